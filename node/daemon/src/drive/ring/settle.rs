//! How a job of the ring ends or goes on without a worker: receipts asked for, the split put together, a replacement found
//! and the engine told what to send again. Like the rest of the ring it decides nothing about money: the consumer role does.

use super::{
    ConsumerMessage, Job, MAX_LOSSES, Planned, Running, SETTLE, Said, Settled, UnderWay, back::revoke, pace::is_probe,
    rebuild::is_rebuild,
};
use crate::drive::now;
use satgrid_engine::{
    port::JobId,
    stage::ring::{Held, RingEvent, RingWork},
};
use satgrid_ledger::statements::stage_root;
use satgrid_node::consumer::ConsumerEvent;
use satgrid_protocol::refusal::{Cause, Member, Refusal, RefusalFault, Sent, blamed, check};
use satgrid_types::{NodeKey, RequestId, Signed, WorkKind};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

impl Running {
    /// Rows were refused, by a word that the first worker (`from`) delivered. Where the one who refuses lacks positions before them,
    /// the engine is told once: works that were on their way by then are refused for the same reason. What is nobody's word ends
    /// the work as well: whoever passed it on might have swallowed the rows as easily.
    pub(super) fn refused(&mut self, from: NodeKey, signed: &Signed<Refusal>) -> Vec<ConsumerMessage> {
        let Ok(number) = signed.peek().map(|said| said.work) else {
            tracing::warn!(from = %from.short(), "a refusal that cannot be read");
            self.blame.count(now(), [from]);
            return Vec::new();
        };
        let Some(UnderWay { work, from: first, .. }) = self.works.remove(&number) else { return Vec::new() };
        let ring = self.members();
        let rows = work.pieces.iter().map(|piece| u64::from(piece.rows)).sum();
        let sequences: Vec<u32> = work.pieces.iter().map(|piece| piece.sequence).collect();
        let sent = Sent { lead: self.ours, ring: &ring, work: number, rows, sequences: &sequences, from };
        let outcome = check(signed, &sent);
        let (who, text) = match &outcome {
            Ok((_, said)) => (said.worker, said.text.clone()),
            Err(fault) => (from, format!("it passed on a refusal that is nobody's word: {fault}")),
        };
        tracing::info!(worker = %who.short(), why = %text, "a worker refused rows");
        // Those before it did what was asked.
        self.credit(&work, first..outcome.as_ref().map_or(0, |(at, _)| *at));
        if is_probe(number) {
            return self.probe_back(&work, false);
        }
        if is_rebuild(number) {
            return self.rebuilt(number, false);
        }
        let jobs: BTreeSet<JobId> = work.pieces.iter().map(|piece| piece.job).collect();
        if jobs.iter().any(|job| self.jobs.get(job).is_some_and(Job::moves)) {
            // What is under way of it goes out again, once its next worker is there.
            return Vec::new();
        }
        let mut orders = Vec::new();
        match gap(&outcome, &sequences) {
            Some((stage, sequence, held)) => {
                let told = self.gaps.get(&(stage, sequence));
                if told.is_none_or(|since| since.is_some_and(|since| since <= number)) {
                    self.gaps.insert((stage, sequence), None);
                    if let Some(orders) = self.rebuild_gap(stage, sequence, held) {
                        return orders;
                    }
                    let held = vec![Held { sequence, upto: held }];
                    let _ = self.events.send(RingEvent::NeedsReplay { stage, held });
                }
            }
            None => {
                self.blame.count(now(), blamed(&outcome, &sent));
                let slot = outcome.as_ref().ok().and_then(|(_, said)| said.slot);
                let one = slot.map(JobId).filter(|job| jobs.contains(job));
                let ended = one.map_or_else(|| jobs.clone(), |job| BTreeSet::from([job]));
                orders.extend(self.end(&ended, &format!("worker {}: {text}", who.short())));
            }
        }
        orders.extend(jobs.iter().flat_map(|job| self.tell(*job)));
        orders.extend(jobs.into_iter().flat_map(|job| self.wind_up(job)));
        orders
    }

