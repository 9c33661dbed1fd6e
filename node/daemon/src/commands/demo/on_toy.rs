//! `make bench-tiny`: tiny completions at a fixed rate through the whole path that a user runs, with the toy engine in the providers.
//!
//! Chain, relay, wallets, the tokenizer and the gateway are processes of the program that is shipped; the two providers are this very
//! test binary, started again with the shipped command line (`satgrid_on_toy`), whose one difference is its engine. The client is this
//! process, on threads of its own, and asks by schedule: a call is timed from the moment at which it was due, whatever became of the
//! ones before it. Beside it, in the same run and by the same client, a bare axum handler answers the same bytes.
//!
//! Nothing passes or fails by time, and a machine too busy for the rate is told its refusals. What is asserted is that every call
//! had an answer, and that answers are whole.

mod load;

use super::nodes::{self, ForSale, Market, Prices};
use super::{Clock, funding, own_model};
use crate::admin::TOKEN_FILE;
use crate::cli::Cli;
use crate::commands::devnet::tiny_model;
use crate::models::Store;
use axum::{Json, body::Body, http::header::CONTENT_TYPE, response::Response, routing::post};
use clap::Parser;
use load::Load;
use satgrid_engine::{
    port::{Command as ToEngine, Engine, EngineEvent, Extras, Job, JobId},
    sampling::Sampling,
    toy::{AsyncToy, ToyConfig},
};
use serde_json::{Value, json};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// The command line of a program that runs on the toy, one argument a line.
const ARGS: &str = "ARGS_ON_TOY";
/// Address and folder of the bare handler.
const BARE: &str = "BARE_HANDLER";
const ON_TOY: &str = "commands::demo::on_toy::satgrid_on_toy";
const BARE_HANDLER: &str = "commands::demo::on_toy::bare_handler";
const SLOTS: u32 = 16;
/// Of each load.
const SECONDS: u64 = 10;
const PER_SECOND: u64 = 200;
/// Calls before the first load, so that sessions are open and the tokenizer's process runs.
const WARM: u64 = 200;
/// More than a load asks.
const KEY_PER_MINUTE: u64 = 10_000_000;

/// Whether this process sells what the toy says.
pub(crate) fn runs_on_toy() -> bool {
    std::env::var_os(ARGS).is_some()
}

/// The shipped program: beside the tests in the target folder, unless the environment names another.
pub(crate) fn shipped() -> std::io::Result<PathBuf> {
    if let Some(named) = std::env::var_os("SATGRID_BIN") {
        return std::path::absolute(named);
    }
    let deps = std::env::current_exe()?;
    let beside = deps.parent().and_then(Path::parent).map(|folder| folder.join("satgrid"));
    beside.ok_or_else(|| std::io::Error::other("no folder above this test"))
}

/// What the demo starts: the shipped program, and for a provider's node this binary.
pub(super) fn command(args: &[&str]) -> std::io::Result<Command> {
    let parent = std::process::id().to_string();
    if let ["up", "--config", config] = args
        && config.contains("provider")
    {
        let mut command = again(ON_TOY)?;
        command.env(ARGS, ["satgrid", "up", "--config", config, "--with-parent", &parent].join("\n"));
        return Ok(command);
    }
    let mut command = Command::new(shipped()?);
    command.args(args).args(["--with-parent", &parent]);
    Ok(command)
}

/// This test binary, to run one of its tests.
fn again(test: &str) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--ignored", "--exact", "--nocapture", test]);
    Ok(command)
}

#[test]
#[ignore = "a process of the bench"]
fn satgrid_on_toy() {
    let Ok(args) = std::env::var(ARGS) else { return };
    crate::commands::run(Cli::parse_from(args.lines())).unwrap();
}

/// Reads what it is asked as JSON, and answers with what a gateway said before.
#[test]
#[ignore = "a process of the bench"]
fn bare_handler() {
    let Ok(bare) = std::env::var(BARE) else { return };
    let (address, folder) = bare.split_once('\n').unwrap();
    let read = |name: &str| bytes::Bytes::from(std::fs::read(Path::new(folder).join(name)).unwrap());
    let (whole, stream) = (read("whole"), read("stream"));
    let answer = async move |Json(asked): Json<Value>| {
        let streamed = asked["stream"] == true;
        let kind = if streamed { "text/event-stream" } else { "application/json" };
        let body = if streamed { stream.clone() } else { whole.clone() };
        Response::builder().header(CONTENT_TYPE, kind).body(Body::from(body)).unwrap()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let routes = axum::Router::new().route("/v1/chat/completions", post(answer));
        axum::serve(listener, routes).await.unwrap();
    });
}

#[test]
#[ignore = "a bench: make bench-tiny"]
fn tiny_completions_at_a_fixed_rate() -> anyhow::Result<()> {
    let number =
        |name: &str, otherwise| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let (per_second, seconds) = (number("RATE", PER_SECOND), number("SECONDS_EACH", SECONDS));
    let paid = number("PAID", 0) > 0;
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("tiny-random.gguf");
    tiny_model(&model)?;
    let models_dir = folder.path().join("models");
    let (name, path, has_template, catalogue) = own_model(&Store::new(&models_dir), &model)?;
    let prices = if paid { Prices::new(Some(1_000_000), Some(4_000_000)) } else { Prices::new(Some(0), Some(0)) };
    let for_sale = ForSale {
        name,
        path,
        also: None,
        has_template,
        catalogue,
        slots: SLOTS,
        short_acks: false,
        profile: "exact".to_owned(),
        models_dir,
        prices,
        threads: None,
        parts: None,
    };
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    println!(
        "\n{per_second} calls a second for {seconds} s, {}, load average {}",
        if paid { "paid" } else { "unpaid" },
        busy()
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut market = Market::new(nodes::fresh_dir(&folder.path().join("market"))?, Clock::start());
        let measured = measure(&mut market, port, &for_sale, (per_second, seconds)).await;
        if measured.is_err() {
            market.show_why();
        }
        market.stop().await;
        measured
    })?;
    println!("load average at the end {}", busy());
    Ok(())
}

