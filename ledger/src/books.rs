//! The books: balances and reservations, folded from transfers.
//!
//! | a transfer is | it awaits | a crash there means |
//! |---|---|---|
//! | unknown | being applied | nothing happened |
//! | pending | post, void or expiry, exactly one | the reservation stands; its owner finds it by id and ends it |
//! | posted, voided or expired | nothing | it is done; applying it again does nothing |
//!
//! Always true: debits equal credits; no account that must not be negative is overdrawn, reservations included; a
//! transfer id means one transfer for ever. A draft is applied whole or not at all. Time is an argument.

use crate::{
    entry::Draft,
    transfer::{Account, Normal, Transfer, TransferOp},
};
use satgrid_types::{Msat, SessionId, TransferId, UnixMs, cbor};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// No draft holds more transfers. A finished request ends its reservations, one per window of output.
pub const MAX_TRANSFERS: usize = 1_024;

/// Why a draft was not applied; nothing of it was.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BooksError {
    #[error("transfer {id}: zero msat; leave it out or void it")]
    Zero { id: TransferId },
    #[error("transfer {id}: {account} on both sides")]
    SameAccount { id: TransferId, account: Account },
    #[error("transfer {id} is already booked with other content")]
    Conflict { id: TransferId },
    #[error("transfer {id}: nothing pending under {pending}")]
    NotPending { id: TransferId, pending: TransferId },
    #[error("transfer {id}: {pending} was ended before")]
    Ended { id: TransferId, pending: TransferId },
    #[error("transfer {id}: posts {amount}, only {held} were reserved")]
    PostsMore { id: TransferId, held: Msat, amount: Msat },
    #[error("transfer {id}: expired at {}, its time is {}", at.0, expires_at.0)]
    NotDue { id: TransferId, at: UnixMs, expires_at: UnixMs },
    #[error("transfer {id}: {pending} has no timeout; only an event ends it")]
    NoTimeout { id: TransferId, pending: TransferId },
    #[error("{account} would be overdrawn by {by}")]
    Overdrawn { account: Account, by: Msat },
    #[error("{given} transfers in one draft, the limit is {MAX_TRANSFERS}")]
    TooMany { given: usize },
    #[error("{account}: the sum does not fit")]
    Overflow { account: Account },
}

/// A pending transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    pub debit: Account,
    pub credit: Account,
    pub amount: Msat,
    pub expires_at: Option<UnixMs>,
    /// When it was reserved.
    pub since: UnixMs,
    /// The session that it belongs to: by its accounts, else by those of the draft that made it.
    pub session: Option<SessionId>,
}

/// One account's sums since the journal began, in msat.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Sums {
    pub debits: u128,
    pub credits: u128,
    pub debits_pending: u128,
    pub credits_pending: u128,
}

impl Sums {
    fn balance(&self, normal: Normal) -> i128 {
        let (debits, credits) = (signed(self.debits), signed(self.credits));
        match normal {
            Normal::Debit => debits.saturating_sub(credits),
            Normal::Credit => credits.saturating_sub(debits),
        }
    }
    /// What is reserved to leave the account.
    fn outgoing(&self, normal: Normal) -> i128 {
        signed(match normal {
            Normal::Debit => self.credits_pending,
            Normal::Credit => self.debits_pending,
        })
    }
    fn is_settled(&self) -> bool {
        self.debits == self.credits && self.debits_pending == 0 && self.credits_pending == 0
    }
}

/// Sums of u64 amounts stay far below 2^127: 2^63 transfers of the largest amount would be needed.
fn signed(sum: u128) -> i128 {
    i128::try_from(sum).unwrap_or(i128::MAX)
}

/// First half of SHA-256 over a transfer's canonical bytes: tells a replay from a conflict.
type Fingerprint = [u8; 16];

fn fingerprint(transfer: &Transfer) -> Fingerprint {
    let digest = Sha256::digest(cbor::encode(transfer));
    let mut out = [0; 16];
    out.copy_from_slice(&digest[..16]);
    out
}

