//! Each server's requests, and what one event of its stream says. Pure: JSON in, JSON out.

use satgrid_engine::sampling::Sampling;
use serde_json::{Map, Value, json};

use crate::config::Dialect;

/// A prompt as the server takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PromptForm {
    Ids(Vec<u32>),
    Text(String),
}

/// What is asked of a server at once.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ask<'a> {
    pub(crate) model: &'a str,
    pub(crate) prompt: &'a PromptForm,
    pub(crate) sampling: &'a Sampling,
    pub(crate) max_output: u32,
    pub(crate) ignore_eos: bool,
}

/// What one event of a stream brings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) ids: Vec<u32>,
    pub(crate) text: String,
    pub(crate) end: Option<End>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Stop,
    Length,
}

/// Where completions are asked for.
pub(crate) const fn path(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::LlamaServer => "/completion",
        Dialect::Sglang => "/generate",
        Dialect::Ollama => "/api/generate",
        Dialect::Vllm | Dialect::Text => "/v1/completions",
    }
}

/// The request's body; its answer is a stream.
pub(crate) fn body(dialect: Dialect, ask: &Ask<'_>) -> Value {
    let Ask { model, prompt, sampling: s, max_output, ignore_eos } = ask;
    let prompt = match prompt {
        PromptForm::Ids(ids) => json!(ids),
        PromptForm::Text(text) => json!(text),
    };
    // Servers read seeds as signed 32-bit numbers, some as unsigned: 31 bits mean the same to all.
    let seed = s.seed & 0x7fff_ffff;
    let bias_map = || -> Map<String, Value> { s.logit_bias.iter().map(|(id, b)| (id.to_string(), json!(b))).collect() };
    match dialect {
        Dialect::LlamaServer => json!({
            "prompt": prompt, "n_predict": max_output, "stream": true, "return_tokens": true, "cache_prompt": true,
            "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p,
            "presence_penalty": s.presence_penalty, "frequency_penalty": s.frequency_penalty,
            "repeat_penalty": s.repeat_penalty, "repeat_last_n": s.repeat_window, "seed": seed,
            "ignore_eos": ignore_eos,
            "logit_bias": s.logit_bias.iter().map(|(id, bias)| json!([id, bias])).collect::<Vec<_>>(),
        }),
        Dialect::Vllm => json!({
            "model": model, "prompt": prompt, "max_tokens": max_output, "stream": true, "return_token_ids": true,
            "temperature": s.temperature, "top_p": s.top_p, "top_k": if s.top_k == 0 { -1 } else { i64::from(s.top_k) },
            "min_p": s.min_p, "presence_penalty": s.presence_penalty, "frequency_penalty": s.frequency_penalty,
            "repetition_penalty": s.repeat_penalty, "seed": seed, "ignore_eos": ignore_eos,
            "add_special_tokens": false, "logit_bias": bias_map(),
        }),
        Dialect::Sglang => json!({
            "input_ids": prompt, "stream": true,
            "sampling_params": {
                "max_new_tokens": max_output, "temperature": s.temperature, "top_p": s.top_p,
                "top_k": if s.top_k == 0 { -1 } else { i64::from(s.top_k) }, "min_p": s.min_p,
                "presence_penalty": s.presence_penalty, "frequency_penalty": s.frequency_penalty,
                "repetition_penalty": s.repeat_penalty, "sampling_seed": seed, "ignore_eos": ignore_eos,
                "logit_bias": bias_map(),
            },
        }),
        Dialect::Ollama => json!({
            "model": model, "prompt": prompt, "raw": true, "stream": true,
            "options": {
                "num_predict": max_output, "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k,
                "min_p": s.min_p, "presence_penalty": s.presence_penalty, "frequency_penalty": s.frequency_penalty,
                "repeat_penalty": s.repeat_penalty, "repeat_last_n": s.repeat_window, "seed": seed,
            },
        }),
        Dialect::Text => json!({
            "model": model, "prompt": prompt, "max_tokens": max_output, "stream": true, "temperature": s.temperature,
            "top_p": s.top_p, "presence_penalty": s.presence_penalty, "frequency_penalty": s.frequency_penalty,
            "seed": seed, "logit_bias": bias_map(),
        }),
    }
}

