//! `satgrid market list` and `satgrid market why`: read the relays as a consumer would, and say what is there.

mod experts;
mod why_layers;

use super::print;
use crate::cli::{Format, Globals, MarketCommand};
use crate::config::Config;
use crate::drive::{
    market::{Listening, Market},
    now,
};
use crate::failure::{Findings, HintExt};
use anyhow::Context;
use satgrid_market::{Demand, Verdict};
use satgrid_types::VerifiedListing;
use serde_json::{Value, json};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How long the relays may take to send what they have.
const SYNC_WITHIN: Duration = Duration::from_secs(5);
/// Listings are applied in the background: they are all there once nothing has changed for so long.
const SETTLE: Duration = Duration::from_millis(150);

pub(super) fn run(globals: &Globals, command: &MarketCommand) -> anyhow::Result<()> {
    let config = globals.load()?.config;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let (market, listening) = read_relays(&config).await?;
        match command {
            MarketCommand::List => list(globals.format, &market, &listening),
            MarketCommand::Keys => keys(globals.format, &market),
            MarketCommand::Why { model, prompt, output } => {
                let led = config.provider.models.iter().find(|sold| sold.buy_experts && sold.listed_name() == *model);
                if let Some(led) = led {
                    return experts::why(globals.format, &config, &market, led).await;
                }
                why(globals.format, &config, &market, model, *prompt, *output).await
            }
        }
    })
}

async fn read_relays(config: &Config) -> anyhow::Result<(Market, Listening)> {
    let market = Market::new(crate::up::catalogue(config)?);
    let relays = config.market.relays.clone();
    let listening = Listening::start(&market, relays, None, None, CancellationToken::new())
        .await
        .context("market.relays cannot be used")
        .hint("name at least one relay in market.relays")?;
    let asked = config.market.relays.len();
    let answered = listening.synced(SYNC_WITHIN).await;
    if answered < asked {
        for relay in listening.health().borrow().iter().filter(|relay| !relay.connected) {
            let why = relay.last_error.as_deref().unwrap_or("no answer");
            eprintln!("warning: relay {} is not connected: {why}", relay.url);
        }
    }
    // Signatures are checked behind the relays' last word: what is heard grows for a while yet on a busy machine.
    let began = std::time::Instant::now();
    let mut before = None;
    while began.elapsed() < SYNC_WITHIN {
        tokio::time::sleep(SETTLE).await;
        let heard = (market.live().len(), market.refusals(), listening.counters());
        if before.replace(heard.clone()) == Some(heard) {
            break;
        }
    }
    Ok((market, listening))
}

fn list(format: Format, market: &Market, listening: &Listening) -> anyhow::Result<()> {
    let live = market.live();
    match format {
        Format::Json => print::json(&live.iter().map(|listing| listing_json(listing)).collect::<Vec<_>>())?,
        Format::Text => {
            let header = [
                "MODEL", "QUANT", "PROVIDER", "IN", "CACHED", "OUT", "CONTEXT", "SLOTS", "PROFILE", "TOK/S", "VERIFIED",
            ];
            let rows = live.iter().map(|l| row(market, l)).collect();
            print::out(&print::table(&header, rows))?;
            eprintln!("{} live listings; prices in msat per million tokens", live.len());
        }
    }
    let refused: Vec<String> = listening
        .counters()
        .into_iter()
        .chain(market.refusals())
        .filter(|(reason, count)| *count > 0 && !matches!(*reason, "accepted" | "duplicate"))
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    if !refused.is_empty() {
        eprintln!("refused: {}", refused.join(", "));
    }
    Ok(())
}

fn keys(format: Format, market: &Market) -> anyhow::Result<()> {
    let all = market.given_up();
    match format {
        Format::Json => {
            let rows = all.iter().map(|(key, fate, proof)| json!({ "node_key": key, "fate": fate, "proof": proof }));
            print::json(&rows.collect::<Vec<_>>())
        }
        Format::Text => {
            let rows = all.iter().map(|(key, fate, _)| vec![key.to_string(), fate.clone()]).collect();
            print::out(&print::table(&["NODE KEY", "WAS"], rows))
        }
    }
}

