//! A session's connection: hello, quote, open, resume.

use super::{
    CallId, Consumer, ConsumerAction, ConsumerConfig, SessionIndex, caps::Lack, flow::Flow, hold::Hold, owed::Owed,
    session_key, streams::Live,
};
use crate::{CloseCode, LinkId, StreamId};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{RefundTo, SessionOpen},
};
use satgrid_protocol::{
    check,
    frame::{ConsumerControl, Hello, MAX_OPEN_REQUESTS, OpenRequest, ProviderControl, Refusal},
    session::{SessionState, Side, SliceStatus},
};
use satgrid_types::{
    ModelRoot, Msat, NodeKey, Numerators, Part, Quote, ReceiptId, RequestId, SessionId, Signed, UnixMs,
    VerifiedListing, node_key,
};
use std::collections::{BTreeMap, VecDeque};

/// Where a session's connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No connection; the balance stays.
    Asleep,
    Connecting,
    Greeting,
    Quoting,
    Opening,
    Resuming,
    Ready,
    /// Closed, or the two sides' books cannot be brought together: never used again.
    Over,
}

/// A quote is renewed when it has less than this left, in ms.
const QUOTE_MARGIN_MS: u64 = 5_000;

/// A provider that could not be reached or went away is tried again after this long, in ms.
pub(super) const BRIEF_MS: u64 = 15_000;

/// One session and what is alive of it.
pub(super) struct Session {
    pub key: SigningKey,
    provider: NodeKey,
    root: ModelRoot,
    /// Which part of the model: none after a restart, where only the price tells.
    part: Option<Part>,
    /// The listing by which it was found; none after a restart, until a call finds it again.
    pub listing: Option<VerifiedListing>,
    pub state: Option<SessionState>,
    pub phase: Phase,
    pub phase_since: UnixMs,
    pub link: Option<LinkId>,
    /// All slices that the provider says have arrived.
    pub credited: Msat,
    /// The invoice that was asked for, and when.
    pub wanted_invoice: Option<(u32, Msat, UnixMs)>,
    /// What it spends, and since when its slice is awaited.
    pub flow: Flow,
    quote_wanted: Option<UnixMs>,
    /// Since when a paid slice is not credited.
    pub uncredited_since: Option<UnixMs>,
    /// Payments that failed in a row.
    pub failed_payments: u32,
    /// What the route to it is tried with after a payment failed; none while none has.
    pub carries: Option<Msat>,
    pub waiting: VecDeque<CallId>,
    pub streams: BTreeMap<StreamId, RequestId>,
    pub requests: BTreeMap<RequestId, Live>,
    pub idle_since: UnixMs,
    /// The connection broke under its requests, and it is tried to connect again.
    pub hold: Option<Hold>,
    /// The operator asked for the remainder.
    pub closing: bool,
    /// The provider owes a remainder by a credit note: when it is asked for again.
    pub owed: Option<Owed>,
    /// The provider lets notes of other sessions be spent here; the one that is being spent, and since when.
    pub spends_credit: bool,
    pub spending: Option<(SessionIndex, UnixMs)>,
    /// Its own note was not taken: it is not offered again in this run.
    pub note_kept: bool,
    /// Asked for the invoice to be refunded to.
    pub close_asked: bool,
    /// Money cannot be had for it: what stalls now is out of funds.
    pub unfunded: Option<Lack>,
    /// The provider reserved more for what runs than we did, and refused the next request: nothing starts before a slice
    /// is credited or a receipt frees something.
    pub short: bool,
    /// Its part of what the consumer says that it may lose.
    pub exposed: Msat,
    /// What is known of the provider's log.
    pub log: super::log::LogView,
}

