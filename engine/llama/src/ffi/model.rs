//! A loaded model, or its vocabulary alone.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

/// Longest piece of one token, in bytes; longer ones are cut off as an error.
const MAX_PIECE: usize = 64 * 1024;

/// How to load a file.
pub(crate) struct ModelConfig<'a> {
    pub(crate) path: &'a Path,
    /// No weights: tokenising and pieces only.
    pub(crate) vocab_only: bool,
    /// Repacked weights: faster, but prefill and decode then round differently.
    pub(crate) repack: bool,
    /// The device that holds the last layers, and how many; else everything is the processor's.
    pub(crate) offload: Option<(super::Handle, u32)>,
}

/// Why a file did not become a model. The reason is llama.cpp's own last word.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("{path}: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a model that this engine can load ({reason})", path = path.display())]
    Refused { path: PathBuf, reason: String },
}

/// A model in memory. Read-only once loaded, so threads may share it.
pub(crate) struct Model {
    model: NonNull<sys::llama_model>,
    vocab: NonNull<sys::llama_vocab>,
}

// SAFETY: after loading, llama.cpp only reads a model and its vocabulary (its own server tokenises on many threads over one
// model); every method here takes `&self` and calls functions whose C signature takes the object as const.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Loads a file; `progress` hears thousandths, about every hundredth.
    pub(crate) fn load(config: &ModelConfig<'_>, mut progress: impl FnMut(u32)) -> Result<Self, LoadError> {
        super::start_backend();
        let path = config.path.to_path_buf();
        // Opened once here, so that a missing file or right is told in the system's words.
        if let Err(source) = std::fs::File::open(&path) {
            return Err(LoadError::Unreadable { path, source });
        }
        let Some(c_path) = path.to_str().and_then(|p| CString::new(p).ok()) else {
            return Err(LoadError::Refused { path, reason: "the path is not UTF-8".into() });
        };
        super::log::take_complaints();
        let mut told = None;
        let mut tell = |fraction: f32| {
            let permille = (fraction.clamp(0.0, 1.0) * 1000.0) as u32;
            if told.is_none_or(|told| permille >= told + 10) {
                told = Some(permille);
                progress(permille);
            }
        };
        let mut callback: &mut dyn FnMut(f32) = &mut tell;
        // Ended by null; without a device the list is empty, so that no card is taken unasked.
        let mut devices = [config.offload.map_or(std::ptr::null_mut(), |(device, _)| device.0), std::ptr::null_mut()];
        // The library counts the output head as one more layer.
        let layers =
            config.offload.map_or(0, |(_, layers)| i32::try_from(layers).map_or(i32::MAX, |n| n.saturating_add(1)));
        // SAFETY: the parameters come from the library's own defaults; the path, the devices and the callback's data outlive
        // the call, which is the only time that the library uses them. The tensor lists are left null, which means none.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.vocab_only = config.vocab_only;
            params.use_extra_bufts = config.repack;
            params.devices = devices.as_mut_ptr();
            params.n_gpu_layers = layers;
            params.split_mode = sys::LLAMA_SPLIT_MODE_NONE;
            params.progress_callback = Some(on_progress);
            params.progress_callback_user_data = (&raw mut callback).cast::<c_void>();
            sys::llama_model_load_from_file(c_path.as_ptr(), params)
        };
        let Some(model) = NonNull::new(model) else {
            let complaints = super::log::take_complaints();
            let told =
                complaints.iter().find(|line| line.contains("error loading model") || line.contains("gguf_init"));
            let reason = told.or(complaints.first()).cloned().unwrap_or_else(|| "no reason given".into());
            return Err(LoadError::Refused { path, reason });
        };
        // SAFETY: the model is valid; the vocabulary is a part of it and lives as long.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        let Some(vocab) = NonNull::new(vocab.cast_mut()) else {
            // SAFETY: the model was just loaded and nothing else refers to it.
            unsafe { sys::llama_model_free(model.as_ptr()) };
            return Err(LoadError::Refused { path, reason: "the file has no vocabulary".into() });
        };
        Ok(Self { model, vocab })
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_model {
        self.model.as_ptr()
    }

    /// Number of token ids.
    pub(crate) fn vocab_size(&self) -> u32 {
        // SAFETY: the vocabulary lives as long as `self`.
        u32::try_from(unsafe { sys::llama_vocab_n_tokens(self.vocab.as_ptr()) }).unwrap_or(0)
    }

    /// Numbers in a hidden row.
    pub(crate) fn width(&self) -> u32 {
        // SAFETY: the model lives as long as `self`.
        u32::try_from(unsafe { sys::llama_model_n_embd(self.model.as_ptr()) }).unwrap_or(0)
    }

    /// Numbers in a pooled row.
    pub(crate) fn pooled_width(&self) -> u32 {
        // SAFETY: the model lives as long as `self`.
        u32::try_from(unsafe { sys::llama_model_n_embd_out(self.model.as_ptr()) }).unwrap_or(0)
    }

    pub(crate) fn layers(&self) -> u32 {
        // SAFETY: as above.
        u32::try_from(unsafe { sys::llama_model_n_layer(self.model.as_ptr()) }).unwrap_or(0)
    }

    /// The longest context that the model was trained for.
    pub(crate) fn trained_context(&self) -> u32 {
        // SAFETY: the model lives as long as `self`.
        u32::try_from(unsafe { sys::llama_model_n_ctx_train(self.model.as_ptr()) }).unwrap_or(0)
    }

    /// True for tokens that end a generation: end of text, of turn, of message.
    pub(crate) fn is_eog(&self, token: u32) -> bool {
        // SAFETY: the id is checked to be in the vocabulary, for which the library asserts.
        self.id(token).is_some_and(|id| unsafe { sys::llama_vocab_is_eog(self.vocab.as_ptr(), id) })
    }

    pub(crate) fn bos(&self) -> Option<u32> {
        // SAFETY: the vocabulary lives as long as `self`; a missing id is -1.
        u32::try_from(unsafe { sys::llama_vocab_bos(self.vocab.as_ptr()) }).ok()
    }

    pub(crate) fn eos(&self) -> Option<u32> {
        // SAFETY: as in `bos`.
        u32::try_from(unsafe { sys::llama_vocab_eos(self.vocab.as_ptr()) }).ok()
    }

    pub(crate) fn adds_bos(&self) -> bool {
        // SAFETY: as in `bos`.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab.as_ptr()) }
    }

    /// False for a model whose file brings no tokenizer (a middle stage, a random model).
    pub(crate) fn has_tokenizer(&self) -> bool {
        // SAFETY: the vocabulary lives as long as `self`.
        unsafe { sys::llama_vocab_type(self.vocab.as_ptr()) != sys::LLAMA_VOCAB_TYPE_NONE }
    }

    /// The chat template in the file, if any.
    pub(crate) fn chat_template(&self) -> Option<String> {
        // SAFETY: a null name asks for the default template; the answer is null or a string that the model owns.
        let template = unsafe { sys::llama_model_chat_template(self.model.as_ptr(), std::ptr::null()) };
        // SAFETY: not null, ended by NUL, owned by the model that `self` keeps alive; copied here.
        (!template.is_null()).then(|| unsafe { CStr::from_ptr(template) }.to_string_lossy().into_owned())
    }

    /// Token ids of a text; `None` where the text cannot be tokenised.
    pub(crate) fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Option<Vec<u32>> {
        if !self.has_tokenizer() {
            return None;
        }
        let length = i32::try_from(text.len()).ok()?;
        let mut ids = vec![0_i32; text.len() / 3 + 16];
        for _ in 0..2 {
            // SAFETY: the text is passed with its length; the buffer with its own. The library writes at most that many ids
            // and answers the negative of what it would need.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab.as_ptr(),
                    text.as_ptr().cast::<c_char>(),
                    length,
                    ids.as_mut_ptr(),
                    i32::try_from(ids.len()).ok()?,
                    add_special,
                    parse_special,
                )
            };
            match usize::try_from(n) {
                Ok(n) => return ids[..n].iter().map(|&id| u32::try_from(id).ok()).collect(),
                Err(_) => ids = vec![0_i32; usize::try_from(n.checked_neg()?).ok()?],
            }
        }
        None
    }

    /// The bytes of one token; control tokens are empty unless `special` asks for their names. `None` outside the vocabulary.
    pub(crate) fn piece(&self, token: u32, special: bool) -> Option<Vec<u8>> {
        let id = self.id(token)?;
        if !self.has_tokenizer() {
            return Some(Vec::new());
        }
        let mut bytes = vec![0_u8; 64];
        for _ in 0..2 {
            // SAFETY: the id is in the vocabulary; the buffer is passed with its length, of which the library uses at most all
            // and answers the negative of what it would need.
            let n = unsafe {
                sys::llama_token_to_piece(
                    self.vocab.as_ptr(),
                    id,
                    bytes.as_mut_ptr().cast::<c_char>(),
                    i32::try_from(bytes.len()).ok()?,
                    0,
                    special,
                )
            };
            match usize::try_from(n) {
                Ok(n) => {
                    bytes.truncate(n);
                    return Some(bytes);
                }
                Err(_) => {
                    let needed = usize::try_from(n.checked_neg()?).ok()?;
                    if needed > MAX_PIECE {
                        return None;
                    }
                    bytes = vec![0_u8; needed];
                }
            }
        }
        None
    }

    /// The id as llama.cpp writes it, if it is in the vocabulary.
    fn id(&self, token: u32) -> Option<sys::llama_token> {
        (token < self.vocab_size()).then(|| i32::try_from(token).ok()).flatten()
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: `self` owns the model; contexts hold an `Arc` of `self`, so none is left.
        unsafe { sys::llama_model_free(self.model.as_ptr()) }
    }
}

unsafe extern "C" fn on_progress(fraction: f32, user: *mut c_void) -> bool {
    // SAFETY: `load` passes a pointer to its own reference to the callback and waits for the load to end.
    let callback = unsafe { &mut *user.cast::<&mut dyn FnMut(f32)>() };
    callback(fraction);
    // False would stop the load.
    true
}
