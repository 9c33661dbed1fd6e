//! Cutting layers over those who sell them.
//!
//! A lead lacks the layers `[a, b)`. Each live listing of layers of that model is an edge from its first layer to its end;
//! a plan is a path from a to b. The best path is the one whose workers together take the least time for a token, where
//! each worker adds the time of its layers (by its own measurement) and one hop; among those equally fast, the cheapest;
//! then by keys, so that the same book gives the same plan on every machine. Fewer machines win by themselves: every hop
//! costs.
//!
//! Workers of one plan are of one engine build, profile and instruction set: in `exact` the answer is the same to the bit.

use crate::book::Book;
use satgrid_types::{
    BuildId, EngineProfile, LayerRange, ModelRoot, MsatPerMtok, NodeKey, Part, UnixMs, VerifiedListing,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use thiserror::Error;

/// What a hop costs in the comparison, in microseconds a token, where nobody has measured it: half a round trip in one city.
pub const HOP_US: u64 = 2_000;
/// What a layer costs where its worker has not measured itself, in microseconds a token.
const UNMEASURED_LAYER_US: u64 = 5_000;
/// Layers beyond which no model goes.
const MAX_LAYERS: u32 = 4_096;

/// Which layers are wanted.
#[derive(Debug, Clone)]
pub struct LayerDemand {
    pub root: ModelRoot,
    pub range: LayerRange,
    /// Nodes that are not asked: the lead itself, and workers that were lost.
    pub not: BTreeSet<NodeKey>,
    /// The lead's own: a worker on another promises it other bits, or fewer.
    pub profile: EngineProfile,
    /// The engine that the others run, where there are others.
    pub build: Option<(BuildId, String)>,
    /// The most that a million position-layers may cost.
    pub max_rate: Option<MsatPerMtok>,
    /// Sequences that each worker has to hold at once, and positions of each.
    pub slots: u32,
    pub context: u32,
}

/// One worker of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub range: LayerRange,
    pub listing: Arc<VerifiedListing>,
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

/// Why a listing of layers is no part of any plan.
pub fn refusal(listing: &VerifiedListing, demand: &LayerDemand) -> Option<&'static str> {
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
        (Some(_), _) => None,
    }
}

/// What became of one listing of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerVerdict {
    /// In the plan, as the n-th worker from 1.
    Planned {
        place: usize,
    },
    /// It could be; the plan without it is faster, cheaper, or the only whole one.
    Spare,
    Refused(&'static str),
}

/// A listing of layers of the wanted model, and why it is or is not in the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayersConsidered {
    pub listing: Arc<VerifiedListing>,
    pub range: LayerRange,
    /// Time for a token through these layers and over one hop, as the plan reckons.
    pub token_us: u64,
    pub verdict: LayerVerdict,
}

/// The plan, or why there is none; and every live listing of the model's layers with its verdict, by first layer.
pub fn explain_layers(
    now: UnixMs,
    book: &Book,
    demand: &LayerDemand,
) -> (Result<Vec<Planned>, NoLayers>, Vec<LayersConsidered>) {
    let plan = plan_layers(now, book, demand);
    let planned: &[Planned] = plan.as_deref().unwrap_or_default();
    let mut considered = Vec::new();
    for listing in book.live(now).filter(|listing| listing.model_root == demand.root) {
        let Part::Layers(range) = &listing.part else { continue };
        let verdict = match (planned.iter().position(|one| one.listing == *listing), refusal(listing, demand)) {
            (Some(at), _) => LayerVerdict::Planned { place: at.saturating_add(1) },
            (None, Some(why)) => LayerVerdict::Refused(why),
            (None, None) => LayerVerdict::Spare,
        };
        let token_us = cost_us(listing, range);
        considered.push(LayersConsidered { listing: Arc::clone(listing), range: *range, token_us, verdict });
    }
    considered.sort_by_key(|one| (one.range.start(), one.range.end(), one.listing.node_key));
    (plan, considered)
}

/// Microseconds that a worker takes for a token through its layers, a hop included.
fn cost_us(listing: &VerifiedListing, range: &LayerRange) -> u64 {
    let decode = listing.speed.decode_mtok_s;
    let compute = 1_000_000_000u64.checked_div(decode).unwrap_or(u64::from(range.layers()) * UNMEASURED_LAYER_US);
    compute.saturating_add(HOP_US)
}

