//! The fold itself: the file, the log, listings and quotes, and each entry handed to its session.

use super::{
    Balances, Finding, Party, Report, Rule, SideTotals,
    flows::{Backing, Ending, Flows, check_endings, judge},
    session::{Notes, SessionAudit},
    stages::Stages,
};
use crate::{
    books::{Books, BooksError},
    bundle::{BundleError, BundleReader, EntryItem, Filter, Header},
    entry::{Draft, Entry, Evidence, MAX_OPENING_LEN},
    log::{Frontier, SignedCheckpoint, leaf_hash, verify_inclusion},
    statements::ReceiptOpening,
    transfer::Account,
};
use satgrid_types::{
    Digest, ListingId, NodeKey, PaymentHash, Quote, QuoteId, SessionId, TransferId, UnixMs, VerifiedListing, cbor,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
};

/// A reservation may be expired this much after its timeout before it counts as forgotten.
const OVERDUE_GRACE_MS: u64 = 60 * 60 * 1_000;

/// How much a report holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Totals alone: memory does not grow with sessions that are over.
    Totals,
    /// Each session's summary, for tables and cross-checks.
    Sessions,
}

/// Audits a whole bundle.
pub fn audit<R: Read>(mut reader: BundleReader<R>, detail: Detail) -> Result<Report, BundleError> {
    let mut auditor = Auditor::new(reader.header(), reader.checkpoint(), detail);
    while let Some(item) = reader.next_entry()? {
        auditor.entry(&item);
    }
    Ok(auditor.finish())
}

/// What a payment hash stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Payment {
    Slice(SessionId, u32),
    Refund(SessionId),
}

/// The state of the fold.
#[derive(Debug)]
pub struct Auditor {
    pub(super) report: Report,
    pub(super) detail: Detail,
    pub(super) checkpoint: Option<SignedCheckpoint>,
    pub(super) frontier: Frontier,
    /// Where an entry of a whole export is a checkpoint: the root over the entries before it.
    pub(super) root_before: Option<Digest>,
    /// The entry before: its number, leaf and time.
    pub(super) last: Option<(u64, Digest, UnixMs)>,
    pub(super) network: Option<String>,
    /// The entry that began the journal; then every key that was its node's, the newest last.
    pub(super) genesis: Option<u64>,
    pub(super) keys: Vec<NodeKey>,
    pub(super) listings: BTreeMap<ListingId, VerifiedListing>,
    pub(super) quotes: BTreeMap<NodeKey, BTreeMap<QuoteId, Quote>>,
    pub(super) sessions: BTreeMap<SessionId, SessionAudit>,
    pub(super) by_key: BTreeMap<NodeKey, SessionId>,
    /// First halves of the ids of sessions that are over.
    pub(super) over: BTreeSet<[u8; 16]>,
    /// How many of those the header's filter does not select.
    pub(super) strays: u64,
    pub(super) payments: BTreeMap<PaymentHash, Payment>,
    /// First halves of all payment hashes that were ever invoiced or attempted.
    pub(super) hashes: BTreeSet<[u8; 16]>,
    pub(super) books: Books,
    pub(super) stages: Stages,
}

