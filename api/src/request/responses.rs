//! `/v1/responses`: input items, instructions, flat tools and `text.format`, read into the same request as a chat's.
//!
//! Stateless: whatever needs a response that is kept somewhere is refused by name. Thinking that a client sends back is left
//! out, as the models' templates do.

use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    Parsed, ask,
    fields::{Fields, wrong_type},
    json, models, routing, sampling, tools,
};
use crate::{
    config::limits,
    error::ApiError,
    service::{CompletionRequest, Format, Message, MessageCall, Prompt, Role, Tool},
};

/// What a response repeats of its request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Echo {
    /// A JSON object as text: in memory its values are up to a hundred times as large, and a reply may take an hour.
    repeated: String,
    pub(crate) max_output_tokens: Option<u32>,
    pub(crate) parallel_tool_calls: bool,
    pub(crate) top_logprobs: u32,
}

impl Echo {
    /// Members of the response that say what its request said.
    pub(crate) fn repeated(&self) -> Map<String, Value> {
        serde_json::from_str(&self.repeated).unwrap_or_default()
    }
}

/// The parts of a body whose text matters.
#[derive(Default, Deserialize)]
struct Texts<'a> {
    #[serde(borrow, default)]
    text: Option<TextText<'a>>,
    #[serde(borrow, default)]
    tools: Option<Vec<ToolText<'a>>>,
}

#[derive(Default, Deserialize)]
struct TextText<'a> {
    #[serde(borrow, default)]
    format: Option<FormatText<'a>>,
}

#[derive(Default, Deserialize)]
struct FormatText<'a> {
    #[serde(borrow, default)]
    schema: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct ToolText<'a> {
    #[serde(borrow, default)]
    parameters: Option<&'a RawValue>,
}

pub(crate) fn response(body: &[u8], fresh_seed: u64) -> Result<(Parsed, Echo), ApiError> {
    let value = json(body)?;
    let top = Fields::of(&value, "")?;
    refuse_state(&top)?;
    let (model, fallback_models) = models(&top)?;
    let mut messages = Vec::new();
    if let Some(text) = top.string("instructions")? {
        messages.push(said(Role::System, text.to_owned()));
    }
    input(&top, &mut messages)?;
    // A wrong type inside is told better by the readers below.
    let texts: Texts<'_> = serde_json::from_slice(body).unwrap_or_default();
    let format = format(&top, &texts)?;
    let tools = flat_tools(&top, &texts)?;
    let tool_choice = tools::choice(&top, &tools, tools::Naming::Flat)?;
    tools::fits(&top, &format, &tool_choice, "text")?;
    let parallel_tool_calls = top.flag("parallel_tool_calls")?.unwrap_or(true);
    let top_logprobs = top_logprobs(&top)?;
    let max_tokens = top.integer_u32("max_output_tokens", 1..=limits::MAX_TOKENS)?;
    let stream = top.flag("stream")?.unwrap_or(false);
    // Of its own options none changes what is sent.
    top.object("stream_options")?;
    top.object("metadata")?;
    top.object("reasoning")?;
    let tools_told: Value = top.list("tools")?.unwrap_or_default().iter().map(whole_tool).collect();
    let repeated = json!({
        "instructions": top.get("instructions"),
        "metadata": top.get("metadata").cloned().unwrap_or_else(|| json!({})),
        "reasoning": { "effort": null, "summary": null },
        "temperature": top.get("temperature").cloned().unwrap_or_else(|| json!(1)),
        "top_p": top.get("top_p").cloned().unwrap_or_else(|| json!(1)),
        "text": top.get("text").cloned().unwrap_or_else(|| json!({ "format": { "type": "text" } })),
        "tool_choice": top.get("tool_choice").cloned().unwrap_or_else(|| json!("auto")),
        "tools": tools_told,
    });
    let echo = Echo {
        repeated: repeated.to_string(),
        max_output_tokens: max_tokens,
        parallel_tool_calls,
        top_logprobs: top_logprobs.unwrap_or(0),
    };
    let request = CompletionRequest {
        model,
        fallback_models,
        prompt: Prompt::Messages(messages),
        format,
        tools,
        tool_choice,
        parallel_tool_calls,
        top_logprobs,
        sampling: sampling::sampling(&top, fresh_seed)?,
        stop: sampling::stop(&top)?,
        max_tokens,
        routing: routing::routing(&top)?,
    };
    Ok((ask(request, stream), echo))
}

