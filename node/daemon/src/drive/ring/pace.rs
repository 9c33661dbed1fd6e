//! How fast each worker of the ring really is. Whole trips of single rows are timed as they come; only where the least of
//! several takes longer than the workers list (or one of them is watched already), each worker is measured by itself; else a
//! minute after the ring began, and every five.
//!
//! For that the newest row of a stream goes around once more, as a replay that ends at a worker, right before the stream's next
//! row: its result is the cache's content as it is, and nothing follows from it. A trip of no rows at all is passed on by every
//! worker and computed by none. What differs between two such trips is one worker's time ([`satgrid_market::paces`]). Replays
//! are ordered and paid like any other; no customer pays them.
//!
//! | state   | awaits                                          | leaves with                                              |
//! |---------|-------------------------------------------------|----------------------------------------------------------|
//! | resting | its time                                        | listening                                                |
//! | listening | `TRIPS` whole trips of a single row           | resting, where they are as long as listed and no round is due; a round |
//! | a round | `SAMPLES` trips of each kind, one at a time     | resting, with every worker's time told to the market     |
//! |         | as many again, up to `PASSES` times, where noise alone keeps a listing believed | as above                  |
//! |         | a trip that is refused or late (`WITHIN`)       | resting, with nothing told                               |

use super::{ConsumerMessage, Planned, Running, UnderWay, WorkKind};
use crate::drive::now;
use satgrid_engine::{
    port::JobId,
    stage::{
        codec::HiddenRows,
        port::WorkId,
        ring::{RingPiece, RingWork},
    },
};
use satgrid_market::paces::{Own, Trips};
use satgrid_protocol::hop::{HopFrame, RowsHeader, RowsPiece};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Whole trips that a judgement needs, and short ones of each kind.
const TRIPS: u32 = 8;
const SAMPLES: u32 = 4;
/// So often at the most, where they leave a doubt.
const PASSES: u32 = 4;
/// Between two judgements, and between two rounds.
const LISTEN_EVERY: Duration = Duration::from_secs(5);
const ROUND_EVERY: Duration = Duration::from_secs(30);
/// Without any suspicion the first round is due so long after the ring began, and then so often.
const FIRST_AFTER: Duration = Duration::from_secs(60);
const CALM_EVERY: Duration = Duration::from_secs(5 * 60);
/// A short trip that takes longer came to nothing.
const WITHIN: Duration = Duration::from_secs(5);
/// Works of measurements are numbered from here on, below those of rebuilds and away from those of the engine.
const FIRST_PROBE: u64 = 1 << 61;

pub(super) fn is_probe(work: u64) -> bool {
    work >= FIRST_PROBE && !super::rebuild::is_rebuild(work)
}

/// See the module.
#[derive(Default)]
pub(super) struct Pacing {
    rest_until: Option<Instant>,
    heard: u32,
    least: Option<u64>,
    round: Option<Round>,
    /// When a round is due though nothing looks odd.
    due: Option<Instant>,
    next: u64,
}

/// Measurements of every worker, one trip after the other.
struct Round {
    trips: Trips,
    /// Short trips that came back: the first `SAMPLES` are computed by nobody, the next end after the first worker, and so on;
    /// then anew.
    done: u32,
    under_way: Option<(u64, Instant)>,
    /// The next whole trip went out behind a short one, and may have waited for it.
    behind: bool,
}

impl Round {
    /// After which worker the next short trip ends; `None`: nobody computes it.
    fn kind(&self) -> Option<usize> {
        ((self.done / SAMPLES) as usize % self.trips.kinds()).checked_sub(1)
    }

    /// How often each kind's `SAMPLES` came back, and how many trips beyond that.
    fn passes(&self) -> (u32, u32) {
        let pass = SAMPLES.saturating_mul(u32::try_from(self.trips.kinds()).unwrap_or(u32::MAX));
        (self.done / pass, self.done % pass)
    }
}

