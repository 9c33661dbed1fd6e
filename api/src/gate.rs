//! Who may come in, and the id under which a request is logged.
//!
//! The endpoint spends money and usually listens on loopback without a key, so the threat is another program's web page:
//!
//! | caller | key | outcome |
//! |---|---|---|
//! | any | a configured one | in |
//! | any | a stored one (`sk-satgrid-...`) | in, unless revoked, expired (401) or too often (429) |
//! | any | an unknown one, and keys are configured | 401 |
//! | loopback, keyless allowed, no proxy header, known host, known or no web origin | none needed | in |
//! | the same from an unknown web origin or host | none | 403: a page in the user's browser, or DNS rebinding |
//! | any other | none | 401 |
//!
//! `/health` and preflights pass.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    extract::{ConnectInfo, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use sha2::{Digest, Sha256};
use tracing::Instrument;

use crate::{
    accounts::KeyDenied,
    config::{
        ApiConfig,
        limits::{MAX_HEAD_BYTES, MAX_TRACE_ID_BYTES},
    },
    door,
    error::ApiError,
    router::Edge,
    service::ServiceError,
};

const TRACE_ID: HeaderName = HeaderName::from_static("x-request-id");
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Put on every request that came in.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) trace: String,
    pub(crate) key: Option<String>,
    /// A stored key that makes and revokes others, and asks for no completions.
    pub(crate) manages: bool,
    /// Where it comes from, for limits; empty where that is of no use.
    pub(crate) address: String,
}

impl Caller {
    /// Keys that manage others ask for no completions, so that losing one loses no money.
    pub(crate) fn may_infer(&self) -> Result<(), ApiError> {
        if !self.manages {
            return Ok(());
        }
        let message = "This key manages keys; it cannot ask for completions.";
        Err(ApiError::new(StatusCode::FORBIDDEN, "management_key", message))
    }
}

#[derive(Debug, Clone)]
struct Trace(String);

/// Outermost: gives the request its id, the response and every log line about it the same, and counts.
pub(crate) async fn trace(State(edge): State<Arc<Edge>>, mut request: Request, next: Next) -> Response {
    let id = sane_trace(request.headers()).unwrap_or_else(|| {
        let [a, b, c, d, e, f, g, h, ..] = (edge.config.entropy)();
        format!("req_{:016x}", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    });
    request.extensions_mut().insert(Trace(id.clone()));
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", request_id = %id);
    let began = tokio::time::Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let _entered = span.enter();
    edge.metrics.responded(&route, response.status().as_u16(), began.elapsed());
    tracing::debug!(%route, status = response.status().as_u16(), "answered");
    // Checked to be plain ASCII, or made here.
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(TRACE_ID, value);
    }
    response
}

/// A client's own id, if it can be written to a log as it is.
fn sane_trace(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(TRACE_ID)?.to_str().ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    let fits = (1..=MAX_TRACE_ID_BYTES).contains(&id.len()) && id.chars().all(plain);
    fits.then(|| id.to_owned())
}

/// Of the address and the headers, each with its separators.
fn head_bytes(request: &Request) -> usize {
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len().saturating_add(value.len()));
    let path = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    fields.fold(path, |sum, field| sum.saturating_add(field).saturating_add(4))
}

pub(crate) async fn gate(State(edge): State<Arc<Edge>>, mut request: Request, next: Next) -> Response {
    let trace = request.extensions().get::<Trace>().map(|t| t.0.clone()).unwrap_or_default();
    // The connection's buffer may hold up to twice the limit.
    if head_bytes(&request) > MAX_HEAD_BYTES {
        let message = format!("The request's headers are larger than {MAX_HEAD_BYTES} bytes.");
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        return ApiError::new(status, "headers_too_large", message).into_response();
    }
    if request.uri().path() == "/health" || request.method() == Method::OPTIONS {
        return next.run(request).await;
    }
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
    if edge.config.door.is_some() {
        return stranger(edge, trace, peer, request, next).await;
    }
    let admitted = match stored(&edge, request.headers()).await {
        Some(known) => known,
        None => admit(&edge.config, request.headers(), request.uri(), peer).map(|key| (key, false)),
    };
    match admitted {
        Ok((key, manages)) => {
            request.extensions_mut().insert(Caller { trace, key, manages, address: String::new() });
            next.run(request).await
        }
        Err(error) => {
            tracing::warn!(?peer, status = error.status.as_u16(), "request turned away");
            error.into_response()
        }
    }
}

/// How every secret of a stored key begins. Others are left to the configured keys, and cost no look into the database.
pub const STORED_KEY_PREFIX: &str = "sk-satgrid-";

/// What a stored key says, if one is shown: its id and whether it manages.
async fn stored(edge: &Edge, headers: &HeaderMap) -> Option<Result<(Option<String>, bool), ApiError>> {
    edge.config.accounts.as_ref()?;
    let shown = shown_key(headers).filter(|shown| shown.starts_with(STORED_KEY_PREFIX))?;
    Some(account(edge, Sha256::digest(shown.as_bytes()).into()).await)
}

