//! The test that admits an architecture: a whole model against its trunk and packs, every logit compared to the bit.

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::Arc;

use satgrid_engine::experts::family::FAMILIES;
use satgrid_engine::experts::manifest::Manifest;
use satgrid_engine::experts::map::{ExpertMap, HostId, claims};
use satgrid_engine::experts::step::InFlight;
use satgrid_engine::experts::{ExpertStep, pack, trunk};
use satgrid_engine::gguf::TensorType;
use satgrid_engine::root::ModelRoot;
use satgrid_engine::tiny_moe::TinyMoe;
use satgrid_types::ExpertSet;

use super::*;
use crate::backend::LlamaBackend;
use crate::ffi::{BatchRow, ExpertHook, Model, ModelConfig};
use crate::scheduler::{Backend, Computes, Shape};

const SLOTS: u32 = 8;
const PROMPT: u32 = 45;

/// A model on disk, whole and in parts.
struct Split {
    folder: tempfile::TempDir,
    manifest: Manifest,
    sets: Vec<ExpertSet>,
}

impl Split {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Experts are dealt over `parts` packs, differently in each layer.
    fn of(model: &TinyMoe, parts: u32) -> Self {
        let bytes = model.to_bytes().unwrap();
        let gguf = Gguf::read(&mut Cursor::new(&bytes)).unwrap();
        let root = ModelRoot::compute(&gguf, &mut Cursor::new(&bytes), &mut |_| ()).unwrap();
        let manifest = Manifest::of_model(&gguf, &root).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let dealt = |part: u32| manifest.all().filter(move |(layer, expert)| (layer + expert) % parts == part);
        let sets: Vec<ExpertSet> = (0..parts).map(|part| ExpertSet::new(dealt(part))).collect();
        let split = Self { folder, manifest, sets };
        std::fs::write(split.path("whole"), &bytes).unwrap();
        let mut out = Vec::new();
        trunk::write(&gguf, &mut Cursor::new(&bytes), &split.manifest, &mut out, &mut |_| ()).unwrap();
        std::fs::write(split.path("trunk"), &out).unwrap();
        for (part, set) in split.sets.iter().enumerate() {
            let mut out = Vec::new();
            pack::write(&gguf, &mut Cursor::new(&bytes), &split.manifest, set, &mut out, &mut |_| ()).unwrap();
            std::fs::write(split.path(&format!("pack-{part}")), &out).unwrap();
        }
        split
    }

    fn open_pack(&self, part: usize) -> Result<(PackBackend, PackFacts), PackError> {
        let pack = self.path(&format!("pack-{part}"));
        PackBackend::open(&PackSettings { pack, only: None, profile: Profile::Fast, threads: 1, device: None }, |_| {})
    }

    fn backend(&self, name: &str, hook: Option<Box<dyn ExpertHook>>) -> LlamaBackend {
        let path = self.path(name);
        let model =
            Model::load(&ModelConfig { path: &path, vocab_only: false, repack: false, offload: None }, |_| {}).unwrap();
        let (context, batch) = (128, 64);
        let shape = Shape {
            profile: Profile::Exact,
            slots: SLOTS,
            context,
            vocab: model.vocab_size(),
            batch,
            prefill_beside_streams: batch,
            guess: false,
        };
        LlamaBackend::new(Arc::new(model), &shape, batch, 2, hook).unwrap()
    }
}

/// The packs in this process.
struct Here {
    packs: Vec<PackBackend>,
    map: ExpertMap,
    manifest: Manifest,
    step: Option<ExpertStep>,
}

