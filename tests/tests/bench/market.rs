//! A small market of real processes: a regtest chain, a relay, one provider, one consumer, one channel.
//!
//! Everything is done through what an operator has: configuration files, the admin ports, the chain's RPC.

use reqwest::Client;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const MODEL: &str = "gemma-3-270m";
/// Sequences that the provider runs at once, and open requests that it allows one consumer.
pub(crate) const SLOTS: u32 = 16;
/// Positions of one sequence.
pub(crate) const CONTEXT: u32 = 1_024;
/// In msat per million tokens: dear enough that slices are paid during every stream.
const INPUT_PRICE: u64 = 10_000_000;
const OUTPUT_PRICE: u64 = 40_000_000;
const CHANNEL_SAT: u64 = 1_000_000;
/// A regtest address whose key nobody has.
const NOBODY: &str = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202";
const WITHIN: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// A process that does not outlive this one.
pub(crate) struct Process {
    child: Child,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) struct Node {
    process: Process,
    admin: SocketAddr,
    dir: PathBuf,
    client: Client,
}

pub(crate) struct Market {
    pub(crate) client: Client,
    pub(crate) provider: Node,
    pub(crate) consumer: Node,
    /// Ends in `/v1`.
    pub(crate) api: String,
    pub(crate) binary: PathBuf,
    /// The file that is sold.
    pub(crate) model: PathBuf,
    pub(crate) threads: u32,
    _relay: Process,
    _chain: Process,
    /// Goes last.
    _dir: tempfile::TempDir,
}

fn spawn(binary: &Path, args: &[&str], log: &Path, stdout: Stdio) -> Process {
    let log = File::create(log).unwrap();
    let parent = std::process::id().to_string();
    let mut command = Command::new(binary);
    command.args(args).args(["--with-parent", &parent]).stdin(Stdio::null()).stdout(stdout).stderr(log);
    Process { child: command.spawn().unwrap() }
}

/// Starts a part of the network, which prints where it listens.
fn spawn_and_hear(binary: &Path, what: &str, dir: &Path) -> (Process, String) {
    let mut process = spawn(binary, &["devnet", what], &dir.join(format!("{what}.log")), Stdio::piped());
    let mut line = String::new();
    BufReader::new(process.child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(!line.is_empty(), "{what} ended before it was ready");
    (process, line.trim().to_owned())
}

fn run(binary: &Path, args: &[&str]) -> String {
    let output = Command::new(binary).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The engine's threads, of the paid side and of the bare one: one for each core, or `BENCH_THREADS`.
fn threads() -> u32 {
    std::env::var("BENCH_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(1))
    })
}

impl Market {
    pub(crate) async fn start(binary: &Path) -> Market {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().to_owned();
        // No connection is kept: between two turns the bare engine runs, and a server closes what idles that long.
        let client = Client::builder().no_proxy().pool_max_idle_per_host(0).timeout(Duration::from_secs(300));
        let client = client.build().unwrap();
        let model = PathBuf::from(run(binary, &["models", "pull", MODEL]).trim());
        let (chain, chain_url) = spawn_and_hear(binary, "chain", &dir);
        let (relay, relay_url) = spawn_and_hear(binary, "relay", &dir);
        let mine = async |blocks: u32, address: &str| {
            let call = json!({ "jsonrpc": "1.0", "id": 1, "method": "generatetoaddress", "params": [blocks, address] });
            let answer: Value = client.post(&chain_url).json(&call).send().await.unwrap().json().await.unwrap();
            assert!(answer["error"].is_null(), "{answer}");
        };
        mine(1, NOBODY).await;
        let threads = threads();
        let [provider_admin, provider_wallet, quic, consumer_admin, consumer_wallet, api] =
            std::array::from_fn(|_| satgrid_tests::ports::free().unwrap());
        let parts = Parts { binary, dir: &dir, client: &client, chain: &chain_url, relay: &relay_url };
        let provider = parts.node(
            "provider",
            provider_admin,
            provider_wallet,
            "",
            &format!(
                "[provider]\nquic_listen = \"{quic}\"\npublic_addresses = [\"{quic}\"]\n\
                 requests_per_peer = {SLOTS}\n[[provider.models]]\npath = {model:?}\nalias = \"{MODEL}\"\n\
                 price_in_msat_per_mtok = {INPUT_PRICE}\nprice_out_msat_per_mtok = {OUTPUT_PRICE}\n\
                 slots = {SLOTS}\ncontext = {CONTEXT}\nthreads = {threads}\nprofile = \"exact\"\n"
            ),
        );
        let listen = format!("listen = \"{api}\"\n");
        let consumer = parts.node("consumer", consumer_admin, consumer_wallet, &listen, "");
        let market = Market {
            client: client.clone(),
            provider,
            consumer,
            api: format!("http://{api}/v1"),
            binary: binary.to_owned(),
            model,
            threads,
            _relay: relay,
            _chain: chain,
            _dir: temporary,
        };
        let provider = until("the provider", || market.provider.try_get("status")).await;
        until("the consumer", || market.consumer.try_get("status")).await;

        for node in [&market.provider, &market.consumer] {
            let address = node.post("wallet/address", &json!({})).await;
            mine(1, address["address"].as_str().unwrap()).await;
        }
        mine(100, NOBODY).await;
        market.sync().await;
        let open = json!({
            "node": provider["lightning_node"], "addr": provider["lightning_listen"],
            "capacity_sat": CHANNEL_SAT, "push_msat": 20_000_000,
        });
        market.consumer.post("wallet/open", &open).await;
        until("a channel", async || {
            mine(3, NOBODY).await;
            market.sync().await;
            let wallets = [market.provider.get("wallet").await, market.consumer.get("wallet").await];
            wallets.iter().all(|wallet| wallet["channels"][0]["usable"] == true).then_some(())
        })
        .await;
        until("the provider's listing", async || {
            let status = market.consumer.get("status").await;
            status["listings"].as_u64().filter(|listings| *listings > 0)
        })
        .await;
        market
    }

    async fn sync(&self) {
        for node in [&self.provider, &self.consumer] {
            node.post("wallet/sync", &json!({})).await;
        }
    }

    /// Ends the nodes as an operator would, then the network below them.
    pub(crate) async fn stop(mut self) {
        for node in [&mut self.consumer, &mut self.provider] {
            let pid = node.pid().to_string();
            let _ = Command::new("kill").args(["-TERM", &pid]).status();
        }
        let since = Instant::now();
        for node in [&mut self.consumer, &mut self.provider] {
            while node.process.child.try_wait().unwrap().is_none() && since.elapsed() < STOP_WITHIN {
                tokio::time::sleep(POLL).await;
            }
        }
    }
}

/// What all nodes share.
struct Parts<'a> {
    binary: &'a Path,
    dir: &'a Path,
    client: &'a Client,
    chain: &'a str,
    relay: &'a str,
}

