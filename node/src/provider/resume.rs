//! A consumer that comes back after its connection broke: requests whose runs were kept go on, all others end at the last
//! acknowledgement or receipt that it shows.
//!
//! | what was lost on the way | how it is made good |
//! |---|---|
//! | chunks | said again, from what the consumer has |
//! | an acknowledgement that was offered | said again in its place among the chunks |
//! | its countersignature | the consumer shows it when it resumes |
//! | a receipt that was offered | said again after the last chunk |
//! | its countersignature, or its entry in a crash | the consumer shows the last receipts when it resumes |
//!
//! What runs without a link stays within its grant: the window that nobody signed for, and no further.

use super::{
    EngineId, Provider, ProviderAction,
    peers::Peer,
    requests::{Phase, Request},
    sessions::Session,
};
use crate::{LinkId, StreamId};
use satgrid_engine::port::Command;
use satgrid_ledger::statements::Receipt;
use satgrid_protocol::frame::{MAX_CHUNK_TOKENS, OpenRequest, ProviderControl, ProviderFrame, Refusal};
use satgrid_types::{BothSigned, Msat, Numerators, RequestId, SessionId, UnixMs};

impl Request {
    /// The consumer is back and has this much of the output. Its time to answer what is out begins anew.
    pub(super) fn wait_for_stream(&mut self, now: UnixMs, received: Option<u32>) {
        self.awaits_stream = received;
        self.ack.offered_at = now;
        if let Phase::Offered { at, .. } = &mut self.phase {
            *at = now;
        }
    }

    /// Both signed for the output up to here.
    pub(super) fn signed_upto(&mut self, completion: u32) {
        let keep = self.done.completion.saturating_sub(completion);
        let drop = self.unsigned.len().saturating_sub(usize::try_from(keep).unwrap_or(usize::MAX));
        self.unsigned.drain(..drop);
    }

    /// Chunks of the output from `from` to `to`, where it is still kept.
    fn chunks(&self, from: u32, to: u32) -> Vec<ProviderFrame> {
        let begin = self.done.completion.saturating_sub(u32::try_from(self.unsigned.len()).unwrap_or(u32::MAX));
        let at = |index: u32| usize::try_from(index.saturating_sub(begin)).unwrap_or(usize::MAX);
        let kept = self.unsigned.get(at(from)..at(to)).unwrap_or_default();
        let numbered = kept.chunks(MAX_CHUNK_TOKENS).zip((from..).step_by(MAX_CHUNK_TOKENS));
        numbered.map(|(ids, first)| ProviderFrame::Chunk(first, ids.to_vec())).collect()
    }
}

impl Provider {
    /// The consumer is back: what it shows of open requests lets them go on or settles them, and the session goes on over
    /// this link.
    pub(super) fn resume(
        &mut self,
        now: UnixMs,
        link: LinkId,
        id: SessionId,
        open: Vec<OpenRequest>,
        receipts: Vec<BothSigned<Receipt>>,
    ) {
        let Some((peer, host, carried)) = self.links.get(&link).map(|l| (l.peer, l.host, l.session)) else { return };
        if carried.is_some_and(|carried| carried != id) {
            // The session that it left would go on waiting for this link, which says nothing more of it.
            return self.violation(link, "one session per connection");
        }
        let Some(session) = self.sessions.get_mut(&id).filter(|s| s.state.consumer() == peer) else {
            return self.refuse(link, Refusal::Unknown, "no such session here for this key");
        };
        session.peer = Peer::of(host, peer);
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
        for receipt in &receipts {
            self.adopt_receipt(id, receipt);
        }
        for request in &open {
            self.adopt_ack(now, id, request);
        }
        let going: Vec<RequestId> = open.iter().filter(|o| self.can_go_on(id, o)).map(|o| o.request).collect();
        self.abandon_all_but(id, &going);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.detached_at = None;
        session.held = false;
        for request in open {
            if let Some(live) = session.requests.get_mut(&request.request) {
                live.wait_for_stream(now, request.received);
            }
        }
        self.tell_credits(link, id);
        let Some(session) = self.sessions.get(&id) else { return };
        let (paid, last) = (session.state.paid(), session.state.last_receipt());
        let settled = session.state.settled_numerators();
        let silent = session.state.credits().is_empty() && session.state.spent().is_none();
        let resumed = ProviderControl::Resumed(id, paid, last, settled, going);
        if silent {
            return self.say(link, resumed);
        }
        // In order behind what was said of credit, which may wait for the journal: a close counts it.
        self.behind(vec![ProviderAction::Control { link, frame: resumed }]);
    }

