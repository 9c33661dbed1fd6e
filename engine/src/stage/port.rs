//! The `Stage` port: what a node asks of an engine process that holds layers `[a, b)` of a model.
//!
//! A stage has no vocabulary and no prompt: hidden rows in, hidden rows out. It keeps the KV cache of many sequences; whose
//! they are and who pays is the node's to know. Rules on positions and batches are in the parent module.
//!
//! # Life of a sequence
//!
//! | state   | awaits                                       | leaves with                                                       |
//! |---------|----------------------------------------------|-------------------------------------------------------------------|
//! | unknown | a piece that starts at 0                     | held (the longest unused sequence without work makes room)        |
//! | held    | pieces, `Trim`, idle time                    | `Forget`, or eviction for another sequence: unknown               |
//! | any     |                                              | `Down`: unknown, with every other                                 |
//!
//! Each work ends with exactly one of `Evaluated` and `Refused`, unless `Down` comes first. A refused work changed nothing but
//! that its sequences may be cut back to the start of its pieces.
//!
//! # What is counted
//!
//! `Evaluated` tells the rows of each purpose and the time that they took of the engine: the time of its batch, shared by
//! rows where several works were one batch. Times of different works never overlap, so their sum is the engine's busy time.

use async_trait::async_trait;
use minicbor::{Decode, Encode};
use satgrid_types::{LayerRange, WorkKind};

use super::codec::{CodecError, HiddenRows};
use crate::port::{EngineDown, JobId, Profile, Speed};

/// Most pieces in one work, and most rows in one work.
pub const MAX_PIECES: usize = 256;
pub const MAX_ROWS: u32 = 2048;

/// Names a work between a node and one stage engine. The node chooses it and never uses one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct WorkId(#[n(0)] pub u64);

/// One KV sequence of one payer: the node numbers the payers, each payer its sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct SequenceId {
    /// The node's own number of the session that pays. No two live sessions share one.
    #[n(0)]
    pub owner: u64,
    #[n(1)]
    pub number: u32,
}

/// Rows of one sequence in a work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Piece {
    #[n(0)]
    pub sequence: SequenceId,
    /// Position of the first row. What the stage holds there and beyond is dropped first.
    #[n(1)]
    pub start: u32,
    #[n(2)]
    pub rows: u32,
    #[n(3)]
    pub purpose: WorkKind,
    /// What its rows are computed for: where a stage's experts are elsewhere, they are paid by job.
    #[n(4)]
    pub job: JobId,
}

/// What the node asks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum StageCommand {
    #[n(0)]
    Evaluate(#[n(0)] StageWork),
    /// Drops the sequence's positions at `upto` and beyond.
    #[n(1)]
    Trim {
        #[n(0)]
        sequence: SequenceId,
        #[n(1)]
        upto: u32,
    },
    /// Drops the whole sequence.
    #[n(2)]
    Forget {
        #[n(0)]
        sequence: SequenceId,
    },
    /// Drops every sequence of an owner.
    #[n(3)]
    ForgetOwner {
        #[n(0)]
        owner: u64,
    },
}

/// Rows to compute in one batch.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StageWork {
    #[n(0)]
    pub id: WorkId,
    #[n(1)]
    pub pieces: Vec<Piece>,
    /// The rows of the pieces, one piece after the other. Rows go out in the same type.
    #[n(2)]
    pub rows: HiddenRows,
    /// False where nobody needs what comes out: the end of a replay.
    #[n(3)]
    pub output: bool,
}

/// What the stage reports.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum StageEvent {
    #[n(0)]
    Evaluated {
        #[n(0)]
        work: WorkId,
        /// As many rows as went in, in the same order and type; none where no output was asked for.
        #[n(1)]
        rows: HiddenRows,
        /// Microseconds of the engine.
        #[n(2)]
        busy_us: u64,
    },
    #[n(1)]
    Refused {
        #[n(0)]
        work: WorkId,
        #[n(1)]
        error: StageError,
    },
    /// The process died, every sequence and work with it. Commands are refused until `Up`.
    #[n(2)]
    Down {
        #[n(0)]
        reason: String,
    },
    #[n(3)]
    Up,
}

