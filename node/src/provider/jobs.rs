//! What a signed request asks for beyond tokens, in the engine's own types. What does not fit is the asker's fault.

use satgrid_engine::{grammar::Grammar, port::Extras};
use satgrid_protocol::frame::{MAX_TEXTS, MAX_TOP_LOGPROBS, StartRequest};

/// What the request asks for beyond tokens, as its engine takes it.
pub(super) fn extras(start: &StartRequest) -> Result<Extras, String> {
    let private = &start.private;
    let grammar = private.grammar.as_ref().map(|bytes| Grammar::from_bytes(bytes)).transpose();
    let grammar = grammar.map_err(|error| format!("the request's grammar: {error}"))?;
    if private.top_logprobs.is_some_and(|top| top > MAX_TOP_LOGPROBS) {
        return Err(format!("log probabilities of more than {MAX_TOP_LOGPROBS} tokens"));
    }
    if let Some(texts) = &private.embed {
        let sum = texts.iter().try_fold(0_u32, |sum, length| sum.checked_add(*length));
        let told = texts.is_empty() || texts.len() > MAX_TEXTS || texts.contains(&0);
        if told || sum != u32::try_from(start.prompt.len()).ok() {
            return Err(format!("texts to embed: 1 to {MAX_TEXTS}, none empty, together the prompt"));
        }
        if grammar.is_some() || private.top_logprobs.is_some() || private.resumed > 0 {
            return Err("an embedding has no output that a grammar or log probabilities could speak of".into());
        }
    }
    Ok(Extras { grammar, top_logprobs: private.top_logprobs, embed: private.embed.clone() })
}
