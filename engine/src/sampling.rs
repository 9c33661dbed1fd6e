//! Drawing a token from logits.
//!
//! The draw at output position `i` depends on the logits, the tokens so far, the parameters and (seed, `i`),
//! never on a sampler's state: a stream can be replayed from any position, by another provider or by an auditor.
//! All arithmetic after the logits is either IEEE basic operations or integers, so the same logits give
//! the same token on every platform.
//!
//! Order of the steps: logit bias, penalties, `top_k`, `top_p`, `min_p`, temperature, draw. The truncations look at
//! probabilities at temperature 1 (as llama.cpp does), so a higher temperature never lets unlikelier tokens in. Ties
//! go to the lowest id.

mod draw;
mod logprobs;
mod weight;

use minicbor::{Decode, Encode};

pub use draw::draw;
pub use logprobs::{Logprobs, MAX_TOP_LOGPROBS, logprobs};

/// Most entries in a logit bias map.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Largest bias and penalty, either sign.
pub const MAX_BIAS: f32 = 1000.0;
pub const MAX_PENALTY: f32 = 100.0;
pub const MAX_TEMPERATURE: f32 = 100.0;

/// How a token is drawn. Temperature 0 is greedy: the likeliest token, the lowest id among equals.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Sampling {
    /// 0 to [`MAX_TEMPERATURE`]; 2 is OpenAI's highest.
    #[n(0)]
    pub temperature: f32,
    /// Keep the fewest likeliest tokens that reach this probability; 1 keeps all. One token is always kept.
    #[n(1)]
    pub top_p: f32,
    /// Keep this many likeliest tokens; 0 keeps all.
    #[n(2)]
    pub top_k: u32,
    /// Drop tokens less likely than this fraction of the likeliest; 0 keeps all.
    #[n(3)]
    pub min_p: f32,
    /// Subtracted from the logit of every token that the output holds.
    #[n(4)]
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output.
    #[n(5)]
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens among the latest `repeat_window`, prompt included; 1
    /// changes nothing.
    #[n(6)]
    pub repeat_penalty: f32,
    /// How far back `repeat_penalty` looks, in tokens.
    #[n(7)]
    pub repeat_window: u32,
    /// Added to the logits of these ids; see [`Sampling::forbid`].
    #[n(8)]
    pub logit_bias: Vec<(u32, f32)>,
    #[n(9)]
    pub seed: u64,
}

/// A parameter that makes no sense.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Encode, Decode)]
pub enum SamplingError {
    #[error("{name} is {value}, allowed is {low} to {high}")]
    #[n(0)]
    OutOfRange {
        #[n(0)]
        name: String,
        #[n(1)]
        value: f32,
        #[n(2)]
        low: f32,
        #[n(3)]
        high: f32,
    },
    #[error("{entries} entries of logit bias, at most {MAX_LOGIT_BIAS}")]
    #[n(1)]
    TooManyBiases {
        #[n(0)]
        entries: u32,
    },
}

impl Default for Sampling {
    /// OpenAI's defaults: temperature 1, nothing truncated, nothing penalised.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_penalty: 1.0,
            repeat_window: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// The likeliest token every time.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Plain sampling at a temperature.
    pub fn seeded(temperature: f32, seed: u64) -> Self {
        Self { temperature, seed, ..Self::default() }
    }

    /// Makes these ids impossible to draw; an engine does so with end-of-generation tokens where a job ignores them.
    pub fn forbid(&mut self, ids: impl IntoIterator<Item = u32>) {
        self.logit_bias.extend(ids.into_iter().map(|id| (id, f32::NEG_INFINITY)));
    }

    /// Refuses what no engine should be asked. `draw` itself takes anything and never panics.
    pub fn check(&self) -> Result<(), SamplingError> {
        within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)?;
        within("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)?;
        within("repeat_penalty", self.repeat_penalty, f32::MIN_POSITIVE, MAX_PENALTY)?;
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            let entries = u32::try_from(self.logit_bias.len()).unwrap_or(u32::MAX);
            return Err(SamplingError::TooManyBiases { entries });
        }
        self.logit_bias.iter().try_for_each(|&(_, bias)| within("logit_bias", bias, -MAX_BIAS, MAX_BIAS))
    }
}

fn within(name: &str, value: f32, low: f32, high: f32) -> Result<(), SamplingError> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(SamplingError::OutOfRange { name: name.to_owned(), value, low, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_out_of_range_are_refused_by_name() {
        let base = Sampling::default;
        let cases = [
            (Sampling { temperature: f32::NAN, ..base() }, "temperature"),
            (Sampling { temperature: -0.1, ..base() }, "temperature"),
            (Sampling { top_p: 1.01, ..base() }, "top_p"),
            (Sampling { min_p: -1.0, ..base() }, "min_p"),
            (Sampling { repeat_penalty: 0.0, ..base() }, "repeat_penalty"),
            (Sampling { frequency_penalty: f32::INFINITY, ..base() }, "frequency_penalty"),
            (Sampling { logit_bias: vec![(1, f32::NAN)], ..base() }, "logit_bias"),
        ];
        for (sampling, expect) in cases {
            let error = sampling.check().unwrap_err();
            assert!(matches!(&error, SamplingError::OutOfRange { name, .. } if name == expect), "{error}");
        }
        let many = Sampling { logit_bias: vec![(0, 0.0); MAX_LOGIT_BIAS + 1], ..base() };
        assert_eq!(many.check(), Err(SamplingError::TooManyBiases { entries: 1025 }));
        assert_eq!(base().check(), Ok(()));
        assert_eq!(Sampling::greedy().check(), Ok(()));
    }
}
