//! The hops that come in to a desk: who may send rows for which job, by the tickets that were shown, and what waits.

use super::{
    hops::{HopEvent, HopId},
    now,
};
use ed25519_dalek::SigningKey;
use satgrid_engine::port::JobId;
use satgrid_protocol::{
    frame::reason,
    hop::{Expected, HopFrame, Shown, TicketFrame, take_ticket},
    refusal::{Cause, Refusal},
};
use satgrid_types::{NodeKey, RequestId, SessionId, Signed, node_key};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
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

/// A work that is refused: its number and its rows.
pub(super) type Refused = (u64, u64);

/// What is wrong with a work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wrong {
    pub why: Cause,
    /// The request whose rows alone it is about.
    pub slot: Option<u64>,
    pub text: String,
}

impl Wrong {
    /// With all of the work.
    pub(super) fn all(why: Cause, text: impl Into<String>) -> Wrong {
        Wrong { why, slot: None, text: text.into() }
    }
    /// With the rows of one request.
    pub(super) fn one(slot: u64, why: Cause, text: impl Into<String>) -> Wrong {
        Wrong { why, slot: Some(slot), text: text.into() }
    }
}

/// One hop; frames of kind `F` wait on it in their order.
struct Inlet<F> {
    upstream: NodeKey,
    back: mpsc::Sender<HopFrame>,
    slots: BTreeMap<u64, (JobId, Ordered)>,
    /// Slots whose requests have ended, the latest last.
    ended: VecDeque<u64>,
    /// The last order that a ticket was shown for.
    last: Option<Ordered>,
    waiting: VecDeque<F>,
    /// Those whose orders are not known yet, and when they came.
    tickets: Vec<(Instant, TicketFrame)>,
}

/// All hops of a desk.
pub(super) struct Inlets<F> {
    /// Signs refusals.
    key: Arc<SigningKey>,
    ours: NodeKey,
    hops: BTreeMap<HopId, Inlet<F>>,
    /// Tickets that were shown, by session.
    shown: BTreeMap<SessionId, Shown>,
}

impl<F> Inlets<F> {
    pub(super) fn new(key: Arc<SigningKey>) -> Self {
        Inlets { ours: node_key(&key), key, hops: BTreeMap::new(), shown: BTreeMap::new() }
    }

