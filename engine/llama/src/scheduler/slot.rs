//! One slot of the context, and the job that runs in it.

use std::collections::VecDeque;
use std::sync::Arc;

use satgrid_engine::draft::Drafter;
use satgrid_engine::grammar::{Constraint, Vocabulary};
use satgrid_engine::port::{Job, Logprobs};
use satgrid_engine::sampling::{draw, logprobs};
use satgrid_engine::stop::StopMatcher;

use super::{Backend, to_u32};
use crate::plan::Progress;

#[derive(Default)]
pub(super) struct Slot {
    pub(super) running: Option<Running>,
    /// Tokens in the sequence while no job runs.
    pub(super) idle: Vec<u32>,
    pub(super) session: Option<[u8; 32]>,
    pub(super) used: u64,
    /// Rows of it are sent and not back: until then nothing else happens to it.
    pub(super) away: bool,
    /// Its job was cancelled while they were.
    pub(super) cancelled: bool,
}

pub(super) struct Waiting {
    pub(super) job: Job,
    pub(super) grant: Grant,
}

/// Granted positions of the prompt and granted output tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Grant {
    pub(super) prompt: u32,
    pub(super) output: u32,
}

pub(super) struct Running {
    pub(super) job: Job,
    pub(super) grant: Grant,
    /// Prompt, then every token drawn.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt: u32,
    /// Positions in the cache.
    pub(super) at: u32,
    /// Positions that were there before.
    pub(super) cached: u32,
    /// Covered and cached positions last told.
    pub(super) told: (u32, u32),
    /// Output tokens told.
    pub(super) emitted: u32,
    /// Output tokens at which the job ends.
    pub(super) limit: u32,
    pub(super) stop: StopMatcher,
    /// The job's grammar, at the last token drawn; and the number of output tokens after which nothing may follow.
    constraint: Option<Constraint>,
    pub(super) over_after: Option<u32>,
    /// Of tokens that are drawn and not told.
    pub(super) logprobs: VecDeque<Logprobs>,
    /// The last batch that it had rows in.
    pub(super) served: u64,
    pub(super) drafter: Box<dyn Drafter>,
    /// False once the session is forgotten: nothing stays after the job.
    pub(super) keep: bool,
}

/// The job's grammar at work, after what an earlier run of the same request has said.
pub(super) fn constraint(job: &Job, vocabulary: Option<Arc<Vocabulary>>) -> Result<Option<Constraint>, String> {
    let (Some(grammar), Some(vocabulary)) = (&job.extras.grammar, vocabulary) else { return Ok(None) };
    let mut constraint = Constraint::new(grammar, vocabulary).map_err(|error| error.to_string())?;
    if !constraint.resume(job.resumed_tokens()).map_err(|error| error.to_string())? {
        return Err("the output to be resumed does not follow the grammar".to_owned());
    }
    Ok(Some(constraint))
}

impl Slot {
    pub(super) fn clear(&mut self) {
        self.idle.clear();
        self.session = None;
    }

    pub(super) fn progress(&self, slot: u32) -> Option<Progress> {
        let running = self.running.as_ref().filter(|_| !self.away)?;
        let upto = if running.at < running.prompt {
            running.prompt.min(running.grant.prompt)
        } else {
            // Position p yields output p - prompt + 1, which must be granted; the tokens must be known.
            let granted = running.prompt.saturating_add(running.grant.output).saturating_sub(1);
            granted.min(to_u32(running.tokens.len()))
        };
        Some(Progress { slot, at: running.at, prompt: running.prompt, upto, served: running.served })
    }
}

impl Grant {
    pub(super) fn raise(&mut self, other: Self) {
        self.prompt = self.prompt.max(other.prompt);
        self.output = self.output.max(other.output);
    }
}

impl Running {
    pub(super) fn new(
        mut job: Job,
        grant: Grant,
        (slot, cached): (u32, u32),
        limit: u32,
        constraint: Option<Constraint>,
        backend: &impl Backend,
    ) -> Self {
        let prompt = to_u32(job.prompt.len());
        if job.ignore_eos {
            job.sampling.forbid(backend.eog().iter().copied());
        }
        let mut stop = StopMatcher::new(&job.stop);
        let resumed = job.prompt.len().saturating_sub(job.resumed as usize);
        for &token in job.prompt.iter().skip(resumed) {
            stop.push(&backend.piece(token));
        }
        let tokens = job.prompt.clone();
        let over_after = constraint.as_ref().is_some_and(Constraint::is_over).then_some(0);
        let (told, emitted, served) = ((0, 0), 0, 0);
        let drafter = backend.drafter(slot, &job);
        Self {
            job,
            grant,
            tokens,
            prompt,
            at: cached,
            cached,
            told,
            emitted,
            limit,
            stop,
            constraint,
            over_after,
            logprobs: VecDeque::new(),
            served,
            drafter,
            keep: true,
        }
    }

    /// What may follow the tokens that are known, as far as grants, the job's end and `room` in the batch allow.
    pub(super) fn guess(&mut self, room: u32) -> Vec<u32> {
        if to_u32(self.tokens.len()) != self.at + 1 {
            return Vec::new();
        }
        // Position p yields output p - prompt + 1: the last one that may be said bounds the last that is worth computing.
        let last = self.prompt.saturating_add(self.grant.output.min(self.limit)).saturating_sub(2);
        let most = last.saturating_sub(self.at).min(room);
        self.drafter.guess(&self.tokens, most as usize)
    }

    /// Draws the next token from the logits of a row.
    pub(super) fn draw(&mut self, row: usize, backend: &mut impl Backend) -> Result<u32, String> {
        let index = to_u32(self.tokens.len()).saturating_sub(self.prompt);
        let logits = backend.logits(row).map_err(|error| error.to_string())?;
        let position = self.job.resumed.saturating_add(index);
        let sampling = &self.job.sampling;
        let drawn = match &self.constraint {
            Some(constraint) => constraint.draw(logits, &self.tokens, sampling, position).map_err(|e| e.to_string())?,
            None => draw(logits, &self.tokens, sampling, position),
        };
        let token = drawn.ok_or_else(|| "no token is possible".to_owned())?;
        self.logprobs.extend(self.job.extras.top_logprobs.map(|top| logprobs(logits, token, top)));
        if let Some(constraint) = self.constraint.as_mut() {
            constraint.accept(token).map_err(|error| error.to_string())?;
            self.over_after = constraint.is_over().then_some(index + 1);
        }
        Ok(token)
    }

    /// Feeds a told token to the stop strings; true once one is complete.
    pub(super) fn stops_at(&mut self, token: u32, backend: &impl Backend) -> bool {
        self.stop.push(&backend.piece(token));
        self.stop.stopped()
    }
}
