//! What a trunk or a pack carries to prove which model it is a part of.
//!
//! The manifest holds every leaf of the model root (see [`crate::root`]) and, of each tensor that holds experts, its
//! type, shape and the hash of every expert's part. So one file proves itself: the leaves give the root, each tensor of
//! the file has its leaf among them, and each expert's part has its hash in a table whose own root is such a leaf.

use minicbor::{Decode, Encode};
use satgrid_types::LayerRange;
use sha2::{Digest, Sha256};

use super::family::{FAMILIES, Family, MoeShape, Refused};
use crate::gguf::{Array, Gguf, GgufError, TensorType, Value, WriteError};
use crate::root::{ModelRoot, experts_root, merkle_root, tensor_leaf_hash};

/// The key under which a trunk or pack carries its manifest, as an array of bytes.
pub const MANIFEST_KEY: &str = "satgrid.experts.manifest";
/// Keys of ours begin so; none of them is part of the model.
pub const OWN_KEYS: &str = "satgrid.";
const VERSION: u32 = 1;

/// One of an expert's three matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum Part {
    #[n(0)]
    Gate,
    #[n(1)]
    Up,
    #[n(2)]
    Down,
}

impl Part {
    /// In the order of a manifest and of a pack.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// The tensor that holds this part of all experts of a layer.
    pub fn tensor(self, layer: u32) -> String {
        let part = match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        };
        format!("blk.{layer}.ffn_{part}_exps.weight")
    }

    /// The shape of that tensor, innermost dimension first.
    pub fn shape(self, model: &MoeShape) -> [u64; 3] {
        let (embd, ff, experts) = (u64::from(model.n_embd), u64::from(model.n_ff), u64::from(model.experts));
        match self {
            Self::Gate | Self::Up => [embd, ff, experts],
            Self::Down => [ff, embd, experts],
        }
    }
}

/// A tensor that holds experts: what it is, and the hash of each expert's part.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ExpertTensor {
    #[n(0)]
    kind: u32,
    /// 32 bytes for each expert.
    #[cbor(n(1), with = "minicbor::bytes")]
    hashes: Vec<u8>,
}

/// Which model, and the hashes of all its tensors.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Manifest {
    #[n(0)]
    version: u32,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub root: [u8; 32],
    /// 32 bytes for each leaf of the root.
    #[cbor(n(2), with = "minicbor::bytes")]
    leaves: Vec<u8>,
    #[n(3)]
    architecture: String,
    #[n(4)]
    pub layers: u32,
    #[n(5)]
    pub experts: u32,
    /// Experts for each row.
    #[n(6)]
    pub used: u32,
    #[n(7)]
    pub n_embd: u32,
    #[n(8)]
    pub n_ff: u32,
    /// For each layer gate, up and down.
    #[n(9)]
    tensors: Vec<ExpertTensor>,
}

