//! Selling experts, and selling a model whose experts are bought: what starts each, and how it is listed.

use super::{
    bought::{Bought, BoughtParts, SETTLE, SETTLE_OF_A_STAGE},
    engines::{ExpertFigures, Identity, OnSale, speed_of, worker_program},
    expert_figures::{Dealer, Figures, Timed, shape},
    experts::{self, Beside},
    layers::{LeadParts, profile_of},
    rings::Buys,
};
use crate::config::{ExpertSources, PackForSale};
use crate::failure::HintExt;
use anyhow::Context;
use satgrid_engine::{
    experts::{
        Manifest,
        group::{ExpertGroup, GroupEvent},
    },
    port::Speed,
};
use satgrid_engine_llama::{LlamaExperts, PackSettings, default_threads};
use satgrid_ledger::statements::MAX_EXPERT_COUNTS;
use satgrid_market::experts::{ExpertDemand, Weights, complete, hash_of};
use satgrid_node::provider::EngineId;
use satgrid_types::{
    BuildId, ExpertSet, LayerRange, Listing, ModelRoot, Msat, MsatPerMtok, Part, RateCard, TokenizerHash, node_key,
};
use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// How long a lead waits for workers to list the experts that it lacks, before it says what is missing; it goes on waiting.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a lead waits for the round trips to all sellers, once every expert has a holder.
const FIGURES_WITHIN: Duration = Duration::from_secs(4);
/// A lead with a spare begins without workers after this.
const SPARE_AFTER: Duration = Duration::from_secs(20);
/// What a listing of experts says of its context: experts know no positions.
const ANY_CONTEXT: u32 = 1 << 20;
/// An order covers so many times what its longest answer takes: rows that are lost are evaluated again.
const ORDER_MARGIN: u64 = 4;

/// Experts that are for sale, with the process that holds them.
pub(crate) struct PackOnSale {
    pub id: EngineId,
    pub host: Arc<LlamaExperts>,
    name: String,
    rates: RateCard,
    slots: u32,
}

/// Starts the process of one pack.
pub(crate) async fn start_pack(pack: &PackForSale, id: EngineId) -> anyhow::Result<PackOnSale> {
    let settings = PackSettings {
        pack: pack.path.clone(),
        only: None,
        profile: profile_of(pack.profile),
        threads: pack.threads.unwrap_or_else(default_threads),
        device: pack.device.clone(),
    };
    let host = LlamaExperts::spawn(worker_program()?, settings, |_| {}).await?;
    let facts = host.facts();
    if facts.experts.len() > MAX_EXPERT_COUNTS {
        let held = facts.experts.len();
        return Err(anyhow::anyhow!("a pack of {held} experts: a receipt counts at most {MAX_EXPERT_COUNTS}"))
            .hint("cut it into more packs, and sell them from more nodes: satgrid models split --experts --packs N");
    }
    let name = pack.alias.clone().unwrap_or_else(|| "experts".to_owned());
    tracing::info!(
        model = %name, root = %hex::encode(&facts.model_root[..8]), experts = facts.experts.len(), bytes = facts.bytes,
        rows_per_s = facts.millirows_per_s / 1_000, "experts for sale are up"
    );
    let rates = RateCard {
        expert_row: Some(MsatPerMtok(pack.price_msat_per_million_expert_rows)),
        per_request: Msat(pack.per_request_msat),
        ..RateCard::default()
    };
    Ok(PackOnSale { id, host, name, rates, slots: pack.slots })
}

/// The listing of some experts. Its decode speed is in expert rows.
pub(crate) fn pack_listing(pack: &PackOnSale, by: &Identity<'_>) -> Listing {
    let facts = pack.host.facts();
    let (set, weights) = (pack.host.set(), pack.host.claims());
    let speed =
        Speed { prefill_millitokens_per_s: facts.millirows_per_s, decode_millitokens_per_s: facts.millirows_per_s };
    let on_sale = OnSale {
        model: pack.name.clone(),
        root: facts.model_root,
        // Experts have no vocabulary.
        tokenizer: TokenizerHash([0; 32]),
        quantisation: "part".into(),
        experts_hash: Some(hash_of(&set, &weights)),
        embeds: None,
        part: Part::Experts(set),
        rates: pack.rates,
        context: ANY_CONTEXT,
        slots: pack.slots,
        speed: Some(speed),
        memory_bytes: facts.bytes,
        profile: facts.profile,
        build_id: facts.build_id,
        instruction_set: facts.instruction_set.clone(),
    };
    on_sale.listing(by)
}

/// The experts of a trunk, a whole model's or a stage's, before its engine runs.
pub(crate) struct Group {
    group: Arc<ExpertGroup>,
    heard: mpsc::UnboundedReceiver<GroupEvent>,
    figures: Arc<Figures>,
    layers: Option<LayerRange>,
    /// What the engine asks for rows.
    pub experts: Arc<Timed>,
}

