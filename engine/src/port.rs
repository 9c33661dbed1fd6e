//! The `Engine` port: what the node asks of a running model, and what it hears back.
//!
//! A provider meters its work: a prompt is prefilled in pieces and output pauses when the payer has not
//! acknowledged it. So a job runs on **grants**. The engine may evaluate prompt positions below `prompt_upto`
//! and emit output tokens with an index below `output_upto`; grants only grow, and beyond them the engine does
//! nothing (it may hold one token drawn but not emitted, since the last prompt position yields it for free).
//!
//! Everything here crosses a local socket between the node and the engine's child process, hence CBOR.
//!
//! # Life of a job
//!
//! | state      | awaits                                 | leaves with                                          |
//! |------------|----------------------------------------|------------------------------------------------------|
//! | prefilling | `Grant` of prompt, a free slot         | `Prefilled { upto: prompt.len() }`, to generating    |
//! | generating | `Grant` of output                      | `Finished` (stop, length) or `Failed`                |
//! | any        | `Cancel`                               | `Finished { Cancelled }` within one batch            |
//! | any        |                                        | `Down`: the process died and every job with it       |
//!
//! Each started job ends with exactly one of `Finished` and `Failed`, unless `Down` comes first. Nothing about a
//! job follows its end. A `Grant` or `Cancel` for a job that is unknown or over is ignored: the two may cross.
//!
//! # What is counted
//!
//! - `Prefilled::upto` counts prompt positions covered so far, `cached` how many of those came from the session's
//!   prefix cache; neither ever falls, and `cached <= upto <= prompt_upto`. At least the prompt's last position is
//!   always evaluated, so `cached < prompt.len()`.
//! - `Logprobs` come for jobs that asked, right before the `Tokens` that they speak of.
//! - All `Tokens` of a job are consecutive from index 0. An end-of-generation token is delivered and counted like any
//!   other; its piece is empty, so it adds no text. Likewise the token that completes a stop string: the reader of
//!   the tokens cuts the text (see `stop::TextStream`).
//! - A job that embeds ([`Extras::embed`]) has no output tokens. Its texts' rows come as `Embedded`, in order, each before the
//!   `Prefilled` that covers its text's last position. An engine whose model reads a text whole covers granted positions of a
//!   text that is not granted whole yet: it evaluates them once it is. Such a job ends with `Stop`, or is cancelled.
//! - `Finished::evaluated` counts positions that the model computed: `prompt - cached + max(output - 1, 0)` for a job
//!   that ran to its end, since the last token drawn is never fed back.

mod job;

use std::collections::BTreeSet;

use async_trait::async_trait;
use minicbor::{Decode, Encode};

use crate::facts::ModelFacts;

pub use crate::sampling::Logprobs;
pub use job::{Extras, Job, JobError, JobId, MAX_STOP_BYTES, MAX_STOPS, MAX_TEXTS};

/// What the node asks.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum Command {
    /// Takes the job in. Nothing of it is evaluated before a grant.
    #[n(0)]
    Start(#[n(0)] Job),
    /// The engine may evaluate prompt positions below `prompt_upto` and emit output tokens with an index below
    /// `output_upto`. Grants only grow: the larger of the old and the new value holds. Values beyond the prompt or
    /// `max_output` mean "all of it".
    #[n(1)]
    Grant {
        #[n(0)]
        job: JobId,
        #[n(1)]
        prompt_upto: u32,
        #[n(2)]
        output_upto: u32,
    },
    /// Ends the job with `Finished { reason: Cancelled }` within one batch.
    #[n(2)]
    Cancel {
        #[n(0)]
        job: JobId,
    },
    /// Drops the session's prefix cache. Its running jobs go on, but nothing of them stays when they are over.
    #[n(3)]
    ForgetSession {
        #[cbor(n(0), with = "minicbor::bytes")]
        session: [u8; 32],
    },
}

/// What the engine reports.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum EngineEvent {
    /// Prompt positions below `upto` are covered, of which `cached` came from the session's prefix cache.
    /// Sent after every batch that moved `upto`; always before the job's first `Tokens`.
    #[n(0)]
    Prefilled {
        #[n(0)]
        job: JobId,
        #[n(1)]
        upto: u32,
        #[n(2)]
        cached: u32,
    },
    /// Output tokens; `first` is the index of `ids[0]` in the job's output.
    #[n(1)]
    Tokens {
        #[n(0)]
        job: JobId,
        #[n(1)]
        first: u32,
        #[n(2)]
        ids: Vec<u32>,
    },
    /// The job is over; `evaluated` positions were computed for it.
    #[n(2)]
    Finished {
        #[n(0)]
        job: JobId,
        #[n(1)]
        reason: FinishReason,
        #[n(2)]
        evaluated: u32,
    },
    /// The job is over and its output is incomplete.
    #[n(3)]
    Failed {
        #[n(0)]
        job: JobId,
        #[n(1)]
        error: JobError,
    },
    /// The engine process died: all jobs and prefix caches are gone, and commands are refused until `Up`.
    #[n(4)]
    Down {
        #[n(0)]
        reason: String,
    },
    /// The engine takes commands again, with the same facts as before but possibly new speeds.
    #[n(5)]
    Up,
    /// Log probabilities of the output tokens from index `first` on, for a job that asked; right before their `Tokens`.
    #[n(6)]
    Logprobs {
        #[n(0)]
        job: JobId,
        #[n(1)]
        first: u32,
        #[n(2)]
        entries: Vec<Logprobs>,
    },
    /// The row of the text of this index, of a job that embeds: little-endian f32 numbers, of length 1 as a vector.
    #[n(7)]
    Embedded {
        #[n(0)]
        job: JobId,
        #[n(1)]
        index: u32,
        #[cbor(n(2), with = "minicbor::bytes")]
        row: Vec<u8>,
    },
}

