//! Slices: asked for when the balance runs low, checked, paid once, credited; and the remainder asked back.

use super::{
    Consumer, ConsumerAction, ConsumerConfig, FundsLimit, SessionIndex,
    calls::Call,
    caps::Lack,
    links::{Phase, Session},
};
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{CreditNote, SessionClose, SliceDescriptor},
};
use satgrid_protocol::{
    check,
    frame::ConsumerControl,
    session::{SessionState, SliceStatus, invoice_hash},
    slices::{self, SliceDemand, SlicePolicy},
};
use satgrid_types::{Msat, PaymentHash, Preimage, SessionId, Signed, UnixMs};
use satgrid_wallet::invoice::{self, Expected, InvoiceMismatch};

/// Payments to one session that may fail in a row before its calls go elsewhere.
const MAX_FAILED_PAYMENTS: u32 = 3;

impl Consumer {
    /// Asks for the next slice's invoice where the free balance falls under its mark.
    pub(super) fn top_up(&mut self, now: UnixMs, index: SessionIndex) {
        self.measure(now, index);
        let Some(session) = self.sessions.get(&index).filter(|s| s.is_ready() && !s.closing) else { return };
        let (Some(state), Some(link)) = (&session.state, session.link) else { return };
        let idle = session.waiting.is_empty() && session.requests.is_empty();
        // One at a time, and none before the last is credited: a provider that keeps silent about one gets no second.
        let uncredited = state.paid() > session.credited;
        if idle
            || session.spending.is_some()
            || state.attempted().is_some()
            || uncredited
            || session.wanted_invoice.is_some()
        {
            return;
        }
        let (terms, k) = (state.quote().terms, state.next_k());
        let (policy, demand) = self.slice_demand(now, session, state);
        if !demand.is_due(&policy) {
            return;
        }
        // The need of the first in line alone decides whether nothing can be done without money.
        let first = session.waiting.front().and_then(|call| self.start_need(index, *call)).unwrap_or_default();
        let amount = slices::next_slice(&policy, &terms, &demand);
        // What was asked for elsewhere and is not attempted yet will be exposed too, and so will this slice's fee.
        let live = self.live.iter().filter_map(|index| self.sessions.get(index));
        let asked = live.filter_map(|s| s.wanted_invoice.map(|(_, amount, _)| amount));
        let exposed = asked
            .map(|amount| amount.saturating_add(fee_limit(&self.config, amount)))
            .fold(self.exposure(), Msat::saturating_add);
        let room = self.config.exposure_cap.saturating_sub(exposed);
        let room = room.saturating_sub(fee_limit(&self.config, room));
        let payable = self.payable.unwrap_or(Msat::MAX);
        let lacking = first.saturating_sub(demand.balance).max(terms.min_slice);
        let (amount, limit) = match amount {
            None => (None, FundsLimit::SessionCap),
            Some(amount) if room < amount => ((room >= lacking).then_some(room), FundsLimit::ExposureCap),
            Some(amount) if payable < amount => ((payable >= lacking).then_some(payable), FundsLimit::Wallet),
            Some(amount) => (Some(amount), FundsLimit::Wallet),
        };
        let Some(amount) = amount else {
            if !demand.is_short() {
                // What was wanted was a lead over payments. There is none to be had, and work goes on without.
                return;
            }
            let available = match limit {
                FundsLimit::Wallet => payable,
                FundsLimit::SessionCap => demand.spend_cap.saturating_sub(demand.committed),
                FundsLimit::ExposureCap => room,
            };
            return self.cannot_fund(now, index, Lack { required: lacking, available, limit });
        };
        if !self.quote_is_fresh(now, index) {
            return;
        }
        if let Some(session) = self.sessions.get_mut(&index) {
            session.wanted_invoice = Some((k, amount, now));
            session.flow.asked(now, k);
            session.unfunded = None;
        }
        self.say(link, ConsumerControl::WantInvoice(k, amount));
    }

