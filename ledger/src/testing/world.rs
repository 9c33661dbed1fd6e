//! The world itself: what a provider and a consumer do, step by step, and what each of them journals.

use super::party::{Party, bolt11, bytes32, listing};
use crate::{
    entry::{Draft, Evidence},
    statements::{
        Ack, CreditNote, CreditReason, CreditTransfer, InclusionPromise, Receipt, ReceiptOpening, ReceiptPrivate,
        RefundTo, RequestOpen, RequestPrivate, RunningHash, SessionClose, SessionOpen, SliceDescriptor, SlicePaid,
        ack_id, note_id, receipt_id, session_id,
    },
    transfer::{Account, Transfer, TransferKind, transfer_id},
};
use ed25519_dalek::SigningKey;
use satgrid_pricing::{charge, marginal_charge, numerators};
use satgrid_types::{
    AckId, BothSigned, Digest, EngineProfile, FinishReason, Msat, MsatPerMtok, Numerators, PaymentHash, Preimage,
    Quote, RateCard, ReceiptId, RequestId, Salt, Sampling, SessionId, Signed, Terms, TokenUsage, TransferId, UnixMs,
    Verified, VerifiedListing, node_key,
};
use sha2::{Digest as _, Sha256};

/// When the world begins: 2026-01-01T00:00:00Z.
pub const EPOCH: UnixMs = UnixMs(1_767_225_600_000);

/// How much work a request is.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    pub prompt: u32,
    pub cached: u32,
    pub output: u32,
    /// Acknowledgements on the way.
    pub acks: u32,
}

/// A session under way.
#[derive(Debug, Clone)]
pub struct Session {
    pub id: SessionId,
    pub key: SigningKey,
    pub quote: Verified<Quote>,
    pub open: Verified<SessionOpen>,
    pub paid: Msat,
    pub charged: Msat,
    pub numerators: Numerators,
    next_slice: u32,
    receipts: u32,
    requests: u32,
    last_receipt: Option<ReceiptId>,
    unreceipted: Vec<SlicePaid>,
    receipted_paid: Msat,
}

/// A request that was opened and reserved on both sides.
#[derive(Debug, Clone)]
struct Running {
    id: RequestId,
    salt: Salt,
    prompt_hash: Digest,
    hold: TransferId,
    last_ack: Option<AckId>,
    acked: Numerators,
    running: RunningHash,
}

/// One provider, one consumer.
#[derive(Debug, Clone)]
pub struct World {
    pub provider: Party,
    pub consumer: Party,
    pub now: UnixMs,
    pub listing: VerifiedListing,
    /// A refund is paid with this routing fee.
    pub refund_fee: Msat,
    /// A slice is paid with this routing fee.
    pub slice_fee: Msat,
    sessions: u32,
    keys: String,
}

impl Default for World {
    fn default() -> World {
        World::new()
    }
}

impl World {
    /// Both parties exist and the listing is out.
    pub fn new() -> World {
        World::with_rates(RateCard {
            input: MsatPerMtok(900_000),
            cached_input: MsatPerMtok(90_000),
            output: MsatPerMtok(3_300_001),
            per_request: Msat(5),
            ..RateCard::default()
        })
    }

    pub fn with_rates(rates: RateCard) -> World {
        World::of("provider", "consumer", "session", rates)
    }

    /// A world whose parties and session keys have other names: its journals can stand beside those of another world.
    pub fn of(provider: &str, consumer: &str, keys: &str, rates: RateCard) -> World {
        let keys = keys.to_owned();
        let (mut provider, mut consumer) = (Party::new(provider), Party::new(consumer));
        let listing = listing(&provider, rates, EPOCH);
        let mut now = EPOCH;
        for party in [&mut provider, &mut consumer] {
            let genesis = Draft::of(party.genesis());
            party.append(now, genesis);
            now = now.plus_ms(7);
            party.append(now, Draft::of(Evidence::Listing { event_json: listing.event().to_json() }));
        }
        World { provider, consumer, now, listing, refund_fee: Msat(3), slice_fee: Msat(2), sessions: 0, keys }
    }

