//! Selling layers, and selling a model whose middle layers are bought: what starts each, and how it is listed.

use super::{
    consumer::Message as ConsumerMessage,
    engines::{ExpertFigures, Identity, OnSale, worker_program},
    experts::Beside,
    hops::Switchboard,
    market::Market,
    ring::{PaidRing, Planned, RingParts},
    rings::Buys,
    scout::{self, Scout},
    trunks::{Group, Trunk},
};
use crate::config::{self, LeadForSale, StageForSale};
use crate::failure::HintExt;
use anyhow::Context;
use bytes::Bytes;
use ed25519_dalek::SigningKey;
use satgrid_engine::{
    experts::Manifest,
    gguf::Gguf,
    memory::{ContextShape, Needs},
    part::PartFile,
    port::{Engine, Profile, Speed},
    stage::port::{Stage, StageFacts},
};
use satgrid_engine_llama::{
    EngineSettings, LeadConfig, LeadSettings, LlamaLead, LlamaStage, Offload, StageConfig, StageSettings,
    default_threads,
};
use satgrid_ledger_sqlite::FigureStore;
use satgrid_market::{
    Hop,
    layers::{self, LayerDemand, LayerNeeds},
};
use satgrid_node::provider::EngineId;
use satgrid_protocol_quic::QuicEndpoint;
use satgrid_types::{
    BuildId, LayerRange, Listing, ModelRoot, Msat, MsatPerMtok, NodeKey, Part, RateCard, TokenizerHash, node_key,
};
use std::{
    collections::BTreeSet,
    fs::File,
    io::BufReader,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// How long a lead waits for workers to list the layers that it lacks, before it says what is missing; it goes on waiting.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a whole plan waits for figures of its links; then it reckons without those that are missing.
const FIGURES_WITHIN: Duration = Duration::from_secs(8);

/// Positions over which the cache of one is reckoned: it is taken in blocks.
const CELLS: u32 = 1_024;

/// Layers that are for sale, with their running engine.
pub(crate) struct LayersForSale {
    pub id: EngineId,
    pub stage: Arc<LlamaStage>,
    pub name: String,
    pub rates: RateCard,
    /// Of a trunk that buys experts.
    pub buys: Option<Arc<dyn Buys>>,
    /// Listed: measured by its engine, or estimated over those whose experts are bought.
    speed: Option<Speed>,
    /// Of experts that are elsewhere.
    elsewhere_bytes: u64,
}

/// A model that this node leads.
pub(crate) struct LedForSale {
    pub id: EngineId,
    pub engine: Arc<LlamaLead>,
    pub ring: Arc<PaidRing>,
    pub name: String,
    pub rates: RateCard,
    pub tokenizer: Bytes,
    pub memory_bytes: u64,
}

pub(super) fn profile_of(profile: config::Profile) -> Profile {
    match profile {
        config::Profile::Exact => Profile::Exact,
        config::Profile::Fast => Profile::Fast,
    }
}

/// Starts the engine of one part; of a trunk its experts too, which are bought `with` the market where it lacks them.
pub(crate) async fn start_stage(
    stage: &StageForSale,
    id: EngineId,
    figures: Option<&ExpertFigures>,
    with: Option<LeadParts<'_>>,
) -> anyhow::Result<LayersForSale> {
    let (_, part) = read_part(&stage.path)?;
    let sources = stage.expert_sources();
    if part.experts.is_none() && sources.any() {
        return Err(anyhow::anyhow!("experts are named, but {} holds its own", stage.path.display()))
            .hint("satgrid models split MODEL --layers A..B --trunk cuts layers without their experts");
    }
    let settings = StageSettings {
        part: stage.path.clone(),
        profile: profile_of(stage.profile),
        threads: stage.threads.unwrap_or_else(default_threads),
        sequences: stage.slots,
        context: stage.context.unwrap_or(0),
        offload: Offload { device: stage.device.clone(), layers: stage.gpu_layers },
        memory_mib: stage.memory_mib,
    };
    let name = stage.alias.clone().unwrap_or_else(|| "layers".to_owned());
    let (profile, threads, device) = (settings.profile, settings.threads, settings.offload.device.clone());
    let config = StageConfig { program: worker_program()?, settings };
    let elsewhere_bytes = part.experts.as_ref().map_or(0, |experts| bytes_of(experts, part.range));
    let (engine, buyer) = match part.experts {
        Some(manifest) => {
            let beside = Beside { profile, threads, device };
            let group = Group::start(&sources, &beside, manifest, Some(part.range), figures).await?;
            let engine = LlamaStage::spawn_trunk(config, group.experts.clone(), |_| {}).await?;
            let StageFacts { sequences, context, build_id, instruction_set, speed, .. } = engine.facts();
            let build = (BuildId(build_id), instruction_set);
            let trunk = Trunk { id, name: name.clone(), slots: sequences, context, build, speed };
            let buyer = group.runs(&sources, trunk, with).await;
            (engine, buyer)
        }
        None => (LlamaStage::spawn(config, |_| {}).await?, None),
    };
    let (buys, estimate) = buyer.unzip();
    let facts = engine.facts();
    tracing::info!(model = %name, root = %hex::encode(&facts.model_root[..8]), layers = %facts.layers, "layers are up");
    let rates = RateCard {
        position_layer: Some(MsatPerMtok(stage.price_msat_per_million_position_layers)),
        per_request: Msat(stage.per_request_msat),
        ..RateCard::default()
    };
    let speed = estimate.unwrap_or(facts.speed);
    Ok(LayersForSale { id, stage: engine, name, rates, buys, speed, elsewhere_bytes })
}

/// Bytes of all experts of these layers.
fn bytes_of(experts: &Manifest, layers: LayerRange) -> u64 {
    let of = |layer| experts.expert_bytes(layer).unwrap_or(0).saturating_mul(experts.experts.into());
    (layers.start()..layers.end()).map(of).fold(0, u64::saturating_add)
}

/// The listing of some layers.
pub(crate) fn stage_listing(layers: &LayersForSale, by: &Identity<'_>) -> Listing {
    let facts = layers.stage.facts();
    let on_sale = OnSale {
        model: facts.name.unwrap_or_else(|| layers.name.clone()),
        root: facts.model_root,
        // Layers have no vocabulary.
        tokenizer: TokenizerHash([0; 32]),
        quantisation: facts.quantisation,
        part: Part::Layers(facts.layers),
        rates: layers.rates,
        context: facts.context,
        slots: facts.sequences,
        speed: layers.speed,
        // What the layers may take wherever they are: their lead knows the weight of whole layers.
        memory_bytes: facts.memory_bytes.saturating_add(layers.elsewhere_bytes),
        profile: facts.profile,
        build_id: facts.build_id,
        instruction_set: facts.instruction_set,
        experts_hash: None,
        embeds: None,
    };
    on_sale.listing(by)
}

/// The listing of a model that this node leads: to its customers it is a whole one.
pub(crate) fn led_listing(led: &LedForSale, by: &Identity<'_>) -> Listing {
    OnSale::whole(led.engine.facts(), &led.name, led.rates, led.memory_bytes).listing(by)
}

/// What a lead is started with, beside its configuration.
pub(crate) struct LeadParts<'a> {
    pub market: &'a Market,
    pub key: Arc<SigningKey>,
    pub addresses: Vec<String>,
    pub endpoint: QuicEndpoint,
    pub switchboard: Switchboard,
    pub consumer: mpsc::Sender<ConsumerMessage>,
    /// Where measurements of workers are kept.
    pub figures: Option<Arc<FigureStore>>,
}

