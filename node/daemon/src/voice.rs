//! Between the API's words and a model's tokens: what a request's prompt and grammar are, and what its tokens say.
//!
//! Nothing here sends or pays. A schema that cannot be held is refused here, with the path of the keyword at fault, before
//! anything is asked of a provider.

use std::collections::VecDeque;
use std::sync::Arc;

use satgrid_api::{
    CompletionEvent, CompletionRequest, Format, LikelyToken, Message, Prompt, Role, ServiceError, TokenLogprob, Tool,
    ToolChoice,
};
use satgrid_engine::{
    grammar::{Grammar, Json, SchemaError, any_object, from_schema},
    port::Tokenizer,
    stop::{Beside, TextStream},
    template::ChatOrder,
    tools::{END_THINK, Part, Reader, Signature, Style, THINK, forced},
};
use satgrid_protocol::frame::TokenLogprobs;
use serde_json::{Value, json};

use crate::drive::{now, tokenizers::Vocabulary};
use crate::embeds;

/// What a provider is asked for one reply.
pub(crate) struct Asked {
    pub tokens: Vec<u32>,
    /// Of texts to embed, which the tokens are: how many each has.
    pub texts: Option<Vec<u32>>,
    /// The grammar of the output, encoded.
    pub grammar: Option<Vec<u8>>,
    /// What the prompt's end has begun already: a call, a thought.
    begun: Option<&'static str>,
}

/// Renders, tokenises, and makes the grammar.
pub(crate) async fn asked(vocabulary: &Vocabulary, request: &CompletionRequest) -> Result<Asked, ServiceError> {
    let messages = match &request.prompt {
        Prompt::Messages(messages) => messages,
        Prompt::Embed(texts) => {
            let (tokens, texts) = embeds::tokens_of(vocabulary, texts).await?;
            return Ok(Asked { tokens, texts: Some(texts), grammar: None, begun: None });
        }
        Prompt::Text(_) | Prompt::Tokens(_) => {
            let tokens = tokens_of(vocabulary, &request.prompt, true).await?;
            return Ok(Asked { tokens, texts: None, grammar: None, begun: None });
        }
    };
    let tools = offered(request);
    let style = style(vocabulary);
    let mut text = render(vocabulary, messages, &tools, true).await?;
    let ends_thinking = text.text.trim_end().ends_with(THINK);
    let mut begun = ends_thinking.then_some(THINK);
    let grammar = match (&request.tool_choice, &request.format) {
        (ToolChoice::Required | ToolChoice::Named(_), _) if !tools.is_empty() => {
            begun = (!style.begun().is_empty()).then_some(style.begun());
            Some(forced_call(style, request, &tools)?)
        }
        (_, Format::Text) => None,
        (_, Format::JsonObject) => Some(any_object().map_err(internal)?),
        (_, Format::JsonSchema { schema, param }) => Some(schema_grammar(schema, param)?),
    };
    if grammar.is_some() {
        if ends_thinking {
            // The answer's form is fixed, so the thought that the template opens is closed again.
            text.text.push_str(&format!("\n{END_THINK}\n\n"));
            begun = begun.filter(|begun| *begun != THINK);
        }
        text.text.push_str(begun.unwrap_or_default());
    }
    let tokens = vocabulary.tokenizer.tokenize(&text.text, text.add_special, text.parse_special).await;
    let grammar = grammar.map(|grammar| grammar.to_bytes()).transpose().map_err(internal)?;
    Ok(Asked { tokens: tokens.map_err(internal)?, texts: None, grammar, begun })
}

/// The tools that the model may call.
fn offered(request: &CompletionRequest) -> Vec<&Tool> {
    match &request.tool_choice {
        ToolChoice::None => Vec::new(),
        ToolChoice::Auto | ToolChoice::Required => request.tools.iter().collect(),
        ToolChoice::Named(name) => request.tools.iter().filter(|tool| tool.name == *name).collect(),
    }
}

fn style(vocabulary: &Vocabulary) -> Style {
    Style::of(vocabulary.tokenizer.chat_template().as_deref())
}

fn forced_call(style: Style, request: &CompletionRequest, tools: &[&Tool]) -> Result<Grammar, ServiceError> {
    let schemas = tools.iter().map(|tool| parsed(&tool.parameters, &tool.param)).collect::<Result<Vec<_>, _>>()?;
    let signatures: Vec<Signature<'_>> =
        tools.iter().zip(&schemas).map(|(tool, parameters)| Signature { name: &tool.name, parameters }).collect();
    forced(style, &signatures, request.parallel_tool_calls)
        .map_err(|(at, error)| refused(tools.get(at).map_or("tools", |tool| &tool.param), &error))
}

