//! The machine's clock against others': invoices, quotes and listings are judged by it.
//!
//! Two witnesses: the newest block of the chain source (no block is more than two hours ahead of the time, and on a public
//! network one comes every ten minutes), and the `Date` that the chain source and the relays answer with over HTTP.

use super::{Finding, fail, ok, warn};
use crate::{
    config::{ChainSource, Config, Network},
    drive::now,
    up,
};
use reqwest::header::DATE;
use satgrid_wallet_ldk::Chain;
use std::time::{Duration, UNIX_EPOCH};

/// An invoice of a slice lives for two minutes, and a quote's times may be off by as much.
const MOST_OFF_S: u64 = 60;
/// How far ahead of the time a block may be (consensus).
const BLOCK_AHEAD_S: u64 = 2 * 3_600;
/// A public network without a block for so long: once in many centuries, so a clock or a source is wrong.
const BLOCK_BEHIND_S: u64 = 6 * 3_600;
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

const REMEDY: &str = "set the clock (timedatectl set-ntp true): invoices, quotes and listings expire by it";

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    runtime.block_on(async {
        let mut findings = Vec::new();
        if let Some(source) = config.wallet.chain.as_ref().and_then(|_| up::chain_source(config).ok()) {
            let tip = tokio::time::timeout(ANSWER_WITHIN, Chain::of(&source).tip_time()).await;
            // A source that does not answer has a line of its own.
            if let Ok(Ok(tip_s)) = tip {
                findings.push(against_block(now().as_secs(), tip_s, config.node.network != Network::Regtest));
            }
        }
        for url in addresses(config) {
            if let Some((host, date_s)) = date(&url).await {
                findings.push(against_date(now().as_secs(), &host, date_s));
            }
        }
        findings
    })
}

/// Who may be asked over HTTP.
fn addresses(config: &Config) -> Vec<String> {
    let esplora = match &config.wallet.chain {
        Some(ChainSource::Esplora { url }) => Some(url.clone()),
        Some(ChainSource::Electrum { .. } | ChainSource::Bitcoind { .. }) | None => None,
    };
    // A relay answers plain HTTP on the same port.
    let relays = config.market.relays.iter().filter_map(|relay| Some(format!("http{}", relay.strip_prefix("ws")?)));
    esplora.into_iter().chain(relays).collect()
}

async fn date(url: &str) -> Option<(String, u64)> {
    let client = reqwest::Client::builder().timeout(ANSWER_WITHIN).redirect(reqwest::redirect::Policy::none());
    let response = client.build().ok()?.get(url).send().await.ok()?;
    let date = httpdate::parse_http_date(response.headers().get(DATE)?.to_str().ok()?).ok()?;
    Some((response.url().host_str()?.to_owned(), date.duration_since(UNIX_EPOCH).ok()?.as_secs()))
}

fn against_block(now_s: u64, tip_s: u64, public: bool) -> Finding {
    let (ahead, behind) = (tip_s.saturating_sub(now_s), now_s.saturating_sub(tip_s));
    if ahead > BLOCK_AHEAD_S {
        let detail = format!("the newest block is of {} from now: this clock is behind", span(ahead));
        return fail("clock", detail, REMEDY);
    }
    if public && behind > BLOCK_BEHIND_S {
        let detail =
            format!("the newest block is {} old: this clock is ahead, or the chain source stands still", span(behind));
        return warn("clock", detail, REMEDY);
    }
    ok("clock", "it agrees with the newest block")
}

fn against_date(now_s: u64, host: &str, date_s: u64) -> Finding {
    let off = now_s.abs_diff(date_s);
    if off <= MOST_OFF_S {
        return ok("clock", format!("it agrees with {host}"));
    }
    let way = if now_s > date_s { "ahead of" } else { "behind" };
    fail("clock", format!("it is {} {way} {host}", span(off)), REMEDY)
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        172_800.. => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    const NOW: u64 = 1_800_000_000;
    const DAY: u64 = 86_400;

    #[test]
    fn a_clock_that_is_wrong_by_a_day_is_found_either_way() {
        let block = |tip_s: u64, public: bool, level: Level, says: &str| {
            let found = against_block(NOW, tip_s, public);
            assert!(found.level == level && found.detail.contains(says), "{tip_s}: {found:?}");
        };
        block(NOW + DAY, true, Level::Fail, "24 h from now: this clock is behind");
        block(NOW + DAY, false, Level::Fail, "behind");
        block(NOW - DAY, true, Level::Warn, "24 h old: this clock is ahead, or the chain source");
        // Nobody mines on regtest unless asked.
        block(NOW - DAY, false, Level::Ok, "agrees");
        block(NOW + 7_000, true, Level::Ok, "agrees");
        block(NOW - 5_000, true, Level::Ok, "agrees");
        let date = |date_s: u64, level: Level, says: &str| {
            let found = against_date(NOW, "relay.example", date_s);
            assert!(found.level == level && found.detail.contains(says), "{date_s}: {found:?}");
        };
        date(NOW - 60, Level::Ok, "agrees with relay.example");
        date(NOW - 61, Level::Fail, "61 s ahead of relay.example");
        date(NOW - DAY, Level::Fail, "24 h ahead of");
        date(NOW + 3 * DAY, Level::Fail, "3 days behind relay.example");
    }
}
