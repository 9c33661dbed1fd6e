//! Whole against staged, on real child processes: every architecture of the allow-list gives the same tokens when it is cut.
//!
//! Streams are sampled at temperature 1 from logits that are compared to the last bit by the draw: one bit that differs early
//! gives another text soon after.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{ALL, Heard, job, kill, program, settings};
use satgrid_engine::conformance::conformance;
use satgrid_engine::experts::call::MAX_CALL_BYTES;
use satgrid_engine::experts::group::{ExpertGroup, GroupConfig, GroupEvent, Observer};
use satgrid_engine::experts::{Experts, Manifest, map, pack};
use satgrid_engine::gguf::{Gguf, TensorType};
use satgrid_engine::port::{Command, Engine, EngineEvent, FinishReason, Job, JobId, Profile};
use satgrid_engine::root::ModelRoot;
use satgrid_engine::stage::port::Stage;
use satgrid_engine::stage::ring::Ring;
use satgrid_engine::tiny::TinyModel;
use satgrid_engine::tiny_moe::TinyMoe;
use satgrid_engine::tiny_shapes::{Family, TinyShape};
use satgrid_engine_llama::{
    EngineSettings, LeadConfig, LeadSettings, LlamaExperts, LlamaLead, LlamaStage, LlamaTokenizer, LocalRing,
    PackSettings, SpawnError, StageConfig, StageSettings, TokenizerConfig, split_model, split_stage_trunk,
};
use satgrid_types::{ExpertSet, LayerRange, WireType, WorkKind};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(300);

fn range(start: u32, end: u32) -> LayerRange {
    LayerRange::new(start, end).unwrap()
}

/// A model in parts: the cuts are where one part ends and the next begins.
struct Parts {
    folder: tempfile::TempDir,
    whole: PathBuf,
    cuts: Vec<u32>,
    layers: u32,
}

impl Parts {
    fn of(bytes: &[u8], layers: u32, cuts: &[u32]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole.gguf");
        std::fs::write(&whole, bytes).unwrap();
        Self::at(folder, whole, layers, cuts)
    }

    fn at(folder: tempfile::TempDir, whole: PathBuf, layers: u32, cuts: &[u32]) -> Self {
        let parts = Self { folder, whole, cuts: cuts.to_vec(), layers };
        for part in parts.ranges() {
            let report = split_model(&parts.whole, part, &parts.path(part), &mut |_| ()).unwrap();
            assert_eq!((report.range, report.layers), (part, layers));
        }
        parts
    }

    fn ranges(&self) -> Vec<LayerRange> {
        let ends = self.cuts.iter().copied().chain([self.layers]);
        let starts = [0].into_iter().chain(self.cuts.iter().copied());
        starts.zip(ends).map(|(start, end)| range(start, end)).collect()
    }

    fn path(&self, part: LayerRange) -> PathBuf {
        self.folder.path().join(format!("{part}.gguf"))
    }

    fn stage_settings(&self, part: LayerRange, base: &EngineSettings) -> StageSettings {
        let (threads, sequences, context) = (base.threads, base.slots, base.context);
        let offload = base.offload.clone();
        StageSettings {
            part: self.path(part),
            profile: base.profile,
            threads,
            sequences,
            context,
            offload,
            memory_mib: None,
        }
    }

    /// The middle stages, a ring over them, and the lead.
    async fn lead(&self, base: &EngineSettings, wire: WireType) -> Split {
        self.lead_that_asks(base, wire, None).await.unwrap()
    }

    /// The same, with a small model that guesses.
    async fn lead_that_asks(
        &self,
        base: &EngineSettings,
        wire: WireType,
        draft: Option<PathBuf>,
    ) -> Result<Split, SpawnError> {
        let ranges = self.ranges();
        let mut stages = Vec::new();
        for part in &ranges[1..ranges.len() - 1] {
            stages.push(stage(self.stage_settings(*part, base)).await.unwrap());
        }
        let ports = stages.iter().map(|stage| Arc::clone(stage) as Arc<dyn Stage>).collect();
        let ring = LocalRing::new(ports, wire);
        let lead = self.lead_of(base, Arc::clone(&ring) as Arc<dyn Ring>, draft).await?;
        Ok(Split { stages, ring, lead })
    }

