//! Trips around a ring that loses stages, over ends that only add up.

use satgrid_types::{WireType, WorkKind};
use std::collections::{BTreeMap, BTreeSet};

use satgrid_engine::port::JobId;
use satgrid_engine::stage::codec::HiddenRows;
use satgrid_engine::stage::port::WorkId;
use satgrid_engine::stage::ring::{Held, RingCommand, RingEvent, RingWork};

use super::trip::{Ends, Trip, TripShape, Way};
use crate::ffi::{BatchRow, DecodeError};

const WIDTH: u32 = 32;

/// Rows of one number: each end and stage gives the running sum of what it was given.
#[derive(Default)]
struct Sum(BTreeMap<u32, Vec<f32>>);

impl Sum {
    fn feed(&mut self, sequence: u32, position: u32, number: f32) -> Option<f32> {
        let held = self.0.entry(sequence).or_default();
        if held.len() < position as usize {
            return None;
        }
        held.truncate(position as usize);
        held.push(number);
        Some(held.iter().sum())
    }
}

#[derive(Default)]
struct Two {
    head: Sum,
    tail: Sum,
    logits: Vec<f32>,
    head_rows: usize,
}

impl Ends for Two {
    fn width(&self) -> u32 {
        WIDTH
    }

    fn head(&mut self, rows: &[BatchRow]) -> Result<Vec<f32>, DecodeError> {
        self.head_rows += rows.len();
        let number = |row: &BatchRow| self.head.feed(row.slot, row.position, row.token as f32).unwrap();
        let numbers: Vec<f32> = rows.iter().map(number).collect();
        Ok(numbers.into_iter().flat_map(|number| [number; WIDTH as usize]).collect())
    }

    fn tail(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<(), DecodeError> {
        let numbers = rows.iter().zip(hidden.chunks(WIDTH as usize));
        self.logits = numbers.map(|(row, one)| self.tail.feed(row.slot, row.position, one[0]).unwrap()).collect();
        Ok(())
    }

    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        Ok(&self.logits[row..=row])
    }

    fn truncate_head(&mut self, slot: u32, from: u32) -> bool {
        self.head.0.entry(slot).or_default().truncate(from as usize);
        true
    }

    fn truncate_tail(&mut self, slot: u32, from: u32) -> bool {
        self.tail.0.entry(slot).or_default().truncate(from as usize);
        true
    }
}

/// Stages that answer at once, and lose what they hold at chosen works.
struct Stages {
    stages: Vec<Sum>,
    events: Vec<RingEvent>,
    works: u32,
    /// At the n-th work this stage is replaced: by an empty one, or one rebuilt up to a position.
    losses: Vec<(u32, usize, u32)>,
    computed: BTreeMap<WorkKind, u32>,
    first: BTreeSet<(u32, u32)>,
    again: u32,
    fails: bool,
    /// Its order has ended, and nobody else takes it.
    over: Option<JobId>,
}

impl Stages {
    fn new(stages: usize, losses: &[(u32, usize, u32)]) -> Self {
        Self {
            stages: (0..stages).map(|_| Sum::default()).collect(),
            events: Vec::new(),
            works: 0,
            losses: losses.to_vec(),
            computed: BTreeMap::new(),
            first: BTreeSet::new(),
            again: 0,
            fails: false,
            over: None,
        }
    }

