//! `export --csv`, `--beancount`, `--koinly`: the books for other programs. Amounts are exact decimals made from integers.

use crate::{
    CLEAN,
    args::{BooksForm, ExportArgs},
    movements::{Category, Movement, each},
    rates::Rates,
    source::Source,
    time::{day, seconds, utc},
};
use anyhow::Context;
use satgrid_ledger::transfer::Account;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

pub(crate) async fn run(args: &ExportArgs, form: BooksForm) -> anyhow::Result<u8> {
    let rates = args.rates.as_deref().map(Rates::read).transpose()?.unwrap_or_default();
    let mut source = Source::open(&args.db).await?;
    if args.out == Path::new("-") {
        write(&mut source, args, form, &rates, BufWriter::new(io::stdout().lock())).await?;
        return Ok(CLEAN);
    }
    let part = args.out.with_extension("part");
    let out = BufWriter::new(File::create(&part).with_context(|| part.display().to_string())?);
    let written = write(&mut source, args, form, &rates, out).await;
    match written {
        Ok(rows) => {
            fs::rename(&part, &args.out).with_context(|| args.out.display().to_string())?;
            eprintln!("{rows} movements: {}", args.out.display());
            Ok(CLEAN)
        }
        Err(error) => {
            let _ = fs::remove_file(&part);
            Err(error)
        }
    }
}

async fn write(
    source: &mut Source,
    args: &ExportArgs,
    form: BooksForm,
    rates: &Rates,
    mut out: impl Write,
) -> anyhow::Result<u64> {
    let mut rows = 0;
    let wanted = |movement: &Movement| {
        args.session.is_none_or(|session| movement.session == Some(session))
            && args.peer.is_none_or(|peer| movement.peer == Some(peer))
    };
    match form {
        BooksForm::Csv => {
            writeln!(out, "{CSV_HEAD}")?;
            each(source, (args.from, args.to), |movement| {
                if wanted(&movement) {
                    rows += 1;
                    writeln!(out, "{}", csv(&movement, rates))?;
                }
                Ok(())
            })
            .await?;
        }
        BooksForm::Koinly => {
            writeln!(out, "{KOINLY_HEAD}")?;
            each(source, (args.from, args.to), |movement| {
                if let Some(row) = koinly(&movement, rates).filter(|_| wanted(&movement)) {
                    rows += 1;
                    writeln!(out, "{row}")?;
                }
                Ok(())
            })
            .await?;
        }
        BooksForm::Beancount => {
            let mut opened = BTreeMap::new();
            let mut body = Vec::new();
            // Movements of one entry are one transaction.
            let mut together: Vec<Movement> = Vec::new();
            each(source, (args.from, args.to), |movement| {
                if !wanted(&movement) {
                    return Ok(());
                }
                rows += 1;
                for account in [movement.debit, movement.credit] {
                    opened.entry(beancount_account(account)).or_insert_with(|| day(movement.at));
                }
                if together.first().is_some_and(|first| first.entry != movement.entry) {
                    transaction(&mut body, &together)?;
                    together.clear();
                }
                together.push(movement);
                Ok(())
            })
            .await?;
            transaction(&mut body, &together)?;
            writeln!(out, "; books of a satgrid ledger, in millisatoshi; made by `satgrid-ledger export --beancount`")?;
            writeln!(out, "option \"title\" \"satgrid\"\noption \"operating_currency\" \"MSAT\"\n")?;
            for (account, since) in opened {
                writeln!(out, "{since} open {account} MSAT")?;
            }
            out.write_all(&body)?;
        }
    }
    out.flush()?;
    Ok(rows)
}

const CSV_HEAD: &str = "time_utc,entry,category,counterparty,amount_msat,wallet_msat,debit,credit,payment_hash,receipt_id,session,model,rate_currency,rate_per_btc,rate_time_utc,value";

fn csv(movement: &Movement, rates: &Rates) -> String {
    let or_empty = |text: Option<String>| text.unwrap_or_default();
    let rate = rates.at(movement.at);
    let value = rate.map(|rate| rate.value(movement.amount.0));
    let fields = [
        utc(movement.at),
        movement.entry.to_string(),
        movement.category.name().into(),
        or_empty(movement.peer.map(|peer| peer.to_string())),
        movement.amount.0.to_string(),
        wallet(movement).to_string(),
        movement.debit.name().into(),
        movement.credit.name().into(),
        or_empty(movement.payment_hash.map(|hash| hash.to_string())),
        or_empty(movement.receipt.map(|receipt| receipt.to_string())),
        or_empty(movement.session.map(|session| session.to_string())),
        movement.model.clone(),
        or_empty(rate.map(|_| rates.currency.clone())),
        or_empty(rate.map(|rate| rate.text.clone())),
        or_empty(rate.map(|rate| utc(rate.at))),
        or_empty(value),
    ];
    fields.map(|field| quoted(&field)).join(",")
}

/// What the movement did to the Lightning balance, in msat.
fn wallet(movement: &Movement) -> i128 {
    let amount = i128::from(movement.amount.0);
    match (movement.debit, movement.credit) {
        (Account::Lightning, _) => amount,
        (_, Account::Lightning) => -amount,
        _ => 0,
    }
}

/// A CSV field. A model's name is a provider's text: what a spreadsheet would take for a formula is defused.
fn quoted(field: &str) -> String {
    let formula =
        field.starts_with(['=', '+', '@', '\t', '\r']) || (field.starts_with('-') && field.parse::<i128>().is_err());
    let field = if formula { format!("'{field}") } else { field.to_owned() };
    if field.contains([',', '"', '\n', '\r']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field }
}

