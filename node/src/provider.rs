//! The seller: quotes, invoices, meters work against acknowledgements and prepaid money, signs receipts, refunds.
//!
//! # A request at its provider
//!
//! | phase | awaits | leaves with | a crash here means |
//! |---|---|---|---|
//! | running | engine events, countersigned acks | the engine is done | ended at the last ack when the consumer resumes, or after `DETACHED_MS` |
//! | finishing | the last ack, its turn in the receipt chain | the receipt is offered | the same |
//! | offered | the countersigned receipt | the receipt is durable | the consumer shows the receipt when it resumes |
//! | held | the consumer's resume; it runs to the end of its grant | it goes on, or after the terms' `resume_ms` it is detached | the same |
//! | detached | the consumer's resume | the receipt or the last ack that the consumer shows, or `DETACHED_MS` | the same |
//!
//! Nothing is evaluated that is not reserved from prepaid money, and no output runs further ahead of the consumer's
//! signature than the terms' window.

mod credit;
mod jobs;
mod links;
mod log;
mod parts;
mod peers;
mod refunds;
mod requests;
mod resume;
mod sessions;
mod signers;
mod start;
mod strangers;
#[cfg(test)]
mod tests;
mod types;
mod words;

pub use types::*;

use self::signers::Signers;
use crate::{LinkId, StreamId, Ticket, gate::Gate};
use ed25519_dalek::SigningKey;
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{RngCore, SeedableRng},
};
use satgrid_engine::port::{Command, EngineEvent, JobId};
use satgrid_ledger::entry::Draft;
use satgrid_protocol::{
    frame::{ProviderControl, ProviderFrame, Refusal, reason},
    session::SessionState,
};
use satgrid_types::{ListingId, Msat, NodeKey, PaymentHash, RequestId, SessionId, UnixMs};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The provider role. See the module's documentation.
pub struct Provider {
    config: ProviderConfig,
    keys: Signers,
    rng: ChaCha20Rng,
    gate: Gate<ProviderAction>,
    actions: VecDeque<ProviderAction>,
    offerings: BTreeMap<ListingId, Offering>,
    links: BTreeMap<LinkId, links::Link>,
    sessions: BTreeMap<SessionId, sessions::Session>,
    jobs: BTreeMap<JobId, (SessionId, RequestId)>,
    next_job: u64,
    /// Invoices that the wallet is making: what they are for.
    invoices: BTreeMap<InvoiceTicket, links::WantedInvoice>,
    next_invoice: u64,
    by_payment: BTreeMap<PaymentHash, SessionId>,
    leavers: peers::Leavers,
    /// Engines whose process is dead.
    down: BTreeSet<EngineId>,
    /// Why no new work is taken.
    paused: Option<String>,
    /// Sessions that time can change: with open requests, or a close that waits. All others cost nothing per event.
    live: BTreeSet<SessionId>,
    /// Sessions in which nothing was paid, when they were last looked at; and when that is done again at the latest.
    unpaid: BTreeSet<SessionId>,
    unpaid_due: Option<UnixMs>,
    /// Since when it runs without a gap: payments of before may not be told yet.
    awake_since: UnixMs,
    /// The earliest deadline of the live sessions.
    wake: Option<UnixMs>,
    /// Sum of what each session says that it may lose, kept as sessions change.
    exposed: Msat,
    /// The time of the event in hand.
    now: UnixMs,
    counters: ProviderCounters,
}

/// What an event may have changed, as far as time and deadlines go.
enum Touched {
    Nothing,
    Session(SessionId),
    Anything,
}