fn read_part(path: &Path) -> anyhow::Result<(Gguf, PartFile)> {
    let open = || -> anyhow::Result<(Gguf, PartFile)> {
        let gguf = Gguf::read(&mut BufReader::new(File::open(path)?))?;
        let part = PartFile::read(&gguf)?;
        Ok((gguf, part))
    };
    open().with_context(|| format!("{} is no part of a model", path.display())).hint("satgrid models split MODEL A-B")
}

/// What a lead asks of the market, from its two ends and its configuration.
fn demand(lead: &LeadForSale, head: &PartFile, tail: &PartFile, ours: NodeKey) -> anyhow::Result<LayerDemand> {
    if head.root != tail.root || !tail.is_tail() {
        anyhow::bail!("the head and the tail are not the two ends of one model");
    }
    let range = LayerRange::new(head.range.end(), tail.range.start())
        .context("the head and the tail leave no layers for anybody else: sell the whole model")?;
    Ok(LayerDemand {
        root: ModelRoot(head.root),
        range,
        ends: (ours, ours),
        not: BTreeSet::from([ours]),
        profile: super::engines::profile(profile_of(lead.profile)),
        build: None,
        max_rate: lead.max_price_msat_per_million_position_layers.map(MsatPerMtok),
        slots: lead.slots,
        context: lead.context.unwrap_or(0),
        needs: needs_of(&tail.whole),
    })
}

/// What each layer of a model takes, by the table that its root covers.
fn needs_of(whole: &Gguf) -> LayerNeeds {
    let shape = ContextShape { slots: 1, context: CELLS, batch: 0, outputs: 0, flash: true };
    let needs = Needs::of(whole, &shape);
    LayerNeeds { weights: needs.layers, position: needs.kv_layer / u64::from(CELLS) }
}

/// What a configured lead asks of the market.
pub(crate) fn demand_of(lead: &LeadForSale, ours: NodeKey) -> anyhow::Result<LayerDemand> {
    let ((_, head), (_, tail)) = (read_part(&lead.head)?, read_part(&lead.tail)?);
    demand(lead, &head, &tail, ours)
}

