//! Sessions by hand: every step on both sides, booked, and folded again from what was booked.

use super::*;
use crate::{
    check::{self, CountFault, Counted},
    exposure::ConsumerExposure,
};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    Books,
    statements::{RequestOpen, RunningHash, receipt_id},
    testing::{World, bolt11, bytes32},
};
use satgrid_pricing::{charge, cost_alone, numerators};
use satgrid_types::{Digest, FinishReason, Preimage, RateCard, RequestId, Salt, TokenUsage};
use sha2::{Digest as _, Sha256};

/// One side: the live state, the books, and every draft in order.
struct SideOf {
    state: SessionState,
    books: Books,
    journal: Vec<Draft>,
}

impl SideOf {
    fn new(state: SessionState) -> SideOf {
        SideOf { state, books: Books::new(), journal: Vec::new() }
    }
    #[track_caller]
    fn take(&mut self, now: UnixMs, draft: Draft) {
        self.books.apply(now, &draft).unwrap();
        self.state.apply(&draft).unwrap();
        self.journal.push(draft);
    }
    /// What the journal holds is all there is.
    #[track_caller]
    fn assert_folds(&self, fresh: &SessionState) {
        let mut again = fresh.clone();
        self.journal.iter().for_each(|draft| again.apply(draft).unwrap());
        assert_eq!(again, self.state);
    }
    fn balance(&self, account: Account) -> i128 {
        self.books.balance(&account)
    }
}

/// A session with both its sides, and the keys that sign in it.
struct Pair {
    now: UnixMs,
    provider: SideOf,
    consumer: SideOf,
    fresh: [SessionState; 2],
    provider_key: SigningKey,
    consumer_key: SigningKey,
    world: World,
    requests: u8,
}

impl Pair {
    fn new() -> Pair {
        let mut world = World::new();
        let session = world.open();
        let fresh = [Side::Provider, Side::Consumer].map(|side| SessionState::new(side, &session.quote, &session.open));
        let [provider, consumer] = fresh.clone().map(SideOf::new);
        let provider_key = world.provider.node.clone();
        Pair { now: world.now, provider, consumer, fresh, provider_key, consumer_key: session.key, world, requests: 0 }
    }

    fn rates(&self) -> RateCard {
        self.consumer.state.quote().rates
    }

    /// The next slice's invoice, on both sides.
    fn invoice(&mut self, amount: Msat) -> (u32, PaymentHash, Preimage) {
        self.now = self.now.plus_ms(50);
        let k = self.consumer.state.next_k();
        let preimage = Preimage(bytes32(&format!("preimage {k} {:?}", self.now)));
        let hash = PaymentHash(Sha256::digest(preimage.0).into());
        let terms = self.provider.state.descriptor(k, amount);
        let text = bolt11(&self.world.provider.lightning, amount, &terms.description_hash(), &hash, self.now);
        for side in [&mut self.provider, &mut self.consumer] {
            let draft = side.state.invoiced(terms.clone(), text.clone());
            side.take(self.now, draft);
        }
        (k, hash, preimage)
    }

    /// The next slice, paid with a routing fee.
    fn pay(&mut self, amount: Msat, fee: Msat) {
        let (k, hash, preimage) = self.invoice(amount);
        let attempt = self.consumer.state.attempt(k, hash, Msat(100)).unwrap();
        self.consumer.take(self.now, attempt);
        let settled = self.consumer.state.settled(hash, preimage, fee).unwrap();
        self.consumer.take(self.now, settled);
        let received = self.provider.state.received(hash, amount).unwrap();
        self.provider.take(self.now, received);
    }