fn schema_grammar(schema: &str, param: &str) -> Result<Grammar, ServiceError> {
    from_schema(&parsed(schema, param)?).map_err(|error| refused(param, &error))
}

fn parsed(schema: &str, param: &str) -> Result<Json, ServiceError> {
    let invalid = |error: serde_json::Error| ServiceError::InvalidRequest {
        param: param.to_owned(),
        message: format!("Invalid schema: {error}."),
    };
    Json::parse(schema).map_err(invalid)
}

fn refused(param: &str, error: &SchemaError) -> ServiceError {
    let param = format!("{param}{}", error.path);
    ServiceError::InvalidRequest { message: format!("Invalid schema: `{param}`: {}.", error.reason), param }
}

/// That the model has these ids, which a client chose by itself.
pub(crate) fn known(vocabulary: &Vocabulary, tokens: &[u32], param: &str) -> Result<(), ServiceError> {
    let size = vocabulary.tokenizer.vocab_size();
    let Some(unknown) = tokens.iter().find(|id| **id >= size) else { return Ok(()) };
    let message = format!("Token {unknown} of `{param}` is not in the model's vocabulary of {size}.");
    Err(ServiceError::InvalidRequest { param: param.into(), message })
}

/// Token ids of a prompt without tools.
pub(crate) async fn tokens_of(
    vocabulary: &Vocabulary,
    prompt: &Prompt,
    open_turn: bool,
) -> Result<Vec<u32>, ServiceError> {
    match prompt {
        Prompt::Tokens(tokens) => known(vocabulary, tokens, "prompt").map(|()| tokens.clone()),
        Prompt::Embed(texts) => embeds::tokens_of(vocabulary, texts).await.map(|(tokens, _)| tokens),
        Prompt::Text(text) => vocabulary.tokenizer.tokenize(text, true, false).await.map_err(internal),
        Prompt::Messages(messages) => {
            let text = render(vocabulary, messages, &[], open_turn).await?;
            let tokenizer = &vocabulary.tokenizer;
            tokenizer.tokenize(&text.text, text.add_special, text.parse_special).await.map_err(internal)
        }
    }
}

async fn render(
    vocabulary: &Vocabulary,
    messages: &[Message],
    tools: &[&Tool],
    open_turn: bool,
) -> Result<satgrid_engine::template::Prompt, ServiceError> {
    let template = vocabulary.tokenizer.chat_template();
    let knows_tools = template.is_some_and(|template| template.contains("tools"));
    let style = style(vocabulary);
    let tools: Vec<Value> = tools.iter().filter_map(|tool| serde_json::from_str(&tool.json).ok()).collect();
    let mut all: Vec<Value> = messages.iter().map(|message| value_of(message, style, knows_tools)).collect();
    if !tools.is_empty() && !knows_tools {
        tell_of_tools(&mut all, &style.instruction(&tools));
    }
    let tools = (!tools.is_empty() && knows_tools).then_some(Value::Array(tools));
    let now = i64::try_from(now().as_secs()).unwrap_or(0);
    let order = ChatOrder::new(&all, tools.as_ref(), open_turn, now);
    vocabulary.tokenizer.render(order).await.map_err(|error| ServiceError::InvalidRequest {
        param: "messages".into(),
        message: format!("the model's chat template refuses them: {error}"),
    })
}

/// A message as a template reads it. One that knows no tools gets calls and results as text.
fn value_of(message: &Message, style: Style, knows_tools: bool) -> Value {
    let (mut role, mut content) = (message.role.as_str(), message.content.clone());
    if message.role == Role::Tool && !knows_tools {
        role = "user";
        content = format!("<tool_response>\n{content}\n</tool_response>");
    }
    if !knows_tools {
        for call in &message.tool_calls {
            content = format!("{content}\n{}", style.written(&call.name, &call.arguments)).trim().to_owned();
        }
    }
    let mut value = json!({"role": role, "content": content});
    if let Some(name) = &message.name {
        value["name"] = json!(name);
    }
    if knows_tools {
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().map(|call| {
                // Templates write the arguments as JSON themselves.
                let arguments = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!(call.arguments));
                json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}})
            });
            value["tool_calls"] = calls.collect();
        }
        if let Some(id) = &message.tool_call_id {
            value["tool_call_id"] = json!(id);
        }
    }
    value
}

/// Puts the instruction before the first message, or into it where that is the system's.
fn tell_of_tools(messages: &mut Vec<Value>, instruction: &str) {
    match messages.first_mut() {
        Some(first) if matches!(first["role"].as_str(), Some("system" | "developer")) => {
            let said = first["content"].as_str().unwrap_or_default();
            first["content"] = json!(format!("{said}\n\n{instruction}"));
        }
        Some(_) | None => messages.insert(0, json!({"role": "system", "content": instruction})),
    }
}

