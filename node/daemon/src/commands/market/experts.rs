//! `satgrid market why` for a model whose experts this node buys: who sells them, who serves and who stands by, what the router
//! chose so far, and how fast the model is this way beside the others.

use super::super::print;
use crate::cli::Format;
use crate::config::{Config, ModelForSale, Profile};
use crate::drive::market::Market;
use crate::failure::{Findings, HintExt};
use crate::models::{Store, identify};
use crate::progress::Bytes;
use anyhow::Context;
use satgrid_ledger_sqlite::{Cost, Costs, ExpertRows, read_figures};
use satgrid_market::{
    estimate::{BATCHES, ExpertSplit, Fit, Line, WorkerCost, beats_from},
    experts::{Choosing, ExpertDemand, Role, Wanted, Weights, choose, complete, refusal},
    layers::{LayerDemand, LayerNeeds},
    ways::{Way, both_step_us, layers_step_us, pick, shown, whole},
};
use satgrid_types::{EngineProfile, ExpertSet, LayerRange, ModelRoot, MsatPerMtok, NodeKey, Part, VerifiedListing};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Hottest experts of a layer that are shown.
const HOTTEST: usize = 4;
/// The largest batch that ways are compared at.
const MOST_STREAMS: u32 = 512;

/// What this machine knows of a trunk that it leads.
struct Known {
    manifest: satgrid_engine::experts::Manifest,
    heat: ExpertRows,
    costs: Costs,
    /// This node, once it has measured anything.
    ours: Option<NodeKey>,
}

impl Known {
    async fn of(config: &Config, model: &ModelForSale) -> anyhow::Result<Known> {
        let store = Store::new(&config.models.dir);
        let path = match (&model.path, &model.name) {
            (Some(path), _) => path.clone(),
            (None, name) => {
                let found = name.as_deref().and_then(|name| store.find(name));
                store.path(&found.context("the trunk is not in the model store")?)
            }
        };
        let identified = identify(&store, &path, Bytes::new).map_err(anyhow::Error::new)?;
        let manifest = identified.inspected.manifest()?;
        let (heat, costs) = read_figures(&crate::up::beside_journal(config), manifest.root).await.unwrap_or_default();
        let ours = costs.keys().find(|(_, what)| *what == Cost::Trunk).map(|(node, _)| NodeKey(*node));
        Ok(Known { manifest, heat, costs, ours })
    }

    fn line(&self, node: NodeKey, what: Cost) -> Option<Line> {
        self.costs.get(&(node.0, what)).map(|sums| Line { sums: *sums })
    }

    fn cost_of(&self, listing: &VerifiedListing) -> WorkerCost {
        let (link, work) = (self.line(listing.node_key, Cost::Link), self.line(listing.node_key, Cost::Work));
        WorkerCost::of(link.as_ref(), work.as_ref(), &listing.speed)
    }

    fn trunk(&self) -> Option<Fit> {
        self.line(self.ours?, Cost::Trunk)?.fit(0.0)
    }
}

/// A seller and what becomes of it.
struct Row {
    listing: Arc<VerifiedListing>,
    verdict: &'static str,
    why: &'static str,
    cost: WorkerCost,
    share_permille: u64,
}

/// One way to run the model: for each batch its step.
struct WayRow {
    way: Way,
    steps: Vec<Option<f64>>,
    why: String,
}

