//! Sampling parameters as signed statements carry them: fixed point, since signed bytes hold no floats.

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// At most this many biased tokens in one request.
pub const MAX_LOGIT_BIAS: usize = 1_024;

/// Fixed-point sampling parameters; `_micro` fields are millionths.
///
/// The default is greedy: temperature 0. The draw at output position i depends on `seed` and i alone.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct Sampling {
    #[n(0)]
    pub temperature_micro: u32,
    /// 1,000,000 keeps every token.
    #[n(1)]
    pub top_p_micro: u32,
    /// 0 keeps every token.
    #[n(2)]
    pub top_k: u32,
    #[n(3)]
    pub min_p_micro: u32,
    #[n(4)]
    pub presence_penalty_micro: i32,
    #[n(5)]
    pub frequency_penalty_micro: i32,
    /// 1,000,000 is no penalty.
    #[n(6)]
    pub repeat_penalty_micro: u32,
    /// Sorted by token id, each once.
    #[n(7)]
    pub logit_bias_micro: Vec<(u32, i32)>,
    #[n(8)]
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature_micro: 0,
            top_p_micro: 1_000_000,
            top_k: 0,
            min_p_micro: 0,
            presence_penalty_micro: 0,
            frequency_penalty_micro: 0,
            repeat_penalty_micro: 1_000_000,
            logit_bias_micro: Vec::new(),
            seed: 0,
        }
    }
}