impl Auditor {
    /// Begins an audit of the journal that a header and a checkpoint announce.
    pub fn new(header: &Header, note: &str, detail: Detail) -> Auditor {
        let report = Report {
            node: header.node,
            keys: Vec::new(),
            filter: header.filter,
            entries: 0,
            checkpoint_size: None,
            checkpoint_root: None,
            first_at: None,
            last_at: None,
            as_provider: SideTotals::default(),
            as_consumer: SideTotals::default(),
            balances: Balances::new(),
            open_holds: 0,
            open_holds_msat: 0,
            misbehaviour: 0,
            findings: Vec::new(),
            findings_total: 0,
            sessions: BTreeMap::new(),
        };
        let mut auditor = Auditor {
            report,
            detail,
            checkpoint: None,
            frontier: Frontier::new(),
            root_before: None,
            last: None,
            network: None,
            genesis: None,
            keys: Vec::new(),
            listings: BTreeMap::new(),
            quotes: BTreeMap::new(),
            sessions: BTreeMap::new(),
            by_key: BTreeMap::new(),
            over: BTreeSet::new(),
            strays: 0,
            payments: BTreeMap::new(),
            hashes: BTreeSet::new(),
            books: Books::new(),
            stages: Stages::default(),
        };
        match SignedCheckpoint::parse(note) {
            Ok(signed) if signed.node == header.node => {
                auditor.report.checkpoint_size = Some(signed.size);
                auditor.report.checkpoint_root = Some(signed.root);
                auditor.checkpoint = Some(signed);
            }
            Ok(signed) => {
                auditor.find(
                    None,
                    Rule::LogCheckpoint,
                    format!("signed by {}, the journal is of {}", signed.node, header.node),
                );
            }
            Err(error) => auditor.find(None, Rule::LogCheckpoint, error.to_string()),
        }
        auditor
    }

    fn find(&mut self, entry: Option<u64>, rule: Rule, detail: impl Into<String>) {
        let finding = Finding { rule, entry, session: None, party: Party::Exporter, detail: detail.into() };
        self.report.push(finding);
    }

    /// Whether a key is, or was, of the node whose journal this is.
    pub(super) fn is_ours(&self, key: &NodeKey) -> bool {
        *key == self.report.node || self.keys.contains(key)
    }

    /// Sessions that are not over yet: what memory grows with.
    pub fn open_sessions(&self) -> usize {
        self.sessions.len()
    }

    pub(super) fn is_whole(&self) -> bool {
        self.report.filter == Filter::All
    }

    /// Takes the next entry.
    pub fn entry(&mut self, item: &EntryItem) {
        let leaf = leaf_hash(&item.entry);
        let position = self.report.entries;
        self.report.entries = self.report.entries.saturating_add(1);
        let mut entry = match Entry::decode(&item.entry) {
            Ok(entry) => entry,
            Err(error) => {
                self.frontier.push(leaf);
                self.find(Some(position), Rule::EntryCanonical, error.to_string());
                return;
            }
        };
        self.place(&entry, item, leaf);
        if let Some(bytes) = &item.opening {
            match cbor::decode_limited::<ReceiptOpening>(bytes, MAX_OPENING_LEN) {
                Ok(opening) if matches!(entry.evidence, Some(Evidence::Receipt { .. })) => {
                    entry.set_opening(Some(opening));
                }
                Ok(_) => self.find(Some(entry.seq), Rule::ReceiptOpening, "private fields beside something else"),
                Err(error) => self.find(Some(entry.seq), Rule::ReceiptOpening, error.to_string()),
            }
        }
        self.judge(&entry, leaf);
    }

    /// Sequence, chain, clock and place in the log.
    fn place(&mut self, entry: &Entry, item: &EntryItem, leaf: Digest) {
        let seq = entry.seq;
        let (next, follows) = match self.last {
            None => (0, seq == 0),
            Some((last, ..)) => {
                (last.saturating_add(1), if self.is_whole() { seq == last.saturating_add(1) } else { seq > last })
            }
        };
        if !follows {
            self.find(Some(seq), Rule::EntrySequence, format!("number {seq}, expected {next}"));
        }
        let adjacent = seq == next;
        let prev = self.last.map_or(Digest([0; 32]), |(_, leaf, _)| leaf);
        if adjacent && entry.prev != prev {
            self.find(Some(seq), Rule::EntryChain, format!("chained to {}, the entry before is {prev}", entry.prev));
        }
        if let Some((.., at)) = self.last
            && entry.at < at
        {
            self.find(Some(seq), Rule::EntryClock, format!("at {}, the entry before at {}", entry.at.0, at.0));
        }
        self.report.first_at = self.report.first_at.or(Some(entry.at));
        self.report.last_at = Some(entry.at);
        let is_checkpoint = matches!(entry.evidence, Some(Evidence::Checkpoint { .. }));
        self.root_before = (is_checkpoint && self.is_whole()).then(|| self.frontier.root());
        self.frontier.push(leaf);
        self.last = Some((seq, leaf, entry.at));
        match (&item.proof, &self.checkpoint) {
            (None, _) if self.is_whole() => {}
            (Some(proof), Some(checkpoint)) if !self.is_whole() => {
                if !verify_inclusion(&leaf, seq, checkpoint.size, proof, &checkpoint.root) {
                    self.find(Some(seq), Rule::LogInclusion, "the proof does not lead to the checkpoint's root");
                }
            }
            (Some(_), _) if self.is_whole() => {
                self.find(Some(seq), Rule::LogInclusion, "a proof in a whole export, where none belongs");
            }
            (None, _) => self.find(Some(seq), Rule::LogInclusion, "no proof in a partial export"),
            (Some(_), _) => {}
        }
    }

