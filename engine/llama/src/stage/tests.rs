//! The queue over layers that only remember what they were given.

use satgrid_engine::port::{JobId, Profile};
use satgrid_engine::stage::codec::{CodecError, HiddenRows};
use satgrid_engine::stage::port::{
    Fault, Piece, SequenceId, StageCommand, StageError, StageEvent, StageFacts, StageWork, WorkId,
};
use satgrid_types::{LayerRange, WireType, WorkKind};

use super::queue::{Layers, StageQueue};
use crate::ffi::{BatchRow, DecodeError};

const WIDTH: u32 = 32;

/// Each sequence's rows are summed up: what comes out tells everything that went in before.
#[derive(Default)]
struct Sums {
    held: std::collections::BTreeMap<u32, Vec<f32>>,
    batches: Vec<usize>,
    seated: std::collections::BTreeMap<u32, JobId>,
    fails: bool,
    bad: bool,
}

impl Layers for Sums {
    fn evaluate(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<Vec<f32>, DecodeError> {
        if self.fails {
            return Err(DecodeError::NoRoom);
        }
        assert!(rows.is_sorted_by_key(|row| (row.slot, row.position)));
        self.batches.push(rows.len());
        let mut out = Vec::new();
        for (row, numbers) in rows.iter().zip(hidden.chunks_exact(WIDTH as usize)) {
            let held = self.held.entry(row.slot).or_default();
            assert_eq!(held.len(), row.position as usize, "slot {}", row.slot);
            held.push(numbers[0]);
            let sum: f32 = if self.bad { f32::NAN } else { held.iter().sum() };
            out.extend(vec![sum; WIDTH as usize]);
        }
        Ok(out)
    }

    fn truncate(&mut self, slot: u32, from: u32) -> bool {
        self.held.entry(slot).or_default().truncate(from as usize);
        true
    }

    fn seated(&mut self, slot: u32, job: JobId) {
        self.seated.insert(slot, job);
    }
}

fn facts() -> StageFacts {
    StageFacts {
        model_root: [1; 32],
        architecture: "llama".to_owned(),
        layers: LayerRange::new(2, 4).unwrap(),
        model_layers: 6,
        n_embd: WIDTH,
        profile: Profile::Exact,
        build_id: [2; 32],
        instruction_set: "test".to_owned(),
        sequences: 3,
        context: 16,
        batch: 8,
        speed: None,
        tensor_bytes: 0,
        name: None,
        quantisation: "F32".to_owned(),
        memory_bytes: 0,
    }
}

fn piece(sequence: u32, start: u32, rows: u32) -> Piece {
    let sequence = SequenceId { owner: 7, number: sequence };
    Piece { sequence, start, rows, purpose: WorkKind::Decode, job: JobId(sequence.number.into()) }
}

fn work(id: u64, pieces: &[Piece], firsts: &[f32]) -> StageWork {
    let numbers: Vec<f32> = firsts.iter().flat_map(|first| vec![*first; WIDTH as usize]).collect();
    let rows = HiddenRows::encode(&numbers, WIDTH, WireType::F32).unwrap();
    StageWork { id: WorkId(id), pieces: pieces.to_vec(), rows, output: true }
}

struct Bench {
    queue: StageQueue,
    layers: Sums,
}

impl Bench {
    fn new() -> Self {
        Self { queue: StageQueue::new(facts()), layers: Sums::default() }
    }

    fn send(&mut self, work: StageWork) {
        self.queue.handle(StageCommand::Evaluate(work), &mut self.layers);
    }