/// The stored key that is found by this hash: its id and whether it manages.
async fn account(edge: &Edge, hash: [u8; 32]) -> Result<(Option<String>, bool), ApiError> {
    let unknown = |said: String| ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", said);
    let Some(accounts) = &edge.config.accounts else { return Err(unknown(KeyDenied::Unknown.to_string())) };
    let account = accounts.admit(hash).await.map_err(|denied| match denied {
        KeyDenied::Unavailable { detail } => ServiceError::Internal { detail }.into(),
        KeyDenied::Unknown | KeyDenied::Revoked | KeyDenied::Expired => unknown(denied.to_string()),
    })?;
    for (key, per_minute) in &account.paces {
        edge.pace.take(key, *per_minute).map_err(ApiError::too_many)?;
    }
    Ok((Some(account.id), account.manages))
}

/// The front door's gate: a key, an L402 credential, or an open path; a completion without any is answered with a price.
async fn stranger(edge: Arc<Edge>, trace: String, peer: Option<IpAddr>, mut request: Request, next: Next) -> Response {
    let address = door::address(&edge, request.headers(), peer);
    let path = request.uri().path().to_owned();
    let admitted = match (door::credential(request.headers()), &edge.config.door) {
        (Some((token, preimage)), Some(desk)) => match desk.credential(token, preimage).await {
            Ok(hash) => account(&edge, hash).await,
            Err(error) => Err(error.into()),
        },
        (_, _) => match stored(&edge, request.headers()).await {
            Some(known) => known,
            None => {
                let pace = edge.pace.take(&format!("stranger {address}"), door::STRANGERS_PER_MINUTE);
                match pace.map_err(ApiError::too_many) {
                    Err(error) => Err(error),
                    Ok(()) if door::is_open(&path) => Ok((None, false)),
                    Ok(()) if request.method() == Method::POST && door::is_sold(&path) => {
                        return door::challenge(&edge, &address, request)
                            .await
                            .unwrap_or_else(IntoResponse::into_response);
                    }
                    Ok(()) => {
                        let message = "Show a key (POST /v1/topup makes one) or an L402 token.";
                        Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
                    }
                }
            }
        },
    };
    // What is free has its pace for those who paid once, too.
    let admitted = admitted.and_then(|known| {
        if let (Some(key), true) = (&known.0, door::is_open(&path)) {
            edge.pace.take(&format!("free {key}"), door::STRANGERS_PER_MINUTE).map_err(ApiError::too_many)?;
        }
        Ok(known)
    });
    match admitted {
        Ok((key, manages)) => {
            request.extensions_mut().insert(Caller { trace, key, manages, address });
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

/// The key's name, or `None` for a keyless caller that may come in.
fn admit(config: &ApiConfig, headers: &HeaderMap, uri: &Uri, peer: Option<IpAddr>) -> Result<Option<String>, ApiError> {
    let refused = |message: &str| ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
    let shown = shown_key(headers).filter(|_| !config.keys.is_empty());
    if let Some(shown) = shown {
        return match known_key(config, shown) {
            Some(name) => Ok(Some(name.to_owned())),
            None => Err(refused("Incorrect API key provided.")),
        };
    }
    let forwarded = headers.contains_key("x-forwarded-for") || headers.contains_key(header::FORWARDED);
    if !config.keyless_loopback || forwarded || !peer.is_some_and(|ip| ip.to_canonical().is_loopback()) {
        return Err(refused(
            "You didn't provide an API key. Send it as `Authorization: Bearer KEY`; keyless calls are for this machine only.",
        ));
    }
    let forbidden = |code, message: &str| Err(ApiError::new(StatusCode::FORBIDDEN, code, message));
    if headers.get(header::ORIGIN).is_some_and(|origin| !allows_origin(config, origin)) {
        return forbidden("origin_not_allowed", "Web pages of this origin may not call without a key.");
    }
    if !allows_host(config, headers, uri) {
        return forbidden("host_not_allowed", "Keyless calls must name this machine as `localhost` or by its address.");
    }
    Ok(None)
}

fn shown_key(headers: &HeaderMap) -> Option<&str> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then(|| key.trim());
    }
    headers.get(API_KEY)?.to_str().ok()
}

/// Looks at every key and every byte of its hash, whatever it finds.
fn known_key<'a>(config: &'a ApiConfig, shown: &str) -> Option<&'a str> {
    let shown: [u8; 32] = Sha256::digest(shown.as_bytes()).into();
    let mut found = None;
    for key in &config.keys {
        let difference = key.sha256.iter().zip(shown).fold(0, |sum, (a, b)| sum | (a ^ b));
        if std::hint::black_box(difference) == 0 {
            found = Some(key.name.as_str());
        }
    }
    found
}

/// Pages from this machine, and those that the operator named.
pub(crate) fn allows_origin(config: &ApiConfig, origin: &HeaderValue) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    if config.allowed_origins.iter().any(|allowed| allowed.trim_end_matches('/') == origin) {
        return true;
    }
    let local = origin.parse::<Uri>().ok().filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
    local.and_then(|uri| uri.host().map(is_this_machine)).unwrap_or(false)
}

