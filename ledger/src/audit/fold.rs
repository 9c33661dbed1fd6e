//! The fold itself: the file, the log, listings and quotes, and each entry handed to its session.

use super::{
    Balances, Finding, Party, Report, Rule, SideTotals,
    flows::{Backing, Ending, Flows, Reserves, check_endings, judge},
    session::{Notes, SessionAudit},
};
use crate::{
    books::{Books, BooksError},
    bundle::{BundleError, BundleReader, EntryItem, Filter, Header},
    entry::{Draft, Entry, Evidence, MAX_OPENING_LEN},
    log::{Frontier, SignedCheckpoint, leaf_hash, verify_inclusion},
    statements::{ReceiptOpening, SessionOpen, session_id},
    transfer::Account,
};
use satgrid_types::{
    Digest, ListingId, Msat, NodeKey, NostrEvent, PaymentHash, Quote, QuoteId, SessionId, Signed, Statement,
    TransferId, UnixMs, VerifiedListing, cbor, verify_listing,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
};

/// A reservation may be expired this much after its timeout before it counts as forgotten.
const OVERDUE_GRACE_MS: u64 = 60 * 60 * 1_000;
/// How far two parties' clocks may be apart.
const CLOCK_SKEW_MS: u64 = 5 * 60 * 1_000;
/// Quotes and listings that ran out this long ago are forgotten.
const FORGET_MS: u64 = 24 * 60 * 60 * 1_000;
/// From so many on, they are looked through.
const FORGET_FROM: usize = 4_096;

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
enum Payment {
    Slice(SessionId, u32),
    Refund(SessionId),
}

/// The state of the fold.
#[derive(Debug)]
pub struct Auditor {
    report: Report,
    detail: Detail,
    checkpoint: Option<SignedCheckpoint>,
    frontier: Frontier,
    /// The entry before: its number, leaf and time.
    last: Option<(u64, Digest, UnixMs)>,
    network: Option<String>,
    listings: BTreeMap<ListingId, VerifiedListing>,
    quotes: BTreeMap<NodeKey, BTreeMap<QuoteId, Quote>>,
    sessions: BTreeMap<SessionId, SessionAudit>,
    by_key: BTreeMap<NodeKey, SessionId>,
    over: BTreeSet<[u8; 16]>,
    payments: BTreeMap<PaymentHash, Payment>,
    /// First halves of all payment hashes that were ever invoiced or attempted.
    hashes: BTreeSet<[u8; 16]>,
    books: Books,
}

