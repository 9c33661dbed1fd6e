//! `satgrid up`: assembles a node from its configuration, runs it until it is told to stop, and takes it down in order.
//!
//! Order up: journal, wallet, engines, links, roles, market, edges. Order down: edges first, so that nobody is promised
//! anything more; then the shutdown token, which ends drivers and links; the wallet last, cleanly, since a wallet that is
//! killed may lose its channels.

mod checkpoints;
mod house;
mod identity;
mod open;
mod parts;
mod window;

pub(crate) use open::{backups, beside_journal, catalogue, chain_source, cold_keys, wallet_network};

use house::{Beside, House, HouseBooks};

use crate::accounts::{Desk, recover::Costs};
use crate::admin;
use crate::clock;
use crate::config::{Config, DoorSells};
use crate::door::{DoorDesk, Till};
use crate::drive::{
    bookkeeper::{Bookkeeper, Own},
    channels::{Keeper, Wished},
    figures::{Figures, WalletFigures},
    journal::JournalWriter,
    market::Market,
    metered::EngineFigures,
    now,
    restore::{self, Restorer},
    sweep::Sweeper,
    tokenizers::Tokenizers,
    wallet::keep_connected,
};
use crate::failure::HintExt;
use crate::seed;
use crate::service::Gateway;
use crate::signals;
use crate::store::Store;
use crate::traces::Traces;
use anyhow::{Context, bail};
use parts::Node;
use satgrid_api::{Api, MetricsRegistry, admin_router, metrics_router, serve_admin};
use satgrid_ledger::{
    entry::{Draft, Evidence},
    journal::Journal,
};
use satgrid_ledger_sqlite::KeyStore;
use satgrid_node::recover::{Fold, Recovered};
use satgrid_protocol_quic::Code;
use satgrid_types::{Msat, NostrKey, node_key};
use satgrid_wallet::Embedded;
use std::{
    net::SocketAddr,
    os::unix::process::CommandExt,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// How long the wallet may take to stop.
const WALLET_STOP: Duration = Duration::from_secs(20);

/// How long the relays may take to hear that this node has stopped.
const HEARTBEAT_STOP: Duration = Duration::from_secs(3);

/// Most threads of the node itself.
const MAX_THREADS: usize = 64;

/// Runs a node until a signal. Blocks.
pub(crate) fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads(&config)).enable_all().build()?;
    let result = runtime.block_on(node(config));
    // Tasks that still wait for a peer are not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result? {
        Ended::Told => Ok(()),
        Ended::Anew => {
            // The same process, from the beginning: what is on the disk is all that counts.
            let exe = crate::program().context("this program does not find itself")?;
            let mut again = std::process::Command::new(exe);
            again.args(std::env::args_os().skip(1));
            let passphrase = seed::taken_along()?;
            if let Some((_, place)) = &passphrase {
                again.args(["--set", place]);
            }
            let error = again.exec();
            Err(error).context("this program cannot be started anew")
        }
    }
}

/// Why a node stopped in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// By a signal.
    Told,
    /// The disk was full and has room again: the journal is folded anew.
    Anew,
}

/// Engines want the cores too, and a token that wakes a second thread costs more than it gains: half of them by default.
fn threads(config: &Config) -> usize {
    let half = || std::thread::available_parallelism().map_or(1, |cores| cores.get() / 2);
    usize::try_from(config.node.threads).ok().filter(|&asked| asked > 0).unwrap_or_else(half).clamp(1, MAX_THREADS)
}

