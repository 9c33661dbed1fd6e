//! `satgrid devnet`: a chain and a relay on this machine, each a process of its own until it is told to stop; and the
//! demo, which starts these and more. It also writes the tiny model that is sold where only a market's behaviour counts.

use anyhow::Context;
use satgrid_engine::{
    experts::family::FAMILIES, facts::Pooling, tiny::TinyModel, tiny_bert::TinyBert, tiny_moe::TinyMoe,
};
use serde_json::json;
use std::fs::File;
use std::io::BufWriter;
use std::net::SocketAddr;
use std::path::Path;

use super::{demo, print};
use crate::cli::{DevnetCommand, Format, Globals, TinyMoeArgs, TinyPooling};
use crate::failure::HintExt;
use crate::signals;

pub(crate) fn run(globals: &Globals, command: &DevnetCommand) -> anyhow::Result<()> {
    let command = match command {
        DevnetCommand::Demo(args) => return demo::run(globals, args),
        DevnetCommand::TinyModel { file } => return tiny_model(file),
        DevnetCommand::TinyEmbedder { file, pooling } => return tiny_embedder(file, *pooling),
        DevnetCommand::Chain { listen, electrum, fee_rate } => Serve::Chain(*listen, *electrum, *fee_rate),
        DevnetCommand::TinyMoe { out, shape } => return tiny_moe(out, shape),
        DevnetCommand::Relay { listen } => Serve::Relay(*listen),
    };
    globals.start_logging()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Serve::Chain(listen, electrum, fee_rate) => {
                let ready = |address| announce(globals.format, "http", address);
                let chain = satgrid_devnet::run_chain(listen, electrum, fee_rate, ready, signals::stop());
                let served = chain.await;
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

/// A turn of the tiny model is a line, so that prompts stay short.
const TINY_TEMPLATE: &str = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// Conformance runs and benches sell it on a market of their own.
pub(super) fn tiny_model(path: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let mut out = BufWriter::new(File::create(path).with_context(cannot)?);
    let model = TinyModel { chat_template: Some(TINY_TEMPLATE.to_owned()), ..TinyModel::default() };
    model.write(&mut out).with_context(cannot)
}

/// A model that writes to the right takes the last row, as Qwen3's embedding models do; the others are BERTs.
fn tiny_embedder(path: &Path, pooling: TinyPooling) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let mut out = BufWriter::new(File::create(path).with_context(cannot)?);
    let written = match pooling {
        TinyPooling::Mean => TinyBert { pooling: Pooling::Mean, ..TinyBert::default() }.write(&mut out),
        TinyPooling::Cls => TinyBert { pooling: Pooling::Cls, ..TinyBert::default() }.write(&mut out),
        TinyPooling::Last => {
            let name = "tiny-random-embedder".to_owned();
            TinyModel { pooling: Some(Pooling::Last), name, ..TinyModel::default() }.write(&mut out)
        }
    };
    written.with_context(cannot)
}

fn tiny_moe(out: &Path, shape: &TinyMoeArgs) -> anyhow::Result<()> {
    let Some(family) = FAMILIES.iter().find(|family| family.architecture == shape.architecture) else {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.architecture).collect();
        return Err(anyhow::anyhow!("{:?} is not split by experts", shape.architecture)).hint(names.join(", "));
    };
    let model = TinyMoe {
        architecture: family.architecture,
        layers: shape.layers,
        n_embd: shape.width,
        n_ff: shape.expert_width,
        experts: shape.experts,
        used: shape.used,
        ..TinyMoe::default()
    };
    std::fs::write(out, model.to_bytes()?).with_context(|| format!("cannot write {}", out.display()))
}

enum Serve {
    Chain(SocketAddr, Option<SocketAddr>, u32),
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