    fn open(&mut self, prompt: u32, reserve: Msat) -> RequestId {
        self.requests += 1;
        let request = RequestId([self.requests; 32]);
        let open = RequestOpen {
            version: RequestOpen::VERSION,
            session: self.consumer.state.id(),
            request,
            quote: self.consumer.state.quote_id(),
            prompt_tokens: prompt,
            max_output: 1_000,
            private_hash: Digest([0; 32]),
            opened_at: self.now,
            part: None,
        };
        let signed = Signed::sign(&open, &self.consumer_key);
        for side in [&mut self.provider, &mut self.consumer] {
            let draft = side.state.request(self.now, &signed, request, reserve);
            side.take(self.now, draft);
        }
        request
    }

    fn statement(&self, request: RequestId, usage: TokenUsage) -> Ack {
        let numerators = numerators(&usage, &self.rates()).unwrap();
        Ack {
            version: Ack::VERSION,
            session: self.consumer.state.id(),
            request,
            seq: self.consumer.state.request_state(&request).unwrap().acked_seq() + 1,
            usage,
            numerators,
            cost: charge(numerators),
            running_hash: RunningHash::start(&Salt([0; 32]), &request).value(),
        }
    }

    fn countersigned(&self, ack: &Ack) -> BothSigned<Ack> {
        BothSigned::countersign(&Signed::sign(ack, &self.provider_key), &self.consumer_key)
    }

    fn ack(&mut self, request: RequestId, usage: TokenUsage, more: Msat) -> BothSigned<Ack> {
        let both = self.countersigned(&self.statement(request, usage));
        for side in [&mut self.provider, &mut self.consumer] {
            let draft = side.state.acked(self.now, &both, request, more).unwrap();
            side.take(self.now, draft);
        }
        both
    }

    fn receipt(&self, request: RequestId, usage: TokenUsage) -> Receipt {
        let facts = ReceiptFacts {
            model: "m".into(),
            engine: "e".into(),
            usage,
            finish: FinishReason::Stop,
            started_at: self.now,
            first_token_ms: Some(3),
            duration_ms: 40,
            private_hash: Digest([4; 32]),
            error: None,
            slices: self.provider.state.unreceipted(),
            part: None,
            split: None,
            expert_rows: None,
            expert_split: None,
        };
        self.provider.state.receipt(&request, facts).unwrap()
    }

    fn finish(&mut self, request: RequestId, usage: TokenUsage) -> Receipt {
        let body = self.receipt(request, usage);
        let both = BothSigned::countersign(&Signed::sign(&body, &self.provider_key), &self.consumer_key);
        for side in [&mut self.provider, &mut self.consumer] {
            let draft = side.state.finished(&both, &body, None).unwrap();
            side.take(self.now, draft);
        }
        assert_eq!(self.provider.state.last_receipt(), Some(receipt_id(&both)));
        body
    }

    fn abandon(&mut self, request: RequestId) {
        for side in [&mut self.provider, &mut self.consumer] {
            let draft = side.state.abandoned(request).unwrap();
            side.take(self.now, draft);
        }
    }

    /// Both sides stand at the same figures, their books say the same, and folding gives the live state.
    #[track_caller]
    fn assert_agree(&self) {
        let (p, c) = (&self.provider, &self.consumer);
        let id = p.state.id();
        assert_eq!(p.state.charged(), c.state.charged());
        assert_eq!(p.state.settled_numerators(), c.state.settled_numerators());
        assert_eq!(charge(p.state.settled_numerators()), p.state.charged());
        assert_eq!(p.balance(Account::Income), i128::from(p.state.charged().0));
        assert_eq!(c.balance(Account::Expense), i128::from(c.state.charged().0));
        assert_eq!(c.balance(Account::PrepaidAsset(id)), i128::from(c.state.remainder().0));
        assert_eq!(c.books.available(&Account::PrepaidAsset(id)), c.state.available());
        let owed = p.balance(Account::Prepaid(id)) + p.balance(Account::RefundsDue(id));
        assert_eq!(owed, i128::from(p.state.remainder().0));
        p.assert_folds(&self.fresh[0]);
        c.assert_folds(&self.fresh[1]);
    }
}

fn usage(prompt: u32, completion: u32) -> TokenUsage {
    TokenUsage { prompt, completion, ..TokenUsage::default() }
}

