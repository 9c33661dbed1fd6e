//! `satgrid status`: what the running node does, what it may lose now, and what is wrong with it, from its admin port.

use super::{admin_client::Admin, print};
use crate::cli::{Format, Globals};
use serde_json::{Map, Value};

pub(super) fn run(globals: &Globals) -> anyhow::Result<()> {
    let config = globals.load()?.config;
    let admin = Admin::of(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut status, wallet) = runtime.block_on(async {
        let status = admin.get("status").await?;
        // A wallet that does not answer is a line of the status, not the end of it.
        let wallet =
            admin.get("wallet").await.unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }));
        Ok::<_, anyhow::Error>((status, wallet))
    })?;
    status["wallet"] = wallet;
    match globals.format {
        Format::Json => print::json(&status),
        Format::Text => print::out(&text(&status)),
    }
}

/// The parts that there are, with an empty line between them.
fn text(status: &Value) -> String {
    let parts = [
        head(status),
        exposure(status),
        sessions(status),
        seller(status),
        engines(status),
        wallet(status),
        relays(status),
    ];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n\n")
}

fn head(status: &Value) -> String {
    let mut rows = vec![
        vec!["node".into(), short(&status["node_key"])],
        vec!["version".into(), word(&status["version"])],
        vec!["network".into(), word(&status["network"])],
        vec!["up for".into(), span(number(&status["uptime_s"]))],
    ];
    for (name, key) in [("API", "api_listen"), ("QUIC", "quic_listen"), ("Lightning", "lightning_listen")] {
        if !status[key].is_null() {
            rows.push(vec![name.into(), word(&status[key])]);
        }
    }
    for role in ["consumer", "provider"] {
        if let Some(why) = status[role]["halted"].as_str() {
            rows.push(vec![format!("{role} STOPPED"), why.to_owned()]);
        }
        if let Some(why) = status[role]["paused"].as_str() {
            rows.push(vec![format!("{role} PAUSED"), why.to_owned()]);
        }
    }
    if let Some(trouble) = status["clock"].as_str() {
        rows.push(vec!["CLOCK".into(), trouble.to_owned()]);
    }
    print::table(&["STATUS", ""], rows)
}

fn exposure(status: &Value) -> String {
    let row = |name: &str, side: &Value| {
        let figures = ["exposure_msat", "largest_exposure_msat"].map(|key| amount(&side[key]));
        side.is_object().then(|| [vec![name.to_owned()], figures.to_vec()].concat())
    };
    let rows = [row("as a buyer", &status["consumer"]), row("as a seller", &status["provider"])];
    print::table(&["MOST YOU CAN LOSE NOW", "NOW", "LARGEST SINCE START"], rows.into_iter().flatten().collect())
}

fn sessions(status: &Value) -> String {
    let consumer = &status["consumer"];
    if !consumer.is_object() {
        return String::new();
    }
    let counters = &consumer["counters"];
    let mut out = format!(
        "buying: {} calls open, {} taken, {} finished, {} failed, {} failovers",
        consumer["open_calls"], counters["calls"], counters["finished"], counters["failed"], counters["failovers"],
    );
    let of = |s: &Value| {
        let figures = ["paid_msat", "charged_msat", "remainder_msat", "refunded_msat"].map(|key| amount(&s[key]));
        [vec![word(&s["session"]), short(&s["provider"]), word(&s["state"])], figures.to_vec()].concat()
    };
    // What is closed and settled is history: `satgrid ledger show` has it.
    let open: Vec<Vec<String>> = list(&consumer["sessions"]).filter(|s| s["state"] != "settled").map(of).collect();
    if !open.is_empty() {
        let header = ["SESSION", "PROVIDER", "STATE", "PAID", "CHARGED", "LEFT", "REFUNDED"];
        out = format!("{out}\n{}", print::table(&header, open));
    }
    for avoided in list(&consumer["avoided"]) {
        out = format!("{out}\navoided: provider {}: {}", short(&avoided["provider"]), word(&avoided["why"]));
    }
    out
}

