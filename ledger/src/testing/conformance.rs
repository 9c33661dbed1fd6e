//! What every journal does, as cases that run on any implementation of the port.
//!
//! Each case gets a journal of its own, empty. Use: open one, run the case to its end, throw the journal away.

use super::World;
use crate::{
    Books,
    entry::{Draft, Entry, Evidence, Head},
    journal::{Journal, JournalError, JournalReader, MAX_APPEND, MAX_READ, named_by},
    log::{MemoryTiles, root_at, verify_consistency, verify_inclusion},
    retention::Retention,
};
use core::{future::Future, pin::Pin};
use satgrid_types::{Digest, Msat, UnixMs};
use std::collections::BTreeSet;

/// A case on a journal.
pub type Case = for<'a> fn(&'a dyn Journal) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// All cases, by name.
pub const CASES: &[(&str, Case)] = &[
    ("empty", |journal| Box::pin(empty(journal))),
    ("numbers_and_chains", |journal| Box::pin(numbers_and_chains(journal))),
    ("keeps_what_it_was_given", |journal| Box::pin(keeps_what_it_was_given(journal))),
    ("time_stands_still", |journal| Box::pin(time_stands_still(journal))),
    ("limits", |journal| Box::pin(limits(journal))),
    ("reads_in_pieces", |journal| Box::pin(reads_in_pieces(journal))),
];

/// A case on a journal and the reader beside it.
pub type ReaderCase =
    for<'a> fn(&'a dyn Journal, &'a dyn JournalReader) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// What every stored journal's reader does.
pub const READER_CASES: &[(&str, ReaderCase)] = &[
    ("reads_what_was_appended", |journal, reader| Box::pin(reads_what_was_appended(journal, reader))),
    ("proves_from_its_tiles", |journal, reader| Box::pin(proves_from_its_tiles(journal, reader))),
    ("knows_what_its_entries_name", |journal, reader| Box::pin(knows_what_its_entries_name(journal, reader))),
];

/// A draft that says nothing but a number.
pub fn numbered(n: u64) -> Draft {
    Draft::of(Evidence::WalletSnapshot { lightning_msat: Msat(n), onchain_msat: Msat::ZERO })
}

/// Numbers run from 0 and each entry is chained to the one before.
pub fn assert_chained(entries: &[Entry]) {
    let mut head = Head::EMPTY;
    for entry in entries {
        assert_eq!((entry.seq, entry.prev), (head.len, head.last), "entry {}", entry.seq);
        assert!(entry.at >= head.at, "entry {}", entry.seq);
        head = entry.head();
    }
}

async fn reads_what_was_appended(journal: &dyn Journal, reader: &dyn JournalReader) {
    assert_eq!(reader.head().await, Ok(Head::EMPTY));
    assert_eq!(reader.checkpoint(10).await, Ok(None));
    let world = World::example();
    for entry in world.consumer.journal.entries() {
        journal.append(entry.at, vec![entry.draft()]).await.expect("appended");
        assert_eq!(reader.head().await, Ok(entry.head()), "what is durable is seen at once");
    }
    assert_eq!(reader.read(0, MAX_READ).await, Ok(world.consumer.journal.entries()));
    assert_eq!(reader.pruned(0, u64::MAX).await, Ok(Vec::new()));
    assert_eq!(reader.witnessed(satgrid_types::NodeKey([1; 32])).await, Ok(Vec::new()));
}

async fn knows_what_its_entries_name(journal: &dyn Journal, reader: &dyn JournalReader) {
    let other = |n: u16| Digest([n.to_be_bytes(); 16].concat().try_into().expect("32 bytes"));
    assert_eq!(reader.named(vec![other(1)]).await, Ok(Vec::new()));
    let world = World::example();
    let mut named = BTreeSet::new();
    for entry in world.consumer.journal.entries() {
        journal.append(entry.at, vec![entry.draft()]).await.expect("appended");
        if let Some(name) = named_by(&entry) {
            assert_eq!(reader.named(vec![other(1), name]).await, Ok(vec![name]), "what is durable is known at once");
            named.insert(name);
        }
    }
    assert!(named.len() >= 2, "the example names payments");
    let asked: Vec<Digest> = (0..600).map(other).chain(named.iter().copied()).collect();
    let found = reader.named(asked).await.expect("an answer");
    assert_eq!((found.len(), found.into_iter().collect()), (named.len(), named));
}

async fn proves_from_its_tiles(journal: &dyn Journal, reader: &dyn JournalReader) {
    let (mut tiles, mut entries) = (MemoryTiles::default(), Vec::new());
    for count in [1, 254, 1, 1, 300, 43] {
        let added = journal.append(UnixMs(1), (0..count).map(numbered).collect()).await.expect("appended");
        added.iter().for_each(|entry| tiles.push(entry.leaf()));
        entries.extend(added);
        let size = tiles.size();
        let root = reader.root(size).await.expect("a root");
        assert_eq!(root_at(size, &mut tiles), Ok(root));
        for index in [0, size / 2, size.saturating_sub(1)] {
            let proof = reader.prove_inclusion(index, size).await.expect("a proof");
            let leaf = entries[usize::try_from(index).expect("small")].leaf();
            assert!(verify_inclusion(&leaf, index, size, &proof, &root), "{index} of {size}");
        }
        for old in [1, size / 2, size] {
            let old_root = reader.root(old).await.expect("a root");
            let proof = reader.prove_consistency(old, size).await.expect("a proof");
            assert!(verify_consistency(old, size, &old_root, &root, &proof), "{old} to {size}");
        }
        assert!(reader.prove_inclusion(size, size).await.is_err());
        assert!(reader.prove_consistency(size.saturating_add(1), size).await.is_err());
    }
}

