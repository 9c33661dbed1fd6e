//! The front door of a running provider: a client that has a wallet and no node pays an invoice for one answer, fills a
//! key, is killed upon, and takes its money back. The consumer's wallet pays; its node has no part in the answers.
//! Then the consumer opens a door of its own, over HTTPS, and sells on what it buys in the market; a provider's wallet pays, and
//! is paid back at a Lightning address whose server fails at first.

use super::address::AddressServer;
use super::http::{admin, answer, client, wait_for};
use super::market::{Market, auditor, free_port, is_running, satgrid, signal};
use reqwest::Client;
use serde_json::{Value, json};
use std::process::{Child, Stdio};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);
const SELLER: &str = "provider-a";
/// Whose door sells what the market sells, and whose wallet a stranger there has.
const RESELLER: &str = "consumer";
const PAYER: &str = "provider-b";
/// Made for the tests of the edge, for `localhost`.
const CERTIFICATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/tests/tls/certificate.pem");
const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/tests/tls/key.pem");

/// What a stranger knows: an address.
struct Stranger<'a> {
    market: &'a Market,
    door: String,
    client: Client,
    /// The node whose wallet it has.
    payer: &'static str,
}

/// A token and the proof that it was paid for.
struct Paid {
    token: String,
    preimage: String,
}

impl Paid {
    fn credential(&self) -> String {
        format!("L402 {}:{}", self.token, self.preimage)
    }
}

/// Starts the seller with its door open on `port`.
fn open_door(market: &Market, port: u16) -> Child {
    start(market, SELLER, port, &[])
}

