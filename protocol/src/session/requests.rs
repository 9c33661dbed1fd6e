//! The requests of a session: reserved, acknowledged, and ended once, by a receipt or at the last acknowledgement.

use crate::frame::MAX_OPEN_REQUESTS;

use super::{LastAck, MAX_AHEAD_BYTES, MAX_RECEIPTS_AHEAD, SessionError, SessionState, hold_expiry};
use satgrid_ledger::{
    books::MAX_TRANSFERS,
    entry::{Draft, Evidence},
    statements::{
        Ack, ExpertCount, ExpertSplit, PartWork, Receipt, ReceiptOpening, RequestOpen, SlicePaid, Split, ack_id,
        receipt_id,
    },
    transfer::{Transfer, TransferKind, TransferOp, transfer_id},
};
use satgrid_pricing::{charge, marginal_charge, numerators};
use satgrid_types::{
    AckId, BothSigned, Digest, FinishReason, Msat, Numerators, RateCard, RequestId, Signed, TokenUsage, TransferId,
    UnixMs,
};

/// Reservations that one request may have: its end names them all, and one charge beside them.
pub const MAX_HOLDS: usize = 1_000;
const _: () = assert!(MAX_HOLDS < MAX_TRANSFERS);

/// One open request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestState {
    open: RequestOpen,
    rates: RateCard,
    acked: Option<(AckId, Ack, BothSigned<Ack>)>,
    holds: Vec<(TransferId, Msat)>,
}

/// What a receipt says beside what the session's state knows: the provider's account of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptFacts {
    pub model: String,
    pub engine: String,
    pub usage: TokenUsage,
    pub finish: FinishReason,
    pub started_at: UnixMs,
    pub first_token_ms: Option<u32>,
    pub duration_ms: u32,
    pub private_hash: Digest,
    pub error: Option<String>,
    /// Slices that this receipt accounts for.
    pub slices: Vec<SlicePaid>,
    /// Of a worker: what it did.
    pub part: Option<PartWork>,
    /// Of a lead: how it put the answer together, and the root over its workers' receipts.
    pub split: Option<(Split, Digest)>,
    /// Of a worker that evaluated experts: its counters.
    pub expert_rows: Option<Vec<ExpertCount>>,
    /// Of a lead that bought experts: the account of all rows, and the root over its workers' receipts.
    pub expert_split: Option<(ExpertSplit, Digest)>,
}

impl RequestState {
    pub fn open(&self) -> &RequestOpen {
        &self.open
    }
    pub fn rates(&self) -> &RateCard {
        &self.rates
    }
    /// Usage by the last acknowledgement that both signed; zero before the first.
    pub fn acked(&self) -> TokenUsage {
        self.acked.as_ref().map_or_else(TokenUsage::default, |(_, ack, _)| ack.usage)
    }
    pub fn acked_seq(&self) -> u32 {
        self.acked.as_ref().map_or(0, |(_, ack, _)| ack.seq)
    }
    pub fn acked_numerators(&self) -> Numerators {
        self.acked.as_ref().map_or(Numerators::ZERO, |(_, ack, _)| ack.numerators)
    }
    pub fn acked_cost(&self) -> Msat {
        charge(self.acked_numerators())
    }
    pub fn last_ack_id(&self) -> LastAck {
        self.acked.as_ref().map(|(id, _, _)| *id)
    }
    /// The last acknowledgement with both signatures: this side's claim.
    pub fn last_ack(&self) -> Option<&BothSigned<Ack>> {
        self.acked.as_ref().map(|(_, _, both)| both)
    }
    /// Whether more may be reserved for it: [`MAX_HOLDS`].
    pub fn may_reserve(&self) -> bool {
        self.holds.len() < MAX_HOLDS
    }
    pub fn reserved(&self) -> Msat {
        self.holds.iter().fold(Msat::ZERO, |sum, (_, amount)| sum.saturating_add(*amount))
    }
}

impl SessionState {
    pub fn requests(&self) -> &std::collections::BTreeMap<RequestId, RequestState> {
        &self.requests
    }
    pub fn request_state(&self, id: &RequestId) -> Option<&RequestState> {
        self.requests.get(id)
    }
    /// It was open once and is over: a late frame about it is not a new request.
    pub fn has_ended(&self, id: &RequestId) -> bool {
        self.ended.contains(id)
    }

    /// Requests that ended without a receipt, latest last, each with its last acknowledgement: what a resume shows.
    pub fn abandoned_requests(&self) -> &[(RequestId, Option<BothSigned<Ack>>)] {
        &self.abandoned
    }
    /// The last receipt with both signatures: what a resume shows.
    pub fn last_receipt_signed(&self) -> Option<&BothSigned<Receipt>> {
        self.last_receipt_signed.as_ref()
    }
    /// Receipts before the last one, oldest first: a provider that crashed may lack them too.
    pub fn earlier_receipts(&self) -> Vec<BothSigned<Receipt>> {
        self.earlier_receipts.iter().cloned().collect()
    }
    /// Numerators of all requests that ended: both sides must stand at the same figure to go on.
    pub fn settled_numerators(&self) -> Numerators {
        self.settled
    }

