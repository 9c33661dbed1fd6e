//! `satgrid wallet ...`: asks the running node over its admin port.

use super::{admin_client::Admin, print};
use crate::cli::{Format, Globals, WalletCommand};
use serde_json::{Value, json};

pub(super) fn run(globals: &Globals, command: &WalletCommand) -> anyhow::Result<()> {
    let config = globals.load()?.config;
    let admin = Admin::of(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            WalletCommand::Balance => balance(globals.format, &admin.get("wallet").await?),
            WalletCommand::Address => {
                let answer = admin.post("wallet/address", &json!({})).await?;
                match globals.format {
                    Format::Json => print::json(&answer),
                    Format::Text => print::out(answer["address"].as_str().unwrap_or_default()),
                }
            }
            WalletCommand::History => history(globals.format, &admin.get("wallet/payments").await?),
            WalletCommand::Open { node, addr, capacity_sat, push_msat } => {
                let open = json!({ "node": node, "addr": addr, "capacity_sat": capacity_sat, "push_msat": push_msat });
                admin.post("wallet/open", &open).await?;
                eprintln!("opening; `satgrid wallet balance` shows when the channel is usable");
                Ok(())
            }
            WalletCommand::Refund { session } => {
                admin.post(&format!("sessions/{session}/close"), &json!({})).await?;
                eprintln!("asked; the refund arrives as a payment, or the ledger shows a credit note");
                Ok(())
            }
        }
    })
}

fn balance(format: Format, answer: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(answer);
    }
    let figures = [
        ("in channels", "lightning_total_msat", "msat"),
        ("payable now", "payable_msat", "msat"),
        ("receivable now", "receivable_msat", "msat"),
        ("on chain, confirmed", "onchain_confirmed_sat", "sat"),
        ("on chain, all", "onchain_total_sat", "sat"),
    ];
    let rows = figures
        .iter()
        .map(|(name, key, unit)| vec![(*name).to_owned(), answer["balance"][key].to_string(), (*unit).to_owned()]);
    print::out(&print::table(&["BALANCE", "AMOUNT", "UNIT"], rows.collect()))?;
    let channels = answer["channels"].as_array().cloned().unwrap_or_default();
    let rows = channels.iter().map(|c| {
        let text = |key: &str| c[key].as_str().map_or_else(|| c[key].to_string(), |s| s.chars().take(16).collect());
        ["counterparty", "capacity_sat", "ours_msat", "payable_msat", "receivable_msat", "usable"].map(text).to_vec()
    });
    print::out(&print::table(&["PEER", "CAPACITY SAT", "OURS MSAT", "PAYABLE", "RECEIVABLE", "USABLE"], rows.collect()))
}

fn history(format: Format, answer: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(answer);
    }
    let payments = answer.as_array().cloned().unwrap_or_default();
    let rows = payments.iter().map(|p| {
        let text = |key: &str| p[key].as_str().map_or_else(|| p[key].to_string(), str::to_owned);
        ["payment_hash", "direction", "amount_msat", "fee_msat", "state"].map(text).to_vec()
    });
    print::out(&print::table(&["PAYMENT HASH", "DIRECTION", "MSAT", "FEE", "STATE"], rows.collect()))
}
