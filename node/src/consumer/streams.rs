//! Running requests: started when covered, counted token by token, countersigned. Their ends are in `receipts`.

use super::{
    CallId, Consumer, ConsumerAction, ConsumerConfig, Emission, FundsLimit, SessionIndex, calls::Place, links::Session,
    parts::PartLive,
};
use crate::{LinkId, StreamId};
use satgrid_ledger::statements::{Ack, Receipt, RequestOpen, RequestPrivate, RunningHash};
use satgrid_protocol::{
    check::{self, Counted},
    frame::{ConsumerFrame, MAX_CHUNK_TOKENS, ProviderFrame, Refusal, StartRequest, TokenLogprobs},
    metering::{Grant, Meter},
    session::RequestState,
};
use satgrid_types::{BothSigned, FinishReason, Msat, RequestId, Salt, Signed, Terms, TokenUsage, UnixMs, cbor};

/// Times in a row that a call may be refused for want of funds before its provider is left.
const MAX_SHORT: u32 = 4;
pub(super) const SILENT: &str = "the provider went silent";
/// Without money for it, silence of this many ms ends a request.
const UNFUNDED_STALL_MS: u64 = 2_000;

/// What is alive of one request.
pub(super) struct Live {
    pub call: CallId,
    pub stream: StreamId,
    pub(super) salt: Salt,
    pub(super) private: RequestPrivate,
    pub received: u32,
    /// Of texts: those whose rows came.
    pub(super) rows: usize,
    pub(super) running: RunningHash,
    pub last_frame_at: UnixMs,
    /// Since its first tokens came.
    pub(super) wrote: Option<Wrote>,
    /// Of a worker.
    pub(super) part: Option<PartLive>,
    /// A statement that is right, and beyond what our own books show as paid: signed once the payment is booked.
    pub(super) held: Option<Held>,
    /// Why this side asked for the end of it, where the client did not.
    pub ended: Option<Ended>,
}

/// How fast output came: what follows the first tokens, which wait for the prompt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wrote {
    from: UnixMs,
    upto: UnixMs,
    tokens: u32,
}

/// Over fewer tokens a speed is an accident.
const LEAST_TOKENS: u32 = 16;

impl Wrote {
    pub(super) fn more(so_far: Option<Wrote>, now: UnixMs, tokens: u32) -> Wrote {
        match so_far {
            Some(wrote) => Wrote { upto: now, tokens: wrote.tokens.saturating_add(tokens), ..wrote },
            None => Wrote { from: now, upto: now, tokens: 0 },
        }
    }

    /// Thousandths of a token a second.
    pub(super) fn mtok_s(self) -> Option<u64> {
        if self.tokens < LEAST_TOKENS {
            return None;
        }
        (u64::from(self.tokens) * 1_000_000).checked_div(self.upto.since(self.from))
    }
}

/// See [`Live::held`].
pub(super) enum Held {
    Ack(Box<Ack>, BothSigned<Ack>),
    Receipt(FinishReason, Signed<Receipt>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Silent,
    Unfunded,
}

/// Whether a request can go on with the money that its session has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hunger {
    Fed,
    /// It cannot, and no money can be had now.
    Starved,
    /// It cannot, and none will ever come in this session: it is at its cap.
    Final,
}

impl Live {
    pub(super) fn stall_deadline(&self, config: &ConsumerConfig, hunger: Hunger) -> UnixMs {
        let patience = match (self.ended, hunger) {
            (None, Hunger::Final) => 0,
            // A worker waits for rows, and its lead for a customer. Who is dead is told by the link.
            (None, Hunger::Starved | Hunger::Fed) if self.part.is_some() => return UnixMs(u64::MAX),
            (None, Hunger::Starved) => UNFUNDED_STALL_MS,
            (Some(_), _) | (None, Hunger::Fed) => config.stall_ms,
        };
        self.last_frame_at.plus_ms(patience)
    }
    pub(super) fn counted(&self) -> Counted {
        let ordered = self.part.as_ref().map(|part| part.sent);
        let embedded = self.missing_row();
        Counted { received: self.received, running_hash: self.running.value(), ordered, embedded }
    }
}

