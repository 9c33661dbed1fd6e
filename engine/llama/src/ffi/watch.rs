//! The one evaluation callback of a context, and who listens behind it: the capture of a stage's rows, the hook of a trunk, or, in a
//! stage whose experts are elsewhere, both. Decides nothing.

use std::ffi::{CStr, c_void};

use llama_cpp_sys_2 as sys;

use super::capture::Capture;
use super::hook::HookState;

/// What a context's callback leads to. The library holds its address, so it stays where it is.
pub(super) struct Watch {
    pub(super) capture: Option<Capture>,
    pub(super) hook: Option<HookState>,
}

impl Watch {
    /// `None` where nobody listens: then llama.cpp computes without a callback.
    pub(super) fn of(capture: Option<Capture>, hook: Option<HookState>) -> Option<Box<Self>> {
        (capture.is_some() || hook.is_some()).then(|| Box::new(Self { capture, hook }))
    }
}

/// Called for every tensor of the graph: first asked whether it is of interest, then with its data. False ends the graph.
pub(super) unsafe extern "C" fn on_tensor(tensor: *mut sys::ggml_tensor, ask: bool, user: *mut c_void) -> bool {
    // SAFETY: `Context::new` passes a pointer to the watch that the context owns, and only a decode, which holds the context
    // exclusively, leads here; the tensor lives for the call and its name is ended by NUL.
    let (watch, name) = unsafe { (&mut *user.cast::<Watch>(), CStr::from_ptr((*tensor).name.as_ptr())) };
    if let Some(capture) = watch.capture.as_mut().filter(|capture| capture.wants(name)) {
        if !ask {
            capture.take(tensor);
        }
        // The norm and the head are somebody else's: what was asked for is the graph's end.
        return ask;
    }
    match watch.hook.as_mut() {
        Some(hook) => hook.on_tensor(name, tensor, ask),
        None => !ask,
    }
}
