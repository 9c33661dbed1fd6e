//! A job: what it holds, what is wrong with it before it starts, and how it fails.

use minicbor::{Decode, Encode};

use crate::grammar::{Grammar, GrammarError};
use crate::sampling::{MAX_TOP_LOGPROBS, Sampling, SamplingError};

/// Most stop strings in one job, and most bytes in one of them.
pub const MAX_STOPS: usize = 16;
pub const MAX_STOP_BYTES: usize = 256;
/// Most texts that one job embeds.
pub const MAX_TEXTS: usize = 2048;

/// Names a job between the node and one engine. The node chooses it and never uses one twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct JobId(#[n(0)] pub u64);

/// One prompt to continue.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Job {
    #[n(0)]
    pub id: JobId,
    /// Whose prefix cache may be used: a session never sees, nor gains time from, another session's prompts.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub session: [u8; 32],
    /// Token ids, at least one, fewer than the context.
    #[n(2)]
    pub prompt: Vec<u32>,
    #[n(3)]
    pub sampling: Sampling,
    /// The job ends with `Length` at this many output tokens, or earlier where the context is full.
    #[n(4)]
    pub max_output: u32,
    /// The job ends with `Stop` at the token that completes one of these. At most [`MAX_STOPS`], none empty.
    #[n(5)]
    pub stop: Vec<String>,
    /// End-of-generation tokens are never drawn.
    #[n(6)]
    pub ignore_eos: bool,
    /// After a failover the prompt ends with output of an earlier run of the same request: this many tokens. Draws,
    /// penalties and stop strings go on from there; output indices, `max_output` and usage start at 0 as ever.
    /// Otherwise 0.
    #[n(7)]
    pub resumed: u32,
    #[n(8)]
    pub extras: Extras,
}

/// What most jobs do without.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
pub struct Extras {
    /// The output's text is one that this grammar allows; the job ends with `Stop` where nothing more may follow.
    #[n(0)]
    pub grammar: Option<Grammar>,
    /// Tell the log probability of each token and of this many likeliest ones, at most [`MAX_TOP_LOGPROBS`].
    #[n(1)]
    pub top_logprobs: Option<u32>,
    /// The prompt is texts to be embedded, one after the other, of so many tokens each; then there is no output.
    #[n(2)]
    pub embed: Option<Vec<u32>>,
}

impl Job {
    /// The position by which output token `index` is drawn: the output of earlier runs counts.
    pub fn draw_position(&self, index: u32) -> u32 {
        self.resumed.saturating_add(index)
    }

    /// The tokens that an earlier run already sent; they prime the stop matcher.
    pub fn resumed_tokens(&self) -> &[u32] {
        let at = self.prompt.len().saturating_sub(self.resumed as usize);
        &self.prompt[at..]
    }

    /// A model either embeds or writes: what the job asks is what this one does.
    pub fn check_kind(&self, embeds: bool) -> Result<(), JobError> {
        if self.extras.embed.is_some() == embeds { Ok(()) } else { Err(JobError::OtherKind { embeds }) }
    }

    /// The checks that every engine makes before it takes a job in.
    pub fn check(&self, context: u32, vocab: u32) -> Result<(), JobError> {
        let prompt = u32::try_from(self.prompt.len()).unwrap_or(u32::MAX);
        if prompt == 0 {
            return Err(JobError::PromptEmpty);
        }
        match &self.extras.embed {
            Some(texts) => check_texts(texts, prompt, context)?,
            None if prompt >= context => return Err(JobError::PromptTooLong { prompt, context }),
            None => {}
        }
        if let Some(&token) = self.prompt.iter().find(|&&token| token >= vocab) {
            return Err(JobError::UnknownToken { token, vocab });
        }
        if self.resumed > prompt {
            return Err(JobError::BadResume { resumed: self.resumed, prompt });
        }
        let bad = |stop: &String| stop.is_empty() || stop.len() > MAX_STOP_BYTES;
        if self.stop.len() > MAX_STOPS || self.stop.iter().any(bad) {
            return Err(JobError::BadStop);
        }
        if let Some(grammar) = &self.extras.grammar {
            grammar.check().map_err(JobError::BadGrammar)?;
        }
        if self.extras.top_logprobs.is_some_and(|top| top > MAX_TOP_LOGPROBS) {
            return Err(JobError::BadLogprobs);
        }
        self.sampling.check().map_err(JobError::Sampling)
    }
}

fn check_texts(texts: &[u32], prompt: u32, context: u32) -> Result<(), JobError> {
    let sum = texts.iter().try_fold(0_u32, |sum, length| sum.checked_add(*length));
    if texts.is_empty() || texts.len() > MAX_TEXTS || texts.contains(&0) || sum != Some(prompt) {
        return Err(JobError::BadTexts);
    }
    match texts.iter().find(|length| **length > context) {
        Some(length) => Err(JobError::PromptTooLong { prompt: *length, context }),
        None => Ok(()),
    }
}

/// Why a job was refused or broke off. All but the last two are the asker's fault and come before any work.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Encode, Decode)]
pub enum JobError {
    #[error("the prompt is empty")]
    #[n(0)]
    PromptEmpty,
    #[error("a prompt of {prompt} tokens leaves no room in a context of {context}")]
    #[n(1)]
    PromptTooLong {
        #[n(0)]
        prompt: u32,
        #[n(1)]
        context: u32,
    },
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    #[n(2)]
    UnknownToken {
        #[n(0)]
        token: u32,
        #[n(1)]
        vocab: u32,
    },
    #[error("sampling: {0}")]
    #[n(3)]
    Sampling(#[n(0)] SamplingError),
    #[error("stop strings: at most {MAX_STOPS}, each of 1 to {MAX_STOP_BYTES} bytes")]
    #[n(4)]
    BadStop,
    /// A second `Start` under the id of a job that is not over; that one goes on. A bug of the asker.
    #[error("a job of this id is not over yet")]
    #[n(5)]
    DuplicateJob,
    #[error("{resumed} resumed tokens in a prompt of {prompt}")]
    #[n(6)]
    BadResume {
        #[n(0)]
        resumed: u32,
        #[n(1)]
        prompt: u32,
    },
    #[error("grammar: {0}")]
    #[n(9)]
    BadGrammar(#[n(0)] GrammarError),
    #[error("log probabilities of at most {MAX_TOP_LOGPROBS} tokens")]
    #[n(10)]
    BadLogprobs,
    #[error("texts to embed: 1 to {MAX_TEXTS}, none empty, together the prompt")]
    #[n(11)]
    BadTexts,
    #[error("{}", if *embeds { "the model embeds texts and writes none" } else { "the model writes and embeds no texts" })]
    #[n(12)]
    OtherKind {
        /// What the model does.
        #[n(0)]
        embeds: bool,
    },
    /// More jobs than the engine queues.
    #[error("the engine has no room for another job")]
    #[n(8)]
    Busy,
    /// The model's computation failed, for example for want of memory.
    #[error("the engine failed: {reason}")]
    #[n(7)]
    Backend {
        #[n(0)]
        reason: String,
    },
}
