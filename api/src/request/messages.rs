//! `messages` and `prompt`: what the model is to continue.

use serde_json::Value;

use super::fields::{Fields, wrong_type};
use crate::{
    config::limits,
    error::ApiError,
    service::{Message, MessageCall, Prompt, Role},
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
        "tool" => Role::Tool,
        "function" => return Err(fields.unsupported("role", "the older form of `tool`")),
        other => {
            let shown: String = other.chars().take(40).collect();
            let message = format!(
                "`{}` must be one of system, developer, user, assistant, tool, not {shown:?}.",
                fields.name("role")
            );
            return Err(fields.invalid("role", message));
        }
    };
    if fields.get("function_call").is_some() {
        return Err(fields.unsupported("function_call", "the older form of `tool_calls`"));
    }
    let tool_calls = tool_calls(fields, role)?;
    let tool_call_id = fields.string("tool_call_id")?.map(str::to_owned);
    if role == Role::Tool {
        fields.required("tool_call_id", tool_call_id.as_ref())?;
    }
    if fields.get("audio").is_some() {
        return Err(fields.unsupported("audio", "audio"));
    }
    // A reply that only calls tools has no content.
    let silent = !tool_calls.is_empty() && fields.get("content").is_none();
    let content = if silent { String::new() } else { content(fields)? };
    Ok(Message { role, content, name: fields.string("name")?.map(str::to_owned), tool_calls, tool_call_id })
}

/// Calls that an earlier reply made.
fn tool_calls(fields: &Fields<'_>, role: Role) -> Result<Vec<MessageCall>, ApiError> {
    let list = fields.list("tool_calls")?.unwrap_or_default();
    if !list.is_empty() && role != Role::Assistant {
        return Err(fields.invalid("tool_calls", "Only an assistant's message holds `tool_calls`."));
    }
    let call = |(i, value)| {
        let call = Fields::of(value, format!("{}[{i}]", fields.name("tool_calls")))?;
        let function = call.required("function", call.object("function")?)?;
        Ok(MessageCall {
            id: call.required("id", call.string("id")?)?.to_owned(),
            name: function.required("name", function.string("name")?)?.to_owned(),
            arguments: function.required("arguments", function.string("arguments")?)?.to_owned(),
        })
    };
    list.iter().enumerate().map(call).collect()
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

/// The legacy endpoint's `prompt`: a text, token ids, or a list of those.
pub(super) fn prompts(top: &Fields<'_>) -> Result<Vec<Prompt>, ApiError> {
    let value = top.required("prompt", top.get("prompt"))?;
    if let Value::Array(list) = value
        && matches!(list.first(), Some(Value::String(_) | Value::Array(_)))
    {
        return list.iter().enumerate().map(|(i, one)| prompt(&format!("prompt[{i}]"), one)).collect();
    }
    Ok(vec![prompt("prompt", value)?])
}

fn prompt(name: &str, value: &Value) -> Result<Prompt, ApiError> {
    match value {
        Value::String(text) if text.is_empty() => {
            Err(ApiError::bad("invalid_value", name, format!("`{name}` is empty.")))
        }
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(ids) => Ok(Prompt::Tokens(token_ids(name, ids)?)),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            Err(wrong_type(name, "a string or an array", other))
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
