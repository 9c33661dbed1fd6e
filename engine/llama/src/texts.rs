//! A model in memory that embeds: the engine's [`Texts`] over llama.cpp's pooled contexts.
//!
//! | the model | a text is computed | a batch holds |
//! |---|---|---|
//! | sees both directions, or pools all rows | whole, in one batch of up to the context | one text; in the fast profile as many as fit |
//! | writes to the right and takes the last row | in pieces of at most [`BATCH`] positions | the same |
//!
//! On the processor only: an embedding model is small beside those that write.

use std::sync::Arc;
use std::time::Instant;

use satgrid_engine::embedder::{EmbedShape, TextRun, Texts};
use satgrid_engine::facts::{ModelFacts, Pooling};
use satgrid_engine::port::{Profile, Speed};

use crate::backend::{OpenError, check_slots, check_start, context_of};
use crate::ffi::{BatchRow, Context, ContextConfig, Model, ModelConfig};
use crate::settings::{BATCH, EngineSettings};

/// Positions of the measurement at start.
const MEASURE: u32 = 128;

/// See the module.
pub(crate) struct LlamaTexts {
    context: Context,
}

impl LlamaTexts {
    /// Loads the model and takes the context's memory. `progress` hears thousandths of the load.
    pub(crate) fn open(
        settings: &EngineSettings,
        facts: &ModelFacts,
        progress: impl FnMut(u32),
    ) -> Result<(LlamaTexts, EmbedShape), OpenError> {
        check_start(settings.profile)?;
        check_slots(settings.slots)?;
        if let Some(device) = settings.offload.device.as_ref().filter(|_| !settings.offload.wants_processor()) {
            return Err(OpenError::EmbedsOnProcessor { device: device.clone() });
        }
        let exact = settings.profile == Profile::Exact;
        let config = ModelConfig { path: &settings.model, vocab_only: false, repack: !exact, offload: None };
        let model = Model::load(&config, progress)?;
        if model.pooled_width() != model.width() {
            return Err(OpenError::OddRows { width: model.width(), pooled: model.pooled_width() });
        }
        let context = context_of(settings.context, model.trained_context())?;
        let whole = facts.pooling != Some(Pooling::Last) || facts.both_ways;
        let batch = if whole { context.max(BATCH) } else { BATCH };
        let shape =
            EmbedShape { slots: settings.slots, context, vocab: model.vocab_size(), batch, whole, alone: exact };
        let config = ContextConfig {
            slots: shape.slots,
            context,
            batch,
            outputs: batch,
            threads: settings.threads,
            unified: !exact,
            flash: !exact,
            capture: false,
            card: None,
            pooled: true,
        };
        match Context::new(Arc::new(model), &config, None) {
            Some(made) if made.positions_per_slot() >= context => Ok((LlamaTexts { context: made }, shape)),
            Some(_) | None => Err(OpenError::NoMemory { slots: shape.slots, context }),
        }
    }

    /// Texts read in a second; there is nothing else to measure.
    pub(crate) fn measure(&mut self, shape: &EmbedShape) -> Option<Speed> {
        let count = MEASURE.min(shape.context);
        let ids: Vec<u32> = (0..count).map(|at| (at * 97 + 5) % shape.vocab.max(1)).collect();
        let run = TextRun { slot: 0, from: 0, ids: &ids, ends: true };
        // Once for the caches, the threads and the pages of the weights.
        let mut took = None;
        for _ in 0..2 {
            let begin = Instant::now();
            let done = self.evaluate(&[run]);
            self.clear(0);
            done.ok()?;
            took = Some(begin.elapsed());
        }
        let millitokens = f64::from(count) * 1_000.0 / took?.as_secs_f64().max(1e-6);
        // Without output, what is asked of a provider is how fast it reads.
        let speed = millitokens as u64;
        Some(Speed { prefill_millitokens_per_s: speed, decode_millitokens_per_s: speed })
    }
}

impl Texts for LlamaTexts {
    fn evaluate(&mut self, runs: &[TextRun<'_>]) -> Result<Vec<Vec<f32>>, String> {
        let rows: Vec<BatchRow> = runs
            .iter()
            .flat_map(|run| {
                let slot = run.slot;
                (run.from..).zip(run.ids).map(move |(position, &token)| BatchRow {
                    slot,
                    position,
                    token,
                    output: true,
                })
            })
            .collect();
        self.context.decode(&rows).map_err(|error| error.to_string())?;
        let ends = runs.iter().filter(|run| run.ends);
        ends.map(|run| self.context.pooled(run.slot).map(<[f32]>::to_vec).map_err(|error| error.to_string())).collect()
    }

    fn clear(&mut self, slot: u32) {
        self.context.truncate(slot, 0);
    }
}
