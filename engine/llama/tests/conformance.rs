//! The suite that every engine passes, on the real child process with the tiny model.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{TinyModel, program, settings, spawn};
use satgrid_engine::conformance::{conformance, embedding_conformance};
use satgrid_engine::facts::Pooling;
use satgrid_engine::port::Profile;
use satgrid_engine::tiny_bert::TinyBert;
use satgrid_engine_llama::{LlamaTokenizer, TokenizerConfig};
use tokio::time::timeout;

async fn check(profile: Profile) {
    let model = TinyModel::write();
    let idle = Duration::from_secs(600);
    let config = TokenizerConfig { program: program(), artefact: model.path.clone(), idle };
    let tokenizer = LlamaTokenizer::spawn(config).await.unwrap();
    let engine = spawn(settings(&model.path, profile, 4)).await.unwrap();
    timeout(Duration::from_secs(300), conformance(engine.as_ref(), tokenizer.as_ref())).await.expect("no hang");
}

#[tokio::test]
async fn the_exact_profile_conforms() {
    check(Profile::Exact).await;
}

#[tokio::test]
async fn the_fast_profile_conforms() {
    check(Profile::Fast).await;
}

/// Models that embed: one that writes to the right and takes the last row, as Qwen3-Embedding does, one that does so and pools
/// all rows, and BERTs, which see both directions.
#[tokio::test]
async fn embedding_models_conform() {
    let llama = |pooling| satgrid_engine::tiny::TinyModel { pooling: Some(pooling), ..Default::default() }.to_bytes();
    let bert = |pooling| TinyBert { pooling, ..TinyBert::default() }.to_bytes();
    let rows = [
        (llama(Pooling::Last).unwrap(), Profile::Exact),
        (llama(Pooling::Last).unwrap(), Profile::Fast),
        (llama(Pooling::Mean).unwrap(), Profile::Exact),
        (bert(Pooling::Mean).unwrap(), Profile::Exact),
        (bert(Pooling::Cls).unwrap(), Profile::Fast),
    ];
    for (bytes, profile) in rows {
        let model = TinyModel::of(&bytes);
        let config =
            TokenizerConfig { program: program(), artefact: model.path.clone(), idle: Duration::from_secs(600) };
        let tokenizer = LlamaTokenizer::spawn(config).await.unwrap();
        let engine = spawn(settings(&model.path, profile, 4)).await.unwrap();
        let suite = embedding_conformance(engine.as_ref(), tokenizer.as_ref());
        timeout(Duration::from_secs(120), suite).await.expect("no hang");
    }
}