    /// What the next slice of a session depends on, and the policy for its provider.
    fn slice_demand(&self, now: UnixMs, session: &Session, state: &SessionState) -> (SlicePolicy, SliceDemand) {
        let (quote, provider) = (state.quote(), session.provider());
        let direct = self.direct_peers.contains(&quote.lightning_node);
        let first = if direct { self.config.slices.first } else { self.config.first_routed };
        let largest = session.carries.map_or(self.config.slices.largest, |most| most.min(self.config.slices.largest));
        let policy = SlicePolicy { first, largest };
        let floor = slices::floor(&quote.rates, &quote.terms);
        let sum = |amounts: &mut dyn Iterator<Item = Msat>| amounts.fold(Msat::ZERO, Msat::saturating_add);
        let running = match session.requests.is_empty() {
            true => floor,
            false => sum(&mut session.requests.keys().map(|id| session.ahead(id, floor))),
        };
        let waiting = || session.waiting.iter().filter_map(|call| self.calls.get(call)).map(Call::meter);
        let starts = sum(&mut waiting().filter_map(|meter| meter.start_cost(&quote.rates, &quote.terms)));
        let reserves = sum(&mut waiting().map(|meter| meter.first_reserve(&quote.rates, &quote.terms)));
        let rest = || sum(&mut session.requests.keys().map(|id| session.ahead(id, Msat::MAX)));
        let payment_ms = self.payment_times.get(&provider).cloned().unwrap_or_default().p95_ms();
        let demand = SliceDemand {
            balance: if session.short { Msat::ZERO } else { session.usable_balance() },
            at_hand: starts.saturating_add(running),
            ahead: reserves.saturating_add(session.flow.ahead(now, payment_ms, session.requests.len(), rest)),
            last: state.last_paid(),
            proven: self.settled_with(&provider).saturating_add(state.acked_open()),
            committed: state.paid().saturating_sub(state.refunded()),
            spend_cap: self.config.session_cap,
        };
        (policy, demand)
    }

