//! A model split by experts, over real processes: the text is a solo run's to the bit, whoever dies or lies on the way.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use common::{ALL, Heard, Listener, job, kill, program, settings};
use satgrid_engine::experts::call::MAX_CALL_BYTES;
use satgrid_engine::experts::group::{ExpertGroup, GroupConfig, GroupEvent, Observer, Spare};
use satgrid_engine::experts::{ExpertCall, ExpertHost, ExpertRows, HostError, Manifest, map, pack, trunk};
use satgrid_engine::gguf::{Gguf, TensorType};
use satgrid_engine::port::{Engine, Job, Profile};
use satgrid_engine::root::ModelRoot;
use satgrid_engine::sampling::Sampling;
use satgrid_engine::tiny_moe::TinyMoe;
use satgrid_engine_llama::{EngineConfig, EngineSettings, LlamaEngine, LlamaExperts, PackSettings, SpawnError};
use satgrid_types::{ExpertSet, WireType};

/// A model on disk, whole and in parts: `packs`, and one with everything for the lead's own use.
struct Split {
    folder: tempfile::TempDir,
    manifest: Manifest,
    packs: Vec<PathBuf>,
}

impl Split {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn of(model: &TinyMoe, sets: &[ExpertSet]) -> Self {
        let bytes = model.to_bytes().unwrap();
        let gguf = Gguf::read(&mut Cursor::new(&bytes)).unwrap();
        let root = ModelRoot::compute(&gguf, &mut Cursor::new(&bytes), &mut |_| ()).unwrap();
        let manifest = Manifest::of_model(&gguf, &root).unwrap();
        let mut split = Self { folder: tempfile::tempdir().unwrap(), manifest, packs: Vec::new() };
        std::fs::write(split.path("whole"), &bytes).unwrap();
        let mut out = Vec::new();
        trunk::write(&gguf, &mut Cursor::new(&bytes), &split.manifest, &mut out, &mut |_| ()).unwrap();
        std::fs::write(split.path("trunk"), &out).unwrap();
        let everything = ExpertSet::new(split.manifest.all());
        for (number, set) in sets.iter().chain([&everything]).enumerate() {
            let (path, mut out) = (split.path(&format!("pack-{number}")), Vec::new());
            pack::write(&gguf, &mut Cursor::new(&bytes), &split.manifest, set, &mut out, &mut |_| ()).unwrap();
            std::fs::write(&path, &out).unwrap();
            split.packs.push(path);
        }
        split
    }

    fn settings(&self, name: &str, slots: u32) -> EngineSettings {
        EngineSettings { context: 3072, ..settings(&self.path(name), Profile::Exact, slots) }
    }

    async fn host(&self, pack: usize, only: Option<ExpertSet>) -> Arc<LlamaExperts> {
        let pack = self.packs[pack].clone();
        let settings = PackSettings { pack, only, profile: Profile::Exact, threads: 1, device: None };
        LlamaExperts::spawn(program(), settings, |_| {}).await.unwrap()
    }

    fn group(&self, witness_per_million: u32, spare: Option<Arc<dyn Spare>>) -> (Arc<ExpertGroup>, Arc<Told>) {
        self.group_on(WireType::F32, witness_per_million, spare)
    }

    fn group_on(
        &self,
        wire: WireType,
        witness_per_million: u32,
        spare: Option<Arc<dyn Spare>>,
    ) -> (Arc<ExpertGroup>, Arc<Told>) {
        let told = Arc::new(Told::default());
        let config = GroupConfig {
            manifest: self.manifest.clone(),
            layers: None,
            spare,
            observer: told.clone(),
            witness_per_million,
            seed: [7; 32],
            wire,
            call_bytes: MAX_CALL_BYTES,
        };
        (Arc::new(ExpertGroup::new(config)), told)
    }

    async fn lead(&self, group: Arc<ExpertGroup>, slots: u32) -> Listener {
        group.ready().unwrap();
        let config = EngineConfig { program: program(), settings: self.settings("trunk", slots) };
        let engine = LlamaEngine::spawn_trunk(config, group, |_| {}).await.unwrap();
        Listener { engine, heard: Default::default(), downs: Vec::new(), ups: 0 }
    }
}

#[derive(Default)]
struct Told(Mutex<Vec<GroupEvent>>);

