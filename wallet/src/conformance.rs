//! What every wallet behind the port must do, as one suite: run on the fake and on the embedded node alike.
//!
//! The caller prepares two wallets with a ready channel from payer to payee, and calls [`run`] under a time limit of its
//! own (the suite waits for events and never looks at a clock). Every failure is a panic that says what was expected.
#![allow(clippy::wildcard_enum_match_arm)] // "anything else" is what a test objects to

use crate::{
    invoice::{self, Expected, InvoiceMismatch},
    message,
    port::{
        Direction, FailureReason, Invoice, InvoiceError, InvoiceRequest, Lightning, PayError, PaymentState, WalletEvent,
    },
};
use satgrid_types::{Digest, Msat, PaymentHash, Preimage, UnixMs};
use sha2::{Digest as _, Sha256};

/// Amounts that are easy to get wrong: one msat, below a sat, between sats, around the dust limit, a large slice.
pub const AMOUNTS: [Msat; 8] =
    [Msat(1), Msat(999), Msat(1_000), Msat(1_001), Msat(12_345), Msat(353_999), Msat(354_001), Msat(5_000_000)];
/// The payer's channel must be able to pay this much for the suite to pass.
pub const NEEDS: Msat = Msat(10_000_000);
const EXPIRY_SECS: u32 = 600;
const MAX_FEE: Msat = Msat(10_000);
/// Reads of a balance, a sync apart, before it has to be right.
const BALANCE_READS: u32 = 300;
const TERMS: Digest = Digest([0x5a; 32]);

/// Two wallets; the payer can pay at least [`NEEDS`] to the payee. No event of either is waiting.
pub struct Pair<'a> {
    pub payer: &'a dyn Lightning,
    pub payee: &'a dyn Lightning,
    /// The time on the invoices' clock: to judge expiry.
    pub now: UnixMs,
}

/// The whole suite.
pub async fn run(pair: &Pair<'_>) {
    run_payments(pair).await;
    signatures_are_the_nodes(pair).await;
}

/// All but signatures by the node, which a wallet over Nostr Wallet Connect cannot make: it gives empty ones.
pub async fn run_payments(pair: &Pair<'_>) {
    invoices_say_what_was_asked(pair).await;
    amounts_are_exact(pair).await;
    the_same_invoice_is_paid_once(pair).await;
    the_list_goes_back_as_far_as_is_asked(pair).await;
    events_wait_for_their_acknowledgement(pair).await;
    a_payment_that_cannot_be_made_fails(pair).await;
    what_is_not_an_invoice_is_refused(pair).await;
}

async fn invoices_say_what_was_asked(pair: &Pair<'_>) {
    let amount = Msat(12_345);
    let made = invoice(pair, amount).await;
    let agreed =
        Expected { amount, description_hash: TERMS, payee: pair.payee.node_id(), network: pair.payee.network() };
    let checked = invoice::check(&made.bolt11, &agreed, pair.now).expect("its own invoice passes");
    assert_eq!(checked.payment_hash(), made.payment_hash);
    let lifetime = checked.expires_at().since(pair.now) / 1_000;
    assert!(lifetime.abs_diff(u64::from(EXPIRY_SECS)) < 120, "lives for {lifetime} s");
    let wrong = |expected: Expected| invoice::check(&made.bolt11, &expected, pair.now);
    assert!(matches!(wrong(Expected { amount: Msat(12_344), ..agreed }), Err(InvoiceMismatch::Amount { .. })));
    assert!(matches!(
        wrong(Expected { description_hash: Digest([0; 32]), ..agreed }),
        Err(InvoiceMismatch::DescriptionHash { .. })
    ));
    assert!(matches!(wrong(Expected { payee: pair.payer.node_id(), ..agreed }), Err(InvoiceMismatch::Payee { .. })));
    assert_eq!(state(pair.payee, made.payment_hash).await, PaymentState::InFlight, "an open invoice waits");
    assert_eq!(state(pair.payer, made.payment_hash).await, PaymentState::Unknown);

    let ask = |amount, expiry_secs| InvoiceRequest { amount, description_hash: TERMS, expiry_secs };
    assert_eq!(pair.payee.create_invoice(ask(Msat::ZERO, 60)).await, Err(InvoiceError::ZeroAmount));
    assert_eq!(pair.payee.create_invoice(ask(Msat(1), 0)).await, Err(InvoiceError::Expiry { asked: 0 }));
}

