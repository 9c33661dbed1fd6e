//! One batch around the ring, and the replay of what a replaced stage has lost.
//!
//! A batch is cut into works that follow each other closely: while the tail computes one, the stages compute the next and the
//! head the one after, so a long prompt keeps every machine busy. Answers are used in the order of the works.
//!
//! | a sequence is | the stages hold                         | leaves with                                                       |
//! |---------------|-----------------------------------------|-------------------------------------------------------------------|
//! | level         | what the tail holds, at least           | `NeedsReplay`: behind                                             |
//! | behind        | some stage less than that               | the replay that goes before its next rows: level                  |
//!
//! A sequence that is behind and idle costs nothing until it is used again. Replayed rows are those that were kept; where
//! they are gone, the head computes them again from the tokens.

use satgrid_types::{WireType, WorkKind};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use satgrid_engine::port::JobId;
use satgrid_engine::stage::codec::HiddenRows;
use satgrid_engine::stage::kept::KeptRows;
use satgrid_engine::stage::port::WorkId;
use satgrid_engine::stage::ring::{RingCommand, RingEvent, RingPiece, RingWork};

use crate::ffi::{BatchRow, DecodeError};

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

/// The way to the ring. Waiting hears commands of the node meanwhile and keeps them for later.
pub(crate) trait Way {
    fn send(&mut self, command: RingCommand) -> Result<(), DecodeError>;
    /// The next word of the ring.
    fn wait(&mut self) -> Result<RingEvent, DecodeError>;
}

/// How works are cut and how they travel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TripShape {
    pub(crate) slots: u32,
    pub(crate) stages: u32,
    /// Most rows in one work.
    pub(crate) chunk: u32,
    /// Single rows of many sequences go in so many works at the most, so that the machines compute at the same time.
    pub(crate) groups: u32,
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
    /// Positions that came back and are in the tail.
    at: u32,
    /// Stages that hold less, and how much.
    behind: BTreeMap<u32, u32>,
}

/// Positions that a stage lacks, and how far they are sent.
struct Replay {
    job: JobId,
    slot: u32,
    stage: u32,
    from: u32,
    upto: u32,
}

/// A work under way.
struct Flight {
    id: WorkId,
    rows: Range<usize>,
    work: RingWork,
    answer: Option<HiddenRows>,
}

/// Where the logits of a row of the batch are.
enum Logits {
    Tail(usize),
    Copied(Vec<f32>),
}

pub(crate) struct Trip {
    shape: TripShape,
    sequences: Vec<Sequence>,
    kept: KeptRows<u32>,
    next_work: u64,
    flights: VecDeque<Flight>,
    logits: BTreeMap<usize, Logits>,
}