pub(super) async fn why(format: Format, config: &Config, market: &Market, model: &ModelForSale) -> anyhow::Result<()> {
    let name = model.listed_name();
    let known = Known::of(config, model).await.hint("buy_experts is for a trunk: satgrid models split --experts")?;
    let manifest = &known.manifest;
    let weights: Arc<Weights> = Arc::new(
        manifest.all().filter_map(|(l, e)| Some(((l, e), manifest.expert_hash(l, e)?))).collect::<BTreeMap<_, _>>(),
    );
    let wanted: Arc<Wanted> = Arc::new(manifest.all().collect());
    let live: Vec<_> = market.live().into_iter().filter(|l| l.model_root == ModelRoot(manifest.root)).collect();
    // What this node runs is known once it lists; before, any build is taken to fit.
    let own_listing = live.iter().find(|l| Some(l.node_key) == known.ours && l.part == Part::Whole);
    let demand = ExpertDemand {
        root: ModelRoot(manifest.root),
        weights: weights.clone(),
        wanted: wanted.clone(),
        not: known.ours.into_iter().collect(),
        build: own_listing.map(|listing| (listing.build, listing.instruction_set.clone())),
        max_rate: model.max_price_msat_per_million_expert_rows.map(MsatPerMtok),
    };
    let (sellers, refused) = market.sellers_of_experts(&demand);
    let own = own_experts(model);
    let choosing = Choosing {
        shape: crate::drive::expert_figures::shape(manifest, None, model.wire.wire_type()),
        trunk: known.trunk().unwrap_or(Fit { base: 0.0, slope: 0.0 }),
        own: &own,
        heat: &known.heat,
        batch: model.slots.clamp(1, 32),
    };
    let (roles, mut split) = choose(&sellers, &wanted, &choosing, &|listing| known.cost_of(listing));
    if let Some(waits) = known.ours.and_then(|ours| known.line(ours, Cost::Wait)) {
        split.fit_wait(&waits);
    }
    let lacking = match model.spare_experts {
        Some(_) => Ok(()),
        None => complete(&demand, &own.pairs().iter().copied().collect(), &sellers, refused),
    };
    let missing = lacking.err().map(|error| error.to_string());
    let rows = rows(&known, &demand, &live, &sellers, &roles, &split);
    let ways = ways((market, model), &known, &demand, &live, &split, missing.as_deref());
    match format {
        Format::Json => print::json(&told(&name, &known, &rows, &ways, missing.as_deref()))?,
        Format::Text => show(&name, &known, &rows, &ways)?,
    }
    match missing {
        None => Ok(()),
        Some(why) => {
            eprintln!("{name}: {why}");
            Err(anyhow::Error::new(Findings))
        }
    }
}

/// Experts in packs of the configuration that can be read here.
fn own_experts(model: &ModelForSale) -> ExpertSet {
    let held = |path: &std::path::PathBuf| {
        let mut file = std::io::BufReader::new(std::fs::File::open(path).ok()?);
        let gguf = satgrid_engine::gguf::Gguf::read(&mut file).ok()?;
        Some(satgrid_engine::experts::pack::Pack::open(gguf).ok()?.set())
    };
    ExpertSet::new(model.experts.iter().filter_map(held).flat_map(|set| set.pairs().to_vec()))
}

fn rows(
    known: &Known,
    demand: &ExpertDemand,
    live: &[Arc<VerifiedListing>],
    sellers: &[Arc<VerifiedListing>],
    roles: &[Role],
    split: &ExpertSplit,
) -> Vec<Row> {
    let (mut rows, mut holder) = (Vec::new(), 0);
    for (listing, role) in sellers.iter().zip(roles) {
        let (verdict, why) = match role {
            Role::Serves => ("serves", ""),
            Role::Copies => ("serves", "copies of experts that others serve too: a step is faster with them"),
            Role::StandsBy => ("stands by", "others hold the same; takes over from who is lost, and is a witness"),
        };
        let share_permille = if *role == Role::StandsBy { 0 } else { split.share_permille(holder) };
        holder += usize::from(*role != Role::StandsBy);
        rows.push(Row { listing: listing.clone(), verdict, why, cost: known.cost_of(listing), share_permille });
    }
    for listing in live.iter().filter(|listing| matches!(listing.part, Part::Experts(_))) {
        if let Some(why) = refusal(listing, demand) {
            let cost = known.cost_of(listing);
            rows.push(Row { listing: listing.clone(), verdict: "refused", why, cost, share_permille: 0 });
        }
    }
    rows
}

