//! One session under audit: requests, acknowledgements, receipts, close.

use super::{
    Party, Rule, SessionSummary, SideTotals,
    flows::{Backing, Reserves},
};
use crate::{
    statements::{
        Ack, CreditNote, ExpertCount, InclusionPromise, Leg, PartOrder, RequestOpen, SessionClose, SessionOpen, ack_id,
    },
    transfer::Account,
};
use satgrid_pricing::{charge, marginal_charge, numerators};
use satgrid_types::{
    AckId, BothSigned, Digest, Msat, NodeKey, Numerators, PaymentHash, Quote, QuoteId, ReceiptId, RequestId, SessionId,
    Signed, Statement, TokenUsage, TransferId, UnixMs, VerifyError, verify_body,
};
use std::collections::{BTreeMap, BTreeSet};

/// What one entry's evidence led to: findings, and what it adds to the totals.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) found: Vec<(Rule, Party, String)>,
    pub(super) delta: SideTotals,
    /// A worker's part in some request that ended with this entry.
    pub(super) leg: Option<Leg>,
    /// The session whose credit note this entry spent.
    pub(super) spent_from: Option<SessionId>,
    /// Of a leg for experts that has a receipt: what it counts.
    pub(super) counts: Option<Vec<ExpertCount>>,
}

impl Notes {
    pub(super) fn add(&mut self, rule: Rule, party: Party, detail: impl Into<String>) {
        self.found.push((rule, party, detail.into()));
    }
    /// Notes a finding where `holds` is false.
    pub(super) fn require(&mut self, holds: bool, rule: Rule, party: Party, detail: impl FnOnce() -> String) -> bool {
        if !holds {
            self.add(rule, party, detail());
        }
        holds
    }
    /// Notes why a statement was not believed.
    pub(super) fn refuse(&mut self, error: &VerifyError) {
        let rule = match error {
            VerifyError::Codec { .. } => Rule::StatementCanonical,
            VerifyError::Key { .. } | VerifyError::Signature { .. } => Rule::StatementSignature,
        };
        self.add(rule, Party::Exporter, error.to_string());
    }
    pub(super) fn version(&mut self, kind: &str, given: u32, known: u32) {
        self.require(given == known, Rule::StatementVersion, Party::Exporter, || {
            format!("{kind} version {given}, this program knows {known}")
        });
    }
}

/// A request that is open.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) quote: QuoteId,
    pub(super) prompt_tokens: u32,
    pub(super) max_output: u32,
    pub(super) last_ack: Option<(AckId, Ack)>,
    pub(super) holds: Vec<TransferId>,
    /// Work on a part of a model, ordered by a lead.
    pub(super) part: Option<PartOrder>,
}

impl Request {
    /// Whether part work is counted where it was ordered, and as it was ordered.
    pub(super) fn allows(&self, usage: &TokenUsage) -> bool {
        match (&self.part, &usage.part) {
            (None, None) => true,
            (Some(order), Some(part)) => order.allows(part),
            (Some(_), None) => true,
            (None, Some(_)) => false,
        }
    }
}

/// Where a slice stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SliceStatus {
    Invoiced,
    Attempted,
    Paid,
    Failed,
}

#[derive(Debug, Clone)]
pub(super) struct Slice {
    pub(super) hash: PaymentHash,
    pub(super) amount: Msat,
    /// Invoices of the same number that were replaced before anybody tried to pay them.
    pub(super) earlier: Vec<(PaymentHash, Msat)>,
    pub(super) max_fee: Msat,
    pub(super) status: SliceStatus,
    pub(super) receipted: bool,
}

impl Slice {
    /// Takes up the invoice of this payment hash, if it is one of the slice's: an invoice that was replaced can still be
    /// paid until it expires.
    pub(super) fn take_up(&mut self, hash: PaymentHash) -> bool {
        if self.hash == hash {
            return true;
        }
        if self.status == SliceStatus::Paid {
            return false;
        }
        let Some(at) = self.earlier.iter().position(|(earlier, _)| *earlier == hash) else { return false };
        let (hash, amount) = self.earlier.swap_remove(at);
        self.earlier.push((self.hash, self.amount));
        (self.hash, self.amount) = (hash, amount);
        true
    }
}

/// A refund that was attempted and whose fate is open.
#[derive(Debug, Clone)]
pub(super) struct Refund {
    pub(super) hash: PaymentHash,
    pub(super) amount: Msat,
}

