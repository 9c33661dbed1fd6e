//! Whose the rows are that a trunk sends to its experts.
//!
//! llama.cpp computes a batch in one or more pieces, each through all layers, rows in the batch's order. The last layer
//! computes only the rows that are drawn from. So of each layer the rows come in a known order, and a mark in each says how
//! far they have come.

use std::collections::BTreeMap;

use satgrid_engine::port::JobId;

use crate::ffi::BatchRow;

/// The jobs behind the rows of the batch that is being computed.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    last_layer: u32,
    seats: BTreeMap<u32, JobId>,
    all: Vec<JobId>,
    drawn: Vec<JobId>,
    /// Rows of each layer that were seen.
    seen: BTreeMap<u32, usize>,
}

impl Owners {
    pub(crate) fn new(layers: u32) -> Self {
        Self { last_layer: layers.saturating_sub(1), ..Self::default() }
    }

    pub(crate) fn seated(&mut self, slot: u32, job: JobId) {
        self.seats.insert(slot, job);
    }

    /// A batch of these rows begins.
    pub(crate) fn begin(&mut self, rows: &[BatchRow]) {
        self.seen.clear();
        self.all.clear();
        self.drawn.clear();
        for row in rows {
            let Some(&job) = self.seats.get(&row.slot) else { continue };
            self.all.push(job);
            if row.output {
                self.drawn.push(job);
            }
        }
    }

    /// The jobs of the next `count` rows of a layer; none where no job was ever seated: the engine measures itself.
    pub(crate) fn of(&mut self, layer: u32, count: usize) -> Result<Vec<JobId>, String> {
        if self.seats.is_empty() {
            return Ok(Vec::new());
        }
        let rows = if layer == self.last_layer { &self.drawn } else { &self.all };
        let from = self.seen.entry(layer).or_default();
        let upto = from.saturating_add(count);
        let jobs = rows.get(*from..upto).map(<[JobId]>::to_vec);
        *from = upto;
        jobs.ok_or_else(|| format!("layer {layer} computes {upto} rows, and the batch has {}", rows.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_their_slots_jobs_in_the_batch_s_order() {
        let mut owners = Owners::new(3);
        let row = |slot, output| BatchRow { slot, position: 0, token: 1, output };
        owners.begin(&[row(0, true)]);
        assert_eq!(owners.of(0, 1), Ok(Vec::new()), "nobody is seated yet");
        owners.seated(0, JobId(10));
        owners.seated(2, JobId(12));
        // Two pieces of one batch, each through all layers; only drawn rows in the last.
        owners.begin(&[row(0, false), row(0, true), row(2, true)]);
        assert_eq!(owners.of(0, 2), Ok(vec![JobId(10), JobId(10)]));
        assert_eq!(owners.of(2, 1), Ok(vec![JobId(10)]));
        assert_eq!(owners.of(0, 1), Ok(vec![JobId(12)]));
        assert_eq!(owners.of(2, 1), Ok(vec![JobId(12)]));
        assert!(owners.of(2, 1).unwrap_err().contains("the batch has 2"));
        owners.seated(2, JobId(13));
        owners.begin(&[row(2, true)]);
        assert_eq!(owners.of(1, 1), Ok(vec![JobId(13)]));
    }
}
