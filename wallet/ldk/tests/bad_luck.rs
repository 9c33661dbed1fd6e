//! What peers and the chain may do to a wallet: a payee that sits on a payment until it times out, a chain source that goes
//! away or lies, a chain that changes its mind. Nothing is lost, and what happened is said.
#![allow(clippy::unwrap_used)]

mod world;

use ldk_node::{
    Builder, Event, Node,
    bitcoin::Network,
    lightning_invoice::{Bolt11InvoiceDescription, Description},
    lightning_types::payment::PaymentHash as LdkHash,
    liquidity::LSPS2ServiceConfig,
};
use satgrid_types::{LightningKey, Msat, PaymentHash};
use satgrid_wallet::{
    Embedded, FailureReason, Lightning, OpenChannel, PayError, PaymentState, WalletEvent,
    embedded::{OnchainSend, Receive},
};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, LdkWallet, Lsp};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use world::{LIMIT, World, free_addr, next, unix_now};

const CAPACITY_SAT: u64 = 100_000;
/// LDK peers accept a tenth of the channel in flight.
const AMOUNT: Msat = Msat(9_000_000);
/// No payment's timeout is further away, in blocks: 144 of the last hop, and what hides the route's end.
const MOST_BLOCKS: u32 = 1_000;
/// What closing, claiming and sweeping may cost at one sat per virtual byte.
const MINERS_SAT: u64 = 5_000;

/// A node without us, that does what it is told.
fn stranger(world: &World, listen: SocketAddr, service: Option<LSPS2ServiceConfig>) -> Arc<Node> {
    let mut builder = Builder::new();
    builder.set_network(Network::Regtest);
    builder.set_entropy_seed_bytes([77; 64]);
    builder.set_storage_dir_path(world.dir.path().join("stranger").display().to_string());
    builder.set_chain_source_esplora(world.server.url(), None);
    builder.set_listening_addresses(vec![listen.into()]).unwrap();
    if let Some(service) = service {
        builder.set_liquidity_provider_lsps2(service);
    }
    let node = Arc::new(builder.build().unwrap());
    node.start().unwrap();
    node
}

/// Other blocks in the place of the last `depth`, one more of them, and none with a transaction; those of the blocks that are
/// gone wait `again`, or are forgotten.
fn reorganise(world: &World, depth: u32, again: bool) {
    let now = u32::try_from(unix_now().as_secs()).unwrap();
    let mut chain = world.chain.lock().unwrap();
    chain.undo(depth, now, |_| again);
    for _ in 0..=depth {
        chain.mine_empty(now);
    }
}

/// A transaction's id as people write it.
fn txid(bytes: &[u8; 32]) -> String {
    bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}

