//! Checkpoints of others, pruned bodies, and copies beside a writer.

#![allow(clippy::unwrap_used)]

use satgrid_ledger::{
    Journal, JournalReader,
    journal::Witness,
    log::{FraudProof, SignedCheckpoint},
    testing::{
        World,
        conformance::{lets_go_of_bodies, numbered},
    },
};
use satgrid_ledger_sqlite::{SqliteJournal, SqliteReader};
use satgrid_types::{Digest, UnixMs, node_key};

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(future)
}

#[test]
fn a_second_history_is_found_among_what_was_heard() {
    let folder = tempfile::tempdir().unwrap();
    let key = World::example().provider.node;
    let note = |size, root| SignedCheckpoint::sign(size, Digest([root; 32]), &key);
    run(async {
        let journal = SqliteJournal::open(&folder.path().join("ledger.db")).await.unwrap();
        let hear = async |note: &SignedCheckpoint| journal.witness(note, UnixMs(1)).await.unwrap();
        assert_eq!(hear(&note(10, 1)).await, Witness::First);
        assert_eq!(hear(&note(10, 1)).await, Witness::Known);
        assert_eq!(hear(&note(20, 2)).await, Witness::Grown { from: Box::new(note(10, 1)) });
        assert_eq!(hear(&note(15, 3)).await, Witness::Grown { from: Box::new(note(10, 1)) });
        let Witness::Conflict { with } = hear(&note(20, 9)).await else { panic!("a conflict was expected") };
        let proof = FraudProof { one: with.note().into(), other: note(20, 9).note().into() };
        assert_eq!(proof.check(), Ok(node_key(&key)));
        // What is kept stays bounded, and the newest stay.
        for size in 100..300 {
            hear(&note(size, 4)).await;
        }
        let kept = journal.reader().witnessed(&node_key(&key)).await.unwrap();
        assert_eq!((kept.len(), kept[0].size), (64, 299));
        journal.close().await;
    });
}

#[test]
fn pruned_bodies_leave_their_leaves_and_the_books() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    run(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        let prune = async |bodies| journal.prune(bodies).await;
        let last = lets_go_of_bodies(&journal, journal.reader(), prune).await;
        // The journal goes on, also after a restart.
        journal.close().await;
        let journal = SqliteJournal::open(&path).await.unwrap();
        assert_eq!(journal.append(UnixMs(0), vec![numbered(1)]).await.unwrap()[0].prev, last);
        journal.close().await;
    });
}

#[test]
fn a_copy_is_whole_while_the_writer_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("ledger.db"), folder.path().join("copy.db"));
    run(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        let writer = {
            let journal = journal.clone();
            tokio::spawn(async move {
                for n in 0..300 {
                    journal.append(UnixMs(n), vec![numbered(n * 2), numbered(n * 2 + 1)]).await.unwrap();
                }
            })
        };
        let mut sizes = Vec::new();
        while !writer.is_finished() {
            SqliteReader::open(&path).await.unwrap().snapshot(&copy).await.unwrap();
            let reader = SqliteReader::open(&copy).await.unwrap();
            let head = reader.head().await.unwrap();
            assert_eq!(head.len % 2, 0, "an append is in it whole or not at all");
            // The tiles are of the same moment as the entries.
            reader.root(head.len).await.unwrap();
            sizes.push(head.len);
        }
        writer.await.unwrap();
        assert!(sizes.is_sorted());
        journal.close().await;
    });
}
