//! How fast workers of a ring really are: what a lead measured of their layers, beside what they list.
//!
//! A lead sees one figure, the time of a row's whole trip. It takes it apart by rows that end early: a row that stops being
//! computed after worker k still travels the whole ring, so two such trips that end at neighbours differ by one worker's
//! time, and one that nobody computes is the way alone ([`Trips`]). Of each kind the middle one of several counts, and the
//! listing is believed as far as that one may be off: what else goes on is nobody's lie. Where noise alone keeps a listing
//! believed, more trips tell ([`Own::is_doubtful`]).
//!
//! | a worker's pace    | is so while                                                                                    |
//! |--------------------|------------------------------------------------------------------------------------------------|
//! | unknown            | nothing was measured for [`KEPT_MS`]: its listing is believed                                  |
//! | measured           | plans reckon with what was measured, not with what is listed                                   |
//! | overstated         | it was over [`LIE_FACTOR`] times what it lists in each of the last [`LIES`] measurements, and lists it still: left out |
//!
//! What this cannot tell: a worker that is slow in passing on what others computed is taken for a slow link, and one that
//! sees that a row ends early may hurry for it alone. Both make the whole trip longer than the sum of its parts, and whoever
//! holds them against each other sees that; to whom it belongs nobody can say.

use satgrid_types::{LayerRange, NodeKey, UnixMs};
use std::collections::BTreeMap;

/// A listed time is overstated where so many times as long was measured, and ...
pub const LIE_FACTOR: u64 = 2;
/// ... so many microseconds more: what a busy machine adds to a very short time is no lie.
pub const LIE_SLACK_US: u64 = 2_000;
/// Trips of one kind that are kept.
const MOST_TRIPS: usize = 64;
/// Measurements in a row that make a liar.
pub const LIES: u32 = 3;
/// A measurement counts so long, in ms; then the listing is believed again.
pub const KEPT_MS: u64 = 60 * 60 * 1_000;

/// What was measured of a worker's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// What it listed by then, and what was measured, in microseconds a token.
    pub listed_us: u64,
    pub measured_us: u64,
    /// Measurements in a row in which it was overstated.
    pub lies: u32,
    pub at: UnixMs,
}

/// Whether a measured time makes a listed one untrue.
pub fn overstates(listed_us: u64, measured_us: u64) -> bool {
    measured_us > listed_us.saturating_mul(LIE_FACTOR).saturating_add(LIE_SLACK_US)
}

/// The paces of everybody whom this lead bought layers of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paces(BTreeMap<(NodeKey, u32, u32), Pace>);

impl Paces {
    /// Takes a measurement in; what became of the worker's pace.
    pub fn measured(
        &mut self,
        at: UnixMs,
        node: NodeKey,
        range: &LayerRange,
        listed_us: u64,
        measured_us: u64,
    ) -> Pace {
        let before = self.of(at, &node, range).map_or(0, |pace| pace.lies);
        let lies = if overstates(listed_us, measured_us) { before.saturating_add(1) } else { 0 };
        let pace = Pace { listed_us, measured_us, lies, at };
        self.keep(node, range, pace);
        pace
    }

    /// As it was kept.
    pub fn keep(&mut self, node: NodeKey, range: &LayerRange, pace: Pace) {
        self.0.insert((node, range.start(), range.end()), pace);
    }

    /// What counts now.
    pub fn of(&self, now: UnixMs, node: &NodeKey, range: &LayerRange) -> Option<&Pace> {
        let pace = self.0.get(&(*node, range.start(), range.end()))?;
        (now.since(pace.at) < KEPT_MS).then_some(pace)
    }

    /// Whether who lists this has been measured to be slower again and again.
    pub fn is_overstated(&self, now: UnixMs, node: &NodeKey, range: &LayerRange, listed_us: u64) -> bool {
        self.of(now, node, range).is_some_and(|pace| pace.lies >= LIES && overstates(listed_us, pace.measured_us))
    }
}

/// Trips of one round of measurements, in microseconds, by their kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trips {
    /// That nobody computed: the way alone.
    way: Vec<u64>,
    /// That ended after each worker; those after the last one are whole trips.
    after: Vec<Vec<u64>>,
}

