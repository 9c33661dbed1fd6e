//! The scheduler's backend over two ends and a ring.

use std::time::Duration;

use satgrid_engine::draft::{Drafter, Lookup};
use satgrid_engine::port::{Command, Job, JobId};
use satgrid_engine::stage::ring::RingCommand;

use super::ends::LlamaEnds;
use super::trip::{Trip, TripShape, Way};
use crate::draft::DraftModel;
use crate::ffi::{BatchRow, DecodeError};
use crate::scheduler::{Backend, Failed, Sends};
use crate::wire::{FromWorker, ToWorker};
use crate::worker::{Link, Stop};

/// What came over the socket, which carries the node's commands and the ring's words.
// It lives for one turn of the loop; a box would cost more than the bytes.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Next {
    Command(Command),
    /// A word of the ring, which was taken in.
    Word,
    /// Nothing came in time.
    Nothing,
}

impl Way for Link {
    fn send(&mut self, command: RingCommand) -> Result<(), DecodeError> {
        let sent = Link::send(self, &FromWorker::Ring(command));
        sent.map_err(|error| DecodeError::Ring { reason: format!("the node does not listen: {error}") })
    }
}

pub(crate) struct RingBackend<'a> {
    ends: LlamaEnds,
    trip: Trip,
    draft: Option<DraftModel>,
    link: &'a mut Link,
}

impl<'a> RingBackend<'a> {
    pub(crate) fn new(ends: LlamaEnds, shape: TripShape, draft: Option<DraftModel>, link: &'a mut Link) -> Self {
        Self { ends, trip: Trip::new(shape), draft, link }
    }

    /// What the node says next; waits as long as told, for ever if not.
    pub(crate) fn next(&mut self, wait: Option<Duration>) -> Result<Next, Stop> {
        let word = match wait {
            None => self.link.wait()?,
            Some(wait) => match self.link.next(wait)? {
                Some(word) => word,
                None => return Ok(Next::Nothing),
            },
        };
        match word {
            ToWorker::Command(command) => return Ok(Next::Command(command)),
            ToWorker::Ring(event) => self.trip.heard(event, &mut self.ends, self.link),
            ToWorker::Stage(_)
            | ToWorker::Tokenize { .. }
            | ToWorker::Names { .. }
            | ToWorker::Render(_)
            | ToWorker::ExpertOutputs(_)
            | ToWorker::ExpertCall { .. } => {
                tracing::error!("a lead's engine was asked for something else than jobs");
            }
        }
        Ok(Next::Word)
    }

    pub(crate) fn say(&mut self, message: &FromWorker) -> Result<(), Stop> {
        Ok(self.link.send(message)?)
    }
}

impl Sends for RingBackend<'_> {
    fn waves(&self) -> u32 {
        self.trip.waves()
    }

    fn room(&self) -> bool {
        self.trip.room()
    }

    fn launch(&mut self, batch: u64, rows: &[BatchRow]) -> Result<(), DecodeError> {
        self.trip.launch(batch, rows, &mut self.ends, self.link)
    }

    fn landed(&mut self) -> Option<(u64, Result<Failed, DecodeError>)> {
        self.trip.landed(&mut self.ends, self.link)
    }
}

impl Backend for RingBackend<'_> {
    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        self.trip.logits(row, &mut self.ends)
    }

    fn truncate(&mut self, slot: u32, from: u32) -> bool {
        // That the node is gone shows in the loop.
        self.trip.truncate(slot, from, &mut self.ends, self.link).unwrap_or(false)
    }

    fn is_eog(&self, token: u32) -> bool {
        self.ends.tail.is_eog(token)
    }

    fn eog(&self) -> &[u32] {
        self.ends.tail.eog()
    }

    fn piece(&self, token: u32) -> Vec<u8> {
        self.ends.tail.piece(token)
    }

    fn seated(&mut self, slot: u32, job: JobId, prompt: u32) {
        self.trip.seated(slot, job, prompt);
    }

    fn guessed(&mut self, slot: u32, from: u32) {
        self.trip.guessed(slot, from);
    }

    fn drafter(&self, slot: u32, job: &Job) -> Box<dyn Drafter> {
        match &self.draft {
            Some(draft) => draft.drafter(slot, job),
            None => Box::<Lookup>::default(),
        }
    }
}
