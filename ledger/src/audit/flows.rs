//! Transfers against evidence: what an entry's transfers do, and whether the evidence beside them says so.
//!
//! Nets are debit-positive: a debit adds to an account, a credit takes away. They are of posted amounts only.

use super::{Party, Rule, session::Notes};
use crate::{
    books::{Books, Hold},
    transfer::{Account, Transfer, TransferOp},
};
use satgrid_types::{Msat, SessionId, TransferId, UnixMs};
use std::collections::{BTreeMap, BTreeSet};

/// How a hold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Posted,
    Voided,
    Expired,
}

/// What an entry's transfers do that was not done before.
#[derive(Debug, Default)]
pub(super) struct Flows {
    pub(super) net: BTreeMap<Account, i128>,
    pub(super) opened: Vec<(TransferId, Hold)>,
    pub(super) ended: Vec<(TransferId, Hold, Ending)>,
}

impl Flows {
    /// Reads transfers against the books as they stand before them.
    pub(super) fn read(books: &Books, at: UnixMs, transfers: &[Transfer]) -> Flows {
        let (mut flows, mut here) = (Flows::default(), BTreeSet::new());
        for transfer in transfers {
            // The same id again moves nothing, also within one entry: the books take it once.
            if books.knows(&transfer.id) || !here.insert(transfer.id) {
                continue;
            }
            match transfer.op {
                TransferOp::Post { debit, credit, amount } => flows.post(debit, credit, amount),
                TransferOp::Pending { debit, credit, amount, expires_at } => {
                    let session = debit.session().or(credit.session());
                    flows.opened.push((transfer.id, Hold { debit, credit, amount, expires_at, since: at, session }));
                }
                TransferOp::PostPending { pending, amount } => {
                    if let Some(hold) = flows.end(books, pending, Ending::Posted) {
                        flows.post(hold.debit, hold.credit, amount);
                    }
                }
                TransferOp::VoidPending { pending } => {
                    flows.end(books, pending, Ending::Voided);
                }
                TransferOp::ExpirePending { pending } => {
                    flows.end(books, pending, Ending::Expired);
                }
            }
        }
        flows.net.retain(|_, msat| *msat != 0);
        flows
    }

    fn post(&mut self, debit: Account, credit: Account, amount: Msat) {
        let amount = i128::from(amount.0);
        let net = self.net.entry(debit).or_default();
        *net = net.saturating_add(amount);
        let net = self.net.entry(credit).or_default();
        *net = net.saturating_sub(amount);
    }

    fn end(&mut self, books: &Books, pending: TransferId, how: Ending) -> Option<Hold> {
        let here = || self.opened.iter().find(|(id, _)| *id == pending).map(|(_, hold)| *hold);
        let hold = books.pending(&pending).copied().or_else(here)?;
        self.ended.push((pending, hold, how));
        Some(hold)
    }

    fn of(&self, account: Account) -> i128 {
        self.net.get(&account).copied().unwrap_or(0)
    }

    /// Whose remainder became dust.
    pub(super) fn to_dust(&self) -> Option<SessionId> {
        self.net.keys().find_map(Account::session).filter(|session| is_dust(self, *session))
    }

    /// Only these accounts moved.
    fn only(&self, accounts: &[Account]) -> bool {
        self.net.keys().all(|account| accounts.contains(account))
    }
}

/// What an entry's evidence justifies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backing {
    /// Exactly these nets, and these reservations.
    Exactly(Vec<(Account, i128)>, Reserves),
    /// Provider: the whole remainder may become a refund due.
    Remainder(SessionId, Reserves),
    /// Provider: a refund went out; its fee comes from the refund or from our own fees.
    RefundOut { session: SessionId, amount: Msat, fee: Msat },
    /// Consumer: a refund came in; what it cost on the way, at most `cap`, is lost.
    RefundIn { session: SessionId, amount: Msat, cap: Msat },
    /// Coins are the owner's; what miners took of them is a cost, in an account of its own. Older journals have it among the
    /// routing fees.
    Miners(Msat),
    /// No evidence: only what needs none.
    Alone,
    /// The evidence is itself a finding; its transfers are not judged a second time.
    Unjudged,
}

