//! Which part of a model a provider runs.

use core::fmt;
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// A half-open range of layers `[start, end)`, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct LayerRange {
    #[n(0)]
    start: u32,
    #[n(1)]
    end: u32,
}

impl LayerRange {
    /// `None` for an empty or backward range.
    pub const fn new(start: u32, end: u32) -> Option<LayerRange> {
        if start < end { Some(LayerRange { start, end }) } else { None }
    }
    pub const fn start(&self) -> u32 {
        self.start
    }
    pub const fn end(&self) -> u32 {
        self.end
    }
    pub const fn layers(&self) -> u32 {
        // Decoded ranges are not checked; a backward one has no layers.
        self.end.saturating_sub(self.start)
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.start, self.end)
    }
}

/// Which experts of a mixture-of-experts model a provider holds: sorted, unique (layer, expert) pairs.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(transparent)]
pub struct ExpertSet(#[n(0)] Vec<(u32, u32)>);

impl ExpertSet {
    pub fn new(pairs: impl IntoIterator<Item = (u32, u32)>) -> ExpertSet {
        let set: std::collections::BTreeSet<_> = pairs.into_iter().collect();
        ExpertSet(set.into_iter().collect())
    }
    pub fn contains(&self, layer: u32, expert: u32) -> bool {
        self.0.binary_search(&(layer, expert)).is_ok()
    }
    pub fn pairs(&self) -> &[(u32, u32)] {
        &self.0
    }
}

/// The part of a model that a listing offers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    #[n(0)]
    Whole,
    #[n(1)]
    Layers(#[n(0)] LayerRange),
    #[n(2)]
    Experts(#[n(0)] ExpertSet),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Whole => f.write_str("whole"),
            Part::Layers(range) => write!(f, "layers {range}"),
            Part::Experts(set) => write!(f, "{} experts", set.0.len()),
        }
    }
}
