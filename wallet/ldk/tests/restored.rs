//! Everything lost but the words and the channel backup: on real nodes and a real (regtest) chain, funds come back.
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, Msat};
use satgrid_wallet::{
    Embedded, InvoiceRequest, Lightning, WalletEvent,
    embedded::ChannelBackup,
    restore::{LostState, Restoring, Seen},
};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, LdkWallet, StartError, node_id, rehearse};
use std::{fs, path::Path, time::Duration, time::Instant};
use world::{LIMIT, World, free_addr, next, unix_now};

async fn pay(payer: &LdkWallet, payee: &LdkWallet, amount: Msat) {
    let ask = InvoiceRequest { amount, description_hash: Digest([7; 32]), expiry_secs: 600 };
    let made = payee.create_invoice(ask).await.unwrap();
    payer.pay(&made.bolt11, Msat(0)).await.unwrap();
    next(payer, |e| matches!(e, WalletEvent::PaymentSettled { .. })).await;
    next(payee, |e| matches!(e, WalletEvent::PaymentReceived { .. })).await;
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// A restored wallet asks its peers until every channel of the backup is over; gives what came of each.
async fn restore(world: &World, wallet: &LdkWallet, peer: &LdkWallet, backup: &ChannelBackup) -> Vec<LostState> {
    let mut restoring = Restoring::of(backup, unix_now());
    let since = Instant::now();
    while !restoring.is_over() {
        assert!(since.elapsed() < LIMIT * 2, "never over: {restoring:?}");
        for lost in &mut restoring.lost {
            if let Some(address) = &lost.address {
                let _ = wallet.ask_peer(lost.channel.counterparty, address).await;
            }
            lost.state = wallet.recover(&lost.channel).await.unwrap();
        }
        world.mine(1);
        peer.sync().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    restoring.lost.into_iter().map(|lost| lost.state).collect()
}

/// Both types of channel: with anchors (both sides have coins) and without.
#[tokio::test(flavor = "multi_thread")]
async fn funds_come_back_from_words_and_backup() {
    for with_anchors in [true, false] {
        let world = World::new().await;
        let listen = free_addr();
        let peer = world.start("peer").await;
        let config = world.config("lost", listen);
        let ours = LdkWallet::start(config.clone()).await.unwrap();
        assert_eq!(node_id(&config.seed, config.network), Some(ours.node_id()));
        world.fund(if with_anchors { vec![&peer, &ours] } else { vec![&ours] }.as_slice()).await;
        peer.sync().await.unwrap();
        world.open(&ours, &peer, 300_000, Msat::ZERO).await;
        pay(&ours, &peer, Msat(20_000_500)).await;
        let kept = ours.channel_backup().await.unwrap();
        assert_eq!((kept.channels.len(), kept.updates.len()), (1, 1));
        assert!(*kept.updates.values().next().unwrap() > 0);
        let onchain = ours.balance().await.unwrap().onchain_total_sat;
        ours.stop().await.unwrap();
        drop(ours);
        fs::remove_dir_all(&config.dir).unwrap();

        // The rehearsal touches nothing and says what is there; another's words are refused.
        let found = rehearse(&config.seed, config.network, &config.chain, &kept).await.unwrap();
        assert_eq!(found[0].open, Ok(true));
        let other = world.config("other", listen).seed;
        assert!(rehearse(&other, config.network, &config.chain, &kept).await.unwrap_err().contains("these words"));
        assert!(!config.dir.exists());

        // Without the disk the guard says so, and with the restore's word it lets go.
        let seen = Seen { by: "channels.json".into(), updates: kept.updates.clone() };
        let refused = LdkWallet::start(LdkConfig { seen: vec![seen.clone()], ..config.clone() }).await;
        assert!(matches!(refused, Err(StartError::Old { .. })));
        let seen = vec![Restoring::of(&kept, unix_now()).allow(seen)];
        let ours = LdkWallet::start(LdkConfig { seen, ..config.clone() }).await.unwrap();
        assert!(ours.channels().await.unwrap().is_empty());
        let states = restore(&world, &ours, &peer, &kept).await;
        let LostState::Swept { sat, .. } = states[0] else { panic!("{states:?}") };
        assert!((275_000..280_000).contains(&sat), "of 279,999, less the fees: {sat}");
        world.mine(1);
        ours.sync().await.unwrap();
        let now = ours.balance().await.unwrap().onchain_total_sat;
        assert_eq!(now, onchain + sat, "coins on chain and what was in the channel (anchors: {with_anchors})");
        // Asked again, it finds its own sweep.
        assert!(
            matches!(ours.recover(&kept.channels[0]).await.unwrap(), LostState::Swept { sat: again, .. } if again == sat)
        );
        ours.stop().await.unwrap();
        peer.stop().await.unwrap();
    }
}

/// The chain over bitcoind's face, which has no index of spenders.
#[tokio::test(flavor = "multi_thread")]
async fn lost_channels_are_found_over_bitcoind_too() {
    let world = World::new().await;
    let peer = world.start("peer").await;
    let (host, port) = ("127.0.0.1".to_owned(), world.server.addr().port());
    let chain = ChainSource::BitcoindRpc { host, port, user: "user".into(), password: "password".into() };
    let config = LdkConfig { chain, ..world.config("lost", free_addr()) };
    let ours =
        LdkWallet::start(LdkConfig { chain: world.config("x", free_addr()).chain, ..config.clone() }).await.unwrap();
    world.fund(&[&ours]).await;
    peer.sync().await.unwrap();
    world.open(&ours, &peer, 200_000, Msat::ZERO).await;
    let kept = ours.channel_backup().await.unwrap();
    ours.stop().await.unwrap();
    drop(ours);
    fs::remove_dir_all(&config.dir).unwrap();
    let ours = LdkWallet::start(config).await.unwrap();
    let states = restore(&world, &ours, &peer, &kept).await;
    assert!(matches!(states[0], LostState::Swept { sat, .. } if sat > 195_000), "{states:?}");
    ours.stop().await.unwrap();
    peer.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_channels_is_never_started() {
    let world = World::new().await;
    let peer = world.start("peer").await;
    let config = world.config("ours", free_addr());
    let ours = LdkWallet::start(config.clone()).await.unwrap();
    world.fund(&[&ours]).await;
    peer.sync().await.unwrap();
    world.open(&ours, &peer, 100_000, Msat::ZERO).await;
    pay(&ours, &peer, Msat(1_000_000)).await;
    ours.stop().await.unwrap();
    drop(ours);
    let old = world.dir.path().join("copy");
    copy(&config.dir, &old);

    let ours = LdkWallet::start(config.clone()).await.unwrap();
    ours.ensure_connected(peer.node_id(), peer.listen_addr().unwrap()).await.unwrap();
    pay(&ours, &peer, Msat(2_000_000)).await;
    let kept = ours.channel_backup().await.unwrap();
    ours.stop().await.unwrap();
    drop(ours);
    let seen = vec![Seen { by: "channels.json".into(), updates: kept.updates }];
    let guarded = LdkConfig { seen, ..config.clone() };

    // What is on the disk starts; the copy of before the second payment does not, and nothing of it is changed.
    let ours = LdkWallet::start(guarded.clone()).await.unwrap();
    ours.stop().await.unwrap();
    drop(ours);
    fs::remove_dir_all(&config.dir).unwrap();
    copy(&old, &config.dir);
    let refused = LdkWallet::start(guarded).await.err().unwrap();
    assert!(matches!(&refused, StartError::Old { reason, .. } if reason.contains("has seen state")), "{refused}");
    assert!(refused.to_string().contains("wallet restore"), "{refused}");
    assert!(peer.channels().await.unwrap().len() == 1, "the peer has heard nothing of it");
    peer.stop().await.unwrap();
}
