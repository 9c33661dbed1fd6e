//! A ring over stage engines of this very process: what a model costs when it is merely cut, and a second user of both ports.
//!
//! It carries rows from stage to stage, hears when a stage's process has died, waits until it is up again and asks for a
//! replay. There is no network, no ticket and no money here.

use satgrid_types::{WireType, WorkKind};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use satgrid_engine::port::EngineDown;
use satgrid_engine::stage::codec::HiddenRows;
use satgrid_engine::stage::port::{Piece, SequenceId, Stage, StageCommand, StageError, StageEvent, StageWork, WorkId};
use satgrid_engine::stage::ring::{Held, Ring, RingCommand, RingEvent, RingFacts, RingPiece, RingWork};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, channel, unbounded_channel};

/// How long a dead stage is waited for.
const REPLACED_WITHIN: Duration = Duration::from_secs(60);
/// Events of a stage that wait.
const INBOX: usize = 64;

/// Positions that a stage computed, by purpose, and its busy time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StageCounts {
    pub positions: BTreeMap<WorkKind, u64>,
    pub busy_us: u64,
}

pub struct LocalRing {
    facts: RingFacts,
    commands: UnboundedSender<RingCommand>,
    events: tokio::sync::Mutex<UnboundedReceiver<RingEvent>>,
    counts: Arc<Mutex<Vec<StageCounts>>>,
}

impl LocalRing {
    /// A ring over stages in the order of their layers.
    pub fn new(stages: Vec<Arc<dyn Stage>>, wire: WireType) -> Arc<Self> {
        let all: Vec<_> = stages.iter().map(|stage| stage.facts()).collect();
        let facts = RingFacts {
            stages: all.iter().map(|facts| facts.layers).collect(),
            sequences: all.iter().map(|facts| facts.sequences).min().unwrap_or(u32::MAX),
            context: all.iter().map(|facts| facts.context).min().unwrap_or(u32::MAX),
            batch: all.iter().map(|facts| facts.batch).min().unwrap_or(u32::MAX),
            wire,
        };
        let (commands, orders) = unbounded_channel();
        let (sink, events) = unbounded_channel();
        let counts = Arc::new(Mutex::new(vec![StageCounts::default(); stages.len()]));
        let carrier = Carrier {
            down: vec![false; stages.len()],
            stages,
            under_way: BTreeMap::new(),
            next: 0,
            sequences: BTreeSet::new(),
            events: sink,
            counts: Arc::clone(&counts),
        };
        tokio::spawn(carrier.run(orders));
        Arc::new(Self { facts, commands, events: tokio::sync::Mutex::new(events), counts })
    }

    /// What each stage computed so far.
    pub fn counts(&self) -> Vec<StageCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Ring for LocalRing {
    fn facts(&self) -> RingFacts {
        self.facts.clone()
    }

    fn send(&self, command: RingCommand) -> Result<(), EngineDown> {
        self.commands.send(command).map_err(|_| EngineDown)
    }

    async fn next_event(&self) -> Option<RingEvent> {
        self.events.lock().await.recv().await
    }
}

/// A work at a stage.
struct Carried {
    /// The lead's id of it.
    work: WorkId,
    pieces: Vec<RingPiece>,
    ends_at: Option<u32>,
    stage: usize,
}

struct Carrier {
    stages: Vec<Arc<dyn Stage>>,
    down: Vec<bool>,
    under_way: BTreeMap<WorkId, Carried>,
    next: u64,
    sequences: BTreeSet<u32>,
    events: UnboundedSender<RingEvent>,
    counts: Arc<Mutex<Vec<StageCounts>>>,
}

impl Carrier {
    async fn run(mut self, mut orders: UnboundedReceiver<RingCommand>) {
        let (inbox, mut heard) = channel(INBOX);
        for (at, stage) in self.stages.iter().enumerate() {
            let (inbox, stage) = (inbox.clone(), Arc::clone(stage));
            tokio::spawn(async move {
                loop {
                    // Ends with the stage, or with the ring.
                    let event = tokio::select! {
                        event = stage.next_event() => event,
                        () = inbox.closed() => return,
                    };
                    let Some(event) = event else { return };
                    if inbox.send((at, event)).await.is_err() {
                        return;
                    }
                }
            });
        }
        drop(inbox);
        loop {
            let hopeless = async {
                match self.down.iter().any(|down| *down) {
                    true => tokio::time::sleep(REPLACED_WITHIN).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.order(order),
                    None => return,
                },
                Some((at, event)) = heard.recv() => self.heard(at, event),
                () = hopeless => self.fail("a stage is down and does not come back".to_owned()),
            }
        }
    }