    /// A representative history: three sessions, one with an abandoned request and a failed payment, one refunded, one
    /// left with a credit note, wallet snapshots on both sides.
    pub fn example() -> World {
        let mut world = World::new();
        let mut first = world.open();
        world.pay(&mut first, Msat::sat(10));
        world.complete(&mut first, Work { prompt: 200, cached: 0, output: 300, acks: 2 });
        world.fail_payment(&mut first, Msat::sat(10));
        world.pay(&mut first, Msat::sat(20));
        world.abandon(&mut first, Work { prompt: 120, cached: 64, output: 100, acks: 1 });
        world.complete(&mut first, Work { prompt: 700, cached: 512, output: 1_000, acks: 3 });
        let mut second = world.open();
        world.pay(&mut second, Msat::sat(5));
        world.complete(&mut second, Work { prompt: 33, cached: 0, output: 11, acks: 1 });
        world.complete(&mut second, Work { prompt: 1, cached: 0, output: 1, acks: 0 });
        world.close_with_refund(&mut first);
        world.close_with_credit_note(&mut second);
        let mut third = world.open();
        world.pay(&mut third, Msat::sat(10));
        world.complete(&mut third, Work { prompt: 64, cached: 0, output: 128, acks: 1 });
        world.snapshot();
        world
    }

    fn tick(&mut self) -> UnixMs {
        self.now = self.now.plus_ms(13);
        self.now
    }
    fn provider_entry(&mut self, draft: Draft) {
        let at = self.tick();
        self.provider.append(at, draft);
    }
    fn consumer_entry(&mut self, draft: Draft) {
        let at = self.tick();
        self.consumer.append(at, draft);
    }
    fn both(&mut self, evidence: &Evidence) {
        self.provider_entry(Draft::of(evidence.clone()));
        self.consumer_entry(Draft::of(evidence.clone()));
    }

    /// A quote, accepted.
    pub fn open(&mut self) -> Session {
        self.sessions = self.sessions.saturating_add(1);
        let key = SigningKey::from_bytes(&bytes32(&format!("{} {}", self.keys, self.sessions)));
        let at = self.tick();
        let quote = Quote {
            version: Quote::VERSION,
            provider: node_key(&self.provider.node),
            lightning_node: self.provider.lightning_key(),
            consumer: node_key(&key),
            listing: self.listing.id(),
            model_root: self.listing.model_root,
            tokenizer: self.listing.tokenizer,
            quantisation: self.listing.quantisation.clone(),
            profile: EngineProfile::Exact,
            build: self.listing.build,
            instruction_set: self.listing.instruction_set.clone(),
            context_length: self.listing.context_length,
            rates: self.listing.rates,
            terms: Terms::default(),
            issued_at: at,
            valid_until: at.plus_ms(Quote::VALIDITY_MS),
            nonce: self.sessions.into(),
        };
        let quote = verified(&quote, &self.provider.node);
        let open = SessionOpen {
            version: SessionOpen::VERSION,
            provider: node_key(&self.provider.node),
            consumer: node_key(&key),
            quote: quote.quote_id(),
            refund_to: RefundTo::InvoiceAtClose,
            spend_cap: Msat::sat(1_000),
            opened_at: self.tick(),
        };
        let open = verified(&open, &key);
        self.both(&Evidence::Quote(quote.evidence().clone()));
        self.both(&Evidence::Open(open.evidence().clone()));
        Session {
            id: session_id(&open),
            key,
            quote,
            open,
            paid: Msat::ZERO,
            charged: Msat::ZERO,
            numerators: Numerators::ZERO,
            next_slice: 0,
            receipts: 0,
            requests: 0,
            last_receipt: None,
            unreceipted: Vec::new(),
            receipted_paid: Msat::ZERO,
        }
    }