fn ways(
    (market, model): (&Market, &ModelForSale),
    known: &Known,
    demand: &ExpertDemand,
    live: &[Arc<VerifiedListing>],
    split: &ExpertSplit,
    missing: Option<&str>,
) -> Vec<WayRow> {
    let not: &BTreeSet<NodeKey> = &demand.not;
    let step = |batch| whole(live, not, batch).map(|(_, step)| step);
    let seller = whole(live, not, 1).map(|(listing, _)| listing.node_key.short());
    let by = seller.map_or_else(
        || "nobody else lists it whole with a speed".to_owned(),
        |node| format!("{node} by its own word; each batch by who holds so many streams"),
    );
    let mut all = vec![WayRow { way: Way::Whole, steps: BATCHES.iter().map(|b| step(*b)).collect(), why: by }];

    let layers = known.manifest.layers;
    let profile = match model.profile {
        Profile::Exact => EngineProfile::Exact,
        Profile::Fast => EngineProfile::Fast,
    };
    let plan = LayerRange::new(1, layers.saturating_sub(1)).map(|range| {
        let (not, max_rate) = (demand.not.clone(), None);
        // The lead is left out of its own demand.
        let lead = not.first().copied().unwrap_or(NodeKey([0; 32]));
        let demand = LayerDemand {
            root: demand.root,
            range,
            ends: (lead, lead),
            not,
            profile,
            build: demand.build.clone(),
            max_rate,
            slots: 1,
            context: 1,
            needs: LayerNeeds::default(),
        };
        market.plan_layers(&demand)
    });
    let (plan, why) = match plan {
        Some(Ok(plan)) => {
            let workers = plan.stages.len();
            (Some(plan), format!("{workers} workers by their own words, and {} hops", workers + 1))
        }
        Some(Err(why)) => (None, why.to_string()),
        None => (None, "too few layers to cut".to_owned()),
    };
    let layered = |batch| layers_step_us(plan.as_ref()?, batch);
    all.push(WayRow { way: Way::Layers, steps: BATCHES.iter().map(|b| layered(*b)).collect(), why });

    let can = missing.is_none() && known.trunk().is_some();
    let split_step = |batch| can.then(|| split.step_us(batch));
    let why = match (missing, known.trunk()) {
        (Some(missing), _) => missing.to_owned(),
        (None, None) => "this node has not started the trunk yet, so it is not measured".to_owned(),
        (None, Some(trunk)) => {
            let mut why = format!(
                "the trunk {:.1} ms, and {layers} waits of {:.1} ms for one stream",
                trunk.at(1.0) / 1e3,
                split.wait_us(1) / 1e3 / f64::from(layers.max(1)),
            );
            for (way, other) in [(Way::Layers, &layered as &dyn Fn(u32) -> Option<f64>), (Way::Whole, &step)] {
                // Beyond what somebody holds there is nothing to beat.
                let theirs = |batch| other(batch).unwrap_or(0.0);
                if let (Some(_), Some(from)) =
                    (other(1), beats_from(MOST_STREAMS, |batch| split.step_us(batch), theirs))
                {
                    why = format!("{why}; faster than {way} from {from} streams");
                }
            }
            why
        }
    };
    all.push(WayRow { way: Way::Experts, steps: BATCHES.iter().map(|b| split_step(*b)).collect(), why });

    let both = |batch| plan.as_ref().filter(|_| can).and_then(|plan| both_step_us(plan, split, batch));
    let why = match (&plan, can) {
        (Some(plan), true) => {
            let machines = plan.stages.len() + 1;
            format!("this trunk cut over {machines} machines as layers are sold now, each asking the same experts")
        }
        (None, _) => "no ring of layers".to_owned(),
        (Some(_), false) => "no group of experts".to_owned(),
    };
    all.push(WayRow { way: Way::Both, steps: BATCHES.iter().map(|b| both(*b)).collect(), why });
    all
}

/// The way that is best for each batch.
fn best(ways: &[WayRow]) -> Vec<Option<Way>> {
    let at =
        |n: usize| pick(&ways.iter().map(|row| (row.way, row.steps.get(n).copied().flatten())).collect::<Vec<_>>());
    (0..BATCHES.len()).map(at).collect()
}

/// Of each layer its hottest experts with their part of its rows, in thousandths.
fn hottest(heat: &ExpertRows) -> BTreeMap<u32, Vec<(u32, u64)>> {
    let mut layers: BTreeMap<u32, Vec<(u32, u64)>> = BTreeMap::new();
    for (&(layer, expert), &rows) in heat {
        layers.entry(layer).or_default().push((expert, rows));
    }
    for experts in layers.values_mut() {
        let all: u64 = experts.iter().map(|(_, rows)| rows).sum();
        experts.sort_by_key(|&(expert, rows)| (std::cmp::Reverse(rows), expert));
        experts.truncate(HOTTEST);
        experts.iter_mut().for_each(|(_, rows)| *rows = rows.saturating_mul(1_000) / all.max(1));
    }
    layers
}

fn percent(permille: u64) -> String {
    format!("{}.{}%", permille / 10, permille % 10)
}