async fn node(config: Config) -> anyhow::Result<Ended> {
    if !config.is_provider() && !config.is_consumer() {
        bail!("node.roles is empty: nothing to run");
    }
    let keys = open::keys(&config).await?;
    let ours = node_key(&keys.identity);
    let nostr = NostrKey(keys.nostr.x_only_public_key().0.serialize());
    tracing::info!(node = %ours, network = config.node.network.name(), "starting");

    // Ports first: a port that is taken is told at once, before money or models are touched.
    let admin_port = listen(config.api.admin, "api.admin").await?;
    let api_port = if config.is_consumer() { Some(listen(config.api.listen, "api.listen").await?) } else { None };

    let door_port = match config.door.listen {
        Some(address) => Some(listen(address, "door.listen").await?),
        None => None,
    };
    let life = CancellationToken::new();
    let heartbeat = open::claim_seed(&config, &keys, life.clone()).await?;

    let journal = open::open_journal(&config).await?;
    let key_store = open::open_keys(&config).await?;
    let mut costs = Costs::of(&key_store).await?;
    let mut fold = Fold::new(keys.all());
    let opened: Arc<dyn Journal> = Arc::new(journal.clone());
    let writer = JournalWriter::open(opened, |entry| {
        fold.entry(entry);
        costs.entry(entry);
        costs.charge(entry);
    });
    let writer = writer.await.context("the ledger does not fold")?;
    let recovered = fold.finish();
    costs.restored(&recovered.consumer_sessions);
    let resale = Till::resale(writer.clone(), config.door.margin_permille);
    let house = match config.has_house() {
        true => Some(HouseBooks::open(&config, &keys, &mut costs).await?),
        false => None,
    };
    let till = if house.is_some() { Till::own(writer.clone()) } else { resale.clone() };
    costs.settle(&key_store, &till).await.context("calls of the last run cannot be settled")?;

    let restoring = restore::read(&config.node.dir)?;
    let wallet = open::open_wallet(&config, &keys, restoring.as_ref()).await?;
    let lightning = wallet.lightning.clone();
    let identity = keys.identity.clone();
    let budgets = key_store.clone();
    let opened = Opened {
        config,
        keys,
        nostr,
        journal: journal.clone(),
        writer,
        recovered,
        restoring: Arc::new(Mutex::new(restoring)),
        wallet,
        admin_port,
        api_port,
        door_port,
        key_store,
        tills: (resale, till),
        house,
    };
    let outcome = opened.run().await;
    if let Err(error) = budgets.flush().await {
        tracing::warn!(%error, "what the last calls cost was not written down");
    }
    match tokio::time::timeout(WALLET_STOP, lightning.stop()).await {
        Ok(Ok(())) => tracing::info!("stopped"),
        Ok(Err(error)) => tracing::warn!(%error, "the wallet did not stop cleanly"),
        Err(_) => tracing::warn!("the wallet did not stop in {} s", WALLET_STOP.as_secs()),
    }
    // The last word on the books: a tree head over everything that this run wrote.
    if let Err(error) = journal.checkpoint(&identity).await {
        tracing::warn!(%error, "no checkpoint was signed at the end");
    }
    journal.close().await;
    life.cancel();
    if let Some(heartbeat) = heartbeat {
        let _ = tokio::time::timeout(HEARTBEAT_STOP, heartbeat).await;
    }
    outcome
}

/// Everything that was opened: what has to be closed whatever happens, and what runs in between.
struct Opened {
    config: Config,
    keys: open::Keys,
    nostr: NostrKey,
    journal: Store,
    writer: JournalWriter,
    recovered: Recovered,
    restoring: restore::Shared,
    wallet: open::Wallet,
    admin_port: TcpListener,
    api_port: Option<TcpListener>,
    door_port: Option<TcpListener>,
    key_store: KeyStore,
    /// Of this node's own edge, and of the front door.
    tills: (Till, Till),
    house: Option<HouseBooks>,
}

