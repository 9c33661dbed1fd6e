//! The scheduler over a backend that is all arithmetic: logits depend on every token in the sequence, so any slip in positions,
//! slots, cuts or order changes the output.

use std::collections::{BTreeMap, BTreeSet};

use satgrid_engine::sampling::{Sampling, draw};

use super::*;

const VOCAB: u32 = 50;
const EOG: [u32; 1] = [49];

#[derive(Default)]
struct Arithmetic {
    cells: BTreeMap<u32, Vec<u32>>,
    logits: Vec<Option<Vec<f32>>>,
    batches: Vec<Vec<BatchRow>>,
    /// Positions can only be dropped all at once.
    recurrent: bool,
    /// Only the last few tokens matter, so that a text soon repeats itself.
    forgetful: bool,
    fail_next: bool,
}

fn logits_of(tokens: &[u32]) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    for &token in tokens {
        state = (state ^ token).wrapping_mul(0x0100_0193).rotate_left(7);
    }
    (0..VOCAB)
        .map(|id| ((state ^ id.wrapping_mul(0x85eb_ca6b)).wrapping_mul(0xc2b2_ae35) >> 16) as f32 / 8192.0)
        .collect()
}

impl Computes for Arithmetic {
    fn evaluate(&mut self, rows: &[BatchRow]) -> Result<(), DecodeError> {
        if std::mem::take(&mut self.fail_next) {
            return Err(DecodeError::Failed { code: -3 });
        }
        self.logits.clear();
        for row in rows {
            let cells = self.cells.entry(row.slot).or_default();
            assert_eq!(cells.len(), row.position as usize, "slot {} has a gap", row.slot);
            cells.push(row.token);
            self.logits.push(row.output.then(|| logits_of(&cells[from(cells.len(), self.forgetful)..])));
        }
        self.batches.push(rows.to_vec());
        Ok(())
    }
}

impl Backend for Arithmetic {
    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        self.logits.get(row).and_then(|row| row.as_deref()).ok_or(DecodeError::NoLogits { row })
    }

    fn truncate(&mut self, slot: u32, from: u32) -> bool {
        if self.recurrent && from > 0 {
            return false;
        }
        self.cells.entry(slot).or_default().truncate(from as usize);
        true
    }

    fn is_eog(&self, token: u32) -> bool {
        EOG.contains(&token)
    }

    fn eog(&self) -> &[u32] {
        &EOG
    }

    fn piece(&self, token: u32) -> Vec<u8> {
        vec![b'a' + u8::try_from(token % 26).unwrap()]
    }
}

fn from(length: usize, forgetful: bool) -> usize {
    if forgetful { length.saturating_sub(1) } else { 0 }
}

/// What an engine without slots, batches or caches would say.
fn reference(job: &Job) -> (Vec<u32>, FinishReason) {
    reference_of(job, false)
}

fn reference_of(job: &Job, forgetful: bool) -> (Vec<u32>, FinishReason) {
    let mut sampling = job.sampling.clone();
    if job.ignore_eos {
        sampling.forbid(EOG);
    }
    let (mut tokens, mut output, mut text) = (job.prompt.clone(), Vec::new(), String::new());
    for index in 0..job.max_output.min(64 - to_u32(job.prompt.len())) {
        let token = draw(&logits_of(&tokens[from(tokens.len(), forgetful)..]), &tokens, &sampling, job.resumed + index)
            .unwrap();
        tokens.push(token);
        output.push(token);
        text.push(char::from(b'a' + u8::try_from(token % 26).unwrap()));
        if EOG.contains(&token) || job.stop.iter().any(|stop| text.contains(stop)) {
            return (output, FinishReason::Stop);
        }
    }
    (output, FinishReason::Length)
}

fn scheduler(profile: Profile, slots: u32) -> Scheduler {
    Scheduler::new(Shape {
        profile,
        slots,
        context: 64,
        vocab: VOCAB,
        batch: 16,
        prefill_beside_streams: 4,
        guess: false,
    })
}

fn job(id: u64, session: u8, prompt: std::ops::Range<u32>) -> Job {
    Job {
        id: JobId(id),
        session: [session; 32],
        prompt: prompt.map(|i| (i * 7 + u32::from(session)) % VOCAB).collect(),
        sampling: Sampling::seeded(1.0, id),
        max_output: 12,
        stop: Vec::new(),
        ignore_eos: true,
        resumed: 0,
        extras: Default::default(),
    }
}