impl Provider {
    /// A provider with no sessions. `seed` feeds nonces and must never be used twice.
    pub fn new(config: ProviderConfig, key: SigningKey, seed: [u8; 32]) -> Provider {
        Provider {
            config,
            keys: Signers::new(key),
            rng: ChaCha20Rng::from_seed(seed),
            gate: Gate::default(),
            actions: VecDeque::new(),
            offerings: BTreeMap::new(),
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            jobs: BTreeMap::new(),
            next_job: 0,
            invoices: BTreeMap::new(),
            next_invoice: 0,
            by_payment: BTreeMap::new(),
            leavers: peers::Leavers::default(),
            down: BTreeSet::new(),
            paused: None,
            live: BTreeSet::new(),
            unpaid: BTreeSet::new(),
            unpaid_due: None,
            awake_since: UnixMs(0),
            wake: None,
            exposed: Msat::ZERO,
            now: UnixMs(0),
            counters: ProviderCounters::default(),
        }
    }

    /// Keys that this node had before: sessions that were opened under one go on under it.
    #[must_use]
    pub fn with_former(mut self, keys: Vec<SigningKey>) -> Provider {
        self.keys.add_former(keys);
        self
    }

    /// Takes up the sessions that the journal holds. Their open requests wait for the consumer to resume. One in which nothing was
    /// paid and no invoice issued does not come back: it may be one that was forgotten.
    pub fn restore(&mut self, now: UnixMs, restored: Vec<SessionState>, refunds: Vec<PendingRefund>) {
        self.now = now;
        self.awake_since = now;
        for state in restored.into_iter().filter(|state| state.is_taken_up(now)) {
            self.adopt(now, state);
        }
        for refund in refunds {
            self.retry_refund(refund);
        }
        self.tick(now);
    }

    // Getters.

    pub fn node_key(&self) -> NodeKey {
        self.keys.node_key()
    }
    pub fn counters(&self) -> &ProviderCounters {
        &self.counters
    }
    /// Why no new work is taken, where there is a reason.
    pub fn paused(&self) -> Option<&str> {
        self.paused.as_deref()
    }
    pub fn open_requests(&self) -> usize {
        self.jobs.len()
    }
    pub fn session_states(&self) -> impl Iterator<Item = &SessionState> {
        self.sessions.values().map(|s| &s.state)
    }
    /// "Most you can lose now", over all sessions.
    pub fn exposure(&self) -> Msat {
        self.exposed
    }

    // What happened.

    /// Takes in one event.
    pub fn handle(&mut self, now: UnixMs, event: ProviderEvent) {
        self.note_gap(now);
        self.now = now;
        if self.gate.is_broken() {
            // Nothing more is promised, signed or paid; whoever comes is told.
            if let ProviderEvent::LinkUp { link, peer, host } = event {
                self.link_up(link, peer, host);
            }
            return;
        }
        let touched = self.touched_by(&event);
        match event {
            ProviderEvent::Offer(offering) => {
                let root = offering.listing.model_root;
                self.offerings.retain(|_, old| {
                    old.listing.model_root != root || old.engine != offering.engine || old.is_live(now)
                });
                self.offerings.insert(offering.listing.id(), *offering);
            }
            ProviderEvent::LinkUp { link, peer, host } => self.link_up(link, peer, host),
            ProviderEvent::LinkDown { link } => self.link_down(now, link),
            ProviderEvent::LinkUsed { link } => self.link_used(link, true),
            ProviderEvent::LinkFreed { link } => self.link_used(link, false),
            ProviderEvent::Control { link, frame } => self.control(now, link, frame),
            ProviderEvent::Request { link, stream, frame } => self.request_frame(now, link, stream, frame),
            ProviderEvent::StreamClosed { link, stream } => self.stream_closed(now, link, stream),
            ProviderEvent::Engine { engine, event } => self.engine_event(now, engine, event),
            ProviderEvent::Worked { job, done, .. } => self.worked(now, job, done),
            ProviderEvent::Counted { job, counts, .. } => self.counted(job, counts),
            ProviderEvent::Split { job, split, root, .. } => self.split_of(job, *split, root),
            ProviderEvent::ExpertSplit { job, split, root, .. } => self.expert_split_of(job, *split, root),
            ProviderEvent::InvoiceMade { ticket, result } => self.invoice_made(ticket, result),
            ProviderEvent::PaymentReceived { hash, amount } => self.payment_received(now, hash, amount),
            ProviderEvent::RefundSettled { hash, preimage, fee, .. } => self.refund_settled(hash, preimage, fee),
            ProviderEvent::RefundFailed { hash, reason } => self.refund_failed(now, hash, reason),
            ProviderEvent::Durable(ticket) => {
                let released = self.gate.durable(ticket);
                self.actions.extend(released);
            }
            ProviderEvent::Paused(why) => self.paused = why,
            ProviderEvent::Logged(entry) => self.logged(now, &entry),
            ProviderEvent::TreeHead { note } => self.tree_head(&note),
            ProviderEvent::LogProved { link, proof } => self.proved(link, proof),
            ProviderEvent::JournalFailed { reason } => self.journal_failed(&reason),
            ProviderEvent::Tick => {}
        }
        self.settle(now, &touched);
    }