/// A session as far as the entries read so far tell.
#[derive(Debug, Clone)]
pub(super) struct SessionAudit {
    pub(super) id: SessionId,
    pub(super) as_provider: bool,
    pub(super) provider: NodeKey,
    pub(super) consumer: NodeKey,
    pub(super) spend_cap: Msat,
    pub(super) quotes: BTreeMap<QuoteId, Quote>,
    pub(super) slices: BTreeMap<u32, Slice>,
    pub(super) requests: BTreeMap<RequestId, Request>,
    /// First halves of the ids of requests that are over.
    pub(super) ended: BTreeSet<[u8; 16]>,
    pub(super) numerators: Numerators,
    pub(super) charged: Msat,
    pub(super) paid: Msat,
    /// What left the remainder again: refunds and what they cost.
    pub(super) refunded: Msat,
    /// What other sessions' credit notes brought in, and what went to others by this one's.
    pub(super) credited: Msat,
    pub(super) spent: Msat,
    /// The last credit note.
    pub(super) note: Option<[u8; 32]>,
    /// Until when it may be spent.
    pub(super) note_until: Option<UnixMs>,
    pub(super) receipted_paid: Msat,
    pub(super) receipts: u32,
    pub(super) last_receipt: Option<ReceiptId>,
    pub(super) closed: bool,
    /// Invoices that its closes named: a close may be said again with another one, after a credit note.
    close_invoices: BTreeSet<Option<String>>,
    pub(super) refund: Option<Refund>,
    pub(super) summary: Option<SessionSummary>,
}

impl SessionAudit {
    pub(super) fn new(
        id: SessionId,
        as_provider: bool,
        open: &SessionOpen,
        quotes: BTreeMap<QuoteId, Quote>,
        keep: bool,
    ) -> Self {
        let summary = keep.then(|| SessionSummary {
            provider: Some(open.provider),
            consumer: Some(open.consumer),
            as_provider,
            quotes: quotes.keys().map(QuoteId::to_string).collect(),
            ..SessionSummary::default()
        });
        SessionAudit {
            id,
            as_provider,
            provider: open.provider,
            consumer: open.consumer,
            spend_cap: open.spend_cap,
            quotes,
            slices: BTreeMap::new(),
            requests: BTreeMap::new(),
            ended: BTreeSet::new(),
            numerators: Numerators::ZERO,
            charged: Msat::ZERO,
            paid: Msat::ZERO,
            refunded: Msat::ZERO,
            credited: Msat::ZERO,
            spent: Msat::ZERO,
            note: None,
            note_until: None,
            receipted_paid: Msat::ZERO,
            receipts: 0,
            last_receipt: None,
            closed: false,
            close_invoices: BTreeSet::new(),
            refund: None,
            summary,
        }
    }

    /// Paid and credited less charged, refunded and spent elsewhere. Zero where the figures contradict each other, which is a
    /// finding elsewhere.
    pub(super) fn remainder(&self) -> Msat {
        let gone = self.charged.saturating_add(self.refunded).saturating_add(self.spent);
        self.paid.saturating_add(self.credited).saturating_sub(gone)
    }
    pub(super) fn owed_by(&self) -> Party {
        Party::Provider(self.provider)
    }

    /// What a charge does, debit-positive.
    pub(super) fn charge_effect(&self, cost: Msat) -> Backing {
        let cost = i128::from(cost.0);
        let nets = if self.as_provider {
            vec![(Account::Prepaid(self.id), cost), (Account::Income, cost.saturating_neg())]
        } else {
            vec![(Account::Expense, cost), (Account::PrepaidAsset(self.id), cost.saturating_neg())]
        };
        Backing::Exactly(nets, Reserves::Nothing)
    }

    /// A further quote for this session's key.
    pub(super) fn requote(&mut self, id: QuoteId, quote: Quote) {
        if let Some(summary) = &mut self.summary {
            summary.quotes.push(id.to_string());
        }
        self.quotes.insert(id, quote);
    }

    pub(super) fn request(
        &mut self,
        signed: &Signed<RequestOpen>,
        open: RequestOpen,
        holds: Vec<TransferId>,
        notes: &mut Notes,
    ) -> Backing {
        if let Err(error) = signed_by(signed, &self.consumer) {
            notes.refuse(&error);
            return Backing::Unjudged;
        }
        notes.version(RequestOpen::KIND, open.version, RequestOpen::VERSION);
        let consumer = Party::Consumer(self.consumer);
        let fresh = !self.requests.contains_key(&open.request) && !self.ended.contains(&half(&open.request));
        notes.require(fresh, Rule::RequestInvalid, consumer, || format!("request {} was opened before", open.request));
        notes.require(self.quotes.contains_key(&open.quote), Rule::RequestInvalid, consumer, || {
            format!("request {} at quote {}, which is not this session's", open.request, open.quote)
        });
        notes.require(!self.closed, Rule::RequestInvalid, consumer, || "a request after the close".into());
        notes.delta.requests = 1;
        if let Some(summary) = &mut self.summary {
            summary.requests.insert(open.request);
        }
        if fresh {
            let (quote, prompt_tokens, max_output) = (open.quote, open.prompt_tokens, open.max_output);
            let part = open.part;
            self.requests
                .insert(open.request, Request { quote, prompt_tokens, max_output, last_ack: None, holds, part });
        }
        Backing::Exactly(Vec::new(), Reserves::Work(self.id))
    }

