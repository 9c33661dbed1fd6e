//! One seed, one running node: whoever starts looks for another's sign of life, and gives its own.
//!
//! Two nodes on one seed would sign as one and publish old channel states against each other. A lock keeps a second one
//! off the same folder; this keeps a copy of the folder, or the same words on another machine, from running beside it.
//!
//! | the newest sign is | a start means |
//! |---|---|
//! | none, or older than [`STALE_S`] | it may run |
//! | its own (same folder on the same machine), however old | it was restarted |
//! | "stopped" | the other one ended in order |
//! | from the future, by more than clocks may differ | as above; where it may run, that sign is taken back: it would outlast ours |
//! | another's, and fresh | refused |
//!
//! Relays that do not answer refuse nobody: a node must be able to start when they are down. It is a guard against a
//! mistake, not against an enemy, who would not publish.

use crate::ahead;
use crate::relays::{RelayConfig, Relays, StartError};
use nostr_sdk::{EventBuilder, Filter, Keys, Kind, SecretKey, Tag, Timestamp};
use secp256k1::Keypair;
use std::time::Duration;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

/// Application data, addressable (NIP-78).
const KIND: Kind = Kind::Custom(30_078);
const NAME: &str = "satgrid-heartbeat";
const BEAT_EVERY: Duration = Duration::from_secs(30);
/// A sign older than this is of a node that is gone.
pub const STALE_S: u64 = 100;
const _: () = assert!(STALE_S > 3 * BEAT_EVERY.as_secs());
const LOOK_WITHIN: Duration = Duration::from_secs(3);
const STOPPED: &str = "stopped";

#[derive(Debug, Error)]
pub enum HeartbeatError {
    #[error("another node runs on this seed: it gave a sign of life {ago_s} s ago")]
    Elsewhere { ago_s: u64 },
    #[error(transparent)]
    Relays(#[from] StartError),
}

/// Refuses where another instance lives; else gives this one's sign until the shutdown, and then says that it stopped.
pub async fn claim(
    config: &RelayConfig,
    keys: Keypair,
    instance: String,
    shutdown: CancellationToken,
) -> Result<tokio::task::JoinHandle<()>, HeartbeatError> {
    // A key pair's secret is a secret key.
    let Ok(secret) = SecretKey::from_slice(&keys.secret_bytes()) else {
        return Err(StartError::Client("the Nostr key is none".into()).into());
    };
    let keys = Keys::new(secret);
    let relays = Relays::connect(config, Some(keys.clone()), None).await?;
    let client = relays.client;
    client.wait_for_connection(LOOK_WITHIN).await;
    let ours = Filter::new().kind(KIND).author(keys.public_key()).identifier(NAME).limit(1);
    let found = client.fetch_events(ours, LOOK_WITHIN).await.ok();
    let newest = found.and_then(|events| events.into_iter().max_by_key(|event| event.created_at));
    if let Some(event) = newest {
        let ago_s = Timestamp::now().as_secs().saturating_sub(event.created_at.as_secs());
        if refuses(&event.content, &instance, ago_s) {
            client.shutdown().await;
            return Err(HeartbeatError::Elsewhere { ago_s });
        }
        for relay in &relays.all {
            ahead::take_back(relay, &keys, Filter::new().kind(KIND).identifier(NAME)).await;
        }
    }
    Ok(tokio::spawn(async move {
        loop {
            beat(&client, &keys, &instance).await;
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = tokio::time::sleep(BEAT_EVERY) => {}
            }
        }
        // A relay keeps the first of two events of one second.
        tokio::time::sleep(Duration::from_secs(1)).await;
        beat(&client, &keys, STOPPED).await;
        client.shutdown().await;
    }))
}

fn refuses(content: &str, instance: &str, ago_s: u64) -> bool {
    content != STOPPED && content != instance && ago_s < STALE_S
}

async fn beat(client: &nostr_sdk::Client, keys: &Keys, content: &str) {
    let event = EventBuilder::new(KIND, content).tag(Tag::identifier(NAME)).sign_with_keys(keys);
    if let Ok(event) = event
        && let Err(error) = client.send_event(&event).await
    {
        tracing::debug!(%error, "no relay took the sign of life");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_fresh_sign_of_another_refuses() {
        let check =
            |content: &str, ago_s, expect| assert_eq!(refuses(content, "me", ago_s), expect, "{content} {ago_s}");
        check("me", 0, false);
        check("other", 0, true);
        check("other", STALE_S - 1, true);
        check("other", STALE_S, false);
        check(STOPPED, 0, false);
    }
}
