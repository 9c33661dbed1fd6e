//! `satgrid-ledger`: the auditor's tool. See the library for what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    satgrid_ledger_cli::run(std::env::args_os())
}
