//! `satgrid devnet demo`: a whole market on this machine, one paid answer, and a bill that adds up to the msat.
//!
//! Every part is a process of its own, started from this same binary: a regtest chain, a Nostr relay, two providers
//! with different prices and a consumer's gateway. This command only does what an operator could do by hand: it writes
//! configurations, mines blocks, opens channels, sends one HTTP request, reads the wallets' lists and the exported
//! ledgers, and compares. It decides nothing about money and sees nothing that the nodes do not show.
//!
//! | file | what it does |
//! |---|---|
//! | `children` | processes that end when this one does |
//! | `nodes` | folders, seeds and configurations; the processes of the market |
//! | `client` | the nodes' admin ports and the chain's RPC |
//! | `funding` | coins, channels, listings: until the market is ready |
//! | `chat` | one streamed completion over plain HTTP |
//! | `experts` | with `--experts`: a model split over a lead and workers, and the proof that it is exact |
//! | `ledgers` | both sides' exports, read back and verified |
//! | `bill` | what was paid, held against every other account of it |
//! | `show` | tables for people |
//! | `on_toy` | a bench in test builds: the same market with the toy engine, at a fixed rate |

mod bill;
mod chat;
mod children;
mod client;
mod experts;
mod funding;
mod ledgers;
mod nodes;
#[cfg(test)]
pub(super) mod on_toy;
mod show;

use anyhow::{Context, bail};
use serde_json::json;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::print;
use crate::cli::{DemoArgs, Format, Globals};
use crate::failure::{Findings, HintExt};
use crate::models::{CATALOGUE, CHUNK_BYTES, HubOptions, Reference, Store, identify, inspect, pull};
use crate::progress::Bytes;
use crate::signals;
use nodes::{ForSale, Market, Prices};

/// Where everything is put when `--dir` names nothing else; inside the checkout, where `make demo` runs.
const DEFAULT_DIR: &str = ".demo";
/// A base model continues text; these lines leave it something to say.
const PROMPT: &str = "The history of money is a history of trust. At first people traded goods for goods. Later they";

/// Says on standard error what goes on, with the time since the start.
#[derive(Clone)]
struct Clock(Arc<Instant>);

impl Clock {
    fn start() -> Clock {
        Clock(Arc::new(Instant::now()))
    }
    fn say(&self, text: impl std::fmt::Display) {
        eprintln!("[{:5.1} s] {text}", self.0.elapsed().as_secs_f32());
    }
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

pub(super) fn run(globals: &Globals, args: &DemoArgs) -> anyhow::Result<()> {
    // `--dir` names the demo's folder here, and no node's.
    let models = Globals { dir: None, ..globals.clone() }.load()?.config.models;
    let clock = Clock::start();
    free_port(args.port)?;
    let dir = std::path::absolute(globals.dir.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_DIR)))?;
    let (for_sale, dir) = if args.experts {
        let dir = nodes::fresh_dir(&dir)?;
        let (path, parts) = experts::prepare(&dir)?;
        if globals.format == Format::Text {
            print::out(&experts::show_map(&parts))?;
        }
        (ForSale { parts: Some(parts), ..for_sale(&models, args, Some(&path))? }, dir)
    } else {
        (for_sale(&models, args, args.model.as_deref())?, nodes::fresh_dir(&dir)?)
    };
    // One thread: a child is told of its parent's end when the thread that started it ends.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut market = Market::new(dir.clone(), clock.clone());
        let mut interrupted = false;
        let walked = tokio::select! {
            walked = walk(globals, args, &mut market, &for_sale) => walked,
            () = signals::stop() => {
                interrupted = true;
                Err(anyhow::anyhow!("interrupted"))
            }
        };
        match &walked {
            Ok(_) if args.keep => {
                eprint!("{}", show::try_it(&market, &for_sale));
                signals::stop().await;
            }
            Err(_) if !interrupted => market.show_why(),
            Ok(_) | Err(_) => {}
        }
        market.stop().await;
        clock.say(format!("everything is stopped; logs, ledgers and the bill are in {}", dir.display()));
        if walked? { Ok(()) } else { Err(anyhow::Error::new(Findings)) }
    })
}

