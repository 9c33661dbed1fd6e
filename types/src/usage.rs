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
    /// Work on a part of a model, in sessions between a lead and its workers; absent where whole models are sold.
    #[n(4)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<PartUsage>,
}

/// Cumulative work of one worker on one request: positions by why they were evaluated, and the units that are priced.
///
/// A position that is evaluated twice counts twice; the second time it is `replay` unless it was a rejected draft.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct PartUsage {
    #[n(0)]
    pub prefill: u64,
    #[n(1)]
    pub decode: u64,
    /// Speculative positions, whether they were accepted or not.
    #[n(2)]
    pub draft: u64,
    /// Evaluated again to rebuild what a lost worker held. Paid by the lead, never by its customer.
    #[n(3)]
    pub replay: u64,
    /// Positions times layers: what layer work is priced by.
    #[n(4)]
    pub position_layers: u64,
    /// What expert work is priced by.
    #[n(5)]
    pub expert_rows: u64,
}

/// Why positions are evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(index_only)]
#[serde(rename_all = "snake_case")]
pub enum WorkKind {
    #[n(0)]
    Prefill,
    #[n(1)]
    Decode,
    #[n(2)]
    Draft,
    #[n(3)]
    Replay,
}

impl PartUsage {
    /// All positions; `None` where the sum does not fit.
    pub const fn positions(&self) -> Option<u64> {
        match self.first_evaluations() {
            Some(sum) => sum.checked_add(self.replay),
            None => None,
        }
    }
    /// Positions but replays: what every layer of a request evaluates exactly as often as every other.
    pub const fn first_evaluations(&self) -> Option<u64> {
        match self.prefill.checked_add(self.decode) {
            Some(sum) => sum.checked_add(self.draft),
            None => None,
        }
    }
    /// Adds `positions` of one kind through `layers` layers; `None` where a count does not fit.
    pub fn plus(mut self, kind: WorkKind, positions: u64, layers: u32) -> Option<PartUsage> {
        let counter = match kind {
            WorkKind::Prefill => &mut self.prefill,
            WorkKind::Decode => &mut self.decode,
            WorkKind::Draft => &mut self.draft,
            WorkKind::Replay => &mut self.replay,
        };
        *counter = counter.checked_add(positions)?;
        let added = positions.checked_mul(u64::from(layers))?;
        self.position_layers = self.position_layers.checked_add(added)?;
        Some(self)
    }
    pub const fn covers(&self, earlier: &PartUsage) -> bool {
        self.prefill >= earlier.prefill
            && self.decode >= earlier.decode
            && self.draft >= earlier.draft
            && self.replay >= earlier.replay
            && self.position_layers >= earlier.position_layers
            && self.expert_rows >= earlier.expert_rows
    }
}

impl TokenUsage {
    /// Counts that contradict each other (more cached than prompt, more reasoning than output) are nobody's usage.
    pub const fn is_consistent(&self) -> bool {
        self.cached_prompt <= self.prompt && self.reasoning <= self.completion
    }
    /// Work on a part of a model and nothing else.
    pub const fn of_part(part: PartUsage) -> TokenUsage {
        TokenUsage { prompt: 0, cached_prompt: 0, completion: 0, reasoning: 0, part: Some(part) }
    }
    /// No counter of `self` is smaller than in `earlier`: cumulative statements only grow.
    pub const fn covers(&self, earlier: &TokenUsage) -> bool {
        self.prompt >= earlier.prompt
            && self.cached_prompt >= earlier.cached_prompt
            && self.completion >= earlier.completion
            && self.reasoning >= earlier.reasoning
            && match (&self.part, &earlier.part) {
                (Some(now), Some(before)) => now.covers(before),
                (Some(_) | None, None) => true,
                (None, Some(_)) => false,
            }
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
