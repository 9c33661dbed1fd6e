//! `satgrid wallet sweep` and `satgrid wallet cold`: money to where its owner keeps it.

use super::sats;
use crate::cli::{ColdCommand, Format, SweepArgs};
use crate::commands::{admin_client::Admin, print};
use crate::config::Config;
use crate::failure::HintExt;
use crate::up;
use anyhow::{Context, ensure};
use satgrid_wallet_ldk::{Chain, Cold, ColdDraft};
use serde_json::{Value, json};
use std::io::BufRead;

pub(super) async fn sweep(format: Format, admin: &Admin, args: &SweepArgs) -> anyhow::Result<()> {
    if args.list {
        return list(format, &admin.get("wallet/sweeps").await?);
    }
    let mut ask = json!({
        "to": args.to, "keep_sat": args.keep_sat, "sat_per_vb": args.fee_rate, "label": args.label,
    });
    let plan = admin.post("wallet/sweeps/preview", &ask).await?;
    if format == Format::Json && !args.now {
        return print::json(&plan);
    }
    let draft = &plan["onchain"];
    let lightning = draft.is_null();
    let miners = format!(
        "{}{} sat for miners ({} vB at {} sat/vB, {} coins)",
        if draft["exact"] == true { "" } else { "about " },
        draft["fee_sat"],
        draft["vsize"],
        draft["sat_per_vb"],
        draft["inputs"],
    );
    eprintln!(
        "to      {}\namount  {} sat of {}\nfee     {}\nstays   {} sat{}",
        plan["to"].as_str().unwrap_or_default(),
        plan["amount_sat"],
        plan["holds_sat"],
        if lightning {
            format!("at most {} for the route", sats(&plan["max_fee"]))
        } else if plan["all"] == true {
            format!("{miners}, out of the amount: {} sat arrive", draft["amount_sat"])
        } else {
            format!("{miners}, out of what stays")
        },
        plan["keep_sat"],
        if lightning {
            String::new()
        } else {
            format!(", and {} sat as the anchor reserve", plan["anchor_reserve_sat"])
        },
    );
    if let Some(why) = plan["waits"].as_str() {
        eprintln!("waits   by schedule: {why}");
    }
    if !args.now {
        eprintln!("nothing was sent; --now does it");
        return Ok(());
    }
    confirm(args.yes, "sweep it? type yes: ")?;
    // At the rate that was shown.
    ask["sat_per_vb"] = plan["sat_per_vb"].clone();
    let swept = admin.post("wallet/sweeps", &ask).await?;
    match format {
        Format::Json => print::json(&swept),
        Format::Text => print::out(swept["by"].as_str().unwrap_or_default()),
    }
}

fn list(format: Format, answer: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(answer);
    }
    let rows = answer.as_array().into_iter().flatten().map(|swept| {
        let text = |key: &str| swept[key].as_str().unwrap_or("-").to_owned();
        let at = swept["at"].as_u64().unwrap_or_default() / 1_000;
        vec![at.to_string(), format!("{} sat", swept["amount_sat"]), text("to"), text("by"), text("label")]
    });
    print::out(&print::table(&["UNIX TIME", "AMOUNT", "TO", "TRANSACTION OR PAYMENT", "LABEL"], rows.collect()))
}

fn confirm(yes: bool, question: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    eprint!("{question}");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    ensure!(answer.trim() == "yes", "nothing was sent");
    Ok(())
}

pub(super) async fn cold(format: Format, config: &Config, command: &ColdCommand) -> anyhow::Result<()> {
    let (network, keys) = up::cold_keys(config, &crate::seed::read(config)?.0.seed());
    let mut cold = Cold::open(&config.node.dir, network, &keys)?;
    match command {
        ColdCommand::Address { label } => {
            let given = cold.next_address(label.as_deref())?;
            match format {
                Format::Json => print::json(&json!(given)),
                Format::Text => print::out(&given.address),
            }
        }
        ColdCommand::List => {
            let all = cold.addresses();
            if format == Format::Json {
                return print::json(&json!(all));
            }
            let rows = all.into_iter().map(|a| vec![a.index.to_string(), a.address, a.label.unwrap_or("-".into())]);
            print::out(&print::table(&["INDEX", "ADDRESS", "LABEL"], rows.collect()))
        }
        ColdCommand::Balance => {
            let balance = cold.sync(&up::chain_source(config)?).await?;
            match format {
                Format::Json => print::json(&json!(balance)),
                Format::Text => {
                    print::out(&format!("{} sat confirmed, {} sat pending", balance.confirmed_sat, balance.pending_sat))
                }
            }
        }
        ColdCommand::Send { address, amount, fee_rate, yes } => {
            let source = up::chain_source(config)?;
            cold.sync(&source).await?;
            let amount_sat = match amount.as_str() {
                "all" => None,
                sat => Some(sat.parse::<u64>().with_context(|| format!("{sat:?} is neither sats nor `all`"))?),
            };
            let rate = match fee_rate {
                Some(rate) => u64::from(*rate),
                None => Chain::of(&source).sat_per_vb().await.map_err(anyhow::Error::msg)?,
            };
            let draft = cold.draft(address, amount_sat, rate)?;
            send(format, &source, address, &draft, rate, *yes).await
        }
    }
}

async fn send(
    format: Format,
    source: &satgrid_wallet_ldk::ChainSource,
    address: &str,
    draft: &ColdDraft,
    rate: u64,
    yes: bool,
) -> anyhow::Result<()> {
    eprintln!(
        "to      {address}\namount  {} sat\nfee     {} sat ({rate} sat/vB, {} vB)",
        draft.amount_sat, draft.fee_sat, draft.vsize
    );
    if !draft.signed {
        eprintln!("the keys are elsewhere: sign this with the device that has them, and broadcast it");
        return match format {
            Format::Json => print::json(&json!(draft)),
            Format::Text => print::out(&draft.psbt),
        };
    }
    confirm(yes, "send it? type yes: ")?;
    let txid = draft.broadcast(source).await.hint("nothing was sent")?;
    match format {
        Format::Json => print::json(&json!({ "txid": txid, "draft": draft })),
        Format::Text => print::out(&txid),
    }
}
