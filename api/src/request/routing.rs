//! `provider`: which sellers may serve, in OpenRouter's words; prices in our unit, whose name the field carries.

use satgrid_types::{Msat, MsatPerMtok};
use serde_json::Value;

use super::fields::Fields;
use crate::{
    config::limits,
    error::ApiError,
    service::{MaxPrice, MaxPriceUsd, Routing, RoutingSort},
};

/// Highest limit in dollars: nobody sells a million tokens for more.
const MAX_USD: f64 = 2_000.0;

pub(super) fn routing(top: &Fields<'_>) -> Result<Routing, ApiError> {
    let Some(provider) = top.object("provider")? else { return Ok(Routing::default()) };
    let names = |field| provider.names(field, limits::MAX_PROVIDERS, limits::MAX_PROVIDER_NAME_BYTES);
    // Promises about privacy: ignoring one would break it.
    if provider.string("data_collection")?.is_some_and(|policy| policy != "allow") {
        return Err(provider.unsupported("data_collection", "a promise about data collection"));
    }
    if provider.flag("zdr")? == Some(true) {
        return Err(provider.unsupported("zdr", "a promise of zero data retention"));
    }
    Ok(Routing {
        order: names("order")?,
        only: names("only")?,
        ignore: names("ignore")?,
        allow_fallbacks: provider.flag("allow_fallbacks")?.unwrap_or(true),
        sort: sort(&provider)?,
        max_price: max_price(&provider)?,
        quantisations: names("quantizations")?,
    })
}

fn sort(provider: &Fields<'_>) -> Result<Option<RoutingSort>, ApiError> {
    match provider.string("sort")? {
        None => Ok(None),
        Some("price") => Ok(Some(RoutingSort::Price)),
        Some("throughput") => Ok(Some(RoutingSort::Throughput)),
        Some("latency") => Ok(Some(RoutingSort::Latency)),
        Some(_) => Err(provider.invalid("sort", "`provider.sort` must be one of price, throughput, latency.")),
    }
}

/// Each a number, or a number in a string, as OpenRouter writes prices and some clients send them back.
///
/// OpenRouter's `prompt` and `completion` are dollars a million tokens, `request` dollars; ours end in their unit. The
/// dollars are turned into msat by the node, which refuses them where it has no exchange rate.
fn max_price(provider: &Fields<'_>) -> Result<MaxPrice, ApiError> {
    let Some(given) = provider.object("max_price")? else { return Ok(MaxPrice::default()) };
    let numbers = Value::Object(given.with_numbers());
    let cap = Fields::of(&numbers, provider.name("max_price"))?;
    if cap.get("image").is_some() {
        return Err(cap.unsupported("image", "a price for images"));
    }
    let dollars = |field| -> Result<Option<u64>, ApiError> {
        let micro = cap.micro_unsigned(field, 0.0..=MAX_USD)?;
        Ok(micro.map(u64::from))
    };
    Ok(MaxPrice {
        prompt: cap.integer("prompt_msat_per_mtok", 0..=u64::MAX)?.map(MsatPerMtok),
        completion: cap.integer("completion_msat_per_mtok", 0..=u64::MAX)?.map(MsatPerMtok),
        request: cap.integer("request_msat", 0..=u64::MAX)?.map(Msat),
        usd: MaxPriceUsd {
            prompt: dollars("prompt")?,
            completion: dollars("completion")?,
            request: dollars("request")?,
        },
    })
}