    /// The workers of the plan, and the orders that each has.
    fn members(&self) -> Vec<Member> {
        let plan = self.parts.plan.iter().enumerate();
        let member = |(at, stage): (usize, &Planned)| {
            let node = stage.listing.node_key;
            let workers = self.jobs.values().filter_map(|job| job.workers.get(at)).filter(|one| one.node == node);
            let orders = workers.filter_map(|one| one.ordered.map(|(session, _, request)| (session, request)));
            Member { node, orders: orders.collect() }
        };
        plan.map(member).collect()
    }

    /// What these workers computed of a work counts as returned: their statements are signed up to it.
    pub(super) fn credit(&mut self, work: &RingWork, workers: Range<usize>) {
        for piece in &work.pieces {
            let Some(job) = self.jobs.get_mut(&piece.job) else { continue };
            for (index, (worker, stage)) in job.workers.iter_mut().zip(&self.parts.plan).enumerate() {
                let reached = workers.contains(&index) && work.ends_at.is_none_or(|last| index <= last as usize);
                // A worker may book as replay what was under way when another was lost: either is ordered.
                for kind in [Some(piece.purpose), work.again.then_some(WorkKind::Replay)].into_iter().flatten() {
                    let returned = worker.returned.plus(kind, piece.rows.into(), stage.range.layers());
                    if reached && let Some(returned) = returned {
                        worker.returned = returned;
                    }
                }
            }
        }
    }

    /// A job that is over and has nothing under way asks its workers for their receipts.
    pub(super) fn wind_up(&mut self, job: JobId) -> Vec<ConsumerMessage> {
        let under_way = self.works.values().any(|one| one.work.pieces.iter().any(|piece| piece.job == job));
        let Some(held) = self.jobs.get_mut(&job).filter(|held| held.over && !under_way) else { return Vec::new() };
        // Rows that were lost behind a worker come back no more. Its receipt may tell of all that was ordered; so may the
        // acknowledgement that it offered before, or its receipt would wait behind that.
        for worker in held.workers.iter_mut().filter(|worker| worker.sent.covers(&worker.returned)) {
            worker.returned = worker.sent;
        }
        let mut orders = self.tell(job);
        let open = self.jobs.get(&job).into_iter().flat_map(|held| &held.workers).filter(|worker| !worker.over);
        orders.extend(open.map(|worker| {
            let call = worker.call;
            let event = match worker.ordered {
                Some(_) => ConsumerEvent::PartDone { call },
                None => ConsumerEvent::Cancel { call },
            };
            ConsumerMessage::Event(event)
        }));
        orders
    }

    pub(super) fn finish(&mut self, job: JobId) {
        self.finish_with(job, false);
    }

