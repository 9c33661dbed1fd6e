//! How much work a request took, in tokens.

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Cumulative token counts of one request.
///
/// `prompt` counts evaluated and cached prompt tokens together, `cached_prompt` those of them that were not evaluated
/// again, `completion` the output tokens including `reasoning`. Serialised names are those of OpenAI's usage object in spirit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct TokenUsage {
    #[n(0)]
    pub prompt: u32,
    #[n(1)]
    pub cached_prompt: u32,
    #[n(2)]
    pub completion: u32,
    #[n(3)]
    pub reasoning: u32,
}

impl TokenUsage {
    /// Counts that contradict each other (more cached than prompt, more reasoning than output) are nobody's usage.
    pub const fn is_consistent(&self) -> bool {
        self.cached_prompt <= self.prompt && self.reasoning <= self.completion
    }
    /// No counter of `self` is smaller than in `earlier`: cumulative statements only grow.
    pub const fn covers(&self, earlier: &TokenUsage) -> bool {
        self.prompt >= earlier.prompt
            && self.cached_prompt >= earlier.cached_prompt
            && self.completion >= earlier.completion
            && self.reasoning >= earlier.reasoning
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(index_only)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-turn token or a stop string.
    #[n(0)]
    Stop,
    /// `max_tokens` or the context's end.
    #[n(1)]
    Length,
    /// The consumer asked to stop, or its client went away.
    #[n(2)]
    Cancelled,
    /// The provider's engine failed; what was acknowledged is charged, nothing more.
    #[n(3)]
    Error,
}
