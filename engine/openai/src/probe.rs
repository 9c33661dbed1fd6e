//! Before anything is sold: what answers at the URL, whether it tells token ids, whether it tokenises as the named
//! tokenizer does, and how fast it is.

use std::time::Instant;

use satgrid_engine::{
    port::{Speed, Tokenizer},
    sampling::Sampling,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    client::{Client, UpstreamError},
    config::{Dialect, UpstreamConfig},
    dialect::{Ask, PromptForm},
    engine::Served,
};

/// Text whose tokens tell vocabularies apart: spaces, numbers, other scripts.
const SAMPLE: &str = "The old mill stood by the river in 1987; l'été, 東京 and  two  spaces.";
/// Tokens that are generated to measure the speed.
const MEASURED: u32 = 16;

/// Why an upstream cannot be sold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    #[error("the upstream at {url} does not serve: {why}")]
    NotServing { url: String, why: String },
    #[error(
        "the upstream tokenises otherwise than the model file that is named: {upstream} tokens against {file} for the same \
         text"
    )]
    OtherTokenizer { upstream: usize, file: usize },
    #[error("the upstream gave no text and no token ids")]
    Nothing,
    #[error("the named tokenizer failed: {0}")]
    Tokenizer(String),
}

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    pub served: Served,
    /// SHA-256 over the dialect and what the server says of its version: the build that listings name.
    pub build_id: [u8; 32],
    pub version: String,
    pub speed: Speed,
}

/// Asks the server, with a few requests that cost it next to nothing.
pub async fn probe(config: &UpstreamConfig, tokenizer: &dyn Tokenizer) -> Result<Probed, ProbeError> {
    let client = Client::new(config.clone());
    let not_serving = |error: UpstreamError| ProbeError::NotServing { url: config.url.clone(), why: error.to_string() };
    let dialect = match config.dialect {
        Some(dialect) => dialect,
        None => detect(&client).await.map_err(not_serving)?,
    };
    let version = version(&client, dialect).await;
    same_tokenizer(&client, dialect, tokenizer).await?;
    let (gives_ids, speed) = try_out(&client, dialect, tokenizer).await?;
    let build_id = Sha256::digest(format!("satgrid-upstream-v1\0{}\0{version}", dialect.name())).into();
    let served = Served { dialect, retokenised: !gives_ids };
    Ok(Probed { served, build_id, version, speed })
}

/// Which server it is, by questions that only it answers.
async fn detect(client: &Client) -> Result<Dialect, UpstreamError> {
    let has = |answer: Result<Value, UpstreamError>, field: &str| match answer {
        Ok(answer) => Ok(!answer[field].is_null()),
        Err(error @ (UpstreamError::Unreachable(_) | UpstreamError::Silent(_))) => Err(error),
        Err(
            UpstreamError::Status { .. } | UpstreamError::Said(_) | UpstreamError::BrokeOff | UpstreamError::Garbled(_),
        ) => Ok(false),
    };
    if has(client.get("/props").await, "default_generation_settings")? {
        return Ok(Dialect::LlamaServer);
    }
    if has(client.get("/get_model_info").await, "model_path")? {
        return Ok(Dialect::Sglang);
    }
    if has(client.get("/api/version").await, "version")? {
        return Ok(Dialect::Ollama);
    }
    if has(client.get("/version").await, "version")? {
        return Ok(Dialect::Vllm);
    }
    Ok(Dialect::Text)
}

async fn version(client: &Client, dialect: Dialect) -> String {
    let (path, field) = match dialect {
        Dialect::LlamaServer => ("/props", "build_info"),
        Dialect::Vllm => ("/version", "version"),
        Dialect::Sglang => ("/get_server_info", "version"),
        Dialect::Ollama => ("/api/version", "version"),
        Dialect::Text => return "unknown".to_owned(),
    };
    let answer = client.get(path).await.unwrap_or_default();
    answer[field].as_str().unwrap_or("unknown").chars().filter(|c| !c.is_control()).take(64).collect()
}

/// Servers that tokenise on demand must agree with the file: ids mean nothing otherwise.
async fn same_tokenizer(client: &Client, dialect: Dialect, tokenizer: &dyn Tokenizer) -> Result<(), ProbeError> {
    let asked = match dialect {
        Dialect::LlamaServer => json!({ "content": SAMPLE, "add_special": false, "parse_special": false }),
        Dialect::Vllm => json!({ "model": client.config().model, "prompt": SAMPLE, "add_special_tokens": false }),
        Dialect::Sglang | Dialect::Ollama | Dialect::Text => return Ok(()),
    };
    let Ok(answer) = client.post("/tokenize", &asked).await else { return Ok(()) };
    let Some(theirs) = answer["tokens"].as_array() else { return Ok(()) };
    let ours = tokenizer.tokenize(SAMPLE, false, false).await.map_err(|e| ProbeError::Tokenizer(e.to_string()))?;
    let same = theirs.len() == ours.len() && theirs.iter().zip(&ours).all(|(a, b)| a.as_u64() == Some(u64::from(*b)));
    if same { Ok(()) } else { Err(ProbeError::OtherTokenizer { upstream: theirs.len(), file: ours.len() }) }
}

/// One short completion: whether ids come with it, and how fast.
async fn try_out(client: &Client, dialect: Dialect, tokenizer: &dyn Tokenizer) -> Result<(bool, Speed), ProbeError> {
    let url = client.config().url.clone();
    let not_serving = |error: UpstreamError| ProbeError::NotServing { url: url.clone(), why: error.to_string() };
    let ids = tokenizer.tokenize(SAMPLE, true, false).await.map_err(|e| ProbeError::Tokenizer(e.to_string()))?;
    let count = ids.len();
    let prompt = if dialect.takes_ids() { PromptForm::Ids(ids) } else { PromptForm::Text(SAMPLE.to_owned()) };
    let (model, sampling) = (client.config().model.clone(), Sampling::greedy());
    let ask = Ask { model: &model, prompt: &prompt, sampling: &sampling, max_output: MEASURED, ignore_eos: true };
    let began = Instant::now();
    let mut stream = client.stream(dialect, &ask).await.map_err(not_serving)?;
    let (mut first, mut ids, mut text) = (None, 0, 0);
    while let Some(piece) = stream.next(ids).await.map_err(not_serving)? {
        if !piece.ids.is_empty() || !piece.text.is_empty() {
            first.get_or_insert_with(Instant::now);
        }
        ids += piece.ids.len();
        text += piece.text.len();
    }
    let first = first.ok_or(ProbeError::Nothing)?;
    let gives_ids = ids > 0;
    // Without ids the pieces are tokens near enough.
    let produced = if gives_ids { ids } else { text.div_ceil(4) };
    let per_second = |tokens: usize, micros: u128| {
        let milli = u128::try_from(tokens).unwrap_or(0) * 1_000_000_000 / micros.max(1);
        u64::try_from(milli).unwrap_or(u64::MAX)
    };
    let prefill = per_second(count, first.duration_since(began).as_micros());
    let decode = per_second(produced.saturating_sub(1), first.elapsed().as_micros());
    Ok((gives_ids, Speed { prefill_millitokens_per_s: prefill, decode_millitokens_per_s: decode }))
}