/// Until nothing of closed channels is out any more; gives what the wallet has, in sat.
async fn all_back(world: &World, wallet: &LdkWallet) -> u64 {
    let began = Instant::now();
    loop {
        wallet.sync().await.unwrap();
        let balance = wallet.balance().await.unwrap();
        if balance.closing_sat == 0 && wallet.channels().await.unwrap().is_empty() {
            return balance.onchain_total_sat;
        }
        assert!(began.elapsed() < LIMIT, "not all is back: {balance:?}");
        world.mine(6);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn open(world: &World, payer: &LdkWallet, node: &Node, addr: SocketAddr) {
    let key = LightningKey(node.node_id().serialize());
    let open = OpenChannel { node: key, addr, capacity_sat: CAPACITY_SAT, push: Msat::ZERO };
    payer.open_channel(open).await.unwrap();
    next(payer, |e| matches!(e, WalletEvent::ChannelPending { .. })).await;
    while !payer.channels().await.unwrap().iter().any(|c| c.usable) {
        world.mine(1);
        payer.sync().await.unwrap();
        let _ = tokio::task::block_in_place(|| node.sync_wallets());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    next(payer, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payee_that_sits_on_a_payment_gets_it_never() {
    let world = World::new().await;
    let payer = world.start("payer").await;
    world.fund(&[&payer]).await;
    let had_sat = payer.balance().await.unwrap().onchain_confirmed_sat;
    let listen = free_addr();
    let node = stranger(&world, listen, None);
    open(&world, &payer, &node, listen).await;

    let hash = PaymentHash([9; 32]);
    let words = Bolt11InvoiceDescription::Direct(Description::new("never settled".into()).unwrap());
    let made = node.bolt11_payment().receive_for_hash(AMOUNT.0, &words, 3_600, LdkHash(hash.0)).unwrap().to_string();
    payer.pay(&made, Msat(0)).await.unwrap();
    loop {
        let event = tokio::time::timeout(LIMIT, node.next_event_async()).await.unwrap();
        node.event_handled().unwrap();
        if matches!(event, Event::PaymentClaimable { .. }) {
            break;
        }
    }
    // It hangs: said to be in flight, not sent a second time, and not spendable meanwhile.
    assert_eq!(payer.lookup(hash).await.unwrap(), PaymentState::InFlight);
    let balance = payer.balance().await.unwrap();
    assert!(balance.outbound_in_flight && balance.payable < Msat(CAPACITY_SAT * 1_000 - AMOUNT.0), "{balance:?}");
    payer.pay(&made, Msat(0)).await.unwrap();
    let outbound = payer.payments().await.unwrap();
    assert_eq!(outbound.len(), 1, "{outbound:?}");

    // The payee goes away with it. Block after block, until the payer takes it back on the chain.
    tokio::task::block_in_place(|| node.stop()).unwrap();
    drop(node);
    let (mut mined, mut closed, mut failed) = (0, false, None);
    while failed.is_none() {
        assert!(mined < MOST_BLOCKS, "neither failed after {mined} blocks; closed: {closed}");
        world.mine(6);
        mined += 6;
        payer.sync().await.unwrap();
        while let Ok(event) = tokio::time::timeout(Duration::from_millis(20), payer.next_event()).await {
            payer.event_handled().await.unwrap();
            match event.unwrap() {
                WalletEvent::ChannelClosed { forced, .. } => closed = forced,
                WalletEvent::PaymentFailed { hash: of, reason } if of == hash => failed = Some(reason),
                WalletEvent::PaymentSettled { .. }
                | WalletEvent::PaymentFailed { .. }
                | WalletEvent::PaymentReceived { .. }
                | WalletEvent::ChannelPending { .. }
                | WalletEvent::ChannelReady { .. }
                | WalletEvent::Other { .. } => {}
            }
        }
    }
    assert!(closed, "an HTLC is taken back by closing its channel");
    eprintln!("a stalled payment failed after {mined} blocks: {failed:?}");
    assert!(matches!(payer.lookup(hash).await.unwrap(), PaymentState::Failed { .. }));
    assert_ne!(failed, Some(FailureReason::Expired));
    // All of it comes back, less what the miners take.
    let began = Instant::now();
    loop {
        let balance = payer.balance().await.unwrap();
        if balance.closing_sat == 0 && balance.onchain_confirmed_sat + MINERS_SAT >= had_sat {
            break;
        }
        assert!(began.elapsed() < LIMIT, "{had_sat} before, now {balance:?}");
        world.mine(6);
        payer.sync().await.unwrap();
    }
    payer.stop().await.unwrap();
}

/// Esplora is gone and comes back: open channels go on paying, what needs the chain says so.
#[tokio::test(flavor = "multi_thread")]
async fn payments_go_on_while_the_chain_source_is_down() {
    let world = World::new().await;
    // The payer has an Esplora of its own over the same chain.
    // It runs in a runtime of its own: connections that are kept alive end with that.
    let apart = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (runtime, shared, at) = (apart(), world.chain.clone(), free_addr());
    let own = runtime.spawn(async move { satgrid_devnet::serve(shared, at).await }).await.unwrap().unwrap();
    let (addr, chain) = (own.addr(), ChainSource::Esplora { url: own.url() });
    let payer = LdkWallet::start(LdkConfig { chain, ..world.config("payer", free_addr()) }).await.unwrap();
    let payee = world.start("payee").await;
    world.fund(&[&payer]).await;
    world.open(&payer, &payee, CAPACITY_SAT, Msat::ZERO).await;
    drop(own);
    runtime.shutdown_background();
    let refused = payer.sync().await;
    assert!(refused.is_err(), "no answer from the chain is no success");
    for n in 1..=3 {
        let amount = Msat(1_000_000 * n);
        let request = satgrid_wallet::InvoiceRequest {
            amount,
            description_hash: satgrid_types::Digest([1; 32]),
            expiry_secs: 600,
        };
        let made = payee.create_invoice(request).await.unwrap();
        payer.pay(&made.bolt11, Msat(0)).await.unwrap();
        next(&payer, |e| matches!(e, WalletEvent::PaymentSettled { .. })).await;
        next(&payee, |e| matches!(e, WalletEvent::PaymentReceived { .. })).await;
    }
    assert!(payer.channels().await.unwrap().iter().all(|c| c.usable));
    let _own = satgrid_devnet::serve(world.chain.clone(), addr).await.unwrap();
    world.mine(3);
    payer.sync().await.unwrap();
    assert_eq!(payer.height(), world.chain.lock().unwrap().height());
    let late = payer.pay("lnbcrt1nothing", Msat(0)).await;
    assert!(matches!(late, Err(PayError::BadInvoice { .. })));
    for wallet in [payer, payee] {
        wallet.stop().await.unwrap();
    }
}

/// A block with coins for us is taken back: they are unconfirmed again, and gone where the chain forgets them.
#[tokio::test(flavor = "multi_thread")]
async fn coins_of_a_block_that_is_taken_back_are_not_ours_yet() {
    let world = World::new().await;
    let (sender, receiver) = (world.start("sender").await, world.start("receiver").await);
    world.fund(&[&sender]).await;
    let address = receiver.new_address().await.unwrap();
    let send = OnchainSend { address, amount_sat: Some(70_000), sat_per_vb: Some(2) };
    let (copied, draft) = (send.clone(), sender.draft_onchain(send.clone()).await.unwrap());
    assert!(draft.exact && draft.amount_sat == 70_000 && draft.sat_per_vb == 2, "{draft:?}");
    // The rate is held to a quarter of a virtual byte.
    assert!((draft.vsize * 2 - 2..=draft.vsize * 2 + 2).contains(&draft.fee_sat), "{draft:?}");
    let sent = sender.send_onchain(copied).await.unwrap();
    let holds = async |confirmed: u64, total: u64| {
        let began = Instant::now();
        loop {
            receiver.sync().await.unwrap();
            let now = receiver.balance().await.unwrap();
            if (now.onchain_confirmed_sat, now.onchain_total_sat) == (confirmed, total) {
                return;
            }
            assert!(began.elapsed() < LIMIT, "{confirmed} of {total} expected: {now:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    holds(0, 70_000).await;
    world.mine(1);
    holds(70_000, 70_000).await;
    // What it cost is what the draft said.
    sender.sync().await.unwrap();
    let rows = sender.onchain_rows().await.unwrap();
    let row = rows.iter().find(|row| txid(&row.txid.0) == sent).expect("the wallet lists it");
    assert_eq!((row.amount, row.fee), (Msat(70_000_000), Msat(draft.fee_sat * 1_000)));

    let undo = |depth, again| reorganise(&world, depth, again);
    undo(1, true);
    holds(0, 70_000).await;
    world.mine(1);
    holds(70_000, 70_000).await;
    undo(2, false);
    holds(0, 0).await;
    for wallet in [sender, receiver] {
        wallet.stop().await.unwrap();
    }
}

/// A block with a channel's funding is taken back, by chance or by a source that lies: the channel ends, since it might be
/// double-spent from then on, and both have what was theirs.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_whose_funding_is_taken_back_ends_and_nothing_is_lost() {
    let world = World::new().await;
    let (payer, payee) = (world.start("payer").await, world.start("payee").await);
    world.fund(&[&payer, &payee]).await;
    let had = async |wallet: &LdkWallet| wallet.balance().await.unwrap().onchain_total_sat;
    let (payer_had, payee_had) = (had(&payer).await, had(&payee).await);
    const PUSHED_SAT: u64 = 30_000;
    world.open(&payer, &payee, CAPACITY_SAT, Msat(PUSHED_SAT * 1_000)).await;
    let depth = payer.channels().await.unwrap()[0].confirmations;
    reorganise(&world, depth, true);
    for wallet in [&payer, &payee] {
        wallet.sync().await.unwrap();
        let closed = next(wallet, |e| matches!(e, WalletEvent::ChannelClosed { .. })).await;
        let WalletEvent::ChannelClosed { forced, reason, .. } = closed else { unreachable!() };
        assert!(forced && reason.contains("un-confirmed"), "{reason}");
    }
    world.mine(1);
    let (payer_has, payee_has) = (all_back(&world, &payer).await, all_back(&world, &payee).await);
    eprintln!("a funding taken back cost {} sat in all", payer_had + payee_had - payer_has - payee_has);
    assert!(payer_has + PUSHED_SAT <= payer_had && payer_has + PUSHED_SAT + MINERS_SAT > payer_had, "{payer_has}");
    assert!(payee_has <= payee_had + PUSHED_SAT && payee_has + MINERS_SAT > payee_had + PUSHED_SAT, "{payee_has}");
    payer.stop().await.unwrap();
    payee.stop().await.unwrap();
}

/// A liquidity provider that opens a channel which cannot carry the payment: it gets nothing, and nobody loses anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_liquidity_provider_that_opens_less_is_paid_nothing() {
    let world = World::new().await;
    let listen = free_addr();
    let service = LSPS2ServiceConfig {
        require_token: None,
        advertise_service: false,
        channel_opening_fee_ppm: 10_000,
        // No room beside the payment itself: the reserve alone makes the channel too small for it.
        channel_over_provisioning_ppm: 0,
        min_channel_opening_fee_msat: 100_000,
        min_channel_lifetime: 1_008,
        max_client_to_self_delay: 2_016,
        min_payment_size_msat: 1_000_000,
        max_payment_size_msat: 1_000_000_000,
        client_trusts_lsp: false,
    };
    let lsp = stranger(&world, listen, Some(service));
    world.fund_address(&lsp.onchain_payment().new_address().unwrap().to_string());
    tokio::task::block_in_place(|| lsp.sync_wallets()).unwrap();
    let payer = world.start("payer").await;
    world.fund(&[&payer]).await;
    open(&world, &payer, &lsp, listen).await;
    let key = LightningKey(lsp.node_id().serialize());
    let named = Lsp { node: key, addr: listen, token: None, max_fee_permille: 50 };
    let provider = LdkConfig { lsp: Some(named), ..world.config("provider", free_addr()) };
    let provider = LdkWallet::start(provider).await.unwrap();
    let ask = Receive { amount: Msat(9_000_000), description: "first".into(), expiry_secs: 600, max_lsp_fee: None };
    let made = provider.receive(ask).await.unwrap();
    payer.pay(&made.invoice.bolt11, Msat(200_000)).await.unwrap();
    let hash = made.invoice.payment_hash;
    let ended = next(
        &payer,
        |e| matches!(e, WalletEvent::PaymentFailed { hash: of, .. } | WalletEvent::PaymentSettled { hash: of, .. } if *of == hash),
    );
    let ended = ended.await;
    assert!(matches!(ended, WalletEvent::PaymentFailed { .. }), "{ended:?}");
    assert_eq!(lsp.list_channels().len(), 2, "it did open one");
    assert_eq!(provider.lookup(hash).await.unwrap(), PaymentState::InFlight, "the invoice was not paid");
    assert_eq!(provider.balance().await.unwrap().lightning_total, Msat::ZERO);
    assert_eq!(provider.fees_paid().await.unwrap().lsp, Msat::ZERO);
    let left = payer.balance().await.unwrap();
    assert_eq!(left.lightning_total, Msat(CAPACITY_SAT * 1_000), "{left:?}");
    for wallet in [payer, provider] {
        wallet.stop().await.unwrap();
    }
    tokio::task::block_in_place(|| lsp.stop()).unwrap();
}

/// A BOLT 12 offer of a node that is not ours, as sweeps pay it.
#[tokio::test(flavor = "multi_thread")]
async fn an_offer_is_paid() {
    let world = World::new().await;
    let payer = world.start("payer").await;
    world.fund(&[&payer]).await;
    let listen = free_addr();
    let node = stranger(&world, listen, None);
    open(&world, &payer, &node, listen).await;
    let offer = node.bolt12_payment().receive_variable_amount("rent", None).unwrap().to_string();
    let amount = Msat(9_876_543);
    let garbled = payer.pay_offer(&offer.replace("lno1", "lno1q"), amount, Msat(1_000)).await;
    assert!(matches!(garbled, Err(PayError::BadInvoice { .. })), "{garbled:?}");
    payer.pay_offer(&offer, amount, Msat(1_000)).await.unwrap();
    let settled = next(&payer, |e| matches!(e, WalletEvent::PaymentSettled { .. } | WalletEvent::PaymentFailed { .. }));
    let settled = settled.await;
    let WalletEvent::PaymentSettled { hash, fee, .. } = settled else { panic!("{settled:?}") };
    let arrived = loop {
        let event = tokio::time::timeout(LIMIT, node.next_event_async()).await.unwrap();
        node.event_handled().unwrap();
        if let Event::PaymentReceived { amount_msat, .. } = event {
            break amount_msat;
        }
    };
    assert_eq!((arrived, fee), (amount.0, Msat::ZERO));
    let rows = payer.payments().await.unwrap();
    assert!(rows.iter().any(|row| row.hash == hash && row.amount == amount), "{rows:?}");
    payer.stop().await.unwrap();
    tokio::task::block_in_place(|| node.stop()).unwrap();
}
