//! Whole, by layers, by experts, or by both: which way a model gives the most tokens a second now.
//!
//! Each way is judged by the same figure, the time of a step of so many streams: a seller of the whole model by its own word;
//! layers by the workers' own words and the hops between them ([`crate::links`]); experts by what the lead measured ([`crate::estimate`]);
//! both by that and the hops. A way that is not to be had is named with its reason.

use crate::{
    estimate::{ExpertSplit, listed_step_us, tokens_per_s},
    layers::Plan,
};
use core::fmt;
use satgrid_types::{NodeKey, Part, VerifiedListing};
use std::collections::BTreeSet;
use std::sync::Arc;

/// How a model is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    Whole,
    Layers,
    Experts,
    /// Stages that lead experts.
    Both,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Whole => "whole",
            Way::Layers => "layers",
            Way::Experts => "experts",
            Way::Both => "both",
        })
    }
}

/// The fastest seller of the whole model for so many streams at a time, of those that are not left out, and its step.
pub fn whole<'a>(
    listings: &'a [Arc<VerifiedListing>],
    not: &BTreeSet<NodeKey>,
    batch: u32,
) -> Option<(&'a Arc<VerifiedListing>, f64)> {
    let fits = |listing: &&Arc<VerifiedListing>| {
        listing.part == Part::Whole && listing.slots >= batch && !not.contains(&listing.node_key)
    };
    let timed = listings.iter().filter(fits).filter_map(|l| Some((l, listed_step_us(&l.speed, batch)?)));
    timed.min_by(|(a, x), (b, y)| x.total_cmp(y).then_with(|| a.id().cmp(&b.id())))
}

/// A step over these workers, whose lead keeps the first and the last layer; `None` where one of them names no speed or holds
/// fewer streams.
pub fn layers_step_us(plan: &Plan, batch: u32) -> Option<f64> {
    let (mut compute, mut layers) = (0.0, 0_u32);
    for part in &plan.stages {
        if part.listing.slots < batch {
            return None;
        }
        compute += listed_step_us(&part.listing.speed, batch)?;
        layers = layers.saturating_add(part.range.layers());
    }
    if layers == 0 {
        return None;
    }
    // The lead's two layers are taken to be as the others; rows come back to it.
    let own = 2.0 * compute / f64::from(layers);
    let hops: f64 = plan.hops().map(|hop| hop.us() as f64).sum();
    Some(compute + own + hops)
}

/// A step where the lead's trunk is cut over the machines of this plan, each of which asks the experts of its layers as the lead does now.
/// Streams go in a group for each machine, so that all compute at once: a group's own way around remains, and the work of the
/// busiest holder of experts, whoever asks. `None` where there is no stage, or one holds fewer streams.
pub fn both_step_us(plan: &Plan, split: &ExpertSplit, batch: u32) -> Option<f64> {
    let machines = u32::try_from(plan.stages.len()).ok()?.checked_add(1)?;
    if plan.stages.is_empty() || plan.stages.iter().any(|part| part.listing.slots < batch) {
        return None;
    }
    let group = batch.div_ceil(machines).max(1);
    let groups = f64::from(batch.div_ceil(group));
    let hops: f64 = plan.hops().map(|hop| hop.us() as f64).sum();
    Some((split.step_us(group) + hops).max(groups * split.busiest_us(group)))
}

/// The way with the shortest step, of those that are to be had.
pub fn pick(steps: &[(Way, Option<f64>)]) -> Option<Way> {
    let timed = steps.iter().filter_map(|(way, step)| Some((*way, (*step)?)));
    timed.min_by(|(a, x), (b, y)| x.total_cmp(y).then_with(|| a.cmp(b))).map(|(way, _)| way)
}

