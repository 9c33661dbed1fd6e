//! What the journal says after a restart: the sessions of each side, payments without an outcome, refunds under way.

use crate::provider::PendingRefund;
use satgrid_ledger::entry::{Entry, Evidence};
use satgrid_protocol::session::{SessionState, Side, invoice_hash};
use satgrid_types::{Msat, NodeKey, PaymentHash, Quote, QuoteId, SessionId, UnixMs, Verified};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Everything that the roles take up again.
#[derive(Debug, Default)]
pub struct Recovered {
    pub provider_sessions: Vec<SessionState>,
    pub consumer_sessions: Vec<SessionState>,
    pub refunds: Vec<PendingRefund>,
    /// Sessions that this node ever opened as a consumer: the next session key's index.
    pub opened: u64,
    /// The key that began the journal; absent where it is empty.
    pub genesis: Option<NodeKey>,
    /// How often that key and those after it gave way.
    pub successions: usize,
    /// Value settled by receipts, by provider: what lets slices grow.
    pub settled_with: BTreeMap<NodeKey, Msat>,
    /// Rules that providers broke, oldest first, as far as [`MAX_MISBEHAVED`] goes back.
    pub misbehaved: VecDeque<(UnixMs, NodeKey, String)>,
}

/// Penalties end some day: older ones than these are let go.
const MAX_MISBEHAVED: usize = 4_096;
/// Quotes that a session may be opened under: an open follows its quote at once.
const MAX_QUOTES: usize = 4_096;
/// With so many sessions in which nothing was paid, those are let go that the provider had forgotten by then.
const SWEEP_AT: usize = 2_048;
/// The provider forgets by the time of its events; an entry is written a little later.
const SWEEP_AFTER_MS: u64 = 10 * 60 * 1_000;

/// Folds the journal, in order.
#[derive(Debug)]
pub struct Fold {
    /// Every key that was this node's.
    ours: BTreeSet<NodeKey>,
    /// The last of them; their order beside them.
    quotes: BTreeMap<QuoteId, Verified<Quote>>,
    quoted: VecDeque<QuoteId>,
    sessions: BTreeMap<SessionId, SessionState>,
    by_consumer: BTreeMap<NodeKey, Vec<SessionId>>,
    /// Of the provider's, those in which nothing was paid when they were last looked at; and when that is done again.
    unpaid: BTreeSet<SessionId>,
    sweep_at: usize,
    by_payment: BTreeMap<PaymentHash, SessionId>,
    refunds: BTreeMap<PaymentHash, PendingRefund>,
    out: Recovered,
}

impl Fold {
    pub fn new(ours: impl IntoIterator<Item = NodeKey>) -> Fold {
        Fold {
            ours: ours.into_iter().collect(),
            quotes: BTreeMap::new(),
            quoted: VecDeque::new(),
            sessions: BTreeMap::new(),
            by_consumer: BTreeMap::new(),
            unpaid: BTreeSet::new(),
            sweep_at: SWEEP_AT,
            by_payment: BTreeMap::new(),
            refunds: BTreeMap::new(),
            out: Recovered::default(),
        }
    }

