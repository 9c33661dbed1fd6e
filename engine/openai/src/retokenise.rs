//! Text back to token ids, with the tokenizer that the provider has named.
//!
//! A stream of text is cut where a word begins, since tokenizers do not join over that; each part is tokenised alone, and
//! its pieces must give the same bytes back. What the consumer receives, counts and reads is then the same text.

use satgrid_engine::port::{Tokenizer, TokenizerError};

/// A part is cut here at the latest: text without a space is tokenised in pieces of this many bytes.
const MAX_PART: usize = 256;

/// Why text could not be turned into ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RetokeniseError {
    #[error("the named tokenizer does not give the upstream's text back")]
    NotTheSame,
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Text that waits for its end of word.
#[derive(Debug, Default)]
pub(crate) struct Retokeniser {
    waiting: String,
}

impl Retokeniser {
    /// The ids of all words that are whole now.
    pub(crate) async fn push(&mut self, text: &str, with: &dyn Tokenizer) -> Result<Vec<u32>, RetokeniseError> {
        self.waiting.push_str(text);
        match cut(&self.waiting) {
            0 => Ok(Vec::new()),
            at => {
                let rest = self.waiting.split_off(at);
                let whole = std::mem::replace(&mut self.waiting, rest);
                ids_of(&whole, with).await
            }
        }
    }

    /// The ids of what is left.
    pub(crate) async fn finish(&mut self, with: &dyn Tokenizer) -> Result<Vec<u32>, RetokeniseError> {
        let rest = std::mem::take(&mut self.waiting);
        if rest.is_empty() { Ok(Vec::new()) } else { ids_of(&rest, with).await }
    }
}

/// Up to where the text holds whole words only: before its last space that begins a word.
fn cut(text: &str) -> usize {
    let last = text.char_indices().rev().find(|(at, c)| *c == ' ' && *at > 0 && !text[..*at].ends_with(' '));
    match last {
        Some((at, _)) => at,
        None if text.len() > MAX_PART => {
            text.char_indices().map(|(at, _)| at).take_while(|at| *at <= MAX_PART).last().unwrap_or(0)
        }
        None => 0,
    }
}

/// The ids of a text whose pieces are that text again.
pub(crate) async fn ids_of(text: &str, with: &dyn Tokenizer) -> Result<Vec<u32>, RetokeniseError> {
    let ids = with.tokenize(text, false, false).await?;
    let same = with.pieces(&ids, false).await?.concat() == text.as_bytes();
    if same { Ok(ids) } else { Err(RetokeniseError::NotTheSame) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_engine::toy::ToyTokenizer;

    #[test]
    fn words_are_cut_before_their_space() {
        for (text, at) in [("", 0), ("one", 0), ("one ", 3), ("one two", 3), ("one two th", 7), (" a", 0), ("a  b", 1)]
        {
            assert_eq!(cut(text), at, "{text:?}");
        }
        assert_eq!(cut(&"é".repeat(200)), 256);
    }

    #[tokio::test]
    async fn what_goes_in_comes_out() {
        let text = "The  old mill, by the river\n\nand so on \u{1f600} end ";
        for size in 1..8 {
            let mut retokeniser = Retokeniser::default();
            let mut ids = Vec::new();
            let chars: Vec<char> = text.chars().collect();
            for part in chars.chunks(size) {
                let part: String = part.iter().collect();
                ids.extend(retokeniser.push(&part, &ToyTokenizer).await.unwrap());
            }
            ids.extend(retokeniser.finish(&ToyTokenizer).await.unwrap());
            let back = ToyTokenizer.pieces(&ids, false).await.unwrap().concat();
            assert_eq!(String::from_utf8(back).unwrap(), text);
        }
    }
}
