//! What is kept of an authority in the data folder: the account, a key with its certificate, and why the last try failed.
//! Readable by their owner only, replaced whole. This file asks nobody for anything.

use crate::config;
use crate::door::life::Life;
use crate::drive::channels;
use anyhow::Context;
use instant_acme::AccountCredentials;
use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// Beside the seed and the journal.
const FOLDER: &str = "acme";
const FAILURE: &str = "last-failure";

/// A key and the chain that an authority signed for it, both PEM.
pub(super) struct Held {
    pub key: String,
    pub chain: String,
    pub life: Life,
}

/// The folder, for one set of names at one authority.
pub(crate) struct Kept {
    dir: PathBuf,
    /// Other names, or another authority, are another file.
    certificate: PathBuf,
    account: PathBuf,
}

impl Kept {
    pub(crate) fn of(settings: &config::Acme, data_dir: &Path) -> Kept {
        let dir = data_dir.join(FOLDER);
        let certificate = dir.join(format!("{}.pem", fingerprint(&[&settings.directory, &settings.domains.join(",")])));
        let account = dir.join(format!("account-{}.json", fingerprint(&[&settings.directory])));
        Kept { dir, certificate, account }
    }

    pub(super) fn make_folder(&self) -> anyhow::Result<()> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.with_context(|| self.dir.display().to_string())
    }

    /// The life of the certificate, where there is one.
    pub(crate) fn life(&self) -> anyhow::Result<Option<Life>> {
        Ok(self.held()?.map(|held| held.life))
    }

    /// Why the last try brought no certificate, if it did not.
    pub(crate) fn failure(&self) -> Option<String> {
        fs::read_to_string(self.dir.join(FAILURE)).ok()
    }

    pub(super) fn held(&self) -> anyhow::Result<Option<Held>> {
        let Some(text) = read(&self.certificate)? else { return Ok(None) };
        let name = || self.certificate.display().to_string();
        let at = text.find("-----BEGIN CERTIFICATE-----").with_context(|| format!("no certificate in {}", name()))?;
        let (key, chain) = text.split_at(at);
        let life = Life::of_pem(chain).with_context(name)?;
        Ok(Some(Held { key: key.to_owned(), chain: chain.to_owned(), life }))
    }

    /// In one file, so that key and certificate always fit together.
    pub(super) fn keep(&self, held: &Held) -> anyhow::Result<()> {
        write(&self.certificate, &format!("{}\n{}", held.key.trim_end(), held.chain))?;
        match fs::remove_file(self.dir.join(FAILURE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(FAILURE),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    pub(super) fn account(&self) -> anyhow::Result<Option<AccountCredentials>> {
        let Some(text) = read(&self.account)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).with_context(|| format!("no account in {}", self.account.display()))
    }

    pub(super) fn keep_account(&self, account: &AccountCredentials) -> anyhow::Result<()> {
        write(&self.account, &serde_json::to_string(account)?)
    }

    /// The authority does not know it any more.
    pub(super) fn forget_account(&self) -> anyhow::Result<()> {
        fs::remove_file(&self.account).with_context(|| self.account.display().to_string())
    }

    pub(super) fn keep_failure(&self, why: &str) {
        if let Err(error) = write(&self.dir.join(FAILURE), why) {
            tracing::warn!("{error:#}");
        }
    }
}

fn fingerprint(of: &[&str]) -> String {
    use sha2::{Digest as _, Sha256};
    let mut hash = Sha256::new();
    of.iter().for_each(|text| hash.update(Sha256::digest(text.as_bytes())));
    hex::encode(&hash.finalize()[..8])
}

fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    channels::write(path, text).with_context(|| path.display().to_string())
}
