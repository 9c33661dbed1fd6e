//! What a signed request asks for beyond tokens, in the engine's own types. What does not fit is the asker's fault.

use satgrid_engine::{grammar::Grammar, port::Extras};
use satgrid_protocol::frame::{MAX_TOP_LOGPROBS, StartRequest};

/// What the request asks for beyond tokens, as its engine takes it.
pub(super) fn extras(start: &StartRequest) -> Result<Extras, String> {
    let private = &start.private;
    let grammar = private.grammar.as_ref().map(|bytes| Grammar::from_bytes(bytes)).transpose();
    let grammar = grammar.map_err(|error| format!("the request's grammar: {error}"))?;
    if private.top_logprobs.is_some_and(|top| top > MAX_TOP_LOGPROBS) {
        return Err(format!("log probabilities of more than {MAX_TOP_LOGPROBS} tokens"));
    }
    Ok(Extras { grammar, top_logprobs: private.top_logprobs })
}