impl Parts<'_> {
    /// Seed, configuration and process of a node. `api` and `more` are added to the configuration.
    fn node(&self, role: &str, admin: SocketAddr, wallet: SocketAddr, api: &str, more: &str) -> Node {
        let dir = self.dir.join(role);
        let made = self.dir.join(format!("{role}-made.toml"));
        let (made, dir_text) = (made.to_string_lossy(), dir.to_string_lossy());
        run(self.binary, &["--config", &made, "--dir", &dir_text, "--network", "regtest", "init", "--hide-words"]);
        let config = self.dir.join(format!("{role}.toml"));
        let text = format!(
            "[node]\nnetwork = \"regtest\"\ndir = {dir:?}\nroles = [\"{role}\"]\n\
             [api]\nadmin = \"{admin}\"\n{api}[market]\nrelays = [\"{}\"]\n\
             [wallet]\nchain = \"esplora:{}\"\nlisten = \"{wallet}\"\nmax_balance_sat = 2100000000000000\n{more}",
            self.relay, self.chain
        );
        std::fs::write(&config, text).unwrap();
        std::fs::set_permissions(&config, std::fs::Permissions::from_mode(0o600)).unwrap();
        let log = self.dir.join(format!("{role}.log"));
        let process = spawn(self.binary, &["up", "--config", &config.to_string_lossy()], &log, Stdio::null());
        Node { process, admin, dir, client: self.client.clone() }
    }
}

impl Node {
    pub(crate) fn pid(&self) -> u32 {
        self.process.child.id()
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        self.ask(self.client.get(self.url(path))).await.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Value {
        self.ask(self.client.post(self.url(path)).json(body)).await.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    async fn try_get(&self, path: &str) -> Option<Value> {
        self.ask(self.client.get(self.url(path))).await.ok()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/admin/v1/{path}", self.admin)
    }

    async fn ask(&self, request: reqwest::RequestBuilder) -> Result<Value, String> {
        let token = std::fs::read_to_string(self.dir.join("admin-token")).map_err(|error| error.to_string())?;
        let answer = request.bearer_auth(token.trim()).send().await.map_err(|error| error.to_string())?;
        let (status, text) = (answer.status(), answer.text().await.map_err(|error| error.to_string())?);
        if !status.is_success() {
            return Err(format!("{status}: {text}"));
        }
        serde_json::from_str(&text).map_err(|error| error.to_string())
    }
}

/// Asks until there is an answer.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = ask().await {
            return found;
        }
        assert!(since.elapsed() < WITHIN, "{what} did not come within {} s", WITHIN.as_secs());
        tokio::time::sleep(POLL).await;
    }
}