    /// The same with stages that hold no experts: each leads a group of its own.
    async fn lead_of_trunks(&self, base: &EngineSettings) -> (Split, Vec<Group>) {
        let ranges = self.ranges();
        let (mut stages, mut groups) = (Vec::new(), Vec::new());
        for part in &ranges[1..ranges.len() - 1] {
            let path = self.folder.path().join(format!("{part}.trunk.gguf"));
            split_stage_trunk(&self.whole, *part, &path, &mut |_| ()).unwrap();
            let held = std::fs::metadata(self.path(*part)).unwrap().len();
            assert!(std::fs::metadata(&path).unwrap().len() < held, "the trunk is smaller than the layers");
            let settings = StageSettings { part: path, ..self.stage_settings(*part, base) };
            let group = Group::over(&self.whole, *part).await;
            let config = StageConfig { program: program(), settings };
            let experts = Arc::clone(&group.group) as Arc<dyn Experts>;
            stages.push(timeout(PATIENCE, LlamaStage::spawn_trunk(config, experts, |_| {})).await.unwrap().unwrap());
            groups.push(group);
        }
        let ports = stages.iter().map(|stage| Arc::clone(stage) as Arc<dyn Stage>).collect();
        let ring = LocalRing::new(ports, WireType::F32);
        let lead = self.lead_over(base, Arc::clone(&ring) as Arc<dyn Ring>).await.unwrap();
        (Split { stages, ring, lead }, groups)
    }

    async fn lead_over(&self, base: &EngineSettings, ring: Arc<dyn Ring>) -> Result<Arc<LlamaLead>, SpawnError> {
        self.lead_of(base, ring, None).await
    }

    async fn lead_of(
        &self,
        base: &EngineSettings,
        ring: Arc<dyn Ring>,
        draft: Option<PathBuf>,
    ) -> Result<Arc<LlamaLead>, SpawnError> {
        let ranges = self.ranges();
        let tail = EngineSettings { model: self.path(*ranges.last().unwrap()), ..base.clone() };
        let settings = LeadSettings { head: self.path(ranges[0]), tail, ring: ring.facts(), guess: true, draft };
        timeout(PATIENCE, LlamaLead::spawn(LeadConfig { program: program(), settings }, ring, |_| {})).await.unwrap()
    }
}

/// The experts of some layers of a model, in two processes that hold all of them each.
struct Group {
    _folder: tempfile::TempDir,
    group: Arc<ExpertGroup>,
    hosts: Vec<Arc<LlamaExperts>>,
}

struct Silent;

impl Observer for Silent {
    fn told(&self, _event: GroupEvent) {}
}

impl Group {
    async fn over(whole: &Path, layers: LayerRange) -> Self {
        let mut file = std::fs::File::open(whole).unwrap();
        let gguf = Gguf::read(&mut file).unwrap();
        let root = ModelRoot::compute(&gguf, &mut file, &mut |_| ()).unwrap();
        let manifest = Manifest::of_model(&gguf, &root).unwrap();
        let (folder, mut out) = (tempfile::tempdir().unwrap(), Vec::new());
        let set = ExpertSet::new(manifest.of_layers(Some(layers)));
        pack::write(&gguf, &mut file, &manifest, &set, &mut out, &mut |_| ()).unwrap();
        let pack = folder.path().join("pack");
        std::fs::write(&pack, out).unwrap();
        let group = Arc::new(ExpertGroup::new(GroupConfig {
            manifest,
            layers: Some(layers),
            spare: None,
            observer: Arc::new(Silent),
            witness_per_million: 0,
            seed: [7; 32],
            wire: WireType::F32,
            call_bytes: MAX_CALL_BYTES,
        }));
        assert!(group.ready().is_err(), "nobody holds anything yet");
        let mut hosts = Vec::new();
        for name in ["a", "b"] {
            let only = None;
            let settings = PackSettings { pack: pack.clone(), only, profile: Profile::Exact, threads: 1, device: None };
            let host = LlamaExperts::spawn(program(), settings, |_| {}).await.unwrap();
            group.admit(name, host.clone(), &map::claims(group.manifest(), &set), false).unwrap();
            hosts.push(host);
        }
        // Experts of other layers are none of its business.
        group.ready().unwrap();
        Self { _folder: folder, group, hosts }
    }
}

