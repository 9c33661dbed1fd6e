//! The child's loop for a lead: the scheduler of a whole model, over a backend whose middle is elsewhere.

use std::time::{Duration, Instant};

use satgrid_engine::draft::MAX_GUESS;
use satgrid_engine::facts::ModelFacts;
use satgrid_engine::port::{Command, EngineFacts, Profile};
use satgrid_engine::tokenizer_artefact::TokenizerArtefact;

use super::backend::{Next, RingBackend};
use super::ends::{Embedding, LlamaEnds};
use super::trip::TripShape;
use crate::backend::LlamaBackend;
use crate::devices::Offload;
use crate::draft::{DraftModel, Fits};
use crate::facts;
use crate::scheduler::{Backend, Scheduler, Shape};
use crate::settings::{BATCH, LeadSettings};
use crate::stage::layers::{LayersConfig, LlamaLayers, Part};
use crate::watchdog::Watchdog;
use crate::wire::FromWorker;
use crate::worker::{Link, Stop};

/// An idle engine waits this long for more jobs before it begins with the first: those that come together share batches.
const GATHER: Duration = Duration::from_millis(2);
/// Rows of a prompt's works in the exact profile, where any cut gives the same bits: short enough that all stages have one.
const CHUNK: u32 = 64;

/// Runs until the parent goes.
pub(crate) fn run(settings: &LeadSettings, link: &mut Link) -> Result<(), Stop> {
    link.send(&FromWorker::Loading { permille: 0 })?;
    let failed = |reason: &dyn std::fmt::Display| Stop::LoadFailed(reason.to_string());
    let opened = open(settings, link);
    let (ends, shape, model, root, tokenizer_hash) = opened.map_err(|reason| failed(&reason))?;
    let draft = open_draft(settings, &ends, &shape).map_err(|reason| failed(&reason))?;
    let known_answer = facts::known_answer().map_err(|error| failed(&error))?;
    let facts = EngineFacts {
        model,
        model_root: root,
        tokenizer_hash,
        profile: settings.tail.profile,
        build_id: facts::build_id(&known_answer),
        instruction_set: facts::instruction_set(ends.tail.card()),
        slots: shape.slots,
        context: shape.context,
        batch: shape.batch,
        // A measurement would have to be paid for.
        speed: None,
    };
    link.send(&FromWorker::EngineReady(Box::new(facts)))?;
    let chunk = match settings.tail.profile {
        Profile::Exact => CHUNK.min(shape.batch),
        // The very batches of a whole model: other cuts give other bits.
        Profile::Fast => shape.batch,
    };
    let stages = u32::try_from(settings.ring.stages.len()).unwrap_or(u32::MAX);
    // One at each machine, this one too, and one on the way to it.
    let works = stages.saturating_add(1).saturating_mul(2);
    let exact = settings.tail.profile == Profile::Exact;
    let trip = TripShape { slots: shape.slots, stages, chunk, works, exact, wire: settings.ring.wire };
    drive(&mut Scheduler::new(shape), &mut RingBackend::new(ends, trip, draft, link))
}

type Opened = (LlamaEnds, Shape, ModelFacts, [u8; 32], [u8; 32]);

