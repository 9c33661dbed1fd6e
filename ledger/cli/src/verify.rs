//! `verify`: one file, or both parties' files against each other.

use crate::{
    CLEAN, FINDINGS,
    args::{Format, VerifyArgs},
    claim,
    output::{hinted, print, print_findings, print_json, table},
    source::open_file,
    time::utc,
};
use anyhow::{Context, bail};
use satgrid_ledger::{
    audit::{Auditor, Detail, Finding, Party, Report, Rule, SessionSummary, SideTotals, cross_check},
    bundle::{Opened, open},
    claim::{ClaimReport, audit_claim},
};
use satgrid_types::{Digest, NodeKey, SessionId};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::{IsTerminal, stderr},
    path::Path,
};

/// What `--format json` prints. Fields are only ever added.
#[derive(Debug, Serialize)]
struct Verdict<'a> {
    format: &'static str,
    version: u32,
    /// `clean` or `findings`.
    verdict: &'static str,
    findings_total: u64,
    files: Vec<FileVerdict<'a>>,
    /// Where the two files differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    cross: Option<&'a [Finding]>,
}

#[derive(Debug, Serialize)]
struct FileVerdict<'a> {
    file: String,
    /// `journal` or `fraud-proof`.
    kind: &'static str,
    node: NodeKey,
    #[serde(skip_serializing_if = "Option::is_none")]
    journal: Option<JournalVerdict<'a>>,
    findings_total: u64,
    findings: &'a [Finding],
}

#[derive(Debug, Serialize)]
struct JournalVerdict<'a> {
    filter: String,
    entries: u64,
    checkpoint_size: Option<u64>,
    checkpoint_root: Option<Digest>,
    from: Option<String>,
    to: Option<String>,
    as_provider: &'a SideTotals,
    as_consumer: &'a SideTotals,
    balances_msat: &'a BTreeMap<&'static str, i128>,
    open_holds: u64,
    open_holds_msat: u64,
    misbehaviour: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    sessions: Option<&'a BTreeMap<SessionId, SessionSummary>>,
}

/// What a file turned out to be.
enum Read {
    Ledger(Judged),
    Claim(Box<ClaimReport>),
}

/// The verdict on a file about a journal.
enum Judged {
    Journal(Box<Report>),
    Fraud { node: NodeKey, finding: [Finding; 1] },
}

pub(crate) fn run(args: VerifyArgs) -> anyhow::Result<u8> {
    let detail = if args.other.is_some() || args.sessions { Detail::Sessions } else { Detail::Totals };
    let first = judge(&args.file, detail)?;
    let other = args.other.as_deref().map(|path| judge(path, detail)).transpose()?;
    let (first, other) = match (first, other) {
        (Read::Ledger(first), None) => (first, None),
        (Read::Ledger(first), Some(Read::Ledger(other))) => (first, Some(other)),
        (Read::Claim(one), None) => return claim::verdict(&[(&args.file, &one)], args.format),
        (Read::Claim(one), Some(Read::Claim(answer))) => {
            let answered = args.other.as_deref().unwrap_or(&args.file);
            return claim::verdict(&[(&args.file, &one), (answered, &answer)], args.format);
        }
        (Read::Claim(_), Some(Read::Ledger(_))) | (Read::Ledger(_), Some(Read::Claim(_))) => {
            return Err(hinted(
                "a claim is held against the other side's claim of the same session",
                "`claim --db JOURNAL --session SESSION --out FILE` makes it from either side's journal",
            ));
        }
    };
    let cross = match (&first, &other) {
        (Judged::Journal(a), Some(Judged::Journal(b))) => Some(cross_check(a, b)),
        (_, None) => None,
        _ => bail!("a fraud proof is verified alone"),
    };
    let judged: Vec<(&Path, &Judged)> =
        core::iter::once((args.file.as_path(), &first)).chain(args.other.as_deref().zip(other.as_ref())).collect();
    let total = judged.iter().map(|(_, file)| file.total()).sum::<u64>() + cross.as_ref().map_or(0, Vec::len) as u64;
    match args.format {
        Format::Json => {
            let files = judged.iter().map(|(path, file)| file.json(path, args.sessions)).collect();
            let verdict = if total == 0 { "clean" } else { "findings" };
            let cross = cross.as_deref();
            print_json(&Verdict {
                format: "satgrid-verify",
                version: 1,
                verdict,
                findings_total: total,
                files,
                cross,
            })?;
        }
        Format::Table => {
            for (path, file) in &judged {
                file.print(path, args.sessions)?;
            }
            if let Some(cross) = &cross {
                print_findings("both files", cross.len() as u64, cross)?;
            }
            print(if total == 0 { "verdict: clean" } else { "verdict: findings" })?;
        }
    }
    Ok(if total == 0 { CLEAN } else { FINDINGS })
}

