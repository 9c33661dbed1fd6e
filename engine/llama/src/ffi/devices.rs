//! The devices that this process can compute on: the processor, and whatever backends were found beside the executable.

use std::ffi::{CStr, c_char};

use llama_cpp_sys_2 as sys;

use crate::devices::{Device, DeviceKind};

/// A device as the library names it; valid for the life of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handle(pub(super) sys::ggml_backend_dev_t);

/// All devices, in the library's order.
pub(crate) fn devices() -> Vec<(Handle, Device)> {
    super::start_backend();
    // SAFETY: takes nothing; the backends are loaded.
    let count = unsafe { sys::ggml_backend_dev_count() };
    (0..count).filter_map(device).collect()
}

fn device(index: usize) -> Option<(Handle, Device)> {
    // SAFETY: the index is below the count, devices are never removed, and every string that the library returns is
    // ended by NUL and lives as long as the process; `memory` writes to two live integers.
    unsafe {
        let handle = sys::ggml_backend_dev_get(index);
        if handle.is_null() {
            return None;
        }
        let (mut free, mut total) = (0_usize, 0_usize);
        sys::ggml_backend_dev_memory(handle, &raw mut free, &raw mut total);
        let backend = sys::ggml_backend_dev_backend_reg(handle);
        let backend = if backend.is_null() { String::new() } else { text(sys::ggml_backend_reg_name(backend)) };
        let kind = match sys::ggml_backend_dev_type(handle) {
            sys::GGML_BACKEND_DEVICE_TYPE_GPU => DeviceKind::Gpu,
            sys::GGML_BACKEND_DEVICE_TYPE_IGPU => DeviceKind::Integrated,
            sys::GGML_BACKEND_DEVICE_TYPE_CPU => DeviceKind::Processor,
            _ => DeviceKind::Accelerator,
        };
        let device = Device {
            name: text(sys::ggml_backend_dev_name(handle)),
            description: text(sys::ggml_backend_dev_description(handle)),
            backend,
            kind,
            free: free as u64,
            total: total as u64,
        };
        Some((Handle(handle), device))
    }
}

/// # Safety
/// `pointer` is null or a string ended by NUL.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: as the caller vouches.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
}
