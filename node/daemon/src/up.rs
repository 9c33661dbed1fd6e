//! `satgrid up`: assembles a node from its configuration, runs it until it is told to stop, and takes it down in order.
//!
//! Order up: journal, wallet, engines, links, roles, market, edges. Order down: edges first, so that nobody is promised
//! anything more; then the shutdown token, which ends drivers and links; the wallet last, cleanly, since a wallet that is
//! killed may lose its channels.

use crate::admin;
use crate::config::{ChainSource, Config, Network};
use crate::drive::{
    consumer::{self, ConsumerDriver, ConsumerView},
    engines::{self, ForSale, Identity, TokenizersForSale},
    fresh_seed,
    journal::JournalWriter,
    market::{Listening, Market},
    now, payments,
    provider::{self, ProviderDriver, ProviderView},
    tokenizers::Tokenizers,
    wallet::WalletPump,
};
use crate::failure::HintExt;
use crate::service::Gateway;
use crate::signals;
use anyhow::{Context, bail};
use ed25519_dalek::SigningKey;
use satgrid_api::{ApiConfig, ApiKey};
use satgrid_engine::port::Engine;
use satgrid_engine_llama::LlamaEngine;
use satgrid_ledger::{
    entry::{Draft, Evidence},
    journal::Journal,
};
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_market::{Catalogue, ProviderPattern};
use satgrid_market_nostr::{Publisher, PublisherConfig, RelayConfig, RelayHealth};
use satgrid_node::{
    consumer::{Consumer, ConsumerConfig},
    provider::{EngineId, Offering, Provider, ProviderConfig, ProviderEvent},
    recover::{Fold, Recovered},
};
use satgrid_protocol::slices::SlicePolicy;
use satgrid_protocol_quic::{
    Code, Limits, QuicEndpoint,
    artefact::{ArtefactServer, ServeLimits},
};
use satgrid_types::{Digest, Msat, NostrKey, Terms, node_key};
use satgrid_wallet::{
    FailureReason, Lightning,
    keys::{Phrase, Seed},
    payment::Outcome,
};
use satgrid_wallet_ldk::{LdkConfig, LdkWallet};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, RwLock, atomic::AtomicU64},
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

/// How long the wallet may take to stop.
const WALLET_STOP: Duration = Duration::from_secs(20);
/// The `d` of this node's published checkpoints.
const LOG_NAME: &str = "journal";
/// Name and version that receipts carry.
const ENGINE_NAME: &str = "llama.cpp (llama-cpp-2 0.1.160)";

/// Runs a node until a signal. Blocks.
pub(crate) fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(node(config));
    // Tasks that still wait for a peer are not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// The keys of this node, all from one seed.
struct Keys {
    seed: Seed,
    identity: SigningKey,
    nostr: secp256k1::Keypair,
    /// From which the consumer's session keys are derived.
    sessions: [u8; 32],
}

fn keys(config: &Config) -> anyhow::Result<Keys> {
    let words = config.wallet.seed.read().hint("`satgrid init` makes one")?;
    let seed = Phrase::parse(&words).context("the seed's words are not right")?.seed();
    let nostr = secp256k1::Keypair::from_seckey_slice(secp256k1::SECP256K1, seed.nostr().as_ref())?;
    let (identity, sessions) = (seed.identity(), seed.session(0).to_bytes());
    Ok(Keys { seed, identity, nostr, sessions })
}

