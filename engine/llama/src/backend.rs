//! A model in memory as the scheduler's backend: loading, checks of the settings against the model, and the calls.

use std::io::BufReader;
use std::sync::Arc;
use std::time::{Duration, Instant};

use satgrid_engine::gguf::Gguf;
use satgrid_engine::memory::ContextShape;
use satgrid_engine::port::{JobId, Profile};

use crate::crowd::{Governor, SAMPLE, time_in_run_queue};
use crate::devices::{Device, PlaceError, needs_trial};
use crate::facts::is_exact;
use crate::ffi::{BatchRow, Context, ContextConfig, DecodeError, ExpertHook, LoadError, Model, ModelConfig};
use crate::placed::Placed;
use crate::scheduler::{Backend, Computes, Shape};
use crate::settings::{BATCH, DEFAULT_CONTEXT, EngineSettings, MAX_SLOTS, TILED_PRODUCT};

/// How long the prompts of others may hold up running streams, between two of their tokens.
const STALL_MS: u64 = 400;
/// Least positions of a prompt's piece beside running streams; also the shortest piece whose speed tells anything.
const LEAST_PIECE: u32 = 16;
/// Most batches of prompts between two steps, on a card that reads them in less than the time above: beyond that the steps are
/// full enough.
const MOST_PIECES: u32 = 4;

/// Why a model does not run with these settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{slots} slots: 1 to {MAX_SLOTS} are possible")]
    Slots { slots: u32 },
    #[error("a context of {asked} is longer than the {trained} that the model was trained for")]
    ContextTooLong { asked: u32, trained: u32 },
    #[error("no memory for {slots} slots of {context} positions")]
    NoMemory { slots: u32, context: u32 },
    #[error("the exact profile needs {TILED_PRODUCT}=0 in the environment from the start of the process")]
    TiledProduct,
    #[error("writing the model of the known answer to the temporary folder: {0}")]
    KnownAnswer(std::io::Error),
    #[error("the device: {0}")]
    Place(#[from] PlaceError),
    #[error(
        "{device} does not keep the exact profile: a prompt in one batch and the same prompt in pieces give other bits \
         (set profile = \"fast\", or device = \"cpu\")"
    )]
    NotExact { device: String },
    #[error("a model that embeds runs on the processor, not on {device} (take `device` out)")]
    EmbedsOnProcessor { device: String },
    #[error("its pooled rows have {pooled} numbers and its hidden ones {width}: such models are not run yet")]
    OddRows { width: u32, pooled: u32 },
    #[error("this build needs a processor with {feature}")]
    Processor { feature: &'static str },
}

/// One context over one model.
pub(crate) struct LlamaBackend {
    context: Context,
    eog: Vec<u32>,
    governor: Governor,
    /// Batch time since the last look at the run queue, and what it said then.
    batch_time: Duration,
    queued: Option<Duration>,
    /// Running mean of a prompt's positions per second.
    prefill_per_s: Option<f64>,
    card: Option<Device>,
}

impl LlamaBackend {
    /// Loads the model and takes the context's memory. `progress` hears thousandths of the load.
    pub(crate) fn open(settings: &EngineSettings, progress: impl FnMut(u32)) -> Result<(Self, Shape), OpenError> {
        Self::open_with(settings, None, 0, progress)
    }

    /// As [`LlamaBackend::open`]; a trunk brings who finds its experts' rows, a lead that guesses wants more rows of logits.
    pub(crate) fn open_with(
        settings: &EngineSettings,
        hook: Option<Box<dyn ExpertHook>>,
        outputs: u32,
        progress: impl FnMut(u32),
    ) -> Result<(Self, Shape), OpenError> {
        check_start(settings.profile)?;
        check_slots(settings.slots)?;
        let exact = settings.profile == Profile::Exact;
        // A trunk's trial would have to be paid for, so in the exact profile it is the processor's, which needs none.
        let placed = if hook.is_some() && exact { Placed::on_processor() } else { Self::place(settings)? };
        let config = ModelConfig { path: &settings.model, vocab_only: false, repack: !exact, offload: placed.offload };
        let model = Model::load(&config, progress)?;
        let context = context_of(settings.context, model.trained_context())?;
        let shape = Shape {
            profile: settings.profile,
            slots: settings.slots,
            context,
            vocab: model.vocab_size(),
            batch: BATCH,
            prefill_beside_streams: BATCH / 4,
            guess: false,
        };
        // Each sequence ends a batch with one row at most whose logits are drawn from.
        let outputs = outputs.max(shape.slots);
        let mut backend = Self::new(Arc::new(model), &shape, outputs, settings.threads, hook)?;
        placed.tell("the model is");
        if let Some(device) = placed.card() {
            if needs_trial(&placed.placement, settings.profile) && !matches!(is_exact(&mut backend, &shape), Ok(true)) {
                return Err(OpenError::NotExact { device: device.name.clone() });
            }
            backend.card = Some(device.clone());
        }
        Ok((backend, shape))
    }

