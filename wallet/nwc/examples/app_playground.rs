//! A relay, our service in front of a fake wallet, and somebody to pay: for a client that is not ours
//! (`tests/interop/nwc`). Prints one line of JSON with what the client needs, and runs until its input ends.
#![allow(clippy::unwrap_used)]

use nostr_relay_builder::builder::{RateLimit, RelayBuilder};
use nostr_relay_builder::local::LocalRelay;
use satgrid_types::{Digest, Msat, UnixMs};
use satgrid_wallet::{
    InvoiceRequest, Lightning,
    fake::{FakeLightning, FakeNetwork, FaultRates},
};
use satgrid_wallet_nwc::{Connections, NewConnection, NwcService, ServiceConfig, budget::Renewal};
use std::{
    io::Read,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

fn now() -> UnixMs {
    UnixMs(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap())
}

#[tokio::main]
async fn main() {
    let relay =
        LocalRelay::new(RelayBuilder::default().rate_limit(RateLimit { max_reqs: 500, notes_per_minute: 100_000 }));
    relay.run().await.unwrap();
    let mut network = FakeNetwork::new(3, FaultRates::NONE);
    network.handle_timeout(now());
    let [ours, shop] = FakeLightning::wallets::<2>(network);
    ours.with_network(|n| n.add_channel(ours.node_id(), shop.node_id(), 200_000, Msat(100_000_000)));
    for wallet in [ours.clone(), shop.clone()] {
        tokio::spawn(async move {
            while wallet.next_event().await.is_ok() {
                let _ = wallet.event_handled().await;
            }
        });
    }
    let dir = tempfile::TempDir::new().unwrap();
    let relays = vec![relay.url().await.to_string()];
    let mut connections = Connections::open(dir.path().join("connections"), [1; 32]).unwrap();
    let mut connect = |name: &str, budget: u64, byte: u8| {
        let (name, budget, relays) = (name.to_owned(), Msat(budget), relays.clone());
        let new = NewConnection { name, budget, renewal: Renewal::Daily, relays, secret: [byte; 32] };
        connections.add(now(), new).unwrap()
    };
    let (spender, watcher) = (connect("spender", 100_000, 2), connect("watcher", 0, 3));
    let service = ServiceConfig { relays: relays.clone() };
    let _service = NwcService::start(service, Arc::new(ours.clone()), None, connections).await.unwrap();
    let mut invoices = Vec::new();
    for msat in [21_000, 90_000, 5_000] {
        let ask = InvoiceRequest { amount: Msat(msat), description_hash: Digest([4; 32]), expiry_secs: 600 };
        invoices.push(shop.create_invoice(ask).await.unwrap().bolt11);
    }
    let node = ours.node_id();
    println!("{}", serde_json::json!({ "spender": spender, "watcher": watcher, "invoices": invoices, "node": node }));
    let ends = tokio::task::spawn_blocking(|| std::io::stdin().read_to_string(&mut String::new()));
    let _ = ends.await;
}
