//! What the API's calls came to, for `/metrics`: counts, tokens, msat and times. No key and no text of anybody's.

use satgrid_api::{Bill, Histogram, MetricsSource};
use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

#[derive(Debug, Default)]
pub(crate) struct Meter {
    done: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    output_tokens: AtomicU64,
    cost_msat: AtomicU64,
    first_token: Histogram,
    whole: Histogram,
}

impl Meter {
    /// A key's limit said no.
    pub(super) fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn spoke(&self, after: Duration) {
        self.first_token.observe(after);
    }

    pub(super) fn ended(&self, done: bool, after: Duration, bill: &Bill) {
        let add = |figure: &AtomicU64, n: u64| {
            figure.fetch_add(n, Ordering::Relaxed);
        };
        add(if done { &self.done } else { &self.failed }, 1);
        add(&self.prompt_tokens, u64::from(bill.usage.prompt));
        add(&self.cached_tokens, u64::from(bill.usage.cached_prompt));
        add(&self.output_tokens, u64::from(bill.usage.completion));
        add(&self.cost_msat, bill.cost.0);
        self.whole.observe(after);
    }
}

impl MetricsSource for Meter {
    fn render(&self, out: &mut String) {
        let figures = [
            ("satgrid_api_calls_done_total", "Calls that were answered whole.", &self.done),
            ("satgrid_api_calls_failed_total", "Calls that failed or whose client left.", &self.failed),
            ("satgrid_api_calls_refused_by_key_total", "Calls that a key's limit refused.", &self.refused),
            ("satgrid_api_prompt_tokens_total", "Prompt tokens, each counted once.", &self.prompt_tokens),
            ("satgrid_api_cached_tokens_total", "Prompt tokens that came from a cache.", &self.cached_tokens),
            ("satgrid_api_output_tokens_total", "Tokens received.", &self.output_tokens),
            ("satgrid_api_cost_msat_total", "What providers were paid for them.", &self.cost_msat),
        ];
        for (name, help, figure) in figures {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter");
            let _ = writeln!(out, "{name} {}", figure.load(Ordering::Relaxed));
        }
        self.first_token.family(out, "satgrid_api_first_token_seconds", "From a call to its first token.");
        self.whole.family(out, "satgrid_api_call_seconds", "From a call to its end.");
    }
}
