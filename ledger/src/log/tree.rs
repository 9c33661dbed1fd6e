//! RFC 6962 Merkle tree: hashing, roots, inclusion and consistency proofs, and their verification.
//!
//! A tree is never held here: whoever stores it answers for the hashes of complete, aligned subtrees ([`Subtrees`]),
//! and roots and proofs are computed from those. [`Frontier`] is the running root of a log that is only read forwards.

use satgrid_types::Digest;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// A proof over 2^63 leaves needs no more hashes.
pub const MAX_PROOF: usize = 64;

/// Hash of a leaf: SHA-256(0x00 || bytes).
pub fn leaf_hash(bytes: &[u8]) -> Digest {
    Digest(Sha256::new().chain_update([0]).chain_update(bytes).finalize().into())
}

/// Hash of an inner node: SHA-256(0x01 || left || right).
pub fn node_hash(left: &Digest, right: &Digest) -> Digest {
    Digest(Sha256::new().chain_update([1]).chain_update(left.0).chain_update(right.0).finalize().into())
}

/// Root of the tree without leaves: SHA-256 of nothing.
pub fn empty_root() -> Digest {
    Digest(Sha256::digest([]).into())
}

/// The right edge of a growing tree: enough to append leaves and to tell the root, in O(log n) memory.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    /// Roots of the complete subtrees that `size` is the sum of, largest first.
    peaks: Vec<Digest>,
}

impl Frontier {
    pub fn new() -> Frontier {
        Frontier::default()
    }
    pub fn size(&self) -> u64 {
        self.size
    }
    pub fn push(&mut self, leaf: Digest) {
        let mut node = leaf;
        // One peak merges for every trailing one bit of the old size, like a carry.
        for _ in 0..self.size.trailing_ones() {
            if let Some(left) = self.peaks.pop() {
                node = node_hash(&left, &node);
            }
        }
        self.peaks.push(node);
        self.size = self.size.saturating_add(1);
    }
    pub fn root(&self) -> Digest {
        let mut peaks = self.peaks.iter().rev();
        match peaks.next() {
            None => empty_root(),
            Some(last) => peaks.fold(*last, |right, left| node_hash(left, &right)),
        }
    }
}

/// Complete, aligned subtrees of a stored log.
pub trait Subtrees {
    type Error;
    /// Root over the leaves `[index << level, (index + 1) << level)`, all of which exist.
    fn subtree(&mut self, level: u32, index: u64) -> Result<Digest, Self::Error>;
}

/// What was asked of a log that it cannot answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProofError<E> {
    #[error("leaf {index} is not in a log of {size} entries")]
    NoSuchLeaf { index: u64, size: u64 },
    #[error("a log of {new} entries cannot extend one of {old}")]
    Backwards { old: u64, new: u64 },
    #[error(transparent)]
    Store(E),
}

/// Root of the first `size` leaves.
pub fn root_at<S: Subtrees>(size: u64, store: &mut S) -> Result<Digest, S::Error> {
    if size == 0 { Ok(empty_root()) } else { range_root(0, size, store) }
}

/// Proof that leaf `index` is in the tree of the first `size` leaves (RFC 6962, 2.1.1).
pub fn inclusion_proof<S: Subtrees>(index: u64, size: u64, store: &mut S) -> Result<Vec<Digest>, ProofError<S::Error>> {
    if index >= size {
        return Err(ProofError::NoSuchLeaf { index, size });
    }
    let mut path = Vec::new();
    let (mut start, mut len) = (0, size);
    while len > 1 {
        let left = split(len);
        let (middle, right) = (add(start, left), sub(len, left));
        if index < middle {
            path.push(range_root(middle, right, store).map_err(ProofError::Store)?);
            len = left;
        } else {
            path.push(range_root(start, left, store).map_err(ProofError::Store)?);
            (start, len) = (middle, right);
        }
    }
    path.reverse();
    Ok(path)
}

