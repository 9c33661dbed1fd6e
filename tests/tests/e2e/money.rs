//! The operator's own money on a running node: sweeps on chain and to a Lightning address with what they cost, and a wallet
//! whose process is killed. The books agree with the wallet after each.

use super::address::AddressServer;
use super::bad_luck::up;
use super::http::{Events, admin, admin_post, client, long, wait_for};
use super::market::{Market, Node, child_with, is_running, satgrid, signal};
use serde_json::{Value, json};
use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

const WITHIN: Duration = Duration::from_secs(60);
/// Enough to open both channels again.
const KEPT: &str = "1000000";
const NOBODY: &str = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202";

/// `satgrid wallet ARGS --format json` of a node.
fn wallet(node: &Node, args: &[&str]) -> Value {
    try_wallet(node, args).unwrap_or_else(|said| panic!("{args:?}: {said}"))
}

fn try_wallet(node: &Node, args: &[&str]) -> Result<Value, String> {
    let mut command = satgrid();
    command.args(["--format", "json", "--config"]).arg(&node.config).arg("wallet").args(args);
    let output = command.output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}

async fn mine(market: &Market, blocks: u32) {
    let (chain, _) = market.part("chain");
    let mine = json!({ "id": 1, "method": "generatetoaddress", "params": [blocks, NOBODY] });
    client().post(&chain).json(&mine).send().await.unwrap();
    for node in &market.nodes {
        if admin(node, "status").await.is_some() {
            admin_post(node, "wallet/sync").await;
        }
    }
}