impl Session {
    fn new(key: SigningKey, provider: NodeKey, root: ModelRoot) -> Session {
        Session {
            key,
            provider,
            root,
            part: None,
            listing: None,
            state: None,
            phase: Phase::Asleep,
            phase_since: UnixMs(0),
            link: None,
            credited: Msat::ZERO,
            wanted_invoice: None,
            flow: Flow::default(),
            quote_wanted: None,
            uncredited_since: None,
            failed_payments: 0,
            carries: None,
            waiting: VecDeque::new(),
            streams: BTreeMap::new(),
            requests: BTreeMap::new(),
            idle_since: UnixMs(0),
            hold: None,
            owed: None,
            closing: false,
            spends_credit: false,
            spending: None,
            note_kept: false,
            close_asked: false,
            unfunded: None,
            short: false,
            exposed: Msat::ZERO,
            log: super::log::LogView::default(),
        }
    }

    /// A session from the journal.
    pub(super) fn asleep(key: SigningKey, state: SessionState) -> Session {
        let mut session = Session::new(key, state.provider(), state.quote().model_root);
        session.phase = if state.close_statement().is_some() { Phase::Over } else { Phase::Asleep };
        session.owed = Owed::of(UnixMs(0), &state);
        session.state = Some(state);
        session
    }

    pub(super) fn provider(&self) -> NodeKey {
        self.provider
    }
    /// Whether a call to this listing may use the session.
    pub(super) fn serves(&self, listing: &VerifiedListing) -> bool {
        let part = match &self.part {
            Some(part) => *part == listing.part,
            // From the journal: whole models have a price for output, parts have none.
            None => {
                listing.part == Part::Whole
                    && self.state.as_ref().is_none_or(|s| {
                        let rates = &s.quote().rates;
                        rates.position_layer.is_none() && rates.expert_row.is_none()
                    })
            }
        };
        part && self.provider == listing.node_key && self.root == listing.model_root && self.is_usable()
    }
    /// A newer listing of the same provider and model says where it is now.
    pub(super) fn learn(&mut self, listing: &VerifiedListing) {
        let part = self.part.as_ref().is_none_or(|part| *part == listing.part);
        let same = listing.node_key == self.provider && listing.model_root == self.root && part;
        if same && self.listing.as_ref().is_none_or(|known| known.created_at() <= listing.created_at()) {
            self.listing = Some(listing.clone());
        }
    }
    pub(super) fn is_usable(&self) -> bool {
        self.phase != Phase::Over && !self.closing
    }
    pub(super) fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }
    /// Prepaid, known to both sides, and neither charged nor reserved.
    pub(super) fn usable_balance(&self) -> Msat {
        let Some(state) = &self.state else { return Msat::ZERO };
        let unknown_to_provider = state.paid().saturating_sub(self.credited);
        state.available().saturating_sub(unknown_to_provider)
    }
    /// Where it stands, for the operator.
    pub(super) fn word(&self) -> &'static str {
        let left = self.state.as_ref().is_some_and(|s| !s.remainder().is_zero());
        match self.phase {
            Phase::Over if left => "owed",
            Phase::Over => "settled",
            _ if self.closing => "closing",
            Phase::Asleep => "asleep",
            Phase::Ready => "ready",
            Phase::Connecting | Phase::Greeting | Phase::Quoting | Phase::Opening | Phase::Resuming => "connecting",
        }
    }
    /// Something here can go on or fall due.
    pub(super) fn is_live(&self) -> bool {
        self.link.is_some()
            || self.closing
            || self.owed.is_some()
            || !self.waiting.is_empty()
            || !self.requests.is_empty()
    }
    pub(super) fn is_setting_up(&self) -> bool {
        matches!(self.phase, Phase::Connecting | Phase::Greeting | Phase::Quoting | Phase::Opening | Phase::Resuming)
    }
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.requests.is_empty() && self.wanted_invoice.is_none() && !self.closing
    }

    pub(super) fn next_deadline(&self, config: &ConsumerConfig) -> Option<UnixMs> {
        let setup = self.is_setting_up().then(|| self.phase_since.plus_ms(config.setup_ms));
        let invoice = self.wanted_invoice.map(|(_, _, at)| at.plus_ms(config.setup_ms));
        let quote = self.quote_wanted.map(|at| at.plus_ms(config.setup_ms));
        let uncredited = self.uncredited_since.map(|at| at.plus_ms(config.credit_ms));
        let idle = (self.is_ready() && self.is_idle()).then(|| self.idle_since.plus_ms(config.idle_ms));
        let running = self.requests.iter().filter(|_| self.is_ready());
        let stall = running.map(|(id, r)| r.stall_deadline(config, self.hunger(id))).min();
        let hold = self.hold.as_ref().and_then(|hold| hold.next_deadline(self, config));
        let owed = self.owed.as_ref().filter(|_| self.link.is_none()).map(Owed::next_try);
        let credit = self.spending.map(|(_, at)| at.plus_ms(config.setup_ms));
        let log = self.log.next_deadline(config).filter(|_| self.link.is_some());
        [setup, invoice, quote, uncredited, idle, stall, hold, owed, credit, log].into_iter().flatten().min()
    }
}