/// All accounts and reservations of one journal.
#[derive(Debug, Default, Clone)]
pub struct Books {
    sums: BTreeMap<Account, Sums>,
    holds: BTreeMap<TransferId, Hold>,
    known: BTreeMap<TransferId, Fingerprint>,
    /// Which ids belong to a session, to forget them when it is over.
    of_session: BTreeMap<SessionId, Vec<TransferId>>,
    /// Sums of accounts that were forgotten: equal on both sides.
    retired: u128,
}

impl Books {
    pub fn new() -> Books {
        Books::default()
    }

    // Getters.

    /// The account's balance in its normal direction, reservations not counted; msat. Only accounts that may be
    /// negative ever are.
    pub fn balance(&self, account: &Account) -> i128 {
        self.sums(account).balance(account.normal())
    }
    /// Balance less what is reserved to leave the account: the one figure for admission and for display. Never below
    /// zero: for an account that may be overdrawn, look at [`Books::balance`].
    pub fn available(&self, account: &Account) -> Msat {
        let sums = self.sums(account);
        let left = sums.balance(account.normal()).saturating_sub(sums.outgoing(account.normal()));
        Msat(u64::try_from(left.max(0)).unwrap_or(u64::MAX))
    }
    /// What is reserved to leave the account.
    pub fn reserved(&self, account: &Account) -> Msat {
        Msat(u64::try_from(self.sums(account).outgoing(account.normal())).unwrap_or(u64::MAX))
    }
    pub fn sums(&self, account: &Account) -> Sums {
        self.sums.get(account).copied().unwrap_or_default()
    }
    /// The pending transfer under this id, if it is still pending.
    pub fn pending(&self, id: &TransferId) -> Option<&Hold> {
        self.holds.get(id)
    }
    /// Whether a transfer of this id was ever booked (and its session not retired).
    pub fn knows(&self, id: &TransferId) -> bool {
        self.known.contains_key(id)
    }
    pub fn holds(&self) -> impl Iterator<Item = (&TransferId, &Hold)> {
        self.holds.iter()
    }
    pub fn holds_of(&self, session: SessionId) -> impl Iterator<Item = (&TransferId, &Hold)> {
        self.holds.iter().filter(move |(_, hold)| hold.session == Some(session))
    }
    /// Holds whose timeout has passed at `now`.
    pub fn due(&self, now: UnixMs) -> Vec<TransferId> {
        let due = |hold: &Hold| hold.expires_at.is_some_and(|at| at <= now);
        self.holds.iter().filter(|(_, hold)| due(hold)).map(|(id, _)| *id).collect()
    }
    /// The earliest timeout of any hold.
    pub fn next_due(&self) -> Option<UnixMs> {
        self.holds.values().filter_map(|hold| hold.expires_at).min()
    }
    /// Accounts that were ever used, in order, with their sums.
    pub fn accounts(&self) -> impl Iterator<Item = (&Account, &Sums)> {
        self.sums.iter()
    }
    /// Everything owed to others: prepaid balances, refunds due, workers.
    pub fn liabilities(&self) -> Msat {
        let owed = self.sums.iter().filter(|(account, _)| account.is_liability());
        let sum = owed.fold(0i128, |sum, (account, sums)| sum.saturating_add(sums.balance(account.normal())));
        Msat(u64::try_from(sum.max(0)).unwrap_or(u64::MAX))
    }
    /// All debits and all credits since the journal began, in msat: equal, always.
    pub fn trial_balance(&self) -> (u128, u128) {
        self.sums.values().fold((self.retired, self.retired), |(debits, credits), sums| {
            (debits.saturating_add(sums.debits), credits.saturating_add(sums.credits))
        })
    }

    // Commands.

