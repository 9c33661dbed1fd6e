//! A request that runs: metered, acknowledged, receipted.

use super::{EngineId, Provider, ProviderAction, parts::PartLive};
use crate::{LinkId, StreamId, Ticket};
use satgrid_engine::port::{Command, EngineEvent, FinishReason as EngineFinish, JobId};
use satgrid_ledger::statements::{Ack, ExpertSplit, Receipt, ReceiptOpening, ReceiptPrivate, RunningHash, Split};
use satgrid_pricing::{charge, numerators};
use satgrid_protocol::{
    frame::{ConsumerFrame, MAX_CHUNK_TOKENS, ProviderFrame, TokenLogprobs},
    metering::{Grant, Meter},
    session::{MAX_AHEAD_BYTES, MAX_RECEIPTS_AHEAD, REQUEST_DEADLINE_MS, ReceiptFacts},
};
use satgrid_types::{
    BothSigned, Digest, FinishReason, Msat, RequestId, Salt, Sampling, SessionId, Signature, Signed, Terms, TokenUsage,
    UnixMs,
};

/// What is alive of one request.
pub(super) struct Request {
    pub stream: (LinkId, StreamId),
    pub job: JobId,
    pub done: TokenUsage,
    pub(super) meter: Meter,
    /// Of work on a part of a model.
    pub(super) part: Option<PartLive>,
    /// Of a lead: how the answer was put together, once it is.
    pub(super) split: Option<(Split, Digest)>,
    /// The same where experts were bought.
    pub(super) expert_split: Option<(ExpertSplit, Digest)>,
    pub(super) salt: Salt,
    pub(super) prompt_hash: Digest,
    pub(super) sampling: Sampling,
    pub(super) running: RunningHash,
    pub(super) granted: Grant,
    pub ack: AckState,
    /// Output that no countersigned acknowledgement covers: said again on the stream of a resumed request.
    pub unsigned: Vec<u32>,
    /// Resumed, and its new stream is awaited: how much of the output the consumer has.
    pub awaits_stream: Option<u32>,
    pub phase: Phase,
    pub(super) started_at: UnixMs,
    pub(super) first_token_at: Option<UnixMs>,
    /// It ran for too long and its engine was told to stop.
    pub(super) overdue: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    Running,
    /// The run is over; its receipt waits for the last acknowledgement and for its turn.
    Finishing {
        reason: FinishReason,
        error: Option<String>,
        at: UnixMs,
    },
    /// The receipt is with the consumer since `at`.
    Offered {
        body: Box<Receipt>,
        signed: Signed<Receipt>,
        at: UnixMs,
    },
}

/// The acknowledgement that is out, and when and for what the last one was offered.
pub(super) struct AckState {
    pub out: Option<(Ack, Signed<Ack>)>,
    pub(super) offered: TokenUsage,
    pub offered_at: UnixMs,
    /// The append that has the last one.
    pub(super) entry: Option<Ticket>,
}

impl Request {
    pub(super) fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    pub(super) fn next_deadline(&self, terms: &Terms, signature_timeout_ms: u64) -> Option<UnixMs> {
        match (&self.phase, &self.ack.out) {
            (Phase::Offered { at, .. }, _) => Some(at.plus_ms(signature_timeout_ms)),
            (_, Some(_)) | (Phase::Finishing { .. }, None) if self.awaits_stream.is_some() => {
                Some(self.ack.offered_at.plus_ms(signature_timeout_ms))
            }
            (_, Some(_)) => Some(self.ack.offered_at.plus_ms(signature_timeout_ms)),
            (Phase::Running, None)
                if self.meter.units(&self.done).completion > self.meter.units(&self.ack.offered).completion =>
            {
                Some(self.ack.offered_at.plus_ms(u64::from(terms.ack_interval_ms)))
            }
            (Phase::Running, None) if self.overdue => None,
            (Phase::Running, None) => Some(self.started_at.plus_ms(REQUEST_DEADLINE_MS)),
            (Phase::Finishing { .. }, None) => None,
        }
    }
}

