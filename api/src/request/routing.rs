//! `provider`: which sellers may serve, in OpenRouter's words; prices in our unit, whose name the field carries.

use satgrid_types::{Msat, MsatPerMtok};

use super::fields::Fields;
use crate::{
    config::limits,
    error::ApiError,
    service::{MaxPrice, Routing, RoutingSort},
};

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

/// OpenRouter's `prompt` and `completion` are dollars a million tokens. A cap must not be read in another unit than it
/// was meant in, so those names are refused and ours end in their unit.
fn max_price(provider: &Fields<'_>) -> Result<MaxPrice, ApiError> {
    let Some(cap) = provider.object("max_price")? else { return Ok(MaxPrice::default()) };
    for dollars in ["prompt", "completion", "request", "image"] {
        if cap.get(dollars).is_some() {
            let message = "A price in dollars needs an exchange rate, and none is configured. Use \
                           `prompt_msat_per_mtok`, `completion_msat_per_mtok` and `request_msat`.";
            return Err(ApiError::bad("unsupported_parameter", cap.name(dollars), message));
        }
    }
    Ok(MaxPrice {
        prompt: cap.integer("prompt_msat_per_mtok", 0..=u64::MAX)?.map(MsatPerMtok),
        completion: cap.integer("completion_msat_per_mtok", 0..=u64::MAX)?.map(MsatPerMtok),
        request: cap.integer("request_msat", 0..=u64::MAX)?.map(Msat),
    })
}
