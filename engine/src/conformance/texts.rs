//! The suite of engines that embed: rows in order and exact, grants honoured, other jobs refused.

use super::bench::{Bench, End, Trace};
use crate::port::{Command, Engine, Extras, FinishReason, Job, JobError, Tokenizer};

/// Texts of a few lengths, one of them longer than most pieces of a prompt.
const TEXTS: [&str; 4] = [
    "the river",
    "a quiet market in the morning light, where one by one the old stones grew bright over the water",
    "winter",
    "the window over the garden and the paper of the old machine, two by two, slowly, under the bright number of signals",
];

/// Runs every case on an engine of an embedding model.
pub async fn embedding_conformance(engine: &dyn Engine, tok: &dyn Tokenizer) {
    let mut bench = Bench::new(engine, tok).await;
    assert!(bench.facts.model.pooling.is_some(), "the model does not embed");
    other_jobs_are_refused(&mut bench).await;
    let rows = each_text_has_its_row(&mut bench).await;
    pieces_are_granted(&mut bench, &rows).await;
    many_at_once(&mut bench, &rows).await;
    cancelled(&mut bench).await;
}

async fn tokens(bench: &Bench<'_>) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for text in TEXTS {
        all.push(bench.tok.tokenize(text, true, false).await.expect("tokenize"));
    }
    all
}

fn job_of(bench: &mut Bench<'_>, texts: &[Vec<u32>]) -> Job {
    let lengths = texts.iter().map(|ids| ids.len() as u32).collect();
    let extras = Extras { embed: Some(lengths), ..Extras::default() };
    Job { prompt: texts.concat(), extras, ignore_eos: false, ..bench.job(0) }
}

/// Numbers of a row that has the model's width and length 1.
fn numbers(bench: &Bench<'_>, row: &[u8]) -> Vec<f32> {
    let numbers: Vec<f32> = row.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!((numbers.len() as u32, row.len() % 4), (bench.facts.model.n_embd, 0));
    let length: f32 = numbers.iter().map(|n| n * n).sum();
    assert!((length - 1.0).abs() < 1e-4, "a row's length is {length}");
    numbers
}

fn same(bench: &Bench<'_>, a: &[u8], b: &[u8]) {
    if bench.exact() {
        assert_eq!(a, b, "the exact profile gave other bits");
    }
    let (a, b) = (numbers(bench, a), numbers(bench, b));
    let cosine: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
    assert!(cosine > 0.999, "the same text, cosine {cosine}");
}

async fn other_jobs_are_refused(bench: &mut Bench<'_>) {
    let texts = tokens(bench).await;
    let context = bench.facts.context;
    let base = job_of(bench, &texts[..1]);
    let of = |lengths: Vec<u32>| Extras { embed: Some(lengths), ..Extras::default() };
    let count = base.prompt.len() as u32;
    let writes = bench.job(4);
    let cases = [
        (writes, JobError::OtherKind { embeds: true }),
        (Job { extras: of(vec![count - 1]), ..base.clone() }, JobError::BadTexts),
        (Job { extras: of(vec![count, 0]), ..base.clone() }, JobError::BadTexts),
        (Job { extras: of(vec![]), ..base.clone() }, JobError::BadTexts),
        (
            Job { prompt: vec![5; context as usize + 1], extras: of(vec![context + 1]), ..base.clone() },
            JobError::PromptTooLong { prompt: context + 1, context },
        ),
        (
            Job { prompt: vec![bench.facts.model.vocab], extras: of(vec![1]), ..base },
            JobError::UnknownToken { token: bench.facts.model.vocab, vocab: bench.facts.model.vocab },
        ),
    ];
    for (job, expected) in cases {
        let id = bench.job(0).id;
        let trace = bench.run(Job { id, ..job }).await;
        assert_eq!(trace.end, Some(End::Failed(expected)));
        assert_eq!((trace.upto, trace.rows.len()), (0, 0), "no work for a refused job");
    }
}

/// The rows of all texts, each computed alone; together they are the same.
async fn each_text_has_its_row(bench: &mut Bench<'_>) -> Vec<Vec<u8>> {
    let texts = tokens(bench).await;
    let mut alone = Vec::new();
    for text in &texts {
        let job = job_of(bench, std::slice::from_ref(text));
        let trace = bench.run(job).await;
        assert_eq!((trace.finished(), trace.rows.len()), (FinishReason::Stop, 1));
        alone.push(trace.rows[0].clone());
    }
    for (at, row) in alone.iter().enumerate() {
        for other in &alone[..at] {
            let (a, b) = (numbers(bench, row), numbers(bench, other));
            let cosine: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert!(cosine < 0.9999, "two texts have one row: cosine {cosine}");
        }
    }
    let job = job_of(bench, &texts);
    let together = bench.run(job).await;
    all_there(bench, &together, &alone);
    alone
}

#[track_caller]
fn all_there(bench: &Bench<'_>, trace: &Trace, expected: &[Vec<u8>]) {
    assert_eq!((trace.finished(), trace.rows.len()), (FinishReason::Stop, expected.len()));
    assert_eq!(trace.cached, 0, "nothing of a text is kept");
    trace.rows.iter().zip(expected).for_each(|(row, expected)| same(bench, row, expected));
}

/// Granted piece by piece, each covered before the next is granted, as a provider does.
async fn pieces_are_granted(bench: &mut Bench<'_>, expected: &[Vec<u8>]) {
    let texts = tokens(bench).await;
    for piece in [7, 40] {
        let job = job_of(bench, &texts);
        let prompt = job.prompt.len() as u32;
        let id = bench.start(job);
        let mut upto = 0;
        while upto < prompt {
            upto = prompt.min(upto + piece);
            bench.grant(id, upto, 0);
            let seen = bench.until(id, |trace| trace.upto == upto).await;
            // A row is there before the position that ends its text is told as covered.
            let ends = texts.iter().scan(0, |end, text| {
                *end += text.len() as u32;
                Some(*end)
            });
            let due = ends.filter(|end| *end <= upto).count();
            assert_eq!(seen.rows.len(), due, "{upto} of {prompt} covered");
        }
        let trace = bench.until(id, |trace| trace.end.is_some()).await;
        all_there(bench, &trace, expected);
    }
}

async fn many_at_once(bench: &mut Bench<'_>, expected: &[Vec<u8>]) {
    let texts = tokens(bench).await;
    let mut ids = Vec::new();
    for _ in 0..bench.facts.slots + 2 {
        let job = job_of(bench, &texts);
        ids.push(bench.launch(job));
    }
    for id in ids {
        let trace = bench.until(id, |trace| trace.end.is_some()).await;
        all_there(bench, &trace, expected);
    }
}

async fn cancelled(bench: &mut Bench<'_>) {
    let texts = tokens(bench).await;
    let job = job_of(bench, &texts);
    let id = bench.start(job);
    bench.grant(id, texts[0].len() as u32, 0);
    bench.until(id, |trace| trace.rows.len() == 1).await;
    bench.send(Command::Cancel { job: id });
    let trace = bench.until(id, |trace| trace.end.is_some()).await;
    let evaluated = texts[0].len() as u32;
    assert_eq!(trace.end, Some(End::Finished { reason: FinishReason::Cancelled, evaluated }));
}
