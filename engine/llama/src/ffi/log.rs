//! llama.cpp's log lines become `tracing` events; the latest complaints are kept, since a failed load says why only there.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;

use llama_cpp_sys_2 as sys;

/// Complaints kept for the next error message.
const MAX_COMPLAINTS: usize = 8;
/// Bytes of one line that are kept; names in a hostile file may be long.
const MAX_LINE: usize = 300;

static COMPLAINTS: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

pub(super) fn install() {
    // SAFETY: the callback has the signature that the library asks for, uses no user data and lives for ever.
    unsafe { sys::llama_log_set(Some(on_line), std::ptr::null_mut()) }
}

/// Takes the complaints since the last call, oldest first.
pub(super) fn take_complaints() -> Vec<String> {
    COMPLAINTS.lock().map(|mut kept| kept.drain(..).collect()).unwrap_or_default()
}

unsafe extern "C" fn on_line(level: sys::ggml_log_level, text: *const c_char, _user: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: the library passes a string ended by NUL that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let line: String = text.trim().chars().filter(|c| !c.is_control()).take(MAX_LINE).collect();
    if line.is_empty() || line.chars().all(|c| c == '.') {
        return;
    }
    match level {
        sys::GGML_LOG_LEVEL_ERROR => {
            tracing::warn!(target: "llama", "{line}");
            if let Ok(mut kept) = COMPLAINTS.lock() {
                kept.push_back(line);
                if kept.len() > MAX_COMPLAINTS {
                    kept.pop_front();
                }
            }
        }
        sys::GGML_LOG_LEVEL_WARN => tracing::debug!(target: "llama", "{line}"),
        _ => tracing::trace!(target: "llama", "{line}"),
    }
}
