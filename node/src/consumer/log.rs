//! The provider's log as its consumer watches it.
//!
//! | what comes | what is done |
//! |---|---|
//! | a promise | kept in the ledger; it is to be kept by every later tree head |
//! | a tree head | kept by the node; against the last one of this provider a consistency proof is asked for, against the newest promise an inclusion proof |
//! | a proof | checked; one that fails is proof of misbehaviour, with the heads and hashes that were given |
//!
//! Two heads of one size with different roots need no proof: together they are one. One question is open at a time; a
//! provider that never answers keeps its promise unproven, which the ledger shows.

use super::{Consumer, ConsumerAction, SessionIndex};
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

/// Receipts of one session whose promise has not come; older ones are given up.
const MAX_UNPROMISED: usize = 64;

/// What a session knows of its provider's log.
#[derive(Debug, Default)]
pub(super) struct LogView {
    /// The provider speaks of its log.
    pub speaks: bool,
    unpromised: VecDeque<ReceiptId>,
    /// The newest promise that no proof has kept: index and leaf.
    promised: Option<(u64, Digest)>,
    asked: Option<Asked>,
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
    pub(super) fn await_promise(&mut self, index: SessionIndex, receipt: ReceiptId) {
        if let Some(session) = self.sessions.get_mut(&index) {
            let due = &mut session.log.unpromised;
            due.push_back(receipt);
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
        let Some(at) = session.log.unpromised.iter().position(|due| *due == promise.receipt) else { return };
        session.log.unpromised.remove(at);
        session.log.promised = Some((promise.index, promise.leaf));
        self.counters.promises += 1;
        self.append(vec![Draft::of(Evidence::Promise(signed))], Vec::new());
        self.ask_log(index);
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
        let sessions: Vec<SessionIndex> =
            self.sessions.iter().filter(|(_, session)| session.provider() == node).map(|(index, _)| *index).collect();
        // One proof is kept; every session with it ends its connection.
        for (n, index) in sessions.into_iter().enumerate() {
            if n == 0 {
                self.misbehaved(now, index, "two-histories", TWO_HISTORIES, fraud_file(proof));
            } else {
                self.drop_link(now, index, CloseCode::Violation, TWO_HISTORIES);
            }
        }
    }

    fn heard(&mut self, now: UnixMs, index: SessionIndex, provider: NodeKey, head: SignedCheckpoint) {
        let last = self.heads.get(&provider).cloned();
        if let Some(last) = &last
            && last.size == head.size
            && last.root != head.root
        {
            let proof = FraudProof { one: last.note().to_owned(), other: head.note().to_owned() };
            return self.misbehaved(now, index, "two-histories", TWO_HISTORIES, fraud_file(&proof));
        }
        if last.as_ref() == Some(&head) {
            return self.ask_log(index);
        }
        self.actions.push_back(ConsumerAction::Witness { note: head.note().to_owned() });
        let (old, new) = match last {
            None => (None, head),
            Some(last) if last.size <= head.size => (Some(last), head),
            // An older one came late: it must be a part of what is known.
            Some(last) => (Some(head), last),
        };
        if let (Some(old), Some(session)) = (old, self.sessions.get_mut(&index))
            && session.log.asked.is_none()
            && old.size > 0
        {
            self.heads.insert(provider, new.clone());
            return self.ask(index, Asked::Consistency { old: Box::new(old), new: Box::new(new) });
        }
        self.heads.insert(provider, new);
        self.ask_log(index);
    }

    /// Asks that the newest promise be kept, once a head covers it.
    fn ask_log(&mut self, index: SessionIndex) {
        let Some(session) = self.sessions.get(&index) else { return };
        let (Some((at, leaf)), None) = (session.log.promised, &session.log.asked) else { return };
        let Some(head) = self.heads.get(&session.provider()).filter(|head| head.size > at) else { return };
        let asked = Asked::Inclusion { index: at, leaf, head: Box::new(head.clone()) };
        self.ask(index, asked);
    }

    fn ask(&mut self, index: SessionIndex, asked: Asked) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let (Some(link), true) = (session.link, session.log.speaks) else { return };
        let frame = ConsumerControl::WantProof(asked.ask());
        session.log.asked = Some(asked);
        self.say(link, frame);
    }

    pub(super) fn proof(&mut self, now: UnixMs, index: SessionIndex, proof: LogProof) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(asked) = session.log.asked.take().filter(|asked| asked.ask() == proof.ask) else {
            return self.drop_link(now, index, CloseCode::Violation, "an answer about the log that was not asked for");
        };
        if !asked.is_answered_by(&proof.hashes) {
            let (rule, text) = match &asked {
                Asked::Inclusion { .. } => ("promise-broken", "its log does not hold the receipt that it promised"),
                Asked::Consistency { .. } => {
                    ("log-inconsistent", "its log does not extend the one that it showed before")
                }
            };
            return self.misbehaved(now, index, rule, text, cbor::encode(&proof));
        }
        if let Asked::Inclusion { index: at, .. } = asked
            && let Some(session) = self.sessions.get_mut(&index)
            && session.log.promised.is_some_and(|(promised, _)| promised == at)
        {
            session.log.promised = None;
            self.counters.promises_kept += 1;
        }
        self.ask_log(index);
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
