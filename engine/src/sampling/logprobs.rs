//! Log probabilities of a row of logits, as the model gave it: before bias, penalties, truncation and temperature.

use minicbor::{Decode, Encode};

/// OpenAI's limit.
pub const MAX_TOP_LOGPROBS: u32 = 20;
/// What is less likely than e^-2000 counts as that.
const LEAST: f64 = -2_000.0;

/// Log probabilities at one output position, in millionths of a nat (0 or less).
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Logprobs {
    /// Of the token that was drawn.
    #[n(0)]
    pub drawn_micro: i32,
    /// Token and log probability of the likeliest ones, likeliest first, the lowest id first among equals.
    #[n(1)]
    pub top: Vec<(u32, i32)>,
}

/// The log probability of `drawn` and of the `top` likeliest tokens.
pub fn logprobs(logits: &[f32], drawn: u32, top: u32) -> Logprobs {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).filter(|w| w.is_finite()).sum();
    let log_sum = sum.ln();
    let micro = |logit: f32| {
        let nats = f64::from(logit - highest) - log_sum;
        // A float too large or not a number becomes the nearest bound or 0.
        (nats.clamp(LEAST, 0.0) * 1e6).round() as i32
    };
    let mut order: Vec<u32> = (0_u32..).take(logits.len()).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let top = (top as usize).min(order.len());
    if top < order.len() {
        order.select_nth_unstable_by(top, by_logit);
        order.truncate(top);
    }
    order.sort_unstable_by(by_logit);
    Logprobs {
        drawn_micro: logits.get(drawn as usize).map_or((LEAST * 1e6) as i32, |logit| micro(*logit)),
        top: order.into_iter().map(|id| (id, micro(logits[id as usize]))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_the_likeliest_come_first() {
        let logits = [0.0, 2.0_f32.ln(), 5.0_f32.ln(), f32::NEG_INFINITY];
        let all = logprobs(&logits, 1, 20);
        assert_eq!(all.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 1, 0, 3]);
        let sum: f64 = all.top.iter().map(|(_, micro)| (f64::from(*micro) / 1e6).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        assert_eq!(all.drawn_micro, ((2.0_f64 / 8.0).ln() * 1e6).round() as i32);
        assert_eq!(logprobs(&logits, 3, 0), Logprobs { drawn_micro: -2_000_000_000, top: Vec::new() });
        assert_eq!(logprobs(&[], 3, 2).top, []);
    }
}