/// What every stored journal does that lets go of bodies. Gives the leaf that its next entry is chained to.
pub async fn lets_go_of_bodies(
    journal: &dyn Journal,
    reader: &dyn JournalReader,
    prune: impl AsyncFn(Vec<u64>) -> Result<u64, JournalError>,
) -> Digest {
    let entries = World::example().provider.journal.entries();
    for entry in &entries {
        journal.append(entry.at, vec![entry.draft()]).await.expect("appended");
    }
    let size = entries.len() as u64;
    let root = reader.root(size).await.expect("a root");
    let mut retention = Retention::new();
    entries.iter().for_each(|entry| retention.observe(entry).expect("books"));
    let mut gone = retention.finish(UnixMs(u64::MAX));
    assert!(!gone.is_empty());
    let count = gone.len() as u64;
    // Asked for as well, and refused: the next entry is chained to it.
    gone.push(size.saturating_sub(1));
    assert_eq!(prune(gone.clone()).await, Ok(count));
    assert_eq!(prune(gone.clone()).await, Ok(0), "once");
    gone.pop();
    assert_eq!(reader.pruned(0, size).await, Ok(gone.clone()));
    assert_eq!(reader.root(size).await, Ok(root));
    let books = |entries: &[Entry]| {
        let mut books = Books::new();
        entries.iter().for_each(|entry| books.apply(entry.at, &entry.draft()).expect("books"));
        books.accounts().map(|(account, sums)| (*account, *sums)).collect::<Vec<_>>()
    };
    let left = reader.read(0, MAX_READ).await.expect("read");
    assert_eq!((left.len(), books(&left)), (entries.len(), books(&entries)));
    for (before, after) in entries.iter().zip(&left) {
        if gone.contains(&before.seq) {
            assert_eq!((after.evidence.clone(), &after.transfers), (None, &before.transfers));
            let proof = reader.prove_inclusion(before.seq, size).await.expect("a proof");
            assert!(verify_inclusion(&before.leaf(), before.seq, size, &proof, &root), "the leaf stayed");
        } else {
            assert_eq!(after, before);
        }
    }
    assert!(left.iter().any(|entry| matches!(entry.evidence, Some(Evidence::Close(_)))));
    entries.last().expect("entries").leaf()
}

async fn empty(journal: &dyn Journal) {
    assert_eq!(journal.head().await, Ok(Head::EMPTY));
    assert_eq!(journal.read(0, 10).await, Ok(Vec::new()));
    assert_eq!(journal.append(UnixMs(1), Vec::new()).await, Ok(Vec::new()));
    assert_eq!(journal.head().await, Ok(Head::EMPTY));
}

async fn numbers_and_chains(journal: &dyn Journal) {
    let first = journal.append(UnixMs(5), vec![numbered(0)]).await.expect("appended");
    let more = journal.append(UnixMs(6), (1..300).map(numbered).collect()).await.expect("appended");
    let all = journal.read(0, MAX_READ).await.expect("read");
    assert_eq!(all, [first, more].concat());
    assert_eq!(all.len(), 300);
    assert_chained(&all);
    assert_eq!(journal.head().await, Ok(all.last().expect("300 entries").head()));
}

async fn keeps_what_it_was_given(journal: &dyn Journal) {
    let world = World::example();
    for entry in world.provider.journal.entries() {
        let appended = journal.append(entry.at, vec![entry.draft()]).await;
        assert_eq!(appended, Ok(vec![entry]), "bytes, chain and private fields are the same in every journal");
    }
    assert_eq!(journal.read(0, MAX_READ).await, Ok(world.provider.journal.entries()));
}

async fn time_stands_still(journal: &dyn Journal) {
    journal.append(UnixMs(100), vec![numbered(0)]).await.expect("appended");
    let back = journal.append(UnixMs(50), vec![numbered(1)]).await.expect("appended");
    assert_eq!(back[0].at, UnixMs(100), "a clock that was set back is held");
    let on = journal.append(UnixMs(150), vec![numbered(2)]).await.expect("appended");
    assert_eq!(on[0].at, UnixMs(150));
}

async fn limits(journal: &dyn Journal) {
    let many = journal.append(UnixMs(1), vec![numbered(0); MAX_APPEND.saturating_add(1)]).await;
    assert!(matches!(many, Err(JournalError::Limit { .. })), "{many:?}");
    let long = Draft::of(Evidence::Checkpoint { note: "x".repeat(crate::entry::MAX_ENTRY_LEN) });
    let refused = journal.append(UnixMs(1), vec![numbered(0), long]).await;
    assert!(matches!(refused, Err(JournalError::Limit { .. })), "{refused:?}");
    assert_eq!(journal.head().await, Ok(Head::EMPTY), "a refused append leaves nothing behind");
    assert!(journal.append(UnixMs(1), vec![numbered(0)]).await.is_ok());
}

async fn reads_in_pieces(journal: &dyn Journal) {
    journal.append(UnixMs(1), (0..10).map(numbered).collect()).await.expect("appended");
    let numbers = |entries: Vec<Entry>| entries.iter().map(|entry| entry.seq).collect::<Vec<_>>();
    assert_eq!(journal.read(3, 4).await.map(numbers), Ok(vec![3, 4, 5, 6]));
    assert_eq!(journal.read(8, 4).await.map(numbers), Ok(vec![8, 9]));
    assert_eq!(journal.read(10, 4).await.map(numbers), Ok(vec![]));
    assert_eq!(journal.read(0, 0).await.map(numbers), Ok(vec![]));
    assert_eq!(journal.read(u64::MAX, 4).await.map(numbers), Ok(vec![]));
}
