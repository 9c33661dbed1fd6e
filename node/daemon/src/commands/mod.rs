//! The commands, one file each. Data goes to standard output, talk to standard error.

mod admin_client;
mod config;
mod demo;
mod devnet;
mod doctor;
pub(crate) mod engine_worker;
mod identity;
mod init;
mod keys;
mod ledger;
mod market;
mod models;
mod print;
mod status;
mod up;
mod wallet;
pub(crate) mod wallet_process;

#[cfg(test)]
pub(crate) use demo::on_toy::{runs_on_toy, shipped};

use crate::cli::{Cli, Command};
use crate::signals;
use std::process::ExitCode;

/// Carries out what the command line says.
pub(crate) fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let globals = cli.globals;
    if let Some(parent) = globals.with_parent {
        signals::end_with(parent)?;
    }
    match cli.command {
        Command::Init(args) => init::run(&globals, &args),
        Command::Config(command) => config::run(&globals, &command),
        Command::Models(command) => models::run(&globals, &command),
        Command::Up => up::run(&globals),
        Command::Status => status::run(&globals),
        Command::Market(command) => market::run(&globals, &command),
        Command::Wallet(command) => wallet::run(&globals, &command),
        Command::Identity(command) => identity::run(&globals, &command),
        Command::Keys(command) => keys::run(&globals, &command),
        Command::Ledger { args } => return Ok(ledger::run(args)),
        Command::Doctor => doctor::run(&globals),
        Command::Devnet(command) => devnet::run(&globals, &command),
    }?;
    Ok(ExitCode::SUCCESS)
}
