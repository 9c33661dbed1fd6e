//! The `Tokenizer` port over a child process that holds a vocabulary and no weights.
//!
//! Tokenizer artefacts come from strangers, and llama.cpp aborts on some that lie; so they are read in the child only. The
//! child is started for the first text, ends after a time without any, and is started again on demand: a node at rest keeps
//! only the table of pieces (3 MB for 262,144 tokens), from which all streams are decoded without a call.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use satgrid_engine::port::{SpecialTokens, Tokenizer, TokenizerError};
use satgrid_engine::template::{ChatOrder, Prompt, TemplateError};
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::child::{Child, SpawnError, WorkerProgram};
use crate::settings::WorkerArgs;
use crate::wire::{self, FromWorker, PieceBytes, PieceTable, ToWorker, VERSION, VocabFacts};

/// Longest text that is tokenised in one call.
pub const MAX_TEXT: usize = 8 * 1024 * 1024;
/// Longest that one call may take in the child.
const CALL_WITHIN: Duration = Duration::from_secs(30);
/// Longest that a chat template may take; honest ones take a few milliseconds.
const RENDER_WITHIN: Duration = Duration::from_secs(5);
/// Most tokens whose names are asked for in one call.
const MAX_NAMES: usize = 1_000_000;

/// Which file to tokenise with, and for how long to keep its process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerConfig {
    pub program: WorkerProgram,
    /// A tokenizer artefact, or a model: its weights are not loaded.
    pub artefact: PathBuf,
    /// The child ends after this long without a call.
    pub idle: Duration,
}

/// A vocabulary in a child process that comes and goes.
pub struct LlamaTokenizer {
    config: TokenizerConfig,
    special: SpecialTokens,
    chat_template: Option<String>,
    pieces: PieceTable,
    running: Mutex<Running>,
}

struct Running {
    child: Option<Child>,
    last_call: Instant,
}

impl LlamaTokenizer {
    /// Starts the child once, to learn that the file serves and to fetch its table of pieces.
    pub async fn spawn(config: TokenizerConfig) -> Result<Arc<Self>, SpawnError> {
        let (child, facts) = start(&config).await?;
        if facts.version != VERSION {
            return Err(SpawnError::Protocol(format!("version {} instead of {VERSION}", facts.version)));
        }
        let idle = config.idle;
        let tokenizer = Arc::new(Self {
            config,
            special: facts.special,
            chat_template: facts.chat_template,
            pieces: facts.pieces,
            running: Mutex::new(Running { child: Some(child), last_call: Instant::now() }),
        });
        tokio::spawn(unload_when_idle(Arc::downgrade(&tokenizer), idle));
        Ok(tokenizer)
    }

    /// Whether the child is there now.
    pub async fn is_loaded(&self) -> bool {
        self.running.lock().await.child.is_some()
    }

    /// The child's process id, while there is one.
    pub async fn process_id(&self) -> Option<u32> {
        self.running.lock().await.child.as_ref().and_then(Child::id)
    }

    /// The model's chat template over a conversation, in the child: it is a stranger's program. One that takes too much
    /// memory or time costs the child, which is started again for the next text.
    pub async fn render(&self, order: ChatOrder) -> Result<Prompt, TemplateError> {
        self.render_within(order, RENDER_WITHIN).await
    }

    /// As [`LlamaTokenizer::render`], for at most so long.
    pub async fn render_within(&self, order: ChatOrder, within: Duration) -> Result<Prompt, TemplateError> {
        let failed = |reason: String| TemplateError::Failed { reason };
        let frame = wire::encode(&ToWorker::Render(order)).map_err(|error| failed(error.to_string()))?;
        let mut running = self.running.lock().await;
        let mut child = self.child(&mut running).await.map_err(|error| failed(error.to_string()))?;
        match timeout(within, ask(&mut child, &frame)).await {
            Ok(Ok(answer)) => {
                *running = Running { child: Some(child), last_call: Instant::now() };
                let out_of_turn = || failed("the process answered another question".into());
                if let FromWorker::Rendered(prompt) = answer { prompt } else { Err(out_of_turn()) }
            }
            // Not asked again: it would break the next one too.
            Ok(Err(_)) => Err(TemplateError::Broke { how: child.end().await }),
            // The child goes with its handle, killed.
            Err(_) => Err(TemplateError::OutOfTime { ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX) }),
        }
    }

    /// One question, one answer. A child that died is replaced once: the text may not be to blame.
    async fn call(&self, question: &ToWorker) -> Result<FromWorker, TokenizerError> {
        let failed = |reason: String| TokenizerError::Backend { reason };
        let frame = wire::encode(question).map_err(|error| failed(error.to_string()))?;
        let mut running = self.running.lock().await;
        let mut last = String::new();
        for _ in 0..2 {
            let mut child = self.child(&mut running).await.map_err(|error| failed(error.to_string()))?;
            match timeout(CALL_WITHIN, ask(&mut child, &frame)).await {
                Ok(Ok(answer)) => {
                    // Kept only after a whole answer: a caller that goes away in the middle leaves no half-read stream.
                    *running = Running { child: Some(child), last_call: Instant::now() };
                    return Ok(answer);
                }
                Ok(Err(error)) => last = format!("{error}; the process {}", child.end().await),
                Err(_) => return Err(failed(format!("no answer within {} s", CALL_WITHIN.as_secs()))),
            }
        }
        Err(failed(last))
    }

    /// The child that is there, or a new one. One that died between two calls is nobody's fault, least of all the next text's.
    async fn child(&self, running: &mut Running) -> Result<Child, SpawnError> {
        if let Some(mut child) = running.child.take()
            && child.lives()
        {
            return Ok(child);
        }
        Ok(start(&self.config).await?.0)
    }
}

