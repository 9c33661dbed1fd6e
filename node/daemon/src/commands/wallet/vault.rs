//! `satgrid wallet encrypt|decrypt`: how the seed lies on this disk. The node may run: it reads the seed at its start only.

use crate::cli::{Format, WalletCommand};
use crate::commands::print;
use crate::config::{Config, Secret};
use crate::seed::{self, Kept};
use anyhow::Context;
use serde_json::json;

pub(super) fn change(format: Format, config: &Config, command: &WalletCommand) -> anyhow::Result<()> {
    let (path, encrypted) = if let WalletCommand::Encrypt { passphrase_from } = command {
        let from = passphrase_from.clone().map(Secret::try_from).transpose();
        let from = from.map_err(anyhow::Error::msg).context("--passphrase-from")?;
        let (path, before) = seed::encrypt(config, from.as_ref())?;
        eprintln!(
            "{}",
            match before {
                Kept::Plain => "the seed is encrypted; the words on paper open it without the passphrase",
                Kept::Sealed => "the seed is under another passphrase",
            }
        );
        eprintln!("copies of the plain file in backups stay what they are, and a flash disk may keep old blocks");
        if config.wallet.passphrase.is_none() {
            eprintln!("hint: `satgrid up` asks for it on a terminal; for a service set wallet.passphrase");
        }
        (path, true)
    } else {
        let path = seed::decrypt(config)?;
        eprintln!("the seed is plain words again: whoever reads the file has the money");
        (path, false)
    };
    match format {
        Format::Json => print::json(&json!({ "seed": path, "encrypted": encrypted })),
        Format::Text => print::out(&path.display().to_string()),
    }
}