    /// Evidence, transfers, and both against each other.
    fn judge(&mut self, entry: &Entry, leaf: Digest) {
        let draft = Draft { evidence: None, transfers: entry.transfers.clone() };
        let flows = Flows::read(&self.books, entry.at, &draft.transfers);
        let mut notes = Notes::default();
        let (session, backing, by_wallet) = match &entry.evidence {
            Some(evidence) => self.evidence(entry, evidence, leaf, &flows, &mut notes),
            None => (flows.opened.iter().find_map(|(_, hold)| hold.session), Backing::Alone, false),
        };
        self.account_for_stages(entry, session, &mut notes);
        if (entry.seq == 0) != matches!(entry.evidence, Some(Evidence::Genesis { .. })) {
            notes.add(Rule::EntryGenesis, Party::Exporter, "the first entry, and it alone, is the genesis");
        }
        judge(&backing, &flows, &mut notes);
        if backing != Backing::Alone {
            check_endings(&flows, by_wallet, &mut notes);
        }
        self.check_holds(session, &flows, &mut notes);
        self.check_dust(entry, &flows, &mut notes);
        if let Err(error) = self.books.apply(entry.at, &draft) {
            let rule = match error {
                BooksError::Zero { .. }
                | BooksError::SameAccount { .. }
                | BooksError::Conflict { .. }
                | BooksError::TooMany { .. }
                | BooksError::Overflow { .. } => Rule::TransferMalformed,
                BooksError::NotPending { .. }
                | BooksError::Ended { .. }
                | BooksError::PostsMore { .. }
                | BooksError::NotDue { .. }
                | BooksError::NoTimeout { .. } => Rule::TransferTwoPhase,
                BooksError::Overdrawn { .. } => Rule::TransferOverdrawn,
            };
            notes.add(rule, Party::Exporter, error.to_string());
        } else if by_wallet && let Some(session) = session {
            let left = self.books.holds_of(session).any(|(_, hold)| hold.credit == Account::Lightning);
            notes.require(!left, Rule::TransferTwoPhase, Party::Exporter, || {
                "the payment is over and its reservation is not".into()
            });
        }
        let spent_from = notes.spent_from;
        self.write_down(entry.seq, session, notes);
        for session in session.into_iter().chain(spent_from) {
            self.retire(session);
        }
    }

    /// Workers' parts in requests, and the receipts that account for them.
    fn account_for_stages(&mut self, entry: &Entry, session: Option<SessionId>, notes: &mut Notes) {
        let (leg, counts) = (notes.leg.take(), notes.counts.take());
        let as_provider = session.and_then(|id| self.sessions.get(&id)).is_some_and(|audit| audit.as_provider);
        if !self.is_whole() {
            return;
        }
        // What this node did for another's request is that node's to account for.
        if let Some(leg) = leg.filter(|_| !as_provider) {
            let ours = self.is_ours(&leg.order.lead);
            return self.stages.bought(ours, leg, counts, notes);
        }
        match &entry.evidence {
            Some(Evidence::Receipt { receipt, .. }) if as_provider => {
                if let Ok(receipt) = receipt.peek() {
                    self.stages.sold(&receipt, notes);
                }
            }
            Some(Evidence::Request(open)) if as_provider => {
                if let Ok(open) = open.peek() {
                    self.stages.opened(&open.request);
                }
            }
            Some(Evidence::Abandoned { request, .. }) if as_provider => self.stages.dropped(request),
            Some(_) | None => {}
        }
    }

