//! The experts of one model as the lead sees them: hosts come and go, and the rows of every step are found.
//!
//! | a host is | leaves with                                                                                         |
//! |-----------|-----------------------------------------------------------------------------------------------------|
//! | in        | no answer, a bad answer, or a lie found by a witness: out, and its rows of the step go elsewhere      |
//! | out       | [`ExpertGroup::admit`] again, under a new number                                                      |
//!
//! Where nobody is left for an expert, the lead loads it: the [`Spare`] makes a host of its own for all experts that are
//! without one. With witnesses a part of all rows is asked twice. Where two hosts differ, a host of the lead's own decides;
//! without one a third holder does; without that both are suspects, the first one's row is used, and the observer is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use satgrid_types::{ExpertSet, LayerRange, WireType};

use super::call::{CallError, ExpertCall, ExpertRows, ExpertStep, HostError, StepError, Work};
use super::heat::Heat;
use super::manifest::Manifest;
use super::map::{Claims, ExpertMap, HostId, MapError, Pace, claims};
use super::step::{Disagreement, InFlight, Outgoing};
use super::{ExpertHost, Experts};
use crate::port::JobId;
use crate::stage::codec::HiddenRows;

/// Hosts that one step may lose before it is given up: a fault of ours would else lose them all.
const MAX_LOSSES: u32 = 16;

/// What happened to the group, for logs, reputation and displays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupEvent {
    /// The host no longer takes part.
    Out { host: String, reason: String },
    /// A witness showed that the host returned wrong rows: [`Disagreement::statement`] says which.
    Lied { host: String, layer: u32, expert: u32, statement: Vec<u8> },
    /// Two hosts differ and nobody could tell who is right.
    Suspects { hosts: [String; 2], layer: u32, expert: u32 },
    /// The lead now holds these experts itself.
    Loaded { experts: u32 },
}

/// Hears of the group.
pub trait Observer: Send + Sync {
    fn told(&self, event: GroupEvent);
}

/// Makes a host of the lead's own for experts that nobody else holds.
#[async_trait]
pub trait Spare: Send + Sync {
    async fn load(&self, experts: ExpertSet) -> Result<Arc<dyn ExpertHost>, String>;
}

/// How a group is run.
pub struct GroupConfig {
    pub manifest: Manifest,
    /// Of a lead that runs only these layers of the model; none: all of them.
    pub layers: Option<LayerRange>,
    pub spare: Option<Arc<dyn Spare>>,
    pub observer: Arc<dyn Observer>,
    /// Rows of a million that are asked of a second host too.
    pub witness_per_million: u32,
    /// Draws which rows these are.
    pub seed: [u8; 32],
    /// How rows travel between nodes. All rows are rounded to it, whoever evaluates them: the answer is the same whether a
    /// host is bought, the lead's own, or was replaced. Only f32 changes nothing.
    pub wire: WireType,
    /// No call holds more bytes of rows, as 32-bit numbers, nor does its answer.
    pub call_bytes: usize,
}

/// What became of the rows of one job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobRows {
    /// Experts that the router chose for each row.
    pub chosen: u32,
    /// Rows of each layer with experts.
    pub layers: BTreeMap<u32, u64>,
    /// Rows that hosts of the lead's own evaluated, second evaluations included.
    pub own: BTreeMap<(u32, u32), u64>,
}

/// A host and what the lead knows of it.
struct Member {
    host: Arc<dyn ExpertHost>,
    name: String,
    /// The lead's own: its word decides.
    own: bool,
    rows: BTreeMap<(u32, u32), u64>,
}

struct State {
    map: ExpertMap,
    members: BTreeMap<HostId, Member>,
    next: u32,
    draw: ChaCha20Rng,
    /// Rows that the router sent to each expert.
    routed: Heat,
    /// The same, since somebody took them.
    heat: Heat,
    /// Jobs whose rows are accounted for.
    accounts: BTreeMap<JobId, JobRows>,
}

/// The hosts of one model's experts. See the module.
pub struct ExpertGroup {
    config: GroupConfig,
    state: Mutex<State>,
    /// One load at a time.
    loading: futures::lock::Mutex<()>,
}

