//! The engine's child process as a program of its own, for this crate's tests and benchmarks.

use std::process::ExitCode;

use satgrid_engine_llama::{WorkerArgs, worker_main};

fn main() -> ExitCode {
    match WorkerArgs::parse(std::env::args_os().skip(1)) {
        Ok(args) => ExitCode::from(worker_main(args)),
        Err(error) => {
            eprintln!("satgrid-engine-worker: {error}");
            ExitCode::from(64)
        }
    }
}
