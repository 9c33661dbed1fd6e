//! Jobs that end while rows of theirs are under way: these are given up, and what others had in the same works goes again.

use std::collections::BTreeSet;

use satgrid_engine::port::JobId;
use satgrid_engine::stage::codec::HiddenRows;
use satgrid_engine::stage::ring::RingCommand;

use super::{Batch, Ends, Flight, Trip, Way};
use crate::ffi::DecodeError;

impl Trip {
    /// The stages take nothing of these jobs any more, and works with rows of theirs are void. A job without rows under way is not
    /// heard of here: the ring says so again when it has some.
    pub(super) fn ended(
        &mut self,
        jobs: &[JobId],
        reason: &str,
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<(), DecodeError> {
        let slots = (0_u32..).zip(&self.sequences).filter(|(_, sequence)| jobs.contains(&sequence.job));
        let slots: BTreeSet<u32> = slots.map(|(slot, _)| slot).collect();
        for Batch { rows, waiting, failed, .. } in self.batches.values_mut() {
            let stays = |at: &usize| rows.get(*at).is_some_and(|row| !slots.contains(&row.slot));
            waiting.iter_mut().for_each(|places| places.retain(stays));
            waiting.retain(|places| !places.is_empty());
            let over = rows.iter().map(|row| row.slot).filter(|slot| slots.contains(slot));
            failed.extend(over.map(|slot| (slot, reason.to_owned())));
        }
        for at in 0..self.flights.len() {
            let void = |flight: &Flight| flight.work.pieces.iter().any(|piece| slots.contains(&piece.sequence));
            if self.flights[at].answer.is_some() || !void(&self.flights[at]) {
                continue;
            }
            let id = self.work_id();
            let flight = &mut self.flights[at];
            let batch = self.batches.get(&flight.batch);
            flight.give_up(&slots, batch);
            (flight.id, flight.work.id, flight.work.again) = (id, id, true);
            if !flight.work.pieces.is_empty() {
                way.send(RingCommand::Work(flight.work.clone()))?;
            }
        }
        for flight in self.flights.iter().filter(|flight| flight.work.pieces.is_empty()) {
            if let Some(batch) = self.batches.get_mut(&flight.batch) {
                batch.away = batch.away.saturating_sub(1);
            }
        }
        self.flights.retain(|flight| !flight.work.pieces.is_empty());
        let whole = self.batches.iter().filter(|(_, batch)| batch.away == 0 && batch.waiting.is_empty());
        for number in whole.map(|(number, _)| *number).collect::<Vec<u64>>() {
            self.complete(number);
        }
        // There is room for what waited.
        self.send_waiting(ends, way)
    }
}

impl Flight {
    /// Takes out the rows of these slots.
    fn give_up(&mut self, slots: &BTreeSet<u32>, batch: Option<&Batch>) {
        let (mut rows, mut from) = (HiddenRows::none(self.work.rows.wire), 0_u32);
        for piece in &self.work.pieces {
            let upto = from.saturating_add(piece.rows);
            if !slots.contains(&piece.sequence) {
                rows.extend(&self.work.rows.slice(from, upto));
            }
            from = upto;
        }
        self.work.rows = rows;
        self.work.pieces.retain(|piece| !slots.contains(&piece.sequence));
        let slot = |at: &usize| batch.and_then(|batch| batch.rows.get(*at)).map(|row| row.slot);
        self.places.retain(|at| slot(at).is_some_and(|slot| !slots.contains(&slot)));
    }
}
