//! The provider's log as its consumer watches it.
//!
//! | what comes | what is done |
//! |---|---|
//! | a promise | kept in the ledger; it is to be kept by every later tree head |
//! | a tree head | kept by the node; a consistency proof must join it to the last one of this provider that was joined, an inclusion proof to the newest promise |
//! | a proof | checked; one that fails is proof of misbehaviour, with the heads and hashes that were given |
//!
//! Two heads of one size with different roots need no proof: together they are one. One question is open at a time. A
//! provider that is silent is found by its deadline (`ConsumerConfig::log_ms`, counted while it is connected): a receipt
//! without a promise is `promise-overdue`; a promise that no head covers, or a question without an answer, `log-silent`.

use super::{
    Consumer, ConsumerAction, ConsumerConfig, SessionIndex,
    links::{Phase, Session},
};
use crate::CloseCode;
use satgrid_ledger::{
    bundle::write_fraud,
    entry::{Draft, Evidence},
    log::{FraudProof, SignedCheckpoint, verify_consistency, verify_inclusion},
    statements::InclusionPromise,
};
use satgrid_protocol::frame::{ConsumerControl, LogAsk, LogProof};
use satgrid_types::{Digest, NodeKey, ReceiptId, Signed, UnixMs, cbor};
use std::collections::VecDeque;

/// Tree heads of one session that no proof has joined to the others yet: more than come before an answer is overdue.
const MAX_UNJOINED: usize = 64;
/// Receipts of one session whose promise has not come; older ones are given up.
const MAX_UNPROMISED: usize = 64;

/// What a session knows of its provider's log.
#[derive(Debug, Default)]
pub(super) struct LogView {
    /// The provider speaks of its log.
    pub speaks: bool,
    /// Receipts whose promise is due, and since when; without a time where the connection broke meanwhile.
    unpromised: VecDeque<(ReceiptId, Option<UnixMs>)>,
    /// The newest promise that no proof has kept, and since when it waits for a head that covers it.
    promised: Option<(Signed<InclusionPromise>, u64, Digest)>,
    uncovered: Option<UnixMs>,
    /// Heads that no proof has joined to the others yet, in the order in which they came; of the first it is asked. They
    /// outlive the connection: who showed another history and hung up owes the proof when it is back.
    unjoined: VecDeque<SignedCheckpoint>,
    asked: Option<(Asked, UnixMs)>,
}

/// A question, and what its answer is checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    Inclusion { index: u64, leaf: Digest, head: Box<SignedCheckpoint> },
    Consistency { old: Box<SignedCheckpoint>, new: Box<SignedCheckpoint> },
}

impl LogView {
    /// The connection is gone, and with it what was asked on it.
    pub(super) fn unlinked(&mut self) {
        self.asked = None;
        self.uncovered = None;
        self.unpromised.iter_mut().for_each(|(_, since)| *since = None);
    }
    /// Our clock was moved: what the provider owes is owed from now.
    pub(super) fn clock_moved(&mut self, now: UnixMs) {
        self.unpromised.iter_mut().filter_map(|(_, since)| since.as_mut()).for_each(|since| *since = now);
        self.uncovered = self.uncovered.map(|_| now);
        if let Some((_, since)) = &mut self.asked {
            *since = now;
        }
    }
    /// The provider is connected, and speaks of its log or does not.
    pub(super) fn linked(&mut self, now: UnixMs, speaks: bool) {
        self.speaks = speaks;
        self.uncovered = self.promised.is_some().then_some(now);
    }
    /// Since when the provider owes what it has not said.
    fn owes_since(&self) -> Option<UnixMs> {
        let promise = self.unpromised.iter().filter_map(|(_, since)| *since).min();
        let asked = self.asked.as_ref().map(|(_, since)| *since);
        [promise, self.uncovered, asked].into_iter().flatten().min().filter(|_| self.speaks)
    }
    pub(super) fn next_deadline(&self, config: &ConsumerConfig) -> Option<UnixMs> {
        self.owes_since().map(|since| since.plus_ms(config.log_ms))
    }
}

impl Asked {
    fn ask(&self) -> LogAsk {
        match self {
            Asked::Inclusion { index, head, .. } => LogAsk::Inclusion(*index, head.size),
            Asked::Consistency { old, new } => LogAsk::Consistency(old.size, new.size),
        }
    }
    fn is_answered_by(&self, hashes: &[Digest]) -> bool {
        match self {
            Asked::Inclusion { index, leaf, head } => verify_inclusion(leaf, *index, head.size, hashes, &head.root),
            Asked::Consistency { old, new } => verify_consistency(old.size, new.size, &old.root, &new.root, hashes),
        }
    }
}

impl Consumer {
    /// A receipt was countersigned: its promise is due.
    pub(super) fn await_promise(&mut self, now: UnixMs, index: SessionIndex, receipt: ReceiptId) {
        if let Some(session) = self.sessions.get_mut(&index) {
            let since = session.link.map(|_| now);
            let due = &mut session.log.unpromised;
            due.push_back((receipt, since));
            if due.len() > MAX_UNPROMISED {
                due.pop_front();
            }
        }
    }

