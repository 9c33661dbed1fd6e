//! A part's layers in memory: the file proved, the model loaded, the context that computes hidden rows.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use satgrid_engine::gguf::Gguf;
use satgrid_engine::part::{PartError, PartFile};
use satgrid_engine::port::{Profile, Speed};

use crate::backend::{OpenError, check_start};
use crate::facts::per_second;
use crate::ffi::{BatchRow, Context, ContextConfig, DecodeError, Model, ModelConfig};
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
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayersConfig {
    pub(crate) profile: Profile,
    pub(crate) threads: u32,
    pub(crate) sequences: u32,
    pub(crate) context: u32,
}

/// The layers of a part that is no tail.
pub(crate) struct LlamaLayers {
    context: Context,
}

impl LlamaLayers {
    pub(crate) fn open(path: &Path, config: &LayersConfig) -> Result<Self, OpenError> {
        check_start(config.profile)?;
        let exact = config.profile == Profile::Exact;
        let config_of_model = ModelConfig { path, vocab_only: false, repack: !exact, offload: None };
        let model = Model::load(&config_of_model, |_| true)?;
        let context = ContextConfig {
            slots: config.sequences,
            context: config.context,
            batch: BATCH,
            outputs: BATCH,
            threads: config.threads,
            unified: !exact,
            flash: !exact,
            capture: true,
        };
        let no_memory = OpenError::NoMemory { slots: config.sequences, context: config.context };
        match Context::new(Arc::new(model), &context, None) {
            Some(context) if context.positions_per_slot() >= config.context => Ok(Self { context }),
            Some(_) | None => Err(no_memory),
        }
    }

    pub(crate) fn width(&self) -> u32 {
        self.context.model().width()
    }

    /// Measures one sequence's prefill and decode, briefly, and leaves slot 0 empty. `None` if the model fails.
    pub(crate) fn measure(&mut self, context: u32) -> Option<Speed> {
        let width = self.width() as usize;
        let row = |position| BatchRow { slot: 0, position, token: 0, output: true };
        // Any numbers of a usual size do: the time does not depend on them.
        let hidden = |rows: u32| (0..rows as usize * width).map(|at| ((at * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let run = |layers: &mut Self, from: u32, upto: u32| {
            let rows: Vec<BatchRow> = (from..upto).map(row).collect();
            let numbers: Vec<f32> = hidden(upto - from);
            layers.evaluate(&rows, &numbers).ok()
        };
        let prefill = MEASURE_PREFILL.min(context.saturating_sub(MEASURE_DECODE));
        if prefill == 0 {
            return None;
        }
        run(self, 0, 1)?;
        self.truncate(0, 0);
        let begin = Instant::now();
        run(self, 0, prefill)?;
        let prefill_millitokens_per_s = per_second(prefill, begin.elapsed());
        let begin = Instant::now();
        for at in prefill..prefill + MEASURE_DECODE {
            run(self, at, at + 1)?;
        }
        let decode_millitokens_per_s = per_second(MEASURE_DECODE, begin.elapsed());
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
}