    fn order(&mut self, order: RingCommand) {
        match order {
            RingCommand::Work(RingWork { id, pieces, rows, ends_at, .. }) => {
                self.sequences.extend(pieces.iter().map(|piece| piece.sequence));
                self.pass(Carried { work: id, pieces, ends_at, stage: 0 }, rows);
            }
            RingCommand::Forget { sequence } => {
                self.sequences.remove(&sequence);
                let sequence = SequenceId { owner: 0, number: sequence };
                for stage in &self.stages {
                    // A stage that is down holds nothing.
                    let _ = stage.send(StageCommand::Forget { sequence });
                }
            }
            RingCommand::Reset => {
                self.under_way.clear();
                self.sequences.clear();
                for stage in &self.stages {
                    let _ = stage.send(StageCommand::ForgetOwner { owner: 0 });
                }
            }
            RingCommand::JobOver { .. } => {}
        }
    }

    /// Hands rows to a stage. What is lost with a stage that is down is asked for again when it is up.
    fn pass(&mut self, carried: Carried, rows: HiddenRows) {
        let last = carried.ends_at.map_or(self.stages.len().saturating_sub(1), |stage| stage as usize);
        let Some(stage) = self.stages.get(carried.stage) else { return };
        self.next += 1;
        let id = WorkId(self.next);
        let piece = |piece: &RingPiece| Piece {
            sequence: SequenceId { owner: 0, number: piece.sequence },
            start: piece.start,
            rows: piece.rows,
            purpose: piece.purpose,
            job: piece.job,
        };
        let output = carried.ends_at.is_none() || carried.stage < last;
        let work = StageWork { id, pieces: carried.pieces.iter().map(piece).collect(), rows, output };
        if stage.send(StageCommand::Evaluate(work)).is_ok() {
            self.under_way.insert(id, carried);
        }
    }

    fn heard(&mut self, at: usize, event: StageEvent) {
        match event {
            StageEvent::Evaluated { work, rows, busy_us } => {
                let Some(mut carried) = self.under_way.remove(&work) else { return };
                if let Some(counts) = self.counts.lock().unwrap_or_else(PoisonError::into_inner).get_mut(at) {
                    counts.busy_us += busy_us;
                    for piece in &carried.pieces {
                        *counts.positions.entry(piece.purpose).or_default() += u64::from(piece.rows);
                    }
                }
                let last = carried.ends_at.map_or(self.stages.len() - 1, |stage| stage as usize);
                if carried.stage < last {
                    carried.stage += 1;
                    self.pass(carried, rows);
                } else {
                    self.tell(RingEvent::Done { work: carried.work, rows });
                }
            }
            StageEvent::Refused { work, error } => {
                if self.under_way.remove(&work).is_none() {
                    return;
                }
                if let StageError::Gap { sequence, held, .. } = error {
                    self.needs_replay(at, vec![Held { sequence: sequence.number, upto: held }]);
                } else {
                    self.fail(format!("stage {at}: {error}"));
                }
            }
            StageEvent::Down { reason } => {
                tracing::warn!(stage = at, reason, "a stage is down");
                self.down[at] = true;
                self.under_way.clear();
            }
            StageEvent::Up => {
                self.down[at] = false;
                let held = self.sequences.iter().map(|&sequence| Held { sequence, upto: 0 }).collect();
                self.needs_replay(at, held);
            }
        }
    }

    fn needs_replay(&mut self, at: usize, held: Vec<Held>) {
        let lost: BTreeSet<u32> = held.iter().map(|held| held.sequence).collect();
        self.under_way.retain(|_, carried| !carried.pieces.iter().any(|piece| lost.contains(&piece.sequence)));
        self.tell(RingEvent::NeedsReplay { stage: u32::try_from(at).unwrap_or(u32::MAX), held });
    }

    fn fail(&mut self, reason: String) {
        self.under_way.clear();
        self.tell(RingEvent::Failed { reason });
    }

    fn tell(&self, event: RingEvent) {
        // Nobody listens once the ring is dropped, which ends the loop.
        let _ = self.events.send(event);
    }
}
