//! Starts the house of a provider's front door: a consumer beside the provider, with a ledger of its own.

use super::checkpoints::sign_checkpoints;
use super::open::{Keys, catalogue, wallet_network};
use super::parts::route_ended;
use crate::accounts::recover::Costs;
use crate::config::Config;
use crate::door::HouseWallet;
use crate::drive::{
    bookkeeper::Own,
    consumer::{self, ConsumerDriver, ConsumerView},
    fresh_seed,
    journal::JournalWriter,
    market::Market,
    payments, provider,
    wallet::WalletPump,
};
use crate::store::Store;
use anyhow::Context;
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    entry::{Draft, Evidence},
    journal::Journal,
};
use satgrid_ledger_sqlite::{KeyStore, SqliteJournal};
use satgrid_node::{
    consumer::{Consumer, ConsumerConfig},
    recover::{Fold, Recovered},
};
use satgrid_protocol::slices::SlicePolicy;
use satgrid_protocol_quic::{Limits, QuicEndpoint};
use satgrid_types::{Msat, NodeKey, NostrKey, VerifiedListing};
use satgrid_wallet::{Embedded, Lightning};
use sha2::{Digest, Sha256};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, RwLock},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// The house's ledger, beside the node's.
const LEDGER: &str = "house.sqlite";
/// Advances cost nothing and are not at risk: they stay in this process. So slices may be large, and few.
const FIRST_SLICE: Msat = Msat::sat(1_000);
const LARGEST_SLICE: Msat = Msat::sat(20_000);
const NO_CAP: Msat = Msat::sat(1_000_000_000);

/// The house's ledger, opened and folded, before anything runs.
pub(super) struct HouseBooks {
    journal: SqliteJournal,
    writer: JournalWriter,
    recovered: Recovered,
    identity: SigningKey,
    sessions: [u8; 32],
}

/// A key of the house's, from the node's own.
fn derived(keys: &Keys, what: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(b"satgrid-house-v1\0").chain_update(what).chain_update(keys.sessions).finalize().into()
}

impl HouseBooks {
    /// Opens the ledger; what open calls have cost the house goes to `costs`.
    pub(super) async fn open(config: &Config, keys: &Keys, costs: &mut Costs) -> anyhow::Result<HouseBooks> {
        let identity = SigningKey::from_bytes(&derived(keys, b"identity"));
        let path = config.node.dir.join(LEDGER);
        let journal = SqliteJournal::open(&path).await;
        let journal = journal.with_context(|| format!("the house's ledger {} cannot be opened", path.display()))?;
        let mut fold = Fold::new([NodeKey(identity.verifying_key().to_bytes())]);
        let opened: Arc<dyn Journal> = Arc::new(journal.clone());
        let writer = JournalWriter::open(opened, |entry| {
            fold.entry(entry);
            costs.house_entry(entry);
        });
        let writer = writer.await.context("the house's ledger does not fold")?;
        let recovered = fold.finish();
        costs.house_restored(&recovered.consumer_sessions);
        Ok(HouseBooks { journal, writer, recovered, identity, sessions: derived(keys, b"sessions") })
    }
}

/// What the house stands beside.
pub(super) struct Beside<'a> {
    pub config: &'a Config,
    pub nostr: NostrKey,
    /// The provider's.
    pub journal: JournalWriter,
    pub key_store: KeyStore,
    pub wallet: Arc<dyn Embedded>,
    pub provider: mpsc::Sender<provider::Message>,
    pub offered: watch::Receiver<Vec<VerifiedListing>>,
    pub quic_listen: SocketAddr,
    pub shutdown: CancellationToken,
}

/// The house as its gateway needs it.
pub(super) struct House {
    pub market: Market,
    pub endpoint: QuicEndpoint,
    pub consumer: mpsc::Sender<consumer::Message>,
    pub view: Arc<RwLock<ConsumerView>>,
    /// Where the provider is dialled: on this machine.
    pub at: SocketAddr,
    store: Store,
    identity: SigningKey,
}

impl House {
    pub(super) async fn start(books: HouseBooks, beside: Beside<'_>) -> anyhow::Result<House> {
        let HouseBooks { journal, writer, recovered, identity, sessions } = books;
        let Beside { config, nostr, journal: providers, key_store, wallet, provider, offered, quic_listen, shutdown } =
            beside;
        let store = Store::Sqlite(journal);
        if recovered.genesis.is_none() {
            let node = NodeKey(identity.verifying_key().to_bytes());
            let (lightning, network) = (wallet.node_id(), config.node.network.name().to_owned());
            let genesis = Evidence::Genesis { node, nostr, lightning, network };
            writer.append(vec![Draft::of(genesis)]).await.map_err(anyhow::Error::msg)?;
        }
        let house = Arc::new(HouseWallet::new(wallet, key_store, providers, provider));
        let lightning: Arc<dyn Lightning> = house.clone();
        let (handled, handled_inbox) = mpsc::unbounded_channel();
        let (ended, ended_inbox) = mpsc::unbounded_channel();
        let payments = payments::start(lightning.clone(), None, ended, handled.clone());
        let any = match quic_listen.ip() {
            IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let endpoint = QuicEndpoint::bind_client(any, Limits::default(), &shutdown)?;
        let market = Market::new(catalogue(config)?);
        tokio::spawn(market.clone().own(offered, shutdown.clone()));
        let mut role = Consumer::new(consumer_config(config), sessions, fresh_seed());
        role.restore(recovered.consumer_sessions, recovered.opened, recovered.settled_with);
        let view: Arc<RwLock<ConsumerView>> = Arc::default();
        let at = dialled(quic_listen);
        let consumer = consumer::start(ConsumerDriver {
            role,
            master: sessions,
            journal: writer.clone(),
            wallet: lightning.clone(),
            payments: payments.clone(),
            handled,
            endpoint: endpoint.clone(),
            at: Some(at),
            market: market.clone(),
            store: store.clone(),
            view: view.clone(),
            shutdown: shutdown.clone(),
        });
        tokio::spawn(route_ended(ended_inbox, None, Some(consumer.clone()), None));
        house.restore().await.context("payments of the house cannot be told")?;
        let pump = WalletPump {
            wallet: lightning,
            journal: writer,
            payments,
            provider: None,
            consumer: Some(consumer.clone()),
            door: None,
            handled: handled_inbox,
            // It has no channels that could close.
            changes: mpsc::unbounded_channel().0,
            // The house has no money of its own.
            own: Own::default(),
            shutdown: shutdown.clone(),
        };
        tokio::spawn(pump.run());
        tokio::spawn(sign_checkpoints(store.clone(), identity.clone(), None, None, shutdown));
        Ok(House { market, endpoint, consumer, view, at, store, identity })
    }

    /// The last word on its books.
    pub(super) async fn close(self) {
        if let Err(error) = self.store.checkpoint(&self.identity).await {
            tracing::warn!(%error, "no checkpoint of the house was signed at the end");
        }
        self.store.close().await;
    }
}

/// Where a socket that listens there is reached from this machine.
fn dialled(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    SocketAddr::from((ip, listen.port()))
}

fn consumer_config(config: &Config) -> ConsumerConfig {
    ConsumerConfig {
        slices: SlicePolicy { first: FIRST_SLICE, largest: LARGEST_SLICE },
        first_routed: FIRST_SLICE,
        session_cap: NO_CAP,
        exposure_cap: NO_CAP,
        network: wallet_network(config.node.network),
        idle_ms: config.session.idle_close_s.saturating_mul(1_000),
        // The balance stays for the next client's call.
        refund_idle: false,
        ..ConsumerConfig::default()
    }
}
