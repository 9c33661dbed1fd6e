//! The verdict on a claim: every piece is verified on its own, and what is owed is computed from what holds.
//!
//! | figure | from |
//! |---|---|
//! | paid | invoices of the quote's Lightning node over this session's terms, each with its preimage; or, where it is more, what the last receipt says under both signatures |
//! | charged | the last receipt's running total and the last acknowledgements of requests that it does not hold, rounded once |
//! | refunded | the consumer's own word; or invoices that the consumer's close names, with their preimages |
//! | credit | notes of other sessions spent in this one count as paid, this session's spent elsewhere as refunded, by both signatures |
//! | owed | paid less charged less refunded; once something was refunded, less the quote's `refund_fee_cap`, which its route may have cost |

use super::{ClaimHeader, Maker};
use crate::{
    audit::{Finding, MAX_FINDINGS, Party, Rule, read_invoice},
    bundle::{BundleError, ClaimReader},
    entry::Evidence,
    statements::{Ack, CreditTransfer, Receipt, RequestOpen, SessionOpen, SliceDescriptor, receipt_id, session_id},
};
use satgrid_pricing::{charge, numerators};
use satgrid_types::{
    BothSigned, Digest, Msat, NodeKey, Numerators, PaymentHash, Preimage, Quote, QuoteId, ReceiptId, RequestId,
    SessionId, Signed, VerifyError,
};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
};
use thiserror::Error;

/// A claim holds no more pieces: thousands of slices fit, and memory stays bounded.
pub const MAX_CLAIM_PIECES: u64 = 65_536;

/// What a claim comes to, in msat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClaimFigures {
    pub paid: Msat,
    pub charged: Msat,
    pub refunded: Msat,
    pub owed: Msat,
}

/// The evidence of a claim that holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Facts {
    paid: BTreeMap<u32, Msat>,
    receipt: Option<(ReceiptId, Receipt)>,
    /// Every receipt that is here, by its number: whose request it is, and what that request comes to.
    receipts: BTreeMap<u32, (RequestId, Numerators)>,
    acked: BTreeMap<RequestId, (u32, Numerators)>,
    refunded: BTreeMap<PaymentHash, Msat>,
    /// Credit that came from other sessions, and that went to others, by note.
    credited: BTreeMap<Digest, Msat>,
    spent: BTreeMap<Digest, Msat>,
    /// What a refund's route may have cost: the largest cap of the session's quotes.
    fee_cap: Msat,
}

/// The verdict on one claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimReport {
    pub maker: Maker,
    pub network: String,
    pub session: Option<SessionId>,
    pub provider: Option<NodeKey>,
    pub consumer: Option<NodeKey>,
    pub pieces: u64,
    pub slices: u64,
    /// Receipts in the chain, by the last one's number.
    pub receipts: u64,
    pub last_receipt: Option<ReceiptId>,
    /// Requests that are charged at an acknowledgement.
    pub acknowledged: u64,
    /// What the provider's own credit note says.
    pub credit_note: Option<Msat>,
    pub figures: ClaimFigures,
    pub findings: Vec<Finding>,
    pub findings_total: u64,
    facts: Facts,
}

/// Two claims that say nothing about each other.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ClaimMismatch {
    #[error("two sessions: {one} and {other}")]
    TwoSessions { one: SessionId, other: SessionId },
    #[error("one of them opens no session")]
    NoSession,
}

/// Judges a whole claim.
pub fn audit_claim<R: Read>(mut reader: ClaimReader<R>) -> Result<ClaimReport, BundleError> {
    let mut audit = ClaimAudit::new(reader.header());
    while let Some(piece) = reader.next_piece()? {
        audit.piece(&piece);
    }
    Ok(audit.finish())
}

/// The fold over a claim's pieces.
#[derive(Debug)]
pub struct ClaimAudit {
    report: ClaimReport,
    quotes: BTreeMap<QuoteId, Quote>,
    invoices: BTreeMap<PaymentHash, (u32, Msat)>,
    requests: BTreeMap<RequestId, RequestOpen>,
    /// Invoices that the consumer's close asks the remainder to.
    refund_invoices: BTreeMap<PaymentHash, Msat>,
}

