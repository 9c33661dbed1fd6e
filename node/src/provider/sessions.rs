//! Live sessions: their requests, the receipt chain's queue, and the deadlines.

use super::{EngineId, Provider, ProviderAction, requests::Request};
use crate::LinkId;
use satgrid_engine::port::Command;
use satgrid_ledger::statements::{Receipt, SessionClose};
use satgrid_pricing::cost_alone;
use satgrid_protocol::{
    exposure::ProviderExposure,
    frame::{OpenRequest, ProviderControl, Refusal},
    session::{DETACHED_MS, SessionState},
};
use satgrid_types::{BothSigned, Msat, RequestId, SessionId, Signed, UnixMs};
use std::collections::{BTreeMap, VecDeque};

/// One session and what is alive of it.
pub(super) struct Session {
    pub state: SessionState,
    pub engine: Option<EngineId>,
    pub link: Option<LinkId>,
    pub requests: BTreeMap<RequestId, Request>,
    /// Requests whose run is over, in order: one receipt is offered at a time, since each names the one before.
    pub finishing: VecDeque<RequestId>,
    /// Since when requests without a live link wait for the consumer.
    pub detached_at: Option<UnixMs>,
    /// A close that came while requests were open.
    pub closing: Option<(LinkId, Signed<SessionClose>)>,
    /// Invoices that replaced an unpaid one, since the last payment.
    pub reissued: u32,
    /// Its part of what the provider says that it may lose.
    pub exposed: Msat,
}

impl Session {
    pub(super) fn new(state: SessionState, link: Option<LinkId>, engine: Option<EngineId>) -> Session {
        Session {
            state,
            engine,
            link,
            requests: BTreeMap::new(),
            finishing: VecDeque::new(),
            detached_at: None,
            closing: None,
            reissued: 0,
            exposed: Msat::ZERO,
        }
    }

    /// Something here can fall due with time.
    pub(super) fn is_live(&self) -> bool {
        !self.state.requests().is_empty() || self.detached_at.is_some() || self.closing.is_some()
    }

    pub(super) fn exposure(&self) -> ProviderExposure {
        let done = self.requests.iter().filter_map(|(id, live)| {
            let rates = self.state.request_state(id)?.rates();
            cost_alone(&live.done, rates).ok()
        });
        let done = done.fold(Msat::ZERO, Msat::saturating_add);
        self.state.provider_exposure(done)
    }

    pub(super) fn next_deadline(&self, signature_timeout_ms: u64) -> Option<UnixMs> {
        let terms = &self.state.quote().terms;
        // Without a link nothing can be asked of anybody; the requests wait as one.
        let requests = self.requests.values().filter(|_| self.link.is_some());
        let requests = requests.filter_map(|r| r.next_deadline(terms, signature_timeout_ms)).min();
        let detached = self.detached_at.map(|at| at.plus_ms(DETACHED_MS));
        [requests, detached].into_iter().flatten().min()
    }
}

impl Provider {
    /// A session from the journal, without a connection.
    pub(super) fn adopt(&mut self, now: UnixMs, state: SessionState) {
        let id = state.id();
        for slice in state.slices().values() {
            if let Some(hash) = slice.payment_hash {
                self.by_payment.insert(hash, id);
            }
        }
        let open = !state.requests().is_empty();
        let mut session = Session::new(state, None, None);
        session.detached_at = open.then_some(now);
        self.sessions.insert(id, session);
        self.refresh(&id);
    }

    pub(super) fn link_down(&mut self, now: UnixMs, link: LinkId) {
        let Some(gone) = self.links.remove(&link) else { return };
        let Some(id) = gone.session else { return };
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if session.link != Some(link) {
            return;
        }
        session.link = None;
        session.closing = None;
        if !session.state.requests().is_empty() {
            session.detached_at = Some(now);
        }
        let engine = session.engine;
        let running: Vec<_> = session.requests.values().filter(|r| r.is_running()).map(|r| r.job).collect();
        if let Some(engine) = engine {
            for job in running {
                self.actions.push_back(ProviderAction::Engine { engine, command: Command::Cancel { job } });
            }
        }
    }

