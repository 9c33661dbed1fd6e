//! Several batches under way at once, over a model whose middle is computed elsewhere.
//!
//! A batch that is sent around other machines is away for as long as the links are long. So streams go in groups, each a
//! batch of its own: while one group's rows are on their way, another's are computed. A slot is in one batch at a time, so a
//! sequence never overtakes itself; which streams share a batch changes no bit in the exact profile. A job that is cancelled
//! while its rows are away ends when they are back.

use std::collections::BTreeMap;

use satgrid_engine::port::FinishReason;

use super::{Backend, End, Scheduler, to_u32};
use crate::ffi::{BatchRow, DecodeError};

/// Slots whose rows came to nothing, and why.
pub(crate) type Failed = BTreeMap<u32, String>;

/// A backend that sends batches away and hears of them later.
pub(crate) trait Sends: Backend {
    /// Batches under way that keep every machine at work.
    fn waves(&self) -> u32;
    /// Whether one more batch may begin.
    fn room(&self) -> bool;
    /// Begins a batch of rising slots and positions. On an error it will not come back.
    fn launch(&mut self, batch: u64, rows: &[BatchRow]) -> Result<(), DecodeError>;
    /// A batch that is back, or failed; the slots that alone came to nothing in it. Its logits are there until the next call.
    fn landed(&mut self) -> Option<(u64, Result<Failed, DecodeError>)>;
}

impl Scheduler {
    /// Seats waiting jobs and begins batches for as long as there is room. False if there was nothing to begin.
    pub(crate) fn launch(&mut self, backend: &mut impl Sends) -> bool {
        let mut begun = false;
        while backend.room() {
            self.seat_waiting(backend);
            let streams = self.slots.iter().filter_map(|slot| slot.running.as_ref());
            let streams = to_u32(streams.filter(|running| running.at >= running.prompt).count());
            let group = streams.div_ceil(backend.waves().max(1)).max(1);
            let Some(batch) = self.plan(group, backend) else { break };
            begun = true;
            for end in &batch.ends {
                self.slots[end.slot as usize].away = true;
            }
            match backend.launch(self.batches, &batch.rows) {
                Ok(()) => {
                    self.away.insert(self.batches, batch.ends);
                }
                Err(error) => self.back(batch.ends, Err(error), backend),
            }
        }
        begun
    }

    /// Books what is back. False if nothing was.
    pub(crate) fn land(&mut self, backend: &mut impl Sends) -> bool {
        let mut any = false;
        while let Some((batch, outcome)) = backend.landed() {
            any = true;
            if let Some(ends) = self.away.remove(&batch) {
                self.back(ends, outcome, backend);
            }
        }
        any
    }

    pub(crate) fn nothing_is_away(&self) -> bool {
        self.away.is_empty()
    }

    fn back(&mut self, ends: Vec<End>, outcome: Result<Failed, DecodeError>, backend: &mut impl Backend) {
        let slots: Vec<usize> = ends.iter().map(|end| end.slot as usize).collect();
        for &slot in &slots {
            self.slots[slot].away = false;
        }
        self.book(ends, outcome, backend);
        for slot in slots {
            if std::mem::take(&mut self.slots[slot].cancelled) && self.slots[slot].running.is_some() {
                self.finish(slot, FinishReason::Cancelled);
            }
        }
    }
}
