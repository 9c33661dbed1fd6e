//! How many tokens a second a model gives, run one way or another, from what was measured.
//!
//! A step evaluates one row for each of a batch of streams. Whole or by layers it takes what the sellers say of themselves,
//! and a hop for each of them. By experts it takes the trunk's own time and, at each layer, the wait for the slowest of those who
//! are asked: a call's time on the way, its bytes, the worker's time for its rows. All of these are straight lines through what
//! a lead measured while it served ([`Line`]); what nobody has measured is assumed, and said to be.
//!
//! So the estimate knows when not to: with a round trip at each layer a split by experts is for low latency, for large batches,
//! and for models that fit nowhere else.

use satgrid_types::{ExpertSet, Speed};
use std::collections::BTreeMap;

/// A call to a worker that nobody has measured, there and back: two hops in one city.
pub const CALL_US: f64 = 4_000.0;
/// A byte to or from it: a hundred megabits a second.
const BYTE_US: f64 = 0.08;
/// A row of a worker that did not measure itself.
const ROW_US: f64 = 500.0;
/// Measurements below which a line says nothing.
const ENOUGH: f64 = 4.0;
/// Bytes of a call and its answer beside their rows.
const FRAME_BYTES: f64 = 40.0;
/// Bounds of what a measured wait may make of the modelled one.
const LEAST_STRETCH: f64 = 0.5;
const MOST_STRETCH: f64 = 4.0;
/// The batches that tables show.
pub const BATCHES: [u32; 3] = [1, 8, 32];

/// A straight line through measurements, the newest counting most: sums of weights, x, y, x squared, and x times y.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Line {
    pub sums: [f64; 5],
}

/// `base + slope * x`; neither is below zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fit {
    pub base: f64,
    pub slope: f64,
}

impl Fit {
    pub fn at(&self, x: f64) -> f64 {
        self.base + self.slope * x
    }
}

impl Line {
    /// Takes a measurement in; those before fade, so that about the last `memory` count.
    pub fn add(&mut self, x: f64, y: f64, memory: f64) {
        let fade = 1.0 - 1.0 / memory.max(1.0);
        for (sum, new) in self.sums.iter_mut().zip([1.0, x, y, x * x, x * y]) {
            *sum = *sum * fade + new;
        }
    }

    pub fn is_measured(&self) -> bool {
        self.sums[0] >= ENOUGH
    }

    /// The mean x and y. None where nothing was measured.
    pub fn mean(&self) -> Option<(f64, f64)> {
        let [n, x, y, ..] = self.sums;
        (n > 0.0).then(|| (x / n, y / n))
    }

    /// The variance of x.
    fn spread(&self) -> f64 {
        let [n, x, _, xx, _] = self.sums;
        xx / n - (x / n) * (x / n)
    }

    /// Whether there were different x: a spread of less than a twentieth of the mean is noise.
    pub fn tells_slope(&self) -> bool {
        let [n, x, ..] = self.sums;
        let (noise, spread) = (x / n / 20.0, self.spread());
        self.is_measured() && spread > noise * noise && spread > 0.0
    }

    /// The least squares, or none where too little was measured. Where all x were alike the slope is what is `assumed`.
    pub fn fit(&self, assumed: f64) -> Option<Fit> {
        let [n, x, y, _, xy] = self.sums;
        if !self.is_measured() || !self.sums.iter().all(|sum| sum.is_finite()) {
            return None;
        }
        let (x, y) = (x / n, y / n);
        let steepest = if x > 0.0 { y.max(0.0) / x } else { 0.0 };
        let slope = if self.tells_slope() { (xy / n - x * y) / self.spread() } else { assumed };
        let slope = slope.clamp(0.0, steepest);
        Some(Fit { base: (y - slope * x).max(0.0), slope })
    }
}

/// A worker of a lead, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorkerCost {
    /// A call on its way there and its answer back, beside the worker's own time: by bytes.
    pub link: Fit,
    /// The worker's own time: by rows.
    pub work: Fit,
    /// The link was measured, not assumed.
    pub measured: bool,
}

