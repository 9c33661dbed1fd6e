//! Work on a part of a model: what a lead orders of a worker, what the worker states when it is done, and how the
//! workers' receipts roll up into the receipt of the customer's request.
//!
//! A worker is paid in a session of the same kind as everybody else: the lead is its consumer. A request in such a
//! session carries a [`PartOrder`]; its acknowledgements count [`satgrid_types::PartUsage`], its receipt carries a
//! [`PartWork`]. The receipt that the lead gives its own customer carries a [`Split`] and the root over the workers'
//! receipts, so that each of them belongs to exactly one request.

use crate::log::{Frontier, leaf_hash};
use minicbor::{Decode, Encode};
use satgrid_types::{Digest, LayerRange, NodeKey, PartUsage, RequestId, TokenUsage, WireType};
use sha2::{Digest as _, Sha256};

/// What a lead orders: which layers, for which request of its own customer, and how many positions at the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PartOrder {
    /// The layers; absent where experts are bought, which the listing names.
    #[n(0)]
    pub layers: Option<LayerRange>,
    /// The node that leads.
    #[n(1)]
    pub lead: NodeKey,
    /// The request of the lead's customer: one receipt of that request accounts for this work.
    #[n(2)]
    pub request: RequestId,
    #[n(3)]
    pub wire: WireType,
    /// Positions of all kinds that may be evaluated under this order, replays included; for experts, rows.
    #[n(4)]
    pub max_positions: u64,
}

impl PartOrder {
    /// Whether `usage` is work that this order allows.
    pub fn allows(&self, usage: &PartUsage) -> bool {
        let Some(positions) = usage.positions() else { return false };
        match self.layers {
            Some(range) => {
                let tallies = positions.checked_mul(u64::from(range.layers())) == Some(usage.position_layers);
                tallies && positions <= self.max_positions && usage.expert_rows == 0
            }
            // Experts evaluate rows and know no positions.
            None => positions == 0 && usage.position_layers == 0 && usage.expert_rows <= self.max_positions,
        }
    }
}

/// What a worker states in its receipt, beside the counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PartWork {
    #[n(0)]
    pub order: PartOrder,
    /// Running hash over the wire bytes of all rows that came in, in order.
    #[n(1)]
    pub input: Digest,
    /// The same over all rows that went out.
    #[n(2)]
    pub output: Digest,
    #[n(3)]
    pub bytes_in: u64,
    #[n(4)]
    pub bytes_out: u64,
    /// Time that the engine worked on it, in ms.
    #[n(5)]
    pub busy_ms: u64,
}

/// How a lead says that it had a request worked on.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Split {
    /// Layers of the whole model.
    #[n(0)]
    pub layers: u32,
    /// Those that the lead ran itself: at least the first and the last.
    #[n(1)]
    pub own: Vec<LayerRange>,
    /// Positions that every layer evaluated, replays left out.
    #[n(2)]
    pub positions: u64,
    /// Running hash over the rows that the lead sent into the ring.
    #[n(3)]
    pub sent: Digest,
    /// The same over the rows that came back.
    #[n(4)]
    pub received: Digest,
    /// What was sent and never came back, where the workers' receipts show it.
    #[n(5)]
    pub lost: Option<LostRows>,
}

/// What a lead sent into the ring and never saw again: a worker's engine or a link died under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LostRows {
    /// Positions, each time that they were sent, replays left out.
    #[n(0)]
    pub positions: u64,
    /// Wire bytes of all rows that the lead sent into the ring.
    #[n(1)]
    pub bytes_sent: u64,
    /// Wire bytes of all rows that came back.
    #[n(2)]
    pub bytes_received: u64,
}

/// Ranges that a lead may run itself.
pub const MAX_OWN_RANGES: usize = 8;

/// One worker's part in a request: its receipt, or the last acknowledgement where it vanished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leg {
    pub worker: NodeKey,
    pub order: PartOrder,
    pub usage: PartUsage,
    /// Id of the receipt or of the last acknowledgement; absent where nothing was ever signed.
    pub id: Option<Digest>,
    /// The rows that passed; absent without a receipt.
    pub rows: Option<Passed>,
}

/// The rows that a worker took in and gave out, by its receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    pub input: Digest,
    pub output: Digest,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl From<&PartWork> for Passed {
    fn from(work: &PartWork) -> Passed {
        let PartWork { input, output, bytes_in, bytes_out, .. } = *work;
        Passed { input, output, bytes_in, bytes_out }
    }
}