    fn work(&mut self, work: RingWork) {
        self.works += 1;
        if self.fails {
            self.events.insert(0, RingEvent::Failed { reason: "no stages for sale".to_owned() });
            return;
        }
        if let Some(job) = self.over.filter(|job| work.pieces.iter().any(|piece| piece.job == *job)) {
            self.events.insert(0, RingEvent::Ended { jobs: vec![job], reason: "nobody else sells it".to_owned() });
            return;
        }
        if let Some((_, stage, upto)) = self.losses.iter().find(|loss| loss.0 == self.works).copied() {
            // The sequences of the work too: a stage may be lost before it held anything of them.
            for piece in &work.pieces {
                self.stages[stage].0.entry(piece.sequence).or_default();
            }
            let all = self.stages[stage].0.iter_mut();
            let held = all.map(|(sequence, held)| {
                held.truncate(upto as usize);
                Held { sequence: *sequence, upto: u32::try_from(held.len()).unwrap() }
            });
            let held = held.collect();
            self.events.insert(0, RingEvent::NeedsReplay { stage: u32::try_from(stage).unwrap(), held });
            // The work is lost on its way.
            return;
        }
        self.again += u32::from(work.again);
        let mut numbers: Vec<f32> = work.rows.decode(WIDTH).unwrap().iter().step_by(WIDTH as usize).copied().collect();
        let last = work.ends_at.map_or(self.stages.len(), |stage| stage as usize + 1);
        for stage in &mut self.stages[..last] {
            let mut at = 0;
            for piece in &work.pieces {
                for position in piece.start..piece.start + piece.rows {
                    // A gap: the ring asked for a replay already, this work is void.
                    let Some(sum) = stage.feed(piece.sequence, position, numbers[at]) else { return };
                    numbers[at] = sum;
                    at += 1;
                }
            }
        }
        for piece in &work.pieces {
            for position in piece.start..piece.start + piece.rows {
                // Work that is sent again may have come through before: every stage books that as replay.
                let first = piece.purpose == WorkKind::Replay || self.first.insert((piece.sequence, position));
                let purpose = if first { piece.purpose } else { WorkKind::Replay };
                assert!(first || work.again);
                *self.computed.entry(purpose).or_default() += 1;
            }
        }
        let rows = match work.ends_at {
            Some(_) => HiddenRows::none(WireType::F32),
            None => {
                let numbers: Vec<f32> = numbers.into_iter().flat_map(|number| [number; WIDTH as usize]).collect();
                HiddenRows::encode(&numbers, WIDTH, WireType::F32).unwrap()
            }
        };
        self.events.insert(0, RingEvent::Done { work: work.id, rows });
    }
}

impl Way for Stages {
    fn send(&mut self, command: RingCommand) -> Result<(), DecodeError> {
        match command {
            RingCommand::Work(work) => self.work(work),
            RingCommand::Forget { sequence } => self.stages.iter_mut().for_each(|stage| {
                stage.0.remove(&sequence);
            }),
            RingCommand::Reset | RingCommand::JobOver { .. } => {}
        }
        Ok(())
    }
}

/// One batch, to its end.
fn evaluate(trip: &mut Trip, rows: &[BatchRow], two: &mut Two, stages: &mut Stages) -> Result<(), DecodeError> {
    trip.launch(1, rows, two, stages)?;
    loop {
        if let Some((batch, outcome)) = trip.landed(two, stages) {
            assert_eq!(batch, 1);
            return outcome.map(|failed| assert!(failed.is_empty()));
        }
        let event = stages.events.pop().expect("a word of the ring");
        trip.heard(event, two, stages);
    }
}

fn rows(slot: u32, from: u32, upto: u32) -> Vec<BatchRow> {
    let row = |position| BatchRow { slot, position, token: position % 7 + slot, output: position + 1 == upto };
    (from..upto).map(row).collect()
}

/// Each row a batch of its own, all under way at once; the logits of each, in order.
fn together(trip: &mut Trip, rows: &[BatchRow], two: &mut Two, stages: &mut Stages) -> Vec<f32> {
    let mut told = vec![0.0; rows.len()];
    for (batch, row) in rows.iter().enumerate() {
        assert!(trip.room());
        trip.launch(batch as u64, &[*row], two, stages).unwrap();
    }
    let mut left = rows.len();
    while left > 0 {
        match trip.landed(two, stages) {
            Some((batch, outcome)) => {
                assert!(outcome.unwrap().is_empty());
                told[batch as usize] = trip.logits(0, two).unwrap()[0];
                left -= 1;
            }
            None => {
                let event = stages.events.pop().expect("a word of the ring");
                trip.heard(event, two, stages);
            }
        }
    }
    told
}

