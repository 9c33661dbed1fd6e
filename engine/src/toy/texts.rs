//! The toy that embeds: a text's row is a hash of its tokens.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

use crate::embedder::{TextRun, Texts};

/// See the module. It reads texts in pieces.
#[derive(Debug)]
pub(super) struct ToyTexts {
    pub(super) dimensions: u32,
    pub(super) seed: u64,
    texts: BTreeMap<u32, Vec<u32>>,
}

impl ToyTexts {
    pub(super) fn new(dimensions: u32, seed: u64) -> ToyTexts {
        ToyTexts { dimensions, seed, texts: BTreeMap::new() }
    }
}

impl Texts for ToyTexts {
    fn evaluate(&mut self, runs: &[TextRun<'_>]) -> Result<Vec<Vec<f32>>, String> {
        let mut rows = Vec::new();
        for run in runs {
            let text = self.texts.entry(run.slot).or_default();
            if text.len() != run.from as usize {
                return Err("a text with a gap".to_owned());
            }
            text.extend_from_slice(run.ids);
            if run.ends {
                let number = |at: u32| {
                    let mut hash = Sha256::new().chain_update(self.seed.to_le_bytes()).chain_update(at.to_le_bytes());
                    text.iter().for_each(|id| hash.update(id.to_le_bytes()));
                    let [a, b, ..] = <[u8; 32]>::from(hash.finalize());
                    f32::from(i16::from_le_bytes([a, b])) + 0.5
                };
                rows.push((0..self.dimensions).map(number).collect());
            }
        }
        Ok(rows)
    }

    fn clear(&mut self, slot: u32) {
        self.texts.remove(&slot);
    }
}
