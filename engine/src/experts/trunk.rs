//! The trunk: a whole model's file with everything but its routed experts' weights.
//!
//! It is a GGUF of the same architecture. In place of the experts stand zeros of the least width, [`STAND_IN_WIDTH`]: their
//! product costs next to nothing and its result is overwritten. The one changed key of the metadata is kept
//! beside it, so that the trunk proves its metadata and every tensor of its own against the model root.

use std::io::{Read, Seek, Write};

use super::family::MoeShape;
use super::manifest::{MANIFEST_KEY, Manifest, OWN_KEYS, Part, PartError, parts};
use crate::gguf::{Gguf, Tensor, TensorType, Value, WriteError, hash_tensor, read_range};
use crate::root::{holds_experts, metadata_leaf_hash, tensor_leaf_hash};

/// Inner width of the zeros in place of an expert.
pub const STAND_IN_WIDTH: u32 = 2;
/// Numbers of the zeros: two bytes each, and no block to fill.
const STAND_IN: TensorType = TensorType::F16;
/// Holds the value of the width's key in the whole model; absent where the model had none.
const WIDTH_KEY: &str = "satgrid.experts.width";

/// Writes a model's trunk. Reads the model once, a piece at a time.
pub fn write<R: Read + Seek, W: Write>(
    gguf: &Gguf,
    reader: &mut R,
    manifest: &Manifest,
    out: &mut W,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PartError> {
    let shape = MoeShape::admit(gguf)?;
    let key = shape.width_key();
    let original = gguf.get(&key);
    let mut writer = gguf.writer(|name| name != key && !name.starts_with(OWN_KEYS));
    writer = writer.set(key, stand_in_width(original)).set(MANIFEST_KEY, manifest.to_value());
    if let Some(original) = original {
        writer = writer.set(WIDTH_KEY, original.clone());
    }
    for tensor in &gguf.tensors {
        writer = match stand_in(&shape, tensor) {
            Some((kind, narrow)) => writer.tensor(&tensor.name, kind, &narrow)?,
            None => writer.tensor(&tensor.name, tensor.kind, &tensor.shape)?,
        };
    }
    writer.write_pieces(out, |tensor, out| {
        let source = gguf.tensor(&tensor.name).filter(|source| expert_part(&shape, source).is_none());
        match source {
            Some(source) => {
                let mut take = |chunk: &[u8]| {
                    progress(chunk.len() as u64);
                    out.write_all(chunk)
                };
                Ok(read_range(reader, gguf, source, 0..source.bytes, &mut take)?)
            }
            None => zeros(out, tensor.bytes).map_err(|error| PartError::Write(WriteError::Io(error))),
        }
    })
}

/// The type and shape of the zeros in place of a tensor that holds experts; `None` for any other.
pub(crate) fn stand_in(shape: &MoeShape, tensor: &Tensor) -> Option<(TensorType, [u64; 3])> {
    let narrow = MoeShape { n_ff: STAND_IN_WIDTH, ..*shape };
    expert_part(shape, tensor).map(|part| (STAND_IN, part.shape(&narrow)))
}

/// What stands under the width's key in place of the whole model's value, if it has one.
pub(crate) fn stand_in_width(original: Option<&Value>) -> Value {
    MoeShape::width_like(original, STAND_IN_WIDTH)
}

fn expert_part(shape: &MoeShape, tensor: &Tensor) -> Option<Part> {
    if !holds_experts(&tensor.name, &tensor.shape) {
        return None;
    }
    parts(shape.layers).find(|(layer, part)| part.tensor(*layer) == tensor.name).map(|(_, part)| part)
}

fn zeros(out: &mut dyn Write, mut bytes: u64) -> std::io::Result<()> {
    let chunk = [0; 4096];
    while bytes > 0 {
        let now = usize::try_from(bytes).unwrap_or(chunk.len()).min(chunk.len());
        out.write_all(&chunk[..now])?;
        bytes -= now as u64;
    }
    Ok(())
}

/// A trunk that proved itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Trunk {
    pub manifest: Manifest,
    /// The whole model's metadata and tensor table, for its facts. Positions in it mean nothing.
    pub whole: Gguf,
}

impl Trunk {
    /// True for a file that says it is a trunk (or a pack).
    pub fn is_part(gguf: &Gguf) -> bool {
        gguf.get(MANIFEST_KEY).is_some()
    }

    /// Verifies every tensor against the model root that the file names. `progress` hears of every chunk's bytes.
    pub fn open<R: Read + Seek>(gguf: &Gguf, reader: &mut R, progress: &mut dyn FnMut(u64)) -> Result<Self, PartError> {
        let trunk = Self::describe(gguf)?;
        let (shape, root) = (trunk.manifest.shape()?, trunk.manifest.root);
        let leaves = trunk.manifest.leaves().unwrap_or_default();
        for tensor in gguf.tensors.iter().filter(|tensor| expert_part(&shape, tensor).is_none()) {
            let data = hash_tensor(reader, gguf, tensor, progress)?;
            if !leaves[1..].contains(&tensor_leaf_hash(&tensor.name, tensor.kind, &tensor.shape, &data)) {
                return Err(PartError::ForeignTensor { name: tensor.name.clone(), root });
            }
        }
        Ok(trunk)
    }

    /// The trunk by its header alone: manifest and metadata are proved, the tensors' data are not read.
    pub fn describe(gguf: &Gguf) -> Result<Self, PartError> {
        let manifest = Manifest::of_part(gguf)?;
        let (shape, root) = (manifest.shape()?, manifest.root);
        let leaves = manifest.leaves().unwrap_or_default();
        let metadata = whole_metadata(gguf, &shape);
        if leaves.first() != Some(&metadata_leaf_hash(&metadata)) {
            return Err(PartError::ForeignMetadata { root });
        }
        let mut tensors = Vec::new();
        let mut own = 0;
        for tensor in &gguf.tensors {
            let Some(part) = expert_part(&shape, tensor) else {
                own += 1;
                tensors.push(tensor.clone());
                continue;
            };
            let kind = manifest.kind(layer_of(&tensor.name), part).unwrap_or(tensor.kind);
            let shape = part.shape(&shape).to_vec();
            let bytes = kind.size(&shape).unwrap_or(0);
            tensors.push(Tensor { shape, kind, bytes, ..tensor.clone() });
        }
        // Each tensor has a name of its own, so so many that each is proved are all of them.
        let expected = leaves.len().saturating_sub(1 + manifest.expert_tensors());
        if own != expected {
            return Err(PartError::Incomplete { missing: expected.saturating_sub(own) });
        }
        let whole = Gguf { metadata, tensors, ..gguf.clone() };
        Ok(Self { manifest, whole })
    }
}

/// The metadata as the whole model has it.
fn whole_metadata(gguf: &Gguf, shape: &MoeShape) -> Vec<(String, Value)> {
    let key = shape.width_key();
    let kept = gguf.metadata.iter().filter(|(name, _)| *name != key && !name.starts_with(OWN_KEYS));
    let mut metadata: Vec<_> = kept.cloned().collect();
    metadata.extend(gguf.get(WIDTH_KEY).map(|value| (key, value.clone())));
    metadata
}

fn layer_of(name: &str) -> u32 {
    name.split('.').nth(1).and_then(|layer| layer.parse().ok()).unwrap_or(u32::MAX)
}
