//! Cutting layers over those who sell them.
//!
//! A lead lacks the layers `[a, b)`. Each live listing of layers of that model is an edge from its first layer to its end;
//! a plan is a path from a to b. The best path is the one that takes the least time for a token: the time of each worker's
//! layers and every hop between them, from the lead to the first and from the last to the lead
//! ([`Links`]); among those equally fast, the cheapest; then by keys, so that the same book gives the same plan on every
//! machine. Fewer machines win by themselves: every hop costs.
//!
//! A worker's time is what it lists, until the lead has measured it: then it is what was measured ([`Paces`]), and who goes on
//! listing what it does not do is left out. Who lists less memory than its layers and the wanted sequences take cannot hold
//! them: it is left out too ([`LayerNeeds`]).
//!
//! Workers of one plan are of one engine build, profile and instruction set: in `exact` the answer is the same to the bit.

mod needs;

pub use needs::LayerNeeds;

use crate::book::Book;
use crate::links::{Hop, Links};
use crate::paces::{Pace, Paces};
use satgrid_types::{
    BuildId, EngineProfile, LayerRange, ModelRoot, MsatPerMtok, NodeKey, Part, UnixMs, VerifiedListing,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use thiserror::Error;

/// What a layer costs where its worker has not measured itself, in microseconds a token.
const UNMEASURED_LAYER_US: u64 = 5_000;
/// Layers beyond which no model goes.
const MAX_LAYERS: u32 = 4_096;

/// Which layers are wanted.
#[derive(Debug, Clone)]
pub struct LayerDemand {
    pub root: ModelRoot,
    pub range: LayerRange,
    /// Who sends the first rows, and who takes the last: the lead, or where one worker is replaced its neighbours.
    pub ends: (NodeKey, NodeKey),
    /// Nodes that are not asked: the lead itself, and workers that were lost.
    pub not: BTreeSet<NodeKey>,
    /// The lead's own: a worker on another promises it other bits, or fewer.
    pub profile: EngineProfile,
    /// The engine that the others run, where there are others.
    pub build: Option<(BuildId, String)>,
    /// The most that a million position-layers may cost.
    pub max_rate: Option<MsatPerMtok>,
    /// Sequences that each worker has to hold at once, and positions of each; 0 positions: as many as it lists.
    pub slots: u32,
    pub context: u32,
    /// What layers take of a worker's memory; nothing where the model's table is not at hand.
    pub needs: LayerNeeds,
}

/// What a lead knows beside the listings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    pub links: Links,
    /// What it has measured of workers.
    pub paces: Paces,
}

/// One worker of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub range: LayerRange,
    pub listing: Arc<VerifiedListing>,
    /// How rows come to it.
    pub hop: Hop,
    /// Its layers, as measured, else as listed, in microseconds a token.
    pub compute_us: u64,
}

/// Who runs which layers, in order, and how the rows come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub stages: Vec<Planned>,
    pub back: Hop,
}

impl Plan {
    /// A token's way through all of it, in microseconds.
    pub fn token_us(&self) -> u64 {
        let stages = self.stages.iter().map(|stage| stage.compute_us.saturating_add(stage.hop.us()));
        stages.fold(self.back.us(), u64::saturating_add)
    }

