//! The official `openai` Python client against the gateway.

use super::market::Market;
use std::path::{Path, PathBuf};
use std::process::Command;

const SCRIPT: &str = r#"
import sys
from openai import OpenAI, NotFoundError
client = OpenAI(base_url=sys.argv[1], api_key="unused")
model = sys.argv[2]
assert model in [m.id for m in client.models.list()]
messages = [{"role": "user", "content": "the light of the river"}]
stream = client.chat.completions.create(model=model, messages=messages, max_tokens=24, stream=True, seed=3,
    logit_bias={"2": -100}, stream_options={"include_usage": True})
text, usage, finish = "", None, None
for chunk in stream:
    if chunk.usage:
        usage = chunk.usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
assert text and finish == "length", (text, finish)
assert usage.completion_tokens == 24, usage
assert usage.model_extra["cost_msat"] > 0 and len(usage.model_extra["receipt_ids"]) == 1, usage
whole = client.chat.completions.create(model=model, messages=messages, max_tokens=8, seed=3)
assert whole.choices[0].message.role == "assistant" and whole.usage.total_tokens > 8, whole
try:
    client.chat.completions.create(model="no-such-model", messages=messages)
    raise AssertionError("an unknown model was served")
except NotFoundError as error:
    assert error.code == "model_not_found", error
print("openai", __import__("openai").__version__, "streamed", usage.completion_tokens, "tokens for", usage.model_extra["cost_msat"], "msat")
"#;

/// A virtual environment with the client, kept in the cache; `None` where it cannot be had here.
fn python() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let packages = cache.join("satgrid/openai-client");
    if !packages.join("openai").exists() {
        eprintln!("  installing the openai client into {}", packages.display());
        // `--target` needs no venv module, which Debian packs apart.
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]);
        let installed = pip.arg("--target").arg(&packages).arg("openai").status();
        if !installed.is_ok_and(|status| status.success()) {
            let _ = std::fs::remove_dir_all(&packages);
            return None;
        }
    }
    Some(packages)
}

pub(crate) async fn streams(market: &Market) {
    let Some(packages) = python() else {
        eprintln!("  SKIPPED: pip cannot install the openai client here");
        return;
    };
    let (api, model) = (market.api.clone(), market.model.clone());
    let ran = tokio::task::spawn_blocking(move || run(&packages, &api, &model)).await.unwrap();
    eprintln!("  {ran}");
}

fn run(packages: &Path, api: &str, model: &str) -> String {
    let mut python = Command::new("python3");
    python.args(["-c", SCRIPT, api, model]).env("PYTHONPATH", packages).env("NO_PROXY", "127.0.0.1");
    let output = python.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
