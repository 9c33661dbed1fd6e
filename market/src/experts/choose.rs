//! Whose experts a lead buys, of all who fit.
//!
//! First every expert is covered, by those who take over most of the rows for their price. Then copies of hot experts are added
//! as long as they make a step faster: what decides is the estimate over the measured routing and the measured links. All
//! others stand by: a worker that is lost is replaced by them at once, and a spot check asks them, but no request is opened
//! at them before they are needed.

use super::Wanted;
use crate::estimate::{ExpertSplit, Fit, Shape, WorkerCost};
use satgrid_types::{ExpertSet, Part, VerifiedListing};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Most workers that serve one model at a time.
const MOST_SERVING: usize = 64;
/// Candidates that are tried for each copy, cheapest first.
const MOST_TRIED: usize = 16;
/// A copy is bought where a step takes at most this part of the time with it.
const WORTH_IT: f64 = 0.97;

/// What is known of the model and of this lead.
#[derive(Debug, Clone)]
pub struct Choosing<'a> {
    pub shape: Shape,
    /// The trunk's own time of a step.
    pub trunk: Fit,
    /// Experts that the lead holds itself.
    pub own: &'a ExpertSet,
    /// Rows that the router sent to each expert; empty where nothing was counted yet.
    pub heat: &'a BTreeMap<(u32, u32), u64>,
    /// Streams at a time.
    pub batch: u32,
}

/// What becomes of a seller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It was taken to cover experts.
    Serves,
    /// All its experts are others' too: its copies make a step faster.
    Copies,
    StandsBy,
}

/// The role of each seller, in their order, and the split over those who serve.
pub fn choose(
    sellers: &[Arc<VerifiedListing>],
    wanted: &Wanted,
    with: &Choosing<'_>,
    cost: &dyn Fn(&VerifiedListing) -> WorkerCost,
) -> (Vec<Role>, ExpertSplit) {
    let offers: Vec<Offered<'_>> = sellers
        .iter()
        .filter_map(|listing| match &listing.part {
            Part::Experts(set) => Some(Offered {
                set,
                price: u128::from(listing.rates.expert_row.map_or(0, |rate| rate.0)).saturating_add(1),
                cost: cost(listing),
            }),
            Part::Whole | Part::Layers(_) => None,
        })
        .collect();
    let mut roles = vec![Role::StandsBy; sellers.len()];
    // Whoever calls has sorted out what is not experts.
    if offers.len() == sellers.len() {
        cover(&offers, wanted, with, &mut roles);
        copy(&offers, with, &mut roles);
    }
    // Whatever nobody who serves has is the lead's own work: it has a spare, or it cannot begin.
    let held: BTreeSet<(u32, u32)> = offers
        .iter()
        .zip(&roles)
        .filter(|(_, role)| **role != Role::StandsBy)
        .flat_map(|(offer, _)| offer.set.pairs().iter().copied())
        .collect();
    let own = wanted.iter().filter(|place| !held.contains(place)).chain(with.own.pairs()).copied();
    let own = ExpertSet::new(own);
    let split = split(&offers, &Choosing { own: &own, ..with.clone() }, &roles);
    (roles, split)
}

/// A seller of experts.
struct Offered<'a> {
    set: &'a ExpertSet,
    price: u128,
    cost: WorkerCost,
}

