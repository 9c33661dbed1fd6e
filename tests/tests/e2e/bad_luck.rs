//! Processes killed at the worst moment: what runs goes on elsewhere or ends with an error, and no msat is lost or
//! paid twice.

use super::http::{Events, admin, admin_post, answer, client, long, wait_for};
use super::market::{Market, child_with, satgrid, signal};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// The name of the provider that serves now, from the consumer's sessions.
async fn serving(market: &Market) -> String {
    for node in market.nodes.iter().filter(|node| node.name != "consumer") {
        let open = admin(node, "status").await.map(|status| status["provider"]["open_requests"].as_u64());
        if open.flatten().is_some_and(|open| open > 0) {
            return node.name.clone();
        }
    }
    panic!("nobody serves");
}

/// llama.cpp may abort at any time: its process dies, the provider lives, and the stream goes on.
pub(crate) async fn engine_killed(market: &Market) {
    let mut events = Events::open(market, &long(market, 300)).await;
    events.until(20).await;
    let name = serving(market).await;
    let provider = market.node(&name);
    let engine = child_with(provider.pid, "engine-worker").expect("the provider has an engine process");
    signal("KILL", engine);
    events.read_out().await;
    assert!(events.done, "the stream ended early: {:?}", events.error);
    let usage = events.usage.unwrap();
    assert_eq!(usage["completion_tokens"], 300, "{usage}");
    let legs = usage["cost_details"]["providers"].as_array().unwrap();
    assert!(legs.len() >= 2, "it went on in a second leg: {usage}");
    let of_legs: u64 = legs.iter().map(|leg| leg["cost_msat"].as_u64().unwrap()).sum();
    assert_eq!(usage["cost_msat"].as_u64().unwrap(), of_legs);

    assert!(super::market::is_running(provider.pid), "the provider outlives its engine");
    let again = wait_for("a new engine", Duration::from_secs(30), || async {
        child_with(provider.pid, "engine-worker").filter(|pid| *pid != engine)
    });
    again.await;
    let status = admin(provider, "status").await.unwrap();
    assert!(status["provider"]["halted"].is_null(), "{status}");
}

/// A provider that is frozen for a moment: the connection times out, is made again, and the same request goes on. No other
/// may take it over, so however slow the machine is, the call waits for this one.
pub(crate) async fn link_cut(market: &Market) {
    let consumer = market.node("consumer");
    let resumed =
        || async { admin(consumer, "status").await.unwrap()["consumer"]["counters"]["resumed"].as_u64().unwrap() };
    let before = resumed().await;
    let mut call = long(market, 1_500);
    call["provider"] = json!({ "allow_fallbacks": false });
    let mut events = Events::open(market, &call).await;
    events.until(20).await;
    let pid = market.node(&serving(market).await).pid;
    signal("STOP", pid);
    // Longer than the silence after which a connection is over, shorter than the patience for a provider.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    signal("CONT", pid);
    events.read_out().await;
    assert!(events.done, "the stream ended early: {:?}", events.error);
    let usage = events.usage.unwrap();
    assert_eq!(usage["completion_tokens"], 1_500, "{usage}");
    let legs = usage["cost_details"]["providers"].as_array().unwrap();
    assert_eq!(legs.len(), 1, "one request, one receipt: {usage}");
    assert!(resumed().await > before, "the connection was lost and the request resumed");
}

/// SIGKILL for the consumer while a payment is on its way; started again it finds out what became of it.
pub(crate) fn consumer_killed_while_paying(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    let began = Instant::now();
    runtime.block_on(kill_while_paying(market));
    let child = up(market, "consumer");
    market.restarted.push(child);
    market.forced_close = runtime.block_on(resolved(market));
    eprintln!("  the consumer killed while paying: {:.1} s", began.elapsed().as_secs_f32());
}

async fn kill_while_paying(market: &Market) {
    let consumer = market.node("consumer");
    let attempted = || kinds(&market.ledger("consumer"), "payment-attempted");
    let flying = || async {
        let rows = admin(consumer, "wallet/payments").await.unwrap();
        rows.as_array().unwrap().iter().any(|p| p["direction"] == "outbound" && p["state"] == "in_flight")
    };
    let none = wait_for("the payments of the call before", Duration::from_secs(30), || async {
        (!flying().await).then_some(())
    });
    none.await;
    let before = attempted();
    let mut events = Events::open(market, &long(market, 1_000)).await;
    events.until(10).await;
    // The attempt is in the journal before the payment is sent; it takes a while to come back.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        assert!(Instant::now() < deadline, "no payment was seen in flight");
        if flying().await {
            break;
        }
    }
    signal("KILL", consumer.pid);
    events.read_out().await;
    assert!(!events.done, "the gateway is gone: its stream is not whole");
    assert!(attempted() > before, "this call was paid for");
}

fn kinds(entries: &[Value], kind: &str) -> usize {
    entries.iter().filter(|entry| entry["kind"] == kind).count()
}

