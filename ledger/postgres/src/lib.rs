//! The journal on PostgreSQL, for a provider that outgrew one machine: the same port, the same bytes, the same log.
//!
//! | file | for |
//! |---|---|
//! | `journal` | [`PostgresJournal`]: what a node opens, once, for writing |
//! | `writer` | the task that owns the writing connection and commits many appends in one transaction |
//! | `reader` | [`PostgresReader`]: entries, checkpoints and proofs, also beside a running node |
//! | `keep` | checkpoints of others, and pruned bodies |
//! | `snapshot` | [`PostgresSnapshot`]: all rows as of one moment, for a copy |
//! | `open` | connecting, the one-writer lock, migrations |
//!
//! `synchronous_commit` is on: an append that returned is on the server's disk. A second writer is refused by an advisory
//! lock that the server drops with the connection. This crate decides nothing about money; it keeps the bytes it is given.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod journal;
mod keep;
mod open;
mod reader;
mod snapshot;
mod writer;

pub use journal::PostgresJournal;
pub use open::OpenError;
pub use reader::PostgresReader;
pub use snapshot::PostgresSnapshot;
