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
//!
//! So the order of tensors in a file, its padding, its name and licence do not matter; a changed rotary base does.
//! The tokenizer has a hash of its own (`tokenizer_artefact`). A prover can show one tensor with a path of log2(n)
//! hashes.

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use sha2::{Digest, Sha256};

use crate::gguf::{Gguf, GgufError, Tensor, hash_tensor};

const METADATA_LABEL: &[u8] = b"satgrid-model-metadata-v1\0";
const TENSOR_LABEL: &[u8] = b"satgrid-model-tensor-v1\0";

/// The root and what it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRoot {
    pub root: [u8; 32],
    /// Hash of leaf 0, then of every tensor's leaf in order.
    pub leaves: Vec<[u8; 32]>,
    /// Names and data hashes of the tensors, in the order of their leaves.
    pub tensors: Vec<(String, [u8; 32])>,
}

impl ModelRoot {
    /// Reads every tensor's data once, in the order of the file. `progress` hears of every chunk's bytes.
    pub fn compute<R: Read + Seek>(
        gguf: &Gguf,
        reader: &mut R,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, GgufError> {
        let mut hashed = Vec::with_capacity(gguf.tensors.len());
        for tensor in &gguf.tensors {
            hashed.push((tensor, data_hash(reader, gguf, tensor, progress)?));
        }
        Ok(Self::of(gguf, hashed))
    }

    /// The root of a model whose tensors' hashes are known; `None` unless there is one for each tensor.
    pub fn from_hashes(gguf: &Gguf, hashes: Vec<(String, [u8; 32])>) -> Option<Self> {
        let hashes: BTreeMap<String, [u8; 32]> = hashes.into_iter().collect();
        if hashes.len() != gguf.tensors.len() {
            return None;
        }
        let hashed: Option<Vec<_>> = gguf.tensors.iter().map(|t| Some((t, *hashes.get(&t.name)?))).collect();
        Some(Self::of(gguf, hashed?))
    }

    fn of(gguf: &Gguf, mut hashed: Vec<(&Tensor, [u8; 32])>) -> Self {
        hashed.sort_by(|(a, _), (b, _)| a.name.as_bytes().cmp(b.name.as_bytes()));

        let mut leaves = vec![leaf_hash(&metadata_leaf(gguf))];
        leaves.extend(hashed.iter().map(|(tensor, data)| leaf_hash(&tensor_leaf(tensor, data))));
        let tensors = hashed.into_iter().map(|(tensor, data)| (tensor.name.clone(), data)).collect();
        Self { root: merkle_root(&leaves), leaves, tensors }
    }
}

/// The hash of a tensor's data that goes into its leaf.
pub fn data_hash<R: Read + Seek>(
    reader: &mut R,
    gguf: &Gguf,
    tensor: &Tensor,
    progress: &mut dyn FnMut(u64),
) -> Result<[u8; 32], GgufError> {
    hash_tensor(reader, gguf, tensor, progress)
}

fn metadata_leaf(gguf: &Gguf) -> Vec<u8> {
    let names_or_tokens = |key: &str| key.starts_with("general.") || key.starts_with("tokenizer.");
    let mut entries: Vec<_> = gguf.metadata.iter().filter(|(key, _)| !names_or_tokens(key)).collect();
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

fn tensor_leaf(tensor: &Tensor, data: &[u8; 32]) -> Vec<u8> {
    let mut leaf = TENSOR_LABEL.to_vec();
    leaf.extend((tensor.name.len() as u64).to_le_bytes());
    leaf.extend(tensor.name.as_bytes());
    leaf.extend(tensor.kind.id.to_le_bytes());
    leaf.extend((tensor.shape.len() as u32).to_le_bytes());
    tensor.shape.iter().for_each(|dimension| leaf.extend(dimension.to_le_bytes()));
    leaf.extend(data);
    leaf
}

fn leaf_hash(leaf: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update([0]).chain_update(leaf).finalize().into()
}

/// RFC 6962, 2.1: the left subtree holds the largest power of two of leaves that is less than all.
fn merkle_root(leaves: &[[u8; 32]]) -> [u8; 32] {
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