/// Every attempt has one end, and the providers received each payment once at most. Whether a channel was closed by
/// force on the way: ldk-node 0.7.1 may do so after a kill.
async fn resolved(market: &Market) -> bool {
    let consumer = market.node("consumer");
    wait_for("the consumer, restarted", Duration::from_secs(60), || admin(consumer, "status")).await;
    let (chain, _) = market.part("chain");
    let (began, mut mined) = (Instant::now(), false);
    loop {
        let entries = market.ledger("consumer");
        let ended = kinds(&entries, "payment-settled") + kinds(&entries, "payment-failed");
        if ended >= kinds(&entries, "payment-attempted") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "a payment is still open");
        // Where ldk-node 0.7.1 has force-closed the channel, the chain decides.
        if began.elapsed() > Duration::from_secs(20) && !mined {
            eprintln!("  the channel was closed; mining until the payment is decided on chain");
            for _ in 0..12 {
                let mine = json!({ "id": 1, "method": "generatetoaddress",
                    "params": [12, "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"] });
                client().post(&chain).json(&mine).send().await.unwrap();
                admin_post(consumer, "wallet/sync").await;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            mined = true;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let paid = settled(&admin(consumer, "wallet/payments").await.unwrap(), "outbound");
    let mut received = BTreeMap::new();
    for name in ["provider-a", "provider-b"] {
        received.extend(settled(&admin(market.node(name), "wallet/payments").await.unwrap(), "inbound"));
    }
    let entries = market.ledger("consumer");
    let forced = kinds(&entries, "channel-closed") > 0;
    if forced {
        // A slice below the dust limit that was in flight at a forced close is left to the miners: its payer may call it
        // failed and its payee received. Anything else would be a payment from nowhere.
        assert!(paid.iter().all(|(hash, amount)| received.get(hash) == Some(amount)), "{paid:?} {received:?}");
        assert!(received.len() <= paid.len() + 1, "{paid:?} {received:?}");
    } else {
        assert_eq!(paid, received, "what one side paid, the other received, each payment once");
    }
    let hashes: Vec<String> =
        entries.iter().filter(|e| e["kind"] == "payment-attempted").map(Value::to_string).collect();
    assert_eq!(hashes.len(), hashes.iter().collect::<BTreeSet<_>>().len());

    // And it works again. A channel is usable once the peers have found each other.
    let works = wait_for("an answer after the restart", Duration::from_secs(90), || async {
        let body = json!({ "model": market.model, "max_tokens": 8, "logit_bias": { "2": -100 },
            "messages": [{ "role": "user", "content": "the river" }] });
        let sent = client().post(format!("{}/chat/completions", market.api)).json(&body).send().await.ok()?;
        let (status, reply) = answer(sent).await;
        if status != 200 {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        (status == 200).then_some(reply)
    });
    assert_eq!(works.await["usage"]["completion_tokens"], 8);
    forced
}

/// Settled payments of one direction: hash to amount.
fn settled(rows: &Value, direction: &str) -> BTreeMap<String, u64> {
    let rows = rows.as_array().unwrap().iter();
    rows.filter(|row| row["direction"] == direction && row["state"] == "settled")
        .map(|row| (row["payment_hash"].as_str().unwrap().to_owned(), row["amount_msat"].as_u64().unwrap()))
        .collect()
}

/// Without its relay the gateway goes on with what it knows, and says so.
pub(crate) async fn relay_down(market: &Market) {
    signal("KILL", market.part("relay").1);
    let health = format!("{}/health", market.api.trim_end_matches("/v1"));
    wait_for("word of the relay in /health", Duration::from_secs(30), || async {
        let (status, health) = answer(client().get(&health).send().await.unwrap()).await;
        assert_eq!(status, 200, "known listings are enough: {health}");
        health["reasons"].to_string().contains("relay").then_some(())
    })
    .await;
    let mut events = Events::open(market, &long(market, 8)).await;
    events.read_out().await;
    assert!(events.done, "{:?}", events.error);
}

/// Nobody is left: the stream says so, and the charge stops at the last acknowledgements.
pub(crate) async fn everyone_killed(market: &Market) {
    let mut events = Events::open(market, &long(market, 1_000)).await;
    events.until(20).await;
    for name in ["provider-a", "provider-b"] {
        signal("KILL", market.node(name).pid);
    }
    events.read_out().await;
    assert!(!events.done, "[DONE] would mean that the answer is whole");
    let error = events.error.expect("the stream ends in an error");
    let charged = error["metadata"]["cost_msat"].as_u64();
    assert!(charged.is_some_and(|msat| msat > 0), "what was charged is told: {error}");
    let (status, error) = answer(super::http::post(market, &long(market, 8)).await).await;
    assert!(status == 502 || status == 503, "{status}: {error}");
    let known = admin(market.node("consumer"), "status").await.unwrap();
    assert_eq!(known["consumer"]["open_calls"], 0, "{known}");
}

/// Starts both providers again; the consumer ends its sessions with them, and with that the requests that they died in.
pub(crate) fn providers_return(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    let began = Instant::now();
    for name in ["provider-a", "provider-b"] {
        let child = up(market, name);
        market.restarted.push(child);
    }
    runtime.block_on(async {
        for name in ["provider-a", "provider-b"] {
            wait_for("a provider, restarted", Duration::from_secs(60), || admin(market.node(name), "status")).await;
        }
        // Until the consumer comes back to it, a provider holds what it died in for its consumer to take up again.
        let consumer = market.node("consumer");
        let status = admin(consumer, "status").await.unwrap();
        for session in status["consumer"]["sessions"].as_array().unwrap() {
            admin_post(consumer, &format!("sessions/{}/close", session["session"].as_str().unwrap())).await;
        }
    });
    eprintln!("  both providers are back: {:.1} s", began.elapsed().as_secs_f32());
}

pub(crate) fn up(market: &Market, name: &str) -> std::process::Child {
    let log = std::fs::File::options().append(true).open(market.dir.join(format!("logs/{name}.log"))).unwrap();
    let mut up = satgrid();
    up.args(["up", "--config"]).arg(&market.node(name).config).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}
