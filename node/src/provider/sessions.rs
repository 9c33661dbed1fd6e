//! Live sessions: their requests, the receipt chain's queue, and the deadlines.

use super::{EngineId, Provider, ProviderAction, peers::Peer, requests::Request};
use crate::LinkId;
use satgrid_engine::port::Command;
use satgrid_ledger::statements::SessionClose;
use satgrid_pricing::cost_alone;
use satgrid_protocol::{
    exposure::ProviderExposure,
    session::{DETACHED_MS, SessionState},
};
use satgrid_types::{Msat, RequestId, SessionId, Signed, UnixMs};
use std::collections::{BTreeMap, VecDeque};

/// One session and what is alive of it.
pub(super) struct Session {
    pub state: SessionState,
    /// Who it is among consumers.
    pub peer: Peer,
    pub engine: Option<EngineId>,
    pub link: Option<LinkId>,
    pub requests: BTreeMap<RequestId, Request>,
    /// Requests whose run is over, in order: one receipt is offered at a time, since each names the one before.
    pub finishing: VecDeque<RequestId>,
    /// A request ended without a receipt: the next receipt waits until that is on the disk.
    pub in_order: bool,
    /// Since when requests without a live link wait for the consumer.
    pub detached_at: Option<UnixMs>,
    /// Their runs are kept: the consumer may go on with them. Over after the terms' `resume_ms`.
    pub held: bool,
    /// A close that came while requests were open.
    pub closing: Option<(LinkId, Signed<SessionClose>)>,
    /// Invoices that replaced an unpaid one, since the last payment.
    pub reissued: u32,
    /// Further quotes, since the last payment or receipt.
    pub requoted: u32,
    /// Closes that came again with another invoice.
    pub reclosed: u32,
    /// Its part of what the provider says that it may lose.
    pub exposed: Msat,
}

impl Session {
    pub(super) fn new(state: SessionState, peer: Peer, link: Option<LinkId>, engine: Option<EngineId>) -> Session {
        Session {
            state,
            peer,
            engine,
            link,
            requests: BTreeMap::new(),
            finishing: VecDeque::new(),
            in_order: false,
            detached_at: None,
            held: false,
            closing: None,
            reissued: 0,
            requoted: 0,
            reclosed: 0,
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
        let held = self.detached_at.filter(|_| self.held).map(|at| at.plus_ms(terms.resume_ms.into()));
        [requests, detached, held].into_iter().flatten().min()
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
        if state.is_unpaid() {
            self.note_unpaid(id, state.lapses_at());
        }
        let peer = Peer::of(None, state.consumer());
        let mut session = Session::new(state, peer, None, None);
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
            // What runs goes on to the end of its grant, which is what the consumer may not sign for, and waits there.
            session.detached_at = Some(now);
            session.held = true;
        }
    }

    /// Ends every open request of a session at its last acknowledgement.
    pub(super) fn abandon_all(&mut self, id: SessionId) {
        self.abandon_all_but(id, &[]);
    }

    pub(super) fn abandon_all_but(&mut self, id: SessionId, going: &[RequestId]) {
        let Some(session) = self.sessions.get(&id) else { return };
        let open: Vec<RequestId> = session.state.requests().keys().copied().filter(|r| !going.contains(r)).collect();
        for request in open {
            self.abandon(id, request);
        }
    }

    pub(super) fn abandon(&mut self, id: SessionId, request: RequestId) {
        self.note_unsigned(id, &request);
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
            if let Some(session) = self.sessions.get_mut(&id) {
                session.in_order = true;
            }
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
            let resume_ms = session.state.quote().terms.resume_ms;
            if session.held && session.detached_at.is_some_and(|at| now.since(at) >= resume_ms.into()) {
                self.hold_over(id);
            }
            self.tick_requests(now, id);
            self.continue_close(now, id);
            self.refresh(&id);
        }
        self.tick_unpaid(now);
        self.tick_links(now);
        let sessions = &self.sessions;
        self.live.retain(|id| sessions.get(id).is_some_and(Session::is_live));
        let timeout = self.config.signature_timeout_ms;
        let live = self.live.iter().filter_map(|id| self.sessions.get(id)?.next_deadline(timeout)).min();
        self.wake = [live, self.unpaid_due, self.next_unused_link()].into_iter().flatten().min();
    }
}