impl Pacing {
    /// A whole trip of a single row. Whether a short one is to follow.
    fn heard(&mut self, now: Instant, us: u64, workers: usize, suspects: impl FnOnce(u64) -> bool) -> bool {
        if let Some(round) = &mut self.round {
            if round.under_way.is_some_and(|(_, sent)| now.duration_since(sent) > WITHIN) {
                self.rest(now, LISTEN_EVERY);
                return false;
            }
            if round.under_way.is_some() || std::mem::take(&mut round.behind) {
                return false;
            }
            round.trips.took(workers.checked_sub(1), us);
            return true;
        }
        let due = *self.due.get_or_insert(now + FIRST_AFTER);
        if self.rest_until.is_some_and(|until| now < until) {
            return false;
        }
        self.heard += 1;
        let least = self.least.map_or(us, |least| least.min(us));
        self.least = Some(least);
        if self.heard < TRIPS {
            return false;
        }
        if now < due && !suspects(least) {
            self.rest(now, LISTEN_EVERY);
            return false;
        }
        self.round = Some(Round { trips: Trips::of(workers), done: 0, under_way: None, behind: false });
        true
    }

    /// A short trip came back. The workers' times, where it was the last one.
    fn back(&mut self, now: Instant, work: u64, is_doubtful: impl Fn(&[Own]) -> bool) -> Option<Vec<Own>> {
        let round = self.round.as_mut()?;
        let (_, sent) = round.under_way.take_if(|(number, _)| *number == work)?;
        round.trips.took(round.kind(), micros(now.duration_since(sent)));
        round.done += 1;
        let (passes, more) = round.passes();
        if more > 0 {
            return None;
        }
        let times = round.trips.workers();
        if passes < PASSES && times.as_deref().is_some_and(is_doubtful) {
            return None;
        }
        self.due = Some(now + CALM_EVERY);
        self.rest(now, ROUND_EVERY);
        times
    }

    /// The plan is another one: what was measured of this one is void.
    pub(super) fn begin_anew(&mut self) {
        *self = Pacing { next: self.next, ..Pacing::default() };
    }