async fn node(config: Config) -> anyhow::Result<()> {
    if !config.is_provider() && !config.is_consumer() {
        bail!("node.roles is empty: nothing to run");
    }
    let shutdown = CancellationToken::new();
    let keys = keys(&config)?;
    let ours = node_key(&keys.identity);
    let nostr = NostrKey(keys.nostr.x_only_public_key().0.serialize());
    tracing::info!(node = %ours, network = config.node.network.name(), "starting");
    let admin_token = admin::token(&config.node.dir)?;

    // Ports first: a port that is taken is told at once, before money or models are touched.
    let admin_port = listen(config.api.admin, "api.admin").await?;
    let api_port = if config.is_consumer() { Some(listen(config.api.listen, "api.listen").await?) } else { None };

    let journal = open_journal(&config).await?;
    let mut fold = Fold::new(ours);
    let opened: Arc<dyn Journal> = journal.clone();
    let writer = JournalWriter::open(opened, |entry| fold.entry(entry)).await.context("the ledger does not fold")?;
    let recovered = fold.finish();

    let wallet = open_wallet(&config, &keys).await?;
    let lightning: Arc<dyn Lightning> = wallet.clone();
    if !recovered.has_genesis {
        let (lightning, network) = (lightning.node_id(), config.node.network.name().to_owned());
        let genesis = Evidence::Genesis { node: ours, nostr, lightning, network };
        writer.append(vec![Draft::of(genesis)]).await.map_err(anyhow::Error::msg)?;
    }

    let node = Node {
        config: &config,
        keys: &keys,
        nostr,
        journal: writer,
        wallet: lightning.clone(),
        shutdown: shutdown.clone(),
    };
    let market = Market::new(catalogue(&config)?);
    let running = node.start(recovered, &market).await?;

    let relays = running.relays.clone();
    let connected = move || {
        let health = relays.borrow();
        (health.iter().filter(|relay| relay.connected).count(), health.len())
    };
    let admin_state = admin::State {
        token: admin_token,
        node_key: ours,
        nostr_key: nostr,
        wallet: wallet.clone(),
        network: config.node.network.name(),
        quic_listen: running.quic_listen,
        provider: running.provider_view.clone(),
        consumer: running.consumer_view.clone(),
        consumer_inbox: running.consumer.clone(),
        relays: running.relays.clone(),
        market: market.clone(),
        heard: running.heard.clone(),
    };
    tokio::spawn(sign_checkpoints(journal.clone(), keys.identity.clone(), running.publisher.clone(), shutdown.clone()));
    let edges = CancellationToken::new();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(admin::serve(admin_port, admin_state, edges.clone()));
    if let (Some(port), Some(inbox), Some(view)) = (api_port, &running.consumer, &running.consumer_view) {
        let gateway = Gateway {
            market: market.clone(),
            tokenizers: Tokenizers::new(config.node.dir.join("tokenizers"), running.endpoint.clone()),
            consumer: inbox.clone(),
            wallet: lightning.clone(),
            view: view.clone(),
            relays: Box::new(connected),
            allow_unverified_names: config.consumer.allow_unverified_names,
            only: patterns("consumer.only", &config.consumer.only)?,
            prefer: patterns("consumer.prefer", &config.consumer.prefer)?,
            next_call: AtomicU64::new(0),
            started: now(),
        };
        tracing::info!(address = %port.local_addr()?, "OpenAI-compatible endpoint");
        let (api_config, edges) = (api_config(&config)?, edges.clone());
        tasks.spawn(async move {
            satgrid_api::serve(port, Arc::new(gateway), api_config, edges.cancelled_owned()).await.map_err(Into::into)
        });
    }
    tracing::info!("up");

    let outcome = tokio::select! {
        () = signals::stop() => Ok(()),
        Some(ended) = tasks.join_next() => ended.context("an edge panicked").flatten().and_then(|()| bail!("an edge ended by itself")),
    };
    tracing::info!("stopping");
    edges.cancel();
    while tasks.join_next().await.is_some() {}
    shutdown.cancel();
    if let Some(publisher) = running.publisher.and_then(Arc::into_inner) {
        publisher.stopped().await;
    }
    running.endpoint.shutdown(Code::SHUTTING_DOWN, "the node is stopping").await;
    running.engines.iter().for_each(|engine| engine.shut_down());
    match tokio::time::timeout(WALLET_STOP, lightning.stop()).await {
        Ok(Ok(())) => tracing::info!("stopped"),
        Ok(Err(error)) => tracing::warn!(%error, "the wallet did not stop cleanly"),
        Err(_) => tracing::warn!("the wallet did not stop in {} s", WALLET_STOP.as_secs()),
    }
    // The last word on the books: a tree head over everything that this run wrote.
    if let Err(error) = journal.checkpoint(&keys.identity).await {
        tracing::warn!(%error, "no checkpoint was signed at the end");
    }
    if let Some(journal) = Arc::into_inner(journal) {
        journal.close().await;
    }
    outcome
}