    /// A reservation of an open request may not expire under it.
    fn check_holds(&self, session: Option<SessionId>, flows: &Flows, notes: &mut Notes) {
        let expired = flows.ended.iter().filter(|(.., how)| *how == Ending::Expired);
        for (id, hold, _) in expired {
            let audit = hold.session.or(session).and_then(|session| self.sessions.get(&session));
            let live = audit.is_some_and(|audit| audit.requests.values().any(|request| request.holds.contains(id)));
            notes.require(!live, Rule::TransferTwoPhase, Party::Exporter, || {
                format!("{id} expired under an open request")
            });
        }
    }

    /// A remainder is the provider's to keep once nobody can claim it any more by its credit note.
    fn check_dust(&self, entry: &Entry, flows: &Flows, notes: &mut Notes) {
        let Some(session) = flows.to_dust() else { return };
        let until = self.sessions.get(&session).and_then(|audit| audit.note_until);
        notes.require(until.is_some_and(|until| until <= entry.at), Rule::TransferUnbacked, Party::Exporter, || {
            format!("the remainder of session {session} was kept, and its credit note runs until {until:?}")
        });
    }

    fn write_down(&mut self, seq: u64, session: Option<SessionId>, notes: Notes) {
        let Notes { found, delta, leg: _, counts: _, spent_from: _ } = notes;
        for (rule, party, detail) in found {
            let party = party.in_one_file(rule);
            self.report.push(Finding { rule, entry: Some(seq), session, party, detail });
        }
        if let Some(audit) = session.and_then(|session| self.sessions.get_mut(&session)) {
            audit.summarise(&delta);
            let side = if audit.as_provider { &mut self.report.as_provider } else { &mut self.report.as_consumer };
            side.add(&delta);
        }
    }

    /// Lets go of a session that is over.
    fn retire(&mut self, id: SessionId) {
        let over = self.sessions.get(&id).is_some_and(|audit| {
            audit.closed && audit.requests.is_empty() && audit.refund.is_none() && audit.remainder().is_zero()
        });
        if !over || self.books.holds_of(id).next().is_some() || !self.books.retire(id) {
            return;
        }
        if let Some(audit) = self.sessions.remove(&id) {
            if !self.selects(id, &audit) {
                self.strays = self.strays.saturating_add(1);
            }
            for slice in audit.slices.values() {
                self.payments.remove(&slice.hash);
                for (hash, _) in &slice.earlier {
                    self.payments.remove(hash);
                }
            }
            self.by_key.remove(&audit.consumer);
            self.report.sessions.extend(audit.summary.map(|summary| (id, summary)));
        }
        self.over.insert(half(&id.0));
    }

