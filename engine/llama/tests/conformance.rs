//! The suite that every engine passes, on the real child process with the tiny model.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{TinyModel, program, settings, spawn};
use satgrid_engine::conformance::conformance;
use satgrid_engine::port::Profile;
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
