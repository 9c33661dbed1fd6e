//! The engines of a provider, and the listings that say what they run.

use super::experts::Beside;
use super::layers::LeadParts;
use super::rings::Buys;
use super::trunks::{self, Group};
use super::upstream::{self, RunningEngine};
use crate::config::{self, Config};
use crate::failure::HintExt;
use crate::models::{Store, identify};
use crate::progress::Bytes as Progress;
use anyhow::Context;
use bytes::Bytes;
use ed25519_dalek::SigningKey;
use satgrid_engine::port::Engine as _;
use satgrid_engine::port::{EngineFacts, Profile};
use satgrid_engine_llama::{EngineConfig, EngineSettings, LlamaEngine, Offload, WorkerProgram, default_threads};
use satgrid_ledger_sqlite::FigureStore;
use satgrid_node::provider::EngineId;
use satgrid_protocol_quic::artefact::Artefacts;
use satgrid_types::{
    Bindings, BuildId, Digest, EngineProfile, Listing, ModelRoot, Msat, MsatPerMtok, NodeKey, NostrKey, Part, RateCard,
    Speed, TokenizerHash, lightning_binding_message, node_key, sign_node_binding,
};
use satgrid_wallet::Lightning;
use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

/// Where what is counted and measured of experts is kept, and whose it is.
pub(crate) struct ExpertFigures {
    pub store: Arc<FigureStore>,
    pub ours: NodeKey,
}

/// One model that is for sale, with its running engine.
pub(crate) struct ForSale {
    pub id: EngineId,
    pub engine: RunningEngine,
    /// Of a trunk that buys experts.
    pub buys: Option<Arc<dyn Buys>>,
    /// What is listed of its speed: measured by its engine, or estimated over those whose experts are bought.
    pub speed: Option<satgrid_engine::port::Speed>,
    pub name: String,
    pub rates: RateCard,
    pub tokenizer: Bytes,
    pub memory_bytes: u64,
}

impl ForSale {
    pub(crate) fn listing(&self, by: &Identity<'_>) -> Listing {
        let facts = EngineFacts { speed: self.speed, ..self.engine.facts() };
        OnSale::whole(facts, &self.name, self.rates, self.memory_bytes).listing(by)
    }
}

/// The program that runs llama.cpp: this one, again.
pub(crate) fn worker_program() -> anyhow::Result<WorkerProgram> {
    let exe = crate::program().context("this program does not find itself")?;
    Ok(WorkerProgram { exe, leading_args: vec![crate::commands::engine_worker::NAME.into()] })
}

/// Starts an engine for every model in the configuration, one after the other: each load takes all the cores.
pub(crate) async fn start(config: &Config, figures: Option<&ExpertFigures>) -> anyhow::Result<Vec<ForSale>> {
    let mut all = Vec::new();
    // Those that buy wait for the market.
    for (index, model) in config.provider.models.iter().enumerate().filter(|(_, model)| !model.buy_experts) {
        let id = EngineId(u32::try_from(index)?);
        all.push(start_one(config, model, id, figures, None).await?);
    }
    Ok(all)
}

/// Starts one model; one that buys experts, with what it buys by.
pub(crate) async fn start_one(
    config: &Config,
    model: &config::ModelForSale,
    id: EngineId,
    figures: Option<&ExpertFigures>,
    with: Option<LeadParts<'_>>,
) -> anyhow::Result<ForSale> {
    let name = model.listed_name();
    load(config, model, id, figures, with).await.with_context(|| format!("model {name} cannot be sold"))
}

