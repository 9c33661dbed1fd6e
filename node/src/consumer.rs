//! The buyer: picks a provider, opens a session, pays slices while tokens flow, signs what it counted, fails over.
//!
//! # A call (one API request)
//!
//! | phase | awaits | leaves with |
//! |---|---|---|
//! | waiting | a session that is ready, funded and has room | its request is started |
//! | streaming | chunks, acknowledgements, the receipt | finished, or failed over to the next provider with what was received |
//!
//! # A session at its consumer
//!
//! | phase | awaits | a crash here means |
//! |---|---|---|
//! | connecting | the link | nothing happened |
//! | quoting | the provider's quote | nothing happened |
//! | opening | `Opened`; quote and open are in the journal | an empty session |
//! | held | the link again: the connection broke under a stream | the same as ready |
//! | ready | work | open requests end at their last ack; payments are resolved by hash; the balance is used when the provider is next met |
//! | asleep | a reason to connect again | the same |
//!
//! The consumer counts the ids that it received and signs nothing else. A countersignature is durable before it is sent.

mod calls;
mod caps;
mod credit;
mod embeds;
mod flow;
mod hold;
mod links;
mod log;
mod money;
mod owed;
mod parts;
mod receipts;
mod streams;
#[cfg(test)]
mod tests;
mod types;

pub use types::*;

use crate::{LinkId, StreamId, gate::Gate};
use ed25519_dalek::SigningKey;
use rand_chacha::{
    ChaCha20Rng,
    rand_core::{RngCore, SeedableRng},
};
use satgrid_ledger::{
    entry::{Draft, Evidence, MAX_ENTRY_LEN},
    log::SignedCheckpoint,
};
use satgrid_protocol::{
    frame::{ConsumerControl, ProviderFrame, reason},
    pace::PaymentTimes,
    session::SessionState,
};
use satgrid_types::{
    LightningKey, Msat, NodeKey, PaymentHash, RequestId, SessionId, UnixMs, VerifiedListing, node_key,
};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Names one session of this consumer for its whole life: the index of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionIndex(pub u64);

/// The consumer role. See the module's documentation.
pub struct Consumer {
    config: ConsumerConfig,
    /// From which every session key is derived.
    master: [u8; 32],
    rng: ChaCha20Rng,
    gate: Gate<ConsumerAction>,
    actions: VecDeque<ConsumerAction>,
    sessions: BTreeMap<SessionIndex, links::Session>,
    links: BTreeMap<LinkId, SessionIndex>,
    next_link: u64,
    next_stream: u64,
    calls: BTreeMap<CallId, calls::Call>,
    by_payment: BTreeMap<PaymentHash, SessionIndex>,
    /// Value settled by receipts that this node checked itself, by provider.
    settled_with: BTreeMap<NodeKey, Msat>,
    /// How long slices take with each provider.
    payment_times: BTreeMap<NodeKey, PaymentTimes>,
    /// Keys that stand for others that were given up, with those.
    lines: BTreeMap<NodeKey, Vec<NodeKey>>,
    /// Providers that are not asked again before this time.
    shunned: BTreeMap<NodeKey, (UnixMs, String)>,
    payable: Option<Msat>,
    /// Why no new work is taken.
    paused: Option<String>,
    direct_peers: BTreeSet<LightningKey>,
    /// The newest tree head of each provider that this run has heard.
    heads: BTreeMap<NodeKey, SignedCheckpoint>,
    /// Providers that are proven to keep two histories.
    two_faced: BTreeSet<NodeKey>,
    /// Sessions with a connection, work, or a close under way. All others cost nothing per event.
    live: BTreeSet<SessionIndex>,
    /// The earliest deadline of the live sessions and of the calls.
    wake: Option<UnixMs>,
    /// Sum of what each session says that it may lose, kept as sessions change.
    exposed: Msat,
    counters: ConsumerCounters,
}

/// Sessions that may be setting up at once beside those that were opened: how far a restart looks for session keys.
const MAX_KEY_GAP: u64 = 4_096;

/// The most that is kept of what proves a broken rule: a peer's frame may be longer than an entry of the journal, and an
/// entry that is too long stops the node.
const MAX_STATEMENT: usize = MAX_ENTRY_LEN - 1_024;

/// The key of one session: SHA-256 over `"satgrid-session-key-v1\0"`, the master secret and the index (u64, big-endian).
pub fn session_key(master: &[u8; 32], index: SessionIndex) -> SigningKey {
    let mut hasher = Sha256::new();
    hasher.update(b"satgrid-session-key-v1\0");
    hasher.update(master);
    hasher.update(index.0.to_be_bytes());
    SigningKey::from_bytes(&hasher.finalize().into())
}