/// Merkle root (RFC 6962 hashing) over the ids of a request's legs, ordered by their first layer and then by id.
pub fn stage_root(legs: &[Leg]) -> Digest {
    let mut ids: Vec<(u32, Digest)> =
        legs.iter().filter_map(|leg| Some((leg.order.layers.map_or(0, |range| range.start()), leg.id?))).collect();
    ids.sort_unstable();
    let mut tree = Frontier::new();
    for (_, id) in ids {
        tree.push(leaf_hash(&id.0));
    }
    tree.root()
}

/// What is wrong with the way a request was put together from parts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SplitFault {
    #[error("layer {layer} of {layers} was run by nobody")]
    Gap { layer: u32, layers: u32 },
    #[error("layer {layer} was run by the lead and by a worker")]
    Overlap { layer: u32 },
    #[error("the lead names no first or last layer, more than {MAX_OWN_RANGES} ranges, or layers that there are not")]
    Own,
    #[error(
        "layer {layer} evaluated {evaluated} positions for the first time, the request {positions}, and {lost} were lost"
    )]
    Conservation { layer: u32, evaluated: u64, positions: u64, lost: u64 },
    #[error(
        "layer {layer} evaluated {evaluated} positions for the first time, and only {before} passed the one before"
    )]
    Rising { layer: u32, evaluated: u64, before: u64 },
    #[error("{positions} positions came back, the others were lost, and {sold} were sold")]
    Sold { positions: u64, sold: u64 },
    #[error("the rows that {from} sent are not those that {to} received")]
    Rows { from: String, to: String, party: NodeKey },
    #[error("{to} received {missing} bytes of rows less than {from} sent, and the lead says that nothing was lost")]
    Missing { from: String, to: String, missing: u64 },
}

/// Checks that ranges tile the model and that every layer evaluated the same positions.
///
/// Where every leg has its receipt, each layer evaluated exactly the split's positions for the first time, replays left
/// out; what was lost under way may be evaluated beside them, by ever fewer layers. Where a worker vanished, what it did after its last acknowledgement is nobody's to count: then every layer whose
/// legs all have receipts evaluated at least so many, replays included.
pub fn check_split(split: &Split, legs: &[Leg]) -> Result<(), SplitFault> {
    let inside = |range: &LayerRange| range.end() <= split.layers;
    let first = split.own.iter().any(|range| range.start() == 0);
    let last = split.own.iter().any(|range| range.end() == split.layers);
    let all_inside = split.own.iter().all(inside) && legs.iter().filter_map(|leg| leg.order.layers).all(|r| inside(&r));
    if !first || !last || !all_inside || split.own.len() > MAX_OWN_RANGES || split.layers == 0 {
        return Err(SplitFault::Own);
    }
    let covers = |range: &LayerRange, layer: u32| range.start() <= layer && layer < range.end();
    let undisturbed = legs.iter().all(|leg| leg.rows.is_some());
    let lost = split.lost.map_or(0, |lost| lost.positions);
    // Rows that are lost are lost to every worker after that; not so where another takes over and begins anew.
    let mut before = (undisturbed && !is_replaced(legs)).then_some(u64::MAX);
    // Every border between ranges, so that a model of a million layers costs no more than its legs.
    let ranges = split.own.iter().copied().chain(legs.iter().filter_map(|leg| leg.order.layers));
    let mut borders: Vec<u32> = ranges.flat_map(|range| [range.start(), range.end()]).collect();
    borders.push(0);
    borders.sort_unstable();
    borders.dedup();
    for layer in borders.into_iter().filter(|layer| *layer < split.layers) {
        let own = split.own.iter().filter(|range| covers(range, layer)).count();
        let mut there =
            legs.iter().filter(|leg| leg.order.layers.is_some_and(|range| covers(&range, layer))).peekable();
        match (own, there.peek().is_some()) {
            (0, false) => return Err(SplitFault::Gap { layer, layers: split.layers }),
            (1, false) => continue,
            (0, true) => {}
            (_, _) => return Err(SplitFault::Overlap { layer }),
        }
        let there: Vec<&Leg> = there.collect();
        let sum = |count: fn(&PartUsage) -> Option<u64>| {
            there.iter().try_fold(0u64, |sum, leg| sum.checked_add(count(&leg.usage)?)).unwrap_or(u64::MAX)
        };
        let evaluated = sum(PartUsage::first_evaluations);
        let conserved = if undisturbed {
            (split.positions..=split.positions.saturating_add(lost)).contains(&evaluated)
        } else {
            there.iter().any(|leg| leg.rows.is_none()) || sum(PartUsage::positions) >= split.positions
        };
        if !conserved {
            return Err(SplitFault::Conservation { layer, evaluated, positions: split.positions, lost });
        }
        match &mut before {
            Some(before) if evaluated > *before => {
                return Err(SplitFault::Rising { layer, evaluated, before: *before });
            }
            Some(before) => *before = evaluated,
            None => {}
        }
    }
    check_rows(split, legs)
}

