//! What a ring asks of the market: who could take a worker's place, how long a trip should take, and where to put what was
//! measured of a worker. Measurements go to the market view, for plans, and to the ledger's database, for the next start
//! and for `satgrid market why`.

use super::{market::Market, now, ring::Planned};
use satgrid_ledger_sqlite::{FigureStore, StagePace};
use satgrid_market::{
    layers::{LayerDemand, listed_us},
    paces::{Own, Pace, is_suspicious},
};
use satgrid_types::{LayerRange, ModelRoot, NodeKey, VerifiedListing};
use std::{collections::BTreeSet, sync::Arc};

/// What is measured counts at the least as this part of what is listed.
const FASTEST: u64 = 4;

/// The market, for one ring.
pub(crate) struct Scout {
    pub market: Market,
    /// What the lead asks of the market as a whole.
    pub demand: LayerDemand,
    pub store: Option<Arc<FigureStore>>,
}

impl Scout {
    /// The best seller of a stage between these two neighbours, none of those: who sells it now, where that is the best.
    pub(crate) fn replace(
        &self,
        stage: &Planned,
        ends: (NodeKey, NodeKey),
        avoid: &BTreeSet<NodeKey>,
    ) -> Option<Arc<VerifiedListing>> {
        let demand = LayerDemand {
            range: stage.range,
            ends,
            not: self.demand.not.union(avoid).copied().collect(),
            build: Some((stage.listing.build, stage.listing.instruction_set.clone())),
            ..self.demand.clone()
        };
        let found = self.market.plan_layers(&demand).ok()?;
        // The ring's tiling stands: one worker for the very range.
        match found.stages.as_slice() {
            [only] if only.range == stage.range => Some(only.listing.clone()),
            _ => None,
        }
    }

    /// Whether workers are to be measured one by one: the least trip is longer than they list, or one of them was measured
    /// before and may have mended.
    pub(crate) fn suspects(&self, plan: &[Planned], trip_us: u64) -> bool {
        let known = self.market.known(&self.demand.root);
        let (first, last) = self.demand.ends;
        let nodes = || plan.iter().map(|stage| &stage.listing.node_key);
        let hops = [&first].into_iter().chain(nodes()).zip(nodes().chain([&last]));
        let way: u64 = hops.map(|(from, to)| known.links.hop(from, to).us()).sum();
        let listed: u64 = plan.iter().map(|stage| listed_us(&stage.listing, &stage.range)).sum();
        let watched = |stage: &Planned| known.paces.of(now(), &stage.listing.node_key, &stage.range).is_some();
        is_suspicious(way.saturating_add(listed), trip_us) || plan.iter().any(watched)
    }

    /// Whether noise alone keeps some worker's listing believed.
    pub(crate) fn doubts(&self, plan: &[Planned], times: &[Own]) -> bool {
        plan.iter().zip(times).any(|(stage, own)| own.is_doubtful(listed_us(&stage.listing, &stage.range)))
    }

    /// A worker's layers took so long. Whether it lists a speed that it does not have.
    pub(crate) fn measured(&self, stage: &Planned, own: Own) -> bool {
        let (node, listed) = (stage.listing.node_key, listed_us(&stage.listing, &stage.range));
        // So much faster than it measured itself is nobody: that is noise.
        let us = own.beside(listed).max(listed / FASTEST);
        let pace = self.market.paced(self.demand.root, node, &stage.range, listed, us);
        let lies = pace.lies > 0;
        if lies {
            tracing::warn!(
                worker = %node.short(), layers = %stage.range, listed_us = listed, measured_us = us, times = pace.lies,
                "a worker is slower than it lists"
            );
        } else {
            tracing::info!(
                worker = %node.short(), layers = %stage.range, listed_us = listed, measured_us = us,
                "a worker was measured"
            );
        }
        if let Some(store) = self.store.clone() {
            let (model, kept) = (self.demand.root.0, kept_of(node, &stage.range, &pace));
            tokio::spawn(async move {
                if let Err(error) = store.keep_pace(model, &kept).await {
                    tracing::warn!(%error, "a worker's measured pace cannot be kept");
                }
            });
        }
        lies
    }
}

fn kept_of(node: NodeKey, range: &LayerRange, pace: &Pace) -> StagePace {
    let Pace { listed_us, measured_us, lies, at } = *pace;
    StagePace { node: node.0, first: range.start(), beyond: range.end(), listed_us, measured_us, lies, at }
}

/// Takes what was measured before into the market view.
pub(crate) fn recall(market: &Market, root: ModelRoot, kept: Vec<StagePace>) {
    for one in kept {
        let StagePace { node, first, beyond, listed_us, measured_us, lies, at } = one;
        if let Some(range) = LayerRange::new(first, beyond) {
            market.keep_pace(root, NodeKey(node), &range, Pace { listed_us, measured_us, lies, at });
        }
    }
}