const ALL: u32 = u32::MAX;

fn grant(id: u64, prompt_upto: u32, output_upto: u32) -> Command {
    Command::Grant { job: JobId(id), prompt_upto, output_upto }
}

/// What was told of one job.
#[derive(Debug, Default, Clone, PartialEq)]
struct Heard {
    upto: u32,
    cached: u32,
    output: Vec<u32>,
    end: Option<(FinishReason, u32)>,
    error: Option<JobError>,
}

/// Collects events and checks what holds of every stream of them.
fn hear(events: Vec<EngineEvent>, heard: &mut BTreeMap<u64, Heard>) {
    for event in events {
        let job = heard.entry(event.job().unwrap().0).or_default();
        assert!(job.end.is_none() && job.error.is_none(), "after its end: {event:?}");
        match event {
            EngineEvent::Prefilled { upto, cached, .. } => {
                assert!(upto > job.upto && cached >= job.cached && cached <= upto, "{upto} {cached} after {job:?}");
                (job.upto, job.cached) = (upto, cached);
            }
            EngineEvent::Tokens { first, ids, .. } => {
                assert_eq!(first, to_u32(job.output.len()));
                job.output.extend(ids);
            }
            EngineEvent::Logprobs { first, .. } => assert_eq!(first, to_u32(job.output.len())),
            EngineEvent::Embedded { .. } => panic!("nothing is embedded here"),
            EngineEvent::Finished { reason, evaluated, .. } => job.end = Some((reason, evaluated)),
            EngineEvent::Failed { error, .. } => job.error = Some(error),
            EngineEvent::Down { .. } | EngineEvent::Up => panic!("not the scheduler's to say"),
        }
    }
}

fn run(scheduler: &mut Scheduler, backend: &mut Arithmetic, heard: &mut BTreeMap<u64, Heard>) {
    while scheduler.step(backend) {
        hear(scheduler.take_events(), heard);
    }
    hear(scheduler.take_events(), heard);
}

#[test]
fn many_jobs_over_few_slots_each_get_the_reference_output() {
    for profile in [Profile::Exact, Profile::Fast] {
        let (mut s, mut backend, mut heard) = (scheduler(profile, 3), Arithmetic::default(), BTreeMap::new());
        let jobs: Vec<Job> = (0..9)
            .map(|id| {
                let mut job = job(id, u8::try_from(id).unwrap() % 4, 0..5 + 6 * u32::try_from(id).unwrap());
                job.stop = if id % 3 == 0 { vec!["a".into(), "zz".into()] } else { Vec::new() };
                job.ignore_eos = id % 2 == 0;
                job.resumed = if id == 5 { 3 } else { 0 };
                job
            })
            .collect();
        for job in &jobs {
            s.handle(Command::Start(job.clone()), &mut backend);
            s.handle(grant(job.id.0, ALL, ALL), &mut backend);
        }
        run(&mut s, &mut backend, &mut heard);
        assert!(s.is_idle());
        for job in &jobs {
            let told = &heard[&job.id.0];
            let (output, reason) = reference(job);
            assert_eq!(told.output, output, "{profile:?} job {:?}", job.id);
            let prompt = to_u32(job.prompt.len());
            assert_eq!(told.upto, prompt);
            assert_eq!(told.end, Some((reason, prompt - told.cached + to_u32(output.len()) - 1)));
        }
    }
}

/// Guesses change when a token comes, never which; and nothing is computed beyond a grant or a job's end.
#[test]
fn guesses_change_no_text() {
    for (forgetful, greedy, slots) in [(false, false, 1), (true, false, 3), (true, true, 1), (true, true, 3)] {
        let mut backend = Arithmetic { forgetful, ..Arithmetic::default() };
        let shape = Shape { guess: true, ..scheduler(Profile::Exact, slots).shape };
        let (mut s, mut heard) = (Scheduler::new(shape), BTreeMap::new());
        let jobs: Vec<Job> = (0..6_u8)
            .map(|id| {
                let mut job = job(id.into(), id % 4, 0..4 + 2 * u32::from(id));
                job.max_output = 40;
                job.ignore_eos = id % 2 == 0;
                job.stop = if id == 3 { vec!["a".into()] } else { Vec::new() };
                if greedy {
                    job.sampling = Sampling { temperature: 0.0, ..job.sampling };
                }
                job
            })
            .collect();
        for job in &jobs {
            s.handle(Command::Start(job.clone()), &mut backend);
            s.handle(grant(job.id.0, ALL, 9), &mut backend);
        }
        run(&mut s, &mut backend, &mut heard);
        if slots == 1 {
            // The first job holds the slot until it may go on.
            let most = to_u32(jobs[0].prompt.len()) + 8;
            assert!(backend.batches.iter().flatten().all(|row| row.position < most), "beyond the grant");
        }
        for job in &jobs {
            s.handle(grant(job.id.0, ALL, ALL), &mut backend);
        }
        run(&mut s, &mut backend, &mut heard);
        let mut said = 0;
        for job in &jobs {
            let (told, (output, reason)) = (&heard[&job.id.0], reference_of(job, forgetful));
            assert_eq!(told.output, output, "forgetful {forgetful}, greedy {greedy}, job {:?}", job.id);
            let prompt = to_u32(job.prompt.len());
            assert_eq!(told.end, Some((reason, prompt - told.cached + to_u32(output.len()) - 1)));
            said += output.len();
        }
        if greedy && slots == 1 {
            assert!(backend.batches.len() * 2 < said, "{} batches for {said} tokens", backend.batches.len());
        }
    }
}

