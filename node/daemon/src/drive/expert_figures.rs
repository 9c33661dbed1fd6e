//! What a lead counts and measures of its experts while it serves: which the router chose, what the trunk takes, how long it
//! waits, how fast each worker answers. Kept in the ledger's database; whom it buys of and what it lists follow from it.
//!
//! Whose rows they were is not in it.

use super::now;
use async_trait::async_trait;
use satgrid_engine::{
    experts::{ExpertStep, Experts, Manifest, StepError, group::ExpertGroup, heat::Heat},
    port::JobId,
};
use satgrid_ledger_sqlite::{Cost, Costs, FigureStore};
use satgrid_market::{
    Links,
    estimate::{ExpertSplit, Fit, Line, Shape, WorkerCost, tokens_per_s, trunk_of},
    experts::{Choosing, Role, Wanted, choose},
};
use satgrid_types::{ExpertSet, LayerRange, NodeKey, Speed, VerifiedListing, WireType};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

/// Figures go to the disk so often.
const SAVE_EVERY: Duration = Duration::from_secs(2);
/// Measurements of about so many of the newest steps count.
const STEPS: f64 = 64.0;
/// Longer steps are prompts: they do not tell what a step of streams takes.
const MOST_ROWS: usize = 64;

/// A call's time beside the path's round trip, where no call was measured yet: wake-ups on both sides, in microseconds.
const OWN_US: f64 = 300.0;
/// Streams for which roles are dealt, at the most.
const MOST_STREAMS: u32 = 32;
/// Rows of a prompt in one step, for what is listed.
const PROMPT_ROWS: u32 = 64;

/// The figures of one model.
pub(crate) struct Figures {
    model: [u8; 32],
    /// Layers, each of which is measured at each step.
    layers: f64,
    ours: NodeKey,
    store: Arc<FigureStore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    heat: Heat,
    lines: BTreeMap<(NodeKey, Cost), Line>,
    /// Lines that changed since they were kept.
    changed: bool,
}

impl Figures {
    /// With what was kept of the model before.
    pub(crate) async fn load(store: Arc<FigureStore>, model: [u8; 32], layers: u32, ours: NodeKey) -> Arc<Figures> {
        let (heat, costs) = store.of(model).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "figures of experts cannot be read; they are counted anew");
            Default::default()
        });
        let lines = costs.into_iter().map(|((node, what), sums)| ((NodeKey(node), what), Line { sums })).collect();
        let state = Mutex::new(State { heat, lines, changed: false });
        let layers = f64::from(layers.max(1));
        Arc::new(Figures { model, layers, ours, store, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, node: NodeKey, what: Cost, x: usize, took: Duration) {
        let mut state = self.state();
        let line = state.lines.entry((node, what)).or_default();
        line.add(x as f64, took.as_nanos() as f64 / 1e3, self.memory(what));
        state.changed = true;
    }

    /// Measurements that count, about.
    fn memory(&self, what: Cost) -> f64 {
        match what {
            Cost::Trunk => STEPS,
            Cost::Link | Cost::Work | Cost::Wait => STEPS * self.layers,
        }
    }

    /// A worker answered: so many bytes both ways, rows in the answer, and of the wait its own time.
    pub(crate) fn answered(&self, worker: NodeKey, bytes: usize, rows: usize, waited: Duration, busy: Duration) {
        self.add(worker, Cost::Link, bytes, waited.saturating_sub(busy));
        self.add(worker, Cost::Work, rows, busy.min(waited));
    }

    /// Where no call to a seller was measured yet, the link's round trip is a first figure: what a node measures of links is
    /// one thing, whether layers or experts are behind them.
    pub(crate) fn begin_with(&self, links: &Links, sellers: &[Arc<VerifiedListing>]) {
        for listing in sellers.iter().filter(|listing| !self.cost_of(listing).measured) {
            let Some(rtt) = links.rtt_us(&self.ours, &listing.node_key) else { continue };
            let mut state = self.state();
            let line = state.lines.entry((listing.node_key, Cost::Link)).or_default();
            // As few as count at all: what is measured at work soon outweighs them.
            (0..4).for_each(|_| line.add(0.0, rtt as f64 + OWN_US, self.memory(Cost::Link)));
            state.changed = true;
        }
    }

    /// The trunk's own measurement at start, while nothing better is known.
    pub(crate) fn measured_alone(&self, speed: &Speed) {
        let Some(fit) = trunk_of(speed) else { return };
        let mut state = self.state();
        let line = state.lines.entry((self.ours, Cost::Trunk)).or_default();
        if !line.is_measured() {
            for rows in [1.0, 2.0, 4.0, 8.0, 16.0] {
                line.add(rows, fit.at(rows), STEPS);
            }
            state.changed = true;
        }
    }

    pub(crate) fn heat(&self) -> Heat {
        self.state().heat.clone()
    }

    /// What a worker costs in time, by what was measured, else by its listing.
    pub(crate) fn cost_of(&self, listing: &VerifiedListing) -> WorkerCost {
        let state = self.state();
        let line = |what| state.lines.get(&(listing.node_key, what));
        WorkerCost::of(line(Cost::Link), line(Cost::Work), &listing.speed)
    }

    /// The trunk's own time of a step by its rows. None where it could not measure itself.
    pub(crate) fn trunk(&self) -> Option<Fit> {
        self.state().lines.get(&(self.ours, Cost::Trunk))?.fit(0.0)
    }

    /// A layer's waits, by rows.
    fn waits(&self) -> Option<Line> {
        self.state().lines.get(&(self.ours, Cost::Wait)).copied()
    }

    /// Takes what the group counted, and keeps it, until the group is gone.
    pub(crate) async fn keep(self: Arc<Self>, group: Weak<ExpertGroup>) {
        let mut unsaved = Heat::new();
        loop {
            tokio::time::sleep(SAVE_EVERY).await;
            let Some(group) = group.upgrade() else { return };
            let fresh = group.take_heat();
            drop(group);
            let lines = {
                let mut state = self.state();
                for (place, rows) in fresh {
                    *state.heat.entry(place).or_default() += rows;
                    *unsaved.entry(place).or_default() += rows;
                }
                std::mem::take(&mut state.changed).then(|| state.lines.clone())
            };
            if !unsaved.is_empty() {
                match self.store.add(self.model, &unsaved).await {
                    Ok(()) => unsaved.clear(),
                    Err(error) => tracing::warn!(%error, "counted expert rows cannot be kept; tried again"),
                }
            }
            if let Some(lines) = lines {
                let costs: Costs = lines.into_iter().map(|((node, what), line)| ((node.0, what), line.sums)).collect();
                if let Err(error) = self.store.keep(self.model, &costs, now()).await {
                    tracing::warn!(%error, "measured times of experts cannot be kept");
                    self.state().changed = true;
                }
            }
        }
    }
}