/// Proof that the tree of `new` leaves extends that of `old` (RFC 6962, 2.1.2). Empty where `old` is 0 or `new`.
pub fn consistency_proof<S: Subtrees>(old: u64, new: u64, store: &mut S) -> Result<Vec<Digest>, ProofError<S::Error>> {
    if old > new {
        return Err(ProofError::Backwards { old, new });
    }
    if old == 0 || old == new {
        return Ok(Vec::new());
    }
    let mut path = Vec::new();
    let (mut start, mut len, mut whole) = (0, new, true);
    let mut target = old;
    while target != len {
        let left = split(len);
        let (middle, right) = (add(start, left), sub(len, left));
        if target <= left {
            path.push(range_root(middle, right, store).map_err(ProofError::Store)?);
            len = left;
        } else {
            path.push(range_root(start, left, store).map_err(ProofError::Store)?);
            (start, len, whole) = (middle, right, false);
            target = sub(target, left);
        }
    }
    if !whole {
        path.push(range_root(start, len, store).map_err(ProofError::Store)?);
    }
    path.reverse();
    Ok(path)
}

/// Whether `proof` shows that `leaf` is number `index` of the tree of `size` leaves with this root (RFC 9162, 2.1.3.2).
pub fn verify_inclusion(leaf: &Digest, index: u64, size: u64, proof: &[Digest], root: &Digest) -> bool {
    if index >= size || proof.len() > MAX_PROOF {
        return false;
    }
    let (mut node, mut last, mut hash) = (index, sub(size, 1), *leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(sibling, &hash);
            while node & 1 == 0 && node != 0 {
                (node, last) = (node >> 1, last >> 1);
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        (node, last) = (node >> 1, last >> 1);
    }
    last == 0 && hash == *root
}

/// Whether `proof` shows that the tree of `new` leaves extends that of `old` (RFC 9162, 2.1.4.2).
pub fn verify_consistency(old: u64, new: u64, old_root: &Digest, new_root: &Digest, proof: &[Digest]) -> bool {
    if old > new || proof.len() > MAX_PROOF {
        return false;
    }
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    if old == 0 {
        return proof.is_empty() && *old_root == empty_root();
    }
    // A complete old tree is its own first node, so proofs leave it out.
    let with_old: Vec<Digest>;
    let path = if old.is_power_of_two() {
        with_old = core::iter::once(*old_root).chain(proof.iter().copied()).collect();
        &with_old[..]
    } else {
        proof
    };
    let Some((first, rest)) = path.split_first() else { return false };
    let (mut node, mut last) = (sub(old, 1), sub(new, 1));
    while node & 1 == 1 {
        (node, last) = (node >> 1, last >> 1);
    }
    let (mut old_hash, mut new_hash) = (*first, *first);
    for sibling in rest {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            old_hash = node_hash(sibling, &old_hash);
            new_hash = node_hash(sibling, &new_hash);
            while node & 1 == 0 && node != 0 {
                (node, last) = (node >> 1, last >> 1);
            }
        } else {
            new_hash = node_hash(&new_hash, sibling);
        }
        (node, last) = (node >> 1, last >> 1);
    }
    last == 0 && old_hash == *old_root && new_hash == *new_root
}

/// Root over `[start, start + len)`, where `start` is a multiple of the power of two at or above `len`.
fn range_root<S: Subtrees>(start: u64, len: u64, store: &mut S) -> Result<Digest, S::Error> {
    if len.is_power_of_two() {
        let level = len.trailing_zeros();
        return store.subtree(level, start.wrapping_shr(level));
    }
    let left = split(len);
    let left_root = range_root(start, left, store)?;
    let right_root = range_root(add(start, left), sub(len, left), store)?;
    Ok(node_hash(&left_root, &right_root))
}

/// The largest power of two below `len`, which is at least 2.
fn split(len: u64) -> u64 {
    let top = sub(len, 1).checked_ilog2().unwrap_or(0);
    1u64.wrapping_shl(top)
}