impl Group {
    /// Starts this node's own packs. `layers`: those of a stage.
    pub(crate) async fn start(
        sources: &ExpertSources<'_>,
        beside: &Beside,
        manifest: Manifest,
        layers: Option<LayerRange>,
        figures: Option<&ExpertFigures>,
    ) -> anyhow::Result<Group> {
        let (root, all) = (manifest.root, manifest.layers);
        let (group, heard) = experts::group(sources, beside, manifest, layers).await?;
        let count = layers.map_or(all, |range| range.layers());
        let kept = figures.context("the ledger's database is open before any trunk")?;
        let figures = Figures::load(kept.store.clone(), root, count, kept.ours).await;
        let experts = Arc::new(Timed::new(group.clone(), figures.clone(), sources.buys));
        Ok(Group { group, heard, figures, layers, experts })
    }

    /// The engine runs: its rows are counted from now on, and `with` the market those experts are bought that it lacks.
    pub(crate) async fn runs(
        self,
        sources: &ExpertSources<'_>,
        trunk: Trunk,
        with: Option<LeadParts<'_>>,
    ) -> Option<Buyer> {
        tokio::spawn(self.figures.clone().keep(Arc::downgrade(&self.group)));
        let with = with?;
        self.figures.measured_alone(&speed_of(trunk.speed.as_ref()));
        Some(buy(sources, trunk, self, with).await)
    }
}

/// A trunk that runs.
pub(crate) struct Trunk {
    pub id: EngineId,
    pub name: String,
    pub slots: u32,
    pub context: u32,
    pub build: (BuildId, String),
    /// Measured alone.
    pub speed: Option<Speed>,
}

/// Who buys for a trunk, and the speed that the whole is estimated to have.
pub(crate) type Buyer = (Arc<dyn Buys>, Option<Speed>);

/// Buys the experts that a trunk lacks, of whoever sells them. Waits until every expert is held by somebody.
async fn buy(sources: &ExpertSources<'_>, trunk: Trunk, of: Group, with: LeadParts<'_>) -> Buyer {
    let (Trunk { id, name, slots, context, build, .. }, Group { group, heard, figures, layers, .. }) = (trunk, of);
    let manifest = group.manifest();
    let weights: Weights = manifest
        .all()
        .filter_map(|(layer, expert)| Some(((layer, expert), manifest.expert_hash(layer, expert)?)))
        .collect();
    let demand = ExpertDemand {
        root: ModelRoot(manifest.root),
        weights: Arc::new(weights),
        wanted: Arc::new(group.wanted().collect()),
        not: BTreeSet::from([node_key(&with.key)]),
        build: Some(build),
        max_rate: sources.max_price.map(MsatPerMtok),
    };
    let wire = sources.wire.wire_type();
    let shape = shape(manifest, layers, wire);
    let rows = u64::from(context) * u64::from(shape.used) * u64::from(shape.layers);
    let most_rows = rows.saturating_mul(ORDER_MARGIN).min(u64::from(u32::MAX));
    let own: BTreeSet<(u32, u32)> = group.held().collect();
    let dealer = Dealer {
        shape,
        own: ExpertSet::new(own.iter().copied()),
        wanted: demand.wanted.clone(),
        batch: slots,
        figures,
    };
    let ours = node_key(&with.key);
    with.market.watch(demand.root);
    let bought = Bought::start(BoughtParts {
        engine: id,
        group: group.clone(),
        heard,
        demand: demand.clone(),
        dealer: dealer.clone(),
        wire,
        most_rows,
        settle: if layers.is_some() { SETTLE_OF_A_STAGE } else { SETTLE },
        market: with.market.clone(),
        key: with.key,
        endpoint: with.endpoint,
        consumer: with.consumer,
    });
    let (began, mut told, mut covered) = (Instant::now(), false, None::<Instant>);
    loop {
        let (sellers, refused) = with.market.sellers_of_experts(&demand);
        // A spare holds what nobody sells; those who do are given time to be heard.
        let spare = sources.spare.is_some() && began.elapsed() >= SPARE_AFTER;
        let complete = if spare { Ok(()) } else { complete(&demand, &own, &sellers, refused) };
        match complete {
            Ok(()) if group.ready().is_ok() => {
                // What it lists until it has served: an estimate, with what was measured before where there is any.
                let links = with.market.known(&demand.root).links;
                let figures = sellers.iter().all(|listing| links.rtt_us(&ours, &listing.node_key).is_some());
                if !figures && covered.get_or_insert_with(Instant::now).elapsed() < FIGURES_WITHIN {
                    tokio::time::sleep(LOOK_EVERY).await;
                    continue;
                }
                dealer.figures.begin_with(&links, &sellers);
                let speed = dealer.speed(&sellers);
                let decode_tok_s = speed.map_or(0, |speed| speed.decode_millitokens_per_s / 1_000);
                tracing::info!(model = %name, hosts = ?group.hosts(), decode_tok_s, "every expert has a holder");
                return (bought, speed);
            }
            Ok(()) => {}
            Err(why) if !told && began.elapsed() >= PATIENCE => {
                told = true;
                let missing = group.ready().err().map_or_else(String::new, |error| error.to_string());
                tracing::warn!(model = %name, %why, missing, "experts are missing: waiting for workers");
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
