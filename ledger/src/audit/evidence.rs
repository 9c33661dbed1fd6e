//! One entry's evidence: read, checked as far as no session is needed, and handed to its session.

use super::{
    Party, Rule,
    flows::{Backing, Flows, Reserves},
    fold::{Auditor, Detail, Payment, half},
    payments,
    session::{Notes, SessionAudit},
};
use crate::{
    entry::{Entry, Evidence},
    log::SignedCheckpoint,
    statements::{InclusionPromise, SessionOpen, session_id},
    transfer::Account,
};
use satgrid_types::{
    Digest, Msat, NostrEvent, PaymentHash, Quote, SessionId, Signed, SignedSuccession, Statement, Succession,
    SuccessionRefusal, TransferId, UnixMs, VerifyError, verify_listing,
};

/// How far two parties' clocks may be apart.
const CLOCK_SKEW_MS: u64 = 5 * 60 * 1_000;
/// Quotes and listings that ran out this long ago are forgotten.
const FORGET_MS: u64 = 24 * 60 * 60 * 1_000;
/// From so many on, they are looked through.
const FORGET_FROM: usize = 4_096;

/// Whose session an entry is of, what its evidence justifies, and whether it is the wallet's word.
pub(super) type Read = (Option<SessionId>, Backing, bool);

impl Auditor {
    /// Reads one entry's evidence: whose session it is, what it justifies, and whether it is the wallet's word.
    pub(super) fn evidence(
        &mut self,
        entry: &Entry,
        evidence: &Evidence,
        leaf: Digest,
        flows: &Flows,
        notes: &mut Notes,
    ) -> Read {
        let nothing = || Backing::Exactly(Vec::new(), Reserves::Nothing);
        let opened = || -> Vec<TransferId> { flows.opened.iter().map(|(id, _)| *id).collect() };
        match evidence {
            Evidence::Genesis { node, network, .. } => {
                self.genesis = Some(entry.seq);
                self.keys = vec![*node];
                self.network = known_network(network);
                (None, nothing(), false)
            }
            Evidence::Succession(signed) => {
                self.succession(signed, notes);
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
                Ok(promise) if self.over.contains(&half(&promise.session.0)) => {
                    self.late_promise(signed, &promise, notes);
                    (None, nothing(), false)
                }
                Ok(promise) => {
                    let take = |audit: &mut SessionAudit, notes: &mut Notes| audit.promise(signed, notes);
                    (Some(promise.session), self.with(promise.session, notes, take), false)
                }
                Err(error) => refuse(notes, &error),
            },
            Evidence::CreditTransfer(both) => self.credit_transfer(both, notes),
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
            Evidence::WalletPayment { payment_hash, inbound, amount, fee, preimage } => {
                if !self.hashes.insert(half(&payment_hash.0)) {
                    notes.add(Rule::InvoiceReuse, Party::Exporter, format!("{payment_hash} was used before"));
                }
                let backing = payments::own(*payment_hash, *inbound, (*amount, *fee), preimage.as_ref(), notes);
                (None, backing, false)
            }
            Evidence::OnChain { fee, .. } => (None, Backing::Miners(*fee), false),
        }
    }

    /// A promise may arrive after its session is over; it binds the provider's log all the same.
    fn late_promise(&mut self, signed: &Signed<InclusionPromise>, promise: &InclusionPromise, notes: &mut Notes) {
        if let Err(error) = signed.verify(&promise.node) {
            return notes.refuse(&error);
        }
        notes.version(InclusionPromise::KIND, promise.version, InclusionPromise::VERSION);
        let summary = self.report.sessions.get_mut(&promise.session);
        if let Some(summary) = summary.filter(|summary| summary.provider == Some(promise.node)) {
            summary.promised.push((promise.receipt.0, promise.index, promise.leaf));
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
    ) -> Read {
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
        // A provider writes its listing down with every session; three signatures are checked once.
        if self.listings.get(&event.id).is_some_and(|known| *known.event() == event) {
            return;
        }
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
                    // Who gives a quote cannot know whose session a key has.
                    let text = "a quote for a session key of another provider's session";
                    notes.add(Rule::OpenQuote, Party::Exporter, text);
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
        let as_provider = self.is_ours(&open.provider);
        let keep = self.detail == Detail::Sessions;
        self.by_key.insert(open.consumer, id);
        self.sessions.insert(id, SessionAudit::new(id, as_provider, &open, quotes, keep));
        notes.delta.sessions = 1;
        Some(id)
    }

    /// The node's key gave way: what it signs from here on is by the heir.
    fn succession(&mut self, signed: &SignedSuccession, notes: &mut Notes) {
        let said = match signed.verify() {
            Ok(said) => said,
            Err(SuccessionRefusal::Signature(error)) => return notes.refuse(&error),
            Err(SuccessionRefusal::Version(given)) => {
                return notes.version(Succession::KIND, given, Succession::VERSION);
            }
            Err(other) => return notes.add(Rule::StatementSignature, Party::Exporter, other.to_string()),
        };
        let own = self.keys.last() == Some(&said.old) && said.new.is_none_or(|new| !self.keys.contains(&new));
        let own = notes.require(own, Rule::BundleNode, Party::Exporter, || {
            format!("{} is not, or no longer, this journal's key", said.old)
        });
        self.keys.extend(said.new.filter(|_| own));
    }

    /// A checkpoint that the node journalled must be of the log up to that entry: where all of it is here, by its root.
    fn own_checkpoint(&mut self, entry: &Entry, note: &str, notes: &mut Notes) {
        match SignedCheckpoint::parse(note) {
            Ok(signed) if !self.is_ours(&signed.node) => {
                notes.add(Rule::LogCheckpoint, Party::Exporter, format!("of another node, {}", signed.node));
            }
            Ok(signed) => {
                notes.require(signed.size <= entry.seq, Rule::LogCheckpoint, Party::Exporter, || {
                    format!("over {} entries, of which {} exist", signed.size, entry.seq)
                });
                let other = self.root_before.filter(|root| signed.size == entry.seq && signed.root != *root);
                notes.require(other.is_none(), Rule::LogCheckpoint, Party::Exporter, || {
                    format!("root {} over {} entries, which have another", signed.root, signed.size)
                });
            }
            Err(error) => notes.add(Rule::LogCheckpoint, Party::Exporter, error.to_string()),
        }
    }
}

/// What left an account in this entry: its net, taken with `sign`, in msat.
fn taken(flows: &Flows, account: Account, sign: i128) -> Msat {
    let net = flows.net.get(&account).copied().unwrap_or(0).saturating_mul(sign);
    Msat(u64::try_from(net.max(0)).unwrap_or(u64::MAX))
}

fn refuse(notes: &mut Notes, error: &VerifyError) -> Read {
    notes.refuse(error);
    (None, Backing::Unjudged, false)
}

/// The networks whose invoices we can tell apart; another word is not held against invoices.
fn known_network(word: &str) -> Option<String> {
    ["mainnet", "testnet", "signet", "regtest"].contains(&word).then(|| word.to_owned())
}
