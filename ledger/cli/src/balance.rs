//! `balance`: the books as they stand.

use crate::{
    CLEAN,
    args::{BalanceArgs, Format},
    output::{print, print_json, table},
    source::Source,
};
use anyhow::Context;
use satgrid_ledger::{Books, transfer::Account};
use serde::Serialize;
use std::collections::BTreeMap;

/// A line of the balance, in msat.
#[derive(Debug, Default, Serialize)]
struct Line {
    balance_msat: i128,
    reserved_msat: u64,
    available_msat: i128,
}

/// Folds a source's transfers into books.
pub(crate) async fn books(source: &mut Source) -> anyhow::Result<Books> {
    let mut books = Books::new();
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            return Ok(books);
        }
        for entry in entries {
            books.apply(entry.at, &entry.draft()).with_context(|| format!("entry {}", entry.seq))?;
        }
    }
}

pub(crate) async fn run(args: BalanceArgs) -> anyhow::Result<u8> {
    let books = books(&mut Source::open(&args.db).await?).await?;
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    for account in books.accounts().map(|(account, _)| *account) {
        let name = if args.sessions { account.to_string() } else { account.name().to_owned() };
        let line = lines.entry(name).or_default();
        let (balance, reserved) = (books.balance(&account), books.reserved(&account).0);
        line.balance_msat += balance;
        line.reserved_msat += reserved;
        // The books' own figure for accounts that have a floor; the net for those that have none.
        line.available_msat += match account {
            Account::Prepaid(_)
            | Account::PrepaidAsset(_)
            | Account::RefundsDue(_)
            | Account::WorkerPayable(_)
            | Account::Clients => i128::from(books.available(&account).0),
            Account::Lightning
            | Account::Income
            | Account::Expense
            | Account::RoutingFees
            | Account::MinersFees
            | Account::Dust
            | Account::External => balance - i128::from(reserved),
        };
    }
    match args.format {
        Format::Json => print_json(&lines)?,
        Format::Table => {
            let mut out = table(&["account", "balance, msat", "reserved, msat", "available, msat"], 1);
            for (name, line) in lines {
                let numbers = [line.balance_msat, line.reserved_msat.into(), line.available_msat];
                out.add_row(core::iter::once(name).chain(numbers.iter().map(ToString::to_string)));
            }
            print(&out.to_string())?;
        }
    }
    Ok(CLEAN)
}