    pub fn hops(&self) -> impl Iterator<Item = &Hop> {
        self.stages.iter().map(|stage| &stage.hop).chain([&self.back])
    }
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NoLayers {
    #[error("nobody lists layers of this model")]
    NotListed,
    #[error("layers {from} to {to} are sold by nobody who fits: {}", counts(.refused))]
    Gap { from: u32, to: u32, refused: BTreeMap<&'static str, usize> },
}

fn counts(refused: &BTreeMap<&'static str, usize>) -> String {
    if refused.is_empty() {
        return "no listing begins and ends where it must".into();
    }
    let counts: Vec<String> = refused.iter().map(|(why, count)| format!("{count} {why}")).collect();
    counts.join(", ")
}

/// A listing that has less memory than it would take.
const TOO_LITTLE_MEMORY: &str = "too small: less memory than its layers and the wanted sequences take";
/// A listing whose speed was measured to be another, again and again.
const OVERSTATED: &str = "lists a speed that it was measured not to have";

/// Why a listing of layers is no part of any plan.
pub fn refusal(now: UnixMs, listing: &VerifiedListing, demand: &LayerDemand, known: &Known) -> Option<&'static str> {
    let Part::Layers(range) = &listing.part else { return Some("not layers") };
    if demand.not.contains(&listing.node_key) {
        return Some("left out (the lead itself, or lost before)");
    }
    if range.start() < demand.range.start() || range.end() > demand.range.end() || range.layers() == 0 {
        return Some("beyond the layers that are wanted");
    }
    if demand.build.as_ref().is_some_and(|(build, set)| listing.build != *build || listing.instruction_set != *set) {
        return Some("another engine build or instruction set");
    }
    if !listing.profiles.contains(&demand.profile) {
        return Some("another profile than the lead's");
    }
    match (listing.rates.position_layer, demand.max_rate) {
        (None, _) => Some("without a price for layers"),
        (Some(rate), Some(most)) if rate > most => Some("too dear"),
        (Some(_), _) if listing.slots < demand.slots => Some("too small: holds fewer sequences than are wanted"),
        (Some(_), _) if listing.context_length < demand.context => Some("too small: a shorter context than is wanted"),
        (Some(_), _) if listing.memory_bytes < memory_needed(listing, range, demand) => Some(TOO_LITTLE_MEMORY),
        (Some(_), _) if known.paces.is_overstated(now, &listing.node_key, range, listed_us(listing, range)) => {
            Some(OVERSTATED)
        }
        (Some(_), _) => None,
    }
}

/// Bytes that a worker's layers take with the sequences that are wanted of it.
fn memory_needed(listing: &VerifiedListing, range: &LayerRange, demand: &LayerDemand) -> u64 {
    let context = if demand.context == 0 { listing.context_length } else { demand.context };
    demand.needs.of(range, demand.slots, context)
}

/// What takes most of the time on the best way through a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slowest {
    /// Its layers: microseconds a token.
    Layers(u64),
    Link(Hop),
}

/// What became of one listing of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerVerdict {
    /// In the plan, as the n-th worker from 1.
    Planned {
        place: usize,
    },
    /// It could be; the plan is no slower and cheaper, or the only whole one.
    Spare,
    /// The best way through it takes longer than the plan, in microseconds a token; and where it spends most.
    TooSlow {
        with_us: u64,
        plan_us: u64,
        slowest: Slowest,
    },
    Refused(&'static str),
}

/// A listing of layers of the wanted model, and why it is or is not in the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayersConsidered {
    pub listing: Arc<VerifiedListing>,
    pub range: LayerRange,
    /// Its layers, as planned with: as measured, else as listed, in microseconds a token.
    pub compute_us: u64,
    pub listed_us: u64,
    /// Bytes that its layers take with the sequences that are wanted; 0 where that is not known.
    pub needs_bytes: u64,
    /// What was measured of it.
    pub pace: Option<Pace>,
    pub verdict: LayerVerdict,
}

/// The plan, or why there is none; and every live listing of the model's layers with its verdict, by first layer.
pub fn explain_layers(
    now: UnixMs,
    book: &Book,
    demand: &LayerDemand,
    known: &Known,
) -> (Result<Plan, NoLayers>, Vec<LayersConsidered>) {
    let plan = plan_layers(now, book, demand, known);
    let (planned, plan_us) = plan.as_ref().map_or((&[][..], 0), |plan| (&plan.stages[..], plan.token_us()));
    let mut considered = Vec::new();
    for listing in book.live(now).filter(|listing| listing.model_root == demand.root) {
        let Part::Layers(range) = &listing.part else { continue };
        let verdict =
            match (planned.iter().position(|one| one.listing == *listing), refusal(now, listing, demand, known)) {
                (Some(at), _) => LayerVerdict::Planned { place: at.saturating_add(1) },
                (None, Some(why)) => LayerVerdict::Refused(why),
                (None, None) => match through(now, book, demand, known, listing) {
                    Some((with, at)) if with.token_us() > plan_us && !planned.is_empty() => {
                        LayerVerdict::TooSlow { with_us: with.token_us(), plan_us, slowest: slowest(&with, at) }
                    }
                    Some(_) | None => LayerVerdict::Spare,
                },
            };
        considered.push(LayersConsidered {
            listing: Arc::clone(listing),
            range: *range,
            compute_us: compute_us(now, listing, range, known),
            listed_us: listed_us(listing, range),
            needs_bytes: memory_needed(listing, range, demand),
            pace: known.paces.of(now, &listing.node_key, range).copied(),
            verdict,
        });
    }
    considered.sort_by_key(|one| (one.range.start(), one.range.end(), one.listing.node_key));
    (plan, considered)
}

