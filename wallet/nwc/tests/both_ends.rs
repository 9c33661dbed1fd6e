//! Our client against our service over a local relay, with fake Lightning wallets behind: the port's suite, budgets,
//! revocation, and a restart in the middle.
#![allow(clippy::unwrap_used)]

use nostr_relay_builder::builder::{RateLimit, RelayBuilder};
use nostr_relay_builder::local::LocalRelay;
use satgrid_types::{Digest, Msat, UnixMs};
use satgrid_wallet::{
    FailureReason, InvoiceRequest, Lightning, Network, PaymentState, WalletEvent,
    conformance::{self, Pair},
    fake::{FakeLightning, FakeNetwork, FaultRates},
};
use satgrid_wallet_nwc::{
    ConnectError, Connections, NewConnection, NwcConfig, NwcService, NwcWallet, ServiceConfig, budget::Renewal,
};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(120);

fn now() -> UnixMs {
    UnixMs(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64)
}

async fn relay() -> LocalRelay {
    let generous = RateLimit { max_reqs: 500, notes_per_minute: 100_000 };
    let relay = LocalRelay::new(RelayBuilder::default().rate_limit(generous));
    relay.run().await.unwrap();
    relay
}

/// Two fake wallets with 100,000 sat each in a channel, on today's clock; somebody reads their events.
fn fakes() -> [FakeLightning; 2] {
    let mut network = FakeNetwork::new(7, FaultRates::NONE);
    network.handle_timeout(now());
    let wallets = FakeLightning::wallets::<2>(network);
    wallets[0].with_network(|n| n.add_channel(wallets[0].node_id(), wallets[1].node_id(), 200_000, Msat(100_000_000)));
    for wallet in wallets.clone() {
        tokio::spawn(async move {
            while wallet.next_event().await.is_ok() {
                let _ = wallet.event_handled().await;
            }
        });
    }
    wallets
}

struct App {
    dir: TempDir,
    relays: Vec<String>,
    service: NwcService,
    uri: String,
}

impl App {
    async fn new(relay: &LocalRelay, wallet: FakeLightning, budget: Msat, seed: u8) -> App {
        let (dir, relays) = (TempDir::new().unwrap(), vec![relay.url().await.to_string()]);
        let mut connections = Connections::open(dir.path().join("connections"), [seed; 32]).unwrap();
        let new = NewConnection {
            name: "app".into(),
            budget,
            renewal: Renewal::Never,
            relays: relays.clone(),
            secret: [seed + 1; 32],
        };
        let uri = connections.add(now(), new).unwrap();
        let service = serve(&relays, wallet, connections).await;
        App { dir, relays, service, uri }
    }
    fn config(&self) -> NwcConfig {
        NwcConfig { uri: self.uri.clone(), network: Network::Regtest, state: self.dir.path().join("state") }
    }
    async fn client(&self) -> NwcWallet {
        NwcWallet::connect(self.config()).await.unwrap()
    }
    fn left(&self) -> Msat {
        self.service.look(|c| c.all()[0].budget.as_ref().unwrap().left(now()))
    }
}

async fn serve(relays: &[String], wallet: FakeLightning, connections: Connections) -> NwcService {
    let config = ServiceConfig { relays: relays.to_vec() };
    NwcService::start(config, Arc::new(wallet), None, connections).await.unwrap()
}

