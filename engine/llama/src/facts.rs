//! What a running engine says of itself: the build that it is, the instruction set, the speeds of this machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use satgrid_engine::gguf::TensorType;
use satgrid_engine::port::{Profile, Speed};
use satgrid_engine::tiny::TinyModel;
use sha2::{Digest, Sha256};

use crate::backend::{LlamaBackend, OpenError};
use crate::devices::Device;
use crate::ffi::{self, BatchRow, DecodeError, Model, ModelConfig};
use crate::scheduler::{Backend, Computes, Shape};

/// The pinned binding, whose version fixes llama.cpp's sources. A test compares it with the workspace's table.
const BINDING: &str = "llama-cpp-sys-2 0.1.161";
/// Positions of the known answer.
const ANSWER_ROWS: u32 = 24;
/// Positions of the trial of the exact profile, and of its chunks.
pub(crate) const TRIAL_ROWS: u32 = 96;
pub(crate) const TRIAL_CHUNK: u32 = 20;
/// Bounds of the measurement at start: whichever comes first.
const MEASURE_FOR: Duration = Duration::from_millis(300);
const MEASURE_PREFILL: u32 = 128;
const MEASURE_DECODE: u32 = 16;
const MEASURE_CHUNK: u32 = 32;

/// Names the build: two engines with the same id, instruction set and model compute the same bits in the exact profile.
///
/// SHA-256 over the versions, every flag that reached CMake, the compiler, the target, and the answer that the build
/// gives on a model which is fixed for all time.
pub(crate) fn build_id(known_answer: &[u8; 32]) -> [u8; 32] {
    let mut hash = Sha256::new();
    let parts = [
        env!("CARGO_PKG_VERSION"),
        BINDING,
        &ffi::library_version(),
        env!("SATGRID_ENGINE_FLAGS"),
        env!("SATGRID_ENGINE_COMPILER"),
        env!("SATGRID_ENGINE_TARGET"),
    ];
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hash.update(known_answer);
    hash.finalize().into()
}

/// SHA-256 over the logits of the tiny model, prefilled in one batch, exact profile, one thread.
pub(crate) fn known_answer() -> Result<[u8; 32], OpenError> {
    // Every field is named: other defaults would be another question.
    let question = TinyModel {
        seed: 20_260_101,
        kind: TensorType::Q8_0,
        layers: 2,
        n_embd: 64,
        context: 64,
        name: "known-answer".into(),
        chat_template: None,
        pooling: None,
    };
    let file = tempfile::NamedTempFile::new().and_then(|mut file| {
        question.write(&mut file).map_err(std::io::Error::other)?;
        Ok(file)
    });
    let file = file.map_err(OpenError::KnownAnswer)?;
    let config = ModelConfig { path: file.path(), vocab_only: false, repack: false, offload: None };
    let model = Arc::new(Model::load(&config, |_| {})?);
    let vocab = model.vocab_size();
    let shape = Shape {
        profile: Profile::Exact,
        slots: 1,
        context: 64,
        vocab,
        batch: ANSWER_ROWS,
        prefill_beside_streams: ANSWER_ROWS,
        guess: false,
    };
    let mut backend = LlamaBackend::new(model, &shape, ANSWER_ROWS, 1, None)?;
    let token = |position: u32| (position * 37 + 11) % vocab.max(1);
    let rows: Vec<BatchRow> =
        (0..ANSWER_ROWS).map(|position| BatchRow { slot: 0, position, token: token(position), output: true }).collect();
    let mut hash = Sha256::new();
    if backend.evaluate(&rows).is_ok() {
        for row in 0..rows.len() {
            for logit in backend.logits(row).unwrap_or_default() {
                hash.update(logit.to_bits().to_le_bytes());
            }
        }
    }
    Ok(hash.finalize().into())
}

/// The architecture and the widest vector extension that the arithmetic was compiled for, as in `x86_64-avx2`; with a card,
/// also its backend and name, as in `x86_64-avx2+CUDA NVIDIA H100 80GB HBM3`: other cards compute other bits.
pub(crate) fn instruction_set(card: Option<&Device>) -> String {
    let processor = name_instruction_set(std::env::consts::ARCH, &ffi::system_info());
    match card {
        Some(card) => format!("{processor}+{} {}", card.backend, card.description),
        None => processor,
    }
}