impl Consumer {
    /// A consumer with no sessions. `master` is secret and permanent; `seed` feeds request ids and salts and must never
    /// be used twice.
    pub fn new(config: ConsumerConfig, master: [u8; 32], seed: [u8; 32]) -> Consumer {
        Consumer {
            config,
            master,
            rng: ChaCha20Rng::from_seed(seed),
            gate: Gate::default(),
            actions: VecDeque::new(),
            sessions: BTreeMap::new(),
            links: BTreeMap::new(),
            next_link: 0,
            next_stream: 0,
            calls: BTreeMap::new(),
            by_payment: BTreeMap::new(),
            settled_with: BTreeMap::new(),
            payment_times: BTreeMap::new(),
            lines: BTreeMap::new(),
            shunned: BTreeMap::new(),
            payable: None,
            paused: None,
            direct_peers: BTreeSet::new(),
            heads: BTreeMap::new(),
            two_faced: BTreeSet::new(),
            live: BTreeSet::new(),
            wake: None,
            exposed: Msat::ZERO,
            counters: ConsumerCounters::default(),
        }
    }

    /// Takes up what the journal holds: sessions with a balance, requests that were open (they end at their last
    /// acknowledgement: their clients are gone), payments whose fate the wallet must tell.
    pub fn restore(&mut self, states: Vec<SessionState>, opened: u64, settled_with: BTreeMap<NodeKey, Msat>) {
        self.settled_with = settled_with;
        let mut wanted: BTreeMap<NodeKey, SessionState> = states.into_iter().map(|s| (s.consumer(), s)).collect();
        let mut found = Vec::with_capacity(wanted.len());
        // The smallest free index is taken for a new session, so those that were opened lie close together.
        for index in (0..opened.saturating_add(MAX_KEY_GAP)).map(SessionIndex) {
            if wanted.is_empty() {
                break;
            }
            if let Some(state) = wanted.remove(&node_key(&session_key(&self.master, index))) {
                found.push((index, state));
            }
        }
        for (index, state) in found {
            let hashes = state.slices().values().filter_map(|slice| slice.payment_hash);
            for hash in hashes.chain(state.refund_invoices().iter().copied()) {
                self.by_payment.insert(hash, index);
            }
            let session = state.id();
            let unresolved = state.attempted().map(|(k, slice)| (k, slice.clone()));
            let open: Vec<RequestId> = state.requests().keys().copied().collect();
            self.sessions.insert(index, links::Session::asleep(session_key(&self.master, index), state));
            self.refresh(index);
            for request in open {
                self.abandon(index, request);
            }
            if let Some((k, slice)) = unresolved
                && let Some(hash) = slice.payment_hash
            {
                let (bolt11, amount, max_fee) = (slice.bolt11, slice.amount, slice.max_fee);
                self.actions.push_back(ConsumerAction::ResolvePayment {
                    slice: (session, k),
                    hash,
                    bolt11,
                    amount,
                    max_fee,
                });
            }
        }
    }

    /// Tells where a provider can be reached now, for sessions that the journal brought back: a call finds that out by
    /// itself, a close has to be told.
    pub fn learn(&mut self, listing: &VerifiedListing) {
        for session in self.sessions.values_mut() {
            session.learn(listing);
        }
    }

    /// It would ask for money that is owed to it, and does not know where the provider is.
    pub fn wants_listings(&self) -> bool {
        let mut live = self.live.iter().filter_map(|index| self.sessions.get(index));
        live.any(|session| session.owed.is_some() && session.listing.is_none())
    }

    // Getters.

