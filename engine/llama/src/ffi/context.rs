//! A context: the KV cache of several sequences, and the thread pool that computes over it.

use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;
use satgrid_engine::port::JobId;

use super::capture::Capture;
use super::hook::{ExpertHook, HookState};
use super::watch::{Watch, on_tensor};
use super::{Handle, Model};

/// How a context is laid out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ContextConfig {
    /// Sequences held at once.
    pub(crate) slots: u32,
    /// Positions of each.
    pub(crate) context: u32,
    /// Most rows in one batch.
    pub(crate) batch: u32,
    /// Most rows of one batch whose logits are wanted; at least `slots`. Memory is taken for so many.
    pub(crate) outputs: u32,
    pub(crate) threads: u32,
    /// One pool of cells for all sequences: any mix of rows is computed at once and in its order, and each row looks past the
    /// cells of all others. Else a pool each: a mixed batch is computed in parts, whose rows come in another order.
    pub(crate) unified: bool,
    /// Let llama.cpp choose flash attention; else never.
    pub(crate) flash: bool,
    /// Take the last layer's rows out and leave the norm and the head uncomputed: a stage of layers.
    pub(crate) capture: bool,
    /// The card that computes the last layer, if one does: the rows that are taken out go straight from it to the host.
    pub(crate) card: Option<Handle>,
    /// Of a model that embeds: one row a sequence, pooled as the model says, and no logits.
    pub(crate) pooled: bool,
}

/// One position to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchRow {
    pub(crate) slot: u32,
    pub(crate) position: u32,
    pub(crate) token: u32,
    /// Its logits are wanted.
    pub(crate) output: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("a batch of {rows} rows is over the limit of {limit}")]
    TooManyRows { rows: usize, limit: usize },
    #[error("no room in the cache for the batch")]
    NoRoom,
    #[error("llama.cpp failed with code {code}")]
    Failed { code: i32 },
    #[error("no logits for row {row}")]
    NoLogits { row: usize },
    #[error("no pooled row for sequence {slot}")]
    NotPooled { slot: u32 },
    #[error("{numbers} numbers are not {rows} rows of {width}")]
    BadHidden { numbers: usize, rows: usize, width: usize },
    #[error("the last layer's rows did not come out")]
    NothingCaptured,
    /// The stages of other machines.
    #[error("{reason}")]
    Ring { reason: String },
    #[error("the experts' rows are missing: {reason}")]
    Experts { reason: String },
}

/// A context and the model that it runs. Used by one thread; may move to it.
pub(crate) struct Context {
    context: NonNull<sys::llama_context>,
    pool: NonNull<sys::ggml_threadpool>,
    model: Arc<Model>,
    vocab: usize,
    width: usize,
    rows: Rows,
    /// Boxed: the library holds its address.
    watch: Option<Box<Watch>>,
}

// SAFETY: a context may be used from any one thread at a time; `Context` is not `Sync` and every call takes `&mut self`
// or reads memory that only such calls change.
unsafe impl Send for Context {}

/// The arrays of a batch, kept for reuse. `Vec`s of the batch limit; `pointers` point into `sequence`.
struct Rows {
    token: Vec<i32>,
    position: Vec<i32>,
    sequences: Vec<i32>,
    sequence: Vec<i32>,
    pointers: Vec<*mut i32>,
    output: Vec<i8>,
    /// Rows of the last batch.
    filled: usize,
}

