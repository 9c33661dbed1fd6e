//! Room on the disk: with little left, no new work is taken, so that what runs can still be written down to its end; and
//! after the journal found the disk full, tells when there is room to start anew.

use super::{consumer, provider};
use crate::models::free_bytes;
use satgrid_node::{consumer::ConsumerEvent, provider::ProviderEvent};
use std::{path::PathBuf, time::Duration};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// How often the disk is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Where a node writes, and how much must be free there.
#[derive(Debug, Clone)]
pub(crate) struct Space {
    pub folders: Vec<PathBuf>,
    pub least_bytes: u64,
}

impl Space {
    /// Where there is too little room, and why no new work should be taken; none where there is enough. What is paused needs a
    /// quarter more to go on. Peers and clients hear the reason, so it does not name the place.
    fn lacking(&self, paused: bool) -> Option<(String, String)> {
        let wanted = if paused { self.least_bytes.saturating_add(self.least_bytes / 4) } else { self.least_bytes };
        let lacking = self.folders.iter().find_map(|folder| {
            // A folder that cannot be looked at says nothing; writing to it will.
            let free = free_bytes(folder).ok()?;
            (free < wanted).then(|| (folder.display().to_string(), free))
        });
        lacking.map(|(folder, free)| {
            const MIB: u64 = 1024 * 1024;
            let (free, wanted) = (free / MIB, wanted / MIB);
            (folder, format!("{free} MiB are free on this node's disk, {wanted} are wanted (node.min_free_mib)"))
        })
    }

    /// Tells both roles when room runs out and when it is back, until the node stops.
    pub(crate) async fn watch(
        self,
        provider: Option<mpsc::Sender<provider::Message>>,
        consumer: Option<mpsc::Sender<consumer::Message>>,
        shutdown: CancellationToken,
    ) {
        let mut paused = false;
        loop {
            let lacking = self.lacking(paused);
            if lacking.is_some() != paused {
                paused = lacking.is_some();
                match &lacking {
                    Some((folder, reason)) => {
                        tracing::warn!(%folder, %reason, "no new work is taken: the disk is nearly full");
                    }
                    None => tracing::info!("the disk has room again: work is taken"),
                }
                let lacking = lacking.map(|(_, reason)| reason);
                if let Some(provider) = &provider {
                    let event = ProviderEvent::Paused(lacking.clone());
                    let _ = provider.send(provider::Message::Event(event)).await;
                }
                if let Some(consumer) = &consumer {
                    let _ = consumer.send(consumer::Message::Event(ConsumerEvent::Paused(lacking))).await;
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Whether less is free than is wanted.
    pub(crate) fn is_full(&self) -> bool {
        self.lacking(false).is_some()
    }

    /// Resolves once there is room.
    pub(crate) async fn back(&self) {
        while self.lacking(true).is_some() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Resolves once the journal has found the disk full and there is room again.
    pub(crate) async fn back_after(self, mut full: watch::Receiver<bool>) {
        if full.wait_for(|full| *full).await.is_err() {
            return std::future::pending().await;
        }
        self.back().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_paused_goes_on_with_a_quarter_more() {
        let folder = tempfile::tempdir().unwrap();
        let free = free_bytes(folder.path()).unwrap();
        let space = |least_bytes| Space { folders: vec![folder.path().into()], least_bytes };
        assert!(space(0).lacking(true).is_none());
        assert!(space(free.saturating_mul(2)).lacking(false).unwrap().1.contains("node.min_free_mib"));
        let just = space(free / 10 * 9);
        assert!(just.lacking(false).is_none() && just.lacking(true).is_some());
    }

    #[tokio::test]
    async fn a_node_is_not_restarted_where_the_disk_was_never_full() {
        let space = Space { folders: Vec::new(), least_bytes: 1 };
        let (tell, full) = watch::channel(false);
        let back = tokio::spawn(space.back_after(full));
        tokio::task::yield_now().await;
        assert!(!back.is_finished());
        tell.send_replace(true);
        back.await.unwrap();
    }
}