async fn load(
    config: &Config,
    model: &config::ModelForSale,
    id: EngineId,
    figures: Option<&ExpertFigures>,
    with: Option<LeadParts<'_>>,
) -> anyhow::Result<ForSale> {
    let name = model.listed_name();
    let store = Store::new(&config.models.dir);
    let path = file_of(&store, model)?;
    let looked = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || identify(&store, &path, Progress::new)).await?
    };
    let identified = looked.map_err(|fault| {
        let hint = fault.hint();
        Err::<(), _>(anyhow::Error::new(fault)).hint(hint).err().unwrap_or_else(|| anyhow::anyhow!("unreadable"))
    })?;
    let rates = RateCard {
        input: MsatPerMtok(model.price_in_msat_per_mtok),
        cached_input: MsatPerMtok(model.cached_price()),
        output: MsatPerMtok(model.price_out_msat_per_mtok),
        per_request: Msat(model.per_request_msat),
        ..RateCard::default()
    };
    if let Some(upstream) = model.upstream() {
        let inspected = &identified.inspected;
        let engine = upstream::start(model, &upstream, path, inspected, identified.root).await?;
        let memory_bytes = inspected.facts.tensor_bytes;
        let tokenizer = Bytes::from(identified.inspected.tokenizer.bytes);
        let speed = engine.facts().speed;
        return Ok(ForSale { id, engine, buys: None, speed, name, rates, memory_bytes, tokenizer });
    }
    let settings = EngineSettings {
        model: path,
        profile: match model.profile {
            config::Profile::Exact => Profile::Exact,
            config::Profile::Fast => Profile::Fast,
        },
        threads: model.threads.unwrap_or_else(default_threads),
        slots: model.slots,
        context: model.context.unwrap_or(0),
        offload: Offload { device: model.device.clone(), layers: model.gpu_layers },
    };
    #[cfg(test)]
    if crate::commands::runs_on_toy() {
        let engine = super::toy::OnToy::in_place_of(&identified, settings.slots);
        let (speed, tokenizer) = (engine.facts().speed, Bytes::from(identified.inspected.tokenizer.bytes));
        let memory_bytes = identified.inspected.facts.tensor_bytes;
        let engine = RunningEngine::Toy(Arc::new(engine));
        return Ok(ForSale { id, engine, buys: None, speed, name, rates, tokenizer, memory_bytes });
    }
    tracing::info!(model = %name, profile = settings.profile.name(), slots = settings.slots, "loading");
    let engine_config = EngineConfig { program: worker_program()?, settings };
    let mut buys = None;
    let engine = if identified.inspected.is_trunk {
        let (sources, settings) = (model.expert_sources(), &engine_config.settings);
        let (profile, threads, device) = (settings.profile, settings.threads, settings.offload.device.clone());
        let beside = Beside { profile, threads, device };
        let group = Group::start(&sources, &beside, identified.inspected.manifest()?, None, figures).await?;
        let engine = LlamaEngine::spawn_trunk(engine_config, group.experts.clone(), |_| {}).await?;
        let EngineFacts { slots, context, build_id, instruction_set, speed, .. } = engine.facts();
        let build = (BuildId(build_id), instruction_set);
        let trunk = trunks::Trunk { id, name: name.clone(), slots, context, build, speed };
        buys = group.runs(&sources, trunk, with).await;
        engine
    } else if !model.experts.is_empty() || model.buy_experts {
        return Err(anyhow::anyhow!(
            "experts are named, but {} is a whole model",
            engine_config.settings.model.display()
        ))
        .hint("satgrid models split MODEL --experts makes a trunk and packs");
    } else {
        LlamaEngine::spawn(engine_config, |_| {}).await?
    };
    let facts = engine.facts();
    if facts.model_root != identified.root {
        anyhow::bail!("the file changed while it was being loaded");
    }
    let (buys, estimate) = buys.unzip();
    let listed = estimate.unwrap_or(facts.speed);
    let speed = speed_of(listed.as_ref());
    tracing::info!(
        model = %name, root = %hex::encode(&facts.model_root[..8]), build = %hex::encode(&facts.build_id[..8]),
        instruction_set = %facts.instruction_set, prefill_tok_s = speed.prefill_mtok_s / 1_000,
        decode_tok_s = speed.decode_mtok_s / 1_000, "engine is up"
    );
    Ok(ForSale {
        id,
        engine: RunningEngine::Llama(engine),
        buys,
        speed: listed,
        name,
        rates,
        memory_bytes: identified.inspected.facts.tensor_bytes,
        tokenizer: Bytes::from(identified.inspected.tokenizer.bytes),
    })
}

fn file_of(store: &Store, model: &config::ModelForSale) -> anyhow::Result<PathBuf> {
    match (&model.path, &model.name) {
        (Some(path), _) => Ok(path.clone()),
        (None, Some(name)) => match store.find(name) {
            Some(record) => Ok(store.path(&record)),
            None => {
                Err(anyhow::anyhow!("{name} is not in the model store")).hint(format!("satgrid models pull {name}"))
            }
        },
        (None, None) => anyhow::bail!("neither path nor name is set"),
    }
}