async fn ask(child: &mut Child, frame: &[u8]) -> std::io::Result<FromWorker> {
    child.writer.write_all(frame).await?;
    wire::read_async(&mut child.reader).await?.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

async fn start(config: &TokenizerConfig) -> Result<(Child, VocabFacts), SpawnError> {
    let args = WorkerArgs::Tokenizer { artefact: config.artefact.clone() };
    match Child::start(&config.program, &args, None, |_| {}).await? {
        (child, FromWorker::TokenizerReady(facts)) => Ok((child, *facts)),
        _ => Err(SpawnError::Protocol("not a tokenizer".into())),
    }
}

/// Ends the child when it was not called for `idle`. Goes when the tokenizer does.
async fn unload_when_idle(tokenizer: Weak<LlamaTokenizer>, idle: Duration) {
    let mut wait = idle;
    loop {
        tokio::time::sleep(wait.max(Duration::from_millis(10))).await;
        let Some(tokenizer) = tokenizer.upgrade() else { return };
        let mut running = tokenizer.running.lock().await;
        let unused = running.last_call.elapsed();
        wait = idle.saturating_sub(unused);
        if wait.is_zero() {
            wait = idle;
            if let Some(child) = running.child.take() {
                child.end().await;
            }
        }
    }
}

#[async_trait]
impl Tokenizer for LlamaTokenizer {
    async fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > MAX_TEXT {
            return Err(TokenizerError::TooLong { bytes: text.len() as u64, limit: MAX_TEXT as u64 });
        }
        let question = ToWorker::Tokenize { text: text.to_owned(), add_special, parse_special };
        let ids = tokenized(self.call(&question).await?)?;
        match ids.iter().find(|&&id| id >= self.vocab_size()) {
            Some(&token) => Err(TokenizerError::UnknownToken { token, vocab: self.vocab_size() }),
            None => Ok(ids),
        }
    }

    async fn pieces(&self, ids: &[u32], special: bool) -> Result<Vec<Vec<u8>>, TokenizerError> {
        let vocab = self.vocab_size();
        if let Some(&token) = ids.iter().find(|&&token| token >= vocab) {
            return Err(TokenizerError::UnknownToken { token, vocab });
        }
        if !special {
            return Ok(ids.iter().map(|&id| self.pieces.get(id).unwrap_or_default().to_vec()).collect());
        }
        if ids.len() > MAX_NAMES {
            return Err(TokenizerError::TooLong { bytes: ids.len() as u64, limit: MAX_NAMES as u64 });
        }
        let names = named(self.call(&ToWorker::Names { ids: ids.to_vec() }).await?)?;
        if names.len() != ids.len() {
            return Err(out_of_turn());
        }
        Ok(names.into_iter().map(|name| name.0).collect())
    }

    fn special(&self) -> SpecialTokens {
        self.special.clone()
    }

    fn vocab_size(&self) -> u32 {
        self.pieces.len()
    }

    fn chat_template(&self) -> Option<String> {
        self.chat_template.clone()
    }
}

fn out_of_turn() -> TokenizerError {
    TokenizerError::Backend { reason: "the process answered another question".into() }
}

/// The answer to `ToWorker::Tokenize`.
fn tokenized(answer: FromWorker) -> Result<Vec<u32>, TokenizerError> {
    if let FromWorker::Tokenized(ids) = answer { ids } else { Err(out_of_turn()) }
}

/// The answer to `ToWorker::Names`.
fn named(answer: FromWorker) -> Result<Vec<PieceBytes>, TokenizerError> {
    if let FromWorker::Named(names) = answer { names } else { Err(out_of_turn()) }
}
