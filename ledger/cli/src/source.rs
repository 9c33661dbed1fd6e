//! Where entries come from: a journal, or an exported file.

use anyhow::{Context, bail};
use satgrid_ledger::{
    bundle::{BundleReader, Opened, open},
    entry::Entry,
    journal::MAX_READ,
    statements::ReceiptOpening,
};
use satgrid_ledger_sqlite::SqliteReader;
use satgrid_types::cbor;
use std::{
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

/// How a SQLite file begins.
const SQLITE_MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Something that holds entries.
pub(crate) enum Source {
    Journal { reader: SqliteReader, next: u64 },
    Bundle(Box<BundleReader<BufReader<File>>>),
}

pub(crate) fn open_file(path: &Path) -> anyhow::Result<BufReader<File>> {
    Ok(BufReader::with_capacity(1 << 20, File::open(path).with_context(|| path.display().to_string())?))
}

impl Source {
    /// Opens a file by what it is.
    pub(crate) async fn open(path: &Path) -> anyhow::Result<Source> {
        let mut magic = [0; 16];
        let begins = open_file(path)?.read_exact(&mut magic);
        // A journal whose first pages are still in its WAL is empty on disk.
        let empty = std::fs::metadata(path).is_ok_and(|meta| meta.len() == 0);
        if empty || (begins.is_ok() && magic == *SQLITE_MAGIC) {
            return Ok(Source::Journal { reader: SqliteReader::open(path).await?, next: 0 });
        }
        match open(open_file(path)?).with_context(|| path.display().to_string())? {
            Opened::Journal(reader) => Ok(Source::Bundle(Box::new(reader))),
            Opened::Fraud(_) | Opened::Claim(_) => {
                bail!("{}: this file holds no journal; `verify` judges it", path.display())
            }
        }
    }

    /// The next entries, in order; empty at the end. Their signatures are not checked here.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Vec<Entry>> {
        match self {
            Source::Journal { reader, next } => {
                let entries = reader.read(*next, MAX_READ).await?;
                *next += entries.len() as u64;
                Ok(entries)
            }
            Source::Bundle(reader) => {
                let Some(item) = reader.next_entry()? else { return Ok(Vec::new()) };
                let mut entry = Entry::decode(&item.entry).context("an entry; `verify` says more")?;
                if let Some(bytes) = item.opening {
                    entry.set_opening(Some(cbor::decode::<ReceiptOpening>(&bytes)?));
                }
                Ok(vec![entry])
            }
        }
    }
}