    /// Applies a draft at the time of its entry, whole or not at all. A transfer that is booked already with the same
    /// content is passed over, so replaying a draft changes nothing.
    pub fn apply(&mut self, at: UnixMs, draft: &Draft) -> Result<(), BooksError> {
        if draft.transfers.is_empty() {
            return Ok(());
        }
        let Step { sums, holds, known, .. } = Step::of(self, at, draft)?;
        self.sums.extend(sums);
        // A routing fee names no session; it belongs to that of the payment beside it.
        let shared = known.iter().find_map(|(.., session)| *session);
        for (id, fingerprint, session) in known {
            self.known.insert(id, fingerprint);
            if let Some(session) = session.or(shared) {
                self.of_session.entry(session).or_default().push(id);
            }
        }
        for (id, hold) in holds {
            match hold {
                Some(hold) => self.holds.insert(id, Hold { session: hold.session.or(shared), ..hold }),
                None => self.holds.remove(&id),
            };
        }
        Ok(())
    }

    /// Whether [`Books::apply`] would accept the draft.
    pub fn check(&self, at: UnixMs, draft: &Draft) -> Result<(), BooksError> {
        Step::of(self, at, draft).map(drop)
    }

    /// Forgets a session that is over: nothing pending, nothing left in its accounts. False where that is not so.
    ///
    /// Keeps the books' size bound to open sessions. The caller must apply nothing of that session afterwards: its
    /// transfer ids are no longer known, so a replay would be booked again.
    pub fn retire(&mut self, session: SessionId) -> bool {
        let accounts = [Account::Prepaid(session), Account::PrepaidAsset(session), Account::RefundsDue(session)];
        if !accounts.iter().all(|account| self.sums(account).is_settled()) {
            return false;
        }
        for account in accounts {
            if let Some(sums) = self.sums.remove(&account) {
                self.retired = self.retired.saturating_add(sums.debits);
            }
        }
        for id in self.of_session.remove(&session).unwrap_or_default() {
            self.known.remove(&id);
        }
        true
    }
}

/// One draft being applied: what it changes, beside the books that it leaves alone until it is whole.
struct Step<'a> {
    books: &'a Books,
    at: UnixMs,
    sums: BTreeMap<Account, Sums>,
    /// `None`: ended by this draft.
    holds: BTreeMap<TransferId, Option<Hold>>,
    known: Vec<(TransferId, Fingerprint, Option<SessionId>)>,
    touched: BTreeSet<TransferId>,
}

