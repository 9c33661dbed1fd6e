//! Chat templates: a list of messages to the text that a model continues.
//!
//! The template comes with the model (`tokenizer.chat_template`) and runs in minijinja with Python's string and list
//! methods, as Hugging Face runs it in Jinja2: blocks trimmed, `tojson` as Python writes JSON, `raise_exception`, and
//! `strftime_now`, whose date the caller gives. Its size, its work and its output are bounded; every failure is a
//! value. Its memory is bounded only loosely (one expression can double a string), so a template whose origin is not
//! trusted belongs in a process that may die: [`ChatOrder`] takes a conversation there.
//!
//! A base model has no template. Then [`Template::Plain`] stands in: the messages' contents, one after another, for
//! the model to go on writing. It says so by its name, [`PLAIN_NAME`], which belongs in whatever the user sees.

mod civil;
mod json;
mod order;

use std::io;

use minicbor::{Decode, Encode};
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::Value as Json;

pub use civil::CivilTime;
pub use order::ChatOrder;

/// The name of the stand-in, to be shown where it is used.
pub const PLAIN_NAME: &str = "plain-continuation";
/// The name of a template that came with the model.
pub const MODEL_NAME: &str = "model";

pub const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Instructions of one rendering: a thousand messages take about a hundred thousand.
pub const MAX_FUEL: u64 = 5_000_000;
pub const MAX_RENDERED_BYTES: usize = 8 << 20;
const MAX_RECURSION: usize = 100;

/// What a conversation is rendered from.
#[derive(Debug, Clone, Copy)]
pub struct ChatInput<'a> {
    /// OpenAI's message objects. A content of text parts only is joined to one string.
    pub messages: &'a [Json],
    pub tools: Option<&'a Json>,
    /// End with the opening of the assistant's answer.
    pub add_generation_prompt: bool,
    /// What `strftime_now` tells.
    pub now: CivilTime,
}

/// Text for the tokenizer, and how to tokenise it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Prompt {
    #[n(0)]
    pub text: String,
    /// Whether the tokenizer puts BOS in front; false where the template already wrote it.
    #[n(1)]
    pub add_special: bool,
    /// Whether the names of control tokens in the text are those tokens.
    #[n(2)]
    pub parse_special: bool,
}

/// Why there is no prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum TemplateError {
    #[n(0)]
    #[error("a chat template of {bytes} bytes is over the limit of {MAX_TEMPLATE_BYTES}")]
    TooLarge {
        #[n(0)]
        bytes: usize,
    },
    #[n(1)]
    #[error("the model's chat template does not compile: {reason}")]
    Syntax {
        #[n(0)]
        reason: String,
    },
    #[n(2)]
    #[error("there are no messages")]
    NoMessages,
    #[n(3)]
    #[error("message {index} has a content that is neither text nor absent")]
    NotText {
        #[n(0)]
        index: usize,
    },
    /// The template's own objection, for example to the order of roles.
    #[n(4)]
    #[error("the model's chat template refuses these messages: {message}")]
    Refused {
        #[n(0)]
        message: String,
    },
    #[n(5)]
    #[error("the model's chat template takes more than {MAX_FUEL} steps")]
    OutOfFuel,
    #[n(6)]
    #[error("the rendered prompt is over the limit of {MAX_RENDERED_BYTES} bytes")]
    OutputTooLarge,
    #[n(7)]
    #[error("the model's chat template failed: {reason}")]
    Failed {
        #[n(0)]
        reason: String,
    },
    /// It took the process with it that it ran in.
    #[n(8)]
    #[error("the model's chat template took more memory than it may, or broke its process, which {how}")]
    Broke {
        #[n(0)]
        how: String,
    },
    #[n(9)]
    #[error("the model's chat template took longer than {ms} ms")]
    OutOfTime {
        #[n(0)]
        ms: u64,
    },
}

/// A model's own template, or the stand-in.
#[derive(Debug)]
pub enum Template {
    Model(Box<ModelTemplate>),
    Plain,
}