/// The model that a configured lead leads.
pub(crate) fn root_of(lead: &LeadForSale) -> anyhow::Result<ModelRoot> {
    Ok(ModelRoot(read_part(&lead.head)?.1.root))
}

/// Plans the ring over the listings that are live, then starts the two ends. Waits until every layer is sold by somebody.
pub(crate) async fn start_lead(lead: &LeadForSale, id: EngineId, with: LeadParts<'_>) -> anyhow::Result<LedForSale> {
    let ((head_file, head), (tail_file, tail)) = (read_part(&lead.head)?, read_part(&lead.tail)?);
    let name = lead.alias.clone();
    let wire = lead.wire.wire_type();
    let demand = demand(lead, &head, &tail, node_key(&with.key))?;
    if let Some(figures) = &with.figures {
        match figures.paces(head.root).await {
            Ok(kept) => scout::recall(with.market, demand.root, kept),
            Err(error) => tracing::warn!(%error, "measured paces of workers cannot be read; they are measured anew"),
        }
    }
    let plan = wait_for_plan(with.market, &demand, &name).await;
    let row = u32::try_from(tail_file.arch_uint("embedding_length").unwrap_or_default())?;
    tracing::info!(model = %name, picture = ?picture(&plan), "the ring is planned");
    let scout = Scout { market: with.market.clone(), demand, store: with.figures };
    let memory_bytes = [&head_file, &tail_file].iter().flat_map(|file| &file.tensors).map(|tensor| tensor.bytes).sum();
    let ring = PaidRing::start(RingParts {
        plan: plan.stages.into_iter().map(|stage| Planned { range: stage.range, listing: stage.listing }).collect(),
        model_layers: tail.range.end(),
        own: vec![head.range, tail.range],
        wire,
        n_embd: row,
        key: with.key,
        addresses: with.addresses,
        endpoint: with.endpoint,
        switchboard: with.switchboard,
        consumer: with.consumer,
        scout,
    });
    let tokenizer = satgrid_engine::tokenizer_artefact::TokenizerArtefact::from_gguf(&tail.whole)?;
    let tail = EngineSettings {
        model: lead.tail.clone(),
        profile: profile_of(lead.profile),
        threads: lead.threads.unwrap_or_else(default_threads),
        slots: lead.slots,
        context: lead.context.unwrap_or(0),
        offload: Offload { device: lead.device.clone(), layers: None },
    };
    let facts = satgrid_engine::stage::ring::Ring::facts(ring.as_ref());
    let (head, guess, draft) = (lead.head.clone(), lead.speculate, lead.draft.clone());
    let settings = LeadSettings { head, tail, ring: facts, guess, draft };
    let engine = LlamaLead::spawn(LeadConfig { program: worker_program()?, settings }, ring.clone(), |_| {}).await?;
    let rates = RateCard {
        input: MsatPerMtok(lead.price_in_msat_per_mtok),
        cached_input: MsatPerMtok(lead.price_in_msat_per_mtok),
        output: MsatPerMtok(lead.price_out_msat_per_mtok),
        ..RateCard::default()
    };
    Ok(LedForSale { id, engine, ring, name, rates, tokenizer: Bytes::from(tokenizer.bytes), memory_bytes })
}

/// Who runs what, for how much and how far from whom it is: for the log.
fn picture(plan: &layers::Plan) -> Vec<String> {
    let hop = |hop: &Hop| match hop.rtt_us {
        Some(rtt) => format!("{}.{} ms round trip", rtt / 1_000, rtt % 1_000 / 100),
        None => "a link that nobody has measured".to_owned(),
    };
    let stage = |stage: &layers::Planned| {
        let (price, us) = (stage.listing.rates.position_layer.unwrap_or_default().0, stage.compute_us);
        let (range, node) = (stage.range, stage.listing.node_key.short());
        format!("over {}: {range} at {node} for {price}, {}.{} ms", hop(&stage.hop), us / 1_000, us % 1_000 / 100)
    };
    let back = format!("back over {}", hop(&plan.back));
    plan.stages.iter().map(stage).chain([back]).collect()
}

async fn wait_for_plan(market: &Market, demand: &LayerDemand, name: &str) -> layers::Plan {
    let began = Instant::now();
    let mut told = false;
    let mut covered: Option<Instant> = None;
    loop {
        match market.plan_layers(demand) {
            Ok(plan) => {
                // Every layer is sold. Links are being measured, here and at the workers, who list them.
                let since = *covered.get_or_insert_with(Instant::now);
                if plan.hops().all(|hop| hop.rtt_us.is_some()) || since.elapsed() >= FIGURES_WITHIN {
                    return plan;
                }
            }
            Err(why) if !told && began.elapsed() >= PATIENCE => {
                told = true;
                tracing::warn!(model = %name, %why, "no ring yet: waiting for workers");
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
