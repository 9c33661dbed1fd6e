//! A chain over HTTP on one loopback port: `POST /` is bitcoind's JSON-RPC, every other path is Esplora's.
//!
//! Anyone who reaches the port may mine, so it listens on loopback only and says so when asked for more.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::chain::{Shared, lock, shared};
use crate::electrum::serve_electrum;
use crate::{esplora, rpc};

/// Largest request body: the heaviest relayed transaction as hex, and its JSON around it.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// A chain that is being served. It stops when this is dropped.
#[must_use = "the server stops when this is dropped"]
pub struct ChainServer {
    addr: SocketAddr,
    task: JoinHandle<()>,
}

impl ChainServer {
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Base of the Esplora paths, and the place to POST JSON-RPC to.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

impl Drop for ChainServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves `chain` at `addr`; port 0 takes a free one.
///
/// Errors: `InvalidInput` for an address that is not loopback, else whatever binding the port said.
pub async fn serve(chain: Shared, addr: SocketAddr) -> io::Result<ChainServer> {
    let listener = bind(addr).await?;
    let addr = listener.local_addr()?;
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(chain)).await {
            tracing::error!(%error, "the chain's HTTP server ended");
        }
    });
    Ok(ChainServer { addr, task })
}

/// Runs a fresh chain at `addr` until `shutdown` resolves, and tells `ready` where it listens. Electrum's clients are
/// served at `electrum`, if that is given; whoever asks for a fee rate is told `sat_per_vb`.
pub async fn run_chain(
    addr: SocketAddr,
    electrum: Option<SocketAddr>,
    sat_per_vb: u32,
    ready: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let listener = bind(addr).await?;
    let addr = listener.local_addr()?;
    tracing::info!(%addr, "regtest chain: Esplora and bitcoind's JSON-RPC");
    let chain = shared();
    lock(&chain).set_estimate(sat_per_vb);
    let _electrum = match electrum {
        Some(addr) => Some(serve_electrum(chain.clone(), addr).await?),
        None => None,
    };
    ready(addr);
    axum::serve(listener, router(chain)).with_graceful_shutdown(shutdown).await
}

pub(crate) async fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    if !addr.ip().is_loopback() {
        let message = format!("{addr} is not a loopback address; anyone who reaches this chain may mine on it");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    TcpListener::bind(addr).await
}

fn router(chain: Shared) -> Router {
    esplora::routes().merge(rpc::routes()).layer(DefaultBodyLimit::max(MAX_BODY_BYTES)).with_state(chain)
}

/// Unix time in seconds, as block headers have it.
pub(crate) fn now_s() -> u32 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(elapsed.as_secs()).unwrap_or(u32::MAX)
}
