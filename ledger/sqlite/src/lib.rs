//! The journal on SQLite: one writer with group commit, readers that never block it, proofs from stored tiles.
//!
//! | file | for |
//! |---|---|
//! | `journal` | [`SqliteJournal`]: what a node opens, once, for writing |
//! | `writer` | the task that numbers, chains and hashes, and commits many appends in one transaction |
//! | `scribe` | the thread that owns the writing connection |
//! | `reader` | [`SqliteReader`]: entries, checkpoints and proofs, also beside a running node |
//! | `keep` | checkpoints of others, and pruned bodies |
//! | `copy` | [`SqliteCopy`]: a journal of another database as a file |
//! | `keys` | [`KeyStore`]: API keys, what they may spend and what their calls cost |
//! | `figures` | [`FigureStore`]: which experts a lead's router chose, and how fast its workers answered |
//! | `paces` | [`StagePace`]: how fast those are whose layers a lead buys, beside what they list |
//! | `lock` | a second process is refused |
//! | `begin` | a transaction, also after one that a full disk ended |
//!
//! SQLite runs in WAL mode with `synchronous=FULL`: an append that returned is on the disk. This crate decides nothing
//! about money; it keeps the bytes that it is given.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod begin;
mod copy;
mod figures;
mod journal;
mod keep;
mod keys;
mod lock;
mod open;
mod paces;
mod reader;
mod scribe;
mod writer;

pub use copy::SqliteCopy;
pub use figures::{Cost, Costs, ExpertRows, FigureStore, read_figures};
pub use journal::{Options, SqliteJournal};
pub use keys::{
    CallEnd, CallRef, CallRow, CallState, HousePayment, InvoiceFor, InvoiceLimits, InvoiceRow, KeyError, KeyStore,
    NewCall, NewInvoice, OpenCall, RefundRow,
};
pub use open::OpenError;
pub use paces::{StagePace, read_paces};
pub use reader::SqliteReader;
