//! The model root: one hash that names what a model computes.
//!
//! A name is a claim, a root is a fact. The root is a Merkle root with the hashing of RFC 6962 (SHA-256; a leaf is
//! hashed behind a 0x00 byte, an inner node behind 0x01) over these leaves:
//!
//! - leaf 0, the metadata: `"satgrid-model-metadata-v1\0"`, then for every key that does not begin with `general.` or
//!   `tokenizer.`, sorted by its bytes: the key's length (u64) and bytes, the value's GGUF type (u32), the value as
//!   GGUF encodes it. All numbers little-endian.
//! - one leaf per tensor, sorted by the bytes of the name: `"satgrid-model-tensor-v1\0"`, the name's length (u64) and
//!   bytes, the ggml type (u32), the number of dimensions (u32), the dimensions (u64 each, innermost first), SHA-256
//!   of the tensor's data without padding (32 bytes).
//! - a tensor that holds all experts of a layer (`blk.N.ffn_{gate,up,down}_exps.weight`, three dimensions, the expert
//!   outermost) has `"satgrid-model-experts-v1\0"` for a label, and in place of its data's hash the Merkle root over one
//!   leaf per expert, each SHA-256 of that expert's part of the data. So a file with some experts proves which model
//!   they are of, without the others.
//!
//! So the order of tensors in a file, its padding, its name and licence do not matter; a changed rotary base does.
//! The tokenizer has a hash of its own (`tokenizer_artefact`). A prover can show one tensor with a path of log2(n)
//! hashes.

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use sha2::{Digest, Sha256};

use crate::experts::family::MAX_EXPERTS;
use crate::gguf::{Gguf, GgufError, Tensor, TensorType, Value, hash_tensor, read_range};

const METADATA_LABEL: &[u8] = b"satgrid-model-metadata-v1\0";
const TENSOR_LABEL: &[u8] = b"satgrid-model-tensor-v1\0";
const EXPERTS_LABEL: &[u8] = b"satgrid-model-experts-v1\0";

/// The root and what it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRoot {
    pub root: [u8; 32],
    /// Hash of leaf 0, then of every tensor's leaf in order.
    pub leaves: Vec<[u8; 32]>,
    /// Names and data hashes of the tensors, in the order of their leaves.
    pub tensors: Vec<(String, [u8; 32])>,
    /// Of each tensor that holds experts: the hash of every expert's part.
    pub experts: BTreeMap<String, Vec<[u8; 32]>>,
}

impl ModelRoot {
    /// Reads every tensor's data once, in the order of the file. `progress` hears of every chunk's bytes.
    pub fn compute<R: Read + Seek>(
        gguf: &Gguf,
        reader: &mut R,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, GgufError> {
        let mut hashed = Vec::with_capacity(gguf.tensors.len());
        let mut experts = BTreeMap::new();
        for tensor in &gguf.tensors {
            let data = if holds_experts(&tensor.name, &tensor.shape) {
                let parts = hash_experts(reader, gguf, tensor, progress)?;
                let root = experts_root(&parts);
                experts.insert(tensor.name.clone(), parts);
                root
            } else {
                hash_tensor(reader, gguf, tensor, progress)?
            };
            hashed.push((tensor, data));
        }
        Ok(Self::of(gguf, hashed, experts))
    }

    /// The root of a model whose tensors' hashes are known; `None` unless there is one for each tensor.
    pub fn from_hashes(gguf: &Gguf, hashes: Vec<(String, [u8; 32])>) -> Option<Self> {
        let hashes: BTreeMap<String, [u8; 32]> = hashes.into_iter().collect();
        if hashes.len() != gguf.tensors.len() {
            return None;
        }
        let hashed: Option<Vec<_>> = gguf.tensors.iter().map(|t| Some((t, *hashes.get(&t.name)?))).collect();
        Some(Self::of(gguf, hashed?, BTreeMap::new()))
    }

    fn of(gguf: &Gguf, mut hashed: Vec<(&Tensor, [u8; 32])>, experts: BTreeMap<String, Vec<[u8; 32]>>) -> Self {
        hashed.sort_by(|(a, _), (b, _)| a.name.as_bytes().cmp(b.name.as_bytes()));

        let mut leaves = vec![metadata_leaf_hash(&gguf.metadata)];
        leaves.extend(
            hashed.iter().map(|(tensor, data)| tensor_leaf_hash(&tensor.name, tensor.kind, &tensor.shape, data)),
        );
        let tensors = hashed.into_iter().map(|(tensor, data)| (tensor.name.clone(), data)).collect();
        Self { root: merkle_root(&leaves), leaves, tensors, experts }
    }
}

/// A tensor that holds every expert of its layer.
pub fn holds_experts(name: &str, shape: &[u64]) -> bool {
    let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let part = part.filter(|(layer, _)| !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit()));
    let named = matches!(part, Some((_, "ffn_gate_exps.weight" | "ffn_up_exps.weight" | "ffn_down_exps.weight")));
    named && shape.len() == 3
}