/// Who lists: the three keys, and where the node is reached.
pub(crate) struct Identity<'a> {
    pub node: &'a SigningKey,
    pub nostr: NostrKey,
    pub wallet: &'a dyn Lightning,
    pub addresses: Vec<String>,
    pub region: Option<String>,
    /// Where its Lightning node takes channels.
    pub lightning_address: Option<String>,
}

/// What a listing says of an engine.
pub(crate) struct OnSale {
    pub model: String,
    pub root: [u8; 32],
    pub tokenizer: TokenizerHash,
    pub quantisation: String,
    pub part: Part,
    pub rates: RateCard,
    pub context: u32,
    pub slots: u32,
    pub speed: Option<satgrid_engine::port::Speed>,
    pub memory_bytes: u64,
    pub profile: Profile,
    pub build_id: [u8; 32],
    pub instruction_set: String,
    /// Of experts: what they are.
    pub experts_hash: Option<Digest>,
    /// Of a model that embeds: numbers in a row.
    pub embeds: Option<u32>,
}

impl OnSale {
    /// A whole model, whoever computes its layers.
    pub(crate) fn whole(facts: EngineFacts, name: &str, rates: RateCard, memory_bytes: u64) -> OnSale {
        OnSale {
            model: name.to_owned(),
            embeds: facts.model.pooling.map(|_| facts.model.n_embd),
            root: facts.model_root,
            tokenizer: TokenizerHash(facts.tokenizer_hash),
            quantisation: facts.model.quantisation,
            part: Part::Whole,
            rates,
            context: facts.context,
            slots: facts.slots,
            speed: facts.speed,
            memory_bytes,
            profile: facts.profile,
            build_id: facts.build_id,
            instruction_set: facts.instruction_set,
            experts_hash: None,
        }
    }

    /// The listing, with its two bindings. The publisher sets the expiry.
    pub(crate) fn listing(self, by: &Identity<'_>) -> Listing {
        let ours = node_key(by.node);
        // A wallet that signs no messages gives an empty one.
        let lightning = by.wallet.sign_message(lightning_binding_message(&ours).as_bytes());
        let lightning = (!lightning.is_empty()).then_some(lightning);
        let mut listing = Listing {
            version: Listing::VERSION,
            model: self.model,
            model_root: ModelRoot(self.root),
            tokenizer: self.tokenizer,
            quantisation: self.quantisation,
            part: self.part,
            rates: self.rates,
            context_length: self.context,
            slots: self.slots,
            speed: speed_of(self.speed.as_ref()),
            memory_bytes: self.memory_bytes,
            profiles: vec![profile(self.profile)],
            build: BuildId(self.build_id),
            instruction_set: self.instruction_set,
            addresses: by.addresses.clone(),
            region: by.region.clone(),
            node_key: ours,
            lightning_node: by.wallet.node_id(),
            expires_at: 0,
            lightning_address: by.lightning_address.clone(),
            lightning_unproven: lightning.is_none(),
            experts_hash: self.experts_hash,
            embeds: self.embeds,
            links: Vec::new(),
            bindings: Bindings::default(),
        };
        let node = sign_node_binding(by.node, &by.nostr, &listing.d());
        listing.bindings = Bindings { node: Some(node), lightning };
        listing
    }
}

pub(crate) fn profile(profile: Profile) -> EngineProfile {
    match profile {
        Profile::Exact => EngineProfile::Exact,
        Profile::Fast => EngineProfile::Fast,
    }
}

pub(super) fn speed_of(speed: Option<&satgrid_engine::port::Speed>) -> Speed {
    speed.map_or_else(Speed::default, |s| Speed {
        prefill_mtok_s: s.prefill_millitokens_per_s,
        decode_mtok_s: s.decode_millitokens_per_s,
    })
}

/// The tokenizers of everything that is for sale, served free to whoever connects.
pub(crate) struct TokenizersForSale(pub BTreeMap<Digest, Bytes>);

impl Artefacts for TokenizersForSale {
    fn artefact(&self, sha256: &Digest) -> Option<Bytes> {
        self.0.get(sha256).cloned()
    }
}
