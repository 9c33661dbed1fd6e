//! `export`: a journal, or whole sessions of it, as a bundle.

use crate::{CLEAN, args::ExportArgs, output::hinted, source::journal, time::utc};
use anyhow::{Context, bail};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    bundle::{BundleWriter, Filter, Header, Selector},
    entry::{Entry, Evidence},
    journal::{JournalReader, MAX_READ},
    log::SignedCheckpoint,
};
use satgrid_types::{NodeKey, UnixMs, node_key};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

pub(crate) async fn run(args: ExportArgs) -> anyhow::Result<u8> {
    if let Some(form) = args.books_form() {
        return crate::books::run(&args, form).await;
    }
    let reader = journal(&args.db).await?;
    let node = owner(reader.as_ref()).await?;
    let checkpoint = checkpoint(reader.as_ref(), node, args.key.as_deref()).await?;
    let filter = filter(&args);
    let written = if args.out == Path::new("-") {
        let out = BufWriter::new(io::stdout().lock());
        write(reader.as_ref(), &checkpoint, filter, args.redact, out).await?
    } else {
        // Written beside and renamed when whole, so that a file under the final name is never a part.
        let part = args.out.with_extension("part");
        let out = BufWriter::new(File::create(&part).with_context(|| part.display().to_string())?);
        let written = write(reader.as_ref(), &checkpoint, filter, args.redact, out).await;
        match written {
            Ok(written) => {
                fs::rename(&part, &args.out).with_context(|| args.out.display().to_string())?;
                written
            }
            Err(error) => {
                let _ = fs::remove_file(&part);
                return Err(error);
            }
        }
    };
    let head = reader.head().await?;
    eprintln!("{written} of {} entries, under the checkpoint over {} entries", head.len, checkpoint.size);
    if head.len > checkpoint.size {
        eprintln!(
            "{} newer entries (to {}) are not in it: no checkpoint covers them yet",
            head.len - checkpoint.size,
            utc(head.at)
        );
    }
    Ok(CLEAN)
}

fn filter(args: &ExportArgs) -> Filter {
    match (args.session, args.peer, args.from, args.to) {
        (Some(session), ..) => Filter::Session(session),
        (_, Some(peer), ..) => Filter::Peer(peer),
        (_, _, None, None) => Filter::All,
        (_, _, from, to) => Filter::Time(from.unwrap_or_default(), to.unwrap_or(UnixMs(u64::MAX))),
    }
}

/// Whose journal it is: who signed its newest checkpoint, else who began it.
pub(crate) async fn owner(reader: &dyn JournalReader) -> anyhow::Result<NodeKey> {
    if let Some(newest) = reader.checkpoint(reader.head().await?.len).await? {
        return Ok(newest.node);
    }
    let first = reader.read(0, 1).await?;
    match first.first().and_then(|entry| entry.evidence.as_ref()) {
        Some(Evidence::Genesis { node, .. }) => Ok(*node),
        _ => bail!("the journal does not begin with a genesis entry: no node has used it"),
    }
}

async fn checkpoint(reader: &dyn JournalReader, node: NodeKey, key: Option<&Path>) -> anyhow::Result<SignedCheckpoint> {
    let size = reader.head().await?.len;
    let Some(path) = key else {
        let newest = reader.checkpoint(size).await?;
        return newest.ok_or_else(|| {
            hinted(
                "the journal has no checkpoint, so nothing would bind its entries together",
                "the node signs one when it stops and from time to time; or sign one now with --key FILE",
            )
        });
    };
    let key = read_key(path)?;
    if node_key(&key) != node {
        bail!("{}: the key of {}, the journal is of {node}", path.display(), node_key(&key));
    }
    Ok(SignedCheckpoint::sign(size, reader.root(size).await?, &key))
}

fn read_key(path: &Path) -> anyhow::Result<SigningKey> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut secret = [0; 32];
    hex::decode_to_slice(text.trim(), &mut secret)
        .map_err(|_| hinted(format!("{}: not an ed25519 secret key", path.display()), "64 hex digits are expected"))?;
    Ok(SigningKey::from_bytes(&secret))
}

/// Writes the entries below the checkpoint that the filter selects; says how many.
async fn write(
    reader: &dyn JournalReader,
    checkpoint: &SignedCheckpoint,
    filter: Filter,
    redact: bool,
    out: impl Write,
) -> anyhow::Result<u64> {
    let mut selector = Selector::new(filter);
    if filter != Filter::All {
        let mut from = 0;
        while from < checkpoint.size {
            let entries = below(reader, from, checkpoint.size).await?;
            let pruned = reader.pruned(from, from + entries.len() as u64).await?;
            from += entries.len() as u64;
            for entry in &entries {
                match pruned.binary_search(&entry.seq) {
                    Ok(_) => selector.observe_pruned(entry),
                    Err(_) => selector.observe(entry),
                }
            }
        }
    }
    let mut selection = selector.select();
    match selection.left_out() {
        0 if filter != Filter::All && selection.sessions().is_empty() => bail!("no session matches"),
        0 => {}
        left_out if selection.sessions().is_empty() => {
            bail!("{left_out} sessions match, and the bodies of their entries were pruned")
        }
        left_out => eprintln!("{left_out} sessions that match are left out: the bodies of their entries were pruned"),
    }
    if filter == Filter::All && !reader.pruned(0, checkpoint.size).await?.is_empty() {
        return Err(hinted(
            "bodies of this journal were pruned, so the whole of it can no longer be shown",
            "choose a part: --session, --peer, or --from",
        ));
    }
    let mut writer = BundleWriter::start(out, &Header::new(checkpoint.node, filter), checkpoint)?;
    let (mut from, mut written) = (0, 0);
    while from < checkpoint.size {
        let entries = below(reader, from, checkpoint.size).await?;
        let pruned = reader.pruned(from, from + entries.len() as u64).await?;
        from += entries.len() as u64;
        for entry in entries {
            if !selection.wants(&entry) || pruned.binary_search(&entry.seq).is_ok() {
                continue;
            }
            let proof = match filter {
                Filter::All => None,
                Filter::Session(_) | Filter::Peer(_) | Filter::Time(..) => {
                    Some(reader.prove_inclusion(entry.seq, checkpoint.size).await?)
                }
            };
            writer.entry(&entry, redact, proof)?;
            written += 1;
        }
    }
    writer.finish()?;
    Ok(written)
}

async fn below(reader: &dyn JournalReader, from: u64, size: u64) -> anyhow::Result<Vec<Entry>> {
    let limit = usize::try_from(size - from).unwrap_or(MAX_READ).min(MAX_READ);
    let entries = reader.read(from, limit).await?;
    if entries.is_empty() {
        bail!("the journal ends at entry {from}, its checkpoint covers {size}");
    }
    Ok(entries)
}
