//! A small, valid world for tests, vectors and benches: two parties with real keys, a listing, sessions with real signed
//! invoices, acknowledgements, receipts and refunds, journalled on both sides as the roles journal them.
//!
//! Deterministic: the same calls give the same bytes. Not for production: keys are derived from small numbers.

mod bundles;
pub mod conformance;
mod lead;
mod party;
mod rotation;
mod world;

pub use bundles::*;
pub use lead::*;
pub use party::*;
pub use rotation::*;
pub use world::*;
