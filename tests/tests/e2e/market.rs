//! The demo's market as a test's own: started by the shipped binary, left running, and ended with nothing left over.

use satgrid_engine::tiny::TinyModel;
use serde_json::Value;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// From nothing to a paid answer, on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// How long two ledgers may differ by what is on its way.
const AGREE_WITHIN: Duration = Duration::from_secs(15);
/// Of each node's log, where a test fails.
const LOG_LINES: usize = 30;
const ENDS_WITHIN: Duration = Duration::from_secs(60);

fn beside(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/satgrid");
    let binary = std::env::var_os("SATGRID_BIN").map_or(built, PathBuf::from).with_file_name(name);
    assert!(binary.exists(), "{} is not built: `make build`", binary.display());
    binary
}

/// The shipped binary, in an environment without settings of the user's.
pub(crate) fn satgrid() -> Command {
    clean(Command::new(beside("satgrid")))
}

/// The auditor's binary.
pub(crate) fn auditor() -> Command {
    clean(Command::new(beside("satgrid-ledger")))
}

fn clean(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SATGRID_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

pub(crate) fn free_port() -> u16 {
    satgrid_tests::ports::free().unwrap().port()
}

/// A model of random weights that the binary loads like any other.
pub(crate) fn tiny_model(dir: &Path) -> PathBuf {
    let path = dir.join("tiny-random.gguf");
    TinyModel::default().write(&mut File::create(&path).unwrap()).unwrap();
    path
}

/// Runs the demo to its end; it must succeed. What it printed comes back.
#[track_caller]
pub(crate) fn demo(dir: &Path, args: &[&str]) -> Value {
    try_demo(dir, args).unwrap_or_else(|failure| panic!("{failure}"))
}

/// Runs the demo to its end: what it printed, or everything that it said where it failed.
pub(crate) fn try_demo(dir: &Path, args: &[&str]) -> Result<Value, String> {
    let mut command = satgrid();
    command.args(["devnet", "demo", "--format", "json", "--port", &free_port().to_string()]);
    let output = command.arg("--dir").arg(dir.join("market")).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stdout)));
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}

/// A node of the market.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) dir: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) admin: String,
}

/// A market that stays until the test is over.
pub(crate) struct Market {
    /// What the demo printed of its own paid answer.
    pub(crate) document: Value,
    pub(crate) dir: PathBuf,
    /// Ends in `/v1`.
    pub(crate) api: String,
    pub(crate) model: String,
    pub(crate) nodes: Vec<Node>,
    /// ldk-node closed a channel by force after a kill.
    pub(crate) forced_close: bool,
    demo: Child,
    /// Nodes that the test itself started again.
    pub(crate) restarted: Vec<Child>,
}

impl Market {
    pub(crate) fn start(dir: &Path, model: &Path) -> Market {
        let mut command = satgrid();
        command.args(["devnet", "demo", "--keep", "--format", "json", "--max-tokens", "64", "--model"]).arg(model);
        command.args(["--port", &free_port().to_string(), "--dir"]).arg(dir);
        let log = dir.with_extension("log");
        command.stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        let mut demo = command.spawn().unwrap();
        let mut stdout = BufReader::new(demo.stdout.take().unwrap());
        let began = Instant::now();
        // One JSON document on stdout, whole before the demo begins to wait.
        let reader = std::thread::spawn(move || {
            let mut values = serde_json::Deserializer::from_reader(stdout.by_ref()).into_iter::<Value>();
            values.next().and_then(Result::ok)
        });
        while !reader.is_finished() {
            if began.elapsed() > READY_WITHIN {
                let _ = demo.kill();
                panic!("the market is not ready: {}", std::fs::read_to_string(&log).unwrap());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let Some(document) = reader.join().unwrap() else {
            let _ = demo.kill();
            panic!("the market failed: {}", std::fs::read_to_string(&log).unwrap());
        };
        eprintln!("  a market on a tiny model, with a paid answer: {:.1} s", began.elapsed().as_secs_f32());
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let described = &document["market"];
        let nodes = described["nodes"].as_array().unwrap().iter().map(|node| Node {
            name: text(&node["name"]),
            pid: u32::try_from(node["pid"].as_u64().unwrap()).unwrap(),
            dir: text(&node["dir"]).into(),
            config: text(&node["config"]).into(),
            admin: text(&node["admin"]),
        });
        Market {
            api: text(&described["api"]),
            model: text(&described["model"]),
            nodes: nodes.collect(),
            dir: dir.to_owned(),
            document,
            demo,
            forced_close: false,
            restarted: Vec::new(),
        }
    }

    /// Runs one case and says how long it took.
    pub(crate) async fn case(&self, name: &str, case: impl Future<Output = ()>) {
        let began = Instant::now();
        case.await;
        eprintln!("  {name}: {:.1} s", began.elapsed().as_secs_f32());
    }

    pub(crate) fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).unwrap()
    }

