//! Calls: assigned to a provider, moved to the next one when that fails, ended once.

use super::{Bill, CallError, CallId, Consumer, ConsumerAction, ConsumerConfig, Emission, Leg, SessionIndex, Submit};
use crate::CloseCode;
use satgrid_ledger::statements::{Leg as PartLeg, PartOrder};
use satgrid_protocol::metering::Meter;
use satgrid_types::{Digest, FinishReason, Msat, NodeKey, RequestId, UnixMs, VerifiedListing};
use std::collections::VecDeque;

/// How long a call may wait for a session that is ready and funded, in ms.
const WAIT_MS: u64 = 60_000;

/// One API request in hand.
pub(super) struct Call {
    submit: Submit,
    candidates: VecDeque<VerifiedListing>,
    /// Output so far, over all providers.
    pub received: Vec<u32>,
    /// Of texts: those whose rows came.
    pub rows: usize,
    pub place: Place,
    pub bill: Bill,
    attempts: usize,
    last_failure: String,
    /// The last provider that was asked had no place for it.
    full: bool,
    pub cancelled: bool,
    /// Times that its provider said the balance does not cover it, in a row.
    pub short: u32,
    waiting_since: UnixMs,
}

/// Where a call stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Nowhere,
    Waiting(SessionIndex),
    Streaming(SessionIndex, RequestId),
}

impl Call {
    pub(super) fn next_deadline(&self, _config: &ConsumerConfig) -> Option<UnixMs> {
        matches!(self.place, Place::Waiting(_)).then(|| self.waiting_since.plus_ms(WAIT_MS))
    }
    /// The prompt for the next provider: with what was received so far.
    pub(super) fn prompt(&self) -> Vec<u32> {
        let mut prompt = self.submit.prompt.get(self.submit.text_begins(self.rows)..).unwrap_or_default().to_vec();
        prompt.extend_from_slice(&self.received);
        prompt
    }
    pub(super) fn prompt_len(&self) -> u32 {
        let done = u32::try_from(self.submit.text_begins(self.rows)).unwrap_or(u32::MAX);
        len(&self.submit.prompt).saturating_sub(done).saturating_add(len(&self.received))
    }
    /// Lengths of the texts that are left to embed.
    pub(super) fn texts(&self) -> Option<Vec<u32>> {
        self.submit.embed.as_ref().map(|texts| texts.get(self.rows..).unwrap_or_default().to_vec())
    }
    /// Of texts: some have no row yet.
    pub(super) fn lacks_rows(&self) -> bool {
        self.submit.embed.as_ref().is_some_and(|texts| self.rows < texts.len())
    }
    /// Nothing has come of it yet.
    fn is_untouched(&self) -> bool {
        self.received.is_empty() && self.rows == 0
    }
    /// Whether all that was asked for came, without a word of its end.
    fn is_whole(&self) -> Option<FinishReason> {
        if let Some(texts) = &self.submit.embed {
            return (self.rows >= texts.len()).then_some(FinishReason::Stop);
        }
        let stopped = self.received.last().is_some_and(|token| self.submit.ends.contains(token));
        let full = self.output_left() == 0 && self.part().is_none();
        if stopped { Some(FinishReason::Stop) } else { full.then_some(FinishReason::Length) }
    }
    pub(super) fn output_left(&self) -> u32 {
        self.submit.max_output.saturating_sub(len(&self.received))
    }
    pub(super) fn resumed(&self) -> u32 {
        len(&self.received)
    }
    pub(super) fn submit(&self) -> &Submit {
        &self.submit
    }
    pub(super) fn part(&self) -> Option<PartOrder> {
        self.submit.part
    }
    pub(super) fn meter(&self) -> Meter {
        match self.submit.part {
            Some(order) => Meter::Part(order),
            None => Meter::Tokens { prompt_tokens: self.prompt_len(), max_output: self.output_left() },
        }
    }
    /// Why this provider could take the call above its limit; `None` where it cannot. A quote dearer than the listing is
    /// refused later, so the listing's rates bound what it may charge.
    fn over_budget(&self, listing: &VerifiedListing) -> Option<String> {
        let max = self.submit.max_cost?;
        let so_far = self.bill.cost();
        let more = satgrid_pricing::leg_ceiling(self.prompt_len(), self.output_left(), &listing.rates);
        let whole = more.ok().and_then(|more| more.checked_add(so_far));
        if whole.is_some_and(|whole| whole <= max) {
            return None;
        }
        let provider = listing.node_key.short();
        Some(format!("provider {provider} could bring the cost over the {max} that this call may spend"))
    }
}

pub(super) fn len(tokens: &[u32]) -> u32 {
    u32::try_from(tokens.len()).unwrap_or(u32::MAX)
}

