//! A part's layers in memory: the file proved, the model loaded, the context that computes hidden rows.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use satgrid_engine::gguf::Gguf;
use satgrid_engine::memory::ContextShape;
use satgrid_engine::part::{PartError, PartFile};
use satgrid_engine::port::{JobId, Profile, Speed};

use crate::backend::{OpenError, check_start};
use crate::devices::{Device, Offload, needs_trial};
use crate::facts::{TRIAL_CHUNK, TRIAL_ROWS, per_second};
use crate::ffi::{BatchRow, Context, ContextConfig, DecodeError, ExpertHook, Model, ModelConfig};
use crate::placed::Placed;
use crate::settings::BATCH;
use crate::stage::queue::Layers;

/// Positions of the measurement at start, in one batch and one by one.
const MEASURE_PREFILL: u32 = 64;
const MEASURE_DECODE: u32 = 8;

/// A part of a model that is what it says.
pub(crate) struct Part {
    pub(crate) gguf: Gguf,
    pub(crate) file: PartFile,
}

impl Part {
    /// Reads the whole file and proves it. The error is for the person who gave the path.
    pub(crate) fn open(path: &Path, progress: &mut dyn FnMut(u32)) -> Result<Self, String> {
        let named = |error: PartError| format!("{}: {error}", path.display());
        let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let gguf = Gguf::read(&mut reader).map_err(|error| named(error.into()))?;
        let part = PartFile::read(&gguf).map_err(named)?;
        let total = tensor_bytes(&gguf).max(1);
        let (mut done, mut told) = (0_u64, 0);
        let verified = part.verify(&gguf, &mut reader, &mut |bytes| {
            done += bytes;
            let permille = u32::try_from(done.saturating_mul(1000) / total).unwrap_or(1000);
            if permille >= told + 10 {
                told = permille;
                progress(permille);
            }
        });
        verified.map_err(named)?;
        Ok(Self { gguf, file: part })
    }
}

pub(crate) fn tensor_bytes(gguf: &Gguf) -> u64 {
    gguf.tensors.iter().fold(0, |sum, tensor| tensor.bytes.saturating_add(sum))
}

/// What a context over a part is to be.
#[derive(Debug, Clone)]
pub(crate) struct LayersConfig {
    pub(crate) profile: Profile,
    pub(crate) threads: u32,
    pub(crate) sequences: u32,
    pub(crate) context: u32,
    pub(crate) offload: Offload,
    /// Bytes that may be taken at the most, where that is set.
    pub(crate) memory: Option<u64>,
}

/// The layers of a part that is no tail.
pub(crate) struct LlamaLayers {
    context: Context,
    card: Option<Device>,
    may_use: u64,
}

impl LlamaLayers {
    /// Loads the part whose table is `gguf`, on the device that has room for it. In the exact profile a card is tried first.
    /// Of a trunk, `hook` finds its experts' rows.
    pub(crate) fn open(
        path: &Path,
        gguf: &Gguf,
        config: &LayersConfig,
        hook: Option<Box<dyn ExpertHook>>,
    ) -> Result<Self, OpenError> {
        check_start(config.profile)?;
        let exact = config.profile == Profile::Exact;
        let (slots, context) = (config.sequences, config.context);
        let shape = ContextShape { slots, context, batch: BATCH, outputs: BATCH, flash: !exact };
        let placed = Placed::of(gguf, &config.offload, &shape, config.memory)?;
        let config_of_model = ModelConfig { path, vocab_only: false, repack: !exact, offload: placed.offload };
        let model = Model::load(&config_of_model, |_| {})?;
        let wanted = ContextConfig {
            slots,
            context,
            batch: BATCH,
            outputs: BATCH,
            threads: config.threads,
            unified: !exact,
            flash: !exact,
            capture: true,
            card: placed.offload.map(|(card, _)| card),
            pooled: false,
        };
        let made = Context::new(Arc::new(model), &wanted, hook).filter(|made| made.positions_per_slot() >= context);
        let context = made.ok_or(OpenError::NoMemory { slots, context })?;
        let mut layers = Self { context, card: placed.card().cloned(), may_use: placed.may_use };
        placed.tell("the layers are");
        if needs_trial(&placed.placement, config.profile) && !matches!(layers.is_exact(config.context), Ok(true)) {
            return Err(OpenError::NotExact {
                device: placed.card().map(|card| card.name.clone()).unwrap_or_default(),
            });
        }
        Ok(layers)
    }