    /// Where the model goes, by its file's table. A file without one is the loader's to refuse.
    fn place(settings: &EngineSettings) -> Result<Placed, PlaceError> {
        let file = std::fs::File::open(&settings.model).ok();
        let Some(gguf) = file.and_then(|file| Gguf::read(&mut BufReader::new(file)).ok()) else {
            return Ok(Placed::on_processor());
        };
        let trained = gguf.arch_uint("context_length").and_then(|n| u32::try_from(n).ok()).unwrap_or(DEFAULT_CONTEXT);
        let shape = ContextShape {
            slots: settings.slots,
            context: if settings.context == 0 { trained.min(DEFAULT_CONTEXT) } else { settings.context.min(trained) },
            batch: BATCH,
            outputs: settings.slots,
            flash: settings.profile == Profile::Fast,
        };
        Placed::of(&gguf, &settings.offload, &shape, None)
    }

    /// The card that the model is on, if it is on one.
    pub(crate) fn card(&self) -> Option<&Device> {
        self.card.as_ref()
    }

    /// A context of this shape over a model that is loaded, for batches with at most `outputs` rows of logits.
    pub(crate) fn new(
        model: Arc<Model>,
        shape: &Shape,
        outputs: u32,
        threads: u32,
        hook: Option<Box<dyn ExpertHook>>,
    ) -> Result<Self, OpenError> {
        let exact = shape.profile == Profile::Exact;
        let config = ContextConfig {
            slots: shape.slots,
            context: shape.context,
            batch: shape.batch,
            outputs,
            threads,
            // A pool of cells for each sequence: a row looks at its own sequence's alone, and what idle ones hold costs nothing. The
            // library then computes a mixed batch in parts, by sequence, which a hook that counts rows cannot follow.
            unified: !exact && hook.is_some(),
            flash: !exact,
            capture: false,
            card: None,
            pooled: false,
        };
        let no_memory = OpenError::NoMemory { slots: shape.slots, context: shape.context };
        let eog = (0..model.vocab_size()).filter(|&token| model.is_eog(token)).collect();
        match Context::new(model, &config, hook) {
            Some(context) if context.positions_per_slot() >= shape.context => {
                let (governor, batch_time, queued) = (Governor::new(threads), Duration::ZERO, time_in_run_queue());
                Ok(Self { context, eog, governor, batch_time, queued, prefill_per_s: None, card: None })
            }
            Some(_) | None => Err(no_memory),
        }
    }
}

impl LlamaBackend {
    /// How many positions of a prompt may stand between two steps of running streams, so that these do not stall for longer
    /// than [`STALL_MS`]; `None` before the first prompt.
    pub(crate) fn piece_beside_streams(&self) -> Option<u32> {
        // A float too large or not a number becomes the nearest bound.
        let positions = (self.prefill_per_s? * STALL_MS as f64 / 1000.0) as u32;
        Some(positions.clamp(LEAST_PIECE, MOST_PIECES * BATCH))
    }

    fn mind_the_pace(&mut self, rows: &[BatchRow], took: Duration) {
        let one_prompt = rows.first().map(|row| row.slot) == rows.last().map(|row| row.slot);
        if one_prompt && rows.len() >= LEAST_PIECE as usize {
            let now = rows.len() as f64 / took.as_secs_f64().max(1e-6);
            self.prefill_per_s = Some(self.prefill_per_s.map_or(now, |mean| mean * 0.75 + now * 0.25));
        }
    }

    /// After a batch: looks now and then whether our threads had to wait for others, and takes fewer or more.
    fn mind_the_crowd(&mut self, batch_time: Duration) {
        self.batch_time += batch_time;
        if self.batch_time < SAMPLE {
            return;
        }
        let (Some(before), Some(now)) = (self.queued, time_in_run_queue()) else { return };
        let threads = self.governor.threads();
        self.governor.sample(self.batch_time, now.saturating_sub(before));
        if self.governor.threads() != threads {
            self.context.set_threads(self.governor.threads());
            tracing::debug!(threads = self.governor.threads(), "computing with another number of threads");
        }
        (self.batch_time, self.queued) = (Duration::ZERO, Some(now));
    }
}

impl LlamaBackend {
    /// As `evaluate`, over hidden rows instead of tokens: the last layers of a model.
    pub(crate) fn evaluate_hidden(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<(), DecodeError> {
        let begin = Instant::now();
        let result = self.context.decode_hidden(rows, hidden);
        self.mind_the_crowd(begin.elapsed());
        result
    }
}

impl Computes for LlamaBackend {
    fn evaluate(&mut self, rows: &[BatchRow]) -> Result<(), DecodeError> {
        let begin = Instant::now();
        let result = self.context.decode(rows);
        let took = begin.elapsed();
        self.mind_the_crowd(took);
        self.mind_the_pace(rows, took);
        result
    }
}

impl Backend for LlamaBackend {
    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        self.context.logits(row)
    }

