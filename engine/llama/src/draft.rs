//! A small model that guesses what a large one says next, behind the port of `satgrid_engine::draft`.
//!
//! It keeps a sequence for each slot of the large one, reads what that said, and draws as that will draw: from its own numbers,
//! with the job's sampling, at the same place of the text. So a sampled text is guessed as often as both models agree. Where the text
//! repeats itself, that is asked first: it costs nothing. All of it runs on the engine's one thread; of a prompt a piece is read
//! at each step, and nothing is guessed by the model before it has read all.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use satgrid_engine::draft::{Drafter, Lookup, Pace};
use satgrid_engine::port::Job;
use satgrid_engine::sampling::{Sampling, draw};

use crate::ffi::{BatchRow, Context, ContextConfig, DecodeError, Model, ModelConfig};
use crate::scheduler::common_start;

/// Positions of a prompt that are read at one step: other streams wait for as long.
const PIECE: u32 = 128;

/// The model. Clones share it.
#[derive(Clone)]
pub(crate) struct DraftModel(Arc<Mutex<Small>>);

struct Small {
    context: Context,
    /// What each sequence holds.
    held: Vec<Vec<u32>>,
}

/// What the small model has to fit.
pub(crate) struct Fits<'a> {
    pub(crate) slots: u32,
    pub(crate) context: u32,
    pub(crate) threads: u32,
    /// The pieces of the large model's vocabulary.
    pub(crate) vocab: u32,
    pub(crate) piece: &'a dyn Fn(u32) -> Vec<u8>,
}

impl DraftModel {
    /// Loads a whole model with the same vocabulary. The error is for the person who gave the path.
    pub(crate) fn open(path: &Path, fits: &Fits<'_>) -> Result<Self, String> {
        let config = ModelConfig { path, vocab_only: false, repack: true, offload: None };
        let model = Model::load(&config, |_| {}).map_err(|error| error.to_string())?;
        let refused = |why: String| Err(format!("{} cannot guess for this model: {why}", path.display()));
        if !model.has_tokenizer() || model.vocab_size() != fits.vocab {
            return refused(format!("it has {} tokens, the model has {}", model.vocab_size(), fits.vocab));
        }
        let piece = |token| model.piece(token, false).unwrap_or_default();
        if let Some(token) = (0..fits.vocab).find(|&token| piece(token) != (fits.piece)(token)) {
            return refused(format!("token {token} is another one there"));
        }
        let wanted = ContextConfig {
            slots: fits.slots,
            context: fits.context,
            batch: PIECE,
            outputs: fits.slots,
            threads: fits.threads,
            unified: false,
            flash: true,
            capture: false,
            card: None,
            pooled: false,
        };
        let Some(context) = Context::new(Arc::new(model), &wanted, None) else {
            return refused(format!("no memory for {} sequences of {}", fits.slots, fits.context));
        };
        Ok(Self(Arc::new(Mutex::new(Small { context, held: vec![Vec::new(); fits.slots as usize] }))))
    }

    /// Who guesses for a job in a slot.
    pub(crate) fn drafter(&self, slot: u32, job: &Job) -> Box<dyn Drafter> {
        Box::new(Drafted {
            model: self.clone(),
            slot,
            sampling: job.sampling.clone(),
            prompt: job.prompt.len(),
            resumed: job.resumed,
            lookup: Lookup::default(),
            pace: Pace::default(),
            by_model: false,
        })
    }
}

struct Drafted {
    model: DraftModel,
    slot: u32,
    sampling: Sampling,
    prompt: usize,
    resumed: u32,
    lookup: Lookup,
    pace: Pace,
    /// Whose the last guess was.
    by_model: bool,
}

impl Drafter for Drafted {
    fn guess(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        let found = self.lookup.guess(tokens, most);
        self.by_model = found.is_empty();
        if !self.by_model {
            return found;
        }
        let most = self.pace.step(most);
        if most == 0 {
            return Vec::new();
        }
        let (sampling, prompt, resumed) = (&self.sampling, self.prompt, self.resumed);
        let draws = |logits: &[f32], known: &[u32]| {
            let said = u32::try_from(known.len().saturating_sub(prompt)).unwrap_or(u32::MAX);
            draw(logits, known, sampling, resumed.saturating_add(said))
        };
        let mut small = self.model.0.lock().unwrap_or_else(PoisonError::into_inner);
        small.guess(self.slot, tokens, most, draws).unwrap_or_else(|error| {
            // A step without a guess is a step like any other; what the sequence holds is read again.
            tracing::debug!(%error, "the small model does not guess");
            small.empty(self.slot);
            Vec::new()
        })
    }

    fn verified(&mut self, guessed: usize, right: usize) {
        match self.by_model {
            true => self.pace.verified(guessed, right),
            false => self.lookup.verified(guessed, right),
        }
    }
}

impl Small {
    fn empty(&mut self, slot: u32) {
        self.context.truncate(slot, 0);
        if let Some(held) = self.held.get_mut(slot as usize) {
            held.clear();
        }
    }

    fn guess(
        &mut self,
        slot: u32,
        tokens: &[u32],
        most: usize,
        draws: impl Fn(&[f32], &[u32]) -> Option<u32>,
    ) -> Result<Vec<u32>, DecodeError> {
        let Some(mut row) = self.read(slot, tokens)? else { return Ok(Vec::new()) };
        let mut known = tokens.to_vec();
        while let Some(token) = draws(self.context.logits(row)?, &known) {
            known.push(token);
            let is_last = known.len() - tokens.len() >= most || self.context.model().is_eog(token);
            if is_last || known.len() >= self.context.positions_per_slot() as usize {
                break;
            }
            row = self.extend(slot, known.len() - 1, &[token], true)?;
        }
        Ok(known.split_off(tokens.len()))
    }

    /// Reads a piece of what the sequence lacks of the text; the last token's row once nothing is left to read.
    fn read(&mut self, slot: u32, tokens: &[u32]) -> Result<Option<usize>, DecodeError> {
        let (Some(held), Some(last)) = (self.held.get_mut(slot as usize), tokens.len().checked_sub(1)) else {
            return Ok(None);
        };
        if tokens.len() > self.context.positions_per_slot() as usize {
            return Ok(None);
        }
        // The last token is always computed: its logits are not kept.
        let common = common_start(held, tokens).min(last);
        if held.len() > common {
            let from = u32::try_from(common).unwrap_or(u32::MAX);
            if !self.context.truncate(slot, from) {
                self.empty(slot);
                return Ok(None);
            }
            held.truncate(common);
        }
        let upto = tokens.len().min(common + PIECE as usize);
        let whole = upto == tokens.len();
        let row = self.extend(slot, common, &tokens[common..upto], whole)?;
        Ok(whole.then_some(row))
    }

    /// Computes what follows in a sequence; the place of the last row in the batch.
    fn extend(&mut self, slot: u32, from: usize, tokens: &[u32], output: bool) -> Result<usize, DecodeError> {
        let last = tokens.len().saturating_sub(1);
        let rows: Vec<BatchRow> = tokens
            .iter()
            .enumerate()
            .map(|(at, &token)| {
                let position = u32::try_from(from + at).unwrap_or(u32::MAX);
                BatchRow { slot, position, token, output: output && at == last }
            })
            .collect();
        self.context.decode(&rows)?;
        if let Some(held) = self.held.get_mut(slot as usize) {
            held.extend_from_slice(tokens);
        }
        Ok(last)
    }
}
