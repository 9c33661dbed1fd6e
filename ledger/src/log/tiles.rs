//! The log's stored form: tiles of 256 hashes (the layout of C2SP tlog-tiles), so that any proof reads a few rows.
//!
//! Tile (0, n) holds the leaf hashes 256 n to 256 n + 255; tile (l, n) holds the roots of 256 complete tiles of level
//! l - 1. The last tile of each level is partial until it is full. A leaf changes one tile, and one more per 256.

use super::{Subtrees, node_hash};
use core::convert::Infallible;
use satgrid_types::Digest;
use std::collections::BTreeMap;
use thiserror::Error;

/// Hashes in a full tile.
pub const TILE_WIDTH: usize = 256;
const TILE_BITS: u32 = 8;

/// Which tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TileId {
    pub level: u8,
    pub index: u64,
}

/// The partial tiles at the right edge: what a writer keeps in memory.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TileEdge {
    /// By level: number of full tiles before, and the hashes of the partial one.
    levels: Vec<(u64, Vec<Digest>)>,
}

impl TileEdge {
    /// Appends a leaf; `changed` is told every tile that it changed, with the tile's hashes now.
    pub fn push(&mut self, leaf: Digest, changed: &mut impl FnMut(TileId, &[Digest])) {
        let mut hash = leaf;
        for level in 0u8.. {
            let at = usize::from(level);
            if self.levels.len() <= at {
                self.levels.push((0, Vec::with_capacity(TILE_WIDTH)));
            }
            let Some((full, hashes)) = self.levels.get_mut(at) else { return };
            hashes.push(hash);
            changed(TileId { level, index: *full }, hashes);
            if hashes.len() < TILE_WIDTH {
                return;
            }
            hash = fold(hashes);
            hashes.clear();
            *full = full.saturating_add(1);
        }
    }
    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.levels.first().map_or(0, |(full, hashes)| full.saturating_mul(256).saturating_add(hashes.len() as u64))
    }
    /// The partial tiles, level by level.
    pub fn tiles(&self) -> impl Iterator<Item = (TileId, &[Digest])> {
        let levels = (0u8..).zip(&self.levels);
        levels.map(|(level, (index, hashes))| (TileId { level, index: *index }, hashes.as_slice()))
    }
    /// Root over all leaves: the edge holds every peak of the tree.
    pub fn root(&self) -> Result<Digest, MissingTile> {
        let mut cache = TileCache::default();
        self.tiles().for_each(|(id, hashes)| cache.insert(id, hashes.to_vec()));
        super::root_at(self.size(), &mut cache)
    }
    /// Which tiles are at the edge of a log of `size` leaves: those that [`TileEdge::restore`] wants.
    pub fn ids(size: u64) -> Vec<TileId> {
        let mut out = Vec::new();
        let mut hashes = size;
        for level in 0u8..8 {
            if hashes == 0 {
                break;
            }
            out.push(TileId { level, index: hashes >> TILE_BITS });
            hashes >>= TILE_BITS;
        }
        out
    }
    /// Takes up a stored log: `tiles` are those of [`TileEdge::ids`], empty where the tile does not exist yet.
    /// `None` where their lengths contradict `size`.
    pub fn restore(size: u64, tiles: Vec<Vec<Digest>>) -> Option<TileEdge> {
        let ids = TileEdge::ids(size);
        if ids.len() != tiles.len() {
            return None;
        }
        let mut hashes = size;
        let mut levels = Vec::with_capacity(tiles.len());
        for (id, tile) in ids.iter().zip(tiles) {
            if usize::try_from(hashes % 256).ok()? != tile.len() {
                return None;
            }
            hashes >>= TILE_BITS;
            levels.push((id.index, tile));
        }
        Some(TileEdge { levels })
    }
}

/// Root over a power of two of hashes.
fn fold(hashes: &[Digest]) -> Digest {
    match hashes {
        [one] => *one,
        [] => super::empty_root(),
        _ => {
            let (left, right) = hashes.split_at(hashes.len().div_ceil(2));
            node_hash(&fold(left), &fold(right))
        }
    }
}

/// A stored log whose tiles do not hold what a log of its size must.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("tile {level}/{index} of the log is missing or too short")]
pub struct MissingTile {
    pub level: u8,
    pub index: u64,
}

/// Complete subtrees, read from tiles that were fetched before.
///
/// Storage adapters are asynchronous and proofs are not: run the proof, fetch the tile that it misses, run it again. A
/// proof needs at most two tiles per level.
#[derive(Debug, Default, Clone)]
pub struct TileCache {
    tiles: BTreeMap<TileId, Vec<Digest>>,
}

