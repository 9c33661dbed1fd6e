//! A real Nostr relay for the market on one machine.
//!
//! It checks ids and signatures, replaces addressable events and honours NIP-40 as any relay does; it forgets
//! everything when it stops. Its limit on notes is raised, since every node of the demo comes from one address.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use nostr_relay_builder::builder::{RateLimit, RelayBuilder};
use nostr_relay_builder::local::LocalRelay;
use tokio::net::TcpListener;

/// Events that one connection may publish in a minute.
const NOTES_PER_MINUTE: u32 = 6_000;
/// Open subscriptions of one connection.
const MAX_SUBSCRIPTIONS: usize = 64;
/// Connections at once.
const MAX_CONNECTIONS: usize = 256;
/// Events in one answer.
const MAX_EVENTS_PER_FILTER: usize = 5_000;
/// How long a port that was just given back may stay busy before we call it taken.
const BIND_PATIENCE: Duration = Duration::from_millis(500);

/// Why the relay could not start.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("{0} is not a loopback address; this relay lets anyone write")]
    NotLoopback(SocketAddr),
    #[error("cannot listen on {addr}: {source}")]
    Listen { addr: SocketAddr, source: std::io::Error },
    #[error("relay: {0}")]
    Relay(#[from] nostr_relay_builder::Error),
}

/// A relay that is being served. It stops when this is dropped.
#[must_use = "the relay stops when this is dropped"]
pub struct RelayServer {
    relay: LocalRelay,
    addr: SocketAddr,
}

impl RelayServer {
    /// Starts a relay at `addr`; port 0 takes a free one.
    pub async fn start(addr: SocketAddr) -> Result<Self, RelayError> {
        if !addr.ip().is_loopback() {
            return Err(RelayError::NotLoopback(addr));
        }
        let addr = probe(addr).await?;
        let builder = RelayBuilder::default()
            .addr(addr.ip())
            .port(addr.port())
            .rate_limit(RateLimit { max_reqs: MAX_SUBSCRIPTIONS, notes_per_minute: NOTES_PER_MINUTE })
            .max_connections(MAX_CONNECTIONS)
            .max_filter_limit(MAX_EVENTS_PER_FILTER)
            .default_filter_limit(MAX_EVENTS_PER_FILTER);
        let relay = LocalRelay::new(builder);
        relay.run().await?;
        Ok(Self { relay, addr })
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `ws://` and the address.
    pub fn url(&self) -> String {
        format!("ws://{}", self.addr)
    }
}

impl Drop for RelayServer {
    fn drop(&mut self) {
        self.relay.shutdown();
    }
}

/// Starts a relay on a loopback port; 0 takes a free one.
pub async fn serve_relay(port: u16) -> Result<RelayServer, RelayError> {
    RelayServer::start(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)).await
}

/// Runs a relay at `addr` until `shutdown` resolves, and tells `ready` where it listens.
pub async fn run_relay(
    addr: SocketAddr,
    ready: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()>,
) -> Result<(), RelayError> {
    let server = RelayServer::start(addr).await?;
    tracing::info!(addr = %server.addr(), "Nostr relay");
    ready(server.addr());
    shutdown.await;
    Ok(())
}

/// Finds out whether `addr` can be bound, and which port 0 stands for.
///
/// The relay binds by itself and names no port in its error, so we try first. A relay that was dropped a moment ago
/// closes its port in its own time, hence the patience.
async fn probe(addr: SocketAddr) -> Result<SocketAddr, RelayError> {
    let deadline = tokio::time::Instant::now() + BIND_PATIENCE;
    loop {
        match TcpListener::bind(addr).await.and_then(|listener| listener.local_addr()) {
            Ok(found) => return Ok(found),
            Err(_) if tokio::time::Instant::now() < deadline => tokio::time::sleep(BIND_PATIENCE / 20).await,
            Err(source) => return Err(RelayError::Listen { addr, source }),
        }
    }
}
