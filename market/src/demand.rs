//! What one request needs, at what price, and from whom.
//!
//! The words for preferences are those of OpenRouter's `provider` object, which clients already send.

use core::fmt;
use core::str::FromStr;
use std::collections::{BTreeMap, BTreeSet};

use satgrid_types::{
    BuildId, EngineProfile, ModelRoot, Msat, MsatPerMtok, NodeKey, TokenUsage, TokenizerHash, VerifiedListing,
};
use thiserror::Error;

/// Fewest hex digits that name a provider.
const MIN_PATTERN: usize = 8;
const MAX_PATTERN: usize = 64;

/// Which models will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// These roots, each with the tokenizer that belongs to it.
    Roots(BTreeMap<ModelRoot, TokenizerHash>),
    /// Whatever providers call by this name. Nobody vouches for it.
    ClaimedName(String),
}

/// What the user will pay at most; `None` is no bound.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MaxPrice {
    pub input: Option<MsatPerMtok>,
    pub output: Option<MsatPerMtok>,
    pub per_request: Option<Msat>,
    /// Bound on the whole request, if it uses all the output that it asked for.
    pub total: Option<Msat>,
}

/// What ranks first among those that fit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    #[default]
    Price,
    /// Output tokens per second.
    Throughput,
    /// Time until the first token, which the prompt's length decides.
    Latency,
}

/// The engine whose output another must repeat token for token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineIdentity {
    pub root: ModelRoot,
    pub build: BuildId,
    pub instruction_set: String,
}

impl EngineIdentity {
    pub fn of(listing: &VerifiedListing) -> EngineIdentity {
        EngineIdentity {
            root: listing.model_root,
            build: listing.build,
            instruction_set: listing.instruction_set.clone(),
        }
    }
}

/// Names a provider by the first hex digits (8 at least) of its node key or of its Nostr key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProviderPattern(String);

/// A text that names no provider.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} names no provider: give {MIN_PATTERN} to {MAX_PATTERN} hex digits of its node key or Nostr key")]
pub struct BadPattern(pub String);

impl FromStr for ProviderPattern {
    type Err = BadPattern;
    fn from_str(text: &str) -> Result<Self, BadPattern> {
        let digits = text.len() >= MIN_PATTERN && text.len() <= MAX_PATTERN;
        if digits && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            Ok(ProviderPattern(text.to_ascii_lowercase()))
        } else {
            Err(BadPattern(text.chars().take(MAX_PATTERN).collect()))
        }
    }
}

impl From<NodeKey> for ProviderPattern {
    fn from(key: NodeKey) -> Self {
        ProviderPattern(key.to_string())
    }
}

impl fmt::Display for ProviderPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl ProviderPattern {
    pub fn matches(&self, listing: &VerifiedListing) -> bool {
        starts_with(&listing.node_key.0, &self.0) || starts_with(&listing.nostr_key().0, &self.0)
    }
}

/// Does the hex of `bytes` start with these digits?
fn starts_with(bytes: &[u8; 32], digits: &str) -> bool {
    let nibble = |index: usize| {
        let byte = bytes[index / 2];
        if index.is_multiple_of(2) { byte >> 4 } else { byte & 0xf }
    };
    digits.chars().enumerate().all(|(index, digit)| digit.to_digit(16) == Some(u32::from(nibble(index))))
}

/// What one request needs. [`Demand::new`] asks for nothing beyond model and size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    pub wanted: Wanted,
    pub prompt_tokens: u32,
    /// Output that must fit into the context, and that a bound on the total is held against.
    pub max_output_tokens: u32,
    /// Output that is expected, for ranking by price.
    pub expected_output_tokens: u32,
    /// Prompt tokens that a provider still has in its cache, from an open session with it.
    pub cached: BTreeMap<NodeKey, u32>,
    pub profile: Option<EngineProfile>,
    /// Set where a stream goes on elsewhere: only an equal engine gives the same text.
    pub same_engine: Option<EngineIdentity>,
    /// Accepted quantisations (case aside); empty for any.
    pub quantisations: BTreeSet<String>,
    pub max_price: MaxPrice,
    pub sort: Sort,
    /// If not empty, nobody else.
    pub only: Vec<ProviderPattern>,
    pub ignore: Vec<ProviderPattern>,
    /// These come first, in this order.
    pub order: Vec<ProviderPattern>,
    /// With an order given: may others be used after those?
    pub allow_fallbacks: bool,
    /// Providers that already failed this request.
    pub failed: BTreeSet<NodeKey>,
}

impl Demand {
    pub fn new(wanted: Wanted, prompt_tokens: u32, max_output_tokens: u32) -> Demand {
        Demand {
            wanted,
            prompt_tokens,
            max_output_tokens,
            expected_output_tokens: max_output_tokens,
            cached: BTreeMap::new(),
            profile: None,
            same_engine: None,
            quantisations: BTreeSet::new(),
            max_price: MaxPrice::default(),
            sort: Sort::default(),
            only: Vec::new(),
            ignore: Vec::new(),
            order: Vec::new(),
            allow_fallbacks: true,
            failed: BTreeSet::new(),
        }
    }

    /// Usage at this provider with so many output tokens.
    pub(crate) fn usage(&self, provider: &NodeKey, output_tokens: u32) -> TokenUsage {
        let cached = self.cached.get(provider).copied().unwrap_or(0).min(self.prompt_tokens);
        TokenUsage {
            prompt: self.prompt_tokens,
            cached_prompt: cached,
            completion: output_tokens,
            ..TokenUsage::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Offer;

    #[test]
    fn a_pattern_names_by_either_key() {
        let listing = Offer::new(1).verified();
        let node = listing.node_key.to_string();
        let nostr = listing.nostr_key().to_string();
        for good in [&node[..8], &node[..9], &node, &nostr[..20], &node[..8].to_uppercase()] {
            assert!(good.parse::<ProviderPattern>().unwrap().matches(&listing), "{good}");
        }
        let other = Offer::new(2).verified().node_key.to_string();
        assert!(!other[..8].parse::<ProviderPattern>().unwrap().matches(&listing));
        for bad in ["", "abcdefg", "nothexdigits", &"a".repeat(65)] {
            assert!(bad.parse::<ProviderPattern>().is_err(), "{bad}");
        }
    }
}
