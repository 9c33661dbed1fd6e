//! Requests that cannot be served, and a purse that cannot pay: a clear error each, and not a msat moved.

use super::http::{Events, admin, answer, client, long, post, wait_for};
use super::market::{Market, Node, free_port, satgrid};
use serde_json::{Value, json};
use std::process::Stdio;
use std::time::Duration;

/// What the consumer's wallet has paid so far.
async fn payments(market: &Market) -> usize {
    admin(market.node("consumer"), "wallet/payments").await.unwrap().as_array().unwrap().len()
}

pub(crate) async fn requests(market: &Market) {
    let before = payments(market).await;
    let check = async |what: &str, body: Value, status: u16, code: &str| {
        let (got, error) = answer(post(market, &body).await).await;
        assert_eq!((got, error["error"]["code"].as_str()), (status, Some(code)), "{what}: {error}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.len() > 10 && error["error"]["type"].is_string(), "{what}: {error}");
    };
    let hello = json!([{ "role": "user", "content": "hello" }]);
    check("unknown model", json!({ "model": "gpt-9", "messages": hello }), 404, "model_not_found").await;
    let too_long = json!([{ "role": "user", "content": "the river ".repeat(2_000) }]);
    let body = json!({ "model": market.model, "messages": too_long });
    check("prompt over the context", body, 400, "context_length_exceeded").await;
    let body = json!({ "model": market.model, "messages": hello, "max_tokens": 1_000_000 });
    check("answer over the context", body, 400, "context_length_exceeded").await;
    let free = json!({ "model": market.model, "messages": hello, "max_tokens": 8,
        "provider": { "max_price": { "completion_msat_per_mtok": 1 } } });
    let (status, error) = answer(post(market, &free).await).await;
    assert_eq!(status, 503, "{error}");
    assert!(error["error"]["metadata"]["reasons"].as_array().is_some_and(|why| !why.is_empty()), "{error}");

    for (what, body) in [
        ("empty messages", json!({ "model": market.model, "messages": [] }).to_string()),
        ("no messages", json!({ "model": market.model }).to_string()),
        ("malformed JSON", "{\"model\": ".to_owned()),
        ("nothing", String::new()),
        ("an array", "[]".to_owned()),
    ] {
        let request = client().post(format!("{}/chat/completions", market.api));
        let response = request.header("content-type", "application/json").body(body).send().await.unwrap();
        let (status, error) = answer(response).await;
        assert_eq!(status, 400, "{what}: {error}");
        assert_eq!(error["error"]["type"], "invalid_request_error", "{what}: {error}");
    }
    let unknown = json!({ "model": market.model, "prompt": [1, u32::MAX], "max_tokens": 1 });
    let request = client().post(format!("{}/completions", market.api)).json(&unknown);
    let (status, error) = answer(request.send().await.unwrap()).await;
    assert_eq!((status, error["error"]["param"].as_str()), (400, Some("prompt")), "a token that nobody has: {error}");
    let (status, models) = answer(client().get(format!("{}/models", market.api)).send().await.unwrap()).await;
    assert_eq!(status, 200);
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["sellers"]),
        (&json!(market.model), &json!(2)),
        "{models}"
    );
    let nobody =
        client().get(format!("http://{}/admin/v1/status", market.node("consumer").admin)).send().await.unwrap();
    assert_eq!(nobody.status().as_u16(), 401, "the admin port asks for its token");
    assert_eq!(payments(market).await, before, "nothing was paid for any of these");
}

/// Streams side by side, and one that is not streamed; each with a bill of its own.
pub(crate) async fn several_at_once(market: &Market) {
    let stream = async |tokens: u32| {
        let mut events = Events::open(market, &long(market, tokens)).await;
        events.read_out().await;
        assert!(events.done, "{:?}", events.error);
        let usage = events.usage.unwrap();
        assert_eq!(usage["completion_tokens"], tokens);
        assert_eq!(usage["receipt_ids"].as_array().unwrap().len(), 1, "{usage}");
        usage["cost_msat"].as_u64().unwrap()
    };
    let whole = async {
        let mut body = long(market, 16);
        body["stream"] = json!(false);
        body.as_object_mut().unwrap().remove("stream_options");
        let (status, reply) = answer(post(market, &body).await).await;
        assert_eq!(status, 200, "{reply}");
        assert_eq!(reply["usage"]["completion_tokens"], 16, "{reply}");
        reply["usage"]["cost_msat"].as_u64().unwrap()
    };
    let costs: [u64; 4] = tokio::join!(stream(24), stream(32), stream(40), whole).into();
    // A session rounds once, so streams side by side share at most a msat of it.
    let (prompt, spread) = (costs[0] - 24 * 400, 2);
    for (cost, tokens) in costs.into_iter().zip([24, 32, 40, 16]) {
        assert!(cost.abs_diff(tokens * 400 + prompt) <= spread, "{costs:?}");
    }
}

/// A second consumer, set up by hand like a user's, whose wallet has nothing.
pub(crate) async fn empty_wallet(market: &Market) {
    let dir = market.dir.join("poor");
    let config = market.dir.join("poor.toml");
    let mut init = satgrid();
    init.args(["init", "--consumer", "--hide-words", "--network", "regtest", "--config"]).arg(&config);
    let made = init.arg("--dir").arg(&dir).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (api, admin_port) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let settings = [
        format!("api.listen={api}"),
        format!("api.admin={admin_port}"),
        format!("wallet.listen=127.0.0.1:{}", free_port()),
        format!("wallet.chain=esplora:{}", market.part("chain").0),
        format!("market.relays={}", market.part("relay").0),
        format!("market.catalogue={}", market.dir.join("catalogue.toml").display()),
    ];
    let mut up = satgrid();
    up.args(["up", "--config"]).arg(&config).args(settings.iter().flat_map(|setting| ["--set", setting]));
    let log = std::fs::File::create(market.dir.join("logs/poor.log")).unwrap();
    let child = tokio::process::Command::from(up).stdout(Stdio::null()).stderr(log).kill_on_drop(true).spawn();
    let mut child = child.unwrap();
    let health = format!("http://{api}/health");
    wait_for("the poor consumer's gateway", Duration::from_secs(60), || async {
        client().get(&health).send().await.ok().filter(|answer| answer.status().is_success())
    })
    .await;

    let body = json!({ "model": market.model, "messages": [{ "role": "user", "content": "the river" }] });
    let sent = client().post(format!("http://{api}/v1/chat/completions")).json(&body).send().await.unwrap();
    let retry = sent.headers().get("x-should-retry").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (status, error) = answer(sent).await;
    assert_eq!((status, error["error"]["code"].as_str()), (402, Some("insufficient_quota")), "{error}");
    assert_eq!(retry.as_deref(), Some("false"), "clients must not try again by themselves");
    let metadata = &error["error"]["metadata"];
    assert_eq!(metadata["limit_source"], "wallet", "{error}");
    assert!(metadata["required_msat"].as_u64().unwrap() > metadata["available_msat"].as_u64().unwrap(), "{error}");
    let invoice = metadata["topup"]["bolt11"].as_str().unwrap();
    assert!(invoice.starts_with("lnbcrt"), "{error}");

    let poor = Node { name: "poor".into(), pid: child.id().unwrap(), dir, config, admin: admin_port };
    let status = admin(&poor, "status").await.unwrap();
    assert_eq!(status["consumer"]["counters"]["slices"], 0, "{status}");
    super::market::signal("TERM", poor.pid);
    let ended = tokio::time::timeout(Duration::from_secs(20), child.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "it stops cleanly: {ended}");
}
