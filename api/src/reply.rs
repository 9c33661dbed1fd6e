//! OpenAI's response objects, with the nulls that its schema requires, and our additions to `usage`.
//!
//! Structs, not maps: field order is part of what our golden files hold still.

use satgrid_types::{FinishReason, RateCard, TokenUsage};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    accounts::ExchangeRate,
    logprobs::{ChatLogprobs, TextLogprobs},
    service::{Bill, Leg, ModelInfo},
};

/// Which of the two completion endpoints is answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    Chat,
    Text,
}

impl Flavour {
    pub(crate) const fn id_prefix(self) -> &'static str {
        match self {
            Flavour::Chat => "chatcmpl-",
            Flavour::Text => "cmpl-",
        }
    }
}

/// What every object of one completion repeats.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) flavour: Flavour,
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: Option<String>,
}

impl Head {
    /// The id of a call: nine letters and digits, since some models' templates take no other.
    pub(crate) fn call_id(&self, choice: u32, call: u32) -> String {
        const LETTERS: &[u8; 62] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
        let hash = Sha256::new().chain_update(&self.id).chain_update([0]).chain_update(choice.to_be_bytes());
        let hash = hash.chain_update(call.to_be_bytes()).finalize();
        hash.iter().take(9).map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()])).collect()
    }
}

/// `None` for reasons that the port does not allow in `Finished`.
pub(crate) const fn finish_word(reason: FinishReason) -> Option<&'static str> {
    match reason {
        FinishReason::Stop => Some("stop"),
        FinishReason::Length => Some("length"),
        FinishReason::Cancelled | FinishReason::Error => None,
    }
}

/// A whole reply, or one chunk of a streamed one: `choices` differ, the frame is the same.
#[derive(Serialize)]
pub(crate) struct Completion<'a, C: Serialize> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    /// Absent where unknown: OpenAI's schema allows no null here.
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'a str>,
    choices: Vec<C>,
    /// Outer `None`: the field is absent; inner `None`: `null`, as in chunks when usage was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageReply>>,
}

impl<'a, C: Serialize> Completion<'a, C> {
    pub(crate) fn new(
        head: &'a Head,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<UsageReply>>,
    ) -> Completion<'a, C> {
        Completion {
            id: &head.id,
            object,
            created: head.created,
            model: &head.model,
            system_fingerprint: head.fingerprint.as_deref(),
            choices,
            usage,
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Choice<'a> {
    Message { index: u32, message: MessageReply<'a>, logprobs: Option<ChatLogprobs>, finish_reason: &'static str },
    Delta { index: u32, delta: Delta<'a>, logprobs: Option<ChatLogprobs>, finish_reason: Option<&'static str> },
    Text { text: &'a str, index: u32, logprobs: Option<TextLogprobs>, finish_reason: Option<&'static str> },
}

/// A field that the schema requires and that we have nothing for yet.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Null;

#[derive(Serialize)]
pub(crate) struct MessageReply<'a> {
    pub(crate) role: &'static str,
    pub(crate) content: Option<&'a str>,
    pub(crate) refusal: Null,
    pub(crate) annotations: [(); 0],
    /// Thinking before the answer, by the name that most servers give it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<CallReply>,
}