    /// The card that the layers are on, if they are on one.
    pub(crate) fn card(&self) -> Option<&Device> {
        self.card.as_ref()
    }

    /// Bytes that they may take here: free before they were loaded, and no more than was set.
    pub(crate) fn may_use(&self) -> u64 {
        self.may_use
    }

    pub(crate) fn width(&self) -> u32 {
        self.context.model().width()
    }

    /// Whether these layers keep the exact profile's promise where they are: the same rows give the same bits in one batch, in
    /// chunks, and one by one. Leaves slot 0 empty.
    fn is_exact(&mut self, context: u32) -> Result<bool, DecodeError> {
        let length = context.min(TRIAL_ROWS).min(BATCH);
        let mut run = |chunk: u32| -> Result<Vec<u32>, DecodeError> {
            self.truncate(0, 0);
            let mut bits = Vec::new();
            for from in (0..length).step_by(chunk.max(1) as usize) {
                let rows = self.positions(from, (from + chunk).min(length))?;
                bits.extend(rows.iter().map(|number| number.to_bits()));
            }
            Ok(bits)
        };
        let (whole, chunked, single) = (run(length)?, run(TRIAL_CHUNK)?, run(1)?);
        self.truncate(0, 0);
        Ok(!whole.is_empty() && whole == chunked && whole == single)
    }

    /// Evaluates some positions of slot 0 over made-up rows, which depend on the position alone.
    fn positions(&mut self, from: u32, upto: u32) -> Result<Vec<f32>, DecodeError> {
        let width = self.width() as usize;
        let rows: Vec<BatchRow> =
            (from..upto).map(|position| BatchRow { slot: 0, position, token: 0, output: true }).collect();
        let numbers = from as usize * width..upto as usize * width;
        // Any numbers of a usual size do.
        let hidden: Vec<f32> = numbers.map(|at| ((at * 37 % 101) as f32 - 50.0) / 50.0).collect();
        self.evaluate(&rows, &hidden)
    }

    /// Measures one sequence's prefill and decode, briefly, and leaves slot 0 empty. `None` if the model fails.
    pub(crate) fn measure(&mut self, context: u32) -> Option<Speed> {
        let prefill = MEASURE_PREFILL.min(context.saturating_sub(MEASURE_DECODE));
        if prefill == 0 {
            return None;
        }
        self.positions(0, 1).ok()?;
        self.truncate(0, 0);
        let begin = Instant::now();
        self.positions(0, prefill).ok()?;
        let prefill_millitokens_per_s = per_second(prefill, begin.elapsed());
        let mut steps = Vec::with_capacity(MEASURE_DECODE as usize);
        for at in prefill..prefill + MEASURE_DECODE {
            let begin = Instant::now();
            self.positions(at, at + 1).ok()?;
            steps.push(begin.elapsed());
        }
        // Where several nodes of a machine start together, most steps are held up by others: the third fastest was not.
        steps.sort_unstable();
        let decode_millitokens_per_s = per_second(1, *steps.get(2)?);
        self.truncate(0, 0);
        Some(Speed { prefill_millitokens_per_s, decode_millitokens_per_s })
    }
}

impl Layers for LlamaLayers {
    fn evaluate(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<Vec<f32>, DecodeError> {
        self.context.decode_hidden(rows, hidden)?;
        self.context.captured().map(<[f32]>::to_vec)
    }

    fn truncate(&mut self, slot: u32, from: u32) -> bool {
        self.context.truncate(slot, from)
    }

    fn seated(&mut self, slot: u32, job: JobId) {
        self.context.seated(slot, job);
    }
}
