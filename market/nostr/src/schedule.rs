//! When things happen again: refreshes and retries, as pure functions.

use std::time::Duration;

use satgrid_types::{MAX_LIFETIME_S, UnixMs};

/// Shortest and longest life that a listing is given: relays and readers are not to be bothered more often, nor left
/// with a price that is older.
pub const MIN_LIFETIME: Duration = Duration::from_secs(15 * 60);
pub const MAX_LIFETIME: Duration = Duration::from_secs(MAX_LIFETIME_S);
/// Longest wait before a relay is tried again.
pub(crate) const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// A refresh comes at half of the life, less or more a tenth of it.
const JITTER_DIVISOR: u64 = 10;

/// The life that a listing is given.
pub(crate) fn clamp_lifetime(wanted: Duration) -> Duration {
    wanted.clamp(MIN_LIFETIME, MAX_LIFETIME)
}

/// A small deterministic source of jitter, so that nodes that started together do not refresh together.
#[derive(Debug, Clone)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Jitter {
        Jitter(seed)
    }

    /// SplitMix64. Nothing secret hangs on it.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// When a listing made at `made_at` is to be made anew: within [0.4, 0.6] of its life.
    pub(crate) fn refresh_at(&mut self, made_at: UnixMs, lifetime: Duration) -> UnixMs {
        let life_ms = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
        let spread = life_ms / JITTER_DIVISOR;
        let offset = self.next() % (2 * spread + 1);
        made_at.plus_ms(life_ms / 2 - spread + offset)
    }
}

/// How long to leave a relay alone after so many failures in a row.
pub(crate) fn backoff(retry: Duration, failures: u32) -> Duration {
    let factor = 1u32 << failures.saturating_sub(1).min(10);
    retry.saturating_mul(factor).min(MAX_BACKOFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refreshes_come_around_the_middle_of_a_life() {
        let life = Duration::from_secs(1_800);
        let mut jitter = Jitter::new(7);
        let times: Vec<u64> = (0..1_000).map(|_| jitter.refresh_at(UnixMs(1_000), life).0).collect();
        assert!(times.iter().all(|at| (721_000..=1_081_000).contains(at)));
        assert!(times.iter().min() < Some(&740_000) && times.iter().max() > Some(&1_060_000), "spread over all of it");
        let mut again = Jitter::new(7);
        assert_eq!(times[0], again.refresh_at(UnixMs(1_000), life).0, "the same seed gives the same times");
    }

    #[test]
    fn waits_double_up_to_a_minute() {
        let waits: Vec<u64> = [1, 2, 3, 4, 5, 99].map(|n| backoff(Duration::from_secs(5), n).as_secs()).to_vec();
        assert_eq!(waits, vec![5, 10, 20, 40, 60, 60]);
        assert_eq!(clamp_lifetime(Duration::ZERO), MIN_LIFETIME);
        assert_eq!(clamp_lifetime(Duration::from_secs(1 << 20)), MAX_LIFETIME);
    }
}
