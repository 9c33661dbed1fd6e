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
