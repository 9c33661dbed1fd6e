//! A client that asks by schedule over kept connections, times each call from when it was due, and reads the processor time of
//! those who answered. Knows HTTP/1.1 as far as its two servers speak it.

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};

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

/// A request as it goes over the wire.
pub(super) struct Call(Vec<u8>);

impl Call {
    pub(super) fn new(body: &Value, key: Option<&str>, once: Option<u64>) -> Call {
        let body = body.to_string();
        let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
        let once = once.map(|number| format!("Idempotency-Key: bench-{number}\r\n")).unwrap_or_default();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{}Content-Length: {}\r\n\r\n",
            key + &once,
            body.len(),
        );
        Call([head.into_bytes(), body.into_bytes()].concat())
    }
}

/// The answer's status and body, the latter without the marks of its pieces.
pub(super) struct Answered {
    status: u16,
    pub(super) body: Vec<u8>,
}

async fn ask(stream: &mut TcpStream, call: &Call) -> anyhow::Result<Answered> {
    stream.write_all(&call.0).await?;
    let mut bytes = Vec::with_capacity(4_096);
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        more(stream, &mut bytes).await?;
    };
    let head = std::str::from_utf8(&bytes[..head_end])?.to_ascii_lowercase();
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut rest = bytes.split_off(head_end);
    if let Some(length) = length {
        let length: usize = length.trim().parse()?;
        while rest.len() < length {
            more(stream, &mut rest).await?;
        }
        return Ok(Answered { status, body: rest });
    }
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let Some(line) = rest[at..].windows(2).position(|two| two == b"\r\n") else {
            more(stream, &mut rest).await?;
            continue;
        };
        let size = usize::from_str_radix(std::str::from_utf8(&rest[at..at + line])?, 16)?;
        let from = at + line + 2;
        while rest.len() < from + size + 2 {
            more(stream, &mut rest).await?;
        }
        if size == 0 {
            return Ok(Answered { status, body });
        }
        body.extend_from_slice(&rest[from..from + size]);
        at = from + size + 2;
    }
}

async fn more(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> anyhow::Result<()> {
    let read = tokio::time::timeout(WITHIN, stream.read_buf(bytes)).await.context("no answer")??;
    ensure!(read > 0, "the server hung up");
    Ok(())
}

/// One after the other; the last answer comes back, and is a whole one.
pub(super) fn warm_up(at: SocketAddr, load: &Load, model: &str, calls: u64) -> anyhow::Result<Answered> {
    on_a_thread(async {
        let mut stream = TcpStream::connect(at).await?;
        let mut last = None;
        for number in 0..calls {
            let answered = ask(&mut stream, &super::call(load, model, number)).await?;
            if answered.status != 200 {
                bail!("{}: {}", answered.status, String::from_utf8_lossy(&answered.body));
            }
            last = Some(answered);
        }
        let last = last.context("no calls")?;
        let text = String::from_utf8_lossy(&last.body).into_owned();
        let usage =
            if load.streamed { text.contains("data: [DONE]") } else { text.contains("\"completion_tokens\":1,") };
        ensure!(usage, "no whole answer: {text}");
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
    // Numbers that no other load has: an idempotency key is used once.
    let first = u64::from(Instant::now().elapsed().subsec_nanos())
        + u64::from(std::process::id()) * 1_000_000
        + u64::from(at.port());
    let before = processor_time(pids);
    let (give, mut take) = mpsc::unbounded_channel::<(Instant, Call)>();
    let (micros, refused) = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            on_a_thread(async move {
                let idle: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
                let mut open = JoinSet::new();
                while let Some((due, call)) = take.recv().await {
                    let idle = idle.clone();
                    open.spawn(async move {
                        let kept = idle.lock().unwrap().pop();
                        let mut stream = match kept {
                            Some(stream) => stream,
                            None => TcpStream::connect(at).await?,
                        };
                        stream.set_nodelay(true)?;
                        let answered = ask(&mut stream, &call).await?;
                        let took = due.elapsed();
                        idle.lock().unwrap().push(stream);
                        anyhow::Ok((took, answered))
                    });
                }
                let (mut micros, mut refused) = (Vec::new(), Vec::new());
                while let Some(done) = open.join_next().await {
                    let (took, answered) = done??;
                    match answered.status {
                        200 => micros.push(u64::try_from(took.as_micros())?),
                        status => refused.push(format!("{status}: {}", String::from_utf8_lossy(&answered.body))),
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
            let call = super::call(load, model, first + number);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let _ = give.send((due, call));
        }
        drop(give);
        client.join().unwrap()
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
