//! An end to batches that never end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest that one batch may take: 512 positions of a large model on a slow machine, several times over.
const BATCH_WITHIN: Duration = Duration::from_secs(900);

/// Ends the process when one batch takes too long, so that the node hears of a hang as of any other death.
pub(crate) struct Watchdog {
    /// Seconds since `origin` at which the running batch began, plus one; 0 between batches.
    began: Arc<AtomicU64>,
    origin: Instant,
}

impl Watchdog {
    pub(crate) fn start() -> io::Result<Self> {
        let (began, origin) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let watched = Arc::clone(&began);
        std::thread::Builder::new().name("engine-watchdog".into()).spawn(move || {
            loop {
                std::thread::sleep(BATCH_WITHIN / 20);
                let began = watched.load(Ordering::Relaxed);
                if began > 0 && origin.elapsed().as_secs() + 1 > began + BATCH_WITHIN.as_secs() {
                    tracing::error!("a batch took longer than {} s", BATCH_WITHIN.as_secs());
                    std::process::abort();
                }
            }
        })?;
        Ok(Self { began, origin })
    }

    pub(crate) fn begin(&self) {
        self.began.store(self.origin.elapsed().as_secs() + 1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.began.store(0, Ordering::Relaxed);
    }
}