    /// An invoice for slice `k`, journalled on both sides.
    fn invoice(&mut self, session: &Session, k: u32, again: u32, amount: Msat) -> (PaymentHash, Preimage) {
        let descriptor = SliceDescriptor {
            version: SliceDescriptor::VERSION,
            session: session.id,
            k,
            amount,
            quote: session.quote.quote_id(),
            provider: session.quote.provider,
            consumer: session.quote.consumer,
            previous_receipt: session.last_receipt,
        };
        let preimage = Preimage(bytes32(&format!("preimage {} {k} {again}", session.id)));
        let payment_hash = PaymentHash(Sha256::digest(preimage.0).into());
        let at = self.tick();
        let bolt11 = bolt11(&self.provider.lightning, amount, &descriptor.description_hash(), &payment_hash, at);
        self.both(&Evidence::Invoice { session: session.id, k, bolt11, descriptor });
        (payment_hash, preimage)
    }

    fn attempt(&mut self, session: &Session, k: u32, tries: u32, hash: PaymentHash, amount: Msat) -> [TransferId; 2] {
        let max_fee = Msat(1_000);
        let [slice, fee] =
            [TransferKind::Slice, TransferKind::SliceFee].map(|kind| transfer_id(session.id, None, kind, tries));
        let attempted = Evidence::PaymentAttempted { session: session.id, k, payment_hash: hash, max_fee };
        self.consumer_entry(Draft::of(attempted).with([
            Transfer::pending(slice, Account::PrepaidAsset(session.id), Account::Lightning, amount, None),
            Transfer::pending(fee, Account::RoutingFees, Account::Lightning, max_fee, None),
        ]));
        [slice, fee]
    }

    /// The next slice, invoiced, paid and received.
    pub fn pay(&mut self, session: &mut Session, amount: Msat) {
        let k = session.next_slice;
        let (payment_hash, preimage) = self.invoice(session, k, 1, amount);
        let tries = crate::transfer::attempt(k, 1).expect("a small number");
        let [slice, fee] = self.attempt(session, k, tries, payment_hash, amount);
        let credit = transfer_id(session.id, None, TransferKind::SliceCredit, k);
        self.provider_entry(Draft::of(Evidence::PaymentReceived { payment_hash, amount }).with([Transfer::post(
            credit,
            Account::Lightning,
            Account::Prepaid(session.id),
            amount,
        )]));
        let routing = self.slice_fee;
        let fee = if routing.is_zero() { Transfer::void(fee) } else { Transfer::post_pending(fee, routing) };
        self.consumer_entry(
            Draft::of(Evidence::PaymentSettled { payment_hash, preimage, amount, fee: routing })
                .with([Transfer::post_pending(slice, amount), fee]),
        );
        session.next_slice = k.saturating_add(1);
        session.paid = session.paid.saturating_add(amount);
        session.unreceipted.push(SlicePaid { k, payment_hash, amount });
    }

    /// The next slice, invoiced, attempted and failed; its number is free again.
    pub fn fail_payment(&mut self, session: &mut Session, amount: Msat) {
        let k = session.next_slice;
        let (payment_hash, _) = self.invoice(session, k, 0, amount);
        let [slice, fee] = self.attempt(session, k, k, payment_hash, amount);
        self.consumer_entry(
            Draft::of(Evidence::PaymentFailed { payment_hash, reason: "no route".into() })
                .with([Transfer::void(slice), Transfer::void(fee)]),
        );
    }