#[test]
fn nothing_is_done_beyond_a_grant() {
    for profile in [Profile::Exact, Profile::Fast] {
        let (mut s, mut backend, mut heard) = (scheduler(profile, 2), Arithmetic::default(), BTreeMap::new());
        let job = job(1, 0, 0..20);
        let (expect, _) = reference(&job);
        s.handle(Command::Start(job), &mut backend);
        run(&mut s, &mut backend, &mut heard);
        assert!(heard.is_empty() && backend.batches.is_empty());
        for (prompt, output, upto, told, computed) in [
            (7, 0, 7, 0, 7),
            (7, 5, 7, 0, 7),
            (3, 0, 7, 0, 7),
            (19, 0, 19, 0, 19),
            // The last position yields a token; five are granted, of which the fifth is drawn at position 23.
            (20, 0, 20, 5, 24),
            (20, 6, 20, 6, 25),
            (ALL, ALL, 20, 12, 31),
        ] {
            s.handle(grant(1, prompt, output), &mut backend);
            run(&mut s, &mut backend, &mut heard);
            let heard = &heard[&1];
            assert_eq!((heard.upto, heard.output.len()), (upto, told), "{profile:?} after {prompt}, {output}");
            assert_eq!(backend.batches.iter().map(Vec::len).sum::<usize>(), computed);
            assert_eq!(heard.output, expect[..told]);
        }
        assert_eq!(heard[&1].end, Some((FinishReason::Length, 31)));
    }
}

#[test]
fn a_token_drawn_early_waits_for_its_grant() {
    let (mut s, mut backend, mut heard) = (scheduler(Profile::Exact, 1), Arithmetic::default(), BTreeMap::new());
    s.handle(Command::Start(Job { max_output: 1, ..job(1, 0, 0..4) }), &mut backend);
    s.handle(grant(1, ALL, 0), &mut backend);
    run(&mut s, &mut backend, &mut heard);
    assert_eq!((heard[&1].output.len(), heard[&1].end), (0, None));
    s.handle(grant(1, ALL, 1), &mut backend);
    run(&mut s, &mut backend, &mut heard);
    assert_eq!((heard[&1].output.len(), heard[&1].end), (1, Some((FinishReason::Length, 4))));
}

#[test]
fn a_session_reuses_its_prefix_and_nobody_else_does() {
    for recurrent in [false, true] {
        let (mut s, mut heard) = (scheduler(Profile::Exact, 3), BTreeMap::new());
        let mut backend = Arithmetic { recurrent, ..Arithmetic::default() };
        let mut go = |s: &mut Scheduler, backend: &mut Arithmetic, job: Job, cached: u32| {
            let id = job.id.0;
            let (expect, _) = reference(&job);
            s.handle(Command::Start(job), backend);
            s.handle(grant(id, ALL, ALL), backend);
            run(s, backend, &mut heard);
            assert_eq!(heard[&id].output, expect, "job {id}");
            assert_eq!(heard[&id].cached, if recurrent { 0 } else { cached }, "job {id}, recurrent {recurrent}");
        };
        let first = job(1, 1, 0..20);
        go(&mut s, &mut backend, first.clone(), 0);
        // The same prompt again: all but the last position. Another session: nothing.
        go(&mut s, &mut backend, job(2, 1, 0..20), 19);
        go(&mut s, &mut backend, Job { session: [2; 32], ..job(3, 1, 0..20) }, 0);
        // A longer conversation goes on from the common start.
        go(&mut s, &mut backend, job(4, 1, 0..30), 20);
        // A prompt that parts early from the held one leaves that alone while there is room.
        go(&mut s, &mut backend, job(5, 1, 0..2), 1);
        s.handle(Command::ForgetSession { session: [1; 32] }, &mut backend);
        go(&mut s, &mut backend, job(6, 1, 0..30), 0);
    }
}