/// A reply under way: tokens in, events out.
pub(crate) struct Voice {
    vocabulary: Arc<Vocabulary>,
    text: TextStream,
    reader: Reader,
    /// Calls begun so far.
    calls: u32,
    logprobs: VecDeque<TokenLogprobs>,
    /// Those whose text is not decided yet.
    unsaid: Beside<TokenLogprob>,
    /// Tokens of thinking.
    pub reasoning: u32,
}

impl Voice {
    pub(crate) fn new(vocabulary: Arc<Vocabulary>, request: &CompletionRequest, asked: &Asked) -> Self {
        let chat = matches!(request.prompt, Prompt::Messages(_));
        let template = vocabulary.tokenizer.chat_template();
        let thinks = chat && template.is_some_and(|template| template.contains(THINK));
        let tools = offered(request).into_iter().map(|tool| tool.name.clone()).collect();
        let reader = Reader::new(style(&vocabulary), tools, thinks, asked.begun);
        let text = TextStream::new(&request.stop);
        let (logprobs, unsaid) = (VecDeque::new(), Beside::default());
        Self { vocabulary, text, reader, calls: 0, logprobs, unsaid, reasoning: 0 }
    }

    /// Log probabilities of the tokens that come next.
    pub(crate) fn likely(&mut self, entries: Vec<TokenLogprobs>) {
        self.logprobs.extend(entries);
    }

    pub(crate) async fn tokens(&mut self, ids: &[u32]) -> Result<Vec<CompletionEvent>, ServiceError> {
        let pieces = self.vocabulary.tokenizer.pieces(ids, false).await.map_err(internal)?;
        let mut events = Vec::new();
        for (id, piece) in ids.iter().zip(pieces) {
            if let Some(entry) = self.logprobs.pop_front()
                && !piece.is_empty()
            {
                let named = self.named(&piece, entry).await?;
                self.unsaid.hold(&self.text, named);
            }
            self.reasoning += u32::from(self.reader.is_thinking());
            // A mark that is a control token has no text of its own.
            let mark = self.vocabulary.marks.get(id).map(|mark| mark.as_bytes());
            let text = self.text.push(mark.unwrap_or(&piece));
            self.tell(&mut events);
            let parts = self.reader.push(&text);
            self.add(parts, &mut events);
        }
        Ok(events)
    }

    /// What was held back, when no more tokens come.
    pub(crate) fn finish(&mut self) -> Vec<CompletionEvent> {
        let text = self.text.finish();
        let mut parts = self.reader.push(&text);
        parts.extend(self.reader.finish());
        let mut events = Vec::new();
        self.tell(&mut events);
        self.add(parts, &mut events);
        events
    }

    /// A stop string has been completed.
    pub(crate) fn stopped(&self) -> bool {
        self.text.stopped()
    }

    /// Log probabilities of tokens whose text goes out now: none of those that a stop string cut away.
    fn tell(&mut self, events: &mut Vec<CompletionEvent>) {
        let tokens = self.unsaid.told(&self.text);
        if !tokens.is_empty() {
            events.push(CompletionEvent::Logprobs { tokens });
        }
    }

    fn add(&mut self, parts: Vec<Part>, events: &mut Vec<CompletionEvent>) {
        for part in parts {
            events.push(match part {
                Part::Text(delta) => CompletionEvent::Text { delta },
                Part::Reasoning(delta) => CompletionEvent::Reasoning { delta },
                Part::Call(name) => {
                    self.calls += 1;
                    CompletionEvent::ToolCall { index: self.calls - 1, name }
                }
                Part::Arguments(delta) => CompletionEvent::Arguments { index: self.calls.saturating_sub(1), delta },
            });
        }
    }

    async fn named(&self, piece: &[u8], entry: TokenLogprobs) -> Result<TokenLogprob, ServiceError> {
        let ids: Vec<u32> = entry.top.iter().map(|(id, _)| *id).collect();
        // A provider's list may name tokens that there are not: its word is checked, not trusted.
        let pieces = self.vocabulary.tokenizer.pieces(&ids, false).await.unwrap_or_default();
        let top = pieces.into_iter().zip(&entry.top);
        Ok(TokenLogprob {
            token: LikelyToken { bytes: piece.to_vec(), logprob_micro: entry.drawn_micro },
            top: top.map(|(bytes, (_, micro))| LikelyToken { bytes, logprob_micro: *micro }).collect(),
        })
    }
}

fn internal(error: impl std::fmt::Display) -> ServiceError {
    ServiceError::Internal { detail: error.to_string() }
}