impl Consumer {
    /// The session that a call to this listing uses, new if there is none.
    pub(super) fn session_with(&mut self, now: UnixMs, listing: &VerifiedListing) -> SessionIndex {
        let index = self.session_for(listing).unwrap_or_else(|| {
            let index = self.free_index();
            let key = session_key(&self.master, index);
            let mut session = Session::new(key, listing.node_key, listing.model_root);
            session.part = Some(listing.part.clone());
            self.sessions.insert(index, session);
            index
        });
        if let Some(session) = self.sessions.get_mut(&index) {
            session.listing = Some(listing.clone());
        }
        self.wake(now, index);
        index
    }

    /// Connects a session that sleeps.
    pub(super) fn wake(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get(&index).filter(|s| s.phase == Phase::Asleep) else { return };
        let Some(listing) = &session.listing else { return };
        let (provider, addresses) = (session.provider, listing.addresses.clone());
        let link = self.new_link(index);
        if let Some(session) = self.sessions.get_mut(&index) {
            session.link = Some(link);
            session.phase = Phase::Connecting;
            session.phase_since = now;
        }
        self.live.insert(index);
        self.actions.push_back(ConsumerAction::Connect { link, provider, addresses, session: index });
    }

    pub(super) fn link_up(&mut self, link: LinkId) {
        let Some(session) = self.links.get(&link).and_then(|i| self.sessions.get_mut(i)) else {
            // It was given up while it was being made: nobody else would close it.
            let reason = "it came too late".to_owned();
            return self.actions.push_back(ConsumerAction::CloseLink { link, code: CloseCode::Done, reason });
        };
        session.phase = Phase::Greeting;
        self.say(link, ConsumerControl::Hello(Hello::ours()));
    }

    pub(super) fn link_failed(&mut self, now: UnixMs, link: LinkId, text: &str) {
        let held = self.links.get(&link).and_then(|i| self.sessions.get(i)).is_some_and(|s| s.hold.is_some());
        if !held {
            self.shun_briefly(now, link, text);
        }
        self.unlink(now, link, text, true);
    }

    fn shun_briefly(&mut self, now: UnixMs, link: LinkId, text: &str) {
        if let Some(index) = self.links.get(&link).copied() {
            self.shun_provider(now, index, text);
        }
    }

    /// It could not be reached or went away: it is not asked again for a while.
    pub(super) fn shun_provider(&mut self, now: UnixMs, index: SessionIndex, text: &str) {
        let Some(session) = self.sessions.get(&index) else { return };
        let entry = self.shunned.entry(session.provider).or_insert((now, String::new()));
        if entry.0 < now.plus_ms(BRIEF_MS) {
            *entry = (now.plus_ms(BRIEF_MS), text.to_owned());
        }
    }

