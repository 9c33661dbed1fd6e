//! Receiving from nothing: a provider with no channel and no coin is paid over a channel that a liquidity provider
//! opens for the payment (LSPS2, both ends ldk-node).
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, Msat};
use satgrid_wallet::{Embedded, InvoiceError, InvoiceRequest, Lightning, PaymentState, WalletEvent, embedded::Receive};
use satgrid_wallet_ldk::{LdkConfig, LdkWallet, Lsp, LspService};
use std::time::Instant;
use world::{World, free_addr, next};

fn ask(sat: u64, max_lsp_fee: Option<Msat>) -> Receive {
    Receive { amount: Msat(sat * 1_000), description: "first sats".into(), expiry_secs: 600, max_lsp_fee }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_with_nothing_is_paid() {
    let world = World::new().await;
    let listen = free_addr();
    let service = LspService { fee_ppm: 10_000, min_fee_msat: 100_000 };
    let config = LdkConfig { lsp_service: Some(service), ..world.config("lsp", listen) };
    let lsp = LdkWallet::start(config).await.unwrap();
    let payer = world.start("payer").await;
    world.fund(&[&lsp, &payer]).await;
    world.open(&payer, &lsp, 1_000_000, Msat::ZERO).await;

    let since = Instant::now();
    let named = Lsp { node: lsp.node_id(), addr: listen, token: None, max_fee_permille: 50 };
    let provider = LdkConfig { lsp: Some(named), ..world.config("provider", free_addr()) };
    let provider = LdkWallet::start(provider).await.unwrap();
    assert_eq!(provider.facts().await.unwrap().lsp, Some(lsp.node_id()));

    // The fee is known before the invoice is shown to anyone, and an operator's limit holds.
    let dear = provider.receive(ask(20_000, Some(Msat(199_999)))).await;
    assert!(matches!(dear, Err(InvoiceError::LspFee { .. })), "{dear:?}");
    let made = provider.receive(ask(20_000, None)).await.unwrap();
    assert_eq!(made.lsp_fee, Some(Msat(200_000)), "1 % of 20,000 sat");

    payer.pay(&made.invoice.bolt11, Msat(100_000)).await.unwrap();
    let got = next(&provider, |e| matches!(e, WalletEvent::PaymentReceived { .. })).await;
    let hash = made.invoice.payment_hash;
    assert_eq!(got, WalletEvent::PaymentReceived { hash, amount: Msat(19_800_000) });
    eprintln!("from an empty provider to its first earned sat: {:?}", since.elapsed());
    next(&payer, |e| matches!(e, WalletEvent::PaymentSettled { .. })).await;
    assert!(matches!(provider.lookup(hash).await.unwrap(), PaymentState::Settled { .. }));
    assert_eq!(provider.fees_paid().await.unwrap().lsp, Msat(200_000));

    // Now there is room: a slice needs no further channel, and costs the payer the route alone.
    let room = provider.balance().await.unwrap().receivable;
    assert!(room >= Msat(50_000_000), "{room}");
    let slice = InvoiceRequest { amount: Msat(250_000), description_hash: Digest([3; 32]), expiry_secs: 120 };
    let made = provider.create_invoice(slice).await.unwrap();
    payer.pay(&made.bolt11, Msat(5_000)).await.unwrap();
    let amount = Msat(250_000);
    next(&provider, |e| *e == WalletEvent::PaymentReceived { hash: made.payment_hash, amount }).await;
    assert_eq!(provider.channels().await.unwrap().len(), 1);

    // One that raises its fee above the operator's limit is not used, and one that is gone opens nothing: both are said
    // before anyone pays.
    lsp.stop().await.unwrap();
    drop(lsp);
    let dear = LspService { fee_ppm: 60_000, min_fee_msat: 100_000 };
    let config = LdkConfig { lsp_service: Some(dear), ..world.config("lsp", listen) };
    let lsp = LdkWallet::start(config).await.unwrap();
    provider.ensure_connected(lsp.node_id(), listen).await.unwrap();
    let refused = provider.receive(ask(900_000, None)).await;
    assert!(matches!(refused, Err(InvoiceError::LspFee { limit: Msat(45_000_000), .. })), "{refused:?}");
    lsp.stop().await.unwrap();
    let gone = provider.receive(ask(900_000, None)).await;
    assert!(matches!(gone, Err(InvoiceError::NoRoom { .. })), "{gone:?}");
    provider.stop().await.unwrap();
    payer.stop().await.unwrap();
}