impl ClaimAudit {
    pub fn new(header: &ClaimHeader) -> ClaimAudit {
        let report = ClaimReport {
            maker: header.maker,
            network: header.network.clone(),
            session: None,
            provider: None,
            consumer: None,
            pieces: 0,
            slices: 0,
            receipts: 0,
            last_receipt: None,
            acknowledged: 0,
            credit_note: None,
            figures: ClaimFigures::default(),
            findings: Vec::new(),
            findings_total: 0,
            facts: Facts::default(),
        };
        ClaimAudit {
            report,
            quotes: BTreeMap::new(),
            invoices: BTreeMap::new(),
            requests: BTreeMap::new(),
            refund_invoices: BTreeMap::new(),
        }
    }

    fn find(&mut self, rule: Rule, party: Party, detail: impl Into<String>) {
        let (entry, session) = (Some(self.report.pieces.saturating_sub(1)), self.report.session);
        let party = party.in_one_file(rule);
        self.report.push(Finding { rule, entry, session, party, detail: detail.into() });
    }

    fn require(&mut self, holds: bool, rule: Rule, party: Party, detail: &str) -> bool {
        if !holds {
            self.find(rule, party, detail);
        }
        holds
    }

    fn refuse(&mut self, error: &VerifyError) {
        let rule = match error {
            VerifyError::Codec { .. } => Rule::StatementCanonical,
            VerifyError::Key { .. } | VerifyError::Signature { .. } => Rule::StatementSignature,
        };
        self.find(rule, Party::Exporter, error.to_string());
    }

    fn version(&mut self, given: u32) {
        self.require(given == 1, Rule::StatementVersion, Party::Exporter, "a version that this program does not know");
    }

    /// Takes the next piece.
    pub fn piece(&mut self, evidence: &Evidence) {
        self.report.pieces = self.report.pieces.saturating_add(1);
        if self.report.pieces > MAX_CLAIM_PIECES {
            if self.report.pieces == MAX_CLAIM_PIECES.saturating_add(1) {
                self.find(Rule::ClaimPiece, Party::Exporter, format!("more than {MAX_CLAIM_PIECES} pieces"));
            }
            return;
        }
        if let Evidence::Quote(quote) = evidence {
            return self.quote(quote);
        }
        if let Evidence::Open(open) = evidence {
            return self.open(open);
        }
        let (Some(session), Some(provider), Some(consumer)) =
            (self.report.session, self.report.provider, self.report.consumer)
        else {
            return self.find(Rule::StatementSession, Party::Exporter, "before the session's opening");
        };
        let parties = (session, provider, consumer);
        match evidence {
            Evidence::Invoice { session: of, k, bolt11, descriptor } => {
                self.invoice(parties, (*of, *k), bolt11, descriptor);
            }
            Evidence::PaymentSettled { payment_hash, preimage, .. } => self.settled(*payment_hash, preimage),
            Evidence::PaymentReceived { payment_hash, .. } => {
                // The payee's own word counts against the payee alone.
                let own = self.report.maker == Maker::Provider;
                if self.require(own, Rule::PaymentPreimage, Party::Exporter, "a payer shows a preimage") {
                    self.paid(*payment_hash);
                }
            }
            Evidence::Request(request) => self.request(parties, request),
            Evidence::Ack(ack) => self.ack(parties, ack),
            Evidence::Receipt { receipt, .. } => self.receipt(parties, receipt),
            Evidence::Close(close) => match close.verify(&consumer) {
                Ok(close) => {
                    self.version(close.version);
                    self.require(
                        close.session == session,
                        Rule::StatementSession,
                        Party::Exporter,
                        "of another session",
                    );
                    if let Some(facts) = close.invoice.as_deref().and_then(|text| read_invoice(text).ok())
                        && let Some(amount) = facts.amount
                    {
                        self.refund_invoices.insert(facts.payment_hash, amount);
                    }
                }
                Err(error) => self.refuse(&error),
            },
            Evidence::CreditNote(note) => match note.verify(&provider) {
                Ok(note) => {
                    self.version(note.version);
                    let ours = note.session == session && note.consumer == consumer && note.provider == provider;
                    if self.require(ours, Rule::StatementSession, Party::Exporter, "of another session") {
                        self.report.credit_note = Some(note.amount);
                    }
                }
                Err(error) => self.refuse(&error),
            },
            Evidence::RefundReceived { session: of, payment_hash, amount } => {
                let own = self.report.maker == Maker::Consumer && *of == session;
                if self.require(own, Rule::ClaimRefund, Party::Exporter, "only the consumer's word counts for it") {
                    self.report.facts.refunded.insert(*payment_hash, *amount);
                }
            }
            Evidence::RefundSettled { session: of, payment_hash, preimage, .. } => {
                // Whoever knows the preimage of the consumer's own invoice was told it by paying.
                let asked = self.refund_invoices.get(payment_hash).copied().filter(|_| *of == session);
                match asked.filter(|_| preimage.as_ref().is_some_and(|preimage| opens(preimage, payment_hash))) {
                    Some(amount) => {
                        self.report.facts.refunded.insert(*payment_hash, amount);
                    }
                    None => {
                        self.find(
                            Rule::ClaimRefund,
                            Party::Exporter,
                            "no close names this invoice, or no preimage opens it",
                        );
                    }
                }
            }
            Evidence::CreditTransfer(both) => self.credit(parties, both),
            Evidence::Quote(_) | Evidence::Open(_) => {}
            Evidence::Genesis { .. }
            | Evidence::Listing { .. }
            | Evidence::PaymentAttempted { .. }
            | Evidence::PaymentFailed { .. }
            | Evidence::Abandoned { .. }
            | Evidence::RefundAttempted { .. }
            | Evidence::ChannelClosed { .. }
            | Evidence::WalletPayment { .. }
            | Evidence::OnChain { .. }
            | Evidence::Succession(_)
            | Evidence::Misbehaviour { .. }
            | Evidence::WalletSnapshot { .. }
            | Evidence::Checkpoint { .. }
            | Evidence::Promise(_) => {
                self.find(Rule::ClaimPiece, Party::Exporter, format!("{} proves nothing here", evidence.kind()));
            }
        }
    }

