//! The `Ring` port: what a lead's engine asks of the world between its two ends.
//!
//! The lead's engine computes the first layers, sends the rows through all middle stages, takes them back and computes the
//! last layers and the head. Where the stages are, how rows travel and who is paid is the ring's affair; a ring has one plan
//! of stages that tile `[head's end, tail's start)`, and replaces a stage that it loses.
//!
//! # Loss and replay
//!
//! | what happens                                | the ring                                        | the lead's engine                          |
//! |---------------------------------------------|-------------------------------------------------|--------------------------------------------|
//! | a stage or link is lost                     | holds what it is given, looks for a replacement | waits                                      |
//! | a replacement is there                      | rebuilds its cache from kept rows where it can (`kept`), then tells `NeedsReplay` for the rest, or `held` at the full length | takes every unanswered work of those sequences as void; sends replays from `held` on, then those works again under new ids with `again` set |
//! | a stage evicted a sequence (`Gap`)          | tells `NeedsReplay` of that one                 | the same                                   |
//! | a job's order ends and nobody else takes it, or its rows are refused | `Ended` of that job | it fails; what others had in the same works goes again without its rows, under new ids with `again` set |
//! | there is no replacement, or the plan is over| `Failed`                                        | the jobs fail; later works may try again   |
//!
//! A replay is a work with `ends_at`: the stages before that one compute the positions again, that one computes them for the
//! first time and sends nothing on; the ring answers with no rows. An answer to a work that is void is ignored.
//!
//! # What is counted
//!
//! `purpose` is the lead's own view: `Replay` exactly for positions whose rows had come back before. A work that is sent
//! `again` was under way when a stage was lost: the stages before the lost one may have computed it already, and book it
//! as replay; to the others it is new.

use async_trait::async_trait;
use minicbor::{Decode, Encode};
use satgrid_types::{LayerRange, WireType, WorkKind};

use super::codec::HiddenRows;
use super::port::WorkId;
use crate::port::{EngineDown, JobId};

/// What the lead's engine may count on.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RingFacts {
    /// The middle stages in order. Empty where the lead holds every layer.
    #[n(0)]
    pub stages: Vec<LayerRange>,
    /// Sequences that every stage has room for.
    #[n(1)]
    pub sequences: u32,
    /// Positions of each, the least of all stages.
    #[n(2)]
    pub context: u32,
    /// Most rows in one work, the least of all stages.
    #[n(3)]
    pub batch: u32,
    /// The lead's choice; receipts say it.
    #[n(4)]
    pub wire: WireType,
}

/// Rows of one job in a work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct RingPiece {
    /// Whose work it is: bills and tickets go by requests.
    #[n(0)]
    pub job: JobId,
    /// The lead's number of a KV sequence, below its slots. Jobs follow each other in one and share what they can.
    #[n(1)]
    pub sequence: u32,
    #[n(2)]
    pub start: u32,
    #[n(3)]
    pub rows: u32,
    #[n(4)]
    pub purpose: WorkKind,
}

/// Rows to send through the middle stages.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RingWork {
    #[n(0)]
    pub id: WorkId,
    #[n(1)]
    pub pieces: Vec<RingPiece>,
    #[n(2)]
    pub rows: HiddenRows,
    /// The last stage that computes these rows, counted from 0; all of them where absent.
    #[n(3)]
    pub ends_at: Option<u32>,
    /// Sent before under another id, and not answered.
    #[n(4)]
    pub again: bool,
}

/// What the lead's engine asks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum RingCommand {
    #[n(0)]
    Work(#[n(0)] RingWork),
    /// Nothing of the sequence will be used again.
    #[n(1)]
    Forget {
        #[n(0)]
        sequence: u32,
    },
    /// The lead's engine began anew: no sequence is held and no answer is awaited.
    #[n(2)]
    Reset,
    /// The job is over, with this many positions sent for it: its requests at the stages can be settled.
    #[n(3)]
    JobOver {
        #[n(0)]
        job: JobId,
    },
}

/// How far a stage that was replaced holds a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Held {
    #[n(0)]
    pub sequence: u32,
    #[n(1)]
    pub upto: u32,
}

/// What the ring tells.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum RingEvent {
    /// The rows of a work, through all stages; none for a replay.
    #[n(0)]
    Done {
        #[n(0)]
        work: WorkId,
        #[n(1)]
        rows: HiddenRows,
    },
    /// The stage holds these sequences only so far; every unanswered work of them is void. After a replacement that is every
    /// sequence that a work was sent for and that was not forgotten, also where the stage holds nothing.
    #[n(1)]
    NeedsReplay {
        #[n(0)]
        stage: u32,
        #[n(1)]
        held: Vec<Held>,
    },
    /// Nothing that is under way will be answered, and no sequence is held any more. Later works, which start at 0, may try.
    #[n(2)]
    Failed {
        #[n(0)]
        reason: String,
    },
    /// These jobs cannot go on; every unanswered work with a piece of theirs is void. Works that come with one all the same are too, and
    /// it is told again.
    #[n(3)]
    Ended {
        #[n(0)]
        jobs: Vec<JobId>,
        #[n(1)]
        reason: String,
    },
}

/// The stages between a lead's two ends.
#[async_trait]
pub trait Ring: Send + Sync {
    /// The plan as of now. Its tiling, and what it says of limits and type, hold for the life of the ring; the number of
    /// stages does too, since a replacement takes the very range of the one that was lost.
    fn facts(&self) -> RingFacts;

    /// Hands a command over and returns at once; the outcome comes as events.
    fn send(&self, command: RingCommand) -> Result<(), EngineDown>;

    /// The next event, in order. One reader at a time; dropping the future loses no event. `None` once the ring is gone
    /// for good.
    async fn next_event(&self) -> Option<RingEvent>;
}
