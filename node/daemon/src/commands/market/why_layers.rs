//! `satgrid market why` of a model that this node leads: how it is put together from the layers that are for sale, what a token's
//! way through it takes and where, and why each other listing is not in it.

use super::print;
use crate::cli::Format;
use crate::config::{Config, LeadForSale};
use crate::drive::{layers, market::Market, scout};
use crate::failure::Findings;
use satgrid_ledger_sqlite::read_paces;
use satgrid_market::{
    Hop,
    layers::{LayerVerdict, LayersConsidered, Plan, Slowest},
};
use satgrid_types::{NodeKey, node_key};
use serde_json::{Value, json};

pub(super) async fn run(
    format: Format,
    config: &Config,
    market: &Market,
    model: &str,
    lead: &LeadForSale,
) -> anyhow::Result<()> {
    let seed = crate::seed::read(config)?.0.seed();
    let standing = crate::identity::Standing::read(&config.node.dir, &seed)?;
    let ours = node_key(&seed.identity(standing.map_or(0, |standing| standing.index)));
    let demand = layers::demand_of(lead, ours)?;
    let kept = read_paces(&crate::up::beside_journal(config), demand.root.0).await.unwrap_or_default();
    scout::recall(market, demand.root, kept);
    let (plan, considered) = market.explain_layers(&demand);
    let missing = plan.as_ref().err().map(ToString::to_string);
    match format {
        Format::Json => {
            let rows: Vec<Value> = considered.iter().map(considered_json).collect();
            let (wanted, plan) = (demand.range.to_string(), plan.as_ref().ok().map(plan_json));
            print::json(
                &json!({ "model": model, "layers": wanted, "missing": missing, "plan": plan, "considered": rows }),
            )?;
        }
        Format::Text => {
            let header = ["VERDICT", "WORKER", "LAYERS", "MSAT/M", "MS/TOKEN", "MIB OF", "WHY"];
            print::out(&print::table(&header, considered.iter().map(|one| row(one, ours)).collect()))?;
            eprintln!(
                "{model}: layers {} are wanted, by {} sequences; times and memory are each worker's own figure where nothing \
                 was measured",
                demand.range, demand.slots
            );
            if let Ok(plan) = &plan {
                let hops: Vec<String> = plan.hops().map(|hop| hop_text(hop, ours)).collect();
                eprintln!(
                    "{model}: {} ms a token in the plan, hops included: {}",
                    ms(plan.token_us()),
                    hops.join(", ")
                );
            }
        }
    }
    match missing {
        None => Ok(()),
        Some(why) => {
            eprintln!("{model}: {why}");
            Err(anyhow::Error::new(Findings))
        }
    }
}

fn row(one: &LayersConsidered, ours: NodeKey) -> Vec<String> {
    let ((verdict, why), listing) = (told(one, ours), &one.listing);
    vec![
        verdict,
        listing.node_key.short(),
        one.range.to_string(),
        listing.rates.position_layer.unwrap_or_default().0.to_string(),
        ms(one.compute_us),
        format!("{} of {}", one.needs_bytes.div_ceil(1 << 20), listing.memory_bytes >> 20),
        why,
    ]
}

fn told(one: &LayersConsidered, ours: NodeKey) -> (String, String) {
    let (verdict, why) = verdict(&one.verdict, ours);
    let measured = one.pace.map(|pace| {
        let (was, listed) = (ms(pace.measured_us), ms(one.listed_us));
        match pace.lies {
            0 => format!("measured at {was} ms, lists {listed}"),
            1 => format!("measured at {was} ms, lists {listed}: not believed"),
            times => format!("measured at {was} ms, lists {listed}: not believed, {times} times in a row"),
        }
    });
    let why = [Some(why).filter(|why| !why.is_empty()), measured].into_iter().flatten();
    (verdict, why.collect::<Vec<_>>().join("; "))
}

fn verdict(verdict: &LayerVerdict, ours: NodeKey) -> (String, String) {
    match verdict {
        LayerVerdict::Planned { place } => (format!("worker {place}"), String::new()),
        LayerVerdict::Spare => ("spare".to_owned(), "fits; the plan is as fast and cheaper, or whole".to_owned()),
        LayerVerdict::TooSlow { with_us, plan_us, slowest } => {
            let most = match slowest {
                Slowest::Layers(us) => format!("its layers take {} ms", ms(*us)),
                Slowest::Link(hop) => format!("the link {}", hop_text(hop, ours)),
            };
            (
                "spare".to_owned(),
                format!("too slow: {} ms a token with it, {} planned; {most}", ms(*with_us), ms(*plan_us)),
            )
        }
        LayerVerdict::Refused(why) => ("refused".to_owned(), (*why).to_owned()),
    }
}

fn hop_text(hop: &Hop, ours: NodeKey) -> String {
    let name = |node: &NodeKey| if *node == ours { "here".to_owned() } else { node.short() };
    let (from, to) = (name(&hop.from), name(&hop.to));
    match hop.rtt_us {
        Some(rtt) => format!("{from} to {to}: {} ms round trip", ms(rtt)),
        None => format!("{from} to {to}: not measured"),
    }
}

fn considered_json(one: &LayersConsidered) -> Value {
    let listing = &one.listing;
    let (verdict, why) = told(one, NodeKey([0; 32]));
    let slow = match one.verdict {
        LayerVerdict::TooSlow { with_us, plan_us, slowest } => Some(json!({
            "with_us": with_us, "plan_us": plan_us,
            "slowest": match slowest {
                Slowest::Layers(us) => json!({ "layers_us": us }),
                Slowest::Link(hop) => hop_json(&hop),
            },
        })),
        LayerVerdict::Planned { .. } | LayerVerdict::Spare | LayerVerdict::Refused(_) => None,
    };
    json!({
        "worker": listing.node_key, "listing": listing.id(), "layers": one.range.to_string(), "verdict": verdict, "why": why,
        "too_slow": slow, "token_us": one.compute_us, "listed_us": one.listed_us,
        "measured": one.pace.map(|pace| json!({ "token_us": pace.measured_us, "lies": pace.lies, "at": pace.at.0 })),
        "rates": listing.rates, "memory_bytes": listing.memory_bytes, "needs_bytes": one.needs_bytes,
    })
}

fn plan_json(plan: &Plan) -> Value {
    json!({ "token_us": plan.token_us(), "hops": plan.hops().map(hop_json).collect::<Vec<_>>() })
}

fn hop_json(hop: &Hop) -> Value {
    json!({ "from": hop.from, "to": hop.to, "rtt_us": hop.rtt_us })
}

/// Microseconds as milliseconds with one place.
fn ms(us: u64) -> String {
    format!("{}.{}", us / 1_000, us % 1_000 / 100)
}