    /// Tokens and the journal's answers come by the thousand: they are looked at where they land, and nowhere else.
    fn touched_by(&self, event: &ProviderEvent) -> Touched {
        match event {
            ProviderEvent::Engine { event: EngineEvent::Tokens { job, .. }, .. } => {
                self.jobs.get(job).map_or(Touched::Nothing, |(id, _)| Touched::Session(*id))
            }
            ProviderEvent::Worked { job, .. } => {
                self.jobs.get(job).map_or(Touched::Nothing, |(id, _)| Touched::Session(*id))
            }
            ProviderEvent::Durable(_)
            | ProviderEvent::Logged(_)
            | ProviderEvent::TreeHead { .. }
            | ProviderEvent::LogProved { .. } => Touched::Nothing,
            ProviderEvent::Offer(_)
            | ProviderEvent::LinkUp { .. }
            | ProviderEvent::LinkDown { .. }
            | ProviderEvent::LinkUsed { .. }
            | ProviderEvent::LinkFreed { .. }
            | ProviderEvent::Control { .. }
            | ProviderEvent::Request { .. }
            | ProviderEvent::StreamClosed { .. }
            | ProviderEvent::Engine { .. }
            | ProviderEvent::Split { .. }
            | ProviderEvent::Counted { .. }
            | ProviderEvent::ExpertSplit { .. }
            | ProviderEvent::InvoiceMade { .. }
            | ProviderEvent::PaymentReceived { .. }
            | ProviderEvent::RefundSettled { .. }
            | ProviderEvent::RefundFailed { .. }
            | ProviderEvent::Paused(_)
            | ProviderEvent::JournalFailed { .. }
            | ProviderEvent::Tick => Touched::Anything,
        }
    }

    /// What falls due, and when to look again.
    fn settle(&mut self, now: UnixMs, touched: &Touched) {
        let due = self.wake.is_some_and(|at| at <= now);
        match touched {
            Touched::Nothing if !due => {}
            Touched::Session(id) if !due => {
                self.refresh(id);
                let next = self.sessions.get(id).and_then(|s| s.next_deadline(self.config.signature_timeout_ms));
                self.wake = [self.wake, next].into_iter().flatten().min();
            }
            Touched::Nothing | Touched::Session(_) | Touched::Anything => self.tick(now),
        }
    }

    /// A session changed: what it may lose is summed anew, and time has an eye on it.
    fn refresh(&mut self, id: &SessionId) {
        let Some(session) = self.sessions.get_mut(id) else { return };
        let most = session.exposure().most();
        self.exposed = self.exposed.saturating_sub(session.exposed).saturating_add(most);
        session.exposed = most;
        if session.is_live() {
            self.live.insert(*id);
        }
    }

    /// The next thing to be done, until there is none.
    pub fn poll_action(&mut self) -> Option<ProviderAction> {
        self.actions.pop_front()
    }

