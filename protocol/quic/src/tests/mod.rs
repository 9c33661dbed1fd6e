//! Two real endpoints on loopback, and the ways in which the other end can misbehave.

mod artefact;
mod death;
mod frames;
mod handshake;
mod sim;

use crate::{FrameStream, Limits, Link, QuicEndpoint, StreamKind};
use core::time::Duration;
use ed25519_dalek::SigningKey;
use std::net::SocketAddr;
use tokio_util::sync::CancellationToken;

pub(super) const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
/// More than any step on loopback takes, so that a broken test ends.
pub(super) const SOON: Duration = Duration::from_secs(20);

pub(super) fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}
pub(super) const PROVIDER: u8 = 1;
pub(super) const SESSION: u8 = 2;

pub(super) fn provider(limits: Limits) -> QuicEndpoint {
    QuicEndpoint::bind(LOOPBACK, key(PROVIDER), limits, &CancellationToken::new()).unwrap()
}
pub(super) fn consumer(limits: Limits) -> QuicEndpoint {
    QuicEndpoint::bind_client(LOOPBACK, limits, &CancellationToken::new()).unwrap()
}

/// Both ends of one link.
pub(super) struct Pair {
    pub provider: QuicEndpoint,
    pub consumer: QuicEndpoint,
    pub server: Link,
    pub client: Link,
}

impl Pair {
    pub(super) async fn new() -> Pair {
        Pair::with(Limits::default(), Limits::default()).await
    }
    pub(super) async fn with(provider_limits: Limits, consumer_limits: Limits) -> Pair {
        let (provider, consumer) = (provider(provider_limits), consumer(consumer_limits));
        let client = connect(&consumer, &provider, SESSION).await;
        let server = soon(provider.accept()).await.unwrap();
        Pair { provider, consumer, server, client }
    }
    /// One request stream, seen from the consumer and from the provider; the provider has read the frame "open".
    pub(super) async fn stream(&self) -> (FrameStream, FrameStream) {
        let mut near = self.client.open(StreamKind::Request).await.unwrap();
        near.tx.send(b"open").await.unwrap();
        let mut far = soon(self.server.accept()).await.unwrap();
        assert_eq!(soon(far.rx.recv()).await.unwrap().unwrap(), b"open");
        (near, far)
    }
}

pub(super) async fn connect(consumer: &QuicEndpoint, provider: &QuicEndpoint, session: u8) -> Link {
    let hint = provider.local_addr().unwrap().into();
    let expected = satgrid_types::node_key(&key(PROVIDER));
    soon(consumer.connect(&[hint], expected, &key(session))).await.unwrap()
}

pub(super) async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(SOON, future).await.expect("takes too long")
}