/// What was sold came back: none of it is among the rows that a lead says were lost. Without losses there is nothing to say.
///
/// Each fresh position of the prompt was evaluated, and each token of the output but the last.
pub fn check_sold(split: &Split, usage: &TokenUsage) -> Result<(), SplitFault> {
    let fresh = u64::from(usage.prompt.saturating_sub(usage.cached_prompt));
    let sold = fresh.saturating_add(usage.completion.into());
    if split.lost.is_none() || split.positions.saturating_add(1) >= sold {
        return Ok(());
    }
    Err(SplitFault::Sold { positions: split.positions, sold })
}

/// Legs of layers, by their layers.
fn chain_of(legs: &[Leg]) -> Vec<&Leg> {
    let mut chain: Vec<&Leg> = legs.iter().filter(|leg| leg.order.layers.is_some()).collect();
    chain.sort_unstable_by_key(|leg| leg.order.layers.map(|range| (range.start(), range.end())));
    chain
}

/// Some layers were ordered twice.
fn is_replaced(legs: &[Leg]) -> bool {
    chain_of(legs).windows(2).any(|pair| pair[0].order.layers == pair[1].order.layers)
}

/// One end of a hop: who, the hash over the rows, and their bytes where they are known.
struct End {
    who: String,
    rows: Digest,
    bytes: Option<u64>,
}

/// The output of each leg is the input of the next, where nobody was replaced: then each stands for its layers alone. Where
/// rows were lost, the next may have received fewer bytes: then nothing can be said of those that it has.
fn check_rows(split: &Split, legs: &[Leg]) -> Result<(), SplitFault> {
    let chain = chain_of(legs);
    if is_replaced(legs) || chain.iter().any(|leg| leg.rows.is_none()) || chain.is_empty() {
        return Ok(());
    }
    let lead = |rows, bytes| End { who: "the lead".to_owned(), rows, bytes };
    let mut from = lead(split.sent, split.lost.map(|lost| lost.bytes_sent));
    let mut party = chain[0].worker;
    for leg in chain {
        let Some(Passed { input, output, bytes_in, bytes_out }) = leg.rows else { return Ok(()) };
        let who = format!("worker {}", leg.worker.short());
        let to = End { who: who.clone(), rows: input, bytes: Some(bytes_in) };
        party = leg.worker;
        check_hop(from, to, split.lost.is_some(), party)?;
        from = End { who, rows: output, bytes: Some(bytes_out) };
    }
    let to = lead(split.received, split.lost.map(|lost| lost.bytes_received));
    check_hop(from, to, split.lost.is_some(), party)
}

fn check_hop(from: End, to: End, lost: bool, party: NodeKey) -> Result<(), SplitFault> {
    if from.rows == to.rows {
        return Ok(());
    }
    let missing = from.bytes.zip(to.bytes).and_then(|(sent, came)| sent.checked_sub(came)).filter(|bytes| *bytes > 0);
    match missing {
        Some(_) if lost => Ok(()),
        // Who leads knows what did not come back, and has to say so.
        Some(missing) => Err(SplitFault::Missing { from: from.who, to: to.who, missing }),
        None => Err(SplitFault::Rows { from: from.who, to: to.who, party }),
    }
}

/// The running hash over wire bytes of rows.
#[derive(Debug, Clone, Default)]
pub struct RowsHash(Sha256);

