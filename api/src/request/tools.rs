//! `response_format`, `tools` and `tool_choice`: what text the reply may be.
//!
//! Schemas are kept as their author wrote them: an answer's members come in their order, which a parsed map forgets.

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use super::fields::{Fields, wrong_type};
use crate::{
    config::limits,
    error::ApiError,
    service::{Format, Tool, ToolChoice},
};

/// The parts of a body whose text matters.
#[derive(Default, Deserialize)]
struct Texts<'a> {
    #[serde(borrow, default)]
    response_format: Option<FormatText<'a>>,
    #[serde(borrow, default)]
    json_schema: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tools: Option<Vec<&'a RawValue>>,
}

#[derive(Default, Deserialize)]
struct FormatText<'a> {
    #[serde(borrow, default)]
    json_schema: Option<SchemaText<'a>>,
    #[serde(borrow, default)]
    schema: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct SchemaText<'a> {
    #[serde(borrow, default)]
    schema: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct ToolText<'a> {
    #[serde(borrow, default)]
    function: Option<FunctionText<'a>>,
}

#[derive(Default, Deserialize)]
struct FunctionText<'a> {
    #[serde(borrow, default)]
    parameters: Option<&'a RawValue>,
}

/// The schema of a function that names none.
pub(super) const NO_PARAMETERS: &str = r#"{"type":"object","properties":{}}"#;

/// Where a choice has the function's name: within `function`, or beside `type` as `/v1/responses` has it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    Nested,
    Flat,
}

/// What the reply may be, and which tools the model has.
pub(super) struct Shape {
    pub(super) format: Format,
    pub(super) tools: Vec<Tool>,
    pub(super) choice: ToolChoice,
    pub(super) parallel: bool,
}

pub(super) fn shape(top: &Fields<'_>, body: &[u8]) -> Result<Shape, ApiError> {
    let concerned = ["response_format", "json_schema", "tools"].iter().any(|field| top.get(field).is_some());
    // A wrong type inside is told better by the readers below.
    let texts: Texts<'_> = if concerned { serde_json::from_slice(body).unwrap_or_default() } else { Texts::default() };
    let format = format(top, &texts)?;
    let tools = tools(top, &texts)?;
    let choice = choice(top, &tools, Naming::Nested)?;
    fits(top, &format, &choice, "response_format")?;
    Ok(Shape { format, tools, choice, parallel: top.flag("parallel_tool_calls")?.unwrap_or(true) })
}

/// A forced call is all that a reply holds.
pub(super) fn fits(top: &Fields<'_>, format: &Format, choice: &ToolChoice, field: &str) -> Result<(), ApiError> {
    if *format != Format::Text && matches!(choice, ToolChoice::Required | ToolChoice::Named(_)) {
        return Err(top.invalid(field, format!("A forced tool call leaves no room for a format in `{field}`.")));
    }
    Ok(())
}

fn format(top: &Fields<'_>, texts: &Texts<'_>) -> Result<Format, ApiError> {
    // llama-server's own word.
    if let Some(schema) = texts.json_schema.filter(|_| top.get("json_schema").is_some()) {
        return Ok(Format::JsonSchema { schema: schema.get().to_owned(), param: "json_schema" });
    }
    let Some(format) = top.object("response_format")? else { return Ok(Format::Text) };
    let given = texts.response_format.as_ref();
    match format.required("type", format.string("type")?)? {
        "text" => Ok(Format::Text),
        "json_object" => match given.and_then(|given| given.schema) {
            Some(schema) => Ok(Format::JsonSchema { schema: schema.get().to_owned(), param: "response_format.schema" }),
            None => Ok(Format::JsonObject),
        },
        "json_schema" => {
            let outer = format.required("json_schema", format.object("json_schema")?)?;
            let schema = outer.required("schema", outer.get("schema"))?;
            if !schema.is_object() && !schema.is_boolean() {
                return Err(wrong_type(&outer.name("schema"), "an object", schema));
            }
            let text = given.and_then(|given| given.json_schema.as_ref()?.schema).map(RawValue::get);
            let schema = text.map_or_else(|| schema.to_string(), str::to_owned);
            Ok(Format::JsonSchema { schema, param: "response_format.json_schema.schema" })
        }
        _ => Err(format.invalid("type", "`response_format.type` must be one of text, json_object, json_schema.")),
    }
}

fn tools(top: &Fields<'_>, texts: &Texts<'_>) -> Result<Vec<Tool>, ApiError> {
    let list = top.list("tools")?.unwrap_or_default();
    if list.len() > limits::MAX_TOOLS {
        return Err(top.invalid("tools", format!("`tools` may hold at most {}.", limits::MAX_TOOLS)));
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let outer = Fields::of(value, format!("tools[{i}]"))?;
        if outer.required("type", outer.string("type")?)? != "function" {
            return Err(outer.unsupported("type", "a tool that is not a function"));
        }
        let function = outer.required("function", outer.object("function")?)?;
        let name = name(&function, &tools)?;
        function.string("description")?;
        function.flag("strict")?;
        function.object("parameters")?;
        let text =
            texts.tools.as_ref().and_then(|all| all.get(i)).map_or_else(|| value.to_string(), |t| t.get().to_owned());
        let inner: ToolText<'_> = serde_json::from_str(&text).unwrap_or_default();
        let parameters = inner.function.and_then(|f| f.parameters).map(RawValue::get).filter(|text| *text != "null");
        tools.push(Tool {
            name: name.to_owned(),
            parameters: parameters.unwrap_or(NO_PARAMETERS).to_owned(),
            param: function.name("parameters"),
            json: text,
        });
    }
    Ok(tools)
}

/// A function's name, which no other tool has.
pub(super) fn name<'a>(function: &Fields<'a>, known: &[Tool]) -> Result<&'a str, ApiError> {
    let name = function.required("name", function.string("name")?)?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    if name.is_empty() || name.len() > limits::MAX_TOOL_NAME_BYTES || !name.bytes().all(plain) {
        let most = limits::MAX_TOOL_NAME_BYTES;
        let message = format!("`{}` must be 1 to {most} letters, digits, `_`, `-` or `.`.", function.name("name"));
        return Err(function.invalid("name", message));
    }
    if known.iter().any(|known| known.name == name) {
        return Err(function.invalid("name", format!("Two tools are called {name:?}.")));
    }
    Ok(name)
}

pub(super) fn choice(top: &Fields<'_>, tools: &[Tool], naming: Naming) -> Result<ToolChoice, ApiError> {
    let choice = match top.get("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => {
                return Err(
                    top.invalid("tool_choice", "`tool_choice` must be none, auto, required or name a function.")
                );
            }
        },
        Some(value) => {
            let named = Fields::of(value, "tool_choice")?;
            if named.required("type", named.string("type")?)? != "function" {
                return Err(named.unsupported("type", "a choice that is not a function"));
            }
            let function = match naming {
                Naming::Nested => named.required("function", named.object("function")?)?,
                Naming::Flat => named,
            };
            let name = function.required("name", function.string("name")?)?;
            if tools.iter().all(|tool| tool.name != name) {
                return Err(function.invalid("name", "`tool_choice` names a function that is not among `tools`."));
            }
            ToolChoice::Named(name.to_owned())
        }
    };
    if choice == ToolChoice::Required && tools.is_empty() {
        return Err(top.invalid("tool_choice", "`tool_choice` is required and there are no `tools`."));
    }
    Ok(choice)
}
