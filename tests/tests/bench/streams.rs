//! Paid streams through the API against the bare engine: same file, threads, profile, slots, lengths of prompt and output.
//!
//! The paid side is measured where a client stands: from sending the HTTP request to the text that comes back. The bare
//! side is `satgrid engine-worker --bare-...`: a process that loads the model, starts equal jobs and counts.

use crate::Size;
use crate::machine::{engines, processor_seconds, wallets};
use crate::market::{CONTEXT, MODEL, Market, SLOTS};
use crate::report::{Goal, Report, median};
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const SINGLE_GOAL: f64 = 0.97;
const CROWD_GOAL: f64 = 0.95;
const FIRST_TOKEN_GOAL_MS: f64 = 20.0;
/// The ends that the model may draw: a paid stream has no `ignore_eos`, so they are made impossible.
const ENDS: [&str; 2] = ["1", "106"];
/// About 64 tokens with the number before it.
const STORY: &str = "The history of money is a history of trust. At first people traded goods for goods, then shells, \
    then silver, then paper that promised silver, and at last numbers in the books of a bank that promised nothing but \
    more numbers. Each step was easier to carry and harder to check. What comes after that is";

/// One paid stream as its client saw it.
#[derive(Debug, Clone, Copy)]
struct Paid {
    prompt_tokens: u32,
    tokens: u32,
    /// From sending the request.
    first: Duration,
    last: Duration,
    end: Duration,
    cached: u32,
}

impl Paid {
    /// Tokens after the first over the time after the first.
    fn decode(&self) -> f64 {
        f64::from(self.tokens.saturating_sub(1)) / (self.last - self.first).as_secs_f64()
    }
}

/// What the bare engine prints.
#[derive(Debug, Clone)]
struct Bare {
    total: f64,
    decode: f64,
    first_ms: Vec<f64>,
}

/// No two prompts begin alike: what a session has cached serves none of them.
fn prompt() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{} {number}. {STORY}", number.wrapping_mul(7_919) % 9_973)
}

async fn paid(market: &Market, max_tokens: u32) -> Paid {
    let bias: serde_json::Map<String, Value> = ENDS.iter().map(|id| ((*id).to_owned(), json!(-100))).collect();
    let body = json!({
        "model": MODEL, "messages": [{ "role": "user", "content": prompt() }], "max_tokens": max_tokens,
        "temperature": 0, "logit_bias": bias, "stream": true, "stream_options": { "include_usage": true },
    });
    let request = market.client.post(format!("{}/chat/completions", market.api)).json(&body);
    let sent = Instant::now();
    let mut answer = request.send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    let (mut text, mut seen, mut first, mut last) = (Vec::new(), 0, None, Duration::ZERO);
    while let Some(bytes) = answer.chunk().await.unwrap() {
        text.extend_from_slice(&bytes);
        // Read no more than needed while the clock runs: the nodes share these cores.
        if has_text(&text[seen..]) {
            last = sent.elapsed();
            first.get_or_insert(last);
        }
        seen = text.len();
    }
    let end = sent.elapsed();
    let text = String::from_utf8(text).unwrap();
    assert!(text.trim_end().ends_with("[DONE]"), "a stream broke off: {}", &text[text.len().saturating_sub(500)..]);
    let mut chunks =
        text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    let usage = chunks.find(|chunk| !chunk["usage"].is_null()).expect("usage was asked for")["usage"].clone();
    let number = |value: &Value| u32::try_from(value.as_u64().unwrap_or(0)).unwrap();
    assert!(usage["receipt_ids"].as_array().is_some_and(|ids| !ids.is_empty()), "no receipt: {usage}");
    assert_eq!(number(&usage["completion_tokens"]), max_tokens, "{usage}");
    Paid {
        prompt_tokens: number(&usage["prompt_tokens"]),
        tokens: number(&usage["completion_tokens"]),
        cached: number(&usage["prompt_tokens_details"]["cached_tokens"]),
        first: first.expect("some text came"),
        last,
        end,
    }
}

/// Whether a piece of the stream brings text: the opening chunk's content is empty.
fn has_text(bytes: &[u8]) -> bool {
    const CONTENT: &[u8] = b"\"content\":\"";
    bytes.windows(CONTENT.len() + 1).any(|window| window.starts_with(CONTENT) && !window.ends_with(b"\"\""))
}

