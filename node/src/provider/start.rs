//! A request is taken up: what it must be, what it is granted, and its job.

use super::{
    EngineId, Offering, Provider, ProviderAction, jobs,
    parts::{PartLive, check_part_start},
    requests::{AckState, Phase, Request, grant_command},
    words::engine_sampling,
};
use crate::{LinkId, StreamId};
use satgrid_engine::port::{Command, Job, JobId};
use satgrid_ledger::statements::{RequestOpen, RunningHash, prompt_hash};
use satgrid_protocol::{
    frame::{MAX_PROMPT_TOKENS, MAX_STOPS, Refusal, StartRequest},
    metering::{Grant, Meter},
    session::SessionState,
};
use satgrid_types::{MAX_LOGIT_BIAS, Msat, SessionId, TokenUsage, UnixMs, Verified};

/// A start that a well-behaved consumer could have sent. What fails here is a violation.
pub(super) fn check_start(state: &SessionState, start: &StartRequest) -> Result<Verified<RequestOpen>, String> {
    let open = start.open.verify(&state.consumer()).map_err(|e| e.to_string())?;
    let private = &start.private;
    let length = u32::try_from(start.prompt.len()).unwrap_or(u32::MAX);
    let whole = open.part.is_none();
    if !whole {
        check_part_start(start, &open)?;
    }
    if open.version != RequestOpen::VERSION || open.session != state.id() {
        return Err("the request is for another session".into());
    }
    if (start.prompt.is_empty() && whole) || start.prompt.len() > MAX_PROMPT_TOKENS || length != open.prompt_tokens {
        return Err(format!("the prompt has {length} tokens, {} were signed for", open.prompt_tokens));
    }
    let writes = whole && private.embed.is_none();
    let ill_measured = if writes { open.max_output == 0 } else { open.max_output > 0 && private.embed.is_some() };
    if ill_measured || private.stop.len() > MAX_STOPS || private.resumed > length {
        return Err("no output asked for, too many stop strings, or more resumed than prompt tokens".into());
    }
    // It is kept beside the receipt, and a journal that is given too much of it stops.
    if private.sampling.logit_bias_micro.len() > MAX_LOGIT_BIAS {
        return Err(format!("more than {MAX_LOGIT_BIAS} biased tokens"));
    }
    let committed = private.commitment(&start.salt) == open.private_hash;
    if !committed || prompt_hash(&start.salt, &start.prompt) != private.prompt_hash {
        return Err("the prompt or its parameters are not those that were signed for".into());
    }
    Ok(open)
}

