//! The parts of a running node: what starts each, and what each is started with.

use super::open::{Keys, beside_journal, wallet_network};
use super::window::{self, Shown};
use crate::config::Config;
use crate::door::{self, DoorDesk};
use crate::drive::{
    bookkeeper::Own,
    channels,
    checkpoints::{NOTES, compare_heads},
    consumer::{self, ConsumerDriver, ConsumerView},
    engines::{self, ExpertFigures, ForSale, Identity, TokenizersForSale},
    fresh_seed,
    hops::Switchboard,
    journal::JournalWriter,
    layers::{self, LayersForSale, LeadParts, LedForSale},
    market::{Listening, Market},
    metered::Metered,
    now, payments,
    probes::{Prober, Told},
    provider::{self, ProviderDriver, ProviderView},
    rings::Buys,
    space::Space,
    trunks::{self, PackOnSale},
    upstream::RunningEngine,
    wallet::WalletPump,
};
use crate::failure::HintExt;
use crate::store::Store;
use anyhow::Context;
use satgrid_engine::{port::Engine, stage::port::Stage};
use satgrid_engine_llama::{LlamaLead, LlamaStage};
use satgrid_ledger_sqlite::{FigureStore, KeyStore};
use satgrid_market_nostr::{Publisher, PublisherConfig, RelayConfig, RelayHealth};
use satgrid_node::{
    consumer::{Consumer, ConsumerConfig, ConsumerEvent},
    provider::{EngineId, Offering, Provider, ProviderConfig, ProviderEvent},
    recover::Recovered,
};
use satgrid_protocol::slices::SlicePolicy;
use satgrid_protocol_quic::{
    Limits, QuicEndpoint,
    artefact::{ArtefactServer, ServeLimits},
};
use satgrid_types::{Digest, EngineProfile, Listing, ModelRoot, Msat, NostrKey, RateCard, Terms, node_key};
use satgrid_wallet::{Embedded, FailureReason, Lightning, payment::Outcome};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Name and version that receipts carry.
const ENGINE_NAME: &str = "llama.cpp (llama-cpp-sys-2 0.1.161)";

/// Streams of one connection, however many requests a consumer may have open.
const MOST_STREAMS: u32 = 1_024;

/// What the parts are started with.
pub(super) struct Node<'a> {
    pub config: &'a Config,
    pub keys: &'a Keys,
    pub nostr: NostrKey,
    pub journal: JournalWriter,
    pub store: Store,
    pub wallet: Arc<dyn Lightning>,
    pub embedded: Option<Arc<dyn Embedded>>,
    pub key_store: KeyStore,
    pub own: Own,
    pub shutdown: CancellationToken,
}

/// The parts that run.
pub(super) struct Running {
    pub endpoint: QuicEndpoint,
    pub quic_listen: Option<SocketAddr>,
    pub engines: Vec<(String, RunningEngine)>,
    pub metered: Vec<Metered>,
    pub stages: Vec<Arc<LlamaStage>>,
    pub leads: Vec<Arc<LlamaLead>>,
    pub door: Option<Arc<DoorDesk>>,
    pub publisher: Option<Arc<Publisher>>,
    pub relays: watch::Receiver<Vec<RelayHealth>>,
    /// Events from relays, by what became of them.
    pub heard: Option<Arc<Listening>>,
    pub consumer: Option<mpsc::Sender<consumer::Message>>,
    pub provider: Option<mpsc::Sender<provider::Message>>,
    pub provider_view: Option<Arc<RwLock<ProviderView>>>,
    pub consumer_view: Option<Arc<RwLock<ConsumerView>>>,
    /// Channels as they open and close, for whoever backs them up and opens them again.
    pub changes: mpsc::UnboundedReceiver<channels::Change>,
}

