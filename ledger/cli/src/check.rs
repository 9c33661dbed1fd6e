//! `check`: does a proof hold? It needs the file alone, and a checkpoint that its owner did not choose.

use crate::{
    CLEAN, FINDINGS,
    args::{CheckArgs, Format},
    output::{hinted, print, print_json},
    prove::Proof,
};
use anyhow::{Context, bail};
use satgrid_ledger::{
    entry::{Entry, Evidence},
    log::{SignedCheckpoint, leaf_hash, verify_consistency, verify_inclusion},
    statements::receipt_id,
};
use satgrid_types::{Digest, NodeKey, ReceiptId};
use serde::Serialize;
use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

/// No proof file is longer, in bytes: an entry in hex and 64 hashes.
const MAX_PROOF_FILE: u64 = 1 << 20;
/// Checkpoints that one check may be held against.
const MAX_NOTES: usize = 64;

/// What `--format json` prints. Fields are only ever added.
#[derive(Debug, Serialize)]
struct Checked {
    format: &'static str,
    version: u32,
    /// `holds` or `fails`.
    verdict: &'static str,
    kind: &'static str,
    size: u64,
    root: Digest,
    /// Who signed this root, where a checkpoint says so.
    vouched_by: Option<NodeKey>,
    entry: Option<u64>,
    receipt: Option<ReceiptId>,
    /// What is wrong.
    faults: Vec<String>,
}

pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<u8> {
    let proof = read_proof(&args.proof)?;
    let notes = args.checkpoint.iter().map(note).collect::<anyhow::Result<Vec<_>>>()?;
    if notes.len() > MAX_NOTES {
        bail!("{} checkpoints, the limit is {MAX_NOTES}", notes.len());
    }
    let checked = check(&proof, &notes)?;
    match args.format {
        Format::Json => print_json(&checked)?,
        Format::Table => print(&text(&checked))?,
    }
    Ok(if checked.faults.is_empty() { CLEAN } else { FINDINGS })
}

fn note(path: &PathBuf) -> anyhow::Result<SignedCheckpoint> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    SignedCheckpoint::parse(&text).with_context(|| path.display().to_string())
}

fn read_proof(path: &Path) -> anyhow::Result<Proof> {
    let file = fs::File::open(path).with_context(|| path.display().to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_PROOF_FILE).read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| {
        hinted(format!("{}: not a proof: {error}", path.display()), "`prove --format json` writes one")
    })
}

fn check(proof: &Proof, notes: &[SignedCheckpoint]) -> anyhow::Result<Checked> {
    let mut faults = Vec::new();
    let (mut entry, mut receipt) = (None, None);
    let (kind, size, root, own) = match proof {
        Proof::Inclusion { index, leaf, entry_hex, size, root, proof, checkpoint } => {
            let bytes = hex::decode(entry_hex).context("entry_hex is not hex")?;
            if leaf_hash(&bytes) != *leaf {
                faults.push("the entry's bytes are not the leaf".to_owned());
            }
            match Entry::decode(&bytes) {
                Ok(decoded) => {
                    if decoded.seq != *index {
                        faults.push(format!("the entry says that it is number {}", decoded.seq));
                    }
                    if let Some(Evidence::Receipt { receipt: both, .. }) = &decoded.evidence {
                        receipt = Some(receipt_id(both));
                    }
                }
                Err(error) => faults.push(format!("not an entry: {error}")),
            }
            entry = Some(*index);
            if !verify_inclusion(leaf, *index, *size, proof, root) {
                faults.push("the hashes do not lead from the leaf to the root".to_owned());
            }
            ("inclusion", *size, *root, checkpoint)
        }
        Proof::Consistency { old_size, old_root, size, root, proof, checkpoint } => {
            if !verify_consistency(*old_size, *size, old_root, root, proof) {
                faults.push("the hashes do not lead from the old root to the new one".to_owned());
            }
            for note in notes.iter().filter(|note| note.size == *old_size && note.root != *old_root) {
                faults.push(format!("{} signed another root over {old_size} entries", note.node));
            }
            ("consistency", *size, *root, checkpoint)
        }
    };
    let mut vouched_by = None;
    let own = own.as_deref().map(SignedCheckpoint::parse).transpose();
    let own = own.unwrap_or_else(|error| {
        faults.push(format!("its checkpoint: {error}"));
        None
    });
    if let Some(own) = &own
        && (own.size, own.root) != (size, root)
    {
        faults.push("its checkpoint is of another size or root".to_owned());
    }
    for note in own.iter().chain(notes).filter(|note| note.size == size) {
        if note.root == root {
            vouched_by = Some(note.node);
        } else {
            faults.push(format!("{} signed another root over {size} entries", note.node));
        }
    }
    let verdict = if faults.is_empty() { "holds" } else { "fails" };
    Ok(Checked { format: "satgrid-check", version: 1, verdict, kind, size, root, vouched_by, entry, receipt, faults })
}

fn text(checked: &Checked) -> String {
    let mut lines = checked.faults.clone();
    if checked.faults.is_empty() {
        lines.push(match (checked.entry, checked.receipt) {
            (Some(entry), Some(receipt)) => format!("receipt {receipt} is entry {entry} of {}", checked.size),
            (Some(entry), None) => format!("entry {entry} is in the log of {}", checked.size),
            (None, _) => format!("the log of {} entries only grew", checked.size),
        });
        lines.push(match checked.vouched_by {
            Some(node) => format!("root {}, signed by {node}", checked.root),
            None => format!("root {}; nobody vouches for it: give a checkpoint with --checkpoint", checked.root),
        });
    }
    lines.push(checked.verdict.to_owned());
    lines.join("\n")
}
