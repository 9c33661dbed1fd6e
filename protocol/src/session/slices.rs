//! The slices of a session: invoiced, attempted, paid or failed, each settled once.

use super::{SessionError, SessionState, Side};
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{SliceDescriptor, SlicePaid},
    transfer::{Account, Transfer, TransferKind, attempt, transfer_id},
};
use satgrid_types::{Msat, PaymentHash, Preimage, UnixMs};

/// Where a slice stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SliceStatus {
    /// There is an invoice; nobody has tried to pay it here.
    Invoiced,
    /// Consumer: the wallet was (or was about to be) asked to pay. Only the wallet's word by hash ends this.
    Attempted,
    Paid,
    /// This invoice will never be paid; `k` may be invoiced again.
    Failed,
}

impl SliceStatus {
    pub const fn word(self) -> &'static str {
        match self {
            SliceStatus::Invoiced => "invoiced",
            SliceStatus::Attempted => "attempted",
            SliceStatus::Paid => "paid",
            SliceStatus::Failed => "failed",
        }
    }
}

/// One slice, with its latest invoice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceState {
    pub amount: Msat,
    pub bolt11: String,
    pub payment_hash: Option<PaymentHash>,
    pub max_fee: Msat,
    pub status: SliceStatus,
    /// Earlier invoices of the same k that failed.
    pub again: u32,
}

impl SessionState {
    pub fn slices(&self) -> &std::collections::BTreeMap<u32, SliceState> {
        &self.slices
    }
    /// Slice `k`, by its payment.
    pub fn slice_by_hash(&self, hash: &PaymentHash) -> Option<(u32, &SliceState)> {
        let k = *self.by_hash.get(hash)?;
        self.slices.get(&k).map(|slice| (k, slice))
    }
    /// The slice whose payment has been attempted and whose fate is not known. At most one.
    pub fn attempted(&self) -> Option<(u32, &SliceState)> {
        self.slices.iter().find(|(_, s)| s.status == SliceStatus::Attempted).map(|(k, s)| (*k, s))
    }
    /// The number of the next slice: the first that is neither paid nor attempted.
    pub fn next_k(&self) -> u32 {
        let open = self.slices.iter().find(|(_, s)| matches!(s.status, SliceStatus::Invoiced | SliceStatus::Failed));
        open.map_or_else(|| self.slices.last_key_value().map_or(0, |(k, _)| k.saturating_add(1)), |(k, _)| *k)
    }
    /// The last slice that was paid.
    pub fn last_paid(&self) -> Option<Msat> {
        self.slices.values().rev().find(|s| s.status == SliceStatus::Paid).map(|s| s.amount)
    }
    /// The payment under way, with the most that its route may cost.
    pub fn in_flight(&self) -> Msat {
        self.attempted().map_or(Msat::ZERO, |(_, s)| s.amount.saturating_add(s.max_fee))
    }
    /// Invoices that were issued and not paid: the provider keeps at most two.
    pub fn unpaid_invoices(&self) -> usize {
        self.slices.values().filter(|s| s.status == SliceStatus::Invoiced).count()
    }
    /// Slices that arrived and stand in no receipt yet, by `k`.
    pub fn unreceipted(&self) -> Vec<SlicePaid> {
        let unreceipted = |(k, slice): (&u32, &SliceState)| {
            let payment_hash = slice.payment_hash?;
            let is = slice.status == SliceStatus::Paid && !self.receipted_slices.contains(k);
            is.then_some(SlicePaid { k: *k, payment_hash, amount: slice.amount })
        };
        self.slices.iter().filter_map(unreceipted).collect()
    }

    /// Some receipt accounts for slice `k`.
    pub fn is_receipted(&self, k: u32) -> bool {
        self.receipted_slices.contains(&k)
    }

    /// What slice `k` of `amount` would pay for, as of now.
    pub fn descriptor(&self, k: u32, amount: Msat) -> SliceDescriptor {
        SliceDescriptor {
            version: SliceDescriptor::VERSION,
            session: self.id,
            k,
            amount,
            quote: self.current_quote,
            provider: self.open.provider,
            consumer: self.open.consumer,
            previous_receipt: self.last_receipt,
        }
    }

    /// An invoice was issued (provider) or received and checked (consumer).
    pub fn invoiced(&self, descriptor: SliceDescriptor, bolt11: String) -> Draft {
        Draft::of(Evidence::Invoice { session: self.id, k: descriptor.k, bolt11, descriptor })
    }