impl WorkerCost {
    /// From what was measured, else from the worker's own figure (expert rows a second, in thousandths).
    pub fn of(link: Option<&Line>, work: Option<&Line>, speed: &Speed) -> WorkerCost {
        let listed = if speed.decode_mtok_s > 0 { 1e9 / speed.decode_mtok_s as f64 } else { ROW_US };
        let measured = link.and_then(|line| line.fit(0.0));
        let work = work.and_then(|line| line.fit(listed)).unwrap_or(Fit { base: 0.0, slope: listed });
        let assumed = Fit { base: CALL_US, slope: BYTE_US };
        WorkerCost { link: measured.unwrap_or(assumed), work, measured: measured.is_some() }
    }

    /// Experts that the lead evaluates itself, of which nothing is known but that no network lies between.
    pub fn own() -> WorkerCost {
        let none = Fit { base: 0.0, slope: 0.0 };
        WorkerCost { link: none, work: Fit { base: 0.0, slope: ROW_US }, measured: false }
    }
}

/// What a step is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Of the model the first layer that the lead runs.
    pub first: u32,
    /// Layers with experts, experts of each, and how many of them each row goes to.
    pub layers: u32,
    pub experts: u32,
    pub used: u32,
    /// Bytes of a row on the wire.
    pub row_bytes: u32,
}

/// A trunk and those who hold its experts.
#[derive(Debug, Clone)]
pub struct ExpertSplit {
    shape: Shape,
    /// The trunk's own time of a step, by rows.
    pub trunk: Fit,
    /// What waiting takes beyond the mean of its parts, as it was measured; 1 where it was not.
    pub stretch: f64,
    /// What a layer's wait was measured to be, by rows, over batches of several sizes: then nothing is modelled.
    waited: Option<Fit>,
    costs: Vec<WorkerCost>,
    /// Of each layer, for each holder, the part of the slots that falls on it.
    shares: Vec<Vec<f64>>,
}

impl ExpertSplit {
    /// Holders of one expert share its rows. Without figures of a layer all of its experts count alike.
    pub fn new(
        shape: Shape,
        trunk: Fit,
        holders: &[(&ExpertSet, WorkerCost)],
        heat: &BTreeMap<(u32, u32), u64>,
    ) -> ExpertSplit {
        let mut shares = Vec::new();
        for layer in shape.first..shape.first.saturating_add(shape.layers) {
            let rows: Vec<f64> =
                (0..shape.experts).map(|e| heat.get(&(layer, e)).map_or(0.0, |rows| *rows as f64)).collect();
            let all: f64 = rows.iter().sum();
            let mut here = vec![0.0; holders.len()];
            for (expert, rows) in (0..shape.experts).zip(rows) {
                let part = if all > 0.0 { rows / all } else { 1.0 / f64::from(shape.experts.max(1)) };
                let by: Vec<usize> = holders
                    .iter()
                    .enumerate()
                    .filter(|(_, (set, _))| set.contains(layer, expert))
                    .map(|(at, _)| at)
                    .collect();
                by.iter().for_each(|at| here[*at] += part / by.len() as f64);
            }
            shares.push(here);
        }
        let costs = holders.iter().map(|(_, cost)| *cost).collect();
        ExpertSplit { shape, trunk, stretch: 1.0, waited: None, costs, shares }
    }

    /// What a step waits for experts, over all layers, in microseconds.
    pub fn wait_us(&self, batch: u32) -> f64 {
        if let Some(waited) = self.waited {
            return f64::from(self.shape.layers) * waited.at(f64::from(batch));
        }
        let layers = self.shares.iter().map(|shares| self.layer_us(shares, f64::from(batch)));
        layers.sum::<f64>() * self.stretch
    }

