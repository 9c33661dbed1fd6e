//! Signed tree heads, from time to time and at the end.

use crate::drive::provider::Message;
use crate::store::Store;
use ed25519_dalek::SigningKey;
use satgrid_ledger::journal::Journal;
use satgrid_market_nostr::Publisher;
use satgrid_node::provider::ProviderEvent;
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The `d` of this node's published checkpoints.
const LOG_NAME: &str = "journal";

/// Signs a tree head whenever the journal has grown, so that what was written can no longer be unwritten unseen; and
/// publishes one from time to time where this node lists, and tells it to those who have a session here.
pub(super) async fn sign_checkpoints(
    journal: Store,
    key: SigningKey,
    publisher: Option<Arc<Publisher>>,
    provider: Option<mpsc::Sender<Message>>,
    shutdown: CancellationToken,
) {
    const EVERY: Duration = Duration::from_secs(2);
    const PUBLISH_EVERY: Duration = Duration::from_secs(60);
    const TELL_EVERY: Duration = Duration::from_secs(10);
    let (mut signed, mut published): (u64, Option<tokio::time::Instant>) = (0, None);
    let mut told: Option<tokio::time::Instant> = None;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let Ok(head) = journal.head().await else { continue };
        if head.len == signed {
            continue;
        }
        match journal.checkpoint(&key).await {
            Ok(checkpoint) => {
                signed = head.len;
                if let (true, Some(provider)) = (told.is_none_or(|at| at.elapsed() >= TELL_EVERY), &provider) {
                    told = Some(tokio::time::Instant::now());
                    let event = ProviderEvent::TreeHead { note: checkpoint.note().to_owned() };
                    let _ = provider.send(Message::Event(event)).await;
                }
                let due = published.is_none_or(|at| at.elapsed() >= PUBLISH_EVERY);
                if let (true, Some(publisher)) = (due, &publisher) {
                    published = Some(tokio::time::Instant::now());
                    let _ = publisher.checkpoint(LOG_NAME, checkpoint.note().to_owned()).await;
                }
            }
            Err(error) => tracing::warn!(%error, "no checkpoint was signed"),
        }
    }
}
