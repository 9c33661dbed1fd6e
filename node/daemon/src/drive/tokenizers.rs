//! Tokenizers by hash: from the cache on disk, else from a provider that serves the model, checked either way.
//!
//! A vocabulary is a stranger's file and its chat template a stranger's program: they are parsed, and it is run, in a child process
//! and never here.

use super::engines::worker_program;
use anyhow::{Context, bail};
use ed25519_dalek::SigningKey;
use satgrid_engine::{
    port::Tokenizer,
    template::{ChatOrder, MODEL_NAME, PLAIN_NAME, TemplateError},
    tokenizer_artefact::MAX_ARTEFACT_BYTES,
};
use satgrid_engine_llama::{LlamaTokenizer, TokenizerConfig};
use satgrid_protocol_quic::{QuicEndpoint, artefact::Download, hints};
use satgrid_types::{Digest, TokenizerHash, VerifiedListing};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::Mutex;

/// A tokenizer's process ends after this long without a call: a gateway at rest stays small.
const IDLE: Duration = Duration::from_secs(60);
/// Tokenizers that are kept in hand.
const MAX_LOADED: usize = 8;

/// What models write around thinking and calls.
const MARKS: [&str; 7] =
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"];

/// One model's tokenizer and chat template.
pub(crate) struct Vocabulary {
    pub tokenizer: Arc<LlamaTokenizer>,
    /// Control tokens that mark thinking and calls, whose pieces are empty.
    pub marks: BTreeMap<u32, &'static str>,
}

/// The tokenizers that this node has at hand.
pub(crate) struct Tokenizers {
    dir: PathBuf,
    endpoint: QuicEndpoint,
    /// Dialled instead of what listings name.
    at: Option<SocketAddr>,
    loaded: Mutex<BTreeMap<TokenizerHash, Arc<Vocabulary>>>,
}

impl Tokenizers {
    pub(crate) fn new(dir: PathBuf, endpoint: QuicEndpoint) -> Tokenizers {
        Tokenizers { dir, endpoint, at: None, loaded: Mutex::new(BTreeMap::new()) }
    }

    /// Of the provider on this machine.
    pub(crate) fn own(dir: PathBuf, endpoint: QuicEndpoint, at: SocketAddr) -> Tokenizers {
        Tokenizers { at: Some(at), ..Tokenizers::new(dir, endpoint) }
    }

    /// The tokenizer of this hash; `sellers` serve it where the cache has none.
    pub(crate) async fn get(
        &self,
        hash: TokenizerHash,
        sellers: &[VerifiedListing],
    ) -> anyhow::Result<Arc<Vocabulary>> {
        // One at a time: two requests for a new model fetch it once.
        let mut loaded = self.loaded.lock().await;
        if let Some(found) = loaded.get(&hash) {
            return Ok(found.clone());
        }
        let path = self.dir.join(format!("{hash}.gguf"));
        if !is_whole(&path, &hash) {
            let bytes = self.fetch(hash, sellers).await?;
            keep(&path, &bytes).with_context(|| format!("cannot keep a tokenizer in {}", self.dir.display()))?;
        }
        let config = TokenizerConfig { program: worker_program()?, artefact: path, idle: IDLE };
        let tokenizer = LlamaTokenizer::spawn(config).await.context("the tokenizer cannot be loaded")?;
        // No messages: only whether there is a template that compiles.
        match tokenizer.render(ChatOrder::new(&[], None, false, 0)).await {
            Ok(_) | Err(TemplateError::NoMessages) => {}
            Err(error) => return Err(error.into()),
        }
        let template = if tokenizer.chat_template().is_some() { MODEL_NAME } else { PLAIN_NAME };
        tracing::info!(tokenizer = %hash.short(), template, "tokenizer loaded");
        let marks = marks(&tokenizer).await?;
        let vocabulary = Arc::new(Vocabulary { tokenizer, marks });
        if loaded.len() >= MAX_LOADED {
            loaded.pop_first();
        }
        loaded.insert(hash, vocabulary.clone());
        Ok(vocabulary)
    }

    async fn fetch(&self, hash: TokenizerHash, sellers: &[VerifiedListing]) -> anyhow::Result<Vec<u8>> {
        let mut download = Download::new(Digest(hash.0), MAX_ARTEFACT_BYTES);
        let mut last = anyhow::anyhow!("nobody serves the tokenizer {hash}");
        for seller in sellers {
            // Fetching a public artefact needs no identity: the key is used once.
            let key = SigningKey::from_bytes(&super::fresh_seed());
            let addresses = self.at.map_or_else(|| seller.addresses.clone(), |at| vec![at.to_string()]);
            let hints = hints(&addresses);
            let fetched = async {
                let link = self.endpoint.connect(&hints, seller.node_key, &key).await?;
                Ok::<_, anyhow::Error>(download.run(&link).await?)
            };
            match fetched.await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    tracing::info!(provider = %seller.node_key.short(), %error, "a tokenizer was not fetched");
                    last = error;
                }
            }
        }
        bail!(last.context("the model's tokenizer cannot be fetched"))
    }
}

async fn marks(tokenizer: &LlamaTokenizer) -> anyhow::Result<BTreeMap<u32, &'static str>> {
    let template = tokenizer.chat_template().unwrap_or_default();
    let mut marks = BTreeMap::new();
    for mark in MARKS.into_iter().filter(|mark| template.contains(mark)) {
        if let [id] = tokenizer.tokenize(mark, false, true).await?.as_slice()
            && tokenizer.pieces(&[*id], false).await?.concat().is_empty()
        {
            marks.insert(*id, mark);
        }
    }
    Ok(marks)
}

fn is_whole(path: &Path, hash: &TokenizerHash) -> bool {
    std::fs::read(path).is_ok_and(|bytes| <[u8; 32]>::from(Sha256::digest(&bytes)) == hash.0)
}

/// Writes it whole or not at all.
fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let part = path.with_extension("part");
    std::fs::write(&part, bytes)?;
    std::fs::rename(part, path)
}