/// Proves and loads both parts, and holds them and the ring against each other. The error is for who gave the paths.
fn open(settings: &LeadSettings, link: &mut Link) -> Result<Opened, String> {
    let (head_path, tail_path) = (&settings.head, &settings.tail.model);
    let head = Part::open(head_path, &mut |permille| link.tell_load(permille * 4 / 10))?;
    let tail = Part::open(tail_path, &mut |permille| link.tell_load(400 + permille * 4 / 10))?;
    if head.file.root != tail.file.root {
        return Err(format!("{} and {} are of different models", head_path.display(), tail_path.display()));
    }
    if !tail.file.is_tail() {
        return Err(format!("{} does not end the model", tail_path.display()));
    }
    if head.file.range.start() != 0 || head.file.is_tail() {
        return Err(format!("{} does not begin the model, or holds all of it", head_path.display()));
    }
    for (path, part) in [(head_path, &head), (tail_path, &tail)] {
        if part.file.experts.is_some() {
            return Err(format!("{}: a lead's own layers hold their experts themselves", path.display()));
        }
    }
    let mut at = head.file.range.end();
    for stage in settings.ring.stages.iter().chain([&tail.file.range]) {
        if stage.start() != at {
            return Err(format!("layers {stage} follow layer {at}: each layer must be run exactly once"));
        }
        at = stage.end();
    }
    let ring = &settings.ring;
    if !ring.stages.is_empty() && (ring.sequences < settings.tail.slots || ring.batch == 0) {
        return Err(format!("the stages hold {} sequences, {} are wanted", ring.sequences, settings.tail.slots));
    }
    let mut tail_settings = settings.tail.clone();
    if !ring.stages.is_empty() {
        let asked = if tail_settings.context == 0 { crate::settings::DEFAULT_CONTEXT } else { tail_settings.context };
        tail_settings.context = asked.min(ring.context);
    }
    let opened = LlamaBackend::open_with(&tail_settings, None, MAX_GUESS as u32 + 1, |permille| {
        link.tell_load(800 + permille / 10)
    });
    let (backend, mut shape) = opened.map_err(|error| error.to_string())?;
    if !ring.stages.is_empty() {
        shape.batch = shape.batch.min(ring.batch).min(BATCH);
        // Other batches give other bits in the fast profile, and without stages a trip costs nothing.
        shape.guess = settings.guess && settings.tail.profile == Profile::Exact;
    }
    // Both ends on one device, so that they compute alike; what the tail left free there decides whether the head fits.
    let device = backend.card().map_or_else(|| "cpu".to_owned(), |card| card.name.clone());
    let config = LayersConfig {
        profile: settings.tail.profile,
        threads: settings.tail.threads,
        sequences: shape.slots,
        context: shape.context,
        offload: Offload { device: Some(device), layers: None },
        memory: None,
    };
    let layers = LlamaLayers::open(head_path, &head.gguf, &config, None).map_err(|error| error.to_string())?;
    let embedding = Embedding::open(tail_path, &tail.gguf)?;
    let model = ModelFacts::from_gguf(&tail.file.whole).map_err(|error| error.to_string())?;
    let tokenizer_hash =
        TokenizerArtefact::from_gguf(&tail.file.whole).map(|artefact| artefact.hash).unwrap_or_default();
    Ok((LlamaEnds { embedding, head: layers, tail: backend }, shape, model, tail.file.root, tokenizer_hash))
}

/// The small model that guesses, where one is named and guesses are verified.
fn open_draft(settings: &LeadSettings, ends: &LlamaEnds, shape: &Shape) -> Result<Option<DraftModel>, String> {
    let Some(path) = settings.draft.as_deref().filter(|_| shape.guess) else { return Ok(None) };
    let fits = Fits {
        slots: shape.slots,
        context: shape.context,
        threads: settings.tail.threads,
        vocab: shape.vocab,
        piece: &|token| ends.tail.piece(token),
    };
    DraftModel::open(path, &fits).map(Some)
}

/// Hears all that waits, lands what is back, begins what may begin, tells of it. Where nothing can be done it waits for the
/// next word: a batch may be away for as long as the ring needs to replace a stage, and the ring says when there is no hope.
fn drive(scheduler: &mut Scheduler, backend: &mut RingBackend<'_>) -> Result<(), Stop> {
    let (mut idle, mut asleep) = (false, false);
    let mut gather_until = Instant::now();
    let watchdog = Watchdog::start()?;
    loop {
        let wait = (!asleep).then(|| gather_until.saturating_duration_since(Instant::now()));
        match backend.next(wait)? {
            Next::Command(command) => {
                if idle && matches!(command, Command::Start(_)) {
                    gather_until = Instant::now() + GATHER;
                }
                scheduler.handle(command, backend);
                (idle, asleep) = (false, false);
                continue;
            }
            Next::Word => {
                asleep = false;
                continue;
            }
            Next::Nothing => {
                watchdog.begin();
                let landed = scheduler.land(backend);
                let begun = scheduler.launch(backend);
                watchdog.end();
                asleep = !landed && !begun;
                idle = asleep && scheduler.nothing_is_away();
            }
        }
        let events = scheduler.take_events();
        if !events.is_empty() {
            backend.say(&FromWorker::Events(events))?;
        }
    }
}
