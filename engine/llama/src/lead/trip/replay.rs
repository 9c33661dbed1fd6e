//! What a replaced stage has lost, sent again: from the rows that are kept, or computed again by the head.

use satgrid_engine::port::JobId;
use satgrid_engine::stage::codec::HiddenRows;
use satgrid_engine::stage::ring::{Held, RingCommand, RingPiece, RingWork};
use satgrid_types::WorkKind;

use super::{Ends, Flight, Trip, Way, ours, slots_of};
use crate::ffi::{BatchRow, DecodeError};

/// Positions that a stage lacks, and how far they are sent.
struct Replay {
    job: JobId,
    slot: u32,
    stage: u32,
    from: u32,
    upto: u32,
}

impl Trip {
    /// Notes what a stage that was replaced holds.
    fn behind(&mut self, stage: u32, held: &[Held]) {
        for held in held {
            if let Some(sequence) = self.sequences.get_mut(held.sequence as usize) {
                let upto = sequence.behind.get(&stage).map_or(held.upto, |before| held.upto.min(*before));
                sequence.behind.insert(stage, upto);
            }
        }
    }

    /// A stage holds less: works of those sequences that are under way are void, and go again behind what it lacks.
    pub(super) fn replaced(
        &mut self,
        stage: u32,
        held: &[Held],
        ends: &mut impl Ends,
        way: &mut impl Way,
    ) -> Result<(), DecodeError> {
        self.behind(stage, held);
        let lost: Vec<u32> = held.iter().map(|held| held.sequence).collect();
        let void = |flight: &Flight| {
            flight.answer.is_none() && flight.work.pieces.iter().any(|piece| lost.contains(&piece.sequence))
        };
        let pieces = self.flights.iter().filter(|flight| void(flight)).flat_map(|flight| &flight.work.pieces);
        let touched: Vec<u32> = pieces.map(|piece| piece.sequence).filter(|one| lost.contains(one)).collect();
        for slot in slots_of(&touched) {
            self.catch_up(slot, ends, way)?;
        }
        for at in 0..self.flights.len() {
            if void(&self.flights[at]) {
                let id = self.work_id();
                let flight = &mut self.flights[at];
                (flight.id, flight.work.id, flight.work.again) = (id, id, true);
                way.send(RingCommand::Work(flight.work.clone()))?;
            }
        }
        Ok(())
    }

    /// Sends again what stages lack of the positions that have come back. The answers need not be awaited: what follows goes
    /// the same way behind them.
    pub(super) fn catch_up(&mut self, slot: u32, ends: &mut impl Ends, way: &mut impl Way) -> Result<(), DecodeError> {
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
}
