//! Texts to embed, on their way to a provider: their token ids, and what of them no request can carry.

use satgrid_api::{ServiceError, TextToEmbed, limits::MAX_REPLY_BYTES};
use satgrid_engine::port::Tokenizer;
use satgrid_protocol::frame::MAX_PROMPT_TOKENS;
use satgrid_types::VerifiedListing;

use crate::{drive::tokenizers::Vocabulary, voice::known};

const BYTES_OF_NUMBER: usize = 4;

/// All texts' token ids one after the other, and how many each has.
pub(crate) async fn tokens_of(
    vocabulary: &Vocabulary,
    texts: &[TextToEmbed],
) -> Result<(Vec<u32>, Vec<u32>), ServiceError> {
    let (mut tokens, mut lengths) = (Vec::new(), Vec::with_capacity(texts.len()));
    for (at, text) in texts.iter().enumerate() {
        let ids = match text {
            TextToEmbed::Tokens(ids) => {
                known(vocabulary, ids, "input")?;
                ids.clone()
            }
            TextToEmbed::Text(text) => {
                let made = vocabulary.tokenizer.tokenize(text, true, false).await;
                made.map_err(|error| ServiceError::Internal { detail: error.to_string() })?
            }
        };
        if ids.is_empty() {
            return Err(invalid(format!("Text {at} of `input` has no tokens.")));
        }
        lengths.push(u32::try_from(ids.len()).unwrap_or(u32::MAX));
        tokens.extend(ids);
        if tokens.len() > MAX_PROMPT_TOKENS {
            return Err(invalid(format!(
                "`input` has more than {MAX_PROMPT_TOKENS} tokens: send its {} texts a part at a time.",
                texts.len()
            )));
        }
    }
    Ok((tokens, lengths))
}

/// That each text fits the model and all rows fit one answer. The longest text's tokens.
pub(crate) fn check(lengths: &[u32], candidates: &[VerifiedListing]) -> Result<u32, ServiceError> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let context_length = candidates.iter().map(|listing| listing.context_length).max().unwrap_or(0);
    if longest > context_length {
        return Err(ServiceError::ContextLength { prompt_tokens: longest, context_length });
    }
    let numbers = candidates.first().and_then(|listing| listing.embeds).unwrap_or(1);
    let row = usize::try_from(numbers).unwrap_or(usize::MAX).saturating_mul(BYTES_OF_NUMBER);
    let most = MAX_REPLY_BYTES.checked_div(row).unwrap_or(usize::MAX);
    if lengths.len() > most {
        let message =
            format!("The rows of {} texts do not fit one answer: send at most {most} at a time.", lengths.len());
        return Err(invalid(message));
    }
    Ok(longest)
}

fn invalid(message: String) -> ServiceError {
    ServiceError::InvalidRequest { param: "input".into(), message }
}
