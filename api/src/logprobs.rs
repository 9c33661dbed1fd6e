//! Log probabilities as the two completion endpoints write them.

use serde::Serialize;
use serde_json::{Map, Number, Value};

use crate::{
    reply::Null,
    service::{LikelyToken, TokenLogprob},
};

/// Of a chat.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Null,
}

#[derive(Debug, Clone, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ChatLikely,
    top_logprobs: Vec<ChatLikely>,
}

#[derive(Debug, Clone, Serialize)]
struct ChatLikely {
    token: String,
    logprob: Number,
    bytes: Vec<u8>,
}

/// Of the legacy endpoint.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Number>,
    top_logprobs: Vec<Map<String, Value>>,
    /// In characters, as Python counts them.
    text_offset: Vec<usize>,
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Millionths of a nat as a decimal. OpenAI writes what is next to impossible as -9999.
fn nats(micro: i32) -> Number {
    let nats = f64::from(micro) / 1e6;
    let nats = if nats <= -2_000.0 { -9_999.0 } else { nats };
    Number::from_f64(nats).unwrap_or_else(|| Number::from(0))
}

impl ChatLikely {
    fn of(token: &LikelyToken) -> ChatLikely {
        ChatLikely { token: shown(&token.bytes), logprob: nats(token.logprob_micro), bytes: token.bytes.clone() }
    }
}

impl ChatLogprobs {
    pub(crate) fn of(tokens: &[TokenLogprob]) -> ChatLogprobs {
        let content = tokens.iter().map(|one| ChatToken {
            token: ChatLikely::of(&one.token),
            top_logprobs: one.top.iter().map(ChatLikely::of).collect(),
        });
        ChatLogprobs { content: content.collect(), refusal: Null }
    }
}

impl TextLogprobs {
    /// `offset` is where the text stands, and is moved on.
    pub(crate) fn of(tokens: &[TokenLogprob], offset: &mut usize) -> TextLogprobs {
        let mut reply = TextLogprobs::default();
        for one in tokens {
            let token = shown(&one.token.bytes);
            let top = one.top.iter().map(|likely| (shown(&likely.bytes), Value::Number(nats(likely.logprob_micro))));
            reply.top_logprobs.push(top.collect());
            reply.token_logprobs.push(nats(one.token.logprob_micro));
            reply.text_offset.push(*offset);
            *offset = offset.saturating_add(token.chars().count());
            reply.tokens.push(token);
        }
        reply
    }
}