    /// Runs dry; the first number of each row that came out, or the error, by work.
    fn run(&mut self) -> Vec<(u64, Result<Vec<f32>, StageError>)> {
        let mut now = 0;
        while self.queue.step(&mut self.layers, || {
            now += 10;
            now
        }) {}
        let told = self.queue.take_events().into_iter().map(|event| match event {
            StageEvent::Evaluated { work, rows, .. } => {
                let numbers = rows.decode(WIDTH).unwrap();
                (work.0, Ok(numbers.iter().step_by(WIDTH as usize).copied().collect()))
            }
            StageEvent::Refused { work, error } => (work.0, Err(error)),
            StageEvent::Down { .. } | StageEvent::Up => panic!("not of a queue"),
        });
        told.collect()
    }
}

#[test]
fn single_rows_share_batches_and_long_pieces_do_not() {
    let mut bench = Bench::new();
    bench.send(work(1, &[piece(0, 0, 3)], &[1.0, 2.0, 4.0]));
    bench.send(work(2, &[piece(1, 0, 1)], &[10.0]));
    bench.send(work(3, &[piece(2, 0, 1)], &[20.0]));
    // Behind work 2 of the same sequence: another batch.
    bench.send(work(4, &[piece(1, 1, 1)], &[5.0]));
    bench.send(work(5, &[piece(0, 3, 1)], &[8.0]));
    let told = bench.run();
    let expect = [
        (1, Ok(vec![1.0, 3.0, 7.0])),
        (2, Ok(vec![10.0])),
        (3, Ok(vec![20.0])),
        (5, Ok(vec![15.0])),
        (4, Ok(vec![15.0])),
    ];
    assert_eq!(told, expect);
    assert_eq!(bench.layers.batches, [3, 3, 1]);
}

#[test]
fn a_start_trims_and_a_gap_is_told() {
    let mut bench = Bench::new();
    bench.send(work(1, &[piece(0, 0, 3)], &[1.0, 2.0, 4.0]));
    bench.send(work(2, &[piece(0, 1, 1)], &[100.0]));
    bench.send(work(3, &[piece(0, 4, 1)], &[1.0]));
    bench.send(work(4, &[piece(1, 2, 1)], &[1.0]));
    let told = bench.run();
    let of = |id: u64| told.iter().find(|one| one.0 == id).map(|one| &one.1);
    assert_eq!(of(2), Some(&Ok(vec![101.0])));
    let gap = |id: u64, held: u32| matches!(of(id), Some(Err(StageError::Gap { held: h, .. })) if *h == held);
    assert!(gap(3, 2) && gap(4, 0), "{told:?}");
    bench.queue.handle(StageCommand::Trim { sequence: piece(0, 0, 1).sequence, upto: 1 }, &mut bench.layers);
    bench.send(work(5, &[piece(0, 2, 1)], &[1.0]));
    assert!(matches!(bench.run()[0].1, Err(StageError::Gap { held: 1, .. })));
}

#[test]
fn the_longest_unused_sequence_makes_room_and_owners_are_forgotten() {
    let mut bench = Bench::new();
    for n in 0..4 {
        bench.send(work(u64::from(n), &[piece(n, 0, 1)], &[1.0]));
        assert!(bench.run()[0].1.is_ok());
    }
    // Three fit: sequence 0 is gone, 1 to 3 are there.
    for (n, held) in [(1, true), (2, true), (3, true), (0, false)] {
        bench.send(work(10 + u64::from(n), &[piece(n, 1, 1)], &[1.0]));
        assert_eq!(bench.run()[0].1.is_ok(), held, "sequence {n}");
    }
    bench.queue.handle(StageCommand::ForgetOwner { owner: 7 }, &mut bench.layers);
    bench.send(work(20, &[piece(3, 2, 1)], &[1.0]));
    assert!(matches!(bench.run()[0].1, Err(StageError::Gap { held: 0, .. })));
    // More sequences in one batch than there is room for.
    bench.send(work(30, &[piece(0, 0, 1), piece(1, 0, 1), piece(2, 0, 1), piece(3, 0, 1)], &[1.0; 4]));
    assert!(matches!(bench.run()[0].1, Err(StageError::Full { limit: 3 })));
}

/// Two leads with more sequences than there is room for: whoever comes last waits for those whose works are there, and none is
/// refused; the works of a sequence stay in their order.
#[test]
fn a_work_without_a_slot_waits_for_those_that_have_one() {
    let mut bench = Bench::new();
    for n in 0..3 {
        bench.send(work(u64::from(n), &[piece(n, 0, 1)], &[1.0]));
    }
    bench.run();
    // Each has a long work now, and a fourth sequence two.
    bench.send(work(10, &[piece(3, 0, 2)], &[1.0; 2]));
    bench.send(work(11, &[piece(3, 2, 2)], &[1.0; 2]));
    for n in 0..3 {
        bench.send(work(20 + u64::from(n), &[piece(n, 1, 2)], &[1.0; 2]));
    }
    let told = bench.run();
    let order: Vec<u64> = told.iter().map(|(id, _)| *id).collect();
    assert!(told.iter().all(|(_, outcome)| outcome.is_ok()), "{told:?}");
    assert_eq!(order, [20, 21, 22, 10, 11]);
}

#[test]
fn bad_work_is_refused_and_names_whose_fault_it_is() {
    let mut bench = Bench::new();
    let shape = StageWork {
        rows: HiddenRows { count: 1, ..HiddenRows::none(WireType::F32) },
        ..work(0, &[piece(0, 0, 1)], &[1.0])
    };
    let mut nan = work(1, &[piece(0, 0, 1)], &[1.0]);
    nan.rows.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    type Expected = fn(&StageError) -> bool;
    let rows: [(StageWork, Expected); 7] = [
        (shape, |e| matches!(e, StageError::BadRows(CodecError::WrongShape { .. }))),
        (nan, |e| matches!(e, StageError::BadRows(CodecError::NotFinite { row: 0 }))),
        (work(2, &[piece(0, 0, 2), piece(1, 0, 1)], &[1.0; 3]), |e| matches!(e, StageError::BadWork { .. })),
        (work(3, &[piece(0, 0, 1), piece(0, 1, 1)], &[1.0; 2]), |e| matches!(e, StageError::BadWork { .. })),
        (work(4, &[piece(0, 0, 9)], &[1.0; 9]), |e| matches!(e, StageError::BadWork { .. })),
        (work(5, &[], &[]), |e| matches!(e, StageError::BadWork { .. })),
        (work(6, &[piece(0, 15, 2)], &[1.0; 2]), |e| matches!(e, StageError::OverContext { limit: 16, .. })),
    ];
    for (work, expected) in rows {
        let id = work.id.0;
        bench.send(work);
        let told = bench.run();
        assert!(
            matches!(&told[..], [(_, Err(error))] if expected(error) && error.fault() == Fault::Sender),
            "{id}: {told:?}"
        );
    }
    bench.layers.bad = true;
    bench.send(work(7, &[piece(0, 0, 1)], &[1.0]));
    assert!(matches!(&bench.run()[0].1, Err(error @ StageError::BadResult(_)) if error.fault() == Fault::Stage));
    bench.layers.bad = false;
    bench.layers.fails = true;
    bench.send(work(8, &[piece(0, 0, 1)], &[1.0]));
    assert!(matches!(&bench.run()[0].1, Err(error @ StageError::Backend { .. }) if error.fault() == Fault::Stage));
    // Nothing is left of a sequence whose batch failed.
    bench.layers.fails = false;
    bench.send(work(9, &[piece(0, 1, 1)], &[1.0]));
    assert!(matches!(bench.run()[0].1, Err(StageError::Gap { held: 0, .. })));
}
