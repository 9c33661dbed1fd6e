//! Keeps the channels: a backup at every change of them or of their states, a force-closed channel opened again, and what is lacking said in time.

use super::{now, restore};
use satgrid_types::{LightningKey, Msat, UnixMs};
use satgrid_wallet::{
    Channel, Embedded, OpenChannel,
    embedded::{ChannelBackup, Shortage},
    reopen::{Due, Reopen},
    restore::Restoring,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How often channels are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Blocks that a chain loses to chance: deeper reorganisations of a public network have a cause.
const BLOCKS_BACK: u32 = 2;
/// The backup below the node's folder.
pub(crate) const BACKUP_FILE: &str = "channels.json";

/// Channels that the operator asked to force-close: those stay closed.
pub(crate) type Wished = Arc<Mutex<BTreeSet<String>>>;

/// Why to look at the channels now.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// One is being opened, or is ready: from now on it is in the backup.
    Opened,
    Closed(Closed),
}

/// A channel that closed; the journal has it.
#[derive(Debug, Clone)]
pub(crate) struct Closed {
    pub channel: String,
    pub counterparty: Option<LightningKey>,
    pub forced: bool,
}

/// The file: what reaches the channels' peers again, and what is to be opened again. No secret is in it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BackupFile {
    pub version: u32,
    pub network: String,
    pub written_at: UnixMs,
    pub backup: ChannelBackup,
    #[serde(default)]
    pub reopen: Reopen,
}

const VERSION: u32 = 1;

impl BackupFile {
    /// As it is written and, by hand, asked for. Channels that are still to come back stay in it.
    pub(crate) fn of(
        network: &str,
        mut backup: ChannelBackup,
        restoring: Option<&Restoring>,
        reopen: &Reopen,
    ) -> BackupFile {
        for lost in restoring.into_iter().flat_map(Restoring::open) {
            let address = lost.address.clone().map(|address| (lost.channel.counterparty, address));
            backup.peers.extend(address.filter(|peer| !backup.peers.contains(peer)));
            backup.channels.push(lost.channel.clone());
        }
        let network = network.to_owned();
        BackupFile { version: VERSION, network, written_at: now(), backup, reopen: reopen.clone() }
    }
}

pub(crate) struct Keeper {
    pub wallet: Arc<dyn Embedded>,
    pub dir: PathBuf,
    pub backup: Option<PathBuf>,
    pub network: &'static str,
    pub reopen: bool,
    /// Channels that are still to come back stay in the backup.
    pub restoring: restore::Shared,
    pub wished: Wished,
    /// The smallest slice that is sold, and that is bought.
    pub wants: (Option<Msat>, Option<Msat>),
    pub shutdown: CancellationToken,
}