impl Trip {
    pub(crate) fn new(shape: TripShape) -> Self {
        let sequences = vec![Sequence::default(); shape.slots as usize];
        let (kept, flights) = (KeptRows::new(KEPT_BYTES), VecDeque::new());
        Self { shape, sequences, kept, next_work: 0, flights, logits: BTreeMap::new() }
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

    /// A word of the ring between batches.
    pub(crate) fn hear(&mut self, event: RingEvent) {
        match event {
            RingEvent::NeedsReplay { stage, held } => {
                for held in held {
                    if let Some(sequence) = self.sequences.get_mut(held.sequence as usize) {
                        let upto = sequence.behind.get(&stage).map_or(held.upto, |before| held.upto.min(*before));
                        sequence.behind.insert(stage, upto);
                    }
                }
            }
            RingEvent::Failed { .. } => self.lost(),
            // Of a work that is void.
            RingEvent::Done { .. } => {}
        }
    }

    /// No stage holds anything any more.
    fn lost(&mut self) {
        self.flights.clear();
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

    /// Computes the rows. On an error every sequence of the batch is in an unknown state: the caller empties it.
    pub(crate) fn evaluate(
        &mut self,
        rows: &[BatchRow],
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<(), DecodeError> {
        self.logits.clear();
        self.flights.clear();
        let mut chunks = cut(rows, &self.shape);
        // What a replaced stage lacks goes first.
        for slot in slots(rows) {
            self.catch_up(slot, ends, way)?;
        }
        // Each stage has a work, and one is on the way to it.
        let most = 2 * self.shape.stages as usize + 1;
        while !chunks.is_empty() || !self.flights.is_empty() {
            while self.flights.len() < most {
                let Some(range) = chunks.pop_front() else { break };
                self.launch(rows, range, ends, way)?;
            }
            while self.flights.front().is_some_and(|flight| flight.answer.is_none()) {
                let event = way.wait()?;
                self.answered(event, ends, way)?;
            }
            let Some(flight) = self.flights.pop_front() else { continue };
            self.land(rows, flight, chunks.is_empty() && self.flights.is_empty(), ends)?;
        }
        for row in rows {
            self.sequence(row.slot)?.drafted = None;
        }
        Ok(())
    }

    /// Computes the head over some rows and sends them.
    fn launch(
        &mut self,
        rows: &[BatchRow],
        range: Range<usize>,
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<(), DecodeError> {
        let part = &rows[range.clone()];
        let hidden = ends.head(part)?;
        let hidden = HiddenRows::encode(&hidden, ends.width(), self.shape.wire).map_err(|error| ours(&error))?;
        let mut pieces: Vec<RingPiece> = Vec::new();
        for (at, row) in (0_u32..).zip(part) {
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
        if self.shape.stages == 0 {
            let answer = Some(work.rows.clone());
            self.flights.push_back(Flight { id, rows: range, work, answer });
            return Ok(());
        }
        way.send(RingCommand::Work(work.clone()))?;
        self.flights.push_back(Flight { id, rows: range, work, answer: None });
        Ok(())
    }

    /// Takes a word of the ring while works are under way.
    fn answered(&mut self, event: RingEvent, ends: &mut impl Ends, way: &mut impl Way) -> Result<(), DecodeError> {
        match event {
            RingEvent::Done { work, rows } => {
                if let Some(flight) = self.flights.iter_mut().find(|flight| flight.id == work) {
                    if rows.count != flight.work.rows.count || rows.wire != self.shape.wire {
                        let reason = format!("{} rows came back for {}", rows.count, flight.work.rows.count);
                        return Err(DecodeError::Ring { reason });
                    }
                    flight.answer = Some(rows);
                }
                Ok(())
            }
            RingEvent::NeedsReplay { stage, held } => {
                let lost: Vec<u32> = held.iter().map(|held| held.sequence).collect();
                self.hear(RingEvent::NeedsReplay { stage, held });
                let touched: Vec<u32> = self
                    .flights
                    .iter()
                    .filter(|flight| flight.answer.is_none())
                    .flat_map(|flight| flight.work.pieces.iter().map(|piece| piece.sequence))
                    .filter(|sequence| lost.contains(sequence))
                    .collect();
                for slot in slots_of(&touched) {
                    self.catch_up(slot, ends, way)?;
                }
                for at in 0..self.flights.len() {
                    let flight = &self.flights[at];
                    let void = flight.answer.is_none()
                        && flight.work.pieces.iter().any(|piece| lost.contains(&piece.sequence));
                    if void {
                        let id = self.work_id();
                        let flight = &mut self.flights[at];
                        (flight.id, flight.work.id, flight.work.again) = (id, id, true);
                        way.send(RingCommand::Work(flight.work.clone()))?;
                    }
                }
                Ok(())
            }
            RingEvent::Failed { reason } => {
                self.lost();
                Err(DecodeError::Ring { reason })
            }
        }
    }

    /// Sends again what stages lack of the positions that have come back. The answers need not be awaited: what follows goes
    /// the same way behind them.
    fn catch_up(&mut self, slot: u32, ends: &mut impl Ends, way: &mut impl Way) -> Result<(), DecodeError> {
        let sequence = self.sequence(slot)?;
        let (upto, job) = (sequence.at, sequence.job);
        for (stage, held) in std::mem::take(&mut sequence.behind) {
            if held >= upto {
                continue;
            }
            let mut replay = Replay { job, slot, stage, from: held, upto };
            if self.kept.upto(slot) < upto {
                self.compute_again(&mut replay, ends, way)?;
                continue;
            }
            while replay.from < upto {
                let end = upto.min(replay.from + self.shape.chunk.max(1));
                let Some(rows) = self.kept.rows(slot, replay.from, end) else { break };
                self.send_again(&mut replay, rows, way)?;
            }
        }
        Ok(())
    }

    /// Sends rows of a replay, which begin where it has come to.
    fn send_again(&mut self, replay: &mut Replay, rows: HiddenRows, way: &mut impl Way) -> Result<(), DecodeError> {
        let Replay { job, slot, stage, from: start, .. } = *replay;
        let piece = RingPiece { job, sequence: slot, start, rows: rows.count, purpose: WorkKind::Replay };
        replay.from += rows.count;
        let id = self.work_id();
        way.send(RingCommand::Work(RingWork { id, pieces: vec![piece], rows, ends_at: Some(stage), again: false }))
    }

    /// A replay whose rows are gone: the head computes all of the sequence again from its tokens.
    fn compute_again(
        &mut self,
        replay: &mut Replay,
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<(), DecodeError> {
        let slot = replay.slot;
        let tokens = self.sequence(slot)?.tokens.clone();
        self.kept.forget(slot);
        ends.truncate_head(slot, 0);
        let rows: Vec<BatchRow> =
            (0_u32..).zip(&tokens).map(|(position, &token)| BatchRow { slot, position, token, output: true }).collect();
        for part in rows.chunks(self.shape.chunk.max(1) as usize) {
            let hidden = ends.head(part)?;
            let hidden = HiddenRows::encode(&hidden, ends.width(), self.shape.wire).map_err(|error| ours(&error))?;
            let start = part.first().map_or(0, |row| row.position);
            self.kept.push(slot, start, &hidden);
            let (from, upto) = (replay.from.max(start), replay.upto.min(start + hidden.count));
            if from == replay.from && from < upto {
                self.send_again(replay, hidden.slice(from - start, upto - start), way)?;
            }
        }
        Ok(())
    }

    /// Computes the tail over rows that came back.
    fn land(&mut self, rows: &[BatchRow], flight: Flight, last: bool, ends: &mut impl Ends) -> Result<(), DecodeError> {
        let part = &rows[flight.rows.clone()];
        let answer = flight.answer.unwrap_or_else(|| HiddenRows::none(self.shape.wire));
        let hidden = answer.decode(ends.width()).map_err(|error| theirs(&error))?;
        ends.tail(part, &hidden)?;
        for (at, row) in part.iter().enumerate() {
            self.sequence(row.slot)?.at = row.position + 1;
            if row.output {
                let logits = if last { Logits::Tail(at) } else { Logits::Copied(ends.logits(at)?.to_vec()) };
                self.logits.insert(flight.rows.start + at, logits);
            }
        }
        Ok(())
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

/// Fewer single rows are no work of their own: each work costs every stage a batch.
const LEAST_GROUP: usize = 2;

/// Cuts a batch into works: single rows of many sequences go in a few groups, many rows of one are cut to chunks. A batch of
/// the fast profile may hold both: its single rows are one work.
fn cut(rows: &[BatchRow], shape: &TripShape) -> VecDeque<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if rows[run.start].slot == row.slot => run.end = at + 1,
            _ => runs.push(at..at + 1),
        }
    }
    let mut works: VecDeque<Range<usize>> = VecDeque::new();
    let mut singles: Option<Range<usize>> = None;
    let group = |works: &mut VecDeque<Range<usize>>, singles: Range<usize>| {
        let groups = (singles.len() / LEAST_GROUP).clamp(1, shape.groups.max(1) as usize);
        let step = singles.len().div_ceil(groups).max(1);
        works.extend(singles.clone().step_by(step).map(|from| from..singles.end.min(from + step)));
    };
    for run in runs {
        if run.len() == 1 {
            match singles.as_mut().filter(|singles| singles.end == run.start) {
                Some(singles) => singles.end = run.end,
                None => {
                    if let Some(singles) = singles.replace(run) {
                        group(&mut works, singles);
                    }
                }
            }
            continue;
        }
        if let Some(singles) = singles.take() {
            group(&mut works, singles);
        }
        let step = shape.chunk.max(1) as usize;
        works.extend(run.clone().step_by(step).map(|from| from..run.end.min(from + step)));
    }
    if let Some(singles) = singles {
        group(&mut works, singles);
    }
    works
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_cut_so_that_machines_work_at_the_same_time() {
        let check = |slots: &[u32], groups: u32, expect: &[usize]| {
            let row = |&slot: &u32| BatchRow { slot, position: 0, token: 0, output: true };
            let rows: Vec<BatchRow> = slots.iter().map(row).collect();
            let shape = TripShape { slots: 16, stages: 2, chunk: 4, groups, wire: WireType::F32 };
            let lengths: Vec<usize> = cut(&rows, &shape).into_iter().map(|work| work.len()).collect();
            assert_eq!(lengths, expect, "{slots:?} in {groups}");
        };
        check(&[0, 1, 2, 3, 4, 5, 6, 7], 3, &[3, 3, 2]);
        check(&[0, 1, 2, 3, 4, 5, 6, 7], 1, &[8]);
        check(&[0, 1, 2], 3, &[3]);
        check(&[0], 3, &[1]);
        // A run of one sequence is a work of its own, and long ones are cut.
        check(&[0, 1, 1, 1, 2], 3, &[1, 3, 1]);
        check(&[5; 10], 3, &[4, 4, 2]);
    }
}
