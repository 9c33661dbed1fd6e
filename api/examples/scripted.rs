//! A TEST SERVICE: the edge in front of a script, for trying HTTP clients by hand. No model, no market, no money.
//!
//! `cargo run -p satgrid-api --example scripted -- 127.0.0.1:8402`; the model's name picks what happens, see
//! `tests/support/mod.rs`. Ends on Ctrl-C.
#![allow(clippy::unwrap_used, reason = "a tool for tests; its script is shared with them")]

use std::sync::Arc;

#[path = "../tests/support/mod.rs"]
mod support;

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:0".into());
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("scripted test service, no model behind it: http://{}/v1", listener.local_addr()?);
    let service = Arc::new(support::Scripted::default());
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    satgrid_api::serve(listener, service, satgrid_api::ApiConfig::default(), interrupted).await
}