    fn rest(&mut self, now: Instant, time: Duration) {
        *self = Pacing { rest_until: Some(now + time), due: self.due, next: self.next, ..Pacing::default() };
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Running {
    /// A work came back whole. Where it was a single row, its time tells of the ring's pace.
    pub(super) fn whole_trip(&mut self, work: &RingWork, took: Duration) -> Vec<ConsumerMessage> {
        let [piece] = work.pieces.as_slice() else { return Vec::new() };
        let plain = piece.rows == 1 && piece.purpose != WorkKind::Replay && work.ends_at.is_none() && !work.again;
        let (scout, plan) = (&self.parts.scout, &self.parts.plan);
        let suspects = |least| scout.suspects(plan, least);
        if !plain || !self.pacing.heard(Instant::now(), micros(took), plan.len(), suspects) || !self.is_calm(piece) {
            return Vec::new();
        }
        self.send_probe(work, piece)
    }

    /// Nothing of the sequence is under way, lacking or being rebuilt: a row that goes around again changes nothing.
    fn is_calm(&self, piece: &RingPiece) -> bool {
        let job = self.jobs.get(&piece.job);
        let ready = job.is_some_and(|job| job.ready && !job.over && job.lost.is_none() && job.rebuild.is_none());
        let touches = |work: &RingWork| work.pieces.iter().any(|one| one.sequence == piece.sequence);
        ready
            && !self.works.values().any(|one| touches(&one.work))
            && !self.held_back.iter().any(touches)
            && !self.gaps.keys().any(|(_, sequence)| *sequence == piece.sequence)
    }

    fn send_probe(&mut self, work: &RingWork, piece: &RingPiece) -> Vec<ConsumerMessage> {
        let number = FIRST_PROBE + self.pacing.next;
        self.pacing.next += 1;
        let Some(round) = &mut self.pacing.round else { return Vec::new() };
        (round.under_way, round.behind) = (Some((number, Instant::now())), true);
        let kind = round.kind();
        let again = RingPiece { purpose: WorkKind::Replay, ..*piece };
        let ends_at = u32::try_from(kind.unwrap_or(0)).ok();
        let probe =
            RingWork { id: WorkId(number), pieces: vec![again], rows: work.rows.clone(), ends_at, again: false };
        if kind.is_some() {
            return self.send_around(probe);
        }
        // No rows: nobody has anything to compute, and so nothing to bill.
        let RingPiece { job, sequence, start, rows, .. } = again;
        if let Some(job) = self.jobs.get_mut(&job) {
            job.tally.sent(WorkKind::Replay, rows, &[]);
        }
        let piece = RowsPiece { slot: job.0, sequence, start, rows, kind: WorkKind::Replay };
        let wire = self.parts.wire;
        let header = RowsHeader { work: number, pieces: vec![piece], wire, ends_after: Some(0), again: false };
        let probe = RingWork { rows: HiddenRows::none(wire), ..probe };
        self.works.insert(number, UnderWay { work: probe, from: usize::MAX, sent: Instant::now() });
        if let Some((_, out)) = &self.first {
            out.send(HopFrame::Rows(header, Vec::new()));
        }
        Vec::new()
    }

    /// A short trip ended, as it should or not.
    pub(super) fn probe_back(&mut self, work: &RingWork, well: bool) -> Vec<ConsumerMessage> {
        let now = Instant::now();
        let plan = &self.parts.plan;
        if !well {
            self.pacing.rest(now, LISTEN_EVERY);
        } else if let Some(times) = self.pacing.back(now, work.id.0, |times| self.parts.scout.doubts(plan, times)) {
            let told = plan.iter().zip(times).enumerate();
            let slow: Vec<usize> =
                told.filter_map(|(at, (stage, own))| self.parts.scout.measured(stage, own).then_some(at)).collect();
            self.slow.extend(slow);
        }
        let jobs: BTreeSet<JobId> = work.pieces.iter().map(|piece| piece.job).collect();
        let mut orders: Vec<ConsumerMessage> = jobs.iter().flat_map(|job| self.tell(*job)).collect();
        orders.extend(jobs.into_iter().flat_map(|job| self.wind_up(job)));
        orders
    }

    /// Between two requests, whoever turned out slower than it lists, or is common to several failures, gives way to another, if
    /// there is any: in the first case a better one. What the new one lacks of idle sequences is rebuilt as after any loss.
    pub(super) fn swap(&mut self) {
        let time = now();
        let plan = self.parts.plan.iter().enumerate();
        let fails = plan.filter(|(_, stage)| self.blame.gives_way(time, &stage.listing.node_key));
        let failing: BTreeSet<usize> = fails.map(|(at, _)| at).collect();
        let nobody = self.slow.is_empty() && failing.is_empty();
        if nobody || !self.works.is_empty() || !self.jobs.values().all(|job| job.over) {
            return;
        }
        for at in std::mem::take(&mut self.slow).union(&failing).copied() {
            let Some(stage) = self.parts.plan.get(at).cloned() else { continue };
            let (before, fails) = (stage.listing.node_key, failing.contains(&at));
            let nodes = self.parts.plan.iter().enumerate().filter(|(other, _)| fails || *other != at);
            let avoid: BTreeSet<_> =
                nodes.map(|(_, stage)| stage.listing.node_key).chain(self.avoided.clone()).collect();
            let next = self.parts.scout.replace(&stage, self.beside(at), &avoid);
            if let Some(next) = next.filter(|next| next.node_key != before) {
                let (from, to) = (before.short(), next.node_key.short());
                if fails {
                    let layers = stage.range;
                    tracing::warn!(failing = %from, worker = %to, %layers, "a worker that is common to failures gives way");
                    self.avoided.insert(before);
                } else {
                    tracing::info!(slow = %from, worker = %to, layers = %stage.range, "a slow worker gives way to another");
                }
                self.parts.plan[at] = Planned { listing: next, ..stage };
                self.pacing.begin_anew();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trips over workers of these times, as the ring would have them; what it finds, and how many trips were asked for.
    fn drive(workers: &[u64], listed: u64, doubts: bool) -> (Option<Vec<u64>>, u32) {
        let (mut pacing, mut now, mut sent) = (Pacing::default(), Instant::now(), 0);
        let whole: u64 = workers.iter().sum::<u64>() + 900;
        for _ in 0..400 {
            now += Duration::from_millis(50);
            if !pacing.heard(now, whole, workers.len(), |least| least > listed) {
                continue;
            }
            sent += 1;
            let number = u64::from(sent);
            let round = pacing.round.as_mut().unwrap();
            (round.under_way, round.behind) = (Some((number, now)), true);
            let upto = round.kind().map_or(0, |worker| worker + 1);
            now += Duration::from_micros(900 + workers[..upto].iter().sum::<u64>());
            assert_eq!(pacing.back(now, number + 7, |_| false), None, "not the one that is awaited");
            if let Some(times) = pacing.back(now, number, |_| doubts) {
                return (Some(times.iter().map(|own| own.us).collect()), sent);
            }
        }
        (None, sent)
    }

    #[test]
    fn workers_are_measured_only_where_the_ring_is_slower_than_listed() {
        for workers in [&[70_000_u64][..], &[4_000, 70_000, 2_000], &[1, 2, 3, 90_000]] {
            let samples = SAMPLES * u32::try_from(workers.len()).unwrap();
            assert_eq!(drive(workers, 20_000, false), (Some(workers.to_vec()), samples));
            assert_eq!(
                drive(workers, 20_000, true),
                (Some(workers.to_vec()), PASSES * samples),
                "a doubt asks for more"
            );
            assert_eq!(drive(workers, 200_000, false), (None, 0), "no trip is spent on an honest ring");
        }
    }

    #[test]
    fn a_calm_ring_is_measured_seldom() {
        let (mut pacing, mut now, mut rounds) = (Pacing::default(), Instant::now(), 0);
        // Ten minutes of a token every 200 ms.
        for _ in 0..3_000 {
            now += Duration::from_millis(200);
            if pacing.heard(now, 9_000, 1, |_| false) {
                let round = pacing.round.as_mut().unwrap();
                (round.under_way, round.behind) = (Some((1, now)), true);
                rounds += u32::from(pacing.back(now, 1, |_| false).is_some());
            }
        }
        assert_eq!(rounds, 2, "after a minute, and five later");
    }

    #[test]
    fn a_trip_that_is_lost_ends_the_round() {
        let (mut pacing, now) = (Pacing::default(), Instant::now());
        let heard = |pacing: &mut Pacing, now| pacing.heard(now, 9, 2, |_| true);
        (1..TRIPS).for_each(|_| assert!(!heard(&mut pacing, now)));
        assert!(heard(&mut pacing, now));
        pacing.round.as_mut().unwrap().under_way = Some((1, now));
        assert!(!heard(&mut pacing, now), "one at a time");
        assert!(!heard(&mut pacing, now + 2 * WITHIN));
        assert_eq!(pacing.back(now + 2 * WITHIN, 1, |_| false), None, "it comes too late");
        let later = now + 2 * WITHIN + LISTEN_EVERY;
        (1..TRIPS).for_each(|_| assert!(!heard(&mut pacing, later)));
        assert!(heard(&mut pacing, later), "and a new one begins");
    }

    #[test]
    fn probes_are_no_rebuilds() {
        assert!(is_probe(FIRST_PROBE) && is_probe(FIRST_PROBE + 9) && !is_probe(7) && !is_probe(1 << 62));
    }
}