impl Provider {
    pub(super) fn request_frame(&mut self, now: UnixMs, link: LinkId, stream: StreamId, frame: ConsumerFrame) {
        let Some(id) = self.links.get(&link).and_then(|l| l.session) else {
            return self.violation(link, "a request before a session");
        };
        match frame {
            ConsumerFrame::Start(start) => self.start(now, link, stream, id, *start),
            ConsumerFrame::Resume(request) => self.go_on(now, link, stream, id, request),
            ConsumerFrame::Ack(seq, signature) => {
                if let Some(request) = self.request_on(id, link, stream) {
                    self.ack_signed(now, id, request, seq, &signature);
                }
            }
            ConsumerFrame::Route(route) => self.route(link, stream, id, *route),
            ConsumerFrame::Done => self.part_done(link, stream, id),
            ConsumerFrame::Cancel => {
                if let Some(request) = self.request_on(id, link, stream) {
                    self.cancel(id, request);
                }
            }
            ConsumerFrame::Receipt(signature) => {
                if let Some(request) = self.request_on(id, link, stream) {
                    self.receipt_signed(now, id, request, signature);
                }
            }
        }
    }

    pub(super) fn request_on(&self, id: SessionId, link: LinkId, stream: StreamId) -> Option<RequestId> {
        let session = self.sessions.get(&id)?;
        session.requests.iter().find(|(_, r)| r.stream == (link, stream)).map(|(id, _)| *id)
    }

    pub(super) fn engine_event(&mut self, now: UnixMs, engine: EngineId, event: EngineEvent) {
        let Some(job) = event.job() else {
            if let EngineEvent::Down { reason } = event {
                self.down.insert(engine);
                self.engine_down(now, engine, &reason);
            } else {
                self.down.remove(&engine);
            }
            return;
        };
        let Some(&(id, request)) = self.jobs.get(&job) else {
            // Its request is over here (it was begun as the engine or the link went away): it must not keep a slot.
            if matches!(
                event,
                EngineEvent::Prefilled { .. } | EngineEvent::Tokens { .. } | EngineEvent::Embedded { .. }
            ) {
                self.actions.push_back(ProviderAction::Engine { engine, command: Command::Cancel { job } });
            }
            return;
        };
        match event {
            EngineEvent::Prefilled { upto, cached, .. } => {
                let Some(live) = self.live(id, &request) else { return };
                let Meter::Tokens { prompt_tokens, .. } = live.meter else { return };
                live.done.prompt = upto.min(prompt_tokens);
                live.done.cached_prompt = cached.min(live.done.prompt);
                self.offer_ack_if_due(now, id, request);
            }
            EngineEvent::Tokens { first, ids, .. } => self.tokens(now, id, request, first, &ids),
            EngineEvent::Embedded { index, row, .. } => self.embedded(now, id, request, index, row),
            EngineEvent::Logprobs { first, entries, .. } => {
                let Some(live) = self.live(id, &request) else { return };
                if live.is_running() && first == live.done.completion {
                    let (link, stream) = live.stream;
                    let entries = entries.into_iter().map(|e| TokenLogprobs { drawn_micro: e.drawn_micro, top: e.top });
                    self.send(link, stream, ProviderFrame::Logprobs(first, entries.collect()));
                }
            }
            EngineEvent::Finished { reason, .. } => {
                let reason = match reason {
                    EngineFinish::Stop => FinishReason::Stop,
                    EngineFinish::Length => FinishReason::Length,
                    EngineFinish::Cancelled => FinishReason::Cancelled,
                };
                self.run_over(now, id, request, reason, None);
            }
            EngineEvent::Failed { error, .. } => {
                self.run_over(now, id, request, FinishReason::Error, Some(error.to_string()));
            }
            EngineEvent::Down { .. } | EngineEvent::Up => {}
        }
    }