async fn amounts_are_exact(pair: &Pair<'_>) {
    let before = sums(pair).await;
    let (payer_before, payee_before) = (total(pair.payer).await, total(pair.payee).await);
    let mut paid = Msat::ZERO;
    let mut fees = Msat::ZERO;
    for amount in AMOUNTS {
        let made = invoice(pair, amount).await;
        pair.payer.pay(&made.bolt11, MAX_FEE).await.expect("a payment over a ready channel starts");
        let (preimage, fee) = settled(pair.payer, made.payment_hash).await;
        assert_eq!(received(pair.payee, made.payment_hash).await, amount);
        assert_eq!(<[u8; 32]>::from(Sha256::digest(preimage.0)), made.payment_hash.0);
        assert!(fee <= MAX_FEE);
        assert_eq!(state(pair.payer, made.payment_hash).await, PaymentState::Settled { preimage, fee, amount });
        let inbound = PaymentState::Settled { preimage, fee: Msat::ZERO, amount };
        assert_eq!(state(pair.payee, made.payment_hash).await, inbound);
        paid = paid.saturating_add(amount);
        fees = fees.saturating_add(fee);
    }
    let after = sums(pair).await;
    assert_eq!(after.out.checked_sub(before.out), Some(paid), "the payer's list sums to what was paid");
    assert_eq!(after.fees.checked_sub(before.fees), Some(fees));
    assert_eq!(after.received.checked_sub(before.received), Some(paid), "the payee's list agrees to the msat");
    let spent = paid.saturating_add(fees);
    total_becomes(pair.payer, payer_before.checked_sub(spent).expect("paid out of what it had")).await;
    total_becomes(pair.payee, payee_before.saturating_add(paid)).await;
}

async fn the_same_invoice_is_paid_once(pair: &Pair<'_>) {
    let amount = Msat(77_777);
    let made = invoice(pair, amount).await;
    let before = sums(pair).await;
    pair.payer.pay(&made.bolt11, MAX_FEE).await.expect("starts");
    pair.payer.pay(&made.bolt11, MAX_FEE).await.expect("in flight: nothing new is sent");
    settled(pair.payer, made.payment_hash).await;
    received(pair.payee, made.payment_hash).await;
    pair.payer.pay(&made.bolt11, MAX_FEE).await.expect("paid: nothing new is sent");
    let after = sums(pair).await;
    assert_eq!(after.out.checked_sub(before.out), Some(amount));
    assert_eq!(after.received.checked_sub(before.received), Some(amount));
    let rows = pair.payer.payments().await.expect("lists");
    assert_eq!(rows.iter().filter(|row| row.hash == made.payment_hash).count(), 1);
}

async fn the_list_goes_back_as_far_as_is_asked(pair: &Pair<'_>) {
    for wallet in [pair.payer, pair.payee] {
        let all = wallet.payments().await.expect("lists");
        let newest = all.iter().map(|row| row.at).max().expect("payments were made");
        let begins = UnixMs::from_secs(newest.as_secs());
        let late = wallet.payments_since(newest).await.expect("lists");
        assert!(late.iter().all(|row| row.at >= begins), "nothing of before the second that was asked for");
        for row in all.iter().filter(|row| row.at >= newest) {
            assert!(late.iter().any(|listed| listed.hash == row.hash), "{} is not left out", row.hash);
        }
        let tomorrow = UnixMs::from_secs(newest.as_secs().saturating_add(24 * 3_600));
        assert_eq!(wallet.payments_since(tomorrow).await.expect("lists"), []);
    }
}

async fn events_wait_for_their_acknowledgement(pair: &Pair<'_>) {
    let made = invoice(pair, Msat(4_242)).await;
    pair.payer.pay(&made.bolt11, MAX_FEE).await.expect("starts");
    let first = pair.payer.next_event().await.expect("an event");
    let again = pair.payer.next_event().await.expect("the event");
    assert_eq!(first, again, "an event comes again until it is acknowledged");
    settled(pair.payer, made.payment_hash).await;
    received(pair.payee, made.payment_hash).await;
}

async fn a_payment_that_cannot_be_made_fails(pair: &Pair<'_>) {
    let payable = pair.payer.balance().await.expect("balance").payable;
    let made = invoice(pair, payable.saturating_add(Msat(1))).await;
    let before = total(pair.payer).await;
    match pair.payer.pay(&made.bolt11, MAX_FEE).await {
        Err(error) => assert!(matches!(error, PayError::NoRoute { .. }), "{error}"),
        Ok(()) => {
            failed(pair.payer, made.payment_hash).await;
        }
    }
    assert!(matches!(state(pair.payer, made.payment_hash).await, PaymentState::Failed { .. }));
    assert_eq!(state(pair.payee, made.payment_hash).await, PaymentState::InFlight, "the invoice is still open");
    total_becomes(pair.payer, before).await;
}

