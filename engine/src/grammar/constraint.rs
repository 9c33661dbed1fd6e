//! A grammar at work in a job: draws only what it allows.
//!
//! The first draw is that of an unconstrained job; only where its token does not fit is another one drawn, with a seed of its own per
//! try, and after [`TRIES`] the whole vocabulary is asked. So the choice depends on (seed, position), the logits and the output so
//! far, and a token that the grammar would have allowed anyway is the one that the model would have said without it.

use std::sync::Arc;

use super::matcher::Work;
use super::{Grammar, Matcher, Overrun, Vocabulary};
use crate::sampling::{Sampling, draw};

/// Draws before the whole vocabulary is asked.
const TRIES: u64 = 8;
/// Sets the seeds of later tries apart.
const NEXT_SEED: u64 = 0x9E37_79B9_7F4A_7C15;

/// One job's grammar and where its output stands.
#[derive(Debug, Clone)]
pub struct Constraint {
    matcher: Matcher,
    vocabulary: Arc<Vocabulary>,
}

impl Constraint {
    /// A constraint at its beginning. The grammar was checked.
    pub fn new(grammar: &Grammar, vocabulary: Arc<Vocabulary>) -> Result<Self, Overrun> {
        Ok(Self { matcher: Matcher::new(Arc::new(grammar.clone()))?, vocabulary })
    }

    /// Draws the token at `position`, as [`draw`] does. `None` where no token is possible.
    pub fn draw(
        &self,
        logits: &[f32],
        history: &[u32],
        sampling: &Sampling,
        position: u32,
    ) -> Result<Option<u32>, Overrun> {
        let Some(first) = draw(logits, history, sampling, position) else { return Ok(None) };
        if self.allows(first)? {
            return Ok(Some(first));
        }
        let mut row = logits.to_vec();
        let mut sampling = sampling.clone();
        let seed = sampling.seed;
        let mut refused = first;
        for attempt in 1..=TRIES {
            if let Some(logit) = row.get_mut(refused as usize) {
                *logit = f32::NEG_INFINITY;
            }
            sampling.seed = seed ^ attempt.wrapping_mul(NEXT_SEED);
            match draw(&row, history, &sampling, position) {
                Some(token) if self.allows(token)? => return Ok(Some(token)),
                Some(token) => refused = token,
                None => return Ok(None),
            }
        }
        let mut allowed = vec![f32::NEG_INFINITY; row.len()];
        let mut allow = |token: u32| {
            if let (Some(to), Some(from)) = (allowed.get_mut(token as usize), row.get(token as usize)) {
                *to = *from;
            }
        };
        self.vocabulary.allowed(&self.matcher, &mut allow)?;
        if self.matcher.is_complete() {
            self.vocabulary.eog().iter().copied().for_each(&mut allow);
        }
        sampling.seed = seed ^ (TRIES + 1).wrapping_mul(NEXT_SEED);
        Ok(draw(&allowed, history, &sampling, position))
    }

    /// Takes a drawn token in; false where it does not fit, as with the output of an engine that follows no grammars.
    pub fn accept(&mut self, token: u32) -> Result<bool, Overrun> {
        self.accept_within(token, &mut Work::of_a_token())
    }

    /// Takes in what an earlier run of the same request has said; false where that does not fit. However long it is, it costs no
    /// more than one draw may.
    pub fn resume(&mut self, tokens: &[u32]) -> Result<bool, Overrun> {
        let mut work = Work::of_many();
        for &token in tokens {
            if !self.accept_within(token, &mut work)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn accept_within(&mut self, token: u32, work: &mut Work) -> Result<bool, Overrun> {
        match self.vocabulary.piece(token) {
            Some(piece) => self.matcher.accept_within(piece, work),
            None => Ok(self.vocabulary.eog().contains(&token) && self.matcher.is_complete()),
        }
    }

    /// Nothing may follow: the job ends here even where the model has no end-of-generation token.
    pub fn is_over(&self) -> bool {
        self.matcher.is_over()
    }

    fn allows(&self, token: u32) -> Result<bool, Overrun> {
        match self.vocabulary.piece(token) {
            Some(piece) => self.matcher.allows(piece),
            None => Ok(self.vocabulary.eog().contains(&token) && self.matcher.is_complete()),
        }
    }
}
