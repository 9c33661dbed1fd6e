//! Who owes whom, provably: signed statements, double entry, an append-only log, and the audit that checks them all.
//!
//! Pure: bytes and times come in as arguments, findings and totals go out. Storage is an adapter's work.
//!
//! | module | for |
//! |---|---|
//! | [`statements`] | what the two parties of a session sign |
//! | [`transfer`] | accounts and two-phase transfers, with deterministic ids |
//! | [`entry`] | evidence and transfers as one append-only, hash-chained record |
//! | [`books`] | balances and reservations, folded from entries |
//! | [`journal`] | the port behind which entries are durable |
//! | [`claim`] | what a provider owes on one session, as a file that proves it |
//! | [`retention`] | which bodies may go, when nothing of a session is open any more |
//! | [`keys`] | what an API client's key may spend, reserved before and posted after |
//! | [`log`] | RFC 6962 Merkle tree, proofs and signed checkpoints |
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![cfg_attr(
    not(test),
    deny(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, clippy::float_arithmetic)
)]
#![forbid(unsafe_code)]

pub mod audit;
pub mod books;
pub mod bundle;
pub mod claim;
pub mod entry;
pub mod journal;
pub mod keys;
pub mod log;
pub mod own;
pub mod retention;
pub mod statements;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transfer;

pub use books::{Books, BooksError, Hold, Sums};
pub use entry::{Draft, Entry, Evidence, Head};
pub use journal::{Journal, JournalError, JournalFuture, JournalReader, MemoryJournal};
pub use transfer::{Account, Transfer, TransferKind, TransferOp, attempt, end_id, transfer_id};
