//! One mixture-of-experts model over several machines, exactly.
//!
//! The *trunk* is the whole model without its routed experts' weights: attention, norms, shared experts and the true
//! router stay with the lead. An *expert pack* holds any set of (layer, expert). At each such layer the trunk asks for the
//! rows that the router chose; the experts' outputs come back one row per (token, slot), and the trunk weights and
//! sums them itself, in the order in which a solo run does. So the result is the same to the bit.
//!
//! | module       | what it is                                                                                   |
//! |--------------|----------------------------------------------------------------------------------------------|
//! | [`family`]   | which architectures are split, and what is refused, by name                                  |
//! | [`manifest`] | what a trunk or pack carries to prove which model it is a part of                              |
//! | [`trunk`], [`pack`] | the two artefacts: written from a model file as a stream, verified when opened         |
//! | [`heat`]     | how often each expert was chosen, and packs that are equally busy                             |
//! | [`call`]     | a layer's question to one host and its answer, with limits and whose fault each error is       |
//! | [`map`]      | who holds which expert, and which host gets which rows of a step                               |
//! | [`step`]     | one layer's rows on their way: split by host, lost and asked again, checked, put in slot order |
//! | [`group`]    | the step over real hosts: the [`Experts`] port that a trunk asks                               |
//!
//! Nothing here computes, waits or opens a file.

pub mod call;
pub mod family;
pub mod group;
pub mod heat;
pub mod manifest;
pub mod map;
pub mod pack;
pub mod step;
pub mod trunk;

use async_trait::async_trait;

pub use call::{AnswerError, CallError, ExpertCall, ExpertRows, ExpertStep, HostError, StepError};
pub use family::{MoeShape, Refused};
pub use manifest::{Manifest, Part, PartError};

/// What a trunk asks: the outputs of the chosen experts for every row of a layer.
#[async_trait]
pub trait Experts: Send + Sync {
    /// One output row per (row, slot) of the step, in that order.
    async fn evaluate(&self, step: ExpertStep) -> Result<Vec<f32>, StepError>;
}

/// Somebody who evaluates experts: a child process of this node, or a provider whom the lead pays.
#[async_trait]
pub trait ExpertHost: Send + Sync {
    /// Evaluates one call. An adapter bounds the wait: a host that does not answer in time is [`HostError::Late`].
    async fn evaluate(&self, call: ExpertCall) -> Result<ExpertRows, HostError>;
}
