//! Opening and closing channels, with what happens shown while it happens.

use super::POLL;
use crate::cli::{Format, OpenArgs};
use crate::commands::admin_client::Admin;
use crate::commands::print;
use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;

/// A peer that refuses the channel makes it vanish; so many looks without it are a refusal.
const PATIENCE_LOOKS: u32 = 60;

pub(super) async fn open(format: Format, admin: &Admin, args: &OpenArgs) -> anyhow::Result<()> {
    let (addr, capacity) = match args.place_and_capacity.as_slice() {
        [capacity] => (None, capacity),
        [addr, capacity] => (Some(addr), capacity),
        _ => bail!("write [HOST:PORT] CAPACITY_SAT"),
    };
    let capacity_sat: u64 = capacity.parse().with_context(|| format!("{capacity:?} is no number of sats"))?;
    let before = ids(&admin.get("wallet").await?);
    let body = json!({ "node": args.node, "addr": addr, "capacity_sat": capacity_sat, "push_msat": args.push_msat });
    let opened = admin.post("wallet/open", &body).await?;
    eprintln!(
        "a channel of {capacity_sat} sat to {} at {}; beside it {} sat stay on chain, so that a force-close can be paid",
        opened["node"].as_str().unwrap_or_default(),
        opened["addr"].as_str().unwrap_or_default(),
        opened["anchor_reserve_sat"],
    );
    if args.no_wait {
        eprintln!("`satgrid wallet channels` shows when it is usable");
        return if format == Format::Json { print::json(&opened) } else { Ok(()) };
    }
    let progress = Progress::new();
    let mut missing = 0;
    loop {
        let wallet = admin.get("wallet").await?;
        let ours = |c: &&Value| c["counterparty"] == opened["node"] && !before.contains(&c["id"].to_string());
        match wallet["channels"].as_array().into_iter().flatten().find(ours) {
            Some(channel) if channel["usable"] == true => {
                progress.done("usable");
                return if format == Format::Json { print::json(channel) } else { Ok(()) };
            }
            Some(channel) => {
                missing = 0;
                progress.say(&match (channel["confirmations"].as_u64(), channel["ready"].as_bool()) {
                    (_, Some(true)) => "ready; waiting for the peer".to_owned(),
                    (None | Some(0), _) => "the funding transaction waits for a block".to_owned(),
                    (Some(n), _) => format!("{n} confirmations"),
                });
            }
            None if missing >= PATIENCE_LOOKS => {
                bail!("the peer refused the channel; the node's Lightning log says why")
            }
            None => {
                missing += 1;
                progress.say("agreeing with the peer");
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

pub(super) async fn close(format: Format, admin: &Admin, channel: &str, force: bool) -> anyhow::Result<()> {
    let closed = admin.post("wallet/close", &json!({ "channel": channel, "force": force })).await?;
    if force {
        eprintln!(
            "forced: our share comes back on chain after the channel's delay (`satgrid wallet balance`: coming back)"
        );
    } else {
        eprintln!("closing with the peer; our share is on chain as soon as the transaction is");
    }
    match format {
        Format::Json => print::json(&closed),
        Format::Text => print::out(closed["channel"].as_str().unwrap_or_default()),
    }
}

fn ids(wallet: &Value) -> Vec<String> {
    wallet["channels"].as_array().into_iter().flatten().map(|c| c["id"].to_string()).collect()
}

/// A spinner on a terminal, a line for each change elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    said: std::cell::RefCell<String>,
}

impl Progress {
    fn new() -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
            let bar = ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(POLL / 4);
            bar
        });
        Progress { bar, said: std::cell::RefCell::default() }
    }
    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None if *self.said.borrow() != text => {
                eprintln!("{text}");
                text.clone_into(&mut self.said.borrow_mut());
            }
            None => {}
        }
    }
    fn done(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{text}");
    }
}
