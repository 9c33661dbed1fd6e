//! llama.cpp's thread pool. It is a part of the processor's backend: linked in, or, where backends are loaded at run time,
//! asked for by name.

use llama_cpp_sys_2 as sys;

/// A pool with these parameters; null if there is none to be had.
///
/// # Safety
/// `params` points at parameters that the library made.
#[cfg(not(feature = "gpu"))]
pub(super) unsafe fn new(params: *mut sys::ggml_threadpool_params) -> *mut sys::ggml_threadpool {
    // SAFETY: as the caller vouches.
    unsafe { sys::ggml_threadpool_new(params) }
}

/// # Safety
/// `pool` came from [`new`] and nothing uses it any more.
#[cfg(not(feature = "gpu"))]
pub(super) unsafe fn free(pool: *mut sys::ggml_threadpool) {
    // SAFETY: as the caller vouches.
    unsafe { sys::ggml_threadpool_free(pool) }
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(feature = "gpu")]
pub(super) unsafe fn new(params: *mut sys::ggml_threadpool_params) -> *mut sys::ggml_threadpool {
    type New = unsafe extern "C" fn(*mut sys::ggml_threadpool_params) -> *mut sys::ggml_threadpool;
    let Some(address) = named(c"ggml_threadpool_new") else { return std::ptr::null_mut() };
    // SAFETY: the library vouches for the function's type by its name; the parameters are as the caller vouches.
    unsafe { std::mem::transmute::<*mut std::ffi::c_void, New>(address)(params) }
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(feature = "gpu")]
pub(super) unsafe fn free(pool: *mut sys::ggml_threadpool) {
    type Free = unsafe extern "C" fn(*mut sys::ggml_threadpool);
    let Some(address) = named(c"ggml_threadpool_free") else { return };
    // SAFETY: as above.
    unsafe { std::mem::transmute::<*mut std::ffi::c_void, Free>(address)(pool) }
}

/// A function of the processor's backend.
#[cfg(feature = "gpu")]
fn named(name: &std::ffi::CStr) -> Option<*mut std::ffi::c_void> {
    // SAFETY: the backends are loaded by now and stay; the name is ended by NUL; null answers are looked for.
    let address = unsafe {
        let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        if device.is_null() {
            return None;
        }
        sys::ggml_backend_reg_get_proc_address(sys::ggml_backend_dev_backend_reg(device), name.as_ptr())
    };
    (!address.is_null()).then_some(address)
}
