//! Writing a bundle item by item.

use super::{EntryItem, Header, Item, MAX_ITEM_LEN};
use crate::{
    claim::ClaimHeader,
    entry::{Entry, Evidence, MAX_ENTRY_LEN, MAX_OPENING_LEN},
    log::{FraudProof, SignedCheckpoint},
};
use satgrid_types::{Digest, cbor};
use std::io::{self, Write};

/// Writes a journal's bundle.
#[derive(Debug)]
pub struct BundleWriter<W> {
    out: W,
    entries: u64,
}

impl<W: Write> BundleWriter<W> {
    /// Starts a bundle with its header and the checkpoint that its entries lie below.
    pub fn start(mut out: W, header: &Header, checkpoint: &SignedCheckpoint) -> io::Result<BundleWriter<W>> {
        write_item(&mut out, &Item::Header(header.clone()))?;
        write_item(&mut out, &Item::Checkpoint(checkpoint.note().to_owned()))?;
        Ok(BundleWriter { out, entries: 0 })
    }
    /// Writes an entry; with `redact`, without the private fields beside its receipt.
    pub fn entry(&mut self, entry: &Entry, redact: bool, proof: Option<Vec<Digest>>) -> io::Result<()> {
        let opening = if redact { None } else { entry.opening().map(cbor::encode) };
        self.item(EntryItem { entry: entry.bytes(), opening, proof })
    }
    /// Writes an entry that is held as bytes already.
    pub fn item(&mut self, item: EntryItem) -> io::Result<()> {
        if item.entry.len() > MAX_ENTRY_LEN || item.opening.as_ref().is_some_and(|o| o.len() > MAX_OPENING_LEN) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an entry over the limit"));
        }
        self.entries = self.entries.saturating_add(1);
        write_item(&mut self.out, &Item::Entry(item))
    }
    /// Writes the end mark.
    pub fn finish(mut self) -> io::Result<W> {
        write_item(&mut self.out, &Item::End(self.entries))?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Writes a claim: its header, its pieces, the end.
pub fn write_claim<W: Write>(mut out: W, header: &ClaimHeader, pieces: &[Evidence]) -> io::Result<()> {
    write_item(&mut out, &Item::Claim(header.clone()))?;
    for piece in pieces {
        write_item(&mut out, &Item::Piece(Box::new(piece.clone())))?;
    }
    write_item(&mut out, &Item::End(pieces.len() as u64))?;
    out.flush()
}

/// Writes a file that holds a fraud proof alone.
pub fn write_fraud<W: Write>(mut out: W, proof: &FraudProof) -> io::Result<()> {
    write_item(&mut out, &Item::Fraud(proof.clone()))?;
    out.flush()
}

fn write_item(out: &mut impl Write, item: &Item) -> io::Result<()> {
    let body = cbor::encode(item);
    if body.len() > MAX_ITEM_LEN {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an item over the limit"));
    }
    let mut head = minicbor::Encoder::new(Vec::with_capacity(9));
    head.bytes_len(body.len() as u64).map_err(|e| io::Error::other(e.to_string()))?;
    out.write_all(head.writer())?;
    out.write_all(&body)
}
