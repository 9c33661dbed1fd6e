//! The auditor's tool, as a library: `satgrid-ledger` and `satgrid ledger` are the same code.
//!
//! It needs no key, no model and no network. Data goes to stdout, talk to stderr. Exit codes: 0 clean, 1 findings, 2
//! unreadable or misused. Reading a journal never blocks the node that writes it.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod args;
mod balance;
mod books;
mod check;
mod claim;
mod export;
mod misbehaviour;
mod movements;
mod output;
mod prove;
mod prune;
mod rates;
mod reconcile;
mod show;
mod source;
mod statement;
mod time;
mod verify;

pub use args::Args;

use args::Command;
use clap::Parser as _;
use std::{ffi::OsString, process::ExitCode};

/// Everything was as it must be.
pub const CLEAN: u8 = 0;
/// The files could be read, and something in them is wrong.
pub const FINDINGS: u8 = 1;
/// A file could not be read, or the command makes no sense.
pub const UNREADABLE: u8 = 2;

/// Runs one command with the given arguments, the program's name first. Must not be called within a tokio runtime:
/// there, use [`run_async`].
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run_async(args)),
        Err(error) => {
            eprintln!("error: starting the runtime: {error}");
            ExitCode::from(UNREADABLE)
        }
    }
}

/// As [`run`], on the caller's runtime and with arguments that were parsed before.
pub async fn run_async(args: Args) -> ExitCode {
    let done = match args.command {
        Command::Export(args) => export::run(args).await,
        Command::Verify(args) => verify::run(args),
        Command::Show(args) => show::run(args).await,
        Command::Balance(args) => balance::run(args).await,
        Command::Statement(args) => statement::run(args).await,
        Command::Prove(args) => prove::run(args).await,
        Command::Check(args) => check::run(&args),
        Command::Checkpoint(args) => prove::checkpoint(args).await,
        Command::Claim(args) => claim::run(args).await,
        Command::Reconcile(args) => reconcile::run(args).await,
        Command::Prune(args) => prune::run(args).await,
        Command::Snapshot(args) => prune::snapshot(args).await,
        Command::Misbehaviour(args) => misbehaviour::run(args).await,
        Command::Fraud(args) => prove::fraud(&args),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) if output::is_broken_pipe(&error) => ExitCode::from(CLEAN),
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = output::hint(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(UNREADABLE)
        }
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    // `--help` and `--version` are errors to clap and successes to everyone else.
    let code = if error.use_stderr() { UNREADABLE } else { CLEAN };
    let _ = error.print();
    ExitCode::from(code)
}
