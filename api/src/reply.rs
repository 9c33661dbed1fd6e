//! OpenAI's response objects, with the nulls that its schema requires, and our additions to `usage`.
//!
//! Structs, not maps: field order is part of what our golden files hold still.

use satgrid_types::{FinishReason, RateCard, TokenUsage};
use serde::Serialize;

use crate::service::{Bill, Leg, ModelInfo};

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
    Message { index: u32, message: MessageReply<'a>, logprobs: Null, finish_reason: &'static str },
    Delta { index: u32, delta: Delta<'a>, logprobs: Null, finish_reason: Option<&'static str> },
    Text { text: &'a str, index: u32, logprobs: Null, finish_reason: Option<&'static str> },
}

/// A field that the schema requires and that we have nothing for yet.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Null;

#[derive(Serialize)]
pub(crate) struct MessageReply<'a> {
    pub(crate) role: &'static str,
    pub(crate) content: &'a str,
    pub(crate) refusal: Null,
    pub(crate) annotations: [(); 0],
}

#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Delta<'a> {
    Opening { role: &'static str, content: &'static str, refusal: Null },
    Content { content: &'a str },
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
    cost_details: CostDetails,
    receipt_ids: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
struct CostDetails {
    /// Lightning fees, on top of `cost_msat`.
    routing_fees_msat: u64,
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
struct RatesReply {
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

impl CostReply {
    pub(crate) fn of(bill: &Bill) -> CostReply {
        CostReply {
            cost_msat: bill.cost.0,
            cost_details: CostDetails {
                routing_fees_msat: bill.routing_fees.0,
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
    msat_per_mtok: RatesReply,
    per_request_msat: u64,
    sellers: u32,
    quantizations: Vec<String>,
    model_root: Option<String>,
}

impl From<ModelInfo> for ModelReply {
    fn from(model: ModelInfo) -> ModelReply {
        ModelReply {
            object: "model",
            created: model.created.as_secs(),
            owned_by: "satgrid",
            context_length: model.context_length,
            msat_per_mtok: RatesReply::from(&model.rates),
            per_request_msat: model.rates.per_request.0,
            sellers: model.sellers,
            quantizations: model.quantisations,
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

/// vLLM's names for these two.
#[derive(Serialize)]
pub(crate) struct TokenizeReply {
    pub(crate) count: usize,
    pub(crate) max_model_len: u32,
    pub(crate) tokens: Vec<u32>,
}

#[derive(Serialize)]
pub(crate) struct DetokenizeReply {
    pub(crate) prompt: String,
}

#[derive(Serialize)]
pub(crate) struct HealthReply {
    pub(crate) status: &'static str,
    pub(crate) reasons: Vec<String>,
}