    /// The request is alive here, and what the consumer has of it is what it can have.
    fn can_go_on(&self, id: SessionId, open: &OpenRequest) -> bool {
        let Some(session) = self.sessions.get(&id) else { return false };
        // Without `detached_at` the consumer was the first to notice the break.
        let alive = session.held || session.detached_at.is_none();
        let request = session.requests.get(&open.request).zip(session.state.request_state(&open.request));
        let fits = |received: u32| {
            request
                .is_some_and(|(live, state)| received >= state.acked().completion && received <= live.done.completion)
        };
        alive && open.received.is_some_and(fits)
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
        if session.requests.contains_key(&open.request) {
            return self.acknowledged(now, id, open.request, both);
        }
        if let Ok(draft) = state.acked(now, both, open.request, Msat::ZERO) {
            self.record(id, vec![draft], Vec::new());
        }
    }

    /// The new stream of a request that a break left open: what was said after what the consumer has is said again, in the
    /// order in which it was said.
    pub(super) fn go_on(&mut self, now: UnixMs, link: LinkId, stream: StreamId, id: SessionId, request: RequestId) {
        let settled = self.sessions.get(&id).map(|session| session.state.settled_numerators());
        let live = self.live(id, &request).and_then(|live| live.awaits_stream.take().map(|received| (live, received)));
        let Some((live, received)) = live else {
            return self.violation(link, "a stream for a request that does not wait for one");
        };
        live.stream = (link, stream);
        live.ack.offered_at = now;
        let mut frames = Vec::new();
        let mut from = received;
        // A consumer that has more than the acknowledgement covers has the acknowledgement too, and will sign it.
        if let Some((ack, signed)) = live.ack.out.as_ref().filter(|(ack, _)| received <= ack.usage.completion) {
            frames.extend(live.chunks(received, ack.usage.completion));
            frames.push(ProviderFrame::Ack(signed.clone()));
            from = ack.usage.completion;
        }
        frames.extend(live.chunks(from, live.done.completion));
        let follows = |added: Numerators, sum: Numerators| settled.and_then(|all| all.checked_add(added)) == Some(sum);
        let receipt = match &mut live.phase {
            Phase::Offered { body, signed, at } if follows(body.numerators, body.cumulative_numerators) => {
                *at = now;
                Some(ProviderFrame::Receipt(body.finish, signed.clone()))
            }
            Phase::Offered { body, .. } => {
                // Another request ended without a receipt when the consumer came back, and this one counts on from there: it
                // is offered anew.
                let at = live.started_at.plus_ms(body.duration_ms.into());
                live.phase = Phase::Finishing { reason: body.finish, error: body.error.clone(), at };
                None
            }
            Phase::Running | Phase::Finishing { .. } => None,
        };
        // As when they were said first: chunks and acknowledgements wait for no entry (what the engine makes next would
        // overtake them), a receipt waits for the one before it.
        frames.into_iter().for_each(|frame| self.send(link, stream, frame));
        let receipt = receipt.map(|frame| ProviderAction::Send { link, stream, frame });
        self.behind(receipt.into_iter().collect());
        self.offer_ack_if_due(now, id, request);
        self.offer_next_receipt(id);
    }

    /// A consumer that is here goes before one that is away: where every slot is taken, the session that has been held
    /// longest is held no more. Its calls begin again from what was received, when it comes back.
    pub(super) fn make_room(&mut self, engine: EngineId) {
        let slots = self.offerings.values().filter(|o| o.engine == engine).map(|o| o.listing.slots).max();
        let live = self.live.iter().filter_map(|id| Some((*id, self.sessions.get(id)?)));
        let running = |s: &Session| s.requests.values().filter(|r| r.is_running()).count();
        let served: Vec<_> = live.filter(|(_, s)| s.engine == Some(engine) && running(s) > 0).collect();
        let taken: usize = served.iter().map(|(_, session)| running(session)).sum();
        if slots.and_then(|slots| usize::try_from(slots).ok()).is_none_or(|slots| taken < slots) {
            return;
        }
        let longest = served.iter().filter(|(_, s)| s.held).min_by_key(|(_, s)| s.detached_at).map(|(id, _)| *id);
        if let Some(id) = longest {
            self.hold_over(id);
        }
    }

    /// The consumer did not come back in time: nothing runs for it any more. The bookkeeping stays open.
    pub(super) fn hold_over(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.held = false;
        let running = session.requests.values().filter(|r| r.is_running()).map(|r| r.job);
        if let Some(engine) = session.engine {
            let cancel = running.map(|job| ProviderAction::Engine { engine, command: Command::Cancel { job } });
            self.actions.extend(cancel);
        }
    }
}
