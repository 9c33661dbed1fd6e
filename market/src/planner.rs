//! Who is chosen for a demand, who comes next if that one fails, and why each other listing was not.
//!
//! Three steps, all of them a pure function of book, demand and our own records:
//!
//! 1. **Consider** every listing whose root is wanted, and (to explain) every listing that claims the wanted name.
//! 2. **Filter**: [`WhyNot`] names the first thing that rules a listing out.
//! 3. **Rank**: the user's order first, then what the demand sorts by, then the rest of price and speed, then our own
//!    history, then ids: a total order, so the same inputs give the same plan on every machine.
//!
//! A plan is a list of stages that together cover the model. Today the planner forms plans of one stage, the whole model
//! at one provider; a listing of layers or experts is answered with [`WhyNot::PartOnly`].

mod rank;
mod refusal;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use satgrid_types::{EngineProfile, ListingId, Msat, NodeKey, Part, UnixMs, VerifiedListing};
use thiserror::Error;

use crate::book::Book;
use crate::demand::{Demand, EngineIdentity, Wanted};
use crate::reputation::Reputation;
use rank::{Rank, rank};
use refusal::check;
pub use refusal::{PriceItem, WhyNot};

/// Plans kept beside the best one.
pub const MAX_FAILOVER: usize = 8;
/// Listings that one explanation tells of.
pub const MAX_CONSIDERED: usize = 1_000;

/// One provider's part in a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    pub part: Part,
    pub listing: Arc<VerifiedListing>,
    /// What this stage costs with the output that is expected.
    pub expected_cost: Msat,
    /// What it costs if all the output that was asked for is used.
    pub max_cost: Msat,
}

/// Stages that together run the whole model, in the order of the layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub stages: Vec<Stage>,
}

impl Plan {
    /// The only provider of a plan with one stage.
    pub fn sole(&self) -> Option<&Stage> {
        match self.stages.as_slice() {
            [stage] => Some(stage),
            _ => None,
        }
    }
}

/// The best plan and those to fall back on, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub best: Plan,
    /// Other providers only. Where the demand asks for the exact profile, those that repeat the best one's output
    /// token for token come first.
    pub failover: Vec<Plan>,
}

/// Nobody can serve the demand.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NoPlan {
    #[error("nobody lists this model")]
    NotListed,
    #[error("{}", summary(.considered, .reasons))]
    AllRefused { considered: usize, reasons: BTreeMap<&'static str, usize> },
}

fn summary(considered: &usize, reasons: &BTreeMap<&'static str, usize>) -> String {
    let counts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    format!("none of {considered} listings fits: {}", counts.join(", "))
}

/// A listing that was looked at, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Considered {
    pub listing: Arc<VerifiedListing>,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Place 1 is chosen, the others are fallen back on in this order (among different providers).
    Ranked {
        place: usize,
        expected_cost: Msat,
    },
    Refused(WhyNot),
}

/// Chooses. Errors say how many listings were looked at and what ruled them out.
pub fn plan(now: UnixMs, book: &Book, demand: &Demand, reputation: &Reputation) -> Result<Choice, NoPlan> {
    let mut reasons: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut considered = 0;
    let mut best_of: BTreeMap<NodeKey, Candidate<'_>> = BTreeMap::new();
    for listing in considered_for(book, demand) {
        considered += 1;
        match candidate(now, book, listing, demand, reputation) {
            Ok(candidate) => {
                let known = best_of.get(&listing.node_key);
                if known.is_none_or(|known| candidate.rank < known.rank) {
                    best_of.insert(listing.node_key, candidate);
                }
            }
            Err(why) => *reasons.entry(why.reason()).or_default() += 1,
        }
    }
    let mut candidates: Vec<Candidate<'_>> = best_of.into_values().collect();
    let Some(best) = candidates.iter().min_by(|a, b| a.rank.cmp(&b.rank)) else {
        return Err(if considered == 0 { NoPlan::NotListed } else { NoPlan::AllRefused { considered, reasons } });
    };
    let identity = EngineIdentity::of(best.listing);
    let exact = demand.profile == Some(EngineProfile::Exact);
    candidates.sort_by_cached_key(|candidate| {
        let differs = exact && EngineIdentity::of(candidate.listing) != identity;
        (differs, candidate.rank.clone())
    });
    let mut plans = candidates.into_iter().map(Candidate::into_plan);
    match plans.next() {
        Some(best) => Ok(Choice { best, failover: plans.take(MAX_FAILOVER).collect() }),
        None => Err(NoPlan::NotListed),
    }
}

/// Tells of every listing of the wanted model or name: its place, or why it was refused. Ranked ones come first.
pub fn explain(now: UnixMs, book: &Book, demand: &Demand, name: &str, reputation: &Reputation) -> Vec<Considered> {
    let mut all: BTreeMap<ListingId, &Arc<VerifiedListing>> =
        considered_for(book, demand).map(|listing| (listing.id(), listing)).collect();
    all.extend(book.claiming(name).map(|listing| (listing.id(), listing)));
    let mut ranked = Vec::new();
    let mut refused = Vec::new();
    for listing in all.into_values().take(MAX_CONSIDERED) {
        match candidate(now, book, listing, demand, reputation) {
            Ok(candidate) => ranked.push(candidate),
            Err(why) => refused.push(Considered { listing: listing.clone(), verdict: Verdict::Refused(why) }),
        }
    }
    ranked.sort_by(|a, b| a.rank.cmp(&b.rank));
    let ranked = ranked.into_iter().enumerate().map(|(index, candidate)| Considered {
        listing: candidate.listing.clone(),
        verdict: Verdict::Ranked { place: index + 1, expected_cost: candidate.expected_cost },
    });
    ranked.chain(refused).collect()
}

/// A listing that fits.
struct Candidate<'a> {
    listing: &'a Arc<VerifiedListing>,
    expected_cost: Msat,
    max_cost: Msat,
    rank: Rank,
}

impl Candidate<'_> {
    fn into_plan(self) -> Plan {
        Plan {
            stages: vec![Stage {
                part: Part::Whole,
                listing: self.listing.clone(),
                expected_cost: self.expected_cost,
                max_cost: self.max_cost,
            }],
        }
    }
}

fn considered_for<'a>(book: &'a Book, demand: &'a Demand) -> Box<dyn Iterator<Item = &'a Arc<VerifiedListing>> + 'a> {
    match &demand.wanted {
        Wanted::Roots(roots) => Box::new(roots.keys().flat_map(|root| book.with_root(root))),
        Wanted::ClaimedName(name) => Box::new(book.claiming(name)),
    }
}

fn candidate<'a>(
    now: UnixMs,
    book: &Book,
    listing: &'a Arc<VerifiedListing>,
    demand: &Demand,
    reputation: &Reputation,
) -> Result<Candidate<'a>, WhyNot> {
    let record = reputation.of_line(now, book.lineage(), &listing.node_key);
    let cost = check(now, listing, demand, &record)?;
    let rank = rank(now, listing, demand, &record, &cost);
    Ok(Candidate { listing, expected_cost: cost.expected_cost, max_cost: cost.max_cost, rank })
}
