//! The commands, one file each. Data goes to standard output, talk to standard error.

mod config;
mod devnet;
mod doctor;
pub(crate) mod engine_worker;
mod init;
mod models;
mod print;

use crate::cli::{Cli, Command};

/// Carries out what the command line says.
pub(crate) fn run(cli: Cli) -> anyhow::Result<()> {
    let globals = cli.globals;
    match cli.command {
        Command::Init(args) => init::run(&globals, &args),
        Command::Config(command) => config::run(&globals, &command),
        Command::Models(command) => models::run(&globals, &command),
        Command::Doctor => doctor::run(&globals),
        Command::Devnet(command) => devnet::run(&globals, &command),
    }
}