    /// A stream began: answers go where `back` leads.
    pub(super) fn begun(&mut self, hop: HopId, upstream: NodeKey, back: mpsc::Sender<HopFrame>) {
        let (slots, ended, waiting, tickets) = (BTreeMap::new(), VecDeque::new(), VecDeque::new(), Vec::new());
        self.hops.insert(hop, Inlet { upstream, back, slots, ended, last: None, waiting, tickets });
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
                let Some((job, ordered)) = find(&said.session, &said.request) else {
                    if came.elapsed() < ORDER_WITHIN {
                        later.push((came, frame));
                    }
                    continue;
                };
                let Ordered { session, request, lead } = ordered;
                hop.last = Some(ordered);
                let expected = Expected { lead, upstream: hop.upstream, downstream: ours, session, request };
                match take_ticket(&frame.ticket, &expected, self.shown.entry(session).or_default(), time) {
                    Ok(_) => {
                        hop.slots.insert(frame.slot, (job, ordered));
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
    pub(super) fn job(&self, hop: HopId, slot: u64, runs: impl Fn(&JobId) -> bool) -> Option<Result<JobId, Wrong>> {
        let held = self.hops.get(&hop);
        let awaits = |held: &Inlet<F>| held.tickets.iter().any(|(came, _)| came.elapsed() < ORDER_WITHIN);
        // It ended here: that is nobody else's doing.
        let over = || Wrong::one(slot, Cause::Worker, "the request is over");
        match held.and_then(|held| held.slots.get(&slot)) {
            Some((job, _)) if runs(job) => Some(Ok(*job)),
            Some(_) => Some(Err(over())),
            None if held.is_some_and(|held| held.ended.contains(&slot)) => Some(Err(over())),
            None if held.is_some_and(awaits) => None,
            None => Some(Err(Wrong::one(slot, Cause::Sender, format!("no ticket covers slot {slot}")))),
        }
    }

    /// The hop on which a job's rows come.
    pub(super) fn hop_of(&self, job: JobId) -> Option<HopId> {
        self.hops.iter().find(|(_, hop)| hop.slots.values().any(|(held, _)| *held == job)).map(|(id, _)| *id)
    }

    /// The way back to the upstream node.
    pub(super) fn back(&self, hop: HopId) -> Option<&mpsc::Sender<HopFrame>> {
        self.hops.get(&hop).map(|held| &held.back)
    }

    /// Tells upstream that work came to nothing, and why.
    pub(super) fn refuse(&self, hop: HopId, refused: Refused, wrong: &Wrong) {
        tracing::debug!(work = refused.0, text = %wrong.text, "rows refused");
        let Some(held) = self.hops.get(&hop) else { return };
        let accused = match wrong.why {
            Cause::Sender => Some(held.upstream),
            Cause::Gap(..) | Cause::Worker | Cause::Next => None,
        };
        if let Some(signed) = self.signed(held, refused, accused, wrong) {
            let _ = held.back.try_send(HopFrame::Lost(signed));
        }
    }

    /// Tells upstream that work does not reach the node behind this one, once the lead has had time to notice by itself that it is
    /// dead: it goes on with another one then, and a refusal would end what it could go on with.
    pub(super) fn refuse_later(&self, hop: HopId, refused: Refused, next: NodeKey) {
        let Some(held) = self.hops.get(&hop) else { return };
        let wrong = Wrong::all(Cause::Next, "the next node is not connected");
        let Some(signed) = self.signed(held, refused, Some(next), &wrong) else { return };
        let back = held.back.clone();
        tokio::spawn(async move {
            tokio::time::sleep(NOTICED_WITHIN).await;
            let _ = back.try_send(HopFrame::Lost(signed));
        });
    }

    /// The refusal, under this node's key. Who has shown no ticket for any order of ours is told nothing: no lead awaits it.
    fn signed(
        &self,
        held: &Inlet<F>,
        (work, rows): Refused,
        accused: Option<NodeKey>,
        wrong: &Wrong,
    ) -> Option<Signed<Refusal>> {
        let of_slot = wrong.slot.and_then(|slot| held.slots.get(&slot));
        let stands = of_slot.or_else(|| held.slots.values().next_back()).map(|(_, ordered)| *ordered);
        let Ordered { session, request, .. } = stands.or(held.last)?;
        let refusal = Refusal {
            version: Refusal::VERSION,
            worker: self.ours,
            session,
            request,
            work,
            rows,
            slot: wrong.slot,
            why: wrong.why,
            accused,
            text: reason(&wrong.text),
        };
        Some(Signed::sign(&refusal, &self.key))
    }

    /// A job is over: its slots cover nothing any more.
    pub(super) fn over(&mut self, job: JobId) {
        for hop in self.hops.values_mut() {
            let over = hop.slots.iter().filter(|(_, (held, _))| *held == job).map(|(slot, _)| *slot);
            hop.ended.extend(over.collect::<Vec<u64>>());
            let beyond = hop.ended.len().saturating_sub(MAX_WAITING);
            hop.ended.drain(..beyond);
            hop.slots.retain(|_, (held, _)| *held != job);
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
    use satgrid_protocol::{
        hop::{MAX_TICKET_MS, Ticket},
        refusal::{Member, RefusalFault, Sent, check},
    };

    const HOP: HopId = HopId(1);
    const SESSION: SessionId = SessionId([3; 32]);

    /// Of a request that ended before its ticket came: a ticket and its end travel on different streams.
    #[test]
    fn a_ticket_whose_order_never_comes_holds_nothing_up() {
        let lead = SigningKey::from_bytes(&[9; 32]);
        let key = Arc::new(SigningKey::from_bytes(&[1; 32]));
        let (ours, upstream) = (node_key(&key), NodeKey([2; 32]));
        let (back, mut answers) = mpsc::channel(8);
        let mut inlets: Inlets<()> = Inlets::new(key);
        inlets.begun(HOP, upstream, back);
        let refused = |inlets: &Inlets<()>, slot: u64, answers: &mut mpsc::Receiver<HopFrame>| {
            inlets.refuse(HOP, (7, 3), &Wrong::one(slot, Cause::Sender, "no"));
            match answers.try_recv() {
                Ok(HopFrame::Lost(signed)) => Some(signed),
                Ok(_) | Err(_) => None,
            }
        };
        assert!(refused(&inlets, 70, &mut answers).is_none(), "nobody is known who would believe it");
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
        // What is refused is refused under this node's key, to the lead whose order stands on the hop.
        let ring = [Member { node: ours, orders: vec![(SESSION, known)] }];
        let sent = |work: u64| Sent { lead: upstream, ring: &ring, work, rows: 3, sequences: &[], from: ours };
        for slot in [70, 71] {
            let signed = refused(&inlets, slot, &mut answers).unwrap();
            let (at, said) = check(&signed, &sent(7)).unwrap();
            assert_eq!((at, said.slot, said.accused), (0, Some(slot), Some(upstream)));
            assert_eq!(check(&signed, &sent(8)), Err(RefusalFault::Other { what: "work" }));
        }
        for (came, _) in &mut inlets.hops.get_mut(&HOP).unwrap().tickets {
            *came = came.checked_sub(ORDER_WITHIN).unwrap();
        }
        inlets.over(JobId(5));
        let why = |slot: u64| inlets.job(HOP, slot, |_| true).map(|job| job.map_err(|wrong| wrong.why));
        assert_eq!(why(70), Some(Err(Cause::Worker)), "rows of what is over are refused, and nobody is accused");
        assert_eq!(why(72), Some(Err(Cause::Sender)));
        assert!(refused(&inlets, 70, &mut answers).is_some());
        inlets.take_tickets(find);
        assert!(inlets.hops[&HOP].tickets.is_empty());
    }
}