    fn begin(&mut self, session: &mut Session, work: Work) -> Running {
        let id = RequestId(bytes32(&format!("request {} {}", session.id, session.requests)));
        session.requests = session.requests.saturating_add(1);
        let salt = Salt(bytes32(&format!("salt {id}")));
        let private = RequestPrivate::new(&salt, &tokens(work.prompt), Sampling::default(), Vec::new(), 0);
        let open = RequestOpen {
            version: RequestOpen::VERSION,
            session: session.id,
            request: id,
            quote: session.quote.quote_id(),
            prompt_tokens: work.prompt,
            max_output: work.output.saturating_add(100),
            private_hash: private.commitment(&salt),
            opened_at: self.tick(),
            part: None,
        };
        let open = Evidence::Request(Signed::sign(&open, &session.key));
        let hold = transfer_id(session.id, Some(id), TransferKind::Hold, 0);
        let reserve = session.paid.saturating_sub(session.charged);
        let until = Some(self.now.plus_ms(3_600_000));
        let (debit, credit) = (Account::Prepaid(session.id), Account::Income);
        self.provider_entry(Draft::of(open.clone()).with([Transfer::pending(hold, debit, credit, reserve, until)]));
        let (debit, credit) = (Account::Expense, Account::PrepaidAsset(session.id));
        self.consumer_entry(Draft::of(open).with([Transfer::pending(hold, debit, credit, reserve, until)]));
        let running = RunningHash::start(&salt, &id);
        let mut request = Running {
            id,
            salt,
            prompt_hash: private.prompt_hash,
            hold,
            last_ack: None,
            acked: Numerators::ZERO,
            running,
        };
        for seq in 1..=work.acks {
            let share = |total: u32| scale(total, seq, work.acks);
            let usage = TokenUsage {
                prompt: work.prompt,
                cached_prompt: work.cached,
                completion: share(work.output),
                reasoning: share(work.output) / 4,
                part: None,
            };
            let before = if seq == 1 { 0 } else { scale(work.output, seq.saturating_sub(1), work.acks) };
            (before..usage.completion).for_each(|token| request.running.push(token));
            let numerators = numerators(&usage, &session.quote.rates).expect("small numbers");
            let ack = Ack {
                version: Ack::VERSION,
                session: session.id,
                request: id,
                seq,
                usage,
                numerators,
                cost: charge(numerators),
                running_hash: request.running.value(),
            };
            let ack = BothSigned::countersign(&Signed::sign(&ack, &self.provider.node), &session.key);
            (request.last_ack, request.acked) = (Some(ack_id(&ack)), numerators);
            self.both(&Evidence::Ack(ack));
        }
        request
    }

    /// A request that was acknowledged so far and runs on.
    pub fn start(&mut self, session: &mut Session, work: Work) {
        let _running = self.begin(session, work);
    }

    fn settle(&self, hold: TransferId, cost: Msat) -> Transfer {
        if cost.is_zero() { Transfer::void(hold) } else { Transfer::post_pending(hold, cost) }
    }

