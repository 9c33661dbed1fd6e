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
    sync::{Arc, PoisonError},
    time::Duration,
};
use tokio::sync::OnceCell;

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
    loaded: Places<TokenizerHash, Arc<Vocabulary>>,
}

/// Values that are made once for all who ask at a time, each under its key: who waits for one holds up nobody else.
struct Places<K, V> {
    places: std::sync::Mutex<BTreeMap<K, Place<V>>>,
    most: usize,
}

type Place<V> = Arc<OnceCell<V>>;

impl<K: Ord + Copy, V: Clone> Places<K, V> {
    fn new(most: usize) -> Places<K, V> {
        Places { places: std::sync::Mutex::new(BTreeMap::new()), most }
    }

    /// What is there, else what `make` makes. Where that fails, whoever asks next tries again.
    async fn get<E>(&self, key: K, make: impl Future<Output = Result<V, E>>) -> Result<V, E> {
        let place = self.place(key);
        place.get_or_try_init(|| make).await.cloned()
    }

    fn place(&self, key: K) -> Place<V> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = places.get(&key) {
            return place.clone();
        }
        if places.len() >= self.most {
            // Not what somebody is making; and what could not be made is nothing to keep.
            places.retain(|_, place| place.initialized() || Arc::strong_count(place) > 1);
            let made = places.iter().find(|(_, place)| place.initialized()).map(|(key, _)| *key);
            if let Some(made) = made.filter(|_| places.len() >= self.most) {
                places.remove(&made);
            }
        }
        places.entry(key).or_default().clone()
    }
}

impl Tokenizers {
    pub(crate) fn new(dir: PathBuf, endpoint: QuicEndpoint) -> Tokenizers {
        Tokenizers { dir, endpoint, at: None, loaded: Places::new(MAX_LOADED) }
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
        // Two requests for a new model fetch it once; a seller that takes its time holds up those for no other.
        self.loaded.get(hash, self.load(hash, sellers)).await
    }

    async fn load(&self, hash: TokenizerHash, sellers: &[VerifiedListing]) -> anyhow::Result<Arc<Vocabulary>> {
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
        Ok(Arc::new(Vocabulary { tokenizer, marks }))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_for_one_holds_up_no_other_and_what_failed_is_tried_again() {
        let places: Places<u8, u32> = Places::new(2);
        let never = places.get(1, std::future::pending::<Result<u32, ()>>());
        let quick = async {
            let made = places.get(2, async { Ok::<u32, ()>(7) }).await;
            let again = places.get(2, async { Err::<u32, ()>(()) }).await;
            (made, again)
        };
        tokio::select! {
            biased;
            _ = never => panic!("it never comes"),
            (made, again) = quick => assert_eq!((made, again), (Ok(7), Ok(7))),
        }
        assert_eq!(places.get(1, async { Err::<u32, &str>("no") }).await, Err("no"));
        assert_eq!(places.get(1, async { Ok::<u32, &str>(5) }).await, Ok(5));
        for key in 3..9 {
            assert_eq!(places.get(key, async move { Ok::<u32, ()>(key.into()) }).await, Ok(key.into()));
        }
        assert_eq!(places.places.lock().unwrap().len(), 2);
    }
}