    fn engine_down(&mut self, now: UnixMs, engine: EngineId, reason: &str) {
        let hit: Vec<(SessionId, RequestId)> = self
            .jobs
            .values()
            .filter(|(id, _)| self.sessions.get(id).is_some_and(|s| s.engine == Some(engine)))
            .copied()
            .collect();
        for (id, request) in hit {
            self.run_over(now, id, request, FinishReason::Error, Some(format!("the engine process died: {reason}")));
        }
    }

    pub(super) fn live(&mut self, id: SessionId, request: &RequestId) -> Option<&mut Request> {
        self.sessions.get_mut(&id)?.requests.get_mut(request)
    }

    fn tokens(&mut self, now: UnixMs, id: SessionId, request: RequestId, first: u32, ids: &[u32]) {
        let Some(live) = self.live(id, &request) else { return };
        if !live.is_running() || first != live.done.completion || live.part.is_some() {
            return;
        }
        live.first_token_at.get_or_insert(now);
        let (link, stream) = live.stream;
        let mut chunks = Vec::new();
        for chunk in ids.chunks(MAX_CHUNK_TOKENS) {
            let at = live.done.completion;
            chunk.iter().for_each(|token| live.running.push(*token));
            live.unsigned.extend_from_slice(chunk);
            live.done.completion = at.saturating_add(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
            chunks.push(ProviderFrame::Chunk(at, chunk.to_vec()));
        }
        for chunk in chunks {
            self.send(link, stream, chunk);
        }
        self.offer_ack_if_due(now, id, request);
    }

    /// A text's row, which goes out before the statement that charges for the text.
    fn embedded(&mut self, now: UnixMs, id: SessionId, request: RequestId, index: u32, row: Vec<u8>) {
        let Some(live) = self.live(id, &request) else { return };
        if !live.is_running() {
            return;
        }
        live.first_token_at.get_or_insert(now);
        let (link, stream) = live.stream;
        self.send(link, stream, ProviderFrame::Embedded(index, row.into()));
    }

    pub(super) fn offer_ack_if_due(&mut self, now: UnixMs, id: SessionId, request: RequestId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(state) = session.state.request_state(&request) else { return };
        let (rates, seq) = (*state.rates(), state.acked_seq());
        let (terms, provider) = (session.state.quote().terms, session.state.provider());
        let Some(live) = session.requests.get_mut(&request) else { return };
        let waited = now.since(live.ack.offered_at);
        let due = live.is_running() && live.ack.out.is_none();
        if !due || !live.meter.ack_due(&live.done, &live.ack.offered, waited, &terms) {
            return;
        }
        let Ok(numerators) = numerators(&live.done, &rates) else { return };
        let ack = Ack {
            version: Ack::VERSION,
            session: id,
            request,
            seq: seq.saturating_add(1),
            usage: live.done,
            numerators,
            cost: charge(numerators),
            running_hash: live.running.value(),
        };
        let signed = Signed::sign(&ack, self.keys.of(&provider));
        live.ack =
            AckState { out: Some((ack, signed.clone())), offered: live.done, offered_at: now, entry: live.ack.entry };
        let (link, stream) = live.stream;
        self.send(link, stream, ProviderFrame::Ack(signed));
    }

    fn ack_signed(&mut self, now: UnixMs, id: SessionId, request: RequestId, seq: u32, signature: &Signature) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let consumer = session.state.consumer();
        let Some(live) = session.requests.get_mut(&request) else { return };
        let link = live.stream.0;
        let Some((_, signed)) = live.ack.out.as_ref().filter(|(ack, _)| ack.seq == seq) else {
            return self.violation(link, "a signature for an acknowledgement that was not offered");
        };
        let both: BothSigned<Ack> = BothSigned::from_parts(signed.body().to_vec(), *signed.signature(), *signature);
        if both.verify(&session.state.provider(), &consumer).is_err() {
            return self.violation(link, "the acknowledgement's countersignature does not verify");
        }
        self.acknowledged(now, id, request, &both);
    }