async fn paid_crowd(market: &Market, streams: u32, max_tokens: u32) -> (Vec<Paid>, Duration) {
    let sent = Instant::now();
    let mut last = Duration::ZERO;
    let local = tokio::task::LocalSet::new();
    let all = local
        .run_until(async {
            let calls = (0..streams).map(|_| paid(market, max_tokens));
            join_all(calls).await
        })
        .await;
    // All were sent at once, so the latest text of any of them ends the measurement.
    all.iter().for_each(|one| last = last.max(one.last));
    assert!(last <= sent.elapsed());
    (all, last)
}

/// All futures on this one task.
async fn join_all<T>(futures: impl IntoIterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut waiting: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, done) in &mut waiting {
            if done.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *done = Some(value);
            }
        }
        if waiting.iter().all(|(_, done)| done.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    waiting.into_iter().filter_map(|(_, done)| done).collect()
}

fn bare(market: &Market, streams: u32, prompt: u32, output: u32) -> Bare {
    let numbers = [streams, prompt, output, market.threads, SLOTS, CONTEXT].map(|number| number.to_string());
    let [streams, prompt, output, threads, slots, context] = &numbers;
    let mut command = Command::new(&market.binary);
    command.args(["engine-worker", "--profile", "exact", "--model"]).arg(&market.model);
    command.args(["--bare-streams", streams, "--bare-prompt", prompt, "--bare-output", output]);
    command.args(["--threads", threads, "--slots", slots, "--context", context]);
    // The exact profile's own switch, which ggml reads when a process starts, and large pages: the node sets both for its engine.
    command.env("GGML_CPU_TILED_MM", "0").env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
    let printed = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    let text = String::from_utf8(printed.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("bare ")).expect("the bare engine gives figures");
    let figures: Vec<f64> = line.split_whitespace().map(|figure| figure.parse().unwrap()).collect();
    let [total, decode, _wall, first_ms @ ..] = figures.as_slice() else { panic!("{line}") };
    Bare { total: *total, decode: *decode, first_ms: first_ms.to_vec() }
}

/// Opens the session, fetches the tokenizer, and lets slices grow to what 16 streams need.
pub(crate) async fn warm_up(market: &Market) {
    let since = Instant::now();
    paid(market, 16).await;
    paid_crowd(market, SLOTS, 32).await;
    eprintln!("the session is open: {:.1} s of paid streams, not counted", since.elapsed().as_secs_f64());
}

/// Counters of the consumer, to say what was paid meanwhile.
async fn slices_and_receipts(market: &Market) -> (u64, u64) {
    let status = market.consumer.get("status").await;
    let counters = &status["consumer"]["counters"];
    (counters["slices"].as_u64().unwrap_or(0), counters["receipts"].as_u64().unwrap_or(0))
}

/// Processor seconds so far of: the gateway with its tokenizer and its wallet, the provider's node with its wallet, its engine.
fn processor_times(market: &Market) -> [f64; 3] {
    let all = |pids: Vec<u32>| pids.into_iter().map(processor_seconds).sum::<f64>();
    let (gateway, provider) = (market.consumer.pid(), market.provider.pid());
    let gateway = processor_seconds(gateway) + all(engines(gateway)) + all(wallets(gateway));
    [gateway, processor_seconds(provider) + all(wallets(provider)), all(engines(provider))]
}

/// One stream at a time.
pub(crate) async fn single(market: &Market, size: Size, report: &mut Report) {
    let (mut speed, mut tails, mut used) = (Vec::new(), Vec::new(), [0.0; 3]);
    let paid_before = slices_and_receipts(market).await;
    for turn in 1..=size.single_turns {
        let before = processor_times(market);
        let a = paid(market, size.single_tokens).await;
        let after = processor_times(market);
        let b = bare(market, 1, a.prompt_tokens, size.single_tokens);
        (0..3).for_each(|part| used[part] += (after[part] - before[part]) * 1_000.0);
        eprintln!("one stream, turn {turn}: paid {:.1} tokens/s; bare {:.1} tokens/s", a.decode(), b.decode);
        speed.push((a.decode(), b.decode));
        tails.push((a.end - a.last).as_secs_f64() * 1_000.0);
    }
    let paid_after = slices_and_receipts(market).await;
    report.ratio("one paid stream : bare engine", "tokens/s", &speed, Goal::AtLeast(SINGLE_GOAL));
    let tokens = f64::from(size.single_turns * size.single_tokens);
    report.note(format!(
        "one stream: {} slices paid and {} receipts signed meanwhile; from the last text to [DONE] {:.0} ms; processor time \
         a token: gateway {:.2} ms, provider's node {:.2} ms, engine {:.2} ms (wallets and HTTP included)",
        paid_after.0 - paid_before.0,
        paid_after.1 - paid_before.1,
        median(&tails),
        used[0] / tokens,
        used[1] / tokens,
        used[2] / tokens,
    ));
}