#[test]
fn the_longest_unused_slot_goes_first() {
    let (mut s, mut backend, mut heard) = (scheduler(Profile::Exact, 2), Arithmetic::default(), BTreeMap::new());
    let mut cached = Vec::new();
    for (id, session) in [(1, 1), (2, 2), (3, 1), (4, 3), (5, 2), (6, 3)] {
        s.handle(Command::Start(job(id, session, 0..10)), &mut backend);
        s.handle(grant(id, ALL, ALL), &mut backend);
        run(&mut s, &mut backend, &mut heard);
        cached.push(heard[&id].cached);
    }
    // Session 3 takes session 2's slot, so that finds nothing and takes session 1's.
    assert_eq!(cached, [0, 0, 9, 0, 0, 9]);
}

#[test]
fn a_job_is_seated_beside_those_that_run() {
    let (mut s, mut backend) = (scheduler(Profile::Fast, 5), Arithmetic::default());
    let mut start = |s: &mut Scheduler, id: u64, session| {
        s.handle(Command::Start(job(id, session, 0..10)), &mut backend);
        s.handle(grant(id, ALL, ALL), &mut backend);
        assert!(s.step(&mut backend));
        s.slots.iter().map(|slot| if slot.running.is_some() { 'r' } else { '-' }).collect::<String>()
    };
    (1..=4).for_each(|id| drop(start(&mut s, id, id as u8)));
    [1, 2, 4].into_iter().for_each(|id| s.handle(Command::Cancel { job: JobId(id) }, &mut Arithmetic::default()));
    // The empty slot is a gap away, but costs nobody's cache; then the longest unused of the neighbours goes.
    assert_eq!(start(&mut s, 5, 5), "--r-r");
    assert_eq!(start(&mut s, 6, 6), "-rr-r");
    assert_eq!(start(&mut s, 7, 7), "rrr-r");
}

#[test]
fn cancelling_ends_a_job_wherever_it_is() {
    let (mut s, mut backend, mut heard) = (scheduler(Profile::Exact, 1), Arithmetic::default(), BTreeMap::new());
    for id in 1..=3 {
        s.handle(Command::Start(job(id, 0, 0..40)), &mut backend);
        s.handle(grant(id, ALL, ALL), &mut backend);
    }
    assert!(s.step(&mut backend));
    for id in [1, 3, 1, 99] {
        s.handle(Command::Cancel { job: JobId(id) }, &mut backend);
    }
    run(&mut s, &mut backend, &mut heard);
    assert_eq!(heard[&1].end, Some((FinishReason::Cancelled, 16)));
    assert_eq!(heard[&3].end, Some((FinishReason::Cancelled, 0)));
    assert_eq!((heard[&2].cached, heard[&2].end.map(|end| end.0)), (16, Some(FinishReason::Length)));
}

#[test]
fn bad_jobs_are_refused_with_a_reason() {
    let (mut s, mut backend, mut heard) = (scheduler(Profile::Exact, 1), Arithmetic::default(), BTreeMap::new());
    let rows = [
        (Job { prompt: vec![], ..job(1, 0, 0..1) }, JobError::PromptEmpty),
        (job(2, 0, 0..64), JobError::PromptTooLong { prompt: 64, context: 64 }),
        (Job { prompt: vec![VOCAB], ..job(3, 0, 0..1) }, JobError::UnknownToken { token: VOCAB, vocab: VOCAB }),
    ];
    for (job, expect) in rows {
        let id = job.id.0;
        s.handle(Command::Start(job), &mut backend);
        hear(s.take_events(), &mut heard);
        assert_eq!(heard[&id].error, Some(expect));
    }
    for id in 100..101 + MAX_QUEUED as u64 {
        s.handle(Command::Start(job(id, 0, 0..5)), &mut backend);
    }
    hear(s.take_events(), &mut heard);
    assert_eq!(heard[&(100 + MAX_QUEUED as u64)].error, Some(JobError::Busy));
    assert_eq!(heard.len(), 4);
}