/// A step as tokens a second, for tables.
pub fn shown(batch: u32, step_us: Option<f64>) -> String {
    step_us.map_or_else(|| "-".to_owned(), |step| format!("{:.1}", tokens_per_s(batch, step)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::{Fit, Shape, WorkerCost};
    use crate::layers::Planned;
    use crate::links::{HOP_US, Links};
    use crate::testing::Offer;
    use satgrid_types::{ExpertSet, LayerRange};
    use std::collections::BTreeMap;

    fn offer(provider: u32, decode_mtok_s: u64, slots: u32, part: Part) -> Arc<VerifiedListing> {
        Arc::new(Offer { decode_mtok_s, slots, part, layer_price: Some(1), ..Offer::new(provider) }.verified())
    }

    #[test]
    fn the_fastest_whole_seller_that_holds_so_many_streams() {
        let listings = [
            offer(1, 20_000, 32, Part::Whole),
            offer(2, 50_000, 4, Part::Whole),
            offer(3, 90_000, 32, Part::Whole),
            offer(4, 99_000, 32, Part::Layers(LayerRange::new(1, 3).unwrap())),
        ];
        let us = |not: &[u32], batch| {
            let not = not.iter().map(|p| Offer::new(*p).node()).collect();
            whole(&listings, &not, batch).map(|(listing, _)| listing.node_key)
        };
        assert_eq!(us(&[3], 1), Some(Offer::new(2).node()));
        assert_eq!(us(&[3], 8), Some(Offer::new(1).node()));
        assert_eq!(us(&[], 8), Some(Offer::new(3).node()));
        assert_eq!(us(&[], 64), None);
    }

    #[test]
    fn layers_are_their_workers_and_their_hops() {
        let planned = |provider, a, b| {
            let range = LayerRange::new(a, b).unwrap();
            let listing = offer(provider, 100_000, 8, Part::Layers(range));
            let (hop, compute_us) = (Links::default().hop(&NodeKey([9; 32]), &listing.node_key), 10_000);
            Planned { range, listing, hop, compute_us }
        };
        let plan = |stages: &[Planned]| {
            let back = Links::default().hop(&NodeKey([8; 32]), &NodeKey([9; 32]));
            Plan { stages: stages.to_vec(), back }
        };
        let step = layers_step_us(&plan(&[planned(1, 1, 5), planned(2, 5, 9)]), 1).unwrap();
        // 20 ms for 8 layers, 5 ms for the lead's 2, 3 hops.
        assert!((step - (20_000.0 + 5_000.0 + 3.0 * HOP_US as f64)).abs() < 1.0, "{step}");
        assert_eq!(layers_step_us(&plan(&[planned(1, 1, 5)]), 9), None);
        assert_eq!(layers_step_us(&plan(&[]), 1), None);
    }

    #[test]
    fn stages_that_lead_experts_pay_for_hops_with_smaller_groups() {
        let range = LayerRange::new(1, 3).unwrap();
        let listing = offer(1, 100_000, 32, Part::Layers(range));
        let (hop, compute_us) = (Links::default().hop(&NodeKey([9; 32]), &listing.node_key), 10_000);
        let back = Links::default().hop(&NodeKey([8; 32]), &NodeKey([9; 32]));
        let plan = Plan { stages: vec![Planned { range, listing, hop, compute_us }], back };
        let fit = |base, slope| Fit { base, slope };
        let shape = Shape { first: 0, layers: 4, experts: 2, used: 1, row_bytes: 256 };
        let set = ExpertSet::new((0..4).flat_map(|layer| [(layer, 0), (layer, 1)]));
        let steps = |row_us: f64, work_us: f64, batch: u32| {
            let cost = WorkerCost { link: fit(100.0, 0.0), work: fit(0.0, work_us), measured: true };
            let split = ExpertSplit::new(shape, fit(0.0, row_us), &[(&set, cost)], &BTreeMap::new());
            (split.step_us(batch), both_step_us(&plan, &split, batch).unwrap())
        };
        let hops = 2.0 * HOP_US as f64;
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1.0, "{a}, not {b}");
        // One stream: the hops come on top. 32 of them: two machines take 16 rows of the trunk each.
        let (experts, both) = steps(1_000.0, 1.0, 1);
        near(both, experts + hops);
        let (experts, both) = steps(1_000.0, 1.0, 32);
        near(experts, 32.0 * 1_000.0 + 4.0 * (100.0 + 32.0));
        near(both, 16.0 * 1_000.0 + 4.0 * (100.0 + 16.0) + hops);
        // Where the holders of experts are busy all the time, machines beside them take nothing off.
        let (_, both) = steps(0.0, 1_000.0, 32);
        near(both, 4.0 * 32.0 * 1_000.0);
        assert_eq!(
            both_step_us(
                &Plan { stages: Vec::new(), ..plan.clone() },
                &ExpertSplit::new(shape, fit(0.0, 1.0), &[], &BTreeMap::new()),
                1
            ),
            None
        );
    }

    #[test]
    fn the_shortest_step_is_picked() {
        assert_eq!(
            pick(&[(Way::Whole, None), (Way::Layers, Some(9.0)), (Way::Experts, Some(8.0))]),
            Some(Way::Experts)
        );
        assert_eq!(pick(&[(Way::Whole, Some(8.0)), (Way::Experts, Some(8.0))]), Some(Way::Whole));
        assert_eq!(pick(&[(Way::Whole, None)]), None);
        assert_eq!((shown(8, Some(1e6)), shown(8, None)), ("8.0".to_owned(), "-".to_owned()));
    }
}
