//! A `Service` that follows a script, for tests of the edge only: no model, no market, no money behind it.
//!
//! The model's name picks the script; see [`Scripted::complete`].
#![allow(dead_code, reason = "each test file and the example use a part")]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use satgrid_api::{
    Bill, CallContext, CompletionEvent, CompletionRequest, CompletionStream, Leg, LimitSource, ModelInfo, Prompt,
    Readiness, Service, ServiceError, Shortfall, TokenizeRequest, Tokenized, TopUp,
};
use satgrid_types::{
    FinishReason, ModelRoot, Msat, MsatPerMtok, NodeKey, PaymentHash, RateCard, ReceiptId, TokenUsage, UnixMs,
};

/// What breaks careless writers and readers of streams: line ends of every kind, quotes, NUL, what looks like an event.
pub(crate) const NASTY: &str =
    "\r\n\n\ndata: [DONE]\n\n \u{2028}\u{85}\0 \"\\ : \u{feff}\u{10ffff} </script> é\u{301} 👩‍👩‍👧 ";

type Event = Result<CompletionEvent, ServiceError>;

#[derive(Default)]
pub(crate) struct Scripted {
    pub(crate) calls: Mutex<Vec<(CompletionRequest, CallContext)>>,
    /// Events handed out so far, over all streams.
    pub(crate) produced: Arc<AtomicUsize>,
    /// Streams dropped before their end.
    pub(crate) cancelled: Arc<AtomicUsize>,
    pub(crate) not_ready: Mutex<Vec<String>>,
    /// The model `gated` waits for this before its second half.
    pub(crate) gate: Arc<tokio::sync::Notify>,
}

pub(crate) fn rates() -> RateCard {
    RateCard {
        input: MsatPerMtok(10_000_000),
        cached_input: MsatPerMtok(2_500_000),
        output: MsatPerMtok(40_000_000),
        per_request: Msat(0),
        ..RateCard::default()
    }
}

pub(crate) fn leg(provider: u8, receipt: Option<u8>, prompt: u32, completion: u32) -> Leg {
    Leg {
        provider: NodeKey([provider; 32]),
        receipt: receipt.map(|n| ReceiptId([n; 32])),
        usage: TokenUsage { prompt, completion, ..TokenUsage::default() },
        rates: rates(),
        cost: Msat(u64::from(prompt) * 10 + u64::from(completion) * 40),
    }
}

pub(crate) fn bill() -> Bill {
    Bill {
        usage: TokenUsage { prompt: 9, completion: 3, ..TokenUsage::default() },
        cost: Msat(210),
        routing_fees: Msat(0),
        legs: vec![leg(0xaa, Some(0x11), 9, 3)],
        ..Bill::default()
    }
}

/// One provider died after two tokens without a receipt; the second took its output over as input.
pub(crate) fn bill_of_two() -> Bill {
    Bill {
        usage: TokenUsage { prompt: 9, completion: 5, ..TokenUsage::default() },
        cost: Msat(170 + 230),
        routing_fees: Msat(1_000),
        legs: vec![leg(0xaa, None, 9, 2), leg(0xbb, Some(0x22), 11, 3)],
        ..Bill::default()
    }
}

fn started() -> Event {
    Ok(CompletionEvent::Started { model: "org/tiny".into(), fingerprint: Some("fp_0123abcd".into()) })
}

fn text(delta: &str) -> Event {
    Ok(CompletionEvent::Text { delta: delta.into() })
}

fn finished(reason: FinishReason, bill: Bill) -> Event {
    Ok(CompletionEvent::Finished { reason, bill })
}

fn shortfall(limit: LimitSource, topup: bool) -> ServiceError {
    ServiceError::InsufficientFunds(Box::new(Shortfall {
        required: Msat(250_000),
        available: Msat(1_200),
        limit,
        topup: topup.then(|| TopUp {
            bolt11: "lnbcrt2500n1scripted".into(),
            payment_hash: PaymentHash([0x33; 32]),
            expires_at: UnixMs(1_700_000_120_999),
        }),
    }))
}