    /// A request from its opening to its receipt, with the provider's inclusion promise.
    pub fn complete(&mut self, session: &mut Session, work: Work) -> ReceiptId {
        let mut request = self.begin(session, work);
        let done = if work.acks == 0 { 0 } else { work.output };
        (done..work.output).for_each(|token| request.running.push(token));
        let usage = TokenUsage {
            prompt: work.prompt,
            cached_prompt: work.cached,
            completion: work.output,
            reasoning: work.output / 4,
            part: None,
        };
        let added = numerators(&usage, &session.quote.rates).expect("small numbers");
        let cost = marginal_charge(session.numerators, added).expect("small numbers");
        let private = ReceiptPrivate {
            prompt_hash: request.prompt_hash,
            running_hash: request.running.value(),
            sampling: Sampling::default(),
        };
        let slices = core::mem::take(&mut session.unreceipted);
        let newly = Msat::checked_sum(slices.iter().map(|slice| slice.amount)).expect("small numbers");
        session.numerators = session.numerators.checked_add(added).expect("small numbers");
        session.charged = session.charged.saturating_add(cost);
        session.receipted_paid = session.receipted_paid.saturating_add(newly);
        let quote = &session.quote;
        let receipt = Receipt {
            version: Receipt::VERSION,
            session: session.id,
            seq: session.receipts,
            previous: session.last_receipt,
            request: request.id,
            quote: quote.quote_id(),
            listing: quote.listing,
            model: self.listing.model.clone(),
            model_root: quote.model_root,
            tokenizer: quote.tokenizer,
            quantisation: quote.quantisation.clone(),
            engine: "llama.cpp".into(),
            profile: quote.profile,
            build: quote.build,
            instruction_set: quote.instruction_set.clone(),
            usage,
            rates: quote.rates,
            numerators: added,
            cost,
            cumulative_numerators: session.numerators,
            cumulative_cost: session.charged,
            cumulative_paid: session.receipted_paid,
            slices,
            finish: FinishReason::Stop,
            started_at: self.now,
            first_token_ms: Some(120),
            duration_ms: 4_000,
            private_hash: private.commitment(&request.salt),
            last_ack: request.last_ack,
            error: None,
            provider: quote.provider,
            consumer: quote.consumer,
            stage_root: None,
            expert_root: None,
            fingerprint_root: None,
            part: None,
            split: None,
            expert_rows: None,
            expert_split: None,
        };
        let signed = BothSigned::countersign(&Signed::sign(&receipt, &self.provider.node), &session.key);
        let id = receipt_id(&signed);
        let opening = Some(ReceiptOpening { salt: request.salt, private });
        let draft = Draft::of(Evidence::Receipt { receipt: signed, opening }).with([self.settle(request.hold, cost)]);
        self.provider_entry(draft.clone());
        self.consumer_entry(draft);
        session.receipts = session.receipts.saturating_add(1);
        session.last_receipt = Some(id);
        let last = self.provider.journal.last();
        if let Some(promise) =
            last.and_then(|entry| InclusionPromise::of(&entry, node_key(&self.provider.node), self.now))
        {
            let promise = Evidence::Promise(Signed::sign(&promise, &self.provider.node));
            self.consumer_entry(Draft::of(promise));
        }
        id
    }

    /// A request that is broken off and charged at its last acknowledgement.
    pub fn abandon(&mut self, session: &mut Session, work: Work) {
        let request = self.begin(session, work);
        let cost = marginal_charge(session.numerators, request.acked).expect("small numbers");
        session.numerators = session.numerators.checked_add(request.acked).expect("small numbers");
        session.charged = session.charged.saturating_add(cost);
        let evidence = Evidence::Abandoned {
            session: session.id,
            request: request.id,
            last_ack: request.last_ack,
            numerators: request.acked,
        };
        let draft = Draft::of(evidence).with([self.settle(request.hold, cost)]);
        self.provider_entry(draft.clone());
        self.consumer_entry(draft);
    }

    fn close(&mut self, session: &Session, invoice: Option<String>) -> Msat {
        let remainder = session.paid.saturating_sub(session.charged);
        let close = SessionClose {
            version: SessionClose::VERSION,
            session: session.id,
            last_receipt: session.last_receipt,
            remainder,
            invoice,
            closed_at: self.tick(),
        };
        let close = Evidence::Close(Signed::sign(&close, &session.key));
        let id = transfer_id(session.id, None, TransferKind::Remainder, 0);
        let (debit, credit) = (Account::Prepaid(session.id), Account::RefundsDue(session.id));
        let moved = (!remainder.is_zero()).then(|| Transfer::post(id, debit, credit, remainder));
        self.provider_entry(Draft::of(close.clone()).with(moved));
        self.consumer_entry(Draft::of(close));
        remainder
    }

