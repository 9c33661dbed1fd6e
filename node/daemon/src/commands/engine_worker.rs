//! `satgrid engine-worker`: the child process in which llama.cpp runs. The node starts it; people have no use for it.

use satgrid_engine_llama::{WorkerArgs, worker_main};
use std::ffi::OsString;
use std::process::ExitCode;

use crate::config::LogFormat;
use crate::telemetry;

/// The first argument that makes this binary a worker.
pub(crate) const NAME: &str = "engine-worker";

pub(crate) fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // What the worker prints goes into the node's log.
    if let Err(error) = telemetry::init("warn", LogFormat::Text) {
        eprintln!("error: {error}");
    }
    match WorkerArgs::parse(args) {
        Ok(args) => ExitCode::from(worker_main(args)),
        Err(error) => {
            eprintln!("error: {error}\nhint: `satgrid up` starts this by itself");
            ExitCode::from(2)
        }
    }
}