    pub(super) fn ack(
        &mut self,
        both: &BothSigned<Ack>,
        ack: Ack,
        holds: Vec<TransferId>,
        notes: &mut Notes,
    ) -> Backing {
        if let Err(error) = signed_by_both(both, &self.provider, &self.consumer) {
            notes.refuse(&error);
            return Backing::Unjudged;
        }
        notes.version(Ack::KIND, ack.version, Ack::VERSION);
        let provider = self.owed_by();
        let Some(request) = self.requests.get_mut(&ack.request) else {
            notes.add(
                Rule::RequestUnknown,
                provider,
                format!("an acknowledgement of {}, which is not open", ack.request),
            );
            return Backing::Unjudged;
        };
        let (seq, before) =
            request.last_ack.as_ref().map_or((0, Default::default()), |(_, last)| (last.seq, last.usage));
        notes.require(ack.seq > seq, Rule::AckSequence, provider, || format!("number {} after {seq}", ack.seq));
        let fits = ack.usage.covers(&before)
            && ack.usage.is_consistent()
            && ack.usage.prompt <= request.prompt_tokens
            && ack.usage.completion <= request.max_output;
        notes.require(fits, Rule::AckUsage, provider, || {
            format!("{:?} after {before:?}, of {} prompt tokens", ack.usage, request.prompt_tokens)
        });
        notes.require(request.allows(&ack.usage), Rule::StageWork, provider, || {
            format!("{:?} is not the work that was ordered", ack.usage.part)
        });
        if let Some(quote) = self.quotes.get(&request.quote) {
            let computed = numerators(&ack.usage, &quote.rates);
            let right = computed == Ok(ack.numerators) && ack.cost == charge(ack.numerators);
            notes.require(right, Rule::AckCost, provider, || {
                format!("says {} ({}), computed {computed:?}", ack.numerators.0, ack.cost)
            });
        }
        request.last_ack = Some((ack_id(both), ack));
        request.holds.extend(holds);
        notes.delta.acks = 1;
        Backing::Exactly(Vec::new(), Reserves::Work(self.id))
    }

    /// A request that ended without a receipt.
    pub(super) fn abandoned(
        &mut self,
        id: RequestId,
        last_ack: Option<AckId>,
        claimed: Numerators,
        notes: &mut Notes,
    ) -> Backing {
        let Some(request) = self.requests.remove(&id) else {
            notes.add(Rule::RequestUnknown, Party::Exporter, format!("{id} is not open"));
            return Backing::Unjudged;
        };
        self.ended.insert(half(&id));
        if let Some(order) = request.part {
            let last = request.last_ack.as_ref();
            let usage = last.and_then(|(_, ack)| ack.usage.part).unwrap_or_default();
            let id = last.map(|(id, _)| Digest(id.0));
            notes.leg = Some(Leg { worker: self.provider, order, usage, id, rows: None });
        }
        let last = request.last_ack.as_ref();
        let owed = last.map_or(Numerators::ZERO, |(_, ack)| ack.numerators);
        let right = last_ack == last.map(|(id, _)| *id) && claimed == owed;
        notes.require(right, Rule::AbandonedCharge, Party::Exporter, || {
            format!("charged at {last_ack:?} with {}, both signed {}", claimed.0, owed.0)
        });
        let Ok(cost) = marginal_charge(self.numerators, owed) else {
            notes.add(Rule::AbandonedCharge, Party::Exporter, "the charge does not fit");
            return Backing::Unjudged;
        };
        self.add_charge(owed, cost);
        notes.delta.abandoned = 1;
        notes.delta.charged_msat = cost.0;
        if let Some((_, ack)) = last {
            notes.delta.prompt_tokens = ack.usage.prompt.into();
            notes.delta.cached_tokens = ack.usage.cached_prompt.into();
            notes.delta.output_tokens = ack.usage.completion.into();
        }
        if let Some(summary) = &mut self.summary {
            summary.abandoned.insert(id.to_string(), (last.map(|(id, _)| id.to_string()), owed.0));
        }
        self.charge_effect(cost)
    }

    pub(super) fn add_charge(&mut self, added: Numerators, cost: Msat) {
        self.numerators = self.numerators.checked_add(added).unwrap_or(Numerators(u64::MAX));
        self.charged = self.charged.saturating_add(cost);
    }

