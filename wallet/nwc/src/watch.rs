//! What this side waits for, on disk: NIP-47 forgets to tell, so whoever must not miss a payment asks.
//!
//! | a row is | entered when | left when |
//! |---|---|---|
//! | waiting | an invoice was made, or a payment begun (before it is asked for) | the wallet says settled, failed, or it expired unpaid |
//! | told | its event was shown | the event was acknowledged; then it is gone |
//!
//! A crash shows an event again, never none.

use satgrid_types::{Msat, PaymentHash, UnixMs};
use satgrid_wallet::{Direction, FailureReason};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// How long after its expiry an invoice is still asked about: a payment may have been under way.
const GRACE_MS: u64 = 3_600_000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Waiting {
    pub direction: Direction,
    pub amount: Msat,
    pub bolt11: String,
    pub expires_at: UnixMs,
    /// The wallet itself said that the payment failed.
    pub failed: Option<FailureReason>,
}

#[derive(Debug, Default)]
pub(crate) struct Watch {
    path: PathBuf,
    rows: BTreeMap<PaymentHash, Waiting>,
}

impl Watch {
    pub(crate) fn open(path: PathBuf) -> io::Result<Watch> {
        let rows = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        Ok(Watch { path, rows })
    }

    pub(crate) fn get(&self, hash: &PaymentHash) -> Option<&Waiting> {
        self.rows.get(hash)
    }
    pub(crate) fn rows(&self) -> impl Iterator<Item = (&PaymentHash, &Waiting)> {
        self.rows.iter()
    }

    /// Durable when it returns.
    pub(crate) fn add(&mut self, hash: PaymentHash, waiting: Waiting) -> io::Result<()> {
        self.rows.insert(hash, waiting);
        self.save()
    }
    pub(crate) fn fail(&mut self, hash: &PaymentHash, reason: FailureReason) -> io::Result<()> {
        match self.rows.get_mut(hash) {
            Some(row) => row.failed = Some(reason),
            None => return Ok(()),
        }
        self.save()
    }
    pub(crate) fn remove(&mut self, hash: &PaymentHash) -> io::Result<()> {
        if self.rows.remove(hash).is_some() { self.save() } else { Ok(()) }
    }
    /// Forgets invoices that nobody paid in time.
    pub(crate) fn forget_expired(&mut self, now: UnixMs) -> io::Result<()> {
        let before = self.rows.len();
        self.rows.retain(|_, row| row.direction == Direction::Outbound || now.since(row.expires_at) < GRACE_MS);
        if self.rows.len() == before { Ok(()) } else { self.save() }
    }

    fn save(&self) -> io::Result<()> {
        replace(&self.path, &serde_json::to_vec(&self.rows)?)
    }
}

/// Replaces a file as a whole, readable by its owner only.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        // The name is durable only when its folder is.
        Some(dir) if !dir.as_os_str().is_empty() => std::fs::File::open(dir)?.sync_all(),
        Some(_) | None => Ok(()),
    }
}
