//! The scheduler's backend over two ends and a ring.

use std::collections::VecDeque;
use std::time::Duration;

use satgrid_engine::port::{Command, JobId};
use satgrid_engine::stage::ring::{RingCommand, RingEvent};

use super::ends::LlamaEnds;
use super::trip::{Trip, TripShape, Way};
use crate::ffi::{BatchRow, DecodeError};
use crate::scheduler::Backend;
use crate::wire::{FromWorker, ToWorker};
use crate::worker::{Link, Stop};

/// The socket to the node, which carries the node's commands and the ring's words.
pub(crate) struct Wayside<'a> {
    link: &'a mut Link,
    /// Commands that came while a batch was under way.
    commands: VecDeque<Command>,
    /// Words of the ring that came between batches.
    heard: VecDeque<RingEvent>,
    gone: bool,
}

/// What the loop asks of the socket.
// It lives for one turn of the loop; a box would cost more than the bytes.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Next {
    Command(Command),
    /// Nothing came in time.
    Nothing,
}

impl<'a> Wayside<'a> {
    fn new(link: &'a mut Link) -> Self {
        Self { link, commands: VecDeque::new(), heard: VecDeque::new(), gone: false }
    }

    fn sort(&mut self, word: ToWorker) {
        match word {
            ToWorker::Command(command) => self.commands.push_back(command),
            ToWorker::Ring(event) => self.heard.push_back(event),
            ToWorker::Stage(_)
            | ToWorker::Tokenize { .. }
            | ToWorker::Names { .. }
            | ToWorker::ExpertOutputs(_)
            | ToWorker::ExpertCall { .. } => {
                tracing::error!("a lead's engine was asked for something else than jobs");
            }
        }
    }

    fn next(&mut self, wait: Option<Duration>) -> Result<Next, Stop> {
        use std::sync::mpsc::RecvTimeoutError;
        loop {
            if let Some(command) = self.commands.pop_front() {
                return Ok(Next::Command(command));
            }
            let word = match wait {
                None => Ok(self.link.requests.recv().map_err(|_| Stop::ParentGone)?),
                Some(wait) => self.link.requests.recv_timeout(wait),
            };
            match word {
                Ok(word) => self.sort(word),
                Err(RecvTimeoutError::Timeout) => return Ok(Next::Nothing),
                Err(RecvTimeoutError::Disconnected) => return Err(Stop::ParentGone),
            }
        }
    }
}

impl Way for Wayside<'_> {
    fn send(&mut self, command: RingCommand) -> Result<(), DecodeError> {
        let sent = self.link.send(&FromWorker::Ring(command));
        sent.map_err(|error| DecodeError::Ring { reason: format!("the node does not listen: {error}") })
    }

    fn wait(&mut self) -> Result<RingEvent, DecodeError> {
        loop {
            if let Some(event) = self.heard.pop_front() {
                return Ok(event);
            }
            match self.link.requests.recv() {
                Ok(word) => self.sort(word),
                Err(_) => {
                    self.gone = true;
                    return Err(DecodeError::Ring { reason: "the node is gone".to_owned() });
                }
            }
        }
    }
}

pub(crate) struct RingBackend<'a> {
    ends: LlamaEnds,
    trip: Trip,
    way: Wayside<'a>,
}

impl<'a> RingBackend<'a> {
    pub(crate) fn new(ends: LlamaEnds, shape: TripShape, link: &'a mut Link) -> Self {
        Self { ends, trip: Trip::new(shape), way: Wayside::new(link) }
    }

    /// The next command of the node; waits as long as told, for ever if not.
    pub(crate) fn next_command(&mut self, wait: Option<Duration>) -> Result<Next, Stop> {
        let next = self.way.next(wait)?;
        while let Some(event) = self.way.heard.pop_front() {
            self.trip.hear(event);
        }
        Ok(next)
    }

    pub(crate) fn say(&mut self, message: &FromWorker) -> Result<(), Stop> {
        if self.way.gone {
            return Err(Stop::ParentGone);
        }
        Ok(self.way.link.send(message)?)
    }
}

impl Backend for RingBackend<'_> {
    fn evaluate(&mut self, rows: &[BatchRow]) -> Result<(), DecodeError> {
        while let Some(event) = self.way.heard.pop_front() {
            self.trip.hear(event);
        }
        self.trip.evaluate(rows, &mut self.ends, &mut self.way)
    }

    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        self.trip.logits(row, &mut self.ends)
    }

    fn truncate(&mut self, slot: u32, from: u32) -> bool {
        // That the node is gone shows in the loop.
        self.trip.truncate(slot, from, &mut self.ends, &mut self.way).unwrap_or(false)
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
}
