//! `satgrid wallet-process`: the process in which the Lightning node runs. The node starts it; people have no use for it.

use satgrid_wallet_ldk::process::worker_main;
use std::process::ExitCode;

/// The first argument that makes this binary a wallet.
pub(crate) const NAME: &str = "wallet-process";

pub(crate) fn run() -> ExitCode {
    match worker_main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: the wallet's process: {error}\nhint: `satgrid up` starts this by itself");
            ExitCode::FAILURE
        }
    }
}