/// Starts a node with its door open on `port`, and with further settings.
fn start(market: &Market, name: &str, port: u16, settings: &[(&str, &str)]) -> Child {
    let log = std::fs::File::options().append(true).open(market.dir.join(format!("logs/{name}.log"))).unwrap();
    let mut up = satgrid();
    up.env("SATGRID_DOOR_LISTEN", format!("127.0.0.1:{port}")).envs(settings.iter().copied());
    up.args(["up", "--config"]).arg(&market.node(name).config).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// Pays with a node's wallet, by the tool that people use; the preimage.
fn pay(market: &Market, payer: &str, invoice: &str) -> Option<String> {
    let mut command = satgrid();
    command.args(["wallet", "pay", invoice, "--format", "json", "--config"]).arg(&market.node(payer).config);
    let output = command.output().unwrap();
    let paid: Value = serde_json::from_slice(&output.stdout).ok()?;
    paid["preimage"].as_str().map(str::to_owned)
}

/// An invoice of a node's wallet.
fn invoice(market: &Market, payee: &str, sat: u64) -> Value {
    let mut command = satgrid();
    command.args(["wallet", "receive", &sat.to_string(), "--format", "json", "--config"]);
    let output = command.arg(&market.node(payee).config).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

impl<'a> Stranger<'a> {
    fn new(market: &'a Market, door: &str) -> Stranger<'a> {
        Stranger { market, door: door.to_owned(), client: client(), payer: "consumer" }
    }

    fn body(&self, tokens: u32) -> Value {
        json!({
            "model": self.market.model, "max_tokens": tokens, "seed": 7, "logit_bias": { "2": -100 },
            "messages": [{ "role": "user", "content": "the light of the river" }],
        })
    }

    async fn ask(&self, authorization: Option<&str>, tokens: u32) -> (u16, Option<String>, Value) {
        let mut request = self.client.post(format!("{}/chat/completions", self.door)).json(&self.body(tokens));
        if let Some(shown) = authorization {
            request = request.header("authorization", shown);
        }
        let response = request.send().await.unwrap();
        let challenge = response.headers().get("www-authenticate").map(|value| value.to_str().unwrap().to_owned());
        let (status, body) = answer(response).await;
        (status, challenge, body)
    }

    async fn get(&self, path: &str, secret: Option<&str>) -> (u16, Value) {
        let request = self.client.get(format!("{}/{path}", self.door));
        let request = if let Some(secret) = secret { request.bearer_auth(secret) } else { request };
        answer(request.send().await.unwrap()).await
    }

    async fn post(&self, path: &str, secret: Option<&str>, body: &Value) -> (u16, Value) {
        let request = self.client.post(format!("{}/{path}", self.door)).json(body);
        let request = if let Some(secret) = secret { request.bearer_auth(secret) } else { request };
        answer(request.send().await.unwrap()).await
    }

    async fn up(&self) {
        wait_for("the front door", SOON, || async {
            let models = self.client.get(format!("{}/models", self.door)).send().await.ok()?;
            let models = models.json::<Value>().await.ok()?;
            models["data"].as_array().is_some_and(|models| !models.is_empty()).then_some(())
        })
        .await;
        // Its Lightning peer has to find it again too.
        wait_for("a channel to the seller", SOON, || async {
            let wallet = admin(self.market.node("consumer"), "wallet").await?;
            let all = wallet["channels"].as_array()?.iter().all(|channel| channel["usable"] == true);
            all.then_some(())
        })
        .await;
    }

    async fn balance(&self, secret: &str) -> Option<u64> {
        let (status, key) = self.get("key", Some(secret)).await;
        (status == 200).then(|| key["data"]["balance_msat"].as_u64().unwrap())
    }

    async fn top_up(&self, secret: Option<&str>, sat: u64) -> Value {
        let (status, made) = self.post("topup", secret, &json!({ "amount_sat": sat })).await;
        assert_eq!(status, 201, "{made}");
        made
    }

    async fn refund(&self, secret: &str, destination: &str) -> (u16, Value) {
        self.post("refund", Some(secret), &json!({ "destination": destination })).await
    }

    async fn refund_ended(&self, secret: &str, id: &Value) -> Value {
        wait_for("a refund's end", SOON, || async {
            let (_, refunds) = self.get("refund", Some(secret)).await;
            let ended = |refund: &&Value| refund["state"] == "settled" || refund["state"] == "failed";
            refunds["data"].as_array()?.iter().filter(|refund| refund["id"] == *id).find(ended).cloned()
        })
        .await
    }
}

fn field(challenge: &str, name: &str) -> String {
    let (_, rest) = challenge.split_once(&format!("{name}=\"")).unwrap_or_else(|| panic!("{challenge}"));
    rest.split('"').next().unwrap().to_owned()
}

/// One answer for one invoice, and what else its token buys.
async fn l402(stranger: &Stranger<'_>) -> u64 {
    let (status, challenge, body) = stranger.ask(None, 16).await;
    assert_eq!(status, 402, "{body}");
    let challenge = challenge.expect("a challenge");
    assert!(challenge.starts_with("L402 version=\"0\""), "{challenge}");
    let token = field(&challenge, "token");
    let bolt11 = field(&challenge, "invoice");
    assert_eq!(body["error"]["metadata"]["topup"]["bolt11"], bolt11.as_str());
    let asked = body["error"]["metadata"]["required_msat"].as_u64().unwrap();

    // Not paid yet, and a preimage that is none.
    let early = format!("L402 {token}:{}", "00".repeat(32));
    assert_eq!(stranger.ask(Some(&early), 16).await.0, 401);

    let preimage = pay(stranger.market, stranger.payer, &bolt11).expect("the invoice is paid");
    let paid = Paid { token, preimage };
    let credential = paid.credential();
    let (id, cost) = wait_for("the paid answer", SOON, || async {
        let (status, _, body) = stranger.ask(Some(&credential), 16).await;
        match status {
            200 => Some((body["id"].clone(), body["usage"].clone())),
            // The payer knows a moment before the payee has written it down.
            503 => None,
            other => panic!("{other}: {body}"),
        }
    })
    .await;
    let receipts = cost["receipt_ids"].as_array().unwrap();
    assert_eq!(receipts.len(), 1, "a receipt that two keys signed: {cost}");
    let mut spent = cost["cost_msat"].as_u64().unwrap();
    assert!(spent > 0 && spent <= asked, "{spent} of {asked}");
    let path = format!("{}/generations/{}", stranger.door, id.as_str().unwrap());
    let generation = stranger.client.get(path);
    let (status, generation) = answer(generation.header("authorization", &credential).send().await.unwrap()).await;
    assert_eq!((status, generation["cost_msat"].as_u64()), (200, Some(spent)), "{generation}");

    // Another's preimage, a changed token, the old scheme's name, nothing at all.
    let other = if paid.token[20..].starts_with('A') { 'B' } else { 'A' };
    let forged = format!("{}{other}{}", &paid.token[..20], &paid.token[21..]);
    for (token, preimage) in
        [(&forged, &paid.preimage), (&paid.token, &"11".repeat(32)), (&"AgI=".to_owned(), &paid.preimage)]
    {
        let (status, _, body) = stranger.ask(Some(&format!("L402 {token}:{preimage}")), 16).await;
        assert_eq!(status, 401, "{body}");
    }
    // The same token again: what is left on it, and not a msat more.
    let mut calls = 1;
    loop {
        let (status, _, body) = stranger.ask(Some(&credential), 16).await;
        if status == 402 {
            assert_eq!(body["error"]["code"], "key_limit_exceeded", "{body}");
            break;
        }
        assert_eq!(status, 200, "{body}");
        spent += body["usage"]["cost_msat"].as_u64().unwrap();
        calls += 1;
        assert!(spent <= asked, "{spent} spent of {asked} after {calls} calls");
    }
    eprintln!("  L402: {asked} msat paid, {calls} answers for {spent} msat, then refused");
    spent
}

/// A key that holds money; what was spent on it.
async fn prepaid(stranger: &Stranger<'_>) -> (String, u64) {
    let made = stranger.top_up(None, 5_000).await;
    let secret = made["key"].as_str().unwrap().to_owned();
    let hash = made["payment_hash"].as_str().unwrap();
    assert_eq!(stranger.get("key", Some(&secret)).await.0, 401, "no key before it is paid for");
    assert_eq!(stranger.get(&format!("invoices/{hash}"), None).await.1["state"], "open");
    pay(stranger.market, stranger.payer, made["invoice"].as_str().unwrap()).expect("the top-up is paid");
    let balance = wait_for("the key", SOON, || stranger.balance(&secret)).await;
    assert_eq!(balance, 5_000_000);
    assert_eq!(stranger.get(&format!("invoices/{hash}"), None).await.1["state"], "paid");
    let (status, _, body) = stranger.ask(Some(&format!("Bearer {secret}")), 24).await;
    assert_eq!(status, 200, "{body}");
    let cost = body["usage"]["cost_msat"].as_u64().unwrap();
    let left =
        wait_for("posted", SOON, || async { stranger.balance(&secret).await.filter(|balance| *balance != 5_000_000) });
    assert_eq!(left.await, 5_000_000 - cost);
    (secret, cost)
}

async fn refunds(stranger: &Stranger<'_>, secret: &str) -> u64 {
    let before = stranger.balance(secret).await.unwrap();
    let (status, refused) =
        stranger.refund(secret, invoice(stranger.market, stranger.payer, 1_000_000)["invoice"].as_str().unwrap()).await;
    assert_eq!(status, 402, "more than is there: {refused}");
    let (status, refused) = stranger.refund(secret, "lnbcrt1nonsense").await;
    assert_eq!(status, 400, "{refused}");

    let back = invoice(stranger.market, stranger.payer, 1_000);
    let destination = back["invoice"].as_str().unwrap();
    let (status, asked) = stranger.refund(secret, destination).await;
    assert_eq!(status, 202, "{asked}");
    let settled = stranger.refund_ended(secret, &asked["id"]).await;
    assert_eq!(settled["state"], "settled", "{settled}");
    let fee = settled["fee_msat"].as_u64().unwrap();
    let path = format!("wallet/payment?hash={}", back["payment_hash"].as_str().unwrap());
    wait_for("the refund at its client", SOON, || async {
        let found = admin(stranger.market.node(stranger.payer), &path).await?;
        (found["state"] == "settled").then_some(())
    })
    .await;
    // The same invoice once more is not paid once more.
    let (status, again) = stranger.refund(secret, destination).await;
    assert_eq!(status, 202, "{again}");
    assert_eq!(stranger.refund_ended(secret, &again["id"]).await["state"], "failed");
    assert_eq!(stranger.balance(secret).await.unwrap(), before - 1_000_000 - fee, "paid back once");
    1_000_000 + fee
}

/// Figures of the seller's own books.
fn clients(market: &Market) -> (i64, i64) {
    let journal = market.node(SELLER).dir.join("ledger.sqlite");
    let output = satgrid().args(["ledger", "balance", "--format", "json", "--db"]).arg(journal).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Value = serde_json::from_slice(&output.stdout).unwrap();
    let clients = &lines["clients"];
    (clients["balance_msat"].as_i64().unwrap(), clients["reserved_msat"].as_i64().unwrap())
}

/// The house's ledger verifies, alone and against the provider's.
fn audit_house(market: &Market) {
    let seller = market.node(SELLER);
    let mut bundles = Vec::new();
    for name in ["house", "ledger"] {
        let out = market.dir.join(format!("{name}.door-audit"));
        let mut command = satgrid();
        command
            .args(["ledger", "export", "--db"])
            .arg(seller.dir.join(format!("{name}.sqlite")))
            .arg("--out")
            .arg(&out);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        bundles.push(out);
    }
    for files in [&bundles[..1], &bundles[1..], &bundles[..]] {
        let output = auditor().arg("verify").args(files).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{files:?}\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Everything that a stranger does, and a kill in the middle.
pub(crate) fn strangers(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    let port = free_port();
    let ends = |market: &Market, name: &str, pid: u32| {
        signal(name, pid);
        runtime.block_on(async {
            wait_for("the end of the seller", SOON, || async { (!is_running(pid)).then_some(()) }).await;
        });
        let _ = market;
    };
    ends(market, "TERM", market.node(SELLER).pid);
    let first = open_door(market, port);
    let pid = first.id();
    market.restarted.push(first);
    let door = format!("http://127.0.0.1:{port}/v1");

    let (secret, spent, refunded, more) = runtime.block_on(async {
        let stranger = Stranger::new(market, &door);
        stranger.up().await;
        let on_tokens = l402(&stranger).await;
        let (secret, on_key) = prepaid(&stranger).await;
        let refunded = refunds(&stranger, &secret).await;
        let more = stranger.top_up(Some(&secret), 700).await;
        (secret, on_tokens + on_key, refunded, more)
    });
    // Killed the moment the payer has its preimage: the payee may have written nothing down.
    let before = runtime.block_on(async { Stranger::new(market, &door).balance(&secret).await.unwrap() });
    pay(market, "consumer", more["invoice"].as_str().unwrap()).expect("the second top-up is paid");
    ends(market, "KILL", pid);
    let second = open_door(market, port);
    market.restarted.push(second);
    runtime.block_on(async {
        let stranger = Stranger::new(market, &door);
        stranger.up().await;
        let credited = wait_for("the second top-up", SOON, || async {
            stranger.balance(&secret).await.filter(|balance| *balance != before)
        });
        assert_eq!(credited.await, before + 700_000, "credited once");
        let (status, _, body) = stranger.ask(Some(&format!("Bearer {secret}")), 8).await;
        assert_eq!(status, 200, "{body}");
        let cost = body["usage"]["cost_msat"].as_u64().unwrap();
        let left = before + 700_000 - cost;
        wait_for("posted", SOON, || async { stranger.balance(&secret).await.filter(|balance| *balance == left) }).await;
        eprintln!("  {spent} msat spent, {refunded} msat paid back, {left} msat left on the key");
        let (owed, reserved) = clients(market);
        assert_eq!(reserved, 0);
        assert!(owed >= left.cast_signed(), "{owed} owed to clients, {left} of it on the key");
    });
    // A tree head over what was just written is signed within seconds.
    std::thread::sleep(Duration::from_secs(5));
    audit_house(market);
}

/// The consumer sells on over HTTPS what it buys: an answer for an invoice, a key, and money back to a Lightning address.
pub(crate) fn resold(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    let (port, pid) = (free_port(), market.node(RESELLER).pid);
    signal("TERM", pid);
    runtime.block_on(wait_for("the end of the reseller", SOON, || async { (!is_running(pid)).then_some(()) }));
    let settings = [
        ("SATGRID_DOOR_SELLS", "market"),
        ("SATGRID_DOOR_CERTIFICATE", CERTIFICATE),
        ("SATGRID_DOOR_KEY", KEY),
        ("SATGRID_DOOR_MARGIN_PERMILLE", "250"),
    ];
    let up = start(market, RESELLER, port, &settings);
    market.restarted.push(up);
    runtime.block_on(async {
        let root = reqwest::Certificate::from_pem(&std::fs::read(CERTIFICATE).unwrap()).unwrap();
        let client = Client::builder().no_proxy().timeout(SOON).add_root_certificate(root).build().unwrap();
        let door = format!("https://localhost:{port}/v1");
        let stranger = Stranger { market, door, client, payer: PAYER };
        stranger.up().await;
        let plain = format!("http://localhost:{port}/v1/models");
        assert!(super::http::client().get(plain).send().await.is_err(), "nothing is answered in the clear");

        let on_token = l402(&stranger).await;
        let made = stranger.top_up(None, 1_000).await;
        let secret = made["key"].as_str().unwrap().to_owned();
        pay(market, PAYER, made["invoice"].as_str().unwrap()).expect("the top-up is paid");
        wait_for("the key", SOON, || stranger.balance(&secret)).await;

        let payee = market.node(PAYER).config.clone();
        let server = AddressServer::start(1, move |sat| {
            let mut command = satgrid();
            command.args(["wallet", "receive", &sat.to_string(), "--format", "json", "--config"]);
            let made: Value = serde_json::from_slice(&command.arg(&payee).output().unwrap().stdout).unwrap();
            made["invoice"].as_str().unwrap().to_owned()
        })
        .await;
        let body = json!({ "destination": server.address(), "amount_msat": 300_000 });
        let (status, asked) = stranger.post("refund", Some(&secret), &body).await;
        assert_eq!(status, 202, "{asked}");

        // What a provider asks and a quarter more, with the provider's receipt.
        let (status, _, body) = stranger.ask(Some(&format!("Bearer {secret}")), 24).await;
        assert_eq!(status, 200, "{body}");
        let usage = &body["usage"];
        assert_eq!(usage["receipt_ids"].as_array().unwrap().len(), 1, "{usage}");
        let bought = usage["cost_msat"].as_u64().unwrap();
        let cost = usage["cost_details"]["charged_msat"].as_u64().unwrap();
        assert!(bought > 0 && cost == bought + bought.div_ceil(4), "{usage}");

        let settled = stranger.refund_ended(&secret, &asked["id"]).await;
        assert_eq!(settled["state"], "settled", "{settled}");
        assert!(server.asked() >= 2, "it failed once and was asked again");
        let left = 1_000_000 - cost - 300_000 - settled["fee_msat"].as_u64().unwrap();
        wait_for("posted", SOON, || async { stranger.balance(&secret).await.filter(|balance| *balance == left) }).await;
        eprintln!("  resold: {on_token} msat by L402, {cost} msat on a key for {bought} msat in the market, 300000 msat paid back");
    });
}
