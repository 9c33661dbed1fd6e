//! Starts jobs, reads events, and holds every event against the port's rules.

use std::collections::BTreeMap;

use crate::port::{Command, Engine, EngineEvent, EngineFacts, FinishReason, Job, JobError, JobId, Profile, Tokenizer};
use crate::sampling::Sampling;

const PROMPT: &str = "The old mill stood by the river, and in the morning the light came slowly over the water. \
    One by one the stones grew bright, until the night was";

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    Finished { reason: FinishReason, evaluated: u32 },
    Failed(JobError),
}

/// A job as seen through its events.
#[derive(Debug, Clone, Default)]
pub(super) struct Trace {
    prompt: u32,
    prompt_upto: u32,
    output_upto: u32,
    pub(super) upto: u32,
    pub(super) cached: u32,
    pub(super) ids: Vec<u32>,
    pub(super) logprobs: Vec<crate::sampling::Logprobs>,
    /// Of texts, in their order.
    pub(super) rows: Vec<Vec<u8>>,
    pub(super) end: Option<End>,
}

impl Trace {
    /// The reason, and that usage is exact: only for jobs that were not cancelled.
    #[track_caller]
    pub(super) fn finished(&self) -> FinishReason {
        let Some(End::Finished { reason, evaluated }) = &self.end else {
            panic!("expected a finished job, not {:?}", self.end)
        };
        let output = self.ids.len() as u32;
        let expected = self.prompt - self.cached + output.saturating_sub(1);
        assert_eq!(*evaluated, expected, "positions evaluated: {} cached, {output} output", self.cached);
        *reason
    }
}

pub(super) struct Bench<'a> {
    pub(super) engine: &'a dyn Engine,
    pub(super) tok: &'a dyn Tokenizer,
    pub(super) facts: EngineFacts,
    pub(super) prompt: Vec<u32>,
    pub(super) traces: BTreeMap<JobId, Trace>,
    count: u64,
}

impl<'a> Bench<'a> {
    pub(super) async fn new(engine: &'a dyn Engine, tok: &'a dyn Tokenizer) -> Self {
        let facts = engine.facts();
        assert!(facts.slots >= 2 && facts.context >= 512 && facts.batch >= 1, "too small for the suite: {facts:?}");
        assert_eq!(facts.model.vocab, tok.vocab_size(), "engine and tokenizer disagree on the vocabulary");
        let prompt = tok.tokenize(PROMPT, true, false).await.expect("tokenize");
        assert!((16..300).contains(&prompt.len()), "{} prompt tokens", prompt.len());
        Self { engine, tok, facts, prompt, traces: BTreeMap::new(), count: 0 }
    }

    /// Whether identical output is promised.
    pub(super) fn exact(&self) -> bool {
        self.facts.profile == Profile::Exact
    }

    /// A greedy job of its own session that never ends early.
    pub(super) fn job(&mut self, max_output: u32) -> Job {
        self.count += 1;
        let mut session = *b"conformance session ____________";
        session[24..].copy_from_slice(&self.count.to_le_bytes());
        Job {
            id: JobId(self.count),
            session,
            prompt: self.prompt.clone(),
            sampling: Sampling::greedy(),
            max_output,
            stop: Vec::new(),
            ignore_eos: true,
            resumed: 0,
            extras: Default::default(),
        }
    }

    pub(super) fn start(&mut self, job: Job) -> JobId {
        let id = job.id;
        self.traces.insert(id, Trace { prompt: job.prompt.len() as u32, ..Trace::default() });
        self.send(Command::Start(job));
        id
    }

    pub(super) fn grant(&mut self, job: JobId, prompt_upto: u32, output_upto: u32) {
        let trace = self.traces.get_mut(&job).expect("a started job");
        trace.prompt_upto = trace.prompt_upto.max(prompt_upto);
        trace.output_upto = trace.output_upto.max(output_upto);
        self.send(Command::Grant { job, prompt_upto, output_upto });
    }

    pub(super) fn send(&self, command: Command) {
        self.engine.send(command).expect("the engine is up");
    }

    /// Starts a job with everything granted.
    pub(super) fn launch(&mut self, job: Job) -> JobId {
        let id = self.start(job);
        self.grant(id, u32::MAX, u32::MAX);
        id
    }

    /// Runs a job to its end.
    pub(super) async fn run(&mut self, job: Job) -> Trace {
        let id = self.launch(job);
        self.until(id, |trace| trace.end.is_some()).await
    }

    /// Reads events until the job is as wanted.
    pub(super) async fn until(&mut self, job: JobId, wanted: impl Fn(&Trace) -> bool) -> Trace {
        loop {
            let trace = &self.traces[&job];
            if wanted(trace) {
                return trace.clone();
            }
            assert_eq!(trace.end, None, "{job:?} ended too early");
            self.read().await;
        }
    }

    /// Lets another job run from start to end, and shows that this one did not move meanwhile.
    pub(super) async fn stands_still(&mut self, job: JobId) {
        let before = self.traces[&job].clone();
        let other = self.job(4);
        assert_eq!(self.run(other).await.finished(), FinishReason::Length);
        let after = &self.traces[&job];
        assert_eq!((after.upto, &after.ids, &after.end), (before.upto, &before.ids, &before.end), "{job:?} moved");
    }

    async fn read(&mut self) {
        let event = self.engine.next_event().await.expect("an engine that is not shut down");
        let Some(job) = event.job() else { panic!("the engine went down or up: {event:?}") };
        let trace = self.traces.get_mut(&job).unwrap_or_else(|| panic!("an event of an unknown job: {event:?}"));
        assert_eq!(trace.end, None, "an event after the end: {event:?}");
        match event {
            EngineEvent::Prefilled { upto, cached, .. } => {
                assert!(trace.ids.is_empty(), "prefill after output");
                assert!(upto > trace.upto || cached > trace.cached, "an empty report of prefill");
                assert!(upto >= trace.upto && cached >= trace.cached, "prefill went back");
                assert!(upto <= trace.prompt_upto.min(trace.prompt), "prefilled {upto}, granted {}", trace.prompt_upto);
                assert!(cached <= upto && cached < trace.prompt, "{cached} of {upto} cached");
                (trace.upto, trace.cached) = (upto, cached);
            }
            EngineEvent::Tokens { first, ids, .. } => {
                assert_eq!(trace.upto, trace.prompt, "output before the prompt was reported");
                assert_eq!(first as usize, trace.ids.len(), "output tokens are consecutive");
                assert!(!ids.is_empty() && ids.iter().all(|id| *id < self.facts.model.vocab), "bad ids {ids:?}");
                trace.ids.extend(ids);
                let granted = trace.output_upto as usize;
                assert!(trace.ids.len() <= granted, "{} tokens out, {granted} granted", trace.ids.len());
            }
            EngineEvent::Logprobs { first, entries, .. } => {
                assert_eq!(first as usize, trace.ids.len(), "log probabilities come right before their tokens");
                trace.logprobs.extend(entries);
            }
            EngineEvent::Embedded { index, row, .. } => {
                assert_eq!(index as usize, trace.rows.len(), "rows come in order");
                trace.rows.push(row);
            }
            EngineEvent::Finished { reason, evaluated, .. } => trace.end = Some(End::Finished { reason, evaluated }),
            EngineEvent::Failed { error, .. } => trace.end = Some(End::Failed(error)),
            EngineEvent::Down { .. } | EngineEvent::Up => {}
        }
    }

    pub(super) async fn pieces(&self, ids: &[u32]) -> Vec<Vec<u8>> {
        self.tok.pieces(ids, false).await.expect("pieces")
    }
}