fn ask(msat: u64) -> InvoiceRequest {
    InvoiceRequest { amount: Msat(msat), description_hash: Digest([9; 32]), expiry_secs: 600 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connected_wallet_conforms() {
    let relay = relay().await;
    let [one, other] = fakes();
    let payer_app = App::new(&relay, one.clone(), Msat(1_000_000_000), 1).await;
    let payee_app = App::new(&relay, other.clone(), Msat(1_000_000_000), 3).await;
    let (payer, payee) = (payer_app.client().await, payee_app.client().await);
    assert_eq!((payer.node_id(), payee.node_id()), (one.node_id(), other.node_id()));
    let pair = Pair { payer: &payer, payee: &payee, now: now() };
    tokio::time::timeout(LIMIT, conformance::run_payments(&pair)).await.expect("the suite ends in time");
    assert_eq!(payer.sign_message(b"x"), "");
    assert!(payer.channels().await.unwrap()[0].usable);

    // What was to be told before a restart is told after it.
    let made = payee.create_invoice(ask(5_000)).await.unwrap();
    payee.stop().await.unwrap();
    assert!(payee.next_event().await.is_err());
    payer.pay(&made.bolt11, Msat(1_000)).await.unwrap();
    assert!(matches!(payer.next_event().await.unwrap(), WalletEvent::PaymentSettled { .. }));
    let again = payee_app.client().await;
    let got = tokio::time::timeout(LIMIT, again.next_event()).await.unwrap().unwrap();
    assert_eq!(got, WalletEvent::PaymentReceived { hash: made.payment_hash, amount: Msat(5_000) });
    again.event_handled().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_holds_and_a_revoked_app_is_silent() {
    let relay = relay().await;
    let [one, other] = fakes();
    let app = App::new(&relay, one.clone(), Msat(20_000), 5).await;
    let client = app.client().await;
    let next = async || {
        let event = tokio::time::timeout(LIMIT, client.next_event()).await.unwrap().unwrap();
        client.event_handled().await.unwrap();
        event
    };
    let small = other.create_invoice(ask(10_000)).await.unwrap();
    client.pay(&small.bolt11, Msat(1_000)).await.unwrap();
    assert!(matches!(next().await, WalletEvent::PaymentSettled { fee: Msat(0), .. }));
    assert_eq!(app.left(), Msat(10_000), "the fee limit was given back");

    // Its fee limit would not fit.
    let dear = other.create_invoice(ask(9_500)).await.unwrap();
    client.pay(&dear.bolt11, Msat(1_000)).await.unwrap();
    let failed = WalletEvent::PaymentFailed { hash: dear.payment_hash, reason: FailureReason::NoRoute };
    assert_eq!(next().await, failed);
    assert_eq!(one.lookup(dear.payment_hash).await.unwrap(), PaymentState::Unknown, "the wallet was never asked");
    assert_eq!(app.left(), Msat(10_000));

    // The budget survives a restart of the service.
    let App { dir, relays, service, uri } = app;
    drop(service);
    let connections = Connections::open(dir.path().join("connections"), [5; 32]).unwrap();
    assert_eq!(connections.all()[0].budget.as_ref().unwrap().left(now()), Msat(10_000));
    let service = serve(&relays, one.clone(), connections).await;
    let fits = other.create_invoice(ask(9_000)).await.unwrap();
    client.pay(&fits.bolt11, Msat(1_000)).await.unwrap();
    assert!(matches!(next().await, WalletEvent::PaymentSettled { .. }));

    service.change(|c| c.revoke("app")).unwrap();
    client.stop().await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let config = NwcConfig { uri, network: Network::Regtest, state: dir.path().join("other") };
    let silent = NwcWallet::connect(config).await.err().unwrap();
    assert!(matches!(silent, ConnectError::Silent(_)), "{silent}");
    private(&dir.path().join("connections"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_refused() {
    let dir = TempDir::new().unwrap();
    let config = |uri: &str, network| NwcConfig { uri: uri.into(), network, state: dir.path().join("state") };
    for bad in ["", "https://x", "nostr+walletconnect://abc?relay=ws://127.0.0.1:1"] {
        let refused = NwcWallet::connect(config(bad, Network::Regtest)).await;
        assert!(matches!(refused, Err(ConnectError::Uri)), "{bad}");
    }
    let relay = relay().await;
    let [one, _] = fakes();
    let app = App::new(&relay, one, Msat::ZERO, 9).await;
    let other = NwcWallet::connect(config(&app.uri, Network::Signet)).await;
    assert!(matches!(other, Err(ConnectError::OtherNetwork { .. })));
}

fn private(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
}