struct Split {
    stages: Vec<Arc<LlamaStage>>,
    ring: Arc<LocalRing>,
    lead: Arc<LlamaLead>,
}

async fn stage(settings: StageSettings) -> Result<Arc<LlamaStage>, SpawnError> {
    timeout(PATIENCE, LlamaStage::spawn(StageConfig { program: program(), settings }, |_| {})).await.unwrap()
}

/// Starts all jobs with everything granted; their ends, in the order of the jobs.
async fn run(engine: &dyn Engine, jobs: &[Job]) -> Vec<Heard> {
    for job in jobs {
        engine.send(Command::Start(job.clone())).unwrap();
        engine.send(Command::Grant { job: job.id, prompt_upto: ALL, output_upto: ALL }).unwrap();
    }
    let mut heard: Vec<Heard> = vec![Heard::default(); jobs.len()];
    while !heard.iter().all(Heard::is_over) {
        let event = timeout(PATIENCE, engine.next_event()).await.expect("no hang").unwrap();
        let Some(at) = event.job().and_then(|id| jobs.iter().position(|job| job.id == id)) else {
            panic!("out of turn: {event:?}")
        };
        match event {
            EngineEvent::Prefilled { upto, cached, .. } => (heard[at].upto, heard[at].cached) = (upto, cached),
            EngineEvent::Tokens { ids, .. } => heard[at].output.extend(ids),
            EngineEvent::Finished { reason, evaluated, .. } => heard[at].end = Some((reason, evaluated)),
            EngineEvent::Failed { error, .. } => heard[at].error = Some(error),
            EngineEvent::Logprobs { .. }
            | EngineEvent::Embedded { .. }
            | EngineEvent::Down { .. }
            | EngineEvent::Up => {}
        }
    }
    heard
}

/// Prompts of 1 to 600 tokens, all at once, then the last one's session again from its cache and cut back.
async fn streams(engine: &dyn Engine) -> Vec<Heard> {
    let mut jobs: Vec<Job> =
        [1, 2, 63, 64, 65, 130, 257, 600].iter().zip(1..).map(|(prompt, id)| job(id, *prompt, 40)).collect();
    let mut heard = run(engine, &jobs).await;
    let last = jobs.pop().unwrap();
    let again = Job { id: JobId(100), ..last.clone() };
    heard.extend(run(engine, std::slice::from_ref(&again)).await);
    let mut detour = Job { id: JobId(101), ..last };
    detour.prompt.truncate(400);
    detour.prompt.extend([7, 8, 9]);
    heard.extend(run(engine, std::slice::from_ref(&detour)).await);
    heard
}

fn kind(id: u32) -> TensorType {
    TensorType::from_id(id).unwrap()
}

