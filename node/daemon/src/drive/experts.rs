//! The experts of a trunk that this node leads: packs in processes of their own, and a spare for those that are lost.
//!
//! | a pack's process | what follows                                                                                      |
//! |------------------|---------------------------------------------------------------------------------------------------|
//! | serves           | its rows are used                                                                                 |
//! | died             | its rows of the step go to a replica or to the spare; when it serves again it is taken in again    |
//! | lied             | its rows are not used, and it is not taken in again until the node starts anew                     |

use super::engines::worker_program;
use crate::config::ExpertSources;
use crate::failure::HintExt;
use anyhow::Context;
use async_trait::async_trait;
use satgrid_engine::experts::call::MAX_CALL_BYTES;
use satgrid_engine::experts::group::{ExpertGroup, GroupConfig, GroupEvent, Observer, Spare};
use satgrid_engine::experts::{ExpertHost, Manifest, map};
use satgrid_engine::port::Profile;
use satgrid_engine_llama::{LlamaExperts, PackSettings};
use satgrid_types::{ExpertSet, LayerRange};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;

/// How packs of this node's own run beside their trunk.
#[derive(Debug, Clone)]
pub(crate) struct Beside {
    pub profile: Profile,
    /// The trunk's.
    pub threads: u32,
    pub device: Option<String>,
}

/// Starts the packs of a trunk and gives the group that finds the rows of its experts, and what happens in it beside these
/// packs. Where no experts are bought it is complete, or an error that lists what is missing. `layers`: those of a stage.
pub(crate) async fn group(
    sources: &ExpertSources<'_>,
    beside: &Beside,
    manifest: Manifest,
    layers: Option<LayerRange>,
) -> anyhow::Result<(Arc<ExpertGroup>, mpsc::UnboundedReceiver<GroupEvent>)> {
    // All packs compute at the same time: threads that have no core of their own only hold up the others.
    let packs = u32::try_from(sources.packs.len()).unwrap_or(u32::MAX).max(1);
    let threads = (beside.threads / packs).max(1);
    let pack_settings = |pack: &PathBuf, only| PackSettings {
        pack: pack.clone(),
        only,
        profile: beside.profile,
        threads,
        device: beside.device.clone(),
    };
    let from_disk = |pack| Arc::new(FromDisk { settings: pack_settings(pack, None) }) as Arc<dyn Spare>;
    let spare = sources.spare.map(from_disk);
    let (events, heard) = mpsc::unbounded_channel();
    let root = manifest.root;
    let group = Arc::new(ExpertGroup::new(GroupConfig {
        manifest,
        layers,
        spare,
        observer: Arc::new(Tell(events)),
        witness_per_million: sources.witness_per_million,
        seed: super::fresh_seed(),
        wire: sources.wire.wire_type(),
        call_bytes: if sources.buys { satgrid_protocol::experts::MAX_CALL_BYTES } else { MAX_CALL_BYTES },
    }));
    let mut packs = BTreeMap::new();
    for path in sources.packs {
        let host = LlamaExperts::spawn(worker_program()?, pack_settings(path, None), |_| {}).await?;
        if host.facts().model_root != root {
            return Err(anyhow::anyhow!("{} is a pack of another model", path.display()))
                .hint("make trunk and packs from one file: satgrid models split --experts");
        }
        let name = path.display().to_string();
        // Another process than the lead's engine, but the same owner: what it says is believed.
        group.admit(&name, host.clone(), &host.claims(), true).with_context(|| format!("{name} cannot be used"))?;
        tracing::info!(
            pack = %name, experts = host.facts().experts.len(), bytes = host.facts().bytes,
            rows_per_s = host.facts().millirows_per_s / 1_000, "experts are up"
        );
        packs.insert(name, host);
    }
    if !sources.buys {
        group
            .ready()
            .hint("name packs with these experts in `experts`, or a pack with all of them in `spare_experts`")?;
    }
    let (others, elsewhere) = mpsc::unbounded_channel();
    tokio::spawn(mind(Arc::downgrade(&group), packs, heard, others));
    Ok((group, elsewhere))
}

/// Loads experts from a pack on this machine, in a process of their own.
struct FromDisk {
    settings: PackSettings,
}

#[async_trait]
impl Spare for FromDisk {
    async fn load(&self, experts: ExpertSet) -> Result<Arc<dyn ExpertHost>, String> {
        let program = worker_program().map_err(|error| format!("{error:#}"))?;
        tracing::warn!(experts = %map::list(&experts), "loading experts that nobody else holds");
        let settings = PackSettings { only: Some(experts), ..self.settings.clone() };
        let host = LlamaExperts::spawn(program, settings, |_| {}).await.map_err(|error| error.to_string())?;
        Ok(host)
    }
}

/// Hands what happens to the task that minds the packs.
struct Tell(mpsc::UnboundedSender<GroupEvent>);

impl Observer for Tell {
    fn told(&self, event: GroupEvent) {
        // The task ends with the group.
        let _ = self.0.send(event);
    }
}

/// Logs what happens, and takes a pack in again when its process serves again.
async fn mind(
    group: std::sync::Weak<ExpertGroup>,
    packs: BTreeMap<String, Arc<LlamaExperts>>,
    mut heard: mpsc::UnboundedReceiver<GroupEvent>,
    others: mpsc::UnboundedSender<GroupEvent>,
) {
    let mut liars = BTreeSet::new();
    while let Some(event) = heard.recv().await {
        // Nobody listens where no experts are bought.
        let _ = others.send(event.clone());
        match event {
            GroupEvent::Lied { host, layer, expert, .. } => {
                tracing::error!(%host, layer, expert, "returned wrong rows: a witness computed others");
                liars.insert(host);
            }
            GroupEvent::Suspects { hosts: [a, b], layer, expert } => {
                tracing::error!(%a, %b, layer, expert, "returned different rows, and nobody could tell who is right");
            }
            GroupEvent::Loaded { experts } => {
                tracing::warn!(experts, "experts without a holder are evaluated here now")
            }
            GroupEvent::Out { host, reason } => {
                tracing::error!(%host, reason, "experts are out");
                let Some(pack) = packs.get(&host).filter(|_| !liars.contains(&host)).cloned() else { continue };
                let group = group.clone();
                tokio::spawn(async move {
                    if !pack.until_up().await {
                        return;
                    }
                    let Some(group) = group.upgrade() else { return };
                    match group.admit(&host, pack.clone(), &pack.claims(), true) {
                        Ok(_) => tracing::info!(%host, "experts are back"),
                        Err(error) => tracing::error!(%host, %error, "experts cannot be used again"),
                    }
                });
            }
        }
    }
}