impl Observer for Told {
    fn told(&self, event: GroupEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Told {
    fn all(&self) -> Vec<GroupEvent> {
        self.0.lock().unwrap().clone()
    }
}

/// Loads from the pack with everything.
struct FromDisk(Arc<Split>);

#[async_trait]
impl Spare for FromDisk {
    async fn load(&self, experts: ExpertSet) -> Result<Arc<dyn ExpertHost>, String> {
        let last = self.0.packs.len() - 1;
        Ok(self.0.host(last, Some(experts)).await)
    }
}

/// Turns one number of each answer for one expert.
struct Liar {
    honest: Arc<LlamaExperts>,
    expert: u32,
}

#[async_trait]
impl ExpertHost for Liar {
    async fn evaluate(&self, call: ExpertCall) -> Result<ExpertRows, HostError> {
        let lies: Vec<bool> = call.work.iter().map(|work| work.expert == self.expert).collect();
        let mut answer = self.honest.evaluate(call).await?;
        let width = answer.rows.len() / lies.len();
        for (row, _) in answer.rows.chunks_mut(width).zip(lies).filter(|(_, lies)| *lies) {
            row[0] += 0.001;
        }
        Ok(answer)
    }
}

/// Eight sessions: prompts of 1 to 2,000 tokens, half of them greedy.
fn jobs() -> Vec<Job> {
    let prompts = [1, 2, 17, 64, 300, 555, 900, 2000];
    let job = |(at, prompt): (usize, &u32)| {
        let id = u64::try_from(at).unwrap() + 1;
        let sampling = if at % 2 == 0 { Sampling::greedy() } else { Sampling::seeded(0.9, id) };
        Job { sampling, ..job(id, *prompt, 24) }
    };
    prompts.iter().enumerate().map(job).collect()
}

async fn outputs(engine: &mut Listener, jobs: &[Job]) -> Vec<Vec<u32>> {
    for job in jobs {
        engine.start_job(job, ALL, ALL);
    }
    engine.until(|l| jobs.iter().all(|job| l.heard.get(&job.id.0).is_some_and(Heard::is_over))).await;
    let over = jobs.iter().map(|job| &engine.heard[&job.id.0]);
    over.map(|heard| {
        assert_eq!(heard.error, None);
        heard.output.clone()
    })
    .collect()
}

async fn solo(split: &Split, jobs: &[Job]) -> Vec<Vec<u32>> {
    outputs(&mut Listener::start(split.settings("whole", 8)).await, jobs).await
}

#[tokio::test]
async fn eight_sessions_over_three_workers_are_as_solo() {
    let model = TinyMoe { kind: TensorType::Q8_0, ..TinyMoe::default() };
    let split = Split::of(&model, &map::deal(model.layers, model.experts, 3));
    let expect = solo(&split, &jobs()).await;
    let (group, told) = split.group(0, None);
    for pack in 0..3 {
        let host = split.host(pack, None).await;
        assert_eq!(host.facts().model_root, split.manifest.root);
        let claims = host.claims();
        group.admit(&format!("worker {pack}"), host, &claims, false).unwrap();
    }
    let mut lead = split.lead(group.clone(), 8).await;
    // To everybody else it is the whole model.
    let whole = Listener::start(split.settings("whole", 1)).await.engine.facts();
    let facts = lead.engine.facts();
    assert_eq!((facts.model_root, facts.tokenizer_hash), (whole.model_root, whole.tokenizer_hash));
    assert_eq!((facts.model, facts.build_id), (whole.model, whole.build_id));
    assert!(facts.speed.is_some());

    jobs().iter().for_each(|job| group.open_account(job.id));
    assert_eq!(outputs(&mut lead, &jobs()).await, expect);
    assert_eq!(told.all(), []);
    // Every row is its job's: each position but the last drawn one, and in the last layer what was drawn from.
    for (job, output) in jobs().iter().zip(&expect) {
        let rows = group.close_account(job.id).unwrap();
        let (prompt, drawn) = (job.prompt.len() as u64, output.len() as u64);
        assert_eq!((rows.chosen, rows.own.len()), (model.used, 0));
        assert_eq!((rows.layers[&0], rows.layers[&2]), (prompt + drawn - 1, drawn), "job {:?}", job.id);
    }
    // Conservation: at each layer the experts' rows are the layer's rows times the chosen experts; the last layer may
    // compute fewer rows, since only those that are drawn from go through it.
    let (routed, given) = (group.routed(), group.given());
    let sum = |layer: u32| routed.iter().filter(|((at, _), _)| *at == layer).map(|(_, rows)| rows).sum::<u64>();
    assert_eq!(sum(0), sum(1));
    assert!(sum(0) % u64::from(model.used) == 0 && sum(2) < sum(0), "{} {}", sum(0), sum(2));
    let given: u64 = given.values().flat_map(|rows| rows.values()).sum();
    assert_eq!(given, routed.values().sum::<u64>());
}

/// Three families in three kinds of weights, over one to four workers: eight sessions at once.
#[tokio::test]
async fn families_and_weights_over_one_to_four_workers_are_as_solo() {
    let kinds = [TensorType::F32, TensorType::Q8_0, TensorType::Q4_0];
    let all = ["qwen3moe", "olmoe", "granitemoe"].into_iter().flat_map(|family| kinds.map(|kind| (family, kind)));
    for ((architecture, kind), workers) in all.zip([1u32, 2, 3, 4].into_iter().cycle()) {
        let model = TinyMoe { architecture, kind, ..TinyMoe::default() };
        let split = Split::of(&model, &map::deal(model.layers, model.experts, workers));
        let expect = solo(&split, &jobs()).await;
        let (group, _) = split.group(0, None);
        for pack in 0..workers as usize {
            let host = split.host(pack, None).await;
            let claims = host.claims();
            group.admit(&format!("worker {pack}"), host, &claims, false).unwrap();
        }
        let mut lead = split.lead(group, 8).await;
        assert_eq!(outputs(&mut lead, &jobs()).await, expect, "{architecture} {} over {workers}", kind.name);
    }
}

/// Rows of a shorter type change what the model says, but not by who evaluates them; most of the first tokens are still the
/// whole model's.
#[tokio::test]
async fn shorter_rows_give_one_text_however_the_experts_are_dealt() {
    let model = TinyMoe::default();
    let few = &jobs()[..4];
    let mut by_wire = Vec::new();
    for wire in [WireType::Bf16, WireType::Q8_0] {
        let mut texts = Vec::new();
        for workers in [1u32, 3] {
            let split = Split::of(&model, &map::deal(model.layers, model.experts, workers));
            let (group, _) = split.group_on(wire, 0, None);
            for pack in 0..workers as usize {
                let host = split.host(pack, None).await;
                let claims = host.claims();
                group.admit(&format!("worker {pack}"), host, &claims, false).unwrap();
            }
            texts.push(outputs(&mut split.lead(group, 8).await, few).await);
        }
        assert_eq!(texts[0], texts[1], "{}", wire.name());
        by_wire.push(texts.remove(0));
    }
    let exact = solo(&Split::of(&model, &[]), few).await;
    let first = |texts: &[Vec<u32>]| texts.iter().zip(&exact).filter(|(a, b)| a.first() == b.first()).count();
    assert!(by_wire.iter().all(|texts| first(texts) >= 3), "{by_wire:?}\n{exact:?}");
}

#[tokio::test]
async fn a_worker_that_dies_is_replaced_by_a_replica_and_then_by_the_lead() {
    let model = TinyMoe { architecture: "olmoe", kind: TensorType::Q4_0, ..TinyMoe::default() };
    let split = Arc::new(Split::of(&model, &map::deal(model.layers, model.experts, 2)));
    let long = Job { max_output: 200, ..job(1, 100, 200) };
    let expect = solo(&split, std::slice::from_ref(&long)).await;
    let (group, told) = split.group(0, Some(Arc::new(FromDisk(split.clone()))));
    let mut hosts = Vec::new();
    // The first pack has a replica.
    for (name, pack) in [("first", 0), ("replica", 0), ("second", 1)] {
        let host = split.host(pack, None).await;
        let claims = host.claims();
        group.admit(name, host.clone(), &claims, false).unwrap();
        hosts.push(host);
    }
    let mut lead = split.lead(group.clone(), 1).await;
    lead.start_job(&long, ALL, ALL);
    for (victim, tokens) in [(0, 40), (2, 80), (1, 120)] {
        lead.until(|l| l.heard.get(&1).is_some_and(|heard| heard.output.len() >= tokens)).await;
        kill(hosts[victim].process_id().unwrap());
    }
    let heard = lead.end_of(1).await;
    assert_eq!((heard.error, heard.output), (None, expect[0].clone()));
    let told = told.all();
    for host in ["first", "second", "replica"] {
        let out = told.iter().any(|event| matches!(event, GroupEvent::Out { host: named, .. } if named == host));
        assert!(out, "{host}: {told:?}");
    }
    assert!(told.iter().any(|event| matches!(event, GroupEvent::Loaded { .. })), "{told:?}");
    // The lead's own process was never down.
    assert_eq!(lead.downs.len(), 0);
}

#[tokio::test]
async fn a_liar_is_named_by_a_witness_and_nothing_of_it_is_used() {
    let model = TinyMoe { architecture: "qwen2moe", ..TinyMoe::default() };
    let split = Arc::new(Split::of(&model, &[]));
    let jobs = jobs();
    let expect = solo(&split, &jobs[..4]).await;
    // Every row is witnessed, so no lie passes; the third holder decides.
    let (group, told) = split.group(1_000_000, None);
    let liar = Arc::new(Liar { honest: split.host(0, None).await, expert: 3 });
    let claims = liar.honest.claims();
    group.admit("liar", liar, &claims, false).unwrap();
    for name in ["honest", "judge"] {
        group.admit(name, split.host(0, None).await, &claims, false).unwrap();
    }
    let mut lead = split.lead(group, 8).await;
    assert_eq!(outputs(&mut lead, &jobs[..4]).await, expect);
    let told = told.all();
    assert!(matches!(&told[0], GroupEvent::Lied { host, expert: 3, .. } if host == "liar"), "{told:?}");
    assert!(matches!(&told[1], GroupEvent::Out { host, .. } if host == "liar"), "{told:?}");
    assert_eq!(told.len(), 2, "{told:?}");
}

#[tokio::test]
async fn what_does_not_fit_together_is_refused_in_words() {
    let model = TinyMoe { layers: 2, ..TinyMoe::default() };
    let split = Split::of(&model, &map::deal(2, model.experts, 2));
    let other = Split::of(&TinyMoe { seed: 2, ..model.clone() }, &map::deal(2, model.experts, 2));
    let host = split.host(0, None).await;
    let stranger = other.host(1, None).await;

    // An owner is missing, and a pack is of another model.
    let (group, _) = split.group(0, None);
    group.admit("first", host.clone(), &host.claims(), false).unwrap();
    let error = group.ready().unwrap_err().to_string();
    assert_eq!(error, "nobody holds layer 0: 1, 3, 5, 7; layer 1: 0, 2, 4, 6");
    let error = group.admit("stranger", stranger.clone(), &stranger.claims(), false).unwrap_err().to_string();
    assert_eq!(error, "stranger holds other weights than the model's as expert 1 of layer 0");

    // Calls that the process itself refuses.
    let call = |layer, expert, row| ExpertCall {
        step: 0,
        layer,
        rows: vec![0.5; 64],
        work: vec![satgrid_engine::experts::call::Work { row, expert }],
        jobs: Vec::new(),
    };
    for (call, expect) in [
        (call(0, 1, 0), "expert 1 of layer 0 is not held"),
        (call(9, 0, 0), "expert 0 of layer 9 is not held"),
        (call(0, 99, 0), "expert 99"),
        (call(0, 0, 1), "row 1, but there are only 1"),
        (ExpertCall { rows: vec![0.5; 63], ..call(0, 0, 0) }, "not whole rows of 64"),
        (ExpertCall { rows: vec![f32::NAN; 64], ..call(0, 0, 0) }, "not finite"),
        (ExpertCall { rows: vec![0.5; 64 * 600], ..call(0, 0, 0) }, "at most 512"),
    ] {
        let error = host.evaluate(call).await.unwrap_err().to_string();
        assert!(error.contains(expect), "{error:?} has no {expect:?}");
    }
    assert_eq!(host.evaluate(call(0, 0, 0)).await.unwrap().rows.len(), 64, "it serves on");

    // A trunk is no model of its own, a model no trunk.
    let failed = |result: Result<Arc<LlamaEngine>, SpawnError>| result.map(|_| ()).unwrap_err().to_string();
    let error = failed(common::spawn(split.settings("trunk", 1)).await);
    assert!(error.contains("a part of a split model"), "{error}");
    let config = EngineConfig { program: program(), settings: split.settings("whole", 1) };
    let (group, _) = split.group(0, None);
    let error = failed(LlamaEngine::spawn_trunk(config, group, |_| {}).await);
    assert!(error.contains("a whole model"), "{error}");
}