fn seller(status: &Value) -> String {
    let provider = &status["provider"];
    if !provider.is_object() {
        return String::new();
    }
    let counters = &provider["counters"];
    format!(
        "selling: {} requests open on {} links, {} started, {} receipts, {} ended at their last ack, {} refused\n\
         held for buyers: {} msat prepaid and unused, {} msat to be refunded, in {} sessions",
        provider["open_requests"],
        provider["links"],
        counters["requests_started"],
        counters["receipts"],
        counters["abandoned"],
        counters["requests_refused"],
        amount(&provider["prepaid_msat"]),
        amount(&provider["refunds_due_msat"]),
        provider["sessions"],
    )
}

fn engines(status: &Value) -> String {
    let rows: Vec<Vec<String>> = list(&status["engines"])
        .map(|e| {
            let process =
                e["process"].as_u64().map_or_else(|| "DOWN, starting again".into(), |id| format!("process {id}"));
            vec![word(&e["model"]), process, word(&e["slots"]), word(&e["context"])]
        })
        .collect();
    if rows.is_empty() { String::new() } else { print::table(&["ENGINE", "STATE", "SLOTS", "CONTEXT"], rows) }
}

fn wallet(status: &Value) -> String {
    let wallet = &status["wallet"];
    if let Some(error) = wallet["error"].as_str() {
        return format!("wallet: {error}");
    }
    let balance = &wallet["balance"];
    let usable = list(&wallet["channels"]).filter(|c| c["usable"] == true).count();
    let channels = list(&wallet["channels"]).count();
    let rows = vec![
        vec!["in channels".into(), amount(&balance["lightning_total_msat"]), "msat".into()],
        vec!["payable now".into(), amount(&balance["payable_msat"]), "msat".into()],
        vec!["receivable now".into(), amount(&balance["receivable_msat"]), "msat".into()],
        vec!["on chain, confirmed".into(), amount(&balance["onchain_confirmed_sat"]), "sat".into()],
        vec!["channels usable".into(), format!("{usable} of {channels}"), String::new()],
    ];
    print::table(&["WALLET", "AMOUNT", "UNIT"], rows)
}

fn relays(status: &Value) -> String {
    let rows: Vec<Vec<String>> = list(&status["relays"])
        .map(|r| {
            let state =
                if r["connected"] == true { "connected".into() } else { format!("LOST: {}", word(&r["last_error"])) };
            vec![word(&r["url"]), state]
        })
        .collect();
    let refused: u64 =
        status["refused_listings"].as_object().map(Map::values).into_iter().flatten().filter_map(Value::as_u64).sum();
    let counts = format!("listings: {} live, {refused} refused", status["listings"]);
    if rows.is_empty() { counts } else { format!("{}\n{counts}", print::table(&["RELAY", "STATE"], rows)) }
}

// Helpers.

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}
/// Text as it is; anything else as JSON writes it; nothing for nothing.
fn word(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}
/// The beginning of a key or hash.
fn short(value: &Value) -> String {
    word(value).chars().take(16).collect()
}
/// With a comma at every third digit.
fn amount(value: &Value) -> String {
    let digits = word(value);
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600.. => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn figures_read_well() {
        assert_eq!([json!(7), json!(1_000), json!(12_345_678)].map(|v| amount(&v)), ["7", "1,000", "12,345,678"]);
        assert_eq!([59, 61, 7_260].map(span), ["59 s", "1 min 1 s", "2 h 1 min"]);
    }

    #[test]
    fn what_is_wrong_is_said_and_what_is_over_is_not() {
        let session = |state: &str| json!({ "session": "ab", "provider": "cd", "state": state, "paid_msat": 10_000 });
        let status = json!({
            "node_key": "00", "uptime_s": 3, "listings": 2, "refused_listings": { "expired": 4 },
            "consumer": { "halted": "no space left on device", "exposure_msat": 4_200, "open_calls": 0,
                          "sessions": [session("ready"), session("settled")] },
            "engines": [{ "model": "gemma", "process": null, "slots": 4, "context": 2_048 }],
            "relays": [{ "url": "ws://x", "connected": false, "last_error": "refused" }],
            "wallet": { "error": "the node does not answer" },
        });
        let text = text(&status);
        for line in
            ["consumer STOPPED", "no space left", "4,200", "10,000", "DOWN", "LOST: refused", "4 refused", "not answer"]
        {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert_eq!(text.matches("10,000").count(), 1, "{text}");
        assert!(!text.contains("selling"), "{text}");
    }
}
