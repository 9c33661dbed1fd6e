//! `show`: entries, one a line.

use crate::{
    CLEAN,
    args::{Format, ShowArgs},
    output::{print, print_json, table},
    source::Source,
    time::utc,
};
use satgrid_ledger::{
    bundle::Subjected,
    entry::{Entry, Evidence},
    statements::PartOrder,
    transfer::TransferOp,
};
use satgrid_types::{Digest, TokenUsage};
use serde::Serialize;

/// One entry as `--format json` prints it.
#[derive(Debug, Serialize)]
struct Shown {
    entry: u64,
    at: String,
    kind: &'static str,
    sessions: Vec<String>,
    what: String,
    transfers: Vec<String>,
    leaf: String,
}

pub(crate) async fn run(args: ShowArgs) -> anyhow::Result<u8> {
    let mut source = Source::open(&args.db).await?;
    let mut subjected = Subjected::default();
    let mut rows = Vec::new();
    'all: loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            let subjects = subjected.of(&entry);
            if entry.seq < args.from || args.session.is_some_and(|session| !subjects.sessions.contains(&session)) {
                continue;
            }
            if rows.len() as u64 >= args.limit {
                eprintln!("there is more: --from {} shows it", entry.seq);
                break 'all;
            }
            let sessions = subjects.sessions.iter().map(ToString::to_string).collect();
            rows.push(shown(&entry, sessions));
        }
    }
    match args.format {
        Format::Json => print_json(&rows)?,
        Format::Table => {
            let mut out = table(&["entry", "at", "kind", "session", "what", "transfers"], 6);
            for row in rows {
                let session = row.sessions.first().map_or_else(String::new, |id| id.chars().take(8).collect());
                out.add_row([
                    row.entry.to_string(),
                    row.at,
                    row.kind.into(),
                    session,
                    row.what,
                    row.transfers.join("\n"),
                ]);
            }
            print(&out.to_string())?;
        }
    }
    Ok(CLEAN)
}

fn shown(entry: &Entry, sessions: Vec<String>) -> Shown {
    Shown {
        entry: entry.seq,
        at: utc(entry.at),
        kind: entry.evidence.as_ref().map_or("transfers", Evidence::kind),
        sessions,
        what: entry.evidence.as_ref().map(what).unwrap_or_default(),
        transfers: entry.transfers.iter().map(|transfer| op(&transfer.op)).collect(),
        leaf: entry.leaf().to_string(),
    }
}

fn op(op: &TransferOp) -> String {
    match op {
        TransferOp::Post { debit, credit, amount } => format!("{} -> {}: {amount}", credit.name(), debit.name()),
        TransferOp::Pending { debit, credit, amount, .. } => {
            format!("{} -> {}: {amount} reserved", credit.name(), debit.name())
        }
        TransferOp::PostPending { pending, amount } => format!("{} posted: {amount}", pending.short()),
        TransferOp::VoidPending { pending } => format!("{} returned", pending.short()),
        TransferOp::ExpirePending { pending } => format!("{} expired", pending.short()),
    }
}

