//! Relays: a client that stays connected, and what it hears.

use nostr_sdk::prelude::{Client, Event, Filter, Kind, RelayOptions, RelayPoolNotification, RelayUrl, SubscriptionId};
use std::{collections::VecDeque, time::Duration};
use tokio::sync::mpsc;

const RETRY: Duration = Duration::from_secs(5);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Events that wait to be read.
const INBOX: usize = 256;
/// Relays repeat themselves; so many events are remembered.
const SEEN: usize = 2_048;

/// Connects; relays that do not answer are tried again in the background.
pub(crate) async fn connect(relays: &[RelayUrl]) -> Result<Client, String> {
    let client = Client::default();
    for relay in relays {
        let options = RelayOptions::new().retry_interval(RETRY).adjust_retry_interval(false);
        client.pool().add_relay(relay.clone(), options).await.map_err(|e| format!("{relay}: {e}"))?;
    }
    client.connect().await;
    client.wait_for_connection(CONNECT_WITHIN).await;
    Ok(client)
}

/// Every event of these kinds that a subscription brings from now on, each once. Call it before subscribing, so that
/// nothing is missed: what is said over these relays is kept by none.
pub(crate) fn hear(client: &Client, kinds: Vec<Kind>) -> mpsc::Receiver<Event> {
    let mut heard = client.notifications();
    let (to, inbox) = mpsc::channel(INBOX);
    tokio::spawn(async move {
        let (mut seen, mut order) = (std::collections::BTreeSet::new(), VecDeque::new());
        loop {
            match heard.recv().await {
                Ok(RelayPoolNotification::Event { event, .. }) => {
                    let fits = kinds.contains(&event.kind) && event.verify().is_ok();
                    if !fits || !seen.insert(event.id) {
                        continue;
                    }
                    order.push_back(event.id);
                    if order.len() > SEEN
                        && let Some(oldest) = order.pop_front()
                    {
                        seen.remove(&oldest);
                    }
                    if to.send(*event).await.is_err() {
                        return;
                    }
                }
                Ok(RelayPoolNotification::Message { .. }) => {}
                Ok(RelayPoolNotification::Shutdown) => return,
                Err(tokio::sync::broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "wallet connect: relays sent more than was read");
                }
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
            }
        }
    });
    inbox
}

/// Asks the relays for these events; gives the subscription.
pub(crate) async fn subscribe(client: &Client, filter: Filter) -> Result<SubscriptionId, String> {
    client.subscribe(filter, None).await.map(|asked| asked.val).map_err(|e| e.to_string())
}
