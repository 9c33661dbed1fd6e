//! The node: one binary for provider, consumer and everything around them.
//!
//! This crate joins the pure roles to the world: it reads the configuration, opens the adapters and drives them. It
//! decides nothing about money. Here the command line is taken, carried out, and its errors are told.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod accounts;
mod admin;
mod cli;
mod clock;
mod commands;
mod config;
mod door;
mod drive;
mod embeds;
mod failure;
mod identity;
mod lnurl;
mod models;
mod progress;
mod seed;
mod service;
mod signals;
mod store;
mod telemetry;
mod traces;
mod up;
mod voice;

use clap::Parser;
use std::process::ExitCode;

/// This program, to be started as a child or anew. Where it was replaced or removed since its start, as by an upgrade, what runs is
/// still there under another name: all processes of a node are of one version.
#[cfg(not(test))]
fn program() -> std::io::Result<std::path::PathBuf> {
    let exe = std::env::current_exe()?;
    Ok(if exe.exists() { exe } else { "/proc/self/exe".into() })
}

#[cfg(test)]
use commands::shipped as program;

fn main() -> ExitCode {
    // The children that run llama.cpp and the wallet are this same binary; nothing of the command line is its business.
    let mut args = std::env::args_os().skip(1);
    let first = args.next();
    if first.as_ref().is_some_and(|first| first == commands::engine_worker::NAME) {
        return commands::engine_worker::run(args);
    }
    if first.is_some_and(|first| first == commands::wallet_process::NAME) {
        return commands::wallet_process::run();
    }
    let cli = cli::Cli::parse();
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprint!("{}", failure::report(&error));
            ExitCode::from(failure::exit_code(&error))
        }
    }
}