    fn quote(&mut self, signed: &Signed<Quote>) {
        match signed.peek().and_then(|claimed| signed.verify(&claimed.provider)) {
            Ok(quote) => {
                self.version(quote.version);
                let same = self.report.provider.is_none_or(|key| key == quote.provider)
                    && self.report.consumer.is_none_or(|key| key == quote.consumer);
                if self.require(same, Rule::OpenQuote, Party::Exporter, "a quote of other parties") {
                    self.quotes.insert(quote.quote_id(), quote.into_statement());
                }
            }
            Err(error) => self.refuse(&error),
        }
    }

    fn open(&mut self, signed: &Signed<SessionOpen>) {
        let open = match signed.peek().and_then(|claimed| signed.verify(&claimed.consumer)) {
            Ok(open) => open,
            Err(error) => return self.refuse(&error),
        };
        self.version(open.version);
        if !self.require(self.report.session.is_none(), Rule::OpenTwice, Party::Exporter, "a second session") {
            return;
        }
        self.report.session = Some(session_id(&open));
        (self.report.provider, self.report.consumer) = (Some(open.provider), Some(open.consumer));
        self.quotes.retain(|_, quote| quote.provider == open.provider && quote.consumer == open.consumer);
        let held = self.quotes.contains_key(&open.quote);
        self.require(held, Rule::OpenQuote, Party::Consumer(open.consumer), "the quote that it accepts is not here");
    }

    fn invoice(
        &mut self,
        (session, provider, consumer): (SessionId, NodeKey, NodeKey),
        (of, k): (SessionId, u32),
        bolt11: &str,
        terms: &SliceDescriptor,
    ) {
        let party = Party::Provider(provider);
        self.version(terms.version);
        let facts = match read_invoice(bolt11) {
            Ok(facts) => facts,
            Err(why) => return self.find(Rule::InvoiceSignature, party, why),
        };
        let quote = self.quotes.get(&terms.quote).cloned();
        let ours = of == session
            && terms.session == session
            && terms.k == k
            && terms.provider == provider
            && terms.consumer == consumer;
        let network = facts.network == self.report.network;
        let payee = quote.is_some_and(|quote| quote.lightning_node == facts.payee);
        let bound = facts.description_hash == Some(terms.description_hash());
        let amount = facts.amount == Some(terms.amount);
        let holds = [
            self.require(network, Rule::InvoiceSignature, party, "an invoice of another network"),
            self.require(ours, Rule::InvoiceDescriptor, party, "the terms are of another session, slice or party"),
            self.require(payee, Rule::InvoicePayee, party, "it does not pay the Lightning node of the quote"),
            self.require(bound, Rule::InvoiceTerms, party, "the description hash is not that of the terms"),
            self.require(amount, Rule::InvoiceAmount, party, "its amount is not that of the terms"),
        ];
        if holds.iter().all(|holds| *holds) {
            let fresh = self.invoices.insert(facts.payment_hash, (k, terms.amount)).is_none();
            self.require(fresh, Rule::InvoiceReuse, Party::Exporter, "a payment hash of two invoices");
        }
    }

