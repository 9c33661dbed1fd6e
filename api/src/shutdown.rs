//! Two steps of closing: no new work, then no work at all.

use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    /// New completions get 503; open ones go on.
    Draining,
    /// Open streams end with an error now.
    Aborting,
}

/// Seen by every handler and stream.
#[derive(Debug, Clone)]
pub(crate) struct Closing(watch::Receiver<Phase>);

/// Held by the server.
#[derive(Debug)]
pub(crate) struct Closer(watch::Sender<Phase>);

pub(crate) fn pair() -> (Closer, Closing) {
    let (tx, rx) = watch::channel(Phase::Open);
    (Closer(tx), Closing(rx))
}

impl Closer {
    pub(crate) fn drain(&self) {
        self.0.send_replace(Phase::Draining);
    }

    pub(crate) fn abort(&self) {
        self.0.send_replace(Phase::Aborting);
    }
}

impl Closing {
    pub(crate) fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining
    }

    /// Returns when open work must end. Never, if the server is gone: then nobody asks.
    pub(crate) async fn aborted(&mut self) {
        if self.0.wait_for(|phase| *phase == Phase::Aborting).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
