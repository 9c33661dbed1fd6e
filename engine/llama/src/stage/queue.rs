//! Which sequence sits in which slot of the context, and which works are one batch.
//!
//! A state machine without a clock, thread or model. Works of single rows that wait together, of any lead, are one batch as
//! long as no sequence is in it twice: that is the batching of many sessions that the exact profile allows. A work of several
//! rows of one sequence is a batch alone. Works of one sequence never overtake each other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use satgrid_engine::port::JobId;
use satgrid_engine::stage::codec::HiddenRows;
use satgrid_engine::stage::port::{SequenceId, StageCommand, StageError, StageEvent, StageFacts, StageWork, WorkId};

use crate::ffi::{BatchRow, DecodeError};

/// Works that wait, and the bytes of their rows; more are refused as busy.
const MAX_QUEUED: usize = 1024;
const MAX_QUEUED_BYTES: usize = 256 << 20;
/// Times that a work is put behind others for want of a slot before it is refused.
const MAX_PUT_BACK: u32 = 64;

/// What the queue needs of layers in memory.
pub(crate) trait Layers {
    /// Computes the rows, of rising slot and rising position; as many rows come out, in that order.
    fn evaluate(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<Vec<f32>, DecodeError>;
    /// Drops a slot's positions at `from` and beyond; false if that is not possible there.
    fn truncate(&mut self, slot: u32, from: u32) -> bool;
    /// The slot's rows are this job's from now on: whoever finds their experts' rows wants to know.
    fn seated(&mut self, slot: u32, job: JobId);
}

#[derive(Debug, Clone, Copy, Default)]
struct Seat {
    sequence: Option<SequenceId>,
    /// Positions in the cache.
    at: u32,
    used: u64,
}

pub(crate) struct StageQueue {
    facts: StageFacts,
    seats: Vec<Seat>,
    works: VecDeque<StageWork>,
    queued_bytes: usize,
    /// Works that found no slot, and how often.
    put_back: BTreeMap<WorkId, u32>,
    events: Vec<StageEvent>,
    batches: u64,
}

/// A work of the batch under way: its numbers as they came, and the slot of each row.
struct Taken {
    work: StageWork,
    hidden: Vec<f32>,
    rows: Vec<BatchRow>,
}

impl StageQueue {
    pub(crate) fn new(facts: StageFacts) -> Self {
        let seats = vec![Seat::default(); facts.sequences as usize];
        Self {
            facts,
            seats,
            works: VecDeque::new(),
            queued_bytes: 0,
            put_back: BTreeMap::new(),
            events: Vec::new(),
            batches: 0,
        }
    }

    /// The events since the last call, in order.
    pub(crate) fn take_events(&mut self) -> Vec<StageEvent> {
        std::mem::take(&mut self.events)
    }

    pub(crate) fn handle(&mut self, command: StageCommand, layers: &mut impl Layers) {
        match command {
            StageCommand::Evaluate(work) => self.queue(work),
            StageCommand::Trim { sequence, upto } => {
                // A work that waits says itself where it starts.
                let waits = self.works.iter().any(|work| work.pieces.iter().any(|piece| piece.sequence == sequence));
                if let (false, Some(slot)) = (waits, self.slot_of(sequence)) {
                    self.cut(slot, upto, layers);
                }
            }
            StageCommand::Forget { sequence } => self.forget(|one| one == sequence, layers),
            StageCommand::ForgetOwner { owner } => self.forget(|one| one.owner == owner, layers),
        }
    }

    fn queue(&mut self, work: StageWork) {
        let bytes = work.rows.bytes.len();
        let full = self.works.len() >= MAX_QUEUED || self.queued_bytes + bytes > MAX_QUEUED_BYTES;
        let refused = work.check(&self.facts).err().or(full.then_some(StageError::Busy { limit: MAX_QUEUED as u32 }));
        match refused {
            Some(error) => self.refuse(work.id, error),
            None => {
                self.queued_bytes += bytes;
                self.works.push_back(work);
            }
        }
    }

    fn forget(&mut self, which: impl Fn(SequenceId) -> bool, layers: &mut impl Layers) {
        let gone = |work: &StageWork| work.pieces.iter().any(|piece| which(piece.sequence));
        let (dropped, kept): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.works).into_iter().partition(gone);
        self.works = kept;
        for work in dropped {
            self.queued_bytes -= work.rows.bytes.len();
            self.refuse(work.id, StageError::BadWork { rule: "its sequence was forgotten meanwhile".to_owned() });
        }
        for slot in 0..self.seats.len() {
            if self.seats[slot].sequence.is_some_and(&which) {
                self.clear(slot, layers);
            }
        }
    }

