//! A histogram of durations in Prometheus' text format: fixed bounds, counted without a lock.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Upper bounds in milliseconds. The last bucket has none.
const BOUNDS_MS: [u64; 14] = [5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000];

/// How long things took.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS_MS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, took: Duration) {
        let at = BOUNDS_MS.iter().position(|bound| took <= Duration::from_millis(*bound)).unwrap_or(BOUNDS_MS.len());
        self.buckets[at].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Appends the samples of one series; `labels` is empty or `name="value"` pairs. The family's head is the caller's.
    pub fn series(&self, out: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let braced = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let mut below = 0;
        // Writing to a String cannot fail.
        for (at, bucket) in self.buckets.iter().enumerate() {
            below += bucket.load(Ordering::Relaxed);
            let bound = BOUNDS_MS.get(at).map_or_else(|| "+Inf".to_owned(), |ms| seconds(ms.saturating_mul(1_000)));
            let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {below}");
        }
        let _ = writeln!(out, "{name}_sum{braced} {}", seconds(self.sum_us.load(Ordering::Relaxed)));
        let _ = writeln!(out, "{name}_count{braced} {below}");
    }

    /// A whole family of one series.
    pub fn family(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        self.series(out, name, "");
    }
}

/// Microseconds as seconds, without a float.
fn seconds(micros: u64) -> String {
    let (whole, part) = (micros / 1_000_000, micros % 1_000_000);
    if part == 0 { whole.to_string() } else { format!("{whole}.{part:06}").trim_end_matches('0').to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative() {
        let histogram = Histogram::default();
        for ms in [1, 5, 6, 900, 400_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut out = String::new();
        histogram.series(&mut out, "x_seconds", "route=\"/v1\"");
        for line in [
            "x_seconds_bucket{route=\"/v1\",le=\"0.005\"} 2\n",
            "x_seconds_bucket{route=\"/v1\",le=\"0.01\"} 3\n",
            "x_seconds_bucket{route=\"/v1\",le=\"1\"} 4\n",
            "x_seconds_bucket{route=\"/v1\",le=\"300\"} 4\n",
            "x_seconds_bucket{route=\"/v1\",le=\"+Inf\"} 5\n",
            "x_seconds_sum{route=\"/v1\"} 400.912\n",
            "x_seconds_count{route=\"/v1\"} 5\n",
        ] {
            assert!(out.contains(line), "{line} in {out}");
        }
    }
}