/// What an entry may reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reserves {
    Nothing,
    /// Work to come in this session.
    Work(SessionId),
    /// A slice, and at most `max_fee` for its route.
    Slice {
        session: SessionId,
        amount: Msat,
        max_fee: Msat,
    },
    Refund {
        session: SessionId,
        amount: Msat,
        max_fee: Msat,
    },
}

/// Is it a slice or a refund on its way through Lightning? Such holds end by the wallet's word alone.
fn is_payment(hold: &Hold) -> bool {
    hold.credit == Account::Lightning && !is_clients_refund(hold)
}

/// Is it a client's money on its way back? Clients sign nothing, so nothing but the books says what became of it.
fn is_clients_refund(hold: &Hold) -> bool {
    (hold.debit, hold.credit) == (Account::Clients, Account::Lightning)
}

/// Is it a reservation of work, on either side of `session`?
fn is_work(hold: &Hold, session: Option<SessionId>) -> bool {
    let pair = match (hold.debit, hold.credit) {
        (Account::Prepaid(s), Account::Income) | (Account::Expense, Account::PrepaidAsset(s)) => s,
        _ => return false,
    };
    session.is_none_or(|session| session == pair)
}

/// Judges an entry's transfers; what does not follow from the evidence is a finding against the exporter.
pub(super) fn judge(backing: &Backing, flows: &Flows, notes: &mut Notes) {
    let (nets, reserves) = match backing {
        Backing::Unjudged => return,
        Backing::Exactly(expected, reserves) => {
            let mut wanted: BTreeMap<Account, i128> = BTreeMap::new();
            for (account, msat) in expected {
                let net = wanted.entry(*account).or_default();
                *net = net.saturating_add(*msat);
            }
            wanted.retain(|_, msat| *msat != 0);
            (wanted == flows.net, *reserves)
        }
        Backing::Remainder(session, reserves) => (flows.net.is_empty() || is_remainder(flows, *session), *reserves),
        Backing::RefundOut { session, amount, fee } => {
            (is_refund_out(flows, *session, *amount, *fee), Reserves::Nothing)
        }
        Backing::RefundIn { session, amount, cap } => (is_refund_in(flows, *session, *amount, *cap), Reserves::Nothing),
        Backing::Miners(fee) => (is_miners_fee(flows, *fee), Reserves::Nothing),
        Backing::Alone => {
            let session = flows.net.keys().find_map(Account::session);
            let moved = flows.net.is_empty()
                || flows.only(&[Account::Lightning, Account::External])
                || is_clients(flows)
                || session.is_some_and(|s| is_remainder(flows, s) || is_dust(flows, s));
            let works = flows.opened.iter().all(|(_, hold)| is_work(hold, None) || is_clients_refund(hold));
            if !works {
                notes.add(Rule::TransferUnbacked, Party::Exporter, "a payment was reserved without evidence");
            }
            check_endings(flows, false, notes);
            if !moved {
                notes.add(Rule::TransferUnbacked, Party::Exporter, format!("without evidence: {}", show(flows)));
            }
            return;
        }
    };
    if !nets {
        notes.add(Rule::TransferUnbacked, Party::Exporter, format!("the evidence does not justify: {}", show(flows)));
    }
    if !reserves_fit(reserves, flows) {
        notes.add(Rule::TransferUnbacked, Party::Exporter, "a reservation that the evidence does not justify");
    }
}

/// Endings that need evidence: payments by the wallet's word, charges by a receipt or an abandonment.
pub(super) fn check_endings(flows: &Flows, by_wallet: bool, notes: &mut Notes) {
    if !by_wallet && flows.ended.iter().any(|(_, hold, _)| is_payment(hold)) {
        let detail = "a payment's reservation was ended without the wallet's word";
        notes.add(Rule::TransferUnbacked, Party::Exporter, detail);
    }
}

