//! Bundles of a test world, honest or tampered with by an exporter who re-chains and re-signs.

use crate::{
    bundle::{BundleWriter, Filter, Header, Selector},
    entry::{Draft, Entry, Head},
    log::{MemoryTiles, SignedCheckpoint, inclusion_proof, leaf_hash, root_at},
};
use ed25519_dalek::SigningKey;
use satgrid_types::{UnixMs, node_key};

/// Chains drafts with their times anew, as a journal would.
pub fn chain_entries(drafts: impl IntoIterator<Item = (UnixMs, Draft)>) -> Vec<Entry> {
    let mut head = Head::EMPTY;
    let chain = |(at, draft)| {
        let entry = Entry::chain(&head, at, draft);
        head = entry.head();
        entry
    };
    drafts.into_iter().map(chain).collect()
}

/// The drafts of entries, with their times.
pub fn drafts_of(entries: &[Entry]) -> Vec<(UnixMs, Draft)> {
    entries.iter().map(|entry| (entry.at, entry.draft())).collect()
}

/// The log over these entries.
pub fn tiles_of(entries: &[Entry]) -> MemoryTiles {
    let mut tiles = MemoryTiles::default();
    entries.iter().for_each(|entry| tiles.push(leaf_hash(&entry.bytes())));
    tiles
}

/// A checkpoint over these entries.
pub fn checkpoint_of(entries: &[Entry], key: &SigningKey) -> SignedCheckpoint {
    let mut tiles = tiles_of(entries);
    let size = tiles.size();
    // Reading a log in memory cannot fail.
    let Ok(root) = root_at(size, &mut tiles);
    SignedCheckpoint::sign(size, root, key)
}

/// The bundle of these entries, with a checkpoint by `key`.
pub fn bundle_of(entries: &[Entry], key: &SigningKey, filter: Filter, redact: bool) -> Vec<u8> {
    let checkpoint = checkpoint_of(entries, key);
    let mut tiles = tiles_of(entries);
    let mut selector = Selector::new(filter);
    entries.iter().for_each(|entry| selector.observe(entry));
    let mut selection = selector.select();
    let header = Header::new(node_key(key), filter);
    let mut writer = BundleWriter::start(Vec::new(), &header, &checkpoint).expect("memory is writable");
    for entry in entries {
        if selection.wants(entry) {
            let proof = (filter != Filter::All)
                .then(|| inclusion_proof(entry.seq, checkpoint.size, &mut tiles).expect("the entry exists"));
            writer.entry(entry, redact, proof).expect("memory is writable");
        }
    }
    writer.finish().expect("memory is writable")
}
