//! What it costs to verify a long journal: rate against a bare loop of the same checks, growth, and peak memory of the
//! built binary. Figures, not verdicts; `make bench-ledger` runs it. `SATGRID_BENCH_RECEIPTS` sets the longest journal.
//!
//! Both sides of a ratio are processor time, so that other work on the machine counts for neither.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod yardstick;

use satgrid_ledger::{
    Entry, MemoryJournal,
    bundle::{BundleWriter, EntryItem, Filter, Header},
    entry::Head,
    log::{Frontier, SignedCheckpoint},
    testing::{Work, World},
};
use satgrid_types::{Digest, Msat, NodeKey, node_key};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use yardstick::bare_checks;

const RECEIPTS: u64 = 1_000_000;
/// As a node writes them: several payments in a session, several requests for each.
const PAYMENTS: u64 = 4;
const REQUESTS: u64 = 5;

/// Writes sessions to `out` until there are so many receipts; says how many entries and what the root is.
fn generate(world: &mut World, receipts: u64, out: &mut impl Write) -> (u64, Digest) {
    let (mut head, mut frontier, mut made) = (Head::EMPTY, Frontier::new(), 0);
    let dummy = SignedCheckpoint::sign(0, Digest([0; 32]), &world.provider.node);
    let header = Header::new(node_key(&world.provider.node), Filter::All);
    // The head of a file is written once its root is known: here it goes nowhere.
    let mut writer = BundleWriter::start(Skip { out, bytes: 0, armed: false }, &header, &dummy).unwrap();
    let mut flush = |world: &mut World, writer: &mut BundleWriter<_>| {
        for entry in world.provider.journal.entries() {
            let opening = entry.opening().map(satgrid_types::cbor::encode);
            let entry = Entry::chain(&head, entry.at, entry.draft());
            head = entry.head();
            frontier.push(head.last);
            writer.item(EntryItem { entry: entry.bytes(), opening, proof: None }).unwrap();
        }
        world.provider.journal = MemoryJournal::new();
        world.consumer.journal = MemoryJournal::new();
    };
    let start = world.now;
    while made < receipts {
        // All sessions stand on one listing, which lives for half an hour: the entries' time stands still.
        world.now = start;
        let mut session = world.open();
        for _ in 0..PAYMENTS {
            world.pay(&mut session, Msat::sat(20));
            for _ in 0..REQUESTS.min(receipts - made) {
                world.complete(&mut session, Work { prompt: 100, cached: 0, output: 100, acks: 1 });
                made += 1;
            }
        }
        world.close_with_refund(&mut session);
        world.provider.books.retire(session.id);
        world.consumer.books.retire(session.id);
        flush(world, &mut writer);
    }
    writer.finish().unwrap();
    (frontier.size(), frontier.root())
}

/// Lets everything through but the first two items.
struct Skip<'a, W> {
    out: &'a mut W,
    bytes: u64,
    armed: bool,
}

impl<W: Write> Write for Skip<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // `start` writes four times: a length and a body for each of two items.
        if !self.armed {
            self.bytes += 1;
            self.armed = self.bytes == 4;
            return Ok(bytes.len());
        }
        self.out.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn bundle(path: &Path, receipts: u64) -> u64 {
    let mut world = World::new();
    let part = path.with_extension("items");
    let mut items = BufWriter::new(File::create(&part).unwrap());
    let (size, root) = generate(&mut world, receipts, &mut items);
    drop(items);
    let checkpoint = SignedCheckpoint::sign(size, root, &world.provider.node);
    let header = Header::new(node_key(&world.provider.node), Filter::All);
    let mut out = BufWriter::new(File::create(path).unwrap());
    // Only the head: the items end with their own end mark.
    let _ = BundleWriter::start(&mut out, &header, &checkpoint).unwrap();
    let mut items = File::open(&part).unwrap();
    items.seek(SeekFrom::Start(0)).unwrap();
    io::copy(&mut items, &mut out).unwrap();
    out.flush().unwrap();
    std::fs::remove_file(part).unwrap();
    size
}

/// Processor time of this thread so far, in seconds.
fn own_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// Processor time of a process with all its threads, in seconds; `None` once it is gone.
fn seconds_of(process: u32) -> Option<f64> {
    // Clock ticks of Linux' ABI: a hundredth of a second, whatever the kernel's own.
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let fields: Vec<f64> = text.rsplit(')').next()?.split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
    // Fields 14 and 15 of the whole line; the name and what is before it are left out here.
    Some((fields.get(11)? + fields.get(12)?) / TICKS).filter(|seconds| *seconds > 0.0)
}

/// Seconds for each receipt of a bare loop over the same signatures and invoices: bodies and keys lie ready.
fn bare(sample: u64) -> f64 {
    let mut world = World::new();
    let mut keys: BTreeMap<[u8; 32], NodeKey> = BTreeMap::new();
    let mut made = 0;
    while made < sample {
        let mut session = world.open();
        keys.insert(session.id.0, node_key(&session.key));
        for _ in 0..PAYMENTS {
            world.pay(&mut session, Msat::sat(20));
            for _ in 0..REQUESTS {
                world.complete(&mut session, Work { prompt: 100, cached: 0, output: 100, acks: 1 });
                made += 1;
            }
        }
        world.close_with_refund(&mut session);
    }
    let provider = node_key(&world.provider.node);
    let checks = bare_checks(world.provider.journal.entries(), &keys, provider);
    let began = own_seconds();
    checks.iter().for_each(|check| check());
    (own_seconds() - began) / made as f64
}

/// Runs the built binary; how long it took, of the clock and of the processor, and the most memory that it had, in kB.
fn verify(path: &Path) -> (Duration, f64, u64) {
    let began = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_satgrid-ledger"))
        .args(["verify", path.to_str().unwrap()])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (mut most, mut busy) = (0, 0.0);
    let status = loop {
        busy = seconds_of(child.id()).unwrap_or(busy);
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok());
        most = most.max(peak.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    (began.elapsed(), busy, most)
}

#[test]
#[ignore = "a measurement"]
fn a_long_journal() {
    let most = std::env::var("SATGRID_BENCH_RECEIPTS").map_or(RECEIPTS, |text| text.parse().unwrap());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    println!(
        "| receipts | entries | bytes | verify, receipts/s of the clock | processor, us a receipt | of that in a bare loop | ratio | peak memory, MB |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut receipts = 10_000.min(most);
    loop {
        let path = folder.path().join("long.bundle");
        let entries = bundle(&path, receipts);
        let bytes = std::fs::metadata(&path).unwrap().len();
        // Before and after, since other work on the machine comes and goes.
        let before = bare(4_000);
        let (took, busy, kb) = verify(&path);
        let alone = (before + bare(4_000)) / 2.0;
        let (rate, each) = (receipts as f64 / took.as_secs_f64(), busy / receipts as f64);
        let (ratio, us, bare_us, mb) = (alone / each, each * 1e6, alone * 1e6, kb / 1_024);
        println!("| {receipts} | {entries} | {bytes} | {rate:.0} | {us:.0} | {bare_us:.0} | {ratio:.2} | {mb} |");
        std::fs::remove_file(&path).unwrap();
        if receipts == most {
            break;
        }
        receipts = (receipts * 10).min(most);
    }
}