impl Consumer {
    pub(super) fn submit(&mut self, now: UnixMs, submit: Submit) {
        let id = submit.call;
        self.counters.calls += 1;
        let candidates = submit.candidates.iter().cloned().collect();
        let call = Call {
            submit,
            candidates,
            received: Vec::new(),
            rows: 0,
            place: Place::Nowhere,
            bill: Bill::default(),
            attempts: 0,
            last_failure: String::new(),
            full: false,
            cancelled: false,
            short: 0,
            waiting_since: now,
        };
        self.calls.insert(id, call);
        if self.gate.is_broken() {
            return self.fail_call(id, CallError::Journal { reason: "an earlier write failed".into() });
        }
        if let Some(reason) = self.paused.clone() {
            return self.fail_call(id, CallError::Paused { reason });
        }
        if self.calls.len() > self.config.max_calls {
            return self.fail_call(id, CallError::Busy);
        }
        self.assign(now, id);
    }

    /// Gives a call to the next candidate that is not avoided.
    fn assign(&mut self, now: UnixMs, id: CallId) {
        let max = self.config.max_attempts;
        loop {
            let Some(call) = self.calls.get_mut(&id) else { return };
            let fallbacks = call.submit.allow_fallbacks || call.attempts == 0;
            let next = if call.attempts < max && fallbacks { call.candidates.pop_front() } else { None };
            let Some(listing) = next else {
                let error = if call.last_failure.is_empty() {
                    CallError::NoProvider { why: "no listing is left to try".into() }
                } else if call.full && call.is_untouched() {
                    CallError::Full { reason: call.last_failure.clone() }
                } else {
                    CallError::ProvidersFailed { reason: call.last_failure.clone() }
                };
                return self.fail_call(id, error);
            };
            if let Some((until, why)) = self.shunned.get(&listing.node_key)
                && *until > now
            {
                call.last_failure = format!("provider {} is avoided for now: {why}", listing.node_key.short());
                continue;
            }
            if let Some(over) = call.over_budget(&listing) {
                call.last_failure = over;
                continue;
            }
            call.attempts += 1;
            call.waiting_since = now;
            let index = self.session_with(now, &listing);
            return self.attach(id, index);
        }
    }

    /// Another provider could take this call now.
    pub(super) fn has_elsewhere(&self, now: UnixMs, id: CallId) -> bool {
        let shunned =
            |listing: &VerifiedListing| self.shunned.get(&listing.node_key).is_some_and(|(until, _)| *until > now);
        self.calls.get(&id).is_some_and(|call| {
            let may = call.submit.allow_fallbacks && call.attempts < self.config.max_attempts;
            may && call.candidates.iter().any(|listing| !shunned(listing))
        })
    }

    /// The call's provider is back and knows nothing of its request: another one goes on, or where there is none, this one
    /// begins again from what was received.
    pub(super) fn begin_again(&mut self, now: UnixMs, id: CallId, index: SessionIndex, why: &str) {
        let elsewhere = self.has_elsewhere(now, id);
        let max = self.config.max_attempts;
        let usable = self.sessions.get(&index).is_some_and(|s| s.is_ready() && s.is_usable());
        let goes_on = |call: &Call| !call.cancelled && call.is_whole().is_none() && call.attempts < max;
        match self.calls.get_mut(&id) {
            Some(call) if !elsewhere && usable && goes_on(call) => {
                call.attempts += 1;
                self.requeue(now, id, index);
            }
            Some(_) | None => self.reassign(now, id, why),
        }
    }

    pub(super) fn attach(&mut self, id: CallId, index: SessionIndex) {
        if let (Some(call), Some(session)) = (self.calls.get_mut(&id), self.sessions.get_mut(&index)) {
            call.place = Place::Waiting(index);
            session.waiting.push_back(id);
            self.live.insert(index);
        }
    }

    /// Back to the head of its session's queue, with all its patience.
    fn requeue(&mut self, now: UnixMs, id: CallId, index: SessionIndex) {
        if let Some(call) = self.calls.get_mut(&id) {
            call.waiting_since = now;
        }
        self.wait_on(id, index);
    }

    /// Back to the head of its session's queue: its request was not taken up, and may be later.
    pub(super) fn wait_on(&mut self, id: CallId, index: SessionIndex) {
        if let (Some(call), Some(session)) = (self.calls.get_mut(&id), self.sessions.get_mut(&index)) {
            call.place = Place::Waiting(index);
            session.waiting.push_front(id);
            self.live.insert(index);
        }
    }

    /// A provider had no place for it: the next one is asked, and where there is none, the client may try again soon.
    pub(super) fn turned_away(&mut self, now: UnixMs, id: CallId, why: &str) {
        if let Some(call) = self.calls.get_mut(&id) {
            call.full = true;
        }
        self.move_on(now, id, why);
    }

    /// A call lost its provider: the next one goes on from what was received.
    pub(super) fn reassign(&mut self, now: UnixMs, id: CallId, why: &str) {
        if let Some(call) = self.calls.get_mut(&id) {
            call.full = false;
        }
        self.move_on(now, id, why);
    }