fn row(market: &Market, listing: &VerifiedListing) -> Vec<String> {
    let profiles: Vec<String> = listing.profiles.iter().map(ToString::to_string).collect();
    let known = market.catalogue.with_root(&listing.model_root).map_or("name only", |_| "catalogue");
    vec![
        listing.model.clone(),
        listing.quantisation.clone(),
        listing.node_key.short(),
        listing.rates.input.0.to_string(),
        listing.rates.cached_input.0.to_string(),
        listing.rates.output.0.to_string(),
        listing.context_length.to_string(),
        listing.slots.to_string(),
        profiles.join("+"),
        (listing.speed.decode_mtok_s / 1_000).to_string(),
        known.to_owned(),
    ]
}

fn listing_json(listing: &VerifiedListing) -> Value {
    json!({
        "listing": listing.id(), "model": listing.model, "model_root": listing.model_root,
        "quantisation": listing.quantisation, "part": listing.part.to_string(), "provider": listing.node_key,
        "nostr_key": listing.nostr_key(), "lightning_node": listing.lightning_node, "lightning_address": listing.lightning_address,
        "lightning_unproven": listing.lightning_unproven, "rates": listing.rates, "context_length": listing.context_length,
        "slots": listing.slots, "speed": listing.speed, "profiles": listing.profiles, "build": listing.build,
        "instruction_set": listing.instruction_set, "addresses": listing.addresses, "region": listing.region,
        "links": listing.links, "expires_at": listing.expires_at, "expires_in_s": listing.expires_at.saturating_sub(now().as_secs()),
    })
}

async fn why(
    format: Format,
    config: &Config,
    market: &Market,
    model: &str,
    prompt: u32,
    output: u32,
) -> anyhow::Result<()> {
    if let Some(lead) = config.provider.leads.iter().find(|lead| lead.alias == model) {
        return why_layers::run(format, config, market, model, lead).await;
    }
    let wanted = match market.catalogue.resolve(model, config.consumer.allow_unverified_names) {
        Ok(wanted) => wanted,
        Err(unknown) => {
            return Err(anyhow::Error::new(unknown)).hint(
                "name a model of the catalogue, or set consumer.allow_unverified_names to trust what providers claim",
            );
        }
    };
    let demand = Demand::new(wanted, prompt, output);
    let considered = market.explain(&demand, model);
    let rows: Vec<(String, String, bool, &VerifiedListing)> = considered
        .iter()
        .map(|c| match &c.verdict {
            Verdict::Ranked { place, expected_cost } => {
                (format!("place {place}"), format!("{expected_cost} expected"), true, c.listing.as_ref())
            }
            Verdict::Refused(why) => ("refused".to_owned(), why.to_string(), false, c.listing.as_ref()),
        })
        .collect();
    let any = rows.iter().any(|(_, _, fits, _)| *fits);
    match format {
        Format::Json => {
            let rows: Vec<Value> = rows
                .iter()
                .map(|(verdict, why, fits, listing)| {
                    json!({
                        "provider": listing.node_key, "listing": listing.id(), "fits": fits, "verdict": verdict, "why": why,
                    })
                })
                .collect();
            print::json(&json!({ "model": model, "can_be_served": any, "considered": rows }))?;
        }
        Format::Text => {
            let table = rows.iter().map(|(verdict, why, _, listing)| {
                vec![verdict.clone(), listing.node_key.short(), listing.model.clone(), why.clone()]
            });
            print::out(&print::table(&["VERDICT", "PROVIDER", "LISTED AS", "WHY"], table.collect()))?;
        }
    }
    if any {
        return Ok(());
    }
    eprintln!("{model}: {} listings considered, none fits", considered.len());
    Err(anyhow::Error::new(Findings))
}
