//! Clients that mean harm, over real sockets: what they get is bounded and clear, and others are still served.
//!
//! Where a limit is a wait, time is moved: the runtime jumps to the next timer when nothing else can happen.
#![allow(clippy::unwrap_used)]

mod support;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use satgrid_api::{Api, ApiConfig};
use serde_json::{Value, json};
use support::Scripted;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

/// Of a body that a client claims to send or sends.
const HUGE: usize = 100 << 20;

struct Node {
    address: SocketAddr,
    service: Arc<Scripted>,
    _stop: oneshot::Sender<()>,
}

async fn node(config: ApiConfig) -> Node {
    let service = Arc::new(Scripted::default());
    let api = Api::new(service.clone(), config);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let address = listener.local_addr().unwrap();
    tokio::spawn(api.serve(listener, async {
        let _ = stopped.await;
    }));
    Node { address, service, _stop: stop }
}

impl Node {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends it all and reads until the other side closes.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut socket = self.connect().await;
        // A server that has heard enough closes before everything is sent.
        let _ = socket.write_all(bytes).await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn post(&self, path: &str, body: &[u8]) -> (u16, Value) {
        let length = body.len();
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        let answer = self.raw(&[head.as_bytes(), body].concat()).await;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, serde_json::from_str(body).unwrap_or_default())
    }

    async fn is_well(&self) {
        let (status, _) = self.post("/v1/chat/completions", chat(&json!({})).to_string().as_bytes()).await;
        assert_eq!(status, 200, "an honest client is served");
    }
}

