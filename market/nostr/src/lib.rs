//! The market over Nostr relays: publish this node's listings, hear those of others.
//!
//! - [`Publisher`] signs listings and checkpoints, gives each an expiry, renews it at half of its life, and brings it to
//!   every relay: again after a reconnection, and for as long as it takes where a relay is down.
//! - [`Subscriber`] listens on several relays at once, verifies what comes ([`satgrid_types::verify_listing`]) and hands
//!   out `VerifiedListing`s. Everything else is counted by reason and forgotten.
//! - [`succession`] tells relays which key of this node's gave way to which, and asks them.
//!
//! What this room never does: decide whether a listing is wanted (that is `market`'s), or trust a relay. A relay may lie,
//! repeat, withhold and reorder; all that it can achieve is that a listing is not seen.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]

mod ahead;
pub mod heartbeat;
mod outbox;
mod publisher;
mod relays;
mod schedule;
mod subscriber;
pub mod succession;
mod tap;
#[cfg(test)]
mod tests;

pub use outbox::OfferError;
pub use publisher::{Publisher, PublisherConfig, PublisherStopped};
pub use relays::{RelayConfig, RelayHealth, StartError};
pub use schedule::{MAX_LIFETIME, MIN_LIFETIME};
pub use subscriber::{Subscriber, SubscriberConfig, Succeeded};
