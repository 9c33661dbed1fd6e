//! `messages` and `prompt`: what the model is to continue.

use serde_json::Value;

use super::fields::{Fields, wrong_type};
use crate::{
    config::limits,
    error::ApiError,
    service::{Message, Prompt, Role},
};

pub(super) fn messages(top: &Fields<'_>) -> Result<Vec<Message>, ApiError> {
    let list = top.required("messages", top.list("messages")?)?;
    if list.is_empty() {
        return Err(top.invalid("messages", "`messages` must hold at least one message."));
    }
    if list.len() > limits::MAX_MESSAGES {
        return Err(top.invalid("messages", format!("`messages` may hold at most {}.", limits::MAX_MESSAGES)));
    }
    list.iter().enumerate().map(|(i, value)| message(&Fields::of(value, format!("messages[{i}]"))?)).collect()
}

fn message(fields: &Fields<'_>) -> Result<Message, ApiError> {
    let role = match fields.required("role", fields.string("role")?)? {
        "system" => Role::System,
        "developer" => Role::Developer,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" | "function" => return Err(fields.unsupported("role", "a tool's result")),
        other => {
            let shown: String = other.chars().take(40).collect();
            let message =
                format!("`{}` must be one of system, developer, user, assistant, not {shown:?}.", fields.name("role"));
            return Err(fields.invalid("role", message));
        }
    };
    for field in ["tool_calls", "function_call"] {
        let given = fields.get(field).is_some_and(|v| v.as_array().is_none_or(|calls| !calls.is_empty()));
        if given {
            return Err(fields.unsupported(field, "tool calling"));
        }
    }
    if fields.get("audio").is_some() {
        return Err(fields.unsupported("audio", "audio"));
    }
    Ok(Message { role, content: content(fields)?, name: fields.string("name")?.map(str::to_owned) })
}

/// A string, or text parts, which are joined by line breaks as llama.cpp and vLLM do.
fn content(fields: &Fields<'_>) -> Result<String, ApiError> {
    match fields.required("content", fields.get("content"))? {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) if parts.is_empty() => {
            Err(fields.invalid("content", format!("`{}` may not be an empty array.", fields.name("content"))))
        }
        Value::Array(parts) => {
            let texts = parts.iter().enumerate().map(|(i, part)| {
                let part = Fields::of(part, fields.name(&format!("content[{i}]")))?;
                match part.required("type", part.string("type")?)? {
                    "text" => part.required("text", part.string("text")?),
                    "refusal" => part.required("refusal", part.string("refusal")?),
                    "image_url" => Err(part.unsupported("type", "an image")),
                    "input_audio" => Err(part.unsupported("type", "audio")),
                    _ => Err(part.unsupported("type", "a part that is not text")),
                }
            });
            Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            Err(wrong_type(&fields.name("content"), "a string or an array of parts", other))
        }
    }
}

/// The legacy endpoint's `prompt`: a text, token ids, or a list that holds exactly one of those.
pub(super) fn prompt(top: &Fields<'_>) -> Result<Prompt, ApiError> {
    let mut value = top.required("prompt", top.get("prompt"))?;
    if let Value::Array(list) = value {
        match list.as_slice() {
            [] => return Err(top.invalid("prompt", "`prompt` is empty.")),
            [only @ (Value::String(_) | Value::Array(_))] => value = only,
            [Value::String(_) | Value::Array(_), ..] => {
                return Err(top.unsupported("prompt", "more than one prompt in a request"));
            }
            _ => {}
        }
    }
    match value {
        Value::String(text) if text.is_empty() => Err(top.invalid("prompt", "`prompt` is empty.")),
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(ids) => Ok(Prompt::Tokens(token_ids(&top.name("prompt"), ids)?)),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            Err(wrong_type("prompt", "a string or an array", other))
        }
    }
}

/// Token ids, at least one.
pub(super) fn token_ids(name: &str, list: &[Value]) -> Result<Vec<u32>, ApiError> {
    if list.is_empty() {
        return Err(ApiError::bad("invalid_value", name, format!("`{name}` is empty.")));
    }
    list.iter()
        .enumerate()
        .map(|(i, value)| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| wrong_type(&format!("{name}[{i}]"), "a token id (an integer of 32 bits)", value))
        })
        .collect()
}