/// Reads one event. `seen` is how many ids the job has had so far, for servers that repeat them.
pub(crate) fn piece(dialect: Dialect, event: &Value, seen: usize) -> Result<Piece, String> {
    if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
        let said =
            error.get("message").and_then(Value::as_str).or(error.as_str()).unwrap_or("an error without a message");
        return Err(said.chars().take(200).collect());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(match dialect {
        Dialect::LlamaServer => Piece {
            ids: ids(&event["tokens"]),
            text: text(&event["content"]),
            end: (event["stop"] == true).then(|| match event["stop_type"].as_str() {
                Some("limit") => End::Length,
                Some(_) | None => End::Stop,
            }),
        },
        Dialect::Vllm | Dialect::Text => {
            let choice = &event["choices"][0];
            Piece { ids: ids(&choice["token_ids"]), text: text(&choice["text"]), end: end(&choice["finish_reason"]) }
        }
        Dialect::Sglang => {
            let all = ids(&event["output_ids"]);
            let counted = event["meta_info"]["completion_tokens"].as_u64().and_then(|n| usize::try_from(n).ok());
            // Its ids come as the whole output so far, or as what is new; the count beside them says which.
            let new = if counted == Some(all.len()) { all.get(seen..).unwrap_or_default().to_vec() } else { all };
            // Its text is cumulative; ids are what counts here.
            Piece { ids: new, text: String::new(), end: end(&event["meta_info"]["finish_reason"]["type"]) }
        }
        Dialect::Ollama => Piece {
            ids: Vec::new(),
            text: text(&event["response"]),
            end: if event["done"] == true { end(&event["done_reason"]).or(Some(End::Stop)) } else { None },
        },
    })
}

fn ids(value: &Value) -> Vec<u32> {
    let all = value.as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter().filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

fn end(reason: &Value) -> Option<End> {
    match reason.as_str()? {
        "length" => Some(End::Length),
        "" => None,
        _ => Some(End::Stop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_every_dialect() {
        let check = |dialect: Dialect, event: Value, seen: usize, expect: (&[u32], &str, Option<End>)| {
            let got = piece(dialect, &event, seen).unwrap();
            assert_eq!((got.ids.as_slice(), got.text.as_str(), got.end), expect, "{event}");
        };
        let llama = Dialect::LlamaServer;
        check(llama, json!({"content": " a", "tokens": [7], "stop": false}), 0, (&[7], " a", None));
        let last = json!({"content": "", "tokens": [], "stop": true, "stop_type": "limit"});
        check(llama, last, 1, (&[], "", Some(End::Length)));
        check(llama, json!({"content": "", "stop": true, "stop_type": "eos"}), 1, (&[], "", Some(End::Stop)));
        let choice = json!({"choices": [{"text": "x", "token_ids": [1, 2], "finish_reason": null}]});
        check(Dialect::Vllm, choice, 0, (&[1, 2], "x", None));
        let text = json!({"choices": [{"text": "x", "finish_reason": "stop"}]});
        check(Dialect::Text, text, 0, (&[], "x", Some(End::Stop)));
        check(Dialect::Text, json!({"choices": []}), 0, (&[], "", None));
        let whole = json!({"output_ids": [1, 2, 3], "meta_info": {"completion_tokens": 3, "finish_reason": null}});
        check(Dialect::Sglang, whole, 2, (&[3], "", None));
        let new =
            json!({"output_ids": [3], "meta_info": {"completion_tokens": 3, "finish_reason": {"type": "length"}}});
        check(Dialect::Sglang, new, 2, (&[3], "", Some(End::Length)));
        check(Dialect::Ollama, json!({"response": "hi", "done": false}), 0, (&[], "hi", None));
        check(
            Dialect::Ollama,
            json!({"response": "", "done": true, "done_reason": "length"}),
            0,
            (&[], "", Some(End::Length)),
        );
        let error = piece(Dialect::Vllm, &json!({"error": {"message": "no memory"}}), 0);
        assert_eq!(error, Err("no memory".to_owned()));
    }
}