    /// Answers how the job was put together, once every worker's call has ended.
    pub(super) fn finish_with(&mut self, id: JobId, late: bool) {
        let all_over = self.jobs.get(&id).is_some_and(|job| job.workers.iter().all(|worker| worker.over));
        if !all_over && !late {
            return;
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(answer) = job.answer.take() else { return };
        let Some(job) = self.jobs.remove(&id) else { return };
        if let Some((session, _, request)) = job.workers.last().and_then(|worker| worker.ordered) {
            self.parts.switchboard.forget(session, request);
        }
        for (_, slots) in self.back.values_mut() {
            slots.remove(&id.0);
        }
        let split = job.tally.split(self.parts.model_layers, &self.parts.own, &job.legs);
        if let Some(lost) = split.lost {
            tracing::info!(job = id.0, positions = lost.positions, "rows were lost under way: the receipt says so");
        }
        let root = stage_root(&job.legs);
        let worked = job.legs.iter().any(|leg| leg.id.is_some());
        let _ = answer.send(worked.then(|| Settled::Layers(Box::new(split), root)));
    }

    /// These jobs cannot go on; others do, and what they had in the same works their engine sends again without these.
    pub(super) fn end(&mut self, jobs: &BTreeSet<JobId>, reason: &str) -> Vec<ConsumerMessage> {
        tracing::warn!(jobs = jobs.len(), reason, "requests cannot go on");
        for id in jobs {
            let Some(job) = self.jobs.get_mut(id) else { continue };
            job.ended.get_or_insert_with(|| reason.to_owned());
            (job.lost, job.rebuild) = (None, None);
        }
        let theirs = |work: &RingWork| work.pieces.iter().any(|piece| jobs.contains(&piece.job));
        let pieces = self.works.values().filter(|one| theirs(&one.work)).flat_map(|one| &one.work.pieces);
        let touched: BTreeSet<JobId> = pieces.map(|piece| piece.job).chain(jobs.iter().copied()).collect();
        self.works.retain(|_, one| !theirs(&one.work));
        self.held_back.retain(|work| !theirs(work));
        let sequences = &self.sequences;
        self.gaps.retain(|(_, number), _| sequences.get(number).is_none_or(|one| !jobs.contains(&one.job)));
        let event = RingEvent::Ended { jobs: jobs.iter().copied().collect(), reason: reason.to_owned() };
        let _ = self.events.send(event);
        touched.into_iter().flat_map(|job| self.wind_up(job)).collect()
    }

    /// What the engine sends for jobs that cannot go on, as it may before it has heard of it, goes nowhere.
    pub(super) fn turned_away(&mut self, work: &RingWork) -> Option<Vec<ConsumerMessage>> {
        let why = |job: &JobId| self.jobs.get(job).and_then(|job| job.ended.clone());
        let ended: BTreeMap<JobId, String> =
            work.pieces.iter().filter_map(|piece| Some((piece.job, why(&piece.job)?))).collect();
        if ended.is_empty() {
            return None;
        }
        Some(ended.iter().flat_map(|(job, reason)| self.end(&BTreeSet::from([*job]), reason)).collect())
    }

    /// A worker is gone: another one takes its layers, and the engine sends again what it held.
    pub(super) fn lost(&mut self, id: JobId, at: usize) -> Vec<ConsumerMessage> {
        let stage = self.parts.plan[at].clone();
        let Some(job) = self.jobs.get_mut(&id) else { return Vec::new() };
        job.losses += 1;
        job.lost = Some(job.lost.map_or(at, |before| before.max(at)));
        let losses = job.losses;
        (job.ready, job.ticketed) = (false, false);
        // What was being rebuilt of it went with another ring.
        let rebuild = job.rebuild.take();
        let (request, gone) = (job.request, job.workers[at].node);
        self.works.retain(|work, _| !is_rebuild(*work) || !rebuild.as_ref().is_some_and(|one| one.is_left(*work)));
        tracing::warn!(worker = %gone.short(), layers = %stage.range, "a worker was lost");
        self.avoided.insert(gone);
        if stage.listing.node_key != gone {
            return self.order_again(id, request, at);
        }
        // The first job to notice moves the plan; the others follow it.
        let others: BTreeSet<NodeKey> = self.parts.plan.iter().map(|planned| planned.listing.node_key).collect();
        let ends = self.beside(at);
        let find = |avoid: &BTreeSet<NodeKey>| self.parts.scout.replace(&stage, ends, avoid);
        let next = match (losses <= MAX_LOSSES).then(|| successor(&self.avoided, &others, find)).flatten() {
            Some(next) => next,
            None => {
                self.avoided.remove(&gone);
                let reason = format!("worker {} was lost, and nobody else sells layers {}", gone.short(), stage.range);
                return self.end(&BTreeSet::from([id]), &reason);
            }
        };
        tracing::info!(worker = %next.node_key.short(), layers = %stage.range, "a replacement was found");
        self.avoided.remove(&next.node_key);
        self.parts.plan[at].listing = next;
        self.slow.remove(&at);
        self.pacing.begin_anew();
        let mut orders = self.leave(at, gone, id);
        orders.extend(self.order_again(id, request, at));
        orders
    }

    /// The plan has moved. Rows of several jobs are one work and go one way, so every other job leaves that worker too, though it
    /// may serve them still: what is under way of them goes out again once each has its new order.
    fn leave(&mut self, at: usize, gone: NodeKey, but: JobId) -> Vec<ConsumerMessage> {
        let mut leaving = BTreeMap::new();
        for (id, job) in self.jobs.iter_mut().filter(|(id, job)| **id != but && job.goes_on()) {
            let Some(worker) = job.workers.get_mut(at).filter(|one| one.node == gone && !one.over && !one.left) else {
                continue;
            };
            worker.left = true;
            (job.ready, job.ticketed) = (false, false);
            leaving.insert(*id, worker.call);
        }
        for (id, call) in &leaving {
            self.say_in(SETTLE, Said::Left(*id, *call));
        }
        let stays = |work: &RingWork| work.pieces.iter().all(|piece| !leaving.contains_key(&piece.job));
        // Refusals of these are nobody's trouble. The engine awaits them until it is told what is lacking.
        self.works.retain(|_, one| stays(&one.work));
        leaving.into_values().map(|call| ConsumerMessage::Event(ConsumerEvent::Cancel { call })).collect()
    }

    /// Who sends to a worker and who it sends to.
    pub(super) fn beside(&self, at: usize) -> (NodeKey, NodeKey) {
        let node = |at: Option<usize>| at.and_then(|at| self.parts.plan.get(at)).map(|one| one.listing.node_key);
        (node(at.checked_sub(1)).unwrap_or(self.ours), node(at.checked_add(1)).unwrap_or(self.ours))
    }

    /// Orders of whoever the plan names now.
    fn order_again(&mut self, id: JobId, request: RequestId, at: usize) -> Vec<ConsumerMessage> {
        let planned = self.parts.plan[at].clone();
        let (worker, order) = self.call(id, request, &planned);
        if let Some(job) = self.jobs.get_mut(&id) {
            let before = std::mem::replace(&mut job.workers[at], worker);
            if let Some((session, _, request)) = before.ordered {
                self.parts.switchboard.forget(session, request);
            }
            revoke(&mut self.back, &before.node, id);
        }
        vec![order]
    }
}

/// The gap that a worker of the ring speaks of, in a sequence of this very work.
fn gap(outcome: &Result<(usize, Refusal), RefusalFault>, sequences: &[u32]) -> Option<(u32, u32, u32)> {
    let (at, said) = outcome.as_ref().ok()?;
    let Cause::Gap(sequence, held) = said.why else { return None };
    sequences.contains(&sequence).then_some((u32::try_from(*at).ok()?, sequence, held))
}

/// Who takes a worker's place: nobody who was lost before, unless that leaves nobody. Then one of those may be back.
fn successor<T>(
    lost: &BTreeSet<NodeKey>,
    others: &BTreeSet<NodeKey>,
    find: impl Fn(&BTreeSet<NodeKey>) -> Option<T>,
) -> Option<T> {
    find(&lost.union(others).copied().collect()).or_else(|| find(others))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_lost_once_is_taken_where_nobody_else_is_left() {
        let set = |keys: &[u8]| keys.iter().map(|key| NodeKey([*key; 32])).collect::<BTreeSet<_>>();
        let check = |lost: &[u8], planned: &[u8], expect: Option<u8>| {
            let find = |avoid: &BTreeSet<NodeKey>| set(&[1, 2, 3]).difference(avoid).next().copied();
            assert_eq!(successor(&set(lost), &set(planned), find), expect.map(|key| NodeKey([key; 32])));
        };
        check(&[1], &[1], Some(2));
        check(&[1, 2], &[2], Some(3));
        // All were lost, one after the other; the first may have been back for hours.
        check(&[1, 2, 3], &[3], Some(1));
        check(&[1], &[1, 2, 3], None);
    }
}