/// Signs a tree head whenever the journal has grown, so that what was written can no longer be unwritten unseen; and
/// publishes one from time to time where this node lists.
async fn sign_checkpoints(
    journal: Arc<SqliteJournal>,
    key: SigningKey,
    publisher: Option<Arc<Publisher>>,
    shutdown: CancellationToken,
) {
    const EVERY: Duration = Duration::from_secs(2);
    const PUBLISH_EVERY: Duration = Duration::from_secs(60);
    let (mut signed, mut published): (u64, Option<tokio::time::Instant>) = (0, None);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let Ok(head) = journal.head().await else { continue };
        if head.len == signed {
            continue;
        }
        match journal.checkpoint(&key).await {
            Ok(checkpoint) => {
                signed = head.len;
                let due = published.is_none_or(|at| at.elapsed() >= PUBLISH_EVERY);
                if let (true, Some(publisher)) = (due, &publisher) {
                    published = Some(tokio::time::Instant::now());
                    let _ = publisher.checkpoint(LOG_NAME, checkpoint.note().to_owned()).await;
                }
            }
            Err(error) => tracing::warn!(%error, "no checkpoint was signed"),
        }
    }
}

/// What the parts are started with.
struct Node<'a> {
    config: &'a Config,
    keys: &'a Keys,
    nostr: NostrKey,
    journal: JournalWriter,
    wallet: Arc<dyn Lightning>,
    shutdown: CancellationToken,
}

/// The parts that run.
struct Running {
    endpoint: QuicEndpoint,
    quic_listen: Option<SocketAddr>,
    engines: Vec<Arc<LlamaEngine>>,
    publisher: Option<Arc<Publisher>>,
    relays: watch::Receiver<Vec<RelayHealth>>,
    /// Events from relays, by what became of them.
    heard: Option<Arc<Listening>>,
    consumer: Option<mpsc::Sender<consumer::Message>>,
    provider_view: Option<Arc<RwLock<ProviderView>>>,
    consumer_view: Option<Arc<RwLock<ConsumerView>>>,
}

