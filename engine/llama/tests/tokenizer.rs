//! The tokenizer process: text to ids and back, gone when idle, back on demand, and deaf to hostile files.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{TinyModel, program, tiny_bytes};
use satgrid_engine::gguf::Gguf;
use satgrid_engine::port::{Tokenizer, TokenizerError};
use satgrid_engine::template::{ChatOrder, MAX_RENDERED_BYTES, TemplateError};
use satgrid_engine::tiny;
use satgrid_engine::tokenizer_artefact::TokenizerArtefact;
use satgrid_engine_llama::{LlamaTokenizer, MAX_TEXT, SpawnError, TokenizerConfig};

async fn spawn(artefact: &Path, idle: Duration) -> Result<Arc<LlamaTokenizer>, SpawnError> {
    LlamaTokenizer::spawn(TokenizerConfig { program: program(), artefact: artefact.to_path_buf(), idle }).await
}

const LONG: Duration = Duration::from_secs(600);

fn artefact_bytes() -> Vec<u8> {
    let gguf = Gguf::read(&mut std::io::Cursor::new(tiny_bytes())).unwrap();
    TokenizerArtefact::from_gguf(&gguf).unwrap().bytes
}

async fn text_of(tokenizer: &LlamaTokenizer, ids: &[u32]) -> String {
    String::from_utf8(tokenizer.pieces(ids, false).await.unwrap().concat()).unwrap()
}

#[tokio::test]
async fn an_artefact_tokenises_as_its_model_does() {
    let (model, artefact) = (TinyModel::write(), TinyModel::of(&artefact_bytes()));
    let whole = spawn(&model.path, LONG).await.unwrap();
    let cut = spawn(&artefact.path, LONG).await.unwrap();
    assert_eq!((whole.special(), whole.vocab_size()), (cut.special(), cut.vocab_size()));
    assert!(cut.special().add_bos && cut.special().bos.is_some());
    for text in ["", "the quiet river", "naïve — 水 🌊", "</s> is text", "a\n\n b"] {
        let ids = cut.tokenize(text, false, false).await.unwrap();
        assert_eq!(whole.tokenize(text, false, false).await.unwrap(), ids);
        assert_eq!(text_of(&cut, &ids).await, text);
        let with_bos = cut.tokenize(text, true, false).await.unwrap();
        assert_eq!((with_bos[0], &with_bos[1..]), (cut.special().bos.unwrap(), ids.as_slice()), "{text:?}");
    }
    // Control tokens are read from a text only where the caller asks, and their names told only where it asks.
    let eos = cut.special().eos.unwrap();
    assert!(cut.special().eog.contains(&eos));
    assert_eq!(cut.tokenize("</s>", false, true).await.unwrap(), [eos]);
    assert_eq!(cut.pieces(&[eos], false).await.unwrap(), [b""]);
    assert_eq!(cut.pieces(&[eos], true).await.unwrap(), [b"</s>"]);
}

#[tokio::test]
async fn what_no_vocabulary_holds_is_refused() {
    let model = TinyModel::write();
    let tokenizer = spawn(&model.path, LONG).await.unwrap();
    let vocab = tokenizer.vocab_size();
    for special in [false, true] {
        let error = tokenizer.pieces(&[1, vocab], special).await.unwrap_err();
        assert_eq!(error, TokenizerError::UnknownToken { token: vocab, vocab });
    }
    let long = "a".repeat(MAX_TEXT + 1);
    let error = tokenizer.tokenize(&long, false, false).await.unwrap_err();
    assert_eq!(error, TokenizerError::TooLong { bytes: long.len() as u64, limit: MAX_TEXT as u64 });
}