    /// The consumer closes; the remainder less the routing fee comes back.
    pub fn close_with_refund(&mut self, session: &mut Session) {
        let fee = self.refund_fee;
        let amount = session.paid.saturating_sub(session.charged).saturating_sub(fee);
        let preimage = Preimage(bytes32(&format!("refund {}", session.id)));
        let payment_hash = PaymentHash(Sha256::digest(preimage.0).into());
        let terms = Digest(bytes32("refund"));
        let invoice = bolt11(&self.consumer.lightning, amount, &terms, &payment_hash, self.now);
        let remainder = self.close(session, Some(invoice));
        let refund = transfer_id(session.id, None, TransferKind::Refund, 0);
        let (debit, credit) = (Account::RefundsDue(session.id), Account::Lightning);
        let attempted = Evidence::RefundAttempted { session: session.id, payment_hash, amount, max_fee: fee };
        self.provider_entry(Draft::of(attempted).with([Transfer::pending(refund, debit, credit, remainder, None)]));
        let received = Evidence::RefundReceived { session: session.id, payment_hash, amount };
        let credit = transfer_id(session.id, None, TransferKind::RefundCredit, 0);
        let loss = transfer_id(session.id, None, TransferKind::RefundLoss, 0);
        let asset = Account::PrepaidAsset(session.id);
        self.consumer_entry(Draft::of(received).with([
            Transfer::post(credit, Account::Lightning, asset, amount),
            Transfer::post(loss, Account::RoutingFees, asset, fee),
        ]));
        let settled =
            Evidence::RefundSettled { session: session.id, payment_hash, amount, fee, preimage: Some(preimage) };
        self.provider_entry(Draft::of(settled).with([Transfer::post_pending(refund, remainder)]));
    }

    /// The consumer closes; the remainder stays due, by a credit note.
    pub fn close_with_credit_note(&mut self, session: &mut Session) -> Signed<CreditNote> {
        let remainder = self.close(session, None);
        let at = self.tick();
        let note = CreditNote {
            version: CreditNote::VERSION,
            session: session.id,
            provider: session.quote.provider,
            consumer: session.quote.consumer,
            amount: remainder,
            reason: CreditReason::Dust,
            issued_at: at,
            valid_until: at.plus_ms(CreditNote::VALIDITY_MS),
        };
        let note = Signed::sign(&note, &self.provider.node);
        self.both(&Evidence::CreditNote(note.clone()));
        note
    }

    /// What a closed session is owed by a note becomes the balance of another one.
    pub fn spend_credit_note(&mut self, from: &Session, note: &Signed<CreditNote>, to: &mut Session) {
        let amount = from.paid.saturating_sub(from.charged);
        let transfer = CreditTransfer {
            version: CreditTransfer::VERSION,
            provider: to.quote.provider,
            from: from.id,
            consumer: from.quote.consumer,
            to: to.id,
            note: note_id(note),
            amount,
        };
        let both = BothSigned::countersign(&Signed::sign(&transfer, &self.provider.node), &from.key);
        let (evidence, id) = (Evidence::CreditTransfer(both), transfer_id(from.id, None, TransferKind::CreditSpent, 0));
        let (debit, credit) = (Account::RefundsDue(from.id), Account::Prepaid(to.id));
        self.provider_entry(Draft::of(evidence.clone()).with([Transfer::post(id, debit, credit, amount)]));
        let (debit, credit) = (Account::PrepaidAsset(to.id), Account::PrepaidAsset(from.id));
        self.consumer_entry(Draft::of(evidence).with([Transfer::post(id, debit, credit, amount)]));
        to.paid = to.paid.saturating_add(amount);
    }

    /// Both wallets are looked at; both are solvent.
    pub fn snapshot(&mut self) {
        let snapshot = Evidence::WalletSnapshot { lightning_msat: Msat::sat(100_000), onchain_msat: Msat::sat(25_000) };
        self.both(&snapshot);
    }
}

fn verified<T: satgrid_types::Statement>(statement: &T, key: &SigningKey) -> Verified<T> {
    Signed::sign(statement, key).verify(&node_key(key)).expect("just signed")
}

fn tokens(n: u32) -> Vec<u32> {
    (0..n).collect()
}

/// `total * part / parts`, for small numbers.
fn scale(total: u32, part: u32, parts: u32) -> u32 {
    let share = u64::from(total).saturating_mul(part.into()).checked_div(parts.into()).unwrap_or(0);
    u32::try_from(share).unwrap_or(u32::MAX)
}
