//! Batches around the ring, and the replay of what a replaced stage has lost.
//!
//! Several batches are under way at once, and each is cut into works that follow each other closely: while the tail computes
//! one, the stages compute others and the head the one after, so that many streams, or a long prompt, keep every machine
//! busy. A sequence is in one batch at a time and its works come back in order; batches overtake each other as they will.
//! Nothing here waits: works go out, words of the ring come in, and what is back is landed when the caller has time.
//!
//! | a batch is | its works                                 | leaves with                                                 |
//! |------------|-------------------------------------------|-------------------------------------------------------------|
//! | waiting    | are cut, not all sent: no more than so many are under way | an answer makes room: away                  |
//! | away       | are sent                                  | the last of them through the tail: back; an error: failed   |
//! |            |                                           | `Ended`: still away, without the rows of the jobs that ended |
//!
//! | a sequence is | the stages hold                         | leaves with                                                       |
//! |---------------|-----------------------------------------|-------------------------------------------------------------------|
//! | level         | what came back, at least                | `NeedsReplay`: behind                                             |
//! | behind        | some stage less than that               | the replay that goes before its next rows: level                  |
//!
//! A sequence that is behind and idle costs nothing until it is used again. Replayed rows are those that were kept; where
//! they are gone, the head computes them again from the tokens.

mod ended;
mod replay;

use satgrid_types::{WireType, WorkKind};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use satgrid_engine::port::JobId;
use satgrid_engine::stage::codec::HiddenRows;
use satgrid_engine::stage::kept::KeptRows;
use satgrid_engine::stage::port::WorkId;
use satgrid_engine::stage::ring::{RingCommand, RingEvent, RingPiece, RingWork};

use crate::ffi::{BatchRow, DecodeError};
use crate::scheduler::Failed;

/// Bytes of rows that are kept for replays.
const KEPT_BYTES: usize = 64 << 20;

/// The lead's two ends of the model.
pub(crate) trait Ends {
    fn width(&self) -> u32;
    /// Tokens to the first layers' rows; by rising slot and position.
    fn head(&mut self, rows: &[BatchRow]) -> Result<Vec<f32>, DecodeError>;
    /// The last layers and the head over rows that came back.
    fn tail(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<(), DecodeError>;
    /// Logits of a row of the last `tail` that asked for them.
    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError>;
    fn truncate_head(&mut self, slot: u32, from: u32) -> bool;
    fn truncate_tail(&mut self, slot: u32, from: u32) -> bool;
}

/// The way to the ring.
pub(crate) trait Way {
    fn send(&mut self, command: RingCommand) -> Result<(), DecodeError>;
}

/// How works are cut and how they travel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TripShape {
    pub(crate) slots: u32,
    pub(crate) stages: u32,
    /// Most rows in one work.
    pub(crate) chunk: u32,
    /// Works that are under way at the most.
    pub(crate) works: u32,
    /// Rows of several works may be one batch of the tail, and several batches under way: in the exact profile no bit changes.
    pub(crate) exact: bool,
    pub(crate) wire: WireType,
}

#[derive(Debug, Clone, Default)]
struct Sequence {
    job: JobId,
    /// Positions below this are prompt.
    prompt: u32,
    /// Positions from here on are guessed.
    drafted: Option<u32>,
    /// What the head holds.
    tokens: Vec<u32>,
    /// Positions that came back.
    at: u32,
    /// Stages that hold less, and how much.
    behind: BTreeMap<u32, u32>,
}

/// A work under way.
struct Flight {
    id: WorkId,
    batch: u64,
    /// Its rows, as places in the batch.
    places: Vec<usize>,
    work: RingWork,
    answer: Option<HiddenRows>,
}

/// A batch that is not back.
#[derive(Default)]
struct Batch {
    rows: Vec<BatchRow>,
    /// Works that are cut and not sent.
    waiting: VecDeque<Vec<usize>>,
    /// Works that are sent and not landed.
    away: usize,
    logits: BTreeMap<usize, Logits>,
    /// Slots whose jobs have ended meanwhile, and why.
    failed: Failed,
}