impl Node<'_> {
    pub(super) async fn start(&self, recovered: Recovered, market: &Market) -> anyhow::Result<Running> {
        let (handled, handled_inbox) = mpsc::unbounded_channel();
        let (ended, ended_inbox) = mpsc::unbounded_channel();
        let payments = payments::start(self.wallet.clone(), self.embedded.clone(), ended, handled.clone());
        let figures = self.expert_figures().await?;
        let mut for_sale = match self.config.is_provider() {
            true => engines::start(self.config, figures.as_ref()).await?,
            false => Vec::new(),
        };
        let first = u32::try_from(self.config.provider.models.len())?;
        let mut stages = Vec::new();
        let to_start = || self.config.provider.stages.iter().zip(first..);
        for (stage, id) in to_start().filter(|(stage, _)| !stage.buy_experts) {
            let started = layers::start_stage(stage, EngineId(id), figures.as_ref(), None).await;
            stages.push(started.with_context(|| format!("layers in {} cannot be sold", stage.path.display()))?);
        }
        let buying: Vec<_> = to_start().filter(|(stage, _)| stage.buy_experts).collect();
        let first = first.saturating_add(u32::try_from(self.config.provider.stages.len())?);
        let mut packs = Vec::new();
        for (pack, id) in self.config.provider.packs.iter().zip(first..) {
            let started = trunks::start_pack(pack, EngineId(id)).await;
            packs.push(started.with_context(|| format!("experts in {} cannot be sold", pack.path.display()))?);
        }
        let endpoint = self.endpoint()?;
        let key = Arc::new(self.keys.identity.clone());
        let switchboard = Switchboard::default();
        let quic_listen = if self.config.is_provider() { Some(endpoint.local_addr()?) } else { None };

        let consumer_view = self.config.is_consumer().then(Arc::default);
        let consumer = consumer_view.clone().map(|view| {
            let mut role = Consumer::new(self.consumer_config(), self.keys.sessions, fresh_seed());
            consumer::recall(market, recovered.misbehaved);
            role.restore(recovered.consumer_sessions, recovered.opened, recovered.settled_with);
            consumer::start(ConsumerDriver {
                role,
                master: self.keys.sessions,
                journal: self.journal.clone(),
                wallet: self.wallet.clone(),
                payments: payments.clone(),
                handled: handled.clone(),
                endpoint: endpoint.clone(),
                at: None,
                market: market.clone(),
                store: self.store.clone(),
                view,
                shutdown: self.shutdown.clone(),
            })
        });
        let relays = self.config.market.relays.clone();
        // Who sells layers hears of the others, to measure how far they are.
        let hears = self.config.is_consumer() || !stages.is_empty();
        let heard = if hears && !relays.is_empty() {
            let notes = consumer.clone().map(|consumer| {
                let (notes, heard) = mpsc::channel(NOTES);
                tokio::spawn(compare_heads(heard, self.store.clone(), market.clone(), consumer));
                notes
            });
            let listening = Listening::start(market, relays, notes, consumer.clone(), self.shutdown.clone()).await;
            Some(Arc::new(listening.context("market.relays cannot be used")?))
        } else {
            None
        };
        stages.iter().for_each(|layers| market.watch(ModelRoot(layers.stage.facts().model_root)));
        for lead in &self.config.provider.leads {
            market.watch(layers::root_of(lead)?);
        }
        // Trunks that buy experts name their models as they start.
        if self.config.is_provider() && heard.is_some() {
            let prober = Prober {
                market: market.clone(),
                endpoint: endpoint.clone(),
                key: key.clone(),
                shutdown: self.shutdown.clone(),
            };
            tokio::spawn(prober.run());
        }
        let first = first.saturating_add(u32::try_from(packs.len())?);
        let mut leads = Vec::new();
        let paces = if self.config.provider.leads.is_empty() { None } else { Some(self.figures().await?) };
        let with = || -> anyhow::Result<LeadParts<'_>> {
            let consumer = consumer.clone().context("a node that leads buys: add \"consumer\" to node.roles")?;
            Ok(LeadParts {
                market,
                key: key.clone(),
                addresses: self.addresses(&endpoint)?,
                endpoint: endpoint.clone(),
                switchboard: switchboard.clone(),
                consumer,
                figures: paces.clone(),
            })
        };
        let models = self.config.provider.models.iter().zip(0..).filter(|(model, _)| model.buy_experts);
        for (model, id) in models.filter(|_| self.config.is_provider()) {
            for_sale.push(engines::start_one(self.config, model, EngineId(id), figures.as_ref(), Some(with()?)).await?);
        }
        for (stage, id) in buying {
            let started = layers::start_stage(stage, EngineId(id), figures.as_ref(), Some(with()?)).await;
            stages.push(started.with_context(|| format!("layers in {} cannot be sold", stage.path.display()))?);
        }
        for (lead, id) in self.config.provider.leads.iter().zip(first..) {
            let with = with()?;
            let started = layers::start_lead(lead, EngineId(id), with).await;
            leads.push(started.with_context(|| format!("{} cannot be led", lead.alias))?);
        }
        let mut metered: Vec<Metered> = for_sale.iter().map(|m| Metered::new(m.engine.port(), &m.name)).collect();
        metered.extend(leads.iter().map(|m| Metered::new(m.engine.clone(), &m.name)));
        let provider_view = self.config.is_provider().then(Arc::default);
        let provider = provider_view.clone().map(|view| {
            let role = Provider::new(self.provider_config(), self.keys.identity.clone(), fresh_seed());
            let mut role = role.with_former(self.keys.former());
            role.restore(now(), recovered.provider_sessions, recovered.refunds);
            let artefacts = for_sale.iter().map(|m| (Digest(m.engine.facts().tokenizer_hash), m.tokenizer.clone()));
            let led = leads.iter().map(|m| (Digest(m.engine.facts().tokenizer_hash), m.tokenizer.clone()));
            let artefacts = artefacts.chain(led);
            let ids = for_sale.iter().map(|m| m.id).chain(leads.iter().map(|m| m.id));
            let rings = leads.iter().map(|m| (m.id, m.ring.clone() as Arc<dyn Buys>));
            let trunks = for_sale.iter().filter_map(|m| Some((m.id, m.buys.clone()?)));
            let trunks = trunks.chain(stages.iter().filter_map(|s| Some((s.id, s.buys.clone()?))));
            let served = Arc::new(TokenizersForSale(artefacts.collect()));
            let driver = ProviderDriver {
                role,
                journal: self.journal.clone(),
                wallet: self.wallet.clone(),
                payments: payments.clone(),
                handled: handled.clone(),
                engines: ids.into_iter().zip(metered.iter().map(|m| Arc::new(m.clone()) as Arc<dyn Engine>)).collect(),
                stages: stages.iter().map(|s| (s.id, s.stage.clone() as Arc<dyn Stage>)).collect(),
                packs: packs.iter().map(|p| (p.id, p.host.clone())).collect(),
                buys: rings.chain(trunks).collect(),
                switchboard: switchboard.clone(),
                key: key.clone(),
                artefacts: ArtefactServer::new(served, ServeLimits::default()),
                store: self.store.clone(),
                view,
                shutdown: self.shutdown.clone(),
            };
            provider::start(driver, endpoint.clone())
        });
        let door = self.config.door.listen.map(|_| {
            DoorDesk::new(door::Parts {
                keys: self.key_store.clone(),
                journal: self.journal.clone(),
                wallet: self.wallet.clone(),
                payments: payments.clone(),
                handled: handled.clone(),
                settings: self.config.door.clone(),
                margin_permille: if self.config.has_house() { 0 } else { self.config.door.margin_permille },
                network: wallet_network(self.config.node.network),
                secret: self.keys.sessions,
            })
        });
        if let Some(door) = &door {
            tokio::spawn(door.clone().pay_refunds(self.shutdown.clone()));
        }
        tokio::spawn(space(self.config).watch(provider.clone(), consumer.clone(), self.shutdown.clone()));
        tokio::spawn(route_ended(ended_inbox, provider.clone(), consumer.clone(), door.clone()));
        let (tell_changes, changes) = mpsc::unbounded_channel();
        let pump = WalletPump {
            wallet: self.wallet.clone(),
            journal: self.journal.clone(),
            payments,
            provider: provider.clone(),
            consumer: consumer.clone(),
            door: door.clone(),
            handled: handled_inbox,
            changes: tell_changes,
            own: self.own.clone(),
            shutdown: self.shutdown.clone(),
        };
        tokio::spawn(pump.run());

        let publisher = match &provider {
            Some(provider) if self.keys.standing.revoked().is_none() => {
                let told = Told::new(market.clone(), node_key(&key));
                Some(self.publish((&for_sale, &stages, &packs, &leads), &endpoint, provider, told).await?)
            }
            Some(_) | None => None,
        };
        let health = match (&heard, &publisher) {
            (Some(listening), _) => listening.health(),
            (None, Some(publisher)) => publisher.health(),
            (None, None) => watch::channel(Vec::new()).1,
        };
        let engines = for_sale.into_iter().map(|model| (model.name, model.engine)).collect();
        Ok(Running {
            endpoint,
            quic_listen,
            door,
            engines,
            metered,
            stages: stages.into_iter().map(|layers| layers.stage).collect(),
            leads: leads.into_iter().map(|led| led.engine).collect(),
            publisher,
            relays: health,
            heard,
            consumer,
            provider,
            provider_view,
            consumer_view,
            changes,
        })
    }

    /// The figures of trunks that this node leads, if it leads any.
    async fn expert_figures(&self) -> anyhow::Result<Option<ExpertFigures>> {
        let (models, stages) = (&self.config.provider.models, &self.config.provider.stages);
        if !models.iter().any(|m| m.expert_sources().any()) && !stages.iter().any(|s| s.expert_sources().any()) {
            return Ok(None);
        }
        Ok(Some(ExpertFigures { store: self.figures().await?, ours: node_key(&self.keys.identity) }))
    }

    async fn figures(&self) -> anyhow::Result<Arc<FigureStore>> {
        let path = beside_journal(self.config);
        let store = FigureStore::open(&path).await;
        Ok(Arc::new(store.with_context(|| format!("the figures in {} cannot be opened", path.display()))?))
    }

    fn endpoint(&self) -> anyhow::Result<QuicEndpoint> {
        let limits = limits_for(self.config.requests_per_peer());
        if self.config.is_provider() {
            let address = self.config.provider.quic_listen;
            return QuicEndpoint::bind(address, self.keys.identity.clone(), limits, &self.shutdown)
                .with_context(|| format!("provider.quic_listen {address} cannot be used"))
                .hint("another process may hold the port; choose another");
        }
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        Ok(QuicEndpoint::bind_client(any, limits, &self.shutdown)?)
    }

    /// Where others reach this node.
    fn addresses(&self, endpoint: &QuicEndpoint) -> anyhow::Result<Vec<String>> {
        let addresses = self.config.provider.public_addresses.clone();
        // Without a public address the node is sold where it listens: right for one machine or one network.
        Ok(if addresses.is_empty() { vec![endpoint.local_addr()?.to_string()] } else { addresses })
    }

    /// Lists what is for sale, and tells the role every version before anyone can ask for it.
    async fn publish(
        &self,
        (for_sale, stages, packs, leads): (&[ForSale], &[LayersForSale], &[PackOnSale], &[LedForSale]),
        endpoint: &QuicEndpoint,
        provider: &mpsc::Sender<provider::Message>,
        told: Told,
    ) -> anyhow::Result<Arc<Publisher>> {
        let addresses = self.addresses(endpoint)?;
        let by = Identity {
            node: &self.keys.identity,
            nostr: self.nostr,
            wallet: self.wallet.as_ref(),
            addresses,
            region: self.config.provider.region.clone(),
            lightning_address: self.lightning_address(),
        };
        let mut shown: Vec<(Shown, EngineId)> = Vec::new();
        for model in for_sale {
            let engine = model.engine.port();
            shown.push((Shown::new(model.listing(&by), move || engine.is_up()), model.id));
        }
        for layers in stages {
            let stage = layers.stage.clone();
            shown.push((Shown::new(layers::stage_listing(layers, &by), move || stage.is_up()), layers.id));
        }
        for pack in packs {
            let host = pack.host.clone();
            shown.push((Shown::new(trunks::pack_listing(pack, &by), move || host.process_id().is_some()), pack.id));
        }
        for led in leads {
            let engine = led.engine.clone();
            shown.push((Shown::new(layers::led_listing(led, &by), move || engine.is_up()), led.id));
        }
        let (shown, ids): (Vec<Shown>, Vec<EngineId>) = shown.into_iter().unzip();
        let listings: Vec<Listing> = shown.iter().map(|shown| shown.listing.clone()).collect();
        let sold: Vec<(String, EngineId, RateCard, EngineProfile)> = listings
            .iter()
            .zip(ids)
            .map(|(listing, id)| {
                // One profile each: the engine's.
                let profile = listing.profiles.first().copied().unwrap_or(EngineProfile::Exact);
                (listing.d(), id, listing.rates, profile)
            })
            .collect();
        let mut config = PublisherConfig::new(
            RelayConfig::new(self.config.market.relays.clone()),
            u64::from_be_bytes(fresh_seed()[..8].try_into()?),
        );
        config.lifetime = Duration::from_secs(self.config.provider.listing_expiry_s);
        let publisher = Publisher::start(config, self.keys.nostr, self.shutdown.clone())
            .await
            .context("market.relays cannot be used")?;
        let (mut offered, provider) = (publisher.offered(), provider.clone());
        tokio::spawn(async move {
            while offered.changed().await.is_ok() {
                let listings = offered.borrow_and_update().clone();
                for listing in listings {
                    let Some((_, engine, rates, profile)) = sold.iter().find(|(d, ..)| *d == listing.d()).cloned()
                    else {
                        continue;
                    };
                    let build = listing.build;
                    let offering = Offering { listing, engine, rates, profile, build };
                    let event = ProviderEvent::Offer(Box::new(offering));
                    let _ = provider.send(provider::Message::Event(event)).await;
                }
            }
        });
        publisher.offer(listings).await?.context("the listing of this node is not valid")?;
        let publisher = Arc::new(publisher);
        tokio::spawn(window::keep(shown, told, Arc::downgrade(&publisher), self.shutdown.clone()));
        Ok(publisher)
    }

    /// Where consumers open channels to: as configured, else where the wallet listens if that is no wildcard.
    fn lightning_address(&self) -> Option<String> {
        let wallet = &self.config.wallet;
        let here = || (!wallet.listen.ip().is_unspecified()).then(|| wallet.listen.to_string());
        if wallet.nwc.is_some() { None } else { wallet.public_address.clone().or_else(here) }
    }

    fn provider_config(&self) -> ProviderConfig {
        let (session, provider) = (&self.config.session, &self.config.provider);
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
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
                idle_close_ms: small(session.idle_close_s.saturating_mul(1_000)),
                resume_ms: small(session.resume_s.saturating_mul(1_000)),
                ..Terms::default()
            },
            quote_validity_ms: session.quote_validity_s.saturating_mul(1_000),
            max_requests_per_peer: self.config.requests_per_peer() as usize,
            // As many again may wait as run.
            max_requests: (self.config.slots().fold(0, u32::saturating_add) as usize).saturating_mul(2).max(1),
            engine_name: ENGINE_NAME.to_owned(),
            part_batch: satgrid_engine_llama::BATCH,
            ..ProviderConfig::default()
        }
    }

    fn consumer_config(&self) -> ConsumerConfig {
        let consumer = &self.config.consumer;
        ConsumerConfig {
            slices: SlicePolicy { first: sat(consumer.slice_first_direct_sat), largest: sat(consumer.slice_max_sat) },
            first_routed: sat(consumer.slice_first_sat),
            session_cap: sat(consumer.max_session_sat),
            exposure_cap: sat(consumer.max_exposure_sat),
            fee_per_mille: u64::from(consumer.max_fee_permille),
            network: wallet_network(self.config.node.network),
            idle_ms: self.config.session.idle_close_s.saturating_mul(1_000),
            refund_idle: self.config.session.refund_idle,
            ..ConsumerConfig::default()
        }
    }
}

