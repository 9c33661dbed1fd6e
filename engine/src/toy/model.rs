//! The toy's vocabulary, tokenizer and logits.

use std::collections::BTreeSet;

use async_trait::async_trait;

use crate::port::{SpecialTokens, Tokenizer, TokenizerError};

pub(super) const BOS: u32 = 1;
pub(super) const EOS: u32 = 2;
const FIRST_BYTE: u32 = 3;
const FIRST_WORD: u32 = FIRST_BYTE + 256;
const CONTROL: [&str; 3] = ["<unk>", "<s>", "</s>"];
/// Longer first where one begins another, so that the first that fits is the longest.
const WORDS: [&str; 41] = [
    " there",
    " then",
    " the",
    " and",
    " of",
    " to",
    " in",
    " is",
    " it",
    " was",
    " light",
    " river",
    " stone",
    " market",
    " night",
    " morning",
    " water",
    " old",
    " one",
    " two",
    " over",
    " under",
    " with",
    " from",
    " by",
    " slowly",
    " bright",
    " quiet",
    " mill",
    " ran",
    "ing",
    "ed",
    "er",
    "ly",
    ". ",
    ", ",
    "\n",
    "\u{e9}",
    "\u{20ac}",
    "\u{1f600}",
    " ",
];
pub(super) const VOCAB: u32 = FIRST_WORD + WORDS.len() as u32;

/// Greedy longest match over the words, bytes for the rest.
#[derive(Debug, Clone, Copy, Default)]
pub struct ToyTokenizer;

impl ToyTokenizer {
    /// The bytes of one token; control tokens are empty unless asked for.
    pub fn piece(self, id: u32, special: bool) -> Option<Vec<u8>> {
        if let Some(name) = CONTROL.get(id as usize) {
            return Some(if special { name.as_bytes().to_vec() } else { Vec::new() });
        }
        if id < FIRST_WORD {
            return Some(vec![(id - FIRST_BYTE) as u8]);
        }
        Some(WORDS.get((id - FIRST_WORD) as usize)?.as_bytes().to_vec())
    }

    /// Token ids of a text, as the trait's `tokenize`.
    pub fn encode(self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut ids = if add_special { vec![BOS] } else { Vec::new() };
        let mut rest = text.as_bytes();
        while let Some((&byte, tail)) = rest.split_first() {
            let control = CONTROL.iter().position(|name| parse_special && rest.starts_with(name.as_bytes()));
            let word = WORDS.iter().position(|word| rest.starts_with(word.as_bytes()));
            if let Some(id) = control {
                ids.push(id as u32);
                rest = &rest[CONTROL[id].len()..];
            } else if let Some(at) = word {
                ids.push(FIRST_WORD + at as u32);
                rest = &rest[WORDS[at].len()..];
            } else {
                ids.push(FIRST_BYTE + u32::from(byte));
                rest = tail;
            }
        }
        ids
    }
}

#[async_trait]
impl Tokenizer for ToyTokenizer {
    async fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.encode(text, add_special, parse_special))
    }

    async fn pieces(&self, ids: &[u32], special: bool) -> Result<Vec<Vec<u8>>, TokenizerError> {
        let unknown = |token| TokenizerError::UnknownToken { token, vocab: VOCAB };
        ids.iter().map(|&id| self.piece(id, special).ok_or_else(|| unknown(id))).collect()
    }

    fn special(&self) -> SpecialTokens {
        SpecialTokens { bos: Some(BOS), eos: Some(EOS), eog: BTreeSet::from([EOS]), add_bos: true }
    }

    fn vocab_size(&self) -> u32 {
        VOCAB
    }

    fn chat_template(&self) -> Option<String> {
        None
    }
}

/// What the toy model has read so far, in one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Context(u64);

impl Context {
    pub(super) fn new(model_seed: u64) -> Self {
        Self(mix(model_seed))
    }

    pub(super) fn read(&mut self, token: u32) {
        self.0 = mix(self.0 ^ u64::from(token));
    }

    /// Words are likelier than bytes, control tokens all but impossible.
    pub(super) fn logits(self) -> Vec<f32> {
        let noise = |id: u32| (mix(self.0 ^ (u64::from(id) << 32)) >> 40) as f32 / (1 << 24) as f32;
        let bonus = |id: u32| match id {
            0..FIRST_BYTE => -20.0,
            FIRST_BYTE..FIRST_WORD => 0.0,
            _ => 3.0,
        };
        (0..VOCAB).map(|id| bonus(id) + 6.0 * noise(id)).collect()
    }
}

/// The finaliser of splitmix64.
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn detokenising_gives_the_text_back(text in "( the|n|<s>|\u{20ac}|ing|.){0,12}") {
            let ids = ToyTokenizer.encode(&text, true, false);
            let bytes: Vec<u8> = ids.iter().flat_map(|id| ToyTokenizer.piece(*id, false).unwrap()).collect();
            prop_assert_eq!(String::from_utf8(bytes).unwrap(), text);
        }
    }
}
