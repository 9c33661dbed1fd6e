//! Real nodes on a regtest chain in this process.
#![allow(dead_code)] // each test binary uses its part

use ldk_node::bitcoin::{Address, Network, ScriptBuf};
use satgrid_devnet::{ChainServer, Shared, chain};
use satgrid_types::{Msat, UnixMs};
use satgrid_wallet::{Lightning, OpenChannel, WalletEvent, keys::Phrase};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, LdkWallet};
use std::{
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;

/// Whatever is waited for comes within this, or the test has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
const MATURITY: u32 = 100;

pub(crate) struct World {
    pub(crate) chain: Shared,
    pub(crate) server: ChainServer,
    pub(crate) dir: TempDir,
}

impl World {
    pub(crate) async fn new() -> World {
        let chain = chain::shared();
        let server = satgrid_devnet::serve(chain.clone(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let world = World { chain, server, dir: TempDir::new().unwrap() };
        world.mine(1);
        world
    }

    /// The same `name` is the same node: same directory, same seed, same port.
    pub(crate) fn config(&self, name: &str, listen: SocketAddr) -> LdkConfig {
        let mut entropy = [0u8; 16];
        entropy[..name.len()].copy_from_slice(name.as_bytes());
        let seed = Phrase::from_entropy(&entropy).unwrap().seed();
        let chain = ChainSource::Esplora { url: self.server.url() };
        LdkConfig {
            listen: vec![listen],
            alias: Some(name.to_owned()),
            ..LdkConfig::new(self.dir.path().join(name), seed, chain)
        }
    }

    pub(crate) async fn start(&self, name: &str) -> LdkWallet {
        LdkWallet::start(self.config(name, free_addr())).await.unwrap()
    }

    pub(crate) fn mine(&self, blocks: u32) {
        self.mine_to(blocks, ScriptBuf::from(vec![0x51]));
    }
    fn mine_to(&self, blocks: u32, script: ScriptBuf) {
        let now = unix_now().as_secs();
        for _ in 0..blocks {
            self.chain.lock().unwrap().mine(script.clone(), u32::try_from(now).unwrap());
        }
    }

    /// Gives the address one mature block reward.
    pub(crate) fn fund_address(&self, address: &str) {
        let address: Address<_> = address.parse().unwrap();
        self.mine_to(1, address.require_network(Network::Regtest).unwrap().script_pubkey());
        self.mine(MATURITY);
    }

    /// Gives each wallet one mature block reward.
    pub(crate) async fn fund(&self, wallets: &[&LdkWallet]) {
        for wallet in wallets {
            self.fund_address(&wallet.new_address().await.unwrap());
        }
        for wallet in wallets {
            // A look at the chain that was under way already may have begun before the reward.
            let until = tokio::time::Instant::now() + LIMIT;
            while wallet.balance().await.unwrap().onchain_confirmed_sat == 0 {
                assert!(tokio::time::Instant::now() < until, "the reward was not seen");
                wallet.sync().await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Opens a channel and mines it in. Both sides' events are acknowledged; the opener's `ChannelReady` comes back.
    pub(crate) async fn open(&self, from: &LdkWallet, to: &LdkWallet, capacity_sat: u64, push: Msat) -> WalletEvent {
        let addr = to.listen_addr().unwrap();
        from.open_channel(OpenChannel { node: to.node_id(), addr, capacity_sat, push }).await.unwrap();
        let pending = next(from, |e| matches!(e, WalletEvent::ChannelPending { .. })).await;
        assert!(matches!(pending, WalletEvent::ChannelPending { counterparty, .. } if counterparty == to.node_id()));
        // The funding transaction comes when it comes: mine until both sides have seen enough of it.
        while !from.channels().await.unwrap().iter().any(|c| c.counterparty == to.node_id() && c.usable) {
            self.mine(1);
            for wallet in [from, to] {
                wallet.sync().await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        next(to, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
        next(from, |e| matches!(e, WalletEvent::ChannelReady { .. })).await
    }
}

/// Acknowledges events until one fits.
pub(crate) async fn next(wallet: &LdkWallet, fits: impl Fn(&WalletEvent) -> bool) -> WalletEvent {
    next_of(wallet, fits).await
}

/// The same of any wallet.
pub(crate) async fn next_of(wallet: &dyn Lightning, fits: impl Fn(&WalletEvent) -> bool) -> WalletEvent {
    let mut seen = Vec::new();
    let wait = async {
        loop {
            let event = wallet.next_event().await.unwrap();
            wallet.event_handled().await.unwrap();
            if fits(&event) {
                return event;
            }
            seen.push(event);
        }
    };
    match tokio::time::timeout(LIMIT, wait).await {
        Ok(event) => event,
        Err(_) => panic!("the event did not come, but {seen:?}; channels: {:?}", wallet.channels().await),
    }
}

/// A port that was free a moment ago.
pub(crate) fn free_addr() -> SocketAddr {
    satgrid_devnet::ports::free().unwrap()
}

pub(crate) fn unix_now() -> UnixMs {
    UnixMs(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap())
}
