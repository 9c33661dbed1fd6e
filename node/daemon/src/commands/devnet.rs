//! `satgrid devnet`: a chain and a relay on this machine, each a process of its own until it is told to stop; and the
//! demo, which starts these and more.

use anyhow::Context;
use serde_json::json;
use std::net::SocketAddr;

use super::{demo, print};
use crate::cli::{DevnetCommand, Format, Globals};
use crate::failure::HintExt;
use crate::signals;

pub(crate) fn run(globals: &Globals, command: &DevnetCommand) -> anyhow::Result<()> {
    let command = match command {
        DevnetCommand::Demo(args) => return demo::run(globals, args),
        DevnetCommand::Chain { listen, electrum } => Serve::Chain(*listen, *electrum),
        DevnetCommand::Relay { listen } => Serve::Relay(*listen),
    };
    globals.start_logging()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Serve::Chain(listen, electrum) => {
                let ready = |address| announce(globals.format, "http", address);
                let served = satgrid_devnet::run_chain(listen, electrum, ready, signals::stop()).await;
                served.context("the chain cannot be served").hint("choose another loopback address with --listen")
            }
            Serve::Relay(listen) => {
                let ready = |address| announce(globals.format, "ws", address);
                let served = satgrid_devnet::run_relay(listen, ready, signals::stop()).await;
                served.context("the relay cannot be served").hint("choose another loopback address with --listen")
            }
        }
    })
}

enum Serve {
    Chain(SocketAddr, Option<SocketAddr>),
    Relay(SocketAddr),
}

/// Whoever started us reads the address from standard output.
fn announce(format: Format, scheme: &str, address: SocketAddr) {
    let url = format!("{scheme}://{address}");
    let printed = match format {
        Format::Text => print::out(&url),
        Format::Json => print::json(&json!({ "url": url })),
    };
    if let Err(error) = printed {
        tracing::warn!(%error, "nobody hears where this listens");
    }
}