    /// Takes in the next entry.
    pub fn entry(&mut self, entry: &Entry) {
        let draft = entry.draft();
        let Some(evidence) = &draft.evidence else {
            for session in self.sessions.values_mut() {
                // A reservation alone: only the session whose ids match takes it.
                let _ = session.apply(&draft);
            }
            return;
        };
        match evidence {
            Evidence::Genesis { node, .. } => self.out.genesis = Some(*node),
            Evidence::Succession(_) => self.out.successions += 1,
            Evidence::Misbehaviour { peer, rule, .. } => {
                if self.out.misbehaved.len() >= MAX_MISBEHAVED {
                    self.out.misbehaved.pop_front();
                }
                self.out.misbehaved.push_back((entry.at, *peer, rule.clone()));
            }
            Evidence::Quote(signed) => {
                if let Ok(quote) = signed.peek()
                    && let Ok(quote) = signed.verify(&quote.provider)
                {
                    for session in self.by_consumer.get(&quote.consumer).cloned().unwrap_or_default() {
                        self.apply_to(session, &draft);
                    }
                    self.keep_quote(quote);
                }
            }
            Evidence::Open(signed) => {
                let Ok(open) = signed.peek() else { return };
                let Ok(open) = signed.verify(&open.consumer) else { return };
                let Some(quote) = self.quotes.get(&open.quote) else { return };
                let side = if self.ours.contains(&open.provider) { Side::Provider } else { Side::Consumer };
                if side == Side::Consumer {
                    self.out.opened = self.out.opened.saturating_add(1);
                }
                let state = SessionState::new(side, quote, &open);
                let id = state.id();
                if self.sessions.insert(id, state).is_none() {
                    self.by_consumer.entry(open.consumer).or_default().push(id);
                }
                if side == Side::Provider {
                    self.unpaid.insert(id);
                    self.sweep(entry.at);
                }
            }
            Evidence::Invoice { session, bolt11, .. } => {
                if let Some(hash) = invoice_hash(bolt11) {
                    self.by_payment.insert(hash, *session);
                }
                self.apply_to(*session, &draft);
            }
            Evidence::RefundAttempted { session, payment_hash, amount, .. } => {
                self.by_payment.insert(*payment_hash, *session);
                let bolt11 = self.sessions.get(session).and_then(|s| s.close_statement()?.invoice.clone());
                if let Some(bolt11) = bolt11 {
                    let refund = PendingRefund { session: *session, hash: *payment_hash, amount: *amount, bolt11 };
                    self.refunds.insert(*payment_hash, refund);
                }
                self.apply_to(*session, &draft);
            }
            Evidence::RefundSettled { session, payment_hash, .. } => {
                self.refunds.remove(payment_hash);
                self.apply_to(*session, &draft);
            }
            Evidence::PaymentFailed { payment_hash, .. } => {
                self.refunds.remove(payment_hash);
                self.apply_to_payment(payment_hash, &draft);
            }
            Evidence::PaymentSettled { payment_hash, .. } | Evidence::PaymentReceived { payment_hash, .. } => {
                self.apply_to_payment(payment_hash, &draft);
            }
            Evidence::Receipt { receipt, .. } => {
                if let Ok(body) = receipt.peek() {
                    self.apply_to(body.session, &draft);
                    let settled = self.out.settled_with.entry(body.provider).or_default();
                    *settled = settled.saturating_add(body.cost);
                }
            }
            Evidence::Request(signed) => {
                if let Ok(open) = signed.peek() {
                    self.apply_to(open.session, &draft);
                }
            }
            Evidence::Ack(both) => {
                if let Ok(ack) = both.peek() {
                    self.apply_to(ack.session, &draft);
                }
            }
            Evidence::CreditNote(signed) => {
                if let Ok(note) = signed.peek() {
                    self.apply_to(note.session, &draft);
                }
            }
            Evidence::Close(signed) => {
                if let Ok(close) = signed.peek() {
                    self.apply_to(close.session, &draft);
                }
            }
            Evidence::CreditTransfer(both) => {
                if let Ok(body) = both.peek() {
                    self.apply_to(body.from, &draft);
                    self.apply_to(body.to, &draft);
                }
            }
            Evidence::PaymentAttempted { session, .. }
            | Evidence::Abandoned { session, .. }
            | Evidence::RefundReceived { session, .. } => self.apply_to(*session, &draft),
            Evidence::Listing { .. }
            | Evidence::ChannelClosed { .. }
            | Evidence::WalletPayment { .. }
            | Evidence::OnChain { .. }
            | Evidence::WalletSnapshot { .. }
            | Evidence::Checkpoint { .. }
            | Evidence::Promise(_) => {}
        }
    }

    /// What the roles take up again.
    pub fn finish(mut self) -> Recovered {
        for state in self.sessions.into_values() {
            match state.side() {
                Side::Provider => self.out.provider_sessions.push(state),
                Side::Consumer => self.out.consumer_sessions.push(state),
            }
        }
        self.out.refunds = self.refunds.into_values().collect();
        self.out
    }

