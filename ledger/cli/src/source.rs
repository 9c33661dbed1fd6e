//! Where entries come from: a journal, or an exported file.

use anyhow::{Context, bail};
use satgrid_ledger::{
    bundle::{BundleReader, Opened, open},
    entry::Entry,
    journal::{JournalReader, MAX_READ},
    statements::ReceiptOpening,
};
use satgrid_ledger_postgres::PostgresReader;
use satgrid_ledger_sqlite::SqliteReader;
use satgrid_types::cbor;
use std::{
    fs::File,
    io::{BufReader, Read},
    path::Path,
    sync::Arc,
};

/// How a SQLite file begins.
const SQLITE_MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Something that holds entries.
pub(crate) enum Source {
    Journal { reader: Arc<dyn JournalReader>, next: u64 },
    Bundle(Box<BundleReader<BufReader<File>>>),
}

pub(crate) fn open_file(path: &Path) -> anyhow::Result<BufReader<File>> {
    Ok(BufReader::with_capacity(1 << 20, File::open(path).with_context(|| path.display().to_string())?))
}

/// How an address of a PostgreSQL journal begins; `env:NAME` says where one stands, so that no password is in a command line.
const POSTGRES: [&str; 2] = ["postgres://", "postgresql://"];

/// The PostgreSQL address that `--db` names, if it names one.
pub(crate) fn address(db: &Path) -> anyhow::Result<Option<String>> {
    let Some(text) = db.to_str() else { return Ok(None) };
    let text = match text.strip_prefix("env:") {
        Some(name) => std::env::var(name).map_err(|_| anyhow::anyhow!("the environment variable {name} is not set"))?,
        None => text.to_owned(),
    };
    Ok(POSTGRES.iter().any(|scheme| text.starts_with(scheme)).then_some(text))
}

/// Opens a journal for reading: a SQLite file, or the address of a PostgreSQL database.
pub(crate) async fn journal(db: &Path) -> anyhow::Result<Arc<dyn JournalReader>> {
    match address(db)? {
        Some(url) => Ok(Arc::new(PostgresReader::open(&url).await?)),
        None => Ok(Arc::new(SqliteReader::open(db).await?)),
    }
}

impl Source {
    /// Opens a file by what it is.
    pub(crate) async fn open(path: &Path) -> anyhow::Result<Source> {
        if address(path)?.is_some() {
            return Ok(Source::Journal { reader: journal(path).await?, next: 0 });
        }
        let mut magic = [0; 16];
        let begins = open_file(path)?.read_exact(&mut magic);
        // A journal whose first pages are still in its WAL is empty on disk.
        let empty = std::fs::metadata(path).is_ok_and(|meta| meta.len() == 0);
        if empty || (begins.is_ok() && magic == *SQLITE_MAGIC) {
            return Ok(Source::Journal { reader: journal(path).await?, next: 0 });
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