/// A refusal by name, as `complete` returns it.
fn refusal(model: &str) -> Option<ServiceError> {
    Some(match model {
        "no-funds" => shortfall(LimitSource::Wallet, true),
        "key-limit" => shortfall(LimitSource::Key, false),
        "too-dear" => {
            ServiceError::MaxPriceExceeded { model: model.into(), cheapest: "the cheapest asks 40,000,000".into() }
        }
        "too-long" => ServiceError::ContextLength { prompt_tokens: 5_000, context_length: 4_096 },
        "no-provider" => ServiceError::NoProvider {
            model: model.into(),
            why: vec!["p1: listing expired 40 s ago".into(), "p2: dearer than provider.max_price".into()],
        },
        "bad-param" => ServiceError::InvalidRequest {
            param: "logit_bias".into(),
            message: "Token 999999 is not in this model's vocabulary.".into(),
        },
        "busy" => ServiceError::Busy { retry_after: Duration::from_secs(7) },
        "not-ready" => ServiceError::NotReady { reasons: vec!["no relay answers".into()] },
        "fails" => ServiceError::ProviderFailed { reason: "its engine died".into(), bill: None },
        "fails-charged" => {
            ServiceError::ProviderFailed { reason: "its engine died".into(), bill: Some(Box::new(bill())) }
        }
        "internal" => ServiceError::Internal { detail: "the journal's disk is full at /secret/path".into() },
        _ => return None,
    })
}

#[async_trait::async_trait]
impl Service for Scripted {
    async fn ready(&self) -> Readiness {
        let reasons = self.not_ready.lock().unwrap().clone();
        Readiness { ready: reasons.is_empty(), reasons }
    }

    async fn models(&self) -> Vec<ModelInfo> {
        let model = |id: &str, root| ModelInfo {
            id: id.into(),
            created: UnixMs(1_700_000_000_000),
            root,
            context_length: 4_096,
            rates: rates(),
            sellers: 2,
            quantisations: vec!["Q4_K_M".into()],
            embeds: None,
        };
        let embedder = ModelInfo { embeds: Some(3), ..model("embedder", None) };
        vec![embedder, model("org/tiny", Some(ModelRoot([0x44; 32]))), model("plain", None)]
    }

    async fn complete(
        &self,
        request: CompletionRequest,
        context: CallContext,
    ) -> Result<CompletionStream, ServiceError> {
        let (model, request_prompt) = (request.model.clone(), request.prompt.clone());
        self.calls.lock().unwrap().push((request, context));
        let texts = match &request_prompt {
            Prompt::Embed(texts) => Some(texts.len()),
            Prompt::Text(_) | Prompt::Messages(_) | Prompt::Tokens(_) => None,
        };
        if matches!(model.as_str(), "embedder" | "org/tiny") && texts.is_some() != (model == "embedder") {
            return Err(ServiceError::WrongKind { embeds: model == "embedder", model });
        }
        if let Some(error) = refusal(&model) {
            return Err(error);
        }
        let stop = FinishReason::Stop;
        let wait = |secs| {
            // The clock starts when the stream gets there.
            let slept = async move { tokio::time::sleep(Duration::from_secs(secs)).await };
            stream::once(slept).filter_map(|()| async { None })
        };
        let whole = || stream::iter(vec![started(), text("Hel"), text(""), text("lo ⚡"), finished(stop, bill())]);
        let half = || stream::iter(vec![started(), text("Hel")]);
        let rest = || stream::iter(vec![text("lo"), finished(stop, bill())]);
        let gate = Arc::clone(&self.gate);
        let events: CompletionStream = match model.as_str() {
            "org/tiny" => Box::pin(whole()),
            "embedder" => {
                let row = |at: usize| [at as f32 + 0.5, -1.0, 1e-7].iter().flat_map(|n| n.to_le_bytes()).collect();
                let rows = (0..texts.unwrap_or(0)).map(move |at| Ok(CompletionEvent::Embedding { row: row(at) }));
                let rows: Vec<_> = rows.collect();
                Box::pin(
                    stream::iter([started()]).chain(stream::iter(rows)).chain(stream::iter([finished(stop, bill())])),
                )
            }
            "nasty" => {
                let pieces = NASTY.split_inclusive(' ').map(text).collect::<Vec<_>>();
                Box::pin(stream::iter(pieces).chain(rest()))
            }
            "two-legs" => Box::pin(stream::iter(vec![
                started(),
                text("a\n\"b\""),
                text("c"),
                finished(FinishReason::Length, bill_of_two()),
            ])),
            "thinks-and-calls" => Box::pin(stream::iter(vec![
                started(),
                Ok(CompletionEvent::Reasoning { delta: "hm".into() }),
                text("I will."),
                Ok(CompletionEvent::ToolCall { index: 0, name: "f".into() }),
                Ok(CompletionEvent::Arguments { index: 0, delta: "{\"a\":".into() }),
                Ok(CompletionEvent::Arguments { index: 0, delta: "1}".into() }),
                Ok(CompletionEvent::ToolCall { index: 1, name: "g".into() }),
                Ok(CompletionEvent::Arguments { index: 1, delta: "{}".into() }),
                finished(stop, bill()),
            ])),
            "cut-in-a-call" => Box::pin(stream::iter(vec![
                started(),
                Ok(CompletionEvent::ToolCall { index: 0, name: "f".into() }),
                Ok(CompletionEvent::Arguments { index: 0, delta: "{\"a\":".into() }),
                finished(FinishReason::Length, bill()),
            ])),
            "breaks" => {
                let broken = ServiceError::ProviderFailed {
                    reason: "both providers are gone".into(),
                    bill: Some(Box::new(bill())),
                };
                Box::pin(half().chain(stream::iter(vec![Err(broken)])))
            }
            "runs-dry" => Box::pin(half().chain(stream::iter(vec![Err(shortfall(LimitSource::Wallet, true))]))),
            "breaks-first" => Box::pin(stream::iter(vec![started(), Err(ServiceError::NotReady { reasons: vec![] })])),
            "cut" => Box::pin(stream::iter(vec![started(), text("x"), finished(FinishReason::Cancelled, bill())])),
            "no-result" => Box::pin(half()),
            "slow" => Box::pin(wait(40).chain(half()).chain(wait(16)).chain(rest())),
            "hangs" => Box::pin(half().chain(stream::pending())),
            "gated" => {
                let opened = stream::once(async move { gate.notified().await }).filter_map(|()| async { None });
                Box::pin(half().chain(opened).chain(rest()))
            }
            "endless" => Box::pin(stream::repeat_with(|| text(&"x".repeat(1_024)))),
            "panics" => panic!("the script says so"),
            "panics-late" => Box::pin(half().chain(stream::once(async { panic!("the script says so late") }))),
            _ => return Err(ServiceError::UnknownModel { model }),
        };
        Ok(self.watched(events))
    }

