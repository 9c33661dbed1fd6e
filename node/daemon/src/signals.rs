//! When the operator says stop: SIGTERM, SIGINT, or the end of the terminal.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Resolves at the first of SIGTERM, SIGINT and SIGHUP. A signal that cannot be watched keeps its default, which ends us.
pub(crate) async fn stop() {
    let watch = |kind| signal(kind).ok();
    let (terminate, interrupt, hang_up) =
        (watch(SignalKind::terminate()), watch(SignalKind::interrupt()), watch(SignalKind::hangup()));
    tokio::select! {
        () = next(terminate) => {}
        () = next(interrupt) => {}
        () = next(hang_up) => {}
    }
}

async fn next(signal: Option<Signal>) {
    match signal {
        Some(mut signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Has this process told to stop (SIGTERM) when its parent, process `parent`, is gone: nothing that a demo or a test
/// started outlives it, however it ends.
#[cfg(target_os = "linux")]
pub(crate) fn end_with(parent: u32) -> anyhow::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::TERM))?;
    let now = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    // It may have ended before the line above.
    anyhow::ensure!(now == Some(parent), "the parent process {parent} is gone");
    Ok(())
}

/// Elsewhere nothing tells; whoever started this process ends it.
#[cfg(not(target_os = "linux"))]
pub(crate) fn end_with(_parent: u32) -> anyhow::Result<()> {
    Ok(())
}