    /// When to send [`ProviderEvent::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<UnixMs> {
        if self.gate.is_broken() {
            return None;
        }
        self.wake
    }

    // Helpers that every part uses.

    fn append(&mut self, drafts: Vec<Draft>, then: Vec<ProviderAction>) {
        if self.gate.is_broken() {
            return;
        }
        let append = self.gate.append(drafts, then);
        self.actions.push_back(ProviderAction::Append(append));
    }

    /// Applies drafts to a session's state and asks for them to be made durable, with what they authorise.
    fn record(&mut self, session: SessionId, drafts: Vec<Draft>, then: Vec<ProviderAction>) {
        let Some(live) = self.sessions.get_mut(&session) else { return };
        for draft in &drafts {
            if let Err(error) = live.state.apply(draft) {
                // Every draft was built from this very state: if it does not fit, stop before money moves on it.
                let text = format!("a draft does not fit the state it was built from: {error}");
                self.journal_failed(&text);
                return;
            }
        }
        self.refresh(&session);
        if !drafts.is_empty() {
            self.append(drafts, then);
        } else {
            self.behind(then);
        }
    }

    /// Does something once everything that was appended so far is durable.
    fn behind(&mut self, then: Vec<ProviderAction>) {
        if !self.gate.is_broken() {
            let free = self.gate.behind(then);
            self.actions.extend(free);
        }
    }

    /// As `behind`, though appends after `entry`, up to `newest` of them, may still be on their way to the disk.
    fn behind_entry(&mut self, entry: Option<Ticket>, newest: usize, then: Vec<ProviderAction>) {
        if !self.gate.is_broken() {
            let free = self.gate.behind_entry(entry, newest, then);
            self.actions.extend(free);
        }
    }

    fn say(&mut self, link: LinkId, frame: ProviderControl) {
        if self.gate.is_broken() {
            return;
        }
        self.actions.push_back(ProviderAction::Control { link, frame });
    }
    fn refuse(&mut self, link: LinkId, refusal: Refusal, text: impl Into<String>) {
        self.say(link, ProviderControl::Refused(refusal, reason(text)));
    }
    fn send(&mut self, link: LinkId, stream: StreamId, frame: ProviderFrame) {
        if self.gate.is_broken() || !self.links.contains_key(&link) {
            return;
        }
        self.actions.push_back(ProviderAction::Send { link, stream, frame });
    }
    fn refuse_request(&mut self, link: LinkId, stream: StreamId, refusal: Refusal, text: impl Into<String>) {
        self.counters.requests_refused += 1;
        self.send(link, stream, ProviderFrame::Refused(refusal, reason(text)));
        self.actions.push_back(ProviderAction::FinishStream { link, stream });
    }
    /// The peer broke a rule: nothing more is heard from this link.
    fn violation(&mut self, link: LinkId, text: impl Into<String>) {
        self.counters.violations += 1;
        let (code, reason) = (crate::CloseCode::Violation, reason(text));
        self.actions.push_back(ProviderAction::CloseLink { link, code, reason });
        let session = self.links.get(&link).and_then(|l| l.session);
        self.link_down(self.now, link);
        if let Some(id) = session {
            // Nothing is kept running for it.
            self.hold_over(id);
        }
    }
    fn nonce(&mut self) -> u64 {
        self.rng.next_u64()
    }

    /// The journal cannot write: take no work, stop what runs, tell the peers.
    fn journal_failed(&mut self, text: &str) {
        if self.gate.is_broken() {
            return;
        }
        drop(self.gate.fail());
        let running: Vec<(JobId, SessionId)> = self.jobs.iter().map(|(job, (id, _))| (*job, *id)).collect();
        for (job, id) in running {
            if let Some(engine) = self.sessions.get(&id).and_then(|s| s.engine) {
                self.actions.push_back(ProviderAction::Engine { engine, command: Command::Cancel { job } });
            }
        }
        self.jobs.clear();
        for link in core::mem::take(&mut self.links).into_keys() {
            let code = crate::CloseCode::Unavailable;
            self.actions.push_back(ProviderAction::CloseLink {
                link,
                code,
                reason: reason("this node's ledger cannot be written"),
            });
        }
        self.actions.push_back(ProviderAction::Halt { reason: text.to_owned() });
    }
}
