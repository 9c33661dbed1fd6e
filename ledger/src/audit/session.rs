//! One session under audit: requests, acknowledgements, receipts, close.

use super::{
    Party, Rule, SessionSummary, SideTotals,
    flows::{Backing, Reserves},
};
use crate::{
    statements::{
        Ack, CreditNote, InclusionPromise, Receipt, ReceiptOpening, RequestOpen, SessionClose, SessionOpen, ack_id,
        receipt_id,
    },
    transfer::Account,
};
use satgrid_pricing::{charge, marginal_charge, numerators};
use satgrid_types::{
    AckId, BothSigned, Digest, Msat, NodeKey, Numerators, Quote, QuoteId, ReceiptId, RequestId, SessionId, Signed,
    Statement, TransferId, VerifyError, verify_body,
};
use std::collections::{BTreeMap, BTreeSet};

/// What one entry's evidence led to: findings, and what it adds to the totals.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) found: Vec<(Rule, Party, String)>,
    pub(super) delta: SideTotals,
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
    quote: QuoteId,
    prompt_tokens: u32,
    max_output: u32,
    last_ack: Option<(AckId, Ack)>,
    pub(super) holds: Vec<TransferId>,
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
    pub(super) hash: satgrid_types::PaymentHash,
    pub(super) amount: Msat,
    pub(super) max_fee: Msat,
    pub(super) status: SliceStatus,
    pub(super) receipted: bool,
}