/// Why a file is no trunk or pack, or not one of the model that it names.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    #[error("{0}")]
    Refused(#[from] Refused),
    #[error("{0}")]
    Gguf(#[from] GgufError),
    #[error("{0}")]
    Write(#[from] WriteError),
    #[error("the file carries no manifest of a split model")]
    NoManifest,
    #[error("the manifest does not parse: {0}")]
    BadManifest(String),
    #[error("the manifest's leaves do not give the model root that it names")]
    WrongRoot,
    #[error("the file's metadata is not that of the model with root {root}", root = short(.root))]
    ForeignMetadata { root: [u8; 32] },
    #[error("tensor {name:?} is not one of the model with root {root}", root = short(.root))]
    ForeignTensor { name: String, root: [u8; 32] },
    #[error("{missing} tensors of the model are not in the file")]
    Incomplete { missing: usize },
    #[error("expert {expert} of layer {layer} is not one of the model with root {root}", root = short(.root))]
    ForeignExpert { layer: u32, expert: u32, root: [u8; 32] },
    #[error("there is no expert {expert} in layer {layer}: the model has {layers} layers of {experts}")]
    NoSuchExpert { layer: u32, expert: u32, layers: u32, experts: u32 },
    #[error("the pack does not hold expert {expert} of layer {layer}")]
    NotHeld { layer: u32, expert: u32 },
    #[error("a pack holds at least one expert")]
    Empty,
}

fn short(root: &[u8; 32]) -> String {
    root.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

impl Manifest {
    /// Of a whole model, whose root was computed from the file.
    pub fn of_model(gguf: &Gguf, root: &ModelRoot) -> Result<Self, Refused> {
        let shape = MoeShape::admit(gguf)?;
        let mut tensors = Vec::new();
        for (layer, part) in parts(shape.layers) {
            let name = part.tensor(layer);
            let missing = || Refused::Missing { name: name.clone() };
            let kind = gguf.tensor(&name).ok_or_else(missing)?.kind.id;
            let hashes = root.experts.get(&name).ok_or_else(missing)?.concat();
            tensors.push(ExpertTensor { kind, hashes });
        }
        Ok(Self {
            version: VERSION,
            root: root.root,
            leaves: root.leaves.concat(),
            architecture: shape.family.architecture.to_owned(),
            layers: shape.layers,
            experts: shape.experts,
            used: shape.used,
            n_embd: shape.n_embd,
            n_ff: shape.n_ff,
            tensors,
        })
    }

    /// Reads and verifies the manifest in a trunk or pack.
    pub fn of_part(gguf: &Gguf) -> Result<Self, PartError> {
        let Some(Array::U8(bytes)) = gguf.get(MANIFEST_KEY).and_then(Value::as_array) else {
            return Err(PartError::NoManifest);
        };
        let manifest: Self = minicbor::decode(bytes).map_err(|error| PartError::BadManifest(error.to_string()))?;
        manifest.verify()?;
        Ok(manifest)
    }

    pub(crate) fn to_value(&self) -> Value {
        // Encoding into memory does not fail.
        Value::Array(Array::U8(minicbor::to_vec(self).unwrap_or_default()))
    }

    /// The leaves give the root, and each table of experts is one of the leaves.
    fn verify(&self) -> Result<(), PartError> {
        let bad = |what: &str| PartError::BadManifest(what.to_owned());
        if self.version != VERSION {
            return Err(bad("of another version"));
        }
        let shape = self.shape()?;
        let leaves = self.leaves().ok_or_else(|| bad("leaves of the wrong length"))?;
        if merkle_root(&leaves) != self.root {
            return Err(PartError::WrongRoot);
        }
        if self.tensors.len() != 3 * self.layers as usize {
            return Err(bad("tables for another number of layers"));
        }
        for ((layer, part), tensor) in parts(self.layers).zip(&self.tensors) {
            let (name, root) = (part.tensor(layer), self.root);
            let kind = TensorType::from_id(tensor.kind).ok_or_else(|| bad("an unknown tensor type"))?;
            let hashes = hashes(&tensor.hashes).filter(|hashes| hashes.len() == self.experts as usize);
            let hashes = hashes.ok_or_else(|| bad("a table for another number of experts"))?;
            let leaf = tensor_leaf_hash(&name, kind, &part.shape(&shape), &experts_root(&hashes));
            if !leaves.contains(&leaf) {
                return Err(PartError::ForeignTensor { name, root });
            }
        }
        Ok(())
    }

    pub fn shape(&self) -> Result<MoeShape, Refused> {
        let family: Option<Family> = FAMILIES.into_iter().find(|family| family.architecture == self.architecture);
        let family = family.ok_or_else(|| Refused::Architecture(self.architecture.clone()))?;
        Ok(MoeShape {
            family,
            layers: self.layers,
            experts: self.experts,
            used: self.used,
            n_embd: self.n_embd,
            n_ff: self.n_ff,
        })
    }

    /// Hash of leaf 0, then of every tensor's leaf.
    pub(super) fn leaves(&self) -> Option<Vec<[u8; 32]>> {
        hashes(&self.leaves)
    }

    /// Tensors of the model that hold experts.
    pub(super) fn expert_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// How the numbers of a tensor that holds experts are stored.
    pub fn kind(&self, layer: u32, part: Part) -> Option<TensorType> {
        TensorType::from_id(self.tensor(layer, part)?.kind)
    }

    /// The hash of one expert's part.
    pub fn part_hash(&self, layer: u32, expert: u32, part: Part) -> Option<[u8; 32]> {
        let table = &self.tensor(layer, part)?.hashes;
        let at = usize::try_from(expert).ok()?.checked_mul(32)?;
        table.get(at..at.checked_add(32)?)?.try_into().ok()
    }

    /// Names an expert's weights: SHA-256 over the hashes of its gate, up and down.
    pub fn expert_hash(&self, layer: u32, expert: u32) -> Option<[u8; 32]> {
        let mut hash = Sha256::new();
        for part in Part::ALL {
            hash.update(self.part_hash(layer, expert, part)?);
        }
        Some(hash.finalize().into())
    }

    /// Bytes of one expert of a layer.
    pub fn expert_bytes(&self, layer: u32) -> Option<u64> {
        let shape = self.shape().ok()?;
        Part::ALL.iter().try_fold(0_u64, |sum, &part| {
            let [inner, outer, _] = part.shape(&shape);
            sum.checked_add(self.kind(layer, part)?.size(&[inner, outer])?)
        })
    }

    /// Every (layer, expert) of the model.
    pub fn all(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let experts = self.experts;
        (0..self.layers).flat_map(move |layer| (0..experts).map(move |expert| (layer, expert)))
    }

    /// Every (layer, expert) of these layers of the model, or of all.
    pub fn of_layers(&self, layers: Option<LayerRange>) -> impl Iterator<Item = (u32, u32)> + use<> {
        let inside = move |layer: u32| layers.is_none_or(|range| (range.start()..range.end()).contains(&layer));
        self.all().filter(move |(layer, _)| inside(*layer))
    }

    fn tensor(&self, layer: u32, part: Part) -> Option<&ExpertTensor> {
        let at = usize::try_from(layer).ok()?.checked_mul(3)?.checked_add(part as usize)?;
        self.tensors.get(at)
    }
}

/// The tensors that hold experts, in a manifest's order.
pub(super) fn parts(layers: u32) -> impl Iterator<Item = (u32, Part)> {
    (0..layers).flat_map(|layer| Part::ALL.map(|part| (layer, part)))
}

fn hashes(bytes: &[u8]) -> Option<Vec<[u8; 32]>> {
    let (chunks, rest) = bytes.as_chunks::<32>();
    rest.is_empty().then(|| chunks.to_vec())
}
