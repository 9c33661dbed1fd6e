//! Reading a bundle item by item, in bounded memory.

use super::{EntryItem, Header, Item, MAX_ITEM_LEN};
use crate::{claim::ClaimHeader, entry::Evidence, log::FraudProof};
use satgrid_types::{cbor, cbor::CodecError};
use std::io::{self, Read};
use thiserror::Error;

/// Why a file cannot be read as a bundle. `item` counts from 0, the header.
#[derive(Debug, Error)]
pub enum BundleError {
    #[error("reading item {item}: {source}")]
    Io { item: u64, source: io::Error },
    #[error("the file ends within item {item}")]
    Truncated { item: u64 },
    #[error("the file ends after {items} items, without an end mark")]
    NoEnd { items: u64 },
    #[error("item {item} is not a byte string with its length in the shortest form")]
    Framing { item: u64 },
    #[error("item {item} claims {claimed} bytes, the limit is {MAX_ITEM_LEN}")]
    TooLong { item: u64, claimed: u64 },
    #[error("item {item}: {source}")]
    Codec { item: u64, source: CodecError },
    #[error("not a satgrid bundle")]
    NotABundle,
    #[error("bundle version {0}; this program reads version {version}", version = Header::VERSION)]
    Version(u32),
    #[error("item {item} is a {found}, expected {expected}")]
    Order { item: u64, found: &'static str, expected: &'static str },
    #[error("the end mark says {claimed} entries, there were {read}")]
    Count { claimed: u64, read: u64 },
    #[error("there is more after the end mark")]
    Trailing,
}

/// What a bundle turns out to be, once its first item is read.
#[derive(Debug)]
pub enum Opened<R> {
    /// A journal, or a part of one.
    Journal(BundleReader<R>),
    /// Two checkpoints that are said to exclude each other; not checked yet.
    Fraud(FraudProof),
    /// What is said to be owed on one session; not judged yet.
    Claim(ClaimReader<R>),
}

/// Reads a journal's bundle: header and checkpoint at once, then one entry after another.
#[derive(Debug)]
pub struct BundleReader<R> {
    items: Items<R>,
    header: Header,
    checkpoint: String,
    entries: u64,
    ended: bool,
}

/// Opens a bundle.
pub fn open<R: Read>(input: R) -> Result<Opened<R>, BundleError> {
    let mut items = Items { input, next: 0 };
    let first = match items.next() {
        Ok(first) => first,
        Err(io @ BundleError::Io { .. }) => return Err(io),
        Err(_) => return Err(BundleError::NotABundle),
    };
    let header = match first {
        Some(Item::Header(header)) => header,
        Some(Item::Fraud(proof)) => {
            return if items.next()?.is_none() { Ok(Opened::Fraud(proof)) } else { Err(BundleError::Trailing) };
        }
        Some(Item::Claim(header)) => {
            return if header.format != ClaimHeader::FORMAT {
                Err(BundleError::NotABundle)
            } else if header.version != ClaimHeader::VERSION {
                Err(BundleError::Version(header.version))
            } else {
                Ok(Opened::Claim(ClaimReader { items, header, pieces: 0, ended: false }))
            };
        }
        Some(Item::Checkpoint(_) | Item::Entry(_) | Item::End(_) | Item::Piece(_)) | None => {
            return Err(BundleError::NotABundle);
        }
    };
    if header.format != Header::FORMAT {
        return Err(BundleError::NotABundle);
    }
    if header.version != Header::VERSION {
        return Err(BundleError::Version(header.version));
    }
    let checkpoint = match items.next()? {
        Some(Item::Checkpoint(note)) => note,
        Some(other) => return Err(BundleError::Order { item: 1, found: name(&other), expected: "checkpoint" }),
        None => return Err(BundleError::NoEnd { items: 1 }),
    };
    Ok(Opened::Journal(BundleReader { items, header, checkpoint, entries: 0, ended: false }))
}

impl<R: Read> BundleReader<R> {
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// The checkpoint's text, not checked.
    pub fn checkpoint(&self) -> &str {
        &self.checkpoint
    }
    /// The next entry; `None` once, after the end mark, which was checked.
    pub fn next_entry(&mut self) -> Result<Option<EntryItem>, BundleError> {
        if self.ended {
            return Ok(None);
        }
        let item = self.items.next;
        match self.items.next()? {
            Some(Item::Entry(entry)) => {
                self.entries = self.entries.saturating_add(1);
                Ok(Some(entry))
            }
            Some(Item::End(claimed)) => {
                self.ended = true;
                self.items.end(claimed, self.entries).map(|()| None)
            }
            Some(other) => Err(BundleError::Order { item, found: name(&other), expected: "entry or end" }),
            None => Err(BundleError::NoEnd { items: item }),
        }
    }
}