#[test]
fn a_session_from_slice_to_refund() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat(3));
    pair.assert_agree();
    let request = pair.open(100, Msat(2_000));
    assert_eq!(pair.provider.state.available(), Msat(8_000));
    pair.ack(request, usage(100, 0), Msat(500));
    pair.ack(request, usage(100, 128), Msat::ZERO);
    pair.assert_agree();
    let receipt = pair.finish(request, usage(100, 200));
    // 100 x 0.9 + 200 x 3.300001 + 5, rounded up.
    assert_eq!(receipt.cost, Msat(756));
    assert_eq!((receipt.seq, receipt.cumulative_paid, receipt.slices.len()), (0, Msat::sat(10), 1));
    assert_eq!(pair.consumer.state.available(), Msat(9_244));
    pair.assert_agree();
    // The second receipt names the first and no slice again.
    let second = pair.open(1, Msat(50));
    let receipt = pair.finish(second, usage(1, 1));
    assert_eq!((receipt.seq, receipt.slices.len(), receipt.cumulative_paid), (1, 0, Msat::sat(10)));
    pair.assert_agree();

    let left = pair.provider.state.remainder();
    let close = SessionClose {
        version: SessionClose::VERSION,
        session: pair.provider.state.id(),
        last_receipt: pair.consumer.state.last_receipt(),
        remainder: left,
        invoice: None,
        closed_at: pair.now,
    };
    let signed = Signed::sign(&close, &pair.consumer_key);
    let (now, hash) = (pair.now, PaymentHash([8; 32]));
    for side in [&mut pair.provider, &mut pair.consumer] {
        let draft = side.state.closed(&signed);
        side.take(now, draft);
    }
    pair.assert_agree();
    // The first try fails, the second settles; a second word about either changes nothing.
    let attempt = pair.provider.state.refund_attempted(PaymentHash([7; 32]), left, Msat::ZERO);
    pair.provider.take(now, attempt);
    let failed = pair.provider.state.refund_failed(PaymentHash([7; 32]), "no route".into()).unwrap();
    pair.provider.take(now, failed);
    assert!(pair.provider.state.refund_failed(PaymentHash([7; 32]), "again".into()).is_err());
    pair.assert_agree();
    let attempt = pair.provider.state.refund_attempted(hash, left, Msat::ZERO);
    pair.provider.take(now, attempt);
    assert_eq!(pair.provider.state.refund_in_flight(), Some((hash, left)));
    let settled = pair.provider.state.refund_settled(hash, None, Msat::ZERO).unwrap();
    pair.provider.take(now, settled);
    assert!(pair.provider.state.refund_settled(hash, None, Msat::ZERO).is_err());
    let back = pair.consumer.state.refund_received(hash, left);
    pair.consumer.take(now, back);
    assert_eq!((pair.provider.state.remainder(), pair.consumer.state.remainder()), (Msat::ZERO, Msat::ZERO));
    pair.assert_agree();
    assert_eq!(pair.provider.balance(Account::Lightning), i128::from(pair.provider.state.charged().0));
}

#[test]
fn what_the_route_of_a_refund_cost_is_owed_no_longer() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let close = SessionClose {
        version: SessionClose::VERSION,
        session: pair.provider.state.id(),
        last_receipt: None,
        remainder: Msat::sat(10),
        invoice: None,
        closed_at: pair.now,
    };
    let draft = pair.provider.state.closed(&Signed::sign(&close, &pair.consumer_key));
    pair.provider.take(pair.now, draft);
    let due = Account::RefundsDue(pair.provider.state.id());
    let mut check = |n: u8, (amount, max_fee): (u64, u64), fee: u64, left: u64, fees: i128| {
        let hash = PaymentHash([n; 32]);
        let attempt = pair.provider.state.refund_attempted(hash, Msat(amount), Msat(max_fee));
        pair.provider.take(pair.now, attempt);
        let settled = pair.provider.state.refund_settled(hash, None, Msat(fee)).unwrap();
        pair.provider.take(pair.now, settled);
        assert_eq!(pair.provider.state.remainder(), Msat(left));
        assert_eq!(pair.provider.balance(due), i128::from(left));
        assert_eq!(pair.provider.balance(Account::RoutingFees), fees, "a wallet that paid more than it may");
        pair.provider.assert_folds(&pair.fresh[0]);
    };
    check(1, (1, 5_000), 4_999, 5_000, 0);
    check(2, (1_000, 50), 80, 3_950, 30);
    check(3, (3_900, 0), 0, 50, 30);
}