impl Node<'_> {
    async fn start(&self, recovered: Recovered, market: &Market) -> anyhow::Result<Running> {
        let (handled, handled_inbox) = mpsc::unbounded_channel();
        let (ended, ended_inbox) = mpsc::unbounded_channel();
        let payments = payments::start(self.wallet.clone(), ended, handled.clone());
        let for_sale = if self.config.is_provider() { engines::start(self.config).await? } else { Vec::new() };
        let endpoint = self.endpoint()?;
        let quic_listen = if self.config.is_provider() { Some(endpoint.local_addr()?) } else { None };

        let consumer_view = self.config.is_consumer().then(Arc::default);
        let consumer = consumer_view.clone().map(|view| {
            let mut role = Consumer::new(self.consumer_config(), self.keys.sessions, fresh_seed());
            role.restore(recovered.consumer_sessions, recovered.opened, recovered.settled_with);
            consumer::start(ConsumerDriver {
                role,
                master: self.keys.sessions,
                journal: self.journal.clone(),
                wallet: self.wallet.clone(),
                payments: payments.clone(),
                handled: handled.clone(),
                endpoint: endpoint.clone(),
                market: market.clone(),
                view,
                shutdown: self.shutdown.clone(),
            })
        });
        let provider_view = self.config.is_provider().then(Arc::default);
        let provider = provider_view.clone().map(|view| {
            let mut role = Provider::new(self.provider_config(), self.keys.identity.clone(), fresh_seed());
            role.restore(now(), recovered.provider_sessions, recovered.refunds);
            let artefacts = for_sale.iter().map(|m| (Digest(m.engine.facts().tokenizer_hash), m.tokenizer.clone()));
            let served = Arc::new(TokenizersForSale(artefacts.collect()));
            let driver = ProviderDriver {
                role,
                journal: self.journal.clone(),
                wallet: self.wallet.clone(),
                payments: payments.clone(),
                handled: handled.clone(),
                engines: for_sale.iter().map(|m| (m.id, m.engine.clone() as Arc<dyn Engine>)).collect(),
                artefacts: ArtefactServer::new(served, ServeLimits::default()),
                view,
                shutdown: self.shutdown.clone(),
            };
            provider::start(driver, endpoint.clone())
        });
        tokio::spawn(route_ended(ended_inbox, provider.clone(), consumer.clone()));
        let pump = WalletPump {
            wallet: self.wallet.clone(),
            journal: self.journal.clone(),
            payments,
            provider: provider.clone(),
            consumer: consumer.clone(),
            handled: handled_inbox,
            shutdown: self.shutdown.clone(),
        };
        tokio::spawn(pump.run());

        let publisher = match &provider {
            Some(provider) => Some(Arc::new(self.publish(&for_sale, &endpoint, provider).await?)),
            None => None,
        };
        let relays = self.config.market.relays.clone();
        let heard = if self.config.is_consumer() && !relays.is_empty() {
            let listening = Listening::start(market, relays, self.shutdown.clone()).await;
            Some(Arc::new(listening.context("market.relays cannot be used")?))
        } else {
            None
        };
        let health = match (&heard, &publisher) {
            (Some(listening), _) => listening.health(),
            (None, Some(publisher)) => publisher.health(),
            (None, None) => watch::channel(Vec::new()).1,
        };
        let engines = for_sale.into_iter().map(|model| model.engine).collect();
        Ok(Running {
            endpoint,
            quic_listen,
            engines,
            publisher,
            relays: health,
            heard,
            consumer,
            provider_view,
            consumer_view,
        })
    }

    fn endpoint(&self) -> anyhow::Result<QuicEndpoint> {
        let limits = Limits::default();
        if self.config.is_provider() {
            let address = self.config.provider.quic_listen;
            return QuicEndpoint::bind(address, self.keys.identity.clone(), limits, &self.shutdown)
                .with_context(|| format!("provider.quic_listen {address} cannot be used"))
                .hint("another process may hold the port; choose another");
        }
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        Ok(QuicEndpoint::bind_client(any, limits, &self.shutdown)?)
    }

    /// Lists what is for sale, and tells the role every version before anyone can ask for it.
    async fn publish(
        &self,
        for_sale: &[ForSale],
        endpoint: &QuicEndpoint,
        provider: &mpsc::Sender<provider::Message>,
    ) -> anyhow::Result<Publisher> {
        let mut addresses = self.config.provider.public_addresses.clone();
        if addresses.is_empty() {
            // Without a public address the node is sold where it listens: right for one machine or one network.
            addresses.push(endpoint.local_addr()?.to_string());
        }
        let by = Identity {
            node: &self.keys.identity,
            nostr: self.nostr,
            wallet: self.wallet.as_ref(),
            addresses,
            region: self.config.provider.region.clone(),
        };
        let listings = for_sale.iter().map(|model| engines::listing(model, &by)).collect();
        let mut config = PublisherConfig::new(
            RelayConfig::new(self.config.market.relays.clone()),
            u64::from_be_bytes(fresh_seed()[..8].try_into()?),
        );
        config.lifetime = Duration::from_secs(self.config.provider.listing_expiry_s);
        let publisher = Publisher::start(config, self.keys.nostr, self.shutdown.clone())
            .await
            .context("market.relays cannot be used")?;
        let engines: BTreeMap<[u8; 32], &ForSale> =
            for_sale.iter().map(|model| (model.engine.facts().model_root, model)).collect();
        let facts: BTreeMap<[u8; 32], (EngineId, satgrid_types::RateCard, satgrid_types::EngineProfile)> = engines
            .iter()
            .map(|(root, model)| (*root, (model.id, model.rates, engines::profile(&model.engine.facts()))))
            .collect();
        let (mut offered, provider) = (publisher.offered(), provider.clone());
        tokio::spawn(async move {
            while offered.changed().await.is_ok() {
                let listings = offered.borrow_and_update().clone();
                for listing in listings {
                    let Some((engine, rates, profile)) = facts.get(&listing.model_root.0).copied() else { continue };
                    let build = listing.build;
                    let offering = Offering { listing, engine, rates, profile, build };
                    let event = ProviderEvent::Offer(Box::new(offering));
                    let _ = provider.send(provider::Message::Event(event)).await;
                }
            }
        });
        publisher.offer(listings).await?.context("the listing of this node is not valid")?;
        Ok(publisher)
    }

    fn provider_config(&self) -> ProviderConfig {
        let (session, provider) = (&self.config.session, &self.config.provider);
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let slots: u32 = provider.models.iter().map(|model| model.slots).sum();
        ProviderConfig {
            terms: Terms {
                min_slice: sat(provider.slice_min_sat),
                max_slice: sat(provider.slice_max_sat),
                // Work on credit would take the books' prepaid accounts below zero (docs/adr/0004).
                credit_window: Msat::ZERO,
                ack_tokens: session.ack_tokens,
                ack_interval_ms: small(session.ack_ms),
                window_tokens: session.window_tokens,
                invoice_expiry_secs: small(session.invoice_expiry_s),
                refund_dust: sat(session.refund_dust_sat),
                resume_ms: small(session.stream_hold_s.saturating_mul(1_000)),
                idle_close_ms: small(session.idle_close_s.saturating_mul(1_000)),
                ..Terms::default()
            },
            quote_validity_ms: session.quote_validity_s.saturating_mul(1_000),
            max_requests_per_session: provider.requests_per_peer as usize,
            // As many again may wait as run.
            max_requests: (slots as usize).saturating_mul(2).max(1),
            engine_name: ENGINE_NAME.to_owned(),
            ..ProviderConfig::default()
        }
    }

    fn consumer_config(&self) -> ConsumerConfig {
        let consumer = &self.config.consumer;
        ConsumerConfig {
            slices: SlicePolicy {
                first: sat(consumer.slice_first_direct_sat),
                largest: sat(consumer.slice_max_sat),
                ..SlicePolicy::default()
            },
            first_routed: sat(consumer.slice_first_sat),
            session_cap: sat(consumer.max_session_sat),
            exposure_cap: sat(consumer.max_exposure_sat),
            fee_per_mille: u64::from(consumer.max_fee_permille),
            network: wallet_network(self.config.node.network),
            idle_ms: self.config.session.idle_close_s.saturating_mul(1_000),
            ..ConsumerConfig::default()
        }
    }
}

