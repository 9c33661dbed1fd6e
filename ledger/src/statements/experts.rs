//! Work on experts: how many rows each expert evaluated, and how a lead accounts for all of them.
//!
//! A worker's receipt counts rows by (layer, expert), and leaves out what is zero; their sum is what it is paid for. The
//! lead's receipt to its customer says how many rows each layer had and how many experts the router chose for each. The
//! two meet in one law: at every layer the workers' rows and the lead's own are `rows x chosen`, and whatever was evaluated
//! a second time, to compare or because an answer was lost, is said apart.

use super::part::PartOrder;
use crate::log::{Frontier, leaf_hash};
use minicbor::{Decode, Encode};
use satgrid_types::{Digest, PartUsage};
use std::collections::BTreeMap;

/// Counters in one receipt; work on more experts is ordered in several requests.
pub const MAX_EXPERT_COUNTS: usize = 2_048;
/// Layers of a model that a lead accounts for.
pub const MAX_EXPERT_LAYERS: usize = 512;

/// Rows through one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct ExpertCount {
    #[n(0)]
    pub layer: u32,
    #[n(1)]
    pub expert: u32,
    #[n(2)]
    pub rows: u64,
}

/// How a lead accounts for the rows of a request's expert layers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ExpertSplit {
    /// Experts that the router chooses for each row.
    #[n(0)]
    pub chosen: u32,
    /// Rows of each layer, from the first; zero where a layer has no experts.
    #[n(1)]
    pub layers: Vec<u64>,
    /// What the lead evaluated itself.
    #[n(2)]
    pub own: Vec<ExpertCount>,
    /// Expert rows of each layer that were evaluated again: to compare two workers, or because an answer was lost.
    /// As long as `layers`, or empty where there were none.
    #[n(3)]
    pub again: Vec<u64>,
}

/// What is wrong with counters or with what they add up to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpertFault {
    #[error("counters out of order, of no rows, or more than {MAX_EXPERT_COUNTS}")]
    Counters,
    #[error("counters of {counted} rows, {charged} are charged")]
    Sum { counted: u64, charged: u64 },
    #[error("a split of more than {MAX_EXPERT_LAYERS} layers, of none chosen, or that contradicts itself")]
    Split,
    #[error(
        "layer {layer}: experts evaluated {evaluated} rows, its {rows} rows through {chosen} experts each account for {accounted}"
    )]
    Conservation { layer: u32, evaluated: u64, rows: u64, chosen: u32, accounted: u64 },
}

/// Each (layer, expert) once, in rising order, none of no rows.
pub fn check_counts(counts: &[ExpertCount]) -> Result<(), ExpertFault> {
    let rising = counts.is_sorted_by(|a, b| (a.layer, a.expert) < (b.layer, b.expert));
    let good = rising && counts.len() <= MAX_EXPERT_COUNTS && counts.iter().all(|count| count.rows > 0);
    if good { Ok(()) } else { Err(ExpertFault::Counters) }
}

/// Whether a worker's receipt counts what it charges for: counters exactly where experts were ordered.
pub fn check_work(order: &PartOrder, usage: &PartUsage, counts: Option<&[ExpertCount]>) -> Result<(), ExpertFault> {
    let charged = usage.expert_rows;
    let counts = match (order.layers, counts) {
        (Some(_), None) => return Ok(()),
        (Some(_), Some(_)) => return Err(ExpertFault::Counters),
        (None, counts) => counts.unwrap_or_default(),
    };
    check_counts(counts)?;
    let counted = counts.iter().fold(0u64, |sum, count| sum.saturating_add(count.rows));
    if counted == charged { Ok(()) } else { Err(ExpertFault::Sum { counted, charged }) }
}

/// What the workers of one request evaluated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpertLegs {
    /// Ids of their receipts, or of the last acknowledgement of one that vanished.
    pub ids: Vec<Digest>,
    /// Rows by layer, of those with receipts.
    pub rows: BTreeMap<u32, u64>,
    /// Workers that vanished: what they counted where, nobody signed.
    pub vanished: u64,
}

impl ExpertLegs {
    /// Takes in a worker's part; no counters where it vanished.
    pub fn add(&mut self, id: Option<Digest>, counts: Option<&[ExpertCount]>) {
        self.ids.extend(id);
        match counts {
            Some(counts) => {
                for count in counts {
                    let sum = self.rows.entry(count.layer).or_default();
                    *sum = sum.saturating_add(count.rows);
                }
            }
            None => self.vanished = self.vanished.saturating_add(1),
        }
    }

    /// Merkle root (RFC 6962 hashing) over the ids, in rising order.
    pub fn root(&self) -> Digest {
        let mut ids = self.ids.clone();
        ids.sort_unstable();
        let mut tree = Frontier::new();
        for id in ids {
            tree.push(leaf_hash(&id.0));
        }
        tree.root()
    }
}

