//! Traces of calls for a collector of OpenTelemetry's: OTLP over HTTP, as JSON, where `log.otlp_endpoint` names one.
//!
//! A call is a span, each provider that worked on it a child. They carry counts, prices, ids and times, never a word of a prompt or an
//! answer. Our own few lines instead of OpenTelemetry's crates: JSON is one of OTLP's two forms that every collector takes, and
//! the client that sends it is here already. Nothing waits for a collector: what does not fit the queue is dropped and counted.

use crate::drive::now;
use satgrid_api::Bill;
use satgrid_types::{FinishReason, NodeKey, RequestId, UnixMs};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;

/// Calls that wait to be sent.
const QUEUE: usize = 1_024;
/// Calls in one message.
const BATCH: usize = 128;
/// How long a call may wait for others to be sent with it.
const GATHER: Duration = Duration::from_secs(2);
const WAIT: Duration = Duration::from_secs(10);
const INTERNAL: u8 = 1;
const CLIENT: u8 = 3;
const NANOS_PER_MS: u64 = 1_000_000;

/// Where calls are told; cheap to clone.
#[derive(Clone)]
pub(crate) struct Traces {
    queue: mpsc::Sender<CallTrace>,
    dropped: Arc<AtomicU64>,
}

/// One call, as far as it has come.
#[derive(Debug, Clone)]
pub(crate) struct CallTrace {
    id: RequestId,
    model: String,
    embeds: bool,
    began: UnixMs,
    legs: Vec<LegTrace>,
    ended: UnixMs,
    finish: Option<FinishReason>,
    bill: Bill,
}

#[derive(Debug, Clone)]
struct LegTrace {
    request: RequestId,
    provider: NodeKey,
    began: UnixMs,
}

impl CallTrace {
    pub(crate) fn begin(id: RequestId, model: &str, embeds: bool) -> CallTrace {
        let began = now();
        let bill = Bill::default();
        CallTrace { id, model: model.to_owned(), embeds, began, legs: Vec::new(), ended: began, finish: None, bill }
    }

    pub(crate) fn leg(&mut self, request: RequestId, provider: NodeKey) {
        self.legs.push(LegTrace { request, provider, began: now() });
    }
}

impl Traces {
    /// Sends to this collector, `http://host:4318`, until every handle is gone.
    pub(crate) fn start(endpoint: &str) -> anyhow::Result<Traces> {
        let (queue, calls) = mpsc::channel(QUEUE);
        let client = reqwest::Client::builder().timeout(WAIT).build()?;
        let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
        let dropped = Arc::new(AtomicU64::new(0));
        tokio::spawn(send(calls, client, url, Arc::clone(&dropped)));
        Ok(Traces { queue, dropped })
    }

