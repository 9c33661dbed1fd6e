//! `claim`: what is owed on one session, as a file that proves it; and what `verify` says about such a file.

use crate::{
    CLEAN, FINDINGS,
    args::{ClaimArgs, Format},
    output::{hinted, print, print_findings, print_json, table},
    source::Source,
    time::utc,
};
use anyhow::Context;
use satgrid_ledger::{
    Books,
    audit::Finding,
    bundle::write_claim,
    claim::{ClaimCollector, ClaimFigures, ClaimReport, Stakes, cross_claims},
};
use satgrid_types::{NodeKey, ReceiptId, SessionId};
use serde::Serialize;
use std::{fs::File, io::BufWriter, path::Path};

pub(crate) async fn run(args: ClaimArgs) -> anyhow::Result<u8> {
    let mut source = Source::open(&args.db).await?;
    let Some(session) = args.session else { return stakes(&mut source, args.format).await };
    let mut collector = ClaimCollector::new(session);
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            break;
        }
        entries.iter().for_each(|entry| collector.observe(entry));
    }
    let (header, pieces) = collector.finish().ok_or_else(|| {
        hinted(format!("session {session} is not in {}", args.db.display()), "`claim` without --session lists them")
    })?;
    let out = args.out.context("--out FILE is needed: where to write the claim")?;
    let file = File::create(&out).with_context(|| out.display().to_string())?;
    write_claim(BufWriter::new(file), &header, &pieces)?;
    eprintln!("{} pieces from the {}'s journal: {}", pieces.len(), header.maker.name(), out.display());
    eprintln!("`verify {}` says what it proves", out.display());
    Ok(CLEAN)
}

/// A session that holds money, as `--format json` prints it.
#[derive(Debug, Serialize)]
struct AtStake {
    session: SessionId,
    role: &'static str,
    provider: NodeKey,
    consumer: NodeKey,
    opened_at: String,
    closed: bool,
    held_msat: u64,
}

async fn stakes(source: &mut Source, format: Format) -> anyhow::Result<u8> {
    let (mut stakes, mut books) = (Stakes::default(), Books::new());
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            stakes.observe(&entry);
            books.apply(entry.at, &entry.draft()).with_context(|| format!("entry {}", entry.seq))?;
        }
    }
    let rows: Vec<AtStake> = stakes
        .finish(&books)
        .into_iter()
        .map(|(session, stake)| AtStake {
            session,
            role: if stake.as_provider { "provider" } else { "consumer" },
            provider: stake.provider,
            consumer: stake.consumer,
            opened_at: utc(stake.opened_at),
            closed: stake.closed,
            held_msat: stake.amount.0,
        })
        .collect();
    match format {
        Format::Json => print_json(&rows)?,
        Format::Table => {
            let mut out = table(&["session", "role", "peer", "opened", "closed", "msat"], 5);
            for row in rows {
                let peer = if row.role == "provider" { row.consumer } else { row.provider };
                out.add_row([
                    row.session.to_string(),
                    row.role.into(),
                    peer.short(),
                    row.opened_at,
                    row.closed.to_string(),
                    row.held_msat.to_string(),
                ]);
            }
            print(&out.to_string())?;
            eprintln!("`claim --session SESSION --out FILE` writes what proves it");
        }
    }
    Ok(CLEAN)
}

/// One claim's part of `verify --format json`.
#[derive(Debug, Serialize)]
pub(crate) struct ClaimVerdict {
    maker: &'static str,
    network: String,
    session: Option<SessionId>,
    provider: Option<NodeKey>,
    consumer: Option<NodeKey>,
    pieces: u64,
    slices: u64,
    receipts: u64,
    last_receipt: Option<ReceiptId>,
    acknowledged_requests: u64,
    credit_note_msat: Option<u64>,
    #[serde(flatten)]
    figures: Figures,
}

/// What a claim, or a claim and its answer, come to.
#[derive(Debug, Clone, Copy, Serialize)]
#[allow(clippy::struct_field_names)]
pub(crate) struct Figures {
    paid_msat: u64,
    charged_msat: u64,
    refunded_msat: u64,
    owed_msat: u64,
}