// Sizes are numbers of entries that exist; none of these ever saturates.
fn add(a: u64, b: u64) -> u64 {
    a.saturating_add(b)
}
fn sub(a: u64, b: u64) -> u64 {
    a.saturating_sub(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::MemoryTiles;

    /// The leaves and roots of the Certificate Transparency reference implementation.
    const LEAVES: [&str; 8] =
        ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
    const ROOTS: [&str; 9] = [
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ];

    fn leaf(n: u64) -> Digest {
        leaf_hash(&n.to_be_bytes())
    }
    fn tiles(size: u64) -> MemoryTiles {
        let mut tiles = MemoryTiles::default();
        (0..size).for_each(|n| tiles.push(leaf(n)));
        tiles
    }

    #[test]
    fn roots_of_the_reference_vectors() {
        let mut frontier = Frontier::new();
        let mut tiles = MemoryTiles::default();
        assert_eq!(frontier.root().to_string(), ROOTS[0]);
        for (n, text) in LEAVES.iter().enumerate() {
            let leaf = leaf_hash(&hex::decode(text).unwrap());
            frontier.push(leaf);
            tiles.push(leaf);
            assert_eq!(frontier.root().to_string(), ROOTS[n + 1]);
            assert_eq!(root_at(n as u64 + 1, &mut tiles), Ok(frontier.root()));
        }
    }

    #[test]
    fn the_reference_implementations_proofs() {
        let mut tiles = MemoryTiles::default();
        LEAVES.iter().for_each(|text| tiles.push(leaf_hash(&hex::decode(text).unwrap())));
        let hex_of = |proof: Vec<Digest>| proof.iter().map(Digest::to_string).collect::<Vec<_>>();
        assert_eq!(
            hex_of(inclusion_proof(5, 8, &mut tiles).unwrap()),
            [
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ]
        );
        assert_eq!(
            hex_of(consistency_proof(6, 8, &mut tiles).unwrap()),
            [
                "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ]
        );
    }

    #[test]
    fn every_proof_of_small_logs_holds_and_no_other() {
        let mut tiles = tiles(70);
        for size in 0..=70 {
            let root = root_at(size, &mut tiles).unwrap();
            for index in 0..size {
                let proof = inclusion_proof(index, size, &mut tiles).unwrap();
                assert!(verify_inclusion(&leaf(index), index, size, &proof, &root), "{index} of {size}");
                assert!(!verify_inclusion(&leaf(index + 1), index, size, &proof, &root));
                assert!(!verify_inclusion(&leaf(index), index, size, &proof, &leaf(0)) || size == 1 && index == 0);
                for other in 0..size {
                    let moved = verify_inclusion(&leaf(index), other, size, &proof, &root);
                    assert_eq!(moved, other == index, "{index} of {size} shown at {other}");
                }
                let mut longer = proof.clone();
                longer.push(leaf(0));
                assert!(!verify_inclusion(&leaf(index), index, size, &longer, &root));
                if let Some((_, shorter)) = proof.split_last() {
                    assert!(!verify_inclusion(&leaf(index), index, size, shorter, &root));
                }
            }
            assert!(inclusion_proof(size, size, &mut tiles).is_err());
            for old in 0..=size {
                let old_root = root_at(old, &mut tiles).unwrap();
                let proof = consistency_proof(old, size, &mut tiles).unwrap();
                assert!(verify_consistency(old, size, &old_root, &root, &proof), "{old} to {size}");
                if old != 0 {
                    assert!(!verify_consistency(old, size, &leaf(99), &root, &proof));
                    assert!(!verify_consistency(old, size, &old_root, &leaf(99), &proof));
                }
                let mut longer = proof.clone();
                longer.push(leaf(0));
                assert!(!verify_consistency(old, size, &old_root, &root, &longer));
            }
        }
    }

    #[test]
    fn proofs_over_several_tiles() {
        let size = 70_000;
        let mut tiles = tiles(size);
        let mut frontier = Frontier::new();
        (0..size).for_each(|n| frontier.push(leaf(n)));
        let root = root_at(size, &mut tiles).unwrap();
        assert_eq!(root, frontier.root());
        for index in [0, 255, 256, 65_535, 65_536, 69_999] {
            let proof = inclusion_proof(index, size, &mut tiles).unwrap();
            assert!(verify_inclusion(&leaf(index), index, size, &proof, &root));
        }
        for old in [1, 256, 300, 65_536, 69_999] {
            let old_root = root_at(old, &mut tiles).unwrap();
            let proof = consistency_proof(old, size, &mut tiles).unwrap();
            assert!(verify_consistency(old, size, &old_root, &root, &proof));
        }
    }

    #[test]
    fn a_proof_of_a_hostile_length_is_refused() {
        assert!(!verify_inclusion(&leaf(0), 0, u64::MAX, &[leaf(0); 65], &leaf(0)));
        assert!(!verify_inclusion(&leaf(0), u64::MAX, u64::MAX, &[], &leaf(0)));
        assert!(!verify_consistency(1, u64::MAX, &leaf(0), &leaf(0), &[]));
    }
}