fn sat(sat: u64) -> Msat {
    Msat::from_sat(sat).unwrap_or(Msat::MAX)
}

/// Tells the role whose payment it was how it ended.
async fn route_ended(
    mut ended: mpsc::UnboundedReceiver<payments::Ended>,
    provider: Option<mpsc::Sender<provider::Message>>,
    consumer: Option<mpsc::Sender<consumer::Message>>,
) {
    use satgrid_node::consumer::ConsumerEvent;
    while let Some(payments::Ended { owner, hash, amount, outcome }) = ended.recv().await {
        let text = |reason: FailureReason| reason.to_string();
        match owner {
            payments::Owner::Slice => {
                let event = match outcome {
                    Outcome::Settled { preimage, fee } => ConsumerEvent::PaymentSettled { hash, preimage, fee },
                    Outcome::Failed { reason } => ConsumerEvent::PaymentFailed { hash, reason: text(reason) },
                };
                if let Some(consumer) = &consumer {
                    let _ = consumer.send(consumer::Message::Event(event)).await;
                }
            }
            payments::Owner::Refund => {
                let event = match outcome {
                    Outcome::Settled { preimage, fee } => {
                        ProviderEvent::RefundSettled { hash, amount, preimage: Some(preimage), fee }
                    }
                    Outcome::Failed { reason } => ProviderEvent::RefundFailed { hash, reason: text(reason) },
                };
                if let Some(provider) = &provider {
                    let _ = provider.send(provider::Message::Event(event)).await;
                }
            }
        }
    }
}