    /// A request begins, with a reservation. Whoever leaves before the first acknowledgement, nothing is owed.
    pub fn request(&self, now: UnixMs, open: &Signed<RequestOpen>, id: RequestId, reserve: Msat) -> Draft {
        Draft::of(Evidence::Request(open.clone())).with(self.hold(now, id, 0, reserve))
    }

    /// An acknowledgement that both signed, and what must be reserved further for the work that it allows.
    pub fn acked(
        &self,
        now: UnixMs,
        ack: &BothSigned<Ack>,
        id: RequestId,
        reserve_more: Msat,
    ) -> Result<Draft, SessionError> {
        let k = self.next_hold(&id)?;
        Ok(Draft::of(Evidence::Ack(ack.clone())).with(self.hold(now, id, k, reserve_more)))
    }

    /// A further reservation alone: funds arrived for work that waited.
    pub fn reserve(&self, now: UnixMs, id: RequestId, more: Msat) -> Result<Draft, SessionError> {
        let k = self.next_hold(&id)?;
        Ok(Draft { evidence: None, transfers: self.hold(now, id, k, more) })
    }

    /// The receipt that follows from this state and the provider's account of the run. Both sides build it; the consumer
    /// signs only what equals its own.
    pub fn receipt(&self, id: &RequestId, facts: ReceiptFacts) -> Result<Receipt, SessionError> {
        let request = self.requests.get(id).ok_or(SessionError::UnknownRequest(*id))?;
        let quote_id = request.open.quote;
        let quote = self.quotes.get(&quote_id).ok_or(SessionError::UnknownQuote(quote_id))?;
        let numerators = numerators(&facts.usage, &request.rates)?;
        let cost = marginal_charge(self.settled, numerators)?;
        let overflow = SessionError::Overflow;
        let newly_paid = Msat::checked_sum(facts.slices.iter().map(|s| s.amount)).ok_or(overflow.clone())?;
        Ok(Receipt {
            version: Receipt::VERSION,
            session: self.id,
            seq: self.receipts,
            previous: self.last_receipt,
            request: *id,
            quote: quote_id,
            listing: quote.listing,
            model: facts.model,
            model_root: quote.model_root,
            tokenizer: quote.tokenizer,
            quantisation: quote.quantisation.clone(),
            engine: facts.engine,
            profile: quote.profile,
            build: quote.build,
            instruction_set: quote.instruction_set.clone(),
            usage: facts.usage,
            rates: request.rates,
            numerators,
            cost,
            cumulative_numerators: self.settled.checked_add(numerators).ok_or(overflow.clone())?,
            cumulative_cost: self.charged.checked_add(cost).ok_or(overflow.clone())?,
            cumulative_paid: self.receipted_paid.checked_add(newly_paid).ok_or(overflow)?,
            slices: facts.slices,
            finish: facts.finish,
            started_at: facts.started_at,
            first_token_ms: facts.first_token_ms,
            duration_ms: facts.duration_ms,
            private_hash: facts.private_hash,
            last_ack: request.last_ack_id(),
            error: facts.error,
            provider: self.open.provider,
            consumer: self.open.consumer,
            stage_root: facts.split.as_ref().map(|(_, root)| *root),
            expert_root: facts.expert_split.as_ref().map(|(_, root)| *root),
            fingerprint_root: None,
            part: facts.part,
            split: facts.split.map(|(split, _)| split),
            expert_rows: facts.expert_rows,
            expert_split: facts.expert_split.map(|(split, _)| split),
        })
    }

    /// The request is over and both signed its receipt: its cost is taken from the holds, the rest returns.
    pub fn finished(
        &self,
        receipt: &BothSigned<Receipt>,
        body: &Receipt,
        opening: Option<ReceiptOpening>,
    ) -> Result<Draft, SessionError> {
        let transfers = self.settle(&body.request, body.cost)?;
        Ok(Draft::of(Evidence::Receipt { receipt: receipt.clone(), opening }).with(transfers))
    }

    /// The request ended without a receipt: charged at the last acknowledgement that both signed.
    pub fn abandoned(&self, id: RequestId) -> Result<Draft, SessionError> {
        let request = self.requests.get(&id).ok_or(SessionError::UnknownRequest(id))?;
        let numerators = request.acked_numerators();
        let cost = marginal_charge(self.settled, numerators)?;
        let evidence =
            Evidence::Abandoned { session: self.id, request: id, last_ack: request.last_ack_id(), numerators };
        Ok(Draft::of(evidence).with(self.settle(&id, cost)?))
    }

    fn next_hold(&self, id: &RequestId) -> Result<u32, SessionError> {
        let request = self.requests.get(id).ok_or(SessionError::UnknownRequest(*id))?;
        u32::try_from(request.holds.len()).map_err(|_| SessionError::Overflow)
    }

