//! The cold account on a real (regtest) chain: coins in from the node, found over both kinds of server, and out again.
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_wallet::{Embedded, Lightning, Network, embedded::OnchainSend};
use satgrid_wallet_ldk::{ChainSource, Cold, ColdError, ColdKeys};
use std::time::Instant;
use world::{LIMIT, World, free_addr};

const KEPT_SAT: u64 = 1_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn coins_go_to_the_cold_account_and_back() {
    let world = World::new().await;
    let electrum = satgrid_devnet::serve_electrum(world.chain.clone(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let config = world.config("node", free_addr());
    let node = satgrid_wallet_ldk::LdkWallet::start(config.clone()).await.unwrap();
    world.fund(&[&node]).await;
    let keys = ColdKeys::Words(config.seed.clone());
    let dir = world.dir.path();

    let mut cold = Cold::open(dir, Network::Regtest, &keys).unwrap();
    let first = cold.next_address(Some("sweep")).unwrap();
    assert!(matches!(Cold::open(dir, Network::Regtest, &keys), Err(ColdError::Busy)));
    drop(cold);
    // What was given away stays given away, with its label; and it is none of the node's.
    let mut cold = Cold::open(dir, Network::Regtest, &keys).unwrap();
    assert_eq!(cold.addresses(), std::slice::from_ref(&first));
    assert_ne!(cold.next_address(None).unwrap().address, first.address);
    assert_ne!(node.new_address().await.unwrap(), first.address);

    let send = OnchainSend { address: first.address, amount_sat: Some(KEPT_SAT), sat_per_vb: Some(2) };
    node.send_onchain(send).await.unwrap();
    let esplora = ChainSource::Esplora { url: world.server.url() };
    // The node hands its transactions to a queue of its own.
    let since = Instant::now();
    while cold.sync(&esplora).await.unwrap().confirmed_sat == 0 {
        assert!(since.elapsed() < LIMIT, "{:?}", cold.balance());
        world.mine(1);
    }
    for source in [&esplora, &ChainSource::Electrum { url: electrum.url() }] {
        let balance = cold.sync(source).await.unwrap();
        assert_eq!((balance.confirmed_sat, balance.pending_sat), (KEPT_SAT, 0), "{source}");
    }
    let bitcoind = ChainSource::BitcoindRpc { host: "h".into(), port: 1, user: "u".into(), password: "p".into() };
    assert!(matches!(cold.sync(&bitcoind).await, Err(ColdError::NoIndex)));

    // Dust, a wild fee rate and another network's address are refused before anything is made.
    let home = node.new_address().await.unwrap();
    assert!(cold.draft(&home, Some(100), 2).unwrap_err().to_string().contains("dust"));
    assert!(cold.draft(&home, None, 5_000).unwrap_err().to_string().contains("fee rate"));
    assert!(cold.draft("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", None, 2).is_err());

    // The preview says what it costs; a dearer rate costs more; all of it goes.
    let cheap = cold.draft(&home, Some(400_000), 1).unwrap();
    let dear = cold.draft(&home, Some(400_000), 10).unwrap();
    assert!(cheap.signed && dear.fee_sat > 5 * cheap.fee_sat, "{cheap:?} {dear:?}");
    assert_eq!(cheap.amount_sat, 400_000);
    let all = cold.draft(&home, None, 2).unwrap();
    assert_eq!(all.amount_sat + all.fee_sat, KEPT_SAT);
    all.broadcast(&esplora).await.unwrap();
    world.mine(1);
    assert_eq!(cold.sync(&esplora).await.unwrap().confirmed_sat, 0);
    node.sync().await.unwrap();
    let rows = node.onchain_rows().await.unwrap();
    assert!(rows.iter().any(|row| row.inbound && row.confirmed && row.amount.0 == all.amount_sat * 1_000), "{rows:?}");
    assert!(rows.iter().any(|row| !row.inbound && row.amount.0 == KEPT_SAT * 1_000 && row.fee.0 > 0), "{rows:?}");
    node.stop().await.unwrap();
}

/// BIP-84's own test vector, at coin type 1 there is none: the account key of a device, watched.
#[tokio::test]
async fn an_xpub_is_watched_and_signs_nothing() {
    let world = World::new().await;
    let key = "tpubDC5FSnBiZDMmhiuCmWAYsLwgLYrrT9rAqvTySfuCCrgsWz8wxMXUS9Tb9iVMvcRbvFcAHGkMD5Kx8koh4GquNGNTfohfk7pgjhaPCdXpoba";
    let watch = ColdKeys::WatchOnly(key.to_owned());
    let mut cold = Cold::open(world.dir.path(), Network::Regtest, &watch).unwrap();
    let address = cold.next_address(None).unwrap().address;
    world.fund_address(&address);
    let esplora = ChainSource::Esplora { url: world.server.url() };
    assert_eq!(cold.sync(&esplora).await.unwrap().confirmed_sat, 50 * 100_000_000);
    let draft = cold.draft(&address, Some(50_000), 3).unwrap();
    assert!(!draft.signed);
    assert!(draft.broadcast(&esplora).await.is_err());
    drop(cold);
    // The same account by its descriptor; other keys do not open it.
    let same = ColdKeys::WatchOnly(format!("wpkh({key}/<0;1>/*)"));
    assert_eq!(Cold::open(world.dir.path(), Network::Regtest, &same).unwrap().addresses()[0].address, address);
    let other = ColdKeys::Words(world.config("other", free_addr()).seed);
    assert!(matches!(Cold::open(world.dir.path(), Network::Regtest, &other), Err(ColdError::Keys(_))));
    assert!(matches!(
        Cold::open(world.dir.path(), Network::Regtest, &ColdKeys::WatchOnly("x".into())),
        Err(ColdError::Keys(_) | ColdError::Busy)
    ));
}
