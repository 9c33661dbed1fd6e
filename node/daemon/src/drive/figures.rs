//! The roles' figures for `/metrics`, from the views that the drivers keep; and the wallet's and the relays', looked at now
//! and then by a task of their own, so that rendering waits for nobody.

use super::{consumer::ConsumerView, provider::ProviderView};
use satgrid_api::MetricsSource;
use satgrid_market_nostr::RelayHealth;
use satgrid_wallet::{Balance, Lightning};
use std::{
    fmt::Write as _,
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What is rendered. Every name is fixed, so their number is bounded.
pub(crate) struct Figures {
    pub provider: Option<Arc<RwLock<ProviderView>>>,
    pub consumer: Option<Arc<RwLock<ConsumerView>>>,
    pub relays: watch::Receiver<Vec<RelayHealth>>,
    pub wallet: WalletFigures,
}

/// The wallet as it was last looked at.
#[derive(Clone, Default)]
pub(crate) struct WalletFigures(Arc<RwLock<Option<(Balance, Channels)>>>);

#[derive(Debug, Clone, Copy, Default)]
struct Channels {
    all: usize,
    usable: usize,
}

impl WalletFigures {
    /// Looks at the wallet until the node stops.
    pub(crate) fn watch(wallet: Arc<dyn Lightning>, shutdown: CancellationToken) -> WalletFigures {
        let figures = WalletFigures::default();
        let kept = figures.clone();
        tokio::spawn(async move {
            loop {
                if let (Ok(balance), Ok(channels)) = (wallet.balance().await, wallet.channels().await) {
                    let usable = channels.iter().filter(|channel| channel.usable).count();
                    let channels = Channels { all: channels.len(), usable };
                    if let Ok(mut kept) = kept.0.write() {
                        *kept = Some((balance, channels));
                    }
                }
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
            }
        });
        figures
    }

    fn render(&self, out: &mut String) {
        let Some((balance, channels)) = self.0.read().ok().and_then(|known| *known) else { return };
        let all: [(&str, &str, u64); 8] = [
            ("satgrid_wallet_lightning_msat", "Our side of all open channels.", balance.lightning_total.0),
            ("satgrid_wallet_payable_msat", "What can be paid now.", balance.payable.0),
            ("satgrid_wallet_receivable_msat", "What can be received now.", balance.receivable.0),
            ("satgrid_wallet_closing_sat", "In channels that are closing.", balance.closing_sat),
            ("satgrid_wallet_onchain_confirmed_sat", "Confirmed and free on chain.", balance.onchain_confirmed_sat),
            ("satgrid_wallet_onchain_sat", "Everything on chain.", balance.onchain_total_sat),
            ("satgrid_wallet_channels", "Channels.", channels.all as u64),
            ("satgrid_wallet_channels_usable", "Channels that can pay or receive now.", channels.usable as u64),
        ];
        all.iter().for_each(|(name, help, value)| gauge(out, name, help, *value));
    }
}

impl MetricsSource for Figures {
    fn render(&self, out: &mut String) {
        if let Some(view) = self.consumer.as_ref().and_then(|view| view.read().ok()) {
            let c = &view.counters;
            counter(out, "satgrid_calls_total", "Calls taken from the API.", c.calls);
            counter(out, "satgrid_calls_failed_total", "Calls that ended in an error.", c.failed);
            counter(out, "satgrid_failovers_total", "Streams that went on at another provider.", c.failovers);
            counter(out, "satgrid_receipts_total", "Receipts countersigned.", c.receipts);
            counter(out, "satgrid_slices_paid_total", "Slices paid.", c.slices);
            counter(out, "satgrid_misbehaviour_total", "Proofs kept against providers.", c.misbehaviour);
            gauge(out, "satgrid_calls_open", "Calls that wait or run.", view.open_calls as u64);
            gauge(out, "satgrid_consumer_sessions", "Sessions with providers.", view.sessions.len() as u64);
            gauge(out, "satgrid_consumer_exposure_msat", "Most that can be lost now.", view.exposure.0);
            let halted = u64::from(view.halted.is_some());
            gauge(out, "satgrid_consumer_halted", "1 where the consumer has stopped taking work.", halted);
        }
        if let Some(view) = self.provider.as_ref().and_then(|view| view.read().ok()) {
            let c = &view.counters;
            counter(out, "satgrid_provider_requests_total", "Requests started for consumers.", c.requests_started);
            counter(out, "satgrid_provider_requests_refused_total", "Requests refused.", c.requests_refused);
            counter(out, "satgrid_provider_receipts_total", "Receipts that both signed.", c.receipts);
            counter(out, "satgrid_provider_abandoned_total", "Requests that ended at their last ack.", c.abandoned);
            counter(out, "satgrid_provider_slices_total", "Slices received.", c.slices);
            counter(out, "satgrid_provider_violations_total", "Rules broken by consumers.", c.violations);
            counter(out, "satgrid_provider_links_unused_total", "Links that nothing came of.", c.links_unused);
            let forgotten = c.sessions_forgotten;
            counter(out, "satgrid_provider_sessions_forgotten_total", "Sessions in which nothing was paid.", forgotten);
            gauge(out, "satgrid_provider_requests_open", "Requests in hand.", view.open_requests as u64);
            gauge(out, "satgrid_provider_links", "Consumers that are connected.", view.links as u64);
            gauge(out, "satgrid_provider_exposure_msat", "Most that can be lost now.", view.exposure.0);
            let halted = u64::from(view.halted.is_some());
            gauge(out, "satgrid_provider_halted", "1 where the provider has stopped taking work.", halted);
        }
        let relays = self.relays.borrow();
        let connected = relays.iter().filter(|relay| relay.connected).count();
        gauge(out, "satgrid_relays", "Relays that are configured.", relays.len() as u64);
        gauge(out, "satgrid_relays_connected", "Relays that are connected now.", connected as u64);
        drop(relays);
        self.wallet.render(out);
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
