//! Events of ours that are dated ahead: made while this machine's clock was wrong.
//!
//! A relay keeps the newest event of a place, so one of tomorrow keeps out every one of today: a provider whose clock was
//! once a day ahead could not be found for a day after it was set right. They are taken back (NIP-09), each by its id, and
//! nothing else of this key is touched. A relay that does not do as it is asked keeps them until their day.

use std::time::Duration;

use nostr_sdk::nips::nip09::EventDeletionRequest;
use nostr_sdk::pool::relay::ReqExitPolicy;
use nostr_sdk::{EventBuilder, Filter, Keys, Relay, Timestamp};
use satgrid_types::MAX_CLOCK_SKEW_S;

const LOOK_WITHIN: Duration = Duration::from_secs(3);
/// No node publishes more.
const MOST: usize = 512;

/// Takes back what this relay has of `ours` and is dated ahead. Best effort: says nothing where the relay does not answer.
pub(crate) async fn take_back(relay: &Relay, keys: &Keys, ours: Filter) {
    let latest = Timestamp::now() + Duration::from_secs(MAX_CLOCK_SKEW_S);
    let ours = ours.author(keys.public_key()).since(latest).limit(MOST);
    let Ok(found) = relay.fetch_events(ours, LOOK_WITHIN, ReqExitPolicy::ExitOnEOSE).await else { return };
    // A relay may send what was not asked for.
    let ahead = found.into_iter().filter(|event| event.pubkey == keys.public_key() && event.created_at > latest);
    let (ids, dates): (Vec<_>, Vec<_>) = ahead.map(|event| (event.id, event.created_at)).unzip();
    let Some(newest) = dates.into_iter().max() else { return };
    let ahead_s = newest.as_secs().saturating_sub(Timestamp::now().as_secs());
    tracing::warn!(
        relay = %relay.url(), events = ids.len(), ahead_s,
        "the relay has events of ours from the future: this clock was ahead, or is behind now; they are taken back"
    );
    let request = EventDeletionRequest::new().ids(ids).reason("dated ahead by a wrong clock");
    // Some relays let a deletion take only what is not newer than itself.
    let Ok(event) = EventBuilder::delete(request).custom_created_at(newest).sign_with_keys(keys) else { return };
    if let Err(error) = relay.send_event(&event).await {
        tracing::warn!(relay = %relay.url(), %error, "they stay there until their day");
    }
}
