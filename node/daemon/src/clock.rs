//! The machine's clock against others': invoices, quotes and listings are judged by it. `doctor` asks once, a running node
//! at its start and from time to time; it says what it finds and stops nothing, since a witness may be wrong too.
//!
//! Two witnesses: the newest block of the chain source (no block is more than two hours ahead of the time, and on a public
//! network one comes every ten minutes), and the `Date` that the chain source and the relays answer with over HTTP.

use crate::{
    config::{ChainSource, Config, Network},
    drive::now,
    up,
};
use reqwest::header::DATE;
use satgrid_wallet_ldk::Chain;
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// An invoice of a slice lives for two minutes, and a quote's times may be off by as much.
const MOST_OFF_S: u64 = 60;
/// How far ahead of the time a block may be (consensus).
const BLOCK_AHEAD_S: u64 = 2 * 3_600;
/// A public network without a block for so long: once in many centuries, so a clock or a source is wrong.
const BLOCK_BEHIND_S: u64 = 6 * 3_600;
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How often a running node asks, and how often while its clock is off.
const ASK_EVERY: Duration = Duration::from_secs(600);
const ASK_AGAIN: Duration = Duration::from_secs(30);

pub(crate) const REMEDY: &str = "set the clock (timedatectl set-ntp true): invoices, quotes and listings expire by it";

/// What one witness says of this clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Word {
    Right(String),
    /// Or the witness stands still.
    Doubtful(String),
    Wrong(String),
}

/// What is wrong with the clock, as far as a running node knows.
pub(crate) type Trouble = watch::Receiver<Option<String>>;

/// Asks the witnesses until the shutdown.
pub(crate) fn watch(config: &Config, shutdown: CancellationToken) -> Trouble {
    let (tell, trouble) = watch::channel(None);
    let config = config.clone();
    tokio::spawn(async move {
        loop {
            let wrong = words(&config).await.into_iter().find_map(|word| match word {
                Word::Wrong(detail) => Some(format!("this machine's clock is wrong: {detail}")),
                Word::Right(_) | Word::Doubtful(_) => None,
            });
            if *tell.borrow() != wrong {
                match &wrong {
                    Some(reason) => tracing::error!(hint = REMEDY, "{reason}"),
                    None => tracing::info!("this machine's clock is right again"),
                }
            }
            let pause = if wrong.is_some() { ASK_AGAIN } else { ASK_EVERY };
            tell.send_replace(wrong);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
    trouble
}

/// What each witness says that answers.
pub(crate) async fn words(config: &Config) -> Vec<Word> {
    let mut words = Vec::new();
    if let Some(source) = config.wallet.chain.as_ref().and_then(|_| up::chain_source(config).ok()) {
        let tip = tokio::time::timeout(ANSWER_WITHIN, Chain::of(&source).tip_time()).await;
        if let Ok(Ok(tip_s)) = tip {
            words.push(against_block(now().as_secs(), tip_s, config.node.network != Network::Regtest));
        }
    }
    for url in addresses(config) {
        if let Some((host, date_s)) = date(&url).await {
            words.push(against_date(now().as_secs(), &host, date_s));
        }
    }
    words
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

fn against_block(now_s: u64, tip_s: u64, public: bool) -> Word {
    let (ahead, behind) = (tip_s.saturating_sub(now_s), now_s.saturating_sub(tip_s));
    if ahead > BLOCK_AHEAD_S {
        let detail = format!("the newest block is of {} from now: this clock is behind", span(ahead));
        return Word::Wrong(detail);
    }
    if public && behind > BLOCK_BEHIND_S {
        let detail =
            format!("the newest block is {} old: this clock is ahead, or the chain source stands still", span(behind));
        return Word::Doubtful(detail);
    }
    Word::Right("it agrees with the newest block".to_owned())
}

fn against_date(now_s: u64, host: &str, date_s: u64) -> Word {
    let off = now_s.abs_diff(date_s);
    if off <= MOST_OFF_S {
        return Word::Right(format!("it agrees with {host}"));
    }
    let way = if now_s > date_s { "ahead of" } else { "behind" };
    Word::Wrong(format!("it is {} {way} {host}", span(off)))
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
    use super::*;

    const NOW: u64 = 1_800_000_000;
    const DAY: u64 = 86_400;

    #[test]
    fn a_clock_that_is_wrong_by_a_day_is_found_either_way() {
        let right = |detail: &str| Word::Right(format!("it agrees with {detail}"));
        let block = |tip_s: u64, public: bool| against_block(NOW, tip_s, public);
        let behind = Word::Wrong("the newest block is of 24 h from now: this clock is behind".to_owned());
        assert_eq!(block(NOW + DAY, true), behind);
        assert_eq!(block(NOW + DAY, false), behind);
        let still = "the newest block is 24 h old: this clock is ahead, or the chain source stands still";
        assert_eq!(block(NOW - DAY, true), Word::Doubtful(still.to_owned()));
        // Nobody mines on regtest unless asked.
        assert_eq!(block(NOW - DAY, false), right("the newest block"));
        assert_eq!(block(NOW + 7_000, true), right("the newest block"));
        assert_eq!(block(NOW - 5_000, true), right("the newest block"));
        let date = |date_s: u64| against_date(NOW, "relay.example", date_s);
        let wrong = |detail: &str| Word::Wrong(format!("it is {detail} relay.example"));
        assert_eq!(date(NOW - 60), right("relay.example"));
        assert_eq!(date(NOW - 61), wrong("61 s ahead of"));
        assert_eq!(date(NOW - DAY), wrong("24 h ahead of"));
        assert_eq!(date(NOW + 3 * DAY), wrong("3 days behind"));
    }
}