impl Session {
    /// What the provider may do for a request on what it can see of our money, at the last acknowledgement.
    fn granted(&self, id: &RequestId) -> Option<(Grant, &RequestState)> {
        let state = self.state.as_ref()?;
        let request = state.request_state(id)?;
        let funds = request.reserved().saturating_add(self.usable_balance());
        let grant = Meter::of(request.open()).grant(&request.acked(), funds, request.rates(), &state.quote().terms);
        Some((grant, request))
    }

    pub(super) fn hunger(&self, id: &RequestId) -> Hunger {
        // Asked of every request at every event, and what is free is a sum over all of them: it is looked at where money lacks.
        let Some(lack) = self.unfunded else { return Hunger::Fed };
        let (Some((grant, request)), Some(live)) = (self.granted(id), self.requests.get(id)) else {
            return Hunger::Fed;
        };
        let mut done = request.acked();
        done.completion = done.completion.max(live.received);
        if Meter::of(request.open()).goes_on(grant, &done) {
            return Hunger::Fed;
        }
        if self.closing && lack.limit == FundsLimit::SessionCap { Hunger::Final } else { Hunger::Starved }
    }

    /// What should be free beside a running request's reservation: `low` water or its next prompt piece, and never more
    /// than the rest of it can cost.
    pub(super) fn ahead(&self, id: &RequestId, low: Msat) -> Msat {
        let Some(request) = self.state.as_ref().and_then(|s| s.request_state(id)) else { return Msat::ZERO };
        let terms = self.state.as_ref().map_or_else(Terms::default, |s| s.quote().terms);
        Meter::of(request.open()).ahead(&request.acked(), request.reserved(), low, request.rates(), &terms)
    }
}

impl Consumer {
    /// Starts the requests of calls that wait for this session, as far as its balance covers them.
    pub(super) fn start_waiting(&mut self, now: UnixMs, index: SessionIndex) {
        loop {
            let Some(session) = self.sessions.get(&index).filter(|s| s.is_ready() && !s.closing && !s.short) else {
                return;
            };
            let Some(&call) = session.waiting.front() else { return };
            let Some(need) = self.start_need(index, call) else { return };
            if self.sessions.get(&index).is_none_or(|s| s.usable_balance() < need) || !self.quote_is_fresh(now, index) {
                return;
            }
            if let Some(session) = self.sessions.get_mut(&index) {
                session.waiting.pop_front();
            }
            self.start(now, index, call);
        }
    }

    fn start(&mut self, now: UnixMs, index: SessionIndex, id: CallId) {
        let (request, salt) = (RequestId(self.random32()), Salt(self.random32()));
        let stream = self.new_stream();
        let Some(session) = self.sessions.get(&index) else { return };
        let (Some(state), Some(link), Some(call)) = (&session.state, session.link, self.calls.get(&id)) else { return };
        let (prompt, max_output) = (call.prompt(), call.output_left());
        let submit = call.submit();
        let private = RequestPrivate {
            grammar: submit.grammar.clone().map(Into::into),
            top_logprobs: submit.top_logprobs,
            embed: call.texts(),
            ..RequestPrivate::new(&salt, &prompt, submit.sampling.clone(), submit.stop.clone(), call.resumed())
        };
        let open = RequestOpen {
            version: RequestOpen::VERSION,
            session: state.id(),
            request,
            quote: state.quote_id(),
            prompt_tokens: call.prompt_len(),
            max_output,
            private_hash: private.commitment(&salt),
            opened_at: now,
            part: call.part(),
        };
        let signed = Signed::sign(&open, &session.key);
        let quote = state.quote();
        let meter = call.meter();
        let need = meter.start_cost(&quote.rates, &quote.terms).unwrap_or_default();
        let grant = meter.grant(&TokenUsage::default(), session.usable_balance(), &quote.rates, &quote.terms);
        let reserve = meter.cost(grant, &quote.rates).unwrap_or(Msat::ZERO);
        let draft = state.request(now, &signed, request, reserve);
        let provider = state.provider();
        let live = Live {
            call: id,
            stream,
            salt,
            private: private.clone(),
            received: 0,
            rows: 0,
            running: RunningHash::start(&salt, &request),
            last_frame_at: now,
            wrote: None,
            part: call.part().map(|_| PartLive::default()),
            held: None,
            ended: None,
        };
        let start = StartRequest { open: signed, salt, prompt, private };
        let ordered = call.part().map(|_| Emission::Ordered { session: state.id(), key: state.consumer(), request });
        if let Some(session) = self.sessions.get_mut(&index) {
            session.flow.started(now, need, session.requests.len());
            session.streams.insert(stream, request);
            session.requests.insert(request, live);
            session.unfunded = None;
        }
        if let Some(call) = self.calls.get_mut(&id) {
            call.place = Place::Streaming(index, request);
        }
        let open = ConsumerAction::OpenStream { link, stream, frame: ConsumerFrame::Start(Box::new(start)) };
        // Told at once: it promises nothing, and must not come after the call's end.
        self.actions.push_back(ConsumerAction::Emit { call: id, emission: Emission::Started { provider, request } });
        let ordered = ordered.map(|emission| ConsumerAction::Emit { call: id, emission });
        self.record(index, vec![draft], [Some(open), ordered].into_iter().flatten().collect());
    }

