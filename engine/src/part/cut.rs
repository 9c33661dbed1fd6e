//! Cutting: what goes into a part, and writing it.

use std::io::{self, Read, Seek, SeekFrom, Write};

use satgrid_types::LayerRange;

use super::admit::{Refused, admit, layer_of};
use super::{
    KEY_ADDED, KEY_END, KEY_HASHES, KEY_KINDS, KEY_LAYERS, KEY_NAMES, KEY_RANKS, KEY_SHAPES, KEY_START, KEY_VERSION,
    NO_VOCAB, VERSION, WHOLE,
};
use crate::experts::family::{self, MoeShape};
use crate::experts::manifest::{MANIFEST_KEY, Manifest};
use crate::experts::trunk::{stand_in, stand_in_width};
use crate::gguf::{Array, Gguf, GgufWriter, Tensor, TensorType, Value, WriteError};
use crate::root::ModelRoot;

/// Why no part was written.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("layers {range} are not in a model of {layers} layers")]
    OutOfRange { range: LayerRange, layers: u32 },
    #[error("its experts stay where they are: {0}")]
    Experts(#[from] family::Refused),
    #[error("the last layer is its lead's, with its experts: only stages before it are cut without")]
    TailWithoutExperts,
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A part to be written: everything but the tensors' data.
#[derive(Debug, Clone)]
pub struct Cut<'a> {
    whole: &'a Gguf,
    writer: GgufWriter,
    contents: Vec<Content>,
}

/// A tensor of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) name: String,
    pub(super) kind: TensorType,
    pub(super) shape: Vec<u64>,
    /// The whole model's tensor, by its index; none for zeros.
    pub(super) from: Option<usize>,
}

/// Metadata of a part, the keys among them that the whole model has not, and the whole model's values that were replaced or
/// left out.
pub(super) struct Changed {
    pub(super) metadata: Vec<(String, Value)>,
    pub(super) added: Vec<String>,
    pub(super) replaced: Vec<(String, Value)>,
}

impl<'a> Cut<'a> {
    /// Plans the part of `range`. `root` is of the same file.
    pub fn new(whole: &'a Gguf, root: &ModelRoot, range: LayerRange) -> Result<Self, CutError> {
        Self::plan(whole, root, range, None)
    }

    /// Plans the trunk of `range`: the layers without their experts.
    pub fn trunk(whole: &'a Gguf, root: &ModelRoot, range: LayerRange) -> Result<Self, CutError> {
        let manifest = Manifest::of_model(whole, root)?;
        if range.end() == manifest.layers {
            return Err(CutError::TailWithoutExperts);
        }
        Self::plan(whole, root, range, Some(&manifest))
    }

    fn plan(
        whole: &'a Gguf,
        root: &ModelRoot,
        range: LayerRange,
        elsewhere: Option<&Manifest>,
    ) -> Result<Self, CutError> {
        let layers = admit(whole)?;
        if range.end() > layers {
            return Err(CutError::OutOfRange { range, layers });
        }
        let experts = elsewhere.map(Manifest::shape).transpose()?;
        let changed = metadata(whole, range, layers, experts.as_ref());
        let writer =
            changed.metadata.into_iter().fold(GgufWriter::new(), |writer, (key, value)| writer.set(key, value));
        let writer = changed.replaced.into_iter().fold(writer, |w, (key, value)| w.set(format!("{WHOLE}{key}"), value));
        let writer = manifest(writer, whole, root, range, layers, &changed.added);
        let writer = match elsewhere {
            Some(experts) => writer.set(MANIFEST_KEY, experts.to_value()),
            None => writer,
        };
        let contents = contents(whole, range, layers, experts.as_ref());
        let add = |writer: GgufWriter, part: &Content| writer.tensor(part.name.clone(), part.kind, &part.shape);
        let writer = contents.iter().try_fold(writer, add)?;
        Ok(Self { whole, writer, contents })
    }