    /// The acknowledgement that is out came back with both signatures, which were verified.
    pub(super) fn acknowledged(&mut self, now: UnixMs, id: SessionId, request: RequestId, both: &BothSigned<Ack>) {
        let Some(live) = self.live(id, &request) else { return };
        let Some((ack, _)) = live.ack.out.take_if(|(_, signed)| signed.body() == both.body()) else { return };
        live.signed_upto(ack.usage.completion);
        let Ok((drafts, then)) = self.with_grant(now, id, request, Some((ack, both.clone()))) else { return };
        self.record(id, drafts, then);
        let entry = self.gate.newest();
        if let Some(live) = self.live(id, &request) {
            live.ack.entry = entry;
        }
        self.offer_ack_if_due(now, id, request);
        self.offer_next_receipt(id);
    }

    /// The largest grant that is covered now, as drafts (the acknowledgement, if any, with the further reservation) and the
    /// engine command that they authorise.
    fn with_grant(
        &mut self,
        now: UnixMs,
        id: SessionId,
        request: RequestId,
        ack: Option<(Ack, BothSigned<Ack>)>,
    ) -> Result<(Vec<satgrid_ledger::entry::Draft>, Vec<ProviderAction>), satgrid_protocol::session::SessionError> {
        use satgrid_protocol::session::SessionError;
        let unknown = || SessionError::UnknownRequest(request);
        let session = self.sessions.get_mut(&id).ok_or_else(unknown)?;
        let state = session.state.request_state(&request).ok_or_else(unknown)?;
        let acked = ack.as_ref().map_or_else(|| state.acked(), |(ack, _)| ack.usage);
        let rates = *state.rates();
        let reserved = state.reserved();
        let live = session.requests.get(&request).ok_or_else(unknown)?;
        let terms = session.state.quote_of(&state.open().quote).map_or_else(Terms::default, |q| q.terms);
        // Where no more may be reserved for it, nothing more is granted: its consumer ends it, with a receipt.
        let free = if state.may_reserve() { session.state.available() } else { Msat::ZERO };
        let next = live.meter.grant(&acked, reserved.saturating_add(free), &rates, &terms);
        let grows = next.prompt_upto > live.granted.prompt_upto || next.output_upto > live.granted.output_upto;
        let next = Grant {
            prompt_upto: next.prompt_upto.max(live.granted.prompt_upto),
            output_upto: next.output_upto.max(live.granted.output_upto),
        };
        let running = live.is_running();
        let more = live.meter.further(next, reserved, free, &rates)?;
        let more = if running { more } else { Msat::ZERO };
        let draft = match &ack {
            Some((_, both)) => Some(session.state.acked(now, both, request, more)?),
            None if more.is_zero() => None,
            None => Some(session.state.reserve(now, request, more)?),
        };
        let mut then = Vec::new();
        if grows
            && running
            && let Some(engine) = session.engine
            && let Some(live) = session.requests.get_mut(&request)
        {
            live.granted = next;
            then.push(ProviderAction::Engine { engine, command: grant_command(live.job, next) });
        }
        Ok((draft.into_iter().collect(), then))
    }

    /// A slice arrived: work that waited for money goes on.
    pub(super) fn funds_arrived(&mut self, now: UnixMs, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let waiting: Vec<RequestId> =
            session.requests.iter().filter(|(_, r)| r.is_running()).map(|(id, _)| *id).collect();
        for request in waiting {
            if let Ok((drafts, then)) = self.with_grant(now, id, request, None)
                && !(drafts.is_empty() && then.is_empty())
            {
                self.record(id, drafts, then);
            }
        }
    }

