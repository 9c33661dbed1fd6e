//! What comes back to a lead: rows of works, by the ticket that it signed for the last worker, and words of refusal.

use super::{ConsumerMessage, Running, UnderWay, pace::is_probe, rebuild::is_rebuild};
use crate::drive::{
    account::cut,
    hops::{HopEvent, HopId},
    now,
};
use satgrid_engine::{
    port::JobId,
    stage::{codec::HiddenRows, port::WorkId, ring::RingEvent},
};
use satgrid_protocol::hop::{Expected, HopFrame, RowsHeader, TicketFrame, take_ticket};
use satgrid_types::{NodeKey, WorkKind};
use std::collections::{BTreeMap, BTreeSet};

/// Slots that the last worker may use, by the stream it opened.
pub(super) type Back = BTreeMap<HopId, (NodeKey, BTreeSet<u64>)>;

/// A worker has no part in a job any more: what it sends for that one is not asked for.
pub(super) fn revoke(back: &mut Back, worker: &NodeKey, job: JobId) {
    for (_, slots) in back.values_mut().filter(|(upstream, _)| upstream == worker) {
        slots.remove(&job.0);
    }
}

impl Running {
    pub(super) fn hop(&mut self, event: HopEvent) -> Vec<ConsumerMessage> {
        match event {
            HopEvent::Begun { hop, upstream, .. } => {
                self.back.insert(hop, (upstream, BTreeSet::new()));
                Vec::new()
            }
            HopEvent::Frame { hop, frame: HopFrame::Ticket(frame) } => {
                self.ticket_back(hop, &frame);
                Vec::new()
            }
            HopEvent::Frame { hop, frame: HopFrame::Rows(header, rows) } => self.came_back(hop, &header, rows),
            HopEvent::Frame { frame: HopFrame::Lost(_) | HopFrame::Call(..) | HopFrame::Answer(..), .. } => Vec::new(),
            HopEvent::Ended { hop } => {
                self.back.remove(&hop);
                Vec::new()
            }
            HopEvent::Back { from, frame: HopFrame::Lost(signed), .. } => self.refused(from, &signed),
            HopEvent::Back { .. } => Vec::new(),
            HopEvent::Lost { to, reason, .. } => {
                tracing::info!(worker = %to.short(), %reason, "the hop to the first worker is gone");
                if self.first.as_ref().is_some_and(|(node, _)| *node == to) {
                    self.first = None;
                }
                Vec::new()
            }
        }
    }

    /// The last worker shows the ticket that this node signed for the way back.
    fn ticket_back(&mut self, hop: HopId, frame: &TicketFrame) {
        let Some((upstream, slots)) = self.back.get_mut(&hop) else { return };
        let Some(ordered) = self.jobs.get(&JobId(frame.slot)).and_then(|job| job.workers.last()?.ordered) else {
            return;
        };
        let (session, lead, request) = ordered;
        let expected = Expected { lead, upstream: *upstream, downstream: self.ours, session, request };
        match take_ticket(&frame.ticket, &expected, self.shown.entry(session).or_default(), now()) {
            Ok(_) => {
                slots.insert(frame.slot);
            }
            Err(fault) => tracing::warn!(worker = %upstream.short(), %fault, "a ticket for the way back was refused"),
        }
    }

    fn came_back(&mut self, hop: HopId, header: &RowsHeader, bytes: Vec<u8>) -> Vec<ConsumerMessage> {
        let Some((upstream, slots)) = self.back.get(&hop) else { return Vec::new() };
        if !header.pieces.iter().all(|piece| slots.contains(&piece.slot)) {
            tracing::warn!(worker = %upstream.short(), "rows came back without a ticket");
            return Vec::new();
        }
        // An answer to what is void is nobody's.
        let Some(UnderWay { work, from, sent }) = self.works.remove(&header.work) else { return Vec::new() };
        let row_bytes = work.rows.bytes.len() / work.rows.count.max(1) as usize;
        let same = work.pieces.len() == header.pieces.len()
            && work.pieces.iter().zip(&header.pieces).all(|(sent, back)| {
                (sent.job.0, sent.sequence, sent.start, sent.rows) == (back.slot, back.sequence, back.start, back.rows)
            });
        let shape = bytes.len() == work.rows.bytes.len() || (work.ends_at.is_some() && bytes.is_empty());
        let count = if bytes.is_empty() { 0 } else { work.rows.count };
        let rows = HiddenRows { wire: self.parts.wire, count, bytes };
        if !same || !shape || rows.check(self.parts.n_embd).is_err() {
            let reason = format!("worker {} sent back what was not asked for", upstream.short());
            tracing::warn!(%reason, "rows refused");
            let jobs: BTreeSet<JobId> = work.pieces.iter().map(|piece| piece.job).collect();
            return self.end(&jobs, &reason);
        }
        let parts = cut(&rows.bytes, row_bytes, work.pieces.iter().map(|piece| piece.rows as usize));
        let mut touched = BTreeSet::new();
        for (piece, part) in work.pieces.iter().zip(parts) {
            let kind = piece.purpose;
            let Some(job) = self.jobs.get_mut(&piece.job) else { continue };
            job.tally.came_back(kind, piece.rows, part);
            if kind != WorkKind::Replay
                && let Some(sequence) = self.sequences.get_mut(&piece.sequence)
            {
                sequence.back = piece.start.saturating_add(piece.rows);
            }
            touched.insert(piece.job);
        }
        self.credit(&work, from..usize::MAX);
        if is_rebuild(header.work) {
            let mut orders: Vec<ConsumerMessage> = touched.iter().flat_map(|job| self.tell(*job)).collect();
            orders.extend(self.rebuilt(header.work, true));
            return orders;
        }
        if is_probe(header.work) {
            return self.probe_back(&work, true);
        }
        // What is measured goes before the next row, which the engine computes on hearing of this one.
        let mut measured = self.whole_trip(&work, sent.elapsed());
        let _ = self.events.send(RingEvent::Done { work: WorkId(header.work), rows });
        let mut orders: Vec<ConsumerMessage> = touched.iter().flat_map(|job| self.tell(*job)).collect();
        orders.extend(touched.into_iter().flat_map(|job| self.wind_up(job)));
        measured.extend(orders);
        measured
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_replaced_answers_for_that_job_no_more() {
        let [old, new] = [1, 2].map(|n| NodeKey([n; 32]));
        let slots = |slots: &[u64]| slots.iter().copied().collect::<BTreeSet<u64>>();
        let mut back = Back::from([(HopId(1), (old, slots(&[7, 8]))), (HopId(2), (new, slots(&[7])))]);
        revoke(&mut back, &old, JobId(7));
        assert_eq!(back, Back::from([(HopId(1), (old, slots(&[8]))), (HopId(2), (new, slots(&[7])))]));
    }
}
