//! Frames between two nodes over QUIC: endpoint, identity, links.
//!
//! The one technology here is QUIC (quinn, rustls). A [`QuicEndpoint`] owns a UDP socket; a [`Link`] is one connection
//! to a peer whose ed25519 key TLS has proved; a [`FrameStream`] is one bidirectional stream of length-prefixed frames.
//! The consumer opens the connection with its session key, one control stream, one stream per request and one per
//! artefact download. The provider opens nothing.
//!
//! What a frame means is `satgrid-protocol`'s business: this room never looks inside one, except in [`artefact`],
//! whose blobs are verified against their hash while they arrive. It decides nothing about money, keeps no session
//! across connections and never reconnects by itself.
//!
//! Everything that a peer can make this room hold or wait for has a bound in [`Limits`]. Errors are sorted by fault
//! ([`LinkError::fault`]), since that decides between a penalty, a retry and a bug report.
//!
//! On the wire, in this order: QUIC v1 with ALPN `satgrid/1` and raw ed25519 keys both ways (RFC 7250); on each
//! bidirectional stream one byte from the consumer, the [`StreamKind`]; then, in each direction, frames of a u32
//! big-endian length and as many bytes. One-way streams, datagrams, 0-RTT and resumption are off. Why a connection was
//! closed or a stream cancelled is a [`Code`], and for connections a text beside it.
//!
//! ```text
//! consumer                                                provider
//! QuicEndpoint::bind_client                               QuicEndpoint::bind
//!   .connect(hints, expected key, session key) ---------->  .accept() -> Link { peer: session key }
//! Link::open(StreamKind::Control) ----------------------> Link::accept() -> FrameStream { kind: Control, .. }
//! tx.send / rx.recv  <----------------------------------> rx.recv / tx.send
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]

mod addr;
mod admission;
pub mod artefact;
mod code;
mod endpoint;
mod error;
mod identity;
mod limits;
mod link;
mod queue;
mod stream;

pub use addr::{AddressError, AddressHint, HintError, MAX_ADDRESSES, MAX_HINTS, Reach, hints, resolve};
pub use code::Code;
pub use endpoint::{Attempt, AttemptError, BindError, ConnectError, QuicEndpoint};
pub use error::{Fault, LinkError, Violation, Waiting};
pub use identity::{IdentityError, parse_public_key};
pub use limits::{Limits, LimitsError};
pub use link::{Link, PathInfo, StreamKind};
pub use queue::{FrameQueue, QueueError};
pub use stream::{FrameReceiver, FrameSender, FrameStream};

#[cfg(test)]
mod tests;