    /// Takes in what a layer's wait was measured to be, by rows: the slowest of several is not the mean of each, and they share a
    /// machine. Where all batches were alike, the model is stretched to what they took.
    pub fn fit_wait(&mut self, waits: &Line) {
        if waits.tells_slope() {
            self.waited = waits.fit(0.0);
            return;
        }
        let Some((rows, wait_us)) = waits.mean().filter(|_| waits.is_measured()) else { return };
        let modelled = self.shares.iter().map(|shares| self.layer_us(shares, rows.max(1.0))).sum::<f64>();
        let modelled = modelled / f64::from(self.shape.layers.max(1));
        if modelled > 0.0 && wait_us > 0.0 {
            self.stretch = (wait_us / modelled).clamp(LEAST_STRETCH, MOST_STRETCH);
        }
    }

    fn layer_us(&self, shares: &[f64], batch: f64) -> f64 {
        let used = f64::from(self.shape.used);
        let slots = batch * used;
        let busy = shares.iter().filter(|share| **share > 0.0).count().max(1) as f64;
        // The largest of so many is beyond the mean by about so many standard deviations.
        let beyond = 0.6 * (2.0 * busy.ln()).sqrt();
        let mut longest: f64 = 0.0;
        for (share, cost) in shares.iter().zip(&self.costs).filter(|(share, _)| **share > 0.0) {
            let share = share.min(1.0);
            let rows = (slots * share + beyond * (slots * share * (1.0 - share)).sqrt()).min(slots).max(1.0);
            let up = batch * (1.0 - (1.0 - share).powf(used));
            let bytes = (up + slots * share) * f64::from(self.shape.row_bytes) + FRAME_BYTES;
            // Who holds little is not asked at every step.
            let asked = 1.0 - (1.0 - share).powf(slots);
            let took = cost.link.at(bytes) + cost.work.at(rows);
            longest = longest.max(took * asked);
        }
        longest
    }

    pub fn step_us(&self, batch: u32) -> f64 {
        self.trunk.at(f64::from(batch)) + self.wait_us(batch)
    }

    /// What the busiest holder computes in a step, over all layers: where several machines ask at once, that does not overlap.
    pub fn busiest_us(&self, batch: u32) -> f64 {
        let slots = f64::from(batch) * f64::from(self.shape.used);
        let of = |(at, cost): (usize, &WorkerCost)| -> f64 {
            let shares = self.shares.iter().filter_map(|shares| shares.get(at)).map(|share| share.min(1.0));
            let busy = |share: f64| cost.work.at((slots * share).max(1.0)) * (1.0 - (1.0 - share).powf(slots));
            shares.filter(|share| *share > 0.0).map(busy).sum()
        };
        self.costs.iter().enumerate().map(of).fold(0.0, f64::max)
    }

    /// Of all rows, the part that falls on a holder, in thousandths.
    pub fn share_permille(&self, holder: usize) -> u64 {
        let sum: f64 = self.shares.iter().filter_map(|shares| shares.get(holder)).sum();
        (1_000.0 * sum / f64::from(self.shape.layers.max(1))).round() as u64
    }
}

/// A step of a batch by what a seller says of itself: the first row as it decodes, each further one as it reads a prompt.
/// `None` where it says nothing.
pub fn listed_step_us(speed: &Speed, batch: u32) -> Option<f64> {
    let us = |mtok_s: u64| (mtok_s > 0).then(|| 1e9 / mtok_s as f64);
    let first = us(speed.decode_mtok_s)?;
    let further = us(speed.prefill_mtok_s).unwrap_or(first).min(first);
    Some(first + further * f64::from(batch.saturating_sub(1)))
}

/// Tokens a second of a batch whose step takes so long.
pub fn tokens_per_s(batch: u32, step_us: f64) -> f64 {
    if step_us > 0.0 { f64::from(batch) * 1e6 / step_us } else { 0.0 }
}

/// The trunk's line where only its own measurement at start is known.
pub fn trunk_of(speed: &Speed) -> Option<Fit> {
    let (one, two) = (listed_step_us(speed, 1)?, listed_step_us(speed, 2)?);
    Some(Fit { base: (2.0 * one - two).max(0.0), slope: two - one })
}

