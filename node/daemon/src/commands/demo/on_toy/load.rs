//! A client that asks by schedule over kept connections, times each call from when it was due, and reads the processor time of
//! those who answered.

use anyhow::{Context, ensure};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, task::JoinSet};

/// No answer takes longer.
const WITHIN: Duration = Duration::from_secs(30);
/// `sysconf(_SC_CLK_TCK)` on every Linux.
const TICKS_PER_S: f64 = 100.0;

/// One kind of call.
pub(super) struct Load {
    pub(super) name: &'static str,
    pub(super) streamed: bool,
    /// Each call has an idempotency key.
    pub(super) once: bool,
    /// A key's secret.
    pub(super) key: Option<String>,
}

impl Load {
    /// The next call. No two of a run have the same number: an idempotency key is used once.
    fn next(&self, client: &Client, at: SocketAddr, model: &str) -> RequestBuilder {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let body = super::body(model, self.streamed, number);
        let mut call = client.post(format!("http://{at}/v1/chat/completions")).json(&body);
        if let Some(key) = &self.key {
            call = call.bearer_auth(key);
        }
        if self.once {
            call = call.header("Idempotency-Key", format!("bench-{number}"));
        }
        call
    }
}

fn client() -> reqwest::Result<Client> {
    Client::builder().no_proxy().tcp_nodelay(true).timeout(WITHIN).build()
}

async fn ask(call: RequestBuilder) -> reqwest::Result<(StatusCode, Vec<u8>)> {
    let answer = call.send().await?;
    Ok((answer.status(), answer.bytes().await?.into()))
}

/// One after the other; the body of the last answer comes back, and is a whole one.
pub(super) fn warm_up(at: SocketAddr, load: &Load, model: &str, calls: u64) -> anyhow::Result<Vec<u8>> {
    on_a_thread(async {
        let client = client()?;
        let mut last = None;
        for _ in 0..calls {
            let (status, body) = ask(load.next(&client, at, model)).await?;
            ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
            last = Some(body);
        }
        let last = last.context("no calls")?;
        let is_whole = if load.streamed {
            last.ends_with(b"data: [DONE]\n\n")
        } else {
            serde_json::from_slice::<Value>(&last)?["usage"]["completion_tokens"] == 1
        };
        ensure!(is_whole, "no whole answer: {}", String::from_utf8_lossy(&last));
        Ok(last)
    })
}

fn on_a_thread<T: Send>(work: impl Future<Output = anyhow::Result<T>> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work));
        thread.join().unwrap()
    })
}

/// What became of one load.
pub(super) struct Figures {
    /// From when each was due to its last byte, sorted.
    pub(super) micros: Vec<u64>,
    /// Answers that are no 200.
    pub(super) refused: Vec<String>,
    /// Processor time of one call, in ms, by who spent it.
    spent: Vec<(String, f64)>,
}

/// Asks at the rate whatever comes back.
pub(super) fn at_a_fixed_rate(
    at: SocketAddr,
    load: &Load,
    model: &str,
    (per_second, seconds): (u64, u64),
    pids: &[(&str, u64)],
) -> anyhow::Result<Figures> {
    let calls = per_second * seconds;
    let before = processor_time(pids);
    let (give, mut take) = mpsc::unbounded_channel::<Instant>();
    let (micros, refused) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            on_a_thread(async {
                let client = client()?;
                let mut open = JoinSet::new();
                while let Some(due) = take.recv().await {
                    let call = load.next(&client, at, model);
                    open.spawn(async move { ask(call).await.map(|answer| (due.elapsed(), answer)) });
                }
                let (mut micros, mut refused) = (Vec::new(), Vec::new());
                while let Some(done) = open.join_next().await {
                    let (took, (status, body)) = done??;
                    match status {
                        StatusCode::OK => micros.push(u64::try_from(took.as_micros())?),
                        status => refused.push(format!("{status}: {}", String::from_utf8_lossy(&body))),
                    }
                }
                micros.sort_unstable();
                Ok((micros, refused))
            })
        });
        // This thread keeps time.
        let began = Instant::now() + Duration::from_millis(100);
        for number in 0..calls {
            let due = began + Duration::from_nanos(number * 1_000_000_000 / per_second);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let _ = give.send(due);
        }
        drop(give);
        asking.join().unwrap()
    })?;
    // Receipts and the journal are written behind the answer: their time counts as well.
    std::thread::sleep(Duration::from_millis(500));
    let spent = processor_time(pids).into_iter().map(|(name, ticks)| {
        let ticks = ticks.saturating_sub(before.get(&name).copied().unwrap_or_default());
        (name, ticks as f64 / TICKS_PER_S * 1e3 / calls as f64)
    });
    Ok(Figures { micros, refused, spent: spent.collect() })
}

pub(super) fn heading() {
    println!("{:<16} {:>8} {:>8} {:>8} {:>8}   ms a call by its processors", "ms from due", "p50", "p95", "p99", "max");
}

impl Figures {
    pub(super) fn print(&self, who: &str, load: &str) {
        let at = |permille: usize| {
            let rank = (self.micros.len() * permille / 1_000).min(self.micros.len().saturating_sub(1));
            self.micros.get(rank).map_or(f64::NAN, |micros| *micros as f64 / 1e3)
        };
        let sum: f64 = self.spent.iter().map(|(_, ms)| ms).sum();
        let refused = match self.refused.first() {
            Some(first) => format!("; {} REFUSED, the first with {first}", self.refused.len()),
            None => String::new(),
        };
        let spent: Vec<String> = self.spent.iter().map(|(name, ms)| format!("{name} {ms:.2}")).collect();
        println!(
            "{who:<16} {:>8.2} {:>8.2} {:>8.2} {:>8.2}   {sum:.2} ({})   {load}{refused}",
            at(500),
            at(950),
            at(990),
            at(1_000),
            spent.join(", ")
        );
    }
}

/// Ticks of each of these processes, and of all their children together.
fn processor_time(pids: &[(&str, u64)]) -> BTreeMap<String, u64> {
    let stats: Vec<(u64, u64, u64)> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| stat(&std::fs::read_to_string(entry.ok()?.path().join("stat")).ok()?))
        .collect();
    let mut all = BTreeMap::new();
    for (name, pid) in pids {
        let own = stats.iter().find(|(of, ..)| of == pid).map_or(0, |(.., ticks)| *ticks);
        let children: u64 = stats.iter().filter(|(_, parent, _)| parent == pid).map(|(.., ticks)| ticks).sum();
        all.insert((*name).to_owned(), own);
        if children > 0 {
            all.insert(format!("{name}'s children"), children);
        }
    }
    all
}

/// Process, parent and ticks so far, of a line of `/proc/PID/stat`.
fn stat(line: &str) -> Option<(u64, u64, u64)> {
    let pid = line.split(' ').next()?.parse().ok()?;
    // The name in brackets may hold anything.
    let rest: Vec<&str> = line.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| rest.get(at)?.parse::<u64>().ok();
    Some((pid, number(1)?, number(11)? + number(12)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc() {
        let line = "42 (a) b) c) S 7 42 42 0 -1 4194304 100 0 0 0 13 29 0 0 20 0 3 0 555 1 2 3";
        assert_eq!(stat(line), Some((42, 7, 42)));
    }
}