    /// Computes one batch; `clock` gives microseconds. False if there was nothing to compute.
    pub(crate) fn step(&mut self, layers: &mut impl Layers, mut clock: impl FnMut() -> u64) -> bool {
        let works = self.next_batch();
        if works.is_empty() {
            return false;
        }
        let began = clock();
        self.batches += 1;
        let busy: BTreeSet<SequenceId> =
            works.iter().flat_map(|work| work.pieces.iter().map(|piece| piece.sequence)).collect();
        let mut taken = Vec::new();
        for work in works {
            self.queued_bytes -= work.rows.bytes.len();
            match self.seat(&work, &busy, layers) {
                Ok((hidden, rows)) => {
                    self.put_back.remove(&work.id);
                    taken.push(Taken { work, hidden, rows });
                }
                Err(StageError::Full { .. }) if self.may_wait(work.id) => self.wait(work),
                Err(error) => self.refuse(work.id, error),
            }
        }
        if !taken.is_empty() {
            self.compute(taken, layers, began, clock);
        }
        true
    }

    fn compute(&mut self, taken: Vec<Taken>, layers: &mut impl Layers, began: u64, mut clock: impl FnMut() -> u64) {
        let width = self.facts.n_embd as usize;
        // Rising slots, as the context wants them; each row remembers whose it is.
        let mut order: Vec<(BatchRow, usize, usize)> = Vec::new();
        for (whose, one) in taken.iter().enumerate() {
            order.extend(one.rows.iter().enumerate().map(|(at, row)| (*row, whose, at)));
        }
        order.sort_by_key(|(row, ..)| (row.slot, row.position));
        let rows: Vec<BatchRow> = order.iter().map(|(row, ..)| *row).collect();
        let mut hidden = Vec::with_capacity(rows.len() * width);
        for (_, whose, at) in &order {
            hidden.extend_from_slice(&taken[*whose].hidden[at * width..(at + 1) * width]);
        }
        let result = layers.evaluate(&rows, &hidden);
        let outcome = match result {
            Ok(numbers) if numbers.len() == hidden.len() => Ok(numbers),
            Ok(numbers) => Err(format!("{} numbers came out for {}", numbers.len(), hidden.len())),
            Err(error) => Err(error.to_string()),
        };
        let numbers = match outcome {
            Ok(numbers) => numbers,
            Err(reason) => {
                for slot in rows.iter().map(|row| row.slot as usize).collect::<BTreeSet<_>>() {
                    self.clear(slot, layers);
                }
                for one in taken {
                    self.refuse(one.work.id, StageError::Backend { reason: reason.clone() });
                }
                return;
            }
        };
        for row in &rows {
            self.seats[row.slot as usize].at = row.position + 1;
            self.seats[row.slot as usize].used = self.batches;
        }
        let mut outs: Vec<Vec<f32>> = taken.iter().map(|one| vec![0.0; one.hidden.len()]).collect();
        for (row, (_, whose, at)) in numbers.chunks_exact(width).zip(&order) {
            outs[*whose][at * width..(at + 1) * width].copy_from_slice(row);
        }
        let encoded: Vec<_> = taken
            .iter()
            .zip(outs)
            .map(|(one, out)| match one.work.output {
                true => HiddenRows::encode(&out, self.facts.n_embd, one.work.rows.wire),
                false => Ok(HiddenRows::none(one.work.rows.wire)),
            })
            .collect();
        // The time of the batch, shared by rows.
        let took = clock().saturating_sub(began);
        for (one, encoded) in taken.into_iter().zip(encoded) {
            let busy_us = took * one.rows.len() as u64 / rows.len().max(1) as u64;
            match encoded {
                Ok(rows) => self.events.push(StageEvent::Evaluated { work: one.work.id, rows, busy_us }),
                Err(error) => {
                    for row in &one.rows {
                        self.clear(row.slot as usize, layers);
                    }
                    self.refuse(one.work.id, StageError::BadResult(error));
                }
            }
        }
    }

    /// The works of the next batch, taken from the queue.
    fn next_batch(&mut self) -> Vec<StageWork> {
        let Some(first) = self.works.pop_front() else { return Vec::new() };
        let single = |work: &StageWork| work.pieces.iter().all(|piece| piece.rows == 1);
        if !single(&first) {
            return vec![first];
        }
        let mut sequences: BTreeSet<SequenceId> = first.pieces.iter().map(|piece| piece.sequence).collect();
        let mut batch = vec![first];
        let mut left = VecDeque::new();
        // Sequences of works that stay: what is behind them stays too.
        let mut blocked = BTreeSet::new();
        while let Some(work) = self.works.pop_front() {
            let own: Vec<SequenceId> = work.pieces.iter().map(|piece| piece.sequence).collect();
            let room = sequences.len() + own.len() <= self.facts.batch.min(self.facts.sequences) as usize;
            let free = own.iter().all(|one| !sequences.contains(one) && !blocked.contains(one));
            if single(&work) && room && free {
                sequences.extend(own);
                batch.push(work);
            } else {
                blocked.extend(own);
                left.push_back(work);
            }
        }
        self.works = left;
        batch
    }

