//! The port behind the edge: what an HTTP front must be able to ask of a node, and nothing else.
//!
//! The daemon implements [`Service`] over the consumer role. This file knows no HTTP and no JSON: parsing and its errors
//! live in `request`, shapes on the wire in `reply`, statuses in `error`.
//!
//! One completion is one [`CompletionStream`]:
//!
//! | event | how often | meaning |
//! |---|---|---|
//! | `Started` | at most once, first | which model and build answer; optional |
//! | `Text`, `Reasoning` | any number | the next piece of the reply or of the thinking before it, valid UTF-8, no stop string in it |
//! | `Logprobs` | where asked for | the tokens of the `Text` that follows |
//! | `ToolCall`, `Arguments` | any number | a call begins; the next piece of its arguments |
//! | `Finished` | once, last | why it ended and what it cost |
//! | `Err` | instead of `Finished` | nothing more will come; a bill if anything was charged |
//!
//! Dropping the stream cancels the work. The edge reads one event at a time and stops reading while its client is slow,
//! so an implementation must send through a bounded channel and let that channel hold the work back.

use std::{pin::Pin, time::Duration};

use async_trait::async_trait;
use futures::Stream;
use satgrid_types::{
    FinishReason, ModelRoot, Msat, MsatPerMtok, NodeKey, PaymentHash, RateCard, ReceiptId, RequestId, Sampling,
    TokenUsage, UnixMs,
};
use thiserror::Error;
use tokio::time::Instant;

use crate::accounts::ExchangeRate;

/// What a node does for its API clients.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    /// Whether a request sent now has a chance; the reasons are shown to whoever asks `/health`.
    async fn ready(&self) -> Readiness;

    /// Every model that can be asked for now, sorted by id.
    async fn models(&self) -> Vec<ModelInfo>;

    /// Starts one completion. Returns once it is admitted (model known, provider found, money reserved) or refused;
    /// the edge maps errors from here, and those before the first text, to HTTP statuses.
    async fn complete(
        &self,
        request: CompletionRequest,
        context: CallContext,
    ) -> Result<CompletionStream, ServiceError>;

    /// Token ids of a text or of messages after the model's template. Costs nothing.
    async fn tokenize(&self, request: TokenizeRequest) -> Result<Tokenized, ServiceError>;

    /// The text of token ids. Bytes that are no UTF-8 come as U+FFFD.
    async fn detokenize(&self, model: String, tokens: Vec<u32>) -> Result<String, ServiceError>;
}

/// Events of one completion, in order. See the module's table.
pub type CompletionStream = Pin<Box<dyn Stream<Item = Result<CompletionEvent, ServiceError>> + Send>>;

/// Whether the node can take work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Readiness {
    pub ready: bool,
    /// What is missing, one sentence each; may also warn while ready.
    pub reasons: Vec<String>,
}

/// A model that the market sells now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// The name that requests use; may hold slashes.
    pub id: String,
    pub created: UnixMs,
    pub root: Option<ModelRoot>,
    pub context_length: u32,
    /// The cheapest live offer that the default routing would take.
    pub rates: RateCard,
    /// How many providers sell it now.
    pub sellers: u32,
    /// Sorted, each once: `Q4_K_M`, `F16`.
    pub quantisations: Vec<String>,
    /// It embeds texts and writes none: how many numbers a row has.
    pub embeds: Option<u32>,
}

/// Who asks and how long they wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallContext {
    /// Chosen by the edge, unique: reserve and settle by this. The completion's id on the wire is derived from it.
    pub request: RequestId,
    /// `x-request-id`: for logs only. A client may choose it, so it is not unique.
    pub trace: String,
    /// Name of the configured key that was shown; `None` for a keyless caller on this machine.
    pub key: Option<String>,
    /// When the edge will stop waiting.
    pub deadline: Option<Instant>,
}

/// A request after its JSON was checked. Every field is within its limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompletionRequest {
    pub model: String,
    /// Tried in this order if `model` cannot be served.
    pub fallback_models: Vec<String>,
    pub prompt: Prompt,
    pub sampling: Sampling,
    /// At most [`crate::limits::MAX_STOPS`]; none is empty.
    pub stop: Vec<String>,
    /// `None`: until the model stops or its context ends.
    pub max_tokens: Option<u32>,
    pub routing: Routing,
    pub format: Format,
    pub tools: Vec<Tool>,
    pub tool_choice: ToolChoice,
    pub parallel_tool_calls: bool,
    /// Log probabilities of each token and of so many likeliest ones.
    pub top_logprobs: Option<u32>,
}