/// Whether this backend keeps the exact profile's promise with the model that it holds: a prompt gives the same bits in one
/// batch, in chunks, and position by position. Leaves slot 0 empty.
pub(crate) fn is_exact(backend: &mut LlamaBackend, shape: &Shape) -> Result<bool, DecodeError> {
    let length = shape.context.min(TRIAL_ROWS).min(shape.batch);
    let token = |position: u32| (position * 61 + 17) % shape.vocab.max(1);
    let mut run = |chunk: u32| -> Result<Vec<u32>, DecodeError> {
        backend.truncate(0, 0);
        for from in (0..length).step_by(chunk as usize) {
            let upto = (from + chunk).min(length);
            let rows: Vec<BatchRow> = (from..upto)
                .map(|position| BatchRow { slot: 0, position, token: token(position), output: position + 1 == upto })
                .collect();
            backend.evaluate(&rows)?;
            if upto == length {
                return Ok(backend.logits(rows.len() - 1)?.iter().map(|logit| logit.to_bits()).collect());
            }
        }
        Ok(Vec::new())
    };
    let (whole, chunked, single) = (run(length)?, run(TRIAL_CHUNK)?, run(1)?);
    backend.truncate(0, 0);
    Ok(whole == chunked && whole == single)
}

fn name_instruction_set(arch: &str, info: &str) -> String {
    // Widest first.
    const EXTENSIONS: [&str; 9] = ["AVX512", "AVX2", "AVX", "SSE3", "SVE", "MATMUL_INT8", "DOTPROD", "NEON", "RISCV_V"];
    let has = |name: &&str| info.split(['|', ':']).any(|part| part.trim() == format!("{name} = 1"));
    match EXTENSIONS.iter().find(|name| has(name)) {
        Some(extension) => format!("{arch}-{}", extension.to_lowercase()),
        None => arch.to_owned(),
    }
}

/// Measures one job's prefill and decode, briefly, and leaves slot 0 empty. `None` if the model fails.
pub(crate) fn measure(backend: &mut LlamaBackend, shape: &Shape) -> Option<Speed> {
    let speed = try_measure(backend, shape);
    backend.truncate(0, 0);
    speed
}

/// `None` where it cannot be computed: a trunk whose experts are bought has nobody to charge a measurement to.
fn try_measure(backend: &mut LlamaBackend, shape: &Shape) -> Option<Speed> {
    let token = |position: u32| (position * 97 + 5) % shape.vocab.max(1);
    let row = |position, output| BatchRow { slot: 0, position, token: token(position), output };
    let longest = shape.context.saturating_sub(MEASURE_DECODE + 1).min(MEASURE_PREFILL);
    let chunk = longest.min(MEASURE_CHUNK);
    if chunk == 0 {
        return None;
    }
    // Once for the caches, the threads and the pages of the weights.
    backend.evaluate(&[row(0, true)]).ok()?;
    backend.truncate(0, 0);

    let (mut at, begin) = (0, Instant::now());
    while at + chunk <= longest && (at == 0 || begin.elapsed() < MEASURE_FOR) {
        let rows: Vec<BatchRow> = (at..at + chunk).map(|position| row(position, position + 1 == at + chunk)).collect();
        backend.evaluate(&rows).ok()?;
        at += chunk;
    }
    let prefill_millitokens_per_s = per_second(at, begin.elapsed());

    let (from, begin) = (at, Instant::now());
    while at < from + MEASURE_DECODE && (at == from || begin.elapsed() < MEASURE_FOR) {
        backend.evaluate(&[row(at, true)]).ok()?;
        at += 1;
    }
    let decode_millitokens_per_s = per_second(at - from, begin.elapsed());
    Some(Speed { prefill_millitokens_per_s, decode_millitokens_per_s })
}

/// Thousandths of a token per second.
pub(crate) fn per_second(tokens: u32, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(tokens) * 1_000_000_000_000 / nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_binding_is_the_pinned_one() {
        let table = include_str!("../../../Cargo.toml");
        let (name, version) = BINDING.split_once(' ').unwrap();
        assert!(table.contains(&format!("{name} = {{ version = \"={version}\"")), "Cargo.toml pins another {name}");
    }

    #[test]
    fn instruction_sets_are_named_by_their_widest_extension() {
        let rows = [
            ("x86_64", "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | FMA = 1 | ", "x86_64-avx2"),
            ("x86_64", "CPU : AVX = 1 | AVX2 = 1 | AVX512 = 1 | ", "x86_64-avx512"),
            ("aarch64", "CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | ", "aarch64-dotprod"),
            ("riscv64", "", "riscv64"),
        ];
        for (arch, info, expect) in rows {
            assert_eq!(name_instruction_set(arch, info), expect);
        }
    }

    #[test]
    fn the_known_answer_is_known() {
        assert_eq!(known_answer().unwrap(), known_answer().unwrap());
    }

    #[test]
    fn speeds_are_tokens_over_time() {
        assert_eq!(per_second(50, Duration::from_millis(500)), 100_000);
    }
}