/// The shape of a model's steps, or of these layers of it, on this wire.
pub(crate) fn shape(manifest: &Manifest, layers: Option<LayerRange>, wire: WireType) -> Shape {
    let row_bytes = wire.row_bytes(manifest.n_embd).and_then(|bytes| u32::try_from(bytes).ok()).unwrap_or(u32::MAX);
    let (first, layers) = layers.map_or((0, manifest.layers), |range| (range.start(), range.layers()));
    Shape { first, layers, experts: manifest.experts, used: manifest.used, row_bytes }
}

/// Deals who of those that sell a model's experts serves, by the figures.
#[derive(Clone)]
pub(crate) struct Dealer {
    pub shape: Shape,
    /// Experts that the lead holds itself.
    pub own: ExpertSet,
    /// Every (layer, expert) that the lead's layers have.
    pub wanted: Arc<Wanted>,
    /// Streams at a time.
    pub batch: u32,
    pub figures: Arc<Figures>,
}

impl Dealer {
    /// The role of each seller, and the estimate over those who serve.
    pub(crate) fn deal(&self, sellers: &[Arc<VerifiedListing>]) -> (Vec<Role>, ExpertSplit) {
        let heat = self.figures.heat();
        let choosing = Choosing {
            shape: self.shape,
            trunk: self.figures.trunk().unwrap_or(Fit { base: 0.0, slope: 0.0 }),
            own: &self.own,
            heat: &heat,
            batch: self.batch.clamp(1, MOST_STREAMS),
        };
        let (roles, mut split) = choose(sellers, &self.wanted, &choosing, &|listing| self.figures.cost_of(listing));
        if let Some(waits) = self.figures.waits() {
            split.fit_wait(&waits);
        }
        (roles, split)
    }

    /// What a listing says of the split's speed: a stream alone, and a prompt. None where the trunk is not measured.
    pub(crate) fn speed(&self, sellers: &[Arc<VerifiedListing>]) -> Option<satgrid_engine::port::Speed> {
        self.figures.trunk()?;
        let (_, split) = self.deal(sellers);
        let mtok_s = |batch| (1e3 * tokens_per_s(batch, split.step_us(batch))) as u64;
        Some(satgrid_engine::port::Speed {
            prefill_millitokens_per_s: mtok_s(PROMPT_ROWS),
            decode_millitokens_per_s: mtok_s(1),
        })
    }
}

/// A group whose steps are timed.
pub(crate) struct Timed {
    group: Arc<ExpertGroup>,
    figures: Arc<Figures>,
    /// Nobody is paid for a trunk's measurement of itself: it gets zeros, and so measures the trunk alone.
    alone: bool,
    step: Mutex<Option<Step>>,
}

/// A step of the trunk under way.
struct Step {
    number: u64,
    began: Instant,
    rows: usize,
    jobs: Vec<JobId>,
    waited: Duration,
}

impl Timed {
    pub(crate) fn new(group: Arc<ExpertGroup>, figures: Arc<Figures>, alone: bool) -> Timed {
        Timed { group, figures, alone, step: Mutex::new(None) }
    }

    /// A layer's question comes. The first one of a step ends the step before, which took as long as it took where the
    /// same streams go on: else the trunk had nothing to do.
    fn asked(&self, step: &ExpertStep, rows: usize, at: Instant) {
        let mut current = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|current| current.number == step.step) {
            return;
        }
        let fresh = Step { number: step.step, began: at, rows, jobs: step.jobs.clone(), waited: Duration::ZERO };
        let Some(over) = current.replace(fresh) else { return };
        if over.rows <= MOST_ROWS && over.jobs.iter().any(|job| step.jobs.contains(job)) {
            let took = at.duration_since(over.began).saturating_sub(over.waited);
            self.figures.add(self.figures.ours, Cost::Trunk, over.rows, took);
        }
    }

    fn waited(&self, rows: usize, took: Duration) {
        if let Some(step) = self.step.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            step.waited += took;
        }
        if rows <= MOST_ROWS {
            self.figures.add(self.figures.ours, Cost::Wait, rows, took);
        }
    }
}

#[async_trait]
impl Experts for Timed {
    async fn evaluate(&self, step: ExpertStep) -> Result<Vec<f32>, StepError> {
        if step.jobs.is_empty() {
            let width = self.group.manifest().n_embd as usize;
            if self.alone {
                return Ok(vec![0.0; step.ids.len().saturating_mul(width)]);
            }
            return self.group.evaluate(step).await;
        }
        let (rows, began) = (step.jobs.len(), Instant::now());
        self.asked(&step, rows, began);
        let answer = self.group.evaluate(step).await;
        self.waited(rows, began.elapsed());
        answer
    }
}
