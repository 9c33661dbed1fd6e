//! A provider that gives its key up: consumers follow to the new one, what was open under the old one is paid back, and the
//! ledger has the receipts of both.

use super::bad_luck::up;
use super::http::{Events, admin, admin_post, long, post, wait_for};
use super::market::{Market, auditor, is_running, satgrid, signal};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

fn run(config: &Path, args: &[&str]) -> Output {
    satgrid().arg("--config").arg(config).args(args).output().unwrap()
}

fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The sellers of one more answer, which may be bought from `only` this one; `None` while nobody can give one.
async fn sellers(market: &Market, only: Option<&str>) -> Option<Vec<String>> {
    let mut body = long(market, 24);
    if let Some(only) = only {
        body["provider"] = json!({ "only": [only] });
    }
    let response = post(market, &body).await;
    if !response.status().is_success() {
        return None;
    }
    let mut events = Events::of(response);
    events.read_out().await;
    assert!(events.done, "{:?}", events.error);
    let usage = events.usage.unwrap();
    let legs = usage["cost_details"]["providers"].as_array().unwrap().clone();
    Some(legs.iter().map(|leg| leg["provider"].as_str().unwrap().to_owned()).collect())
}

pub(crate) fn rotates(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    // The consumer was just started again: it hears of its sellers first.
    let served = wait_for("an answer", Duration::from_secs(60), || sellers(market, None));
    let old = runtime.block_on(served).pop().unwrap();
    let names = ["provider-a", "provider-b"];
    let name = runtime.block_on(async {
        for name in names {
            let status = admin(market.node(name), "status").await.unwrap();
            if status["node_key"] == old.as_str() {
                return name;
            }
        }
        panic!("nobody is {old}");
    });
    let node = market.node(name).clone();
    let busy = run(&node.config, &["identity", "rotate", "--yes"]);
    assert!(String::from_utf8_lossy(&busy.stderr).contains("stop it first"), "{busy:?}");
    let consumer = market.node("consumer").clone();
    let session = runtime.block_on(async {
        let status = admin(&consumer, "status").await.unwrap();
        let sessions = status["consumer"]["sessions"].as_array().unwrap().clone();
        let with = sessions.iter().find(|s| s["provider"] == old.as_str()).expect("a session with it");
        with["session"].as_str().unwrap().to_owned()
    });

    signal("TERM", node.pid);
    let gone = || async { (!is_running(node.pid)).then_some(()) };
    runtime.block_on(wait_for("the end of the provider", Duration::from_secs(30), gone));
    let rotated = json_of(&run(&node.config, &["--format", "json", "identity", "rotate", "--yes"]));
    let new = rotated["node_key"].as_str().unwrap().to_owned();
    assert_eq!((&rotated["index"], &rotated["given_up"][0]["node_key"]), (&1.into(), &old.as_str().into()));
    let child = up(market, name);
    let pid = child.id();
    market.restarted.push(child);

    runtime.block_on(async {
        let back = || async {
            let status = admin(&node, "status").await?;
            (status["node_key"] == new.as_str()).then_some(())
        };
        wait_for("the provider under its new key", Duration::from_secs(60), back).await;
        // Its wallet was away too: whoever asks before the channel is up again waits for it.
        let buys = || async { sellers(market, Some(&new)).await?.contains(&new).then_some(()) };
        wait_for("an answer by the new key", Duration::from_secs(60), buys).await;
        let failed = market.ledger("consumer").iter().filter(|entry| entry["kind"] == "payment-failed").count();
        eprintln!("  {failed} payments failed while it came back");
        // What is left in the session that was opened under the old key comes back from the new one.
        admin_post(&consumer, &format!("sessions/{session}/close")).await;
        let settled = || async { settled_by(market, &session) };
        let how = wait_for("the remainder under the old key", Duration::from_secs(60), settled).await;
        eprintln!("  {name} rotated its key; the old session ended by a {how}");
    });
    let known = json_of(&run(&consumer.config, &["--format", "json", "market", "keys"]));
    let of_old = known.as_array().unwrap().iter().find(|key| key["node_key"] == old.as_str()).unwrap();
    assert!(of_old["fate"].as_str().unwrap().contains(&new), "{of_old}");

    // Its own checkpoint at the end, by the new key, over receipts of both.
    signal("TERM", pid);
    let gone = || async { (!is_running(pid)).then_some(()) };
    runtime.block_on(wait_for("the end of the provider", Duration::from_secs(30), gone));
    let bundle = market.dir.join("rotated.audit");
    let db = node.dir.join("ledger.sqlite");
    let export = satgrid().args(["ledger", "export", "--db"]).arg(&db).arg("--out").arg(&bundle).output().unwrap();
    assert!(export.status.success(), "{}", String::from_utf8_lossy(&export.stderr));
    let verdict = auditor().args(["verify", "--format", "json"]).arg(&bundle).output().unwrap();
    assert!(verdict.status.success(), "{}", String::from_utf8_lossy(&verdict.stdout));
    assert!(String::from_utf8_lossy(&verdict.stdout).contains(&new));
    super::second_opinion(&bundle);
}

