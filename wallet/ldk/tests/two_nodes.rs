//! The embedded node against itself: two real nodes, a real (regtest) chain, real channels.
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, Msat};
use satgrid_wallet::{
    ChannelError, Direction, Embedded, InvoiceError, InvoiceRequest, Lightning, OpenChannel, PayError, PaymentState,
    WalletError, WalletEvent,
    conformance::{self, Pair},
    restore::LostState,
};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, LdkWallet, StartError};
use std::{
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};
use world::{LIMIT, World, free_addr, next, unix_now};

fn ask(amount: Msat) -> InvoiceRequest {
    InvoiceRequest { amount, description_hash: Digest([7; 32]), expiry_secs: 600 }
}

/// Pays and waits for both ends.
async fn pay(payer: &LdkWallet, payee: &LdkWallet, amount: Msat) {
    let made = payee.create_invoice(ask(amount)).await.unwrap();
    payer.pay(&made.bolt11, Msat(0)).await.unwrap();
    let hash = made.payment_hash;
    next(payer, |e| matches!(e, WalletEvent::PaymentSettled { hash: of, fee: Msat(0), .. } if *of == hash)).await;
    next(payee, |e| *e == WalletEvent::PaymentReceived { hash, amount }).await;
}

/// Both ends' figures for the one channel between them: together they are the channel, once its last payment's round
/// trips are through.
async fn both_sides(a: &LdkWallet, b: &LdkWallet) -> (Msat, Msat) {
    let read = async || (a.channels().await.unwrap()[0].clone(), b.channels().await.unwrap()[0].clone());
    until("both sides make up the channel", async || {
        let (one, other) = read().await;
        one.ours.0 + other.ours.0 == one.capacity_sat * 1_000
    })
    .await;
    let (one, other) = read().await;
    (one.ours, other.ours)
}

