//! The wallet as tables.

use super::sats;
use crate::cli::Format;
use crate::commands::print;
use serde_json::{Value, json};

fn list<'a>(answer: &'a Value, key: &str) -> &'a [Value] {
    answer[key].as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("-")
}

fn sat(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), |sat| format!("{sat} sat"))
}

pub(super) fn balance(format: Format, answer: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(answer);
    }
    let b = &answer["balance"];
    let mut rows = vec![
        ("payable now", sats(&b["payable_msat"]), "outbound above the channels' reserves"),
        ("receivable now", sats(&b["receivable_msat"]), "room on the peers' side"),
        ("in channels", sats(&b["lightning_total_msat"]), "ours, reserves included"),
    ];
    if text(answer, "kind") == "embedded" {
        rows.extend([
            ("on chain, free", sat(&b["onchain_confirmed_sat"]), "confirmed, above the anchor reserve"),
            ("on chain, all", sat(&b["onchain_total_sat"]), "unconfirmed and reserved included"),
            ("anchor reserve", sat(&b["anchor_reserve_sat"]), "pays for a force-close; nothing spends it"),
            ("coming back", sat(&b["closing_sat"]), "from channels that closed, after their delay"),
        ]);
    }
    let rows = rows.into_iter().map(|(name, amount, what)| vec![name.to_owned(), amount, what.to_owned()]).collect();
    print::out(&print::table(&["BALANCE", "AMOUNT", ""], rows))?;
    for shortage in list(answer, "shortages") {
        eprintln!("note: {}\n   hint: {}", text(shortage, "text"), text(shortage, "remedy"));
    }
    Ok(())
}

pub(super) fn channels(format: Format, answer: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(&answer["channels"]);
    }
    let rows = list(answer, "channels").iter().map(|c| {
        let short = |key: &str| text(c, key).chars().take(16).collect::<String>();
        let flag = |key: &str| c[key].as_bool().unwrap_or_default();
        let state = match (flag("ready"), flag("usable")) {
            (_, true) => "usable".to_owned(),
            (true, false) => "peer is away".to_owned(),
            (false, false) => format!("confirming ({})", c["confirmations"]),
        };
        vec![
            short("id"),
            short("counterparty"),
            sat(&c["capacity_sat"]),
            sats(&c["ours_msat"]),
            sats(&c["payable_msat"]),
            sats(&c["receivable_msat"]),
            if flag("we_opened") { "us" } else { "peer" }.to_owned(),
            state,
        ]
    });
    let header = ["CHANNEL", "PEER", "CAPACITY", "OURS", "PAYABLE", "RECEIVABLE", "OPENED BY", "STATE"];
    print::out(&print::table(&header, rows.collect()))
}

pub(super) fn fees(format: Format, answer: &Value, chain: Option<Value>) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(&json!({ "wallet": answer, "chain_sat_per_vb": chain }));
    }
    let paid = &answer["paid"];
    let row = |name: &str, amount: String, what: &str| vec![name.to_owned(), amount, what.to_owned()];
    let mut rows = vec![
        row("paid: routing", sats(&paid["routing_msat"]), "by routes, over all payments"),
        row("paid: channel openings", sats(&paid["lsp_msat"]), "kept by a liquidity provider"),
        row("paid: on chain", sats(&paid["onchain_msat"]), "to miners"),
        row("reserved now", sat(&answer["anchor_reserve_sat"]), "on chain, for the open channels"),
        row("reserve a channel", sat(&answer["anchor_reserve_per_channel_sat"]), "each new channel wants it on chain"),
    ];
    for (blocks, rate) in chain.as_ref().and_then(Value::as_object).into_iter().flatten() {
        rows.push(row(&format!("chain, {blocks} blocks"), format!("{rate} sat/vB"), "the chain source's estimate"));
    }
    print::out(&print::table(&["FEES", "AMOUNT", ""], rows))
}

pub(super) fn history(format: Format, answer: &Value, all: bool) -> anyhow::Result<()> {
    let rows: Vec<&Value> =
        answer.as_array().into_iter().flatten().filter(|p| all || text(p, "state") != "unpaid").collect();
    if format == Format::Json {
        return print::json(&rows);
    }
    let hidden = answer.as_array().map_or(0, Vec::len) - rows.len();
    let table = rows.iter().map(|p| {
        let at = p["at"].as_u64().unwrap_or_default() / 1_000;
        let field = |key: &str| text(p, key).to_owned();
        vec![
            at.to_string(),
            field("direction"),
            sats(&p["amount_msat"]),
            sats(&p["fee_msat"]),
            field("state"),
            field("payment_hash"),
        ]
    });
    print::out(&print::table(&["UNIX TIME", "DIRECTION", "AMOUNT", "FEE", "STATE", "PAYMENT HASH"], table.collect()))?;
    if hidden > 0 {
        eprintln!("{hidden} unpaid invoices are not shown (--all shows them)");
    }
    Ok(())
}
