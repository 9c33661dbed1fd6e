//! The hops that come in to a desk: who may send rows for which job, by the tickets that were shown, and what waits.

use super::{
    hops::{HopEvent, HopId},
    now,
};
use satgrid_engine::port::JobId;
use satgrid_protocol::{
    frame::reason,
    hop::{Expected, HopFrame, Lost, LostFrame, Shown, TicketFrame, take_ticket},
};
use satgrid_types::{NodeKey, RequestId, SessionId};
use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Frames of one hop, and tickets for orders that are not known yet, that may wait.
const MAX_WAITING: usize = 1_024;
/// A ticket may come before its order. Where that does not come by then, it is over already: rows wait for the ticket no longer.
const ORDER_WITHIN: Duration = Duration::from_secs(10);
/// How long a lead may take to notice that a node is dead.
const NOTICED_WITHIN: Duration = Duration::from_secs(3);

/// What a ticket must be for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ordered {
    pub session: SessionId,
    pub request: RequestId,
    /// Signs its tickets.
    pub lead: NodeKey,
}

/// One hop; frames of kind `F` wait on it in their order.
struct Inlet<F> {
    upstream: NodeKey,
    back: mpsc::Sender<HopFrame>,
    slots: BTreeMap<u64, JobId>,
    waiting: VecDeque<F>,
    /// Those whose orders are not known yet, and when they came.
    tickets: Vec<(Instant, TicketFrame)>,
}

/// All hops of a desk.
pub(super) struct Inlets<F> {
    ours: NodeKey,
    hops: BTreeMap<HopId, Inlet<F>>,
    /// Tickets that were shown, by session.
    shown: BTreeMap<SessionId, Shown>,
}

impl<F> Inlets<F> {
    pub(super) fn new(ours: NodeKey) -> Self {
        Inlets { ours, hops: BTreeMap::new(), shown: BTreeMap::new() }
    }

    /// A stream began: answers go where `back` leads.
    pub(super) fn begun(&mut self, hop: HopId, upstream: NodeKey, back: mpsc::Sender<HopFrame>) {
        let (slots, waiting, tickets) = (BTreeMap::new(), VecDeque::new(), Vec::new());
        self.hops.insert(hop, Inlet { upstream, back, slots, waiting, tickets });
    }

    pub(super) fn ended(&mut self, hop: HopId) {
        self.hops.remove(&hop);
    }

    /// A frame to wait its turn. It comes back where too many wait already.
    pub(super) fn push(&mut self, hop: HopId, frame: F) -> Option<F> {
        match self.hops.get_mut(&hop) {
            Some(held) if held.waiting.len() < MAX_WAITING => {
                held.waiting.push_back(frame);
                None
            }
            Some(_) => Some(frame),
            None => None,
        }
    }

    /// A ticket was shown; [`Inlets::take_tickets`] looks at it.
    pub(super) fn show(&mut self, hop: HopId, ticket: TicketFrame) {
        if let Some(held) = self.hops.get_mut(&hop) {
            held.tickets.push((Instant::now(), ticket));
        }
    }

    /// Takes every ticket whose order is known by now.
    pub(super) fn take_tickets(&mut self, find: impl Fn(&SessionId, &RequestId) -> Option<(JobId, Ordered)>) {
        let (ours, time) = (self.ours, now());
        for (id, hop) in &mut self.hops {
            let mut later = Vec::new();
            for (came, frame) in core::mem::take(&mut hop.tickets) {
                let Ok(said) = frame.ticket.peek() else { continue };
                let Some((job, Ordered { session, request, lead })) = find(&said.session, &said.request) else {
                    if came.elapsed() < ORDER_WITHIN {
                        later.push((came, frame));
                    }
                    continue;
                };
                let expected = Expected { lead, upstream: hop.upstream, downstream: ours, session, request };
                match take_ticket(&frame.ticket, &expected, self.shown.entry(session).or_default(), time) {
                    Ok(_) => {
                        hop.slots.insert(frame.slot, job);
                    }
                    Err(fault) => {
                        tracing::warn!(hop = id.0, upstream = %hop.upstream.short(), %fault, "a ticket was refused");
                    }
                }
            }
            later.truncate(MAX_WAITING);
            hop.tickets = later;
        }
    }

    pub(super) fn ids(&self) -> Vec<HopId> {
        self.hops.keys().copied().collect()
    }

    /// What waits on a hop, by its place from 0.
    pub(super) fn nth(&self, hop: HopId, place: usize) -> Option<&F> {
        self.hops.get(&hop)?.waiting.get(place)
    }

    pub(super) fn take(&mut self, hop: HopId, place: usize) -> Option<F> {
        self.hops.get_mut(&hop)?.waiting.remove(place)
    }

