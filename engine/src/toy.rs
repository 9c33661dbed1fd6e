//! A deterministic engine without weights, for tests and the simulator only. The shipped node cannot select it.
//!
//! Its logits are a hash of the tokens so far, so it honours everything that the port promises: grants, seeds, stop
//! strings, prefix reuse, replay. [`ToyEngine`] is sans-IO: `handle` a command, `poll_event` until `None`; each poll
//! does at most one step of work, so a simulator decides how fast it is. [`AsyncToy`] puts it behind the `Engine`
//! trait.
//!
//! [`Faults`] make it die or cheat on a schedule.

mod asynchronous;
mod engine;
mod model;
mod texts;

pub use asynchronous::AsyncToy;
pub use engine::ToyEngine;
pub use model::ToyTokenizer;

use crate::port::Profile;

/// How the toy is made. Two toys with the same `model_seed` say the same.
#[derive(Debug, Clone)]
pub struct ToyConfig {
    pub model_seed: u64,
    pub profile: Profile,
    /// Jobs that run at once.
    pub slots: u32,
    /// Jobs that wait for a slot.
    pub queue: u32,
    /// Prompt and output tokens of one job.
    pub context: u32,
    /// Most prompt positions per step.
    pub batch: u32,
    /// The toy embeds texts, with so many numbers a row; else it writes.
    pub embeds: Option<u32>,
    pub faults: Faults,
}

impl Default for ToyConfig {
    fn default() -> Self {
        Self {
            model_seed: 1,
            profile: Profile::Exact,
            slots: 4,
            queue: 64,
            context: 4096,
            batch: 512,
            embeds: None,
            faults: Faults::default(),
        }
    }
}

/// What goes wrong, and when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// The process dies after this many output tokens over all jobs: `Down`, and nothing works until `restart`.
    pub die_after_tokens: Option<u32>,
    /// Every job emits one token more than it was granted.
    pub overrun: bool,
}