async fn what_is_not_an_invoice_is_refused(pair: &Pair<'_>) {
    for text in ["", "lnbc", "hello", "lnbcrt1qqqq"] {
        let refused = pair.payer.pay(text, MAX_FEE).await;
        assert!(matches!(refused, Err(PayError::BadInvoice { .. })), "{text:?}: {refused:?}");
    }
    assert_eq!(state(pair.payer, PaymentHash([0; 32])).await, PaymentState::Unknown);
}

async fn signatures_are_the_nodes(pair: &Pair<'_>) {
    let text = b"satgrid: this Lightning node vouches for that key";
    let signature = pair.payer.sign_message(text);
    assert!(message::verify(text, &signature, &pair.payer.node_id()));
    assert!(!message::verify(text, &signature, &pair.payee.node_id()));
    assert!(!message::verify(b"another text", &signature, &pair.payer.node_id()));
}

// What tests of adapters use too.

/// An invoice by the payee over `amount` for the suite's terms.
pub async fn invoice(pair: &Pair<'_>, amount: Msat) -> Invoice {
    let request = InvoiceRequest { amount, description_hash: TERMS, expiry_secs: EXPIRY_SECS };
    pair.payee.create_invoice(request).await.expect("an invoice is made")
}

/// Waits for, and acknowledges, the event that the payment settled; other payments' events must not come first.
pub async fn settled(wallet: &dyn Lightning, hash: PaymentHash) -> (Preimage, Msat) {
    match payment_event(wallet).await {
        WalletEvent::PaymentSettled { hash: of, preimage, fee } if of == hash => (preimage, fee),
        other => panic!("waited for {hash} to settle, got {other:?}"),
    }
}

/// Waits for, and acknowledges, the event that the payment arrived.
pub async fn received(wallet: &dyn Lightning, hash: PaymentHash) -> Msat {
    match payment_event(wallet).await {
        WalletEvent::PaymentReceived { hash: of, amount } if of == hash => amount,
        other => panic!("waited for {hash} to arrive, got {other:?}"),
    }
}

async fn failed(wallet: &dyn Lightning, hash: PaymentHash) -> FailureReason {
    match payment_event(wallet).await {
        WalletEvent::PaymentFailed { hash: of, reason } if of == hash => reason,
        other => panic!("waited for {hash} to fail, got {other:?}"),
    }
}

/// The next event about a payment; those about channels are acknowledged and passed over.
async fn payment_event(wallet: &dyn Lightning) -> WalletEvent {
    loop {
        let event = wallet.next_event().await.expect("the wallet runs");
        wallet.event_handled().await.expect("acknowledges");
        match event {
            WalletEvent::PaymentSettled { .. }
            | WalletEvent::PaymentFailed { .. }
            | WalletEvent::PaymentReceived { .. } => return event,
            WalletEvent::ChannelPending { .. }
            | WalletEvent::ChannelReady { .. }
            | WalletEvent::ChannelClosed { .. }
            | WalletEvent::Other { .. } => {}
        }
    }
}

async fn state(wallet: &dyn Lightning, hash: PaymentHash) -> PaymentState {
    wallet.lookup(hash).await.expect("looks up")
}

async fn total(wallet: &dyn Lightning) -> Msat {
    wallet.balance().await.expect("balance").lightning_total
}

/// A payment's event comes a round trip before its HTLC is off the channel; the balance follows.
async fn total_becomes(wallet: &dyn Lightning, expected: Msat) {
    for _ in 0..BALANCE_READS {
        if total(wallet).await == expected {
            return;
        }
        wallet.sync().await.expect("syncs");
    }
    assert_eq!(total(wallet).await, expected, "the balance agrees to the msat with what was paid");
}

struct Sums {
    out: Msat,
    fees: Msat,
    received: Msat,
}

/// Settled payments by the wallets' own lists.
async fn sums(pair: &Pair<'_>) -> Sums {
    let mut sums = Sums { out: Msat::ZERO, fees: Msat::ZERO, received: Msat::ZERO };
    for row in pair.payer.payments().await.expect("lists") {
        if row.direction == Direction::Outbound && matches!(row.state, PaymentState::Settled { .. }) {
            sums.out = sums.out.saturating_add(row.amount);
            sums.fees = sums.fees.saturating_add(row.fee);
        }
    }
    for row in pair.payee.payments().await.expect("lists") {
        if row.direction == Direction::Inbound && matches!(row.state, PaymentState::Settled { .. }) {
            sums.received = sums.received.saturating_add(row.amount);
        }
    }
    sums
}
