//! Which entries a partial export holds: whole sessions, the quotes and listings that they stand on, and the genesis.
//!
//! Sessions between which a credit note moved come together, since the one's balance is the other's remainder.
//! A session is known only once it was opened, and its quote and listing come before that: so the journal is read
//! twice, first by [`Selector::observe`], then by [`Selection::wants`].

use super::Filter;
use crate::{
    entry::{Entry, Evidence},
    statements::{SessionOpen, receipt_id},
    transfer::TransferOp,
};
use lightning_invoice::SignedRawBolt11Invoice;
use satgrid_types::{ListingId, NodeKey, NostrEvent, PaymentHash, ReceiptId, SessionId, TransferId, statement_id};
use std::collections::{BTreeMap, BTreeSet};

/// What one entry belongs to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Subjects {
    pub sessions: BTreeSet<SessionId>,
    /// The session key that a quote is for.
    pub quoted: Option<NodeKey>,
    pub listing: Option<ListingId>,
}

/// Which session a payment or a reservation belongs to, learned entry by entry.
#[derive(Debug, Default, Clone)]
pub struct Subjected {
    payments: BTreeMap<PaymentHash, SessionId>,
    holds: BTreeMap<TransferId, SessionId>,
}

impl Subjected {
    /// What the entry belongs to. Unreadable statements belong to nothing.
    pub fn of(&mut self, entry: &Entry) -> Subjects {
        let mut subjects = Subjects::default();
        for transfer in &entry.transfers {
            match transfer.op {
                TransferOp::Post { debit, credit, .. } => {
                    subjects.sessions.extend(debit.session().or(credit.session()));
                }
                TransferOp::Pending { debit, credit, .. } => {
                    if let Some(session) = debit.session().or(credit.session()) {
                        self.holds.insert(transfer.id, session);
                        subjects.sessions.insert(session);
                    }
                }
                TransferOp::PostPending { pending, .. }
                | TransferOp::VoidPending { pending }
                | TransferOp::ExpirePending { pending } => {
                    subjects.sessions.extend(self.holds.remove(&pending));
                }
            }
        }
        let Some(evidence) = &entry.evidence else { return subjects };
        let session = match evidence {
            Evidence::Listing { event_json } => {
                subjects.listing = NostrEvent::from_json(event_json).ok().map(|event| event.id);
                None
            }
            Evidence::Quote(quote) => {
                subjects.quoted = quote.peek().ok().map(|quote| quote.consumer);
                None
            }
            Evidence::Open(open) => Some(SessionId(statement_id::<SessionOpen>(open.body()))),
            Evidence::Invoice { session, bolt11, .. } => {
                if let Some(hash) = payment_hash(bolt11) {
                    self.payments.insert(hash, *session);
                }
                Some(*session)
            }
            Evidence::PaymentAttempted { session, payment_hash, .. }
            | Evidence::RefundAttempted { session, payment_hash, .. }
            | Evidence::RefundSettled { session, payment_hash, .. }
            | Evidence::RefundReceived { session, payment_hash, .. } => {
                self.payments.insert(*payment_hash, *session);
                Some(*session)
            }
            Evidence::PaymentSettled { payment_hash, .. }
            | Evidence::PaymentFailed { payment_hash, .. }
            | Evidence::PaymentReceived { payment_hash, .. } => self.payments.get(payment_hash).copied(),
            Evidence::Request(request) => request.peek().ok().map(|request| request.session),
            Evidence::Ack(ack) => ack.peek().ok().map(|ack| ack.session),
            Evidence::Receipt { receipt, .. } => receipt.peek().ok().map(|receipt| receipt.session),
            Evidence::Abandoned { session, .. } => Some(*session),
            Evidence::Close(close) => close.peek().ok().map(|close| close.session),
            Evidence::CreditNote(note) => note.peek().ok().map(|note| note.session),
            Evidence::Genesis { .. }
            | Evidence::ChannelClosed { .. }
            | Evidence::WalletPayment { .. }
            | Evidence::OnChain { .. }
            | Evidence::Succession(_)
            | Evidence::Misbehaviour { .. }
            | Evidence::WalletSnapshot { .. }
            | Evidence::Checkpoint { .. } => None,
            Evidence::Promise(promise) => promise.peek().ok().map(|promise| promise.session),
            Evidence::CreditTransfer(both) => both.peek().ok().map(|transfer| {
                subjects.sessions.insert(transfer.from);
                transfer.to
            }),
        };
        subjects.sessions.extend(session);
        subjects
    }
}

/// The payment hash in a BOLT 11 text, its signature not judged.
fn payment_hash(bolt11: &str) -> Option<PaymentHash> {
    let invoice: SignedRawBolt11Invoice = bolt11.parse().ok()?;
    invoice.payment_hash().map(|hash| PaymentHash(*AsRef::<[u8; 32]>::as_ref(&hash.0)))
}

/// First pass: finds the sessions.
#[derive(Debug, Clone)]
pub struct Selector {
    filter: Filter,
    subjected: Subjected,
    /// By session key, the listings that its quotes name.
    quoted: BTreeMap<NodeKey, BTreeSet<ListingId>>,
    /// Sessions between which credit moved: neither can be judged without the other.
    linked: Vec<(SessionId, SessionId)>,
    /// Sessions opened, with their provider and session key.
    opened: BTreeMap<SessionId, (NodeKey, NodeKey)>,
    /// The last receipt of each session, as far as receipts are here.
    receipts: BTreeMap<SessionId, ReceiptId>,
    /// Sessions whose close names another one.
    unreceipted: BTreeSet<SessionId>,
    /// Sessions of entries whose bodies were let go; none where there are no such entries.
    pruned: Option<BTreeSet<SessionId>>,
    selection: Selection,
}