/// F32, Q8_0 and Q4_0 (by ggml's numbers); one to four parts besides the lead's head; past Gemma's window of 48.
#[tokio::test]
async fn every_architecture_gives_the_same_streams_whole_and_in_stages() {
    let rows: [(Family, u32, &[u32]); 7] = [
        (Family::Llama, 0, &[1, 3, 5]),
        (Family::Llama, 8, &[2, 4]),
        (Family::Llama, 2, &[1, 2, 3, 4, 5]),
        (Family::Qwen2, 8, &[3]),
        (Family::Qwen3, 2, &[1, 5]),
        (Family::Qwen3Moe, 8, &[2, 3, 4]),
        (Family::Gemma3, 0, &[1, 5, 6]),
    ];
    for (family, id, cuts) in rows {
        let layers = if family == Family::Gemma3 { 8 } else { 6 };
        let shape = TinyShape { family, seed: 7, kind: kind(id), layers, context: 1024 };
        let parts = Parts::of(&shape.to_bytes().unwrap(), layers, cuts);
        let base = settings(&parts.whole, Profile::Exact, 8);
        let whole = common::spawn(base.clone()).await.unwrap();
        let expect = streams(whole.as_ref()).await;
        assert!(expect.iter().all(|heard| heard.error.is_none() && heard.output.len() == 40), "{expect:?}");
        assert_eq!((expect[8].cached, expect[9].cached), (599, 400));
        let split = parts.lead(&base, WireType::F32).await;
        let (facts, solo) = (split.lead.facts(), whole.facts());
        assert_eq!((facts.model_root, facts.model, facts.build_id), (solo.model_root, solo.model, solo.build_id));
        assert_eq!(streams(split.lead.as_ref()).await, expect, "{family:?} of type {id} cut at {cuts:?}");
        // Every stage computed what the lead's customer pays for, and nothing twice.
        let evaluated: u64 = expect.iter().map(|heard| u64::from(heard.end.unwrap().1)).sum();
        for counts in split.ring.counts() {
            assert_eq!(counts.positions.values().sum::<u64>(), evaluated);
            assert_eq!(counts.positions.get(&WorkKind::Replay), None);
            assert!(counts.busy_us > 0);
        }
    }
}

/// Every admitted mixture of experts: whole, in stages that hold their experts, and in stages that find them elsewhere. Prompts
/// and sessions as above; every row through an expert is some job's.
#[tokio::test]
async fn stages_that_lead_experts_give_the_same_streams() {
    let rows: [(&str, u32, &[u32]); 4] =
        [("qwen3moe", 0, &[1, 3]), ("llama", 8, &[1, 2, 4]), ("olmoe", 2, &[2, 4]), ("qwen2moe", 8, &[1, 4])];
    for (architecture, id, cuts) in rows {
        let model = TinyMoe { architecture, seed: 7, kind: kind(id), layers: 5, context: 1024, ..TinyMoe::default() };
        let parts = Parts::of(&model.to_bytes().unwrap(), 5, cuts);
        let base = settings(&parts.whole, Profile::Exact, 8);
        let expect = streams(common::spawn(base.clone()).await.unwrap().as_ref()).await;
        assert!(expect.iter().all(|heard| heard.error.is_none() && heard.output.len() == 40), "{expect:?}");
        let split = parts.lead(&base, WireType::F32).await;
        assert_eq!(streams(split.lead.as_ref()).await, expect, "{architecture} of type {id} cut at {cuts:?}");
        drop(split);

        let (split, groups) = parts.lead_of_trunks(&base).await;
        let jobs: Vec<JobId> = (1..9).chain([100, 101]).map(JobId).collect();
        groups.iter().for_each(|group| jobs.iter().for_each(|job| group.group.open_account(*job)));
        assert_eq!(streams(split.lead.as_ref()).await, expect, "{architecture}, trunks cut at {cuts:?}");
        for ((group, part), counts) in groups.iter().zip(&parts.ranges()[1..]).zip(split.ring.counts()) {
            let mut sum = 0;
            for (job, heard) in jobs.iter().zip(&expect) {
                let account = group.group.close_account(*job).unwrap();
                let rows = account.layers.get(&part.start()).copied().unwrap_or(0);
                let each: Vec<(u32, u64)> = (part.start()..part.end()).map(|layer| (layer, rows)).collect();
                assert_eq!((account.chosen, account.layers.into_iter().collect()), (model.used, each), "{job:?}");
                // What its customer pays for, and guesses that were wrong.
                assert!(rows >= u64::from(heard.end.unwrap().1), "{job:?}: {rows} rows");
                sum += rows;
            }
            assert_eq!(sum, counts.positions.values().sum::<u64>(), "layers {part}");
        }
    }
}