    /// Consumer: about to pay slice `k`. Durable before the wallet is asked.
    pub fn attempt(&self, k: u32, payment_hash: PaymentHash, max_fee: Msat) -> Result<Draft, SessionError> {
        let slice = self.slices.get(&k).ok_or(SessionError::UnknownSlice(k))?;
        if slice.status != SliceStatus::Invoiced || self.attempted().is_some() {
            return Err(SessionError::SliceStatus { k, status: slice.status.word() });
        }
        let tries = attempt(k, slice.again).ok_or(SessionError::Overflow)?;
        let pending = |kind, debit, amount| {
            let id = transfer_id(self.id, None, kind, tries);
            Transfer::pending(id, debit, Account::Lightning, amount, None)
        };
        let mut transfers = vec![pending(TransferKind::Slice, Account::PrepaidAsset(self.id), slice.amount)];
        if !max_fee.is_zero() {
            transfers.push(pending(TransferKind::SliceFee, Account::RoutingFees, max_fee));
        }
        Ok(Draft::of(Evidence::PaymentAttempted { session: self.id, k, payment_hash, max_fee }).with(transfers))
    }

    /// Consumer: the wallet has the preimage.
    pub fn settled(&self, payment_hash: PaymentHash, preimage: Preimage, fee: Msat) -> Result<Draft, SessionError> {
        let (k, slice) = self.attempted_by(&payment_hash)?;
        let [amount_id, fee_id] = self.attempt_ids(k, slice)?;
        let mut transfers = vec![Transfer::post_pending(amount_id, slice.amount)];
        if !slice.max_fee.is_zero() {
            // A wallet that paid more than it was allowed is booked as it is, beside the reservation.
            let reserved = fee.min(slice.max_fee);
            transfers.push(if reserved.is_zero() {
                Transfer::void(fee_id)
            } else {
                Transfer::post_pending(fee_id, reserved)
            });
        }
        let beyond = fee.saturating_sub(slice.max_fee);
        if !beyond.is_zero() {
            let tries = attempt(k, slice.again).ok_or(SessionError::Overflow)?;
            let id = transfer_id(self.id, None, TransferKind::SliceFeePaid, tries);
            transfers.push(Transfer::post(id, Account::RoutingFees, Account::Lightning, beyond));
        }
        let amount = slice.amount;
        Ok(Draft::of(Evidence::PaymentSettled { payment_hash, preimage, amount, fee }).with(transfers))
    }

    /// Consumer: the wallet says that this payment is not out and will never be.
    pub fn failed(&self, payment_hash: PaymentHash, reason: String) -> Result<Draft, SessionError> {
        let (k, slice) = self.attempted_by(&payment_hash)?;
        let [amount_id, fee_id] = self.attempt_ids(k, slice)?;
        let mut transfers = vec![Transfer::void(amount_id)];
        if !slice.max_fee.is_zero() {
            transfers.push(Transfer::void(fee_id));
        }
        Ok(Draft::of(Evidence::PaymentFailed { payment_hash, reason }).with(transfers))
    }

    /// Provider: a slice arrived. The invoice's amount is credited; what a just-in-time channel kept of it is booked.
    pub fn received(&self, payment_hash: PaymentHash, amount: Msat) -> Result<Draft, SessionError> {
        let (k, slice) = self.slice_by_hash(&payment_hash).ok_or(SessionError::UnknownPayment(payment_hash))?;
        if slice.payment_hash != Some(payment_hash) {
            // An older invoice of this slice, over another amount perhaps: crediting it would give away the difference.
            return Err(SessionError::UnknownPayment(payment_hash));
        }
        if slice.status == SliceStatus::Paid {
            return Err(SessionError::SliceStatus { k, status: slice.status.word() });
        }
        let post = |kind, debit, msat| {
            Transfer::post(transfer_id(self.id, None, kind, k), debit, Account::Prepaid(self.id), msat)
        };
        let arrived = amount.min(slice.amount);
        let mut transfers = vec![post(TransferKind::SliceCredit, Account::Lightning, arrived)];
        let skim = slice.amount.saturating_sub(arrived);
        if !skim.is_zero() {
            transfers.push(post(TransferKind::SliceSkim, Account::RoutingFees, skim));
        }
        Ok(Draft::of(Evidence::PaymentReceived { payment_hash, amount }).with(transfers))
    }