    /// Bytes of the part's tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.writer.tensors().iter().fold(0, |sum, tensor| tensor.bytes.saturating_add(sum))
    }

    /// Writes the part; `reader` gives the whole model's file. `progress` hears of every chunk's bytes.
    pub fn write<R: Read + Seek, W: Write>(
        &self,
        reader: &mut R,
        out: &mut W,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), CutError> {
        let mut contents = self.contents.iter();
        self.writer.write_streamed(out, |tensor, out| {
            let from = contents.next().and_then(|content| content.from).and_then(|at| self.whole.tensors.get(at));
            let mut source: Box<dyn Read + '_> = match from {
                Some(from) => {
                    reader.seek(SeekFrom::Start(self.whole.position(from)))?;
                    Box::new(&mut *reader)
                }
                None => Box::new(io::repeat(0)),
            };
            let mut left = tensor.bytes;
            let mut chunk = vec![0; 1 << 20];
            while left > 0 {
                let want = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
                source.read_exact(&mut chunk[..want])?;
                out.write_all(&chunk[..want])?;
                left -= want as u64;
                progress(want as u64);
            }
            Ok(())
        })?;
        Ok(())
    }
}

/// The metadata of a part of `whole`, without our own keys. `elsewhere`: its experts are not in it.
pub(super) fn metadata(whole: &Gguf, range: LayerRange, layers: u32, elsewhere: Option<&MoeShape>) -> Changed {
    let architecture = whole.architecture().unwrap_or_default();
    let prefix = format!("{architecture}.");
    let tail = range.end() == layers;
    let window = format!("{prefix}attention.sliding_window_pattern");
    let vocab = format!("{prefix}vocab_size");
    let width = elsewhere.map(MoeShape::width_key);
    let mut changed = Changed { metadata: Vec::new(), added: Vec::new(), replaced: Vec::new() };
    for (key, value) in &whole.metadata {
        // The writer sets its own alignment; only a tail has a vocabulary.
        if key == "general.alignment" || (!tail && key.starts_with("tokenizer.")) {
            continue;
        }
        let own = key.starts_with(&prefix);
        let new = if *key == format!("{prefix}block_count") {
            Value::U32(range.layers())
        } else if *key == vocab && !tail {
            Value::U32(NO_VOCAB)
        } else if width.as_ref() == Some(key) {
            stand_in_width(Some(value))
        } else if let (true, Some(windowed)) = (*key == window, windows(whole, &prefix, range)) {
            Value::Array(Array::Bool(windowed))
        } else if own && !key.contains("rope.dimension_sections") {
            sliced(value, range, layers).unwrap_or_else(|| value.clone())
        } else {
            value.clone()
        };
        if new != *value {
            changed.replaced.push((key.clone(), value.clone()));
        }
        changed.metadata.push((key.clone(), new));
    }
    let mut add = |key: String, value: Value| {
        if !changed.metadata.iter().any(|(known, _)| *known == key) {
            changed.added.push(key.clone());
            changed.metadata.push((key, value));
        }
    };
    if let Some(width) = width {
        add(width, stand_in_width(None));
    }
    let windowed = windows(whole, &prefix, range);
    if let Some(windowed) = &windowed {
        add(window.clone(), Value::Array(Array::Bool(windowed.clone())));
    }
    if !tail {
        add(vocab, Value::U32(NO_VOCAB));
        add("tokenizer.ggml.model".to_owned(), Value::string("no_vocab"));
    }
    // llama.cpp ends the process over a file that names a window which none of its layers has.
    if windowed.is_some_and(|windowed| !windowed.contains(&true)) {
        let of_windows = [format!("{prefix}attention.sliding_window"), window];
        changed.metadata.retain(|(key, _)| !of_windows.contains(key));
        changed.added.retain(|key| !of_windows.contains(key));
        changed.replaced.retain(|(key, _)| !of_windows.contains(key));
        let removed = whole.metadata.iter().filter(|(key, _)| of_windows.contains(key));
        changed.replaced.extend(removed.cloned());
    }
    changed
}

/// Which of the layers have a window; `None` for models without windows.
fn windows(whole: &Gguf, prefix: &str, range: LayerRange) -> Option<Vec<bool>> {
    if prefix != "gemma3." || whole.arch_uint("attention.sliding_window").unwrap_or(0) == 0 {
        return None;
    }
    let value = whole.get(&format!("{prefix}attention.sliding_window_pattern"));
    if let Some(Array::Bool(all)) = value.and_then(Value::as_array) {
        return all.get(range.start() as usize..range.end() as usize).map(<[bool]>::to_vec);
    }
    // 6 is llama.cpp's own default for this architecture.
    let n = value.and_then(Value::as_uint).unwrap_or(6);
    let windowed = |layer: u32| n == 0 || u64::from(layer) % n < n - 1;
    Some((range.start()..range.end()).map(windowed).collect())
}

