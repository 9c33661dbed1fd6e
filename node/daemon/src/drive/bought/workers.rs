//! Whom a lead buys experts of: who is in the group, who of them serves and who stands by, and who is out.
//!
//! | a worker is | its rows |
//! |---|---|
//! | serving | ordered at each job's begin; most of what nobody else holds, and its part of what it shares |
//! | standing by | only where nobody who serves holds the expert, and as a witness; ordered when first asked |
//! | out | none; in again once it lists again, or after `TRY_AGAIN` where it is needed; never, if it lied |

use super::{ConsumerMessage, PaidHost, TRY_AGAIN, running::Running};
use crate::drive::{hops::Outgoing, now};
use satgrid_engine::experts::{
    group::GroupEvent,
    map::{self, Pace},
};
use satgrid_market::experts::Role;
use satgrid_node::consumer::ConsumerEvent;
use satgrid_types::{ExpertSet, NodeKey, Part, UnixMs, VerifiedListing};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Roles are dealt anew so often, and whenever somebody comes or goes.
const CHOOSE_EVERY: Duration = Duration::from_secs(20);

/// Somebody who sells experts of the model.
pub(super) struct Worker {
    pub listing: Arc<VerifiedListing>,
    set: ExpertSet,
    pub hop: Option<Outgoing>,
    /// In the group.
    pub inside: bool,
    pub serves: bool,
    lost_at: Option<(UnixMs, Instant)>,
    pub lied: bool,
}

/// The name of a worker in the group.
pub(super) fn name_of(worker: &NodeKey) -> String {
    format!("worker {worker}")
}

impl Running {
    /// What happened in the group.
    pub(super) fn group(&mut self, event: GroupEvent) -> Vec<ConsumerMessage> {
        match event {
            GroupEvent::Out { host, .. } => {
                let found = self.workers.iter_mut().find(|(key, _)| name_of(key) == host);
                if let Some((_, worker)) = found {
                    (worker.inside, worker.lost_at) = (false, Some((now(), Instant::now())));
                    self.dealt = None;
                }
                Vec::new()
            }
            GroupEvent::Lied { host, statement, .. } => {
                let found = self.workers.keys().find(|key| name_of(key) == host).copied();
                let Some(liar) = found else { return Vec::new() };
                let mut orders = self.distrust(&liar);
                // Into the ledger, by name; and nothing is bought of it for a while, whatever it sells.
                orders.push(ConsumerMessage::Event(ConsumerEvent::WrongRows { worker: liar, statement }));
                orders
            }
            GroupEvent::Suspects { .. } | GroupEvent::Loaded { .. } => Vec::new(),
        }
    }

    /// It gave what is wrong: nothing more is ordered of it, and nothing signed beyond what came back.
    pub(super) fn distrust(&mut self, worker: &NodeKey) -> Vec<ConsumerMessage> {
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.lied = true;
        }
        Vec::new()
    }

    /// Takes in who sells and is not in the group.
    pub(super) fn admit(&mut self) {
        let mut demand = self.parts.demand.clone();
        demand.not.extend(self.workers.iter().filter(|(_, worker)| worker.lied).map(|(key, _)| *key));
        let (sellers, _) = self.parts.market.sellers_of_experts(&demand);
        for listing in sellers {
            let Part::Experts(set) = &listing.part else { continue };
            let (key, set) = (listing.node_key, set.clone());
            if let Some(worker) = self.workers.get_mut(&key) {
                let same = worker.set == set;
                worker.listing = Arc::clone(&listing);
                if worker.inside && !same {
                    self.parts.group.withdraw(&name_of(&key), "it holds other experts now");
                    worker.inside = false;
                }
                worker.set = set.clone();
                let back = worker.lost_at.is_none_or(|(at, since)| {
                    let listed_since = UnixMs::from_secs(listing.created_at()) > at;
                    listed_since || (since.elapsed() >= TRY_AGAIN && self.parts.group.ready().is_err())
                });
                if worker.inside || !back {
                    continue;
                }
            }
            self.take_in(key, &listing, set);
            self.dealt = None;
        }
        if self.dealt.is_none_or(|at| at.elapsed() >= CHOOSE_EVERY) {
            self.dealt = Some(Instant::now());
            self.deal_roles();
        }
        self.set_paces();
    }

    fn take_in(&mut self, key: NodeKey, listing: &Arc<VerifiedListing>, set: ExpertSet) {
        let name = name_of(&key);
        let host = Arc::new(PaidHost { worker: key, said: self.said.clone() });
        let claims = map::claims(self.parts.group.manifest(), &set);
        let admitted = self.parts.group.admit(&name, host, &claims, false);
        let worker = self.workers.entry(key).or_insert_with(|| {
            let (inside, serves, lost_at, lied) = (false, false, None, false);
            Worker { listing: Arc::clone(listing), set, hop: None, inside, serves, lost_at, lied }
        });
        match admitted {
            Ok(_) => {
                (worker.inside, worker.serves) = (true, true);
                let price = listing.rates.expert_row.map_or(0, |rate| rate.0);
                tracing::info!(
                    worker = %key.short(), experts = %map::list(&worker.set),
                    msat_per_million_rows = price, "experts are bought here"
                );
            }
            Err(error) => {
                worker.lied = true;
                tracing::error!(worker = %key.short(), %error, "experts cannot be bought here");
            }
        }
    }

    /// Who serves and who stands by, by what was counted and measured up to now.
    fn deal_roles(&mut self) {
        let inside = self.workers.iter().filter(|(_, worker)| worker.inside);
        let mut sellers: Vec<Arc<VerifiedListing>> = inside.map(|(_, worker)| Arc::clone(&worker.listing)).collect();
        sellers.sort_by_key(|listing| (listing.rates.expert_row, listing.node_key));
        let dealer = &self.parts.dealer;
        dealer.figures.begin_with(&self.parts.market.known(&self.parts.demand.root).links, &sellers);
        let (roles, split) = dealer.deal(&sellers);
        for (listing, role) in sellers.iter().zip(roles) {
            let Some(worker) = self.workers.get_mut(&listing.node_key) else { continue };
            let serves = role != Role::StandsBy;
            self.parts.group.set_standby(&name_of(&listing.node_key), !serves);
            if worker.serves != serves {
                tracing::info!(worker = %listing.node_key.short(), ?role, "its part in the group");
                worker.serves = serves;
            }
        }
        tracing::debug!(step_us = split.step_us(1), "the estimate for one stream");
    }

    /// Tells the group how fast each worker is.
    fn set_paces(&self) {
        let dealer = &self.parts.dealer;
        let row_bytes = f64::from(dealer.shape.row_bytes);
        for (key, worker) in self.workers.iter().filter(|(_, worker)| worker.inside) {
            let cost = dealer.figures.cost_of(&worker.listing);
            // A row goes up and another comes down; a row that several experts of one host want goes up once.
            let (call, row) = (cost.link.base + cost.work.base, cost.work.slope + 1.5 * cost.link.slope * row_bytes);
            let ns = |us: f64| (us * 1e3) as u64;
            self.parts.group.set_pace(&name_of(key), Pace { call_ns: ns(call), row_ns: ns(row).max(1) });
        }
    }
}
