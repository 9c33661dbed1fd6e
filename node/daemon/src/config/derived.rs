//! What follows from the configuration: which roles it gives a node, what its door sells, how much runs at once. A pure function
//! of it: opens and reads nothing else.

use super::types::{Config, DoorSells, Provider, Role};

/// Where it is not configured, one consumer may always have so many requests open.
const LEAST_REQUESTS_PER_PEER: u32 = 16;

impl Config {
    pub(crate) fn is_provider(&self) -> bool {
        self.node.roles.contains(&Role::Provider)
    }

    pub(crate) fn is_consumer(&self) -> bool {
        self.node.roles.contains(&Role::Consumer)
    }

    /// How many requests run at once, of each thing that is for sale.
    pub(crate) fn slots(&self) -> impl Iterator<Item = u32> {
        let Provider { models, stages, packs, leads, .. } = &self.provider;
        let whole = models.iter().map(|model| model.slots).chain(leads.iter().map(|lead| lead.slots));
        whole.chain(stages.iter().map(|stage| stage.slots)).chain(packs.iter().map(|pack| pack.slots))
    }

    /// Open requests of one consumer: what is configured, else twice as many as run at once of anything for sale, so that one
    /// consumer can use an idle provider whole while what it had before is being settled, and enough for one that sells little.
    pub(crate) fn requests_per_peer(&self) -> u32 {
        match self.provider.requests_per_peer {
            0 => self.slots().max().unwrap_or(0).saturating_mul(2).max(LEAST_REQUESTS_PER_PEER),
            asked => asked,
        }
    }

    /// What the front door sells, if it is open.
    pub(crate) fn door_sells(&self) -> DoorSells {
        match self.door.sells.as_deref() {
            Some("own") => DoorSells::Own,
            Some(_) => DoorSells::Market,
            None if self.is_provider() => DoorSells::Own,
            None => DoorSells::Market,
        }
    }

    /// Whether a house buys this provider's own models for strangers.
    pub(crate) fn has_house(&self) -> bool {
        self.door.listen.is_some() && self.door_sells() == DoorSells::Own
    }
}