/// Balances follow a payment's event by a round trip.
async fn until(what: &str, fits: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !fits().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_pay_each_other() {
    let world = World::new().await;
    let consumer = world.start("consumer").await;
    let listen = free_addr();
    let provider = LdkWallet::start(world.config("provider", listen)).await.unwrap();
    world.fund(&[&consumer, &provider]).await;

    // Too dear, then right.
    let addr = provider.listen_addr().unwrap();
    let open = OpenChannel { node: provider.node_id(), addr, capacity_sat: 100_000, push: Msat::ZERO };
    let dear = consumer.open_channel(OpenChannel { capacity_sat: 5_000_000_000, ..open }).await;
    assert!(matches!(dear, Err(ChannelError::Funds { anchor_reserve_sat: 25_000, .. })), "{dear:?}");
    let ready = world.open(&consumer, &provider, 100_000, Msat::ZERO).await;
    assert!(matches!(ready, WalletEvent::ChannelReady { funding_confirmed: true, we_opened: true, .. }));
    assert_eq!(both_sides(&consumer, &provider).await, (Msat(100_000_000), Msat(0)));
    assert_eq!(provider.balance().await.unwrap().payable, Msat(0));

    // Below its reserve of 1,000 sat a provider cannot refund; above, it can.
    pay(&consumer, &provider, Msat(960_001)).await;
    let refund = consumer.create_invoice(ask(Msat(5_000))).await.unwrap();
    let refused = provider.pay(&refund.bolt11, Msat(0)).await;
    assert!(matches!(refused, Err(PayError::NoRoute { payable: Msat(0), .. })), "{refused:?}");
    pay(&consumer, &provider, Msat(500_000)).await;
    until("460 sat can be paid back", async || provider.balance().await.unwrap().payable == Msat(460_001)).await;
    provider.pay(&refund.bolt11, Msat(0)).await.unwrap();
    next(&provider, |e| matches!(e, WalletEvent::PaymentSettled { .. })).await;
    next(&consumer, |e| matches!(e, WalletEvent::PaymentReceived { amount: Msat(5_000), .. })).await;
    assert_eq!(both_sides(&consumer, &provider).await.1, Msat(1_455_001));
    assert!(!provider.balance().await.unwrap().outbound_in_flight);

    let pair = Pair { payer: &consumer, payee: &provider, now: unix_now() };
    tokio::time::timeout(LIMIT, conformance::run(&pair)).await.expect("the suite ends in time");
    both_sides(&consumer, &provider).await;

    // An event that nobody acknowledged survives a restart, and so do payments, balances and the node's name.
    let made = provider.create_invoice(ask(Msat(4_321))).await.unwrap();
    consumer.pay(&made.bolt11, Msat(0)).await.unwrap();
    next(&consumer, |e| matches!(e, WalletEvent::PaymentSettled { .. })).await;
    let unacknowledged = provider.next_event().await.unwrap();
    assert_eq!(unacknowledged, WalletEvent::PaymentReceived { hash: made.payment_hash, amount: Msat(4_321) });
    both_sides(&consumer, &provider).await;
    let before = (provider.node_id(), provider.payments().await.unwrap(), provider.balance().await.unwrap());
    let since = Instant::now();
    provider.stop().await.unwrap();
    provider.stop().await.unwrap();
    assert!(since.elapsed() < LIMIT / 3, "stopping took {:?}", since.elapsed());
    assert_eq!(provider.next_event().await, Err(WalletError::Stopped));
    assert_eq!(provider.balance().await, Err(WalletError::Stopped));
    let late = provider.pay(&refund.bolt11, Msat(0)).await;
    assert_eq!(late, Err(PayError::Stopped));
    drop(provider);

    let provider = LdkWallet::start(world.config("provider", listen)).await.unwrap();
    assert_eq!(provider.next_event().await.unwrap(), unacknowledged);
    provider.event_handled().await.unwrap();
    consumer.ensure_connected(provider.node_id(), listen).await.unwrap();
    assert_eq!((provider.node_id(), provider.payments().await.unwrap()), (before.0, before.1));
    assert_eq!(provider.balance().await.unwrap().lightning_total, before.2.lightning_total);
    assert!(matches!(provider.lookup(made.payment_hash).await.unwrap(), PaymentState::Settled { .. }));
    pay(&consumer, &provider, Msat(1)).await;

    // A forced close is seen by both, and both know what will come back.
    let theirs = both_sides(&consumer, &provider).await.1;
    let channel = consumer.channels().await.unwrap()[0].id;
    consumer.close_channel(channel, true).await.unwrap();
    for wallet in [&consumer, &provider] {
        let closed = next(wallet, |e| matches!(e, WalletEvent::ChannelClosed { .. })).await;
        assert!(
            matches!(closed, WalletEvent::ChannelClosed { forced: true, channel: of, .. } if of == channel),
            "{closed:?}"
        );
        let balance = wallet.balance().await.unwrap();
        assert_eq!(balance.lightning_total, Msat::ZERO);
        assert!(balance.closing_sat > 0, "{balance:?}");
    }
    assert_eq!(provider.balance().await.unwrap().closing_sat, theirs.0 / 1_000);
    assert!(matches!(consumer.close_channel(channel, true).await, Err(ChannelError::NoSuchChannel(_))));

    for wallet in [consumer, provider] {
        let inbound: u64 = wallet
            .payments()
            .await
            .unwrap()
            .iter()
            .filter(|p| p.direction == Direction::Inbound && matches!(p.state, PaymentState::Settled { .. }))
            .map(|p| p.amount.0)
            .sum();
        assert!(inbound > 0);
        wallet.stop().await.unwrap();
    }
}

/// A provider with nothing on chain gets a channel of the older type; from a trusted peer, one that is ready at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_with_nothing_receives_over_an_unconfirmed_channel() {
    let world = World::new().await;
    let consumer = world.start("consumer").await;
    let config = LdkConfig {
        trusted_0conf: vec![consumer.node_id()],
        max_balance_sat: Some(60_000),
        ..world.config("provider", free_addr())
    };
    let provider = LdkWallet::start(config).await.unwrap();
    world.fund(&[&consumer]).await;
    // A payer whose chain is dozens of blocks behind chooses a timeout that the payee refuses.
    provider.sync().await.unwrap();
    let addr = provider.listen_addr().unwrap();
    let open = OpenChannel { node: provider.node_id(), addr, capacity_sat: 50_000, push: Msat(2_000_500) };
    consumer.open_channel(open).await.unwrap();
    let ready = next(&provider, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
    assert!(matches!(ready, WalletEvent::ChannelReady { funding_confirmed: false, we_opened: false, .. }), "{ready:?}");
    next(&consumer, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
    assert_eq!(both_sides(&consumer, &provider).await.1, Msat(2_000_500));
    pay(&consumer, &provider, Msat(400)).await;
    assert_eq!(both_sides(&consumer, &provider).await.1, Msat(2_000_900));
    pay(&provider, &consumer, Msat(1_000_001)).await;
    both_sides(&consumer, &provider).await;

    // The operator's cap counts what is held, and is said before anything is promised.
    let capped = provider.create_invoice(ask(Msat(59_000_000))).await;
    let expect = InvoiceError::OverCap { holds_sat: 1_001, asked: Msat(59_000_000), cap_sat: 60_000 };
    assert_eq!(capped, Err(expect));
    assert!(provider.create_invoice(ask(Msat(58_999_000))).await.is_ok());
    let back = OpenChannel {
        node: consumer.node_id(),
        addr: consumer.listen_addr().unwrap(),
        capacity_sat: 60_001,
        push: Msat(0),
    };
    let refused = provider.open_channel(back).await;
    assert_eq!(refused, Err(ChannelError::OverCap { capacity_sat: 60_001, cap_sat: 60_000 }));

    // A cooperative close is no forced one.
    let channel = consumer.channels().await.unwrap()[0].id;
    consumer.close_channel(channel, false).await.unwrap();
    for wallet in [&consumer, &provider] {
        let closed = next(wallet, |e| matches!(e, WalletEvent::ChannelClosed { .. })).await;
        assert!(matches!(closed, WalletEvent::ChannelClosed { forced: false, .. }), "{closed:?}");
    }
    consumer.stop().await.unwrap();
    provider.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_that_can_be_mended_has_its_error() {
    let world = World::new().await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = world.config("node", taken.local_addr().unwrap());
    let error = LdkWallet::start(config.clone()).await.err().unwrap();
    assert!(matches!(error, StartError::Listen { .. }), "{error}");
    drop(taken);

    let silent = ChainSource::Esplora { url: format!("http://{}", free_addr()) };
    let error = LdkWallet::start(LdkConfig { chain: silent, ..config.clone() }).await.err().unwrap();
    assert!(matches!(error, StartError::Chain { .. }), "{error}");

    let long = Some("x".repeat(33));
    let error = LdkWallet::start(LdkConfig { alias: long, ..config.clone() }).await.err().unwrap();
    assert!(matches!(error, StartError::Alias { .. }), "{error}");

    let wallet = LdkWallet::start(config.clone()).await.unwrap();
    let error = LdkWallet::start(config.clone()).await.err().unwrap();
    assert!(matches!(error, StartError::InUse { .. }), "{error}");

    let stranger = "02b80cabdf82638aac86948e4c06e82064f547768dcef977677b9ea931ea75bab5".parse().unwrap();
    let nobody = wallet.connect(stranger, free_addr()).await;
    assert!(matches!(nobody, Err(ChannelError::Unreachable { .. })), "{nobody:?}");

    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&config.dir), 0o700);
    let mut files = 0;
    for entry in std::fs::read_dir(&config.dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            files += 1;
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
    }
    assert!(files >= 4, "database, WAL, log and lock");
    wallet.stop().await.unwrap();
    drop(wallet);

    // One directory, one network; one phrase.
    let other = LdkConfig { network: satgrid_wallet::Network::Signet, ..config };
    let error = LdkWallet::start(other).await.err().unwrap();
    assert!(matches!(error, StartError::OtherNetwork { .. } | StartError::Store { .. }), "{error}");
}

/// The other chain source of the devnet; the wallet sees its coins through either.
#[tokio::test(flavor = "multi_thread")]
async fn bitcoind_rpc_serves_as_well() {
    let world = World::new().await;
    let (host, port) = ("127.0.0.1".to_owned(), world.server.addr().port());
    let chain = ChainSource::BitcoindRpc { host, port, user: "user".into(), password: "password".into() };
    let wallet = LdkWallet::start(LdkConfig { chain, ..world.config("node", free_addr()) }).await.unwrap();
    world.fund(&[&wallet]).await;
    until("the block reward is seen", async || {
        wallet.sync().await.unwrap();
        wallet.balance().await.unwrap().onchain_confirmed_sat == 50 * 100_000_000
    })
    .await;
    assert_eq!(wallet.height(), 102);
    wallet.stop().await.unwrap();
}

/// Electrum's protocol: coins, a channel, the port's suite, and a lost channel, with nothing else to ask.
#[tokio::test(flavor = "multi_thread")]
async fn electrum_serves_as_well() {
    let world = World::new().await;
    let server = satgrid_devnet::serve_electrum(world.chain.clone(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let source = ChainSource::Electrum { url: server.url() };
    let config = |name: &str| LdkConfig { chain: source.clone(), ..world.config(name, free_addr()) };
    let payer = LdkWallet::start(config("payer")).await.unwrap();
    let lost = config("payee");
    let payee = LdkWallet::start(lost.clone()).await.unwrap();
    world.fund(&[&payer, &payee]).await;
    assert_eq!(payer.balance().await.unwrap().onchain_confirmed_sat, 50 * 100_000_000);
    world.open(&payer, &payee, 1_000_000, Msat(100_000_000)).await;
    let pair = Pair { payer: &payer, payee: &payee, now: unix_now() };
    tokio::time::timeout(LIMIT, conformance::run(&pair)).await.expect("the suite ends in time");

    let kept = payee.channel_backup().await.unwrap();
    payee.stop().await.unwrap();
    drop(payee);
    std::fs::remove_dir_all(&lost.dir).unwrap();
    let payee = LdkWallet::start(lost).await.unwrap();
    until("the lost channel's share is swept", async || {
        let _ = payee.ask_peer(payer.node_id(), &payer.listen_addr().unwrap().to_string()).await;
        world.mine(1);
        // Seen once: an answer that does not come within the twenty seconds of ldk-node. The next look asks again.
        if let Err(error) = payer.sync().await {
            eprintln!("a sync failed: {error}");
            return false;
        }
        matches!(payee.recover(&kept.channels[0]).await.unwrap(), LostState::Swept { sat, .. } if sat > 90_000)
    })
    .await;
    payer.stop().await.unwrap();
    payee.stop().await.unwrap();
}
