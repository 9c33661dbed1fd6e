//! Sampling, stop strings and length, with OpenAI's ranges and llama-server's and OpenRouter's extra names.

use satgrid_types::{MAX_LOGIT_BIAS, Sampling};
use serde_json::Value;

use super::fields::{Fields, micro, wrong_type};
use crate::{config::limits, error::ApiError, reply::Flavour};

/// What a client that sets nothing gets: OpenAI samples at temperature 1, unlike [`Sampling::default`], which is greedy.
const DEFAULT_TEMPERATURE_MICRO: u32 = 1_000_000;

/// `fresh_seed` is used where the client names none.
pub(super) fn sampling(top: &Fields<'_>, fresh_seed: u64) -> Result<Sampling, ApiError> {
    let none = Sampling::default();
    let repeat = match top.micro_unsigned("repeat_penalty", 0.01..=10.0)? {
        Some(value) => Some(value),
        None => top.micro_unsigned("repetition_penalty", 0.01..=10.0)?,
    };
    Ok(Sampling {
        temperature_micro: top.micro_unsigned("temperature", 0.0..=2.0)?.unwrap_or(DEFAULT_TEMPERATURE_MICRO),
        top_p_micro: top.micro_unsigned("top_p", 0.0..=1.0)?.unwrap_or(none.top_p_micro),
        top_k: top_k(top)?,
        min_p_micro: top.micro_unsigned("min_p", 0.0..=1.0)?.unwrap_or(none.min_p_micro),
        presence_penalty_micro: top.micro("presence_penalty", -2.0..=2.0)?.unwrap_or(none.presence_penalty_micro),
        frequency_penalty_micro: top.micro("frequency_penalty", -2.0..=2.0)?.unwrap_or(none.frequency_penalty_micro),
        repeat_penalty_micro: repeat.unwrap_or(none.repeat_penalty_micro),
        logit_bias_micro: logit_bias(top)?,
        seed: seed(top)?.unwrap_or(fresh_seed),
    })
}

/// -1 is vLLM's word for "every token"; ours and llama.cpp's is 0.
fn top_k(top: &Fields<'_>) -> Result<u32, ApiError> {
    if top.get("top_k").and_then(Value::as_i64) == Some(-1) {
        return Ok(0);
    }
    Ok(top.integer_u32("top_k", 0..=limits::MAX_TOKENS)?.unwrap_or(0))
}

/// Any integer of 64 bits, signed or not; a negative one keeps its bits.
fn seed(top: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    let Some(value) = top.get("seed") else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| wrong_type(&top.name("seed"), "an integer of 64 bits", value))
}

fn logit_bias(top: &Fields<'_>) -> Result<Vec<(u32, i32)>, ApiError> {
    let Some(value) = top.get("logit_bias") else { return Ok(Vec::new()) };
    let Some(map) = value.as_object() else {
        return Err(wrong_type(&top.name("logit_bias"), "an object from token id to bias", value));
    };
    if map.len() > MAX_LOGIT_BIAS {
        return Err(top.invalid("logit_bias", format!("`logit_bias` may name at most {MAX_LOGIT_BIAS} tokens.")));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (id, bias) in map {
        let token = id.parse::<u32>().ok();
        let bias = bias.as_f64().and_then(|bias| micro(bias, &(-100.0..=100.0)));
        match (token, bias) {
            (Some(token), Some(bias)) => biases.push((token, bias)),
            (_, _) => {
                let shown: String = id.chars().take(20).collect();
                let message = format!("`logit_bias` maps token ids to numbers from -100 to 100; see {shown:?}.");
                return Err(top.invalid("logit_bias", message));
            }
        }
    }
    biases.sort_unstable();
    // "7" and "07" are one token.
    if biases.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(top.invalid("logit_bias", "`logit_bias` names a token twice."));
    }
    Ok(biases)
}

pub(super) fn stop(top: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    match top.get("stop") {
        Some(Value::String(one)) if one.is_empty() || one.len() > limits::MAX_STOP_BYTES => {
            Err(top.invalid("stop", format!("`stop` must have 1 to {} bytes.", limits::MAX_STOP_BYTES)))
        }
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(_)) | None => top.names("stop", limits::MAX_STOPS, limits::MAX_STOP_BYTES),
        Some(other) => Err(wrong_type("stop", "a string or an array of strings", other)),
    }
}

/// Chat says whether and how many more; the legacy endpoint says how many, of which 0 still asks for the chosen token's.
pub(super) fn top_logprobs(flavour: Flavour, top: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let most = limits::MAX_TOP_LOGPROBS;
    if flavour == Flavour::Text {
        // `false` is what chat clients send by habit.
        let off = top.get("logprobs").and_then(Value::as_bool) == Some(false);
        return if off { Ok(None) } else { top.integer_u32("logprobs", 0..=most) };
    }
    let asked = top.flag("logprobs")?.unwrap_or(false);
    match top.integer_u32("top_logprobs", 0..=most)? {
        Some(count) if count > 0 && !asked => {
            Err(top.invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true."))
        }
        count => Ok(asked.then_some(count.unwrap_or(0))),
    }
}

/// `max_completion_tokens` is the newer name of `max_tokens`; two different figures contradict each other.
pub(super) fn max_tokens(top: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let older = top.integer_u32("max_tokens", 1..=limits::MAX_TOKENS)?;
    let newer = top.integer_u32("max_completion_tokens", 1..=limits::MAX_TOKENS)?;
    match (older, newer) {
        (Some(a), Some(b)) if a != b => {
            Err(top.invalid("max_tokens", "`max_tokens` and `max_completion_tokens` contradict each other."))
        }
        (older, newer) => Ok(newer.or(older)),
    }
}
