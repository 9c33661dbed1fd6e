//! Signed tree heads, from time to time and at the end.
//!
//! Each is told to those who have a session here and published where this node lists, no more often than their intervals
//! allow. One that came too soon is not dropped but told later: a consumer who was promised an entry waits for a head that
//! covers it, and holds silence against us.

use crate::drive::provider::Message;
use crate::store::Store;
use ed25519_dalek::SigningKey;
use satgrid_ledger::{journal::Journal, log::SignedCheckpoint};
use satgrid_market_nostr::Publisher;
use satgrid_node::provider::ProviderEvent;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The `d` of this node's published checkpoints.
const LOG_NAME: &str = "journal";
const SIGN_EVERY: Duration = Duration::from_secs(2);
const PUBLISH_EVERY: Duration = Duration::from_secs(60);
/// Far below the two minutes that a consumer waits for a head over what it was promised.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Signs a tree head whenever the journal has grown, so that what was written can no longer be unwritten unseen; and
/// publishes one from time to time where this node lists, and tells it to those who have a session here.
pub(super) async fn sign_checkpoints(
    journal: Store,
    key: SigningKey,
    publisher: Option<Arc<Publisher>>,
    provider: Option<mpsc::Sender<Message>>,
    shutdown: CancellationToken,
) {
    let (mut signed, mut newest): (u64, Option<SignedCheckpoint>) = (0, None);
    let (mut told, mut published) = (Rhythm::every(TELL_EVERY), Rhythm::every(PUBLISH_EVERY));
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(SIGN_EVERY) => {}
        }
        let Ok(head) = journal.head().await else { continue };
        if head.len != signed {
            match journal.checkpoint(&key).await {
                Ok(checkpoint) => {
                    signed = head.len;
                    newest = Some(checkpoint);
                }
                Err(error) => tracing::warn!(%error, "no checkpoint was signed"),
            }
        }
        let Some(checkpoint) = &newest else { continue };
        if let Some(provider) = &provider
            && told.is_due(Instant::now(), checkpoint.size)
        {
            let event = ProviderEvent::TreeHead { note: checkpoint.note().to_owned() };
            let _ = provider.send(Message::Event(event)).await;
        }
        if let Some(publisher) = &publisher
            && published.is_due(Instant::now(), checkpoint.size)
        {
            let _ = publisher.checkpoint(LOG_NAME, checkpoint.note().to_owned()).await;
        }
    }
}

/// Says each size once, and nothing sooner than an interval after what was said last.
struct Rhythm {
    every: Duration,
    said: Option<(Instant, u64)>,
}

impl Rhythm {
    const fn every(every: Duration) -> Rhythm {
        Rhythm { every, said: None }
    }

    fn is_due(&mut self, now: Instant, size: u64) -> bool {
        let due = self.said.is_none_or(|(at, last)| last != size && now.duration_since(at) >= self.every);
        if due {
            self.said = Some((now, size));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_that_came_too_soon_is_said_later_though_nothing_follows_it() {
        let (mut told, began) = (Rhythm::every(TELL_EVERY), Instant::now());
        assert!(told.is_due(began, 4));
        // Two seconds after the last one: not yet, and then once.
        assert!(!told.is_due(began + SIGN_EVERY, 9));
        assert!(told.is_due(began + TELL_EVERY, 9));
        assert!(!told.is_due(began + TELL_EVERY * 3, 9));
        assert!(told.is_due(began + TELL_EVERY * 3, 10));
    }
}