#[test]
fn without_a_receipt_the_last_ack_is_owed_and_ack_zero_is_free() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let (first, second) = (pair.open(300, Msat(3_000)), pair.open(300, Msat(3_000)));
    pair.ack(first, usage(300, 64), Msat::ZERO);
    pair.abandon(second);
    assert_eq!(pair.provider.state.charged(), Msat::ZERO);
    pair.abandon(first);
    assert_eq!(pair.provider.state.charged(), cost_alone(&usage(300, 64), &pair.rates()).unwrap());
    assert!(pair.provider.state.has_ended(&first) && pair.provider.state.requests().is_empty());
    assert_eq!(pair.consumer.state.abandoned_requests().len(), 2);
    pair.assert_agree();
}

#[test]
fn no_number_of_requests_lets_an_id_be_used_again() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    for n in 0..5_000_u64 {
        let mut id = [0xff; 32];
        id[24..].copy_from_slice(&n.to_be_bytes());
        pair.provider.state.ended.insert(RequestId(id));
    }
    let request = pair.open(10, Msat(100));
    pair.abandon(request);
    assert!(pair.provider.state.has_ended(&request));
    // What would happen else.
    pair.now = pair.now.plus_ms(1);
    let open = pair.provider.journal.iter().find_map(|draft| match &draft.evidence {
        Some(Evidence::Request(open)) => Some(open.clone()),
        Some(_) | None => None,
    });
    let again = pair.provider.state.request(pair.now, &open.unwrap(), request, Msat(100));
    assert!(pair.provider.books.apply(pair.now, &again).is_err());
}

#[test]
fn cutting_work_into_requests_does_not_change_its_price() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(100), Msat::ZERO);
    let mut sum = Numerators::ZERO;
    for i in 0..20 {
        let request = pair.open(7 + i, Msat(400));
        let done = usage(7 + i, 3 * i + 1);
        if i % 3 == 0 {
            pair.ack(request, done, Msat::ZERO);
            pair.abandon(request);
        } else {
            pair.finish(request, done);
        }
        sum = sum.checked_add(numerators(&done, &pair.rates()).unwrap()).unwrap();
        assert_eq!(pair.provider.state.charged(), charge(sum), "one rounding over the whole session");
    }
    pair.assert_agree();
}

#[test]
fn a_charge_beyond_its_reservation_is_taken_from_the_balance() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let request = pair.open(100, Msat(10));
    pair.ack(request, usage(100, 10), Msat(1));
    pair.finish(request, usage(100, 200));
    assert_eq!(pair.provider.state.charged(), Msat(756));
    pair.assert_agree();
}

#[test]
fn a_request_with_as_many_reservations_as_it_may_have_ends_in_one_entry() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let request = pair.open(100, Msat(10));
    for done in 1..MAX_HOLDS {
        assert!(pair.provider.state.request_state(&request).unwrap().may_reserve());
        pair.ack(request, usage(100, u32::try_from(done).unwrap()), Msat(1));
    }
    assert!(!pair.provider.state.request_state(&request).unwrap().may_reserve());
    pair.finish(request, usage(100, 1_000));
    pair.assert_agree();
}