    /// A session has no link any more. Where its requests are not held, they end at their last acknowledgement, and their
    /// calls go on elsewhere.
    pub(super) fn unlink(&mut self, now: UnixMs, link: LinkId, text: &str, may_hold: bool) {
        let held = may_hold && self.hold(now, link, text);
        if !held && self.links.get(&link).and_then(|i| self.sessions.get(i)).is_some_and(|s| !s.is_idle()) {
            self.shun_briefly(now, link, text);
        }
        let Some(index) = self.links.remove(&link) else { return };
        let Some(session) = self.sessions.get_mut(&index).filter(|s| s.link == Some(link)) else { return };
        session.link = None;
        session.wanted_invoice = None;
        session.flow.unlinked();
        session.quote_wanted = None;
        session.uncredited_since = None;
        session.close_asked = false;
        session.spending = None;
        session.short = false;
        session.log.unlinked();
        if session.phase != Phase::Over {
            session.phase = Phase::Asleep;
        }
        session.streams.clear();
        if !held {
            self.scatter(now, index, text);
        }
    }

    /// A session's requests end at their last acknowledgement; all its calls go on elsewhere.
    pub(super) fn scatter(&mut self, now: UnixMs, index: SessionIndex, text: &str) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        session.hold = None;
        let waiting: Vec<CallId> = session.waiting.drain(..).collect();
        let open: Vec<RequestId> = session.requests.keys().copied().collect();
        let unopened = session.state.is_none();
        let mut homeless = waiting;
        for request in open {
            homeless.extend(self.abandon(index, request));
        }
        if unopened {
            // Nothing was ever agreed under this key.
            self.sessions.remove(&index);
        }
        for call in homeless {
            self.reassign(now, call, text);
        }
    }

    pub(super) fn control(&mut self, now: UnixMs, link: LinkId, frame: ProviderControl) {
        let Some(&index) = self.links.get(&link) else { return };
        let Some(session) = self.sessions.get(&index) else { return };
        match (session.phase, frame) {
            (Phase::Greeting, ProviderControl::Hello(hello)) if hello.version == Hello::VERSION => {
                if let Some(session) = self.sessions.get_mut(&index) {
                    session.spends_credit = hello.spends_credit();
                    session.log.linked(now, hello.speaks_of_its_log());
                }
                self.greeted(now, index, link);
            }
            (Phase::Quoting | Phase::Ready, ProviderControl::Quote(signed)) => self.quoted(now, index, link, &signed),
            (Phase::Opening, ProviderControl::Opened(id)) => self.opened(now, index, id),
            (Phase::Resuming, ProviderControl::Resumed(id, paid, last, settled, going)) => {
                let lost = self.end_all_but(index, &going);
                self.resumed(now, index, (id, paid, last, settled));
                self.go_on(now, index, link, lost);
            }
            (Phase::Resuming, ProviderControl::Refused(_, text)) => self.not_resumable(now, index, &text),
            (Phase::Ready, ProviderControl::Invoice(descriptor, bolt11)) => {
                self.invoiced(now, index, descriptor, bolt11);
            }
            (Phase::Ready, ProviderControl::Credited(_, total)) => self.credited(now, index, total),
            (Phase::Ready, ProviderControl::Refunding(..)) => {}
            (_, ProviderControl::Owed(note)) => self.owed(now, index, &note),
            (_, ProviderControl::CreditSpent(both)) => self.credit_spent(now, index, &both),
            (_, ProviderControl::CreditKept(session, _)) => self.credit_kept(index, session),
            (_, ProviderControl::Promise(signed)) => self.promised(now, index, signed),
            (_, ProviderControl::TreeHead(note)) => self.tree_head(now, index, &note),
            (_, ProviderControl::Proof(proof)) => self.proof(now, index, proof),
            (_, ProviderControl::Closed) => self.closed_by_provider(now, index),
            (_, ProviderControl::Refused(refusal, text)) => self.refused(now, index, refusal, &text),
            (
                _,
                ProviderControl::Hello(_)
                | ProviderControl::Quote(_)
                | ProviderControl::Opened(_)
                | ProviderControl::Invoice(..)
                | ProviderControl::Credited(..)
                | ProviderControl::Resumed(..)
                | ProviderControl::Refunding(..),
            ) => self.drop_link(now, index, CloseCode::Violation, "a control frame out of its place"),
        }
    }

    fn set_phase(&mut self, now: UnixMs, index: SessionIndex, phase: Phase) {
        if let Some(session) = self.sessions.get_mut(&index) {
            session.phase = phase;
            session.phase_since = now;
            session.idle_since = now;
        }
    }

    fn greeted(&mut self, now: UnixMs, index: SessionIndex, link: LinkId) {
        let Some(session) = self.sessions.get(&index) else { return };
        if let Some(state) = &session.state {
            let ended = state.abandoned_requests().iter().rev();
            let ended = ended.map(|(id, ack)| OpenRequest { request: *id, last_ack: ack.clone(), received: None });
            let open = session.held_requests().chain(ended).take(MAX_OPEN_REQUESTS).collect();
            let earlier = Some(state.earlier_receipts()).filter(|receipts| !receipts.is_empty());
            let resume = ConsumerControl::Resume(state.id(), open, state.last_receipt_signed().cloned(), earlier);
            self.set_phase(now, index, Phase::Resuming);
            // It shows countersignatures: they are durable first.
            return self.behind(vec![ConsumerAction::Control { link, frame: resume }]);
        }
        self.set_phase(now, index, Phase::Quoting);
        self.ask_quote(index, link);
    }

    fn ask_quote(&mut self, index: SessionIndex, link: LinkId) {
        let listing = self.sessions.get(&index).and_then(|s| s.listing.as_ref());
        if let Some((id, root)) = listing.map(|l| (l.id(), l.model_root)) {
            self.say(link, ConsumerControl::WantQuote(id, root));
        }
    }

    /// Whether the current quote serves; asks for a new one where it has run out.
    pub(super) fn quote_is_fresh(&mut self, now: UnixMs, index: SessionIndex) -> bool {
        let Some(session) = self.sessions.get_mut(&index) else { return false };
        let Some(state) = &session.state else { return false };
        if session.quote_wanted.is_none() && now.plus_ms(QUOTE_MARGIN_MS) < state.quote().valid_until {
            return true;
        }
        self.renew_quote(now, index);
        false
    }

    /// Asks for a new quote, once. Not while an invoice is on its way: its terms name the quote it was asked for under.
    pub(super) fn renew_quote(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(link) = session.link else { return };
        if session.quote_wanted.is_none() && session.wanted_invoice.is_none() {
            session.quote_wanted = Some(now);
            self.ask_quote(index, link);
        }
    }

    fn quoted(&mut self, now: UnixMs, index: SessionIndex, link: LinkId, signed: &Signed<Quote>) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        session.quote_wanted = None;
        let Some(listing) = session.listing.clone() else { return };
        let key = node_key(&session.key);
        let quote = match signed.verify(&session.provider) {
            Ok(quote) => quote,
            Err(error) => return self.drop_link(now, index, CloseCode::Violation, &error.to_string()),
        };
        if let Err(fault) = check::quote(&quote, &listing, &key, now) {
            self.counters.refused_quotes += 1;
            let proof = satgrid_types::cbor::encode(signed);
            return self.misbehaved(now, index, fault.rule(), &fault.to_string(), proof);
        }
        let evidence = Draft::of(Evidence::Listing { event_json: listing.event().to_json() });
        if let Some(state) = &session.state {
            let drafts = vec![evidence, state.requote(&quote)];
            self.record(index, drafts, Vec::new());
            return;
        }
        let open = SessionOpen {
            version: SessionOpen::VERSION,
            provider: session.provider,
            consumer: key,
            quote: quote.quote_id(),
            refund_to: RefundTo::InvoiceAtClose,
            spend_cap: self.config.session_cap,
            opened_at: now,
        };
        let signed_open = Signed::sign(&open, &session.key);
        let Ok(open) = signed_open.verify(&key) else { return };
        session.state = Some(SessionState::new(Side::Consumer, &quote, &open));
        let mut drafts = vec![evidence];
        drafts.extend(SessionState::open_drafts(&quote, &open));
        self.set_phase(now, index, Phase::Opening);
        self.append(drafts, vec![ConsumerAction::Control { link, frame: ConsumerControl::Open(signed_open) }]);
    }

    fn opened(&mut self, now: UnixMs, index: SessionIndex, id: SessionId) {
        let ours = self.sessions.get(&index).and_then(|s| s.state.as_ref()).is_some_and(|s| s.id() == id);
        if !ours {
            return self.drop_link(now, index, CloseCode::Violation, "another session was opened than was asked for");
        }
        self.set_phase(now, index, Phase::Ready);
    }

    /// The provider's books: everything paid, the last receipt, the numerators of what ended.
    fn resumed(
        &mut self,
        now: UnixMs,
        index: SessionIndex,
        (id, paid, last, settled): (SessionId, Msat, Option<ReceiptId>, Numerators),
    ) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(state) = &session.state else { return };
        let same = state.id() == id && state.last_receipt() == last && state.settled_numerators() == settled;
        if !same {
            return self.not_resumable(now, index, "the two sides' books of this session differ");
        }
        session.credited = paid;
        self.set_phase(now, index, Phase::Ready);
    }

    /// The session cannot go on: its balance is a claim, and calls get a new session.
    fn not_resumable(&mut self, now: UnixMs, index: SessionIndex, text: &str) {
        let left = self.sessions.get(&index).and_then(|s| s.state.as_ref()).map(SessionState::remainder);
        self.counters.lost_sessions += u64::from(left.is_some_and(|left| !left.is_zero()));
        let waiting: Vec<CallId> = match self.sessions.get_mut(&index) {
            Some(session) => {
                session.phase = Phase::Over;
                session.waiting.drain(..).collect()
            }
            None => return,
        };
        let listing = self.sessions.get(&index).and_then(|s| s.listing.clone());
        self.drop_link(now, index, CloseCode::Done, text);
        let Some(listing) = listing else {
            return waiting.into_iter().for_each(|call| self.reassign(now, call, text));
        };
        for call in waiting {
            let fresh = self.session_with(now, &listing);
            self.attach(call, fresh);
        }
    }

    fn refused(&mut self, now: UnixMs, index: SessionIndex, refusal: Refusal, text: &str) {
        match refusal {
            // The listing was replaced under our hands, or the quote ran out: a new quote mends it, once connected anew.
            Refusal::Quote | Refusal::NotOffered | Refusal::Busy | Refusal::Unavailable | Refusal::Unknown => {
                self.drop_link(now, index, CloseCode::Done, text);
            }
            Refusal::Funds | Refusal::Context | Refusal::Protocol => {
                self.drop_link(now, index, CloseCode::Violation, text);
            }
        }
    }

    pub(super) fn tick_session(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get(&index) else { return };
        let past = |at: Option<UnixMs>, ms: u64| at.is_some_and(|at| now.since(at) >= ms);
        let setup = session.is_setting_up() && past(Some(session.phase_since), self.config.setup_ms);
        let invoice = past(session.wanted_invoice.map(|(_, _, at)| at), self.config.setup_ms);
        let quote = past(session.quote_wanted, self.config.setup_ms);
        if setup && session.hold.is_some() {
            return self.try_again(now, index, "no answer in time");
        }
        if setup || invoice || quote {
            return self.drop_link(now, index, CloseCode::Done, "no answer in time");
        }
        if session.hold.is_some() {
            return self.tick_hold(now, index);
        }
        if past(session.uncredited_since, self.config.credit_ms) {
            let text = "a slice was paid and is not credited";
            let paid =
                session.state.as_ref().and_then(|s| s.slices().values().rev().find(|s| s.status == SliceStatus::Paid));
            // The invoice is the provider's signed promise; its preimage, in the entry of the payment, shows it was kept to.
            let proof = paid.map(|slice| slice.bolt11.clone().into_bytes()).unwrap_or_default();
            return self.misbehaved(now, index, "slice-not-credited", text, proof);
        }
        let idle = session.is_ready() && session.is_idle() && now.since(session.idle_since) >= self.config.idle_ms;
        if idle && !self.refund_idle(now, index) {
            return self.drop_link(now, index, CloseCode::Done, "idle");
        }
        self.tick_owed(now, index);
        self.tick_log(now, index);
        self.watch_credit(now, index);
        self.tick_streams(now, index);
    }
}
