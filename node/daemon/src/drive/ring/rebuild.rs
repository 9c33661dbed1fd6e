//! What a replaced worker lacks, or one that dropped a sequence, rebuilt from the rows that the worker before it kept.
//!
//! Those rows go out once more, as replays that end at the worker that lacks them: it alone computes them, it alone is paid,
//! and the lead's engine is asked for nothing. Where they are not kept any more, or do not come through in time, the engine
//! sends the positions again and the workers before evaluate them anew. Before the first worker is the lead itself, whose
//! engine keeps its own rows: there is nothing to rebuild from here.
//!
//! | a rebuild's works | leaves with                                                                      |
//! |-------------------|----------------------------------------------------------------------------------|
//! | under way         | all answered: the engine is told that the worker holds what had come back        |
//! |                   | refused, or late (`WITHIN`): the engine is told how little of that sequence it holds |

use super::{ConsumerMessage, Running, Said, UnderWay};
use satgrid_engine::{
    port::JobId,
    stage::{
        codec::HiddenRows,
        port::WorkId,
        ring::{Held, RingEvent, RingPiece, RingWork},
    },
};
use satgrid_protocol::frame::{MAX_RESENDS, Resend};
use satgrid_types::WorkKind;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// How long kept rows may take to come through.
const WITHIN: Duration = Duration::from_secs(5);
/// Works of rebuilds are numbered from here on, away from those of the engine.
const FIRST_REBUILD: u64 = 1 << 62;

/// What is being rebuilt of one job at one worker.
pub(super) struct Rebuild {
    number: u64,
    pub(super) stage: usize,
    /// Works that are not answered.
    left: BTreeSet<u64>,
    /// By sequence: what the worker holds without this, and with it.
    wanted: BTreeMap<u32, (u32, u32)>,
    /// Sequences that came to nothing.
    failed: BTreeSet<u32>,
}

impl Rebuild {
    pub(super) fn is_left(&self, work: u64) -> bool {
        self.left.contains(&work)
    }
}

pub(super) fn is_rebuild(work: u64) -> bool {
    work >= FIRST_REBUILD
}

impl Running {
    /// A job's lost worker has a successor: what the worker before it is to send again, with that worker's place.
    pub(super) fn rebuild_lost(&mut self, id: JobId) -> Option<(usize, Vec<Resend>)> {
        let stage = self.jobs.get(&id)?.lost?;
        let own = self.sequences.iter().filter(|(_, sequence)| sequence.job == id && sequence.back > 0);
        let wanted = own.map(|(number, sequence)| (*number, (0, sequence.back))).collect();
        self.begin_rebuild(id, stage, wanted)
    }

    /// A worker has dropped a sequence that a job uses: what the worker before it is told, where there is one.
    pub(super) fn rebuild_gap(&mut self, stage: u32, sequence: u32, held: u32) -> Option<Vec<ConsumerMessage>> {
        let super::Sequence { job, back } = self.sequences.get(&sequence)?;
        let (id, back) = (*job, *back);
        let job = self.jobs.get_mut(&id).filter(|job| job.ready && job.rebuild.is_none() && job.lost.is_none())?;
        if back <= held {
            return None;
        }
        job.ready = false;
        let wanted = BTreeMap::from([(sequence, (held, back))]);
        let Some((at, resend)) = self.begin_rebuild(id, stage as usize, wanted) else {
            self.jobs.entry(id).and_modify(|job| job.ready = true);
            return None;
        };
        let mut orders = self.tell(id);
        orders.extend(self.route(id, at, resend));
        Some(orders)
    }

    fn begin_rebuild(
        &mut self,
        id: JobId,
        stage: usize,
        wanted: BTreeMap<u32, (u32, u32)>,
    ) -> Option<(usize, Vec<Resend>)> {
        let before = stage.checked_sub(1)?;
        let layers = self.parts.plan.get(stage)?.range.layers();
        let (mut resend, mut failed) = (Vec::new(), BTreeSet::new());
        for (&sequence, &(held, back)) in &wanted {
            let works = (back - held).div_ceil(self.batch) as usize;
            if resend.len() + works > MAX_RESENDS {
                failed.insert(sequence);
                continue;
            }
            for start in (held..back).step_by(self.batch as usize) {
                self.next_rebuild += 1;
                let (work, rows) = (FIRST_REBUILD + self.next_rebuild, self.batch.min(back - start));
                resend.push(Resend { work, sequence, start, rows });
            }
        }
        if resend.is_empty() {
            return None;
        }
        let job = self.jobs.get_mut(&id)?;
        for Resend { work, sequence, start, rows } in resend.iter().cloned() {
            let piece = RingPiece { job: id, sequence, start, rows, purpose: WorkKind::Replay };
            let none = HiddenRows::none(self.parts.wire);
            let ends_at = u32::try_from(stage).ok();
            let around = RingWork { id: WorkId(work), pieces: vec![piece], rows: none, ends_at, again: false };
            self.works.insert(work, UnderWay { work: around, from: stage, sent: Instant::now() });
            job.tally.sent(WorkKind::Replay, rows, &[]);
            if let Some(worker) = job.workers.get_mut(stage)
                && let Some(sent) = worker.sent.plus(WorkKind::Replay, rows.into(), layers)
            {
                worker.sent = sent;
            }
        }
        self.next_rebuild += 1;
        let number = self.next_rebuild;
        let left = resend.iter().map(|one| one.work).collect();
        tracing::info!(job = id.0, stage, works = resend.len(), "rows that were kept are sent again");
        job.rebuild = Some(Rebuild { number, stage, left, wanted, failed });
        self.say_in(WITHIN, Said::Rebuild(id, number));
        Some((before, resend))
    }