async fn listen(address: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("{key} {address} cannot be listened on"))
        .hint(format!("another process may hold the port; set {key} to another"))
}

async fn open_journal(config: &Config) -> anyhow::Result<Arc<SqliteJournal>> {
    let path = &config.ledger.path;
    let journal =
        SqliteJournal::open(path).await.with_context(|| format!("the ledger {} cannot be opened", path.display()))?;
    Ok(Arc::new(journal))
}

async fn open_wallet(config: &Config, keys: &Keys) -> anyhow::Result<Arc<LdkWallet>> {
    let chain = match &config.wallet.chain {
        Some(ChainSource::Esplora { url }) => satgrid_wallet_ldk::ChainSource::Esplora { url: url.clone() },
        Some(ChainSource::Electrum { server }) => {
            let url = if server.contains("://") { server.clone() } else { format!("tcp://{server}") };
            satgrid_wallet_ldk::ChainSource::Electrum { url }
        }
        Some(ChainSource::Bitcoind { user, host, port }) => {
            let password = config.wallet.chain_password.as_ref().context("wallet.chain_password is not set")?;
            satgrid_wallet_ldk::ChainSource::BitcoindRpc {
                host: host.clone(),
                port: *port,
                user: user.clone(),
                password: password.read()?,
            }
        }
        None => return Err(anyhow::anyhow!("wallet.chain is not set")).hint("esplora:URL is the simplest"),
    };
    let mut ldk = LdkConfig::new(config.node.dir.join("lightning"), keys.seed.clone(), chain);
    ldk.network = wallet_network(config.node.network);
    ldk.listen = vec![config.wallet.listen];
    ldk.alias = config.wallet.alias.clone();
    ldk.max_balance_sat = Some(config.wallet.max_balance_sat);
    ldk.trusted_0conf = config
        .wallet
        .trusted_0conf
        .iter()
        .map(|text| text.parse().with_context(|| format!("wallet.trusted_0conf: {text:?} is no Lightning node id")))
        .collect::<anyhow::Result<_>>()?;
    let wallet = LdkWallet::start(ldk).await.context("the Lightning wallet does not start")?;
    tracing::info!(node = %wallet.node_id(), height = wallet.height(), "wallet is up");
    Ok(Arc::new(wallet))
}

fn wallet_network(network: Network) -> satgrid_wallet::Network {
    match network {
        Network::Regtest => satgrid_wallet::Network::Regtest,
        Network::Signet => satgrid_wallet::Network::Signet,
        Network::Testnet => satgrid_wallet::Network::Testnet,
        Network::Mainnet => satgrid_wallet::Network::Mainnet,
    }
}

/// The catalogue that came with this build, overruled by the operator's own.
pub(crate) fn catalogue(config: &Config) -> anyhow::Result<Catalogue> {
    let shipped = Catalogue::shipped()?;
    let Some(path) = &config.market.catalogue else { return Ok(shipped) };
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let own = Catalogue::parse(&text).with_context(|| format!("{} is no catalogue", path.display()))?;
    Ok(shipped.overruled_by(&own)?)
}

fn patterns(key: &str, texts: &[String]) -> anyhow::Result<Vec<ProviderPattern>> {
    texts.iter().map(|text| text.parse().with_context(|| key.to_owned())).collect()
}

fn api_config(config: &Config) -> anyhow::Result<ApiConfig> {
    let keys = config
        .api
        .keys
        .iter()
        .map(|key| Ok(ApiKey::new(key.name.clone(), &key.secret.read()?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(ApiConfig { keys, drain: Duration::from_secs(5), ..ApiConfig::default() })
}