    /// Ends the audit: what only the whole can show.
    pub fn finish(mut self) -> Report {
        if self.report.entries == 0 {
            self.find(None, Rule::EntryGenesis, "no entries");
        }
        if let (Some(newest), begun) = (self.keys.last().copied(), self.genesis)
            && newest != self.report.node
        {
            let detail = format!("the header says {}, the journal is of {newest}", self.report.node);
            self.find(begun, Rule::BundleNode, detail);
        }
        self.report.keys = core::mem::take(&mut self.keys);
        if let (Some(checkpoint), true) = (self.checkpoint.clone(), self.is_whole()) {
            if checkpoint.size != self.report.entries {
                self.find(
                    None,
                    Rule::LogSize,
                    format!("{} entries, the checkpoint says {}", self.report.entries, checkpoint.size),
                );
            } else if checkpoint.root != self.frontier.root() {
                self.find(
                    None,
                    Rule::LogRoot,
                    format!("the root is {}, the checkpoint says {}", self.frontier.root(), checkpoint.root),
                );
            }
        }
        let (debits, credits) = self.books.trial_balance();
        if debits != credits {
            self.find(None, Rule::TransferTrial, format!("debits {debits}, credits {credits}"));
        }
        let last_at = self.report.last_at.unwrap_or_default();
        let overdue: Vec<(TransferId, UnixMs)> = self
            .books
            .holds()
            // A journal's time stands still while its clock was set back: what was reserved then is no older than its entry.
            .filter_map(|(id, hold)| hold.expires_at.map(|at| (*id, at.max(hold.since))))
            .filter(|(_, at)| at.0.saturating_add(OVERDUE_GRACE_MS) < last_at.0)
            .collect();
        for (id, at) in overdue {
            self.find(
                None,
                Rule::TransferOverdue,
                format!("{id} was to end at {}, the journal goes on to {}", at.0, last_at.0),
            );
        }
        for (_, hold) in self.books.holds() {
            self.report.open_holds = self.report.open_holds.saturating_add(1);
            self.report.open_holds_msat = self.report.open_holds_msat.saturating_add(hold.amount.0);
        }
        for account in self.books.accounts().map(|(account, _)| *account).collect::<Vec<_>>() {
            let balance = self.report.balances.entry(account.name()).or_default();
            *balance = balance.saturating_add(self.books.balance(&account));
        }
        let open = core::mem::take(&mut self.sessions);
        self.check_filter(&open);
        let summaries = open.into_iter().filter_map(|(id, audit)| Some((id, audit.summary?)));
        self.report.sessions.extend(summaries);
        self.report
    }

    /// Whether the header's filter selects the session. Whole ids are compared: the header is the exporter's word.
    fn selects(&self, id: SessionId, audit: &SessionAudit) -> bool {
        if !audit.credited.is_zero() || !audit.spent.is_zero() {
            // It comes with the one that it shares credit with.
            return true;
        }
        match self.report.filter {
            Filter::All | Filter::Time(..) => true,
            Filter::Session(only) => id == only,
            Filter::Peer(peer) => audit.provider == peer || audit.consumer == peer,
        }
    }

    /// A partial export holds no other session than the header says.
    fn check_filter(&mut self, open: &BTreeMap<SessionId, SessionAudit>) {
        if self.strays > 0 {
            self.find(None, Rule::BundleFilter, format!("{} other sessions that are over", self.strays));
        }
        for id in open.iter().filter(|(id, audit)| !self.selects(**id, audit)).map(|(id, _)| *id).collect::<Vec<_>>() {
            self.find(None, Rule::BundleFilter, format!("session {id}"));
        }
    }
}

impl SideTotals {
    fn add(&mut self, delta: &SideTotals) {
        let SideTotals {
            sessions,
            requests,
            receipts,
            abandoned,
            acks,
            prompt_tokens,
            cached_tokens,
            output_tokens,
            slices,
            paid_msat,
            charged_msat,
            refunded_msat,
        } = self;
        for (sum, part) in [
            (sessions, delta.sessions),
            (requests, delta.requests),
            (receipts, delta.receipts),
            (abandoned, delta.abandoned),
            (acks, delta.acks),
            (prompt_tokens, delta.prompt_tokens),
            (cached_tokens, delta.cached_tokens),
            (output_tokens, delta.output_tokens),
            (slices, delta.slices),
            (paid_msat, delta.paid_msat),
            (charged_msat, delta.charged_msat),
            (refunded_msat, delta.refunded_msat),
        ] {
            *sum = sum.saturating_add(part);
        }
    }
}

/// The first half of an id: enough to tell it again, at half the memory.
pub(super) fn half(bytes: &[u8; 32]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&bytes[..16]);
    out
}