    fn hold(&self, now: UnixMs, id: RequestId, k: u32, amount: Msat) -> Vec<Transfer> {
        if amount.is_zero() {
            return Vec::new();
        }
        let (debit, credit) = self.charge_accounts();
        let hold = transfer_id(self.id, Some(id), TransferKind::Hold, k);
        vec![Transfer::pending(hold, debit, credit, amount, hold_expiry(now))]
    }

    /// Posts `cost` from the request's holds in their order, voids the rest, and charges directly what they do not cover.
    fn settle(&self, id: &RequestId, cost: Msat) -> Result<Vec<Transfer>, SessionError> {
        let request = self.requests.get(id).ok_or(SessionError::UnknownRequest(*id))?;
        let mut left = cost;
        let mut transfers = Vec::with_capacity(request.holds.len());
        for (hold, amount) in &request.holds {
            let part = left.min(*amount);
            left = left.saturating_sub(part);
            transfers.push(if part.is_zero() { Transfer::void(*hold) } else { Transfer::post_pending(*hold, part) });
        }
        if !left.is_zero() {
            let k = self.next_hold(id)?;
            let (debit, credit) = self.charge_accounts();
            let charge = transfer_id(self.id, Some(*id), TransferKind::Charge, k);
            transfers.push(Transfer::post(charge, debit, credit, left));
        }
        Ok(transfers)
    }

    pub(super) fn apply_request(
        &mut self,
        signed: &Signed<RequestOpen>,
        transfers: &[Transfer],
    ) -> Result<(), SessionError> {
        let Ok(open) = signed.verify(&self.open.consumer) else { return Ok(()) };
        if open.session != self.id {
            return Ok(());
        }
        let rates = self.quotes.get(&open.quote).ok_or(SessionError::UnknownQuote(open.quote))?.rates;
        let (id, open) = (open.request, open.into_statement());
        self.requests.insert(id, RequestState { open, rates, acked: None, holds: Vec::new() });
        self.apply_holds(&id, transfers);
        Ok(())
    }

    pub(super) fn apply_ack(&mut self, both: &BothSigned<Ack>, transfers: &[Transfer]) -> Result<(), SessionError> {
        let ack = both.peek().map_err(|e| SessionError::Evidence(e.to_string()))?;
        if ack.session != self.id {
            return Ok(());
        }
        let id = ack.request;
        let request = self.requests.get_mut(&id).ok_or(SessionError::UnknownRequest(id))?;
        request.acked = Some((ack_id(both), ack, both.clone()));
        self.apply_holds(&id, transfers);
        Ok(())
    }

    /// Holds are found among a draft's transfers by their deterministic ids.
    pub(super) fn apply_holds(&mut self, id: &RequestId, transfers: &[Transfer]) {
        let session = self.id;
        let Some(request) = self.requests.get_mut(id) else { return };
        for transfer in transfers {
            let k = u32::try_from(request.holds.len()).unwrap_or(u32::MAX);
            let next = transfer_id(session, Some(*id), TransferKind::Hold, k);
            if let TransferOp::Pending { amount, .. } = transfer.op
                && transfer.id == next
            {
                request.holds.push((next, amount));
            }
        }
    }

    pub(super) fn apply_receipt(&mut self, both: &BothSigned<Receipt>) -> Result<(), SessionError> {
        let receipt = both.peek().map_err(|e| SessionError::Evidence(e.to_string()))?;
        if receipt.session != self.id {
            return Ok(());
        }
        self.end(&receipt.request)?;
        self.settled = receipt.cumulative_numerators;
        self.charged = receipt.cumulative_cost;
        self.receipts = receipt.seq.saturating_add(1);
        self.last_receipt = Some(receipt_id(both));
        if let Some(before) = self.last_receipt_signed.replace(both.clone()) {
            if before.body().len() > MAX_AHEAD_BYTES {
                // Nothing was offered ahead of it.
                self.earlier_receipts.clear();
            } else {
                self.earlier_receipts.push_back(before);
            }
            if self.earlier_receipts.len() > MAX_RECEIPTS_AHEAD {
                self.earlier_receipts.pop_front();
            }
        }
        self.receipted_paid = receipt.cumulative_paid;
        self.receipted_slices.extend(receipt.slices.iter().map(|s| s.k));
        Ok(())
    }

    pub(super) fn apply_abandoned(&mut self, id: RequestId, added: Numerators) -> Result<(), SessionError> {
        let last_ack = self.requests.get(&id).and_then(|r| r.last_ack().cloned());
        self.end(&id)?;
        self.abandoned.push((id, last_ack));
        if self.abandoned.len() > MAX_OPEN_REQUESTS {
            self.abandoned.remove(0);
        }
        let cost = marginal_charge(self.settled, added)?;
        self.settled = self.settled.checked_add(added).ok_or(SessionError::Overflow)?;
        self.charged = self.charged.checked_add(cost).ok_or(SessionError::Overflow)?;
        Ok(())
    }

    fn end(&mut self, id: &RequestId) -> Result<(), SessionError> {
        self.requests.remove(id).ok_or(SessionError::UnknownRequest(*id))?;
        self.ended.insert(*id);
        Ok(())
    }
}
