//! Money in and out: invoices, addresses, payments, coins; and the backup.

use super::{POLL, qr, sats};
use crate::cli::{Format, PayArgs, ReceiveArgs, SendArgs};
use crate::commands::admin_client::Admin;
use crate::commands::print;
use crate::config::ChainSource;
use crate::failure::HintExt;
use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal};
use std::path::Path;
use std::time::Duration;

/// Blocks for which fee estimates are shown.
const ESTIMATES: [u32; 3] = [1, 6, 144];
const CHAIN_WITHIN: Duration = Duration::from_secs(5);

pub(super) async fn receive(format: Format, admin: &Admin, args: &ReceiveArgs) -> anyhow::Result<()> {
    let ask = json!({
        "amount_msat": msat(args.amount_sat)?, "description": args.description, "expiry_s": args.expiry_s,
        "max_lsp_fee_msat": args.max_lsp_fee_sat.map(msat).transpose()?,
    });
    let made = admin.post("wallet/receive", &ask).await?;
    let invoice = made["invoice"].as_str().unwrap_or_default();
    if made["opens_channel"] == true {
        eprintln!(
            "paying this opens a channel to you; {} of the {} sat are kept for it",
            sats(&made["lsp_fee_msat"]),
            args.amount_sat
        );
    } else if made["receivable_msat"].as_u64().unwrap_or_default() < msat(args.amount_sat)? {
        eprintln!(
            "warning: your channels have room for {} only: this will not arrive\n   hint: set wallet.lsp, or have a \
             channel opened to you",
            sats(&made["receivable_msat"])
        );
    }
    match format {
        Format::Json => print::json(&made)?,
        Format::Text => {
            // Upper case needs fewer modules.
            if let Some(code) = qr::lines(&invoice.to_uppercase()) {
                print::out(&code)?;
            }
            print::out(invoice)?;
        }
    }
    if args.wait {
        let hash = made["payment_hash"].as_str().unwrap_or_default();
        eprintln!("waiting for it to be paid ...");
        loop {
            let found = admin.get(&format!("wallet/payment?hash={hash}")).await?;
            if found["state"] == "settled" {
                eprintln!("received {}", sats(&found["amount_msat"]));
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

pub(super) async fn address(format: Format, admin: &Admin) -> anyhow::Result<()> {
    let answer = admin.post("wallet/address", &json!({})).await?;
    let address = answer["address"].as_str().unwrap_or_default();
    match format {
        Format::Json => print::json(&answer),
        Format::Text => {
            if std::io::stdout().is_terminal()
                && let Some(code) = qr::lines(&address.to_uppercase())
            {
                print::out(&code)?;
            }
            print::out(address)
        }
    }
}

pub(super) async fn pay(format: Format, admin: &Admin, args: &PayArgs) -> anyhow::Result<()> {
    let text = args.invoice.trim().trim_start_matches("lightning:");
    let facts = satgrid_wallet::invoice::read(text).context("this is no BOLT 11 invoice")?;
    let amount = facts.amount.context("the invoice names no amount; ask for one that does")?;
    let max_fee = match args.max_fee_sat {
        Some(sat) => msat(sat)?,
        None => (amount.0 / 100).max(1_000),
    };
    let sent = admin.post("wallet/pay", &json!({ "invoice": text, "max_fee_msat": max_fee })).await?;
    let hash = sent["payment_hash"].as_str().unwrap_or_default().to_owned();
    eprintln!("paying {amount}, at most {max_fee} msat for the route ...");
    loop {
        let found = admin.get(&format!("wallet/payment?hash={hash}")).await?;
        match found["state"].as_str().unwrap_or_default() {
            "settled" if format == Format::Json => return print::json(&found),
            "settled" => {
                eprintln!("paid {}, {} for the route", sats(&found["amount_msat"]), sats(&found["fee_msat"]));
                return print::out(found["preimage"].as_str().unwrap_or_default());
            }
            "failed" => bail!("not paid: {}", found["reason"].as_str().unwrap_or("no reason was given")),
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

pub(super) async fn send(format: Format, admin: &Admin, args: &SendArgs) -> anyhow::Result<()> {
    let amount_sat = match args.amount.as_str() {
        "all" => None,
        sats => Some(sats.parse::<u64>().with_context(|| format!("{sats:?} is neither sats nor `all`"))?),
    };
    let wallet = admin.get("wallet").await?;
    let (free, reserve) = (&wallet["balance"]["onchain_confirmed_sat"], &wallet["balance"]["anchor_reserve_sat"]);
    let rate = args.fee_rate.map_or_else(|| "the estimated fee rate".to_owned(), |rate| format!("{rate} sat/vB"));
    eprintln!(
        "to      {}\namount  {}\nfee     {rate}, on top (out of it where all is sent)\nfree    {free} sat; {reserve} sat stay as the anchor reserve",
        args.address,
        amount_sat.map_or_else(|| format!("all: {free} sat less the fee"), |sat| format!("{sat} sat")),
    );
    if !args.yes {
        eprint!("send it? type yes: ");
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        ensure!(answer.trim() == "yes", "nothing was sent");
    }
    let body = json!({ "address": args.address, "amount_sat": amount_sat, "sat_per_vb": args.fee_rate });
    let sent = admin.post("wallet/send", &body).await?;
    match format {
        Format::Json => print::json(&sent),
        Format::Text => print::out(sent["txid"].as_str().unwrap_or_default()),
    }
}

pub(super) async fn backup(admin: &Admin, file: Option<&Path>) -> anyhow::Result<()> {
    let backup = admin.get("wallet/backup").await?;
    let Some(file) = file else { return print::json(&backup) };
    crate::drive::channels::write(file, &serde_json::to_string_pretty(&backup)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let channels = backup["backup"]["channels"].as_array().map_or(0, Vec::len);
    eprintln!("{channels} channels; keep it beside the seed's words, which are not in it");
    Ok(())
}

/// What the chain source estimates, in sat per virtual byte; nothing where it cannot be asked from here.
pub(super) async fn chain_fees(chain: Option<&ChainSource>) -> Option<Value> {
    let Some(ChainSource::Esplora { url }) = chain else { return None };
    let client = reqwest::Client::builder().timeout(CHAIN_WITHIN).build().ok()?;
    let all: Value = client.get(format!("{url}/fee-estimates")).send().await.ok()?.json().await.ok()?;
    let wanted = ESTIMATES.iter().filter_map(|blocks| Some((blocks.to_string(), all.get(blocks.to_string())?.clone())));
    Some(Value::Object(wanted.collect()))
}

fn msat(sat: u64) -> anyhow::Result<u64> {
    sat.checked_mul(1_000).filter(|msat| *msat > 0).context("that amount is not possible").hint("write whole sats")
}