    pub fn counters(&self) -> &ConsumerCounters {
        &self.counters
    }
    /// Why no new work is taken, where there is a reason.
    pub fn paused(&self) -> Option<&str> {
        self.paused.as_deref()
    }
    pub fn open_calls(&self) -> usize {
        self.calls.len()
    }
    pub fn session_states(&self) -> impl Iterator<Item = &SessionState> {
        self.sessions.values().filter_map(|s| s.state.as_ref())
    }
    /// Every session that was opened, and in one word where it stands.
    pub fn sessions(&self) -> impl Iterator<Item = (&SessionState, &'static str)> {
        self.sessions.values().filter_map(|s| s.state.as_ref().map(|state| (state, s.word())))
    }
    /// "Most you can lose now", over all sessions.
    pub fn exposure(&self) -> Msat {
        self.exposed
    }
    /// Providers that are avoided now, and why.
    pub fn shunned(&self, now: UnixMs) -> impl Iterator<Item = (&NodeKey, &str)> {
        self.shunned.iter().filter(move |(_, (until, _))| *until > now).map(|(key, (_, why))| (key, why.as_str()))
    }
    pub fn settled_with(&self, provider: &NodeKey) -> Msat {
        let itself = std::slice::from_ref(provider);
        let line = self.lines.get(provider).map_or(itself, Vec::as_slice);
        line.iter().filter_map(|key| self.settled_with.get(key)).fold(Msat::ZERO, |sum, v| sum.saturating_add(*v))
    }

    // What happened.

    /// Takes in one event.
    pub fn handle(&mut self, now: UnixMs, event: ConsumerEvent) {
        if self.gate.is_broken() {
            // Nothing more is signed or paid; whoever calls is told.
            if let ConsumerEvent::Submit(submit) = event {
                self.submit(now, *submit);
            }
            return;
        }
        let quiet = self.changes_no_deadline(&event) && self.wake.is_none_or(|at| at > now);
        match event {
            ConsumerEvent::Submit(submit) => self.submit(now, *submit),
            ConsumerEvent::Cancel { call } => self.cancel(call),
            ConsumerEvent::Ordered { call, sent, returned, experts } => {
                self.ordered(now, call, parts::PartLive { sent, returned, experts });
            }
            ConsumerEvent::Route { call, slot, downstream, next, addresses, resend, leading } => {
                self.route(now, call, downstream, parts::Way { slot, next, addresses, resend, leading });
            }
            ConsumerEvent::WantTicket { call } => self.want_ticket(now, call),
            ConsumerEvent::PartDone { call } => self.part_done(call),
            ConsumerEvent::WrongRows { worker, statement } => {
                self.keep_against(now, worker, "wrong-rows", "it gave wrong expert rows", statement);
            }
            ConsumerEvent::CloseSession { session } => self.begin_close(now, session),
            ConsumerEvent::CloseInvoice { session, result } => self.close_with(now, session, result),
            ConsumerEvent::ClockMoved => self.clock_moved(now),
            ConsumerEvent::LinkUp { link } => self.link_up(link),
            ConsumerEvent::LinkFailed { link, reason } => self.link_failed(now, link, &reason),
            ConsumerEvent::LinkDown { link, reason, lost } => self.unlink(now, link, &reason, lost),
            ConsumerEvent::Control { link, frame } => self.control(now, link, frame),
            ConsumerEvent::Frame { link, stream, frame } => self.frame(now, link, stream, frame),
            ConsumerEvent::StreamClosed { link, stream } => self.stream_closed(now, link, stream),
            ConsumerEvent::PaymentSettled { hash, preimage, fee } => self.payment_settled(now, hash, preimage, fee),
            ConsumerEvent::PaymentFailed { hash, reason } => self.payment_failed(now, hash, reason),
            ConsumerEvent::PaymentReceived { hash, amount } => self.payment_received(hash, amount),
            ConsumerEvent::Paused(why) => self.paused = why,
            ConsumerEvent::Payable(payable) => self.payable = Some(payable),
            ConsumerEvent::DirectPeers(peers) => self.direct_peers = peers,
            ConsumerEvent::Durable(ticket) => {
                let released = self.gate.durable(ticket);
                self.actions.extend(released);
            }
            ConsumerEvent::Line { key, line } => drop(self.lines.insert(key, line)),
            ConsumerEvent::SecondHistory(proof) => self.second_history(now, &proof),
            ConsumerEvent::OthersHead(head) => self.others_head(now, *head),
            ConsumerEvent::JournalFailed { reason } => self.journal_failed(&reason),
            ConsumerEvent::Tick => {}
        }
        if !quiet {
            self.tick(now);
        }
    }

