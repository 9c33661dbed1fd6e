//! The toy engine itself: the port's rules, written down once without any machinery.

use std::collections::VecDeque;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::ToyConfig;
use super::model::{Context, EOS, ToyTokenizer, VOCAB};
use super::texts::ToyTexts;
use crate::embedder::{EmbedShape, Embedder};
use crate::facts::{ModelFacts, Pooling};
use crate::grammar::{Constraint, Vocabulary};
use crate::port::{Command, EngineDown, EngineEvent, EngineFacts, FinishReason, Job, JobError, JobId, Profile, Speed};
use crate::sampling;
use crate::stop::StopMatcher;

/// Sessions whose last tokens are kept; the oldest goes first.
const MAX_CACHED_SESSIONS: usize = 64;

/// One job and how far it is.
#[derive(Debug)]
struct Running {
    job: Job,
    prompt_upto: usize,
    output_upto: usize,
    /// Prompt positions covered, and how many the prefix cache can cover in all; the latter is known once the job
    /// runs.
    covered: usize,
    cacheable: Option<usize>,
    evaluated: u32,
    output: Vec<u32>,
    context: Context,
    stop: StopMatcher,
    constraint: Option<Constraint>,
    /// False once the session was forgotten: nothing of the job stays after it.
    keep: bool,
}

/// A sans-IO engine. The first `slots` jobs in order of their start run in turns; the others wait.
#[derive(Debug)]
pub struct ToyEngine {
    config: ToyConfig,
    jobs: Vec<Running>,
    /// Which of the running jobs has the next turn.
    turn: usize,
    cache: VecDeque<([u8; 32], Vec<u32>)>,
    events: VecDeque<EngineEvent>,
    tokens_emitted: u32,
    down: bool,
    /// Of a toy that embeds.
    embedder: Option<(Embedder, ToyTexts)>,
}

impl ToyEngine {
    pub fn new(config: ToyConfig) -> Self {
        let (jobs, cache, events) = (Vec::new(), VecDeque::new(), VecDeque::new());
        let embedder = embedder(&config);
        Self { config, jobs, turn: 0, cache, events, tokens_emitted: 0, down: false, embedder }
    }

    // Getters

    pub fn facts(&self) -> EngineFacts {
        let hash = |what: &str| -> [u8; 32] {
            let seed = self.config.model_seed.to_le_bytes();
            Sha256::new().chain_update(b"satgrid toy ").chain_update(what).chain_update(seed).finalize().into()
        };
        EngineFacts {
            model: ModelFacts {
                architecture: "toy".to_owned(),
                name: Some(format!("toy-{}", self.config.model_seed)),
                layers: 1,
                n_embd: self.config.embeds.unwrap_or(1),
                n_head: 1,
                n_head_kv: 1,
                context: self.config.context,
                vocab: VOCAB,
                experts: 0,
                experts_used: 0,
                sliding_window: None,
                quantisation: "none".to_owned(),
                parameters: 0,
                tensor_bytes: 0,
                pooling: self.config.embeds.map(|_| Pooling::Last),
                both_ways: false,
            },
            model_root: hash("model"),
            tokenizer_hash: Sha256::digest(b"satgrid toy tokenizer").into(),
            profile: self.config.profile,
            build_id: Sha256::digest(b"satgrid toy build").into(),
            instruction_set: "toy".to_owned(),
            slots: self.config.slots,
            context: self.config.context,
            batch: self.config.batch,
            speed: Some(Speed { prefill_millitokens_per_s: 400_000, decode_millitokens_per_s: 40_000 }),
        }
    }

    pub fn is_down(&self) -> bool {
        self.down
    }

    // Commands

    pub fn handle(&mut self, command: Command) -> Result<(), EngineDown> {
        if self.down {
            return Err(EngineDown);
        }
        if let Some((embedder, texts)) = &mut self.embedder {
            embedder.handle(command, texts);
            return Ok(());
        }
        match command {
            Command::Start(job) => self.start(job),
            Command::Grant { job, prompt_upto, output_upto } => {
                if let Some(running) = self.jobs.iter_mut().find(|running| running.job.id == job) {
                    running.prompt_upto = running.prompt_upto.max(prompt_upto as usize);
                    running.output_upto = running.output_upto.max(output_upto as usize);
                }
            }
            Command::Cancel { job } => {
                if let Some(at) = self.jobs.iter().position(|running| running.job.id == job) {
                    self.finish(at, FinishReason::Cancelled);
                }
            }
            Command::ForgetSession { session } => {
                self.cache.retain(|(owner, _)| *owner != session);
                let running = self.jobs.iter_mut().filter(|running| running.job.session == session);
                running.for_each(|running| running.keep = false);
            }
        }
        Ok(())
    }