impl From<ClaimFigures> for Figures {
    fn from(f: ClaimFigures) -> Figures {
        Figures { paid_msat: f.paid.0, charged_msat: f.charged.0, refunded_msat: f.refunded.0, owed_msat: f.owed.0 }
    }
}

impl From<&ClaimReport> for ClaimVerdict {
    fn from(report: &ClaimReport) -> ClaimVerdict {
        ClaimVerdict {
            maker: report.maker.name(),
            network: report.network.clone(),
            session: report.session,
            provider: report.provider,
            consumer: report.consumer,
            pieces: report.pieces,
            slices: report.slices,
            receipts: report.receipts,
            last_receipt: report.last_receipt,
            acknowledged_requests: report.acknowledged,
            credit_note_msat: report.credit_note.map(|amount| amount.0),
            figures: report.figures.into(),
        }
    }
}

/// `verify --format json` on claims.
#[derive(Debug, Serialize)]
struct Verdict<'a> {
    format: &'static str,
    version: u32,
    verdict: &'static str,
    findings_total: u64,
    files: Vec<FileVerdict<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cross: Option<&'a [Finding]>,
    /// By both files together.
    #[serde(skip_serializing_if = "Option::is_none")]
    together: Option<Figures>,
}

#[derive(Debug, Serialize)]
struct FileVerdict<'a> {
    file: String,
    kind: &'static str,
    node: Option<NodeKey>,
    claim: ClaimVerdict,
    findings_total: u64,
    findings: &'a [Finding],
}

/// Says what one claim proves, or a claim and the answer to it.
pub(crate) fn verdict(files: &[(&Path, &ClaimReport)], format: Format) -> anyhow::Result<u8> {
    let crossed = match files {
        [(_, one), (_, other)] => Some(cross_claims(one, other).context("these two say nothing about each other")?),
        _ => None,
    };
    let across = crossed.as_ref().map(|(_, findings)| findings.as_slice());
    let total =
        files.iter().map(|(_, report)| report.findings_total).sum::<u64>() + across.map_or(0, <[_]>::len) as u64;
    let verdict = if total == 0 { "clean" } else { "findings" };
    match format {
        Format::Json => {
            let files = files.iter().map(|(path, report)| FileVerdict {
                file: path.display().to_string(),
                kind: "claim",
                node: report.provider,
                claim: ClaimVerdict::from(*report),
                findings_total: report.findings_total,
                findings: &report.findings,
            });
            print_json(&Verdict {
                format: "satgrid-verify",
                version: 1,
                verdict,
                findings_total: total,
                files: files.collect(),
                cross: across,
                together: crossed.as_ref().map(|(figures, _)| Figures::from(*figures)),
            })?;
        }
        Format::Table => {
            for (path, report) in files {
                let name = path.display().to_string();
                print(&text(&name, report))?;
                print_findings(&name, report.findings_total, &report.findings)?;
            }
            if let Some((figures, findings)) = &crossed {
                print_findings("both files", findings.len() as u64, findings)?;
                print(&format!("by both files together {} are owed", figures.owed))?;
            }
            print(&format!("verdict: {verdict}"))?;
        }
    }
    Ok(if total == 0 { CLEAN } else { FINDINGS })
}

fn text(name: &str, report: &ClaimReport) -> String {
    let known = |key: Option<NodeKey>| key.map_or_else(|| "-".into(), |key| key.to_string());
    let figures = report.figures;
    let mut out = table(&["", "msat"], 1);
    for (label, amount) in [
        (format!("paid, {} slices", report.slices), figures.paid),
        (
            format!("charged, {} receipts and {} acknowledged requests", report.receipts, report.acknowledged),
            figures.charged,
        ),
        ("refunded".into(), figures.refunded),
        ("owed by the provider".into(), figures.owed),
    ] {
        out.add_row([label, amount.0.to_string()]);
    }
    format!(
        "{name}: a claim by the {} on {}\nsession {}\nprovider {}\nconsumer {}\n{out}",
        report.maker.name(),
        report.network,
        report.session.map_or_else(|| "-".into(), |id| id.to_string()),
        known(report.provider),
        known(report.consumer),
    )
}