impl Context {
    /// Makes a context; `None` if the library refuses, in practice for want of memory.
    /// A trunk has a hook that finds its experts' rows.
    pub(crate) fn new(model: Arc<Model>, config: &ContextConfig, hook: Option<Box<dyn ExpertHook>>) -> Option<Self> {
        let threads = i32::try_from(config.threads).ok()?.max(1);
        let capture = match config.capture {
            true => {
                let rows = usize::try_from(model.width()).ok()?.checked_mul(usize::try_from(config.batch).ok()?)?;
                Some(Capture::of_layer(model.layers().checked_sub(1)?, config.card, rows))
            }
            false => None,
        };
        let mut watch = Watch::of(capture, hook.map(HookState::new));
        // SAFETY: the parameters come from the library's own defaults and are passed by value; the model outlives the context,
        // which holds an `Arc` of it; so does the watch, which is boxed beside it and only touched between calls.
        let context = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = config.slots.checked_mul(config.context)?;
            params.n_seq_max = config.slots;
            params.n_batch = config.batch;
            params.n_ubatch = config.batch;
            params.n_outputs_max = config.outputs.max(config.slots);
            params.n_threads = threads;
            params.n_threads_batch = threads;
            params.kv_unified = config.unified;
            // The full cache for windowed layers: a session's prefix can be cut back at any position.
            params.swa_full = true;
            params.flash_attn_type =
                if config.flash { sys::LLAMA_FLASH_ATTN_TYPE_AUTO } else { sys::LLAMA_FLASH_ATTN_TYPE_DISABLED };
            params.no_perf = true;
            params.embeddings = config.pooled;
            if let Some(watch) = watch.as_deref_mut() {
                params.cb_eval = Some(on_tensor);
                params.cb_eval_user_data = std::ptr::from_mut(watch).cast();
            }
            sys::llama_init_from_model(model.as_ptr(), params)
        };
        let context = NonNull::new(context)?;
        // A pool of our own, since the library else starts and joins its threads for every batch. Between batches they sleep
        // (poll 0); within one they spin at barriers only.
        // SAFETY: the parameters are made by the library for this number of threads; the pool is freed in `drop` after the
        // context that uses it.
        let pool = unsafe {
            let mut params = sys::ggml_threadpool_params_default(threads);
            params.poll = 0;
            super::pool::new(&raw mut params)
        };
        let Some(pool) = NonNull::new(pool) else {
            // SAFETY: the context was just made and nothing else refers to it.
            unsafe { sys::llama_free(context.as_ptr()) };
            return None;
        };
        // SAFETY: both are valid; the context keeps the pointer until it is freed, before the pool.
        unsafe { sys::llama_attach_threadpool(context.as_ptr(), pool.as_ptr(), pool.as_ptr()) };
        let vocab = usize::try_from(model.vocab_size()).ok()?;
        let width = usize::try_from(model.width()).ok()?;
        let rows = Rows::new(usize::try_from(config.batch).ok()?);
        Some(Self { context, pool, model, vocab, width, rows, watch })
    }

    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Positions that each sequence can hold: what was asked, rounded up by the library.
    pub(crate) fn positions_per_slot(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { sys::llama_n_ctx_seq(self.context.as_ptr()) }
    }

    fn hook(&mut self) -> Option<&mut HookState> {
        self.watch.as_deref_mut().and_then(|watch| watch.hook.as_mut())
    }

    /// Of a trunk: the slot's rows are this job's from now on.
    pub(crate) fn seated(&mut self, slot: u32, job: JobId) {
        if let Some(hook) = self.hook() {
            hook.seated(slot, job);
        }
    }

    /// Computes with this many threads from the next batch on; no more than the context was made with.
    pub(crate) fn set_threads(&mut self, threads: u32) {
        let threads = i32::try_from(threads).unwrap_or(1);
        // SAFETY: the context is valid; the pool has at least as many threads, and the library takes fewer if not.
        unsafe { sys::llama_set_n_threads(self.context.as_ptr(), threads, threads) }
    }

    /// Computes the rows. On an error the cache may hold some of them: the caller cuts the sequences back.
    pub(crate) fn decode(&mut self, rows: &[BatchRow]) -> Result<(), DecodeError> {
        self.run(rows, None)
    }

    /// As [`Context::decode`], over hidden rows instead of tokens, in the order of `rows`.
    pub(crate) fn decode_hidden(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<(), DecodeError> {
        let width = self.width;
        if rows.len().checked_mul(width) != Some(hidden.len()) {
            return Err(DecodeError::BadHidden { numbers: hidden.len(), rows: rows.len(), width });
        }
        self.run(rows, Some(hidden))
    }

    /// The last layer's rows of the last batch, in its order. Of a context made to capture.
    pub(crate) fn captured(&mut self) -> Result<&[f32], DecodeError> {
        let rows = self.rows.filled;
        let capture = self.watch.as_deref().and_then(|watch| watch.capture.as_ref());
        let capture = capture.ok_or(DecodeError::NothingCaptured)?;
        let numbers = capture.numbers();
        if rows == 0 || numbers.len() != rows * self.width {
            return Err(DecodeError::NothingCaptured);
        }
        Ok(numbers)
    }

    fn run(&mut self, rows: &[BatchRow], hidden: Option<&[f32]>) -> Result<(), DecodeError> {
        self.rows.fill(rows)?;
        if let Some(watch) = self.watch.as_deref_mut() {
            watch.hook.iter_mut().for_each(|hook| hook.begin(rows));
            watch.capture.iter_mut().for_each(Capture::clear);
        }
        // One of the two is null: tokens or rows. The library reads them only.
        let embd = hidden.map_or(std::ptr::null_mut(), |hidden| hidden.as_ptr().cast_mut());
        let token = if hidden.is_some() { std::ptr::null_mut() } else { self.rows.token.as_mut_ptr() };
        let batch = sys::llama_batch {
            n_tokens: i32::try_from(rows.len()).unwrap_or(0),
            token,
            embd,
            pos: self.rows.position.as_mut_ptr(),
            n_seq_id: self.rows.sequences.as_mut_ptr(),
            seq_id: self.rows.pointers.as_mut_ptr(),
            logits: self.rows.output.as_mut_ptr(),
        };
        // SAFETY: every array of the batch has at least `n_tokens` elements (of hidden rows: times the width, as `decode_hidden`
        // checked) and lives during the call; each entry of
        // `seq_id` points at one sequence id, as `n_seq_id` says. The library checks the ids against its limits.
        let code = unsafe { sys::llama_decode(self.context.as_ptr(), batch) };
        if let Some(reason) = self.hook().and_then(HookState::take_failure) {
            return Err(DecodeError::Experts { reason });
        }
        match code {
            0 => {
                // SAFETY: the context is valid.
                unsafe { sys::llama_synchronize(self.context.as_ptr()) };
                Ok(())
            }
            1 => Err(DecodeError::NoRoom),
            code => Err(DecodeError::Failed { code }),
        }
    }

    /// The logits of a row of the last batch that asked for them, one per token id.
    pub(crate) fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        if self.rows.output.get(row) != Some(&1) {
            return Err(DecodeError::NoLogits { row });
        }
        let index = i32::try_from(row).map_err(|_| DecodeError::NoLogits { row })?;
        // SAFETY: the row was in the last batch and asked for output; the answer is null or points at `vocab` floats that stay
        // until the next call on the context, which the borrow of `self` forbids.
        unsafe {
            let logits = sys::llama_get_logits_ith(self.context.as_ptr(), index);
            if logits.is_null() {
                return Err(DecodeError::NoLogits { row });
            }
            Ok(std::slice::from_raw_parts(logits, self.vocab))
        }
    }

    /// The pooled row of a sequence that the last batch held, as wide as the model says. Of a context made to pool.
    pub(crate) fn pooled(&mut self, slot: u32) -> Result<&[f32], DecodeError> {
        let none = DecodeError::NotPooled { slot };
        let (Ok(sequence), Ok(width)) = (i32::try_from(slot), usize::try_from(self.model.pooled_width())) else {
            return Err(none);
        };
        // SAFETY: the context is valid and computes nothing now; the answer is null or points at one row of the model's output
        // width, kept until the next call on the context, which the borrow of `self` forbids.
        unsafe {
            let row = sys::llama_get_embeddings_seq(self.context.as_ptr(), sequence);
            if row.is_null() { Err(none) } else { Ok(std::slice::from_raw_parts(row, width)) }
        }
    }

    /// Drops what a sequence holds at `from` and beyond. False if this memory cannot be cut there (a recurrent model): then
    /// nothing changed, and only `from = 0` is possible.
    pub(crate) fn truncate(&mut self, slot: u32, from: u32) -> bool {
        let (Ok(slot), Ok(from)) = (i32::try_from(slot), i32::try_from(from)) else { return false };
        // SAFETY: the context is valid and slots are below `n_seq_max`; a negative end means "to the end".
        unsafe { sys::llama_memory_seq_rm(sys::llama_get_memory(self.context.as_ptr()), slot, from, -1) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `self` owns both; the context, which uses the pool, goes first.
        unsafe {
            sys::llama_free(self.context.as_ptr());
            super::pool::free(self.pool.as_ptr());
        }
    }
}

impl Rows {
    fn new(limit: usize) -> Self {
        let zeros = || vec![0; limit];
        let pointers = vec![std::ptr::null_mut(); limit];
        let (token, position, sequence) = (zeros(), zeros(), zeros());
        Self { token, position, sequences: vec![1; limit], sequence, pointers, output: vec![0; limit], filled: 0 }
    }

    fn fill(&mut self, rows: &[BatchRow]) -> Result<(), DecodeError> {
        let limit = self.token.len();
        if rows.is_empty() || rows.len() > limit {
            return Err(DecodeError::TooManyRows { rows: rows.len(), limit });
        }
        self.output.fill(0);
        self.filled = rows.len();
        for (i, row) in rows.iter().enumerate() {
            let signed = |value: u32| i32::try_from(value).map_err(|_| DecodeError::Failed { code: -1 });
            self.token[i] = signed(row.token)?;
            self.position[i] = signed(row.position)?;
            self.sequence[i] = signed(row.slot)?;
            self.output[i] = i8::from(row.output);
        }
        let ids = self.sequence.as_mut_ptr();
        for (i, pointer) in self.pointers.iter_mut().enumerate() {
            *pointer = ids.wrapping_add(i);
        }
        Ok(())
    }
}