#[tokio::test]
async fn the_process_goes_when_idle_and_comes_back_on_demand() {
    let model = TinyModel::write();
    let tokenizer = spawn(&model.path, Duration::from_millis(50)).await.unwrap();
    let ids = tokenizer.tokenize("the winter garden", false, false).await.unwrap();
    while tokenizer.is_loaded().await {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Pieces need no process.
    assert_eq!(text_of(&tokenizer, &ids).await, "the winter garden");
    assert!(!tokenizer.is_loaded().await);
    assert_eq!(tokenizer.tokenize("the winter garden", false, false).await.unwrap(), ids);
}

#[tokio::test]
async fn a_killed_process_is_replaced_within_the_call() {
    let model = TinyModel::write();
    let tokenizer = spawn(&model.path, LONG).await.unwrap();
    let ids = tokenizer.tokenize("signal", false, false).await.unwrap();
    common::kill(tokenizer.process_id().await.unwrap());
    assert_eq!(tokenizer.tokenize("signal", false, false).await.unwrap(), ids);
}

/// A template that breaks its process is not tried again; but it is not to blame for a process that was gone before.
#[tokio::test]
async fn a_process_that_died_unasked_is_no_template_s_fault() {
    let model = TinyModel::write();
    let tokenizer = spawn(&model.path, LONG).await.unwrap();
    let process = tokenizer.process_id().await.unwrap();
    common::kill(process);
    // Dead, all its threads, and not waited for.
    let lives = || {
        let threads = std::fs::read_dir(format!("/proc/{process}/task")).map_or(0, Iterator::count);
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"));
        threads > 1 || stat.is_ok_and(|stat| !stat.contains(") Z"))
    };
    while lives() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let messages = [serde_json::json!({"role": "user", "content": "Hi"})];
    let prompt = tokenizer.render(ChatOrder::new(&messages, None, true, 1_700_000_000)).await.unwrap();
    assert_eq!(prompt.text, "Hi");
}

/// A stranger's artefact can lie in every byte. Whatever llama.cpp makes of it, this process goes on, with an error in words
/// or a tokenizer that answers.
#[tokio::test]
async fn hostile_artefacts_hurt_only_their_own_process() {
    let good = artefact_bytes();
    let mut files = vec![Vec::new(), good[..good.len() / 2].to_vec(), b"GGUF".to_vec()];
    for step in 0..24 {
        let mut bytes = good.clone();
        let at = (step * 7919) % bytes.len();
        let end = (at + 8).min(bytes.len());
        bytes[at..end].fill(0xff);
        files.push(bytes);
    }
    let mut refused = 0;
    for bytes in files {
        let file = TinyModel::of(&bytes);
        match spawn(&file.path, LONG).await {
            Ok(tokenizer) => {
                // It may answer or fail; ids are in its vocabulary if it answers.
                if let Ok(ids) = tokenizer.tokenize("the quiet river", true, true).await {
                    assert!(ids.iter().all(|&id| id < tokenizer.vocab_size()));
                }
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(refused >= 3);
}

/// What a template of a stranger's model may cost: a child process, and nothing of ours.
#[tokio::test]
async fn a_hostile_chat_template_costs_a_process_and_a_moment() {
    let tokenizer = async |template: &str| {
        let model = tiny::TinyModel { chat_template: Some(template.to_owned()), ..tiny::TinyModel::default() };
        let model = TinyModel::of(&model.to_bytes().unwrap());
        let tokenizer = spawn(&model.path, LONG).await.unwrap();
        (model, tokenizer)
    };
    let messages = [serde_json::json!({"role": "user", "content": "Hi"})];
    let order = || ChatOrder::new(&messages, None, true, 1_700_000_000);
    let doubling = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let slow =
        "{% set s = 'ab' * 4000000 %}{% for i in range(100000) %}{% set t = s | replace('a', 'c') %}{% endfor %}";
    let broke = |error: &TemplateError| matches!(error, TemplateError::Broke { .. });
    let failed = |error: &TemplateError| matches!(error, TemplateError::Failed { .. });
    let refused = |error: &TemplateError| matches!(error, TemplateError::Failed { .. } | TemplateError::Broke { .. });
    let fuel = |error: &TemplateError| *error == TemplateError::OutOfFuel;
    let time = |error: &TemplateError| *error == TemplateError::OutOfTime { ms: 500 };
    let output = |error: &TemplateError| *error == TemplateError::OutputTooLarge;
    let syntax = |error: &TemplateError| matches!(error, TemplateError::Syntax { .. });
    let nested = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
    let many = "{{ 'x' * ".to_owned() + &(MAX_RENDERED_BYTES + 1).to_string() + " }}";
    type Check<'a> = &'a dyn Fn(&TemplateError) -> bool;
    let cases: [(&str, Check<'_>); 8] = [
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", &failed),
        (nested, &fuel),
        (doubling, &broke),
        ("{{ ('x' * 99999999999) | length }}", &refused),
        ("{{ ([1] * 99999999999) | list | length }}", &refused),
        (slow, &time),
        (&many, &output),
        ("{% for %}", &syntax),
    ];
    for (template, expected) in cases {
        let (_model, tokenizer) = tokenizer(template).await;
        let within = Duration::from_millis(if template == slow { 500 } else { 60_000 });
        let error = tokenizer.render_within(order(), within).await.unwrap_err();
        assert!(expected(&error), "{template}: {error:?}");
        // The vocabulary serves as before.
        let ids = tokenizer.tokenize("the quiet river", false, false).await.unwrap();
        assert_eq!(text_of(&tokenizer, &ids).await, "the quiet river");
    }
    let (_model, tokenizer) = tokenizer("{{ bos_token }}{{ messages[0].content }}").await;
    let prompt = tokenizer.render(order()).await.unwrap();
    assert_eq!((prompt.text.as_str(), prompt.add_special), ("<s>Hi", false));
    let base = TinyModel::write();
    let prompt = spawn(&base.path, LONG).await.unwrap().render(order()).await.unwrap();
    assert_eq!((prompt.text.as_str(), prompt.add_special), ("Hi", true), "a base model has none");
}
