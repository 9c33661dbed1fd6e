//! `satgrid ledger ...`: the auditor's tool, the same code as the `satgrid-ledger` binary, with its exit codes.

use std::ffi::OsString;
use std::process::ExitCode;

pub(crate) fn run(args: Vec<OsString>) -> ExitCode {
    let mut line = vec![OsString::from("satgrid ledger")];
    line.extend(args);
    satgrid_ledger_cli::run(line)
}
