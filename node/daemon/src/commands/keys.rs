//! `satgrid keys ...`: asks the running node over its admin port.

use super::{admin_client::Admin, print};
use crate::cli::{Format, Globals, KeysCommand, NewKeyArgs};
use crate::failure::HintExt;
use anyhow::Context;
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

const DAY_S: u64 = 24 * 3_600;
const MSAT_PER_SAT: u64 = 1_000;

pub(super) fn run(globals: &Globals, command: &KeysCommand) -> anyhow::Result<()> {
    let admin = Admin::of(&globals.load()?.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match command {
        KeysCommand::Create(new) => created(globals.format, &runtime.block_on(admin.post("keys", &body(new)?))?),
        KeysCommand::List => listed(globals.format, &runtime.block_on(admin.get("keys"))?),
        KeysCommand::Show { id } => {
            shown(globals.format, &runtime.block_on(admin.get(&format!("keys/{}", plain(id)?)))?)
        }
        KeysCommand::Revoke { id } => {
            let key = runtime.block_on(admin.delete(&format!("keys/{}", plain(id)?)))?;
            eprintln!("{id} and every key below it are revoked; calls under way go on to their end");
            shown(globals.format, &key)
        }
    }
}

/// An id as a part of a path.
fn plain(id: &str) -> anyhow::Result<&str> {
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(anyhow::anyhow!("{id:?} is no key's id")).hint("`satgrid keys list` shows them: key_17");
    }
    Ok(id)
}

fn body(new: &NewKeyArgs) -> anyhow::Result<Value> {
    let msat = |sat: Option<u64>| -> anyhow::Result<Option<u64>> {
        sat.map(|sat| sat.checked_mul(MSAT_PER_SAT).context("a limit is too large")).transpose()
    };
    let expires_at = match new.days {
        Some(days) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
            Some(days.checked_mul(DAY_S).and_then(|life| life.checked_add(now)).context("--days is too large")?)
        }
        None => None,
    };
    Ok(json!({
        "name": new.name, "kind": if new.manage { "manage" } else { "infer" }, "parent": new.parent,
        "per_request_msat": msat(new.per_request_sat)?, "per_day_msat": msat(new.per_day_sat)?,
        "total_msat": msat(new.total_sat)?, "requests_per_minute": new.requests_per_minute, "models": new.models,
        "expires_at": expires_at,
    }))
}

fn created(format: Format, key: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(key);
    }
    eprintln!("{} is made. Its secret is shown this once; the node keeps only its hash:", text(&key["id"]));
    print::out(key["secret"].as_str().unwrap_or_default())
}

fn listed(format: Format, answer: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(answer);
    }
    let header = ["KEY", "NAME", "KIND", "BELOW", "SPENT MSAT", "RESERVED", "TODAY", "LEFT", "REQUESTS", "STATE"];
    let rows = answer["data"].as_array().cloned().unwrap_or_default();
    let rows = rows.iter().map(|key| {
        let state = if key["revoked_at"].is_null() { "live" } else { "revoked" };
        let names = ["id", "name", "kind", "parent", "spent_msat", "reserved_msat", "spent_today_msat"];
        let mut row: Vec<String> = names.iter().map(|name| text(&key[*name])).collect();
        row.extend([text(&key["available_msat"]), text(&key["requests"]), state.to_owned()]);
        row
    });
    print::out(&print::table(&header, rows.collect()))
}

fn shown(format: Format, key: &Value) -> anyhow::Result<()> {
    if format == Format::Json {
        return print::json(key);
    }
    let empty = serde_json::Map::new();
    let limits = key["limits"].as_object().unwrap_or(&empty);
    let figures = key.as_object().unwrap_or(&empty).iter().filter(|(name, _)| *name != "limits");
    let rows = figures.chain(limits).map(|(name, value)| vec![name.clone(), text(value)]);
    print::out(&print::table(&["FIELD", "VALUE"], rows.collect()))
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(all) if all.is_empty() => "-".to_owned(),
        Value::Array(all) => all.iter().map(text).collect::<Vec<_>>().join(" "),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}