impl Trips {
    pub fn of(workers: usize) -> Trips {
        Trips { way: Vec::new(), after: vec![Vec::new(); workers] }
    }

    /// How many kinds of short trips there are: of the whole ones, those that the last worker computes, a ring has plenty.
    pub fn kinds(&self) -> usize {
        self.after.len().max(1)
    }

    /// A trip's time: after which worker, counted from 0, it was not computed any more; `None`: by nobody.
    pub fn took(&mut self, after: Option<usize>, us: u64) {
        let kept = match after {
            Some(worker) => self.after.get_mut(worker),
            None => Some(&mut self.way),
        };
        if let Some(kept) = kept.filter(|kept| kept.len() < MOST_TRIPS) {
            kept.push(us);
        }
    }

    /// Each worker's own time: how much the middle one of its trips is longer than that of those before. `None` where a kind of
    /// trip is missing.
    pub fn workers(&self) -> Option<Vec<Own>> {
        let (mut before, mut spread) = middle(&self.way)?;
        let mut times = Vec::with_capacity(self.after.len());
        for after in &self.after {
            let (after, spread_after) = middle(after)?;
            times.push(Own { us: after.saturating_sub(before), give_us: spread.saturating_add(spread_after) });
            (before, spread) = (after, spread_after);
        }
        Some(times)
    }
}

/// A worker's own time, and how far from the truth that may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    pub us: u64,
    pub give_us: u64,
}

impl Own {
    /// What counts beside a listed time: that, as far as the measurement allows it.
    pub fn beside(&self, listed_us: u64) -> u64 {
        listed_us.clamp(self.us.saturating_sub(self.give_us), self.us.saturating_add(self.give_us))
    }

    /// What was measured makes the listed time untrue, and only its noise speaks for it.
    pub fn is_doubtful(&self, listed_us: u64) -> bool {
        overstates(listed_us, self.us) && !overstates(listed_us, self.beside(listed_us))
    }
}

/// The middle one, and how far it may be off: of n times, 2/sqrt(n) of what the middle half is spread over, which is some two
/// standard errors of a median where the times are normal (0.93/sqrt(n) of it each).
fn middle(times: &[u64]) -> Option<(u64, u64)> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = |part: usize| sorted.get(sorted.len() * part / 4).copied();
    let spread = at(3)?.saturating_sub(at(1)?);
    // The root of 4 * spread^2 / n.
    let squared = u128::from(spread).pow(2).saturating_mul(4) / sorted.len().max(1) as u128;
    Some((at(2)?, u64::try_from(squared.isqrt()).unwrap_or(u64::MAX)))
}

