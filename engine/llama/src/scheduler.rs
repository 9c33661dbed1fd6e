//! Continuous batching: which job sits in which sequence of the context, what it has computed, drawn and told.
//!
//! The scheduler is a state machine without a clock, thread or model: commands go in by [`Scheduler::handle`], one batch at a
//! time is computed by [`Scheduler::step`] over a model that [`Computes`], events come out of [`Scheduler::take_events`]. One
//! thread drives it. It never computes a position beyond a job's grants, and never shows one session another's cache.
//! Where batches are sent away to be computed, several are under way at once: `waves`.
//!
//! | a slot is | its sequence holds                    | leaves with                                               |
//! |-----------|---------------------------------------|-----------------------------------------------------------|
//! | empty     | nothing                               | a job is seated                                           |
//! | running   | the job's first `at` tokens           | the job's end: idle; its rows or the batch failed: empty  |
//! | away      | as running; its next rows are sent    | their batch is back: running, and what was asked meanwhile happens |
//! | idle      | the tokens of its session's last job  | a job of the session with a common start: cut back to it; any other job, longest unused slot first: emptied; `ForgetSession`: emptied |
//!
//! A job is seated when its first grant is in and a slot is free of running jobs; until then it queues.

mod slot;
mod waves;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use satgrid_engine::draft::{Drafter, Lookup};
use satgrid_engine::grammar::Vocabulary;
use satgrid_engine::port::{Command, EngineEvent, FinishReason, Job, JobError, JobId, Profile};

use crate::ffi::{BatchRow, DecodeError};
use crate::plan::{Limits, Plan, Progress, plan_batch};
use slot::{Grant, Running, Slot, Waiting};
pub(crate) use waves::{Failed, Sends};

/// Jobs that wait for a slot or a grant; more are refused as busy.
pub(crate) const MAX_QUEUED: usize = 256;

/// A model in memory: a batch is computed where it stands.
pub(crate) trait Computes: Backend {
    /// Computes the rows, of rising slot and rising position.
    fn evaluate(&mut self, rows: &[BatchRow]) -> Result<(), DecodeError>;
}

/// What the scheduler needs of a model, wherever its batches are computed.
pub(crate) trait Backend {
    /// Logits of a row of the last batch that asked for them.
    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError>;
    /// Drops a sequence's positions at `from` and beyond; false if that is not possible there.
    fn truncate(&mut self, slot: u32, from: u32) -> bool;
    fn is_eog(&self, token: u32) -> bool;
    /// Every end-of-generation token.
    fn eog(&self) -> &[u32];
    fn piece(&self, token: u32) -> Vec<u8>;
    /// The slot's rows are for this job from now on; positions below `prompt` are its prompt.
    fn seated(&mut self, _slot: u32, _job: JobId, _prompt: u32) {}
    /// In the next batch, the slot's rows from this position on are guesses.
    fn guessed(&mut self, _slot: u32, _from: u32) {}
    /// Who guesses for a job in a slot.
    fn drafter(&self, _slot: u32, _job: &Job) -> Box<dyn Drafter> {
        Box::<Lookup>::default()
    }
}

/// The shape of the context that the scheduler fills.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) profile: Profile,
    pub(crate) slots: u32,
    /// Positions of prompt and output that one job may hold.
    pub(crate) context: u32,
    pub(crate) vocab: u32,
    pub(crate) batch: u32,
    pub(crate) prefill_beside_streams: u32,
    /// Guess what streams say next and verify it in the same batch. For a backend that computes a run of rows of each of many
    /// sequences as exactly as single ones: a lead's.
    pub(crate) guess: bool,
}

pub(crate) struct Scheduler {
    shape: Shape,
    slots: Vec<Slot>,
    queue: VecDeque<Waiting>,
    events: Vec<EngineEvent>,
    /// Batches planned so far; orders prompts' turns and slots' last use.
    batches: u64,
    /// Positions in batches that were a prompt's alone, since the last batch that was not.
    since_step: u32,
    /// Made for the first job with a grammar.
    vocabulary: Option<Arc<Vocabulary>>,
    /// Batches under way, by number.
    away: BTreeMap<u64, Vec<End>>,
}

