//! The built binary, and a folder with both parties' journals.

use satgrid_ledger::{
    Journal,
    testing::{Party, World},
};
use satgrid_ledger_sqlite::SqliteJournal;
use serde_json::Value;
use std::{path::PathBuf, process::Command};

/// What a run said, and its exit code.
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) fn ledger(args: &[&str]) -> Said {
    let out = Command::new(env!("CARGO_BIN_EXE_satgrid-ledger")).args(args).output().unwrap();
    Said {
        code: out.status.code().unwrap(),
        out: String::from_utf8(out.stdout).unwrap(),
        err: String::from_utf8(out.stderr).unwrap(),
    }
}

pub(crate) fn json(args: &[&str]) -> Value {
    let said = ledger(&[args, &["--format", "json"]].concat());
    serde_json::from_str(&said.out).unwrap_or_else(|e| panic!("{e}: {} {}", said.out, said.err))
}

/// A folder with both parties' journals, each under a checkpoint.
pub(crate) struct Fixture {
    pub(crate) world: World,
    folder: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        Fixture::of(World::example())
    }
    pub(crate) fn of(world: World) -> Fixture {
        let fixture = Fixture { world, folder: tempfile::tempdir().unwrap() };
        fixture.journal("provider.db", &fixture.world.provider, true);
        fixture.journal("consumer.db", &fixture.world.consumer, true);
        fixture
    }
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
    pub(crate) fn journal(&self, name: &str, party: &Party, sealed: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let journal = SqliteJournal::open(&self.path(name)).await.unwrap();
            for entry in party.journal.entries() {
                journal.append(entry.at, vec![entry.draft()]).await.unwrap();
            }
            if sealed {
                journal.checkpoint(&party.node).await.unwrap();
            }
            journal.close().await;
        });
    }
    pub(crate) fn export(&self, db: &str, out: &str, more: &[&str]) -> Said {
        ledger(&[&["export", "--db", &self.text(db), "--out", &self.text(out)], more].concat())
    }
}
