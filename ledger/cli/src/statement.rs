//! `statement`: what was sold and bought, by peer, model or day.

use crate::{
    CLEAN,
    args::{By, Format, StatementArgs},
    output::{print, print_json, table},
    source::Source,
    time::day,
};
use anyhow::Context;
use satgrid_ledger::{
    Books,
    bundle::Subjected,
    entry::{Entry, Evidence},
    statements::SessionOpen,
    transfer::Account,
};
use satgrid_types::{NodeKey, SessionId, UnixMs};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Sums under one heading.
#[derive(Debug, Default, Clone, Serialize)]
struct Sums {
    receipts: u64,
    prompt_tokens: u64,
    output_tokens: u64,
    earned_msat: i128,
    spent_msat: i128,
    routing_fees_msat: i128,
}

/// Who sits at the other end of a session, and what was bought last: headings for entries that do not say.
#[derive(Debug, Clone)]
struct Known {
    peer: NodeKey,
    model: String,
}

pub(crate) async fn run(args: StatementArgs) -> anyhow::Result<u8> {
    let mut source = Source::open(&args.db).await?;
    let mut books = Books::new();
    let mut subjected = Subjected::default();
    let mut ours = BTreeSet::new();
    let mut known: BTreeMap<SessionId, Known> = BTreeMap::new();
    let mut sums: BTreeMap<String, Sums> = BTreeMap::new();
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            let session = subjected.of(&entry).sessions.first().copied();
            learn(&entry, session, &mut ours, &mut known);
            let before = figures(&books);
            books.apply(entry.at, &entry.draft()).with_context(|| format!("entry {}", entry.seq))?;
            let after = figures(&books);
            if before == after && !matches!(entry.evidence, Some(Evidence::Receipt { .. })) {
                continue;
            }
            if args.from.is_some_and(|from| entry.at < from) || args.to.is_some_and(|to| entry.at >= to) {
                continue;
            }
            let heading = heading(args.by, entry.at, session.and_then(|session| known.get(&session)));
            let sum = sums.entry(heading).or_default();
            sum.earned_msat += after[0] - before[0];
            sum.spent_msat += after[1] - before[1];
            sum.routing_fees_msat += after[2] - before[2];
            if let Some(Evidence::Receipt { receipt, .. }) = &entry.evidence
                && let Ok(receipt) = receipt.peek()
            {
                sum.receipts += 1;
                sum.prompt_tokens += u64::from(receipt.usage.prompt);
                sum.output_tokens += u64::from(receipt.usage.completion);
            }
        }
    }
    match args.format {
        Format::Json => print_json(&sums)?,
        Format::Table => {
            let by = match args.by {
                By::Peer => "peer",
                By::Model => "model",
                By::Day => "day (UTC)",
            };
            let mut out = table(&[by, "receipts", "in", "out", "earned, msat", "spent, msat", "routing, msat"], 1);
            for (heading, sum) in sums {
                out.add_row([
                    heading,
                    sum.receipts.to_string(),
                    sum.prompt_tokens.to_string(),
                    sum.output_tokens.to_string(),
                    sum.earned_msat.to_string(),
                    sum.spent_msat.to_string(),
                    sum.routing_fees_msat.to_string(),
                ]);
            }
            print(&out.to_string())?;
        }
    }
    Ok(CLEAN)
}

/// Income, expense and routing fees so far.
fn figures(books: &Books) -> [i128; 3] {
    [Account::Income, Account::Expense, Account::RoutingFees].map(|account| books.balance(&account))
}

fn learn(
    entry: &Entry,
    session: Option<SessionId>,
    ours: &mut BTreeSet<NodeKey>,
    known: &mut BTreeMap<SessionId, Known>,
) {
    match &entry.evidence {
        Some(Evidence::Genesis { node, .. }) => drop(ours.insert(*node)),
        Some(Evidence::Succession(signed)) => ours.extend(signed.heir()),
        Some(Evidence::Open(open)) => {
            if let (Some(session), Ok(open)) = (session, open.peek()) {
                known.insert(session, Known { peer: peer(&open, ours), model: String::new() });
            }
        }
        Some(Evidence::Receipt { receipt, .. }) => {
            if let (Some(session), Ok(receipt)) = (session, receipt.peek())
                && let Some(known) = known.get_mut(&session)
            {
                known.model = receipt.model;
            }
        }
        _ => {}
    }
}

fn peer(open: &SessionOpen, ours: &BTreeSet<NodeKey>) -> NodeKey {
    if ours.contains(&open.provider) { open.consumer } else { open.provider }
}

fn heading(by: By, at: UnixMs, known: Option<&Known>) -> String {
    match (by, known) {
        (By::Day, _) => day(at),
        (By::Peer, Some(known)) => known.peer.to_string(),
        (By::Model, Some(known)) if !known.model.is_empty() => known.model.clone(),
        (By::Peer | By::Model, _) => "-".into(),
    }
}
