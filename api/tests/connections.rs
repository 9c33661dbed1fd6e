//! The edge over real sockets on loopback: disconnects, shutdown in two steps, the admin port.
//!
//! Waits are for events, not for time; the limits below only end a test that hangs.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use satgrid_api::{AdminError, Api, ApiConfig, ApiMetrics, MetricsRegistry, admin_router, serve_admin};
use support::Scripted;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

const HANGING: Duration = Duration::from_secs(20);

struct Node {
    address: SocketAddr,
    service: Arc<Scripted>,
    metrics: Arc<ApiMetrics>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

async fn node(config: ApiConfig) -> Node {
    let service = Arc::new(Scripted::default());
    let api = Api::new(service.clone(), config);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let (address, metrics) = (listener.local_addr().unwrap(), api.metrics());
    let server = tokio::spawn(api.serve(listener, async {
        let _ = stopped.await;
    }));
    Node { address, service, metrics, stop, server }
}

fn request(model: &str, stream: bool) -> String {
    let body = format!(r#"{{"model":"{model}","stream":{stream},"messages":[{{"role":"user","content":"hi"}}]}}"#);
    format!("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

async fn send(address: SocketAddr, request: &str) -> BufReader<TcpStream> {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    BufReader::new(socket)
}

async fn read_until(socket: &mut BufReader<TcpStream>, mark: &str) -> String {
    let mut seen = String::new();
    let reading = async {
        while !seen.contains(mark) {
            let bytes = socket.fill_buf().await.unwrap();
            assert!(!bytes.is_empty(), "ended before {mark:?}: {seen}");
            let taken = bytes.len();
            seen.push_str(&String::from_utf8_lossy(bytes));
            socket.consume(taken);
        }
    };
    tokio::time::timeout(HANGING, reading).await.unwrap_or_else(|_| panic!("no {mark:?}"));
    seen
}

async fn eventually(what: &str, met: impl Fn() -> bool) {
    let polling = async {
        while !met() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(HANGING, polling).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn a_closed_socket_cancels_the_work() {
    let node = node(ApiConfig::default()).await;
    let mut socket = send(node.address, &request("hangs", true)).await;
    read_until(&mut socket, "Hel").await;
    assert_eq!(node.metrics.open_streams(), 1);
    drop(socket);
    eventually("the stream was cancelled", || node.service.cancelled.load(Ordering::SeqCst) == 1).await;

    let socket = send(node.address, &request("hangs", false)).await;
    eventually("the call arrived", || node.service.calls.lock().unwrap().len() == 2).await;
    drop(socket);
    eventually("the call was cancelled", || node.service.cancelled.load(Ordering::SeqCst) == 2).await;
    eventually("no stream is open", || node.metrics.open_streams() == 0).await;
}

#[tokio::test]
async fn a_reader_that_stops_reading_costs_bounded_memory() {
    let node = node(ApiConfig::default()).await;
    let mut socket = send(node.address, &request("endless", true)).await;
    read_until(&mut socket, "xxx").await;
    // The kernel's socket buffers fill, then the channel, then nothing more is produced, far under the reply's limit.
    let mut last = 0;
    let still = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = node.service.produced.load(Ordering::SeqCst);
            if now == last {
                return now;
            }
            last = now;
        }
    };
    let produced = tokio::time::timeout(HANGING, still).await.unwrap();
    // Each event holds 1 KiB of text.
    assert!(produced * 1_024 < 16 << 20, "{produced}");
    let before = produced;
    let mut sink = vec![0; 1 << 20];
    socket.read_exact(&mut sink).await.unwrap();
    eventually("reading lets the work go on", || node.service.produced.load(Ordering::SeqCst) > before).await;
}

#[tokio::test]
async fn a_reader_that_takes_nothing_more_loses_its_place() {
    let stalled_reader = Duration::from_millis(200);
    let node = node(ApiConfig { stalled_reader, max_connections: 1, ..ApiConfig::default() }).await;
    let mut stuck = send(node.address, &request("endless", true)).await;
    read_until(&mut stuck, "xxx").await;
    let mut next = send(node.address, &request("org/tiny", false)).await;
    assert!(read_until(&mut next, "receipt_ids").await.contains("200 OK"));
}

#[tokio::test]
async fn shutdown_lets_a_stream_finish() {
    let node = node(ApiConfig::default()).await;
    let mut socket = send(node.address, &request("gated", true)).await;
    read_until(&mut socket, "Hel").await;
    node.stop.send(()).unwrap();
    eventually("new connections are refused", || std::net::TcpStream::connect(node.address).is_err()).await;
    node.service.gate.notify_one();
    read_until(&mut socket, "[DONE]").await;
    tokio::time::timeout(HANGING, node.server).await.unwrap().unwrap().unwrap();
    assert_eq!(node.service.cancelled.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn shutdown_ends_what_outlives_its_limit() {
    let node = node(ApiConfig { drain: Duration::from_millis(50), ..ApiConfig::default() }).await;
    let mut stream = send(node.address, &request("hangs", true)).await;
    read_until(&mut stream, "Hel").await;
    let mut whole = send(node.address, &request("hangs", false)).await;
    eventually("both arrived", || node.service.calls.lock().unwrap().len() == 2).await;
    node.stop.send(()).unwrap();
    assert!(read_until(&mut stream, "\"error\"").await.contains("shutting down"));
    assert!(read_until(&mut whole, "\"error\"").await.contains("503"));
    tokio::time::timeout(HANGING, node.server).await.unwrap().unwrap().unwrap();
    assert_eq!(node.service.cancelled.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let node = node(ApiConfig::default()).await;
    let mut socket = send(node.address, &request("org/tiny", false)).await;
    for _ in 0..3 {
        assert!(read_until(&mut socket, "receipt_ids").await.contains("200 OK"));
        socket.write_all(request("org/tiny", false).as_bytes()).await.unwrap();
    }
    assert!(read_until(&mut socket, "receipt_ids").await.contains("200 OK"));
}

#[tokio::test]
async fn the_admin_port_is_for_this_machine() {
    let everywhere = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let service = Arc::new(Scripted::default());
    let mut figures = MetricsRegistry::default();
    let api = Api::new(service.clone(), ApiConfig::default());
    figures.register(api.metrics());
    let refused = serve_admin(everywhere, admin_router(service.clone(), figures.clone()), async {}).await;
    assert!(matches!(refused, Err(AdminError::NotLoopback(_))));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(serve_admin(listener, admin_router(service, figures), async {
        let _ = stopped.await;
    }));
    for (path, extra, status, holds) in [
        ("/health", "Host: localhost", "200", "\"ok\""),
        ("/metrics", "Host: 127.0.0.1", "200", "# TYPE satgrid_api_streams_open gauge"),
        ("/metrics", "Host: evil.example", "403", "host_not_allowed"),
        ("/metrics", "Host: localhost\r\nOrigin: https://evil.example", "403", "host_not_allowed"),
        ("/v1/models", "Host: localhost", "404", "not_found"),
    ] {
        let head = format!("GET {path} HTTP/1.1\r\n{extra}\r\nConnection: close\r\n\r\n");
        let mut answer = String::new();
        send(address, &head).await.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(holds),
            "{path} {extra}: {answer}"
        );
    }
    stop.send(()).unwrap();
    tokio::time::timeout(HANGING, server).await.unwrap().unwrap().unwrap();
}