/// Reads a claim: its header at once, then one piece after another.
#[derive(Debug)]
pub struct ClaimReader<R> {
    items: Items<R>,
    header: ClaimHeader,
    pieces: u64,
    ended: bool,
}

impl<R: Read> ClaimReader<R> {
    pub fn header(&self) -> &ClaimHeader {
        &self.header
    }
    /// The next piece; `None` once, after the end mark, which was checked.
    pub fn next_piece(&mut self) -> Result<Option<Evidence>, BundleError> {
        if self.ended {
            return Ok(None);
        }
        let item = self.items.next;
        match self.items.next()? {
            Some(Item::Piece(evidence)) => {
                self.pieces = self.pieces.saturating_add(1);
                Ok(Some(*evidence))
            }
            Some(Item::End(claimed)) => {
                self.ended = true;
                self.items.end(claimed, self.pieces).map(|()| None)
            }
            Some(other) => Err(BundleError::Order { item, found: name(&other), expected: "piece or end" }),
            None => Err(BundleError::NoEnd { items: item }),
        }
    }
}

fn name(item: &Item) -> &'static str {
    match item {
        Item::Header(_) => "header",
        Item::Checkpoint(_) => "checkpoint",
        Item::Entry(_) => "entry",
        Item::End(_) => "end",
        Item::Fraud(_) => "fraud proof",
        Item::Claim(_) => "claim",
        Item::Piece(_) => "piece of a claim",
    }
}

#[derive(Debug)]
struct Items<R> {
    input: R,
    next: u64,
}

impl<R: Read> Items<R> {
    /// The next item; `None` where the file ends cleanly between two.
    fn next(&mut self) -> Result<Option<Item>, BundleError> {
        let item = self.next;
        let mut first = [0u8; 1];
        loop {
            match self.input.read(&mut first) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(BundleError::Io { item, source }),
            }
        }
        let claimed = self.length(first[0])?;
        let len = usize::try_from(claimed).ok().filter(|len| *len <= MAX_ITEM_LEN);
        let len = len.ok_or(BundleError::TooLong { item, claimed })?;
        let mut body = vec![0; len];
        self.fill(&mut body)?;
        self.next = self.next.saturating_add(1);
        cbor::decode(&body).map(Some).map_err(|source| BundleError::Codec { item, source })
    }

    /// The end mark was read: it counts right, and nothing follows.
    fn end(&mut self, claimed: u64, read: u64) -> Result<(), BundleError> {
        if claimed != read {
            return Err(BundleError::Count { claimed, read });
        }
        match self.next() {
            Ok(None) => Ok(()),
            Err(io @ BundleError::Io { .. }) => Err(io),
            Ok(Some(_)) | Err(_) => Err(BundleError::Trailing),
        }
    }

    /// The length of a byte string from its head: major type 2, shortest form.
    fn length(&mut self, first: u8) -> Result<u64, BundleError> {
        let framing = BundleError::Framing { item: self.next };
        if first >> 5 != 2 {
            return Err(framing);
        }
        let (length, shortest) = match first & 0x1f {
            direct @ 0..=23 => (u64::from(direct), 0),
            24 => (self.head::<1>()?, 24),
            25 => (self.head::<2>()?, 1 << 8),
            26 => (self.head::<4>()?, 1 << 16),
            27 => (self.head::<8>()?, 1 << 32),
            _ => return Err(framing),
        };
        if length < shortest { Err(framing) } else { Ok(length) }
    }

    fn head<const N: usize>(&mut self) -> Result<u64, BundleError> {
        let mut bytes = [0u8; N];
        self.fill(&mut bytes)?;
        Ok(bytes.iter().fold(0u64, |value, byte| value.wrapping_shl(8) | u64::from(*byte)))
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<(), BundleError> {
        let item = self.next;
        self.input.read_exact(out).map_err(|source| {
            if source.kind() == io::ErrorKind::UnexpectedEof {
                BundleError::Truncated { item }
            } else {
                BundleError::Io { item, source }
            }
        })
    }
}