async fn measure(market: &mut Market, port: u16, for_sale: &ForSale, rate: (u64, u64)) -> anyhow::Result<()> {
    market.start(port, for_sale).await?;
    funding::fund(market).await?;
    funding::open_channels(market).await?;
    funding::wait_for_listings(market).await?;
    let secret = new_key(market, &for_sale.name).await?;
    let node = SocketAddr::from((Ipv4Addr::LOCALHOST, port));

    let pids = market.describe(for_sale)["nodes"].clone();
    let pid = |name: &str| pids.as_array()?.iter().find(|node| node["name"] == name)?["pid"].as_u64();
    let pids: Vec<(&str, u64)> =
        ["consumer", "provider-a", "provider-b"].iter().filter_map(|n| Some((*n, pid(n)?))).collect();
    let loads = [
        Load { name: "whole", streamed: false, once: false, key: None },
        Load { name: "streamed", streamed: true, once: false, key: None },
        Load { name: "whole, each with an idempotency key", streamed: false, once: true, key: None },
        Load { name: "whole, on a key with limits", streamed: false, once: false, key: Some(secret) },
    ];
    let mut kept = Vec::new();
    for load in &loads {
        kept.push(load::warm_up(node, load, &for_sale.name, WARM)?);
    }
    let bare = Bare::start(&market.dir, &kept)?;
    load::heading();
    for load in &loads {
        let run = |at, pids: &[(&str, u64)]| load::at_a_fixed_rate(at, load, &for_sale.name, rate, pids);
        let (base, ours) = (run(bare.address, &[("bare", u64::from(bare.child.id()))])?, run(node, &pids)?);
        base.print("a bare handler", load.name);
        ours.print("this node", load.name);
        assert!(base.refused.is_empty(), "the bare handler refuses: {:?}", base.refused.first());
        assert_eq!((ours.micros.len() + ours.refused.len()) as u64, rate.0 * rate.1, "every call has an answer");
    }
    println!("of which the toy engine itself: {} us a call", own_time().as_micros());
    market.check()
}

/// A key with every limit that is looked up at a call.
async fn new_key(market: &Market, model: &str) -> anyhow::Result<String> {
    let consumer = market.consumer()?;
    let token = std::fs::read_to_string(consumer.dir.join(TOKEN_FILE))?;
    let limits = json!({
        "name": "bench", "kind": "infer", "per_request_msat": 1_000_000, "per_day_msat": 1_000_000_000, "total_msat": 1_000_000_000,
        "requests_per_minute": KEY_PER_MINUTE, "models": [model],
    });
    let url = format!("http://{}/admin/v1/keys", consumer.admin.address);
    let client = reqwest::Client::builder().no_proxy().build()?;
    let answer = client.post(url).bearer_auth(token.trim()).json(&limits).send().await?;
    let text = answer.text().await?;
    let key: Value = serde_json::from_str(&text)?;
    Ok(key["secret"].as_str().ok_or_else(|| anyhow::anyhow!("no key: {text}"))?.to_owned())
}

/// The bare handler's process.
struct Bare {
    address: SocketAddr,
    child: std::process::Child,
}

impl Bare {
    fn start(dir: &Path, kept: &[Vec<u8>]) -> anyhow::Result<Bare> {
        std::fs::write(dir.join("whole"), &kept[0])?;
        std::fs::write(dir.join("stream"), &kept[1])?;
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let mut command = again(BARE_HANDLER)?;
        command.env(BARE, format!("{address}\n{}", dir.display())).stdout(std::process::Stdio::null());
        let child = command.spawn()?;
        let bare = Bare { address, child };
        let began = Instant::now();
        while let Err(error) = std::net::TcpStream::connect(address) {
            anyhow::ensure!(began.elapsed() < Duration::from_secs(10), "the bare handler does not listen: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(bare)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the toy itself takes for such a call, with nothing around it.
fn own_time() -> Duration {
    const CALLS: u64 = 1_000;
    let toy = AsyncToy::new(ToyConfig { slots: SLOTS, ..ToyConfig::default() });
    let began = Instant::now();
    for number in 0..CALLS {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let job = Job {
            id: JobId(number),
            session: [7; 32],
            prompt: (3..23).collect(),
            sampling,
            max_output: 1,
            stop: Vec::new(),
            ignore_eos: false,
            resumed: 0,
            extras: Extras::default(),
        };
        toy.send(ToEngine::Start(job)).unwrap();
        toy.send(ToEngine::Grant { job: JobId(number), prompt_upto: 20, output_upto: 1 }).unwrap();
        let ends = |event: Option<EngineEvent>| matches!(event, Some(EngineEvent::Finished { .. }));
        futures::executor::block_on(async { while !ends(toy.next_event().await) {} });
    }
    began.elapsed() / u32::try_from(CALLS).unwrap()
}

fn busy() -> String {
    let average = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{} over {cores} cores", average.split_whitespace().next().unwrap_or("unknown"))
}

/// The body of a call.
fn body(model: &str, streamed: bool, number: u64) -> Value {
    let message = json!({ "role": "user", "content": format!("hi {number}") });
    json!({ "model": model, "messages": [message], "max_tokens": 1, "temperature": 0, "stream": streamed })
}