    /// The consumer is back: what it shows of open requests settles them, and the session goes on over this link.
    pub(super) fn resume(
        &mut self,
        now: UnixMs,
        link: LinkId,
        id: SessionId,
        open: Vec<OpenRequest>,
        last_receipt: Option<BothSigned<Receipt>>,
    ) {
        let Some(peer) = self.links.get(&link).map(|l| l.peer) else { return };
        let Some(session) = self.sessions.get_mut(&id).filter(|s| s.state.consumer() == peer) else {
            return self.refuse(link, Refusal::Unknown, "no such session here for this key");
        };
        let old = session.link.replace(link).filter(|old| *old != link);
        if let Some(old) = old {
            // The same key on two links: the newer one holds the session, the older one learns it.
            let (code, reason) = (crate::CloseCode::Done, "the session was resumed on another connection".into());
            self.actions.push_back(ProviderAction::CloseLink { link: old, code, reason });
            self.links.remove(&old);
        }
        if let Some(held) = self.links.get_mut(&link) {
            held.session = Some(id);
        }
        if let Some(receipt) = last_receipt {
            self.adopt_receipt(id, &receipt);
        }
        for request in open {
            self.adopt_ack(now, id, &request);
        }
        self.abandon_all(id);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.detached_at = None;
        let (paid, last) = (session.state.paid(), session.state.last_receipt());
        let settled = session.state.settled_numerators();
        self.say(link, ProviderControl::Resumed(id, paid, last, settled));
    }

    /// A receipt that the consumer countersigned and whose frame was lost.
    fn adopt_receipt(&mut self, id: SessionId, receipt: &BothSigned<Receipt>) {
        let Some(session) = self.sessions.get(&id) else { return };
        let state = &session.state;
        // Our own signature on it says that the figures are ours; the consumer's, that they are agreed.
        let Ok(body) = receipt.verify(&state.provider(), &state.consumer()) else { return };
        let fits = body.session == id
            && body.seq == state.receipts()
            && body.previous == state.last_receipt()
            && state.request_state(&body.request).is_some();
        if !fits {
            return;
        }
        if let Ok(draft) = state.finished(receipt, &body, None) {
            self.counters.receipts += 1;
            self.forget(id, &body.request);
            self.record(id, vec![draft], Vec::new());
        }
    }

    /// An acknowledgement that the consumer countersigned and whose frame was lost.
    fn adopt_ack(&mut self, now: UnixMs, id: SessionId, open: &OpenRequest) {
        let (Some(session), Some(both)) = (self.sessions.get(&id), &open.last_ack) else { return };
        let state = &session.state;
        let Ok(ack) = both.verify(&state.provider(), &state.consumer()) else { return };
        let newer = state.request_state(&open.request).is_some_and(|r| ack.seq > r.acked_seq());
        if !newer || ack.session != id || ack.request != open.request {
            return;
        }
        if let Ok(draft) = state.acked(now, both, open.request, Msat::ZERO) {
            self.record(id, vec![draft], Vec::new());
        }
    }

    /// Ends every open request of a session at its last acknowledgement.
    pub(super) fn abandon_all(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let open: Vec<RequestId> = session.state.requests().keys().copied().collect();
        for request in open {
            self.abandon(id, request);
        }
    }

    pub(super) fn abandon(&mut self, id: SessionId, request: RequestId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let draft = session.state.abandoned(request);
        if let (Some(engine), Some(live)) = (session.engine, session.requests.get(&request))
            && live.is_running()
        {
            let command = Command::Cancel { job: live.job };
            self.actions.push_back(ProviderAction::Engine { engine, command });
        }
        self.forget(id, &request);
        if let Ok(draft) = draft {
            self.counters.abandoned += 1;
            self.record(id, vec![draft], Vec::new());
        }
        self.offer_next_receipt(id);
    }

    /// Drops what is alive of a request; its state in the session is ended by an entry.
    pub(super) fn forget(&mut self, id: SessionId, request: &RequestId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.finishing.retain(|r| r != request);
        if let Some(live) = session.requests.remove(request) {
            self.jobs.remove(&live.job);
        }
    }

    /// Everything that falls due with time.
    pub(super) fn tick(&mut self, now: UnixMs) {
        if self.gate.is_broken() {
            return;
        }
        for id in self.live.iter().copied().collect::<Vec<SessionId>>() {
            let Some(session) = self.sessions.get(&id) else { continue };
            if session.detached_at.is_some_and(|at| now.since(at) >= DETACHED_MS) {
                self.abandon_all(id);
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.detached_at = None;
                }
                continue;
            }
            self.tick_requests(now, id);
            self.continue_close(now, id);
            self.refresh(&id);
        }
        let sessions = &self.sessions;
        self.live.retain(|id| sessions.get(id).is_some_and(Session::is_live));
        let timeout = self.config.signature_timeout_ms;
        self.wake = self.live.iter().filter_map(|id| self.sessions.get(id)?.next_deadline(timeout)).min();
    }
}
