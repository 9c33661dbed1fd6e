//! The evaluation callback of a trunk: at each expert layer it hands over what the router chose, and puts the experts'
//! rows where the zeros' product was.
//!
//! llama.cpp names the tensors that it computes. Three are of interest: `ffn_norm-i`, the rows that go into the experts;
//! `ffn_moe_topk-i`, the chosen experts, a view with a stride; and `ffn_moe_down-i`, the experts' output, which is overwritten.
//! Weighting and summing come after it, in the trunk.

use std::ffi::CStr;

use llama_cpp_sys_2 as sys;
use satgrid_engine::port::JobId;

use super::BatchRow;

/// Who finds the experts' rows.
pub(crate) trait ExpertHook: Send {
    /// A batch begins: the slot of each of its rows, and whether it is drawn from.
    fn begin(&mut self, _rows: &[BatchRow]) {}
    /// The rows of a slot are this job's from now on.
    fn seated(&mut self, _slot: u32, _job: JobId) {}
    /// The router chose: `used` experts for each of `rows`. Asks for their rows; need not wait for them.
    fn chosen(&mut self, layer: u32, used: u32, ids: Vec<u32>, rows: Vec<f32>) -> Result<(), String>;
    /// The rows for what was chosen last, one for each (row, slot).
    fn outputs(&mut self) -> Result<Vec<f32>, String>;
}

/// What the callback keeps between its calls.
pub(super) struct HookState {
    hook: Box<dyn ExpertHook>,
    /// The last layer's rows, as they go into its experts.
    rows: Vec<f32>,
    failure: Option<String>,
}

/// The tensors of interest.
enum Seen {
    Rows,
    Chosen,
    Outputs,
}

impl HookState {
    pub(super) fn new(hook: Box<dyn ExpertHook>) -> Self {
        Self { hook, rows: Vec::new(), failure: None }
    }

    pub(super) fn begin(&mut self, rows: &[BatchRow]) {
        self.hook.begin(rows);
    }

    pub(super) fn seated(&mut self, slot: u32, job: JobId) {
        self.hook.seated(slot, job);
    }

    /// Why the last batch was broken off.
    pub(super) fn take_failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// Whether a tensor is of interest, when asked; else takes what it is of interest for. False then ends the graph.
    pub(super) fn on_tensor(&mut self, name: &CStr, tensor: *mut sys::ggml_tensor, ask: bool) -> bool {
        let Some((seen, layer)) = name.to_str().ok().and_then(parse) else { return !ask };
        if ask {
            return true;
        }
        // A batch that was broken off may have further graphs.
        if self.failure.is_some() {
            return false;
        }
        let seen = self.see(&seen, layer, tensor);
        self.failure = seen.err();
        self.failure.is_none()
    }

    fn see(&mut self, seen: &Seen, layer: u32, tensor: *mut sys::ggml_tensor) -> Result<(), String> {
        // SAFETY: the library passes a tensor that it has computed and that lives for the call.
        let shape = unsafe { (*tensor).ne };
        let length = |n: i64| usize::try_from(n).unwrap_or(0);
        let (inner, outer) = (length(shape[0]), length(shape[1]));
        // The last layer computes only rows that are drawn from, so none for a piece of a prompt that goes on.
        if shape.contains(&0) {
            return Ok(());
        }
        match seen {
            Seen::Rows => {
                self.rows.resize(inner * outer, 0.0);
                self.expect(tensor, sys::GGML_TYPE_F32, inner * outer)?;
                // SAFETY: contiguous numbers of this type and count were just checked; the buffer has as many.
                unsafe {
                    sys::ggml_backend_tensor_get(tensor, self.rows.as_mut_ptr().cast(), 0, self.rows.len() * 4);
                }
                Ok(())
            }
            Seen::Chosen => {
                // SAFETY: as above; a view has its own stride.
                let (kind, stride) = unsafe { ((*tensor).type_, (*tensor).nb[1]) };
                if kind != sys::GGML_TYPE_I32 || inner == 0 {
                    return Err("the chosen experts are no integers".into());
                }
                let mut ids = vec![0_i32; inner * outer];
                for (row, ids) in ids.chunks_exact_mut(inner).enumerate() {
                    // SAFETY: row `row` begins at its stride and holds `inner` integers of four bytes.
                    unsafe { sys::ggml_backend_tensor_get(tensor, ids.as_mut_ptr().cast(), row * stride, inner * 4) }
                }
                let ids: Option<Vec<u32>> = ids.into_iter().map(|id| u32::try_from(id).ok()).collect();
                let ids = ids.ok_or("the router chose a negative expert")?;
                let used = u32::try_from(inner).map_err(|_| "too many experts for a row")?;
                self.hook.chosen(layer, used, ids, std::mem::take(&mut self.rows))
            }
            Seen::Outputs => {
                let outputs = self.hook.outputs()?;
                self.expect(tensor, sys::GGML_TYPE_F32, outputs.len())?;
                // SAFETY: contiguous numbers of this type and count were just checked.
                unsafe { sys::ggml_backend_tensor_set(tensor, outputs.as_ptr().cast(), 0, outputs.len() * 4) }
                Ok(())
            }
        }
    }

    fn expect(&self, tensor: *const sys::ggml_tensor, kind: sys::ggml_type, numbers: usize) -> Result<(), String> {
        // SAFETY: the tensor lives for the call; these functions only read it.
        let (found, count, whole) =
            unsafe { ((*tensor).type_, sys::ggml_nelements(tensor), sys::ggml_is_contiguous(tensor)) };
        if found == kind && whole && usize::try_from(count) == Ok(numbers) && numbers > 0 {
            return Ok(());
        }
        Err(format!("llama.cpp's tensor holds {count} numbers of type {found}, {numbers} were expected"))
    }
}

fn parse(name: &str) -> Option<(Seen, u32)> {
    let (base, layer) = name.rsplit_once('-')?;
    let seen = match base {
        "ffn_norm" => Seen::Rows,
        "ffn_moe_topk" => Seen::Chosen,
        "ffn_moe_down" => Seen::Outputs,
        _ => return None,
    };
    Some((seen, layer.parse().ok()?))
}