    /// The call is over.
    pub(crate) fn end(&self, mut call: CallTrace, finish: Option<FinishReason>, bill: &Bill) {
        (call.ended, call.finish, call.bill) = (now(), finish, bill.clone());
        if self.queue.try_send(call).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn send(mut calls: mpsc::Receiver<CallTrace>, client: reqwest::Client, url: String, dropped: Arc<AtomicU64>) {
    let mut failing = false;
    while let Some(first) = calls.recv().await {
        let mut batch = vec![first];
        let gather = async {
            while batch.len() < BATCH
                && let Some(call) = calls.recv().await
            {
                batch.push(call);
            }
        };
        let _ = tokio::time::timeout(GATHER, gather).await;
        let sent = client.post(&url).json(&message(&batch)).send().await.and_then(reqwest::Response::error_for_status);
        match sent {
            Ok(_) => failing = false,
            Err(error) => {
                dropped.fetch_add(batch.len() as u64, Ordering::Relaxed);
                // Once: a collector that is away for a day is one line.
                if !std::mem::replace(&mut failing, true) {
                    let dropped = dropped.load(Ordering::Relaxed);
                    tracing::warn!(%error, dropped, "traces are not taken; check log.otlp_endpoint");
                }
            }
        }
    }
}

/// An `ExportTraceServiceRequest` in OTLP's JSON form: ids in hexadecimal, 64-bit numbers as text.
fn message(calls: &[CallTrace]) -> Value {
    let spans: Vec<Value> = calls.iter().flat_map(spans).collect();
    let resource = [text("service.name", "satgrid"), text("service.version", env!("CARGO_PKG_VERSION"))];
    json!({ "resourceSpans": [{
        "resource": { "attributes": resource },
        "scopeSpans": [{ "scope": { "name": "satgrid" }, "spans": spans }],
    }]})
}

fn spans(call: &CallTrace) -> Vec<Value> {
    let trace = hex::encode(&call.id.0[..16]);
    let root = hex::encode(&call.id.0[16..24]);
    let usage = &call.bill.usage;
    let operation = if call.embeds { "embeddings" } else { "chat" };
    let mut attributes = vec![
        text("gen_ai.operation.name", operation),
        text("gen_ai.request.model", &call.model),
        number("gen_ai.usage.input_tokens", usage.prompt.into()),
        number("gen_ai.usage.output_tokens", usage.completion.into()),
        number("satgrid.cost_msat", call.bill.cost.0),
        text("satgrid.request", &call.id.to_string()),
    ];
    let finish = match call.finish {
        Some(FinishReason::Stop) => "stop",
        Some(FinishReason::Length) => "length",
        Some(FinishReason::Cancelled) => "cancelled",
        Some(FinishReason::Error) | None => "failed",
    };
    attributes.push(text("satgrid.finish", finish));
    let failed = call.finish.is_none();
    let times = (call.began, call.ended);
    let mut spans =
        vec![span((&trace, &root, None), &format!("{operation} {}", call.model), INTERNAL, times, attributes, failed)];
    let ends = call.legs.iter().skip(1).map(|leg| leg.began).chain([call.ended]);
    for (at, (leg, ended)) in call.legs.iter().zip(ends).enumerate() {
        let own = hex::encode(&leg.request.0[..8]);
        // A leg that was given up before it was charged has no line in the bill.
        let billed = call
            .bill
            .legs
            .iter()
            .filter(|one| one.provider == leg.provider)
            .nth(call.legs[..at].iter().filter(|before| before.provider == leg.provider).count());
        let mut attributes = vec![
            text("satgrid.provider", &leg.provider.to_string()),
            text("satgrid.request", &leg.request.to_string()),
        ];
        if let Some(billed) = billed {
            attributes.push(number("satgrid.cost_msat", billed.cost.0));
            attributes.extend(billed.receipt.map(|id| text("satgrid.receipt", &id.to_string())));
        }
        let last = at + 1 == call.legs.len();
        let times = (leg.began, ended);
        spans.push(span((&trace, &own, Some(&root)), "provider", CLIENT, times, attributes, failed || !last));
    }
    spans
}

fn span(
    (trace, own, parent): (&str, &str, Option<&str>),
    name: &str,
    kind: u8,
    (began, ended): (UnixMs, UnixMs),
    attributes: Vec<Value>,
    failed: bool,
) -> Value {
    let nanos = |at: UnixMs| at.0.saturating_mul(NANOS_PER_MS).to_string();
    let mut span = json!({
        "traceId": trace, "spanId": own, "name": name, "kind": kind,
        "startTimeUnixNano": nanos(began), "endTimeUnixNano": nanos(ended),
        "attributes": attributes, "status": { "code": if failed { 2 } else { 1 } },
    });
    if let Some(parent) = parent {
        span["parentSpanId"] = json!(parent);
    }
    span
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn number(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{Json, Router, extract::State, routing::post};
    use satgrid_api::Leg;
    use satgrid_types::{Msat, RateCard, ReceiptId, TokenUsage};

    /// A collector that shows what it is told.
    async fn collector() -> (String, mpsc::Receiver<Value>) {
        let (told, heard) = mpsc::channel(8);
        let take = |State(told): State<mpsc::Sender<Value>>, Json(body): Json<Value>| async move {
            told.send(body).await.unwrap();
            Json(json!({ "partialSuccess": {} }))
        };
        let router = Router::new().route("/v1/traces", post(take)).with_state(told);
        let port = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = port.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(port, router).await });
        (format!("http://{address}/"), heard)
    }

    fn attribute<'a>(span: &'a Value, key: &str) -> Option<&'a Value> {
        let found = span["attributes"].as_array()?.iter().find(|one| one["key"] == key)?;
        found["value"].as_object()?.values().next()
    }

    #[tokio::test]
    async fn a_call_and_its_providers_reach_the_collector() {
        let (endpoint, mut heard) = collector().await;
        let traces = Traces::start(&endpoint).unwrap();
        let (first, second) = (NodeKey([1; 32]), NodeKey([2; 32]));
        let mut call = CallTrace::begin(RequestId([7; 32]), "org/model", false);
        call.leg(RequestId([8; 32]), first);
        call.leg(RequestId([9; 32]), second);
        let leg = |provider, receipt: Option<u8>, cost| Leg {
            provider,
            receipt: receipt.map(|byte| ReceiptId([byte; 32])),
            usage: TokenUsage::default(),
            rates: RateCard::default(),
            cost: Msat(cost),
        };
        let usage = TokenUsage { prompt: 11, completion: 5, ..TokenUsage::default() };
        let legs = vec![leg(first, None, 3), leg(second, Some(6), 40)];
        let bill = Bill { usage, cost: Msat(43), legs, ..Bill::default() };
        traces.end(call, Some(FinishReason::Stop), &bill);

        let told = heard.recv().await.unwrap();
        let spans = told["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap();
        let [root, one, two] = spans.as_slice() else { panic!("{told}") };
        assert_eq!(
            (root["traceId"].as_str(), root["spanId"].as_str()),
            (Some(&*"07".repeat(16)), Some(&*"07".repeat(8)))
        );
        assert_eq!((root["name"].as_str(), root.get("parentSpanId")), (Some("chat org/model"), None));
        assert_eq!(attribute(root, "gen_ai.usage.input_tokens"), Some(&json!("11")));
        assert_eq!(attribute(root, "satgrid.cost_msat"), Some(&json!("43")));
        for (span, provider, failed) in [(one, first, 2), (two, second, 1)] {
            assert_eq!((&span["traceId"], &span["parentSpanId"]), (&root["traceId"], &root["spanId"]));
            assert_eq!(attribute(span, "satgrid.provider"), Some(&json!(provider.to_string())));
            assert_eq!(span["status"]["code"], failed, "the first was left");
            let times = ["startTimeUnixNano", "endTimeUnixNano"].map(|key| span[key].as_str().unwrap().parse::<u64>());
            assert!(times[0].clone().unwrap() <= times[1].clone().unwrap());
        }
        assert_eq!(attribute(one, "satgrid.receipt"), None);
        assert_eq!(attribute(two, "satgrid.receipt"), Some(&json!("06".repeat(32))));
    }

    #[tokio::test]
    async fn nothing_waits_for_a_collector_that_is_away() {
        let traces = Traces::start("http://127.0.0.1:1").unwrap();
        for at in 0..(QUEUE + BATCH + 10) {
            let id = RequestId([u8::try_from(at % 256).unwrap(); 32]);
            traces.end(CallTrace::begin(id, "m", true), None, &Bill::default());
        }
        assert!(traces.dropped.load(Ordering::Relaxed) > 0, "the queue is bounded");
    }
}