    /// Chunks and the journal's answers come by the thousand. A chunk moves its request's deadline to a later time only,
    /// unless money has run out: then it may have been the last that is covered.
    fn changes_no_deadline(&self, event: &ConsumerEvent) -> bool {
        match event {
            ConsumerEvent::Frame { link, frame: ProviderFrame::Chunk(..), .. } => {
                self.links.get(link).and_then(|i| self.sessions.get(i)).is_some_and(|s| s.unfunded.is_none())
            }
            ConsumerEvent::Durable(_) | ConsumerEvent::WantTicket { .. } => true,
            ConsumerEvent::Frame { .. }
            | ConsumerEvent::Submit(_)
            | ConsumerEvent::Cancel { .. }
            | ConsumerEvent::Ordered { .. }
            | ConsumerEvent::Route { .. }
            | ConsumerEvent::PartDone { .. }
            | ConsumerEvent::WrongRows { .. }
            | ConsumerEvent::CloseSession { .. }
            | ConsumerEvent::CloseInvoice { .. }
            | ConsumerEvent::ClockMoved
            | ConsumerEvent::LinkUp { .. }
            | ConsumerEvent::LinkFailed { .. }
            | ConsumerEvent::LinkDown { .. }
            | ConsumerEvent::Control { .. }
            | ConsumerEvent::StreamClosed { .. }
            | ConsumerEvent::PaymentSettled { .. }
            | ConsumerEvent::PaymentFailed { .. }
            | ConsumerEvent::PaymentReceived { .. }
            | ConsumerEvent::Payable(_)
            | ConsumerEvent::Paused(_)
            | ConsumerEvent::DirectPeers(_)
            | ConsumerEvent::SecondHistory(_)
            | ConsumerEvent::OthersHead(_)
            | ConsumerEvent::Line { .. }
            | ConsumerEvent::JournalFailed { .. }
            | ConsumerEvent::Tick => false,
        }
    }

    /// The next thing to be done, until there is none.
    pub fn poll_action(&mut self) -> Option<ConsumerAction> {
        self.actions.pop_front()
    }

    /// When to send [`ConsumerEvent::Tick`] at the latest.
    pub fn poll_timeout(&self) -> Option<UnixMs> {
        if self.gate.is_broken() {
            return None;
        }
        self.wake
    }

    // Helpers that every part uses.

    fn append(&mut self, drafts: Vec<Draft>, then: Vec<ConsumerAction>) {
        if self.gate.is_broken() {
            return;
        }
        let append = self.gate.append(drafts, then);
        self.actions.push_back(ConsumerAction::Append(append));
    }

    /// Applies drafts to a session's state and asks for them to be made durable, with what they authorise.
    fn record(&mut self, index: SessionIndex, drafts: Vec<Draft>, then: Vec<ConsumerAction>) -> bool {
        let Some(state) = self.sessions.get_mut(&index).and_then(|s| s.state.as_mut()) else { return false };
        for draft in &drafts {
            if let Err(error) = state.apply(draft) {
                // Every draft was built from this very state: if it does not fit, stop before money moves on it.
                let text = format!("a draft does not fit the state it was built from: {error}");
                self.journal_failed(&text);
                return false;
            }
        }
        self.refresh(index);
        self.append(drafts, then);
        true
    }

    /// A session changed: what it may lose is summed anew, and time has an eye on it.
    fn refresh(&mut self, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let most = session.state.as_ref().map_or(Msat::ZERO, |s| s.consumer_exposure().most());
        self.exposed = self.exposed.saturating_sub(session.exposed).saturating_add(most);
        session.exposed = most;
        self.live.insert(index);
    }

    /// Does something once everything that was appended so far is durable.
    fn behind(&mut self, then: Vec<ConsumerAction>) {
        if !self.gate.is_broken() {
            let free = self.gate.behind(then);
            self.actions.extend(free);
        }
    }
    fn say(&mut self, link: LinkId, frame: ConsumerControl) {
        self.actions.push_back(ConsumerAction::Control { link, frame });
    }

    /// A provider broke a rule: the proof is kept, the link closed, and it is not asked again for a while.
    fn misbehaved(&mut self, now: UnixMs, index: SessionIndex, rule: &str, text: &str, statement: Vec<u8>) {
        let Some(session) = self.sessions.get(&index) else { return };
        self.keep_against(now, session.provider(), rule, text, statement);
        self.drop_link(now, index, crate::CloseCode::Violation, text);
    }

    /// Keeps what proves that a provider broke a rule; it is not asked again for a while.
    fn keep_against(&mut self, now: UnixMs, peer: NodeKey, rule: &str, text: &str, mut statement: Vec<u8>) {
        self.counters.misbehaviour += 1;
        statement.truncate(MAX_STATEMENT);
        self.append(vec![Draft::of(Evidence::Misbehaviour { peer, rule: rule.to_owned(), statement })], Vec::new());
        self.actions.push_back(ConsumerAction::Penalise { provider: peer, rule: rule.to_owned() });
        self.shunned.insert(peer, (now.plus_ms(self.config.shun_ms), text.to_owned()));
    }