/// A refund that was attempted and whose fate is open.
#[derive(Debug, Clone)]
pub(super) struct Refund {
    pub(super) hash: satgrid_types::PaymentHash,
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
    ended: BTreeSet<[u8; 16]>,
    numerators: Numerators,
    pub(super) charged: Msat,
    pub(super) paid: Msat,
    /// What left the remainder again: refunds and what they cost.
    pub(super) refunded: Msat,
    receipted_paid: Msat,
    receipts: u32,
    last_receipt: Option<ReceiptId>,
    pub(super) closed: bool,
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
            receipted_paid: Msat::ZERO,
            receipts: 0,
            last_receipt: None,
            closed: false,
            refund: None,
            summary,
        }
    }

    /// Paid less charged less refunded. Zero where the figures contradict each other, which is a finding elsewhere.
    pub(super) fn remainder(&self) -> Msat {
        self.paid.saturating_sub(self.charged).saturating_sub(self.refunded)
    }
    pub(super) fn owed_by(&self) -> Party {
        Party::Provider(self.provider)
    }

    /// What a charge does, debit-positive.
    fn charge_effect(&self, cost: Msat) -> Backing {
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
        if fresh {
            let (quote, prompt_tokens, max_output) = (open.quote, open.prompt_tokens, open.max_output);
            self.requests.insert(open.request, Request { quote, prompt_tokens, max_output, last_ack: None, holds });
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

    /// A finished request. `at` is where the receipt stands in the log: its number and leaf.
    pub(super) fn receipt(
        &mut self,
        (both, receipt): (&BothSigned<Receipt>, Receipt),
        opening: Option<&ReceiptOpening>,
        at: (u64, Digest),
        notes: &mut Notes,
    ) -> Backing {
        if let Err(error) = signed_by_both(both, &self.provider, &self.consumer) {
            notes.refuse(&error);
            return Backing::Unjudged;
        }
        notes.version(Receipt::KIND, receipt.version, Receipt::VERSION);
        let provider = self.owed_by();
        let id = receipt_id(both);
        let chained = receipt.seq == self.receipts && receipt.previous == self.last_receipt;
        notes.require(chained, Rule::ReceiptChain, provider, || {
            format!("number {} after {} receipts, previous {:?}", receipt.seq, self.receipts, receipt.previous)
        });
        let request = self.requests.remove(&receipt.request);
        self.ended.insert(half(&receipt.request));
        match &request {
            Some(request) => self.check_receipt_work(&receipt, request, opening, notes),
            None => notes.add(
                Rule::RequestUnknown,
                provider,
                format!("a receipt of {}, which is not open", receipt.request),
            ),
        }
        if let Some(opening) = opening {
            let opens = opening.private.commitment(&opening.salt) == receipt.private_hash;
            notes.require(opens, Rule::ReceiptOpening, Party::Exporter, || {
                "the private fields are not what the receipt commits to".into()
            });
        }
        self.check_receipt_terms(&receipt, request.as_ref(), notes);
        let cost = marginal_charge(self.numerators, receipt.numerators);
        notes.require(cost == Ok(receipt.cost), Rule::ReceiptCost, provider, || {
            format!("costs {}, computed {cost:?}", receipt.cost)
        });
        let cost = cost.unwrap_or(receipt.cost);
        self.add_charge(receipt.numerators, cost);
        let cumulative = receipt.cumulative_numerators == self.numerators && receipt.cumulative_cost == self.charged;
        notes.require(cumulative, Rule::ReceiptCumulative, provider, || {
            format!(
                "says {} for {}, computed {}",
                receipt.cumulative_cost, receipt.cumulative_numerators.0, self.charged
            )
        });
        self.check_receipt_slices(&receipt, notes);
        self.receipts = self.receipts.saturating_add(1);
        self.last_receipt = Some(id);
        notes.delta.receipts = 1;
        notes.delta.prompt_tokens = receipt.usage.prompt.into();
        notes.delta.cached_tokens = receipt.usage.cached_prompt.into();
        notes.delta.output_tokens = receipt.usage.completion.into();
        notes.delta.charged_msat = cost.0;
        if let Some(summary) = &mut self.summary {
            summary.logged.push((id.0, at.0, at.1));
        }
        self.charge_effect(cost)
    }

    fn check_receipt_work(
        &self,
        receipt: &Receipt,
        request: &Request,
        opening: Option<&ReceiptOpening>,
        notes: &mut Notes,
    ) {
        let provider = self.owed_by();
        let last = request.last_ack.as_ref();
        notes.require(receipt.last_ack == last.map(|(id, _)| *id), Rule::ReceiptLastAck, provider, || {
            format!("names {:?}, both signed {:?} last", receipt.last_ack, last.map(|(id, _)| *id))
        });
        let acked = last.map(|(_, ack)| ack.usage).unwrap_or_default();
        let fits = receipt.usage.is_consistent()
            && receipt.usage.covers(&acked)
            && receipt.usage.prompt <= request.prompt_tokens
            && receipt.usage.completion <= request.max_output;
        notes.require(fits, Rule::ReceiptUsage, provider, || {
            format!("{:?}, acknowledged {acked:?}, {} prompt tokens", receipt.usage, request.prompt_tokens)
        });
        if let (Some(opening), Some((_, ack))) = (opening, last)
            && ack.usage.completion == receipt.usage.completion
        {
            let same = opening.private.running_hash == ack.running_hash;
            notes.require(same, Rule::ReceiptUsage, provider, || {
                "the output's hash is not that of the last acknowledgement over as many tokens".into()
            });
        }
    }

    fn check_receipt_terms(&self, receipt: &Receipt, request: Option<&Request>, notes: &mut Notes) {
        let provider = self.owed_by();
        let Some(quote) = self.quotes.get(&receipt.quote) else {
            notes.add(Rule::ReceiptTerms, provider, format!("quote {} is not this session's", receipt.quote));
            return;
        };
        let computed = numerators(&receipt.usage, &quote.rates);
        notes.require(computed == Ok(receipt.numerators), Rule::ReceiptCost, provider, || {
            format!("numerators {}, computed {computed:?}", receipt.numerators.0)
        });
        let differs = [
            (request.is_none_or(|request| request.quote == receipt.quote), "quote"),
            (receipt.rates == quote.rates, "rates"),
            (receipt.listing == quote.listing, "listing"),
            (receipt.model_root == quote.model_root, "model root"),
            (receipt.tokenizer == quote.tokenizer, "tokenizer"),
            (receipt.quantisation == quote.quantisation, "quantisation"),
            (receipt.profile == quote.profile, "engine profile"),
            (receipt.build == quote.build, "build"),
            (receipt.instruction_set == quote.instruction_set, "instruction set"),
            (receipt.provider == self.provider, "provider"),
            (receipt.consumer == self.consumer, "consumer"),
        ];
        let differs: Vec<&str> = differs.iter().filter(|(same, _)| !same).map(|(_, name)| *name).collect();
        notes.require(differs.is_empty(), Rule::ReceiptTerms, provider, || {
            format!("not the quote's: {}", differs.join(", "))
        });
    }

    fn check_receipt_slices(&mut self, receipt: &Receipt, notes: &mut Notes) {
        let provider = Party::Provider(self.provider);
        let sorted = receipt.slices.is_sorted_by(|a, b| a.k < b.k) && receipt.slices.len() <= Receipt::MAX_SLICES;
        notes.require(sorted, Rule::ReceiptSlices, provider, || "slices out of order or too many".into());
        for given in &receipt.slices {
            let as_provider = self.as_provider;
            let known = self.slices.get_mut(&given.k).is_some_and(|slice| {
                // The payee's word may reach the payer before its own wallet's: an attempt is enough there.
                let moved = match slice.status {
                    SliceStatus::Paid => true,
                    SliceStatus::Attempted => !as_provider,
                    SliceStatus::Invoiced | SliceStatus::Failed => false,
                };
                let same = slice.hash == given.payment_hash && slice.amount == given.amount;
                let first = !slice.receipted;
                slice.receipted = true;
                moved && same && first
            });
            notes.require(known, Rule::ReceiptSlices, provider, || {
                format!(
                    "slice {} over {} is not a payment of this session, or was counted before",
                    given.k, given.amount
                )
            });
        }
        let newly = Msat::checked_sum(receipt.slices.iter().map(|slice| slice.amount)).unwrap_or(Msat::MAX);
        self.receipted_paid = self.receipted_paid.saturating_add(newly);
        notes.require(receipt.cumulative_paid == self.receipted_paid, Rule::ReceiptCumulative, provider, || {
            format!("says {} paid, its slices so far are {}", receipt.cumulative_paid, self.receipted_paid)
        });
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

    fn add_charge(&mut self, added: Numerators, cost: Msat) {
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
        notes.require(close.remainder == remainder, Rule::CloseRemainder, Party::Consumer(self.consumer), || {
            format!("claims {}, paid less charged is {remainder}", close.remainder)
        });
        notes.require(
            close.last_receipt == self.last_receipt,
            Rule::CloseRemainder,
            Party::Consumer(self.consumer),
            || format!("names receipt {:?}, the last is {:?}", close.last_receipt, self.last_receipt),
        );
        self.closed = true;
        if self.as_provider {
            Backing::Remainder(self.id, Reserves::Nothing)
        } else {
            Backing::Exactly(Vec::new(), Reserves::Nothing)
        }
    }

    pub(super) fn credit_note(&mut self, signed: &Signed<CreditNote>, notes: &mut Notes) -> Backing {
        let note = match signed.verify(&self.provider) {
            Ok(note) => note.into_statement(),
            Err(error) => {
                notes.refuse(&error);
                return Backing::Unjudged;
            }
        };
        notes.version(CreditNote::KIND, note.version, CreditNote::VERSION);
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
fn signed_by_both<T: Statement>(
    both: &BothSigned<T>,
    provider: &NodeKey,
    consumer: &NodeKey,
) -> Result<(), VerifyError> {
    verify_body::<T>(both.body(), provider, both.provider_signature())?;
    verify_body::<T>(both.body(), consumer, both.consumer_signature())
}

fn half(id: &RequestId) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&id.0[..16]);
    out
}