    pub(super) fn frame(&mut self, now: UnixMs, link: LinkId, stream: StreamId, frame: ProviderFrame) {
        let Some(&index) = self.links.get(&link) else { return };
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(&request) = session.streams.get(&stream) else { return };
        let Some(live) = session.requests.get_mut(&request) else { return };
        live.last_frame_at = now;
        match frame {
            ProviderFrame::Chunk(first, ids) => self.chunk(now, index, request, first, ids),
            ProviderFrame::Embedded(text, row) => self.embedded(now, index, request, text, row.into()),
            ProviderFrame::Logprobs(first, entries) => self.logprobs(now, index, request, first, entries),
            ProviderFrame::Ack(signed) => self.ack(now, index, request, &signed),
            ProviderFrame::Receipt(reason, signed) => self.receipt(now, index, request, reason, &signed),
            ProviderFrame::Refused(refusal, text) => self.request_refused(now, index, request, refusal, &text),
        }
    }

    fn chunk(&mut self, now: UnixMs, index: SessionIndex, request: RequestId, first: u32, ids: Vec<u32>) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let max = session.state.as_ref().and_then(|s| s.request_state(&request)).map_or(0, |r| r.open().max_output);
        let Some(live) = session.requests.get_mut(&request) else { return };
        let after = live.received.saturating_add(super::calls::len(&ids));
        if first != live.received || ids.is_empty() || ids.len() > MAX_CHUNK_TOKENS || after > max {
            let text = "a chunk out of order, empty, too long, or beyond what was asked for";
            return self.misbehaved(now, index, "chunk", text, cbor::encode(&ProviderFrame::Chunk(first, ids)));
        }
        live.received = after;
        live.wrote = Some(Wrote::more(live.wrote, now, super::calls::len(&ids)));
        ids.iter().for_each(|token| live.running.push(*token));
        let call = live.call;
        if let Some(call) = self.calls.get_mut(&call) {
            call.received.extend_from_slice(&ids);
        }
        self.actions.push_back(ConsumerAction::Emit { call, emission: Emission::Tokens { ids } });
    }

    fn logprobs(
        &mut self,
        now: UnixMs,
        index: SessionIndex,
        request: RequestId,
        first: u32,
        entries: Vec<TokenLogprobs>,
    ) {
        let Some(live) = self.sessions.get(&index).and_then(|s| s.requests.get(&request)) else { return };
        let most = live.private.top_logprobs.and_then(|top| usize::try_from(top).ok());
        let fits = most.is_some_and(|most| entries.iter().all(|entry| entry.top.len() <= most));
        if first != live.received || entries.is_empty() || entries.len() > MAX_CHUNK_TOKENS || !fits {
            let text = "log probabilities out of order, or that were not asked for";
            return self.misbehaved(now, index, "chunk", text, cbor::encode(&ProviderFrame::Logprobs(first, entries)));
        }
        let call = live.call;
        self.actions.push_back(ConsumerAction::Emit { call, emission: Emission::Logprobs { entries } });
    }

    fn ack(&mut self, now: UnixMs, index: SessionIndex, request: RequestId, signed: &Signed<Ack>) {
        let Some(session) = self.sessions.get(&index) else { return };
        let (Some(state), Some(link)) = (&session.state, session.link) else { return };
        let Some(live) = session.requests.get(&request) else { return };
        let Ok(offered) = signed.verify(&session.provider()) else {
            return self.drop_link(
                now,
                index,
                crate::CloseCode::Violation,
                "an acknowledgement that its provider did not sign",
            );
        };
        if let Err(fault) = check::ack(state, &request, &offered, &live.counted()) {
            return self.misbehaved(now, index, fault.rule(), &fault.to_string(), cbor::encode(signed));
        }
        let both = BothSigned::countersign(signed, &session.key);
        if live.is_early(&offered.usage) {
            if let Some(live) = self.sessions.get_mut(&index).and_then(|s| s.requests.get_mut(&request)) {
                live.held = Some(Held::Ack(Box::new(Ack::clone(&offered)), both));
            }
            return;
        }
        self.commit_ack(now, index, link, request, &offered, both);
    }

    /// Signs an acknowledgement that was checked, once our books cover it.
    fn commit_ack(
        &mut self,
        now: UnixMs,
        index: SessionIndex,
        link: LinkId,
        request: RequestId,
        offered: &Ack,
        both: BothSigned<Ack>,
    ) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(state) = &session.state else { return };
        let Some(held) = state.request_state(&request) else { return };
        if offered.cost > held.reserved().saturating_add(state.available()) {
            // The provider was told of a payment before we were: our own wallet will tell us too.
            if let Some(live) = session.requests.get_mut(&request) {
                live.held = Some(Held::Ack(Box::new(offered.clone()), both));
            }
            return;
        }
        let Some(session) = self.sessions.get(&index) else { return };
        let Some(state) = &session.state else { return };
        let Some(held) = state.request_state(&request) else { return };
        let Some(live) = session.requests.get(&request) else { return };
        // What the provider may do next on this signature is reserved with it.
        let meter = Meter::of(held.open());
        let funds = held.reserved().saturating_add(session.usable_balance());
        let grant = meter.grant(&offered.usage, funds, held.rates(), &state.quote().terms);
        let free = if held.may_reserve() { session.usable_balance() } else { Msat::ZERO };
        let more = meter.further(grant, held.reserved(), free, held.rates());
        // What is signed for is reserved, whatever the provider knows of our money.
        let more = more.unwrap_or(Msat::ZERO).max(offered.cost.saturating_sub(held.reserved()));
        if !more.is_zero() && !held.may_reserve() {
            let (provider, why) = (session.provider(), "a request needs more reservations than one entry can end");
            return self.leave(now, index, provider, why);
        }
        let Ok(draft) = state.acked(now, &both, request, more) else { return };
        let stream = live.stream;
        let frame = ConsumerFrame::Ack(offered.seq, *both.consumer_signature());
        self.record(index, vec![draft], vec![ConsumerAction::Send { link, stream, frame }]);
    }

    fn request_refused(&mut self, now: UnixMs, index: SessionIndex, request: RequestId, refusal: Refusal, text: &str) {
        let Some(session) = self.sessions.get(&index) else { return };
        let (provider, link) = (session.provider(), session.link);
        let stream = session.requests.get(&request).map(|live| live.stream);
        let call = self.abandon(index, request);
        if let (Some(link), Some(stream)) = (link, stream) {
            self.actions.push_back(ConsumerAction::FinishStream { link, stream });
        }
        let text = format!("provider {} refused: {text}", provider.short());
        let covered = call.is_some_and(|call| self.covers_all(index, call));
        if refusal == Refusal::Funds
            && let Some(id) = call
            && let Some(held) = self.calls.get_mut(&id).filter(|call| call.short < MAX_SHORT && !call.cancelled)
        {
            // Both sides reserve by what they know at the time, and ours was the rosier view: the provider fills the windows of
            // what runs first. Wait for the next slice or receipt. Where all that runs is covered to its end, both must see the
            // same: else it could have one slice after the other.
            if let Some(session) = self.sessions.get_mut(&index) {
                held.short += u32::from(covered);
                session.short = true;
            }
            return self.wait_on(id, index);
        }
        match refusal {
            Refusal::Protocol | Refusal::Funds => self.leave(now, index, provider, &text),
            Refusal::NotOffered
            | Refusal::Busy
            | Refusal::Context
            | Refusal::Quote
            | Refusal::Unavailable
            | Refusal::Unknown => {}
        }
        match call {
            Some(call) if refusal == Refusal::Busy => self.turned_away(now, call, &text),
            Some(call) => self.reassign(now, call, &text),
            None => {}
        }
    }

    /// The balance covers a call's start beside all that what runs can still cost.
    fn covers_all(&self, index: SessionIndex, call: CallId) -> bool {
        let Some(session) = self.sessions.get(&index) else { return false };
        let need = self.start_need(index, call).unwrap_or(Msat::MAX);
        let rest = session.requests.keys().map(|id| session.ahead(id, Msat::MAX));
        session.requests.is_empty() || session.usable_balance() >= rest.fold(need, Msat::saturating_add)
    }

    pub(super) fn stream_closed(&mut self, now: UnixMs, link: LinkId, stream: StreamId) {
        let Some(&index) = self.links.get(&link) else { return };
        let Some(request) = self.sessions.get_mut(&index).and_then(|s| s.streams.remove(&stream)) else { return };
        if self.sessions.get(&index).is_some_and(|s| s.requests.contains_key(&request))
            && let Some(call) = self.abandon(index, request)
        {
            self.reassign(now, call, "the provider ended the stream without a receipt");
        }
    }

    pub(super) fn cancel_request(&mut self, index: SessionIndex, request: &RequestId) {
        let Some(session) = self.sessions.get(&index) else { return };
        // One that is held is told when it goes on.
        let link = session.link.filter(|_| session.is_ready());
        if let (Some(link), Some(live)) = (link, session.requests.get(request)) {
            let stream = live.stream;
            self.actions.push_back(ConsumerAction::Send { link, stream, frame: ConsumerFrame::Cancel });
        }
    }

    /// Statements that waited for a payment to be booked.
    pub(super) fn release_held(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index).filter(|s| s.is_ready()) else { return };
        let Some(link) = session.link else { return };
        let held: Vec<(RequestId, Held)> =
            session.requests.iter_mut().filter_map(|(id, live)| Some((*id, live.held.take()?))).collect();
        for (request, held) in held {
            match held {
                Held::Ack(offered, both)
                    if self.sessions.get(&index).is_some_and(|s| {
                        s.requests.get(&request).is_some_and(|live| live.is_early(&offered.usage))
                    }) =>
                {
                    if let Some(live) = self.sessions.get_mut(&index).and_then(|s| s.requests.get_mut(&request)) {
                        live.held = Some(Held::Ack(offered, both));
                    }
                }
                Held::Ack(offered, both) => self.commit_ack(now, index, link, request, &offered, both),
                Held::Receipt(reason, signed) => self.receipt(now, index, request, reason, &signed),
            }
        }
    }

    /// Requests that went silent: first they are asked to end, in good order and with a receipt. A provider that does not
    /// even answer that loses the link; ending one request alone would leave the two sides at different figures.
    pub(super) fn tick_streams(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let hungers: Vec<Hunger> = session.requests.keys().map(|id| session.hunger(id)).collect();
        let mut silent = Vec::new();
        for ((id, live), hunger) in session.requests.iter_mut().zip(hungers) {
            if now < live.stall_deadline(&self.config, hunger) {
                continue;
            }
            if live.ended.is_some() {
                return self.drop_link(now, index, crate::CloseCode::Done, SILENT);
            }
            live.ended = Some(if hunger == Hunger::Fed { Ended::Silent } else { Ended::Unfunded });
            live.last_frame_at = now;
            silent.push(*id);
        }
        for request in silent {
            self.cancel_request(index, &request);
        }
    }
}
