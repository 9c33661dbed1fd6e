//! The audit: a fold over a bundle that trusts nothing in it.
//!
//! Every signature is verified strictly, every charge, chain, root and sum is recomputed, and every transfer is held
//! against the evidence beside it. What breaks a rule becomes a [`Finding`] and the fold goes on, so one report names
//! everything. Memory grows with open sessions, payment hashes and the ids of sessions that are over, not with entries.
//!
//! | part | checks |
//! |---|---|
//! | `fold` | the file, canonical bytes, sequence, chain, Merkle log, checkpoint |
//! | `evidence` | listings, quotes, openings; everything else is handed to its session |
//! | `session` | one session: requests, acknowledgements, close |
//! | `receipt` | receipts |
//! | `payments` | invoices, slices, refunds |
//! | `credit` | credit notes that are spent in other sessions |
//! | `flows` | two-phase rules, double entry, transfers against evidence |
//! | `stages` | a lead's receipts against its workers' |
//! | `cross` | both parties' exports of the same sessions |

mod credit;
mod cross;
mod evidence;
mod finding;
mod flows;
mod fold;
mod invoice;
mod payments;
mod receipt;
mod session;
mod stages;

pub use cross::cross_check;
pub use finding::*;
pub use fold::{Auditor, Detail, audit};
pub use invoice::{InvoiceFacts, MAX_BOLT11_LEN, read_invoice};

#[cfg(test)]
pub(crate) mod tests;