#[tokio::test]
async fn an_expert_worker_that_dies_under_a_stage_changes_no_text_and_the_last_one_is_the_stage_s_failure() {
    let model = TinyMoe { layers: 4, context: 1024, ..TinyMoe::default() };
    let parts = Parts::of(&model.to_bytes().unwrap(), 4, &[1, 3]);
    let base = settings(&parts.whole, Profile::Exact, 2);
    let jobs = [job(1, 200, 120), job(2, 20, 120)];
    let expect = run(common::spawn(base.clone()).await.unwrap().as_ref(), &jobs).await;
    let (split, groups) = parts.lead_of_trunks(&base).await;
    let hosts = &groups[0].hosts;
    let strike = async {
        while groups[0].group.routed().is_empty() {
            tokio::task::yield_now().await;
        }
        kill(hosts[0].process_id().unwrap());
    };
    let (heard, ()) = tokio::join!(run(split.lead.as_ref(), &jobs), strike);
    assert_eq!(heard, expect);
    assert_eq!(groups[0].group.hosts().len(), 1);
    kill(hosts[1].process_id().unwrap());
    let heard = run(split.lead.as_ref(), &[job(3, 20, 10)]).await;
    let error = heard[0].error.as_ref().unwrap().to_string();
    assert!(error.contains("experts' rows are missing"), "{error}");
    // The stage itself is well.
    assert!(split.stages[0].is_up());
}

#[tokio::test]
async fn one_session_of_the_fast_profile_is_the_same_too() {
    let shape = TinyShape { family: Family::Gemma3, seed: 9, kind: kind(8), layers: 6, context: 1024 };
    let parts = Parts::of(&shape.to_bytes().unwrap(), 6, &[1, 3, 5]);
    let base = settings(&parts.whole, Profile::Fast, 1);
    let jobs = [job(1, 700, 60)];
    let expect = run(common::spawn(base.clone()).await.unwrap().as_ref(), &jobs).await;
    let split = parts.lead(&base, WireType::F32).await;
    assert_eq!(run(split.lead.as_ref(), &jobs).await, expect);
}

/// A small model that says what the large one says, and one that knows nothing of it: guesses change when tokens come, never
/// which; those that are right are verified many at once, and those that are wrong stay within their bound.
#[tokio::test]
async fn a_model_that_guesses_changes_no_text() {
    let bytes = |seed| TinyModel { layers: 4, context: 1024, seed, ..TinyModel::default() }.to_bytes().unwrap();
    let parts = Parts::of(&bytes(7), 4, &[1, 3]);
    let base = settings(&parts.whole, Profile::Exact, 8);
    let expect = streams(common::spawn(base.clone()).await.unwrap().as_ref()).await;
    let needed: u64 = expect.iter().map(|heard| u64::from(heard.end.unwrap().1)).sum();
    let said: u64 = expect.iter().map(|heard| heard.output.len() as u64).sum();
    let other = parts.folder.path().join("other.gguf");
    std::fs::write(&other, bytes(8)).unwrap();
    for (draft, knows) in [(&parts.whole, true), (&other, false)] {
        let split = parts.lead_that_asks(&base, WireType::F32, Some(draft.clone())).await.unwrap();
        assert_eq!(streams(split.lead.as_ref()).await, expect, "{}", draft.display());
        for counts in split.ring.counts() {
            let drafts = counts.positions.get(&WorkKind::Draft).copied().unwrap_or(0);
            let wasted = counts.positions.values().sum::<u64>() - needed;
            match knows {
                true => assert!(drafts * 2 > said && wasted * 5 < drafts, "{drafts} of {said}, {wasted} wasted"),
                // Twice 16 for each job and for each of the two that guess for it, and one for each token.
                false => assert!(drafts > 0 && wasted < said + 10 * 64, "{drafts} of {said}, {wasted} wasted"),
            }
        }
    }
    let strange = TinyShape { family: Family::Llama, seed: 1, kind: kind(0), layers: 4, context: 256 };
    std::fs::write(&other, strange.to_bytes().unwrap()).unwrap();
    let refused = parts.lead_that_asks(&base, WireType::F32, Some(other)).await.map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("cannot guess for this model"), "{refused}");
}