/// The key of a node that has open sessions is given up for good: it cannot be while the node runs; started again the node pays
/// back and sells nothing, and its consumers buy of others.
pub(crate) fn revokes(market: &mut Market, runtime: &tokio::runtime::Runtime) {
    let consumer = market.node("consumer").clone();
    // Whoever serves without being asked for; its session is open, with a balance.
    let served = wait_for("an answer", Duration::from_secs(90), || sellers(market, None));
    let key = runtime.block_on(served).pop().unwrap();
    let (node, session) = runtime.block_on(async {
        let mut found = None;
        for name in ["provider-a", "provider-b"] {
            let node = market.node(name);
            if admin(node, "status").await.is_some_and(|status| status["node_key"] == key.as_str()) {
                found = Some(node.clone());
            }
        }
        let open = || async {
            let status = admin(&consumer, "status").await?;
            let of_key = |s: &&Value| s["provider"] == key.as_str();
            let with = status["consumer"]["sessions"].as_array()?.iter().find(of_key)?.clone();
            with["session"].as_str().map(str::to_owned)
        };
        let session = wait_for("the session in the status", Duration::from_secs(10), open).await;
        (found.expect("a node that is still its first self"), session)
    });
    let refused = run(&node.config, &["identity", "revoke", "--yes"]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("stop it first"));
    let shown = json_of(&run(&node.config, &["--format", "json", "identity", "show"]));
    assert_eq!((&shown["revoked"], &shown["node_key"]), (&false.into(), &key.as_str().into()), "nothing was changed");

    signal("TERM", node.pid);
    let gone = || async { (!is_running(node.pid)).then_some(()) };
    runtime.block_on(wait_for("the end of the provider", Duration::from_secs(30), gone));
    let revoked = json_of(&run(&node.config, &["--format", "json", "identity", "revoke", "--yes"]));
    assert_eq!(revoked["revoked"], true, "{revoked}");
    let child = up(market, &node.name);
    let pid = child.id();
    market.restarted.push(child);
    runtime.block_on(async {
        wait_for("the node, revoked", Duration::from_secs(60), || admin(&node, "status")).await;
        admin_post(&consumer, &format!("sessions/{session}/close")).await;
        let settled = || async { settled_by(market, &session) };
        let how = wait_for("the remainder of a revoked key", Duration::from_secs(60), settled).await;
        eprintln!("  {} revoked its key; the open session ended by a {how}", node.name);
        assert!(sellers(market, Some(&key)).await.is_none(), "nobody buys of it");
    });
    let known = json_of(&run(&consumer.config, &["--format", "json", "market", "keys"]));
    let of_it = known.as_array().unwrap().iter().find(|known| known["node_key"] == key.as_str()).unwrap();
    assert!(of_it["fate"].as_str().unwrap().contains("revoked"), "{of_it}");
    signal("TERM", pid);
    let gone = || async { (!is_running(pid)).then_some(()) };
    runtime.block_on(wait_for("the end of the node", Duration::from_secs(30), gone));
}

/// How the consumer got back what was left in a session, once it did.
fn settled_by(market: &Market, session: &str) -> Option<String> {
    let entries = market.ledger("consumer");
    let ends = |entry: &&Value| {
        let kind = entry["kind"].as_str().unwrap_or_default();
        matches!(kind, "refund-received" | "credit-note") && entry.to_string().contains(session)
    };
    entries.iter().find(ends).map(|entry| entry["kind"].as_str().unwrap().to_owned())
}
