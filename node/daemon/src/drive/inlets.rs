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
use std::collections::{BTreeMap, VecDeque};
use tokio::sync::mpsc;

/// Frames of one hop, and tickets for orders that are not known yet, that may wait.
const MAX_WAITING: usize = 1_024;

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
    tickets: Vec<TicketFrame>,
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
            held.tickets.push(ticket);
        }
    }

    /// Takes every ticket whose order is known by now.
    pub(super) fn take_tickets(&mut self, find: impl Fn(&SessionId, &RequestId) -> Option<(JobId, Ordered)>) {
        let (ours, time) = (self.ours, now());
        for (id, hop) in &mut self.hops {
            let mut later = Vec::new();
            for frame in core::mem::take(&mut hop.tickets) {
                let Ok(said) = frame.ticket.peek() else { continue };
                let Some((job, Ordered { session, request, lead })) = find(&said.session, &said.request) else {
                    later.push(frame);
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
        match held.and_then(|held| held.slots.get(&slot)) {
            Some(job) if runs(job) => Some(Ok(*job)),
            Some(_) => Some(Err("the request is over".into())),
            None if held.is_some_and(|held| !held.tickets.is_empty()) => None,
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