/// Time to first token, with the session open: short answers, many turns.
pub(crate) async fn first_token(market: &Market, size: Size, report: &mut Report) {
    const TOKENS: u32 = 8;
    let (mut paid_ms, mut bare_ms, mut later) = (Vec::new(), Vec::new(), Vec::new());
    let (mut prompt_tokens, mut cached) = (0, 0);
    for turn in 1..=size.first_turns {
        let a = paid(market, TOKENS).await;
        let b = bare(market, 1, a.prompt_tokens, TOKENS).first_ms[0];
        let a_ms = a.first.as_secs_f64() * 1_000.0;
        eprintln!("first token, turn {turn}: paid after {a_ms:.0} ms; bare after {b:.0} ms");
        paid_ms.push(a_ms);
        bare_ms.push(b);
        later.push(a_ms - b);
        (prompt_tokens, cached) = (a.prompt_tokens, a.cached);
    }
    report.figure("first token of a paid stream, later by", "ms", median(&later), Goal::AtMost(FIRST_TOKEN_GOAL_MS));
    let least = |all: &[f64]| all.iter().copied().fold(f64::INFINITY, f64::min);
    report.note(format!(
        "first token: {prompt_tokens} tokens of prompt ({cached} cached); paid {:.0} ms, bare {:.0} ms (medians); quickest \
         paid {:.0} ms, bare {:.0} ms",
        median(&paid_ms),
        median(&bare_ms),
        least(&paid_ms),
        least(&bare_ms),
    ));
}

/// 16 streams at once.
pub(crate) async fn crowd(market: &Market, size: Size, report: &mut Report) {
    let (mut speed, mut used) = (Vec::new(), [0.0; 3]);
    let (mut first, mut bare_first) = (Vec::new(), Vec::new());
    let paid_before = slices_and_receipts(market).await;
    for turn in 1..=size.crowd_turns {
        let before = processor_times(market);
        let (all, wall) = paid_crowd(market, SLOTS, size.crowd_tokens).await;
        let after = processor_times(market);
        (0..3).for_each(|part| used[part] += (after[part] - before[part]) * 1_000.0);
        let tokens: u32 = all.iter().map(|one| one.tokens).sum();
        let total = f64::from(tokens) / wall.as_secs_f64();
        let b = bare(market, SLOTS, all[0].prompt_tokens, size.crowd_tokens);
        let firsts: Vec<f64> = all.iter().map(|one| one.first.as_secs_f64() * 1_000.0).collect();
        eprintln!(
            "{SLOTS} streams, turn {turn}: paid {total:.1} tokens/s, first tokens after {:.0} ms (median); bare {:.1} tokens/s, \
             {:.0} ms",
            median(&firsts),
            b.total,
            median(&b.first_ms),
        );
        speed.push((total, b.total));
        first.push(median(&firsts));
        bare_first.push(median(&b.first_ms));
    }
    let paid_after = slices_and_receipts(market).await;
    report.ratio("16 paid streams : bare engine", "tokens/s", &speed, Goal::AtLeast(CROWD_GOAL));
    let tokens = f64::from(size.crowd_turns * size.crowd_tokens * SLOTS);
    report.note(format!(
        "16 streams: {} slices paid and {} receipts signed meanwhile; first tokens after {:.0} ms, bare {:.0} ms; processor \
         time a token: gateway {:.2} ms, provider's node {:.2} ms, engine {:.2} ms",
        paid_after.0 - paid_before.0,
        paid_after.1 - paid_before.1,
        median(&first),
        median(&bare_first),
        used[0] / tokens,
        used[1] / tokens,
        used[2] / tokens,
    ));
}