/// What the workers of one plan share.
type Kind = (BuildId, String, Vec<EngineProfile>);

/// A path as far as some layer: time, price, then keys.
type Path = (u64, u64, Vec<Planned>);

/// Plans over the listings that are live.
pub fn plan_layers(now: UnixMs, book: &Book, demand: &LayerDemand) -> Result<Vec<Planned>, NoLayers> {
    let of_root =
        |listing: &&Arc<VerifiedListing>| listing.model_root == demand.root && matches!(listing.part, Part::Layers(_));
    let all: Vec<&Arc<VerifiedListing>> = book.live(now).filter(of_root).collect();
    if all.is_empty() {
        return Err(NoLayers::NotListed);
    }
    let mut refused: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut kinds: BTreeMap<Kind, Vec<&Arc<VerifiedListing>>> = BTreeMap::new();
    for listing in all {
        match refusal(listing, demand) {
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
        match path(listings, &demand.range) {
            Ok(found) => {
                let better = best.as_ref().is_none_or(|best| (found.0, found.1) < (best.0, best.1));
                if better {
                    best = Some(found);
                }
            }
            Err(reached) => furthest = furthest.max(reached),
        }
    }
    best.map(|(_, _, plan)| plan).ok_or(NoLayers::Gap { from: furthest, to: demand.range.end(), refused })
}

/// The best path over listings of one kind, or how far any path goes.
fn path(listings: &[&Arc<VerifiedListing>], wanted: &LayerRange) -> Result<Path, u32> {
    let mut edges: BTreeMap<u32, Vec<(LayerRange, &Arc<VerifiedListing>)>> = BTreeMap::new();
    for listing in listings {
        if let Part::Layers(range) = &listing.part
            && range.end() <= MAX_LAYERS
        {
            edges.entry(range.start()).or_default().push((*range, listing));
        }
    }
    for from in edges.values_mut() {
        from.sort_by_key(|(range, listing)| (range.end(), listing.node_key, listing.id()));
    }
    let mut best: BTreeMap<u32, Path> = BTreeMap::from([(wanted.start(), (0, 0, Vec::new()))]);
    // Every edge goes forward, so layers in order see each best path finished.
    let mut at = wanted.start();
    while let Some(here) = best.get(&at).cloned() {
        for (range, listing) in edges.get(&at).into_iter().flatten() {
            let (time, price, plan) = &here;
            if plan.iter().any(|used| used.listing.node_key == listing.node_key) {
                continue;
            }
            let rate = listing.rates.position_layer.unwrap_or_default().0.saturating_mul(range.layers().into());
            let to = (time.saturating_add(cost_us(listing, range)), price.saturating_add(rate));
            if best.get(&range.end()).is_none_or(|known| to < (known.0, known.1)) {
                let mut plan = plan.clone();
                plan.push(Planned { range: *range, listing: Arc::clone(listing) });
                best.insert(range.end(), (to.0, to.1, plan));
            }
        }
        match best.range(at + 1..).next() {
            Some((next, _)) => at = *next,
            None => break,
        }
    }
    match best.remove(&wanted.end()) {
        Some(found) => Ok(found),
        None => Err(best.last_key_value().map_or(wanted.start(), |(reached, _)| *reached)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::book::BookLimits;
    use crate::testing::{Offer, now};

    /// Offers of layers: provider, first, end, decode speed, price.
    type Row = (u32, u32, u32, u64, u64);

    fn book(rows: &[Row]) -> Book {
        let mut book = Book::new(BookLimits::default());
        for (provider, from, to, decode_mtok_s, price) in rows {
            let part = Part::Layers(LayerRange::new(*from, *to).unwrap());
            let offer =
                Offer { part, decode_mtok_s: *decode_mtok_s, layer_price: Some(*price), ..Offer::new(*provider) };
            book.apply(now(), offer.verified()).unwrap();
        }
        book
    }
    fn demand() -> LayerDemand {
        let (root, range) = (Offer::new(1).root(), LayerRange::new(2, 10).unwrap());
        let (not, profile) = (BTreeSet::new(), EngineProfile::Exact);
        LayerDemand { root, range, not, profile, build: None, max_rate: None, slots: 1, context: 1 }
    }
    #[track_caller]
    fn check(rows: &[Row], bend: impl Fn(&mut LayerDemand), expect: Result<&[(u32, u32, u32)], &str>) {
        let mut demand = demand();
        bend(&mut demand);
        let given = plan_layers(now(), &book(rows), &demand);
        match (given, expect) {
            (Ok(plan), Ok(want)) => {
                let got: Vec<(NodeKey, u32, u32)> =
                    plan.iter().map(|p| (p.listing.node_key, p.range.start(), p.range.end())).collect();
                let want: Vec<(NodeKey, u32, u32)> =
                    want.iter().map(|(p, a, b)| (Offer::new(*p).node(), *a, *b)).collect();
                assert_eq!(got, want);
            }
            (Err(why), Err(text)) => assert!(why.to_string().contains(text), "{why}"),
            (got, want) => panic!("{got:?}, wanted {want:?}"),
        }
    }

    #[test]
    fn layers_are_cut_by_speed_and_price() {
        let three = [(1, 2, 5, 100_000, 10), (2, 5, 8, 100_000, 10), (3, 8, 10, 100_000, 10)];
        check(&three, |_| (), Ok(&[(1, 2, 5), (2, 5, 8), (3, 8, 10)]));
        let one = [three[0], three[1], three[2], (4, 2, 10, 40_000, 90)];
        check(&one, |_| (), Ok(&[(4, 2, 10)]));
        // Slower than three machines with their hops.
        check(&[three[0], three[1], three[2], (4, 2, 10, 20_000, 90)], |_| (), Ok(&[(1, 2, 5), (2, 5, 8), (3, 8, 10)]));
        // Equally fast: the cheaper.
        check(&[(1, 2, 10, 50_000, 20), (2, 2, 10, 50_000, 19)], |_| (), Ok(&[(2, 2, 10)]));
    }

    #[test]
    fn every_listing_has_its_verdict() {
        let book =
            book(&[(1, 2, 6, 100_000, 10), (2, 6, 10, 100_000, 10), (3, 6, 10, 100_000, 90), (4, 6, 10, 9_000, 20)]);
        let demand = LayerDemand { max_rate: Some(MsatPerMtok(50)), ..demand() };
        let (plan, considered) = explain_layers(now(), &book, &demand);
        assert_eq!(plan.unwrap().len(), 2);
        let told: Vec<(NodeKey, LayerVerdict)> = considered.iter().map(|c| (c.listing.node_key, c.verdict)).collect();
        for (provider, verdict) in [
            (1, LayerVerdict::Planned { place: 1 }),
            (2, LayerVerdict::Planned { place: 2 }),
            (3, LayerVerdict::Refused("too dear")),
            (4, LayerVerdict::Spare),
        ] {
            assert!(told.contains(&(Offer::new(provider).node(), verdict)), "{provider}: {told:?}");
        }
        let (none, considered) = explain_layers(now(), &book, &LayerDemand { slots: u32::MAX, ..demand });
        assert!(none.unwrap_err().to_string().contains("too small"), "nobody holds so many");
        assert!(considered.iter().all(|c| matches!(c.verdict, LayerVerdict::Refused(_))));
    }

    #[test]
    fn what_is_missing_is_named() {
        check(&[], |_| (), Err("nobody lists layers"));
        check(&[(1, 2, 5, 1_000, 1), (2, 6, 10, 1_000, 1)], |_| (), Err("layers 5 to 10 are sold by nobody"));
        check(&[(1, 2, 10, 1_000, 50)], |d| d.max_rate = Some(MsatPerMtok(49)), Err("1 too dear"));
        check(&[(1, 0, 10, 1_000, 50)], |_| (), Err("1 beyond the layers"));
        check(&[(1, 2, 10, 1_000, 50)], |d| d.not = BTreeSet::from([Offer::new(1).node()]), Err("1 left out"));
        let other = Some((BuildId([9; 32]), "avx2".to_owned()));
        check(&[(1, 2, 10, 1_000, 50)], |d| d.build = other.clone(), Err("1 another engine build"));
        check(&[(1, 2, 10, 1_000, 50)], |d| d.profile = EngineProfile::Fast, Err("1 another profile"));
        // Two parts of one node are two hops to one machine: it sells them as one.
        check(&[(1, 2, 5, 1_000, 1), (1, 5, 10, 1_000, 1)], |_| (), Err("layers 5 to 10"));
    }
}