/// A call of a tool, or in a chunk the next piece of one.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CallReply {
    /// In chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: FunctionReply,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct FunctionReply {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Delta<'a> {
    Opening { role: &'static str, content: &'static str, refusal: Null },
    Content { content: &'a str },
    Reasoning { reasoning_content: &'a str },
    Calls { tool_calls: [CallReply; 1] },
    Closing {},
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct UsageReply {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
    #[serde(flatten)]
    cost: CostReply,
}

#[derive(Debug, Clone, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
    audio_tokens: u32,
}

#[derive(Debug, Clone, Serialize)]
struct CompletionDetails {
    reasoning_tokens: u32,
    audio_tokens: u32,
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

/// `cost_msat` and where it comes from.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CostReply {
    cost_msat: u64,
    /// Dollars, as OpenRouter's clients read it; only where an exchange rate is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<serde_json::Number>,
    cost_details: CostDetails,
    receipt_ids: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
struct CostDetails {
    /// Lightning fees, on top of `cost_msat`.
    routing_fees_msat: u64,
    /// What counts against the key, where that is not `cost_msat`.
    #[serde(skip_serializing_if = "Option::is_none")]
    charged_msat: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exchange_rate: Option<serde_json::Value>,
    providers: Vec<LegReply>,
}

#[derive(Debug, Clone, Serialize)]
struct LegReply {
    provider: String,
    receipt_id: Option<String>,
    prompt_tokens: u32,
    cached_tokens: u32,
    completion_tokens: u32,
    cost_msat: u64,
    msat_per_mtok: RatesReply,
    per_request_msat: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct RatesReply {
    input: u64,
    cached_input: u64,
    output: u64,
}

impl From<&RateCard> for RatesReply {
    fn from(rates: &RateCard) -> RatesReply {
        RatesReply { input: rates.input.0, cached_input: rates.cached_input.0, output: rates.output.0 }
    }
}

impl From<&Leg> for LegReply {
    fn from(leg: &Leg) -> LegReply {
        LegReply {
            provider: leg.provider.to_string(),
            receipt_id: leg.receipt.map(|id| id.to_string()),
            prompt_tokens: leg.usage.prompt,
            cached_tokens: leg.usage.cached_prompt,
            completion_tokens: leg.usage.completion,
            cost_msat: leg.cost.0,
            msat_per_mtok: RatesReply::from(&leg.rates),
            per_request_msat: leg.rates.per_request.0,
        }
    }
}

/// A decimal as a JSON number: what OpenRouter's clients expect. Display only.
pub(crate) fn usd_number(decimal: &str) -> Option<serde_json::Number> {
    decimal.parse().ok().and_then(serde_json::Number::from_f64)
}

pub(crate) fn rate_json(rate: &ExchangeRate) -> serde_json::Value {
    serde_json::json!({ "usd_per_btc": rate.usd_per_btc(), "at": rate.at.as_secs(), "source": rate.source })
}

impl CostReply {
    pub(crate) fn of(bill: &Bill) -> CostReply {
        CostReply {
            cost_msat: bill.cost.0,
            cost: bill.rate.as_ref().and_then(|rate| usd_number(&rate.usd(bill.charged.unwrap_or(bill.cost)))),
            cost_details: CostDetails {
                routing_fees_msat: bill.routing_fees.0,
                charged_msat: bill.charged.map(|charged| charged.0),
                exchange_rate: bill.rate.as_ref().map(rate_json),
                providers: bill.legs.iter().map(LegReply::from).collect(),
            },
            receipt_ids: bill.legs.iter().filter_map(|leg| leg.receipt).map(|id| id.to_string()).collect(),
        }
    }
}

impl UsageReply {
    pub(crate) fn of(bill: &Bill) -> UsageReply {
        let TokenUsage { prompt, cached_prompt, completion, reasoning, part: _ } = bill.usage;
        UsageReply {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt.saturating_add(completion),
            prompt_tokens_details: PromptDetails { cached_tokens: cached_prompt, audio_tokens: 0 },
            completion_tokens_details: CompletionDetails {
                reasoning_tokens: reasoning,
                audio_tokens: 0,
                accepted_prediction_tokens: 0,
                rejected_prediction_tokens: 0,
            },
            cost: CostReply::of(bill),
        }
    }
}

#[derive(Serialize)]
pub(crate) struct ModelReply {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    context_length: u32,
    /// Dollars for a token and a request, as OpenRouter writes them; only where an exchange rate is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pricing: Option<PricingReply>,
    msat_per_mtok: RatesReply,
    per_request_msat: u64,
    sellers: u32,
    quantizations: Vec<String>,
    /// Of a model that embeds texts and writes none: numbers in a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding_dimensions: Option<u32>,
    model_root: Option<String>,
}

#[derive(Serialize)]
struct PricingReply {
    prompt: String,
    completion: String,
    input_cache_read: String,
    request: String,
}

impl PricingReply {
    fn of(rates: &RateCard, rate: &ExchangeRate) -> PricingReply {
        // A price for a million tokens is a millionth of a price for one: the decimal point moves by six places.
        let per_token = |msat_per_mtok: u64| {
            let pico = rate.usd_pico(satgrid_types::Msat(msat_per_mtok));
            let unit = 10_u128.pow(18);
            format!("{}.{:018}", pico / unit, pico % unit)
        };
        PricingReply {
            prompt: per_token(rates.input.0),
            completion: per_token(rates.output.0),
            input_cache_read: per_token(rates.cached_input.0),
            request: rate.usd(rates.per_request),
        }
    }
}

impl ModelReply {
    pub(crate) fn new(model: ModelInfo, rate: Option<&ExchangeRate>) -> ModelReply {
        ModelReply {
            pricing: rate.map(|rate| PricingReply::of(&model.rates, rate)),
            object: "model",
            created: model.created.as_secs(),
            owned_by: "satgrid",
            context_length: model.context_length,
            msat_per_mtok: RatesReply::from(&model.rates),
            per_request_msat: model.rates.per_request.0,
            sellers: model.sellers,
            quantizations: model.quantisations,
            embedding_dimensions: model.embeds,
            model_root: model.root.map(|root| root.to_string()),
            id: model.id,
        }
    }
}

#[derive(Serialize)]
pub(crate) struct ModelList {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<ModelReply>,
}

/// vLLM's names for these two, and llama-server's `content` for the text.
#[derive(Serialize)]
pub(crate) struct TokenizeReply {
    pub(crate) count: usize,
    pub(crate) max_model_len: u32,
    pub(crate) tokens: Vec<u32>,
}

#[derive(Serialize)]
pub(crate) struct DetokenizeReply {
    pub(crate) prompt: String,
    pub(crate) content: String,
}

#[derive(Serialize)]
pub(crate) struct HealthReply {
    pub(crate) status: &'static str,
    pub(crate) reasons: Vec<String>,
}
