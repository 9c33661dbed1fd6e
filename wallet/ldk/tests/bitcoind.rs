//! The same conformance over a real bitcoind, by RPC. Optional: it runs where `BITCOIND` names one.
//!
//! Bitcoin Core's sources are in the registry's package `libbitcoinkernel-sys`; docs/testing.md says how to build them.
//! `BITCOIND=/path/to/bitcoind cargo test -p satgrid -p satgrid-wallet-ldk --test bitcoind -- --ignored --nocapture`
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::Msat;
use satgrid_wallet::{
    Lightning, OpenChannel, WalletEvent,
    conformance::{self, Pair},
    keys::Phrase,
};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, LdkWallet};
use std::{
    env,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use world::{LIMIT, free_addr, next, unix_now};

struct Bitcoind {
    child: Child,
    port: u16,
    _dir: TempDir,
}

impl Bitcoind {
    fn start(exe: &str) -> Bitcoind {
        let dir = TempDir::new().unwrap();
        let port = free_addr().port();
        let child = Command::new(exe)
            .args(["-regtest", "-server", "-listen=0", "-fallbackfee=0.00002", "-rpcuser=u", "-rpcpassword=p"])
            .arg(format!("-rpcport={port}"))
            .arg(format!("-datadir={}", dir.path().display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let bitcoind = Bitcoind { child, port, _dir: dir };
        let since = Instant::now();
        while bitcoind.rpc("getblockchaininfo", "[]").is_none() {
            assert!(since.elapsed() < LIMIT, "bitcoind does not answer");
            std::thread::sleep(Duration::from_millis(100));
        }
        bitcoind
    }

    fn rpc(&self, method: &str, params: &str) -> Option<String> {
        let body = format!("{{\"id\":1,\"method\":\"{method}\",\"params\":{params}}}");
        let url = format!("http://127.0.0.1:{}/", self.port);
        let run = Command::new("curl").args(["-sf", "--user", "u:p", "-d", &body, &url]).output().unwrap();
        run.status.success().then(|| String::from_utf8(run.stdout).unwrap())
    }

    /// Mines straight to an address.
    fn mine(&self, blocks: u32, address: &str) {
        assert!(self.rpc("generatetoaddress", &format!("[{blocks},\"{address}\"]")).is_some());
    }

    async fn wallet(&self, dir: &Path, name: &str) -> LdkWallet {
        let mut entropy = [0u8; 16];
        entropy[..name.len()].copy_from_slice(name.as_bytes());
        let seed = Phrase::from_entropy(&entropy).unwrap().seed();
        let (host, user, password) = ("127.0.0.1".to_owned(), "u".to_owned(), "p".to_owned());
        let chain = ChainSource::BitcoindRpc { host, port: self.port, user, password };
        let config = LdkConfig { listen: vec![free_addr()], ..LdkConfig::new(dir.join(name), seed, chain) };
        LdkWallet::start(config).await.unwrap()
    }
}

impl Drop for Bitcoind {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs BITCOIND"]
async fn it_conforms_on_a_real_chain() {
    let Ok(exe) = env::var("BITCOIND") else { return };
    let bitcoind = Bitcoind::start(&exe);
    let dir = TempDir::new().unwrap();
    let (payer, payee) = (bitcoind.wallet(dir.path(), "payer").await, bitcoind.wallet(dir.path(), "payee").await);
    let address = payer.new_address().await.unwrap();
    let elsewhere = payee.new_address().await.unwrap();
    bitcoind.mine(1, &address);
    bitcoind.mine(101, &elsewhere);
    let synced = async || {
        payer.sync().await.unwrap();
        payee.sync().await.unwrap();
    };
    let since = Instant::now();
    while payer.balance().await.unwrap().onchain_confirmed_sat == 0 || payee.height() < 102 {
        assert!(since.elapsed() < LIMIT, "{:?}", payer.balance().await);
        synced().await;
    }
    let since = Instant::now();
    let addr = payee.listen_addr().unwrap();
    let open = OpenChannel { node: payee.node_id(), addr, capacity_sat: 1_000_000, push: Msat::ZERO };
    payer.open_channel(open).await.unwrap();
    next(&payer, |e| matches!(e, WalletEvent::ChannelPending { .. })).await;
    while !payer.channels().await.unwrap().iter().any(|c| c.usable) {
        assert!(since.elapsed() < LIMIT, "{:?}", payer.channels().await);
        bitcoind.mine(1, &elsewhere);
        synced().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    eprintln!("channel usable after {:?}", since.elapsed());
    next(&payee, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
    next(&payer, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
    let pair = Pair { payer: &payer, payee: &payee, now: unix_now() };
    tokio::time::timeout(LIMIT * 2, conformance::run(&pair)).await.expect("the suite ends in time");

    // A forced close on the real chain comes back after its delay.
    let channel = payer.channels().await.unwrap()[0].id;
    payer.close_channel(channel, true).await.unwrap();
    next(&payee, |e| matches!(e, WalletEvent::ChannelClosed { forced: true, .. })).await;
    let closing = payer.balance().await.unwrap().closing_sat;
    assert!(closing > 900_000, "{closing}");
    let since = Instant::now();
    while payer.balance().await.unwrap().closing_sat > 0 {
        assert!(since.elapsed() < LIMIT * 2, "never swept: {:?}", payer.balance().await);
        bitcoind.mine(12, &elsewhere);
        synced().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    eprintln!("{closing} sat of a forced close swept");
    payer.stop().await.unwrap();
    payee.stop().await.unwrap();
}