/// An array with one item for each layer, cut to the range; `None` for anything else.
fn sliced(value: &Value, range: LayerRange, layers: u32) -> Option<Value> {
    let array = value.as_array().filter(|array| array.len() == layers as usize)?;
    let (from, upto) = (range.start() as usize, range.end() as usize);
    Some(Value::Array(match array {
        Array::U8(items) => Array::U8(items.get(from..upto)?.to_vec()),
        Array::I8(items) => Array::I8(items.get(from..upto)?.to_vec()),
        Array::U16(items) => Array::U16(items.get(from..upto)?.to_vec()),
        Array::I16(items) => Array::I16(items.get(from..upto)?.to_vec()),
        Array::U32(items) => Array::U32(items.get(from..upto)?.to_vec()),
        Array::I32(items) => Array::I32(items.get(from..upto)?.to_vec()),
        Array::F32(items) => Array::F32(items.get(from..upto)?.to_vec()),
        Array::Bool(items) => Array::Bool(items.get(from..upto)?.to_vec()),
        Array::Str(items) => Array::Str(items.get(from..upto)?.to_vec()),
        Array::U64(items) => Array::U64(items.get(from..upto)?.to_vec()),
        Array::I64(items) => Array::I64(items.get(from..upto)?.to_vec()),
        Array::F64(items) => Array::F64(items.get(from..upto)?.to_vec()),
    }))
}

/// Architectures of which llama.cpp loads nothing without a head: a stage has zeros there, which are never looked at either.
const WANT_HEAD: [&str; 2] = ["qwen2moe", "olmoe"];

/// The tensors of a part, in the whole model's order. `elsewhere`: zeros in place of its experts.
pub(super) fn contents(whole: &Gguf, range: LayerRange, layers: u32, elsewhere: Option<&MoeShape>) -> Vec<Content> {
    let tail = range.end() == layers;
    let wants_head = whole.architecture().is_some_and(|architecture| WANT_HEAD.contains(&architecture));
    let of = |(at, tensor): (usize, &Tensor)| {
        let same = |name: String| Content { name, kind: tensor.kind, shape: tensor.shape.clone(), from: Some(at) };
        match layer_of(&tensor.name) {
            Some((layer, rest)) if (range.start()..range.end()).contains(&layer) => {
                let name = format!("blk.{}.{rest}", layer - range.start());
                Some(match elsewhere.and_then(|shape| stand_in(shape, tensor)) {
                    Some((kind, shape)) => Content { name, kind, shape: shape.to_vec(), from: None },
                    None => same(name),
                })
            }
            Some(_) => None,
            None if tail => Some(same(tensor.name.clone())),
            None => match tensor.name.as_str() {
                "output.weight" if !wants_head => None,
                "token_embd.weight" | "output.weight" => {
                    let shape = vec![tensor.shape.first().copied().unwrap_or(0), u64::from(NO_VOCAB)];
                    Some(Content { name: tensor.name.clone(), kind: TensorType::F32, shape, from: None })
                }
                _ => Some(same(tensor.name.clone())),
            },
        }
    };
    whole.tensors.iter().enumerate().filter_map(of).collect()
}

fn manifest(
    writer: GgufWriter,
    whole: &Gguf,
    root: &ModelRoot,
    range: LayerRange,
    layers: u32,
    added: &[String],
) -> GgufWriter {
    let bytes = |text: &String| text.clone().into_bytes();
    let tensors: Vec<&Tensor> = root.tensors.iter().filter_map(|(name, _)| whole.tensor(name)).collect();
    writer
        .set(KEY_VERSION, Value::U32(VERSION))
        .set(KEY_START, Value::U32(range.start()))
        .set(KEY_END, Value::U32(range.end()))
        .set(KEY_LAYERS, Value::U32(layers))
        .set(KEY_ADDED, Value::Array(Array::Str(added.iter().map(bytes).collect())))
        .set(KEY_NAMES, Value::Array(Array::Str(root.tensors.iter().map(|(name, _)| bytes(name)).collect())))
        .set(KEY_KINDS, Value::Array(Array::U32(tensors.iter().map(|tensor| tensor.kind.id).collect())))
        .set(KEY_RANKS, Value::Array(Array::U8(tensors.iter().map(|tensor| tensor.shape.len() as u8).collect())))
        .set(KEY_SHAPES, Value::Array(Array::U64(tensors.iter().flat_map(|tensor| tensor.shape.clone()).collect())))
        .set(KEY_HASHES, Value::Array(Array::U8(root.tensors.iter().flat_map(|(_, hash)| *hash).collect())))
}