impl Opened {
    /// Starts the parts, serves until a signal, and ends the parts again. The wallet and the journal stay open.
    async fn run(self) -> anyhow::Result<Ended> {
        let Opened { config, keys, nostr, journal, writer, recovered, restoring, .. } = self;
        let (wallet, admin_port, api_port, key_store) = (self.wallet, self.admin_port, self.api_port, self.key_store);
        let (mut door_port, tills, house) = (self.door_port, self.tills, self.house);
        let ours = node_key(&keys.identity);
        let lightning = wallet.lightning.clone();
        let embedded: Option<Arc<dyn Embedded>> = wallet.embedded.clone().map(|process| process as Arc<dyn Embedded>);
        let admin_token = admin::token(&config.node.dir)?;
        let shutdown = CancellationToken::new();
        // Whatever fails on the way up takes the drivers down with it.
        let _ends_with_this = shutdown.clone().drop_guard();
        if recovered.genesis.is_none() {
            let (lightning, network) = (lightning.node_id(), config.node.network.name().to_owned());
            let genesis = Evidence::Genesis { node: ours, nostr, lightning, network };
            writer.append(vec![Draft::of(genesis)]).await.map_err(anyhow::Error::msg)?;
        }
        self::identity::follow(&config, &keys, &recovered, &writer, &journal).await?;

        let full = writer.full();
        let own = Own::default();
        let bookkeeper = Bookkeeper {
            wallet: lightning.clone(),
            embedded: embedded.clone(),
            store: journal.clone(),
            keys: key_store.clone(),
            journal: writer.clone(),
            own: own.clone(),
            shutdown: shutdown.clone(),
        };
        tokio::spawn(bookkeeper.run());
        let sweeper = match &embedded {
            Some(embedded) => {
                let cold = cold_keys(&config, &keys.seed);
                let sweeper = Arc::new(Sweeper::new(&config, embedded.clone(), own.clone(), cold)?);
                tokio::spawn(sweeper.clone().run(shutdown.clone()));
                Some(sweeper)
            }
            None => None,
        };
        let node = Node {
            config: &config,
            keys: &keys,
            nostr,
            journal: writer.clone(),
            store: journal.clone(),
            wallet: lightning.clone(),
            embedded: embedded.clone(),
            key_store: key_store.clone(),
            own: own.clone(),
            shutdown: shutdown.clone(),
        };
        let market = Market::new(catalogue(&config)?);
        let running = node.start(recovered, &market).await?;

        let relays = running.relays.clone();
        let connected = move || {
            let health = relays.borrow();
            (health.iter().filter(|relay| relay.connected).count(), health.len())
        };
        let clock = clock::watch(&config, shutdown.clone());
        let wished = Wished::default();
        let admin_state = admin::State {
            token: admin_token,
            node_key: ours,
            nostr_key: nostr,
            wallet: lightning.clone(),
            embedded: embedded.clone(),
            wished: wished.clone(),
            restoring: restoring.clone(),
            own,
            sweeper,
            apps: open::serve_apps(&config, &keys, &wallet).await?,
            app_relays: config.market.relays.clone(),
            wants: (sells(&config), buys(&config)),
            network: config.node.network.name(),
            quic_listen: running.quic_listen,
            provider: running.provider_view.clone(),
            consumer: running.consumer_view.clone(),
            consumer_inbox: running.consumer.clone(),
            relays: running.relays.clone(),
            api_listen: api_port.as_ref().and_then(|port| port.local_addr().ok()),
            engines: running.engines.clone(),
            started: now(),
            market: market.clone(),
            heard: running.heard.clone(),
            clock: clock.clone(),
        };
        tokio::spawn(checkpoints::sign_checkpoints(
            journal.clone(),
            keys.identity.clone(),
            running.publisher.clone(),
            running.provider.clone(),
            shutdown.clone(),
        ));
        if let Some(embedded) = embedded {
            tokio::spawn(keep_connected(embedded.clone(), shutdown.clone()));
            let restorer = Restorer {
                wallet: embedded.clone(),
                journal: writer.clone(),
                dir: config.node.dir.clone(),
                shared: restoring.clone(),
                shutdown: shutdown.clone(),
            };
            tokio::spawn(restorer.run());
            let keeper = Keeper {
                wallet: embedded,
                dir: config.node.dir.clone(),
                backup: config.wallet.backup.clone(),
                network: config.node.network.name(),
                reopen: config.wallet.reopen,
                restoring,
                wished,
                wants: (sells(&config), buys(&config)),
                shutdown: shutdown.clone(),
            };
            tokio::spawn(keeper.run(running.changes));
        }
        let edges = CancellationToken::new();
        let mut tasks = tokio::task::JoinSet::new();
        let rate = open::exchange_rate(&config, &shutdown)?;
        let traces = config.log.otlp_endpoint.as_deref().map(Traces::start).transpose()?;
        let desk = Desk::new(key_store.clone(), rate.clone(), tills.0, traces.clone());
        let mut admin_routes = admin::router(admin_state, desk.clone());
        let mut registry = MetricsRegistry::default();
        registry.register(Arc::new(Figures {
            provider: running.provider_view.clone(),
            consumer: running.consumer_view.clone(),
            relays: running.relays.clone(),
            wallet: WalletFigures::watch(lightning.clone(), shutdown.clone()),
        }));
        registry.register(Arc::new(EngineFigures(running.metered.clone())));
        if let (Some(port), Some(inbox), Some(view)) = (api_port, &running.consumer, &running.consumer_view) {
            let gateway = Arc::new(Gateway {
                market: market.clone(),
                tokenizers: Tokenizers::new(config.node.dir.join("tokenizers"), running.endpoint.clone()),
                consumer: inbox.clone(),
                wallet: lightning.clone(),
                view: view.clone(),
                relays: Box::new(connected),
                clock: clock.clone(),
                allow_unverified_names: config.consumer.allow_unverified_names,
                only: open::patterns("consumer.only", &config.consumer.only)?,
                prefer: open::patterns("consumer.prefer", &config.consumer.prefer)?,
                desk: desk.clone(),
                next_call: AtomicU64::new(0),
                started: now(),
            });
            desk.serves(&gateway);
            let api = Api::new(gateway.clone(), open::api_config(&config, desk.clone())?);
            if config.door_sells() == DoorSells::Market
                && let (Some(port), Some(door)) = (door_port.take(), running.door.clone())
            {
                let front = FrontDoor { port, door, gateway: gateway.clone(), desk: desk.clone() };
                front.open(&config, &edges, &mut tasks)?;
            }
            let mut registry = registry;
            registry.register(api.metrics());
            registry.register(desk.meter.clone());
            admin_routes = admin_routes.merge(admin_router(gateway, registry));
            tracing::info!(address = %port.local_addr()?, "OpenAI-compatible endpoint");
            let edges = edges.clone();
            tasks.spawn(async move { Ok(api.serve(port, edges.cancelled_owned()).await?) });
        } else {
            admin_routes = admin_routes.merge(metrics_router(registry));
        }
        let house = match (house, &running.provider, &running.publisher, &wallet.embedded) {
            (Some(books), Some(provider), Some(publisher), Some(wallet)) => {
                let beside = Beside {
                    config: &config,
                    nostr,
                    journal: writer.clone(),
                    key_store: key_store.clone(),
                    wallet: wallet.clone(),
                    provider: provider.clone(),
                    offered: publisher.offered(),
                    quic_listen: running.endpoint.local_addr()?,
                    shutdown: shutdown.clone(),
                };
                Some(House::start(books, beside).await?)
            }
            (_, _, _, _) => None,
        };
        if let (Some(house), Some(port), Some(door)) = (&house, door_port, running.door.clone()) {
            let desk = Desk::new(key_store, rate, tills.1, traces);
            let dir = config.node.dir.join("tokenizers");
            let gateway = Arc::new(Gateway {
                market: house.market.clone(),
                tokenizers: Tokenizers::own(dir, house.endpoint.clone(), house.at),
                consumer: house.consumer.clone(),
                wallet: lightning.clone(),
                view: house.view.clone(),
                // What it sells is here, whoever hears of it.
                relays: Box::new(|| (1, 1)),
                clock: clock.clone(),
                // The names are the operator's own.
                allow_unverified_names: true,
                only: Vec::new(),
                prefer: Vec::new(),
                desk: desk.clone(),
                next_call: AtomicU64::new(0),
                started: now(),
            });
            FrontDoor { port, door, gateway, desk }.open(&config, &edges, &mut tasks)?;
        }
        let admin_edges = edges.clone();
        tasks.spawn(async move { Ok(serve_admin(admin_port, admin_routes, admin_edges.cancelled_owned()).await?) });
        tracing::info!("up");

        let outcome = tokio::select! {
            () = signals::stop() => Ok(Ended::Told),
            full = wallet_gone(&wallet, &config) => match full {
                true => Ok(Ended::Anew),
                false => Err(anyhow::anyhow!("the wallet's process is gone; start the node again")),
            },
            () = parts::space(&config).back_after(full) => Ok(Ended::Anew),
            Some(ended) = tasks.join_next() => match ended.context("an edge panicked") {
                Ok(Ok(())) => Err(anyhow::anyhow!("an edge ended by itself")),
                Ok(Err(error)) | Err(error) => Err(error),
            },
        };
        tracing::info!("stopping");
        edges.cancel();
        while tasks.join_next().await.is_some() {}
        shutdown.cancel();
        if let Some(publisher) = running.publisher.and_then(Arc::into_inner) {
            publisher.stopped().await;
        }
        if let Some(house) = house {
            house.endpoint.shutdown(Code::SHUTTING_DOWN, "the node is stopping").await;
            house.close().await;
        }
        running.endpoint.shutdown(Code::SHUTTING_DOWN, "the node is stopping").await;
        running.engines.iter().for_each(|(_, engine)| engine.shut_down());
        running.stages.iter().for_each(|stage| stage.shut_down());
        running.leads.iter().for_each(|lead| lead.shut_down());
        outcome
    }
}