    fn move_on(&mut self, now: UnixMs, id: CallId, why: &str) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        call.place = Place::Nowhere;
        call.last_failure = why.to_owned();
        if call.cancelled {
            return self.fail_call(id, CallError::Cancelled);
        }
        let begun = !call.is_untouched();
        if let Some(leg) = call.bill.legs.last() {
            let (provider, received, why) = (leg.provider, len(&call.received), why.to_owned());
            self.actions.push_back(ConsumerAction::Left { provider, received, why });
        }
        if self.has_everything(id) {
            return;
        }
        self.counters.failovers += u64::from(begun);
        self.assign(now, id);
    }

    /// Ends a call whose output was received whole before its provider or session went away. Whether it was.
    pub(super) fn has_everything(&mut self, id: CallId) -> bool {
        let Some(call) = self.calls.get(&id) else { return true };
        let Some(reason) = call.is_whole() else { return false };
        let bill = call.bill.clone();
        self.finish_call(id, reason, bill);
        true
    }

    pub(super) fn cancel(&mut self, id: CallId) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        call.cancelled = true;
        let place = call.place;
        match place {
            Place::Streaming(index, request) if self.is_held(index) => {
                // Nobody waits for it any more: it ends here, and at its provider with the next resume.
                self.abandon(index, request);
                self.fail_call(id, CallError::Cancelled);
            }
            Place::Streaming(index, request) => self.cancel_request(index, &request),
            Place::Waiting(index) => {
                if let Some(session) = self.sessions.get_mut(&index) {
                    session.waiting.retain(|c| *c != id);
                }
                self.fail_call(id, CallError::Cancelled);
            }
            Place::Nowhere => self.fail_call(id, CallError::Cancelled),
        }
    }

    pub(super) fn fail_call(&mut self, id: CallId, error: CallError) {
        let Some(call) = self.calls.remove(&id) else { return };
        if let Place::Waiting(index) = call.place
            && let Some(session) = self.sessions.get_mut(&index)
        {
            session.waiting.retain(|c| *c != id);
        }
        self.counters.failed += 1;
        let emission = Emission::Failed { error, bill: call.bill };
        self.actions.push_back(ConsumerAction::Emit { call: id, emission });
    }

    fn finish_call(&mut self, id: CallId, reason: FinishReason, bill: Bill) {
        self.calls.remove(&id);
        self.counters.finished += 1;
        self.actions.push_back(ConsumerAction::Emit { call: id, emission: Emission::Finished { reason, bill } });
    }

    /// Ends a request at its last acknowledgement and adds the leg to its call's bill. Returns the call, if it lives.
    pub(super) fn abandon(&mut self, index: SessionIndex, request: RequestId) -> Option<CallId> {
        let session = self.sessions.get_mut(&index)?;
        let live = session.requests.remove(&request);
        session.streams.retain(|_, r| *r != request);
        let state = session.state.as_ref()?;
        let request_state = state.request_state(&request)?;
        let (usage, rates, before) = (request_state.acked(), *request_state.rates(), state.charged());
        let provider = state.provider();
        let part = request_state.open().part.map(|order| PartLeg {
            worker: provider,
            order,
            usage: usage.part.unwrap_or_default(),
            id: request_state.last_ack_id().map(|id| Digest(id.0)),
            rows: None,
        });
        let draft = state.abandoned(request).ok()?;
        self.record(index, vec![draft], Vec::new());
        let after = self.sessions.get(&index)?.state.as_ref()?.charged();
        let call = live?.call;
        let cost = after.saturating_sub(before);
        let leg = Leg { provider, request, receipt: None, usage, rates, cost, part, experts: Vec::new() };
        let held = self.calls.get_mut(&call)?;
        if part.is_some() || usage.prompt > 0 || usage.completion > 0 {
            held.bill.legs.push(leg);
        }
        Some(call)
    }

    /// What a waiting call needs before its request can start.
    pub(super) fn start_need(&self, index: SessionIndex, id: CallId) -> Option<Msat> {
        let call = self.calls.get(&id)?;
        let quote = self.sessions.get(&index)?.state.as_ref()?.quote();
        call.meter().start_cost(&quote.rates, &quote.terms)
    }

    pub(super) fn tick_calls(&mut self, now: UnixMs) {
        let late = |c: &Call| matches!(c.place, Place::Waiting(_)) && now.since(c.waiting_since) >= WAIT_MS;
        let overdue: Vec<CallId> = self.calls.iter().filter(|(_, c)| late(c)).map(|(id, _)| *id).collect();
        for id in overdue {
            let Some(Place::Waiting(index)) = self.calls.get(&id).map(|c| c.place) else { continue };
            if let Some(session) = self.sessions.get_mut(&index) {
                session.waiting.retain(|c| *c != id);
            }
            self.reassign(now, id, "no session was ready and funded in time");
        }
    }

    /// Calls that wait for this session cannot be paid for.
    pub(super) fn fail_waiting(&mut self, index: SessionIndex, error: &CallError) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let waiting: Vec<CallId> = session.waiting.drain(..).collect();
        for call in waiting {
            self.fail_call(call, error.clone());
        }
    }

    /// The provider does not keep its side: its waiting calls go elsewhere.
    pub(super) fn leave(&mut self, now: UnixMs, index: SessionIndex, provider: NodeKey, why: &str) {
        self.shunned.insert(provider, (now.plus_ms(self.config.shun_ms), why.to_owned()));
        self.drop_link(now, index, CloseCode::Done, why);
    }
}