impl Keeper {
    pub(crate) async fn run(self, mut changes: mpsc::UnboundedReceiver<Change>) {
        let mut reopen = read(&self.dir.join(BACKUP_FILE)).map(|file| file.reopen).unwrap_or_default();
        let mut told: Vec<&str> = Vec::new();
        // What the backup on disk says: how many channels of which size, and their states.
        let mut written: Option<ChannelBackup> = None;
        let mut height = 0;
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                _ = look.tick() => {}
                Some(change) = changes.recv() => if let Change::Closed(gone) = change {
                    let wished = self.wished.lock().unwrap_or_else(PoisonError::into_inner).remove(&gone.channel);
                    reopen.closed(now(), &gone.channel, gone.forced && !wished);
                    written = None;
                    if gone.forced {
                        let peer = gone.counterparty.map(|peer| peer.to_string()).unwrap_or_default();
                        tracing::warn!(channel = %gone.channel, %peer, reopens = reopen.wanted(), "noticed a force-close");
                    }
                }
            }
            // What was not to be had now may be at the next look: backups go on as long as the node does.
            let (Ok(channels), Ok(balance)) = (self.wallet.channels().await, self.wallet.balance().await) else {
                continue;
            };
            let backup = match self.wallet.channel_backup().await {
                Ok(backup) => backup,
                Err(error) => {
                    tracing::error!(%error, "the channels could not be backed up");
                    continue;
                }
            };
            if reopen.saw(&channels) || written.as_ref() != Some(&backup) {
                match self.write(&reopen, backup.clone()) {
                    Ok(()) => written = Some(backup),
                    Err(error) => tracing::error!(%error, "the channel backup was not written"),
                }
            }
            if self.reopen
                && let Some(due) = reopen.due(now(), &balance, &channels)
            {
                self.open(due).await;
            }
            let facts = self.wallet.facts().await.ok();
            let lsp = facts.as_ref().is_some_and(|facts| facts.lsp.is_some());
            height = went_back(height, facts.map_or(height, |facts| facts.height));
            self.tell(&channels, Shortage::all(&balance, &channels, lsp, self.wants.0, self.wants.1), &mut told);
        }
    }

    /// Says what is lacking when it begins to, and when it is mended.
    fn tell(&self, channels: &[Channel], shortages: Vec<Shortage>, told: &mut Vec<&'static str>) {
        // A channel that is being opened or found again is a shortage of seconds.
        if channels.iter().any(|c| !c.usable) {
            return;
        }
        for shortage in &shortages {
            if !told.contains(&shortage.reason()) {
                tracing::warn!(hint = shortage.remedy(), "{shortage}");
            }
        }
        let now: Vec<&'static str> = shortages.iter().map(Shortage::reason).collect();
        for reason in told.iter().filter(|reason| !now.contains(reason)) {
            tracing::info!("the wallet is no longer short: {reason}");
        }
        *told = now;
    }

    async fn open(&self, due: Due) {
        let Due { node, capacity_sat } = due;
        let peers = self.wallet.channel_backup().await.map(|backup| backup.peers).unwrap_or_default();
        let Some(addr) = peers.iter().find(|(key, _)| *key == node).and_then(|(_, addr)| addr.parse().ok()) else {
            tracing::warn!(peer = %node, "a force-closed channel is not opened again: the peer's address is not known");
            return;
        };
        match self.wallet.open_channel(OpenChannel { node, addr, capacity_sat, push: Msat::ZERO }).await {
            Ok(()) => tracing::info!(peer = %node, capacity_sat, "opening a force-closed channel again"),
            Err(error) => {
                tracing::warn!(peer = %node, capacity_sat, %error, "a force-closed channel is not open again yet")
            }
        }
    }

    fn write(&self, reopen: &Reopen, backup: ChannelBackup) -> anyhow::Result<()> {
        let restoring = restore::peek(&self.restoring);
        let file = BackupFile::of(self.network, backup, restoring.as_ref(), reopen);
        let text = serde_json::to_string_pretty(&file)?;
        write(&self.dir.join(BACKUP_FILE), &text)?;
        if let Some(path) = &self.backup {
            write(path, &text)?;
        }
        Ok(())
    }
}

/// Says so where the chain source takes back more blocks than chance does; gives the height to hold the next one against.
fn went_back(before: u32, now: u32) -> u32 {
    let back = before.saturating_sub(now);
    if back > BLOCKS_BACK {
        let hint = "a channel whose funding is gone is closed, and its share comes back if the funding does; compare another chain source";
        tracing::error!(
            before,
            now,
            hint,
            "the chain source takes {back} blocks back: a deep reorganisation, or it lies"
        );
    }
    now
}

pub(crate) fn read(path: &Path) -> Option<BackupFile> {
    let file: BackupFile = serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
    (file.version == VERSION).then_some(file)
}

/// Replaces a file as a whole: whoever reads it reads the old one or the new one. Durable when it returns.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    let new = PathBuf::from(new);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    // The name is durable only when its folder is; a share may know no such call.
    let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) else { return Ok(()) };
    match File::open(dir)?.sync_all() {
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_wallet::embedded::BackedUp;

    #[test]
    fn what_is_backed_up_by_hand_can_be_restored_from() {
        let dir = tempfile::tempdir().unwrap();
        let key = |n: u8| LightningKey([n; 33]);
        let channel = |n: u8| BackedUp {
            channel: n.to_string(),
            counterparty: key(n),
            funding: None,
            capacity_sat: 100_000,
            ours: Msat(5),
        };
        let backup = |n: u8| ChannelBackup {
            node: key(9),
            peers: vec![(key(n), "127.0.0.1:9735".into())],
            channels: vec![channel(n)],
            updates: [(n.to_string(), 4)].into(),
        };
        let restoring = Restoring::of(&backup(1), UnixMs(1));
        let file = BackupFile::of("regtest", backup(2), Some(&restoring), &Reopen::default());
        let path = dir.path().join("by-hand.json");
        write(&path, &serde_json::to_string_pretty(&file).unwrap()).unwrap();
        let back = read(&path).unwrap();
        assert_eq!((back.network.as_str(), back.written_at), ("regtest", file.written_at));
        assert_eq!(back.backup.channels, [channel(2), channel(1)], "what is still to come back stays in it");
        assert_eq!(back.backup.peers.len(), 2);
    }
}