fn is_remainder(flows: &Flows, session: SessionId) -> bool {
    let accounts = [Account::Prepaid(session), Account::RefundsDue(session)];
    flows.only(&accounts) && flows.of(accounts[0]) > 0 && flows.of(accounts[1]) < 0
}

/// Clients pay in, are paid back, or are charged: for what was bought for them, or by the node's owner, who advanced it.
fn is_clients(flows: &Flows) -> bool {
    let charged = flows.of(Account::Clients) > 0;
    flows.only(&[Account::Lightning, Account::Clients])
        || charged
            && (flows.only(&[Account::Income, Account::Clients]) || flows.only(&[Account::External, Account::Clients]))
}

fn is_dust(flows: &Flows, session: SessionId) -> bool {
    let accounts = [Account::RefundsDue(session), Account::Dust];
    flows.only(&accounts) && flows.of(accounts[0]) > 0
}

fn is_refund_out(flows: &Flows, session: SessionId, amount: Msat, fee: Msat) -> bool {
    let due = Account::RefundsDue(session);
    let (amount, fee) = (i128::from(amount.0), i128::from(fee.0));
    let total = amount.saturating_add(fee);
    let from_refund = flows.of(due);
    flows.only(&[Account::Lightning, due, Account::RoutingFees])
        && flows.of(Account::Lightning) == total.saturating_neg()
        && from_refund >= amount
        && flows.of(Account::RoutingFees) == total.saturating_sub(from_refund)
        && flows.of(Account::RoutingFees) >= 0
}

fn is_refund_in(flows: &Flows, session: SessionId, amount: Msat, cap: Msat) -> bool {
    let asset = Account::PrepaidAsset(session);
    let (fees, expense) = (flows.of(Account::RoutingFees), flows.of(Account::Expense));
    let lost = fees.saturating_add(expense);
    fees >= 0
        && expense >= 0
        && flows.only(&[Account::Lightning, asset, Account::RoutingFees, Account::Expense])
        && flows.of(Account::Lightning) == i128::from(amount.0)
        && lost <= i128::from(cap.0)
}

fn is_miners_fee(flows: &Flows, fee: Msat) -> bool {
    let fee = i128::from(fee.0);
    let kept_in = |account| flows.of(account) == fee && flows.only(&[account, Account::External]);
    flows.of(Account::External) == fee.saturating_neg()
        && (kept_in(Account::MinersFees) || kept_in(Account::RoutingFees))
}

fn reserves_fit(reserves: Reserves, flows: &Flows) -> bool {
    let mut opened = flows.opened.iter().map(|(_, hold)| hold);
    match reserves {
        Reserves::Nothing => flows.opened.is_empty(),
        Reserves::Work(session) => opened.all(|hold| is_work(hold, Some(session))),
        Reserves::Slice { session, amount, max_fee } => {
            let slice = (Account::PrepaidAsset(session), Account::Lightning);
            payment_fits(flows, slice, amount, amount, max_fee)
        }
        Reserves::Refund { session, amount, max_fee } => {
            let refund = (Account::RefundsDue(session), Account::Lightning);
            payment_fits(flows, refund, amount, amount.saturating_add(max_fee), max_fee)
        }
    }
}

/// One hold over the amount (within `[least, most]`), and at most one for the fee.
fn payment_fits(flows: &Flows, pair: (Account, Account), least: Msat, most: Msat, max_fee: Msat) -> bool {
    let (mut payments, mut fees) = (0u32, 0u32);
    for (_, hold) in &flows.opened {
        if (hold.debit, hold.credit) == pair && least <= hold.amount && hold.amount <= most {
            payments = payments.saturating_add(1);
        } else if (hold.debit, hold.credit) == (Account::RoutingFees, Account::Lightning) && hold.amount <= max_fee {
            fees = fees.saturating_add(1);
        } else {
            return false;
        }
    }
    payments == 1 && fees <= 1
}

fn show(flows: &Flows) -> String {
    let mut parts: Vec<String> =
        flows.net.iter().map(|(account, msat)| format!("{} {msat:+}", account.name())).collect();
    parts.truncate(8);
    if parts.is_empty() { "nothing".into() } else { parts.join(", ") }
}
