//! The operator's own money: payments of no session and transactions of coins, each booked once.
//!
//! | what | debit / credit |
//! |---|---|
//! | a payment out | external / lightning the amount; routing-fees / lightning the fee |
//! | a payment in | lightning / external |
//! | coins that move | miners-fees / external what the miners got: coins are not in these books, their cost is |
//!
//! Ids come from the payment hash or the txid, so what is booked twice is booked once.

use crate::{
    entry::{Draft, Evidence},
    transfer::{Account, Transfer},
};
use satgrid_types::{Digest, Msat, PaymentHash, Preimage, TransferId};
use sha2::{Digest as _, Sha256};

fn id(context: &[u8], of: &[u8; 32]) -> TransferId {
    let digest = Sha256::new().chain_update(context).chain_update(of).finalize();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    TransferId(id)
}

fn post(id: TransferId, debit: Account, credit: Account, amount: Msat) -> Option<Transfer> {
    (!amount.is_zero()).then(|| Transfer::post(id, debit, credit, amount))
}

/// A settled Lightning payment that belongs to no session.
pub fn payment(hash: PaymentHash, inbound: bool, amount: Msat, fee: Msat, preimage: Option<Preimage>) -> Draft {
    let fee = if inbound { Msat::ZERO } else { fee };
    let (debit, credit) =
        if inbound { (Account::Lightning, Account::External) } else { (Account::External, Account::Lightning) };
    Draft::of(Evidence::WalletPayment { payment_hash: hash, inbound, amount, fee, preimage })
        .with(post(id(b"satgrid-own-v1\0", &hash.0), debit, credit, amount))
        .with(post(id(b"satgrid-own-fee-v1\0", &hash.0), Account::RoutingFees, Account::Lightning, fee))
}

/// A confirmed transaction of the wallet's coins. `txid` as it is hashed.
pub fn on_chain(txid: Digest, inbound: bool, amount: Msat, fee: Msat) -> Draft {
    let fee = if inbound { Msat::ZERO } else { fee };
    Draft::of(Evidence::OnChain { txid, inbound, amount, fee }).with(post(
        id(b"satgrid-chain-fee-v1\0", &txid.0),
        Account::MinersFees,
        Account::External,
        fee,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::books::Books;
    use satgrid_types::UnixMs;

    #[test]
    fn own_money_is_booked_once_and_balances() {
        let mut books = Books::new();
        let (a, b, c) = (PaymentHash([1; 32]), PaymentHash([2; 32]), Digest([3; 32]));
        let drafts = [
            payment(a, true, Msat(50_000), Msat(9), None),
            payment(b, false, Msat(20_000), Msat(30), None),
            on_chain(c, false, Msat(1_000_000), Msat(250_000)),
            on_chain(Digest([4; 32]), true, Msat(7), Msat(7)),
        ];
        for draft in drafts.iter().chain(&drafts) {
            books.apply(UnixMs(1), draft).unwrap();
        }
        assert_eq!(books.balance(&Account::Lightning), 50_000 - 20_000 - 30);
        assert_eq!(books.balance(&Account::RoutingFees), 30);
        assert_eq!(books.balance(&Account::MinersFees), 250_000);
        assert_eq!(books.balance(&Account::External), 50_000 - 20_000 + 250_000);
        assert!(drafts[3].transfers.is_empty());
    }
}
