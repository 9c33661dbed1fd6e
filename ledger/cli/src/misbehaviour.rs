//! `misbehaviour`: what this node caught others at, by name, and what proves it as a file for others.
//!
//! The list is the exporter's own word; the statements in it are what was received, and say for themselves whose they are.

use crate::{
    CLEAN,
    args::{Format, MisbehaviourArgs},
    output::{hinted, print, print_json, table},
    source::Source,
    time::utc,
};
use anyhow::Context;
use satgrid_ledger::{bundle, entry::Evidence};
use serde::Serialize;

/// One of them as `--format json` prints it.
#[derive(Debug, Serialize)]
struct Caught {
    entry: u64,
    at: String,
    peer: String,
    rule: String,
    bytes: usize,
    /// Whether the statement is a file that `verify` judges.
    proof: bool,
    #[serde(skip)]
    statement: Vec<u8>,
}

pub(crate) async fn run(args: MisbehaviourArgs) -> anyhow::Result<u8> {
    let mut source = Source::open(&args.db).await?;
    let mut caught = Vec::new();
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            let wanted = args.entry.is_none_or(|n| n == entry.seq);
            let Some(Evidence::Misbehaviour { peer, rule, statement }) = entry.evidence.filter(|_| wanted) else {
                continue;
            };
            if args.peer.is_some_and(|only| only != peer) {
                continue;
            }
            let proof = matches!(bundle::open(statement.as_slice()), Ok(bundle::Opened::Fraud(_)));
            let (peer, bytes) = (peer.to_string(), statement.len());
            caught.push(Caught { entry: entry.seq, at: utc(entry.at), peer, rule, bytes, proof, statement });
        }
    }
    if let Some(out) = &args.out {
        let one = caught.first().ok_or_else(|| {
            hinted(
                "that entry is no misbehaviour",
                "without --entry those that are kept are listed, with their numbers",
            )
        })?;
        std::fs::write(out, &one.statement).with_context(|| out.display().to_string())?;
        let what = if one.proof { "`verify` judges it" } else { "the statement as it was received" };
        eprintln!("{} by {}: {} ({what})", one.rule, one.peer, out.display());
        return Ok(CLEAN);
    }
    match args.format {
        Format::Json => print_json(&caught)?,
        Format::Table if caught.is_empty() => print("nothing is kept against anybody")?,
        Format::Table => {
            let mut list = table(&["entry", "at", "by", "rule", "proof", "bytes"], 5);
            for one in &caught {
                let proof = if one.proof { "for everybody" } else { "" };
                let entry = one.entry.to_string();
                let by = one.peer.clone();
                list.add_row([entry, one.at.clone(), by, one.rule.clone(), proof.into(), one.bytes.to_string()]);
            }
            print(&list.to_string())?;
        }
    }
    Ok(CLEAN)
}
