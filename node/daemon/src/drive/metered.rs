//! An engine that is counted: what it was asked, what it gave, how long the first token took. Changes nothing.

use async_trait::async_trait;
use satgrid_api::{Histogram, MetricsSource};
use satgrid_engine::port::{Command, Engine, EngineDown, EngineEvent, EngineFacts, JobId};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// A job as it is timed.
#[derive(Debug, Clone, Copy)]
struct Job {
    since: Instant,
    begun: bool,
    spoke: bool,
}

/// The figures of one engine.
#[derive(Debug, Default)]
struct Figures {
    jobs: Mutex<BTreeMap<JobId, Job>>,
    prompt_tokens: AtomicU64,
    output_tokens: AtomicU64,
    finished: AtomicU64,
    failed: AtomicU64,
    first_token: Histogram,
    whole: Histogram,
}

/// The decorated engine. Clones share the figures.
#[derive(Clone)]
pub(crate) struct Metered {
    engine: Arc<dyn Engine>,
    /// The listed name; the operator's own text.
    model: String,
    figures: Arc<Figures>,
}

impl Metered {
    pub(crate) fn new(engine: Arc<dyn Engine>, model: &str) -> Metered {
        let plain = |c: char| if c.is_control() || matches!(c, '"' | '\\') { '_' } else { c };
        Metered { engine, model: model.chars().map(plain).collect(), figures: Arc::default() }
    }

    fn jobs(&self) -> MutexGuard<'_, BTreeMap<JobId, Job>> {
        self.figures.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn saw(&self, event: &EngineEvent) {
        let figures = &self.figures;
        let add = |figure: &AtomicU64, n: u64| {
            figure.fetch_add(n, Ordering::Relaxed);
        };
        match event {
            EngineEvent::Prefilled { job, .. } => {
                if let Some(job) = self.jobs().get_mut(job) {
                    job.begun = true;
                }
            }
            EngineEvent::Tokens { job, ids, .. } => {
                add(&figures.output_tokens, ids.len() as u64);
                if let Some(job) = self.jobs().get_mut(job)
                    && !job.spoke
                {
                    job.spoke = true;
                    figures.first_token.observe(job.since.elapsed());
                }
            }
            EngineEvent::Finished { job, .. } => {
                add(&figures.finished, 1);
                if let Some(job) = self.jobs().remove(job) {
                    figures.whole.observe(job.since.elapsed());
                }
            }
            EngineEvent::Failed { job, .. } => {
                add(&figures.failed, 1);
                self.jobs().remove(job);
            }
            EngineEvent::Down { .. } => {
                let mut jobs = self.jobs();
                add(&figures.failed, jobs.len() as u64);
                jobs.clear();
            }
            EngineEvent::Logprobs { .. } | EngineEvent::Embedded { .. } | EngineEvent::Up => {}
        }
    }
}

#[async_trait]
impl Engine for Metered {
    fn facts(&self) -> EngineFacts {
        self.engine.facts()
    }

    fn send(&self, command: Command) -> Result<(), EngineDown> {
        if let Command::Start(job) = &command {
            self.figures.prompt_tokens.fetch_add(job.prompt.len() as u64, Ordering::Relaxed);
            self.jobs().insert(job.id, Job { since: Instant::now(), begun: false, spoke: false });
        }
        self.engine.send(command)
    }

    async fn next_event(&self) -> Option<EngineEvent> {
        let event = self.engine.next_event().await?;
        self.saw(&event);
        Some(event)
    }

    fn is_up(&self) -> bool {
        self.engine.is_up()
    }
}

/// The figures of all engines, one series for each model.
pub(crate) struct EngineFigures(pub Vec<Metered>);

impl MetricsSource for EngineFigures {
    fn render(&self, out: &mut String) {
        type Read = fn(&Metered) -> u64;
        let families: [(&str, &str, &str, Read); 8] = [
            ("satgrid_engine_up", "gauge", "Whether the engine takes commands.", |e| u64::from(e.engine.is_up())),
            ("satgrid_engine_slots", "gauge", "Requests that run at once.", |e| u64::from(e.engine.facts().slots)),
            ("satgrid_engine_running", "gauge", "Requests that the model works on.", |e| {
                e.jobs().values().filter(|job| job.begun).count() as u64
            }),
            ("satgrid_engine_queued", "gauge", "Requests that wait for a slot or for their first money.", |e| {
                e.jobs().values().filter(|job| !job.begun).count() as u64
            }),
            ("satgrid_engine_prompt_tokens_total", "counter", "Prompt tokens taken in.", |e| {
                e.figures.prompt_tokens.load(Ordering::Relaxed)
            }),
            ("satgrid_engine_output_tokens_total", "counter", "Tokens generated.", |e| {
                e.figures.output_tokens.load(Ordering::Relaxed)
            }),
            ("satgrid_engine_requests_finished_total", "counter", "Requests that ended in good order.", |e| {
                e.figures.finished.load(Ordering::Relaxed)
            }),
            ("satgrid_engine_requests_failed_total", "counter", "Requests that broke off.", |e| {
                e.figures.failed.load(Ordering::Relaxed)
            }),
        ];
        // Writing to a String cannot fail.
        for (name, kind, help, read) in families {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for engine in &self.0 {
                let _ = writeln!(out, "{name}{{model=\"{}\"}} {}", engine.model, read(engine));
            }
        }
        type Time = fn(&Figures) -> &Histogram;
        let times: [(&str, &str, Time); 2] = [
            ("satgrid_engine_first_token_seconds", "From a request's start to its first token.", |f| &f.first_token),
            ("satgrid_engine_request_seconds", "From a request's start to its end.", |f| &f.whole),
        ];
        for (name, help, read) in times {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
            for engine in &self.0 {
                read(&engine.figures).series(out, name, &format!("model=\"{}\"", engine.model));
            }
        }
    }
}