#[tokio::test]
async fn a_lead_passes_the_suite_of_every_engine() {
    let model = TinyModel { layers: 4, ..TinyModel::default() };
    let parts = Parts::of(&model.to_bytes().unwrap(), 4, &[1, 2, 3]);
    let idle = Duration::from_secs(600);
    let config = TokenizerConfig { program: program(), artefact: parts.whole.clone(), idle };
    let tokenizer = LlamaTokenizer::spawn(config).await.unwrap();
    let split = parts.lead(&settings(&parts.whole, Profile::Exact, 4), WireType::F32).await;
    timeout(PATIENCE, conformance(split.lead.as_ref(), tokenizer.as_ref())).await.expect("no hang");
}

#[tokio::test]
async fn a_killed_stage_and_a_killed_lead_change_no_text() {
    let model = TinyModel { layers: 5, kind: kind(8), ..TinyModel::default() };
    let parts = Parts::of(&model.to_bytes().unwrap(), 5, &[1, 2, 4]);
    let base = settings(&parts.whole, Profile::Exact, 3);
    let jobs = [job(1, 300, 200), job(2, 20, 200)];
    let expect = run(common::spawn(base.clone()).await.unwrap().as_ref(), &jobs).await;
    let split = parts.lead(&base, WireType::F32).await;
    for job in &jobs {
        split.lead.send(Command::Start(job.clone())).unwrap();
        split.lead.send(Command::Grant { job: job.id, prompt_upto: ALL, output_upto: ALL }).unwrap();
    }
    // Each stage dies once while both streams run; the lead's customer sees a pause.
    let (mut outputs, mut ends, mut kills) = ([Vec::new(), Vec::new()], 0, 0);
    while ends < 2 {
        match timeout(PATIENCE, split.lead.next_event()).await.expect("no hang").unwrap() {
            EngineEvent::Tokens { job, ids, .. } => outputs[usize::from(job == JobId(2))].extend(ids),
            EngineEvent::Finished { reason, .. } => {
                assert_eq!(reason, FinishReason::Length);
                ends += 1;
            }
            EngineEvent::Prefilled { .. } | EngineEvent::Logprobs { .. } | EngineEvent::Embedded { .. } => {}
            other @ (EngineEvent::Failed { .. } | EngineEvent::Down { .. } | EngineEvent::Up) => panic!("{other:?}"),
        }
        if kills < split.stages.len() && outputs[0].len() > 40 * (kills + 1) {
            kill(split.stages[kills].process_id().unwrap());
            kills += 1;
        }
    }
    assert_eq!(kills, 2);
    assert_eq!([&outputs[0], &outputs[1]], [&expect[0].output, &expect[1].output]);
    let replayed = |at: usize| split.ring.counts()[at].positions.get(&WorkKind::Replay).copied().unwrap_or(0);
    // The first stage works for its own replacement's sake and for that of the second.
    assert!(replayed(0) > replayed(1) && replayed(1) > 300, "{:?}", split.ring.counts());

    // The lead's own process: its jobs are gone, as with any engine, and what follows is right.
    kill(split.lead.process_id().unwrap());
    let down = timeout(PATIENCE, split.lead.next_event()).await.unwrap();
    assert!(matches!(down, Some(EngineEvent::Down { .. })), "{down:?}");
    let up = timeout(PATIENCE, split.lead.next_event()).await.unwrap();
    assert_eq!(up, Some(EngineEvent::Up));
    assert_eq!(run(split.lead.as_ref(), &jobs).await[1].output, expect[1].output);
}

#[tokio::test]
async fn other_wire_types_run_and_are_half_and_a_quarter() {
    let shape = TinyShape { family: Family::Llama, seed: 3, kind: kind(8), layers: 4, context: 256 };
    let parts = Parts::of(&shape.to_bytes().unwrap(), 4, &[1, 3]);
    let base = settings(&parts.whole, Profile::Exact, 1);
    let base = EngineSettings { context: 256, ..base };
    for wire in [WireType::Bf16, WireType::Q8_0] {
        let split = parts.lead(&base, wire).await;
        let heard = run(split.lead.as_ref(), &[job(1, 50, 30)]).await;
        assert_eq!((heard[0].output.len(), &heard[0].error), (30, &None));
    }
}

