//! A server of Lightning addresses (LNURL-pay) on this machine: `alice` is paid by invoices of some node.

use serde_json::json;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

/// Serves until the test's runtime ends.
pub(crate) struct AddressServer {
    host: String,
    asked: Arc<AtomicUsize>,
}

impl AddressServer {
    /// Its first `failures` answers are that it is out of order; `invoice` makes an invoice over so many sat.
    pub(crate) async fn start(
        failures: usize,
        invoice: impl Fn(u64) -> String + Send + Sync + 'static,
    ) -> AddressServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(AtomicUsize::new(0));
        let (callback, count, invoice) = (format!("http://{host}/pay"), asked.clone(), Arc::new(invoice));
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut line = String::new();
                BufReader::new(&mut socket).read_line(&mut line).await.unwrap();
                let path = line.split_whitespace().nth(1).unwrap_or_default();
                let (status, body) = match path.strip_prefix("/pay?amount=") {
                    Some(msat) => {
                        let (sat, invoice) = (msat.parse::<u64>().unwrap() / 1_000, invoice.clone());
                        let made = tokio::task::spawn_blocking(move || invoice(sat)).await.unwrap();
                        ("200 OK", json!({ "pr": made, "routes": [] }))
                    }
                    None if path != "/.well-known/lnurlp/alice" => {
                        ("404 Not Found", json!({ "status": "ERROR", "reason": "nobody" }))
                    }
                    None if count.fetch_add(1, Ordering::SeqCst) < failures => ("503 Service Unavailable", json!({})),
                    None => {
                        let terms = json!({
                            "tag": "payRequest", "callback": callback, "minSendable": 1_000,
                            "maxSendable": 100_000_000, "metadata": "[[\"text/plain\",\"alice\"]]",
                        });
                        ("200 OK", terms)
                    }
                };
                let body = body.to_string();
                let head =
                    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}", body.len());
                let _ = socket.write_all(format!("{head}\r\nconnection: close\r\n\r\n{body}").as_bytes()).await;
            }
        });
        AddressServer { host, asked }
    }

    pub(crate) fn address(&self) -> String {
        format!("alice@{}", self.host)
    }

    /// How often its terms were asked for.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}
