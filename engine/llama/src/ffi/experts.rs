//! Experts' weights in memory, and the small graph that evaluates rows through them.

use std::ffi::c_void;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::Handle;

/// Tensors and nodes of one graph: two inputs, four products, and room.
const GRAPH_TENSORS: usize = 16;

/// One tensor to hold: all held experts' gate, up or down of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorPlan {
    /// ggml's type.
    pub(crate) kind: u32,
    pub(crate) inner: u64,
    pub(crate) outer: u64,
    pub(crate) experts: u64,
}

/// Why experts are not in memory, or did not compute.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WeightsError {
    #[error("no memory for the experts")]
    NoMemory,
    #[error("an expert's data does not fit its tensor")]
    Misplaced,
    #[error("ggml failed with status {status}")]
    Failed { status: i32 },
}

/// The weights of one pack. Used by one thread; may move to it.
pub(crate) struct ExpertWeights {
    backend: NonNull<sys::ggml_backend>,
    /// The processor's threads; none where a card computes.
    pool: Option<NonNull<sys::ggml_threadpool>>,
    context: NonNull<sys::ggml_context>,
    buffer: NonNull<sys::ggml_backend_buffer>,
    allocator: NonNull<sys::ggml_gallocr>,
    tensors: Vec<*mut sys::ggml_tensor>,
}

// SAFETY: all pointers are owned by this value and used through `&mut self` only.
unsafe impl Send for ExpertWeights {}

/// Pieces that are made one after another and freed in the other order, whichever of them exist.
struct Parts {
    backend: sys::ggml_backend_t,
    pool: sys::ggml_threadpool_t,
    context: *mut sys::ggml_context,
    buffer: sys::ggml_backend_buffer_t,
    allocator: sys::ggml_gallocr_t,
}

impl Parts {
    /// # Safety
    /// Each pointer is null or owned by the caller, who does not use it again.
    unsafe fn free(self) {
        // SAFETY: each is checked for null; the order is that of use: allocator and buffer before context and backend.
        unsafe {
            if !self.allocator.is_null() {
                sys::ggml_gallocr_free(self.allocator);
            }
            if !self.buffer.is_null() {
                sys::ggml_backend_buffer_free(self.buffer);
            }
            if !self.context.is_null() {
                sys::ggml_free(self.context);
            }
            if !self.backend.is_null() {
                sys::ggml_backend_free(self.backend);
            }
            if !self.pool.is_null() {
                super::pool::free(self.pool);
            }
        }
    }
}