    pub(super) fn close(&mut self, signed: &Signed<SessionClose>, notes: &mut Notes) -> Backing {
        let close = match signed.verify(&self.consumer) {
            Ok(close) => close.into_statement(),
            Err(error) => {
                notes.refuse(&error);
                return Backing::Unjudged;
            }
        };
        notes.version(SessionClose::KIND, close.version, SessionClose::VERSION);
        let remainder = self.remainder();
        let consumer = Party::Consumer(self.consumer);
        notes.require(close.remainder == remainder, Rule::CloseRemainder, consumer, || {
            format!("claims {}, paid less charged is {remainder}", close.remainder)
        });
        notes.require(close.last_receipt == self.last_receipt, Rule::CloseRemainder, consumer, || {
            format!("names receipt {:?}, the last is {:?}", close.last_receipt, self.last_receipt)
        });
        notes.require(self.close_invoices.insert(close.invoice.clone()), Rule::CloseTwice, Party::Exporter, || {
            "the session was closed before, with the same invoice".into()
        });
        self.closed = true;
        if self.as_provider {
            Backing::Remainder(self.id, Reserves::Nothing)
        } else {
            Backing::Exactly(Vec::new(), Reserves::Nothing)
        }
    }

    pub(super) fn credit_note(&mut self, signed: &Signed<CreditNote>, notes: &mut Notes) -> Backing {
        let (note_id, note) = match signed.verify(&self.provider) {
            Ok(note) => (note.id(), note.into_statement()),
            Err(error) => {
                notes.refuse(&error);
                return Backing::Unjudged;
            }
        };
        notes.version(CreditNote::KIND, note.version, CreditNote::VERSION);
        (self.note, self.note_until) = (Some(note_id), Some(note.valid_until));
        if let Some(summary) = &mut self.summary {
            summary.notes.insert(note_id);
        }
        let remainder = self.remainder();
        let parties = note.provider == self.provider && note.consumer == self.consumer;
        notes.require(note.amount == remainder && parties, Rule::CreditNoteAmount, self.owed_by(), || {
            format!("over {}, still owed are {remainder}", note.amount)
        });
        if self.as_provider {
            Backing::Remainder(self.id, Reserves::Nothing)
        } else {
            Backing::Exactly(Vec::new(), Reserves::Nothing)
        }
    }

    /// The provider's word that a receipt is in its log.
    pub(super) fn promise(&mut self, signed: &Signed<InclusionPromise>, notes: &mut Notes) -> Backing {
        match signed.verify(&self.provider) {
            Ok(promise) => {
                notes.version(InclusionPromise::KIND, promise.version, InclusionPromise::VERSION);
                notes.require(promise.node == self.provider, Rule::PromiseBroken, self.owed_by(), || {
                    format!("promises for {}", promise.node)
                });
                if let Some(summary) = &mut self.summary {
                    summary.promised.push((promise.receipt.0, promise.index, promise.leaf));
                }
            }
            Err(error) => notes.refuse(&error),
        }
        Backing::Exactly(Vec::new(), Reserves::Nothing)
    }

    /// Adds an entry's part to the summary and, at the end, what only the session knows.
    pub(super) fn summarise(&mut self, delta: &SideTotals) {
        let (numerators, paid, charged) = (self.numerators, self.paid, self.charged);
        let (receipts, last, closed) = (self.receipts, self.last_receipt, self.closed);
        if let Some(summary) = &mut self.summary {
            summary.prompt_tokens = summary.prompt_tokens.saturating_add(delta.prompt_tokens);
            summary.output_tokens = summary.output_tokens.saturating_add(delta.output_tokens);
            summary.numerators = numerators.0;
            (summary.paid_msat, summary.charged_msat) = (paid.0, charged.0);
            summary.refunded_msat = summary.refunded_msat.saturating_add(delta.refunded_msat);
            (summary.receipts, summary.closed) = (receipts.into(), closed);
            summary.last_receipt = last.map(|id| id.to_string());
        }
    }
}

/// The signature alone: the statement was read, and its bytes found canonical, to learn whose session it is of.
fn signed_by<T: Statement>(signed: &Signed<T>, key: &NodeKey) -> Result<(), VerifyError> {
    verify_body::<T>(signed.body(), key, signed.signature())
}

/// Both signatures alone, as [`signed_by`].
pub(super) fn signed_by_both<T: Statement>(
    both: &BothSigned<T>,
    provider: &NodeKey,
    consumer: &NodeKey,
) -> Result<(), VerifyError> {
    verify_body::<T>(both.body(), provider, both.provider_signature())?;
    verify_body::<T>(both.body(), consumer, both.consumer_signature())
}

pub(super) fn half(id: &RequestId) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&id.0[..16]);
    out
}
