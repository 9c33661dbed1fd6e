//! The child's loop for a stage: commands between batches, then a batch, then its events.

use std::time::{Duration, Instant};

use satgrid_engine::stage::port::StageFacts;

use super::layers::{LayersConfig, LlamaLayers, Part, tensor_bytes};
use super::queue::StageQueue;
use crate::facts;
use crate::settings::{BATCH, DEFAULT_CONTEXT, MAX_SLOTS, StageSettings};
use crate::watchdog::Watchdog;
use crate::wire::{FromWorker, ToWorker};
use crate::worker::{Link, Stop};

/// Runs until the parent goes.
pub(crate) fn run(settings: &StageSettings, is_trunk: bool, link: &mut Link) -> Result<(), Stop> {
    link.send(&FromWorker::Loading { permille: 0 })?;
    let failed = |reason: &dyn std::fmt::Display| Stop::LoadFailed(reason.to_string());
    let named = |reason: &str| Stop::LoadFailed(format!("{}: {reason}", settings.part.display()));
    let part = Part::open(&settings.part, &mut |permille| link.tell_load(permille * 9 / 10));
    let Part { gguf, file } = part.map_err(|reason| failed(&reason))?;
    if file.is_tail() {
        return Err(named("it ends the model; the last layer is its lead's"));
    }
    match (is_trunk, file.experts.is_some()) {
        (false, true) => return Err(named("its experts are elsewhere: it runs only where they are found")),
        (true, false) => return Err(named("it holds its experts itself, and others were named")),
        (true, true) | (false, false) => {}
    }
    if settings.sequences == 0 || settings.sequences > MAX_SLOTS {
        return Err(named(&format!("{} sequences: 1 to {MAX_SLOTS} are possible", settings.sequences)));
    }
    let trained = gguf.arch_uint("context_length").and_then(|n| u32::try_from(n).ok()).unwrap_or(DEFAULT_CONTEXT);
    let context = match settings.context {
        0 => trained.clamp(1, DEFAULT_CONTEXT),
        asked if asked > trained => return Err(named(&format!("a context of {asked} is longer than its {trained}"))),
        asked => asked,
    };
    let known_answer = facts::known_answer().map_err(|error| failed(&error))?;
    let config = LayersConfig {
        profile: settings.profile,
        threads: settings.threads,
        sequences: settings.sequences,
        context,
        offload: settings.offload.clone(),
        memory: settings.memory_mib.map(|mib| u64::from(mib) << 20),
    };
    let hook = is_trunk.then(|| link.experts(file.range));
    let opened = LlamaLayers::open(&settings.part, &gguf, &config, hook);
    let mut layers = opened.map_err(|error| named(&error.to_string()))?;
    let facts = StageFacts {
        model_root: file.root,
        architecture: gguf.architecture().unwrap_or_default().to_owned(),
        layers: file.range,
        model_layers: file.layers,
        n_embd: layers.width(),
        profile: settings.profile,
        build_id: facts::build_id(&known_answer),
        instruction_set: facts::instruction_set(layers.card()),
        sequences: settings.sequences,
        context,
        batch: BATCH,
        speed: layers.measure(context),
        tensor_bytes: tensor_bytes(&gguf),
        name: gguf.str("general.name").map(str::to_owned),
        quantisation: satgrid_engine::facts::quantisation(&file.whole),
        memory_bytes: layers.may_use(),
    };
    link.send(&FromWorker::StageReady(Box::new(facts.clone())))?;
    drive(&mut StageQueue::new(facts), &mut layers, link)
}

fn drive(queue: &mut StageQueue, layers: &mut LlamaLayers, link: &mut Link) -> Result<(), Stop> {
    let watchdog = Watchdog::start()?;
    let origin = Instant::now();
    let clock = || u64::try_from(origin.elapsed().as_micros()).unwrap_or(u64::MAX);
    let mut idle = false;
    loop {
        let request = match idle {
            true => Some(link.wait()?),
            false => link.next(Duration::ZERO)?,
        };
        match request {
            Some(ToWorker::Stage(command)) => {
                queue.handle(command, layers);
                idle = false;
                // More works may wait that fit into the same batch.
                continue;
            }
            Some(
                ToWorker::Command(_)
                | ToWorker::Tokenize { .. }
                | ToWorker::Names { .. }
                | ToWorker::Render(_)
                | ToWorker::Ring(_)
                | ToWorker::ExpertOutputs(_)
                | ToWorker::ExpertCall { .. },
            ) => {
                tracing::error!("a stage was asked for something else than rows");
                continue;
            }
            None => {
                watchdog.begin();
                idle = !queue.step(layers, clock);
                watchdog.end();
            }
        }
        let events = queue.take_events();
        if !events.is_empty() {
            link.send(&FromWorker::StageEvents(events))?;
        }
    }
}
