//! What is kept of a call: counts, providers, receipts and the exchange rate of its moment, as JSON. No text of anybody's.

use satgrid_api::{Bill, ExchangeRate, Generation, GenerationState, Leg};
use satgrid_ledger_sqlite::{CallRow, CallState};
use satgrid_types::{FinishReason, Msat, NodeKey, RateCard, ReceiptId, TokenUsage, UnixMs};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Detail {
    #[serde(default)]
    finish: Option<Finish>,
    usage: Usage,
    #[serde(default)]
    routing_fees_msat: Msat,
    legs: Vec<LegDetail>,
    #[serde(default)]
    rate: Option<RateDetail>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Finish {
    Stop,
    Length,
}

#[derive(Serialize, Deserialize)]
struct Usage {
    prompt: u32,
    cached_prompt: u32,
    completion: u32,
    reasoning: u32,
}

#[derive(Serialize, Deserialize)]
struct LegDetail {
    provider: NodeKey,
    receipt: Option<ReceiptId>,
    usage: Usage,
    rates: RateCard,
    cost_msat: Msat,
}

#[derive(Serialize, Deserialize)]
struct RateDetail {
    micro_usd_per_btc: u64,
    at: UnixMs,
    source: String,
}

impl From<TokenUsage> for Usage {
    fn from(usage: TokenUsage) -> Usage {
        let TokenUsage { prompt, cached_prompt, completion, reasoning, part: _ } = usage;
        Usage { prompt, cached_prompt, completion, reasoning }
    }
}

impl From<Usage> for TokenUsage {
    fn from(usage: Usage) -> TokenUsage {
        let Usage { prompt, cached_prompt, completion, reasoning } = usage;
        TokenUsage { prompt, cached_prompt, completion, reasoning, part: None }
    }
}

/// The JSON that is kept.
pub(super) fn of(finish: Option<FinishReason>, bill: &Bill) -> String {
    let legs = bill.legs.iter().map(|leg| LegDetail {
        provider: leg.provider,
        receipt: leg.receipt,
        usage: leg.usage.into(),
        rates: leg.rates,
        cost_msat: leg.cost,
    });
    let rate = bill.rate.as_ref().map(|rate| RateDetail {
        micro_usd_per_btc: rate.micro_usd_per_btc,
        at: rate.at,
        source: rate.source.clone(),
    });
    let finish = finish.and_then(|finish| match finish {
        FinishReason::Stop => Some(Finish::Stop),
        FinishReason::Length => Some(Finish::Length),
        FinishReason::Cancelled | FinishReason::Error => None,
    });
    let usage = bill.usage.into();
    let detail = Detail { finish, usage, routing_fees_msat: bill.routing_fees, legs: legs.collect(), rate };
    // Structs of numbers and strings: there is no failing case.
    serde_json::to_string(&detail).unwrap_or_default()
}

/// A kept call as the API shows it.
pub(super) fn generation(row: CallRow) -> Generation {
    let detail: Option<Detail> = row.detail.as_deref().and_then(|text| serde_json::from_str(text).ok());
    let finish = detail.as_ref().and_then(|detail| detail.finish).map(|finish| match finish {
        Finish::Stop => FinishReason::Stop,
        Finish::Length => FinishReason::Length,
    });
    let mut bill = Bill { cost: row.cost, ..Bill::default() };
    if let Some(Detail { usage, routing_fees_msat, legs, rate, .. }) = detail {
        bill.usage = usage.into();
        bill.routing_fees = routing_fees_msat;
        let leg = |leg: LegDetail| Leg {
            provider: leg.provider,
            receipt: leg.receipt,
            usage: leg.usage.into(),
            rates: leg.rates,
            cost: leg.cost_msat,
        };
        bill.legs = legs.into_iter().map(leg).collect();
        bill.rate = rate.map(|rate| ExchangeRate {
            micro_usd_per_btc: rate.micro_usd_per_btc,
            at: rate.at,
            source: rate.source,
        });
    }
    Generation {
        model: row.model,
        key: row.key.map(|key| key.to_string()).or(row.caller),
        created_at: row.at,
        ended_at: row.ended_at,
        state: match row.state {
            CallState::Open => GenerationState::Open,
            CallState::Done => GenerationState::Done,
            CallState::Failed => GenerationState::Failed,
        },
        finish,
        reserved: row.reserved,
        charged: row.charged,
        bill,
    }
}