    /// The process dies now.
    pub fn die(&mut self, reason: &str) {
        self.jobs.clear();
        self.cache.clear();
        self.embedder = embedder(&self.config);
        self.down = true;
        self.events.push_back(EngineEvent::Down { reason: reason.to_owned() });
    }

    /// A new process takes commands; a scheduled death does not come twice.
    pub fn restart(&mut self) {
        if self.down {
            self.down = false;
            self.config.faults.die_after_tokens = None;
            self.events.push_back(EngineEvent::Up);
        }
    }

    // Polling

    /// The next event, working one step for it where none is waiting. `None`: nothing is granted that is not done.
    pub fn poll_event(&mut self) -> Option<EngineEvent> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        if let Some((embedder, texts)) = self.embedder.as_mut().filter(|_| !self.down) {
            let mut events = embedder.take_events();
            if events.is_empty() && embedder.step(texts) {
                events = embedder.take_events();
            }
            self.events.extend(events);
            return self.events.pop_front();
        }
        let active = self.jobs.len().min(self.config.slots as usize);
        for offset in 0..active {
            let at = (self.turn + offset) % active;
            if self.step(at) {
                self.turn = at + 1;
                return self.events.pop_front();
            }
        }
        None
    }

    fn start(&mut self, job: Job) {
        let id = job.id;
        let room = self.config.slots.saturating_add(self.config.queue) as usize;
        if self.jobs.iter().any(|running| running.job.id == id) {
            return self.fail(id, JobError::DuplicateJob);
        }
        if let Err(error) = job.check(self.config.context, VOCAB).and_then(|()| job.check_kind(false)) {
            return self.fail(id, error);
        }
        if self.jobs.len() >= room {
            return self.fail(id, JobError::Busy);
        }
        let mut job = job;
        if job.ignore_eos {
            job.sampling.forbid([EOS]);
        }
        let mut context = Context::new(self.config.model_seed);
        job.prompt.iter().for_each(|token| context.read(*token));
        let mut stop = StopMatcher::new(&job.stop);
        for token in job.resumed_tokens() {
            stop.push(&ToyTokenizer.piece(*token, false).unwrap_or_default());
        }
        let constraint = job.extras.grammar.as_ref().and_then(|grammar| {
            let pieces = (0..VOCAB).map(|token| ToyTokenizer.piece(token, false).unwrap_or_default());
            let mut constraint = Constraint::new(grammar, Arc::new(Vocabulary::new(pieces, &[EOS]))).ok()?;
            let fits = constraint.resume(job.resumed_tokens()) == Ok(true);
            fits.then_some(constraint)
        });
        if job.extras.grammar.is_some() && constraint.is_none() {
            return self.fail(id, JobError::Backend { reason: "the grammar cannot be followed".to_owned() });
        }
        self.jobs.push(Running {
            job,
            prompt_upto: 0,
            output_upto: 0,
            covered: 0,
            cacheable: None,
            evaluated: 0,
            output: Vec::new(),
            context,
            stop,
            constraint,
            keep: true,
        });
    }

    /// One piece of work for a running job; false where its grants allow none.
    fn step(&mut self, at: usize) -> bool {
        let overrun = usize::from(self.config.faults.overrun);
        let running = &self.jobs[at];
        let prompt = running.job.prompt.len();
        if running.covered < running.prompt_upto.min(prompt) {
            self.prefill(at);
            return true;
        }
        if running.covered < prompt {
            return false;
        }
        let output = running.output.len();
        let full = prompt + output >= self.config.context as usize;
        if running.stop.stopped() || running.constraint.as_ref().is_some_and(Constraint::is_over) {
            self.finish(at, FinishReason::Stop);
        } else if output >= running.job.max_output as usize || full {
            self.finish(at, FinishReason::Length);
        } else if output < running.output_upto + overrun && running.output_upto > 0 {
            self.generate(at);
        } else {
            return false;
        }
        true
    }

    fn prefill(&mut self, at: usize) {
        let running = &mut self.jobs[at];
        let prompt = &running.job.prompt;
        let session = running.job.session;
        let cacheable = *running.cacheable.get_or_insert_with(|| {
            let cached = self.cache.iter().find(|(owner, _)| *owner == session).map_or(&[][..], |(_, ids)| ids);
            let shared = cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
            shared.min(prompt.len() - 1)
        });
        let granted = running.prompt_upto.min(prompt.len());
        let from = running.covered.max(cacheable.min(granted));
        let upto = granted.min(from + self.config.batch as usize);
        running.covered = upto;
        running.evaluated += (upto - from) as u32;
        let cached = upto.min(cacheable) as u32;
        self.events.push_back(EngineEvent::Prefilled { job: running.job.id, upto: upto as u32, cached });
    }

    fn generate(&mut self, at: usize) {
        let running = &mut self.jobs[at];
        let first = running.output.len() as u32;
        // The token before is evaluated now; the first output needs only the prompt.
        running.evaluated += u32::from(first > 0);
        let history: Vec<u32> = running.job.prompt.iter().chain(&running.output).copied().collect();
        let position = running.job.draw_position(first);
        let job = running.job.id;
        let logits = running.context.logits();
        let drawn = match &running.constraint {
            Some(constraint) => constraint.draw(&logits, &history, &running.job.sampling, position).ok().flatten(),
            None => sampling::draw(&logits, &history, &running.job.sampling, position),
        };
        let Some(id) = drawn else {
            self.jobs.remove(at);
            return self.fail(job, JobError::Backend { reason: "no token is possible".to_owned() });
        };
        if let Some(constraint) = running.constraint.as_mut() {
            // It was drawn from what fits.
            let _ = constraint.accept(id);
        }
        if let Some(top) = running.job.extras.top_logprobs {
            let entries = vec![sampling::logprobs(&logits, id, top)];
            self.events.push_back(EngineEvent::Logprobs { job, first, entries });
        }
        running.output.push(id);
        running.context.read(id);
        running.stop.push(&ToyTokenizer.piece(id, false).unwrap_or_default());
        let over = running.constraint.as_ref().is_some_and(Constraint::is_over);
        let stopped = id == EOS || running.stop.stopped() || over;
        self.events.push_back(EngineEvent::Tokens { job, first, ids: vec![id] });
        self.tokens_emitted += 1;
        if self.config.faults.die_after_tokens.is_some_and(|limit| self.tokens_emitted >= limit) {
            self.die("the toy was told to die");
        } else if stopped {
            self.finish(at, FinishReason::Stop);
        }
    }

    /// Ends a job and keeps what was evaluated of it for its session.
    fn finish(&mut self, at: usize, reason: FinishReason) {
        let running = self.jobs.remove(at);
        let fed = running.output.len().saturating_sub(1);
        let mut ids = running.job.prompt;
        ids.truncate(running.covered);
        ids.extend(&running.output[..fed]);
        self.cache.retain(|(owner, _)| *owner != running.job.session);
        if running.keep {
            self.cache.push_back((running.job.session, ids));
        }
        if self.cache.len() > MAX_CACHED_SESSIONS {
            self.cache.pop_front();
        }
        let (job, evaluated) = (running.job.id, running.evaluated);
        self.events.push_back(EngineEvent::Finished { job, reason, evaluated });
    }

    fn fail(&mut self, job: JobId, error: JobError) {
        self.events.push_back(EngineEvent::Failed { job, error });
    }
}

fn embedder(config: &ToyConfig) -> Option<(Embedder, ToyTexts)> {
    let ToyConfig { slots, context, batch, .. } = *config;
    let shape =
        EmbedShape { slots, context, vocab: VOCAB, batch, whole: false, alone: config.profile == Profile::Exact };
    config.embeds.map(|dimensions| (Embedder::new(shape), ToyTexts::new(dimensions, config.model_seed)))
}