/// A batch as planned.
struct Batch {
    rows: Vec<BatchRow>,
    ends: Vec<End>,
}

/// Of each slot with rows in a batch: the positions it then holds, the row of its last certain one, and what is guessed to
/// follow.
struct End {
    slot: u32,
    at: u32,
    row: usize,
    guess: Vec<u32>,
}

impl Scheduler {
    pub(crate) fn new(shape: Shape) -> Self {
        let slots = (0..shape.slots).map(|_| Slot::default()).collect();
        Self {
            shape,
            slots,
            queue: VecDeque::new(),
            events: Vec::new(),
            batches: 0,
            since_step: 0,
            vocabulary: None,
            away: BTreeMap::new(),
        }
    }

    /// The events since the last call, in order.
    pub(crate) fn take_events(&mut self) -> Vec<EngineEvent> {
        std::mem::take(&mut self.events)
    }

    pub(crate) fn handle(&mut self, command: Command, backend: &mut impl Backend) {
        match command {
            Command::Start(job) => self.start(job),
            Command::Grant { job, prompt_upto, output_upto } => {
                self.grant(job, Grant { prompt: prompt_upto, output: output_upto }, backend);
            }
            Command::Cancel { job } => self.cancel(job),
            Command::ForgetSession { session } => self.forget(session, backend),
        }
    }

    /// Sets how many positions of a prompt may stand between two steps of running streams.
    pub(crate) fn set_prefill_beside_streams(&mut self, positions: u32) {
        self.shape.prefill_beside_streams = positions;
    }

    /// Seats waiting jobs and computes one batch. False if there was nothing to compute.
    pub(crate) fn step(&mut self, backend: &mut impl Computes) -> bool {
        self.seat_waiting(backend);
        let Some(batch) = self.plan(self.shape.batch, backend) else { return false };
        let outcome = backend.evaluate(&batch.rows).map(|()| Failed::new());
        self.book(batch.ends, outcome, backend);
        true
    }

    /// The next batch, with at most so many streams in it.
    fn plan(&mut self, streams: u32, backend: &mut impl Backend) -> Option<Batch> {
        let away = |prefilling: bool| {
            let runs = self.slots.iter().filter(|slot| slot.away).filter_map(|slot| slot.running.as_ref());
            runs.filter(|running| (running.at < running.prompt) == prefilling).count() > 0
        };
        let limits = Limits {
            profile: self.shape.profile,
            batch: self.shape.batch,
            prefill_beside_streams: self.shape.prefill_beside_streams,
            streams,
            streams_away: away(false),
            prompts_away: away(true),
        };
        let jobs: Vec<Progress> = (0_u32..).zip(&self.slots).filter_map(|(slot, s)| s.progress(slot)).collect();
        let Plan { chunks, since_step } = plan_batch(&jobs, &limits, self.since_step);
        if chunks.is_empty() {
            return None;
        }
        self.batches += 1;
        self.since_step = since_step;
        let positions: u32 = chunks.iter().map(|chunk| chunk.upto - chunk.from).sum();

        let mut rows = Vec::new();
        let mut ends = Vec::new();
        let mut room = self.shape.batch.saturating_sub(positions);
        for chunk in &chunks {
            let Some(running) = self.slots.get_mut(chunk.slot as usize).and_then(|slot| slot.running.as_mut()) else {
                continue;
            };
            running.served = self.batches;
            for position in chunk.from..chunk.upto {
                let Some(&token) = running.tokens.get(position as usize) else { continue };
                let output = position + 1 == chunk.upto && chunk.upto >= running.prompt && running.limit > 0;
                rows.push(BatchRow { slot: chunk.slot, position, token, output });
            }
            let row = rows.len().saturating_sub(1);
            let guess = if self.shape.guess && chunk.from >= running.prompt { running.guess(room) } else { Vec::new() };
            if !guess.is_empty() {
                room = room.saturating_sub(to_u32(guess.len()));
                backend.guessed(chunk.slot, chunk.from);
                rows.extend((chunk.upto..).zip(&guess).map(|(position, &token)| {
                    let slot = chunk.slot;
                    BatchRow { slot, position, token, output: true }
                }));
            }
            ends.push(End { slot: chunk.slot, at: chunk.upto, row, guess });
        }
        Some(Batch { rows, ends })
    }