/// OpenAI's schema wants both fields in an answer, null or not.
fn whole_tool(tool: &Value) -> Value {
    let mut tool = tool.clone();
    if let Some(object) = tool.as_object_mut() {
        for field in ["parameters", "strict"] {
            object.entry(field).or_insert(Value::Null);
        }
    }
    tool
}

/// What would need an earlier response, or work that goes on without a client.
fn refuse_state(top: &Fields<'_>) -> Result<(), ApiError> {
    for field in ["previous_response_id", "conversation"] {
        if top.get(field).is_some() {
            let message = format!("`{field}`: this node keeps no responses; send the whole conversation in `input`.");
            return Err(ApiError::bad("unsupported_parameter", field, message));
        }
    }
    if top.flag("background")? == Some(true) {
        return Err(top.unsupported("background", "work without a client that waits for it"));
    }
    for (field, what) in [("prompt", "a stored prompt"), ("context_management", "compaction")] {
        if top.get(field).is_some() {
            return Err(top.unsupported(field, what));
        }
    }
    Ok(())
}

fn said(role: Role, content: String) -> Message {
    Message { role, content, name: None, tool_calls: Vec::new(), tool_call_id: None }
}

fn input(top: &Fields<'_>, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    let items = match top.required("input", top.get("input"))? {
        Value::String(text) => {
            messages.push(said(Role::User, text.clone()));
            return Ok(());
        }
        Value::Array(items) if items.is_empty() => {
            return Err(top.invalid("input", "`input` must hold at least one item."));
        }
        Value::Array(items) if items.len() > limits::MAX_MESSAGES => {
            return Err(top.invalid("input", format!("`input` may hold at most {} items.", limits::MAX_MESSAGES)));
        }
        Value::Array(items) => items,
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            return Err(wrong_type("input", "a string or an array of items", other));
        }
    };
    for (i, value) in items.iter().enumerate() {
        item(&Fields::of(value, format!("input[{i}]"))?, messages)?;
    }
    if messages.iter().all(|message| message.role == Role::System) && top.get("instructions").is_some() {
        return Err(top.invalid("input", "`input` says nothing to answer."));
    }
    Ok(())
}

fn item(fields: &Fields<'_>, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    match fields.string("type")?.unwrap_or("message") {
        "message" => {
            let role = match fields.required("role", fields.string("role")?)? {
                "system" => Role::System,
                "developer" => Role::Developer,
                "user" => Role::User,
                "assistant" => Role::Assistant,
                _ => return Err(fields.invalid("role", "A role is one of system, developer, user, assistant.")),
            };
            messages.push(said(role, parts(fields, "content")?));
        }
        "function_call" => {
            let call = MessageCall {
                id: fields.required("call_id", fields.string("call_id")?)?.to_owned(),
                name: fields.required("name", fields.string("name")?)?.to_owned(),
                arguments: fields.required("arguments", fields.string("arguments")?)?.to_owned(),
            };
            // Calls beside each other, and what was said before them, are one turn of the model.
            match messages.last_mut() {
                Some(last) if last.role == Role::Assistant => last.tool_calls.push(call),
                Some(_) | None => {
                    messages.push(Message { tool_calls: vec![call], ..said(Role::Assistant, String::new()) });
                }
            }
        }
        "function_call_output" => {
            let id = fields.required("call_id", fields.string("call_id")?)?.to_owned();
            let result = said(Role::Tool, parts(fields, "output")?);
            messages.push(Message { tool_call_id: Some(id), ..result });
        }
        "reasoning" => {}
        "item_reference" => {
            let message = "This node keeps no items; send the item itself.";
            return Err(fields.invalid("type", message));
        }
        other => {
            let shown: String = other.chars().take(40).collect();
            return Err(fields.unsupported("type", &format!("an item {shown:?}")));
        }
    }
    Ok(())
}