/// From nothing to a paid and proven answer; whether everything adds up.
async fn walk(globals: &Globals, args: &DemoArgs, market: &mut Market, for_sale: &ForSale) -> anyhow::Result<bool> {
    market.start(args.port, for_sale).await?;
    funding::fund(market).await?;
    funding::open_channels(market).await?;
    funding::wait_for_listings(market).await?;
    let before = bill::Wallets::read(market).await?;

    let request = chat::Request {
        url: market.api_url(),
        model: for_sale.name.clone(),
        prompt: args.prompt.clone().unwrap_or_else(|| PROMPT.to_owned()),
        max_tokens: args.max_tokens,
    };
    if !for_sale.has_template {
        market.clock.say("this model has no chat template: it gets the prompt as it stands, and continues it");
    }
    let aloud = globals.format == Format::Text;
    let chat = chat::stream(market, &request, aloud, args.kill_provider_after).await?;
    funding::revive(market).await?;
    let settled = bill::settle(market, &before).await?;
    let ledgers = ledgers::export_and_verify(market).await?;
    let bill = bill::Bill::draw(market, &chat, &before, settled, ledgers)?;
    let described = market.describe(for_sale);
    let proof = match &for_sale.parts {
        Some(_) => Some(experts::prove(market, &request, &chat).await?),
        None => None,
    };
    let took = market.clock.elapsed();

    let document = json!({
        "market": described, "chat": chat, "bill": bill, "experts": proof, "elapsed_ms": took.as_millis(),
    });
    std::fs::write(market.dir.join("bill.json"), serde_json::to_vec_pretty(&document)?)?;
    match globals.format {
        Format::Json => print::json(&document)?,
        Format::Text => print::out(&show::bill(&bill, &chat))?,
    }
    market.clock.say(match bill.adds_up() {
        true => "every sum matches to the msat, and both ledgers verify",
        false => "SOMETHING DOES NOT MATCH: see the list above",
    });
    if let Some(proof) = &proof {
        market.clock.say(proof.say());
    }
    Ok(bill.adds_up() && proof.is_none_or(|proof| proof.holds()))
}

/// The one port that people type. Better said now than after half a minute.
fn free_port(port: u16) -> anyhow::Result<()> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .map(drop)
        .with_context(|| format!("port {port} on 127.0.0.1 is taken"))
        .hint("stop what listens there (perhaps another demo), or choose another with --port")
}

/// The model, in the store and known by its root.
fn for_sale(config: &crate::config::Models, args: &DemoArgs, file: Option<&Path>) -> anyhow::Result<ForSale> {
    let store = Store::new(&config.dir);
    let (name, path, has_template, catalogue) = match file {
        Some(file) => own_model(&store, file)?,
        None => known_model(&store)?,
    };
    let mut catalogue = catalogue;
    let also = match &args.also {
        Some(file) => {
            let (name, path, _, known) = own_model(&store, file)?;
            catalogue = Some(catalogue.unwrap_or_default() + &known.unwrap_or_default());
            Some((name, path))
        }
        None => None,
    };
    Ok(ForSale {
        name,
        path,
        also,
        has_template,
        catalogue,
        slots: args.slots,
        short_acks: !args.default_acks,
        profile: args.profile.clone(),
        prices: Prices::new(args.input_price, args.output_price),
        threads: args.threads,
        models_dir: config.dir.clone(),
        parts: None,
    })
}

/// Name, file, whether it has a chat template, and what the consumer's catalogue says of it.
type Model = (String, PathBuf, bool, Option<String>);

/// The first model that this build knows, fetched where it is not in the store.
fn known_model(store: &Store) -> anyhow::Result<Model> {
    let Some(entry) = CATALOGUE.first() else { bail!("this build knows no model; name one with --model") };
    let hub = HubOptions { chunk_bytes: CHUNK_BYTES, endpoint: None, token: None };
    let pulled = pull(store, &Reference::Catalogue(entry), None, &hub, Bytes::new);
    let pulled = pulled.hint("--model FILE uses a GGUF file of yours instead")?;
    let has_template = inspect(&pulled.path)?.has_template;
    Ok((pulled.record.name, pulled.path, has_template, None))
}

fn own_model(store: &Store, file: &Path) -> anyhow::Result<Model> {
    let path = std::path::absolute(file)?;
    let identified = match identify(store, &path, Bytes::new) {
        Ok(identified) => identified,
        Err(fault) => {
            let hint = fault.hint();
            return Err(anyhow::Error::new(fault).context(format!("{} cannot be sold", path.display()))).hint(hint);
        }
    };
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    // The consumer trusts roots, not names: what it is to buy under this name is written into its own catalogue.
    let catalogue = format!(
        "[[model]]\nname = {}\nquantisation = {}\nroot = \"{}\"\ntokenizer = \"{}\"\n",
        toml::Value::from(stem.as_str()),
        toml::Value::from(identified.inspected.facts.quantisation.as_str()),
        hex::encode(identified.root),
        hex::encode(identified.inspected.tokenizer.hash),
    );
    Ok((stem, path, identified.inspected.has_template, Some(catalogue)))
}
