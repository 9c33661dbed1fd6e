//! What a request must be before it is taken up.

use super::parts::check_part_start;
use satgrid_ledger::statements::{RequestOpen, prompt_hash};
use satgrid_protocol::{
    frame::{MAX_PROMPT_TOKENS, MAX_STOPS, StartRequest},
    session::SessionState,
};
use satgrid_types::Verified;

/// A start that a well-behaved consumer could have sent. What fails here is a violation.
pub(super) fn check_start(state: &SessionState, start: &StartRequest) -> Result<Verified<RequestOpen>, String> {
    let open = start.open.verify(&state.consumer()).map_err(|e| e.to_string())?;
    let private = &start.private;
    let length = u32::try_from(start.prompt.len()).unwrap_or(u32::MAX);
    let whole = open.part.is_none();
    if !whole {
        check_part_start(start, &open)?;
    }
    if open.version != RequestOpen::VERSION || open.session != state.id() {
        return Err("the request is for another session".into());
    }
    if (start.prompt.is_empty() && whole) || start.prompt.len() > MAX_PROMPT_TOKENS || length != open.prompt_tokens {
        return Err(format!("the prompt has {length} tokens, {} were signed for", open.prompt_tokens));
    }
    if (open.max_output == 0 && whole) || private.stop.len() > MAX_STOPS || private.resumed > length {
        return Err("no output asked for, too many stop strings, or more resumed than prompt tokens".into());
    }
    let committed = private.commitment(&start.salt) == open.private_hash;
    if !committed || prompt_hash(&start.salt, &start.prompt) != private.prompt_hash {
        return Err("the prompt or its parameters are not those that were signed for".into());
    }
    Ok(open)
}