/// The data hash of a tensor that holds experts, from the hash of each expert's part.
pub fn experts_root(parts: &[[u8; 32]]) -> [u8; 32] {
    let leaves: Vec<_> = parts.iter().map(|part| leaf_hash(part)).collect();
    merkle_root(&leaves)
}

/// Hash of leaf 0.
pub fn metadata_leaf_hash(metadata: &[(String, Value)]) -> [u8; 32] {
    leaf_hash(&metadata_leaf(metadata))
}

/// Hash of a tensor's leaf; `data` is the hash of its data, or [`experts_root`] where it holds experts.
pub fn tensor_leaf_hash(name: &str, kind: TensorType, shape: &[u64], data: &[u8; 32]) -> [u8; 32] {
    leaf_hash(&tensor_leaf(name, kind, shape, data))
}

fn hash_experts<R: Read + Seek>(
    reader: &mut R,
    gguf: &Gguf,
    tensor: &Tensor,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<[u8; 32]>, GgufError> {
    let experts = tensor.shape.last().copied().unwrap_or(1).max(1);
    // A hash and a look into the file for each: a file that lies would have us make one for each of its bytes.
    if experts > u64::from(MAX_EXPERTS) {
        let (what, limit) = ("experts of a tensor", u64::from(MAX_EXPERTS));
        return Err(GgufError::OverLimit { what, value: experts, limit });
    }
    let bytes = tensor.bytes / experts;
    let mut parts = Vec::new();
    for expert in 0..experts {
        let mut hash = Sha256::new();
        let mut take = |chunk: &[u8]| {
            hash.update(chunk);
            progress(chunk.len() as u64);
            Ok(())
        };
        read_range(reader, gguf, tensor, expert * bytes..(expert + 1) * bytes, &mut take)?;
        parts.push(hash.finalize().into());
    }
    Ok(parts)
}

/// The hash of a tensor's data that goes into its leaf.
pub fn data_hash<R: Read + Seek>(
    reader: &mut R,
    gguf: &Gguf,
    tensor: &Tensor,
    progress: &mut dyn FnMut(u64),
) -> Result<[u8; 32], GgufError> {
    if holds_experts(&tensor.name, &tensor.shape) {
        return Ok(experts_root(&hash_experts(reader, gguf, tensor, progress)?));
    }
    hash_tensor(reader, gguf, tensor, progress)
}

fn metadata_leaf(metadata: &[(String, Value)]) -> Vec<u8> {
    let names_or_tokens = |key: &str| key.starts_with("general.") || key.starts_with("tokenizer.");
    let mut entries: Vec<_> = metadata.iter().filter(|(key, _)| !names_or_tokens(key)).collect();
    entries.sort_by(|(a, _), (b, _)| a.as_bytes().cmp(b.as_bytes()));
    let mut leaf = METADATA_LABEL.to_vec();
    for (key, value) in entries {
        leaf.extend((key.len() as u64).to_le_bytes());
        leaf.extend(key.as_bytes());
        leaf.extend((value.kind() as u32).to_le_bytes());
        value.encode(&mut leaf);
    }
    leaf
}

fn tensor_leaf(name: &str, kind: TensorType, shape: &[u64], data: &[u8; 32]) -> Vec<u8> {
    let mut leaf = if holds_experts(name, shape) { EXPERTS_LABEL.to_vec() } else { TENSOR_LABEL.to_vec() };
    leaf.extend((name.len() as u64).to_le_bytes());
    leaf.extend(name.as_bytes());
    leaf.extend(kind.id.to_le_bytes());
    leaf.extend((shape.len() as u32).to_le_bytes());
    shape.iter().for_each(|dimension| leaf.extend(dimension.to_le_bytes()));
    leaf.extend(data);
    leaf
}

fn leaf_hash(leaf: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update([0]).chain_update(leaf).finalize().into()
}

/// RFC 6962, 2.1: the left subtree holds the largest power of two of leaves that is less than all.
pub fn merkle_root(leaves: &[[u8; 32]]) -> [u8; 32] {
    match leaves {
        [] => Sha256::digest([]).into(),
        [leaf] => *leaf,
        leaves => {
            let split = leaves.len().next_power_of_two() / 2;
            let (left, right) = leaves.split_at(split);
            let node = Sha256::new().chain_update([1]).chain_update(merkle_root(left));
            node.chain_update(merkle_root(right)).finalize().into()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::gguf::{GgufWriter, TensorType, Value};

    /// (name, fill) per tensor; the file's order is the slice's.
    fn root(rope: f32, name: &str, tensors: &[(&str, u8)]) -> [u8; 32] {
        let mut writer = GgufWriter::new()
            .set("general.architecture", Value::string("llama"))
            .set("general.name", Value::string(name))
            .set("tokenizer.ggml.model", Value::string(name))
            .set("llama.rope.freq_base", Value::F32(rope))
            .set("llama.block_count", Value::U32(1));
        for (name, _) in tensors {
            writer = writer.tensor(*name, TensorType::F32, &[4]).unwrap();
        }
        let mut fills = tensors.iter().map(|(_, fill)| *fill);
        let mut bytes = Vec::new();
        writer.write(&mut bytes, |tensor| Ok(vec![fills.next().unwrap(); tensor.bytes as usize])).unwrap();
        let gguf = Gguf::read(&mut Cursor::new(&bytes)).unwrap();
        ModelRoot::compute(&gguf, &mut Cursor::new(&bytes), &mut |_| ()).unwrap().root
    }

    #[test]
    fn the_root_names_what_is_computed() {
        let base = root(1e4, "a", &[("x", 1), ("y", 2), ("z", 3)]);
        assert_eq!(root(1e4, "other name", &[("x", 1), ("y", 2), ("z", 3)]), base);
        assert_eq!(root(1e4, "a", &[("z", 3), ("x", 1), ("y", 2)]), base);
        assert_ne!(root(1e5, "a", &[("x", 1), ("y", 2), ("z", 3)]), base);
        assert_ne!(root(1e4, "a", &[("x", 1), ("y", 2), ("z", 4)]), base);
        assert_ne!(root(1e4, "a", &[("x", 2), ("y", 1), ("z", 3)]), base);
        assert_ne!(root(1e4, "a", &[("x", 1), ("y", 2)]), base);
    }

    #[test]
    fn a_tensor_of_more_experts_than_there_are_is_refused() {
        let compute = |experts: u64| {
            let shape = [4, 1, experts];
            let writer = GgufWriter::new().tensor("blk.0.ffn_up_exps.weight", TensorType::F32, &shape).unwrap();
            let mut bytes = Vec::new();
            writer.write(&mut bytes, |tensor| Ok(vec![0; tensor.bytes as usize])).unwrap();
            let gguf = Gguf::read(&mut Cursor::new(&bytes)).unwrap();
            ModelRoot::compute(&gguf, &mut Cursor::new(&bytes), &mut |_| ())
        };
        assert!(compute(512).is_ok());
        assert!(matches!(compute(513), Err(GgufError::OverLimit { value: 513, limit: 512, .. })));
    }

    /// The encoding is a promise: a change needs a new label.
    #[test]
    fn the_root_is_fixed() {
        let root = root(1e4, "a", &[("x", 1), ("y", 2), ("z", 3)]);
        assert_eq!(hex::encode(root), "d9cfb24e49205b35d8527d1fea4be9b1dc0b7de5b3f0a05099ac54279b605b4e");
    }

    /// The test vectors of Certificate Transparency's reference code.
    #[test]
    fn merkle_hashing_is_rfc_6962() {
        let inputs =
            ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
        let leaves: Vec<_> = inputs.iter().map(|hex| leaf_hash(&hex::decode(hex).unwrap())).collect();
        let check = |n: usize, expect: &str| assert_eq!(hex::encode(merkle_root(&leaves[..n])), expect);
        check(0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        check(1, "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d");
        check(2, "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125");
        check(3, "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77");
        check(5, "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4");
        check(8, "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328");
    }
}