/// What text the reply may be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    JsonObject,
    /// JSON that this schema allows; the schema as its author wrote it, since members come in its order.
    JsonSchema {
        schema: String,
        /// Where it stands in the request, for complaints.
        param: &'static str,
    },
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    pub name: String,
    /// The whole tool as JSON, for the model's template.
    pub json: String,
    /// The JSON schema of its arguments, as its author wrote it.
    pub parameters: String,
    /// Where the schema stands in the request, for complaints.
    pub param: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolChoice {
    None,
    #[default]
    Auto,
    Required,
    Named(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// To be rendered by the model's chat template.
    Messages(Vec<Message>),
    /// To be tokenised as it is.
    Text(String),
    /// To be evaluated as it is.
    Tokens(Vec<u32>),
    /// To be embedded: the answer is a row for each, and no text.
    Embed(Vec<TextToEmbed>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextToEmbed {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub content: String,
    pub name: Option<String>,
    /// Of an assistant's message.
    pub tool_calls: Vec<MessageCall>,
    /// Of a tool's message: which call it answers.
    pub tool_call_id: Option<String>,
}

/// A call that an earlier reply made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MessageCall {
    pub id: String,
    pub name: String,
    /// JSON, or whatever the model had written.
    pub arguments: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    System,
    /// OpenAI's newer word for `system`; templates that do not know it get `system`.
    Developer,
    User,
    Assistant,
    /// A tool's result.
    Tool,
}

impl Role {
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// Which providers may serve, in OpenRouter's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// Tried first, in this order.
    pub order: Vec<String>,
    /// If not empty, nobody else.
    pub only: Vec<String>,
    pub ignore: Vec<String>,
    /// `false`: never anyone beyond `order`, and no second provider after a failure.
    pub allow_fallbacks: bool,
    pub sort: Option<RoutingSort>,
    pub max_price: MaxPrice,
    /// If not empty, only these quantisations.
    pub quantisations: Vec<String>,
}

impl Default for Routing {
    fn default() -> Self {
        Routing {
            order: Vec::new(),
            only: Vec::new(),
            ignore: Vec::new(),
            allow_fallbacks: true,
            sort: None,
            max_price: MaxPrice::default(),
            quantisations: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoutingSort {
    Price,
    Throughput,
    Latency,
}

/// Rates that the caller will not exceed; `None` does not limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MaxPrice {
    pub prompt: Option<MsatPerMtok>,
    pub completion: Option<MsatPerMtok>,
    pub request: Option<Msat>,
    /// The same in dollars, where the caller said it so: only a node with an exchange rate can hold it.
    pub usd: MaxPriceUsd,
}

/// Limits in millionths of a dollar: for a million tokens, and for a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MaxPriceUsd {
    pub prompt: Option<u64>,
    pub completion: Option<u64>,
    pub request: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CompletionEvent {
    Started {
        /// The model that answers: the requested one or one of its fallbacks.
        model: String,
        /// Names the engine build and weights; OpenAI's `system_fingerprint`.
        fingerprint: Option<String>,
    },
    Text {
        delta: String,
    },
    /// Thinking that the model marks as such.
    Reasoning {
        delta: String,
    },
    /// The row of the next text that is embedded, in their order: little-endian 32-bit floats, of length 1 as a vector.
    Embedding {
        row: Vec<u8>,
    },
    /// Tokens of the text that comes next.
    Logprobs {
        tokens: Vec<TokenLogprob>,
    },
    /// A call of a tool begins; they are numbered from 0.
    ToolCall {
        index: u32,
        name: String,
    },
    /// Whose events follow, where one stream holds several replies. The edge's own, like `Ended`: a service never sends it.
    Choice {
        index: u32,
    },
    /// That reply has ended and others go on.
    Ended {
        reason: FinishReason,
    },
    /// The next piece of that call's arguments.
    Arguments {
        index: u32,
        delta: String,
    },
    /// `reason` is `Stop` or `Length`; a run that was cancelled or broke ends in `Err`.
    Finished {
        reason: FinishReason,
        bill: Bill,
    },
}

impl CompletionEvent {
    /// What it adds to a reply's size.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            CompletionEvent::Text { delta }
            | CompletionEvent::Reasoning { delta }
            | CompletionEvent::Arguments { delta, .. } => delta.len(),
            CompletionEvent::ToolCall { name, .. } => name.len(),
            CompletionEvent::Embedding { row } => row.len(),
            CompletionEvent::Logprobs { tokens } => {
                let of = |token: &LikelyToken| token.bytes.len().saturating_add(16);
                tokens.iter().map(|t| of(&t.token).saturating_add(t.top.iter().map(of).sum())).sum()
            }
            CompletionEvent::Started { .. }
            | CompletionEvent::Choice { .. }
            | CompletionEvent::Ended { .. }
            | CompletionEvent::Finished { .. } => 0,
        }
    }
}

/// A token with its log probability, and the likeliest tokens at its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenLogprob {
    pub token: LikelyToken,
    pub top: Vec<LikelyToken>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LikelyToken {
    /// Need not be valid UTF-8 by itself.
    pub bytes: Vec<u8>,
    /// Millionths of a nat.
    pub logprob_micro: i32,
}

/// What a request cost, each token counted once even if two providers worked on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bill {
    pub usage: TokenUsage,
    /// Authoritative; the sum over `legs`.
    pub cost: Msat,
    /// Lightning fees of slices that this request caused; not part of `cost`.
    pub routing_fees: Msat,
    /// One for each provider that worked, in order.
    pub legs: Vec<Leg>,
    /// What counts against the caller's key, where that is not `cost`.
    pub charged: Option<Msat>,
    /// What a bitcoin was worth at that moment, where the operator named a source.
    pub rate: Option<ExchangeRate>,
}

/// One provider's part of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leg {
    pub provider: NodeKey,
    /// `None` where the provider left before it signed; the last ack pair is the claim then.
    pub receipt: Option<ReceiptId>,
    /// What this provider was paid for; a prefix taken over from another is input here.
    pub usage: TokenUsage,
    pub rates: RateCard,
    pub cost: Msat,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizeRequest {
    pub model: String,
    pub prompt: Prompt,
    /// Begin-of-text and the like, for `Prompt::Text`.
    pub add_special_tokens: bool,
    /// Open the assistant's turn, for `Prompt::Messages`.
    pub add_generation_prompt: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    pub tokens: Vec<u32>,
    pub context_length: u32,
}

/// Why a request was refused or broke off. Sorted by fault: the caller's, the caller's purse, the market's, ours.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ServiceError {
    #[error("The model `{model}` does not exist on this market or you do not have access to it.")]
    UnknownModel { model: String },
    #[error(
        "This model's maximum context length is {context_length} tokens. However, your messages resulted in \
         {prompt_tokens} tokens. Please reduce the length of the messages."
    )]
    ContextLength { prompt_tokens: u32, context_length: u32 },
    /// The model embeds where a text was asked for, or the other way round.
    #[error("{}", wrong_kind(.model, *.embeds))]
    WrongKind {
        model: String,
        /// What the model does.
        embeds: bool,
    },
    #[error("{message}")]
    InvalidRequest { param: String, message: String },
    /// The key may not do this: another model, or no completions at all.
    #[error("{message}")]
    Forbidden { code: &'static str, message: String },
    #[error(
        "This request needs {} msat and {} msat are available ({}).",
        .0.required.0, .0.available.0, .0.limit.as_str()
    )]
    InsufficientFunds(Box<Shortfall>),
    #[error("Nobody sells `{model}` within `provider.max_price`; {cheapest}.")]
    MaxPriceExceeded {
        model: String,
        /// What would have been needed, as a clause: "the cheapest asks 12,000 msat per million output tokens".
        cheapest: String,
    },
    #[error("No provider can serve `{model}` now: {}", .why.join("; "))]
    NoProvider {
        model: String,
        /// One reason for each provider or filter, never empty.
        why: Vec<String>,
    },
    #[error("The provider failed and no other took over: {reason}")]
    ProviderFailed {
        reason: String,
        /// What was charged up to the last ack that both signed.
        bill: Option<Box<Bill>>,
    },
    /// The edge gave up waiting; what was charged by then is in the ledger, not known here.
    #[error("The request took longer than the {seconds} s that this node allows.")]
    DeadlineExceeded { seconds: u64 },
    #[error("There is no room for another request now, here or at the providers; try again in {} s.", .retry_after.as_secs())]
    Busy { retry_after: Duration },
    #[error("This node is not ready: {}", .reasons.join("; "))]
    NotReady { reasons: Vec<String> },
    /// The detail goes to the log, not to the client.
    #[error("This node failed; the log names the cause under this request's id.")]
    Internal { detail: String },
}

fn wrong_kind(model: &str, embeds: bool) -> String {
    if embeds {
        format!("`{model}` embeds texts and writes none: ask it by POST /v1/embeddings.")
    } else {
        format!(
            "`{model}` writes texts and makes no embeddings: choose a model that /v1/models shows with `embedding_dimensions`."
        )
    }
}

/// Money that is missing, and how to bring it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortfall {
    pub required: Msat,
    pub available: Msat,
    pub limit: LimitSource,
    pub topup: Option<TopUp>,
}

/// Which limit was too low.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitSource {
    /// The wallet cannot send that much.
    Wallet,
    /// The API key's own limit.
    Key,
    /// The node's configured spending limit.
    Node,
}

impl LimitSource {
    pub const fn as_str(self) -> &'static str {
        match self {
            LimitSource::Wallet => "wallet",
            LimitSource::Key => "key",
            LimitSource::Node => "node",
        }
    }
}

/// An invoice that lifts the shortage when paid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopUp {
    pub bolt11: String,
    pub payment_hash: PaymentHash,
    pub expires_at: UnixMs,
}