    pub(super) fn promised(&mut self, now: UnixMs, index: SessionIndex, signed: Signed<InclusionPromise>) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let (provider, id) = (session.provider(), session.state.as_ref().map(|state| state.id()));
        let promise = match signed.verify(&provider) {
            Ok(promise) if promise.node == provider && Some(promise.session) == id => promise,
            Ok(_) | Err(_) => {
                return self.drop_link(
                    now,
                    index,
                    CloseCode::Violation,
                    "a promise that is not of this session's provider",
                );
            }
        };
        // One of a receipt that is no longer waited for says nothing new.
        let Some(at) = session.log.unpromised.iter().position(|(due, _)| *due == promise.receipt) else { return };
        session.log.unpromised.remove(at);
        session.log.promised = Some((signed.clone(), promise.index, promise.leaf));
        session.log.uncovered = session.log.uncovered.or(Some(now));
        self.counters.promises += 1;
        self.append(vec![Draft::of(Evidence::Promise(signed))], Vec::new());
        self.ask_log(now, index);
    }

    pub(super) fn tree_head(&mut self, now: UnixMs, index: SessionIndex, note: &str) {
        let Some(provider) = self.sessions.get(&index).map(|session| session.provider()) else { return };
        let head = match SignedCheckpoint::parse(note) {
            Ok(head) if head.node == provider => head,
            Ok(_) | Err(_) => {
                return self.drop_link(now, index, CloseCode::Violation, "a tree head that the provider did not sign");
            }
        };
        self.heard(now, index, provider, head);
    }

    /// The node's own store, or another of its ears, holds a head of this provider that contradicts one it gave us.
    pub(super) fn second_history(&mut self, now: UnixMs, proof: &FraudProof) {
        let Ok(node) = proof.check() else { return };
        if !self.two_faced.insert(node) {
            // Relays go on repeating its heads: one proof says all.
            return;
        }
        let sessions: Vec<SessionIndex> =
            self.sessions.iter().filter(|(_, session)| session.provider() == node).map(|(index, _)| *index).collect();
        if sessions.is_empty() {
            // It was heard of and not dealt with yet: that is kept, and it stays so for a while.
            self.keep_against(now, node, "two-histories", TWO_HISTORIES, fraud_file(proof));
        }
        // One proof is kept; every session with it ends its connection.
        for (n, index) in sessions.into_iter().enumerate() {
            if n == 0 {
                self.misbehaved(now, index, "two-histories", TWO_HISTORIES, fraud_file(proof));
            } else {
                self.drop_link(now, index, CloseCode::Violation, TWO_HISTORIES);
            }
        }
    }

    /// A head of another size than any that the provider gave us says nothing by itself: the provider must join the two. It is
    /// asked while a session with it is up.
    pub(super) fn others_head(&mut self, now: UnixMs, head: SignedCheckpoint) {
        let ready = |session: &Session| session.phase == Phase::Ready && session.log.speaks;
        let of_it = |session: &Session| session.link.is_some() && session.provider() == head.node;
        let found = self.sessions.iter_mut().find(|(_, session)| ready(session) && of_it(session));
        let Some((&index, session)) = found else { return };
        // What relays repeat does not crowd out what the provider itself says.
        let unjoined = &mut session.log.unjoined;
        if unjoined.len() < MAX_UNJOINED / 2 && !unjoined.contains(&head) {
            unjoined.push_back(head);
            self.ask_log(now, index);
        }
    }

    fn heard(&mut self, now: UnixMs, index: SessionIndex, provider: NodeKey, head: SignedCheckpoint) {
        let last = self.heads.get(&provider).cloned();
        if let Some(last) = &last
            && last.size == head.size
            && last.root != head.root
        {
            let proof = FraudProof { one: last.note().to_owned(), other: head.note().to_owned() };
            return match self.two_faced.insert(provider) {
                true => self.misbehaved(now, index, "two-histories", TWO_HISTORIES, fraud_file(&proof)),
                false => self.drop_link(now, index, CloseCode::Violation, TWO_HISTORIES),
            };
        }
        if last.as_ref() == Some(&head) {
            return self.ask_log(now, index);
        }
        self.actions.push_back(ConsumerAction::Witness { note: head.note().to_owned() });
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let unjoined = &mut session.log.unjoined;
        if last.is_none() {
            self.heads.insert(provider, head);
        } else if !unjoined.contains(&head) {
            unjoined.push_back(head);
        }
        if unjoined.len() > MAX_UNJOINED {
            return self.drop_link(now, index, CloseCode::Violation, "more tree heads than it has proved");
        }
        self.ask_log(now, index);
    }

    /// Asks for the proof that joins the first unjoined head to what is known of this log.
    fn ask_to_join(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index).filter(|session| session.log.asked.is_none()) else { return };
        let provider = session.provider();
        while let Some(head) = session.log.unjoined.front() {
            let known = self.heads.entry(provider).or_insert_with(|| head.clone());
            // Two of one size with different roots are a proof by themselves; whoever keeps all heads finds it.
            if head.size == known.size || head.size == 0 {
                session.log.unjoined.pop_front();
                continue;
            }
            // An older one came late: it must be a part of what is known.
            let (old, new) = if known.size < head.size { (&*known, head) } else { (head, &*known) };
            if old.size == 0 {
                // Every log extends the empty one.
                *known = head.clone();
                session.log.unjoined.pop_front();
                continue;
            }
            let asked = Asked::Consistency { old: Box::new(old.clone()), new: Box::new(new.clone()) };
            return self.ask(now, index, asked);
        }
    }

    fn ask_log(&mut self, now: UnixMs, index: SessionIndex) {
        self.ask_to_join(now, index);
        self.ask_to_keep(now, index);
    }

    /// Asks that the newest promise be kept, once a head covers it.
    fn ask_to_keep(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let (Some((_, at, leaf)), None) = (&session.log.promised, &session.log.asked) else { return };
        let Some(head) = self.heads.get(&session.provider()).filter(|head| head.size > *at) else { return };
        let asked = Asked::Inclusion { index: *at, leaf: *leaf, head: Box::new(head.clone()) };
        session.log.uncovered = None;
        self.ask(now, index, asked);
    }

    fn ask(&mut self, now: UnixMs, index: SessionIndex, asked: Asked) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let (Some(link), true) = (session.link, session.log.speaks) else { return };
        let frame = ConsumerControl::WantProof(asked.ask());
        session.log.asked = Some((asked, now));
        self.say(link, frame);
    }

    pub(super) fn proof(&mut self, now: UnixMs, index: SessionIndex, proof: LogProof) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some((asked, _)) = session.log.asked.take().filter(|(asked, _)| asked.ask() == proof.ask) else {
            return self.drop_link(now, index, CloseCode::Violation, "an answer about the log that was not asked for");
        };
        if !asked.is_answered_by(&proof.hashes) {
            let (rule, text) = match &asked {
                Asked::Inclusion { .. } => ("promise-broken", "its log does not hold the receipt that it promised"),
                Asked::Consistency { .. } => {
                    // It is found; asked again it would be found again.
                    session.log.unjoined.pop_front();
                    ("log-inconsistent", "its log does not extend the one that it showed before")
                }
            };
            return self.misbehaved(now, index, rule, text, cbor::encode(&proof));
        }
        match asked {
            Asked::Inclusion { index: at, .. } => {
                if session.log.promised.as_ref().is_some_and(|(_, promised, _)| *promised == at) {
                    session.log.promised = None;
                    self.counters.promises_kept += 1;
                }
            }
            Asked::Consistency { old, new } => {
                // Where another session's answer moved on meanwhile, this head is not joined to what is known now.
                let known = self.heads.get(&session.provider());
                if known.is_some_and(|known| *known == *old || *known == *new) {
                    session.log.unjoined.pop_front();
                    self.heads.insert(session.provider(), *new);
                }
                // In turns: heads that relays repeat must not keep the promise's question waiting until it is overdue.
                self.ask_to_keep(now, index);
            }
        }
        self.ask_log(now, index);
    }

    /// A provider that owes a word about its log for too long is left; what it owes stands in the ledger under a name.
    pub(super) fn tick_log(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index).filter(|s| s.link.is_some()) else { return };
        if session.log.next_deadline(&self.config).is_none_or(|at| at > now) {
            return;
        }
        let past = |since: UnixMs| now.since(since) >= self.config.log_ms;
        if let Some((asked, since)) = &session.log.asked
            && past(*since)
        {
            let unanswered = cbor::encode(&LogProof { ask: asked.ask(), hashes: Vec::new() });
            return self.misbehaved(now, index, "log-silent", "it does not answer for its log", unanswered);
        }
        if let (Some((promise, ..)), Some(since)) = (&session.log.promised, session.log.uncovered)
            && past(since)
        {
            let promise = cbor::encode(promise);
            let text = "it signs no tree head that covers what it promised";
            return self.misbehaved(now, index, "log-silent", text, promise);
        }
        let overdue = session.log.unpromised.iter().position(|(_, since)| since.is_some_and(past));
        if let Some((receipt, _)) = overdue.and_then(|at| session.log.unpromised.remove(at)) {
            let text = "it does not promise that its log holds a receipt that both signed";
            self.misbehaved(now, index, "promise-overdue", text, receipt.0.to_vec());
        }
    }
}

const TWO_HISTORIES: &str = "two tree heads of one size with different roots: it keeps two histories";

/// A fraud proof as the file that `satgrid-ledger verify` judges.
fn fraud_file(proof: &FraudProof) -> Vec<u8> {
    let mut out = Vec::new();
    // Writing to memory does not fail.
    let _ = write_fraud(&mut out, proof);
    out
}
