//! Probabilities as integers.
//!
//! A candidate's weight is `2^40 * e^x`, rounded, for its distance `x <= 0` from the likeliest. Sums of integers do
//! not depend on the order of adding, and the exponential uses only additions and products, which IEEE 754 fixes to
//! the bit; a platform's own `exp` is not fixed. What falls below 2^-40 of the likeliest is dropped: over 262,144
//! tokens that is less than 3 in 10 million of the whole.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Weight of the likeliest token.
pub(super) const ONE: u64 = 1 << 40;
/// Below this distance the weight is 0: 40 ln 2 = 27.7.
pub(super) const REACH: f64 = 28.0;

const LN_2: f64 = std::f64::consts::LN_2;
/// Adding this rounds to an integer and leaves it in the low bits of the sum.
const ROUND_SIGNED: f64 = 6_755_399_441_055_744.0;
/// The same for numbers from 0 to 2^51: the low 52 bits are the integer.
const ROUND_UNSIGNED: f64 = 4_503_599_627_370_496.0;
const LOW_52: u64 = (1 << 52) - 1;
/// 1/n! for n = 10 down to 0.
const TAYLOR: [f64; 11] = [
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// `2^40 * e^x` within 2 units for `x <= 0`; 0 for NaN and beyond [`REACH`], [`ONE`] for anything above 0.
///
/// Without branches, casts or library calls, so that a loop over a vocabulary becomes vector code.
#[inline(always)]
pub(super) fn weight(x: f64) -> u64 {
    #[expect(clippy::manual_clamp, reason = "clamp keeps NaN; here it becomes -REACH")]
    let x = x.max(-REACH).min(0.0);
    // e^x = 2^k * e^z with z within half of ln 2 of zero.
    let rounded = x * (1.0 / LN_2) + ROUND_SIGNED;
    let z = x - (rounded - ROUND_SIGNED) * LN_2;
    let mut power = 0.0;
    for term in TAYLOR {
        power = power * z + term;
    }
    let scale = f64::from_bits(rounded.to_bits().wrapping_add(1023 + 40) << 52);
    let weight = (power * scale + ROUND_UNSIGNED).to_bits() & LOW_52;
    if x > -REACH { weight } else { 0 }
}

/// A number below `total`, fixed by seed and position alone. `total` above 0.
pub(super) fn pick(seed: u64, position: u32, total: u64) -> u64 {
    let mut key = *b"________satgrid output draw v1__";
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha20Rng::from_seed(key);
    rng.set_stream(u64::from(position));
    let bits = u128::from(rng.next_u64());
    ((bits * u128::from(total)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_follows_exp() {
        for step in 0..28_000 {
            let x = -f64::from(step) / 1000.0;
            let expect = x.exp() * ONE as f64;
            assert!((weight(x) as f64 - expect).abs() <= 2.0, "{x}: {} against {expect}", weight(x));
        }
        assert_eq!([weight(f64::NAN), weight(f64::NEG_INFINITY), weight(-1e9)], [0, 0, 0]);
        assert_eq!(weight(0.5), ONE);
    }

    /// Golden values: another build or platform must draw the same.
    #[test]
    fn pick_is_fixed() {
        let drawn: Vec<u64> = (0..4).map(|position| pick(7, position, 1_000_000)).collect();
        assert_eq!(drawn, PICKED);
        assert_ne!(pick(7, 0, u64::MAX), pick(8, 0, u64::MAX));
    }

    const PICKED: [u64; 4] = [548_562, 477_612, 401_546, 29_686];
}