impl<'a> Step<'a> {
    fn new(books: &'a Books, at: UnixMs) -> Step<'a> {
        Step { books, at, sums: BTreeMap::new(), holds: BTreeMap::new(), known: Vec::new(), touched: BTreeSet::new() }
    }

    /// What the whole draft changes, or why it may not.
    fn of(books: &'a Books, at: UnixMs, draft: &Draft) -> Result<Step<'a>, BooksError> {
        let given = draft.transfers.len();
        if given > MAX_TRANSFERS {
            return Err(BooksError::TooMany { given });
        }
        let mut step = Step::new(books, at);
        draft.transfers.iter().try_for_each(|transfer| step.take(transfer))?;
        step.check_overdrawn()?;
        Ok(step)
    }

    fn take(&mut self, transfer: &Transfer) -> Result<(), BooksError> {
        let id = transfer.id;
        let print = fingerprint(transfer);
        let booked = self.books.known.get(&id).copied();
        let booked = booked.or_else(|| {
            let here = || self.known.iter().find(|(known, ..)| *known == id).map(|(_, print, _)| *print);
            if self.touched.contains(&id) { here() } else { None }
        });
        match booked {
            Some(known) if known == print => return Ok(()),
            Some(_) => return Err(BooksError::Conflict { id }),
            None => {}
        }
        let session = match transfer.op {
            TransferOp::Post { debit, credit, amount } => {
                check_sides(id, debit, credit, amount)?;
                self.post(debit, credit, amount)?;
                debit.session().or(credit.session())
            }
            TransferOp::Pending { debit, credit, amount, expires_at } => {
                check_sides(id, debit, credit, amount)?;
                let session = debit.session().or(credit.session());
                let hold = Hold { debit, credit, amount, expires_at, since: self.at, session };
                self.reserve(&hold, true)?;
                self.holds.insert(id, Some(hold));
                session
            }
            TransferOp::PostPending { pending, amount } => {
                let hold = self.end(id, pending)?;
                if amount.is_zero() {
                    return Err(BooksError::Zero { id });
                }
                if amount > hold.amount {
                    return Err(BooksError::PostsMore { id, held: hold.amount, amount });
                }
                self.post(hold.debit, hold.credit, amount)?;
                hold.session
            }
            TransferOp::VoidPending { pending } => self.end(id, pending)?.session,
            TransferOp::ExpirePending { pending } => {
                let hold = self.end(id, pending)?;
                match hold.expires_at {
                    Some(expires_at) if expires_at <= self.at => hold.session,
                    Some(expires_at) => return Err(BooksError::NotDue { id, at: self.at, expires_at }),
                    None => return Err(BooksError::NoTimeout { id, pending }),
                }
            }
        };
        self.known.push((id, print, session));
        self.touched.insert(id);
        Ok(())
    }

    /// Takes a hold out of the books, once.
    fn end(&mut self, id: TransferId, pending: TransferId) -> Result<Hold, BooksError> {
        let here = self.holds.get(&pending).copied();
        let hold = match here {
            Some(staged) => staged,
            None => self.books.holds.get(&pending).copied(),
        };
        let Some(hold) = hold else {
            let ended = self.books.known.contains_key(&pending) || self.touched.contains(&pending);
            return Err(if ended { BooksError::Ended { id, pending } } else { BooksError::NotPending { id, pending } });
        };
        self.reserve(&hold, false)?;
        self.holds.insert(pending, None);
        Ok(hold)
    }

    fn sums_mut(&mut self, account: Account) -> &mut Sums {
        let books = self.books;
        self.sums.entry(account).or_insert_with(|| books.sums(&account))
    }

    fn post(&mut self, debit: Account, credit: Account, amount: Msat) -> Result<(), BooksError> {
        let sums = self.sums_mut(debit);
        sums.debits = sums.debits.checked_add(amount.0.into()).ok_or(BooksError::Overflow { account: debit })?;
        let sums = self.sums_mut(credit);
        sums.credits = sums.credits.checked_add(amount.0.into()).ok_or(BooksError::Overflow { account: credit })?;
        Ok(())
    }

    fn reserve(&mut self, hold: &Hold, add: bool) -> Result<(), BooksError> {
        let change = |sum: u128| {
            if add { sum.checked_add(hold.amount.0.into()) } else { sum.checked_sub(hold.amount.0.into()) }
        };
        let sums = self.sums_mut(hold.debit);
        sums.debits_pending = change(sums.debits_pending).ok_or(BooksError::Overflow { account: hold.debit })?;
        let sums = self.sums_mut(hold.credit);
        sums.credits_pending = change(sums.credits_pending).ok_or(BooksError::Overflow { account: hold.credit })?;
        Ok(())
    }

    /// Checked once the draft is whole, so the order of its transfers does not matter.
    fn check_overdrawn(&self) -> Result<(), BooksError> {
        for (account, sums) in &self.sums {
            let normal = account.normal();
            let left = sums.balance(normal).saturating_sub(sums.outgoing(normal));
            if left < 0 && account.never_negative() {
                let by = Msat(u64::try_from(left.unsigned_abs()).unwrap_or(u64::MAX));
                return Err(BooksError::Overdrawn { account: *account, by });
            }
        }
        Ok(())
    }
}

fn check_sides(id: TransferId, debit: Account, credit: Account, amount: Msat) -> Result<(), BooksError> {
    if amount.is_zero() {
        return Err(BooksError::Zero { id });
    }
    if debit == credit {
        return Err(BooksError::SameAccount { id, account: debit });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
