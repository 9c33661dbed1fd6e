//! From a request's bytes to the port's types, or to a complaint that names line and column, or the parameter.
//!
//! Pure: no service, no clock, no socket. The seed for those who name none is an argument.

mod embeddings;
mod fields;
mod messages;
mod responses;
mod routing;
mod sampling;
#[cfg(test)]
mod tests;
mod tools;

use axum::http::StatusCode;
use serde_json::Value;

pub(crate) use self::embeddings::{Encoding, embeddings};
use self::fields::Fields;
pub(crate) use self::responses::{Echo, response};
use crate::{
    config::limits,
    error::ApiError,
    reply::Flavour,
    service::{CompletionRequest, Format, Prompt, TokenizeRequest, ToolChoice},
};

/// A completion request and how its reply is to be shaped.
#[derive(Debug)]
pub(crate) struct Parsed {
    /// The first reply asked for.
    pub(crate) request: CompletionRequest,
    /// The further ones, each with the number of its prompt: `n`, and the prompts of a legacy request.
    pub(crate) others: Vec<(usize, CompletionRequest)>,
    /// The legacy endpoint's `echo`: each reply begins with its prompt.
    pub(crate) echo: bool,
    pub(crate) stream: bool,
    /// `stream_options.include_usage`
    pub(crate) include_usage: bool,
}

pub(crate) fn json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        let what = if body.is_empty() {
            "the body is empty".to_owned()
        } else {
            let text = error.to_string();
            // serde_json ends with " at line L column C"; say it once, in a fixed form.
            let reason = text.split(" at line ").next().unwrap_or_default();
            format!("{reason} at line {}, column {}", error.line(), error.column())
        };
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("We could not parse the JSON body: {what}."))
    })
}

pub(crate) fn completion(flavour: Flavour, body: &[u8], fresh_seed: u64) -> Result<Parsed, ApiError> {
    let value = json(body)?;
    let top = Fields::of(&value, "")?;
    refuse_unsupported(flavour, &top)?;
    let (model, fallback_models) = models(&top)?;
    let (mut prompts, default_length) = match flavour {
        Flavour::Chat => (vec![Prompt::Messages(messages::messages(&top)?)], None),
        Flavour::Text => (messages::prompts(&top)?, Some(limits::TEXT_COMPLETION_MAX_TOKENS)),
    };
    let n = top.integer_u32("n", 1..=limits::MAX_CHOICES)?.unwrap_or(1);
    if top.integer_u32("best_of", 1..=limits::MAX_CHOICES)?.is_some_and(|best_of| best_of != n) {
        return Err(top.unsupported("best_of", "generating more replies than are returned"));
    }
    let replies = prompts.len().saturating_mul(n as usize);
    if replies > limits::MAX_CHOICES as usize {
        let most = limits::MAX_CHOICES;
        return Err(top.invalid("n", format!("{replies} replies to one request; at most {most} are made.")));
    }
    if n > 1 && body.len().saturating_mul(n as usize) > limits::MAX_REPEATED_BYTES {
        let (bytes, most) = (body.len(), limits::MAX_REPEATED_BYTES);
        return Err(top.invalid("n", format!("`n` times this body's {bytes} bytes is over {most}: ask several times.")));
    }
    let shape = match flavour {
        Flavour::Chat => Some(tools::shape(&top, body)?),
        Flavour::Text => None,
    };
    let top_logprobs = sampling::top_logprobs(flavour, &top)?;
    let echo = flavour == Flavour::Text && top.flag("echo")? == Some(true);
    if echo && top_logprobs.is_some() {
        return Err(top.unsupported("echo", "log probabilities of the prompt"));
    }
    let stream = top.flag("stream")?.unwrap_or(false);
    let include_usage = match top.object("stream_options")? {
        Some(_) if !stream => {
            return Err(top.invalid("stream_options", "`stream_options` is only allowed when `stream` is true."));
        }
        Some(options) => options.flag("include_usage")?.unwrap_or(false),
        None => false,
    };
    let (format, tools, tool_choice, parallel_tool_calls) = match shape {
        Some(tools::Shape { format, tools, choice, parallel }) => (format, tools, choice, parallel),
        None => (Format::Text, Vec::new(), ToolChoice::None, false),
    };
    let request = CompletionRequest {
        model,
        fallback_models,
        prompt: prompts.remove(0),
        format,
        tools,
        tool_choice,
        parallel_tool_calls,
        top_logprobs,
        sampling: sampling::sampling(&top, fresh_seed)?,
        stop: sampling::stop(&top)?,
        max_tokens: sampling::max_tokens(&top)?.or(default_length),
        routing: routing::routing(&top)?,
    };
    let all = std::iter::once(&request.prompt).chain(&prompts).enumerate();
    let mut others = Vec::with_capacity(replies.saturating_sub(1));
    for (number, prompt) in all {
        for _ in 0..n {
            let mut other = CompletionRequest { prompt: prompt.clone(), ..request.clone() };
            // Each reply draws by a seed of its own, so that the same request gives the same replies.
            other.sampling.seed = request.sampling.seed.wrapping_add(others.len() as u64);
            others.push((number, other));
        }
    }
    others.remove(0);
    Ok(Parsed { request, others, echo, stream, include_usage })
}

