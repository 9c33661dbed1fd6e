//! An engine that embeds: which text is computed next, what was covered, and each text's row. The machine that every engine
//! of an embedding model runs; what computes is behind [`Texts`].
//!
//! It has no clock, thread or model: commands go in by [`Embedder::handle`], one batch at a time is computed by
//! [`Embedder::step`], events come out of [`Embedder::take_events`]. Nothing is kept of a text beyond its row: there is no
//! cache that a later job could gain by.
//!
//! | a job | awaits | leaves with |
//! |---|---|---|
//! | waits | a grant, a free slot | seated |
//! | is seated | grants of its next text: all of it where the model reads texts whole, else any positions | its last text's row: finished; a failed batch: failed |

use std::collections::VecDeque;

use crate::port::{Command, EngineEvent, FinishReason, Job, JobError, JobId};

/// Jobs that wait for a slot; more are refused as busy.
pub const MAX_WAITING: usize = 256;

/// Positions of one text, next to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextRun<'a> {
    /// Where the text's state is kept until its end.
    pub slot: u32,
    /// Position of the first id within its text.
    pub from: u32,
    pub ids: &'a [u32],
    /// The text ends here: its row is wanted.
    pub ends: bool,
}

/// What computes.
pub trait Texts {
    /// Computes the runs, each of another slot. Rows of those that end their text, in the order of the runs. The error is for
    /// the log and the asker.
    fn evaluate(&mut self, runs: &[TextRun<'_>]) -> Result<Vec<Vec<f32>>, String>;
    /// The slot's text is over, or given up.
    fn clear(&mut self, slot: u32);
}

/// How the machine fills its batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbedShape {
    /// Texts in hand at once.
    pub slots: u32,
    /// Positions of one text.
    pub context: u32,
    pub vocab: u32,
    /// Positions in one batch; where texts are read whole, at least `context`.
    pub batch: u32,
    /// The model sees a text in both directions, or pools all its rows: no text is computed in pieces.
    pub whole: bool,
    /// One text in a batch: what stands beside it must change no bit of its row.
    pub alone: bool,
}

/// One job and how far it is.
#[derive(Debug)]
struct Seat {
    job: Job,
    lengths: Vec<u32>,
    granted: u32,
    /// Positions computed.
    at: u32,
    /// Positions told as covered.
    told: u32,
    /// The text in hand, and where it begins.
    text: usize,
    begin: u32,
    slot: Option<u32>,
}

impl Seat {
    /// Where the text in hand ends.
    fn end(&self) -> u32 {
        self.begin.saturating_add(self.lengths.get(self.text).copied().unwrap_or(0))
    }
}

#[derive(Debug)]
pub struct Embedder {
    shape: EmbedShape,
    seats: VecDeque<Seat>,
    events: Vec<EngineEvent>,
}

impl Embedder {
    pub fn new(shape: EmbedShape) -> Embedder {
        Embedder { shape, seats: VecDeque::new(), events: Vec::new() }
    }

    /// The events since the last call, in order.
    pub fn take_events(&mut self) -> Vec<EngineEvent> {
        std::mem::take(&mut self.events)
    }

    pub fn handle(&mut self, command: Command, texts: &mut impl Texts) {
        match command {
            Command::Start(job) => self.start(job),
            Command::Grant { job, prompt_upto, .. } => {
                if let Some(at) = self.find(job) {
                    let seat = &mut self.seats[at];
                    seat.granted = seat.granted.max(prompt_upto.min(u32::try_from(seat.job.prompt.len()).unwrap_or(0)));
                    self.tell(at);
                }
            }
            Command::Cancel { job } => {
                if let Some(seat) = self.find(job).and_then(|at| self.remove(at, texts)) {
                    let reason = FinishReason::Cancelled;
                    self.events.push(EngineEvent::Finished { job, reason, evaluated: seat.at });
                }
            }
            // Nothing is kept of a session.
            Command::ForgetSession { .. } => {}
        }
    }

    /// Computes one batch. False if there was nothing to compute.
    pub fn step(&mut self, texts: &mut impl Texts) -> bool {
        self.seat_waiting();
        let (picked, runs) = self.plan();
        if runs.is_empty() {
            return false;
        }
        let told = texts.evaluate(&runs);
        let ends: Vec<(u32, bool)> =
            runs.iter().map(|run| (u32::try_from(run.ids.len()).unwrap_or(0), run.ends)).collect();
        match told {
            Ok(rows) => {
                let mut rows = rows.into_iter();
                for (job, (count, ended)) in picked.iter().zip(ends) {
                    let row = if ended { rows.next() } else { None };
                    self.advance(*job, count, ended, row.as_deref(), texts);
                }
            }
            Err(reason) => picked.iter().for_each(|job| self.fail(*job, &reason, texts)),
        }
        // Who was served goes behind those that were not.
        let (served, mut others): (VecDeque<Seat>, VecDeque<Seat>) =
            self.seats.drain(..).partition(|seat| picked.contains(&seat.job.id));
        others.extend(served);
        self.seats = others;
        true
    }

