//! The ceiling of a request, from the very plan that would be made if it were sent now.

use super::Desk;
use crate::{drive::now, service::Gateway};
use satgrid_api::{CompletionRequest, Estimate, ServiceError};
use satgrid_ledger::keys::{KeyId, room};
use satgrid_pricing::ceiling;

pub(super) async fn estimate(
    desk: &Desk,
    gateway: &Gateway,
    request: &CompletionRequest,
    key: Option<&str>,
) -> Result<Estimate, ServiceError> {
    let prepared = gateway.prepare(&request.model, request).await?;
    let rates: Vec<_> = prepared.candidates.iter().map(|listing| listing.rates).collect();
    let dear = |_| ServiceError::InvalidRequest { param: "max_tokens".into(), message: "no bill holds it".into() };
    let prompt = u32::try_from(prepared.asked.tokens.len()).unwrap_or(u32::MAX);
    let most = ceiling(&rates, prompt, prepared.max_output).map_err(dear)?;
    let available = match key.and_then(|key| key.parse::<KeyId>().ok()) {
        Some(id) => {
            let chain = desk.keys.chain(id, now()).await;
            room(&chain.map_err(|error| ServiceError::Internal { detail: error.to_string() })?)
        }
        None => None,
    };
    Ok(Estimate {
        model: request.model.clone(),
        prompt_tokens: prompt,
        max_tokens: prepared.max_output,
        ceiling: most.one,
        ceiling_with_failover: if request.routing.allow_fallbacks { most.failover } else { most.one },
        rates: rates.first().copied().unwrap_or_default(),
        providers: u32::try_from(rates.len()).unwrap_or(u32::MAX),
        available,
        rate: desk.rate.now(),
    })
}
