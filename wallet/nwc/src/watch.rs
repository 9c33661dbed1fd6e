//! What this side waits for, on disk: NIP-47 forgets to tell, so whoever must not miss a payment asks.
//!
//! | a row is | entered when | left when |
//! |---|---|---|
//! | waiting | an invoice was made, or a payment begun (before it is asked for) | the wallet says settled or failed, or it expired and was not paid |
//! | told | its event was shown | the event was acknowledged; then it is gone |
//!
//! A crash shows an event again, never none.

use satgrid_types::{Msat, PaymentHash, UnixMs};
use satgrid_wallet::{Direction, FailureReason};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// How long after its expiry an invoice is still asked about: a payment may have been under way.
pub(crate) const GRACE_MS: u64 = 3_600_000;

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
    /// Rows of which the wallet said last that it knows nothing. Not on disk: it is asked again.
    absent: BTreeSet<PaymentHash>,
}

impl Watch {
    pub(crate) fn open(path: PathBuf) -> io::Result<Watch> {
        let rows = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        Ok(Watch { path, rows, absent: BTreeSet::new() })
    }

    pub(crate) fn get(&self, hash: &PaymentHash) -> Option<&Waiting> {
        self.rows.get(hash)
    }
    pub(crate) fn rows(&self) -> impl Iterator<Item = (&PaymentHash, &Waiting)> {
        self.rows.iter()
    }

    /// What the wallet said of it: that it knows it, or not.
    pub(crate) fn heard(&mut self, hash: PaymentHash, known: bool) {
        if known || !self.rows.contains_key(&hash) {
            self.absent.remove(&hash);
        } else {
            self.absent.insert(hash);
        }
    }
    /// Whether some payment may be out: each that has no end here, unless the wallet itself says that it knows nothing of it.
    /// One whose answer is awaited no longer is out all the same.
    pub(crate) fn may_be_out(&self, paying: &BTreeSet<PaymentHash>) -> bool {
        let mut outbound = self.rows.iter().filter(|(_, row)| row.direction == Direction::Outbound);
        outbound.any(|(hash, _)| paying.contains(hash) || !self.absent.contains(hash))
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
        self.absent.remove(hash);
        if self.rows.remove(hash).is_some() { self.save() } else { Ok(()) }
    }
    /// Forgets invoices that nobody paid in time.
    pub(crate) fn forget_expired(&mut self, now: UnixMs) -> io::Result<()> {
        let before = self.rows.len();
        self.rows.retain(|_, row| row.direction == Direction::Outbound || now.since(row.expires_at) < GRACE_MS);
        if self.rows.len() == before {
            return Ok(());
        }
        self.absent.retain(|hash| self.rows.contains_key(hash));
        self.save()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The invoice of a payment that is under way may expire long before the payment ends.
    #[test]
    fn a_payment_is_out_until_it_has_an_end_or_the_wallet_knows_nothing_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watch::open(dir.path().join("state")).unwrap();
        let waiting = |direction| Waiting {
            direction,
            amount: Msat(5),
            bolt11: String::new(),
            expires_at: UnixMs(0),
            failed: None,
        };
        let (paid, made) = (PaymentHash([1; 32]), PaymentHash([2; 32]));
        let (nobody, paying) = (BTreeSet::new(), BTreeSet::from([paid]));
        watch.add(made, waiting(Direction::Inbound)).unwrap();
        assert!(!watch.may_be_out(&nobody));
        watch.add(paid, waiting(Direction::Outbound)).unwrap();
        assert!(watch.may_be_out(&nobody), "nobody has asked the wallet yet");
        watch.heard(paid, false);
        assert!(!watch.may_be_out(&nobody));
        assert!(watch.may_be_out(&paying), "it is being asked for");
        watch.heard(paid, true);
        assert!(watch.may_be_out(&nobody), "it is pending there");
        watch.remove(&paid).unwrap();
        assert!(!watch.may_be_out(&nobody));
    }
}