/// The best plan with this listing in it, and its place there.
fn through(
    now: UnixMs,
    book: &Book,
    demand: &LayerDemand,
    known: &Known,
    listing: &Arc<VerifiedListing>,
) -> Option<(Plan, usize)> {
    let Part::Layers(range) = &listing.part else { return None };
    let side = |from: u32, to: u32, ends: (NodeKey, NodeKey), beside: &[Planned]| -> Option<Vec<Planned>> {
        if from == to {
            return Some(Vec::new());
        }
        let used = beside.iter().map(|one| one.listing.node_key).chain([listing.node_key]);
        let demand = LayerDemand {
            range: LayerRange::new(from, to)?,
            ends,
            not: demand.not.iter().copied().chain(used).collect(),
            build: Some((listing.build, listing.instruction_set.clone())),
            ..demand.clone()
        };
        plan_layers(now, book, &demand, known).ok().map(|plan| plan.stages)
    };
    let (first, last) = demand.ends;
    let mut stages = side(demand.range.start(), range.start(), (first, listing.node_key), &[])?;
    let after = side(range.end(), demand.range.end(), (listing.node_key, last), &stages)?;
    let at = stages.len();
    let before = stages.last().map_or(first, |stage| stage.listing.node_key);
    let (hop, compute_us) = (known.links.hop(&before, &listing.node_key), compute_us(now, listing, range, known));
    stages.push(Planned { range: *range, listing: Arc::clone(listing), hop, compute_us });
    stages.extend(after);
    let back = known.links.hop(&stages.last()?.listing.node_key, &last);
    Some((Plan { stages, back }, at))
}

/// Where the way through the n-th worker of a plan spends most: in its layers, or on a link of its own.
fn slowest(plan: &Plan, at: usize) -> Slowest {
    let compute = plan.stages.get(at).map_or(0, |stage| stage.compute_us);
    let link = plan.hops().skip(at).take(2).max_by_key(|hop| hop.us());
    match link {
        Some(link) if link.us() > compute => Slowest::Link(*link),
        Some(_) | None => Slowest::Layers(compute),
    }
}

/// Microseconds that a worker takes for a token through its layers: as measured, else by its own word.
fn compute_us(now: UnixMs, listing: &VerifiedListing, range: &LayerRange, known: &Known) -> u64 {
    let measured = known.paces.of(now, &listing.node_key, range).map(|pace| pace.measured_us);
    measured.unwrap_or_else(|| listed_us(listing, range))
}

/// The same by its own word.
pub fn listed_us(listing: &VerifiedListing, range: &LayerRange) -> u64 {
    let decode = listing.speed.decode_mtok_s;
    1_000_000_000u64.checked_div(decode).unwrap_or(u64::from(range.layers()) * UNMEASURED_LAYER_US)
}

/// What the workers of one plan share.
type Kind = (BuildId, String, Vec<EngineProfile>);

/// A path through some workers: time, price, and who they are.
#[derive(Clone, Default)]
struct Path {
    us: u64,
    price: u64,
    stages: Vec<Planned>,
}

