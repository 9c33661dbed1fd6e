//! A connection that broke under streams: the requests are held, the provider is met again, and they go on under their ids
//! from what was received. Nothing is signed or paid meanwhile.
//!
//! | the provider | then |
//! |---|---|
//! | is there again and still has the requests | they go on; the client saw a pause |
//! | is there again and has them no more (it restarted, or the time was up) | they end at their last ack on both sides; their calls go elsewhere, or begin again there |
//! | is not there after `failover_ms` | calls that another provider could take go there |
//! | is not there after the terms' `resume_ms` | every request ends at its last ack |

use super::{
    CallId, Consumer, ConsumerAction, ConsumerConfig, SessionIndex,
    links::{BRIEF_MS, Phase, Session},
};
use crate::{CloseCode, LinkId};
use satgrid_protocol::frame::{ConsumerFrame, OpenRequest, reason};
use satgrid_types::{RequestId, UnixMs};

/// How long after a failed attempt to connect again the next one is made, in ms.
const RECONNECT_MS: u64 = 500;

/// See the module.
pub(super) struct Hold {
    since: UnixMs,
    next_try: UnixMs,
    /// The calls that could move have moved.
    moved: bool,
    why: String,
}

impl Hold {
    pub(super) fn next_deadline(&self, session: &Session, config: &ConsumerConfig) -> Option<UnixMs> {
        let resuming = session.phase == Phase::Resuming;
        let next_try = (session.phase == Phase::Asleep).then_some(self.next_try);
        let moved = (!self.moved && !resuming).then(|| self.since.plus_ms(config.failover_ms));
        let over = (!resuming).then(|| self.since.plus_ms(session.resume_ms()));
        [next_try, moved, over].into_iter().flatten().min()
    }
}

impl Session {
    /// How long the provider keeps the run of a request whose link broke.
    fn resume_ms(&self) -> u64 {
        self.state.as_ref().map_or(0, |s| s.quote().terms.resume_ms.into())
    }

    /// What a resume says of the requests that are held.
    pub(super) fn held_requests(&self) -> impl Iterator<Item = OpenRequest> {
        self.requests.iter().map(|(id, live)| OpenRequest {
            request: *id,
            last_ack: self.state.as_ref().and_then(|s| s.request_state(id)?.last_ack().cloned()),
            // What has no row yet is asked for again: rows are not kept to be said twice.
            received: live.private.embed.is_none().then_some(live.received),
        })
    }
}

impl Consumer {
    /// Holds the requests of a link that broke, where there are some. Whether it did.
    pub(super) fn hold(&mut self, now: UnixMs, link: LinkId, text: &str) -> bool {
        let Some(session) = self.links.get(&link).and_then(|i| self.sessions.get_mut(i)) else { return false };
        let known = session.state.is_some() && session.listing.is_some() && session.link == Some(link);
        // A lead does not wait for a worker: it has the rows, and takes another one.
        let parts = session.requests.values().any(|live| live.part.is_some());
        if !known || parts || session.requests.is_empty() || session.resume_ms() == 0 {
            return false;
        }
        match &mut session.hold {
            Some(hold) => hold.next_try = now.plus_ms(RECONNECT_MS),
            None => session.hold = Some(Hold { since: now, next_try: now, moved: false, why: text.to_owned() }),
        }
        true
    }

    /// The request's session has no connection now, and its provider was not asked to go on with it yet.
    pub(super) fn is_held(&self, index: SessionIndex) -> bool {
        self.sessions.get(&index).is_some_and(|s| s.hold.is_some() && s.phase != Phase::Resuming)
    }

    /// An attempt to meet the provider again came to nothing.
    pub(super) fn try_again(&mut self, now: UnixMs, index: SessionIndex, text: &str) {
        let Some(link) = self.sessions.get(&index).and_then(|s| s.link) else { return };
        self.actions.push_back(ConsumerAction::CloseLink { link, code: CloseCode::Done, reason: reason(text) });
        self.unlink(now, link, text, true);
    }

