//! Lost channels, until each has come back: peers are asked to close them, closings are looked for, shares are swept.
//!
//! What to do stands in `restoring.json` below the node's folder, which `satgrid wallet restore` writes. It is written
//! anew at every change, and becomes `restored.json` when all is over. Neither holds a secret.

use super::{channels::write, journal::JournalWriter};
use anyhow::Context;
use satgrid_ledger::entry::{Draft, Evidence};
use satgrid_types::LightningKey;
use satgrid_wallet::{
    Embedded,
    restore::{LostState, Restoring, Seen},
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

pub(crate) const FILE: &str = "restoring.json";
pub(crate) const DONE_FILE: &str = "restored.json";
/// Between two rounds over the lost channels.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The restore under way, for whoever shows it or writes backups.
pub(crate) type Shared = Arc<Mutex<Option<Restoring>>>;

pub(crate) fn peek(restoring: &Shared) -> Option<Restoring> {
    restoring.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The restore that this folder knows of, over or not.
pub(crate) fn read(dir: &Path) -> anyhow::Result<Option<Restoring>> {
    for name in [FILE, DONE_FILE] {
        let path = dir.join(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let read: Restoring = serde_json::from_str(&text)
            .with_context(|| format!("{} is not what this version wrote", path.display()))?;
        return Ok(Some(read));
    }
    Ok(None)
}

/// Writes it down; whatever a former one knew is in it already.
pub(crate) fn save(dir: &Path, restoring: &Restoring) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(restoring)?;
    let (path, done) = (dir.join(FILE), dir.join(DONE_FILE));
    if restoring.is_over() {
        write(&done, &text).with_context(|| format!("cannot write {}", done.display()))?;
        let _ = std::fs::remove_file(path);
        return Ok(());
    }
    write(&path, &text).with_context(|| format!("cannot write {}", path.display()))
}

/// What backups have seen of the channels, for the guard; without what a restore gave up.
pub(crate) fn seen(backups: &[PathBuf], restored: Option<&Restoring>) -> Vec<Seen> {
    let all = backups.iter().filter_map(|path| {
        let Some(file) = super::channels::read(path) else {
            if path.exists() {
                let path = path.display();
                tracing::error!(%path, "this channel backup cannot be read: whether the channels here are old is not held against it");
            }
            return None;
        };
        Some(Seen { by: path.display().to_string(), updates: file.backup.updates })
    });
    all.map(|seen| restored.map_or(seen.clone(), |restored| restored.allow(seen))).collect()
}

pub(crate) struct Restorer {
    pub wallet: Arc<dyn Embedded>,
    pub journal: JournalWriter,
    pub dir: PathBuf,
    pub shared: Shared,
    pub shutdown: CancellationToken,
}

impl Restorer {
    pub(crate) async fn run(self) {
        let Some(mut restoring) = peek(&self.shared).filter(|restoring| !restoring.is_over()) else { return };
        let channels = restoring.open().count();
        tracing::warn!(channels, "restoring: peers are asked to close the channels whose state is lost");
        let mut look = tokio::time::interval(LOOK_EVERY);
        while !restoring.is_over() {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                _ = look.tick() => {}
            }
            if self.round(&mut restoring).await
                && let Err(error) = save(&self.dir, &restoring)
            {
                tracing::error!(%error, "how far the restore is was not written");
            }
            *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(restoring.clone());
        }
        tracing::info!(channels, "restored: every lost channel is over; `satgrid wallet balance` shows what came back");
    }

    /// Whether anything changed.
    async fn round(&self, restoring: &mut Restoring) -> bool {
        let mut changed = false;
        for lost in restoring.lost.iter_mut().filter(|lost| !lost.state.is_over()) {
            let (id, peer): (&str, LightningKey) = (&lost.channel.channel, lost.channel.counterparty);
            if lost.state == LostState::Asked
                && let Some(address) = &lost.address
                && let Err(error) = self.wallet.ask_peer(peer, address).await
            {
                tracing::warn!(channel = id, %peer, address, %error, "the peer of a lost channel is not reached");
            }
            let state = match self.wallet.recover(&lost.channel).await {
                Ok(state) => state,
                Err(error) => {
                    tracing::warn!(channel = id, %error, "a lost channel was not looked at");
                    continue;
                }
            };
            if state == lost.state {
                continue;
            }
            tracing::info!(channel = id, %state, "a lost channel");
            if lost.state == LostState::Asked {
                let reason = format!("its state was lost; {state}");
                let evidence = Evidence::ChannelClosed { channel: id.to_owned(), reason, force: true };
                if self.journal.append(vec![Draft::of(evidence)]).await.is_err() {
                    continue;
                }
            }
            lost.state = state;
            changed = true;
        }
        changed
    }
}