    fn attempted_by(&self, hash: &PaymentHash) -> Result<(u32, &SliceState), SessionError> {
        let (k, slice) = self.slice_by_hash(hash).ok_or(SessionError::UnknownPayment(*hash))?;
        if slice.status != SliceStatus::Attempted {
            return Err(SessionError::SliceStatus { k, status: slice.status.word() });
        }
        Ok((k, slice))
    }

    fn attempt_ids(&self, k: u32, slice: &SliceState) -> Result<[satgrid_types::TransferId; 2], SessionError> {
        let tries = attempt(k, slice.again).ok_or(SessionError::Overflow)?;
        let id = |kind| transfer_id(self.id, None, kind, tries);
        Ok([id(TransferKind::Slice), id(TransferKind::SliceFee)])
    }

    pub(super) fn apply_invoice(&mut self, k: u32, bolt11: &str, d: &SliceDescriptor) -> Result<(), SessionError> {
        let invoice = read(bolt11);
        let payment_hash = invoice.map(|(hash, _)| hash);
        let again = match self.slices.get(&k) {
            Some(old) if matches!(old.status, SliceStatus::Paid | SliceStatus::Attempted) => {
                return Err(SessionError::SliceStatus { k, status: old.status.word() });
            }
            Some(old) => old.again.saturating_add(u32::from(old.status == SliceStatus::Failed)),
            None => 0,
        };
        if let Some(hash) = payment_hash {
            self.by_hash.insert(hash, k);
        }
        self.payable_until = self.payable_until.max(invoice.map(|(_, expires_at)| expires_at));
        let (amount, status) = (d.amount, SliceStatus::Invoiced);
        self.slices.insert(
            k,
            SliceState { amount, bolt11: bolt11.to_owned(), payment_hash, max_fee: Msat::ZERO, status, again },
        );
        Ok(())
    }

    pub(super) fn apply_attempt(&mut self, k: u32, hash: &PaymentHash, max_fee: Msat) -> Result<(), SessionError> {
        let slice = self.slices.get_mut(&k).ok_or(SessionError::UnknownSlice(k))?;
        slice.status = SliceStatus::Attempted;
        slice.payment_hash = Some(*hash);
        slice.max_fee = max_fee;
        self.by_hash.insert(*hash, k);
        Ok(())
    }

    pub(super) fn apply_settled(&mut self, hash: &PaymentHash) -> Result<(), SessionError> {
        self.mark_paid(hash)
    }

    pub(super) fn apply_failed(&mut self, hash: &PaymentHash) -> Result<(), SessionError> {
        if let Some(slice) = self.by_hash.get(hash).and_then(|k| self.slices.get_mut(k)) {
            slice.status = SliceStatus::Failed;
        }
        Ok(())
    }

    pub(super) fn apply_received(&mut self, hash: &PaymentHash) -> Result<(), SessionError> {
        match self.side {
            Side::Provider => self.mark_paid(hash),
            Side::Consumer => Ok(()),
        }
    }

    fn mark_paid(&mut self, hash: &PaymentHash) -> Result<(), SessionError> {
        let Some(slice) = self.by_hash.get(hash).and_then(|k| self.slices.get_mut(k)) else { return Ok(()) };
        if slice.status != SliceStatus::Paid {
            slice.status = SliceStatus::Paid;
            slice.payment_hash = Some(*hash);
            self.paid = self.paid.checked_add(slice.amount).ok_or(SessionError::Overflow)?;
        }
        Ok(())
    }
}

/// The payment hash that a BOLT 11 names; `None` where it is no invoice (refused before it gets here).
pub fn invoice_hash(bolt11: &str) -> Option<PaymentHash> {
    read(bolt11).map(|(hash, _)| hash)
}

/// Its payment hash, and when it expires.
fn read(bolt11: &str) -> Option<(PaymentHash, UnixMs)> {
    let invoice: lightning_invoice::Bolt11Invoice = bolt11.parse().ok()?;
    let hash: &[u8] = invoice.payment_hash().as_ref();
    let expires_at = invoice.expires_at().map_or(UnixMs(u64::MAX), |at| UnixMs::from_secs(at.as_secs()));
    hash.try_into().ok().map(|hash| (PaymentHash(hash), expires_at))
}