#[tokio::test]
async fn parts_that_do_not_fit_are_refused_in_words() {
    let bytes =
        |seed| TinyShape { family: Family::Llama, seed, kind: kind(0), layers: 4, context: 256 }.to_bytes().unwrap();
    let parts = Parts::of(&bytes(1), 4, &[1, 2, 3]);
    let base = EngineSettings { context: 256, ..settings(&parts.whole, Profile::Exact, 1) };
    let refused = |result: Result<Arc<LlamaStage>, SpawnError>, expect: &str| {
        let error = result.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    let with = |path: &Path| StageSettings { part: path.to_path_buf(), ..parts.stage_settings(range(1, 2), &base) };
    refused(stage(with(&parts.whole)).await, "not a part of a model");
    refused(stage(with(&parts.path(range(3, 4)))).await, "the last layer is its lead's");
    let mut spoilt = std::fs::read(parts.path(range(1, 2))).unwrap();
    *spoilt.last_mut().unwrap() ^= 1;
    let path = parts.folder.path().join("spoilt.gguf");
    std::fs::write(&path, spoilt).unwrap();
    refused(stage(with(&path)).await, "its hash differs");
    refused(stage(StageSettings { sequences: 0, ..with(&parts.path(range(1, 2))) }).await, "0 sequences");
    // What it may take is checked before anything is loaded, and listed.
    let capped = |mib| StageSettings { memory_mib: Some(mib), ..with(&parts.path(range(1, 2))) };
    refused(stage(capped(1)).await, "memory_mib allows 1 MiB");
    let (small, free) = (stage(capped(64)).await.unwrap(), stage(with(&parts.path(range(1, 2)))).await.unwrap());
    assert_eq!(small.facts().memory_bytes, 64 << 20);
    assert!(free.facts().memory_bytes > 64 << 20, "{} bytes are free here", free.facts().memory_bytes);
    assert_eq!(small.facts().quantisation, "F32");

    // A dense model has no experts to leave out.
    let error = split_stage_trunk(&parts.whole, range(1, 2), &path, &mut |_| ()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("has no experts"), "{error}");

    // A layer that nobody runs, and one that two run.
    for cut in [range(1, 2), range(1, 3)] {
        let path = parts.folder.path().join("other.gguf");
        split_model(&parts.whole, cut, &path, &mut |_| ()).unwrap();
        let stage = stage(with(&path)).await.unwrap();
        let mut twice: Vec<Arc<dyn Stage>> = vec![stage];
        if cut.end() == 3 {
            twice.push(self::stage(with(&parts.path(range(2, 3)))).await.unwrap());
        }
        let error = parts.lead_over(&base, LocalRing::new(twice, WireType::F32)).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("exactly once"), "{error}");
    }
    // The ends of two models.
    let other = Parts::of(&bytes(2), 4, &[1, 2, 3]);
    std::fs::copy(other.path(range(0, 1)), parts.path(range(0, 1))).unwrap();
    let error = parts.lead_over(&base, LocalRing::new(Vec::new(), WireType::F32)).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("different models"), "{error}");
}

/// The real model, where it is cached: 5, 8 and 5 layers, a prompt past its window of 512.
#[tokio::test]
async fn gemma_gives_the_same_text_in_three_parts() {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let models = std::fs::read_dir(cache.unwrap().join("satgrid/models")).into_iter().flatten().flatten();
    let gemma = models.map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        name.contains("gemma") && name.ends_with(".gguf")
    });
    let Some(gemma) = gemma else {
        eprintln!("no Gemma in the cache: not tried");
        return;
    };
    let parts = Parts::at(tempfile::tempdir().unwrap(), gemma, 18, &[5, 13]);
    let base = EngineSettings { threads: 2, ..settings(&parts.whole, Profile::Exact, 2) };
    let jobs = [job(1, 560, 12), job(2, 9, 24)];
    let whole = common::spawn(base.clone()).await.unwrap();
    let expect = run(whole.as_ref(), &jobs).await;
    assert_eq!(expect[0].output.len(), 12);
    let split = parts.lead(&base, WireType::F32).await;
    assert_eq!(split.lead.facts().tokenizer_hash, whole.facts().tokenizer_hash);
    assert_eq!(run(split.lead.as_ref(), &jobs).await, expect);
}
