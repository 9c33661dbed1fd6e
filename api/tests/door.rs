//! The front door over HTTP: a price for strangers, an L402 credential, open and closed paths, limits.
#![allow(clippy::unwrap_used)]

mod support;

use std::{net::SocketAddr, sync::Arc};

use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{HeaderMap, Request, StatusCode},
};
use http_body_util::BodyExt;
use satgrid_api::{
    Account, AccountError, Accounts, Api, ApiConfig, CompletionRequest, Door, DoorError, DoorInvoice, Estimate,
    ExchangeRate, Generation, InvoiceState, KeyDenied, KeyView, NewKey, Order, Refund, ServiceError,
};
use satgrid_types::{Msat, PaymentHash, RequestId, UnixMs};
use serde_json::{Value, json};
use support::{Scripted, rates};
use tower::ServiceExt;

/// Over no more is an invoice for one request.
const MOST: Msat = Msat(50_000);

/// One key, opened by one token and one preimage.
struct Desk;

#[async_trait]
impl Accounts for Desk {
    async fn admit(&self, hash: [u8; 32]) -> Result<Account, KeyDenied> {
        let paces = match hash {
            known if known == [7; 32] => vec![],
            known if known == [8; 32] => vec![("key_8".to_owned(), 1_000), ("key_1".to_owned(), 2)],
            _ => return Err(KeyDenied::Unknown),
        };
        Ok(Account { id: format!("key_{}", hash[0]), manages: false, paces })
    }
    async fn key(&self, _: &str) -> Result<Option<KeyView>, AccountError> {
        Ok(None)
    }
    async fn keys(&self, _: Option<&str>) -> Result<Vec<KeyView>, AccountError> {
        Ok(vec![])
    }
    async fn create_key(&self, _: NewKey) -> Result<(KeyView, String), AccountError> {
        Err(AccountError::Invalid { message: "not here".into() })
    }
    async fn revoke_key(&self, id: &str) -> Result<KeyView, AccountError> {
        Err(AccountError::NoSuchKey { id: id.into() })
    }
    async fn generation(&self, _: RequestId) -> Result<Vec<Generation>, AccountError> {
        Ok(vec![])
    }
    async fn estimate(&self, request: CompletionRequest, _: Option<String>) -> Result<Estimate, ServiceError> {
        let dear = request.model == "org/dear";
        Ok(Estimate {
            model: request.model,
            prompt_tokens: 3,
            max_tokens: 9,
            ceiling: Msat(4_000),
            ceiling_with_failover: if dear { Msat(50_000) } else { Msat(5_000) },
            rates: rates(),
            providers: 1,
            available: None,
            rate: None,
        })
    }
    fn exchange_rate(&self) -> Option<ExchangeRate> {
        None
    }
}

#[async_trait]
impl Door for Desk {
    async fn invoice(&self, order: Order, _: &str) -> Result<DoorInvoice, DoorError> {
        let (amount, secret) = match order {
            Order::L402 { amount } if amount > MOST => {
                return Err(DoorError::PriceTooHigh { price: amount, most: MOST });
            }
            Order::L402 { amount } => (amount, Some("TOKEN".to_owned())),
            Order::NewKey { amount } => (amount, Some("sk-satgrid-new".to_owned())),
            Order::TopUp { amount, .. } | Order::Missing { amount, .. } => (amount, None),
        };
        let (payment_hash, expires_at) = (PaymentHash([5; 32]), UnixMs(1_700_000_600_000));
        Ok(DoorInvoice { bolt11: "lnbcrt1door".into(), payment_hash, amount, expires_at, secret })
    }
    async fn credential(&self, token: &str, preimage: &str) -> Result<[u8; 32], DoorError> {
        match (token, preimage) {
            ("TOKEN", "aa") => Ok([7; 32]),
            ("BELOW", "aa") => Ok([8; 32]),
            ("TOKEN", "early") => Err(DoorError::NotPaidYet),
            _ => Err(DoorError::BadCredential),
        }
    }
    async fn invoice_state(&self, hash: PaymentHash) -> Result<Option<InvoiceState>, DoorError> {
        Ok((hash == PaymentHash([5; 32])).then_some(InvoiceState::Open))
    }
    async fn refund(&self, _: &str, _: &str, _: Option<Msat>) -> Result<Refund, DoorError> {
        Err(DoorError::Balance { required: Msat(2), available: Msat(1) })
    }
    async fn refunds(&self, _: &str) -> Result<Vec<Refund>, DoorError> {
        Ok(vec![])
    }
    fn price(&self, cost: Msat) -> Msat {
        Msat(cost.0 * 2)
    }
    fn proxies(&self) -> &[std::net::IpAddr] {
        &[std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)]
    }
}

fn world() -> (Arc<Scripted>, Router) {
    let service = Arc::new(Scripted::default());
    let desk = Arc::new(Desk);
    let config =
        ApiConfig { accounts: Some(desk.clone()), door: Some(desk), keyless_loopback: false, ..ApiConfig::default() };
    (service.clone(), Api::new(service, config).router())
}