#[test]
fn a_slice_that_failed_is_invoiced_again_under_its_number() {
    let mut pair = Pair::new();
    let (k, hash, preimage) = pair.invoice(Msat::sat(10));
    let attempt = pair.consumer.state.attempt(k, hash, Msat(100)).unwrap();
    pair.consumer.take(pair.now, attempt);
    assert_eq!(pair.consumer.state.in_flight(), Msat(10_100));
    assert!(pair.consumer.state.attempt(k, hash, Msat(100)).is_err(), "one payment at a time");
    let failed = pair.consumer.state.failed(hash, "no route".into()).unwrap();
    pair.consumer.take(pair.now, failed);
    assert!(pair.consumer.state.settled(hash, preimage, Msat::ZERO).is_err());
    assert_eq!((pair.consumer.state.next_k(), pair.consumer.state.in_flight()), (k, Msat::ZERO));
    pair.pay(Msat::sat(12), Msat(1));
    assert_eq!(pair.provider.state.paid(), Msat::sat(12));
    pair.assert_agree();
}

#[test]
fn an_invoice_that_was_replaced_credits_nothing() {
    let mut pair = Pair::new();
    let (_, small, _) = pair.invoice(Msat::sat(10));
    let (k, large, _) = pair.invoice(Msat::sat(5_000));
    assert_eq!(k, 0);
    // Ten sat on the old invoice are not five thousand on the new one.
    assert!(pair.provider.state.received(small, Msat::sat(10)).is_err());
    let draft = pair.provider.state.received(large, Msat::sat(5_000)).unwrap();
    pair.provider.take(pair.now, draft);
    assert!(pair.provider.state.received(large, Msat::sat(5_000)).is_err(), "a payment hash credits once");
    assert_eq!(pair.provider.state.paid(), Msat::sat(5_000));
}

#[test]
fn what_a_channel_opener_kept_is_booked_and_the_slice_credited_whole() {
    let mut pair = Pair::new();
    let (_, hash, _) = pair.invoice(Msat::sat(10));
    let draft = pair.provider.state.received(hash, Msat(9_400)).unwrap();
    pair.provider.take(pair.now, draft);
    assert_eq!(pair.provider.state.paid(), Msat::sat(10));
    assert_eq!(pair.provider.balance(Account::RoutingFees), 600);
    assert_eq!(pair.provider.balance(Account::Lightning), 9_400);
}

#[test]
fn exposure_by_hand() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let request = pair.open(100, Msat(2_000));
    pair.ack(request, usage(100, 100), Msat::ZERO);
    let expect = ConsumerExposure { paid: Msat(10_000), charged: Msat(426), in_flight: Msat::ZERO };
    assert_eq!(pair.consumer.state.consumer_exposure(), expect);
    let (k, hash, _) = pair.invoice(Msat::sat(20));
    let attempt = pair.consumer.state.attempt(k, hash, Msat(100)).unwrap();
    pair.consumer.take(pair.now, attempt);
    assert_eq!(pair.consumer.state.consumer_exposure().most(), Msat(10_000 + 20_100 - 426));
    assert_eq!(pair.provider.state.provider_exposure(Msat(1_000)).most(), Msat(574));
}

/// The consumer's own count of what `usage` says.
fn counted(received: u32, request: RequestId) -> Counted {
    let running_hash = RunningHash::start(&Salt([0; 32]), &request).value();
    Counted { received, running_hash, ordered: None, embedded: None }
}

