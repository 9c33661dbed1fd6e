//! Counters in Prometheus' text format. A room that has figures implements [`MetricsSource`]; the daemon collects them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::histogram::Histogram;

/// Appends its families in Prometheus' text format, each with `# HELP` and `# TYPE`. Never blocks on I/O.
pub trait MetricsSource: Send + Sync {
    fn render(&self, out: &mut String);
}

/// Everything that `/metrics` shows, in the order in which it was registered.
#[derive(Default, Clone)]
pub struct MetricsRegistry {
    sources: Vec<Arc<dyn MetricsSource>>,
}

impl MetricsRegistry {
    pub fn register(&mut self, source: Arc<dyn MetricsSource>) {
        self.sources.push(source);
    }

    pub fn render(&self) -> String {
        let mut out = String::new();
        for source in &self.sources {
            source.render(&mut out);
        }
        out
    }
}

/// The edge's own figures. Labels are route patterns and statuses, never a client's text, so their number is bounded.
#[derive(Debug, Default)]
pub struct ApiMetrics {
    responses: Mutex<BTreeMap<(String, u16), u64>>,
    heads: Mutex<BTreeMap<String, Arc<Histogram>>>,
    streams_opened: AtomicU64,
    streams_closed: AtomicU64,
    clients_left: AtomicU64,
}

impl ApiMetrics {
    pub(crate) fn responded(&self, route: &str, status: u16, after: Duration) {
        let heads = {
            let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(heads.entry(route.to_owned()).or_default())
        };
        heads.observe(after);
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        *responses.entry((route.to_owned(), status)).or_default() += 1;
    }

    /// The stream counts as open until the guard is dropped.
    pub(crate) fn stream_opened(self: &Arc<Self>) -> impl Drop + use<> {
        struct Open(Arc<ApiMetrics>);
        impl Drop for Open {
            fn drop(&mut self) {
                self.0.streams_closed.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.streams_opened.fetch_add(1, Ordering::Relaxed);
        Open(Arc::clone(self))
    }

    pub(crate) fn client_left(&self) {
        self.clients_left.fetch_add(1, Ordering::Relaxed);
    }

    /// Streams that are open now.
    pub fn open_streams(&self) -> u64 {
        let closed = self.streams_closed.load(Ordering::Relaxed);
        self.streams_opened.load(Ordering::Relaxed).saturating_sub(closed)
    }
}

impl MetricsSource for ApiMetrics {
    fn render(&self, out: &mut String) {
        out.push_str("# HELP satgrid_api_responses_total HTTP responses by route and status.\n");
        out.push_str("# TYPE satgrid_api_responses_total counter\n");
        for ((route, status), count) in &*self.responses.lock().unwrap_or_else(PoisonError::into_inner) {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "satgrid_api_responses_total{{route=\"{route}\",status=\"{status}\"}} {count}");
        }
        out.push_str("# HELP satgrid_api_response_seconds From a request to the head of its response.\n");
        out.push_str("# TYPE satgrid_api_response_seconds histogram\n");
        for (route, heads) in &*self.heads.lock().unwrap_or_else(PoisonError::into_inner) {
            heads.series(out, "satgrid_api_response_seconds", &format!("route=\"{route}\""));
        }
        out.push_str("# HELP satgrid_api_streams_open Streams open now.\n# TYPE satgrid_api_streams_open gauge\n");
        let _ = writeln!(out, "satgrid_api_streams_open {}", self.open_streams());
        out.push_str("# HELP satgrid_api_clients_left_total Streams whose reader went away or stalled.\n");
        out.push_str("# TYPE satgrid_api_clients_left_total counter\n");
        let _ = writeln!(out, "satgrid_api_clients_left_total {}", self.clients_left.load(Ordering::Relaxed));
    }
}