/// A prompt of 20 in two slots, then ten single rows of each, both under way at once. All last logits, in order.
fn run(stages: &mut Stages, two: &mut Two) -> Vec<f32> {
    let shape = TripShape {
        slots: 2,
        stages: u32::try_from(stages.stages.len()).unwrap(),
        chunk: 6,
        works: 2 * u32::try_from(stages.stages.len()).unwrap() + 2,
        exact: true,
        wire: WireType::F32,
    };
    let mut trip = Trip::new(shape);
    let mut told = Vec::new();
    for slot in 0..2 {
        trip.seated(slot, JobId(u64::from(slot)), 20);
        let rows = rows(slot, 0, 20);
        evaluate(&mut trip, &rows, two, stages).unwrap();
        told.push(trip.logits(19, two).unwrap()[0]);
    }
    for at in 20..30 {
        let both: Vec<BatchRow> = (0..2).flat_map(|slot| rows(slot, at, at + 1)).collect();
        told.extend(together(&mut trip, &both, two, stages));
    }
    told
}

#[test]
fn lost_stages_change_nothing_but_the_count_of_replays() {
    for count in 1..4 {
        let mut calm = Stages::new(count, &[]);
        let expect = run(&mut calm, &mut Two::default());
        assert_eq!(calm.computed, BTreeMap::from([(WorkKind::Prefill, 40), (WorkKind::Decode, 20)]));
        // Each stage lost at each work, whole or in part, and twice.
        for at in 1..=calm.works {
            for stage in 0..count {
                for upto in [0, 5, 1000] {
                    for second in [None, Some((at + 3, count - 1, 0))] {
                        let losses: Vec<_> = [(at, stage, upto)].into_iter().chain(second).collect();
                        let mut stages = Stages::new(count, &losses);
                        assert_eq!(run(&mut stages, &mut Two::default()), expect, "{count} stages, {losses:?}");
                        // What was computed first is counted as ever; all else is replay.
                        let first = |purpose| stages.computed.get(&purpose).copied().unwrap_or(0);
                        assert_eq!((first(WorkKind::Prefill), first(WorkKind::Decode)), (40, 20), "{losses:?}");
                        assert!(stages.again > 0);
                    }
                }
            }
        }
    }
}

#[test]
fn a_replay_takes_the_kept_rows_and_the_head_is_not_asked_again() {
    let (mut stages, mut two) = (Stages::new(2, &[(15, 1, 0)]), Two::default());
    run(&mut stages, &mut two);
    assert!(stages.computed[&WorkKind::Replay] > 0);
    assert_eq!(two.head_rows, 60);
}

#[test]
fn a_ring_without_hope_fails_the_batch_and_what_comes_later_begins_anew() {
    let shape = TripShape { slots: 2, stages: 2, chunk: 64, works: 6, exact: true, wire: WireType::F32 };
    let (mut trip, mut stages, mut two) = (Trip::new(shape), Stages::new(2, &[]), Two::default());
    for slot in 0..2 {
        evaluate(&mut trip, &rows(slot, 0, 10), &mut two, &mut stages).unwrap();
    }
    stages.fails = true;
    let error = evaluate(&mut trip, &rows(0, 10, 11), &mut two, &mut stages).unwrap_err();
    assert!(error.to_string().contains("no stages for sale"), "{error}");
    trip.truncate(0, 0, &mut two, &mut stages).unwrap();
    // New stages, which hold nothing: the other slot is replayed from its first position.
    let mut stages = Stages::new(2, &[]);
    evaluate(&mut trip, &rows(1, 10, 11), &mut two, &mut stages).unwrap();
    assert_eq!(stages.computed, BTreeMap::from([(WorkKind::Replay, 10), (WorkKind::Decode, 1)]));
    evaluate(&mut trip, &rows(0, 0, 3), &mut two, &mut stages).unwrap();
    assert_eq!(stages.computed[&WorkKind::Replay], 10);
}