/// The smallest batch, up to `most`, at which `a` takes less time for a step than `b`.
pub fn beats_from(most: u32, a: impl Fn(u32) -> f64, b: impl Fn(u32) -> f64) -> Option<u32> {
    (1..=most).find(|batch| a(*batch) < b(*batch))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 0.01 * b.abs().max(1.0)
    }

    #[test]
    fn a_line_is_what_was_measured() {
        let mut line = Line::default();
        assert_eq!(line.fit(1.0), None);
        for n in 0..64 {
            let x = f64::from(n % 8);
            line.add(x, 100.0 + 5.0 * x, 64.0);
        }
        let fit = line.fit(0.0).unwrap();
        assert!(near(fit.base, 100.0) && near(fit.slope, 5.0), "{fit:?}");
        // The link became slower: what is new counts.
        for n in 0..256 {
            let x = f64::from(n % 8);
            line.add(x, 900.0 + 5.0 * x, 64.0);
        }
        assert!((line.fit(0.0).unwrap().base - 900.0).abs() < 20.0);
        // All alike: the slope is what is assumed, never more than the whole.
        let mut flat = Line::default();
        (0..8).for_each(|_| flat.add(4.0, 100.0, 64.0));
        assert_eq!(flat.fit(10.0).map(|fit| (fit.base.round(), fit.slope.round())), Some((60.0, 10.0)));
        assert_eq!(flat.fit(80.0).map(|fit| (fit.base.round(), fit.slope.round())), Some((0.0, 25.0)));
        // Noise never makes anything negative.
        let mut falling = Line::default();
        (0..8).for_each(|n| falling.add(f64::from(n), 100.0 - f64::from(n), 64.0));
        assert_eq!(falling.fit(0.0).map(|fit| fit.slope), Some(0.0));
    }

    fn cost(call: f64, row: f64) -> WorkerCost {
        WorkerCost { link: Fit { base: call, slope: 0.0 }, work: Fit { base: 0.0, slope: row }, measured: true }
    }

    const SHAPE: Shape = Shape { first: 0, layers: 4, experts: 8, used: 2, row_bytes: 256 };
    const TRUNK: Fit = Fit { base: 2_000.0, slope: 100.0 };

    fn dealt(packs: u32) -> Vec<ExpertSet> {
        let of = |pack| (0..4).flat_map(move |l| (0..8).filter(move |e| e % packs == pack).map(move |e| (l, e)));
        (0..packs).map(|pack| ExpertSet::new(of(pack))).collect()
    }

    fn split(packs: &[ExpertSet], call: f64, heat: &BTreeMap<(u32, u32), u64>) -> ExpertSplit {
        let holders: Vec<_> = packs.iter().map(|set| (set, cost(call, 200.0))).collect();
        ExpertSplit::new(SHAPE, TRUNK, &holders, heat)
    }

    #[test]
    fn a_step_is_the_trunk_and_a_wait_at_each_layer() {
        // One holder: 4 layers, each a call and two rows.
        let one = split(&dealt(1), 1_000.0, &BTreeMap::new());
        assert!(near(one.step_us(1), 2_100.0 + 4.0 * (1_000.0 + 400.0)), "{}", one.step_us(1));
        assert!(near(one.step_us(8), 2_800.0 + 4.0 * (1_000.0 + 3_200.0)), "{}", one.step_us(8));
        // Round trips cost a stream alone most of its speed, a large batch hardly anything.
        let far = split(&dealt(1), 20_000.0, &BTreeMap::new());
        let lost = |batch| tokens_per_s(batch, far.step_us(batch)) / tokens_per_s(batch, one.step_us(batch));
        assert!(lost(1) < 0.15 && lost(256) > 0.7, "{} {}", lost(1), lost(256));
        // Four workers part the rows of a large batch.
        let four = split(&dealt(4), 1_000.0, &BTreeMap::new());
        assert!(four.step_us(64) < 0.5 * one.step_us(64));
        assert_eq!((0..4).map(|at| four.share_permille(at)).collect::<Vec<_>>(), vec![250; 4]);
    }

    #[test]
    fn waits_that_were_measured_take_the_place_of_the_model() {
        let mut one = split(&dealt(1), 1_000.0, &BTreeMap::new());
        let modelled = one.wait_us(1);
        let mut waits = Line::default();
        // All alike: the model is stretched to them, at every batch.
        (0..8).for_each(|_| waits.add(1.0, modelled / 2.0, 64.0));
        one.fit_wait(&waits);
        assert!(near(one.wait_us(1), 2.0 * modelled), "{} for four layers, {modelled} modelled", one.wait_us(1));
        // Batches of 1 to 16: 3 ms and half a millisecond a row, at each of four layers, whatever calls and rows seem to cost.
        let mut waits = Line::default();
        for n in 0..64 {
            let rows = f64::from([1, 4, 16][n % 3]);
            waits.add(rows, 3_000.0 + 500.0 * rows, 64.0);
        }
        one.fit_wait(&waits);
        for batch in [1, 8, 32] {
            assert!(near(one.wait_us(batch), 4.0 * (3_000.0 + 500.0 * f64::from(batch))), "{}", one.wait_us(batch));
        }
        // Too few to say anything.
        let mut fresh = split(&dealt(1), 1_000.0, &BTreeMap::new());
        let mut few = Line::default();
        few.add(1.0, 9e9, 64.0);
        fresh.fit_wait(&few);
        assert!(near(fresh.wait_us(1), modelled));
    }

    #[test]
    fn hot_experts_slow_their_holder_down_until_they_are_copied() {
        let heat: BTreeMap<(u32, u32), u64> =
            (0..4).flat_map(|l| (0..8).map(move |e| ((l, e), if e == 0 { 700 } else { 10 }))).collect();
        let packs = dealt(2);
        let even = split(&packs, 500.0, &BTreeMap::new()).step_us(32);
        let hot = split(&packs, 500.0, &heat).step_us(32);
        assert!(hot > 1.4 * even, "{hot} {even}");
        let copied = [packs[0].clone(), ExpertSet::new(packs[1].pairs().iter().copied().chain((0..4).map(|l| (l, 0))))];
        let copied = split(&copied, 500.0, &heat).step_us(32);
        assert!(copied < 1.1 * even, "{copied} {even}");
    }

    #[test]
    fn it_knows_from_which_batch_a_split_pays() {
        let split = split(&dealt(4), 5_000.0, &BTreeMap::new());
        // Layers: a fixed 8 ms for hops, and each row dearer than over four workers.
        let layers = |batch: u32| 8_000.0 + 2_000.0 * f64::from(batch);
        let from = beats_from(512, |batch| split.step_us(batch), layers).unwrap();
        assert!((2..64).contains(&from), "{from}");
        assert_eq!(beats_from(512, |_| 2.0, |_| 1.0), None);
        let speed = Speed { prefill_mtok_s: 200_000, decode_mtok_s: 50_000 };
        assert_eq!(listed_step_us(&speed, 1), Some(20_000.0));
        assert_eq!(listed_step_us(&speed, 3), Some(30_000.0));
        assert_eq!(trunk_of(&speed), Some(Fit { base: 15_000.0, slope: 5_000.0 }));
        assert_eq!(listed_step_us(&Speed::default(), 1), None);
    }

    #[test]
    fn what_is_not_measured_is_assumed_and_said_so() {
        let listed = Speed { prefill_mtok_s: 0, decode_mtok_s: 4_000_000 };
        let assumed = WorkerCost::of(None, None, &listed);
        assert_eq!((assumed.measured, assumed.link.base, assumed.work.slope), (false, CALL_US, 250.0));
        let mut link = Line::default();
        (0..8).for_each(|n| link.add(f64::from(n) * 100.0, 300.0, 64.0));
        let known = WorkerCost::of(Some(&link), None, &listed);
        assert!(known.measured && near(known.link.base, 300.0));
    }
}