impl ExpertHook for Here {
    fn chosen(&mut self, layer: u32, used: u32, ids: Vec<u32>, rows: Vec<f32>) -> Result<(), String> {
        self.step = Some(ExpertStep { step: 0, layer, used, ids, rows, jobs: Vec::new() });
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<f32>, String> {
        let step = self.step.take().ok_or("nothing was chosen")?;
        let mut flight = InFlight::new(step, self.manifest.n_embd, self.manifest.experts).unwrap();
        for outgoing in flight.begin(&self.map).unwrap() {
            let pack = &mut self.packs[outgoing.host.0 as usize];
            pack.check(&outgoing.call).unwrap();
            let answers = pack.compute(outgoing.call.layer, &[&outgoing.call]).unwrap();
            assert_eq!(flight.answer(outgoing.id, answers.into_iter().next().unwrap()), Ok(None));
        }
        assert!(flight.is_done());
        Ok(flight.finish().0)
    }
}

/// All logits of a prompt in two chunks, and of eight sequences that go on together.
fn logits(backend: &mut LlamaBackend) -> Vec<u32> {
    let mut bits = Vec::new();
    let mut run = |rows: Vec<BatchRow>| {
        backend.evaluate(&rows).unwrap();
        for row in 0..rows.len() {
            bits.extend(backend.logits(row).unwrap().iter().map(|logit| logit.to_bits()));
        }
    };
    let row = |slot: u32, position: u32| {
        let token = (slot * 131 + position * 37 + 11) % 300;
        BatchRow { slot, position, token, output: true }
    };
    run((0..PROMPT).map(|position| row(0, position)).collect());
    for slot in 1..SLOTS {
        run((0..slot + 1).map(|position| row(slot, position)).collect());
    }
    for step in 0..3 {
        run((0..SLOTS).map(|slot| row(slot, step + if slot == 0 { PROMPT } else { slot + 1 })).collect());
    }
    bits
}

#[test]
fn a_split_model_computes_the_same_bits() {
    for family in FAMILIES {
        for (kind, parts) in [(TensorType::F32, 1), (TensorType::Q8_0, 2), (TensorType::Q4_0, 4), (TensorType::F32, 3)]
        {
            let model = TinyMoe { architecture: family.architecture, kind, layers: 2, ..TinyMoe::default() };
            let split = Split::of(&model, parts);
            let whole = logits(&mut split.backend("whole", None));
            let mut map = ExpertMap::default();
            let packs = (0..parts as usize).map(|part| {
                let id = HostId(u32::try_from(part).unwrap());
                map.admit(&split.manifest, id, "here", &claims(&split.manifest, &split.sets[part])).unwrap();
                split.open_pack(part).unwrap().0
            });
            let packs = packs.collect();
            let here = Here { packs, map, manifest: split.manifest.clone(), step: None };
            let name = format!("{} {} over {parts}", family.architecture, kind.name);
            let split = logits(&mut split.backend("trunk", Some(Box::new(here))));
            assert_eq!(whole.len(), split.len(), "{name}");
            let other = whole.iter().zip(&split).filter(|(a, b)| a != b).count();
            assert_eq!(other, 0, "{name}: {other} of {} logits differ", whole.len());
            assert!(whole.iter().any(|bits| f32::from_bits(*bits) != 0.0), "{name}: nothing but zeros");
        }
    }
}

#[test]
fn a_trunk_without_its_experts_says_so() {
    struct Nobody;
    impl ExpertHook for Nobody {
        fn chosen(&mut self, _: u32, _: u32, _: Vec<u32>, _: Vec<f32>) -> Result<(), String> {
            Ok(())
        }
        fn outputs(&mut self) -> Result<Vec<f32>, String> {
            Err("nobody is there".into())
        }
    }
    let split = Split::of(&TinyMoe::default(), 1);
    let mut backend = split.backend("trunk", Some(Box::new(Nobody)));
    let row = BatchRow { slot: 0, position: 0, token: 5, output: true };
    let error = backend.evaluate(&[row]).unwrap_err().to_string();
    assert!(error.contains("nobody is there"), "{error}");
}

#[test]
fn a_pack_that_is_not_of_the_model_is_refused() {
    let split = Split::of(&TinyMoe::default(), 2);
    let path = split.path("pack-0");
    let good = std::fs::read(&path).unwrap();
    let mut facts = split.open_pack(0).unwrap().1;
    facts.experts.truncate(1);
    let check = |bytes: &[u8], expect: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = split.open_pack(0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("pack-0") && error.contains(expect), "{error} has no {expect:?}");
    };
    // One bit of a weight, one byte of the root, a cut file, another kind of file.
    let mut weight = good.clone();
    *weight.last_mut().unwrap() ^= 1;
    check(&weight, "is not one of the model with root");
    let mut root = good.clone();
    let at = good.windows(32).position(|w| w == split.manifest.root).unwrap();
    root[at] ^= 1;
    check(&root, "do not give the model root");
    check(&good[..good.len() - 64], "truncated");
    check(&std::fs::read(split.path("whole")).unwrap(), "no manifest");
}
