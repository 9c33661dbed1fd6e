//! A real child process over the tiny model, and one reader of its events.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use satgrid_engine::port::{Command, Engine, EngineEvent, FinishReason, Job, JobError, JobId, Profile};
use satgrid_engine::sampling::Sampling;
use satgrid_engine_llama::{EngineConfig, EngineSettings, LlamaEngine, Offload, SpawnError, WorkerProgram};
use tokio::time::timeout;

/// Longest that a test waits for anything; only a hang ever takes so long.
const PATIENCE: Duration = Duration::from_secs(120);
pub const ALL: u32 = u32::MAX;

pub fn program() -> WorkerProgram {
    WorkerProgram { exe: PathBuf::from(env!("CARGO_BIN_EXE_satgrid-engine-worker")), leading_args: Vec::new() }
}

pub fn tiny_bytes() -> Vec<u8> {
    satgrid_engine::tiny::TinyModel::default().to_bytes().unwrap()
}

/// The tiny model in a file of its own, removed with the folder.
pub struct TinyModel {
    folder: tempfile::TempDir,
    pub path: PathBuf,
}

impl TinyModel {
    pub fn write() -> Self {
        Self::of(&tiny_bytes())
    }

    /// The tiny model, or the one that `SATGRID_TEST_MODEL` names.
    pub fn or_named() -> Self {
        let mut model = Self::write();
        if let Some(named) = std::env::var_os("SATGRID_TEST_MODEL") {
            model.path = named.into();
        }
        model
    }

    /// A file of these bytes under the same kind of name.
    pub fn of(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        Self { folder, path }
    }
}

pub fn settings(model: &Path, profile: Profile, slots: u32) -> EngineSettings {
    EngineSettings {
        model: model.to_path_buf(),
        profile,
        threads: 1,
        slots,
        context: 1024,
        offload: Offload::default(),
    }
}

pub async fn spawn(settings: EngineSettings) -> Result<Arc<LlamaEngine>, SpawnError> {
    let start = LlamaEngine::spawn(EngineConfig { program: program(), settings }, |_| {});
    timeout(PATIENCE, start).await.expect("the engine starts in time")
}

/// A sampled job with a prompt that is fixed by `id`.
pub fn job(id: u64, prompt: u32, max_output: u32) -> Job {
    let seed = u32::try_from(id % 1000).unwrap();
    Job {
        id: JobId(id),
        session: [u8::try_from(id % 256).unwrap(); 32],
        prompt: (0..prompt).map(|i| (i * 31 + seed * 17) % 200 + 5).collect(),
        sampling: Sampling::seeded(1.0, id),
        max_output,
        stop: Vec::new(),
        ignore_eos: true,
        resumed: 0,
        extras: Default::default(),
    }
}

/// What was told of one job.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Heard {
    pub upto: u32,
    pub cached: u32,
    pub output: Vec<u32>,
    pub end: Option<(FinishReason, u32)>,
    pub error: Option<JobError>,
}

impl Heard {
    pub fn is_over(&self) -> bool {
        self.end.is_some() || self.error.is_some()
    }
}

/// An engine and what it said so far.
pub struct Listener {
    pub engine: Arc<LlamaEngine>,
    pub heard: BTreeMap<u64, Heard>,
    pub downs: Vec<String>,
    pub ups: u32,
}

impl Listener {
    pub async fn start(settings: EngineSettings) -> Self {
        let engine = spawn(settings).await.unwrap();
        Self { engine, heard: BTreeMap::new(), downs: Vec::new(), ups: 0 }
    }

    pub fn send(&self, command: Command) {
        self.engine.send(command).unwrap();
    }

    pub fn start_job(&self, job: &Job, prompt_upto: u32, output_upto: u32) {
        self.send(Command::Start(job.clone()));
        self.grant(job.id, prompt_upto, output_upto);
    }

    pub fn grant(&self, job: JobId, prompt_upto: u32, output_upto: u32) {
        self.send(Command::Grant { job, prompt_upto, output_upto });
    }

    pub async fn hear_one(&mut self) {
        let event = timeout(PATIENCE, self.engine.next_event()).await.expect("an event in time").unwrap();
        self.note(event);
    }

    fn note(&mut self, event: EngineEvent) {
        let Some(id) = event.job() else {
            if let EngineEvent::Down { reason } = event {
                self.downs.push(reason);
            } else {
                self.ups += 1;
            }
            return;
        };
        let job = self.heard.entry(id.0).or_default();
        assert!(!job.is_over(), "after its end: {event:?}");
        match event {
            EngineEvent::Prefilled { upto, cached, .. } => {
                assert!(upto > job.upto && cached >= job.cached && cached <= upto);
                (job.upto, job.cached) = (upto, cached);
            }
            EngineEvent::Tokens { first, ids, .. } => {
                assert_eq!(first as usize, job.output.len());
                job.output.extend(ids);
            }
            EngineEvent::Logprobs { first, .. } => assert_eq!(first as usize, job.output.len()),
            EngineEvent::Finished { reason, evaluated, .. } => job.end = Some((reason, evaluated)),
            EngineEvent::Failed { error, .. } => job.error = Some(error),
            EngineEvent::Embedded { .. } | EngineEvent::Down { .. } | EngineEvent::Up => {}
        }
    }

    pub async fn until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        while !done(self) {
            self.hear_one().await;
        }
    }

    /// Hears until a job is over, and gives what was told of it.
    pub async fn end_of(&mut self, id: u64) -> Heard {
        self.until(|l| l.heard.get(&id).is_some_and(Heard::is_over)).await;
        self.heard[&id].clone()
    }

    /// Runs one job with everything granted, and gives its output.
    pub async fn output(&mut self, job: &Job) -> Vec<u32> {
        self.start_job(job, ALL, ALL);
        let heard = self.end_of(job.id.0).await;
        assert_eq!(heard.error, None);
        heard.output
    }

    /// Nothing more is said: two round trips of a refused job pass in silence.
    pub async fn assert_silence(&mut self, probe: u64) {
        let before = self.heard.clone();
        for id in [probe, probe + 1] {
            self.send(Command::Start(Job { prompt: Vec::new(), ..job(id, 1, 1) }));
            self.end_of(id).await;
            self.heard.remove(&id);
        }
        assert_eq!(self.heard, before);
    }
}

/// Ends a process as a crash would.
pub fn kill(process: u32) {
    let status = std::process::Command::new("kill").args(["-9", &process.to_string()]).status().unwrap();
    assert!(status.success());
}
