//! Progress on standard error: a bar on a terminal, a line every ten percent elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines come no closer than this, so short steps print none.
const LINE_GAP: Duration = Duration::from_millis(500);

/// A long step whose end is known in bytes. Clones show one and the same bar.
#[derive(Clone)]
pub(crate) struct Bytes(Arc<Inner>);

struct Inner {
    label: String,
    total: AtomicU64,
    done: AtomicU64,
    face: Face,
}

enum Face {
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
    Silent,
}

struct Lines {
    /// The last tenth that was printed.
    tenth: u64,
    printed: Instant,
    gap: Duration,
    sink: Sink,
}

type Sink = Box<dyn FnMut(&str) + Send>;

impl Bytes {
    /// A bar where standard error is a terminal, lines where it is not.
    pub(crate) fn new(label: &str, total: u64) -> Bytes {
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = "{msg} {wide_bar} {percent:>3} %  {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(label.to_owned());
            Bytes::with_face(label, total, Face::Bar(bar))
        } else {
            Bytes::lines(label, total, LINE_GAP, Box::new(|line| eprintln!("{line}")))
        }
    }

    /// Shows nothing: for tests and for `--format json`.
    pub(crate) fn silent() -> Bytes {
        Bytes::with_face("", 0, Face::Silent)
    }

    fn lines(label: &str, total: u64, gap: Duration, sink: Sink) -> Bytes {
        let lines = Lines { tenth: 0, printed: Instant::now(), gap, sink };
        Bytes::with_face(label, total, Face::Lines(Mutex::new(lines)))
    }

    fn with_face(label: &str, total: u64, face: Face) -> Bytes {
        let (total, done) = (AtomicU64::new(total), AtomicU64::new(0));
        Bytes(Arc::new(Inner { label: label.to_owned(), total, done, face }))
    }

    pub(crate) fn set_total(&self, total: u64) {
        self.0.total.store(total, Ordering::Relaxed);
        if let Face::Bar(bar) = &self.0.face {
            bar.set_length(total);
        }
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.set(self.0.done.load(Ordering::Relaxed).saturating_add(bytes));
    }

    pub(crate) fn set(&self, bytes: u64) {
        self.0.done.store(bytes, Ordering::Relaxed);
        match &self.0.face {
            Face::Bar(bar) => bar.set_position(bytes),
            Face::Lines(state) => self.print_tenth(state, bytes),
            Face::Silent => {}
        }
    }

    fn print_tenth(&self, lines: &Mutex<Lines>, bytes: u64) {
        let total = self.0.total.load(Ordering::Relaxed).max(1);
        let tenth = (bytes.saturating_mul(10) / total).min(10);
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if tenth > lines.tenth && lines.printed.elapsed() >= lines.gap {
            lines.tenth = tenth;
            lines.printed = Instant::now();
            let line = format!("{}: {} % of {}", self.0.label, tenth * 10, megabytes(total));
            (lines.sink)(&line);
        }
    }

    /// Ends the step; the bar leaves its line to whoever speaks next.
    pub(crate) fn finish(&self) {
        if let Face::Bar(bar) = &self.0.face {
            bar.finish_and_clear();
        }
    }
}

/// `253.1 MB`, decimal as download pages say it.
pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_every_ten_percent() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        let progress = Bytes::lines(
            "model",
            1_000_000,
            Duration::ZERO,
            Box::new(move |line| sink.lock().unwrap().push(line.to_owned())),
        );
        for _ in 0..1000 {
            progress.add(1000);
        }
        let lines = lines.lock().unwrap();
        assert_eq!(lines.len(), 10);
        assert_eq!((lines[0].as_str(), lines[9].as_str()), ("model: 10 % of 1.0 MB", "model: 100 % of 1.0 MB"));
    }
}
