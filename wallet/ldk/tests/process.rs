//! The wallet in a process of its own passes the same suite as the one in this process, and outlives nobody.
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, Msat};
use satgrid_wallet::{
    Embedded, InvoiceRequest, Lightning, OpenChannel, WalletError, WalletEvent,
    conformance::{self, Pair},
    embedded::{OnchainSend, SendError},
    message,
};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, Program, StartError, WalletProcess};
use std::{
    env,
    ffi::OsString,
    time::{Duration, Instant},
};
use world::{LIMIT, World, free_addr, next_of, unix_now};

fn program() -> Program {
    let args = ["--exact", "wallet_process", "--ignored", "--nocapture"].map(OsString::from).to_vec();
    Program { exe: env::current_exe().unwrap(), args }
}

/// Not a test: the wallet's process, with its socket for standard input.
#[test]
#[ignore = "started by the tests below"]
fn wallet_process() {
    let _ = satgrid_wallet_ldk::process::worker_main();
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_the_same_wallet() {
    let world = World::new().await;
    let payee = world.start("payee").await;
    let config = world.config("payer", free_addr());
    let payer = WalletProcess::start(&program(), config.clone()).await.unwrap();
    // Without coins for an anchor reserve the payee would get a channel of the older type.
    world.fund(&[&payee]).await;
    world.fund_address(&payer.new_address().await.unwrap());
    payer.sync().await.unwrap();
    payee.sync().await.unwrap();
    let addr = payee.listen_addr().unwrap();
    let open = OpenChannel { node: payee.node_id(), addr, capacity_sat: 100_000, push: Msat::ZERO };
    payer.open_channel(open).await.unwrap();
    next_of(&payer, |e| matches!(e, WalletEvent::ChannelPending { .. })).await;
    while !payer.channels().await.unwrap().iter().any(|c| c.usable) {
        world.mine(1);
        payer.sync().await.unwrap();
        payee.sync().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    next_of(&payee, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
    next_of(&payer, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
    let pair = Pair { payer: &payer, payee: &payee, now: unix_now() };
    tokio::time::timeout(LIMIT, conformance::run(&pair)).await.expect("the suite ends in time");

    let text = b"vouched";
    assert!(message::verify(text, &payer.sign_message(text), &payer.node_id()));
    let facts = payer.facts().await.unwrap();
    assert_eq!((facts.listen, facts.anchor_reserve_sat), (Some(config.listen[0]), 25_000));
    let backup = payer.channel_backup().await.unwrap();
    assert_eq!((backup.channels.len(), backup.channels[0].counterparty), (1, payee.node_id()));
    assert!(backup.peers.iter().any(|(key, at)| *key == payee.node_id() && *at == addr.to_string()));

    // A call that nobody waits for any more leaves the event for the next caller.
    for _ in 0..3 {
        let nothing = tokio::time::timeout(Duration::from_millis(20), payer.next_event()).await;
        assert!(nothing.is_err(), "{nothing:?}");
    }
    let ask = InvoiceRequest { amount: Msat(7_000), description_hash: Digest([7; 32]), expiry_secs: 60 };
    let made = payee.create_invoice(ask).await.unwrap();
    payer.pay(&made.bolt11, Msat(0)).await.unwrap();
    next_of(&payer, |e| matches!(e, WalletEvent::PaymentSettled { hash, .. } if *hash == made.payment_hash)).await;

    // Coins on chain: the reserve stays, dust and other networks' addresses are refused.
    let to = payee.new_address().await.unwrap();
    let send = |address: &str, amount_sat| OnchainSend { address: address.into(), amount_sat, sat_per_vb: Some(2) };
    let refused = payer.send_onchain(send("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", Some(10_000))).await;
    assert!(matches!(refused, Err(SendError::BadAddress { .. })), "{refused:?}");
    assert!(matches!(payer.send_onchain(send(&to, Some(545))).await, Err(SendError::Dust { .. })));
    let (since, before) = (Instant::now(), payer.balance().await.unwrap());
    let txid = payer.send_onchain(send(&to, Some(10_000))).await.unwrap();
    assert_eq!(txid.len(), 64);
    let mined_until = async |most_sat: u64| {
        loop {
            world.mine(1);
            payer.sync().await.unwrap();
            let left = payer.balance().await.unwrap();
            if left.onchain_total_sat < most_sat
                && left.onchain_total_sat.saturating_sub(left.onchain_confirmed_sat) <= 25_000
            {
                return left;
            }
            assert!(since.elapsed() < LIMIT, "never sent: {left:?}");
        }
    };
    mined_until(before.onchain_total_sat - 10_000).await;
    payer.send_onchain(send(&to, None)).await.unwrap();
    let left = mined_until(1_000_000).await;
    assert!((25_000..25_500).contains(&left.onchain_total_sat), "the anchor reserve stays: {left:?}");
    let refused = payer.send_onchain(send(&to, Some(10_000))).await;
    assert!(matches!(refused, Err(SendError::Funds { reserve_sat: 25_000, .. })), "{refused:?}");

    // Dropped without a stop, as by a crash: the process stops by itself and lets go of the store.
    drop(payer);
    let again = WalletProcess::start(&program(), config.clone()).await.unwrap();
    assert_eq!(again.channels().await.unwrap().len(), 1, "the channel is still there");
    again.stop().await.unwrap();
    again.stop().await.unwrap();
    assert!(matches!(again.next_event().await, Err(WalletError::Stopped)));
    assert!(again.balance().await.is_err());
    tokio::time::timeout(LIMIT, again.gone()).await.unwrap();

    let silent = ChainSource::Esplora { url: format!("http://{}", free_addr()) };
    let error = WalletProcess::start(&program(), LdkConfig { chain: silent, ..config }).await.err().unwrap();
    assert!(matches!(&error, StartError::Remote { reason } if reason.contains("no answer")), "{error}");
    payee.stop().await.unwrap();
}