#[test]
fn every_lie_in_an_acknowledgement_has_its_name() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let request = pair.open(100, Msat(2_000));
    pair.ack(request, usage(100, 10), Msat::ZERO);
    let good = pair.statement(request, usage(100, 20));
    let check = |bend: fn(&mut Ack)| {
        let mut ack = good.clone();
        bend(&mut ack);
        check::ack(&pair.consumer.state, &request, &ack, &counted(20, request)).map_err(|fault| fault.rule())
    };
    assert_eq!(check(|_| {}), Ok(()));
    assert_eq!(check(|a| a.seq += 1), Err("count-out-of-order"));
    assert_eq!(check(|a| a.session = SessionId([1; 32])), Err("count-out-of-order"));
    assert_eq!(check(|a| a.usage.completion += 1), Err("overcount-output"));
    assert_eq!(check(|a| a.usage.prompt += 1), Err("overcount-prompt"));
    assert_eq!(check(|a| a.usage.prompt -= 1), Err("count-inconsistent"));
    assert_eq!(check(|a| a.usage.cached_prompt = 101), Err("count-inconsistent"));
    assert_eq!(check(|a| a.cost = Msat(a.cost.0 + 1)), Err("overcharge"));
    assert_eq!(check(|a| a.running_hash = Digest([1; 32])), Err("output-hash"));
    let unknown = check::ack(&pair.consumer.state, &RequestId([99; 32]), &good, &counted(20, request));
    assert!(matches!(unknown, Err(CountFault::State(SessionError::UnknownRequest(_)))));
}

#[test]
fn every_lie_in_a_receipt_has_its_name() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let request = pair.open(100, Msat(2_000));
    let good = pair.receipt(request, usage(100, 20));
    let check = |bend: fn(&mut Receipt)| {
        let mut receipt = good.clone();
        bend(&mut receipt);
        let private = Digest([4; 32]);
        check::receipt(&pair.consumer.state, &request, &receipt, &counted(20, request), &[], private)
            .map_err(|f| f.rule())
    };
    assert_eq!(check(|_| {}), Ok(()));
    assert_eq!(check(|r| r.duration_ms += 1), Ok(()), "the provider's account of the run");
    assert_eq!(check(|r| r.usage.completion += 1), Err("overcount-output"));
    assert_eq!(check(|r| r.cost = Msat(r.cost.0 + 1)), Err("overcharge"));
    assert_eq!(check(|r| r.cumulative_cost = Msat(r.cumulative_cost.0 + 1)), Err("receipt-field"));
    assert_eq!(check(|r| r.seq = 1), Err("receipt-field"));
    assert_eq!(check(|r| r.private_hash = Digest([5; 32])), Err("receipt-field"));
    assert_eq!(check(|r| r.slices.clear()), Err("receipt-field"));
    assert_eq!(check(|r| r.slices[0].amount = Msat(1)), Err("receipt-field"));
    assert_eq!(check(|r| r.slices.push(r.slices[0])), Err("receipt-field"));
    assert_eq!(check(|r| r.stage_root = Some(Digest([5; 32]))), Err("receipt-field"));
}

#[test]
fn quotes_of_a_session_are_bounded_and_those_in_use_stay() {
    let mut pair = Pair::new();
    pair.pay(Msat::sat(10), Msat::ZERO);
    let request = pair.open(10, Msat(100));
    let first = pair.consumer.state.quote_id();
    for i in 0..3 * MAX_QUOTES as u64 {
        let mut quote = pair.consumer.state.quote().clone();
        quote.nonce = i;
        quote.issued_at = quote.issued_at.plus_ms(1);
        let quote =
            Signed::sign(&quote, &pair.provider_key).verify(&satgrid_types::node_key(&pair.provider_key)).unwrap();
        let draft = pair.consumer.state.requote(&quote);
        pair.consumer.take(pair.now, draft);
    }
    assert!(pair.consumer.state.quotes.len() <= MAX_QUOTES);
    assert!(pair.consumer.state.quote_of(&first).is_some(), "an open request is charged at it");
    assert!(pair.consumer.state.request_state(&request).is_some());
    // A quote for somebody else is not ours.
    let mut other = pair.consumer.state.quote().clone();
    other.consumer = NodeKey([1; 32]);
    let now = pair.consumer.state.quote_id();
    let draft = Draft::of(Evidence::Quote(Signed::sign(&other, &pair.provider_key)));
    pair.consumer.take(pair.now, draft);
    assert_eq!(pair.consumer.state.quote_id(), now);
}
