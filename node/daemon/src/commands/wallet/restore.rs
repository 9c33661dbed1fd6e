//! `satgrid wallet restore`: from the words and the channel backup to a node that brings its channels home.
//!
//! It runs while the node is stopped. The rehearsal says what would be found and done; the restore itself puts whatever
//! old channels there are aside (never to be started), writes down what was lost, and leaves the rest to `satgrid up`.

use crate::cli::{Format, RestoreArgs};
use crate::commands::print;
use crate::config::Config;
use crate::drive::{
    channels::{self, BackupFile},
    now, restore as kept,
};
use crate::failure::HintExt;
use crate::up;
use anyhow::{Context, ensure};
use satgrid_wallet::restore::Restoring;
use satgrid_wallet_ldk::{Rehearsed, put_aside, rehearse};
use serde_json::{Value, json};
use std::io::BufRead;
use std::path::{Path, PathBuf};

pub(super) async fn restore(format: Format, config: &Config, args: &RestoreArgs) -> anyhow::Result<()> {
    let (path, file) = backup(config, args.backup.as_deref())?;
    let network = config.node.network;
    ensure!(
        file.network == network.name(),
        "{} is a backup of {}, not of {}",
        path.display(),
        file.network,
        network.name()
    );
    let seed = crate::seed::read(config)?.0.seed();
    let chain = up::chain_source(config)?;
    let found = rehearse(&seed, up::wallet_network(network), &chain, &file.backup).await;
    let found = found.map_err(anyhow::Error::msg).hint("`satgrid init --restore` takes the words of the lost node")?;
    show(format, &path, &file, &found)?;
    if args.rehearse {
        eprintln!("rehearsed: nothing was touched");
        return Ok(());
    }
    let lightning = config.node.dir.join("lightning");
    if !args.yes {
        eprintln!(
            "This gives up whatever channel state is left in {}: peers will close these channels, and what was in flight in \
             them is lost. Do it only if that state is lost or old.",
            lightning.display()
        );
        eprint!("restore? type yes: ");
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        ensure!(answer.trim() == "yes", "nothing was touched");
    }
    // In this order: without the old state and without the list the guard still refuses to start; with both it would not.
    if let Some(aside) = put_aside(&lightning, now().as_secs()).hint("stop the node first")? {
        eprintln!("the old channels are in {}; they must never be started", aside.display());
    }
    let mut restoring = Restoring::of(&file.backup, now());
    if let Some(before) = kept::read(&config.node.dir)? {
        restoring = restoring.after(before);
    }
    for other in up::backups(config).iter().filter_map(|path| channels::read(path)) {
        restoring.given_up.extend(other.backup.updates.into_keys());
    }
    kept::save(&config.node.dir, &restoring)?;
    eprintln!("next: `satgrid up`, then `satgrid wallet restore --status` until every channel is over");
    Ok(())
}

/// The named backup, or the newest that is found.
fn backup(config: &Config, named: Option<&Path>) -> anyhow::Result<(PathBuf, BackupFile)> {
    let candidates = named.map_or_else(|| up::backups(config), |path| vec![path.to_owned()]);
    let read = candidates.iter().filter_map(|path| Some((path.clone(), channels::read(path)?)));
    let newest = read.max_by_key(|(_, file)| file.written_at);
    let places: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
    newest.with_context(|| format!("no channel backup in {}", places.join(" or "))).hint(
        "name it with --backup; without one only the coins on chain come back, by `satgrid init --restore` and `satgrid up`",
    )
}

fn show(format: Format, path: &Path, file: &BackupFile, found: &[Rehearsed]) -> anyhow::Result<()> {
    let address = |channel: &Rehearsed| {
        let peer = file.backup.peers.iter().find(|(key, _)| *key == channel.channel.counterparty);
        peer.map(|(_, address)| address.clone())
    };
    let on_chain = |channel: &Rehearsed| match &channel.open {
        Ok(true) => "open; the peer will be asked to close it".to_owned(),
        Ok(false) => "closed; our share will be looked for".to_owned(),
        Err(reason) => format!("not known: {reason}"),
    };
    if format == Format::Json {
        let channels: Vec<Value> = found
            .iter()
            .map(|c| {
                json!({
                    "channel": c.channel.channel, "counterparty": c.channel.counterparty, "address": address(c),
                    "capacity_sat": c.channel.capacity_sat, "ours_msat": c.channel.ours, "funding": c.channel.funding,
                    "open": c.open.as_ref().ok(), "on_chain": on_chain(c),
                })
            })
            .collect();
        return print::json(&json!({
            "backup": path, "written_at": file.written_at, "node": file.backup.node, "channels": channels,
        }));
    }
    eprintln!(
        "{} of {} s ago; the words are those of node {}",
        path.display(),
        now().since(file.written_at) / 1_000,
        file.backup.node
    );
    let rows = found.iter().map(|c| {
        let peer: String = c.channel.counterparty.to_string().chars().take(16).collect();
        vec![
            c.channel.channel.chars().take(16).collect(),
            peer,
            address(c).unwrap_or_else(|| "not known: it has to connect to us".to_owned()),
            format!("{} sat", c.channel.capacity_sat),
            format!("{} sat", c.channel.ours.0 / 1_000),
            on_chain(c),
        ]
    });
    print::out(&print::table(&["CHANNEL", "PEER", "ADDRESS", "CAPACITY", "OURS THEN", "ON CHAIN"], rows.collect()))
}

pub(super) fn status(format: Format, answer: &Value) -> anyhow::Result<()> {
    if format == Format::Json || answer.is_null() {
        if answer.is_null() {
            eprintln!("nothing is being restored");
        }
        return if format == Format::Json { print::json(answer) } else { Ok(()) };
    }
    let restoring: Restoring = serde_json::from_value(answer.clone())?;
    let rows = restoring.lost.iter().map(|lost| {
        let id = lost.channel.channel.chars().take(16).collect();
        let peer = lost.channel.counterparty.to_string().chars().take(16).collect();
        vec![id, peer, format!("{} sat", lost.channel.ours.0 / 1_000), lost.state.to_string()]
    });
    print::out(&print::table(&["CHANNEL", "PEER", "OURS THEN", "STATE"], rows.collect()))?;
    eprintln!("{}", if restoring.is_over() { "all over" } else { "not over yet; the node goes on by itself" });
    Ok(())
}
