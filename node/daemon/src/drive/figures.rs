//! The roles' figures for `/metrics`, from the views that the drivers keep.

use super::{consumer::ConsumerView, provider::ProviderView};
use satgrid_api::MetricsSource;
use std::{
    fmt::Write as _,
    sync::{Arc, RwLock},
};

/// What is rendered. Every name is fixed, so their number is bounded.
pub(crate) struct Figures {
    pub provider: Option<Arc<RwLock<ProviderView>>>,
    pub consumer: Arc<RwLock<ConsumerView>>,
}

impl MetricsSource for Figures {
    fn render(&self, out: &mut String) {
        if let Ok(view) = self.consumer.read() {
            let c = &view.counters;
            counter(out, "satgrid_calls_total", "Calls taken from the API.", c.calls);
            counter(out, "satgrid_calls_failed_total", "Calls that ended in an error.", c.failed);
            counter(out, "satgrid_failovers_total", "Streams that went on at another provider.", c.failovers);
            counter(out, "satgrid_receipts_total", "Receipts countersigned.", c.receipts);
            counter(out, "satgrid_slices_paid_total", "Slices paid.", c.slices);
            counter(out, "satgrid_misbehaviour_total", "Proofs kept against providers.", c.misbehaviour);
            gauge(out, "satgrid_consumer_exposure_msat", "Most that can be lost now.", view.exposure.0);
        }
        if let Some(view) = self.provider.as_ref().and_then(|view| view.read().ok()) {
            let c = &view.counters;
            counter(out, "satgrid_provider_requests_total", "Requests started for consumers.", c.requests_started);
            counter(out, "satgrid_provider_receipts_total", "Receipts that both signed.", c.receipts);
            counter(out, "satgrid_provider_abandoned_total", "Requests that ended at their last ack.", c.abandoned);
            counter(out, "satgrid_provider_slices_total", "Slices received.", c.slices);
            gauge(out, "satgrid_provider_exposure_msat", "Most that can be lost now.", view.exposure.0);
        }
    }
}

fn counter(out: &mut String, name: &str, help: &str, value: u64) {
    family(out, name, help, "counter", value);
}
fn gauge(out: &mut String, name: &str, help: &str, value: u64) {
    family(out, name, help, "gauge", value);
}
fn family(out: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    // Writing to a string has no failing case.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
}