/// The law of conservation: at every layer exactly the rows that the router sent were evaluated. Where a worker vanished,
/// what it did is nobody's to count: then no more than that.
pub fn check_conservation(split: &ExpertSplit, legs: &ExpertLegs) -> Result<(), ExpertFault> {
    let layers = split.layers.len();
    let again = split.again.is_empty() || split.again.len() == layers;
    let inside = |layer: u32| usize::try_from(layer).is_ok_and(|layer| layer < layers);
    let own_inside = split.own.iter().all(|count| inside(count.layer));
    if layers > MAX_EXPERT_LAYERS || split.chosen == 0 || !again || !own_inside || check_counts(&split.own).is_err() {
        return Err(ExpertFault::Split);
    }
    if let Some((&layer, &evaluated)) = legs.rows.iter().find(|(layer, _)| !inside(**layer)) {
        return Err(ExpertFault::Conservation { layer, evaluated, rows: 0, chosen: split.chosen, accounted: 0 });
    }
    for (layer, &rows) in (0u32..).zip(&split.layers) {
        let own = split.own.iter().filter(|count| count.layer == layer).map(|count| count.rows);
        let bought = legs.rows.get(&layer).copied().unwrap_or(0);
        let evaluated = own.fold(bought, u64::saturating_add);
        let again = usize::try_from(layer).ok().and_then(|at| split.again.get(at)).copied().unwrap_or(0);
        let accounted = rows.saturating_mul(u64::from(split.chosen)).saturating_add(again);
        let conserved = if legs.vanished == 0 { evaluated == accounted } else { evaluated <= accounted };
        if !conserved {
            return Err(ExpertFault::Conservation { layer, evaluated, rows, chosen: split.chosen, accounted });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(all: &[(u32, u32, u64)]) -> Vec<ExpertCount> {
        all.iter().map(|&(layer, expert, rows)| ExpertCount { layer, expert, rows }).collect()
    }

    fn legs(receipts: &[&[(u32, u32, u64)]], vanished: u64) -> ExpertLegs {
        let mut legs = ExpertLegs { vanished, ..ExpertLegs::default() };
        receipts.iter().for_each(|all| legs.add(None, Some(&counts(all))));
        legs
    }

    #[test]
    fn counters_stand_once_and_in_order() {
        let check =
            |all: &[(u32, u32, u64)], good: bool| assert_eq!(check_counts(&counts(all)).is_ok(), good, "{all:?}");
        check(&[], true);
        check(&[(0, 1, 5), (0, 2, 5), (1, 0, 1)], true);
        check(&[(0, 2, 5), (0, 1, 5)], false);
        check(&[(0, 1, 5), (0, 1, 5)], false);
        check(&[(0, 1, 0)], false);
    }

    #[test]
    fn rows_through_experts_are_conserved() {
        let split = |own: &[(u32, u32, u64)], again: &[u64]| ExpertSplit {
            chosen: 2,
            layers: vec![10, 0, 8],
            own: counts(own),
            again: again.to_vec(),
        };
        let check = |split: &ExpertSplit, legs: &ExpertLegs, expect: &str| match check_conservation(split, legs) {
            Ok(()) => assert_eq!(expect, "", "found nothing"),
            Err(fault) => assert!(!expect.is_empty() && fault.to_string().contains(expect), "{fault}"),
        };
        let all = legs(&[&[(0, 0, 12), (2, 0, 16)], &[(0, 1, 8)]], 0);
        check(&split(&[], &[]), &all, "");
        check(&split(&[], &[0, 0, 0]), &all, "");
        check(&split(&[(0, 1, 8)], &[]), &legs(&[&[(0, 0, 12), (2, 0, 16)]], 0), "");
        check(&split(&[], &[3, 0, 0]), &legs(&[&[(0, 0, 15), (2, 0, 16)], &[(0, 1, 8)]], 0), "");
        check(&split(&[], &[]), &legs(&[&[(0, 0, 13), (2, 0, 16)], &[(0, 1, 8)]], 0), "layer 0: experts evaluated 21");
        check(&split(&[], &[]), &legs(&[&[(0, 0, 12), (2, 0, 16)]], 0), "layer 0: experts evaluated 12");
        check(&split(&[], &[]), &legs(&[&[(0, 0, 12), (2, 0, 16)]], 1), "");
        check(&split(&[], &[]), &legs(&[&[(0, 0, 22), (2, 0, 16)]], 1), "layer 0");
        check(&split(&[], &[]), &legs(&[&[(3, 0, 1)]], 0), "layer 3");
        check(&split(&[(3, 0, 1)], &[]), &all, "contradicts itself");
        check(&split(&[], &[1]), &all, "contradicts itself");
    }
}