    fn start(&mut self, job: Job) {
        let id = job.id;
        let waiting = self.seats.iter().filter(|seat| seat.slot.is_none()).count();
        let refused = if self.find(id).is_some() {
            Some(JobError::DuplicateJob)
        } else if waiting >= MAX_WAITING {
            Some(JobError::Busy)
        } else {
            job.check(self.shape.context, self.shape.vocab).and_then(|()| job.check_kind(true)).err()
        };
        match (refused, job.extras.embed.clone()) {
            (None, Some(lengths)) => {
                let seat = Seat { job, lengths, granted: 0, at: 0, told: 0, text: 0, begin: 0, slot: None };
                self.seats.push_back(seat);
            }
            (error, _) => {
                let error = error.unwrap_or(JobError::BadTexts);
                self.events.push(EngineEvent::Failed { job: id, error });
            }
        }
    }

    fn seat_waiting(&mut self) {
        for slot in 0..self.shape.slots {
            if self.seats.iter().any(|seat| seat.slot == Some(slot)) {
                continue;
            }
            let next = self.seats.iter_mut().find(|seat| seat.slot.is_none() && seat.granted > 0);
            let Some(seat) = next else { return };
            seat.slot = Some(slot);
        }
    }

    /// The jobs of the next batch, and their runs.
    fn plan(&self) -> (Vec<JobId>, Vec<TextRun<'_>>) {
        let (mut picked, mut runs) = (Vec::new(), Vec::new());
        let mut room = self.shape.batch;
        for seat in &self.seats {
            let Some(slot) = seat.slot else { continue };
            let (end, whole) = (seat.end(), self.shape.whole);
            let upto = end.min(seat.granted).min(seat.at.saturating_add(room));
            if upto <= seat.at || (whole && upto < end) {
                continue;
            }
            let range = usize::try_from(seat.at).unwrap_or(usize::MAX)..usize::try_from(upto).unwrap_or(0);
            let Some(ids) = seat.job.prompt.get(range) else { continue };
            room -= upto - seat.at;
            picked.push(seat.job.id);
            runs.push(TextRun { slot, from: seat.at - seat.begin, ids, ends: upto == end });
            if self.shape.alone {
                break;
            }
        }
        (picked, runs)
    }

    /// Books a computed run.
    fn advance(&mut self, job: JobId, count: u32, ended: bool, row: Option<&[f32]>, texts: &mut impl Texts) {
        let Some(at) = self.find(job) else { return };
        let seat = &mut self.seats[at];
        seat.at = seat.at.saturating_add(count);
        if ended {
            let Some(row) = row.and_then(unit) else {
                return self.fail(job, "the model gave a row without a direction", texts);
            };
            let index = u32::try_from(seat.text).unwrap_or(u32::MAX);
            self.events.push(EngineEvent::Embedded { job, index, row });
            (seat.text, seat.begin) = (seat.text + 1, seat.at);
            if let Some(slot) = seat.slot {
                texts.clear(slot);
            }
        }
        self.tell(at);
        let seat = &self.seats[at];
        if seat.text == seat.lengths.len() {
            let evaluated = seat.at;
            self.remove(at, texts);
            self.events.push(EngineEvent::Finished { job, reason: FinishReason::Stop, evaluated });
        }
    }

    /// Tells what is covered, where that grew.
    fn tell(&mut self, at: usize) {
        let whole = self.shape.whole;
        let seat = &mut self.seats[at];
        // A text that must be there whole is taken in piece by piece.
        let covered = if whole && seat.granted < seat.end() { seat.at.max(seat.granted) } else { seat.at };
        if covered > seat.told {
            seat.told = covered;
            self.events.push(EngineEvent::Prefilled { job: seat.job.id, upto: covered, cached: 0 });
        }
    }

    fn fail(&mut self, job: JobId, reason: &str, texts: &mut impl Texts) {
        if let Some(at) = self.find(job) {
            self.remove(at, texts);
            let error = JobError::Backend { reason: reason.to_owned() };
            self.events.push(EngineEvent::Failed { job, error });
        }
    }

    fn remove(&mut self, at: usize, texts: &mut impl Texts) -> Option<Seat> {
        let seat = self.seats.remove(at)?;
        if let Some(slot) = seat.slot {
            texts.clear(slot);
        }
        Some(seat)
    }

    fn find(&self, id: JobId) -> Option<usize> {
        self.seats.iter().position(|seat| seat.job.id == id)
    }
}

/// The row at length 1, as little-endian bytes; `None` where it has no direction.
fn unit(row: &[f32]) -> Option<Vec<u8>> {
    let length = row.iter().map(|number| f64::from(*number) * f64::from(*number)).sum::<f64>().sqrt();
    let sound = length.is_finite() && length > 0.0;
    sound.then(|| row.iter().flat_map(|number| ((f64::from(*number) / length) as f32).to_le_bytes()).collect())
}