fn show(name: &str, known: &Known, rows: &[Row], ways: &[WayRow]) -> anyhow::Result<()> {
    let table = rows.iter().map(|row| {
        let Part::Experts(set) = &row.listing.part else { return Vec::new() };
        let assumed = if row.cost.measured { "" } else { " (assumed)" };
        vec![
            row.verdict.to_owned(),
            row.listing.node_key.short(),
            set.pairs().len().to_string(),
            percent(row.share_permille),
            row.listing.rates.expert_row.unwrap_or_default().0.to_string(),
            format!("{:.2}{assumed}", row.cost.link.base / 1e3),
            format!("{:.0}", row.cost.work.slope),
            row.why.to_owned(),
        ]
    });
    let header = ["VERDICT", "WORKER", "EXPERTS", "ROWS", "MSAT/M", "CALL MS", "US/ROW", "WHY"];
    let mut text = print::table(&header, table.collect());
    let hot = hottest(&known.heat).into_iter().map(|(layer, experts)| {
        let list: Vec<String> = experts.iter().map(|(e, permille)| format!("{e} {}", percent(*permille))).collect();
        vec![layer.to_string(), list.join(", ")]
    });
    let hot: Vec<Vec<String>> = hot.collect();
    if !hot.is_empty() {
        text = format!("{text}\n\n{}", print::table(&["LAYER", "HOTTEST EXPERTS, OF THE LAYER'S ROWS"], hot));
    }
    let best = best(ways);
    let row = |row: &WayRow| {
        let mut cells = vec![row.way.to_string()];
        for (n, batch) in BATCHES.iter().enumerate() {
            let mark = if best.get(n).copied().flatten() == Some(row.way) { " *" } else { "" };
            cells.push(format!("{}{mark}", shown(*batch, row.steps.get(n).copied().flatten())));
        }
        cells.push(row.why.clone());
        cells
    };
    let mut header = vec!["WAY".to_owned()];
    header.extend(BATCHES.map(|batch| format!("TOK/S OF {batch}")));
    header.push("WHY".to_owned());
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    print::out(&format!("{text}\n\n{}", print::table(&header, ways.iter().map(row).collect())))?;
    let counted: u64 = known.heat.values().sum();
    eprintln!("{name}: tokens a second of all streams together, * the most; {counted} expert rows were counted here");
    Ok(())
}

fn told(name: &str, known: &Known, rows: &[Row], ways: &[WayRow], missing: Option<&str>) -> Value {
    let rows = rows.iter().map(|row| {
        json!({
            "worker": row.listing.node_key, "listing": row.listing.id(), "verdict": row.verdict, "why": row.why,
            "experts": row.listing.part.to_string(), "share_permille": row.share_permille, "rates": row.listing.rates,
            "call_us": row.cost.link.base, "byte_us": row.cost.link.slope, "work_us": row.cost.work.base,
            "row_us": row.cost.work.slope, "measured": row.cost.measured,
        })
    });
    let rows: Vec<Value> = rows.collect();
    let per_batch = |row: &WayRow| -> Value {
        let pair = |(batch, step): (&u32, &Option<f64>)| {
            let tok_s = step.map(|step| satgrid_market::estimate::tokens_per_s(*batch, step));
            (batch.to_string(), json!(tok_s))
        };
        BATCHES.iter().zip(&row.steps).map(pair).collect::<serde_json::Map<_, _>>().into()
    };
    let best: serde_json::Map<String, Value> = BATCHES
        .iter()
        .zip(best(ways))
        .map(|(batch, way)| (batch.to_string(), json!(way.map(|way| way.to_string()))))
        .collect();
    let ways: Vec<Value> = ways
        .iter()
        .map(|row| json!({ "way": row.way.to_string(), "tokens_per_s": per_batch(row), "why": row.why }))
        .collect();
    let hot: Vec<Value> = hottest(&known.heat)
        .into_iter()
        .map(|(layer, experts)| {
            let experts: Vec<Value> =
                experts.iter().map(|(expert, permille)| json!({ "expert": expert, "permille": permille })).collect();
            json!({ "layer": layer, "experts": experts })
        })
        .collect();
    json!({
        "model": name, "missing": missing, "considered": rows, "ways": ways, "best": best, "hottest": hot,
        "counted_rows": known.heat.values().sum::<u64>(),
    })
}