/// Plans over the listings that are live.
pub fn plan_layers(now: UnixMs, book: &Book, demand: &LayerDemand, known: &Known) -> Result<Plan, NoLayers> {
    let of_root =
        |listing: &&Arc<VerifiedListing>| listing.model_root == demand.root && matches!(listing.part, Part::Layers(_));
    let all: Vec<&Arc<VerifiedListing>> = book.live(now).filter(of_root).collect();
    if all.is_empty() {
        return Err(NoLayers::NotListed);
    }
    let mut refused: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut kinds: BTreeMap<Kind, Vec<&Arc<VerifiedListing>>> = BTreeMap::new();
    for listing in all {
        match refusal(now, listing, demand, known) {
            Some(why) => *refused.entry(why).or_default() += 1,
            None => {
                let kind = (listing.build, listing.instruction_set.clone(), listing.profiles.clone());
                kinds.entry(kind).or_default().push(listing);
            }
        }
    }
    let mut best: Option<Path> = None;
    let mut furthest = demand.range.start();
    for listings in kinds.values() {
        match path(now, listings, demand, known) {
            Ok(found) => {
                let better = best.as_ref().is_none_or(|best| (found.us, found.price) < (best.us, best.price));
                if better {
                    best = Some(found);
                }
            }
            Err(reached) => furthest = furthest.max(reached),
        }
    }
    let found = best.ok_or(NoLayers::Gap { from: furthest, to: demand.range.end(), refused })?;
    let last = found.stages.last().map_or(demand.ends.0, |stage| stage.listing.node_key);
    Ok(Plan { stages: found.stages, back: known.links.hop(&last, &demand.ends.1) })
}

/// The best path over listings of one kind, or how far any path goes.
fn path(now: UnixMs, listings: &[&Arc<VerifiedListing>], demand: &LayerDemand, known: &Known) -> Result<Path, u32> {
    let links = &known.links;
    let wanted = &demand.range;
    let mut edges: Vec<(LayerRange, &Arc<VerifiedListing>)> = Vec::new();
    for listing in listings {
        if let Part::Layers(range) = &listing.part
            && range.end() <= MAX_LAYERS
        {
            edges.push((*range, listing));
        }
    }
    edges.sort_by_key(|(range, listing)| (range.start(), range.end(), listing.node_key, listing.id()));
    // The best path that ends with each worker, by the layer where it ends: what a hop onward costs depends on who that is.
    // Every edge goes forward, so edges in order see each path that they go on from finished.
    let mut ends: BTreeMap<u32, Vec<Path>> = BTreeMap::from([(wanted.start(), vec![Path::default()])]);
    for (range, listing) in edges {
        let mut best: Option<Path> = None;
        for before in ends.get(&range.start()).into_iter().flatten() {
            if before.stages.iter().any(|used| used.listing.node_key == listing.node_key) {
                continue;
            }
            let from = before.stages.last().map_or(&demand.ends.0, |stage| &stage.listing.node_key);
            let (hop, compute_us) = (links.hop(from, &listing.node_key), compute_us(now, listing, &range, known));
            let last = (range.end() == wanted.end()).then(|| links.hop(&listing.node_key, &demand.ends.1).us());
            let rate = listing.rates.position_layer.unwrap_or_default().0.saturating_mul(range.layers().into());
            let us = before.us.saturating_add(compute_us).saturating_add(hop.us()).saturating_add(last.unwrap_or(0));
            let price = before.price.saturating_add(rate);
            if best.as_ref().is_none_or(|best| (us, price) < (best.us, best.price)) {
                let mut stages = before.stages.clone();
                stages.push(Planned { range, listing: Arc::clone(listing), hop, compute_us });
                best = Some(Path { us, price, stages });
            }
        }
        if let Some(best) = best {
            ends.entry(range.end()).or_default().push(best);
        }
    }
    let reached = ends.last_key_value().map_or(wanted.start(), |(reached, _)| *reached);
    let found = ends.remove(&wanted.end()).unwrap_or_default().into_iter();
    // The first of equals: edges are in the order of keys.
    found.min_by_key(|path| (path.us, path.price)).ok_or(reached)
}

#[cfg(test)]
mod tests;
