//! Payments of the fake network: invoices, HTLCs, rows.

use super::{
    Fault,
    network::{FakeNetwork, FakeNode, Row, Timer},
};
use crate::{
    Network, invoice, message,
    port::{
        ChannelId, Direction, FailureReason, Invoice, InvoiceError, InvoiceRequest, MAX_INVOICE_EXPIRY_SECS, PayError,
        PaymentRecord, PaymentState, WalletError, WalletEvent,
    },
};
use core::time::Duration;
use lightning_invoice::{Bolt11InvoiceDescription, Currency, InvoiceBuilder, PaymentSecret, Sha256 as InvoiceHash};
use rand::Rng;
use satgrid_types::{LightningKey, Msat, PaymentHash, Preimage, UnixMs};
use secp256k1::SECP256K1;
use sha2::{Digest as _, Sha256};

/// An HTLC to a payee that is down waits this long before it is tried again.
const PAYEE_RETRY_MS: u64 = 1_000;

impl FakeNetwork {
    pub fn create_invoice(
        &mut self,
        now: UnixMs,
        payee: LightningKey,
        request: InvoiceRequest,
    ) -> Result<Invoice, InvoiceError> {
        self.handle_timeout(now);
        if request.amount.is_zero() {
            return Err(InvoiceError::ZeroAmount);
        }
        if request.expiry_secs == 0 || request.expiry_secs > MAX_INVOICE_EXPIRY_SECS {
            return Err(InvoiceError::Expiry { asked: request.expiry_secs });
        }
        let preimage = Preimage(self.rng.r#gen());
        let hash = PaymentHash(Sha256::digest(preimage.0).into());
        let secret = PaymentSecret(self.rng.r#gen());
        let node = self.up_mut(payee)?;
        let broken = |reason: String| WalletError::Node { reason };
        let terms = hex::encode(request.description_hash.0).parse().map_err(|e| broken(format!("{e}")))?;
        let invoice = InvoiceBuilder::new(Currency::Regtest)
            .amount_milli_satoshis(request.amount.0)
            .invoice_description(Bolt11InvoiceDescription::Hash(InvoiceHash(terms)))
            .payment_hash(hex::encode(hash.0).parse().map_err(|e| broken(format!("{e}")))?)
            .payment_secret(secret)
            .duration_since_epoch(Duration::from_secs(now.as_secs()))
            .expiry_time(Duration::from_secs(u64::from(request.expiry_secs)))
            .min_final_cltv_expiry_delta(24)
            .basic_mpp()
            .build_signed(|digest| SECP256K1.sign_ecdsa_recoverable(digest, &node.key))
            .map_err(|e| broken(e.to_string()))?;
        let bolt11 = invoice.to_string();
        let facts = invoice::read(&bolt11).map_err(|e| broken(e.to_string()))?;
        node.invoices.insert(hash, (preimage, facts));
        node.write(now, hash, Direction::Inbound, request.amount, Msat::ZERO, PaymentState::InFlight);
        Ok(Invoice { bolt11, payment_hash: hash })
    }

    /// As the port's `pay`: in flight or paid when `Ok`.
    pub fn pay(&mut self, now: UnixMs, payer: LightningKey, bolt11: &str, max_fee: Msat) -> Result<(), PayError> {
        self.handle_timeout(now);
        let node = self.up_mut(payer).map_err(|_| PayError::Stopped)?;
        let bad = |reason: &str| PayError::BadInvoice { reason: reason.to_owned() };
        let facts = invoice::read(bolt11).map_err(|e| PayError::BadInvoice { reason: e.to_string() })?;
        let amount = facts.amount.ok_or_else(|| bad("it names no amount"))?;
        if facts.network != Some(Network::Regtest) {
            return Err(bad("it is for another network"));
        }
        let hash = facts.payment_hash;
        if let Some(row) = node.rows.get(&hash)
            && matches!(row.record.state, PaymentState::InFlight | PaymentState::Settled { .. })
        {
            return if row.record.direction == Direction::Outbound { Ok(()) } else { Err(bad("it is our own")) };
        }
        // Expiry and route come before the duplicate, as in the embedded node.
        if facts.is_expired(now) {
            return Err(PayError::Expired);
        }
        let Some(channel) = self.route(payer, facts.payee, amount) else {
            let payable = self.payable(payer);
            let failed = PaymentState::Failed { reason: FailureReason::NoRoute };
            if let Some(node) = self.nodes.get_mut(&payer) {
                node.write(now, hash, Direction::Outbound, amount, Msat::ZERO, failed);
            }
            return Err(PayError::NoRoute { amount, payable, max_fee });
        };
        if self.channels.values().any(|c| c.htlcs.contains_key(&hash)) {
            return Ok(());
        }
        let fault = self.next_fault(payer);
        let fee = if let Fault::Fee(fee) = fault
            && fee <= max_fee
        {
            fee
        } else {
            Msat::ZERO
        };
        self.add_htlc(channel, payer, hash, amount, fee);
        let (least, most) = self.rates.delay_ms;
        let delay = fault.delay_ms().unwrap_or_else(|| self.rng.gen_range(least..=most));
        self.at(delay, Timer::Resolve { payer, channel, hash, fault });
        if fault == Fault::Break {
            return Err(PayError::Uncertain { reason: "the row was not written".into() });
        }
        if let Some(node) = self.nodes.get_mut(&payer) {
            node.write(now, hash, Direction::Outbound, amount, Msat::ZERO, PaymentState::InFlight);
        }
        Ok(())
    }

    pub fn lookup(&self, node: LightningKey, hash: PaymentHash) -> Result<PaymentState, WalletError> {
        Ok(self.up(node)?.rows.get(&hash).map_or(PaymentState::Unknown, |row| row.record.state.clone()))
    }

    /// Oldest first.
    pub fn payments(&self, node: LightningKey) -> Result<Vec<PaymentRecord>, WalletError> {
        let mut rows: Vec<&Row> = self.up(node)?.rows.values().collect();
        rows.sort_by_key(|row| row.nth);
        Ok(rows.into_iter().map(|row| row.record.clone()).collect())
    }

    pub fn sign_message(&self, node: LightningKey, text: &[u8]) -> String {
        self.nodes.get(&node).map_or_else(String::new, |n| message::sign(text, &n.key))
    }

    fn next_fault(&mut self, payer: LightningKey) -> Fault {
        if let Some(fault) = self.nodes.get_mut(&payer).and_then(|n| n.script.pop_front()) {
            return fault;
        }
        let rates = self.rates;
        let mut draw = self.rng.gen_range(0..1_000u16);
        let mut hit = |rate: u16| match draw.checked_sub(rate) {
            Some(rest) => {
                draw = rest;
                false
            }
            None => true,
        };
        if hit(rates.fail) {
            Fault::Fail(FailureReason::RetriesExhausted)
        } else if hit(rates.stuck) {
            Fault::Stuck { ms: self.rng.gen_range(0..=rates.max_stuck_ms), then_settles: self.rng.r#gen() }
        } else if hit(rates.lose_event) {
            Fault::LoseEvent
        } else if hit(rates.duplicate_event) {
            Fault::DuplicateEvent
        } else if hit(rates.break_) {
            Fault::Break
        } else {
            Fault::None
        }
    }

    /// An HTLC's end.
    pub(super) fn resolve(&mut self, payer: LightningKey, channel: ChannelId, hash: PaymentHash, fault: Fault) {
        let now = self.now;
        let Some((payee, amount, fee)) = self.htlc(channel, payer, hash) else { return };
        if let Some(reason) = fault.failure() {
            return self.fail(payer, channel, hash, reason);
        }
        if !self.is_up(payee) {
            return self.at(PAYEE_RETRY_MS, Timer::Resolve { payer, channel, hash, fault });
        }
        let claim = self.nodes.get_mut(&payee).and_then(|n| n.claim(now, hash, amount));
        let Some(preimage) = claim else {
            return self.fail(payer, channel, hash, FailureReason::Rejected);
        };
        self.settle_htlc(channel, hash);
        self.emit(payee, WalletEvent::PaymentReceived { hash, amount });
        if let Some(node) = self.nodes.get_mut(&payer) {
            // A row that a crash lost does not come back; the event still comes.
            node.update(now, hash, fee, PaymentState::Settled { preimage, fee, amount });
        }
        let has_row = self.nodes.get(&payer).is_some_and(|n| n.rows.contains_key(&hash));
        let times =
            if fault == Fault::LoseEvent && has_row { 0 } else { 1 + usize::from(fault == Fault::DuplicateEvent) };
        for _ in 0..times {
            self.emit(payer, WalletEvent::PaymentSettled { hash, preimage, fee });
        }
    }

    fn fail(&mut self, payer: LightningKey, channel: ChannelId, hash: PaymentHash, reason: FailureReason) {
        self.return_htlc(channel, hash);
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(&payer) {
            node.update(now, hash, Msat::ZERO, PaymentState::Failed { reason });
        }
        self.emit(payer, WalletEvent::PaymentFailed { hash, reason });
    }
}

impl FakeNode {
    fn write(
        &mut self,
        at: UnixMs,
        hash: PaymentHash,
        direction: Direction,
        amount: Msat,
        fee: Msat,
        state: PaymentState,
    ) {
        let nth = self.rows.get(&hash).map_or(self.next_row, |row| row.nth);
        self.next_row += 1;
        self.rows.insert(hash, Row { nth, record: PaymentRecord { hash, direction, amount, fee, state, at } });
    }

    fn update(&mut self, at: UnixMs, hash: PaymentHash, fee: Msat, state: PaymentState) {
        if let Some(row) = self.rows.get_mut(&hash) {
            row.record.at = at;
            row.record.fee = fee;
            row.record.state = state;
        }
    }

    /// The payee's part: an invoice of ours, unpaid, unexpired, in full.
    fn claim(&mut self, now: UnixMs, hash: PaymentHash, amount: Msat) -> Option<Preimage> {
        let (preimage, facts) = self.invoices.get(&hash)?;
        let preimage = *preimage;
        let open = self.rows.get(&hash).is_some_and(|row| row.record.state == PaymentState::InFlight);
        if !open || facts.is_expired(now) || facts.amount != Some(amount) {
            return None;
        }
        self.update(now, hash, Msat::ZERO, PaymentState::Settled { preimage, fee: Msat::ZERO, amount });
        Some(preimage)
    }
}