    fn apply_to(&mut self, session: SessionId, draft: &satgrid_ledger::entry::Draft) {
        if let Some(state) = self.sessions.get_mut(&session) {
            // A journal that does not fold is the auditor's finding; the session stands where it last made sense.
            let _ = state.apply(draft);
        }
    }
    fn apply_to_payment(&mut self, hash: &PaymentHash, draft: &satgrid_ledger::entry::Draft) {
        if let Some(session) = self.by_payment.get(hash).copied() {
            self.apply_to(session, draft);
        }
    }

    fn keep_quote(&mut self, quote: Verified<Quote>) {
        let id = quote.quote_id();
        if self.quotes.insert(id, quote).is_none() {
            self.quoted.push_back(id);
        }
        if self.quoted.len() > MAX_QUOTES
            && let Some(oldest) = self.quoted.pop_front()
        {
            self.quotes.remove(&oldest);
        }
    }

    /// Lets go of what strangers opened and the provider had forgotten when this was written.
    fn sweep(&mut self, at: UnixMs) {
        if self.unpaid.len() <= self.sweep_at {
            return;
        }
        let mut lapsed = BTreeSet::new();
        let sessions = &self.sessions;
        self.unpaid.retain(|id| {
            let Some(state) = sessions.get(id) else { return false };
            let over = !state.is_taken_up(at) && at >= state.lapses_at().plus_ms(SWEEP_AFTER_MS);
            if over {
                lapsed.insert(*id);
            }
            state.is_unpaid() && !over
        });
        for state in lapsed.iter().filter_map(|id| self.sessions.remove(id)) {
            for hash in state.payment_hashes() {
                self.by_payment.remove(hash);
            }
            if let Some(others) = self.by_consumer.get_mut(&state.consumer()) {
                others.retain(|id| *id != state.id());
                if others.is_empty() {
                    self.by_consumer.remove(&state.consumer());
                }
            }
        }
        self.sweep_at = SWEEP_AT.max(self.unpaid.len().saturating_mul(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_ledger::{
        entry::{Draft, Head},
        testing::World,
    };
    use satgrid_types::node_key;

    #[test]
    fn a_rule_that_was_broken_is_remembered() {
        let mut fold = Fold::new([]);
        let peer = NodeKey([7; 32]);
        let evidence = Evidence::Misbehaviour { peer, rule: "overcharge".into(), statement: vec![1] };
        fold.entry(&Entry::chain(&Head::EMPTY, UnixMs(5), Draft::of(evidence)));
        assert_eq!(fold.finish().misbehaved, [(UnixMs(5), peer, "overcharge".to_owned())]);
    }

    #[test]
    fn strangers_leave_nothing_that_a_restart_would_carry() {
        let mut world = World::new();
        let mut paid = world.open();
        world.pay(&mut paid, Msat::sat(10));
        let mut fold = Fold::new([node_key(&world.provider.node)]);
        let mut read = 0;
        let mut fold_on = |world: &World, fold: &mut Fold| {
            let entries = world.provider.journal.entries();
            entries[read..].iter().for_each(|entry| fold.entry(entry));
            read = entries.len();
        };
        for _ in 1..SWEEP_AT {
            world.open();
        }
        fold_on(&world, &mut fold);
        assert_eq!(fold.sessions.len(), SWEEP_AT, "all of them are young");
        world.now = world.now.plus_ms(60 * 60 * 1_000);
        let young = world.open();
        world.pay(&mut paid, Msat::sat(20));
        fold_on(&world, &mut fold);
        let kept: BTreeSet<SessionId> = fold.sessions.keys().copied().collect();
        assert_eq!(kept, BTreeSet::from([paid.id, young.id]));
        assert_eq!(fold.by_consumer.len(), 2);
        assert!(fold.quotes.len() <= MAX_QUOTES && fold.quoted.len() == fold.quotes.len());
        let recovered = fold.finish();
        let sums: BTreeSet<Msat> = recovered.provider_sessions.iter().map(SessionState::paid).collect();
        assert_eq!(sums, BTreeSet::from([Msat::ZERO, Msat::sat(30)]));
    }
}
