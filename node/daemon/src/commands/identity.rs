//! `satgrid identity ...`: the keys that others know this node by, and giving them up. Rotation and revocation want the node to
//! be stopped, since a running one signs by the key that it started with.

use super::print;
use crate::cli::{Format, Globals, IdentityCommand};
use crate::config::Config;
use crate::drive::now;
use crate::failure::HintExt;
use crate::identity::{self, Pair, RELAYS_WITHIN, Standing};
use crate::seed;
use anyhow::{Context, ensure};
use satgrid_market_nostr::{RelayConfig, succession};
use satgrid_types::GivenUp;
use satgrid_wallet::keys::Seed;
use serde_json::{Value, json};
use std::fs::File;
use std::io::BufRead;
use std::net::TcpStream;
use std::time::Duration;

const ASK_WITHIN: Duration = Duration::from_millis(500);

pub(super) fn run(globals: &Globals, command: &IdentityCommand) -> anyhow::Result<()> {
    let config = globals.load()?.config;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let seed = seed::read(&config)?.0.seed();
        let mut standing = identity::standing(&config, &seed).await?;
        match command {
            IdentityCommand::Show => return show(globals.format, &config, &seed, &standing),
            IdentityCommand::Rotate { stolen, yes } => {
                stopped(&config)?;
                let why = if *stolen { GivenUp::Stolen } else { GivenUp::Routine };
                sure(
                    *yes,
                    "Consumers follow to the new key; what is open under the old one is finished under it. Rotate?",
                )?;
                identity::rotate(&config.node.dir, &seed, &mut standing, now(), why)?;
            }
            IdentityCommand::Revoke { stolen, yes } => {
                stopped(&config)?;
                let why = if *stolen { GivenUp::Stolen } else { GivenUp::Ended };
                sure(*yes, "Nobody will buy from this node again, for good; it can only pay back. Revoke?")?;
                identity::revoke(&config.node.dir, &seed, &mut standing, now(), why)?;
            }
        }
        tell(&config, &seed, &standing).await?;
        show(globals.format, &config, &seed, &standing)
    })
}

/// A running node would go on signing by the old key.
fn stopped(config: &Config) -> anyhow::Result<()> {
    let runs = TcpStream::connect_timeout(&config.api.admin, ASK_WITHIN).is_ok();
    let error = || anyhow::anyhow!("something listens on {}: this node runs, it seems", config.api.admin);
    if runs { Err(error()).hint("stop it first; it takes the new key up when it starts again") } else { Ok(()) }
}

fn sure(yes: bool, question: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    eprint!("{question} type yes: ");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    ensure!(answer.trim() == "yes", "nothing was changed");
    Ok(())
}

async fn tell(config: &Config, seed: &Seed, standing: &Standing) -> anyhow::Result<()> {
    // On disk before anybody hears of it: a node that forgot would start under a key that others refuse.
    File::open(&config.node.dir).and_then(|dir| dir.sync_all()).context("cannot sync node.dir")?;
    if config.market.relays.is_empty() {
        eprintln!("warning: no relays are configured, so nobody heard of it; `satgrid up` tells them once there are");
        return Ok(());
    }
    let events = standing.events(seed)?;
    let told = succession::tell(&RelayConfig::new(config.market.relays.clone()), &events, RELAYS_WITHIN).await?;
    for url in told.taken {
        eprintln!("told {url}");
    }
    for (url, error) in told.missed {
        eprintln!("warning: {url} was not told: {error}; `satgrid up` tries again");
    }
    Ok(())
}

fn show(format: Format, config: &Config, seed: &Seed, standing: &Standing) -> anyhow::Result<()> {
    let pair = Pair::of(seed, standing.index)?;
    let given_up = standing.given_up.iter().map(|signed| {
        let said = signed.verify()?;
        Ok(json!({
            "node_key": said.old, "nostr_key": said.old_nostr, "heir": said.new, "at": said.at.as_secs(),
            "why": said.why.name(), "proof": signed.to_hex(),
        }))
    });
    let given_up = given_up.collect::<anyhow::Result<Vec<Value>>>()?;
    let revoked = standing.revoked().is_some();
    if format == Format::Json {
        return print::json(&json!({
            "index": standing.index, "node_key": pair.node_key(), "nostr_key": pair.nostr_key(), "revoked": revoked,
            "given_up": given_up, "file": identity::path(&config.node.dir),
        }));
    }
    let state = if revoked { "revoked" } else { "in use" };
    let mut rows = vec![vec![
        standing.index.to_string(),
        pair.node_key().to_string(),
        pair.nostr_key().to_string(),
        state.to_owned(),
    ]];
    for (n, said) in given_up.iter().enumerate().filter(|(_, said)| !said["heir"].is_null()).rev() {
        let text = |name: &str| said[name].as_str().unwrap_or_default().to_owned();
        rows.push(vec![n.to_string(), text("node_key"), text("nostr_key"), format!("given up: {}", text("why"))]);
    }
    print::out(&print::table(&["INDEX", "NODE KEY", "NOSTR KEY", "STATE"], rows))
}
