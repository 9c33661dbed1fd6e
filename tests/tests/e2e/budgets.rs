//! Keys with budgets on a running node: twenty at once on the balance of one, refusals, figures that add up, and a crash.

use super::bad_luck::up;
use super::http::{Events, admin, answer, client, long, wait_for};
use super::market::{Market, is_running, satgrid, signal};
use serde_json::{Value, json};
use std::time::Duration;

/// Posted at most this long after the client has the end of its answer.
const POSTED_WITHIN: Duration = Duration::from_secs(20);
const AT_ONCE: usize = 20;

/// Makes a key with the tool that operators use.
fn create(market: &Market, args: &[&str]) -> Value {
    let mut command = satgrid();
    command.args(["keys", "create", "--format", "json", "--config"]).arg(&market.node("consumer").config).args(args);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn secret(key: &Value) -> String {
    key["secret"].as_str().unwrap().to_owned()
}

/// A key over the admin port, where limits are in msat.
async fn create_msat(market: &Market, body: &Value) -> Value {
    let node = market.node("consumer");
    let token = std::fs::read_to_string(node.dir.join("admin-token")).unwrap();
    let request = client().post(format!("http://{}/admin/v1/keys", node.admin)).bearer_auth(token.trim()).json(body);
    let (status, key) = answer(request.send().await.unwrap()).await;
    assert_eq!(status, 201, "{key}");
    key
}

async fn figures(market: &Market, id: &Value) -> (u64, u64) {
    let path = format!("keys/{}", id.as_str().unwrap());
    let key = admin(market.node("consumer"), &path).await.unwrap();
    (key["spent_msat"].as_u64().unwrap(), key["reserved_msat"].as_u64().unwrap())
}

fn body(market: &Market, tokens: u32) -> Value {
    let mut body = long(market, tokens);
    body["stream"] = false.into();
    body.as_object_mut().unwrap().remove("stream_options");
    body
}

async fn ask(market: &Market, secret: &str, path: &str, body: &Value) -> (u16, Value) {
    let request = client().post(format!("{}/{path}", market.api)).bearer_auth(secret).json(body);
    answer(request.send().await.unwrap()).await
}

pub(crate) async fn hold(market: &Market) {
    twenty_on_the_balance_of_one(market).await;
    refusals(market).await;
    sub_keys(market).await;
}

async fn twenty_on_the_balance_of_one(market: &Market) {
    let free = create(market, &["estimates"]);
    let request = body(market, 48);
    let (status, estimate) = ask(market, &secret(&free), "estimate", &request).await;
    assert_eq!(status, 200, "{estimate}");
    let ceiling = estimate["ceiling_msat"].as_u64().unwrap();
    assert!(ceiling > 0 && estimate["max_tokens"] == 48 && estimate["providers"].as_u64().unwrap() >= 1, "{estimate}");

    let key = create_msat(market, &json!({ "name": "balance of one", "total_msat": ceiling })).await;
    let shown = secret(&key);
    let calls = (0..AT_ONCE).map(|_| ask(market, &shown, "chat/completions", &request));
    let (mut paid, mut refused) = (Vec::new(), 0);
    for (status, answer) in futures_join(calls).await {
        match status {
            200 => paid.push(answer),
            402 => {
                let error = &answer["error"];
                assert_eq!(error["code"], "key_limit_exceeded", "{answer}");
                assert_eq!(error["type"], "insufficient_quota", "{answer}");
                assert_eq!(error["metadata"]["limit_source"], "key", "{answer}");
                refused += 1;
            }
            other => panic!("{other}: {answer}"),
        }
    }
    let spent: u64 = paid.iter().map(|answer| answer["usage"]["cost_msat"].as_u64().unwrap()).sum();
    assert!(!paid.is_empty() && refused > 0 && paid.len() + refused == AT_ONCE, "{} paid", paid.len());
    assert!(spent <= ceiling, "{spent} msat spent of {ceiling}");
    let posted = wait_for("posted", POSTED_WITHIN, || async {
        let now = figures(market, &key["id"]).await;
        (now.1 == 0).then_some(now)
    });
    assert_eq!(posted.await, (spent, 0), "what the key spent is what its answers cost");

    // The same figures by the answer's own id, and to nobody else.
    let id = paid[0]["id"].as_str().unwrap();
    let path = format!("{}/generations/{id}", market.api);
    let (status, generation) = answer(client().get(&path).bearer_auth(&shown).send().await.unwrap()).await;
    assert_eq!(status, 200, "{generation}");
    assert_eq!(generation["cost_msat"], paid[0]["usage"]["cost_msat"]);
    assert_eq!(generation["calls"][0]["usage"]["receipt_ids"], paid[0]["usage"]["receipt_ids"]);
    assert_eq!(generation["key"], key["id"]);
    let other = client().get(&path).bearer_auth(secret(&free)).send().await.unwrap();
    assert_eq!(other.status().as_u16(), 404, "another key's generation");
    let own = client().get(format!("{}/key", market.api)).bearer_auth(&shown).send().await.unwrap();
    assert_eq!(answer(own).await.1["data"]["spent_msat"], spent);
    eprintln!("  {AT_ONCE} at once on {ceiling} msat: {} paid, {refused} refused, {spent} msat spent", paid.len());
}

/// All at once.
async fn futures_join<F: Future<Output = (u16, Value)>>(calls: impl Iterator<Item = F>) -> Vec<(u16, Value)> {
    let mut waiting: Vec<_> = calls.map(|call| (Box::pin(call), None)).collect();
    std::future::poll_fn(|context| {
        let mut open = false;
        for (call, answer) in &mut waiting {
            if answer.is_none() {
                match call.as_mut().poll(context) {
                    std::task::Poll::Ready(value) => *answer = Some(value),
                    std::task::Poll::Pending => open = true,
                }
            }
        }
        if open { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    waiting.into_iter().map(|(_, answer)| answer.unwrap()).collect()
}

async fn refusals(market: &Market) {
    let request = body(market, 4);
    let check = async |secret: &str, status: u16, code: &str| {
        let (got, answer) = ask(market, secret, "chat/completions", &request).await;
        assert_eq!((got, answer["error"]["code"].as_str()), (status, Some(code)), "{answer}");
        assert!(answer["error"]["message"].is_string(), "{answer}");
    };
    check("sk-satgrid-0000", 401, "invalid_api_key").await;
    check(&secret(&create(market, &["elsewhere", "--model", "another"])), 403, "model_not_allowed").await;
    check(&secret(&create(market, &["boss", "--manage"])), 403, "management_key").await;
    let small = create_msat(market, &json!({ "name": "small", "per_request_msat": 1 })).await;
    check(&secret(&small), 402, "key_limit_exceeded").await;

    let slow = secret(&create(market, &["slow", "--requests-per-minute", "1"]));
    let url = format!("{}/models", market.api);
    assert_eq!(client().get(&url).bearer_auth(&slow).send().await.unwrap().status().as_u16(), 200);
    let again = client().get(&url).bearer_auth(&slow).send().await.unwrap();
    assert!(again.headers().get("retry-after").is_some_and(|wait| wait.to_str().unwrap().parse::<u32>().is_ok()));
    let (status, answer) = answer(again).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (429, Some("rate_limit_exceeded")), "{answer}");

    let gone = create(market, &["gone"]);
    let output = satgrid()
        .args(["keys", "revoke", gone["id"].as_str().unwrap(), "--config"])
        .arg(&market.node("consumer").config)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check(&secret(&gone), 401, "invalid_api_key").await;
}

async fn sub_keys(market: &Market) {
    let boss = secret(&create(market, &["team", "--manage", "--total-sat", "50"]));
    let (status, sub) = ask(market, &boss, "keys", &json!({ "name": "member" })).await;
    assert_eq!(status, 201, "{sub}");
    let (status, reply) = ask(market, &secret(&sub), "chat/completions", &body(market, 8)).await;
    assert_eq!(status, 200, "{reply}");
    let cost = reply["usage"]["cost_msat"].as_u64().unwrap();
    let team = &sub["parent"];
    let above = wait_for("posted", POSTED_WITHIN, || async {
        let now = figures(market, team).await;
        (now.1 == 0 && now.0 > 0).then_some(now)
    });
    assert_eq!(above.await, (cost, 0), "a sub-key's spending counts above");
    let listed = client().get(format!("{}/keys", market.api)).bearer_auth(&boss).send().await.unwrap();
    assert_eq!(answer(listed).await.1["data"][0]["id"], sub["id"]);
    let (status, _) = ask(market, &secret(&sub), "keys", &json!({ "name": "own" })).await;
    assert_eq!(status, 403, "a key that infers makes no keys");
}

/// A killed gateway leaves a reservation; the next start settles it for what the journal says.
pub(crate) fn survive(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    let pid = market.node("consumer").pid;
    let key = runtime.block_on(async {
        let key = create_msat(market, &json!({ "name": "crash", "total_msat": 100_000_000_u64 })).await;
        let request = client().post(format!("{}/chat/completions", market.api)).bearer_auth(secret(&key));
        let response = request.json(&long(market, 1_000)).send().await.unwrap();
        let mut events = Events::of(response);
        events.until(200).await;
        let (spent, reserved) = figures(market, &key["id"]).await;
        assert!(spent == 0 && reserved > 0, "{spent} spent, {reserved} reserved while it runs");
        signal("KILL", pid);
        events.read_out().await;
        // Its ports are free once it is gone.
        wait_for("the end of the killed node", Duration::from_secs(20), || async { (!is_running(pid)).then_some(()) })
            .await;
        key
    });
    let child = up(market, "consumer");
    market.restarted.push(child);
    runtime.block_on(async {
        let consumer = market.node("consumer");
        wait_for("the consumer, restarted", Duration::from_secs(90), || admin(consumer, "status")).await;
        let (spent, reserved) = figures(market, &key["id"]).await;
        assert_eq!(reserved, 0, "nothing stays reserved after a crash");
        assert!(spent > 0, "at least one acknowledgement was signed within 200 tokens");
        // The abandoned request's charge stands in the ledger: the key paid for that and for nothing else.
        eprintln!("  killed in mid-stream: {spent} msat posted at the restart");
    });
}