/// What the ledger holds in an account, in msat.
fn account(node: &Node, name: &str) -> i64 {
    let output = satgrid()
        .args(["ledger", "balance", "--format", "json", "--db"])
        .arg(node.dir.join("ledger.sqlite"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Value = serde_json::from_slice(&output.stdout).unwrap();
    lines[name]["balance_msat"].as_i64().unwrap_or(0)
}

/// Ledger against wallet, as the operator's guide has it.
fn reconcile(node: &Node) -> Value {
    let history = wallet(node, &["history"]);
    let mut child = satgrid()
        .args(["ledger", "reconcile", "--format", "json", "--payments", "-", "--db"])
        .arg(node.dir.join("ledger.sqlite"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(history.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn agrees(node: &Node) {
    let began = Instant::now();
    while reconcile(node)["verdict"] != "agree" {
        assert!(began.elapsed() < WITHIN, "ledger and wallet differ: {:#}", reconcile(node));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Coins to an address: what the preview says of the miners' fee is what the transaction costs, and what is booked.
pub(crate) async fn sweep_on_chain(market: &Market) {
    let (consumer, provider) = (market.node("consumer"), market.node("provider-a"));
    let to = wallet(provider, &["address"])["address"].as_str().unwrap().to_owned();
    let before = account(consumer, "miners-fees");
    assert!(before > 0, "opening the channels has cost something");
    let args = ["sweep", "--to", &to, "--keep-sat", KEPT, "--fee-rate", "7"];
    let plan = wallet(consumer, &args);
    let draft = &plan["onchain"];
    assert_eq!((&draft["exact"], &draft["sat_per_vb"]), (&true.into(), &7.into()), "{plan}");
    let (fee, size) = (draft["fee_sat"].as_u64().unwrap(), draft["vsize"].as_u64().unwrap());
    assert!((size * 7 - 7..=size * 7 + 7).contains(&fee), "7 sat for each of {size} vB: {plan}");
    wallet(consumer, &[&args[..], &["--now", "--yes"]].concat());
    let booked = || async {
        mine(market, 1).await;
        let paid = account(consumer, "miners-fees") - before;
        (paid > 0).then_some(paid)
    };
    let paid = wait_for("the miners' fee in the books", WITHIN, booked).await;
    assert_eq!(paid, i64::try_from(fee).unwrap() * 1_000, "the preview was exact");
    let left = &admin(consumer, "wallet").await.unwrap()["balance"];
    let stays = left["anchor_reserve_sat"].as_u64().unwrap() + KEPT.parse::<u64>().unwrap() - fee;
    assert_eq!(left["onchain_total_sat"], stays, "the anchor reserve stays, and what was to be kept: {left}");
    agrees(consumer).await;
}

/// Channel money to a Lightning address, whose server asks the provider's node for invoices.
pub(crate) async fn sweep_to_lightning_address(market: &Market) {
    let (consumer, provider) = (market.node("consumer").clone(), market.node("provider-a").clone());
    let payee = provider.clone();
    let invoice =
        move |sat: u64| wallet(&payee, &["receive", &sat.to_string()])["invoice"].as_str().unwrap().to_owned();
    let server = AddressServer::start(0, invoice).await;
    let received = |rows: Value| rows.as_array().unwrap().iter().filter(|row| row["state"] == "settled").count();
    let before = received(admin(&provider, "wallet/payments").await.unwrap());
    let to = server.address();
    let args = ["sweep", "--to", &to, "--keep-sat", "20000"];
    // Not before the last payment is over.
    let plan = || async { try_wallet(&consumer, &args).ok() };
    let plan = wait_for("a plan of the sweep", WITHIN, plan).await;
    assert!(plan["onchain"].is_null() && plan["max_fee"].as_u64() > Some(0), "{plan}");
    // The command is another process, and waits for this one's server.
    let (node, args) = (consumer.clone(), args.map(str::to_owned));
    let swept = tokio::task::spawn_blocking(move || {
        let args: Vec<&str> = args.iter().map(String::as_str).chain(["--now", "--yes"]).collect();
        wallet(&node, &args)
    });
    let swept = swept.await.unwrap();
    assert_eq!(swept["amount_sat"], plan["amount_sat"], "{swept}");
    let arrived = || async { (received(admin(&provider, "wallet/payments").await?) > before).then_some(()) };
    wait_for("the sweep at its payee", WITHIN, arrived).await;
    let sum = format!("out: {} msat", swept["amount_sat"].as_u64().unwrap() * 1_000);
    let row = || async {
        let booked = |entry: &Value| entry["kind"] == "wallet-payment" && entry["what"].to_string().contains(&sum);
        market.ledger("consumer").iter().any(booked).then_some(())
    };
    wait_for("the sweep in the books", WITHIN, row).await;
    agrees(&consumer).await;
    agrees(&provider).await;
}

/// SIGKILL for the process that has the Lightning node, while a payment is on its way: the node ends with an error, its
/// supervisor (this test) starts it again, and nothing is lost. Where ldk-node has force-closed a channel, that is noticed,
/// booked, comes back, and the channel is opened again without a person.
pub(crate) fn wallet_killed_while_paying(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    let began = Instant::now();
    runtime.block_on(kill_wallet(market));
    let child = up(market, "consumer");
    market.restarted.push(child);
    market.forced_close = runtime.block_on(recovered(market));
    eprintln!("  the wallet's process killed while paying: {:.1} s", began.elapsed().as_secs_f32());
}

async fn kill_wallet(market: &Market) {
    let consumer = market.node("consumer");
    let process = child_with(consumer.pid, "wallet-process").expect("the wallet has a process of its own");
    let mut events = Events::open(market, &long(market, 1_000)).await;
    events.until(10).await;
    let flying = || async {
        let rows = admin(consumer, "wallet/payments").await?;
        let flies = |row: &Value| row["direction"] == "outbound" && row["state"] == "in_flight";
        rows.as_array()?.iter().any(flies).then_some(())
    };
    let began = Instant::now();
    while flying().await.is_none() {
        assert!(began.elapsed() < WITHIN, "no payment was seen in flight");
    }
    signal("KILL", process);
    events.read_out().await;
    assert!(!events.done, "the node goes with its wallet");
    let ended = || async { (!is_running(consumer.pid)).then_some(()) };
    wait_for("the end of the node", WITHIN, ended).await;
}

async fn recovered(market: &Market) -> bool {
    let consumer = market.node("consumer");
    wait_for("the consumer, restarted", WITHIN, || admin(consumer, "status")).await;
    let kinds = |kind: &str| market.ledger("consumer").iter().filter(|entry| entry["kind"] == kind).count();
    let began = Instant::now();
    // Two usable channels, nothing in flight and nothing on its way back: a force-close takes its delay, in blocks.
    loop {
        let state = admin(consumer, "wallet").await.unwrap();
        let ended = kinds("payment-settled") + kinds("payment-failed") >= kinds("payment-attempted");
        let back = state["balance"]["closing_sat"] == 0 && state["usable_channels"] == 2;
        if ended && back && began.elapsed() > Duration::from_secs(8) {
            break;
        }
        assert!(began.elapsed() < 3 * WITHIN, "not recovered: {state:#}");
        if began.elapsed() > Duration::from_secs(8) {
            mine(market, 6).await;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    let forced = kinds("channel-closed");
    eprintln!("  {forced} channels force-closed, booked, swept and opened again");
    agrees(consumer).await;
    let mut events = Events::open(market, &long(market, 8)).await;
    events.read_out().await;
    assert!(events.done, "{:?}", events.error);
    forced > 0
}
