//! llama.cpp behind types that free what they own: [`Model`], [`Context`], one batch at a time, and experts' weights.
//!
//! All `unsafe` of the product is in this folder, and nothing in it decides anything: no scheduling, no sampling, no
//! policy. llama.cpp reports some faults by aborting the process, so this code runs in the engine's child process only
//! (and in benchmarks).

#![allow(unsafe_code)]

mod capture;
mod context;
mod devices;
mod experts;
mod hook;
mod host;
mod log;
mod model;
mod pool;
mod watch;

pub(crate) use capture::to_floats;
pub(crate) use context::{BatchRow, Context, ContextConfig, DecodeError};
pub(crate) use devices::{Handle, devices};
pub(crate) use experts::{ExpertWeights, TensorPlan, WeightsError};
pub(crate) use hook::ExpertHook;
pub(crate) use model::{LoadError, Model, ModelConfig};

use std::sync::Once;

use llama_cpp_sys_2 as sys;

/// Starts llama.cpp's backends once for the process and sends its log to `tracing`.
pub(crate) fn start_backend() {
    static START: Once = Once::new();
    START.call_once(|| {
        log::install();
        #[cfg(feature = "gpu")]
        load_backends();
        // SAFETY: takes no argument and is called once, before any other use of the library. Without the feature the
        // backends are those linked in.
        unsafe { sys::llama_backend_init() }
    });
}

/// Loads every backend that lies beside the executable, and none from anywhere else: `ggml_backend_load_all` would also
/// look in the working directory.
#[cfg(feature = "gpu")]
fn load_backends() {
    let Ok(exe) = std::env::current_exe() else { return };
    let dir = exe.parent().and_then(|dir| dir.to_str()).and_then(|dir| std::ffi::CString::new(dir).ok());
    if let Some(dir) = dir {
        // SAFETY: a string ended by NUL that outlives the call.
        unsafe { sys::ggml_backend_load_all_from_path(dir.as_ptr()) }
    }
}

/// The features that ggml was compiled with and found, as it prints them: `CPU : SSE3 = 1 | AVX2 = 1 | ...`.
pub(crate) fn system_info() -> String {
    start_backend();
    // SAFETY: the library returns a pointer to a static string ended by NUL; it is copied before any other call could
    // change it, since only this function asks for it and does so under a lock.
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = LOCK.lock();
    unsafe { std::ffi::CStr::from_ptr(sys::llama_print_system_info()) }.to_string_lossy().into_owned()
}

/// The version of llama.cpp that is linked in.
pub(crate) fn library_version() -> String {
    // SAFETY: a pointer to a constant string ended by NUL.
    unsafe { std::ffi::CStr::from_ptr(sys::llama_version()) }.to_string_lossy().into_owned()
}