    /// Of the chain or the relay.
    pub(crate) fn part(&self, name: &str) -> (String, u32) {
        let part = &self.document["market"][name];
        (part["url"].as_str().unwrap().to_owned(), u32::try_from(part["pid"].as_u64().unwrap()).unwrap())
    }

    /// Exports all ledgers and has the auditor judge each alone and the consumer's against each provider's.
    ///
    /// The last receipt may still be on its way to its provider's ledger when the answer is whole at the client, so what
    /// does not match is looked at once more for a while.
    pub(crate) fn audit(&self, when: &str) {
        let began = Instant::now();
        while let Err(report) = self.verdict() {
            assert!(began.elapsed() < AGREE_WITHIN, "{when}: {report}");
            std::thread::sleep(Duration::from_millis(200));
        }
        eprintln!("  ledgers verify {when}: {:.1} s", began.elapsed().as_secs_f32());
    }

    fn verdict(&self) -> Result<(), String> {
        let bundles: Vec<PathBuf> = self.nodes.iter().map(|node| self.export(node)).collect();
        for bundle in &bundles {
            verify(&[bundle])?;
        }
        let Some((consumer, providers)) = bundles.split_first() else { return Ok(()) };
        if self.forced_close {
            // A slice that was lost to the miners stands differently in the two ledgers: that is the finding.
            eprintln!("  ldk-node closed a channel by force: each ledger is verified alone");
            return Ok(());
        }
        providers.iter().try_for_each(|provider| verify(&[consumer, provider]))
    }

    fn export(&self, node: &Node) -> PathBuf {
        let out = self.dir.join(format!("{}.audit", node.name));
        let mut command = satgrid();
        command.args(["ledger", "export", "--db"]).arg(node.dir.join("ledger.sqlite")).arg("--out").arg(&out);
        let output = command.arg("--key").arg(node.dir.join("identity.key")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out
    }

    /// Every entry of a node's ledger, as `ledger show` has it.
    pub(crate) fn ledger(&self, name: &str) -> Vec<Value> {
        let journal = self.node(name).dir.join("ledger.sqlite");
        let output = satgrid().args(["ledger", "show", "--format", "json", "--db"]).arg(journal).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let values = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
        values
            .map(Result::unwrap)
            .flat_map(|value| value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]))
            .collect()
    }

    /// Ctrl-C; then nothing of it may be left.
    pub(crate) fn stop(mut self) {
        let mut pids: Vec<u32> = self.nodes.iter().map(|node| node.pid).collect();
        pids.extend([self.part("chain").1, self.part("relay").1]);
        signal("INT", self.demo.id());
        let status = wait(&mut self.demo);
        assert!(status.success(), "{status}");
        for child in &mut self.restarted {
            signal("TERM", child.id());
            wait(child);
        }
        let left: Vec<&u32> = pids.iter().filter(|pid| is_running(**pid)).collect();
        assert!(left.is_empty(), "still running: {left:?}");
    }
}

/// Where a test fails, its processes end all the same: the demo's children with the demo.
impl Drop for Market {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                let log = std::fs::read_to_string(self.dir.join(format!("logs/{}.log", node.name))).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("--- {}\n{}", node.name, lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"));
            }
        }
        for child in self.restarted.iter_mut().chain([&mut self.demo]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn verify(bundles: &[&PathBuf]) -> Result<(), String> {
    let output = auditor().arg("verify").args(bundles).output().unwrap();
    if output.status.success() {
        return Ok(());
    }
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("{bundles:?}\n{out}\n{err}"))
}

pub(crate) fn signal(name: &str, pid: u32) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

fn wait(child: &mut Child) -> std::process::ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(began.elapsed() < ENDS_WITHIN, "process {} does not end", child.id());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A zombie is not running.
pub(crate) fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// The child of `parent` whose command line has `word` in it.
pub(crate) fn child_with(parent: u32, word: &str) -> Option<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default().to_owned();
        let is_child = fields.split_whitespace().nth(1) == Some(&parent.to_string());
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        is_child && is_running(*pid) && line.contains(word)
    })
}