impl ExpertGroup {
    pub fn new(config: GroupConfig) -> Self {
        let state = State {
            map: ExpertMap::default(),
            members: BTreeMap::new(),
            next: 0,
            draw: ChaCha20Rng::from_seed(config.seed),
            routed: Heat::new(),
            heat: Heat::new(),
            accounts: BTreeMap::new(),
        };
        Self { config, state: Mutex::new(state), loading: futures::lock::Mutex::new(()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn manifest(&self) -> &Manifest {
        &self.config.manifest
    }

    /// Every (layer, expert) of the layers that the lead runs.
    pub fn wanted(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        self.config.manifest.of_layers(self.config.layers)
    }

    /// Takes a host in. `own` hosts belong to the lead, which believes them.
    pub fn admit(&self, name: &str, host: Arc<dyn ExpertHost>, claims: &Claims, own: bool) -> Result<HostId, MapError> {
        let mut state = self.state();
        let id = HostId(state.next);
        state.map.admit(&self.config.manifest, id, name, claims)?;
        state.next += 1;
        if own {
            // Nothing lies between, and nobody is paid: it is asked first, while it has little to do.
            state.map.set_pace(id, Pace { call_ns: 0, ..Pace::default() });
        }
        let member = Member { host, name: name.to_owned(), own, rows: BTreeMap::new() };
        state.members.insert(id, member);
        Ok(id)
    }

    /// Refuses to begin while nobody holds some expert, unless the lead can load them.
    pub fn ready(&self) -> Result<(), MapError> {
        if self.config.spare.is_some() {
            return Ok(());
        }
        self.state().map.complete(&self.config.manifest, self.config.layers)
    }

    /// How fast a host was found to be, by its name: a fast one gets more of what several hold.
    pub fn set_pace(&self, name: &str, pace: Pace) {
        let mut state = self.state();
        let found = state.members.iter().find(|(_, member)| member.name == name).map(|(id, _)| *id);
        if let Some(id) = found {
            state.map.set_pace(id, pace);
        }
    }

    /// Whether a host serves, or gets rows only of experts that nobody else holds.
    pub fn set_standby(&self, name: &str, standby: bool) {
        let mut state = self.state();
        let found = state.members.iter().find(|(_, member)| member.name == name).map(|(id, _)| *id);
        if let Some(id) = found {
            state.map.set_standby(id, standby);
        }
    }

    /// Rows that the router sent to each (layer, expert) since this was last asked.
    pub fn take_heat(&self) -> Heat {
        std::mem::take(&mut self.state().heat)
    }

    /// Rows that the router sent to each (layer, expert) so far.
    pub fn routed(&self) -> BTreeMap<(u32, u32), u64> {
        self.state().routed.clone()
    }

    /// Of each host that is in, by name: the rows that it gave and the lead used.
    pub fn given(&self) -> BTreeMap<String, BTreeMap<(u32, u32), u64>> {
        self.state().members.values().map(|member| (member.name.clone(), member.rows.clone())).collect()
    }

    /// Accounts for a job's rows from now on, until [`ExpertGroup::close_account`].
    pub fn open_account(&self, job: JobId) {
        self.state().accounts.entry(job).or_default();
    }

    /// What became of the job's rows. `None` where no account was opened.
    pub fn close_account(&self, job: JobId) -> Option<JobRows> {
        self.state().accounts.remove(&job)
    }

    /// The (layer, expert) of the lead's layers that somebody holds.
    pub fn held(&self) -> impl Iterator<Item = (u32, u32)> + use<> {
        let state = self.state();
        let all = self.wanted();
        let held: Vec<(u32, u32)> =
            all.filter(|&(layer, expert)| !state.map.holders(layer, expert).is_empty()).collect();
        held.into_iter()
    }

    /// Who is in, by name.
    pub fn hosts(&self) -> BTreeSet<String> {
        self.state().members.values().map(|member| member.name.clone()).collect()
    }

    /// Takes a host out by its name; its rows of steps under way go elsewhere.
    pub fn withdraw(&self, name: &str, reason: &str) {
        let found = self.state().members.iter().find(|(_, member)| member.name == name).map(|(id, _)| *id);
        if let Some(id) = found {
            self.dismiss(id, reason.to_owned());
        }
    }

    fn dismiss(&self, id: HostId, reason: String) {
        let name = {
            let mut state = self.state();
            state.map.dismiss(id);
            state.members.remove(&id).map(|member| member.name)
        };
        if let Some(host) = name {
            self.config.observer.told(GroupEvent::Out { host, reason });
        }
    }

    fn name(&self, id: HostId) -> String {
        self.state().members.get(&id).map(|member| member.name.clone()).unwrap_or_else(|| format!("host {}", id.0))
    }

    /// The lead takes over all experts that nobody holds.
    async fn load(&self, layer: u32, experts: Vec<u32>) -> Result<(), StepError> {
        let _one_at_a_time = self.loading.lock().await;
        let missing = self.state().map.missing(&self.config.manifest, self.config.layers);
        if missing.pairs().is_empty() {
            return Ok(());
        }
        let Some(spare) = &self.config.spare else { return Err(StepError::NoHost { layer, experts, reason: None }) };
        let count = u32::try_from(missing.pairs().len()).unwrap_or(u32::MAX);
        let claims = claims(&self.config.manifest, &missing);
        let no_host = |reason| StepError::NoHost { layer, experts, reason: Some(reason) };
        match spare.load(missing).await {
            Ok(host) => {
                let id = self.admit("the lead", host, &claims, true).map_err(|error| no_host(error.to_string()))?;
                // Until somebody holds them again.
                self.state().map.set_standby(id, true);
            }
            Err(reason) => return Err(no_host(reason)),
        }
        self.config.observer.told(GroupEvent::Loaded { experts: count });
        Ok(())
    }

    /// Calls for all open work, after the lead took over what nobody else has.
    async fn open(&self, flight: &mut InFlight) -> Result<Vec<Outgoing>, StepError> {
        loop {
            let asked = flight.begin(&self.state().map);
            match asked {
                Ok(outgoing) => return Ok(outgoing),
                Err(missing) => self.load(flight.layer(), missing).await?,
            }
        }
    }

    /// The slots of a step that are asked twice.
    fn draw_witnesses(&self, slots: usize) -> Vec<usize> {
        let rate = self.config.witness_per_million;
        if rate == 0 {
            return Vec::new();
        }
        let mut state = self.state();
        (0..slots).filter(|_| state.draw.next_u32() % 1_000_000 < rate).collect()
    }

    async fn call(&self, outgoing: Outgoing) -> (u64, HostId, Result<ExpertRows, HostError>) {
        let Outgoing { id, host, call } = outgoing;
        let member = self.state().members.get(&host).map(|member| (Arc::clone(&member.host), member.own));
        let answer = match member {
            Some((member, own)) => {
                let (layer, work, jobs) = (call.layer, call.work.clone(), call.jobs.clone());
                let answer = member.evaluate(call).await;
                if own && answer.is_ok() {
                    self.book_own(layer, &work, &jobs);
                }
                answer.and_then(|rows| self.rounded(rows))
            }
            None => Err(HostError::Gone { reason: "dismissed meanwhile".to_owned() }),
        };
        (id, host, answer)
    }

    /// Who of two that differ is wrong; both are named where nobody can tell.
    async fn judge(&self, dispute: &Disagreement) -> Vec<HostId> {
        let (layer, expert) = (dispute.question.layer, dispute.expert());
        let own = |host: &HostId| self.state().members.get(host).is_some_and(|member| member.own);
        if let Some(at) = dispute.hosts.iter().position(own) {
            return vec![dispute.hosts[1 - at]];
        }
        let mut judges: Vec<HostId> = self.state().map.holders(layer, expert).to_vec();
        judges.retain(|judge| !dispute.hosts.contains(judge));
        judges.sort_by_key(|judge| !own(judge));
        for judge in judges {
            let asked = Outgoing { id: 0, host: judge, call: dispute.question.clone() };
            if let Some(truth) = self.heard(asked, &dispute.question).await {
                let wrong = dispute.wrong(&truth);
                // A third who agrees with neither decides nothing, unless it is the lead's own.
                if wrong.len() == 1 || own(&judge) {
                    return wrong;
                }
            }
        }
        match &self.config.spare {
            Some(spare) => match spare.load(ExpertSet::new([(layer, expert)])).await {
                Ok(host) => match host.evaluate(dispute.question.clone()).await {
                    Ok(truth) => dispute.wrong(&truth.rows),
                    Err(_) => Vec::new(),
                },
                Err(_) => Vec::new(),
            },
            None => Vec::new(),
        }
    }

    async fn heard(&self, asked: Outgoing, question: &ExpertCall) -> Option<Vec<f32>> {
        let answer = self.call(asked).await.2.ok()?;
        answer.check(question, self.config.manifest.n_embd).ok()?;
        Some(answer.rows)
    }

    fn book_own(&self, layer: u32, work: &[Work], jobs: &[JobId]) {
        let mut state = self.state();
        for work in work {
            let job = usize::try_from(work.row).ok().and_then(|row| jobs.get(row));
            if let Some(account) = job.and_then(|job| state.accounts.get_mut(job)) {
                *account.own.entry((layer, work.expert)).or_default() += 1;
            }
        }
    }

    fn round(&self, rows: Vec<f32>) -> Result<Vec<f32>, crate::stage::codec::CodecError> {
        match self.config.wire {
            WireType::F32 => Ok(rows),
            wire @ (WireType::Bf16 | WireType::Q8_0) => {
                let width = self.config.manifest.n_embd;
                HiddenRows::encode(&rows, width, wire)?.decode(width)
            }
        }
    }

    fn rounded(&self, answer: ExpertRows) -> Result<ExpertRows, HostError> {
        let ExpertRows { step, layer, rows } = answer;
        let rows = self.round(rows).map_err(|error| HostError::Gone { reason: error.to_string() })?;
        Ok(ExpertRows { step, layer, rows })
    }

    fn book(&self, flight: &InFlight, filled: &[Option<HostId>]) {
        let (layer, ids, jobs) = (flight.layer(), flight.ids(), flight.jobs());
        let mut state = self.state();
        let chosen = ids.len().checked_div(jobs.len()).unwrap_or(0);
        for job in jobs {
            if let Some(account) = state.accounts.get_mut(job) {
                account.chosen = u32::try_from(chosen).unwrap_or(u32::MAX);
                *account.layers.entry(layer).or_default() += 1;
            }
        }
        for (&expert, host) in ids.iter().zip(filled) {
            *state.routed.entry((layer, expert)).or_default() += 1;
            *state.heat.entry((layer, expert)).or_default() += 1;
            if let Some(member) = host.and_then(|host| state.members.get_mut(&host)) {
                *member.rows.entry((layer, expert)).or_default() += 1;
            }
            if let Some(host) = host {
                state.map.gave(*host, 1);
            }
        }
    }
}

#[async_trait]
impl Experts for ExpertGroup {
    async fn evaluate(&self, mut step: ExpertStep) -> Result<Vec<f32>, StepError> {
        let manifest = &self.config.manifest;
        let given = step.rows.len() as u64;
        step.rows = self
            .round(step.rows)
            .map_err(|_| StepError::BadStep(CallError::Width { given, width: manifest.n_embd }))?;
        let flight = InFlight::new(step, manifest.n_embd, manifest.experts).map_err(StepError::BadStep)?;
        let mut flight = flight.with_calls_of(self.config.call_bytes);
        let mut losses = 0;
        let mut pending = FuturesUnordered::new();
        for outgoing in self.open(&mut flight).await? {
            pending.push(self.call(outgoing));
        }
        for slot in self.draw_witnesses(flight.slots()) {
            let witness = flight.witness(slot, &self.state().map);
            pending.extend(witness.map(|outgoing| self.call(outgoing)));
        }
        while let Some((id, host, answer)) = pending.next().await {
            let mut wrong = BTreeSet::new();
            let reason = match answer {
                Ok(rows) => match flight.answer(id, rows) {
                    Ok(None) => None,
                    Ok(Some(dispute)) => {
                        let (layer, expert) = (dispute.question.layer, dispute.expert());
                        wrong.extend(self.judge(&dispute).await);
                        for liar in &wrong {
                            let statement = dispute.statement(&manifest.root, *liar);
                            let host = self.name(*liar);
                            self.config.observer.told(GroupEvent::Lied { host, layer, expert, statement });
                        }
                        if wrong.is_empty() {
                            let hosts = dispute.hosts.map(|host| self.name(host));
                            self.config.observer.told(GroupEvent::Suspects { hosts, layer, expert });
                        }
                        None
                    }
                    Err(error) => Some(error.to_string()),
                },
                Err(HostError::Refused(error)) => return Err(StepError::Refused { host: self.name(host), error }),
                Err(HostError::Unpaid) => return Err(StepError::Unpaid { host: self.name(host) }),
                Err(error) => Some(error.to_string()),
            };
            let mut again = Vec::new();
            if let Some(reason) = reason {
                losses += 1;
                self.dismiss(host, reason);
                let asked = flight.lost(id, &self.state().map);
                again = match asked {
                    Ok(again) => again,
                    Err(experts) if losses > MAX_LOSSES => {
                        let reason = Some(format!("{losses} hosts failed in one step"));
                        return Err(StepError::NoHost { layer: flight.layer(), experts, reason });
                    }
                    Err(_) => self.open(&mut flight).await?,
                };
            }
            for liar in wrong {
                self.dismiss(liar, "it returned wrong rows".to_owned());
                let asked = flight.distrust(liar, &self.state().map);
                match asked {
                    Ok(more) => again.extend(more),
                    Err(_) => again.extend(self.open(&mut flight).await?),
                }
            }
            pending.extend(again.into_iter().map(|outgoing| self.call(outgoing)));
        }
        drop(pending);
        self.book(&flight, flight.filled());
        Ok(flight.finish().0)
    }
}