/// Second pass: tells which entries belong to them.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    whole: bool,
    sessions: BTreeSet<SessionId>,
    keys: BTreeSet<NodeKey>,
    listings: BTreeSet<ListingId>,
    left_out: usize,
    subjected: Subjected,
}

impl Selector {
    pub fn new(filter: Filter) -> Selector {
        let whole = matches!(filter, Filter::All);
        Selector {
            filter,
            subjected: Subjected::default(),
            quoted: BTreeMap::new(),
            linked: Vec::new(),
            opened: BTreeMap::new(),
            receipts: BTreeMap::new(),
            unreceipted: BTreeSet::new(),
            pruned: None,
            selection: Selection { whole, ..Selection::default() },
        }
    }
    pub fn observe(&mut self, entry: &Entry) {
        if self.selection.whole {
            return;
        }
        let subjects = self.subjected.of(entry);
        match &entry.evidence {
            Some(Evidence::Quote(quote)) => {
                if let Ok(quote) = quote.peek() {
                    self.quoted.entry(quote.consumer).or_default().insert(quote.listing);
                }
            }
            Some(Evidence::Open(open)) => {
                if let (Some(session), Ok(open)) = (subjects.sessions.first(), open.peek()) {
                    self.opened.insert(*session, (open.provider, open.consumer));
                }
            }
            Some(Evidence::Receipt { receipt, .. }) => {
                let id = receipt_id(receipt);
                self.receipts.extend(receipt.peek().ok().map(|receipt| (receipt.session, id)));
            }
            Some(Evidence::Close(close)) => {
                if let Ok(close) = close.peek()
                    && close.last_receipt != self.receipts.get(&close.session).copied()
                {
                    self.unreceipted.insert(close.session);
                }
            }
            Some(Evidence::CreditTransfer(both)) => self.linked.extend(both.peek().ok().map(|t| (t.from, t.to))),
            _ => {}
        }
        if let Filter::Time(from, to) = self.filter
            && from <= entry.at
            && entry.at < to
        {
            self.selection.sessions.extend(subjects.sessions);
        }
    }
    /// Takes an entry whose body was let go, in its place: its session can no longer be shown.
    pub fn observe_pruned(&mut self, entry: &Entry) {
        let sessions = self.subjected.of(entry).sessions;
        self.pruned.get_or_insert_default().extend(sessions);
    }
    /// Ends the first pass.
    pub fn select(mut self) -> Selection {
        let selection = &mut self.selection;
        match self.filter {
            Filter::Peer(key) => {
                let of_peer =
                    self.opened.iter().filter(|(_, (provider, consumer))| *provider == key || *consumer == key);
                selection.sessions.extend(of_peer.map(|(session, _)| *session));
            }
            Filter::Session(session) => {
                selection.sessions.extend(self.opened.contains_key(&session).then_some(session));
            }
            Filter::All | Filter::Time(..) => {}
        }
        loop {
            let known = selection.sessions.len();
            for (one, other) in &self.linked {
                if selection.sessions.contains(one) || selection.sessions.contains(other) {
                    selection.sessions.extend([*one, *other]);
                }
            }
            if selection.sessions.len() == known {
                break;
            }
        }
        if let Some(pruned) = &self.pruned {
            // Half a session says what is not so, and of whoever closed it.
            let found = selection.sessions.len();
            selection.sessions.retain(|id| !pruned.contains(id) && !self.unreceipted.contains(id));
            keep_linked(&mut selection.sessions, &self.linked);
            selection.left_out = found.saturating_sub(selection.sessions.len());
        }
        let keys = selection.sessions.iter().filter_map(|session| self.opened.get(session));
        selection.keys = keys.map(|(_, consumer)| *consumer).collect();
        let listings = selection.keys.iter().filter_map(|key| self.quoted.get(key));
        selection.listings = listings.flatten().copied().collect();
        self.selection
    }
}

/// Drops every session whose partner is not there: between linked ones credit moved, and neither is shown without the other.
pub(crate) fn keep_linked(sessions: &mut BTreeSet<SessionId>, linked: &[(SessionId, SessionId)]) {
    loop {
        let found = sessions.len();
        for (one, other) in linked {
            if !sessions.contains(one) || !sessions.contains(other) {
                sessions.remove(one);
                sessions.remove(other);
            }
        }
        if sessions.len() == found {
            break;
        }
    }
}

impl Selection {
    /// Sessions that were found; not meaningful for a whole export.
    pub fn sessions(&self) -> &BTreeSet<SessionId> {
        &self.sessions
    }
    /// Sessions that were found and are not shown, since their bodies were let go.
    pub fn left_out(&self) -> usize {
        self.left_out
    }
    /// Whether the export holds this entry. Called for every entry, in order.
    pub fn wants(&mut self, entry: &Entry) -> bool {
        // Whose journal it is, from its beginning to its newest key.
        if self.whole || entry.seq == 0 || matches!(entry.evidence, Some(Evidence::Succession(_))) {
            return true;
        }
        let subjects = self.subjected.of(entry);
        subjects.sessions.iter().any(|session| self.sessions.contains(session))
            || subjects.quoted.is_some_and(|key| self.keys.contains(&key))
            || subjects.listing.is_some_and(|listing| self.listings.contains(&listing))
    }
}
