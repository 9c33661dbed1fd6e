//! `prove` and `fraud`: what the log can show to others.

use crate::{
    CLEAN,
    args::{CheckpointArgs, Format, FraudArgs, ProveArgs},
    output::{hinted, print, print_json},
    source::journal,
};
use anyhow::{Context, bail};
use satgrid_ledger::{
    bundle::write_fraud,
    entry::Evidence,
    journal::{JournalReader, MAX_READ},
    log::{FraudProof, SignedCheckpoint, verify_consistency, verify_inclusion},
    statements::receipt_id,
};
use satgrid_types::{Digest, ReceiptId};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};

/// A proof, with what is needed to check it. Hashes are RFC 6962's; `leaf` is SHA-256(0x00 || `entry_hex`).
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Proof {
    Inclusion {
        index: u64,
        leaf: Digest,
        entry_hex: String,
        size: u64,
        root: Digest,
        proof: Vec<Digest>,
        checkpoint: Option<String>,
    },
    Consistency {
        old_size: u64,
        old_root: Digest,
        size: u64,
        root: Digest,
        proof: Vec<Digest>,
        checkpoint: Option<String>,
    },
}

pub(crate) async fn run(args: ProveArgs) -> anyhow::Result<u8> {
    let reader = journal(&args.db).await?;
    let len = reader.head().await?.len;
    let newest = reader.checkpoint(args.size.unwrap_or(len)).await?;
    let size = args.size.or(newest.as_ref().map(|signed| signed.size)).unwrap_or(len);
    if size > len {
        bail!("the log has {len} entries");
    }
    let note = newest.filter(|signed| signed.size == size).map(|signed| signed.note().to_owned());
    if note.is_none() {
        eprintln!("no checkpoint is signed over exactly {size} entries; the root below is not vouched for");
    }
    let root = reader.root(size).await?;
    let proof = if let Some(old) = args.extends {
        let (proof, old_root) = (reader.prove_consistency(old, size).await?, reader.root(old).await?);
        if !verify_consistency(old, size, &old_root, &root, &proof) {
            bail!("the stored log contradicts itself between {old} and {size} entries");
        }
        Proof::Consistency { old_size: old, old_root, size, root, proof, checkpoint: note }
    } else {
        let index = match (args.entry, args.receipt) {
            (Some(index), _) => index,
            (None, Some(receipt)) => find_receipt(reader.as_ref(), receipt, size).await?,
            (None, None) => bail!("nothing to prove"),
        };
        let entry = reader.read(index, 1).await?;
        let entry = entry.first().filter(|entry| entry.seq < size);
        let entry = entry.with_context(|| format!("entry {index} is not among the first {size}"))?;
        if !reader.pruned(index, index.saturating_add(1)).await?.is_empty() {
            return Err(hinted(
                format!("the body of entry {index} was pruned"),
                "whoever has its bytes can still prove them: the leaf is in the log",
            ));
        }
        let (leaf, proof) = (entry.leaf(), reader.prove_inclusion(index, size).await?);
        if !verify_inclusion(&leaf, index, size, &proof, &root) {
            bail!("entry {index} is not the leaf that the stored log holds");
        }
        Proof::Inclusion { index, leaf, entry_hex: hex::encode(entry.bytes()), size, root, proof, checkpoint: note }
    };
    match args.format {
        Format::Json => print_json(&proof)?,
        Format::Table => print(&text(&proof))?,
    }
    Ok(CLEAN)
}

/// Looks for a receipt from the newest entry back.
async fn find_receipt(reader: &dyn JournalReader, id: ReceiptId, size: u64) -> anyhow::Result<u64> {
    let mut to = size;
    while to > 0 {
        let from = to.saturating_sub(MAX_READ as u64);
        let limit = usize::try_from(to - from).unwrap_or(MAX_READ);
        let entries = reader.read(from, limit).await?;
        let is_it =
            |evidence: &Evidence| matches!(evidence, Evidence::Receipt { receipt, .. } if receipt_id(receipt) == id);
        if let Some(entry) = entries.iter().rev().find(|entry| entry.evidence.as_ref().is_some_and(is_it)) {
            return Ok(entry.seq);
        }
        to = from;
    }
    Err(hinted(
        format!("receipt {id} is not among the first {size} entries"),
        "ids of receipts stand in `show`; a receipt newer than the newest checkpoint needs --size",
    ))
}

fn text(proof: &Proof) -> String {
    let (title, hashes, checkpoint) = match proof {
        Proof::Inclusion { index, leaf, size, root, proof, checkpoint, .. } => {
            (format!("entry {index}, leaf {leaf}\nis in the log of {size} entries with root {root}"), proof, checkpoint)
        }
        Proof::Consistency { old_size, old_root, size, root, proof, checkpoint } => (
            format!(
                "the log of {size} entries with root {root}\nextends that of {old_size} entries with root {old_root}"
            ),
            proof,
            checkpoint,
        ),
    };
    let mut lines = vec![title, "by:".to_owned()];
    lines.extend(hashes.iter().map(|hash| format!("  {hash}")));
    lines.extend(checkpoint.iter().map(|note| format!("checkpoint:\n{note}")));
    lines.join("\n")
}

/// Prints the newest signed note as it is: others keep it, and compare.
pub(crate) async fn checkpoint(args: CheckpointArgs) -> anyhow::Result<u8> {
    let reader = journal(&args.db).await?;
    if let Some(node) = args.of {
        let heard = reader.witnessed(node).await?;
        let newest = heard.first().with_context(|| format!("no checkpoint of {node} was heard"))?;
        print(newest.note().trim_end_matches('\n'))?;
        return Ok(CLEAN);
    }
    let size = args.size.unwrap_or(reader.head().await?.len);
    let signed = reader.checkpoint(size).await?.ok_or_else(|| {
        hinted(format!("no checkpoint over at most {size} entries"), "the node signs one within seconds of new entries")
    })?;
    print(signed.note().trim_end_matches('\n'))?;
    Ok(CLEAN)
}

/// Writes a fraud proof, if the two checkpoints are one.
pub(crate) fn fraud(args: &FraudArgs) -> anyhow::Result<u8> {
    let read = |path: &std::path::Path| -> anyhow::Result<String> {
        let note = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        SignedCheckpoint::parse(&note).with_context(|| path.display().to_string())?;
        Ok(note)
    };
    let proof = FraudProof { one: read(&args.one)?, other: read(&args.other)? };
    let node = proof.check().context("these two prove nothing")?;
    let out = File::create(&args.out).with_context(|| args.out.display().to_string())?;
    write_fraud(out, &proof)?;
    eprintln!("{node} keeps two histories: {}", args.out.display());
    Ok(CLEAN)
}