    fn cancel(&mut self, id: SessionId, request: RequestId) {
        let Some(session) = self.sessions.get(&id) else { return };
        if let (Some(live), Some(engine)) = (session.requests.get(&request), session.engine)
            && live.is_running()
        {
            let command = Command::Cancel { job: live.job };
            self.actions.push_back(ProviderAction::Engine { engine, command });
        }
    }

    fn run_over(
        &mut self,
        now: UnixMs,
        id: SessionId,
        request: RequestId,
        reason: FinishReason,
        error: Option<String>,
    ) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(live) = session.requests.get_mut(&request) else { return };
        self.jobs.remove(&live.job);
        if !live.is_running() {
            return;
        }
        let error = error.map(satgrid_protocol::frame::reason);
        live.phase = Phase::Finishing { reason, error, at: now };
        session.finishing.push_back(request);
        self.offer_next_receipt(id);
    }

    /// Offers the next receipt, once none is out: of the first request that is over and whose last acknowledgement is back.
    pub(super) fn offer_next_receipt(&mut self, id: SessionId) {
        let (now, engine_name) = (self.now, self.config.engine_name.clone());
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if session.link.is_none() {
            return;
        }
        let live = |id: &RequestId| session.requests.get(id);
        if session.finishing.iter().filter_map(live).any(|live| matches!(live.phase, Phase::Offered { .. })) {
            return;
        }
        // One whose acknowledgement is out lets others pass.
        let ready = |id: &&RequestId| live(id).is_some_and(|live| live.ack.out.is_none());
        let Some(&request) = session.finishing.iter().find(ready) else { return };
        let Some(live) = session.requests.get_mut(&request) else { return };
        let Phase::Finishing { reason, error, at } = &live.phase else { return };
        let (reason, at) = (*reason, *at);
        let model = session.state.request_state(&request).and_then(|r| session.state.quote_of(&r.open().quote));
        let model = model.and_then(|q| self.offerings.values().find(|o| o.listing.model_root == q.model_root));
        let facts = ReceiptFacts {
            model: model.map_or_else(String::new, |o| o.listing.model.clone()),
            engine: engine_name,
            usage: live.done,
            finish: reason,
            started_at: live.started_at,
            first_token_ms: live.first_token_at.map(|t| small(t.since(live.started_at))),
            duration_ms: small(at.since(live.started_at)),
            private_hash: private(live).commitment(&live.salt),
            error: error.clone(),
            slices: session.state.unreceipted().into_iter().take(Receipt::MAX_SLICES).collect(),
            part: live.part.as_ref().map(PartLive::work),
            split: live.split.clone(),
            expert_rows: live.part.as_ref().and_then(PartLive::counts),
            expert_split: live.expert_split.clone(),
        };
        let (link, stream) = live.stream;
        let acked = live.ack.entry;
        let before = session.state.last_receipt_signed();
        let ahead = !session.in_order && stands_alone(&facts) && before.is_none_or(is_light);
        session.in_order &= ahead;
        let Ok(body) = session.state.receipt(&request, facts) else {
            // Figures that do not fit 64 bits: nothing can be billed for it.
            return self.abandon(id, request);
        };
        let signed = Signed::sign(&body, self.keys.of(&body.provider));
        if let Some(live) = session.requests.get_mut(&request) {
            live.phase = Phase::Offered { body: Box::new(body), signed: signed.clone(), at: now };
        }
        // It names the receipt before it, which must be durable, or among those that the consumer shows after a crash: else
        // it has a chain that we have not.
        let send = vec![ProviderAction::Send { link, stream, frame: ProviderFrame::Receipt(reason, signed) }];
        match ahead {
            // Its last acknowledgement, which it names, is there.
            true => self.behind_entry(acked, MAX_RECEIPTS_AHEAD, send),
            false => self.behind(send),
        }
    }

    fn receipt_signed(&mut self, now: UnixMs, id: SessionId, request: RequestId, signature: Signature) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(live) = session.requests.get(&request) else { return };
        let (link, stream) = live.stream;
        let Phase::Offered { body, signed, .. } = &live.phase else {
            return self.violation(link, "a signature for a receipt that was not offered");
        };
        let both: BothSigned<Receipt> = BothSigned::from_parts(signed.body().to_vec(), *signed.signature(), signature);
        if both.verify(&session.state.provider(), &session.state.consumer()).is_err() {
            return self.violation(link, "the receipt's countersignature does not verify");
        }
        let opening = ReceiptOpening { salt: live.salt, private: private(live) };
        let draft = session.state.finished(&both, body, Some(opening));
        let cost = body.cost;
        session.requoted = 0;
        self.forget(id, &request);
        if let Ok(draft) = draft {
            self.counters.receipts += 1;
            self.note_signed(id, cost);
            self.record(id, vec![draft], vec![ProviderAction::FinishStream { link, stream }]);
        }
        // What this receipt did not use is free for the others.
        self.funds_arrived(now, id);
        self.offer_next_receipt(id);
    }

    pub(super) fn stream_closed(&mut self, _now: UnixMs, link: LinkId, stream: StreamId) {
        let Some(id) = self.links.get(&link).and_then(|l| l.session) else { return };
        if let Some(request) = self.request_on(id, link, stream) {
            // The consumer reset the stream without a countersignature: charged at its last acknowledgement.
            self.abandon(id, request);
        }
    }

    /// Acknowledgements that fall due with time, and signatures that do not come.
    pub(super) fn tick_requests(&mut self, now: UnixMs, id: SessionId) {
        let timeout = self.config.signature_timeout_ms;
        let Some(session) = self.sessions.get(&id) else { return };
        let Some(link) = session.link else { return };
        let late = session.requests.values().any(|r| {
            let ack = r.ack.out.is_some() && now.since(r.ack.offered_at) >= timeout;
            let receipt = matches!(&r.phase, Phase::Offered { at, .. } if now.since(*at) >= timeout);
            let stream = r.awaits_stream.is_some() && now.since(r.ack.offered_at) >= timeout;
            ack || receipt || stream
        });
        if late {
            return self.violation(link, "a statement was offered and not countersigned in time");
        }
        let open: Vec<RequestId> = session.requests.keys().copied().collect();
        let over = |r: &Request| r.is_running() && !r.overdue && now.since(r.started_at) >= REQUEST_DEADLINE_MS;
        let overdue: Vec<RequestId> = session.requests.iter().filter(|(_, r)| over(r)).map(|(id, _)| *id).collect();
        for request in open {
            self.offer_ack_if_due(now, id, request);
        }
        for request in overdue {
            self.cancel(id, request);
            if let Some(live) = self.live(id, &request) {
                live.overdue = true;
            }
        }
    }
}

/// Nothing of it is said elsewhere in the journal. Such a receipt is offered before the one that it names is on the disk: the
/// consumer's copies bring both back. Else a session would end no more requests than two disks take turns.
fn stands_alone(facts: &ReceiptFacts) -> bool {
    facts.slices.is_empty()
        && facts.part.is_none()
        && facts.split.is_none()
        && facts.expert_rows.is_none()
        && facts.expert_split.is_none()
}

fn is_light(receipt: &BothSigned<Receipt>) -> bool {
    receipt.body().len() <= MAX_AHEAD_BYTES
}

fn private(live: &Request) -> ReceiptPrivate {
    ReceiptPrivate {
        prompt_hash: live.prompt_hash,
        running_hash: live.running.value(),
        sampling: live.sampling.clone(),
    }
}

pub(super) fn grant_command(job: JobId, grant: Grant) -> Command {
    Command::Grant { job, prompt_upto: grant.prompt_upto, output_upto: grant.output_upto }
}

fn small(ms: u64) -> u32 {
    u32::try_from(ms).unwrap_or(u32::MAX)
}