const KOINLY_HEAD: &str = "Date,Sent Amount,Sent Currency,Received Amount,Received Currency,Fee Amount,Fee Currency,Net Worth Amount,Net Worth Currency,Label,Description,TxHash";

/// A row of Koinly's universal form: only what went through the wallet is one.
fn koinly(movement: &Movement, rates: &Rates) -> Option<String> {
    let moved = wallet(movement);
    if moved == 0 {
        return None;
    }
    let amount = btc(movement.amount.0);
    let (sent, received) = if moved < 0 { (amount, String::new()) } else { (String::new(), amount) };
    let currency = |amount: &str| if amount.is_empty() { "" } else { "BTC" }.to_owned();
    let label = match movement.category {
        Category::SlicePaid | Category::RoutingFee | Category::MinersFee => "cost",
        Category::SliceReceived => "income",
        Category::Inference
        | Category::RemainderDue
        | Category::RefundPaid
        | Category::RefundReceived
        | Category::RefundLoss
        | Category::CreditSpent
        | Category::Dust
        | Category::Wallet
        | Category::ClientPaidIn
        | Category::ClientPaidBack
        | Category::ClientCharged
        | Category::Correction => "",
    };
    let worth = rates.at(movement.at).map(|rate| rate.value(movement.amount.0));
    let description = match movement.peer {
        Some(peer) => format!("{} {}", movement.category.name(), peer.short()),
        None => movement.category.name().to_owned(),
    };
    let fields = [
        format!("{} UTC", seconds(movement.at)),
        sent.clone(),
        currency(&sent),
        received.clone(),
        currency(&received),
        String::new(),
        String::new(),
        worth.clone().unwrap_or_default(),
        worth.map(|_| rates.currency.clone()).unwrap_or_default(),
        label.to_owned(),
        description,
        movement.payment_hash.map(|hash| hash.to_string()).unwrap_or_default(),
    ];
    Some(fields.map(|field| quoted(&field)).join(","))
}

/// Msat as bitcoin, exactly: eleven decimals.
fn btc(msat: u64) -> String {
    const PER_BTC: u64 = 100_000_000_000;
    format!("{}.{:011}", msat / PER_BTC, msat % PER_BTC)
}

fn beancount_account(account: Account) -> &'static str {
    match account {
        Account::Lightning => "Assets:Lightning",
        Account::PrepaidAsset(_) => "Assets:Prepaid",
        Account::Prepaid(_) => "Liabilities:Prepaid",
        Account::RefundsDue(_) => "Liabilities:RefundsDue",
        Account::WorkerPayable(_) => "Liabilities:Workers",
        Account::Income => "Income:Inference",
        Account::Dust => "Income:Dust",
        Account::Expense => "Expenses:Inference",
        Account::RoutingFees => "Expenses:RoutingFees",
        Account::MinersFees => "Expenses:MinersFees",
        Account::External => "Equity:External",
        Account::Clients => "Liabilities:Clients",
    }
}

fn transaction(out: &mut impl Write, movements: &[Movement]) -> anyhow::Result<()> {
    let Some(first) = movements.first() else { return Ok(()) };
    let peer = first.peer.map(|peer| peer.short()).unwrap_or_default();
    writeln!(out, "\n{} * \"{peer}\" \"{}\"", day(first.at), first.category.name())?;
    writeln!(out, "  entry: {}\n  time: \"{}\"", first.entry, utc(first.at))?;
    for (key, value) in [
        ("session", first.session.map(|id| id.to_string())),
        ("payment-hash", first.payment_hash.map(|id| id.to_string())),
        ("receipt", first.receipt.map(|id| id.to_string())),
    ] {
        if let Some(value) = value {
            writeln!(out, "  {key}: \"{value}\"")?;
        }
    }
    let mut postings: BTreeMap<&str, i128> = BTreeMap::new();
    for movement in movements {
        let amount = i128::from(movement.amount.0);
        *postings.entry(beancount_account(movement.debit)).or_default() += amount;
        *postings.entry(beancount_account(movement.credit)).or_default() -= amount;
    }
    for (account, amount) in postings.into_iter().filter(|(_, amount)| *amount != 0) {
        writeln!(out, "  {account}  {amount} MSAT")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_ledger::transfer::Normal;

    #[test]
    fn amounts_are_exact() {
        assert_eq!(btc(1), "0.00000000001");
        assert_eq!(btc(123_456_789_012_345), "1234.56789012345");
    }

    #[test]
    fn fields_are_quoted_and_never_formulas() {
        assert_eq!(quoted("plain"), "plain");
        assert_eq!(quoted("a,b"), "\"a,b\"");
        assert_eq!(quoted("say \"hi\""), "\"say \"\"hi\"\"\"");
        assert_eq!(quoted("=HYPERLINK(1)"), "'=HYPERLINK(1)");
        assert_eq!(quoted("-250000"), "-250000");
        assert_eq!(quoted("-1+cmd"), "'-1+cmd");
    }

    #[test]
    fn every_account_stands_on_its_side() {
        let session = satgrid_types::SessionId([0; 32]);
        for account in [
            Account::Lightning,
            Account::PrepaidAsset(session),
            Account::Expense,
            Account::RoutingFees,
            Account::MinersFees,
            Account::Income,
            Account::Prepaid(session),
            Account::External,
            Account::Clients,
        ] {
            let debit =
                beancount_account(account).starts_with("Assets") || beancount_account(account).starts_with("Expenses");
            assert_eq!(debit, account.normal() == Normal::Debit, "{account}");
        }
    }
}