async fn call(router: &Router, mut request: Request<Body>) -> (StatusCode, HeaderMap, Value) {
    request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 5_000))));
    let (parts, body) = router.clone().oneshot(request).await.unwrap().into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    (parts.status, parts.headers, serde_json::from_slice(&bytes).unwrap_or_default())
}

fn chat(authorization: Option<&str>) -> Request<Body> {
    let body = json!({"model": "org/tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]});
    let request = Request::post("/v1/chat/completions");
    let request = match authorization {
        Some(shown) => request.header("authorization", shown),
        None => request,
    };
    request.body(Body::from(body.to_string())).unwrap()
}

#[tokio::test]
async fn a_key_that_lacks_money_is_told_with_the_invoice_that_fills_it() {
    let (_, router) = world();
    let body = json!({"model": "key-limit", "messages": [{"role": "user", "content": "hi"}]});
    let request = Request::post("/v1/chat/completions").header("authorization", "L402 TOKEN:aa");
    let (status, headers, body) = call(&router, request.body(Body::from(body.to_string())).unwrap()).await;
    assert_eq!((status, &body["error"]["code"]), (StatusCode::PAYMENT_REQUIRED, &json!("key_limit_exceeded")));
    assert_eq!(headers["x-should-retry"], "false");
    let topup = &body["error"]["metadata"]["topup"];
    assert_eq!((&topup["bolt11"], &topup["expires_at"]), (&json!("lnbcrt1door"), &json!(1_700_000_600)));
}

#[tokio::test]
async fn a_request_that_no_invoice_covers_is_refused_with_what_to_do() {
    let (_, router) = world();
    let body = json!({"model": "org/dear", "messages": [{"role": "user", "content": "hi"}]});
    let request = Request::post("/v1/chat/completions").body(Body::from(body.to_string())).unwrap();
    let (status, headers, body) = call(&router, request).await;
    assert_eq!((status, &body["error"]["code"]), (StatusCode::BAD_REQUEST, &json!("price_too_high")));
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("max_tokens") && message.contains("/v1/topup"), "{message}");
    assert!(!headers.contains_key("www-authenticate"), "there is nothing to pay");
}

#[tokio::test]
async fn a_stranger_is_told_the_price_of_the_very_request_and_pays_it() {
    let (service, router) = world();
    let (status, headers, body) = call(&router, chat(None)).await;
    assert_eq!(status, StatusCode::PAYMENT_REQUIRED);
    let challenge = headers["www-authenticate"].to_str().unwrap();
    assert_eq!(challenge, "L402 version=\"0\", token=\"TOKEN\", macaroon=\"TOKEN\", invoice=\"lnbcrt1door\"");
    assert_eq!(headers["x-should-retry"], "false", "SDKs must not ask for invoice after invoice");
    assert_eq!(body["error"]["code"], "payment_required");
    assert_eq!(body["error"]["metadata"]["required_msat"], 10_000, "the ceiling with failover, with the margin");
    assert_eq!(service.calls.lock().unwrap().len(), 0, "nothing was sent");

    for scheme in ["L402", "l402", "LSAT"] {
        let (status, _, body) = call(&router, chat(Some(&format!("{scheme} TOKEN:aa")))).await;
        assert_eq!(status, StatusCode::OK, "{body}");
    }
    let calls = service.calls.lock().unwrap();
    assert_eq!(calls.len(), 3);
    assert!(calls.iter().all(|(_, context)| context.key.as_deref() == Some("key_7")), "its own key pays");
}

#[tokio::test]
async fn several_replies_cost_several_ceilings() {
    let (_, router) = world();
    let body = json!({"model": "org/tiny", "max_tokens": 9, "n": 3, "messages": [{"role": "user", "content": "hi"}]});
    let ask = |path: &str| Request::post(path).body(Body::from(body.to_string())).unwrap();
    let (_, _, challenge) = call(&router, ask("/v1/chat/completions")).await;
    assert_eq!(challenge["error"]["metadata"]["required_msat"], 30_000, "{challenge}");
    let (status, _, estimate) = call(&router, ask("/v1/estimate")).await;
    assert_eq!((status.as_u16(), estimate["choices"].as_u64()), (200, Some(3)), "{estimate}");
    assert_eq!((&estimate["ceiling_msat"], &estimate["ceiling_with_failover_msat"]), (&json!(12_000), &json!(15_000)));
}

#[tokio::test]
async fn what_a_stranger_may_not() {
    let (service, router) = world();
    let check = async |request: Request<Body>, status: u16, code: &str| {
        let (got, _, body) = call(&router, request).await;
        assert_eq!((got.as_u16(), body["error"]["code"].as_str()), (status, Some(code)), "{body}");
    };
    let get = |path: &str| Request::get(path).body(Body::empty()).unwrap();
    check(chat(Some("L402 TOKEN:bb")), 401, "invalid_api_key").await;
    check(chat(Some("L402 OTHER:aa")), 401, "invalid_api_key").await;
    check(chat(Some("L402 TOKEN:early")), 503, "not_paid_yet").await;
    check(chat(Some("Bearer sk-satgrid-unknown")), 401, "invalid_api_key").await;
    // On this machine too: the door knows no owner.
    check(get("/v1/keys"), 401, "invalid_api_key").await;
    check(get("/v1/key"), 401, "invalid_api_key").await;
    check(get(&format!("/v1/generations/chatcmpl-{}", "00".repeat(32))), 401, "invalid_api_key").await;
    check(get("/v1/refund"), 401, "invalid_api_key").await;
    let refund = Request::post("/v1/refund").header("authorization", "L402 TOKEN:aa");
    let refund = refund.body(Body::from(json!({"destination": "a@b.example"}).to_string())).unwrap();
    check(refund, 402, "key_limit_exceeded").await;
    let response = json!({"model": "org/tiny", "input": "hi", "max_output_tokens": 9});
    let response = Request::post("/v1/responses").body(Body::from(response.to_string())).unwrap();
    check(response, 402, "payment_required").await;
    // A request that could not be served is not paid for.
    let broken =
        Request::post("/v1/chat/completions").body(Body::from("{\"model\": \"m\", \"messages\": []}")).unwrap();
    check(broken, 400, "invalid_value").await;
    assert_eq!(service.calls.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn invoices_are_limited_by_address() {
    let (_, router) = world();
    let top_up = || Request::post("/v1/topup").body(Body::from("{\"amount_sat\": 100}")).unwrap();
    let (status, _, body) = call(&router, top_up()).await;
    assert_eq!((status.as_u16(), body["key"].as_str()), (201, Some("sk-satgrid-new")), "{body}");
    let (status, _, _) = call(&router, Request::get("/v1/models").body(Body::empty()).unwrap()).await;
    assert_eq!(status, StatusCode::OK);
    let path = format!("/v1/invoices/{}", "05".repeat(32));
    let (_, _, body) = call(&router, Request::get(path).body(Body::empty()).unwrap()).await;
    assert_eq!(body["state"], "open");
    let mut limited = None;
    for _ in 0..40 {
        let (status, headers, _) = call(&router, top_up()).await;
        if status == StatusCode::TOO_MANY_REQUESTS {
            limited = headers.get("retry-after").cloned();
            break;
        }
    }
    assert!(limited.is_some(), "no end to invoices");
}

#[tokio::test]
async fn a_call_counts_against_the_pace_of_every_key_above() {
    let (_, router) = world();
    for expect in [StatusCode::OK, StatusCode::OK, StatusCode::TOO_MANY_REQUESTS] {
        let (status, _, body) = call(&router, chat(Some("L402 BELOW:aa"))).await;
        assert_eq!(status, expect, "{body}");
    }
    let (status, _, _) = call(&router, chat(Some("L402 TOKEN:aa"))).await;
    assert_eq!(status, StatusCode::OK, "another's goes on");
}

#[tokio::test]
async fn what_costs_nothing_has_its_pace_for_a_key_too() {
    let (_, router) = world();
    let mut limited = false;
    for _ in 0..200 {
        let request = Request::post("/v1/tokenize").header("authorization", "L402 TOKEN:aa");
        let body = json!({"model": "org/tiny", "prompt": "hi"}).to_string();
        let (status, _, _) = call(&router, request.body(Body::from(body)).unwrap()).await;
        limited |= status == StatusCode::TOO_MANY_REQUESTS;
    }
    assert!(limited, "no end to what is free");
    let (status, _, body) = call(&router, chat(Some("L402 TOKEN:aa"))).await;
    assert_eq!(status, StatusCode::OK, "what is paid for goes on: {body}");
}

#[tokio::test]
async fn a_trusted_proxy_says_who_asks_and_nobody_else() {
    let (_, router) = world();
    let from = |peer: [u8; 4], forwarded: &str| {
        let request = Request::post("/v1/topup").header("x-forwarded-for", forwarded);
        let mut request = request.body(Body::from("{\"amount_sat\": 100}")).unwrap();
        request.extensions_mut().insert(ConnectInfo(SocketAddr::from((peer, 5_000))));
        router.clone().oneshot(request)
    };
    let limited = async |peer: [u8; 4], forwarded: &dyn Fn(u8) -> String| {
        for n in 0..40 {
            if from(peer, &forwarded(n)).await.unwrap().status() == StatusCode::TOO_MANY_REQUESTS {
                return true;
            }
        }
        false
    };
    // Of a client that came through the proxy, only the last hop counts: it may write what it likes before.
    assert!(limited([127, 0, 0, 1], &|n| format!("10.0.0.{n}, 198.51.100.7")).await);
    assert!(!limited([127, 0, 0, 1], &|n| format!("198.51.100.{}", n + 100)).await, "each its own");
    assert!(limited([203, 0, 113, 9], &|n| format!("198.51.100.{n}")).await, "no proxy of ours");
}
