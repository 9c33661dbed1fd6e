//! The embedded Lightning node behind the wallet's port: ldk-node, with its keys from satgrid's seed.
//!
//! This room speaks to ldk-node and to nothing else. It decides nothing about money: what to pay, whether to pay again
//! and what goes into the books is decided in `satgrid-wallet` and above. It keeps an operator's promises instead: one
//! process per store, files that only their owner can read, a balance cap, a log of its own, a clean stop.
//!
//! What an operator has to know about ldk-node 0.7.1:
//!
//! - Killed (`kill -9`) in mid-payment it may force-close its channels at the next start (reported as
//!   [`satgrid_wallet::WalletEvent::ChannelClosed`] with `forced`). The channel's share comes back after the close's
//!   delay; an amount below the dust limit that was in flight goes to the miners. So the daemon runs it in a process of
//!   its own ([`process`], `docs/adr/0012`) that stops cleanly when whoever uses it dies.
//! - After a restart of either side, a channel is usable when the peers have connected again, which it tries once a
//!   minute: the side that wants to pay calls [`LdkWallet::ensure_connected`].
//! - Both ends must have seen about the same blocks: a payer that is dozens of blocks behind offers a timeout that the
//!   payee rejects. After mining many blocks at once, `sync()` every wallet.
//! - It needs tokio's multi-thread runtime, for as long as the node lives: `stop()` before the runtime ends.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]
#![warn(clippy::float_arithmetic, clippy::cast_possible_truncation)]

mod balance;
mod chain;
mod cold;
mod config;
mod draft;
mod embedded;
mod log;
mod port;
pub mod process;
mod recover;
mod start;
mod store;
mod translate;

pub use chain::Chain;
pub use cold::{Cold, ColdAddress, ColdBalance, ColdDraft, ColdError, ColdKeys};
pub use config::{ChainSource, LdkConfig, LogLevel, Lsp, LspService, MAINNET_CAP_SAT};
pub use process::{Program, WalletProcess};
pub use recover::{Rehearsed, node_id, rehearse};
pub use start::StartError;
pub use store::put_aside;

use ldk_node::Node;
use satgrid_types::LightningKey;
use satgrid_wallet::{ChannelError, Lightning, Network, WalletError, keys::Seed};
use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::watch;

/// How long [`LdkWallet::ensure_connected`] waits for channels to be usable once the peer is connected.
const USABLE_WITHIN: Duration = Duration::from_secs(10);
const USABLE_POLL: Duration = Duration::from_millis(20);

/// A running Lightning node. One task reads its events; any number may call the rest.
///
/// Dropping it without [`stop`](Lightning::stop) stops it too, but blocks the thread that drops it.
pub struct LdkWallet {
    node: Arc<Node>,
    key: LightningKey,
    network: Network,
    cap_sat: Option<u64>,
    lsp: Option<Lsp>,
    /// Kept for what only the seed and the chain can tell: lost channels.
    seed: Seed,
    chain: ChainSource,
    dir: PathBuf,
    anchors: Arc<balance::Anchors>,
    stopped: watch::Sender<bool>,
    /// Held while the node may write.
    _lock: store::Lock,
}

impl LdkWallet {
    /// Opens or creates the store and starts the node. Blocks for the first look at the chain, so the chain source has
    /// to be up.
    pub async fn start(config: LdkConfig) -> Result<LdkWallet, StartError> {
        start::start(config).await
    }

    /// Connects to a peer unless it is connected, and waits until the channels with it are usable (at most
    /// 10 s; a channel that is still confirming is not waited for). Call it before paying a peer after a
    /// restart of either side.
    pub async fn ensure_connected(&self, node: LightningKey, addr: SocketAddr) -> Result<(), ChannelError> {
        self.connect(node, addr).await?;
        let deadline = tokio::time::Instant::now() + USABLE_WITHIN;
        loop {
            let waiting = self.channels().await?.iter().any(|c| c.counterparty == node && c.ready && !c.usable);
            if !waiting {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(ChannelError::Refused {
                    reason: format!(
                        "{node} is connected, but the channel with it was not re-established within {} s",
                        USABLE_WITHIN.as_secs()
                    ),
                });
            }
            tokio::time::sleep(USABLE_POLL).await;
        }
    }

    /// The address that the node listens on, if it does.
    pub fn listen_addr(&self) -> Option<SocketAddr> {
        self.node.listening_addresses()?.iter().find_map(|addr| addr.to_string().parse().ok())
    }

    /// The block height that the Lightning wallet has seen.
    pub fn height(&self) -> u32 {
        self.node.status().current_best_block.height
    }

    /// Runs `f` where it may block. ldk-node's calls wait for the disk, some for the network.
    async fn blocking<T, F>(&self, f: F) -> Result<T, WalletError>
    where
        T: Send + 'static,
        F: FnOnce(&Node) -> T + Send + 'static,
    {
        if *self.stopped.borrow() {
            return Err(WalletError::Stopped);
        }
        let node = self.node.clone();
        tokio::task::spawn_blocking(move || f(&node))
            .await
            .map_err(|e| WalletError::Node { reason: format!("a call to the node did not return: {e}") })
    }
}
