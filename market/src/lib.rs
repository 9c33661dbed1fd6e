//! Who sells what, and who is chosen.
//!
//! - [`book`]: the verified listings that are live, and how a newer one replaces an older.
//! - [`catalogue`]: which model root a name stands for.
//! - [`estimate`]: tokens a second of a model that is run whole, by layers or by experts.
//! - [`experts`]: who sells the experts of a model, and whose the lead buys.
//! - [`layers`]: layers of a model, cut over those who sell them.
//! - [`links`]: how far nodes are from each other, as they measured it.
//! - [`demand`]: what one request needs, and at what price.
//! - [`lineage`]: keys that were given up, and who came after them.
//! - [`paces`]: how fast workers of a ring really are, beside what they list.
//! - [`planner`]: the choice, its failover order, and a reason for every listing that was not chosen.
//! - [`reputation`]: what this node itself has settled with a provider, and what it holds against it.
//! - [`ways`]: a model whole, by layers or by experts, and which is fastest.
//!
//! What this room never does: believe a listing that nobody verified, listen to what others say of a provider, or look at
//! a clock. Receipts between strangers weigh nothing here, because paying oneself is free.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]

pub mod book;
pub mod catalogue;
pub mod demand;
pub mod estimate;
pub mod experts;
pub mod layers;
pub mod lineage;
pub mod links;
pub mod paces;
pub mod planner;
pub mod reputation;
#[cfg(test)]
mod testing;
pub mod ways;

pub use book::{Applied, Book, BookLimits, BookRefusal};
pub use catalogue::{Catalogue, CatalogueError, Model, UnknownModel};
pub use demand::{Demand, MaxPrice, ProviderPattern, Sort, Wanted};
pub use lineage::{Fate, LastWord, Lineage, LineageRefusal};
pub use links::{HOP_US, Hop, Links};
pub use planner::{Choice, Considered, NoPlan, Plan, Stage, Verdict, WhyNot, explain, plan};
pub use reputation::{Fault, Record, Reputation};