    /// Whose the rows of a slot are: `None` where a ticket came whose order is not known yet, else a job that still `runs`
    /// or what is wrong.
    pub(super) fn job(&self, hop: HopId, slot: u64, runs: impl Fn(&JobId) -> bool) -> Option<Result<JobId, String>> {
        let held = self.hops.get(&hop);
        let awaits = |held: &Inlet<F>| held.tickets.iter().any(|(came, _)| came.elapsed() < ORDER_WITHIN);
        match held.and_then(|held| held.slots.get(&slot)) {
            Some(job) if runs(job) => Some(Ok(*job)),
            Some(_) => Some(Err("the request is over".into())),
            None if held.is_some_and(awaits) => None,
            None => Some(Err(format!("no ticket covers slot {slot}"))),
        }
    }

    /// The hop on which a job's rows come.
    pub(super) fn hop_of(&self, job: JobId) -> Option<HopId> {
        self.hops.iter().find(|(_, hop)| hop.slots.values().any(|held| *held == job)).map(|(id, _)| *id)
    }

    /// The way back to the upstream node.
    pub(super) fn back(&self, hop: HopId) -> Option<&mpsc::Sender<HopFrame>> {
        self.hops.get(&hop).map(|held| &held.back)
    }

    /// Tells upstream that work came to nothing, and why.
    pub(super) fn refuse(&self, hop: HopId, work: u64, why: Lost, text: &str) {
        tracing::debug!(work, %text, "rows refused");
        if let Some(back) = self.back(hop) {
            let lost = LostFrame { work, worker: self.ours, why, text: reason(text) };
            let _ = back.try_send(HopFrame::Lost(lost));
        }
    }

    /// As [`Inlets::refuse`], once the lead has had time to notice by itself that the node behind this one is dead: it goes on with
    /// another one then, and a refusal would end what it could go on with.
    pub(super) fn refuse_later(&self, hop: HopId, work: u64, why: Lost, text: &str) {
        let Some(back) = self.back(hop).cloned() else { return };
        let lost = LostFrame { work, worker: self.ours, why, text: reason(text) };
        tokio::spawn(async move {
            tokio::time::sleep(NOTICED_WITHIN).await;
            let _ = back.try_send(HopFrame::Lost(lost));
        });
    }

    /// A job is over: its slots cover nothing any more.
    pub(super) fn over(&mut self, job: JobId) {
        for hop in self.hops.values_mut() {
            hop.slots.retain(|_, held| *held != job);
        }
    }

    /// A session is over: its tickets need not be remembered.
    pub(super) fn forget(&mut self, session: &SessionId) {
        self.shown.remove(session);
    }

    /// Takes in what every desk takes in alike; the rest comes back.
    pub(super) fn hear(&mut self, event: HopEvent) -> Option<HopEvent> {
        match event {
            HopEvent::Begun { hop, upstream, back } => self.begun(hop, upstream, back),
            HopEvent::Frame { hop, frame: HopFrame::Ticket(ticket) } => self.show(hop, ticket),
            HopEvent::Ended { hop } => self.ended(hop),
            other @ (HopEvent::Frame { .. } | HopEvent::Back { .. } | HopEvent::Lost { .. }) => return Some(other),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;
    use satgrid_protocol::hop::{MAX_TICKET_MS, Ticket};
    use satgrid_types::{Signed, node_key};

    const HOP: HopId = HopId(1);
    const SESSION: SessionId = SessionId([3; 32]);

    /// Of a request that ended before its ticket came: a ticket and its end travel on different streams.
    #[test]
    fn a_ticket_whose_order_never_comes_holds_nothing_up() {
        let lead = SigningKey::from_bytes(&[9; 32]);
        let [ours, upstream] = [1, 2].map(|n| NodeKey([n; 32]));
        let (back, _answers) = mpsc::channel(8);
        let mut inlets: Inlets<()> = Inlets::new(ours);
        inlets.begun(HOP, upstream, back);
        let show = |inlets: &mut Inlets<()>, slot: u64, request: RequestId| {
            let ticket = Ticket {
                version: Ticket::VERSION,
                upstream,
                downstream: ours,
                session: SESSION,
                request,
                positions: 9,
                expires_at: now().plus_ms(MAX_TICKET_MS),
                nonce: slot,
            };
            inlets.show(HOP, TicketFrame { slot, ticket: Signed::sign(&ticket, &lead) });
        };
        let known = RequestId([1; 32]);
        show(&mut inlets, 70, known);
        show(&mut inlets, 71, RequestId([2; 32]));
        let ordered = Ordered { session: SESSION, request: known, lead: node_key(&lead) };
        let find = |_: &SessionId, request: &RequestId| (*request == known).then_some((JobId(5), ordered));
        inlets.take_tickets(find);
        assert_eq!(inlets.job(HOP, 70, |_| true), Some(Ok(JobId(5))));
        assert_eq!(inlets.job(HOP, 71, |_| true), None, "its order may come");
        for (came, _) in &mut inlets.hops.get_mut(&HOP).unwrap().tickets {
            *came = came.checked_sub(ORDER_WITHIN).unwrap();
        }
        inlets.over(JobId(5));
        assert!(matches!(inlets.job(HOP, 70, |_| true), Some(Err(_))), "rows of what is over are refused");
        inlets.take_tickets(find);
        assert!(inlets.hops[&HOP].tickets.is_empty());
    }
}