/// Whether a ring's least whole trip is so much longer than the plan said that its workers are to be measured one by one.
pub fn is_suspicious(planned_us: u64, trip_us: u64) -> bool {
    trip_us > planned_us.saturating_mul(3).div_ceil(2).saturating_add(LIE_SLACK_US)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    fn layers() -> LayerRange {
        LayerRange::new(2, 6).unwrap()
    }

    /// A ring of workers with these times and a way of 3 ms, where every fifth trip is late by any time up to 40 ms.
    fn measure(workers: &[u64]) -> Vec<Own> {
        let mut trips = Trips::of(workers.len());
        let mut noise = 7_u64;
        let mut took = |after: Option<usize>, us: u64| {
            for n in 0..10 {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let late = if n % 5 == 1 { (noise >> 40) % 40_000 } else { 0 };
                trips.took(after, 3_000 + us + late);
            }
        };
        took(None, 0);
        let mut sum = 0;
        for (at, us) in workers.iter().enumerate() {
            sum += us;
            took(Some(at), sum);
        }
        trips.workers().unwrap()
    }

    #[test]
    fn a_trip_is_taken_apart() {
        for workers in [&[5_000][..], &[5_000, 90_000, 1_000], &[90_000, 0, 5_000, 7_000]] {
            let exactly: Vec<Own> = workers.iter().map(|us| Own { us: *us, give_us: 0 }).collect();
            assert_eq!(measure(workers), exactly);
        }
        let mut lacking = Trips::of(2);
        lacking.took(Some(1), 9);
        lacking.took(None, 1);
        assert_eq!(lacking.workers(), None);
        lacking.took(Some(7), 9);
        lacking.took(Some(0), 12);
        // A trip that ended earlier and took longer: noise, of which nobody is accused.
        assert_eq!(lacking.workers().unwrap().iter().map(|own| own.us).collect::<Vec<_>>(), [11, 0]);
    }

    #[test]
    fn a_listing_is_believed_as_far_as_noise_goes() {
        let mut trips = Trips::of(1);
        [1_000, 1_000, 1_100, 9_000].into_iter().for_each(|us| trips.took(None, us));
        [50_000, 60_000, 62_000, 90_000].into_iter().for_each(|us| trips.took(Some(0), us));
        let own = trips.workers().unwrap()[0];
        assert_eq!(own, Own { us: 60_900, give_us: 8_000 + 30_000 });
        for (listed, counts) in [(1_000, 22_900), (30_000, 30_000), (98_000, 98_000), (200_000, 98_900)] {
            assert_eq!(own.beside(listed), counts);
        }
    }

    /// A worker of 60 ms that lists 2, on a machine where every eighth trip is late by 150 ms: four trips of each kind may say
    /// nothing, and then they say so; sixteen do.
    #[test]
    fn where_noise_alone_speaks_for_a_listing_more_trips_tell() {
        let told = |trips_of_a_kind: u64| {
            let mut trips = Trips::of(1);
            for n in 0..trips_of_a_kind {
                let late = if n % 8 == 3 { 150_000 } else { n * 100 };
                trips.took(None, 3_000 + late);
                trips.took(Some(0), 63_000 + late);
            }
            trips.workers().unwrap()[0]
        };
        let (few, many) = (told(4), told(16));
        assert!(few.is_doubtful(2_000) && few.beside(2_000) == 2_000);
        assert!(!many.is_doubtful(2_000) && overstates(2_000, many.beside(2_000)), "{many:?}");
        // One that lists what it has is not doubted, however loud it is.
        assert!(!few.is_doubtful(60_000) && !few.is_doubtful(30_000));
    }

    #[test]
    fn who_overstates_again_and_again_is_left_out_until_it_lists_the_truth() {
        let (mut paces, liar) = (Paces::default(), NodeKey([1; 32]));
        let later = |n: u64| NOW.plus_ms(n * 30_000);
        for n in 1..=3_u64 {
            let pace = paces.measured(later(n), liar, &layers(), 1_000, 40_000);
            assert_eq!((pace.lies, pace.measured_us), (u32::try_from(n).unwrap(), 40_000));
            assert_eq!(paces.is_overstated(later(n), &liar, &layers(), 1_000), n == 3, "after {n}");
        }
        // Another part of the same node is another claim, another node another party.
        assert!(!paces.is_overstated(later(3), &liar, &LayerRange::new(6, 8).unwrap(), 1_000));
        assert!(!paces.is_overstated(later(3), &NodeKey([2; 32]), &layers(), 1_000));
        // It lists what it has: taken again, at what was measured.
        assert!(!paces.is_overstated(later(4), &liar, &layers(), 25_000));
        assert_eq!(paces.of(later(4), &liar, &layers()).unwrap().measured_us, 40_000);
        // One good measurement, or enough time.
        let (mut mended, much_later) = (paces.clone(), later(3).plus_ms(KEPT_MS));
        assert_eq!(mended.measured(later(5), liar, &layers(), 1_000, 3_000).lies, 0);
        assert!(!mended.is_overstated(later(5), &liar, &layers(), 1_000));
        assert!(paces.of(much_later, &liar, &layers()).is_none());
    }

    #[test]
    fn noise_is_no_lie() {
        for (listed, measured, lie) in [
            (1_000, 4_000, false),
            (1_000, 4_001, true),
            (40_000, 82_000, false),
            (40_000, 82_001, true),
            (0, 0, false),
        ] {
            assert_eq!(overstates(listed, measured), lie, "{listed} and {measured}");
        }
        for (planned, trip, odd) in [(10_000, 17_000, false), (10_000, 17_001, true), (0, 2_000, false)] {
            assert_eq!(is_suspicious(planned, trip), odd, "{planned} and {trip}");
        }
    }
}