    fn truncate(&mut self, slot: u32, from: u32) -> bool {
        self.context.truncate(slot, from)
    }

    fn is_eog(&self, token: u32) -> bool {
        self.eog.binary_search(&token).is_ok()
    }

    fn eog(&self) -> &[u32] {
        &self.eog
    }

    fn piece(&self, token: u32) -> Vec<u8> {
        self.context.model().piece(token, false).unwrap_or_default()
    }

    fn seated(&mut self, slot: u32, job: JobId, _prompt: u32) {
        self.context.seated(slot, job);
    }
}

/// What must hold before a model is loaded.
pub(crate) fn check_start(profile: Profile) -> Result<(), OpenError> {
    check_processor()?;
    if profile == Profile::Exact && std::env::var_os(TILED_PRODUCT).is_none_or(|value| value != "0") {
        return Err(OpenError::TiledProduct);
    }
    Ok(())
}

/// So many sequences can be held at once.
pub(crate) fn check_slots(slots: u32) -> Result<(), OpenError> {
    if slots == 0 || slots > MAX_SLOTS {
        return Err(OpenError::Slots { slots });
    }
    Ok(())
}

/// Positions of each sequence, of what was asked for (0 for the model's own) and what the model was trained for.
pub(crate) fn context_of(asked: u32, trained: u32) -> Result<u32, OpenError> {
    match asked {
        0 => Ok(trained.clamp(1, DEFAULT_CONTEXT)),
        asked if asked > trained => Err(OpenError::ContextTooLong { asked, trained }),
        asked => Ok(asked),
    }
}

/// Refuses to start where the first product would be an illegal instruction.
pub(crate) fn check_processor() -> Result<(), OpenError> {
    #[cfg(target_arch = "x86_64")]
    {
        let built_with = crate::ffi::system_info();
        let missing = |name: &str, present: bool| built_with.contains(&format!("{name} = 1")) && !present;
        if missing("AVX2", std::is_x86_feature_detected!("avx2")) {
            return Err(OpenError::Processor { feature: "AVX2" });
        }
        if missing("AVX512", std::is_x86_feature_detected!("avx512f")) {
            return Err(OpenError::Processor { feature: "AVX-512" });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_engine::tiny::TinyModel;

    const SLOTS: u32 = 4;
    /// Of two orders of summing the same products.
    const ROUNDING: f32 = 1e-4;

    fn backend() -> LlamaBackend {
        let path = std::env::temp_dir().join(format!("satgrid-mixed-{}.gguf", std::process::id()));
        std::fs::write(&path, TinyModel::default().to_bytes().unwrap()).unwrap();
        let settings = EngineSettings {
            model: path.clone(),
            profile: Profile::Fast,
            threads: 1,
            slots: SLOTS,
            context: 256,
            offload: Default::default(),
        };
        let (backend, _) = LlamaBackend::open(&settings, |_| {}).unwrap();
        std::fs::remove_file(path).unwrap();
        backend
    }

    fn row(slot: u32, position: u32, output: bool) -> BatchRow {
        BatchRow { slot, position, token: 3 + (slot * 31 + position * 7) % 200, output }
    }

    fn rows(slot: u32, positions: std::ops::Range<u32>) -> Vec<BatchRow> {
        let last = positions.end - 1;
        positions.map(|position| row(slot, position, position == last)).collect()
    }

    #[test]
    fn rows_of_streams_and_prompts_in_one_batch_are_what_each_is_alone() {
        // Two streams, at 9 and at 40; a prompt's next piece; the first piece of another.
        let (before, mixed) = (
            [rows(0, 0..9), rows(1, 0..40), rows(2, 0..16)],
            [rows(0, 9..10), rows(1, 40..41), rows(2, 16..49), rows(3, 0..21)],
        );
        let mut together = backend();
        before.iter().for_each(|piece| together.evaluate(piece).unwrap());
        let batch = mixed.concat();
        together.evaluate(&batch).unwrap();
        let mut alone = backend();
        before.iter().for_each(|piece| alone.evaluate(piece).unwrap());
        let mut at = 0;
        for piece in &mixed {
            alone.evaluate(piece).unwrap();
            at += piece.len();
            let (one, other) = (alone.logits(piece.len() - 1).unwrap(), together.logits(at - 1).unwrap());
            let apart = one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < ROUNDING, "slot {}: {apart} apart", piece[0].slot);
            let spread = one.iter().fold(f32::MIN, |a, &b| a.max(b)) - one.iter().fold(f32::MAX, |a, &b| a.min(b));
            assert!(spread > 100.0 * ROUNDING, "logits that say nothing: {spread}");
        }
        assert!(alone.logits(0).is_err(), "its logits were not asked for");
    }
}
