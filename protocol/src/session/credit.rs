//! Spending a credit note: what a closed session is owed becomes the balance of another one, once.

use super::{SessionError, SessionState, Side};
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{CreditTransfer, note_id, verify_credit},
    transfer::{Account, Transfer, TransferKind, transfer_id},
};
use satgrid_types::{BothSigned, Msat, SessionId};

/// Notes of other sessions that one session takes.
const MAX_CREDITS: usize = 64;

impl SessionState {
    /// What credit notes of other sessions brought in.
    pub fn credited(&self) -> Msat {
        self.credited
    }
    /// The notes that were spent here.
    pub fn credits(&self) -> &[BothSigned<CreditTransfer>] {
        &self.credits
    }
    /// Where this session's note was spent.
    pub fn spent(&self) -> Option<&BothSigned<CreditTransfer>> {
        self.spent.as_ref()
    }
    /// Whether a note may be spent here.
    pub fn takes_credit(&self) -> bool {
        self.close.is_none() && self.credits.len() < MAX_CREDITS
    }

    /// What spends this session's note in another session; none where nothing is owed by it, or a refund is under way.
    pub fn spend(&self, to: SessionId) -> Option<CreditTransfer> {
        let note = self.credit_note()?;
        let amount = note.peek().ok()?.amount;
        let owed = self.close.is_some() && self.refund.is_none() && amount == self.remainder() && self.spent.is_none();
        (owed && to != self.id).then(|| CreditTransfer {
            version: CreditTransfer::VERSION,
            provider: self.open.provider,
            from: self.id,
            consumer: self.open.consumer,
            to,
            note: note_id(note),
            amount,
        })
    }

    /// The entry of a note that both agreed to spend. It belongs to both sessions.
    pub fn credit_draft(side: Side, both: &BothSigned<CreditTransfer>) -> Option<Draft> {
        let CreditTransfer { from, to, amount, .. } = both.peek().ok()?;
        let id = transfer_id(from, None, TransferKind::CreditSpent, 0);
        let (debit, credit) = match side {
            Side::Provider => (Account::RefundsDue(from), Account::Prepaid(to)),
            Side::Consumer => (Account::PrepaidAsset(to), Account::PrepaidAsset(from)),
        };
        let draft = Draft::of(Evidence::CreditTransfer(both.clone()));
        Some(draft.with([Transfer::post(id, debit, credit, amount)]))
    }

    pub(super) fn apply_credit(&mut self, both: &BothSigned<CreditTransfer>) -> Result<(), SessionError> {
        if !both.peek().is_ok_and(|body| body.to == self.id || body.from == self.id) {
            return Ok(());
        }
        let body = verify_credit(both).filter(|body| body.provider == self.open.provider);
        let body = body.ok_or_else(|| SessionError::Evidence("a credit transfer that is not signed by both".into()))?;
        if body.from == self.id && self.spent.is_none() {
            self.spent_amount = body.amount;
            self.spent = Some(both.clone());
        } else if body.to == self.id && !self.credits.contains(both) {
            self.credited = self.credited.checked_add(body.amount).ok_or(SessionError::Overflow)?;
            self.credits.push(both.clone());
        }
        Ok(())
    }
}