impl Template {
    /// Compiles the model's template; `bos` and `eos` are the texts of those tokens, empty where there are none.
    pub fn new(source: Option<&str>, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        match source {
            Some(source) => Ok(Self::Model(Box::new(ModelTemplate::new(source, bos, eos)?))),
            None => Ok(Self::Plain),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Model(_) => MODEL_NAME,
            Self::Plain => PLAIN_NAME,
        }
    }

    pub fn render(&self, input: &ChatInput<'_>) -> Result<Prompt, TemplateError> {
        if input.messages.is_empty() {
            return Err(TemplateError::NoMessages);
        }
        let messages: Vec<Json> =
            input.messages.iter().enumerate().map(|(index, message)| flat(index, message)).collect::<Result<_, _>>()?;
        match self {
            Self::Model(template) => template.render(&messages, input),
            Self::Plain => plain(&messages),
        }
    }
}

/// The contents, separated by blank lines. No roles: a base model would take them for part of the text.
fn plain(messages: &[Json]) -> Result<Prompt, TemplateError> {
    let contents: Vec<&str> = messages.iter().filter_map(|message| message.get("content")?.as_str()).collect();
    let text = contents.join("\n\n");
    if text.len() > MAX_RENDERED_BYTES {
        return Err(TemplateError::OutputTooLarge);
    }
    Ok(Prompt { text, add_special: true, parse_special: false })
}

/// Joins text parts, since most templates expect a string.
fn flat(index: usize, message: &Json) -> Result<Json, TemplateError> {
    let not_text = || TemplateError::NotText { index };
    if !message.is_object() {
        return Err(not_text());
    }
    let parts = match message.get("content") {
        None | Some(Json::Null | Json::String(_)) => return Ok(message.clone()),
        Some(Json::Array(parts)) => parts,
        Some(Json::Bool(_) | Json::Number(_) | Json::Object(_)) => return Err(not_text()),
    };
    let texts: Option<Vec<&str>> = parts.iter().map(|part| part.get("text")?.as_str()).collect();
    let mut message = message.clone();
    message["content"] = Json::String(texts.ok_or_else(not_text)?.join(""));
    Ok(message)
}

/// A compiled template.
#[derive(Debug)]
pub struct ModelTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const TEMPLATE: &str = "chat_template";

impl ModelTemplate {
    fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::TooLarge { bytes: source.len() });
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(MAX_FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned(TEMPLATE, source.to_owned())
            .map_err(|error| TemplateError::Syntax { reason: error.to_string() })?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    fn render(&self, messages: &[Json], input: &ChatInput<'_>) -> Result<Prompt, TemplateError> {
        let now = input.now;
        let context = minijinja::context! {
            messages => messages,
            tools => input.tools,
            add_generation_prompt => input.add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
            strftime_now => Value::from_function(move |format: String| now.format(&format)),
        };
        let template = self.environment.get_template(TEMPLATE).map_err(failure)?;
        let mut out = Bounded::default();
        let rendered = template.render_captured_to(context, &mut out);
        if out.full {
            return Err(TemplateError::OutputTooLarge);
        }
        rendered.map_err(failure)?;
        let text = String::from_utf8(out.bytes).map_err(|error| TemplateError::Failed { reason: error.to_string() })?;
        let add_special = self.bos.is_empty() || !text.starts_with(&self.bos);
        Ok(Prompt { text, add_special, parse_special: true })
    }
}

/// Marks an error that the template raised itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// Python's `json.dumps`; minijinja's own filter escapes for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    json::dumps(value, indent.map(|indent| indent.min(16)))
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))
}

fn failure(error: minijinja::Error) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::OutOfFuel;
    }
    let mut source: Option<&dyn std::error::Error> = Some(&error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TemplateError::Refused { message: message.clone() };
        }
        source = cause.source();
    }
    TemplateError::Failed { reason: error.to_string() }
}

/// Collects output up to the limit.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RENDERED_BYTES {
            self.full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