#[test]
fn answers_of_the_wrong_length_or_of_void_works_are_no_answers() {
    let shape = TripShape { slots: 1, stages: 1, chunk: 64, works: 6, exact: true, wire: WireType::F32 };
    let (mut trip, mut stages, mut two) = (Trip::new(shape), Stages::new(1, &[]), Two::default());
    let nobodys = RingEvent::Done { work: WorkId(1), rows: HiddenRows::none(WireType::F32) };
    trip.heard(nobodys, &mut two, &mut stages);
    stages.events.push(RingEvent::Done { work: WorkId(77), rows: HiddenRows::none(WireType::F32) });
    evaluate(&mut trip, &rows(0, 0, 3), &mut two, &mut stages).unwrap();
    stages.events.push(RingEvent::Done { work: WorkId(2), rows: HiddenRows::none(WireType::F32) });
    let error = evaluate(&mut trip, &rows(0, 3, 4), &mut two, &mut stages).unwrap_err();
    assert!(error.to_string().contains("0 rows came back for 1"), "{error}");
}

/// A batch to its end: its number, and the slots that came to nothing in it.
fn land_one(trip: &mut Trip, two: &mut Two, stages: &mut Stages) -> (u64, BTreeMap<u32, String>) {
    loop {
        if let Some((batch, outcome)) = trip.landed(two, stages) {
            return (batch, outcome.unwrap());
        }
        let event = stages.events.pop().expect("a word of the ring");
        trip.heard(event, two, stages);
    }
}

#[test]
fn a_job_that_ends_takes_nobody_elses_rows_along() {
    let shape = TripShape { slots: 4, stages: 2, chunk: 6, works: 6, exact: true, wire: WireType::F32 };
    let one = |slot: u32, at: u32| rows(slot, at, at + 1);
    let ended = |slot: u32| BTreeMap::from([(slot, "nobody else sells it".to_owned())]);
    let begin = || {
        let (mut trip, mut stages, mut two) = (Trip::new(shape), Stages::new(2, &[]), Two::default());
        for slot in 0..3 {
            trip.seated(slot, JobId(10 + u64::from(slot)), 20);
            evaluate(&mut trip, &rows(slot, 0, 20), &mut two, &mut stages).unwrap();
        }
        (trip, stages, two)
    };
    let three = [one(0, 20), one(1, 20), one(2, 20)].concat();
    let (mut calm, mut stages, mut two) = begin();
    evaluate(&mut calm, &three, &mut two, &mut stages).unwrap();
    let expect = [0, 2].map(|row| calm.logits(row, &mut two).unwrap()[0]);

    // The one in the middle ends, in a work of all three and in a prompt that is a batch of its own.
    let (mut trip, mut stages, mut two) = begin();
    let kept = (stages.works, two.head_rows);
    stages.over = Some(JobId(11));
    trip.launch(5, &three, &mut two, &mut stages).unwrap();
    assert_eq!(land_one(&mut trip, &mut two, &mut stages), (5, ended(1)));
    assert_eq!([0, 2].map(|row| trip.logits(row, &mut two).unwrap()[0]), expect);
    assert!(trip.logits(1, &mut two).is_err(), "its own row came to nothing");
    assert_eq!(
        (stages.works - kept.0, two.head_rows - kept.1, stages.again),
        (2, 3, 1),
        "sent once more, not computed"
    );
    // Of a prompt that is cut into more works than may be under way nothing more is sent, while others go on.
    trip.seated(3, JobId(11), 60);
    trip.launch(6, &rows(3, 0, 60), &mut two, &mut stages).unwrap();
    let before = stages.works;
    assert_eq!(land_one(&mut trip, &mut two, &mut stages), (6, ended(3)));
    assert_eq!(stages.works, before);
    // The same word comes with each of its works: the later ones are about nothing that is there.
    trip.truncate(3, 0, &mut two, &mut stages).unwrap();
    trip.seated(3, JobId(12), 20);
    while let Some(event) = stages.events.pop() {
        trip.heard(event, &mut two, &mut stages);
    }
    let next = [one(0, 21), one(2, 21)].concat();
    assert_eq!(together(&mut trip, &next, &mut two, &mut stages).len(), 2);
    evaluate(&mut trip, &rows(3, 0, 20), &mut two, &mut stages).unwrap();
}