fn judge(path: &Path, detail: Detail) -> anyhow::Result<Read> {
    let named = || path.display().to_string();
    let mut reader = match open(open_file(path)?).with_context(named)? {
        Opened::Journal(reader) => reader,
        Opened::Claim(reader) => return Ok(Read::Claim(Box::new(audit_claim(reader).with_context(named)?))),
        Opened::Fraud(proof) => {
            let node = proof.check().with_context(|| format!("{}: this proves nothing", path.display()))?;
            let detail = "two checkpoints of one size with different roots, both signed: this node keeps two histories";
            let (rule, party) = (Rule::Fraud, Party::Provider(node));
            let finding = Finding { rule, entry: None, session: None, party, detail: detail.into() };
            return Ok(Read::Ledger(Judged::Fraud { node, finding: [finding] }));
        }
    };
    let mut auditor = Auditor::new(reader.header(), reader.checkpoint(), detail);
    let shows = stderr().is_terminal();
    let mut read = 0u64;
    while let Some(item) = reader.next_entry().with_context(named)? {
        auditor.entry(&item);
        read += 1;
        if shows && read.is_multiple_of(10_000) {
            eprint!("\r{read} entries");
        }
    }
    if shows && read >= 10_000 {
        eprintln!();
    }
    Ok(Read::Ledger(Judged::Journal(Box::new(auditor.finish()))))
}

impl Judged {
    fn total(&self) -> u64 {
        match self {
            Judged::Journal(report) => report.findings_total,
            Judged::Fraud { .. } => 1,
        }
    }

    fn json(&self, path: &Path, sessions: bool) -> FileVerdict<'_> {
        let file = path.display().to_string();
        match self {
            Judged::Fraud { node, finding } => FileVerdict {
                file,
                kind: "fraud-proof",
                node: *node,
                journal: None,
                findings_total: 1,
                findings: finding,
            },
            Judged::Journal(report) => FileVerdict {
                file,
                kind: "journal",
                node: report.node,
                journal: Some(JournalVerdict {
                    filter: filter(report),
                    entries: report.entries,
                    checkpoint_size: report.checkpoint_size,
                    checkpoint_root: report.checkpoint_root,
                    from: report.first_at.map(utc),
                    to: report.last_at.map(utc),
                    as_provider: &report.as_provider,
                    as_consumer: &report.as_consumer,
                    balances_msat: &report.balances,
                    open_holds: report.open_holds,
                    open_holds_msat: report.open_holds_msat,
                    misbehaviour: report.misbehaviour,
                    sessions: sessions.then_some(&report.sessions),
                }),
                findings_total: report.findings_total,
                findings: &report.findings,
            },
        }
    }

    fn print(&self, path: &Path, sessions: bool) -> anyhow::Result<()> {
        let name = path.display().to_string();
        match self {
            Judged::Fraud { finding, .. } => print_findings(&name, 1, finding),
            Judged::Journal(report) => {
                print_totals(&name, report)?;
                if sessions {
                    print_sessions(report)?;
                }
                print_findings(&name, report.findings_total, &report.findings)
            }
        }
    }
}

fn filter(report: &Report) -> String {
    use satgrid_ledger::bundle::Filter;
    match report.filter {
        Filter::All => "all".into(),
        Filter::Session(session) => format!("session {session}"),
        Filter::Peer(peer) => format!("peer {peer}"),
        Filter::Time(from, to) => {
            format!("sessions active from {} to {}", utc(from), if to.0 == u64::MAX { "now".into() } else { utc(to) })
        }
    }
}

fn print_totals(name: &str, report: &Report) -> anyhow::Result<()> {
    print(&format!(
        "{name}: journal of {}, {}, {} entries from {} to {}",
        report.node,
        filter(report),
        report.entries,
        report.first_at.map_or_else(|| "-".into(), utc),
        report.last_at.map_or_else(|| "-".into(), utc),
    ))?;
    let mut out = table(&["", "as provider", "as consumer"], 1);
    let (p, c) = (&report.as_provider, &report.as_consumer);
    for (label, provider, consumer) in [
        ("sessions", p.sessions, c.sessions),
        ("requests", p.requests, c.requests),
        ("receipts", p.receipts, c.receipts),
        ("broken off", p.abandoned, c.abandoned),
        ("acknowledgements", p.acks, c.acks),
        ("prompt tokens", p.prompt_tokens, c.prompt_tokens),
        ("of them cached", p.cached_tokens, c.cached_tokens),
        ("output tokens", p.output_tokens, c.output_tokens),
        ("slices", p.slices, c.slices),
        ("paid, msat", p.paid_msat, c.paid_msat),
        ("charged, msat", p.charged_msat, c.charged_msat),
        ("refunded, msat", p.refunded_msat, c.refunded_msat),
    ] {
        out.add_row([label.to_owned(), provider.to_string(), consumer.to_string()]);
    }
    print(&out.to_string())
}

fn print_sessions(report: &Report) -> anyhow::Result<()> {
    let headings = ["session", "role", "peer", "receipts", "in", "out", "paid msat", "charged msat", "refunded msat"];
    let mut out = table(&headings, 3);
    for (id, session) in &report.sessions {
        let (role, peer) =
            if session.as_provider { ("provider", session.consumer) } else { ("consumer", session.provider) };
        out.add_row([
            id.short(),
            role.to_owned(),
            peer.map_or_else(String::new, |key| key.short()),
            session.receipts.to_string(),
            session.prompt_tokens.to_string(),
            session.output_tokens.to_string(),
            session.paid_msat.to_string(),
            session.charged_msat.to_string(),
            session.refunded_msat.to_string(),
        ]);
    }
    print(&out.to_string())
}