    /// Nobody is to be accused of a silence that only our clock saw, nor to be left for longer than was meant.
    fn clock_moved(&mut self, now: UnixMs) {
        for session in self.sessions.values_mut() {
            session.uncredited_since = session.uncredited_since.map(|_| now);
            session.log.clock_moved(now);
        }
        let longest = now.plus_ms(self.config.shun_ms);
        self.shunned.values_mut().for_each(|(until, _)| *until = longest.min(*until));
    }

    /// Closes a session's link from our side; what was open on it goes elsewhere.
    fn drop_link(&mut self, now: UnixMs, index: SessionIndex, code: crate::CloseCode, text: &str) {
        let Some(link) = self.sessions.get(&index).and_then(|s| s.link) else { return };
        self.actions.push_back(ConsumerAction::CloseLink { link, code, reason: reason(text) });
        self.unlink(now, link, text, false);
    }

    /// The smallest index whose key no session has.
    fn free_index(&self) -> SessionIndex {
        let taken = self.sessions.keys().zip(0..).take_while(|(index, at)| index.0 == *at).count();
        SessionIndex(u64::try_from(taken).unwrap_or(u64::MAX))
    }
    fn new_link(&mut self, index: SessionIndex) -> LinkId {
        let link = LinkId(self.next_link);
        self.next_link = self.next_link.wrapping_add(1);
        self.links.insert(link, index);
        link
    }
    fn new_stream(&mut self) -> StreamId {
        let stream = StreamId(self.next_stream);
        self.next_stream = self.next_stream.wrapping_add(1);
        stream
    }
    fn random32(&mut self) -> [u8; 32] {
        let mut bytes = [0; 32];
        self.rng.fill_bytes(&mut bytes);
        bytes
    }
    fn index_of(&self, id: SessionId) -> Option<SessionIndex> {
        self.sessions.iter().find(|(_, s)| s.state.as_ref().is_some_and(|s| s.id() == id)).map(|(index, _)| *index)
    }
    /// A live session for what this listing offers, if there is one.
    fn session_for(&self, listing: &VerifiedListing) -> Option<SessionIndex> {
        self.sessions.iter().find(|(_, s)| s.serves(listing)).map(|(index, _)| *index)
    }

    /// The journal cannot write: nothing more is signed or paid; every call ends with an error that says so.
    fn journal_failed(&mut self, text: &str) {
        if self.gate.is_broken() {
            return;
        }
        // Calls that were about to hear of their end: it was not written, so it is another one.
        for action in self.gate.fail() {
            if let ConsumerAction::Emit {
                call,
                emission: Emission::Finished { bill, .. } | Emission::Failed { bill, .. },
            } = action
            {
                let error = CallError::Journal { reason: text.to_owned() };
                self.actions.push_back(ConsumerAction::Emit { call, emission: Emission::Failed { error, bill } });
            }
        }
        let calls: Vec<(CallId, calls::Place)> = self.calls.iter().map(|(id, call)| (*id, call.place)).collect();
        for (call, place) in calls {
            if let calls::Place::Streaming(index, request) = place {
                // What was signed for so far belongs on the bill.
                self.abandon(index, request);
            }
            self.fail_call(call, CallError::Journal { reason: text.to_owned() });
        }
        for link in core::mem::take(&mut self.links).into_keys() {
            let (code, reason) = (crate::CloseCode::Unavailable, reason("this node's ledger cannot be written"));
            self.actions.push_back(ConsumerAction::CloseLink { link, code, reason });
        }
        self.actions.push_back(ConsumerAction::Halt { reason: text.to_owned() });
    }

    /// Everything that falls due with time, and everything that can go on now.
    fn tick(&mut self, now: UnixMs) {
        if self.gate.is_broken() {
            return;
        }
        self.tick_calls(now);
        for index in self.live.iter().copied().collect::<Vec<SessionIndex>>() {
            self.tick_session(now, index);
            self.spend_notes(now, index);
            self.start_waiting(now, index);
            self.top_up(now, index);
            self.continue_close(index);
        }
        let sessions = &self.sessions;
        self.live.retain(|index| sessions.get(index).is_some_and(links::Session::is_live));
        let sessions = self.live.iter().filter_map(|index| self.sessions.get(index)?.next_deadline(&self.config));
        let calls = self.calls.values().filter_map(|c| c.next_deadline(&self.config));
        self.wake = sessions.chain(calls).min();
    }
}
