//! How models speak of tools: what the family of a template writes, how that is forced, and how it is read back.
//!
//! | style | a call is written as | known by |
//! |---|---|---|
//! | `Hermes` (Qwen, Hermes, and whoever has no custom of its own) | `<tool_call>` JSON `</tool_call>` | the tag in the template, or nothing else |
//! | `Mistral` | `[TOOL_CALLS]` JSON list, or name`[ARGS]`JSON | `[TOOL_CALLS]` in the template |
//! | `Llama` | the JSON alone, perhaps behind `<\|python_tag\|>` | `<\|start_header_id\|>` in the template |
//! | `Gemma` | the JSON alone, perhaps fenced | `<start_of_turn>` in the template |
//!
//! A forced call begins in the prompt and goes on under a grammar; a free one is found in the text by [`Reader`].

mod reader;

use serde_json::{Value, json};

use crate::grammar::{Builder, Grammar, Json, NodeId, SchemaError, schema_into};

pub use reader::{Part, Reader};

/// Calls that one reply may make where they are forced.
const MAX_CALLS: u32 = 16;
/// How a model marks its thinking.
pub const THINK: &str = "<think>";
pub const END_THINK: &str = "</think>";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Hermes,
    Mistral,
    Llama,
    Gemma,
}

impl Style {
    /// By the marks that a chat template holds.
    pub fn of(template: Option<&str>) -> Self {
        let has = |mark: &str| template.is_some_and(|template| template.contains(mark));
        if has("<tool_call>") {
            Self::Hermes
        } else if has("[TOOL_CALLS]") {
            Self::Mistral
        } else if has("<|start_header_id|>") || has("<|python_tag|>") {
            Self::Llama
        } else if has("<start_of_turn>") {
            Self::Gemma
        } else {
            Self::Hermes
        }
    }

    /// What stands before a call.
    pub fn open(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Mistral => "[TOOL_CALLS]",
            Self::Llama => "<|python_tag|>",
            Self::Gemma => "",
        }
    }

    fn close(self) -> &'static str {
        match self {
            Self::Hermes => "</tool_call>",
            Self::Mistral | Self::Llama | Self::Gemma => "",
        }
    }

    /// A reply that begins with a brace may be a call.
    fn is_bare(self) -> bool {
        matches!(self, Self::Llama | Self::Gemma)
    }

    fn arguments(self) -> &'static str {
        match self {
            Self::Hermes | Self::Mistral => "arguments",
            Self::Llama | Self::Gemma => "parameters",
        }
    }

    /// What a forced call's prompt ends with; the grammar begins behind it.
    pub fn begun(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>\n",
            Self::Mistral => "[TOOL_CALLS]",
            Self::Llama | Self::Gemma => "",
        }
    }

    /// One call as this style writes it, for messages of templates that know no calls.
    pub fn written(self, name: &str, arguments: &str) -> String {
        let call = format!("{{\"name\": {}, \"{}\": {arguments}}}", json!(name), self.arguments());
        match self {
            Self::Hermes => format!("<tool_call>\n{call}\n</tool_call>"),
            Self::Mistral => format!("[TOOL_CALLS][{call}]"),
            Self::Llama | Self::Gemma => call,
        }
    }

    /// Tells a model of tools that its template says nothing of.
    pub fn instruction(self, tools: &[Value]) -> String {
        let list: Vec<String> = tools.iter().map(|tool| tool.get("function").unwrap_or(tool).to_string()).collect();
        format!(
            "You can call these functions:\n{}\n\nTo call one, reply with nothing but\n{}\nfor each call.",
            list.join("\n"),
            self.written("name of the function", "{its arguments as JSON}"),
        )
    }
}

/// A tool's name and the schema of its arguments.
#[derive(Debug, Clone)]
pub struct Signature<'a> {
    pub name: &'a str,
    pub parameters: &'a Json,
}

/// The grammar of a reply that must call one of these tools, behind [`Style::begun`]. An error names the tool by its place.
pub fn forced(style: Style, tools: &[Signature<'_>], parallel: bool) -> Result<Grammar, (usize, SchemaError)> {
    let mut b = Builder::default();
    let mut calls: Vec<NodeId> = Vec::new();
    for (at, tool) in tools.iter().enumerate() {
        let head = b.text(format!("{{\"name\": {}, \"{}\": ", json!(tool.name), style.arguments()));
        let arguments = schema_into(&mut b, tool.parameters).map_err(|error| (at, error))?;
        let end = b.text("}");
        calls.push(b.sequence([head, arguments, end]));
    }
    let call = b.choice(calls);
    let (first, between, last) = match style {
        Style::Hermes => ("", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        Style::Mistral => ("[", ", ", "]"),
        Style::Llama | Style::Gemma => ("", "; ", ""),
    };
    let (first, between, last) = (b.text(first), b.text(between), b.text(last));
    let next = b.sequence([between, call]);
    // Where calls are separated and not ended, a reply that may go on never ends by itself: one call is enough there.
    let more = if parallel && style != Style::Llama && style != Style::Gemma { MAX_CALLS - 1 } else { 0 };
    let more = b.repeat(next, 0, Some(more));
    let root = b.sequence([first, call, more, last]);
    let whole = |error: crate::grammar::GrammarError| SchemaError { path: String::new(), reason: error.to_string() };
    b.finish(root).map_err(|error| (0, whole(error)))
}

#[cfg(test)]
mod tests;