    /// Books a batch that was computed, but for some slots, or failed: its jobs go on from there.
    fn book(&mut self, ends: Vec<End>, outcome: Result<Failed, DecodeError>, backend: &mut impl Backend) {
        match outcome {
            Ok(failed) => {
                for End { slot, at, row, guess } in ends {
                    if let Some(reason) = failed.get(&slot) {
                        self.fail(slot, reason, backend);
                        continue;
                    }
                    self.advance(slot, at, row, backend);
                    self.verify(slot, row, &guess, backend);
                }
            }
            Err(error) => {
                let reason = error.to_string();
                for End { slot, .. } in ends {
                    self.fail(slot, &reason, backend);
                }
            }
        }
    }

    /// No job is seated or waits.
    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.slots.iter().all(|slot| slot.running.is_none())
    }

    fn start(&mut self, job: Job) {
        let id = job.id;
        let refused = if self.find(id).is_some() || self.queue.iter().any(|waiting| waiting.job.id == id) {
            Some(JobError::DuplicateJob)
        } else if self.queue.len() >= MAX_QUEUED {
            Some(JobError::Busy)
        } else {
            job.check(self.shape.context, self.shape.vocab).and_then(|()| job.check_kind(false)).err()
        };
        match refused {
            Some(error) => self.events.push(EngineEvent::Failed { job: id, error }),
            None => self.queue.push_back(Waiting { job, grant: Grant::default() }),
        }
    }

    fn grant(&mut self, id: JobId, grant: Grant, backend: &mut impl Backend) {
        if let Some(waiting) = self.queue.iter_mut().find(|waiting| waiting.job.id == id) {
            waiting.grant.raise(grant);
        } else if let Some(slot) = self.find(id) {
            if let Some(running) = self.slots[slot].running.as_mut() {
                running.grant.raise(grant);
            }
            if self.slots[slot].away {
                // Told when its rows are back.
                return;
            }
            self.tell_prefilled(slot);
            self.emit(slot, backend);
        }
    }

    fn cancel(&mut self, id: JobId) {
        if let Some(at) = self.queue.iter().position(|waiting| waiting.job.id == id) {
            self.queue.remove(at);
            self.events.push(EngineEvent::Finished { job: id, reason: FinishReason::Cancelled, evaluated: 0 });
        } else if let Some(slot) = self.find(id) {
            if self.slots[slot].away {
                self.slots[slot].cancelled = true;
            } else {
                self.finish(slot, FinishReason::Cancelled);
            }
        }
    }

    fn forget(&mut self, session: [u8; 32], backend: &mut impl Backend) {
        for (number, slot) in (0_u32..).zip(&mut self.slots).filter(|(_, slot)| slot.session == Some(session)) {
            match slot.running.as_mut() {
                Some(running) => running.keep = false,
                None => {
                    slot.clear();
                    backend.truncate(number, 0);
                }
            }
        }
    }

    /// Gives slots to waiting jobs that have a grant, first come first served.
    fn seat_waiting(&mut self, backend: &mut impl Backend) {
        while let Some(at) = self.queue.iter().position(|waiting| waiting.grant.prompt > 0) {
            let Some(number) = self.choose_slot(&self.queue[at].job) else { return };
            let Some(waiting) = self.queue.remove(at) else { return };
            self.seat(number, waiting, backend);
        }
    }

    /// The slot for a job: its session's with the longest common start, else an empty one, else the longest unused; of these one
    /// beside a slot that runs, where any is. The library computes the steps of neighbouring sequences at once, and parts a
    /// batch at each gap.
    fn choose_slot(&self, job: &Job) -> Option<usize> {
        let free = || self.slots.iter().enumerate().filter(|(_, slot)| slot.running.is_none());
        let runs = |number: usize| self.slots.get(number).is_some_and(|slot| slot.running.is_some());
        let gap = |number: usize| !runs(number + 1) && !number.checked_sub(1).is_some_and(runs);
        let empty =
            free().filter(|(_, slot)| slot.idle.is_empty()).map(|(number, _)| number).min_by_key(|&n| (gap(n), n));
        let own = free()
            .filter(|(_, slot)| slot.session == Some(job.session))
            .map(|(number, slot)| (common_start(&slot.idle, &job.prompt), number, slot.idle.len()))
            .max_by_key(|&(common, number, _)| (common, std::cmp::Reverse(number)));
        if let Some((common, number, held)) = own {
            // Another conversation of the same session may share no more than its first tokens: leave it if there is room.
            let worth = common * 2 >= held.min(job.prompt.len());
            if common > 0 && (worth || empty.is_none()) {
                return Some(number);
            }
        }
        empty.or_else(|| free().map(|(number, slot)| (gap(number), slot.used, number)).min().map(|(.., number)| number))
    }

    fn seat(&mut self, number: usize, waiting: Waiting, backend: &mut impl Backend) {
        let Waiting { job, grant } = waiting;
        let vocabulary = job.extras.grammar.is_some().then(|| self.vocabulary(backend));
        let constraint = match slot::constraint(&job, vocabulary) {
            Ok(constraint) => constraint,
            Err(reason) => {
                let error = JobError::Backend { reason };
                return self.events.push(EngineEvent::Failed { job: job.id, error });
            }
        };
        let slot = &mut self.slots[number];
        let prompt = to_u32(job.prompt.len());
        let common = if slot.session == Some(job.session) { common_start(&slot.idle, &job.prompt) } else { 0 };
        // The last position is always computed, since its logits are not kept.
        let mut cached = to_u32(common).min(prompt.saturating_sub(1));
        let kept = cached > 0 && backend.truncate(to_u32(number), cached);
        if !kept {
            cached = 0;
            if !slot.idle.is_empty() {
                backend.truncate(to_u32(number), 0);
            }
        }
        slot.idle.clear();
        slot.session = Some(job.session);
        slot.used = self.batches;
        let limit = job.max_output.min(self.shape.context.saturating_sub(prompt));
        backend.seated(to_u32(number), job.id, prompt);
        slot.running = Some(Running::new(job, grant, (to_u32(number), cached), limit, constraint, backend));
        self.tell_prefilled(number);
    }

    fn vocabulary(&mut self, backend: &impl Backend) -> Arc<Vocabulary> {
        let vocab = self.shape.vocab;
        let make = || Arc::new(Vocabulary::new((0..vocab).map(|token| backend.piece(token)), backend.eog()));
        Arc::clone(self.vocabulary.get_or_insert_with(make))
    }

    /// Books a computed chunk: the slot holds `at` positions, and `row` of the batch has the last one's logits.
    fn advance(&mut self, slot: u32, at: u32, row: usize, backend: &mut impl Backend) {
        let number = slot as usize;
        let Some(running) = self.slots[number].running.as_mut() else { return };
        let was_prefilling = running.at < running.prompt;
        running.at = at;
        if at < running.prompt {
            self.tell_prefilled(number);
            return;
        }
        let nothing_to_say = running.limit == 0 || running.over_after == Some(0);
        let drawn = if nothing_to_say { Ok(None) } else { running.draw(row, backend).map(Some) };
        match drawn {
            Ok(token) => {
                running.tokens.extend(token);
                if was_prefilling {
                    self.tell_prefilled(number);
                }
                self.emit(number, backend);
            }
            Err(reason) => self.fail(slot, &reason, backend),
        }
    }

    /// Goes on drawing for as long as what was guessed is what is drawn, and drops the positions of the rest.
    fn verify(&mut self, slot: u32, row: usize, guess: &[u32], backend: &mut impl Backend) {
        if guess.is_empty() {
            return;
        }
        let Some(running) = self.slots[slot as usize].running.as_mut() else {
            // The token before the guess ended the job: what was computed beyond it is nobody's.
            backend.truncate(slot, to_u32(self.slots[slot as usize].idle.len()));
            return;
        };
        let mut right = 0;
        let mut failed = None;
        for (at, &token) in guess.iter().enumerate() {
            let over = running.over_after.is_some() || backend.is_eog(token);
            if over || running.tokens.last() != Some(&token) {
                break;
            }
            running.at += 1;
            right += 1;
            match running.draw(row + 1 + at, backend) {
                Ok(next) => running.tokens.push(next),
                Err(reason) => {
                    failed = Some(reason);
                    break;
                }
            }
        }
        running.drafter.verified(guess.len(), right);
        let at = running.at;
        if failed.is_none() && right < guess.len() && !backend.truncate(slot, at) {
            failed = Some("what was guessed wrongly cannot be dropped".to_owned());
        }
        match failed {
            Some(reason) => self.fail(slot, &reason, backend),
            None => self.emit(slot as usize, backend),
        }
    }

    /// Tells how far the prompt is covered, if that is news and granted.
    fn tell_prefilled(&mut self, number: usize) {
        let Some(running) = self.slots[number].running.as_mut() else { return };
        let upto = running.at.min(running.prompt).min(running.grant.prompt);
        let now = (upto, running.cached.min(upto));
        if now.0 > running.told.0 {
            running.told = now;
            self.events.push(EngineEvent::Prefilled { job: running.job.id, upto: now.0, cached: now.1 });
        }
    }

    /// Tells the tokens that are drawn and granted, and ends the job where one of them does.
    fn emit(&mut self, number: usize, backend: &impl Backend) {
        let Some(running) = self.slots[number].running.as_mut() else { return };
        if running.at < running.prompt {
            return;
        }
        let mut ended = match running.over_after {
            Some(0) => Some(FinishReason::Stop),
            Some(_) | None => (running.limit == 0).then_some(FinishReason::Length),
        };
        while ended.is_none() && running.emitted < running.grant.output {
            let Some(&token) = running.tokens.get((running.prompt + running.emitted) as usize) else { break };
            let (job, first) = (running.job.id, running.emitted);
            if let Some(entry) = running.logprobs.pop_front() {
                self.events.push(EngineEvent::Logprobs { job, first, entries: vec![entry] });
            }
            self.events.push(EngineEvent::Tokens { job, first, ids: vec![token] });
            running.emitted += 1;
            if backend.is_eog(token) || running.stops_at(token, backend) || running.over_after == Some(running.emitted)
            {
                ended = Some(FinishReason::Stop);
            } else if running.emitted >= running.limit {
                ended = Some(FinishReason::Length);
            }
        }
        if let Some(reason) = ended {
            self.finish(number, reason);
        }
    }

    /// Ends a job in good order; its tokens stay in the slot for the session's next one.
    fn finish(&mut self, number: usize, reason: FinishReason) {
        let slot = &mut self.slots[number];
        let Some(running) = slot.running.take() else { return };
        // What was guessed rightly beyond the end is no part of the job.
        let said = running.prompt.saturating_add(running.emitted.saturating_sub(1));
        let upto = if reason == FinishReason::Stop { running.at.min(said) } else { running.at };
        let evaluated = upto.saturating_sub(running.cached);
        slot.used = self.batches;
        slot.idle = running.tokens;
        slot.idle.truncate(running.at as usize);
        if !running.keep {
            // The cells are freed when the slot is next seated; without an owner no job can match them.
            slot.session = None;
        }
        self.events.push(EngineEvent::Finished { job: running.job.id, reason, evaluated });
    }

    fn fail(&mut self, slot: u32, reason: &str, backend: &mut impl Backend) {
        let number = slot as usize;
        let Some(running) = self.slots[number].running.take() else { return };
        self.slots[number].clear();
        backend.truncate(slot, 0);
        let error = JobError::Backend { reason: reason.to_owned() };
        self.events.push(EngineEvent::Failed { job: running.job.id, error });
    }

    fn find(&self, id: JobId) -> Option<usize> {
        self.slots.iter().position(|slot| slot.running.as_ref().is_some_and(|running| running.job.id == id))
    }
}

pub(crate) fn common_start(held: &[u32], prompt: &[u32]) -> usize {
    held.iter().zip(prompt).take_while(|(a, b)| a == b).count()
}

fn to_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