impl Batch {
    /// The rows at these places.
    fn part(&self, places: &[usize]) -> Vec<BatchRow> {
        places.iter().filter_map(|at| self.rows.get(*at).copied()).collect()
    }
}

/// Where the logits of a row of the batch are.
enum Logits {
    Tail(usize),
    Copied(Vec<f32>),
}

/// A batch that is back or failed, by its number: its logits, and the slots that came to nothing in it.
type Landed = (u64, Result<(BTreeMap<usize, Logits>, Failed), DecodeError>);

pub(crate) struct Trip {
    shape: TripShape,
    sequences: Vec<Sequence>,
    kept: KeptRows<u32>,
    next_work: u64,
    /// By number, which rises with time.
    batches: BTreeMap<u64, Batch>,
    flights: VecDeque<Flight>,
    landed: VecDeque<Landed>,
    /// Of the batch that was told last.
    logits: BTreeMap<usize, Logits>,
}

impl Trip {
    pub(crate) fn new(shape: TripShape) -> Self {
        let sequences = vec![Sequence::default(); shape.slots as usize];
        Self {
            shape,
            sequences,
            kept: KeptRows::new(KEPT_BYTES),
            next_work: 0,
            batches: BTreeMap::new(),
            flights: VecDeque::new(),
            landed: VecDeque::new(),
            logits: BTreeMap::new(),
        }
    }

    /// Batches under way that keep every machine at work: one is computed at each and one is on the way to it.
    pub(crate) fn waves(&self) -> u32 {
        if self.shape.exact { self.shape.works } else { 1 }
    }

    /// Whether one more batch may begin.
    pub(crate) fn room(&self) -> bool {
        match self.shape.exact {
            true => self.waiting() == 0 && self.flights.len() < self.shape.works as usize,
            false => self.batches.is_empty(),
        }
    }

    fn waiting(&self) -> usize {
        self.batches.values().map(|batch| batch.waiting.len()).sum()
    }

    /// The rows of a slot are for this job from now on.
    pub(crate) fn seated(&mut self, slot: u32, job: JobId, prompt: u32) {
        if let Some(sequence) = self.sequences.get_mut(slot as usize) {
            (sequence.job, sequence.prompt, sequence.drafted) = (job, prompt, None);
        }
    }

    /// In the next batch the slot's rows from this position on are guesses, the certain one before them counted with them.
    pub(crate) fn guessed(&mut self, slot: u32, from: u32) {
        if let Some(sequence) = self.sequences.get_mut(slot as usize) {
            sequence.drafted = Some(from);
        }
    }

    /// No stage holds anything any more.
    fn lost(&mut self) {
        let Some(last) = self.shape.stages.checked_sub(1) else { return };
        for sequence in &mut self.sequences {
            // A replay to the last stage passes through all.
            sequence.behind = BTreeMap::from([(last, 0)]);
        }
    }