impl EngineEvent {
    /// The job that the event speaks of; `Down` and `Up` speak of the engine.
    pub fn job(&self) -> Option<JobId> {
        match self {
            Self::Prefilled { job, .. }
            | Self::Tokens { job, .. }
            | Self::Logprobs { job, .. }
            | Self::Embedded { job, .. }
            | Self::Finished { job, .. }
            | Self::Failed { job, .. } => Some(*job),
            Self::Down { .. } | Self::Up => None,
        }
    }
}

/// Why a job ended in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum FinishReason {
    /// An end-of-generation token or a stop string.
    #[n(0)]
    Stop,
    /// `max_output` reached, or the context is full.
    #[n(1)]
    Length,
    #[n(2)]
    Cancelled,
}

/// The two ways to run, named in listing, quote and receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum Profile {
    /// Bit-identical over prefill, decode, chunking, threads and batches, for one build and instruction set.
    #[n(0)]
    Exact,
    /// Any batch mix; only the same call gives the same result.
    #[n(1)]
    Fast,
}

impl Profile {
    /// The word used in listings, quotes, receipts and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

/// What an engine is and what it runs. An engine serves one model; a node with several models runs several engines.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct EngineFacts {
    #[n(0)]
    pub model: ModelFacts,
    /// Merkle root over the model's metadata and tensors (`root::ModelRoot`).
    #[cbor(n(1), with = "minicbor::bytes")]
    pub model_root: [u8; 32],
    /// SHA-256 of the tokenizer artefact (`tokenizer_artefact`).
    #[cbor(n(2), with = "minicbor::bytes")]
    pub tokenizer_hash: [u8; 32],
    #[n(3)]
    pub profile: Profile,
    /// SHA-256 over the engine's version, build flags, compiler and target.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub build_id: [u8; 32],
    /// For example `x86_64-avx2`.
    #[n(5)]
    pub instruction_set: String,
    /// Jobs that run at once; more are queued.
    #[n(6)]
    pub slots: u32,
    /// Prompt and output tokens that one job may hold.
    #[n(7)]
    pub context: u32,
    /// Most positions in one batch, so the longest that a cancellation waits.
    #[n(8)]
    pub batch: u32,
    /// Measured on this machine; absent until it was.
    #[n(9)]
    pub speed: Option<Speed>,
}

/// Measured speeds in thousandths of a token per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Speed {
    #[n(0)]
    pub prefill_millitokens_per_s: u64,
    /// One job alone.
    #[n(1)]
    pub decode_millitokens_per_s: u64,
}

/// The engine takes no commands now: its process died or it was shut down. An `Up` event may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine is down")]
pub struct EngineDown;

/// A running model.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Facts as of now; they outlive a `Down`.
    fn facts(&self) -> EngineFacts;

    /// Hands a command over and returns at once; the outcome comes as events.
    fn send(&self, command: Command) -> Result<(), EngineDown>;

    /// The next event, in order. One reader at a time; dropping the future loses no event. `None` once the engine was
    /// shut down for good and every event was read.
    async fn next_event(&self) -> Option<EngineEvent>;

    /// Whether it takes commands now.
    fn is_up(&self) -> bool;
}

/// The ids with a meaning of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct SpecialTokens {
    #[n(0)]
    pub bos: Option<u32>,
    #[n(1)]
    pub eos: Option<u32>,
    /// Every id that ends a generation (end of text, of turn, of message), `eos` among them.
    #[n(2)]
    pub eog: BTreeSet<u32>,
    /// The model expects `bos` before a prompt; `tokenize` with `add_special` puts it there.
    #[n(3)]
    pub add_bos: bool,
}

/// Why a tokenizer gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum TokenizerError {
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    #[n(0)]
    UnknownToken {
        #[n(0)]
        token: u32,
        #[n(1)]
        vocab: u32,
    },
    #[error("a text of {bytes} bytes is over the limit of {limit}")]
    #[n(1)]
    TooLong {
        #[n(0)]
        bytes: u64,
        #[n(1)]
        limit: u64,
    },
    #[error("the tokenizer failed: {reason}")]
    #[n(2)]
    Backend {
        #[n(0)]
        reason: String,
    },
}

/// Text to token ids and back. A consumer has one without weights, from the tokenizer artefact.
#[async_trait]
pub trait Tokenizer: Send + Sync {
    /// `add_special` puts BOS (and whatever the model wants) around the text; `parse_special` reads the names of
    /// control tokens in the text as those tokens. A user's own words are tokenised without it.
    async fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, TokenizerError>;

    /// The bytes of each token, which need not be valid UTF-8 by themselves. Control tokens are empty unless
    /// `special` asks for their names.
    async fn pieces(&self, ids: &[u32], special: bool) -> Result<Vec<Vec<u8>>, TokenizerError>;

    fn special(&self) -> SpecialTokens;

    fn vocab_size(&self) -> u32;

    /// The chat template that came with the model.
    fn chat_template(&self) -> Option<String>;
}