    fn settled(&mut self, hash: PaymentHash, preimage: &Preimage) {
        if self.require(opens(preimage, &hash), Rule::PaymentPreimage, Party::Exporter, "not the preimage of the hash")
        {
            self.paid(hash);
        }
    }

    fn paid(&mut self, hash: PaymentHash) {
        let Some((k, amount)) = self.invoices.get(&hash).copied() else {
            return self.find(Rule::PaymentUnknown, Party::Exporter, format!("{hash} is no invoice of this claim"));
        };
        let first = self.report.facts.paid.insert(k, amount).is_none();
        self.require(first, Rule::PaymentTwice, Party::Exporter, "a slice that is paid already");
    }

    fn request(&mut self, (session, _, consumer): (SessionId, NodeKey, NodeKey), signed: &Signed<RequestOpen>) {
        match signed.verify(&consumer) {
            Ok(open) => {
                self.version(open.version);
                let valid = open.session == session && self.quotes.contains_key(&open.quote);
                if self.require(valid, Rule::RequestInvalid, Party::Consumer(consumer), "of another session or quote") {
                    self.requests.insert(open.request, open.into_statement());
                }
            }
            Err(error) => self.refuse(&error),
        }
    }

    fn ack(&mut self, (session, provider, consumer): (SessionId, NodeKey, NodeKey), both: &BothSigned<Ack>) {
        let ack = match both.verify(&provider, &consumer) {
            Ok(ack) => ack,
            Err(error) => return self.refuse(&error),
        };
        self.version(ack.version);
        let party = Party::Provider(provider);
        let request = self.requests.get(&ack.request).filter(|_| ack.session == session);
        let Some(request) = request else {
            return self.find(Rule::RequestUnknown, party, format!("request {} is not in this claim", ack.request));
        };
        let fits = ack.usage.is_consistent()
            && ack.usage.prompt <= request.prompt_tokens
            && ack.usage.completion <= request.max_output;
        let quote = self.quotes.get(&request.quote);
        let computed = quote.and_then(|quote| numerators(&ack.usage, &quote.rates).ok());
        let priced = computed == Some(ack.numerators) && ack.cost == charge(ack.numerators);
        self.require(fits, Rule::AckUsage, party, "counts that contradict themselves or exceed the request");
        self.require(priced, Rule::AckCost, party, "numerators or cost are not those of its usage");
        let last = self.report.facts.acked.entry(ack.request).or_insert((ack.seq, ack.numerators));
        if ack.seq > last.0 {
            *last = (ack.seq, ack.numerators);
        }
    }

    fn receipt(&mut self, (session, provider, consumer): (SessionId, NodeKey, NodeKey), both: &BothSigned<Receipt>) {
        let receipt = match both.verify(&provider, &consumer) {
            Ok(receipt) => receipt,
            Err(error) => return self.refuse(&error),
        };
        self.version(receipt.version);
        let party = Party::Provider(provider);
        if !self.require(receipt.session == session, Rule::StatementSession, Party::Exporter, "of another session") {
            return;
        }
        let quote = self.quotes.get(&receipt.quote);
        let terms = quote.is_some_and(|quote| quote.rates == receipt.rates && quote.model_root == receipt.model_root);
        let priced = numerators(&receipt.usage, &receipt.rates) == Ok(receipt.numerators);
        let sums = receipt.cumulative_cost == charge(receipt.cumulative_numerators)
            && receipt.cumulative_numerators >= receipt.numerators;
        self.require(terms, Rule::ReceiptTerms, party, "its quote is not here, or has other rates or another model");
        self.require(priced, Rule::ReceiptCost, party, "its numerators are not those of its usage");
        self.require(sums, Rule::ReceiptCumulative, party, "its running totals contradict themselves");
        let facts = &mut self.report.facts;
        facts.receipts.insert(receipt.seq, (receipt.request, receipt.numerators));
        if facts.receipt.as_ref().is_none_or(|(_, last)| last.seq < receipt.seq) {
            facts.receipt = Some((receipt_id(both), receipt));
        }
    }