    /// A work of a rebuild has ended.
    pub(super) fn rebuilt(&mut self, work: u64, well: bool) -> Vec<ConsumerMessage> {
        let mut jobs = self.jobs.iter_mut();
        let found =
            jobs.find_map(|(id, job)| Some((*id, job.rebuild.as_mut()?)).filter(|(_, one)| one.left.contains(&work)));
        let Some((id, rebuild)) = found else { return Vec::new() };
        rebuild.left.remove(&work);
        if !well {
            // Which sequence it was does not matter: a job has one, but for what it shares with nobody.
            rebuild.failed.extend(rebuild.wanted.keys());
        }
        self.ready(id)
    }

    /// What is not answered by now is not waited for.
    pub(super) fn rebuild_is_late(&mut self, id: JobId, number: u64) -> Vec<ConsumerMessage> {
        let rebuild = self.jobs.get_mut(&id).and_then(|job| job.rebuild.as_mut());
        let Some(rebuild) = rebuild.filter(|one| one.number == number && !one.left.is_empty()) else {
            return Vec::new();
        };
        tracing::info!(job = id.0, "kept rows did not come through: they are computed again");
        rebuild.failed.extend(rebuild.wanted.keys());
        for work in std::mem::take(&mut rebuild.left) {
            self.works.remove(&work);
        }
        let mut orders = self.ready(id);
        orders.extend(self.wind_up(id));
        orders
    }

    /// A job goes on once the lead's hop has its ticket and nothing is being rebuilt; the engine is told what is lacking.
    pub(super) fn ready(&mut self, id: JobId) -> Vec<ConsumerMessage> {
        let Some(job) = self.jobs.get_mut(&id) else { return Vec::new() };
        if job.ready || !job.ticketed || job.rebuild.as_ref().is_some_and(|one| !one.left.is_empty()) {
            return Vec::new();
        }
        job.ready = true;
        let (rebuild, lost) = (job.rebuild.take(), job.lost.take());
        let Some(stage) = lost.or(rebuild.as_ref().map(|one| one.stage)) else { return self.flush() };
        let rebuild = rebuild.filter(|one| one.stage == stage);
        let held_of = |sequence: u32| match rebuild.as_ref().and_then(|one| Some((one, one.wanted.get(&sequence)?))) {
            Some((one, (held, back))) => {
                if one.failed.contains(&sequence) {
                    *held
                } else {
                    *back
                }
            }
            None => 0,
        };
        // After a loss: every sequence of the job, and those that no job uses.
        let idle = |sequence: &super::Sequence| self.jobs.get(&sequence.job).is_none_or(|job| job.over);
        let concerned = |number: &u32, sequence: &super::Sequence| match lost {
            Some(_) => sequence.job == id || idle(sequence),
            None => rebuild.as_ref().is_some_and(|one| one.wanted.contains_key(number)),
        };
        let held: Vec<Held> = self
            .sequences
            .iter()
            .filter(|(number, sequence)| concerned(number, sequence))
            .map(|(number, _)| Held { sequence: *number, upto: held_of(*number) })
            .collect();
        let touched: BTreeSet<u32> = held.iter().map(|held| held.sequence).collect();
        // The engine sends these again under other numbers.
        let void = |work: &RingWork| work.pieces.iter().any(|piece| touched.contains(&piece.sequence));
        self.works.retain(|_, one| !void(&one.work));
        self.held_back.retain(|work| !void(work));
        if lost.is_some() {
            self.gaps.retain(|(_, sequence), _| !touched.contains(sequence));
        }
        let stage = u32::try_from(stage).unwrap_or(u32::MAX);
        let _ = self.events.send(RingEvent::NeedsReplay { stage, held });
        self.flush()
    }
}
