//! Tokens per second of the bare engine against the engine in its child process, side by side.
//!
//! `cargo run -p satgrid-engine-llama --example throughput -- MODEL [STREAMS [PROMPT [OUTPUT]]]`, after building the
//! package's binaries. Rounds alternate, so that a busy machine disturbs both alike; the best of each is compared.

use std::path::{Path, PathBuf};
use std::time::Instant;

use satgrid_engine::port::{Command, Engine, EngineEvent, Job, JobId, Profile};
use satgrid_engine::sampling::Sampling;
use satgrid_engine_llama::bare::{self, Load};
use satgrid_engine_llama::{EngineConfig, EngineSettings, LlamaEngine, Offload, WorkerProgram, default_threads};

const ROUNDS: u32 = 3;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let model = PathBuf::from(args.next().ok_or("which model?")?);
    let mut number = |default: u32| args.next().map_or(Ok(default), |text| text.parse::<u32>());
    let load = Load { streams: number(1)?, prompt: number(128)?, output: number(64)?, rounds: 1 };
    let exe = std::env::current_exe()?;
    let folder = exe.parent().and_then(Path::parent).ok_or("no build folder")?;
    let program = WorkerProgram { exe: folder.join("satgrid-engine-worker"), leading_args: Vec::new() };

    println!("{load:?}, {} threads", default_threads());
    for profile in [Profile::Exact, Profile::Fast] {
        let context = (load.prompt + load.output).next_multiple_of(256);
        let settings = EngineSettings {
            model: model.clone(),
            profile,
            threads: default_threads(),
            slots: load.streams,
            context,
            offload: Offload::default(),
        };
        let config = EngineConfig { program: program.clone(), settings: settings.clone() };
        let engine = LlamaEngine::spawn(config, |_| {}).await?;
        let speed = engine.facts().speed;
        let per_s = |milli: Option<u64>| milli.unwrap_or(0) as f64 / 1000.0;
        println!(
            "{}: at start prefill {:.0}, decode {:.1} tokens/s; {}",
            profile.name(),
            per_s(speed.map(|s| s.prefill_millitokens_per_s)),
            per_s(speed.map(|s| s.decode_millitokens_per_s)),
            engine.facts().instruction_set,
        );
        let (mut bare, mut child) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let report = bare::measure(&program.exe, &[], &settings, load)?;
            let first = report.first_token_ms.last().copied().unwrap_or(0.0);
            println!("  bare   {:7.2} tokens/s, last first token {first:6.0} ms", report.total_tokens_per_s);
            bare.push(report.total_tokens_per_s);
            let (rate, first) = through_child(&engine, load, u64::from(round) * 1000).await;
            println!("  child  {rate:7.2} tokens/s, last first token {first:6.0} ms");
            child.push(rate);
        }
        let best = |rates: &[f64]| rates.iter().copied().fold(0.0, f64::max);
        println!("  ratio of the best: {:.3}", best(&child) / best(&bare));
    }
    Ok(())
}

/// Total tokens/s and the last stream's time to first token in ms.
async fn through_child(engine: &LlamaEngine, load: Load, first_id: u64) -> (f64, f64) {
    let vocab = engine.facts().model.vocab;
    let begin = Instant::now();
    for stream in 0..load.streams {
        let token = |i: u32| (stream.wrapping_mul(7919) ^ i.wrapping_mul(2_654_435_761)) % (vocab - 2) + 1;
        let id = JobId(first_id + u64::from(stream));
        let mut session = [0; 32];
        session[..8].copy_from_slice(&id.0.to_be_bytes());
        let job = Job {
            id,
            session,
            prompt: (0..load.prompt).map(token).collect(),
            sampling: Sampling::greedy(),
            max_output: load.output,
            stop: Vec::new(),
            ignore_eos: true,
            resumed: 0,
            extras: Default::default(),
        };
        let grant = Command::Grant { job: id, prompt_upto: u32::MAX, output_upto: u32::MAX };
        for command in [Command::Start(job), grant] {
            if engine.send(command).is_err() {
                return (0.0, 0.0);
            }
        }
    }
    let (mut over, mut tokens, mut last_first) = (0, 0_usize, 0.0);
    while over < load.streams {
        match engine.next_event().await {
            Some(EngineEvent::Tokens { first, ids, .. }) => {
                tokens += ids.len();
                if first == 0 {
                    last_first = begin.elapsed().as_secs_f64() * 1000.0;
                }
            }
            Some(EngineEvent::Finished { .. } | EngineEvent::Failed { .. }) => over += 1,
            Some(
                EngineEvent::Prefilled { .. }
                | EngineEvent::Logprobs { .. }
                | EngineEvent::Embedded { .. }
                | EngineEvent::Up,
            ) => {}
            Some(EngineEvent::Down { .. }) | None => return (0.0, 0.0),
        }
    }
    (tokens as f64 / begin.elapsed().as_secs_f64(), last_first)
}
