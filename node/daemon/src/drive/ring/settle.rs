//! How a job of the ring ends or goes on without a worker: receipts asked for, the split put together, a replacement found
//! and the engine told what to send again. Like the rest of the ring it decides nothing about money: the consumer role does.

use super::{
    ConsumerMessage, MAX_LOSSES, Running, SETTLE, Said, Settled, UnderWay, back::revoke, pace::is_probe,
    rebuild::is_rebuild,
};
use satgrid_engine::{
    port::JobId,
    stage::ring::{Held, RingEvent, RingWork},
};
use satgrid_ledger::statements::stage_root;
use satgrid_node::consumer::ConsumerEvent;
use satgrid_protocol::hop::{Lost, LostFrame};
use satgrid_types::{NodeKey, RequestId, WorkKind};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

impl Running {
    /// A worker refused rows. Where it lacks positions before them, the engine is told once: works that were on their way by
    /// then are refused for the same reason.
    pub(super) fn refused(&mut self, lost: &LostFrame) -> Vec<ConsumerMessage> {
        tracing::info!(worker = %lost.worker.short(), why = %lost.text, "a worker refused rows");
        let Some(UnderWay { work, from, .. }) = self.works.remove(&lost.work) else { return Vec::new() };
        let stage = self.stage_of(&lost.worker);
        // Those before it did what was asked.
        self.credit(&work, from..stage as usize);
        if is_probe(lost.work) {
            return self.probe_back(&work, false);
        }
        if is_rebuild(lost.work) {
            return self.rebuilt(lost.work, false);
        }
        let mut orders = Vec::new();
        match lost.why {
            Lost::Gap(sequence, held) => {
                let told = self.gaps.get(&(stage, sequence));
                if told.is_none_or(|since| since.is_some_and(|since| since <= lost.work)) {
                    self.gaps.insert((stage, sequence), None);
                    if let Some(orders) = self.rebuild_gap(stage, sequence, held) {
                        return orders;
                    }
                    let held = vec![Held { sequence, upto: held }];
                    let _ = self.events.send(RingEvent::NeedsReplay { stage, held });
                }
            }
            Lost::Sender | Lost::Worker => {
                self.fail(format!("worker {}: {}", lost.worker.short(), lost.text));
            }
        }
        let jobs: BTreeSet<JobId> = work.pieces.iter().map(|piece| piece.job).collect();
        orders.extend(jobs.iter().flat_map(|job| self.tell(*job)));
        orders.extend(jobs.into_iter().flat_map(|job| self.wind_up(job)));
        orders
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

    /// The place of a worker in the plan.
    pub(super) fn stage_of(&self, worker: &NodeKey) -> u32 {
        let at = self.parts.plan.iter().position(|stage| stage.listing.node_key == *worker);
        u32::try_from(at.unwrap_or(0)).unwrap_or(0)
    }

    /// Nothing that is under way will be answered. A gap that the engine was told of is told again when there is one: nothing
    /// goes out because of the last time.
    pub(super) fn fail(&mut self, reason: String) {
        self.works.clear();
        self.held_back.clear();
        self.gaps.clear();
        let _ = self.events.send(RingEvent::Failed { reason });
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
                self.fail(format!("worker {} was lost, and nobody else sells layers {}", gone.short(), stage.range));
                return Vec::new();
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
        for (id, job) in self.jobs.iter_mut().filter(|(id, job)| **id != but && !job.over) {
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