impl Auditor {
    /// Begins an audit of the journal that a header and a checkpoint announce.
    pub fn new(header: &Header, note: &str, detail: Detail) -> Auditor {
        let report = Report {
            node: header.node,
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
            last: None,
            network: None,
            listings: BTreeMap::new(),
            quotes: BTreeMap::new(),
            sessions: BTreeMap::new(),
            by_key: BTreeMap::new(),
            over: BTreeSet::new(),
            payments: BTreeMap::new(),
            hashes: BTreeSet::new(),
            books: Books::new(),
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

    /// Sessions that are not over yet: what memory grows with.
    pub fn open_sessions(&self) -> usize {
        self.sessions.len()
    }

    fn is_whole(&self) -> bool {
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
        if (entry.seq == 0) != matches!(entry.evidence, Some(Evidence::Genesis { .. })) {
            notes.add(Rule::EntryGenesis, Party::Exporter, "the first entry, and it alone, is the genesis");
        }
        judge(&backing, &flows, &mut notes);
        if backing != Backing::Alone {
            check_endings(&flows, by_wallet, &mut notes);
        }
        self.check_holds(session, &flows, &mut notes);
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
        self.write_down(entry.seq, session, notes);
        if let Some(session) = session {
            self.retire(session);
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

    fn write_down(&mut self, seq: u64, session: Option<SessionId>, notes: Notes) {
        let Notes { found, delta } = notes;
        for (rule, party, detail) in found {
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
            audit.slices.values().for_each(|slice| {
                self.payments.remove(&slice.hash);
            });
            self.by_key.remove(&audit.consumer);
            self.report.sessions.extend(audit.summary.map(|summary| (id, summary)));
        }
        self.over.insert(half(&id.0));
    }

    /// Reads one entry's evidence: whose session it is, what it justifies, and whether it is the wallet's word.
    fn evidence(
        &mut self,
        entry: &Entry,
        evidence: &Evidence,
        leaf: Digest,
        flows: &Flows,
        notes: &mut Notes,
    ) -> (Option<SessionId>, Backing, bool) {
        let nothing = || Backing::Exactly(Vec::new(), Reserves::Nothing);
        let opened = || -> Vec<TransferId> { flows.opened.iter().map(|(id, _)| *id).collect() };
        match evidence {
            Evidence::Genesis { node, network, .. } => {
                notes.require(*node == self.report.node, Rule::BundleNode, Party::Exporter, || {
                    format!("the header says {}, the journal is of {node}", self.report.node)
                });
                self.network = known_network(network);
                (None, nothing(), false)
            }
            Evidence::Listing { event_json } => {
                self.listing(event_json, notes);
                (None, nothing(), false)
            }
            Evidence::Quote(signed) => (self.quote(entry, signed, notes), nothing(), false),
            Evidence::Open(signed) => (self.open(signed, notes), nothing(), false),
            Evidence::Invoice { session, k, bolt11, descriptor } => {
                let network = self.network.clone();
                let mut hash = None;
                let backing = self.with(*session, notes, |audit, notes| {
                    let (backing, read) = audit.invoice(*k, bolt11, descriptor, network.as_deref(), notes);
                    hash = read;
                    backing
                });
                if let Some(hash) = hash {
                    self.claim(hash, Payment::Slice(*session, *k), notes);
                }
                (Some(*session), backing, false)
            }
            Evidence::PaymentAttempted { session, k, payment_hash, max_fee } => {
                let pay =
                    |audit: &mut SessionAudit, notes: &mut Notes| audit.attempted(*k, *payment_hash, *max_fee, notes);
                (Some(*session), self.with(*session, notes, pay), false)
            }
            Evidence::PaymentSettled { payment_hash, preimage, amount, fee } => {
                let paid = (*payment_hash, *preimage);
                let take =
                    |audit: &mut SessionAudit, k, notes: &mut Notes| audit.settled(k, paid, (*amount, *fee), notes);
                self.with_slice(*payment_hash, notes, take)
            }
            Evidence::PaymentReceived { payment_hash, amount } => {
                let take =
                    |audit: &mut SessionAudit, k, notes: &mut Notes| audit.received(k, *payment_hash, *amount, notes);
                self.with_slice(*payment_hash, notes, take)
            }
            Evidence::PaymentFailed { payment_hash, .. } => match self.payments.get(payment_hash).copied() {
                Some(Payment::Refund(session)) => {
                    let failed = |audit: &mut SessionAudit, _: &mut Notes| audit.refund_failed();
                    (Some(session), self.with(session, notes, failed), true)
                }
                Some(Payment::Slice(..)) | None => {
                    let take = |audit: &mut SessionAudit, k, notes: &mut Notes| audit.failed(k, *payment_hash, notes);
                    self.with_slice(*payment_hash, notes, take)
                }
            },
            Evidence::Request(signed) => match signed.peek() {
                Ok(open) => {
                    let session = open.session;
                    let take =
                        |audit: &mut SessionAudit, notes: &mut Notes| audit.request(signed, open, opened(), notes);
                    (Some(session), self.with(session, notes, take), false)
                }
                Err(error) => refuse(notes, &error),
            },
            Evidence::Ack(both) => match both.peek() {
                Ok(ack) => {
                    let session = ack.session;
                    let take = |audit: &mut SessionAudit, notes: &mut Notes| audit.ack(both, ack, opened(), notes);
                    (Some(session), self.with(session, notes, take), false)
                }
                Err(error) => refuse(notes, &error),
            },
            Evidence::Receipt { receipt, opening } => match receipt.peek() {
                Ok(body) => {
                    let (session, at) = (body.session, (entry.seq, leaf));
                    let take = |audit: &mut SessionAudit, notes: &mut Notes| {
                        audit.receipt((receipt, body), opening.as_ref(), at, notes)
                    };
                    (Some(session), self.with(session, notes, take), false)
                }
                Err(error) => refuse(notes, &error),
            },
            Evidence::Abandoned { session, request, last_ack, numerators } => {
                let take = |audit: &mut SessionAudit, notes: &mut Notes| {
                    audit.abandoned(*request, *last_ack, *numerators, notes)
                };
                (Some(*session), self.with(*session, notes, take), false)
            }
            Evidence::Close(signed) => match signed.peek() {
                Ok(close) => {
                    let take = |audit: &mut SessionAudit, notes: &mut Notes| audit.close(signed, notes);
                    (Some(close.session), self.with(close.session, notes, take), false)
                }
                Err(error) => refuse(notes, &error),
            },
            Evidence::CreditNote(signed) => match signed.peek() {
                Ok(note) => {
                    let take = |audit: &mut SessionAudit, notes: &mut Notes| audit.credit_note(signed, notes);
                    (Some(note.session), self.with(note.session, notes, take), false)
                }
                Err(error) => refuse(notes, &error),
            },
            Evidence::RefundAttempted { session, payment_hash, amount, max_fee } => {
                // The same refund may be tried again under the same hash.
                if self.payments.get(payment_hash) != Some(&Payment::Refund(*session)) {
                    self.claim(*payment_hash, Payment::Refund(*session), notes);
                }
                let take = |audit: &mut SessionAudit, notes: &mut Notes| {
                    audit.refund_attempted(*payment_hash, *amount, *max_fee, notes)
                };
                (Some(*session), self.with(*session, notes, take), false)
            }
            Evidence::RefundSettled { session, payment_hash, amount, fee, preimage } => {
                let from_due = taken(flows, Account::RefundsDue(*session), 1);
                let take = |audit: &mut SessionAudit, notes: &mut Notes| {
                    audit.refund_settled(*payment_hash, (*amount, *fee), preimage.as_ref(), from_due, notes)
                };
                (Some(*session), self.with(*session, notes, take), true)
            }
            Evidence::RefundReceived { session, payment_hash, amount } => {
                self.claim(*payment_hash, Payment::Refund(*session), notes);
                let booked = taken(flows, Account::PrepaidAsset(*session), -1);
                let take = |audit: &mut SessionAudit, notes: &mut Notes| audit.refund_received(*amount, booked, notes);
                (Some(*session), self.with(*session, notes, take), false)
            }
            Evidence::Promise(signed) => match signed.peek() {
                // A promise may arrive after its session is over: then it was kept, and only its place is of interest.
                Ok(promise) if self.over.contains(&half(&promise.session.0)) => (None, nothing(), false),
                Ok(promise) => {
                    let take = |audit: &mut SessionAudit, notes: &mut Notes| audit.promise(signed, notes);
                    (Some(promise.session), self.with(promise.session, notes, take), false)
                }
                Err(error) => refuse(notes, &error),
            },
            Evidence::WalletSnapshot { lightning_msat, onchain_msat } => {
                if self.is_whole() {
                    let (held, owed) = (lightning_msat.saturating_add(*onchain_msat), self.books.liabilities());
                    notes.require(held >= owed, Rule::WalletInsolvent, Party::Exporter, || {
                        format!("holds {held}, owes {owed}")
                    });
                }
                (None, nothing(), false)
            }
            Evidence::Checkpoint { note } => {
                self.own_checkpoint(entry, note, notes);
                (None, nothing(), false)
            }
            Evidence::Misbehaviour { .. } => {
                self.report.misbehaviour = self.report.misbehaviour.saturating_add(1);
                (None, nothing(), false)
            }
            Evidence::ChannelClosed { .. } => (None, nothing(), false),
        }
    }

    /// Hands evidence to its session, if that is open.
    fn with(
        &mut self,
        session: SessionId,
        notes: &mut Notes,
        take: impl FnOnce(&mut SessionAudit, &mut Notes) -> Backing,
    ) -> Backing {
        if let Some(audit) = self.sessions.get_mut(&session) {
            return take(audit, notes);
        }
        let why = if self.over.contains(&half(&session.0)) { "is over" } else { "was not opened" };
        notes.add(Rule::StatementSession, Party::Exporter, format!("session {session} {why}"));
        Backing::Unjudged
    }

    /// Hands the wallet's word about a payment to the session whose slice it is.
    fn with_slice(
        &mut self,
        hash: PaymentHash,
        notes: &mut Notes,
        take: impl FnOnce(&mut SessionAudit, u32, &mut Notes) -> Backing,
    ) -> (Option<SessionId>, Backing, bool) {
        match self.payments.get(&hash).copied() {
            Some(Payment::Slice(session, k)) => {
                (Some(session), self.with(session, notes, |audit, notes| take(audit, k, notes)), true)
            }
            Some(Payment::Refund(_)) | None => {
                notes.add(Rule::PaymentUnknown, Party::Exporter, format!("no invoice asked for {hash}"));
                (None, Backing::Unjudged, true)
            }
        }
    }

    /// A payment hash is used once, over all sessions.
    fn claim(&mut self, hash: PaymentHash, payment: Payment, notes: &mut Notes) {
        if self.hashes.insert(half(&hash.0)) {
            self.payments.insert(hash, payment);
        } else {
            notes.add(Rule::InvoiceReuse, Party::Exporter, format!("{hash} was used before"));
        }
    }

    fn listing(&mut self, event_json: &str, notes: &mut Notes) {
        let event = match NostrEvent::from_json(event_json) {
            Ok(event) => event,
            Err(error) => return notes.add(Rule::ListingInvalid, Party::Exporter, error.to_string()),
        };
        // Expiry is judged against the quote's own time below.
        let created = UnixMs::from_secs(event.created_at);
        match verify_listing(event, created) {
            Ok(listing) => {
                if self.listings.len() >= FORGET_FROM {
                    let now = self.last.map_or(0, |(.., at)| at.0);
                    self.listings.retain(|_, old| old.expires_at.saturating_mul(1_000).saturating_add(FORGET_MS) > now);
                }
                self.listings.insert(listing.id(), listing);
            }
            Err(error) => notes.add(Rule::ListingInvalid, Party::Exporter, error.to_string()),
        }
    }

    fn quote(&mut self, entry: &Entry, signed: &Signed<Quote>, notes: &mut Notes) -> Option<SessionId> {
        let quote = match signed.peek().and_then(|claimed| signed.verify(&claimed.provider)) {
            Ok(quote) => quote,
            Err(error) => {
                notes.refuse(&error);
                return None;
            }
        };
        notes.version(Quote::KIND, quote.version, Quote::VERSION);
        let provider = Party::Provider(quote.provider);
        match self.listings.get(&quote.listing) {
            None => notes.add(
                Rule::QuoteListing,
                Party::Exporter,
                format!("listing {} is not in the journal", quote.listing),
            ),
            Some(listing) => {
                notes.require(quote.rates.is_within(&listing.rates), Rule::QuoteDearer, provider, || {
                    format!("{:?}, listed are {:?}", quote.rates, listing.rates)
                });
                let same = quote.provider == listing.node_key
                    && quote.lightning_node == listing.lightning_node
                    && quote.model_root == listing.model_root
                    && quote.tokenizer == listing.tokenizer
                    && quote.quantisation == listing.quantisation
                    && quote.build == listing.build
                    && listing.profiles.contains(&quote.profile)
                    && quote.issued_at.as_secs() <= listing.expires_at;
                notes.require(same, Rule::QuoteTerms, provider, || {
                    "not the listing's model, build, keys or time".into()
                });
            }
        }
        let id = quote.quote_id();
        if let Some(session) = self.by_key.get(&quote.consumer).copied() {
            if let Some(audit) = self.sessions.get_mut(&session) {
                if audit.provider == quote.provider {
                    audit.requote(id, quote.into_statement());
                } else {
                    notes.add(Rule::OpenQuote, provider, "a quote for a session key of another provider's session");
                }
            }
            return Some(session);
        }
        if self.quotes.len() >= FORGET_FROM {
            let now = entry.at.0;
            self.quotes.retain(|_, quotes| quotes.values().any(|q| q.valid_until.0.saturating_add(FORGET_MS) > now));
        }
        self.quotes.entry(quote.consumer).or_default().insert(id, quote.into_statement());
        None
    }

    fn open(&mut self, signed: &Signed<SessionOpen>, notes: &mut Notes) -> Option<SessionId> {
        let open = match signed.peek().and_then(|claimed| signed.verify(&claimed.consumer)) {
            Ok(open) => open,
            Err(error) => {
                notes.refuse(&error);
                return None;
            }
        };
        notes.version(SessionOpen::KIND, open.version, SessionOpen::VERSION);
        let id = session_id(&open);
        let consumer = Party::Consumer(open.consumer);
        let known = self.sessions.contains_key(&id)
            || self.over.contains(&half(&id.0))
            || self.by_key.contains_key(&open.consumer);
        if !notes.require(!known, Rule::OpenTwice, consumer, || format!("session {id} or its key was open before")) {
            return Some(id);
        }
        let quotes = self.quotes.remove(&open.consumer).unwrap_or_default();
        let accepted = quotes.get(&open.quote);
        let valid = accepted.is_some_and(|quote| {
            quote.provider == open.provider && open.opened_at.0 <= quote.valid_until.0.saturating_add(CLOCK_SKEW_MS)
        });
        notes.require(valid, Rule::OpenQuote, consumer, || {
            format!("quote {} of {} does not hold", open.quote, open.provider)
        });
        let as_provider = open.provider == self.report.node;
        let keep = self.detail == Detail::Sessions;
        self.by_key.insert(open.consumer, id);
        self.sessions.insert(id, SessionAudit::new(id, as_provider, &open, quotes, keep));
        notes.delta.sessions = 1;
        Some(id)
    }

    /// A checkpoint that the node journalled must be of the log up to that entry, where all of it is here.
    fn own_checkpoint(&mut self, entry: &Entry, note: &str, notes: &mut Notes) {
        match SignedCheckpoint::parse(note) {
            Ok(signed) if signed.node != self.report.node => {
                notes.add(Rule::LogCheckpoint, Party::Exporter, format!("of another node, {}", signed.node));
            }
            Ok(signed) => {
                notes.require(signed.size <= entry.seq, Rule::LogCheckpoint, Party::Exporter, || {
                    format!("over {} entries, of which {} exist", signed.size, entry.seq)
                });
            }
            Err(error) => notes.add(Rule::LogCheckpoint, Party::Exporter, error.to_string()),
        }
    }

    /// Ends the audit: what only the whole can show.
    pub fn finish(mut self) -> Report {
        if self.report.entries == 0 {
            self.find(None, Rule::EntryGenesis, "no entries");
        }
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
            .filter_map(|(id, hold)| hold.expires_at.map(|at| (*id, at)))
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

    /// A partial export holds no other session than the header says.
    fn check_filter(&mut self, open: &BTreeMap<SessionId, SessionAudit>) {
        let strays: Vec<SessionId> = match self.report.filter {
            Filter::All | Filter::Time(..) => Vec::new(),
            Filter::Session(only) => {
                let retired = self.over.iter().filter(|id| **id != half(&only.0)).count();
                if retired > 0 {
                    self.find(None, Rule::BundleFilter, format!("{retired} other sessions"));
                }
                open.keys().copied().filter(|id| *id != only).collect()
            }
            Filter::Peer(peer) => {
                let of_peer = |audit: &SessionAudit| audit.provider == peer || audit.consumer == peer;
                open.iter().filter(|(_, audit)| !of_peer(audit)).map(|(id, _)| *id).collect()
            }
        };
        for id in strays {
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

/// What left an account in this entry: its net, taken with `sign`, in msat.
fn taken(flows: &Flows, account: Account, sign: i128) -> Msat {
    let net = flows.net.get(&account).copied().unwrap_or(0).saturating_mul(sign);
    Msat(u64::try_from(net.max(0)).unwrap_or(u64::MAX))
}

fn refuse(notes: &mut Notes, error: &satgrid_types::VerifyError) -> (Option<SessionId>, Backing, bool) {
    notes.refuse(error);
    (None, Backing::Unjudged, false)
}

/// The networks whose invoices we can tell apart; another word is not held against invoices.
fn known_network(word: &str) -> Option<String> {
    ["mainnet", "testnet", "signet", "regtest"].contains(&word).then(|| word.to_owned())
}

fn half(bytes: &[u8; 32]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&bytes[..16]);
    out
}