/// A consumer's one connection has room for every request that it may have open, and the stream beside them; what may lie
/// unread grows with it.
fn limits_for(requests_per_peer: u32) -> Limits {
    let usual = Limits::default();
    let streams = usual.streams.max(requests_per_peer.saturating_add(1)).min(MOST_STREAMS);
    let window = u64::from(streams).saturating_mul(usual.stream_window_bytes.into());
    let connection_window_bytes = usual.connection_window_bytes.max(u32::try_from(window).unwrap_or(u32::MAX));
    Limits { streams, connection_window_bytes, ..usual }
}

/// Where this node writes, and how much must be free there.
pub(super) fn space(config: &Config) -> Space {
    let ledger = config.ledger.path.parent().map(std::path::Path::to_owned);
    let folders = [config.node.dir.clone()].into_iter().chain(ledger).collect();
    Space { folders, least_bytes: config.node.min_free_mib.saturating_mul(1024 * 1024) }
}

fn sat(sat: u64) -> Msat {
    Msat::from_sat(sat).unwrap_or(Msat::MAX)
}

/// Tells the role whose payment it was how it ended.
pub(super) async fn route_ended(
    mut ended: mpsc::UnboundedReceiver<payments::Ended>,
    provider: Option<mpsc::Sender<provider::Message>>,
    consumer: Option<mpsc::Sender<consumer::Message>>,
    door: Option<Arc<DoorDesk>>,
) {
    while let Some(payments::Ended { pays_for, hash, amount, outcome }) = ended.recv().await {
        let text = |reason: FailureReason| reason.to_string();
        match pays_for {
            payments::PaysFor::Door(_) => {
                if let Some(door) = &door {
                    door.ended(hash, outcome).await;
                }
            }
            payments::PaysFor::Slice(..) => {
                let event = match outcome {
                    Outcome::Settled { preimage, fee } => ConsumerEvent::PaymentSettled { hash, preimage, fee },
                    Outcome::Failed { reason } => ConsumerEvent::PaymentFailed { hash, reason: text(reason) },
                };
                if let Some(consumer) = &consumer {
                    let _ = consumer.send(consumer::Message::Event(event)).await;
                }
            }
            payments::PaysFor::Refund(_) => {
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