/// Why a work was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum StageError {
    /// The sender's fault: see the rules on batches, and the limits of this module.
    #[error("the work breaks the rules: {rule}")]
    #[n(0)]
    BadWork {
        #[n(0)]
        rule: String,
    },
    /// The sender's fault: wrong shape, or numbers that are not finite.
    #[error("the rows that came in: {0}")]
    #[n(1)]
    BadRows(#[n(0)] CodecError),
    /// The sequence was evicted, never begun, or lost with the process: send it again from `held`.
    #[error("sequence {}/{}: positions from {held} on are missing before {start}", sequence.owner, sequence.number)]
    #[n(2)]
    Gap {
        #[n(0)]
        sequence: SequenceId,
        #[n(1)]
        held: u32,
        #[n(2)]
        start: u32,
    },
    /// The sender's fault: it knows the limit from the stage's facts.
    #[error("sequence {}/{}: position {upto} is over the limit of {limit}", sequence.owner, sequence.number)]
    #[n(3)]
    OverContext {
        #[n(0)]
        sequence: SequenceId,
        #[n(1)]
        upto: u32,
        #[n(2)]
        limit: u32,
    },
    /// This stage's limit: all its sequences have work waiting.
    #[error("the stage has no room for another sequence: {limit} are at work")]
    #[n(4)]
    Full {
        #[n(0)]
        limit: u32,
    },
    /// This stage's limit: too much work waits.
    #[error("the stage has no room for another work: {limit} wait")]
    #[n(5)]
    Busy {
        #[n(0)]
        limit: u32,
    },
    /// This stage's fault, or its model's: the computation gave what is no number.
    #[error("the rows that came out: {0}")]
    #[n(6)]
    BadResult(#[n(0)] CodecError),
    /// This stage's fault.
    #[error("the stage's engine failed: {reason}")]
    #[n(7)]
    Backend {
        #[n(0)]
        reason: String,
    },
}

/// Who is to blame for a refusal, and so what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Who sent the work.
    Sender,
    /// The stage that refused it.
    Stage,
    /// Nobody: send the missing positions again.
    Missing,
}

impl StageError {
    pub fn fault(&self) -> Fault {
        match self {
            Self::BadWork { .. } | Self::BadRows(_) | Self::OverContext { .. } => Fault::Sender,
            Self::Gap { .. } => Fault::Missing,
            Self::Full { .. } | Self::Busy { .. } | Self::BadResult(_) | Self::Backend { .. } => Fault::Stage,
        }
    }
}

/// What a stage is and what it runs.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct StageFacts {
    /// The whole model's root, of which the artefact's tensors are proved to be a part.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub model_root: [u8; 32],
    /// `general.architecture`.
    #[n(1)]
    pub architecture: String,
    #[n(2)]
    pub layers: LayerRange,
    /// Layers of the whole model.
    #[n(3)]
    pub model_layers: u32,
    /// Width of a hidden state.
    #[n(4)]
    pub n_embd: u32,
    #[n(5)]
    pub profile: Profile,
    #[cbor(n(6), with = "minicbor::bytes")]
    pub build_id: [u8; 32],
    #[n(7)]
    pub instruction_set: String,
    /// Sequences held at once.
    #[n(8)]
    pub sequences: u32,
    /// Positions of each.
    #[n(9)]
    pub context: u32,
    /// Most rows in one work.
    #[n(10)]
    pub batch: u32,
    /// Measured on this machine over these layers; absent until it was.
    #[n(11)]
    pub speed: Option<Speed>,
    /// Bytes of the artefact's tensors.
    #[n(12)]
    pub tensor_bytes: u64,
    /// `general.name`: a claim, never an identity.
    #[n(13)]
    pub name: Option<String>,
    /// What the weights are stored as, as files are named.
    #[n(14)]
    pub quantisation: String,
    /// Bytes that layers, cache and buffers may take here: what was free before they were loaded, or the cap that was set.
    #[n(15)]
    pub memory_bytes: u64,
}

impl StageWork {
    /// The rules that need no state: pieces, rows, and the bytes of the rows.
    pub fn check(&self, facts: &StageFacts) -> Result<(), StageError> {
        let broken = |rule: &str| Err(StageError::BadWork { rule: rule.to_owned() });
        let rows = self.pieces.iter().try_fold(0_u32, |sum, piece| sum.checked_add(piece.rows));
        if self.pieces.is_empty() || self.pieces.len() > MAX_PIECES {
            return broken("one to 256 pieces");
        }
        if self.pieces.iter().any(|piece| piece.rows == 0) || rows != Some(self.rows.count) {
            return broken("as many rows as the pieces say, none of them empty");
        }
        if self.rows.count > facts.batch.min(MAX_ROWS) {
            return broken("no more rows than the stage's batch");
        }
        if self.pieces.len() > 1 && self.pieces.iter().any(|piece| piece.rows != 1) {
            return broken("one row of each of many sequences, or many rows of one");
        }
        let mut sequences: Vec<SequenceId> = self.pieces.iter().map(|piece| piece.sequence).collect();
        sequences.sort_unstable();
        sequences.dedup();
        if sequences.len() < self.pieces.len() {
            return broken("no sequence twice");
        }
        for piece in &self.pieces {
            let upto = piece.start.saturating_add(piece.rows);
            if upto > facts.context {
                return Err(StageError::OverContext { sequence: piece.sequence, upto, limit: facts.context });
            }
        }
        self.rows.check(facts.n_embd).map_err(StageError::BadRows)
    }
}

/// An engine process that holds some of a model's layers.
#[async_trait]
pub trait Stage: Send + Sync {
    /// Facts as of now; they outlive a `Down`.
    fn facts(&self) -> StageFacts;

    /// Hands a command over and returns at once; the outcome comes as events.
    fn send(&self, command: StageCommand) -> Result<(), EngineDown>;

    /// The next event, in order. One reader at a time; dropping the future loses no event. `None` once the engine was
    /// shut down for good and every event was read.
    async fn next_event(&self) -> Option<StageEvent>;

    /// Whether it takes commands now.
    fn is_up(&self) -> bool;
}
