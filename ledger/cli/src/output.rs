//! Tables and JSON on stdout, hints on stderr.

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets::UTF8_BORDERS_ONLY};
use satgrid_ledger::audit::{Finding, MAX_FINDINGS};
use serde::Serialize;
use std::io::{self, Write};
use thiserror::Error;

/// An error that says what to do about it.
#[derive(Debug, Error)]
#[error("{what}")]
pub(crate) struct Hinted {
    pub(crate) what: String,
    pub(crate) hint: String,
}

pub(crate) fn hinted(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Hinted { what: what.into(), hint: hint.into() }.into()
}

/// The hint in an error's chain, if there is one.
pub(crate) fn hint(error: &anyhow::Error) -> Option<&str> {
    error.chain().find_map(|cause| cause.downcast_ref::<Hinted>()).map(|hinted| hinted.hint.as_str())
}

/// Whoever read our stdout has read enough.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is))
}

pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("writing to stdout")
}

pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// A table with these headings; columns from `numbers` on are set to the right.
pub(crate) fn table(headings: &[&str], numbers: usize) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY).set_header(headings);
    table.column_iter_mut().skip(numbers).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

/// A table of findings, or that there are none.
pub(crate) fn print_findings(name: &str, total: u64, findings: &[Finding]) -> anyhow::Result<()> {
    if total == 0 {
        return print(&format!("{name}: no findings"));
    }
    print(&format!("{name}: {total} findings"))?;
    let mut out = table(&["rule", "entry", "session", "party", "detail"], 5);
    for finding in findings {
        out.add_row([
            finding.rule.id().to_owned(),
            finding.entry.map_or_else(String::new, |n| n.to_string()),
            finding.session.map_or_else(String::new, |id| id.short()),
            finding.party.to_string(),
            finding.detail.clone(),
        ]);
    }
    print(&out.to_string())?;
    if total > findings.len() as u64 {
        print(&format!("only the first {MAX_FINDINGS} are listed"))?;
    }
    Ok(())
}