/// Resolves when the wallet ended by itself. A Lightning node that cannot write its channels must end; where the disk is full,
/// that is why, and this waits until there is room: then a start is of use, and true.
async fn wallet_gone(wallet: &open::Wallet, config: &Config) -> bool {
    wallet.gone().await;
    let space = parts::space(config);
    if !space.is_full() {
        return false;
    }
    tracing::error!("the wallet's process ended on a full disk; the node starts anew when there is room");
    space.back().await;
    true
}

/// The edge for strangers, ready to be served.
struct FrontDoor {
    port: TcpListener,
    door: Arc<DoorDesk>,
    gateway: Arc<Gateway>,
    desk: Arc<Desk>,
}

impl FrontDoor {
    fn open(
        self,
        config: &Config,
        edges: &CancellationToken,
        tasks: &mut tokio::task::JoinSet<anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        let FrontDoor { port, door, gateway, desk } = self;
        desk.serves(&gateway);
        let edge = open::door_api(config, gateway.clone(), desk, door)?;
        let tls = open::tls(config, edges)?;
        tracing::info!(address = %port.local_addr()?, tls = tls.is_some(), sells = ?config.door_sells(), "front door");
        let edges = edges.clone();
        tasks.spawn(async move {
            let served = edge.serve_over(port, tls, edges.cancelled_owned()).await;
            // The desk knows its gateway weakly; it lives as long as its edge.
            drop(gateway);
            Ok(served?)
        });
        Ok(())
    }
}

/// The smallest slice that this node takes, if it sells.
fn sells(config: &Config) -> Option<Msat> {
    config.is_provider().then(|| Msat::from_sat(config.provider.slice_min_sat)).flatten()
}

/// The smallest first slice that this node pays, if it buys.
fn buys(config: &Config) -> Option<Msat> {
    config.is_consumer().then(|| Msat::from_sat(config.consumer.slice_first_direct_sat)).flatten()
}

async fn listen(address: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("{key} {address} cannot be listened on"))
        .hint(format!("another process may hold the port; set {key} to another"))
}