fn split(offers: &[Offered<'_>], with: &Choosing<'_>, roles: &[Role]) -> ExpertSplit {
    let serving = offers.iter().zip(roles).filter(|(_, role)| **role != Role::StandsBy);
    let mut holders: Vec<(&ExpertSet, WorkerCost)> = serving.map(|(offer, _)| (offer.set, offer.cost)).collect();
    holders.push((with.own, WorkerCost::own()));
    ExpertSplit::new(with.shape, with.trunk, &holders, with.heat)
}

/// Takes sellers until every expert that the lead lacks has one, or nobody sells what is left.
fn cover(offers: &[Offered<'_>], wanted: &Wanted, with: &Choosing<'_>, roles: &mut [Role]) {
    let lacking = wanted.iter().filter(|place| !with.own.contains(place.0, place.1));
    let mut open: BTreeSet<(u32, u32)> = lacking.copied().collect();
    let rows = |place: &(u32, u32)| u128::from(with.heat.get(place).copied().unwrap_or(0).saturating_add(1));
    while !open.is_empty() && serving(roles) < MOST_SERVING {
        let mut best: Option<(usize, u128, u128)> = None;
        for (at, offer) in offers.iter().enumerate().filter(|(at, _)| roles.get(*at) == Some(&Role::StandsBy)) {
            let gain: u128 = offer.set.pairs().iter().filter(|place| open.contains(place)).map(rows).sum();
            // More rows for the price; among equals the first, which is the cheapest.
            let better =
                best.is_none_or(|(_, most, price)| gain.saturating_mul(price) > most.saturating_mul(offer.price));
            if gain > 0 && better {
                best = Some((at, gain, offer.price));
            }
        }
        let Some((at, ..)) = best else { return };
        if let (Some(role), Some(offer)) = (roles.get_mut(at), offers.get(at)) {
            *role = Role::Serves;
            offer.set.pairs().iter().for_each(|place| {
                open.remove(place);
            });
        }
    }
}

/// Adds sellers of copies, each time the one that makes a step fastest, while it is worth it.
fn copy(offers: &[Offered<'_>], with: &Choosing<'_>, roles: &mut [Role]) {
    let mut now = split(offers, with, roles).step_us(with.batch);
    while serving(roles) < MOST_SERVING {
        let mut best: Option<(usize, f64)> = None;
        // Nobody is paid for a copy of what the lead holds.
        let lacks = |offer: &Offered<'_>| offer.set.pairs().iter().any(|place| !with.own.contains(place.0, place.1));
        let waiting = offers.iter().zip(roles.iter()).enumerate();
        let waiting = waiting.filter(|(_, (offer, role))| **role == Role::StandsBy && lacks(offer));
        let waiting: Vec<usize> = waiting.map(|(at, _)| at).take(MOST_TRIED).collect();
        for at in waiting {
            let mut tried = roles.to_vec();
            tried.iter_mut().skip(at).take(1).for_each(|role| *role = Role::Copies);
            let took = split(offers, with, &tried).step_us(with.batch);
            if best.is_none_or(|(_, least)| took < least) {
                best = Some((at, took));
            }
        }
        match best {
            Some((at, took)) if took <= now * WORTH_IT => {
                roles.iter_mut().skip(at).take(1).for_each(|role| *role = Role::Copies);
                now = took;
            }
            Some(_) | None => return,
        }
    }
}

fn serving(roles: &[Role]) -> usize {
    roles.iter().filter(|role| **role != Role::StandsBy).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::hash_of;
    use crate::testing::Offer;

    const SHAPE: Shape = Shape { first: 0, layers: 2, experts: 4, used: 2, row_bytes: 256 };

    fn weights() -> crate::experts::Weights {
        (0..2u32).flat_map(|layer| (0..4u32).map(move |e| ((layer, e), [(layer * 4 + e) as u8; 32]))).collect()
    }

    fn of(experts: &[u32]) -> ExpertSet {
        ExpertSet::new((0..2).flat_map(|layer| experts.iter().map(move |e| (layer, *e))))
    }

    /// Provider, the experts of both layers that it sells, price.
    type Row<'a> = (u32, &'a [u32], u64);

    fn sellers(offers: &[Row<'_>]) -> Vec<Arc<VerifiedListing>> {
        let offer = |(provider, held, price): &Row<'_>| {
            let set = of(held);
            let experts = Some(hash_of(&set, &weights()));
            let part = Part::Experts(set);
            Arc::new(Offer { part, expert_price: Some(*price), experts, ..Offer::new(*provider) }.verified())
        };
        offers.iter().map(offer).collect()
    }

    #[track_caller]
    fn check(offers: &[Row<'_>], own: &[u32], hot: &[u64], expect: &[Role]) -> ExpertSplit {
        let heat = (0..2).flat_map(|layer| (0u32..).zip(hot).map(move |(e, rows)| ((layer, e), *rows))).collect();
        let own = of(own);
        let trunk = Fit { base: 100.0, slope: 10.0 };
        let with = Choosing { shape: SHAPE, trunk, own: &own, heat: &heat, batch: 8 };
        let near = |_: &VerifiedListing| WorkerCost {
            link: Fit { base: 200.0, slope: 0.0 },
            work: Fit { base: 0.0, slope: 300.0 },
            measured: true,
        };
        let (roles, split) = choose(&sellers(offers), &weights().into_keys().collect(), &with, &near);
        assert_eq!(roles, expect);
        split
    }

    use Role::{Copies, Serves, StandsBy};

    #[test]
    fn every_expert_is_covered_and_the_rest_stands_by() {
        check(&[(1, &[0, 2], 5), (2, &[1, 3], 5)], &[], &[], &[Serves, Serves]);
        // The same pack twice: the cheaper serves, and without figures a copy of half the model does not help.
        check(&[(1, &[0, 2], 5), (2, &[1, 3], 5), (3, &[1, 3], 9)], &[], &[], &[Serves, Serves, StandsBy]);
        // What the lead holds itself is not bought.
        check(&[(1, &[0, 2], 5), (2, &[1, 3], 5)], &[1, 3], &[], &[Serves, StandsBy]);
        // One seller with everything for less than two with a half each: theirs are copies.
        check(&[(1, &[0, 1, 2, 3], 5), (2, &[0, 2], 9), (3, &[1, 3], 9)], &[], &[], &[Serves, Copies, Copies]);
        check(&[], &[], &[], &[]);
    }

    #[test]
    fn copies_of_hot_experts_are_bought_where_they_help() {
        let offers: &[Row<'_>] = &[(1, &[0, 2], 5), (2, &[1, 3], 5), (3, &[0], 9), (4, &[3], 9)];
        let split = check(offers, &[], &[900, 10, 10, 10], &[Serves, Serves, Copies, StandsBy]);
        // Provider 1 has half of the hot expert's rows, and all of another's.
        assert!((480..520).contains(&split.share_permille(0)), "{}", split.share_permille(0));
        // The same offers without heat: nobody's copy is worth it alone.
        check(offers, &[], &[10, 10, 10, 10], &[Serves, Serves, StandsBy, StandsBy]);
    }
}