/// A line about the evidence; statements are shown as they claim, unchecked.
fn what(evidence: &Evidence) -> String {
    match evidence {
        Evidence::Genesis { node, network, .. } => format!("node {} on {network}", node.short()),
        Evidence::Listing { event_json } => format!("{} bytes", event_json.len()),
        Evidence::Quote(quote) => {
            claim(quote.peek(), |q| format!("by {} for {}", q.provider.short(), q.consumer.short()))
        }
        Evidence::Open(open) => claim(open.peek(), |o| format!("with {}, cap {}", o.provider.short(), o.spend_cap)),
        Evidence::Invoice { k, descriptor, .. } => format!("slice {k}: {}", descriptor.amount),
        Evidence::PaymentAttempted { k, payment_hash, max_fee, .. } => {
            format!("slice {k}, {}, fee at most {max_fee}", payment_hash.short())
        }
        Evidence::PaymentSettled { payment_hash, amount, fee, .. } => {
            format!("{}: {amount}, fee {fee}", payment_hash.short())
        }
        Evidence::PaymentFailed { payment_hash, reason } => format!("{}: {reason}", payment_hash.short()),
        Evidence::PaymentReceived { payment_hash, amount } => format!("{}: {amount}", payment_hash.short()),
        Evidence::Request(request) => claim(request.peek(), |r| match r.part {
            Some(PartOrder { layers: Some(range), request, .. }) => format!("layers {range} for {}", request.short()),
            Some(PartOrder { layers: None, request, .. }) => format!("experts for {}", request.short()),
            None => format!("{} prompt tokens", r.prompt_tokens),
        }),
        Evidence::Ack(ack) => claim(ack.peek(), |a| format!("{}: {}, {}", a.seq, work(&a.usage), a.cost)),
        Evidence::Receipt { receipt, .. } => claim(receipt.peek(), |r| {
            let id = hex::encode(&receipt.id()[..4]);
            format!("{id}: {}, {}", work(&r.usage), r.cost)
        }),
        Evidence::Abandoned { request, .. } => format!("request {}", request.short()),
        Evidence::Close(close) => claim(close.peek(), |c| format!("remainder {}", c.remainder)),
        Evidence::CreditNote(note) => claim(note.peek(), |n| format!("{} still owed", n.amount)),
        Evidence::RefundAttempted { amount, .. } => format!("{amount}"),
        Evidence::RefundSettled { amount, fee, .. } => format!("{amount}, fee {fee}"),
        Evidence::RefundReceived { amount, .. } => format!("{amount}"),
        Evidence::ChannelClosed { channel, reason, force } => {
            format!("{channel}{}: {reason}", if *force { " by force" } else { "" })
        }
        Evidence::Misbehaviour { peer, rule, .. } => format!("{} by {}", rule, peer.short()),
        Evidence::WalletSnapshot { lightning_msat, onchain_msat } => {
            format!("{lightning_msat} on Lightning, {onchain_msat} on chain")
        }
        Evidence::Checkpoint { note } => {
            note.lines().nth(1).map_or_else(String::new, |size| format!("over {size} entries"))
        }
        Evidence::CreditTransfer(both) => {
            claim(both.peek(), |t| format!("{} owed to {} is spent in {}", t.amount, t.from.short(), t.to.short()))
        }
        Evidence::Promise(promise) => claim(promise.peek(), |p| format!("entry {} of {}", p.index, p.node.short())),
        Evidence::WalletPayment { payment_hash, inbound, amount, fee, .. } => {
            let way = if *inbound { "in" } else { "out" };
            format!("{} {way}: {amount}, fee {fee}", payment_hash.short())
        }
        Evidence::Succession(signed) => claim(signed.peek(), |s| {
            let heir = s.new.map_or("nobody".to_owned(), |new| new.short());
            format!("{} gives way to {heir}: {}", s.old.short(), s.why.name())
        }),
        Evidence::OnChain { txid, inbound, amount, fee } => {
            let written = Digest(core::array::from_fn(|i| txid.0[31 - i]));
            format!("{written} {}: {amount}, fee {fee}", if *inbound { "in" } else { "out" })
        }
    }
}

fn claim<T, E: core::fmt::Display>(peeked: Result<T, E>, show: impl FnOnce(T) -> String) -> String {
    peeked.map_or_else(|error| format!("unreadable: {error}"), show)
}

/// What was done, in the units that it is charged by.
fn work(usage: &TokenUsage) -> String {
    match usage.part {
        Some(part) if part.expert_rows > 0 => format!("{} expert rows", part.expert_rows),
        Some(part) => format!("{} position-layers", part.position_layers),
        None => format!("{} in, {} out", usage.prompt, usage.completion),
    }
}
