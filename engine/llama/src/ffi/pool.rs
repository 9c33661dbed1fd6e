//! The processor's backend and its thread pool, asked for by name: linked in or loaded at run time, it is the same to us.

use std::ffi::{CStr, c_int, c_void};

use llama_cpp_sys_2 as sys;

/// A pool with these parameters; null if there is none to be had.
///
/// # Safety
/// `params` points at parameters that the library made.
pub(super) unsafe fn new(params: *mut sys::ggml_threadpool_params) -> *mut sys::ggml_threadpool {
    type New = unsafe extern "C" fn(*mut sys::ggml_threadpool_params) -> *mut sys::ggml_threadpool;
    let Some(address) = named(c"ggml_threadpool_new") else { return std::ptr::null_mut() };
    // SAFETY: the library vouches for the function's type by its name; the parameters are as the caller vouches.
    unsafe { std::mem::transmute::<*mut c_void, New>(address)(params) }
}

/// # Safety
/// `pool` came from [`new`] and nothing uses it any more.
pub(super) unsafe fn free(pool: *mut sys::ggml_threadpool) {
    type Free = unsafe extern "C" fn(*mut sys::ggml_threadpool);
    let Some(address) = named(c"ggml_threadpool_free") else { return };
    // SAFETY: as above.
    unsafe { std::mem::transmute::<*mut c_void, Free>(address)(pool) }
}

/// A backend on the processor; null if there is none to be had.
pub(super) fn backend() -> sys::ggml_backend_t {
    // SAFETY: no parameters is allowed, and a null answer is the caller's to look for.
    unsafe { sys::ggml_backend_init_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU, std::ptr::null()) }
}

/// Has a backend compute on a pool with so many threads. Whether it does now.
///
/// # Safety
/// `backend` came from [`backend`] and `pool` from [`new`]; the pool outlives the backend's work.
pub(super) unsafe fn attach(backend: sys::ggml_backend_t, pool: *mut sys::ggml_threadpool, threads: c_int) -> bool {
    type SetThreads = unsafe extern "C" fn(sys::ggml_backend_t, c_int);
    type SetPool = unsafe extern "C" fn(sys::ggml_backend_t, *mut sys::ggml_threadpool);
    let (set_threads, set_pool) = (named(c"ggml_backend_set_n_threads"), named(c"ggml_backend_cpu_set_threadpool"));
    let (Some(set_threads), Some(set_pool)) = (set_threads, set_pool) else { return false };
    // SAFETY: as above.
    unsafe {
        std::mem::transmute::<*mut c_void, SetThreads>(set_threads)(backend, threads);
        std::mem::transmute::<*mut c_void, SetPool>(set_pool)(backend, pool);
    }
    true
}

/// A function of the processor's backend.
fn named(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the backends are there by now and stay; the name is ended by NUL; null answers are looked for.
    let address = unsafe {
        let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        if device.is_null() {
            return None;
        }
        sys::ggml_backend_reg_get_proc_address(sys::ggml_backend_dev_backend_reg(device), name.as_ptr())
    };
    (!address.is_null()).then_some(address)
}
