//! Signed tree heads, from time to time and at the end.

use ed25519_dalek::SigningKey;
use satgrid_ledger::journal::Journal;
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_market_nostr::Publisher;
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// The `d` of this node's published checkpoints.
const LOG_NAME: &str = "journal";

/// Signs a tree head whenever the journal has grown, so that what was written can no longer be unwritten unseen; and
/// publishes one from time to time where this node lists.
pub(super) async fn sign_checkpoints(
    journal: Arc<SqliteJournal>,
    key: SigningKey,
    publisher: Option<Arc<Publisher>>,
    shutdown: CancellationToken,
) {
    const EVERY: Duration = Duration::from_secs(2);
    const PUBLISH_EVERY: Duration = Duration::from_secs(60);
    let (mut signed, mut published): (u64, Option<tokio::time::Instant>) = (0, None);
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
