//! The demo of a model whose experts are elsewhere: a lead with a trunk, packs of experts in processes of their own, and
//! the proof that their answer is the one that the whole model gives in another process.
//!
//! The model is a tiny random mixture of experts: what it says means nothing, and every bit of it counts.

use anyhow::Context;
use satgrid_engine::experts::{heat::Heat, map};
use satgrid_engine::tiny_moe::TinyMoe;
use serde::Serialize;
use std::path::{Path, PathBuf};

use super::chat::{self, Chat};
use super::nodes::Market;
use crate::commands::print;
use crate::models::{Sets, split_experts};
use crate::progress::Bytes;

/// Packs that the experts are dealt over, so processes that evaluate them.
const PACKS: u32 = 3;

/// The parts that the lead sells the model with.
pub(super) struct Parts {
    pub(super) trunk: PathBuf,
    pub(super) packs: Vec<PathBuf>,
    root: [u8; 32],
    rows: Vec<Vec<String>>,
}

/// Writes the model, and cuts it; gives the whole model's file too.
pub(super) fn prepare(dir: &Path) -> anyhow::Result<(PathBuf, Parts)> {
    let model = TinyMoe { layers: 4, n_embd: 128, n_ff: 64, experts: 16, used: 4, ..TinyMoe::default() };
    let path = dir.join("tiny-moe.gguf");
    std::fs::write(&path, model.to_bytes()?).with_context(|| format!("cannot write {}", path.display()))?;
    // Nobody has led it yet.
    let counted = |_| Heat::new();
    let written = split_experts(&path, &Sets::Dealt(PACKS), &counted, &dir.join("parts"), |_, _| Bytes::silent())?;
    let mut sets = map::deal(model.layers, model.experts, PACKS).into_iter();
    let mut rows = Vec::new();
    for (number, file) in written.files.iter().enumerate() {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (who, experts) = match number {
            0 => ("the lead", "router, attention, norms, embedding and head".to_owned()),
            _ => ("a worker process", sets.next().map(|set| map::list(&set)).unwrap_or_default()),
        };
        rows.push(vec![who.to_owned(), name, format!("{} kB", file.bytes / 1_000), experts.replace("; ", "\n")]);
    }
    let mut files = written.files.into_iter().map(|file| file.path);
    let trunk = files.next().context("a split writes a trunk")?;
    Ok((path, Parts { trunk, packs: files.collect(), root: written.root, rows }))
}

/// Who holds what, for people.
pub(super) fn show_map(parts: &Parts) -> String {
    let table = print::table(&["WHO", "FILE", "SIZE", "HOLDS"], parts.rows.clone());
    format!("\nTHE MAP OF EXPERTS, model root {}\n{table}\n", hex::encode(parts.root))
}

/// The same question to the provider that runs the whole model in one process.
#[derive(Debug, Serialize)]
pub(super) struct Proof {
    split_tokens: u32,
    solo_tokens: u32,
    same_text: bool,
}

impl Proof {
    pub(super) fn holds(&self) -> bool {
        self.same_text && self.split_tokens == self.solo_tokens
    }

    pub(super) fn say(&self) -> String {
        if self.holds() {
            return format!(
                "{} tokens from the trunk and its experts are those of the whole model in another process",
                self.split_tokens
            );
        }
        format!("THE ANSWERS DIFFER: {} tokens split, {} tokens whole", self.split_tokens, self.solo_tokens)
    }
}

/// Ends the lead and asks again: the other provider, with the whole model, answers.
pub(super) async fn prove(market: &mut Market, request: &chat::Request, split: &Chat) -> anyhow::Result<Proof> {
    let lead = market.providers.first().context("the lead was started")?.identity()?.node_key;
    market.kill(lead).await?;
    let solo = chat::stream(market, request, false, None).await.context("the whole model gives no answer")?;
    let asked: Vec<_> = solo.usage.cost_details.providers.iter().map(|leg| leg.provider.clone()).collect();
    anyhow::ensure!(!asked.contains(&lead.to_string()), "the lead answered after its end");
    Ok(Proof {
        split_tokens: split.usage.completion_tokens,
        solo_tokens: solo.usage.completion_tokens,
        same_text: split.text == solo.text,
    })
}