    /// Drops a slot's positions at `from` and beyond. Stages hear of it with the next rows, or now if nothing is left.
    pub(crate) fn truncate(
        &mut self,
        slot: u32,
        from: u32,
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<bool, DecodeError> {
        let cut = ends.truncate_head(slot, from) && ends.truncate_tail(slot, from);
        if let Some(sequence) = self.sequences.get_mut(slot as usize) {
            sequence.tokens.truncate(from as usize);
            sequence.at = sequence.at.min(from);
        }
        self.kept.truncate(slot, from);
        if from == 0 {
            self.kept.forget(slot);
            if self.shape.stages > 0 {
                way.send(RingCommand::Forget { sequence: slot })?;
            }
        }
        Ok(cut)
    }

    /// Logits of a row of the last batch.
    pub(crate) fn logits<'a>(&'a self, row: usize, ends: &'a mut impl Ends) -> Result<&'a [f32], DecodeError> {
        match self.logits.get(&row).ok_or(DecodeError::NoLogits { row })? {
            Logits::Tail(at) => ends.logits(*at),
            Logits::Copied(numbers) => Ok(numbers),
        }
    }

    /// Begins a batch: computes the head and sends rows, as many works as may be under way. On an error the batch is over, and
    /// every sequence in it is in an unknown state: the caller empties it.
    pub(crate) fn launch(
        &mut self,
        batch: u64,
        rows: &[BatchRow],
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<(), DecodeError> {
        // What a replaced stage lacks goes first.
        for slot in slots(rows) {
            self.catch_up(slot, ends, way)?;
        }
        let waiting = cut(rows, &self.shape).into_iter().map(Iterator::collect).collect();
        self.batches.insert(batch, Batch { rows: rows.to_vec(), waiting, ..Batch::default() });
        self.send_waiting(ends, way).inspect_err(|error| {
            self.drop_batch(batch);
            // What could not be sent may have been an older batch's.
            self.fail(error);
        })
    }

    /// Nothing that is back of this batch is awaited any more.
    fn drop_batch(&mut self, batch: u64) {
        self.batches.remove(&batch);
        self.flights.retain(|flight| flight.batch != batch);
    }

    /// A batch that is back or failed; its logits are there until the next call.
    pub(crate) fn landed(
        &mut self,
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Option<(u64, Result<Failed, DecodeError>)> {
        while self.landed.is_empty() {
            let landing = self.landing();
            if landing.is_empty() {
                return None;
            }
            self.land(landing, ends);
            if let Err(error) = self.send_waiting(ends, way) {
                self.fail(&error);
            }
        }
        let (batch, outcome) = self.landed.pop_front()?;
        let outcome = outcome.map(|(logits, failed)| {
            self.logits = logits;
            failed
        });
        Some((batch, outcome))
    }

    /// Every batch under way has failed.
    fn fail(&mut self, error: &DecodeError) {
        self.flights.clear();
        for batch in std::mem::take(&mut self.batches).into_keys() {
            self.landed.push_back((batch, Err(DecodeError::Ring { reason: error.to_string() })));
        }
    }

    /// Sends works that wait, oldest first, as many as may be under way.
    fn send_waiting(&mut self, ends: &mut impl Ends, way: &mut impl Way) -> Result<(), DecodeError> {
        while self.flights.len() < self.shape.works.max(1) as usize {
            let mut batches = self.batches.iter_mut();
            let Some((batch, places)) = batches.find_map(|(id, batch)| Some((*id, batch.waiting.pop_front()?))) else {
                break;
            };
            self.send(batch, places, ends, way)?;
        }
        Ok(())
    }

    /// Computes the head over some rows of a batch and sends them.
    fn send(
        &mut self,
        batch: u64,
        places: Vec<usize>,
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<(), DecodeError> {
        let Some(held) = self.batches.get_mut(&batch) else { return Ok(()) };
        held.away += 1;
        let part = held.part(&places);
        let hidden = ends.head(&part)?;
        let hidden = HiddenRows::encode(&hidden, ends.width(), self.shape.wire).map_err(|error| ours(&error))?;
        let mut pieces: Vec<RingPiece> = Vec::new();
        for (at, row) in (0_u32..).zip(&part) {
            let sequence = self.sequence(row.slot)?;
            sequence.tokens.truncate(row.position as usize);
            sequence.tokens.push(row.token);
            let purpose = match sequence.drafted {
                Some(from) if row.position >= from => WorkKind::Draft,
                _ if row.position < sequence.prompt => WorkKind::Prefill,
                _ => WorkKind::Decode,
            };
            let job = sequence.job;
            self.kept.push(row.slot, row.position, &hidden.slice(at, at + 1));
            match pieces.last_mut() {
                // A piece that ends in guesses counts as one.
                Some(last) if last.sequence == row.slot => (last.rows, last.purpose) = (last.rows + 1, purpose),
                _ => pieces.push(RingPiece { job, sequence: row.slot, start: row.position, rows: 1, purpose }),
            }
        }
        let id = self.work_id();
        let work = RingWork { id, pieces, rows: hidden, ends_at: None, again: false };
        let alone = self.shape.stages == 0;
        let answer = alone.then(|| work.rows.clone());
        if !alone {
            way.send(RingCommand::Work(work.clone()))?;
        }
        self.flights.push_back(Flight { id, batch, places, work, answer });
        if alone {
            self.came_back(self.flights.len() - 1);
        }
        Ok(())
    }

    /// Takes a word of the ring.
    pub(crate) fn heard(&mut self, event: RingEvent, ends: &mut impl Ends, way: &mut impl Way) {
        let outcome = match event {
            RingEvent::Done { work, rows } => self.answered(work, rows),
            RingEvent::NeedsReplay { stage, held } => self.replaced(stage, &held, ends, way),
            RingEvent::Ended { jobs, reason } => self.ended(&jobs, &reason, ends, way),
            RingEvent::Failed { reason } => {
                self.lost();
                Err(DecodeError::Ring { reason })
            }
        };
        if let Err(error) = outcome {
            self.fail(&error);
        }
    }

    /// Rows of a work; of one that is void they are nobody's.
    fn answered(&mut self, work: WorkId, rows: HiddenRows) -> Result<(), DecodeError> {
        let Some(at) = self.flights.iter().position(|flight| flight.id == work) else { return Ok(()) };
        let flight = &mut self.flights[at];
        if rows.count != flight.work.rows.count || rows.wire != self.shape.wire {
            let reason = format!("{} rows came back for {}", rows.count, flight.work.rows.count);
            return Err(DecodeError::Ring { reason });
        }
        flight.answer = Some(rows);
        self.came_back(at);
        Ok(())
    }

    /// The rows of this flight came back: no stage before the ring's end lacks them by itself.
    fn came_back(&mut self, at: usize) {
        for piece in &self.flights[at].work.pieces {
            if let Some(sequence) = self.sequences.get_mut(piece.sequence as usize) {
                sequence.at = piece.start + piece.rows;
            }
        }
    }

    /// Flights that came back and go through the tail together: the first, with the others of single rows where it is one.
    fn landing(&mut self) -> Vec<Flight> {
        // Works of one batch land in their order.
        let (mut behind, mut chosen) = (BTreeSet::new(), Vec::new());
        for (at, flight) in self.flights.iter().enumerate() {
            let single = flight.work.pieces.iter().all(|piece| piece.rows == 1);
            let fits = chosen.is_empty() || (self.shape.exact && single);
            if behind.contains(&flight.batch) || flight.answer.is_none() || !fits {
                behind.insert(flight.batch);
                continue;
            }
            chosen.push(at);
            if !single {
                break;
            }
        }
        // From the last, so that places stay true.
        let mut flights: Vec<Flight> = chosen.into_iter().rev().filter_map(|at| self.flights.remove(at)).collect();
        flights.reverse();
        flights
    }

    /// Computes the tail over rows that came back.
    fn land(&mut self, flights: Vec<Flight>, ends: &mut impl Ends) {
        let outcome = self.tail(&flights, ends);
        for (number, flight) in flights.into_iter().enumerate() {
            let Some(batch) = self.batches.get_mut(&flight.batch) else { continue };
            batch.away = batch.away.saturating_sub(1);
            let logits = match &outcome {
                Ok(places) => &places[number],
                Err(error) => {
                    self.landed.push_back((flight.batch, Err(DecodeError::Ring { reason: error.to_string() })));
                    self.drop_batch(flight.batch);
                    continue;
                }
            };
            let last = batch.away == 0 && batch.waiting.is_empty();
            for (place, at) in flight.places.into_iter().zip(logits) {
                if !batch.rows.get(place).is_some_and(|row| row.output) {
                    continue;
                }
                let found = match last {
                    true => Ok(Logits::Tail(*at)),
                    false => ends.logits(*at).map(|logits| Logits::Copied(logits.to_vec())),
                };
                // A row without logits shows when they are asked for.
                batch.logits.extend(found.ok().map(|found| (place, found)));
            }
            if last {
                self.complete(flight.batch);
            }
        }
    }

    /// All of a batch is back, but for what came to nothing.
    fn complete(&mut self, number: u64) {
        let Some(batch) = self.batches.remove(&number) else { return };
        for row in &batch.rows {
            if let Some(sequence) = self.sequences.get_mut(row.slot as usize) {
                sequence.drafted = None;
            }
        }
        self.landed.push_back((number, Ok((batch.logits, batch.failed))));
    }

    /// One batch of the tail over the rows of several flights; where each row of each went.
    fn tail(&mut self, flights: &[Flight], ends: &mut impl Ends) -> Result<Vec<Vec<usize>>, DecodeError> {
        let width = ends.width() as usize;
        // Rising slots, as the tail wants them; each row remembers whose it is.
        let mut order: Vec<(BatchRow, usize, usize)> = Vec::new();
        let mut answers = Vec::with_capacity(flights.len());
        for (number, flight) in flights.iter().enumerate() {
            let Some(batch) = self.batches.get(&flight.batch) else { continue };
            let rows = batch.part(&flight.places);
            order.extend(rows.into_iter().enumerate().map(|(at, row)| (row, number, at)));
            let none = HiddenRows::none(self.shape.wire);
            let answer = flight.answer.as_ref().unwrap_or(&none);
            answers.push(answer.decode(ends.width()).map_err(|error| theirs(&error))?);
        }
        order.sort_by_key(|(row, ..)| (row.slot, row.position));
        let rows: Vec<BatchRow> = order.iter().map(|(row, ..)| *row).collect();
        let mut hidden = Vec::with_capacity(rows.len() * width);
        let mut places: Vec<Vec<usize>> = flights.iter().map(|flight| vec![0; flight.places.len()]).collect();
        for (place, (_, number, at)) in order.into_iter().enumerate() {
            hidden.extend_from_slice(answers[number].get(at * width..(at + 1) * width).unwrap_or_default());
            places[number][at] = place;
        }
        ends.tail(&rows, &hidden)?;
        Ok(places)
    }

    fn sequence(&mut self, slot: u32) -> Result<&mut Sequence, DecodeError> {
        let failed = || DecodeError::Ring { reason: format!("slot {slot} is not there") };
        self.sequences.get_mut(slot as usize).ok_or_else(failed)
    }

    fn work_id(&mut self) -> WorkId {
        self.next_work += 1;
        WorkId(self.next_work)
    }
}

fn ours(error: &dyn std::fmt::Display) -> DecodeError {
    DecodeError::Ring { reason: format!("the first layers' rows: {error}") }
}

fn theirs(error: &dyn std::fmt::Display) -> DecodeError {
    DecodeError::Ring { reason: format!("the rows that came back: {error}") }
}

fn slots(rows: &[BatchRow]) -> Vec<u32> {
    slots_of(&rows.iter().map(|row| row.slot).collect::<Vec<_>>())
}

fn slots_of(slots: &[u32]) -> Vec<u32> {
    let mut slots = slots.to_vec();
    slots.sort_unstable();
    slots.dedup();
    slots
}

/// Cuts a batch into works: single rows of many sequences go together, many rows of one are cut to chunks. A batch of the
/// fast profile may hold both.
fn cut(rows: &[BatchRow], shape: &TripShape) -> VecDeque<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if rows[run.start].slot == row.slot => run.end = at + 1,
            _ => runs.push(at..at + 1),
        }
    }
    let step = shape.chunk.max(1) as usize;
    let mut works: VecDeque<Range<usize>> = VecDeque::new();
    let mut singles = false;
    for run in runs {
        let single = run.len() == 1;
        match works.back_mut().filter(|_| single && singles) {
            Some(work) => work.end = run.end,
            None => works.extend(run.clone().step_by(step).map(|from| from..run.end.min(from + step))),
        }
        singles = single;
    }
    works
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_cut_so_that_machines_work_at_the_same_time() {
        let check = |slots: &[u32], expect: &[usize]| {
            let row = |&slot: &u32| BatchRow { slot, position: 0, token: 0, output: true };
            let rows: Vec<BatchRow> = slots.iter().map(row).collect();
            let shape = TripShape { slots: 16, stages: 2, chunk: 4, works: 6, exact: true, wire: WireType::F32 };
            let lengths: Vec<usize> = cut(&rows, &shape).into_iter().map(|work| work.len()).collect();
            assert_eq!(lengths, expect, "{slots:?}");
        };
        check(&[0, 1, 2, 3, 4, 5, 6, 7], &[8]);
        check(&[0], &[1]);
        // A run of one sequence is a work of its own, and long ones are cut.
        check(&[0, 1, 1, 1, 2], &[1, 3, 1]);
        check(&[0, 1, 2, 2], &[2, 2]);
        check(&[5; 10], &[4, 4, 2]);
    }
}
