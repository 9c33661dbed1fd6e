//! `satgrid init`: a commented configuration, a data folder (0700) and a seed (0600, encrypted if asked). Overwrites nothing, ever.

use anyhow::{Context, bail};
use rand::RngCore;
use satgrid_wallet::keys::Phrase;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::print;
use crate::cli::{Format, Globals, InitArgs};
use crate::config::{self, Network, Secret};
use crate::failure::HintExt;
use crate::seed;

/// 24 words, and 12 words.
const ENTROPY_BYTES: usize = 32;
const SHORT_ENTROPY_BYTES: usize = 16;

pub(super) fn run(globals: &Globals, args: &InitArgs) -> anyhow::Result<()> {
    let env = |name: &str| std::env::var(name).ok();
    let network = globals.network.unwrap_or(Network::Regtest);
    let file = absolute(globals.config.clone().unwrap_or_else(|| config::config_file(&env)))?;
    if file.exists() {
        return Err(anyhow::anyhow!("{} is there already", file.display()))
            .hint("edit it, or name another with --config");
    }
    let dir = absolute(globals.dir.clone().unwrap_or_else(|| config::data_dir(&env, network)))?;
    let seed_file = dir.join("seed");

    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("cannot make {}", dir.display()))?;
    let place = args.passphrase_from.clone().map(Secret::try_from).transpose();
    let place = place.map_err(anyhow::Error::msg).context("--passphrase-from")?;
    let (phrase, fresh) = if seed_file.exists() {
        if args.restore {
            bail!("{} is there already; it is not replaced", seed_file.display());
        }
        (seed::read_from(&Secret::File(seed_file.clone()), place.as_ref())?.0, false)
    } else {
        // Before the words are read: standing input is for them alone, and plain words never touch the disk.
        let passphrase = match (&place, args.passphrase) {
            (None, false) => None,
            (place, _) => Some(seed::new_passphrase(place.as_ref())?),
        };
        let phrase = if args.restore { words_from_stdin()? } else { new_phrase(args.twelve)? };
        let text = match passphrase {
            Some(passphrase) => seed::sealed(&phrase, &passphrase)?,
            None => format!("{}\n", phrase.reveal()),
        };
        write_new(&seed_file, &text, 0o600)?;
        (phrase, !args.restore)
    };
    let folder = file.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    write_new(&file, &configuration(globals, args, network, &dir, place.as_ref()), 0o644)?;

    let seed = phrase.seed();
    let identity = hex::encode(seed.identity(0).verifying_key().to_bytes());
    match globals.format {
        Format::Json => print::json(&json!({
            "config": file, "dir": dir, "seed": seed_file, "network": network, "identity": identity,
        }))?,
        Format::Text => {
            print::out(&format!(
                "config    {}\nseed      {}\nidentity  {identity}",
                file.display(),
                seed_file.display()
            ))?;
        }
    }
    if fresh && !args.hide_words {
        eprint!("{}", on_paper(phrase.reveal()));
    }
    eprintln!("next: edit {}, then `satgrid config check`, then `satgrid up`", file.display());
    Ok(())
}

fn absolute(path: PathBuf) -> anyhow::Result<PathBuf> {
    std::path::absolute(&path).with_context(|| format!("{} is no path", path.display()))
}

pub(super) fn new_phrase(short: bool) -> anyhow::Result<Phrase> {
    let mut entropy = [0; ENTROPY_BYTES];
    rand::rngs::OsRng.try_fill_bytes(&mut entropy).context("the system gives no random bytes")?;
    Ok(Phrase::from_entropy(if short { &entropy[..SHORT_ENTROPY_BYTES] } else { &entropy })?)
}

fn words_from_stdin() -> anyhow::Result<Phrase> {
    eprintln!("enter the words, then end the input (Ctrl-D):");
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    Phrase::parse(&text).hint("write them in order, with spaces between")
}

/// Writes a file that must not be there yet, and waits until it is on disk.
pub(super) fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn configuration(globals: &Globals, args: &InitArgs, network: Network, dir: &Path, place: Option<&Secret>) -> String {
    let mut roles = Vec::new();
    if args.provider {
        roles.push("\"provider\"");
    }
    if args.consumer || !args.provider {
        roles.push("\"consumer\"");
    }
    let mut set = BTreeMap::from([
        ("node.network", format!("\"{}\"", network.name())),
        ("node.roles", format!("[{}]", roles.join(", "))),
    ]);
    if globals.dir.is_some() {
        set.insert("node.dir", toml::Value::String(dir.to_string_lossy().into_owned()).to_string());
    }
    // A descriptor is this call's alone.
    if let Some(place) = place.filter(|place| !matches!(place, Secret::Fd(_))) {
        set.insert("wallet.passphrase", toml::Value::String(place.to_string()).to_string());
    }
    config::render(&set, args.provider)
}

/// The words in numbered columns, as one copies them.
fn on_paper(words: &str) -> String {
    let words: Vec<&str> = words.split_whitespace().collect();
    let mut text = String::from(
        "\nWrite these words down. They are everything: money and identity. They are not shown again.\n\n",
    );
    for row in words.chunks(4).enumerate() {
        for (column, word) in row.1.iter().enumerate() {
            text.push_str(&format!("{:>4}. {word:<10}", row.0 * 4 + column + 1));
        }
        text = text.trim_end().to_owned() + "\n";
    }
    text + "\n"
}