impl ExpertWeights {
    /// Takes the memory for these tensors, on a card or in the host; their data follows by [`ExpertWeights::place`].
    pub(crate) fn new(plans: &[TensorPlan], threads: u32, card: Option<Handle>) -> Result<Self, WeightsError> {
        super::start_backend();
        let threads = i32::try_from(threads).unwrap_or(1).max(1);
        // SAFETY: every call gets parameters that the library made or pointers checked for null before; what was made is freed
        // by `Parts::free` if a later step fails, else owned by `Self`.
        unsafe {
            let mut parts = Parts {
                backend: match card {
                    Some(card) => sys::ggml_backend_dev_init(card.0, std::ptr::null()),
                    None => super::pool::backend(),
                },
                pool: std::ptr::null_mut(),
                context: std::ptr::null_mut(),
                buffer: std::ptr::null_mut(),
                allocator: std::ptr::null_mut(),
            };
            if card.is_none() {
                let mut params = sys::ggml_threadpool_params_default(threads);
                params.poll = 0;
                parts.pool = super::pool::new(&raw mut params);
            }
            parts.context = sys::ggml_init(sys::ggml_init_params {
                mem_size: sys::ggml_tensor_overhead() * (plans.len() + 1),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            });
            let no_threads = card.is_none() && parts.pool.is_null();
            if parts.backend.is_null() || no_threads || parts.context.is_null() {
                parts.free();
                return Err(WeightsError::NoMemory);
            }
            let signed = |n: u64| i64::try_from(n).unwrap_or(0);
            let tensor = |plan: &TensorPlan| {
                let (inner, outer, experts) = (signed(plan.inner), signed(plan.outer), signed(plan.experts));
                sys::ggml_new_tensor_3d(parts.context, plan.kind, inner, outer, experts)
            };
            let tensors: Vec<_> = plans.iter().map(tensor).collect();
            parts.buffer = sys::ggml_backend_alloc_ctx_tensors(parts.context, parts.backend);
            parts.allocator = sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(parts.backend));
            if card.is_none() && !super::pool::attach(parts.backend, parts.pool, threads) {
                parts.free();
                return Err(WeightsError::NoMemory);
            }
            match (
                NonNull::new(parts.backend),
                NonNull::new(parts.context),
                NonNull::new(parts.buffer),
                NonNull::new(parts.allocator),
            ) {
                (Some(backend), Some(context), Some(buffer), Some(allocator)) => {
                    Ok(Self { backend, pool: NonNull::new(parts.pool), context, buffer, allocator, tensors })
                }
                _ => {
                    parts.free();
                    Err(WeightsError::NoMemory)
                }
            }
        }
    }

    /// Puts bytes into a tensor at an offset.
    pub(crate) fn place(&mut self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<(), WeightsError> {
        let tensor = *self.tensors.get(tensor).ok_or(WeightsError::Misplaced)?;
        let offset = usize::try_from(offset).map_err(|_| WeightsError::Misplaced)?;
        // SAFETY: the tensor is ours and has its memory; the range is checked to lie within it.
        unsafe {
            if offset.checked_add(bytes.len()).is_none_or(|end| end > sys::ggml_nbytes(tensor)) {
                return Err(WeightsError::Misplaced);
            }
            sys::ggml_backend_tensor_set(tensor, bytes.as_ptr().cast::<c_void>(), offset, bytes.len());
        }
        Ok(())
    }

    /// Evaluates `down(silu(gate(row)) * up(row))` for each row with its expert, as llama.cpp's own graph does. The tensors
    /// are those of one layer, in this order: gate, up, down. `ids` count within what the tensors hold.
    pub(crate) fn evaluate(
        &mut self,
        [gate, up, down]: [usize; 3],
        rows: &[f32],
        ids: &[i32],
    ) -> Result<Vec<f32>, WeightsError> {
        let tensor = |index: usize| self.tensors.get(index).copied().ok_or(WeightsError::Misplaced);
        let (gate, up, down) = (tensor(gate)?, tensor(up)?, tensor(down)?);
        let count = i64::try_from(ids.len()).map_err(|_| WeightsError::Misplaced)?;
        // SAFETY: the tensors are ours.
        let (width, experts) = unsafe { ((*up).ne[0], (*up).ne[2]) };
        let fits = usize::try_from(width).is_ok_and(|width| width * ids.len() == rows.len()) && count > 0;
        if !fits || ids.iter().any(|id| *id < 0 || i64::from(*id) >= experts) {
            return Err(WeightsError::Misplaced);
        }
        // SAFETY: the context has room for the graph's tensors; inputs and output have the sizes that were just checked; the
        // context is freed before this returns, the allocator keeps the memory for the next graph.
        unsafe {
            let context = sys::ggml_init(sys::ggml_init_params {
                mem_size: sys::ggml_tensor_overhead() * GRAPH_TENSORS + sys::ggml_graph_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            });
            if context.is_null() {
                return Err(WeightsError::NoMemory);
            }
            let input = sys::ggml_new_tensor_3d(context, sys::GGML_TYPE_F32, width, 1, count);
            let chosen = sys::ggml_new_tensor_2d(context, sys::GGML_TYPE_I32, 1, count);
            sys::ggml_set_input(input);
            sys::ggml_set_input(chosen);
            let up = sys::ggml_mul_mat_id(context, up, input, chosen);
            let gate = sys::ggml_mul_mat_id(context, gate, input, chosen);
            let inner = sys::ggml_swiglu_split(context, gate, up);
            let output = sys::ggml_mul_mat_id(context, down, inner, chosen);
            sys::ggml_set_output(output);
            let graph = sys::ggml_new_graph(context);
            sys::ggml_build_forward_expand(graph, output);
            let result = if sys::ggml_gallocr_alloc_graph(self.allocator.as_ptr(), graph) {
                sys::ggml_backend_tensor_set(input, rows.as_ptr().cast(), 0, rows.len() * 4);
                sys::ggml_backend_tensor_set(chosen, ids.as_ptr().cast(), 0, ids.len() * 4);
                match sys::ggml_backend_graph_compute(self.backend.as_ptr(), graph) {
                    sys::GGML_STATUS_SUCCESS => {
                        let mut out = vec![0_f32; rows.len()];
                        sys::ggml_backend_tensor_get(output, out.as_mut_ptr().cast(), 0, out.len() * 4);
                        Ok(out)
                    }
                    status => Err(WeightsError::Failed { status }),
                }
            } else {
                Err(WeightsError::NoMemory)
            };
            sys::ggml_free(context);
            result
        }
    }
}

impl Drop for ExpertWeights {
    fn drop(&mut self) {
        let parts = Parts {
            backend: self.backend.as_ptr(),
            pool: self.pool.map_or(std::ptr::null_mut(), NonNull::as_ptr),
            context: self.context.as_ptr(),
            buffer: self.buffer.as_ptr(),
            allocator: self.allocator.as_ptr(),
        };
        // SAFETY: `self` owns all of them and is gone after this.
        unsafe { parts.free() }
    }
}