fn chat(extra: &Value) -> Value {
    let mut body = json!({"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// Resident memory of this process.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4_096
}

#[tokio::test]
async fn bombs_and_broken_text_are_told_by_place() {
    let node = node(ApiConfig::default()).await;
    let deep = "[".repeat(1 << 20);
    let objects = r#"{"a":"#.repeat(1 << 18);
    let inside = format!(r#"{{"model":"org/tiny","messages":{}1{}}}"#, "[".repeat(5_000), "]".repeat(5_000));
    let schema = format!(
        r#"{{"model":"org/tiny","messages":[{{"role":"user","content":"hi"}}],"response_format":{{"type":"json_schema","json_schema":{{"name":"n","schema":{}{}}}}}}}"#,
        r#"{"items":"#.repeat(1_000),
        "true".to_owned() + &"}".repeat(1_000)
    );
    let mut not_text = chat(&json!({})).to_string().into_bytes();
    let at = not_text.windows(2).position(|pair| pair == b"hi").unwrap();
    not_text[at] = 0xff;
    let overlong = [b"{\"model\":\"", &[0xc0, 0x80][..], b"\"}"].concat();
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/tokenize"] {
        for body in [deep.as_bytes(), objects.as_bytes(), inside.as_bytes(), schema.as_bytes(), &not_text, &overlong] {
            let (status, answer) = node.post(path, body).await;
            assert_eq!((status, answer["error"]["code"].as_str()), (400, Some("invalid_json")), "{path} {answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains("line "), "{answer}");
        }
    }
    for path in ["/v1/models/%ff%fe", "/v1/generations/%00", "/v1/%2e%2e/%2e%2e/etc"] {
        let answer =
            node.raw(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes()).await;
        let status: u16 = answer.split(' ').nth(1).unwrap().parse().unwrap();
        assert!((400..500).contains(&status), "{path}: {answer}");
    }
    node.is_well().await;
}

#[tokio::test]
async fn numbers_of_any_size_are_refused_by_name_or_mean_what_they_say() {
    let node = node(ApiConfig::default()).await;
    let numbers = [
        "-1",
        "-0.0001",
        "1e308",
        "-1e308",
        "18446744073709551616",
        "-9223372036854775809",
        "4294967296",
        "0.5",
        "1e-300",
    ];
    let fields = [
        "max_tokens",
        "max_completion_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repeat_penalty",
        "top_logprobs",
    ];
    for field in fields {
        for number in numbers {
            let body = chat(&json!({})).to_string().replacen('{', &format!("{{\"{field}\":{number},"), 1);
            let (status, answer) = node.post("/v1/chat/completions", body.as_bytes()).await;
            let named = answer["error"]["param"] == field;
            assert!(status == 200 || (status == 400 && named), "{field} {number}: {status} {answer}");
        }
        // What no JSON number is.
        for text in ["NaN", "Infinity", "1e999999999", "0x10", "01"] {
            let body = chat(&json!({})).to_string().replacen('{', &format!("{{\"{field}\":{text},"), 1);
            let (status, answer) = node.post("/v1/chat/completions", body.as_bytes()).await;
            assert_eq!(
                (status, answer["error"]["code"].as_str()),
                (400, Some("invalid_json")),
                "{field} {text}: {answer}"
            );
        }
    }
    let (status, answer) =
        node.post("/v1/chat/completions", chat(&json!({"logit_bias": {"4294967296": 1}})).to_string().as_bytes()).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("logit_bias")));
}

#[tokio::test]
async fn every_wrong_type_names_its_parameter_and_unknown_fields_do_not_matter() {
    let node = node(ApiConfig::default()).await;
    let wrong = [json!(true), json!(7), json!("x"), json!([]), json!([[1]]), json!({}), json!({"a": 1}), json!([null])];
    let fields = [
        "model",
        "messages",
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "presence_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "models",
        "provider",
        "modalities",
        "functions",
        "user",
        "metadata",
        "store",
    ];
    for field in fields {
        for value in &wrong {
            let mut body = chat(&json!({}));
            body[field] = value.clone();
            let (status, answer) = node.post("/v1/chat/completions", body.to_string().as_bytes()).await;
            let param = answer["error"]["param"].as_str().unwrap_or_default();
            let fits = match status {
                200 => true,
                400 => param.starts_with(field),
                // A model of that name, and keys without a `stream`, are no matter of types.
                404 => field == "model",
                _ => false,
            };
            assert!(fits, "{field} {value}: {status} {answer}");
        }
    }
    let unknown = json!({"x": 1, "deep": {"er": [[]]}, "": "", "Model": 3, "__proto__": {}, "constructor": null});
    let (status, _) = node.post("/v1/chat/completions", chat(&unknown).to_string().as_bytes()).await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_hundred_megabytes_are_refused_before_they_are_held() {
    let node = node(ApiConfig::default()).await;
    node.is_well().await;
    let before = resident();
    // Claimed: refused by the claim alone.
    let claimed = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {HUGE}\r\n\r\n");
    let mut socket = node.connect().await;
    socket.write_all(claimed.as_bytes()).await.unwrap();
    let mut answer = vec![0; 64];
    let read = socket.read(&mut answer).await.unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 413"), "{}", String::from_utf8_lossy(&answer));
    // Sent in pieces that claim nothing: refused at the limit. The kernel holds a little on the way.
    let mut socket = node.connect().await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let piece = [b"10000\r\n".as_slice(), &[b' '; 0x1_0000], b"\r\n"].concat();
    let mut sent = 0;
    while sent < HUGE && socket.write_all(&piece).await.is_ok() {
        sent += piece.len();
    }
    assert!(sent < HUGE / 2, "{sent} bytes were taken");
    assert!(node.service.calls.lock().unwrap().len() == 1, "none of it reached the service");
    let grown = resident().saturating_sub(before);
    assert!(grown < HUGE / 2, "{grown} bytes more are resident");
    node.is_well().await;
}

#[tokio::test]
async fn a_client_that_only_writes_gets_to_its_413() {
    const SENT: usize = 12 << 20;
    let node = node(ApiConfig::default()).await;
    // It looks for an answer once everything is sent, as many clients do; a connection closed before would break its pipe.
    let claimed = format!("Content-Length: {SENT}\r\n\r\n").into_bytes();
    let chunks = [b"10000\r\n".as_slice(), &[b' '; 0x1_0000], b"\r\n"].concat().repeat(SENT >> 16);
    let pieces = [b"Transfer-Encoding: chunked\r\n\r\n".as_slice(), &chunks, b"0\r\n\r\n"].concat();
    for (path, rest, status) in [
        ("/v1/chat/completions", [claimed.as_slice(), &vec![b' '; SENT]].concat(), "413"),
        ("/v1/chat/completions", pieces, "413"),
        ("/v1/nothing", [claimed.as_slice(), &vec![b' '; SENT]].concat(), "404"),
    ] {
        let mut socket = node.connect().await;
        let head = format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        socket.write_all(&[head.as_bytes(), &rest].concat()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
    }
    // One that asks first is told so at once, and not to go on.
    let mut socket = node.connect().await;
    let asks = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {SENT}\r\n\r\n"
    );
    socket.write_all(asks.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn bodies_that_come_slowly_keep_nobody_out() {
    // Room for four bodies of the largest size, and for two answers at a time.
    let config =
        ApiConfig { max_body_bytes: 64 << 10, max_reading_bytes: 256 << 10, max_in_flight: 2, ..ApiConfig::default() };
    let node = node(config).await;
    let begun = |sent: usize| {
        let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65536\r\n\r\n";
        [head.as_bytes(), &vec![b' '; sent]].concat()
    };
    let mut slow = Vec::new();
    for _ in 0..8 {
        let mut socket = node.connect().await;
        socket.write_all(&begun(100)).await.unwrap();
        slow.push(socket);
    }
    node.is_well().await;
    // What has really come fills the room: then others are told to come again.
    for _ in 0..4 {
        let mut socket = node.connect().await;
        socket.write_all(&begun(60_000)).await.unwrap();
        slow.push(socket);
    }
    let told = async {
        loop {
            let (status, answer) = node.post("/v1/chat/completions", chat(&json!({})).to_string().as_bytes()).await;
            if status == 503 {
                return answer;
            }
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), told).await.unwrap();
    assert_eq!(answer["error"]["code"], "busy");
    drop(slow);
    let served =
        async { while node.post("/v1/chat/completions", chat(&json!({})).to_string().as_bytes()).await.0 != 200 {} };
    tokio::time::timeout(Duration::from_secs(20), served).await.unwrap();
}

#[tokio::test]
async fn floods_of_headers_end_at_the_limit() {
    let node = node(ApiConfig::default()).await;
    let many: String = (0..10_000).map(|i| format!("X-H{i}: y\r\n")).collect();
    let long = format!("X-Long: {}\r\n", "y".repeat(1 << 20));
    let path = "x".repeat(1 << 20);
    for flood in [
        format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{many}\r\n"),
        format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{long}\r\n"),
        format!("GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!(
            "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\nConnection: close\r\n\r\n",
            &long[..70_000]
        ),
        "\0\0\0 not http\r\n\r\n".to_owned(),
    ] {
        let answer = node.raw(flood.as_bytes()).await;
        // The answer may be lost where the client still sent when the server closed.
        let refused =
            answer.is_empty() || ["400", "414", "431"].iter().any(|s| answer.starts_with(&format!("HTTP/1.1 {s}")));
        assert!(refused, "{}", answer.chars().take(200).collect::<String>());
    }
    node.is_well().await;
}

/// The clock jumps, so that half a minute of silence takes no time.
#[tokio::test(start_paused = true)]
async fn a_head_that_never_ends_is_hung_up_on() {
    let node = node(ApiConfig::default()).await;
    let began = tokio::time::Instant::now();
    for start in ["", "GET /hea", "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-A: "] {
        let answer = node.raw(start.as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    assert!(began.elapsed() < Duration::from_secs(120), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_is_408() {
    let node = node(ApiConfig::default()).await;
    let head =
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{";
    let answer = node.raw(head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_connections_hold_no_more_than_their_number_of_slots() {
    let node = node(ApiConfig { max_connections: 64, ..ApiConfig::default() }).await;
    let before = resident();
    // In waves, since this process holds both ends: more than the slots and less than the kernel's queue at once.
    for _ in 0..100 {
        let mut held = Vec::new();
        for _ in 0..100 {
            held.push(node.connect().await);
        }
        drop(held);
    }
    // Silent ones have the slots; they are hung up on, and then it is an honest client's turn.
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(node.connect().await);
    }
    node.is_well().await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more are resident");
}

#[tokio::test]
async fn a_thousand_idle_streams_fit_into_a_hundred_megabytes() {
    const CLIENTS: usize = 1_000;
    let config = ApiConfig { max_in_flight: CLIENTS, max_connections: CLIENTS + 8, ..ApiConfig::default() };
    let node = node(config).await;
    let before = resident();
    let body = chat(&json!({"model": "hangs", "stream": true})).to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut clients = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        let mut socket = node.connect().await;
        socket.write_all(request.as_bytes()).await.unwrap();
        clients.push(socket);
    }
    for socket in &mut clients {
        let mut seen = [0; 2_048];
        let mut text = String::new();
        while !text.contains("Hel") {
            let read = socket.read(&mut seen).await.unwrap();
            assert!(read > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&seen[..read]));
        }
    }
    // Both ends are in this process, so this is more than a server alone would hold.
    let grown = resident().saturating_sub(before);
    eprintln!("{CLIENTS} idle streams: {} kB resident in all, both ends", grown >> 10);
    assert!(grown < 100_000_000, "{grown} bytes for {CLIENTS} idle streams");
}