    pub(super) fn tick_hold(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get(&index) else { return };
        let Some(hold) = &session.hold else { return };
        if session.phase == Phase::Resuming {
            // What was said of the requests stands until it is answered.
            return;
        }
        let why = hold.why.clone();
        if session.requests.is_empty() {
            // Every client of theirs has left.
            if let Some(session) = self.sessions.get_mut(&index) {
                session.hold = None;
            }
            return;
        }
        if now >= hold.since.plus_ms(session.resume_ms()) {
            return self.give_up(now, index, &why);
        }
        if !hold.moved && now >= hold.since.plus_ms(self.config.failover_ms) {
            self.move_calls(now, index, &why);
        }
        let Some(session) = self.sessions.get_mut(&index).filter(|s| s.phase == Phase::Asleep) else { return };
        if let Some(hold) = session.hold.as_mut().filter(|hold| now >= hold.next_try) {
            hold.next_try = now.plus_ms(RECONNECT_MS);
            self.wake(now, index);
        }
    }

    /// The provider is avoided for a while, and what was held ends at its last acknowledgement.
    fn give_up(&mut self, now: UnixMs, index: SessionIndex, why: &str) {
        self.shun_provider(now, index, why);
        if let Some(session) = self.sessions.get_mut(&index) {
            session.hold = None;
        }
        if self.sessions.get(&index).is_some_and(|s| s.link.is_some()) {
            return self.drop_link(now, index, CloseCode::Done, why);
        }
        self.scatter(now, index, why);
    }

    /// Calls that another provider could take go there; the others wait on.
    fn move_calls(&mut self, now: UnixMs, index: SessionIndex, why: &str) {
        self.shun_provider(now, index, why);
        let Some(session) = self.sessions.get_mut(&index) else { return };
        if let Some(hold) = &mut session.hold {
            hold.moved = true;
        }
        let streaming: Vec<(RequestId, CallId)> = session.requests.iter().map(|(id, live)| (*id, live.call)).collect();
        let waiting: Vec<CallId> = session.waiting.iter().copied().collect();
        for call in waiting.into_iter().filter(|call| self.has_elsewhere(now, *call)).collect::<Vec<_>>() {
            if let Some(session) = self.sessions.get_mut(&index) {
                session.waiting.retain(|c| *c != call);
            }
            self.reassign(now, call, why);
        }
        for (request, call) in streaming {
            if self.has_elsewhere(now, call) {
                self.abandon(index, request);
                self.reassign(now, call, why);
            }
        }
    }

    /// Ends the held requests that the provider does not go on with: it has ended them at the same acknowledgement. Their
    /// calls come back.
    pub(super) fn end_all_but(&mut self, index: SessionIndex, going: &[RequestId]) -> Vec<CallId> {
        let Some(session) = self.sessions.get(&index) else { return Vec::new() };
        let lost: Vec<RequestId> = session.requests.keys().copied().filter(|id| !going.contains(id)).collect();
        lost.into_iter().filter_map(|request| self.abandon(index, request)).collect()
    }

    /// The session was resumed: each held request gets a stream of its own again.
    pub(super) fn go_on(&mut self, now: UnixMs, index: SessionIndex, link: LinkId, lost: Vec<CallId>) {
        let ready = |s: &&mut Session| s.is_ready() && s.link == Some(link);
        let why = "the provider came back without the request";
        let Some(session) = self.sessions.get_mut(&index).filter(ready) else {
            return lost.into_iter().for_each(|call| self.reassign(now, call, why));
        };
        if session.hold.take().is_some_and(|hold| hold.moved) {
            // It was avoided for being away.
            let provider = session.provider();
            self.shunned.retain(|key, (until, _)| *key != provider || *until > now.plus_ms(BRIEF_MS));
        }
        let Some(session) = self.sessions.get(&index) else { return };
        for request in session.requests.keys().copied().collect::<Vec<_>>() {
            self.go_on_with(now, index, link, request);
        }
        self.release_held(now, index);
        for call in lost {
            self.begin_again(now, call, index, why);
        }
    }

    fn go_on_with(&mut self, now: UnixMs, index: SessionIndex, link: LinkId, request: RequestId) {
        let stream = self.new_stream();
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(live) = session.requests.get_mut(&request) else { return };
        live.stream = stream;
        live.last_frame_at = now;
        let cancelled = live.ended.is_some() || self.calls.get(&live.call).is_none_or(|call| call.cancelled);
        session.streams.insert(stream, request);
        self.counters.resumed += 1;
        let frame = ConsumerFrame::Resume(request);
        self.actions.push_back(ConsumerAction::OpenStream { link, stream, frame });
        if cancelled {
            self.cancel_request(index, &request);
        }
    }
}