/// A string, or parts of text, joined by line breaks as in a chat.
fn parts(fields: &Fields<'_>, field: &str) -> Result<String, ApiError> {
    let list = match fields.required(field, fields.get(field))? {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(list) => list,
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            return Err(wrong_type(&fields.name(field), "a string or an array of parts", other));
        }
    };
    let texts = list.iter().enumerate().map(|(i, part)| {
        let part = Fields::of(part, fields.name(&format!("{field}[{i}]")))?;
        match part.required("type", part.string("type")?)? {
            "input_text" | "output_text" | "text" => part.required("text", part.string("text")?),
            "refusal" => part.required("refusal", part.string("refusal")?),
            "input_image" => Err(part.unsupported("type", "an image")),
            "input_audio" => Err(part.unsupported("type", "audio")),
            "input_file" => Err(part.unsupported("type", "a file")),
            _ => Err(part.unsupported("type", "a part that is not text")),
        }
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

fn format(top: &Fields<'_>, texts: &Texts<'_>) -> Result<Format, ApiError> {
    let Some(text) = top.object("text")? else { return Ok(Format::Text) };
    let Some(format) = text.object("format")? else { return Ok(Format::Text) };
    match format.required("type", format.string("type")?)? {
        "text" => Ok(Format::Text),
        "json_object" => Ok(Format::JsonObject),
        "json_schema" => {
            format.required("schema", format.object("schema")?)?;
            let given = texts.text.as_ref().and_then(|text| text.format.as_ref()?.schema).map(RawValue::get);
            let param = "text.format.schema";
            let schema = given.map_or_else(String::new, str::to_owned);
            Ok(Format::JsonSchema { schema, param })
        }
        _ => Err(format.invalid("type", "`text.format.type` must be one of text, json_object, json_schema.")),
    }
}

/// `{type, name, parameters}`, where a chat has a `function` in between. Templates read the chat's form.
fn flat_tools(top: &Fields<'_>, texts: &Texts<'_>) -> Result<Vec<Tool>, ApiError> {
    let list = top.list("tools")?.unwrap_or_default();
    if list.len() > limits::MAX_TOOLS {
        return Err(top.invalid("tools", format!("`tools` may hold at most {}.", limits::MAX_TOOLS)));
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let tool = Fields::of(value, format!("tools[{i}]"))?;
        if tool.required("type", tool.string("type")?)? != "function" {
            return Err(tool.unsupported("type", "a tool that is not a function"));
        }
        let name = tools::name(&tool, &tools)?;
        let description = tool.string("description")?;
        tool.object("parameters")?;
        let given = texts.tools.as_ref().and_then(|all| all.get(i)?.parameters).map(RawValue::get);
        let parameters = given.filter(|text| *text != "null").unwrap_or(tools::NO_PARAMETERS);
        let described = description.map(|text| format!(",\"description\":{}", json!(text))).unwrap_or_default();
        tools.push(Tool {
            json: format!(
                "{{\"type\":\"function\",\"function\":{{\"name\":{}{described},\"parameters\":{parameters}}}}}",
                json!(name)
            ),
            name: name.to_owned(),
            parameters: parameters.to_owned(),
            param: tool.name("parameters"),
        });
    }
    Ok(tools)
}

/// Asked for by `include`, or by a number.
fn top_logprobs(top: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let count = top.integer_u32("top_logprobs", 0..=limits::MAX_TOP_LOGPROBS)?;
    let included = top.list("include")?.unwrap_or_default();
    let asked = included.iter().any(|name| name.as_str() == Some("message.output_text.logprobs"));
    Ok(if asked { Some(count.unwrap_or(0)) } else { count.filter(|count| *count > 0) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::ToolChoice;

    fn read(body: &Value) -> Result<(Parsed, Echo), (String, Option<String>)> {
        response(body.to_string().as_bytes(), 7)
            .map_err(|error| (error.body.message.clone(), error.body.param().map(str::to_owned)))
    }

    fn with(extra: Value) -> Value {
        let mut body = json!({"model": "m", "input": "hi"});
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    }

    #[test]
    fn items_become_the_turns_of_a_chat() {
        let (parsed, _) = read(&with(json!({"instructions": "be brief", "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
            {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "y", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "x", "output": "1"},
            {"type": "function_call_output", "call_id": "y", "output": [{"type": "input_text", "text": "2"}]},
        ]})))
        .unwrap();
        let Prompt::Messages(messages) = parsed.request.prompt else { panic!("no messages") };
        let told: Vec<_> = messages
            .iter()
            .map(|m| (m.role.as_str(), m.content.as_str(), m.tool_calls.len(), m.tool_call_id.as_deref()))
            .collect();
        assert_eq!(
            told,
            [
                ("system", "be brief", 0, None),
                ("user", "a\nb", 0, None),
                ("assistant", "c", 2, None),
                ("tool", "1", 0, Some("x")),
                ("tool", "2", 0, Some("y")),
            ]
        );
    }

    #[test]
    fn tools_and_format_are_flat_and_keep_their_order() {
        let body = r#"{"model":"m","input":"hi","text":{"format":{"type":"json_schema","name":"n","schema":{"z":1,"a":2}}},
            "tools":[{"type":"function","name":"f","description":"d","parameters":{"y":1,"b":2}}],"max_output_tokens":9}"#;
        let (parsed, echo) = response(body.as_bytes(), 7).unwrap();
        let request = parsed.request;
        assert_eq!(
            request.format,
            Format::JsonSchema { schema: r#"{"z":1,"a":2}"#.into(), param: "text.format.schema" }
        );
        assert_eq!(request.tools[0].parameters, r#"{"y":1,"b":2}"#);
        let written = r#"{"type":"function","function":{"name":"f","description":"d","parameters":{"y":1,"b":2}}}"#;
        assert_eq!(request.tools[0].json, written);
        assert_eq!((request.max_tokens, request.sampling.seed), (Some(9), 7));
        let repeated = echo.repeated();
        assert_eq!(
            repeated["tools"][0],
            json!({"type": "function", "name": "f", "description": "d",
            "parameters": {"y": 1, "b": 2}, "strict": null})
        );
        assert_eq!(repeated["text"]["format"]["schema"], json!({"z": 1, "a": 2}));
        for (name, value) in [("instructions", Value::Null), ("metadata", json!({})), ("top_p", json!(1))] {
            assert_eq!(repeated.get(name), Some(&value), "{name}");
        }
        let named = with(
            json!({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "f"}}),
        );
        assert_eq!(read(&named).unwrap().0.request.tool_choice, ToolChoice::Named("f".into()));
    }

    #[test]
    fn refusals_name_their_parameter() {
        for (extra, param) in [
            (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
            (json!({"conversation": "c"}), "conversation"),
            (json!({"background": true}), "background"),
            (json!({"input": []}), "input"),
            (json!({"input": 3}), "input"),
            (json!({"input": null}), "input"),
            (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type"),
            (json!({"input": [{"type": "computer_call"}]}), "input[0].type"),
            (json!({"input": [{"role": "king", "content": "x"}]}), "input[0].role"),
            (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content[0].type"),
            (json!({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}), "input[0].arguments"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"text": {"format": {"type": "json_schema"}}}), "text.format.schema"),
            (json!({"text": {"format": {"type": "xml"}}}), "text.format.type"),
            (json!({"max_output_tokens": 0}), "max_output_tokens"),
            (json!({"top_logprobs": 21}), "top_logprobs"),
            (json!({"metadata": "x"}), "metadata"),
        ] {
            let (message, found) = read(&with(extra.clone())).map(drop).unwrap_err();
            assert_eq!(found.as_deref(), Some(param), "{extra}: {message}");
        }
        assert!(read(&with(json!({"unheard_of": [1], "store": true, "truncation": "auto", "include": []}))).is_ok());
    }
}
