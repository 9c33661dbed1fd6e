//! The child process that holds an expert pack: it reads and proves the experts, then evaluates what is asked.
//!
//! Calls that wait are taken together: those on one layer, of whichever lead, share a graph. In the exact profile a row's bits
//! depend on nothing else in its graph.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::BufReader;
use std::time::Instant;

use satgrid_engine::experts::call::{ExpertCall, ExpertRows, MAX_WORK};
use satgrid_engine::experts::pack::Pack;
use satgrid_engine::experts::{CallError, Part, PartError};
use satgrid_engine::gguf::Gguf;
use satgrid_engine::port::Profile;

use crate::backend::{OpenError, check_processor};
use crate::devices::{Device, Offload};
use crate::facts;
use crate::ffi::{ExpertWeights, Handle, TensorPlan, WeightsError};
use crate::placed::card_for;
use crate::settings::{PackSettings, TILED_PRODUCT};
use crate::wire::{CallFailure, HeldExpert, PackFacts};

/// Bytes read at once.
const READ_BUFFER: usize = 1 << 20;
/// Rows of the measurement at start.
const MEASURE_ROWS: u32 = 32;

/// Why a pack is not served. The reason is for the person who gave the path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("{0}")]
    Open(#[from] OpenError),
    #[error("{0}")]
    Weights(#[from] WeightsError),
}

/// A pack in memory.
pub(crate) struct PackBackend {
    weights: ExpertWeights,
    held: BTreeMap<u32, Vec<u32>>,
    /// Of each held layer the tensors' indices: gate, up, down.
    tensors: BTreeMap<u32, [usize; 3]>,
    n_embd: u32,
}

impl PackBackend {
    /// Reads the file, or the part of it that the settings name. `progress` hears thousandths.
    pub(crate) fn open(settings: &PackSettings, mut progress: impl FnMut(u32)) -> Result<(Self, PackFacts), PackError> {
        check_processor()?;
        if settings.profile == Profile::Exact && std::env::var_os(TILED_PRODUCT).is_none_or(|value| value != "0") {
            return Err(OpenError::TiledProduct.into());
        }
        let path = settings.pack.display().to_string();
        let named = |error: &dyn std::fmt::Display| PackError::File { path: path.clone(), reason: error.to_string() };
        let file = File::open(&settings.pack).map_err(|error| named(&error))?;
        let mut reader = BufReader::with_capacity(READ_BUFFER, file);
        let gguf = Gguf::read(&mut reader).map_err(|error| named(&error))?;
        let mut pack = Pack::open(gguf).map_err(|error| named(&error))?;
        if let Some(only) = &settings.only {
            pack.restrict(only).map_err(|error| named(&error))?;
        }
        let (mut plans, mut tensors) = (Vec::new(), BTreeMap::new());
        let shape = pack.manifest.shape().map_err(|error| named(&error))?;
        for (&layer, experts) in &pack.held {
            let first = plans.len();
            for part in Part::ALL {
                let [inner, outer, _] = part.shape(&shape);
                let kind = pack.manifest.kind(layer, part).map_or(0, |kind| kind.id);
                plans.push(TensorPlan { kind, inner, outer, experts: experts.len() as u64 });
            }
            tensors.insert(layer, [first, first + 1, first + 2]);
        }
        let (bytes, mut done, mut told) = (pack.bytes(), 0_u64, 0);
        let card = Self::card(settings, bytes)?;
        let mut weights = ExpertWeights::new(&plans, settings.threads, card.as_ref().map(|(handle, _)| *handle))?;
        for (&layer, experts) in &pack.held {
            for (part, tensor) in Part::ALL.into_iter().zip(tensors[&layer]) {
                let mut offset = 0;
                for &expert in experts {
                    let mut misplaced = None;
                    let mut take = |chunk: &[u8]| {
                        misplaced = weights.place(tensor, offset, chunk).err().or(misplaced.take());
                        offset += chunk.len() as u64;
                        done += chunk.len() as u64;
                    };
                    pack.read(&mut reader, (layer, expert), part, &mut take).map_err(|error| named(&error))?;
                    misplaced.map_or(Ok(()), Err)?;
                }
                let permille = u32::try_from(done.saturating_mul(1000) / bytes.max(1)).unwrap_or(1000);
                if permille >= told + 10 {
                    told = permille;
                    progress(permille);
                }
            }
        }
        let n_embd = pack.manifest.n_embd;
        let mut backend = Self { weights, held: pack.held.clone(), tensors, n_embd };
        let card = card.map(|(_, device)| device);
        let facts = backend.facts(&pack, settings.profile, card.as_ref()).map_err(|error| match error {
            FactsError::Part(error) => named(&error),
            FactsError::Open(error) => error.into(),
        })?;
        Ok((backend, facts))
    }

    /// The card that evaluates the experts, if one does. A card promises no more than the fast profile does: whether it gives
    /// a row the same bits in any company is not tried.
    fn card(settings: &PackSettings, bytes: u64) -> Result<Option<(Handle, Device)>, OpenError> {
        let offload = Offload { device: settings.device.clone(), layers: None };
        match (settings.profile, &settings.device) {
            (Profile::Exact, None) => Ok(None),
            (Profile::Exact, Some(_)) => match card_for(&offload, bytes)? {
                Some((_, device)) => Err(OpenError::NotExact { device: device.name }),
                None => Ok(None),
            },
            (Profile::Fast, _) => Ok(card_for(&offload, bytes)?),
        }
    }

    fn facts(&mut self, pack: &Pack, profile: Profile, card: Option<&Device>) -> Result<PackFacts, FactsError> {
        let mut experts = Vec::new();
        for &(layer, expert) in pack.set().pairs() {
            let hash = pack.manifest.expert_hash(layer, expert);
            experts.push(HeldExpert { layer, expert, hash: hash.ok_or(PartError::NotHeld { layer, expert })? });
        }
        let known_answer = facts::known_answer()?;
        Ok(PackFacts {
            model_root: pack.manifest.root,
            experts,
            n_embd: self.n_embd,
            layers: pack.manifest.layers,
            experts_per_layer: pack.manifest.experts,
            used: pack.manifest.used,
            bytes: pack.bytes(),
            profile,
            build_id: facts::build_id(&known_answer),
            instruction_set: facts::instruction_set(card),
            millirows_per_s: self.measure(),
        })
    }

    /// Rows per second through one expert after another, each alone, after one that fills the caches.
    fn measure(&mut self) -> u64 {
        let Some((&layer, experts)) = self.held.first_key_value() else { return 0 };
        let (rows, experts) = (vec![0.1; self.n_embd as usize], experts.clone());
        let mut begin = Instant::now();
        for row in 0..=MEASURE_ROWS {
            let expert = experts[row as usize % experts.len()];
            let work = vec![satgrid_engine::experts::call::Work { row: 0, expert }];
            let call = ExpertCall { layer, rows: rows.clone(), work, ..ExpertCall::default() };
            if self.compute(layer, &[&call]).is_err() {
                return 0;
            }
            if row == 0 {
                begin = Instant::now();
            }
        }
        let nanos = begin.elapsed().as_nanos().max(1);
        u64::try_from(u128::from(MEASURE_ROWS) * 1_000_000_000_000 / nanos).unwrap_or(u64::MAX)
    }

    /// What is wrong with a call, before anything is computed.
    pub(crate) fn check(&self, call: &ExpertCall) -> Result<(), CallError> {
        call.check(self.n_embd, &self.held).map(|_| ())
    }

    /// Evaluates calls on one layer in one graph; each was checked.
    fn compute(&mut self, layer: u32, calls: &[&ExpertCall]) -> Result<Vec<ExpertRows>, WeightsError> {
        let width = self.n_embd as usize;
        let held = self.held.get(&layer).ok_or(WeightsError::Misplaced)?;
        let tensors = *self.tensors.get(&layer).ok_or(WeightsError::Misplaced)?;
        let (mut rows, mut ids) = (Vec::new(), Vec::new());
        for call in calls {
            for work in &call.work {
                let at = held.binary_search(&work.expert).map_err(|_| WeightsError::Misplaced)?;
                ids.push(i32::try_from(at).map_err(|_| WeightsError::Misplaced)?);
                let from = work.row as usize * width;
                rows.extend_from_slice(call.rows.get(from..from + width).ok_or(WeightsError::Misplaced)?);
            }
        }
        let out = self.weights.evaluate(tensors, &rows, &ids)?;
        let mut rest = out.as_slice();
        let mut answers = Vec::with_capacity(calls.len());
        for call in calls {
            let (rows, others) = rest.split_at(call.work.len() * width);
            answers.push(ExpertRows { step: call.step, layer, rows: rows.to_vec() });
            rest = others;
        }
        Ok(answers)
    }
}

enum FactsError {
    Part(PartError),
    Open(OpenError),
}

impl From<PartError> for FactsError {
    fn from(error: PartError) -> Self {
        Self::Part(error)
    }
}

impl From<OpenError> for FactsError {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

/// Calls that wait, oldest first.
#[derive(Default)]
pub(crate) struct Waiting(VecDeque<(u64, ExpertCall)>);

impl Waiting {
    /// Takes a call in, or answers at once why not.
    pub(crate) fn push(&mut self, id: u64, call: ExpertCall, backend: &PackBackend) -> Result<(), CallError> {
        backend.check(&call)?;
        self.0.push_back((id, call));
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Evaluates the oldest call, and with it those on the same layer that fit.
    pub(crate) fn evaluate(&mut self, backend: &mut PackBackend) -> Vec<(u64, Result<ExpertRows, CallFailure>)> {
        let Some(layer) = self.0.front().map(|(_, call)| call.layer) else { return Vec::new() };
        let (mut together, mut others, mut work) = (Vec::new(), VecDeque::new(), 0);
        for (id, call) in self.0.drain(..) {
            if call.layer == layer && (together.is_empty() || work + call.work.len() <= MAX_WORK) {
                work += call.work.len();
                together.push((id, call));
            } else {
                others.push_back((id, call));
            }
        }
        self.0 = others;
        let calls: Vec<&ExpertCall> = together.iter().map(|(_, call)| call).collect();
        match backend.compute(layer, &calls) {
            Ok(answers) => together.iter().map(|(id, _)| *id).zip(answers.into_iter().map(Ok)).collect(),
            Err(error) => {
                let failed = |id: u64| (id, Err(CallFailure::Failed(error.to_string())));
                together.iter().map(|(id, _)| failed(*id)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests;