    /// No money for it: what waits is told at once, what runs goes on with what is prepaid.
    fn cannot_fund(&mut self, now: UnixMs, index: SessionIndex, lack: Lack) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        session.unfunded = Some(lack);
        if lack.limit == FundsLimit::SessionCap && self.retire(now, index) {
            return;
        }
        let Some(session) = self.sessions.get(&index) else { return };
        let blocked = session.waiting.front().copied();
        let Some(call) = blocked else { return };
        let need = self.start_need(index, call).unwrap_or(Msat::MAX);
        let covered = self.sessions.get(&index).is_some_and(|s| !s.short && s.usable_balance() >= need);
        let others = self.sessions.get(&index).is_some_and(|s| !s.requests.is_empty());
        // While others run, their receipts may still free what they reserved.
        if !covered && !others {
            self.fail_waiting(index, &lack.error());
        }
    }

    pub(super) fn invoiced(&mut self, now: UnixMs, index: SessionIndex, descriptor: SliceDescriptor, bolt11: String) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some((k, amount, _)) = session.wanted_invoice.take() else {
            return self.drop_link(now, index, crate::CloseCode::Violation, "an invoice that was not asked for");
        };
        let Some(state) = &session.state else { return };
        if session.closing {
            // Asked for before the close was: nothing more is paid in.
            return;
        }
        let wanted = state.descriptor(k, amount);
        if descriptor == (SliceDescriptor { quote: descriptor.quote, ..wanted.clone() })
            && descriptor.quote != wanted.quote
        {
            // Made under a quote that was lost on its way to us. Ask again; a provider that goes on like this is left.
            self.renew_quote(now, index);
            return self.count_failure(now, index, "an invoice under a quote that was never given");
        }
        let proof = bolt11.clone().into_bytes();
        if let Err(fault) = check::descriptor(&descriptor, &wanted) {
            return self.misbehaved(now, index, "invoice-terms", &fault.to_string(), proof);
        }
        let expected = Expected {
            amount,
            description_hash: descriptor.description_hash(),
            payee: state.quote().lightning_node,
            network: self.config.network,
        };
        let checked = match invoice::check(&bolt11, &expected, now) {
            Ok(checked) => checked,
            Err(mismatch @ InvoiceMismatch::Expired { .. }) => {
                return self.count_failure(now, index, &mismatch.to_string());
            }
            Err(mismatch) => {
                let rule = match &mismatch {
                    InvoiceMismatch::Amount { .. } => "invoice-amount",
                    InvoiceMismatch::DescriptionHash { .. } => "invoice-description-hash",
                    InvoiceMismatch::Payee { .. } => "invoice-payee",
                    InvoiceMismatch::Network { .. } => "invoice-network",
                    InvoiceMismatch::Malformed { .. }
                    | InvoiceMismatch::TooLong { .. }
                    | InvoiceMismatch::Expired { .. } => "invoice-malformed",
                };
                return self.misbehaved(now, index, rule, &mismatch.to_string(), proof);
            }
        };
        let hash = checked.payment_hash();
        if self.by_payment.contains_key(&hash) {
            return self.misbehaved(
                now,
                index,
                "payment-hash-reuse",
                "an invoice with a payment hash seen before",
                proof,
            );
        }
        let fee = fee_limit(&self.config, amount);
        let draft = state.invoiced(descriptor, bolt11.clone());
        if !self.record(index, vec![draft], Vec::new()) {
            return;
        }
        let Some(state) = self.sessions.get(&index).and_then(|s| s.state.as_ref()) else { return };
        let Ok(attempt) = state.attempt(k, hash, fee) else { return };
        self.by_payment.insert(hash, index);
        let slice = (state.id(), k);
        let pay = ConsumerAction::Pay { slice, hash, bolt11, amount, max_fee: fee };
        self.record(index, vec![attempt], vec![pay]);
    }

    pub(super) fn payment_settled(&mut self, now: UnixMs, hash: PaymentHash, preimage: Preimage, fee: Msat) {
        let handled = ConsumerAction::WalletHandled { hash };
        let index = self.by_payment.get(&hash).copied();
        let state = index.and_then(|i| self.sessions.get(&i)?.state.as_ref().map(|s| (i, s)));
        let Some((index, draft)) = state.and_then(|(i, s)| s.settled(hash, preimage, fee).ok().map(|d| (i, d))) else {
            // Not a slice, or settled already: a payment is booked once.
            return self.actions.push_back(handled);
        };
        self.counters.slices += 1;
        let amount = self.attempted_amount(index);
        let largest = self.config.slices.largest;
        if let Some(session) = self.sessions.get_mut(&index) {
            session.failed_payments = 0;
            let provider = session.provider();
            self.actions.extend(amount.map(|amount| ConsumerAction::PaidSlice { provider, amount, fee }));
            // The route carried what it was tried with: it is tried with twice as much.
            if let (Some(most), Some(amount)) = (session.carries, amount)
                && amount >= most
            {
                session.carries = Some(Msat(most.0.saturating_mul(2))).filter(|most| *most < largest);
            }
        }
        self.record(index, vec![draft], vec![handled]);
        self.slice_over(now, index);
        self.release_held(now, index);
    }

    pub(super) fn payment_failed(&mut self, now: UnixMs, hash: PaymentHash, reason: String) {
        let handled = ConsumerAction::WalletHandled { hash };
        let index = self.by_payment.get(&hash).copied();
        let state = index.and_then(|i| self.sessions.get(&i)?.state.as_ref().map(|s| (i, s)));
        let failed = state.and_then(|(i, s)| s.failed(hash, reason.clone()).ok().map(|d| (i, d)));
        let Some((index, draft)) = failed else { return self.actions.push_back(handled) };
        // A payment that fails costs nothing and tells what no probe would: the route does not carry so much now.
        let amount = self.attempted_amount(index);
        if let (Some(session), Some(amount)) = (self.sessions.get_mut(&index), amount) {
            session.carries = Some(Msat(amount.0 / 2));
        }
        self.record(index, vec![draft], vec![handled]);
        self.count_failure(now, index, &reason);
    }

    /// The amount of the slice whose payment is under way.
    fn attempted_amount(&self, index: SessionIndex) -> Option<Msat> {
        let state = self.sessions.get(&index)?.state.as_ref()?;
        state.attempted().map(|(_, slice)| slice.amount)
    }

    /// A slice could not be paid; after a few in a row its calls go elsewhere.
    fn count_failure(&mut self, now: UnixMs, index: SessionIndex, reason: &str) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        session.failed_payments = session.failed_payments.saturating_add(1);
        let give_up = session.failed_payments >= MAX_FAILED_PAYMENTS;
        let provider = session.provider();
        if give_up {
            session.failed_payments = 0;
            self.leave(now, index, provider, &format!("paying it failed again and again: {reason}"));
        }
    }

    pub(super) fn credited(&mut self, now: UnixMs, index: SessionIndex, total: Msat) {
        if let Some(session) = self.sessions.get_mut(&index)
            && session.credited < total
        {
            session.credited = total;
            session.short = false;
        }
        self.slice_over(now, index);
    }

    /// A refund arrived, on the invoice that the close named.
    pub(super) fn payment_received(&mut self, hash: PaymentHash, amount: Msat) {
        let handled = ConsumerAction::WalletHandled { hash };
        let Some(&index) = self.by_payment.get(&hash) else { return self.actions.push_back(handled) };
        let Some(state) = self.sessions.get(&index).and_then(|s| s.state.as_ref()) else { return };
        if !state.is_refund_due_on(&hash) {
            // Told twice, or nothing that is owed to us.
            return self.actions.push_back(handled);
        }
        let draft = state.refund_received(hash, amount);
        self.record(index, vec![draft], vec![handled]);
    }

    pub(super) fn begin_close(&mut self, now: UnixMs, id: SessionId) {
        let Some(index) = self.index_of(id) else { return };
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let unanswered = session
            .state
            .as_ref()
            .is_some_and(|s| s.close_statement().is_some() && s.refunded().is_zero() && !s.remainder().is_zero());
        if session.phase == Phase::Over && session.link.is_none() && unanswered {
            // The close was said and its answer lost: say it again.
            session.phase = Phase::Asleep;
        }
        if session.phase == Phase::Over || (session.phase == Phase::Asleep && session.listing.is_none()) {
            return;
        }
        session.closing = true;
        self.live.insert(index);
        self.wake(now, index);
        self.continue_close(index);
    }

    /// Asks for the invoice to be refunded to, once nothing is open any more.
    pub(super) fn continue_close(&mut self, index: SessionIndex) {
        let ready = |s: &&mut Session| s.closing && s.is_ready() && !s.close_asked;
        let Some(session) = self.sessions.get_mut(&index).filter(ready) else { return };
        let (Some(state), Some(link)) = (&session.state, session.link) else { return };
        let uncredited = state.paid() > session.credited || session.wanted_invoice.is_some();
        if !session.requests.is_empty() || state.attempted().is_some() || uncredited || session.spending.is_some() {
            return;
        }
        session.close_asked = true;
        if let Some(close) = state.close_statement()
            && state.credit_note().is_none()
        {
            let again = Signed::sign(close, &session.key);
            return self.say(link, ConsumerControl::Close(again));
        }
        let (session, amount) = (state.id(), state.remainder());
        self.actions.push_back(ConsumerAction::MakeCloseInvoice { session, amount });
    }

    pub(super) fn close_with(&mut self, now: UnixMs, id: SessionId, result: Result<String, String>) {
        let Some(index) = self.index_of(id) else { return };
        // Where the connection broke meanwhile, another invoice is asked for once the session is resumed.
        let Some(session) = self.sessions.get(&index).filter(|s| s.is_ready()) else { return };
        let (Some(state), Some(link)) = (&session.state, session.link) else { return };
        if state.close_statement().is_some() && state.credit_note().is_none() {
            return;
        }
        let invoice = result.ok();
        if let Some(hash) = invoice.as_deref().and_then(invoice_hash) {
            self.by_payment.insert(hash, index);
        }
        let close = SessionClose {
            version: SessionClose::VERSION,
            session: id,
            last_receipt: state.last_receipt(),
            remainder: state.remainder(),
            invoice,
            closed_at: now,
        };
        let signed = Signed::sign(&close, &session.key);
        let draft = state.closed(&signed);
        self.record(index, vec![draft], vec![ConsumerAction::Control { link, frame: ConsumerControl::Close(signed) }]);
    }

    /// The provider owes what it could not pay: its signed word is kept.
    pub(super) fn owed(&mut self, now: UnixMs, index: SessionIndex, note: &Signed<CreditNote>) {
        let Some(session) = self.sessions.get(&index) else { return };
        let Some(state) = &session.state else { return };
        let Ok(verified) = note.verify(&session.provider()) else { return };
        if verified.session != state.id() {
            return;
        }
        if state.credit_note() != Some(note) {
            self.record(index, vec![Draft::of(Evidence::CreditNote(note.clone()))], Vec::new());
        }
        self.ask_again_later(now, index);
        self.closed_by_provider(now, index);
    }

    pub(super) fn closed_by_provider(&mut self, now: UnixMs, index: SessionIndex) {
        self.end_session(index);
        self.drop_link(now, index, crate::CloseCode::Done, "the session is closed");
    }

    fn end_session(&mut self, index: SessionIndex) {
        if let Some(session) = self.sessions.get_mut(&index)
            && session.state.as_ref().is_some_and(|s| s.close_statement().is_some())
        {
            session.phase = Phase::Over;
            session.closing = false;
        }
    }

    /// Watches that a slice which was paid is credited.
    pub(super) fn watch_credit(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(state) = &session.state else { return };
        let behind = session.is_ready() && state.paid() > session.credited;
        let paid = state.slices().values().any(|s| s.status == SliceStatus::Paid);
        session.uncredited_since = match (behind && paid, session.uncredited_since) {
            (true, since) => since.or(Some(now)),
            (false, _) => None,
        };
    }
}

/// The most that a slice's routing may cost.
fn fee_limit(config: &ConsumerConfig, amount: Msat) -> Msat {
    Msat((amount.0 / 1_000).saturating_mul(config.fee_per_mille)).max(config.min_fee)
}