    /// A credit note that was spent, here or of this session elsewhere.
    fn credit(
        &mut self,
        (session, provider, consumer): (SessionId, NodeKey, NodeKey),
        both: &BothSigned<CreditTransfer>,
    ) {
        let body = match both.peek().and_then(|body| both.verify(&provider, &body.consumer)) {
            Ok(body) => body,
            Err(error) => return self.refuse(&error),
        };
        self.version(body.version);
        let own = body.from == session && body.consumer == consumer;
        let fits = body.provider == provider && body.from != body.to && (body.to == session || own);
        if !self.require(fits, Rule::StatementSession, Party::Exporter, "a credit transfer of other sessions") {
            return;
        }
        let facts = &mut self.report.facts;
        if own { &mut facts.spent } else { &mut facts.credited }.insert(body.note, body.amount);
    }

    /// Ends the claim: what is owed.
    pub fn finish(mut self) -> ClaimReport {
        if self.report.session.is_none() {
            self.find(Rule::StatementSession, Party::Exporter, "no session is opened here");
        }
        let caps = self.quotes.values().map(|quote| quote.terms.refund_fee_cap);
        self.report.facts.fee_cap = caps.max().unwrap_or(Msat::ZERO);
        let facts = &self.report.facts;
        self.report.figures = facts.figures(facts.numerators(self.report.maker));
        self.report.slices = facts.paid.len() as u64;
        self.report.acknowledged = facts.unreceipted().count() as u64;
        let last = facts.receipt.as_ref().map(|(id, receipt)| (*id, u64::from(receipt.seq).saturating_add(1)));
        self.report.last_receipt = last.map(|(id, _)| id);
        self.report.receipts = last.map_or(0, |(_, receipts)| receipts);
        let ClaimFigures { owed, refunded, .. } = self.report.figures;
        if let (Some(note), Some(provider)) = (self.report.credit_note, self.report.provider) {
            let fits = note <= owed.saturating_add(refunded);
            let detail = format!("the credit note is over {note}, the evidence over {owed}");
            self.require(fits, Rule::CreditNoteAmount, Party::Provider(provider), &detail);
        }
        if self.report.maker == Maker::Consumer && owed.is_zero() {
            self.find(Rule::ClaimNothing, Party::Exporter, "by its own evidence nothing is owed");
        }
        self.report
    }
}

impl ClaimReport {
    pub fn is_clean(&self) -> bool {
        self.findings_total == 0
    }
    fn push(&mut self, finding: Finding) {
        self.findings_total = self.findings_total.saturating_add(1);
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }
}

impl Facts {
    /// Acknowledged work that no receipt of the claim holds.
    fn unreceipted(&self) -> impl Iterator<Item = (&RequestId, &(u32, Numerators))> {
        let receipted: BTreeSet<RequestId> = self.receipts.values().map(|(request, _)| *request).collect();
        self.acked.iter().filter(move |(request, _)| !receipted.contains(*request))
    }
    fn base(&self) -> Numerators {
        self.receipt.as_ref().map_or(Numerators::ZERO, |(_, receipt)| receipt.cumulative_numerators)
    }
    /// What the last receipt's running total holds of requests that ended without a receipt before it: known where every
    /// receipt up to it is here.
    fn broken_off(&self) -> Numerators {
        let Some((_, last)) = &self.receipt else { return Numerators::ZERO };
        let chain = self.receipts.range(..=last.seq).map(|(_, (_, numerators))| *numerators);
        let (count, sum) = chain.fold((0u64, Numerators::ZERO), |(n, sum), next| (n.saturating_add(1), add(sum, next)));
        let whole = count == u64::from(last.seq).saturating_add(1);
        if whole { Numerators(self.base().0.saturating_sub(sum.0)) } else { Numerators::ZERO }
    }
    /// Work counts once: not at an acknowledgement where the running total has it. A consumer shows no acknowledgement that
    /// it need not; of a provider's, those of before the last receipt are taken off again.
    fn numerators(&self, maker: Maker) -> Numerators {
        let acked = self.unreceipted().fold(Numerators::ZERO, |sum, (_, (_, added))| add(sum, *added));
        let before = match maker {
            Maker::Consumer => Numerators::ZERO,
            Maker::Provider => self.broken_off(),
        };
        add(self.base(), Numerators(acked.0.saturating_sub(before.0)))
    }
    fn figures(&self, numerators: Numerators) -> ClaimFigures {
        let proven = self.paid.values().fold(Msat::ZERO, |sum, amount| sum.saturating_add(*amount));
        let acknowledged = self.receipt.as_ref().map_or(Msat::ZERO, |(_, receipt)| receipt.cumulative_paid);
        let sum = |credit: &BTreeMap<Digest, Msat>| credit.values().copied().fold(Msat::ZERO, Msat::saturating_add);
        let paid = proven.max(acknowledged).saturating_add(sum(&self.credited));
        let charged = charge(numerators);
        let back = self.refunded.values().fold(Msat::ZERO, |sum, amount| sum.saturating_add(*amount));
        let refunded = back.saturating_add(sum(&self.spent));
        let left = paid.saturating_sub(charged).saturating_sub(refunded);
        let owed = if back.is_zero() { left } else { left.saturating_sub(self.fee_cap) };
        ClaimFigures { paid, charged, refunded, owed }
    }
}

