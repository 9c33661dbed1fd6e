//! The engine with nothing around it: the scheduler driven in this process, no socket, no money, no network.
//!
//! It is the yardstick of the benchmarks: what a paid stream through the whole node is compared with. The exact profile
//! needs `GGML_CPU_TILED_MM=0` from the start of the process, so [`measure`] starts a child for it, like the engine's own.

use std::path::Path;
use std::time::Instant;

use satgrid_engine::port::{Command, EngineEvent, Job, JobId};
use satgrid_engine::sampling::Sampling;

use crate::backend::LlamaBackend;
use crate::facts;
use crate::scheduler::Scheduler;
use crate::settings::{EngineSettings, WorkerArgs, environment};

/// Equal jobs that start at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    pub streams: u32,
    /// Tokens of each prompt; no two prompts share a beginning.
    pub prompt: u32,
    /// Tokens that each stream draws, greedily, ignoring ends.
    pub output: u32,
    /// So many times, one after another in one engine: what an engine gives that has been at work.
    pub rounds: u32,
}

/// What a run of the bare engine gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Output tokens of all streams over the time from the first start to the last token.
    pub total_tokens_per_s: f64,
    /// Output tokens of all streams over the time in which all prompts were done.
    pub decode_tokens_per_s: f64,
    /// Time to first token of each stream, in milliseconds, rising.
    pub first_token_ms: Vec<f64>,
    pub wall_ms: f64,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BareError {
    #[error("{0}")]
    Open(String),
    #[error("a job failed: {0}")]
    Job(String),
    #[error("the process did not run: {0}")]
    Process(#[from] std::io::Error),
    #[error("no figures in {0:?}")]
    NoFigures(String),
}

/// Runs the load in a child process of `exe`, whose leading arguments are `subcommand`; of several rounds, gives the first.
pub fn measure(exe: &Path, subcommand: &[&str], settings: &EngineSettings, load: Load) -> Result<Report, BareError> {
    let args = WorkerArgs::Bare(settings.clone(), load);
    let mut command = std::process::Command::new(exe);
    command.args(subcommand).args(args.to_args()).envs(environment(&args));
    let output = command.stderr(std::process::Stdio::inherit()).output()?;
    Report::parse(&String::from_utf8_lossy(&output.stdout))
}

/// Runs the load in this process, and tells each round.
pub fn run(settings: &EngineSettings, load: Load, mut tell: impl FnMut(&Report)) -> Result<(), BareError> {
    let (mut backend, shape) =
        LlamaBackend::open(settings, |_| {}).map_err(|error| BareError::Open(error.to_string()))?;
    // As an engine of the node does before its first job: it brings the weights' pages and the caches in.
    if facts::measure(&mut backend, &shape).is_none() {
        return Err(BareError::Job("the model does not compute".into()));
    }
    let mut scheduler = Scheduler::new(shape);
    for round in 0..load.rounds.max(1) {
        let jobs = (0..load.streams).map(|stream| job(round * load.streams + stream, load, shape.vocab));
        tell(&once(&mut scheduler, &mut backend, jobs.collect())?);
    }
    Ok(())
}

fn once(scheduler: &mut Scheduler, backend: &mut LlamaBackend, jobs: Vec<Job>) -> Result<Report, BareError> {
    let streams = jobs.len();
    let begin = Instant::now();
    for job in jobs {
        let id = job.id;
        scheduler.handle(Command::Start(job), backend);
        let grant = Command::Grant { job: id, prompt_upto: u32::MAX, output_upto: u32::MAX };
        scheduler.handle(grant, backend);
    }
    let (mut first_token_ms, mut tokens, mut since_prompts) = (Vec::new(), 0_u64, None);
    while scheduler.step(backend) {
        if let Some(positions) = backend.piece_beside_streams() {
            scheduler.set_prefill_beside_streams(positions);
        }
        let now = begin.elapsed().as_secs_f64();
        for event in scheduler.take_events() {
            match event {
                EngineEvent::Tokens { first, ids, .. } => {
                    tokens += ids.len() as u64;
                    if first == 0 {
                        first_token_ms.push(now * 1000.0);
                    }
                    if first_token_ms.len() == streams && since_prompts.is_none() {
                        since_prompts = Some((now, tokens));
                    }
                }
                EngineEvent::Failed { error, .. } => return Err(BareError::Job(error.to_string())),
                EngineEvent::Prefilled { .. }
                | EngineEvent::Logprobs { .. }
                | EngineEvent::Embedded { .. }
                | EngineEvent::Finished { .. }
                | EngineEvent::Down { .. }
                | EngineEvent::Up => {}
            }
        }
    }
    let wall = begin.elapsed().as_secs_f64();
    let (prompts_done, before) = since_prompts.unwrap_or((wall, tokens));
    Ok(Report {
        total_tokens_per_s: tokens as f64 / wall,
        decode_tokens_per_s: (tokens - before) as f64 / (wall - prompts_done).max(1e-9),
        first_token_ms,
        wall_ms: wall * 1000.0,
    })
}

/// A job whose prompt is fixed by its stream's number.
fn job(stream: u32, load: Load, vocab: u32) -> Job {
    let token =
        |i: u32| (stream.wrapping_mul(7919) ^ i.wrapping_mul(2_654_435_761)) % vocab.saturating_sub(2).max(1) + 1;
    Job {
        id: JobId(u64::from(stream)),
        session: [u8::try_from(stream % 256).unwrap_or(0); 32],
        prompt: (0..load.prompt.max(1)).map(token).map(|token| token.min(vocab.saturating_sub(1))).collect(),
        sampling: Sampling::greedy(),
        max_output: load.output,
        stop: Vec::new(),
        ignore_eos: true,
        resumed: 0,
        extras: Default::default(),
    }
}

impl Report {
    /// One line: total and decode tokens/s, wall time in ms, then each time to first token in ms.
    pub fn to_line(&self) -> String {
        let head = [self.total_tokens_per_s, self.decode_tokens_per_s, self.wall_ms];
        let figures: Vec<String> = head.iter().chain(&self.first_token_ms).map(|x| format!("{x:.3}")).collect();
        format!("bare {}", figures.join(" "))
    }

    fn parse(text: &str) -> Result<Self, BareError> {
        let none = || BareError::NoFigures(text.to_owned());
        let line = text.lines().find_map(|line| line.strip_prefix("bare ")).ok_or_else(none)?;
        let figures: Result<Vec<f64>, _> = line.split_whitespace().map(str::parse).collect();
        match figures.map_err(|_| none())?.as_slice() {
            [total, decode, wall, first @ ..] => Ok(Self {
                total_tokens_per_s: *total,
                decode_tokens_per_s: *decode,
                wall_ms: *wall,
                first_token_ms: first.to_vec(),
            }),
            _ => Err(none()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back() {
        let first_token_ms = vec![12.5, 13.0];
        let report = Report { total_tokens_per_s: 90.25, decode_tokens_per_s: 100.5, wall_ms: 2000.0, first_token_ms };
        assert_eq!(Report::parse(&format!("noise\n{}\n", report.to_line())).unwrap(), report);
        assert!(matches!(Report::parse("bare x"), Err(BareError::NoFigures(_))));
    }
}