#[test]
fn a_failed_batch_fails_its_jobs_and_spares_the_rest() {
    let (mut s, mut backend, mut heard) = (scheduler(Profile::Exact, 1), Arithmetic::default(), BTreeMap::new());
    for id in 1..=2 {
        s.handle(Command::Start(job(id, 0, 0..10)), &mut backend);
        s.handle(grant(id, ALL, ALL), &mut backend);
    }
    backend.fail_next = true;
    run(&mut s, &mut backend, &mut heard);
    assert!(matches!(heard[&1].error, Some(JobError::Backend { .. })));
    assert_eq!(heard[&2].output, reference(&job(2, 0, 0..10)).0);
}

#[test]
fn no_output_wanted_ends_after_the_prompt() {
    let (mut s, mut backend, mut heard) = (scheduler(Profile::Fast, 1), Arithmetic::default(), BTreeMap::new());
    s.handle(Command::Start(Job { max_output: 0, ..job(1, 0, 0..10) }), &mut backend);
    s.handle(grant(1, ALL, ALL), &mut backend);
    run(&mut s, &mut backend, &mut heard);
    assert_eq!((heard[&1].upto, heard[&1].end), (10, Some((FinishReason::Length, 10))));
}

/// Batches are away for a while and come back in any order.
struct Far {
    near: Arithmetic,
    flying: Vec<(u64, Vec<BatchRow>)>,
    /// How many may come back before something else happens.
    due: u32,
    state: u32,
    fail_next: bool,
    /// Slots that come to nothing with their next rows.
    over: BTreeSet<u32>,
    /// Most batches that were under way at once.
    most: usize,
}

const WAVES: u32 = 6;

impl Far {
    fn new(seed: u32, forgetful: bool) -> Self {
        let near = Arithmetic { forgetful, ..Arithmetic::default() };
        Self { near, flying: Vec::new(), due: 0, state: seed, fail_next: false, over: BTreeSet::new(), most: 0 }
    }

    fn any(&mut self, below: usize) -> usize {
        self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.state >> 8) as usize % below
    }
}

impl Sends for Far {
    fn waves(&self) -> u32 {
        WAVES
    }

    fn room(&self) -> bool {
        self.flying.len() < WAVES as usize
    }

    fn launch(&mut self, batch: u64, rows: &[BatchRow]) -> Result<(), DecodeError> {
        if std::mem::take(&mut self.fail_next) {
            return Err(DecodeError::Failed { code: -3 });
        }
        let away = |slot: u32| self.flying.iter().any(|(_, rows)| rows.iter().any(|row| row.slot == slot));
        assert!(rows.iter().all(|row| !away(row.slot)), "a sequence is in two batches");
        self.flying.push((batch, rows.to_vec()));
        self.most = self.most.max(self.flying.len());
        Ok(())
    }

    fn landed(&mut self) -> Option<(u64, Result<Failed, DecodeError>)> {
        if self.due == 0 || self.flying.is_empty() {
            return None;
        }
        self.due -= 1;
        let at = self.any(self.flying.len());
        let (batch, rows) = self.flying.remove(at);
        let over = rows.iter().map(|row| row.slot).filter(|slot| self.over.remove(slot)).collect::<Vec<u32>>();
        let failed = over.into_iter().map(|slot| (slot, "nobody sells its layers".to_owned())).collect();
        Some((batch, self.near.evaluate(&rows).map(|()| failed)))
    }
}

impl Backend for Far {
    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        self.near.logits(row)
    }

    fn truncate(&mut self, slot: u32, from: u32) -> bool {
        assert!(!self.flying.iter().any(|(_, rows)| rows.iter().any(|row| row.slot == slot)), "cut while away");
        self.near.truncate(slot, from)
    }

    fn is_eog(&self, token: u32) -> bool {
        self.near.is_eog(token)
    }

    fn eog(&self) -> &[u32] {
        self.near.eog()
    }

    fn piece(&self, token: u32) -> Vec<u8> {
        self.near.piece(token)
    }
}

/// Until nothing is away and nothing may begin.
fn run_far(s: &mut Scheduler, far: &mut Far, heard: &mut BTreeMap<u64, Heard>) {
    loop {
        far.due = u32::try_from(far.any(3)).unwrap();
        let landed = s.land(far);
        let begun = s.launch(far);
        hear(s.take_events(), heard);
        if !landed && !begun && s.nothing_is_away() {
            return;
        }
    }
}

