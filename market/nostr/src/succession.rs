//! Keys that were given up, told to relays and asked of them. Hearing of others' is the [`crate::Subscriber`]'s part.

use crate::relays::{RelayConfig, Relays, StartError};
use nostr_sdk::{Event, Filter, JsonUtil, Kind, PublicKey};
use satgrid_types::{NostrEvent, NostrKey, SUCCESSION_KIND, SignedSuccession, Succession, Verified, verify_succession};
use std::time::Duration;

/// What came of telling the relays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Relays that have every one of the events.
    pub taken: Vec<String>,
    /// The others, with what went wrong.
    pub missed: Vec<(String, String)>,
}

/// Brings events to every relay, once; those that have them already count as told.
pub async fn tell(config: &RelayConfig, events: &[NostrEvent], within: Duration) -> Result<Told, StartError> {
    let relays = Relays::connect(config, None, None).await?;
    relays.client.wait_for_connection(within).await;
    let mut told = Told::default();
    for relay in &relays.all {
        let url = relay.url().to_string();
        let mut missed = None;
        for event in events {
            let sent = match Event::from_json(event.to_json()) {
                Ok(event) => match tokio::time::timeout(within, relay.send_event(&event)).await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err(format!("no answer within {} s", within.as_secs())),
                },
                Err(error) => Err(error.to_string()),
            };
            missed = missed.or(sent.err().filter(|error| !error.contains("duplicate:")));
        }
        match missed {
            None => told.taken.push(url),
            Some(error) => told.missed.push((url, error)),
        }
    }
    relays.client.shutdown().await;
    Ok(told)
}

/// The successions that relays have by these authors: the signed ones that verify, in no order.
pub async fn ask(
    config: &RelayConfig,
    authors: &[NostrKey],
    within: Duration,
) -> Result<Vec<(SignedSuccession, Verified<Succession>)>, StartError> {
    let relays = Relays::connect(config, None, None).await?;
    relays.client.wait_for_connection(within).await;
    let authors = authors.iter().filter_map(|key| PublicKey::from_slice(&key.0).ok());
    let filter = Filter::new().kind(Kind::Custom(SUCCESSION_KIND)).authors(authors);
    let found = relays.client.fetch_events(filter, within).await;
    relays.client.shutdown().await;
    let events = found.map_err(|error| StartError::Client(error.to_string()))?;
    let read = |event: Event| verify_succession(&NostrEvent::from_json(&event.as_json()).ok()?).ok();
    Ok(events.into_iter().filter_map(read).collect())
}
