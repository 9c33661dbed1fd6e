//! Buying a part of a model: a lead's orders to its workers.
//!
//! Money, acknowledgements and receipts run as for any other request; what differs is how work is counted. A worker's
//! statement is signed up to what has come back through the ring, so that what a lost worker was paid for is never more
//! than what the lead has in hand.

use super::{CallId, Consumer, ConsumerAction, Emission, SessionIndex, calls::Place, streams::Live};
use crate::StreamId;
use rand_chacha::rand_core::RngCore;
use satgrid_ledger::statements::ExpertCount;
use satgrid_protocol::{
    frame::{ConsumerFrame, PartRoute, Resend},
    hop::{Leading, MAX_TICKET_MS, Ticket},
};
use satgrid_types::{NodeKey, PartUsage, RequestId, Signed, TokenUsage, UnixMs};

/// What was ordered of a worker, and what of it came back.
#[derive(Debug, Default, Clone)]
pub(super) struct PartLive {
    pub sent: PartUsage,
    pub returned: PartUsage,
    /// `returned` by expert, where experts were bought.
    pub experts: Vec<ExpertCount>,
}

/// Where a worker's rows go next.
pub(super) struct Way {
    pub slot: u64,
    pub next: NodeKey,
    pub addresses: Vec<String>,
    pub resend: Vec<Resend>,
    pub leading: Signed<Leading>,
}

impl Live {
    /// A worker speaks of work whose result has not come back yet.
    pub(super) fn is_early(&self, claimed: &TokenUsage) -> bool {
        match (&self.part, &claimed.part) {
            (Some(part), Some(claimed)) => !part.returned.covers(claimed),
            (Some(_), None) | (None, _) => false,
        }
    }
}

impl Consumer {
    fn streaming(&self, call: CallId) -> Option<(SessionIndex, RequestId, StreamId)> {
        let Place::Streaming(index, request) = self.calls.get(&call)?.place else { return None };
        let live = self.sessions.get(&index)?.requests.get(&request)?;
        Some((index, request, live.stream))
    }

    pub(super) fn ordered(&mut self, now: UnixMs, call: CallId, told: PartLive) {
        let Some((index, request, _)) = self.streaming(call) else { return };
        let live = self.sessions.get_mut(&index).and_then(|s| s.requests.get_mut(&request));
        if let Some(part) = live.and_then(|live| live.part.as_mut()) {
            *part = told;
        }
        self.release_held(now, index);
    }

    /// A ticket for a hop to the worker of `downstream`; for the hop back to the lead, under the session of `upstream`.
    fn ticket(&mut self, now: UnixMs, paid: CallId, upstream: NodeKey, next: NodeKey) -> Option<Signed<Ticket>> {
        let nonce = self.rng.next_u64();
        let (index, request, _) = self.streaming(paid)?;
        let positions = self.calls.get(&paid)?.part()?.max_positions;
        let session = self.sessions.get(&index)?;
        let ticket = Ticket {
            version: Ticket::VERSION,
            upstream,
            downstream: next,
            session: session.state.as_ref()?.id(),
            request,
            positions,
            expires_at: now.plus_ms(MAX_TICKET_MS),
            nonce,
        };
        Some(Signed::sign(&ticket, &session.key))
    }

    pub(super) fn route(&mut self, now: UnixMs, call: CallId, downstream: Option<CallId>, way: Way) {
        let Some((index, _, stream)) = self.streaming(call) else { return };
        let Some(session) = self.sessions.get(&index) else { return };
        let (worker, link) = (session.provider(), session.link);
        let Some(ticket) = self.ticket(now, downstream.unwrap_or(call), worker, way.next) else { return };
        let Way { slot, next, addresses, resend, leading } = way;
        if let Some(link) = link {
            let frame = ConsumerFrame::Route(Box::new(PartRoute { slot, next, addresses, ticket, resend, leading }));
            self.actions.push_back(ConsumerAction::Send { link, stream, frame });
        }
    }

    pub(super) fn want_ticket(&mut self, now: UnixMs, call: CallId) {
        let Some((index, ..)) = self.streaming(call) else { return };
        let Some(lead) = self.calls.get(&call).and_then(|call| call.part()).map(|order| order.lead) else { return };
        let Some(worker) = self.sessions.get(&index).map(|s| s.provider()) else { return };
        if let Some(ticket) = self.ticket(now, call, lead, worker) {
            self.actions.push_back(ConsumerAction::Emit { call, emission: Emission::Ticket { ticket } });
        }
    }

    pub(super) fn part_done(&mut self, call: CallId) {
        let Some((index, _, stream)) = self.streaming(call) else { return };
        if let Some(link) = self.sessions.get(&index).and_then(|s| s.link) {
            self.actions.push_back(ConsumerAction::Send { link, stream, frame: ConsumerFrame::Done });
        }
    }
}