    /// Slots for a work's sequences, cut back to where its pieces start.
    fn seat(
        &mut self,
        work: &StageWork,
        busy: &BTreeSet<SequenceId>,
        layers: &mut impl Layers,
    ) -> Result<(Vec<f32>, Vec<BatchRow>), StageError> {
        let hidden = work.rows.decode(self.facts.n_embd).map_err(StageError::BadRows)?;
        for piece in &work.pieces {
            let held = self.slot_of(piece.sequence).map_or(0, |slot| self.seats[slot].at);
            if piece.start > held {
                return Err(StageError::Gap { sequence: piece.sequence, held, start: piece.start });
            }
        }
        let mut slots = BTreeMap::new();
        for piece in &work.pieces {
            let slot = match self.slot_of(piece.sequence) {
                Some(slot) => slot,
                None => self.make_room(busy, layers)?,
            };
            self.seats[slot].sequence = Some(piece.sequence);
            if !self.cut(slot, piece.start, layers) && piece.start > 0 {
                return Err(StageError::Gap { sequence: piece.sequence, held: 0, start: piece.start });
            }
            layers.seated(slot as u32, piece.job);
            slots.insert(piece.sequence, slot as u32);
        }
        let row = |slot: u32, position| BatchRow { slot, position, token: 0, output: true };
        let rows = work.pieces.iter().flat_map(|piece| {
            let slot = slots.get(&piece.sequence).copied().unwrap_or(0);
            (piece.start..piece.start + piece.rows).map(move |position| row(slot, position))
        });
        Ok((hidden, rows.collect()))
    }

    /// Others' works wait for the slots that are taken: once these are computed there is room.
    fn may_wait(&self, work: WorkId) -> bool {
        !self.works.is_empty() && self.put_back.get(&work).is_none_or(|times| *times < MAX_PUT_BACK)
    }

    /// Puts a work behind all others but those that follow it in one of its sequences.
    fn wait(&mut self, work: StageWork) {
        *self.put_back.entry(work.id).or_default() += 1;
        self.queued_bytes += work.rows.bytes.len();
        let mut its: BTreeSet<SequenceId> = work.pieces.iter().map(|piece| piece.sequence).collect();
        let (mut others, mut behind) = (VecDeque::new(), VecDeque::from([work]));
        for next in self.works.drain(..) {
            if next.pieces.iter().any(|piece| its.contains(&piece.sequence)) {
                its.extend(next.pieces.iter().map(|piece| piece.sequence));
                behind.push_back(next);
            } else {
                others.push_back(next);
            }
        }
        others.append(&mut behind);
        self.works = others;
    }

    /// An empty slot, else that of the longest unused sequence for which no work waits.
    fn make_room(&mut self, busy: &BTreeSet<SequenceId>, layers: &mut impl Layers) -> Result<usize, StageError> {
        if let Some(empty) = self.seats.iter().position(|seat| seat.sequence.is_none()) {
            return Ok(empty);
        }
        let waits =
            |one: SequenceId| self.works.iter().any(|work| work.pieces.iter().any(|piece| piece.sequence == one));
        let idle = |seat: &Seat| seat.sequence.is_some_and(|one| !busy.contains(&one) && !waits(one));
        let oldest = self.seats.iter().enumerate().filter(|(_, seat)| idle(seat)).min_by_key(|(_, seat)| seat.used);
        let slot = oldest.map(|(slot, _)| slot).ok_or(StageError::Full { limit: self.facts.sequences })?;
        self.clear(slot, layers);
        Ok(slot)
    }

    fn slot_of(&self, sequence: SequenceId) -> Option<usize> {
        self.seats.iter().position(|seat| seat.sequence == Some(sequence))
    }

    /// False if the cache could not be cut there and was emptied.
    fn cut(&mut self, slot: usize, from: u32, layers: &mut impl Layers) -> bool {
        let seat = &mut self.seats[slot];
        if from >= seat.at {
            return true;
        }
        if layers.truncate(slot as u32, from) {
            seat.at = from;
            return true;
        }
        seat.at = 0;
        layers.truncate(slot as u32, 0);
        false
    }

    fn clear(&mut self, slot: usize, layers: &mut impl Layers) {
        self.seats[slot] = Seat::default();
        layers.truncate(slot as u32, 0);
    }

    fn refuse(&mut self, work: WorkId, error: StageError) {
        self.put_back.remove(&work);
        self.events.push(StageEvent::Refused { work, error });
    }
}