impl RowsHash {
    pub fn push(&mut self, wire_bytes: &[u8]) {
        self.0.update(wire_bytes);
    }
    pub fn value(&self) -> Digest {
        Digest(self.0.clone().finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::WorkKind;

    fn leg(worker: u8, layers: (u32, u32), first: u64, replay: u64, rows: Option<(u8, u8)>) -> Leg {
        let range = LayerRange::new(layers.0, layers.1).unwrap();
        let usage = PartUsage::default().plus(WorkKind::Prefill, first, range.layers()).unwrap();
        let usage = usage.plus(WorkKind::Replay, replay, range.layers()).unwrap();
        let order = PartOrder {
            layers: Some(range),
            lead: NodeKey([9; 32]),
            request: RequestId([1; 32]),
            wire: WireType::F32,
            max_positions: 1_000,
        };
        assert!(order.allows(&usage));
        let bytes = 8 * usage.positions().unwrap();
        let passed =
            |(i, o)| Passed { input: Digest([i; 32]), output: Digest([o; 32]), bytes_in: bytes, bytes_out: bytes };
        let rows = rows.map(passed);
        Leg { worker: NodeKey([worker; 32]), order, usage, id: Some(Digest([worker; 32])), rows }
    }
    fn own(ranges: &[(u32, u32)]) -> Split {
        let own = ranges.iter().map(|(a, b)| LayerRange::new(*a, *b).unwrap()).collect();
        Split { layers: 12, own, positions: 40, sent: Digest([1; 32]), received: Digest([4; 32]), lost: None }
    }
    #[track_caller]
    fn check(split: &Split, legs: &[Leg], expect: &str) {
        match check_split(split, legs) {
            Ok(()) => assert_eq!(expect, "", "found nothing"),
            Err(fault) => assert!(!expect.is_empty() && fault.to_string().contains(expect), "{fault}"),
        }
    }

    #[test]
    fn ranges_tile_and_positions_are_conserved() {
        let ends = own(&[(0, 1), (11, 12)]);
        let good = [leg(1, (1, 4), 40, 0, Some((1, 2))), leg(2, (4, 11), 40, 0, Some((2, 4)))];
        check(&ends, &good, "");
        check(&own(&[(0, 12)]), &[], "");
        check(&ends, &good[..1], "layer 4 of 12 was run by nobody");
        check(&ends, &[leg(1, (1, 5), 40, 0, Some((1, 2))), good[1]], "layer 4 evaluated 80");
        check(&own(&[(0, 2), (11, 12)]), &good, "layer 1 was run by the lead and by a worker");
        check(&own(&[(0, 1)]), &good, "names no first or last layer");
        check(&own(&[(0, 1), (11, 13)]), &good, "layers that there are not");
        check(&ends, &[good[0], leg(2, (4, 11), 39, 0, Some((2, 4)))], "layer 4 evaluated 39");
    }

    #[test]
    fn a_replacement_replays_and_the_sum_stays() {
        let ends = own(&[(0, 1), (11, 12)]);
        let whole = leg(1, (1, 4), 40, 0, Some((1, 2)));
        let lost = leg(2, (4, 11), 20, 0, None);
        check(&ends, &[whole, lost, leg(3, (4, 11), 15, 25, Some((7, 4)))], "");
        check(&ends, &[leg(1, (1, 4), 38, 1, Some((1, 2))), lost], "layer 1 evaluated 38");
        // Both gave receipts: then nothing is lost between them, and nothing is counted twice.
        let (early, late) = (leg(2, (4, 11), 25, 0, Some((2, 4))), leg(3, (4, 11), 40, 0, Some((2, 4))));
        check(&ends, &[whole, early, late], "layer 4 evaluated 65");
        check(&ends, &[whole, early, leg(3, (4, 11), 15, 25, Some((2, 4)))], "");
    }

    /// A worker gave way to two, and one came back for them both: what each passed on says nothing of the others.
    #[test]
    fn layers_that_were_ordered_twice_are_told_whatever_stands_between() {
        let ends = own(&[(0, 1), (11, 12)]);
        let whole = |worker, rows| leg(worker, (1, 11), 10, 30, Some(rows));
        let (one, two) = (leg(2, (1, 6), 20, 20, Some((7, 8))), leg(3, (6, 11), 20, 20, Some((8, 9))));
        for legs in [[whole(1, (1, 5)), one, whole(4, (6, 4)), two], [one, whole(1, (1, 5)), two, whole(4, (6, 4))]] {
            check(&ends, &legs, "");
        }
    }

    #[test]
    fn a_hop_that_changed_rows_is_named() {
        let ends = own(&[(0, 1), (11, 12)]);
        let first = leg(1, (1, 4), 40, 0, Some((1, 2)));
        check(
            &ends,
            &[first, leg(2, (4, 11), 40, 0, Some((3, 4)))],
            "worker 01010101 sent are not those that worker 0202",
        );
        check(
            &ends,
            &[first, leg(2, (4, 11), 40, 0, Some((2, 5)))],
            "worker 02020202 sent are not those that the lead",
        );
    }

    /// A worker's engine died under a batch of 5 and nobody else sells its layers: the one before has evaluated it.
    #[test]
    fn rows_that_were_lost_are_told_apart_from_rows_that_were_changed() {
        let says = |sent: u64, received: u64, positions: u64| Split {
            lost: Some(LostRows { positions, bytes_sent: 8 * sent, bytes_received: 8 * received }),
            ..own(&[(0, 1), (11, 12)])
        };
        let first = |positions| leg(1, (1, 4), positions, 0, Some((1, 2)));
        let died = leg(2, (4, 8), 40, 0, Some((7, 8)));
        let last = leg(3, (8, 11), 40, 0, Some((8, 4)));
        check(&says(45, 40, 5), &[first(45), died, last], "");
        // Whoever says nothing of it is named, and not the worker.
        check(&own(&[(0, 1), (11, 12)]), &[first(45), died, last], "layer 1 evaluated 45");
        let silent = Split { positions: 40, ..own(&[(0, 1), (11, 12)]) };
        let replayed = leg(1, (1, 4), 40, 5, Some((1, 2)));
        check(&silent, &[replayed, died, last], "40 bytes of rows less than worker 01010101 sent, and the lead says");
        check(&says(45, 40, 4), &[first(45), died, last], "and 4 were lost");
        // The first worker's own engine, and rows that nobody can have received.
        check(&says(45, 40, 5), &[leg(1, (1, 4), 40, 0, Some((9, 2))), leg(2, (4, 11), 40, 0, Some((2, 4)))], "");
        let (all, changed) = (leg(1, (1, 4), 45, 0, Some((1, 2))), leg(2, (4, 11), 45, 0, Some((7, 4))));
        check(&says(45, 40, 5), &[all, changed], "worker 01010101 sent are not those that worker 02020202");
        check(&says(45, 45, 0), &[first(40), leg(2, (4, 11), 40, 0, Some((2, 5)))], "that the lead received");
        let more = [first(41), leg(2, (4, 11), 45, 0, Some((7, 4)))];
        check(&says(45, 40, 5), &more, "only 41 passed");
        // A replacement begins anew: what was under way is evaluated twice, and each time for the first time.
        let again = leg(4, (4, 8), 5, 40, Some((7, 8)));
        check(&says(50, 40, 5), &[first(40), leg(2, (4, 8), 40, 0, Some((2, 8))), again, last], "");
    }

    #[test]
    fn nothing_that_was_sold_is_lost() {
        let lost = Some(LostRows { positions: 10, bytes_sent: 400, bytes_received: 300 });
        let says = |positions, lost| Split { positions, lost, ..own(&[(0, 1), (11, 12)]) };
        let usage = TokenUsage { prompt: 40, cached_prompt: 8, completion: 9, ..TokenUsage::default() };
        assert_eq!(check_sold(&says(40, lost), &usage), Ok(()));
        assert_eq!(check_sold(&says(39, lost), &usage), Err(SplitFault::Sold { positions: 39, sold: 41 }));
        assert_eq!(check_sold(&says(39, None), &usage), Ok(()));
    }

    #[test]
    fn the_root_does_not_depend_on_arrival() {
        let legs = [leg(1, (1, 4), 40, 0, None), leg(2, (4, 11), 40, 0, None)];
        assert_eq!(stage_root(&legs), stage_root(&[legs[1], legs[0]]));
        assert_ne!(stage_root(&legs), stage_root(&legs[..1]));
    }

    #[test]
    fn an_order_bounds_the_work() {
        let mut one = leg(1, (1, 4), 40, 0, None);
        one.usage.position_layers += 1;
        assert!(!one.order.allows(&one.usage), "more layers than ordered");
        let many = PartUsage::default().plus(WorkKind::Decode, 1_001, 3).unwrap();
        assert!(!one.order.allows(&many));
    }
}