/// A claim and the other side's answer, held against each other: what is owed by both together, and whether the claim had
/// left out what its maker knew.
///
/// Charges are both-signed, so the larger one stands, each request counted once: of both totals, and over the same last
/// receipt of that with the later acknowledgement of each request. Slices and refunds are joined, each counted once.
pub fn cross_claims(one: &ClaimReport, other: &ClaimReport) -> Result<(ClaimFigures, Vec<Finding>), ClaimMismatch> {
    let (Some(session), Some(second)) = (one.session, other.session) else { return Err(ClaimMismatch::NoSession) };
    if session != second {
        return Err(ClaimMismatch::TwoSessions { one: session, other: second });
    }
    let mut joined = one.facts.clone();
    let newer = match (&joined.receipt, &other.facts.receipt) {
        (Some((_, ours)), Some((_, theirs))) => theirs.seq > ours.seq,
        (None, Some(_)) => true,
        (_, None) => false,
    };
    joined.receipts.extend(&other.facts.receipts);
    // What either file comes to by the receipts of both.
    let own = |report: &ClaimReport| {
        Facts { receipts: joined.receipts.clone(), ..report.facts.clone() }.numerators(report.maker)
    };
    let mut numerators = own(one).max(own(other));
    if one.last_receipt == other.last_receipt {
        for (request, later) in &other.facts.acked {
            let last = joined.acked.entry(*request).or_insert(*later);
            if later.0 > last.0 {
                *last = *later;
            }
        }
        numerators = numerators.max(joined.numerators(Maker::Provider));
    }
    joined.fee_cap = joined.fee_cap.max(other.facts.fee_cap);
    if newer {
        joined.receipt.clone_from(&other.facts.receipt);
    }
    for (k, amount) in &other.facts.paid {
        joined.paid.entry(*k).or_insert(*amount);
    }
    for (hash, amount) in &other.facts.refunded {
        joined.refunded.entry(*hash).or_insert(*amount);
    }
    joined.credited.extend(&other.facts.credited);
    joined.spent.extend(&other.facts.spent);
    let figures = joined.figures(numerators);
    let mut findings = Vec::new();
    for (report, rest) in [(one, other), (other, one)] {
        let says = report.figures.owed;
        if report.maker == Maker::Consumer && figures.owed < says {
            let charged = rest.figures.charged > report.figures.charged;
            let why = match charged {
                true => "a later statement that both signed",
                false => "a refund with its preimage, or a note that was spent,",
            };
            findings.push(Finding {
                rule: Rule::ClaimContradicted,
                entry: None,
                session: Some(session),
                party: report.consumer.map_or(Party::Exporter, Party::Consumer),
                detail: format!("claims {says}; {why} leaves {}", figures.owed),
            });
        }
    }
    Ok((figures, findings))
}

fn add(sum: Numerators, added: Numerators) -> Numerators {
    sum.checked_add(added).unwrap_or(Numerators(u64::MAX))
}

/// Whether a preimage is that of a payment hash.
fn opens(preimage: &Preimage, hash: &PaymentHash) -> bool {
    <[u8; 32]>::from(Sha256::digest(preimage.0)) == hash.0
}