    async fn tokenize(&self, request: TokenizeRequest) -> Result<Tokenized, ServiceError> {
        if request.model != "org/tiny" {
            return Err(ServiceError::UnknownModel { model: request.model });
        }
        let text = match request.prompt {
            Prompt::Text(text) => text,
            Prompt::Messages(messages) => messages.into_iter().map(|m| m.content).collect(),
            Prompt::Tokens(tokens) => return Ok(Tokenized { tokens, context_length: 4_096 }),
            Prompt::Embed(_) => unreachable!("texts are embedded, not tokenised, by name"),
        };
        let special = if request.add_special_tokens { vec![2] } else { vec![] };
        let tokens = special.into_iter().chain(text.bytes().map(u32::from)).collect();
        Ok(Tokenized { tokens, context_length: 4_096 })
    }

    async fn detokenize(&self, model: String, tokens: Vec<u32>) -> Result<String, ServiceError> {
        if model != "org/tiny" {
            return Err(ServiceError::UnknownModel { model });
        }
        let bytes: Vec<u8> = tokens.into_iter().filter_map(|t| u8::try_from(t).ok()).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Scripted {
    fn watched(&self, events: CompletionStream) -> CompletionStream {
        struct Watch {
            events: CompletionStream,
            produced: Arc<AtomicUsize>,
            cancelled: Arc<AtomicUsize>,
            ended: bool,
        }
        impl Drop for Watch {
            fn drop(&mut self) {
                if !self.ended {
                    self.cancelled.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
        let (produced, cancelled) = (Arc::clone(&self.produced), Arc::clone(&self.cancelled));
        let watch = Watch { events, produced, cancelled, ended: false };
        Box::pin(stream::unfold(watch, |mut watch| async move {
            let event = watch.events.next().await;
            watch.ended = matches!(event, None | Some(Err(_) | Ok(CompletionEvent::Finished { .. })));
            watch.produced.fetch_add(1, Ordering::SeqCst);
            event.map(|event| (event, watch))
        }))
    }
}