fn allows_host(config: &ApiConfig, headers: &HeaderMap, uri: &Uri) -> bool {
    names_this_machine(headers, uri)
        || host(headers, uri)
            .is_some_and(|host| config.allowed_hosts.iter().any(|name| name.eq_ignore_ascii_case(&host)))
}

/// By address or as `localhost`. Without any name (HTTP/1.0) too: no browser sends that.
pub(crate) fn names_this_machine(headers: &HeaderMap, uri: &Uri) -> bool {
    if !headers.contains_key(header::HOST) && uri.authority().is_none() {
        return true;
    }
    // A name can be bound again by whoever owns it, an address cannot.
    host(headers, uri).is_some_and(|host| address(&host).is_some() || is_this_machine(&host))
}

fn host(headers: &HeaderMap, uri: &Uri) -> Option<String> {
    let authority = match headers.get(header::HOST) {
        Some(named) => named.to_str().ok()?.parse::<Authority>().ok()?,
        None => uri.authority()?.clone(),
    };
    Some(authority.host().to_owned())
}

fn is_this_machine(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost") || address(&host).is_some_and(|ip| ip.is_loopback())
}

fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ApiKey;

    fn check(keys: &[&str], peer: &str, headers: &[(&'static str, &str)], expect: Result<Option<&str>, u16>) {
        let config = ApiConfig {
            keys: keys.iter().map(|key| ApiKey::new(format!("name of {key}"), key)).collect(),
            allowed_origins: vec!["https://chat.example/".into()],
            allowed_hosts: vec!["gateway.lan".into()],
            ..ApiConfig::default()
        };
        let map = headers.iter().map(|(k, v)| (HeaderName::from_static(k), v.parse().unwrap())).collect();
        let got = admit(&config, &map, &Uri::from_static("/v1/models"), Some(peer.parse().unwrap()));
        let got = got.map_err(|error| error.status.as_u16());
        let got = got.as_ref().map(|key| key.as_deref()).map_err(|status| *status);
        assert_eq!(got, expect, "{keys:?} {peer} {headers:?}");
    }

    #[test]
    fn who_comes_in() {
        let (here, there) = ("127.0.0.1", "192.0.2.7");
        check(&[], here, &[], Ok(None));
        check(&[], "::1", &[], Ok(None));
        check(&[], "::ffff:127.0.0.1", &[], Ok(None));
        check(&[], there, &[], Err(401));
        // OpenAI's clients always send a key; without configured keys it means nothing.
        check(&[], here, &[("authorization", "Bearer sk-any")], Ok(None));
        check(&[], there, &[("authorization", "Bearer sk-any")], Err(401));

        check(&["sk-a", "sk-b"], there, &[("authorization", "Bearer sk-b")], Ok(Some("name of sk-b")));
        check(&["sk-a"], there, &[("authorization", "bearer sk-a")], Ok(Some("name of sk-a")));
        check(&["sk-a"], there, &[("x-api-key", "sk-a")], Ok(Some("name of sk-a")));
        check(&["sk-a"], there, &[("authorization", "Basic sk-a")], Err(401));
        check(&["sk-a"], here, &[("authorization", "Bearer sk-")], Err(401));
        check(&["sk-a"], here, &[], Ok(None));

        // A page in the user's browser.
        check(&[], here, &[("origin", "https://evil.example")], Err(403));
        check(&[], here, &[("origin", "null")], Err(403));
        check(&[], here, &[("origin", "http://localhost.evil.example")], Err(403));
        check(&[], here, &[("origin", "http://localhost:5173")], Ok(None));
        check(&[], here, &[("origin", "http://[::1]:5173")], Ok(None));
        check(&[], here, &[("origin", "https://chat.example")], Ok(None));
        check(&["sk-a"], here, &[("origin", "https://evil.example"), ("x-api-key", "sk-a")], Ok(Some("name of sk-a")));
        // A name that was bound again to this machine.
        check(&[], here, &[("host", "evil.example:8402")], Err(403));
        check(&[], here, &[("host", "127.0.0.1:8402")], Ok(None));
        check(&[], here, &[("host", "[::1]:8402")], Ok(None));
        check(&[], here, &[("host", "Localhost")], Ok(None));
        check(&[], here, &[("host", "gateway.lan:80")], Ok(None));
        // Behind a proxy everyone looks local.
        check(&[], here, &[("x-forwarded-for", "192.0.2.7")], Err(401));
    }

    #[test]
    fn only_plain_trace_ids_are_taken_over() {
        let long = "x".repeat(MAX_TRACE_ID_BYTES + 1);
        for (given, taken) in [("abc-1.2_3:4", true), ("", false), ("a b", false), ("a\"b", false), (&long, false)] {
            let mut headers = HeaderMap::new();
            headers.insert(TRACE_ID, given.parse().unwrap());
            assert_eq!(sane_trace(&headers).is_some(), taken, "{given:?}");
        }
    }
}