impl TileCache {
    /// Tiles from which [`super::inclusion_proof`] of leaf `index` in a log of `size` leaves can be computed.
    pub fn for_inclusion(index: u64, size: u64) -> Vec<TileId> {
        let mut ids = TileEdge::ids(size);
        let mut at = index;
        for level in ids.iter().map(|id| id.level).collect::<Vec<_>>() {
            at >>= TILE_BITS;
            ids.push(TileId { level, index: at });
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }
    /// Tiles from which [`super::consistency_proof`] between two sizes can be computed.
    pub fn for_consistency(old: u64, new: u64) -> Vec<TileId> {
        let mut ids = TileCache::for_inclusion(old.saturating_sub(1), new);
        ids.extend(TileEdge::ids(old));
        ids.sort_unstable();
        ids.dedup();
        ids
    }
    pub fn insert(&mut self, id: TileId, hashes: Vec<Digest>) {
        self.tiles.insert(id, hashes);
    }
}

impl Subtrees for TileCache {
    type Error = MissingTile;
    fn subtree(&mut self, level: u32, index: u64) -> Result<Digest, MissingTile> {
        let (id, from, len) = locate(level, index);
        let missing = MissingTile { level: id.level, index: id.index };
        let tile = self.tiles.get(&id).ok_or_else(|| missing.clone())?;
        tile.get(from..from.saturating_add(len)).map(fold).ok_or(missing)
    }
}

/// The tile that holds a subtree, and which of its hashes.
fn locate(level: u32, index: u64) -> (TileId, usize, usize) {
    let (tile_level, height) = (level / TILE_BITS, level % TILE_BITS);
    let len = 1usize.wrapping_shl(height);
    let first = index.wrapping_shl(height);
    let tile = TileId { level: u8::try_from(tile_level).unwrap_or(u8::MAX), index: first >> TILE_BITS };
    (tile, usize::try_from(first & 0xff).unwrap_or(0), len)
}

/// A whole log in memory: for tests, tools and small logs.
#[derive(Debug, Default, Clone)]
pub struct MemoryTiles {
    edge: TileEdge,
    cache: TileCache,
}

impl MemoryTiles {
    pub fn push(&mut self, leaf: Digest) {
        let MemoryTiles { edge, cache } = self;
        edge.push(leaf, &mut |id, hashes| {
            let tile = cache.tiles.entry(id).or_default();
            tile.extend_from_slice(hashes.get(tile.len()..).unwrap_or_default());
        });
    }
    pub fn size(&self) -> u64 {
        self.edge.size()
    }
}

impl Subtrees for MemoryTiles {
    type Error = Infallible;
    fn subtree(&mut self, level: u32, index: u64) -> Result<Digest, Infallible> {
        match self.cache.subtree(level, index) {
            Ok(hash) => Ok(hash),
            // Callers ask only for leaves that exist; beyond them there is nothing to hash.
            Err(MissingTile { .. }) => Ok(super::empty_root()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::leaf_hash;

    #[test]
    fn an_edge_is_restored_from_its_tiles() {
        for size in [0u64, 1, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 66_000] {
            let mut edge = TileEdge::default();
            let mut stored: BTreeMap<TileId, Vec<Digest>> = BTreeMap::new();
            for n in 0..size {
                edge.push(leaf_hash(&n.to_be_bytes()), &mut |id, hashes| {
                    stored.insert(id, hashes.to_vec());
                });
            }
            assert_eq!(edge.size(), size);
            let mut frontier = crate::log::Frontier::new();
            (0..size).for_each(|n| frontier.push(leaf_hash(&n.to_be_bytes())));
            assert_eq!(edge.root(), Ok(frontier.root()), "size {size}");
            let tiles = TileEdge::ids(size).iter().map(|id| stored.get(id).cloned().unwrap_or_default()).collect();
            let mut restored = TileEdge::restore(size, tiles).unwrap();
            let mut a = Vec::new();
            let mut b = Vec::new();
            edge.push(leaf_hash(b"next"), &mut |id, hashes| a.push((id, hashes.to_vec())));
            restored.push(leaf_hash(b"next"), &mut |id, hashes| b.push((id, hashes.to_vec())));
            assert_eq!(a, b, "size {size}");
        }
    }

    #[test]
    fn the_named_tiles_are_enough_for_proofs() {
        use crate::log::{consistency_proof, inclusion_proof};
        let size = 66_100;
        let mut all = MemoryTiles::default();
        (0..size).for_each(|n: u64| all.push(leaf_hash(&n.to_be_bytes())));
        let fetch = |ids: Vec<TileId>| {
            let mut cache = TileCache::default();
            for id in ids {
                cache.insert(id, all.cache.tiles.get(&id).cloned().unwrap_or_default());
            }
            cache
        };
        for (index, size) in
            [(0, 1), (0, size), (300, 66_000), (65_999, 66_000), (65_536, 65_537), (255, 256), (5, 300)]
        {
            let mut cache = fetch(TileCache::for_inclusion(index, size));
            assert!(inclusion_proof(index, size, &mut cache).is_ok(), "{index} of {size}");
        }
        for (old, new) in [(1, 2), (256, 257), (300, 66_000), (65_536, 66_000), (65_999, 66_000), (255, 66_100)] {
            let mut cache = fetch(TileCache::for_consistency(old, new));
            assert!(consistency_proof(old, new, &mut cache).is_ok(), "{old} to {new}");
        }
    }

    #[test]
    fn tiles_that_contradict_the_size_are_refused() {
        assert!(TileEdge::restore(3, vec![vec![leaf_hash(b""); 2]]).is_none());
        assert!(TileEdge::restore(3, vec![]).is_none());
        assert!(TileEdge::restore(0, vec![]).is_some());
    }
}