/// One reply, asked for once.
fn ask(request: CompletionRequest, stream: bool) -> Parsed {
    Parsed { request, others: Vec::new(), echo: false, stream, include_usage: false }
}

pub(crate) fn tokenize(body: &[u8]) -> Result<TokenizeRequest, ApiError> {
    let value = json(body)?;
    let top = Fields::of(&value, "")?;
    let model = model(&top)?;
    let prompt = if top.get("messages").is_some() {
        Prompt::Messages(messages::messages(&top)?)
    } else {
        let text = top.string("prompt")?.or(top.string("content")?);
        Prompt::Text(top.required("prompt", text)?.to_owned())
    };
    Ok(TokenizeRequest {
        model,
        prompt,
        // llama-server's shorter name means the same.
        add_special_tokens: top.flag("add_special_tokens")?.or(top.flag("add_special")?).unwrap_or(true),
        add_generation_prompt: top.flag("add_generation_prompt")?.unwrap_or(true),
    })
}

/// Model and token ids.
pub(crate) fn detokenize(body: &[u8]) -> Result<(String, Vec<u32>), ApiError> {
    let value = json(body)?;
    let top = Fields::of(&value, "")?;
    let list = top.required("tokens", top.list("tokens")?)?;
    Ok((model(&top)?, messages::token_ids("tokens", list)?))
}

fn model(top: &Fields<'_>) -> Result<String, ApiError> {
    let name = top.required("model", top.string("model")?)?;
    if name.is_empty() || name.len() > limits::MAX_MODEL_NAME_BYTES {
        return Err(top.invalid("model", format!("`model` must have 1 to {} bytes.", limits::MAX_MODEL_NAME_BYTES)));
    }
    Ok(name.to_owned())
}

/// `model`, then those of `models` that are not it. OpenRouter lets `models` stand alone.
fn models(top: &Fields<'_>) -> Result<(String, Vec<String>), ApiError> {
    let mut list = top.names("models", limits::MAX_FALLBACK_MODELS, limits::MAX_MODEL_NAME_BYTES)?;
    let first = if top.get("model").is_none() && !list.is_empty() { list.remove(0) } else { model(top)? };
    list.retain(|name| *name != first);
    Ok((first, list))
}

/// Parameters whose silent loss would change what the caller gets.
fn refuse_unsupported(flavour: Flavour, top: &Fields<'_>) -> Result<(), ApiError> {
    if top.list("functions")?.is_some_and(|tools| !tools.is_empty()) {
        return Err(top.unsupported("functions", "the older form of `tools`"));
    }
    let harmless = |v: &Value| matches!(v.as_str(), Some("none" | "auto"));
    if top.get("function_call").is_some_and(|v| !harmless(v)) {
        return Err(top.unsupported("function_call", "the older form of `tool_choice`"));
    }
    for field in ["grammar", "structured_outputs", "guided_json", "guided_regex", "guided_grammar"] {
        if top.get(field).is_some() {
            return Err(top.unsupported(field, "a constrained format"));
        }
    }
    if top.list("modalities")?.is_some_and(|list| list.iter().any(|m| m.as_str() != Some("text"))) {
        return Err(top.unsupported("modalities", "a modality other than text"));
    }
    for field in ["audio", "web_search_options"] {
        if top.get(field).is_some() {
            return Err(top.unsupported(field, "it"));
        }
    }
    if flavour == Flavour::Text && top.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(top.unsupported("suffix", "filling in before a suffix"));
    }
    Ok(())
}