impl Provider {
    pub(super) fn start(&mut self, now: UnixMs, link: LinkId, stream: StreamId, id: SessionId, start: StartRequest) {
        if self.gate.is_broken() {
            return self.refuse_request(link, stream, Refusal::Unavailable, "this node's ledger cannot be written");
        }
        if let Some(why) = self.paused.clone() {
            return self.refuse_request(link, stream, Refusal::Unavailable, why);
        }
        let engine = self.engine_for(id);
        let Some(session) = self.sessions.get(&id) else { return };
        let checked = check_start(&session.state, &start).and_then(|open| Ok((open, jobs::extras(&start)?)));
        let (open, extras) = match checked {
            Ok(checked) => checked,
            Err(text) => return self.violation(link, text),
        };
        let state = &session.state;
        // An audit tells the parts that were bought for a request by its id: of those that run at once none may have another's.
        let elsewhere = self.jobs.values().any(|(_, request)| *request == open.request);
        if elsewhere || state.request_state(&open.request).is_some() || state.has_ended(&open.request) {
            return self.refuse_request(link, stream, Refusal::Protocol, "this request id was used before");
        }
        let quote = match state.quote_of(&open.quote) {
            Some(quote)
                if now <= quote.valid_until && state.close_statement().is_none() && session.closing.is_none() =>
            {
                quote
            }
            Some(_) => {
                return self.refuse_request(link, stream, Refusal::Quote, "the quote has expired: ask for a new one");
            }
            None => return self.refuse_request(link, stream, Refusal::Quote, "no such quote in this session"),
        };
        let Some(engine) = engine.filter(|engine| !self.down.contains(engine)) else {
            return self.refuse_request(link, stream, Refusal::Unavailable, "the engine for this model is not running");
        };
        if self.peer_is_full(id) {
            let text = "as many requests of this consumer are open as one may have";
            return self.refuse_request(link, stream, Refusal::Busy, text);
        }
        if self.jobs.len() >= self.config.max_requests {
            return self.refuse_request(link, stream, Refusal::Busy, "all slots and places in the queue are taken");
        }
        if let Some(text) = self.order_refused(engine, &open) {
            return self.refuse_order(link, stream, text);
        }
        let embeds = extras.embed.is_some();
        if let Some(text) = self.other_kind(engine, embeds).filter(|_| open.part.is_none()) {
            return self.refuse_request(link, stream, Refusal::NotOffered, text);
        }
        // A text that is embedded fills the context alone; each of them may.
        let texts = extras.embed.iter().flatten().copied().max();
        let longest = texts.unwrap_or(open.prompt_tokens);
        let room = quote.context_length.saturating_add(u32::from(embeds)).saturating_sub(longest);
        if room == 0 && open.part.is_none() {
            let text = format!("a prompt of {longest} tokens leaves no room in a context of {}", quote.context_length);
            return self.refuse_request(link, stream, Refusal::Context, text);
        }
        let max_output = if embeds { 0 } else { open.max_output.min(room).max(1) };
        let meter = match open.part {
            Some(order) => Meter::Part(order),
            None => Meter::Tokens { prompt_tokens: open.prompt_tokens, max_output },
        };
        let granted = meter.grant(&TokenUsage::default(), state.available(), &quote.rates, &quote.terms);
        if granted == Grant::default() {
            let needed = meter.start_cost(&quote.rates, &quote.terms);
            let text = format!("{} available, {} needed to start", state.available(), needed.unwrap_or(Msat::MAX));
            return self.refuse_request(link, stream, Refusal::Funds, text);
        }
        let Ok(reserve) = meter.cost(granted, &quote.rates) else {
            return self.refuse_request(
                link,
                stream,
                Refusal::Protocol,
                "the price of this request does not fit 64 bits",
            );
        };
        if self.peer_leaves(id, reserve) {
            let text = "this consumer has left too much work unsigned; half of that is forgotten in an hour";
            return self.refuse_request(link, stream, Refusal::Busy, text);
        }
        self.make_room(engine);
        let Some(state) = self.sessions.get(&id).map(|session| &session.state) else { return };
        let draft = state.request(now, open.evidence(), open.request, reserve);
        let job = JobId(self.next_job);
        self.next_job = self.next_job.wrapping_add(1);
        let work = Job {
            id: job,
            session: id.0,
            sampling: engine_sampling(&start.private.sampling),
            max_output,
            stop: start.private.stop.clone(),
            ignore_eos: false,
            resumed: start.private.resumed,
            extras,
            prompt: start.prompt,
        };
        let live = Request {
            stream: (link, stream),
            job,
            done: TokenUsage::default(),
            meter,
            part: open.part.map(PartLive::new),
            split: None,
            expert_split: None,
            salt: start.salt,
            prompt_hash: start.private.prompt_hash,
            sampling: start.private.sampling,
            running: RunningHash::start(&start.salt, &open.request),
            granted,
            ack: AckState { out: None, offered: TokenUsage::default(), offered_at: now, entry: None },
            unsigned: Vec::new(),
            awaits_stream: None,
            phase: Phase::Running,
            started_at: now,
            first_token_at: None,
            overdue: false,
        };
        let request = open.request;
        self.jobs.insert(job, (id, request));
        self.counters.requests_started += 1;
        if let Some(session) = self.sessions.get_mut(&id) {
            session.requests.insert(request, live);
        }
        let grant = grant_command(job, granted);
        let begin = match open.part {
            Some(order) => self.admit(engine, job, id, &open, order),
            None => ProviderAction::Engine { engine, command: Command::Start(work) },
        };
        self.record(id, vec![draft], vec![begin, ProviderAction::Engine { engine, command: grant }]);
    }

    /// Why a request that embeds, or one that does not, is not for this engine's model.
    fn other_kind(&self, engine: EngineId, embeds: bool) -> Option<&'static str> {
        let offering = self.offerings.values().find(|offering| offering.engine == engine)?;
        match (offering.listing.embeds.is_some(), embeds) {
            (true, false) => Some("this model embeds texts and writes none"),
            (false, true) => Some("this model writes and embeds no texts"),
            (true, true) | (false, false) => None,
        }
    }

    /// The session's engine; after a restart, the one that serves its quote's model now.
    fn engine_for(&mut self, id: SessionId) -> Option<EngineId> {
        let session = self.sessions.get_mut(&id)?;
        let (root, build) = (session.state.quote().model_root, session.state.quote().build);
        // One node may sell several parts of one model: the very listing says which, or the engine that served before.
        let known = self.offerings.get(&session.state.quote().listing).map(|o| o.engine).or(session.engine);
        let fits = |o: &&Offering| o.listing.model_root == root && o.build == build;
        let live = self.offerings.values().filter(fits).find(|o| known.is_none_or(|engine| o.engine == engine));
        let serving = live.or_else(|| self.offerings.values().find(fits))?.engine;
        session.engine = Some(serving);
        Some(serving)
    }
}