/// Whatever comes back when, every job says what it says alone, and streams keep several batches under way.
#[test]
fn batches_that_are_away_at_once_change_no_text() {
    for (seed, guess) in [(1, false), (2, false), (3, true), (4, true)] {
        let (mut far, mut heard) = (Far::new(seed, guess), BTreeMap::new());
        let mut s = Scheduler::new(Shape { guess, ..scheduler(Profile::Exact, 8).shape });
        let jobs: Vec<Job> = (0..14_u8)
            .map(|id| {
                let mut job = job(id.into(), id % 5, 0..3 + 3 * u32::from(id));
                job.stop = if id % 4 == 0 { vec!["a".into(), "zz".into()] } else { Vec::new() };
                job.ignore_eos = id % 2 == 0;
                job
            })
            .collect();
        for job in &jobs {
            s.handle(Command::Start(job.clone()), &mut far);
            s.handle(grant(job.id.0, ALL, 4), &mut far);
        }
        for _ in 0..3 {
            run_far(&mut s, &mut far, &mut heard);
            // Those that hold the slots go on; then the rest is seated.
            for job in &jobs {
                s.handle(grant(job.id.0, ALL, ALL), &mut far);
            }
        }
        for job in &jobs {
            let (told, (output, reason)) = (&heard[&job.id.0], reference_of(job, guess));
            assert_eq!(told.output, output, "seed {seed}, job {:?}", job.id);
            let prompt = to_u32(job.prompt.len());
            assert_eq!(told.end, Some((reason, prompt - told.cached + to_u32(output.len()) - 1)));
        }
        assert!(s.is_idle() && far.most >= 4, "{} at once", far.most);
    }
}

#[test]
fn a_job_that_is_cancelled_while_its_rows_are_away_ends_when_they_are_back() {
    let (mut far, mut heard) = (Far::new(7, false), BTreeMap::new());
    let mut s = scheduler(Profile::Exact, 1);
    for id in 1..=2 {
        s.handle(Command::Start(job(id, 0, 0..20)), &mut far);
        s.handle(grant(id, ALL, ALL), &mut far);
    }
    assert!(s.launch(&mut far) && !s.nothing_is_away());
    s.handle(Command::Cancel { job: JobId(1) }, &mut far);
    // A word about it meanwhile changes nothing.
    s.handle(grant(1, ALL, ALL), &mut far);
    assert!(s.take_events().is_empty() && !s.launch(&mut far));
    run_far(&mut s, &mut far, &mut heard);
    assert_eq!(heard[&1].end, Some((FinishReason::Cancelled, 16)));
    assert_eq!(heard[&2].output, reference(&job(2, 0, 0..20)).0);
}

#[test]
fn a_batch_that_cannot_be_sent_fails_its_jobs_and_spares_the_rest() {
    let (mut far, mut heard) = (Far::new(9, false), BTreeMap::new());
    let mut s = scheduler(Profile::Exact, 2);
    for id in 1..=3 {
        s.handle(Command::Start(job(id, 0, 0..10)), &mut far);
        s.handle(grant(id, ALL, ALL), &mut far);
    }
    far.fail_next = true;
    run_far(&mut s, &mut far, &mut heard);
    assert!(matches!(heard[&1].error, Some(JobError::Backend { .. })));
    for id in 2..=3 {
        assert_eq!(heard[&id].output, reference(&job(id, 0, 0..10)).0);
    }
}

#[test]
fn a_job_that_comes_to_nothing_alone_spares_those_in_its_batch() {
    let (mut far, mut heard) = (Far::new(11, false), BTreeMap::new());
    let mut s = scheduler(Profile::Exact, 12);
    (1..=12).for_each(|id| s.handle(Command::Start(job(id, 0, 0..10)), &mut far));
    for output in [4, ALL] {
        (1..=12).for_each(|id| s.handle(grant(id, ALL, output), &mut far));
        run_far(&mut s, &mut far, &mut heard);
        // It ends among streams, in the second round.
        far.over.extend(s.find(JobId(2)).map(to_u32));
    }
    assert!(far.near.batches.iter().any(|rows| rows.len() == 2), "streams share batches");
    let error = JobError::Backend { reason: "nobody sells its layers".to_owned() };
    assert_eq!(heard[&2].error, Some(error));
    for id in (1..=12).filter(|id| *id != 2) {
        assert_eq!(heard[&id].output, reference(&job(id, 0, 0..10)).0, "{id}");
    }
}
