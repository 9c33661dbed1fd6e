//! Engines that run in somebody else's server: probed before they are sold, and the two kinds of engine as one.
//!
//! The file that the model names says what is sold: root, tokenizer, context. The server says how it is run, and the
//! listing's instruction set repeats it: `upstream/vllm`, or `upstream/ollama/retokenised` where the server tells no token
//! ids and its text is tokenised here.

use super::{engines::worker_program, now};
use crate::config::{ModelForSale, Upstream};
use crate::failure::HintExt;
use crate::models::Inspected;
use anyhow::{Context, bail};
use satgrid_engine::port::{Engine, EngineFacts, Profile};
use satgrid_engine_llama::{LlamaEngine, LlamaTokenizer, TokenizerConfig};
use satgrid_engine_openai::{Dialect, ProbeError, UpstreamConfig, UpstreamEngine, probe};
use std::{path::PathBuf, sync::Arc, time::Duration};

/// The tokenizer is asked for each request that goes out or comes back as text.
const TOKENIZER_IDLE: Duration = Duration::from_secs(600);
/// Context where neither the configuration nor the file is smaller.
const DEFAULT_CONTEXT: u32 = 8_192;
/// What goes upstream in one prefill at most.
const BATCH: u32 = 512;

/// An engine that runs: ours, or somebody's server.
#[derive(Clone)]
pub(crate) enum RunningEngine {
    Llama(Arc<LlamaEngine>),
    Upstream(Arc<UpstreamEngine>),
    #[cfg(test)]
    Toy(Arc<super::toy::OnToy>),
}

impl RunningEngine {
    pub(crate) fn port(&self) -> Arc<dyn Engine> {
        match self {
            RunningEngine::Llama(engine) => engine.clone(),
            RunningEngine::Upstream(engine) => engine.clone(),
            #[cfg(test)]
            RunningEngine::Toy(engine) => engine.clone(),
        }
    }

    pub(crate) fn facts(&self) -> EngineFacts {
        self.port().facts()
    }

    /// Of the child process, where it is ours.
    pub(crate) fn process_id(&self) -> Option<u32> {
        match self {
            RunningEngine::Llama(engine) => engine.process_id(),
            RunningEngine::Upstream(_) => None,
            #[cfg(test)]
            RunningEngine::Toy(_) => None,
        }
    }

    pub(crate) fn shut_down(&self) {
        match self {
            RunningEngine::Llama(engine) => engine.shut_down(),
            RunningEngine::Upstream(engine) => engine.shut_down(),
            #[cfg(test)]
            RunningEngine::Toy(engine) => engine.shut_down(),
        }
    }
}

/// Probes the server that `model` names and puts the port in front of it.
pub(crate) async fn start(
    model: &ModelForSale,
    upstream: &Upstream,
    path: PathBuf,
    inspected: &Inspected,
    root: [u8; 32],
) -> anyhow::Result<RunningEngine> {
    if inspected.facts.pooling.is_some() {
        bail!("the named file is a model that embeds; only models that write are sold from another server");
    }
    let program = worker_program()?;
    let tokenizer = LlamaTokenizer::spawn(TokenizerConfig { program, artefact: path, idle: TOKENIZER_IDLE });
    let tokenizer = tokenizer.await.context("the named file holds no tokenizer that works")?;
    let context = model.context.unwrap_or(DEFAULT_CONTEXT).min(inspected.facts.context);
    let mut config = UpstreamConfig::new(&upstream.url, &upstream.model, model.slots, context);
    config.key = upstream.key.as_ref().map(crate::config::Secret::read).transpose()?;
    config.dialect = match &upstream.kind {
        Some(name) => Some(Dialect::from_name(name).with_context(|| format!("{name:?} is no kind of upstream"))?),
        None => None,
    };
    let began = now();
    let probed = match probe(&config, &*tokenizer).await {
        Ok(probed) => probed,
        Err(error @ ProbeError::OtherTokenizer { .. }) => {
            return Err(anyhow::Error::new(error))
                .hint("name the GGUF file of the very model that the upstream serves");
        }
        Err(error @ (ProbeError::NotServing { .. } | ProbeError::Nothing | ProbeError::Tokenizer(_))) => {
            bail!(error)
        }
    };
    let dialect = probed.served.dialect.name();
    let retokenised = if probed.served.retokenised { "/retokenised" } else { "" };
    tracing::info!(
        model = %model.listed_name(), %dialect, version = %probed.version, retokenised = probed.served.retokenised,
        took_ms = now().since(began), "an upstream serves"
    );
    let facts = EngineFacts {
        model: inspected.facts.clone(),
        model_root: root,
        tokenizer_hash: inspected.tokenizer.hash,
        // Nobody promises bit-identical output for a server that is not ours.
        profile: Profile::Fast,
        build_id: probed.build_id,
        instruction_set: format!("upstream/{dialect}{retokenised}"),
        slots: model.slots,
        context,
        batch: BATCH,
        speed: Some(probed.speed),
    };
    Ok(RunningEngine::Upstream(UpstreamEngine::new(config, probed.served, facts, tokenizer)))
}
