//! Dollars for a bitcoin: a fixed figure, or a URL that is asked now and then. None by default; display only.

use crate::drive::now;
use satgrid_api::{ExchangeRate, MaxPrice, MaxPriceUsd, ServiceError};
use satgrid_types::{Msat, MsatPerMtok};
use serde_json::Value;
use std::{
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// A rate from a URL that is older than this is shown no more.
const MAX_AGE_MS: u64 = 24 * 3_600 * 1_000;
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Above any price of a bitcoin that these fields could hold in millionths of a dollar.
const MAX_WHOLE_DIGITS: usize = 12;

/// The newest known rate. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Rate {
    newest: Arc<RwLock<Option<ExchangeRate>>>,
    fixed: bool,
}

/// Where the rate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// `fixed:97000.50`
    Fixed { micro_usd_per_btc: u64 },
    /// A URL that answers JSON; after `#` the JSON pointer of the figure, such as `#/data/amount`.
    Url { url: String, pointer: String },
}

impl std::str::FromStr for Source {
    type Err = String;
    fn from_str(text: &str) -> Result<Source, String> {
        if let Some(figure) = text.strip_prefix("fixed:") {
            let micro_usd_per_btc = micro(figure).ok_or_else(|| format!("{figure:?} is no price in dollars"))?;
            return Ok(Source::Fixed { micro_usd_per_btc });
        }
        let (url, pointer) = text.split_once('#').unwrap_or((text, ""));
        let local = ["http://127.0.0.1", "http://localhost", "http://[::1]"].iter().any(|start| url.starts_with(start));
        if !url.starts_with("https://") && !local {
            return Err("write fixed:DOLLARS or https://...#/json/pointer".to_owned());
        }
        if !pointer.is_empty() && !pointer.starts_with('/') {
            return Err(format!("{pointer:?} is no JSON pointer: it begins with /"));
        }
        Ok(Source::Url { url: url.to_owned(), pointer: pointer.to_owned() })
    }
}

/// A decimal above zero in millionths, without a float; further digits are dropped.
fn micro(decimal: &str) -> Option<u64> {
    let (whole, fraction) = decimal.trim().split_once('.').unwrap_or((decimal.trim(), ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || whole.len() > MAX_WHOLE_DIGITS || !digits(whole) || !digits(fraction) {
        return None;
    }
    let six: String = fraction.chars().chain("000000".chars()).take(6).collect();
    let value = whole.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(six.parse().ok()?)?;
    (value > 0).then_some(value)
}

/// A price in a JSON answer: a number, or a string that holds one.
fn figure(answer: &Value, pointer: &str) -> Option<u64> {
    match answer.pointer(pointer)? {
        Value::String(text) => micro(text),
        // As it was written, not as a float.
        Value::Number(number) => micro(&number.to_string()),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

impl Rate {
    /// Starts with this source; a URL is asked at once and then every `refresh`.
    pub(crate) fn start(source: Option<Source>, refresh: Duration, shutdown: CancellationToken) -> Rate {
        let rate = Rate { fixed: matches!(source, Some(Source::Fixed { .. })), ..Rate::default() };
        match source {
            None => {}
            Some(Source::Fixed { micro_usd_per_btc }) => rate.set(micro_usd_per_btc, "fixed".to_owned()),
            Some(Source::Url { url, pointer }) => {
                tokio::spawn(rate.clone().follow(url, pointer, refresh, shutdown));
            }
        }
        rate
    }

    /// What a bitcoin is worth, unless nobody said so lately.
    pub(crate) fn now(&self) -> Option<ExchangeRate> {
        let newest = self.newest.read().ok()?.clone()?;
        let fresh = self.fixed || now().since(newest.at) <= MAX_AGE_MS;
        fresh.then_some(newest)
    }

    /// A caller's price limits in msat: those in dollars by the rate of this moment, the lower where both were said.
    pub(crate) fn max_price(&self, asked: &MaxPrice) -> Result<MaxPrice, ServiceError> {
        let MaxPriceUsd { prompt, completion, request } = asked.usd;
        if prompt.or(completion).or(request).is_none() {
            return Ok(*asked);
        }
        let rate = self.now().ok_or_else(|| ServiceError::InvalidRequest {
            param: "provider.max_price".into(),
            message: "A price in dollars needs an exchange rate, and this node has none now (api.exchange_rate). Use \
                      `prompt_msat_per_mtok`, `completion_msat_per_mtok` and `request_msat`."
                .into(),
        })?;
        let lower = |said: Option<u64>, usd: Option<u64>| {
            let usd = usd.map(|usd| rate.msat_of_micro_usd(usd).map_or(u64::MAX, |msat| msat.0));
            said.into_iter().chain(usd).min()
        };
        Ok(MaxPrice {
            prompt: lower(asked.prompt.map(|price| price.0), prompt).map(MsatPerMtok),
            completion: lower(asked.completion.map(|price| price.0), completion).map(MsatPerMtok),
            request: lower(asked.request.map(|price| price.0), request).map(Msat),
            usd: MaxPriceUsd::default(),
        })
    }

    fn set(&self, micro_usd_per_btc: u64, source: String) {
        if let Ok(mut newest) = self.newest.write() {
            *newest = Some(ExchangeRate { micro_usd_per_btc, at: now(), source });
        }
    }

    async fn follow(self, url: String, pointer: String, refresh: Duration, shutdown: CancellationToken) {
        let host = url.split('/').nth(2).unwrap_or_default().to_owned();
        let client = reqwest::Client::builder().timeout(ANSWER_WITHIN).build().unwrap_or_default();
        loop {
            match ask(&client, &url, &pointer).await {
                Ok(micro_usd_per_btc) => self.set(micro_usd_per_btc, host.clone()),
                Err(error) => tracing::warn!(%host, error = %format!("{error:#}"), "no exchange rate was had"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(refresh) => {}
            }
        }
    }
}

async fn ask(client: &reqwest::Client, url: &str, pointer: &str) -> anyhow::Result<u64> {
    let mut response = client.get(url).send().await?.error_for_status()?;
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await? {
        body.extend_from_slice(&piece);
        anyhow::ensure!(body.len() <= MAX_ANSWER_BYTES, "the answer is longer than {MAX_ANSWER_BYTES} bytes");
    }
    let answer: Value = serde_json::from_slice(&body)?;
    figure(&answer, pointer).ok_or_else(|| anyhow::anyhow!("there is no price at {pointer:?} of the answer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        let check = |text: &str, expect: Option<Source>| assert_eq!(text.parse::<Source>().ok(), expect, "{text}");
        check("fixed:97000.5", Some(Source::Fixed { micro_usd_per_btc: 97_000_500_000 }));
        check("fixed:0", None);
        check("fixed:-1", None);
        check("fixed:1e5", None);
        let url = |url: &str, pointer: &str| Some(Source::Url { url: url.into(), pointer: pointer.into() });
        check("https://rates.example/v1#/data/amount", url("https://rates.example/v1", "/data/amount"));
        check("http://127.0.0.1:80/x", url("http://127.0.0.1:80/x", ""));
        check("http://rates.example/v1", None);
        check("https://rates.example/v1#amount", None);
    }

    #[test]
    fn figures_are_read_without_floats() {
        let answer: Value = serde_json::from_str(r#"{"a": {"b": "97123.4567899"}, "n": 97000.25, "x": null}"#).unwrap();
        assert_eq!(figure(&answer, "/a/b"), Some(97_123_456_789));
        assert_eq!(figure(&answer, "/n"), Some(97_000_250_000));
        assert_eq!(figure(&answer, "/x"), None);
        assert_eq!(figure(&answer, ""), None);
    }

    #[test]
    fn limits_in_dollars_need_a_rate_and_never_buy_dearer() {
        let usd = MaxPriceUsd { prompt: Some(250_000), ..MaxPriceUsd::default() };
        let asked = MaxPrice { prompt: Some(MsatPerMtok(300_000)), usd, ..MaxPrice::default() };
        assert!(Rate::default().max_price(&asked).is_err());
        assert!(Rate::default().max_price(&MaxPrice::default()).is_ok());
        let rate = Rate::default();
        rate.set(100_000_000_000, "fixed".into());
        assert_eq!(rate.max_price(&asked).unwrap().prompt, Some(MsatPerMtok(250_000)));
        let lower = MaxPrice { prompt: Some(MsatPerMtok(9)), ..asked };
        assert_eq!(rate.max_price(&lower).unwrap().prompt, Some(MsatPerMtok(9)));
    }

    #[tokio::test]
    async fn a_url_is_asked_and_its_answer_kept_with_its_time() {
        let app = axum::Router::new().route("/", axum::routing::get(|| async { r#"{"usd": "100000"}"# }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let source = Source::Url { url, pointer: "/usd".into() };
        let shutdown = CancellationToken::new();
        let rate = Rate::start(Some(source), Duration::from_millis(20), shutdown.clone());
        let known = async {
            loop {
                if let Some(known) = rate.now() {
                    return known;
                }
                tokio::task::yield_now().await;
            }
        };
        let known = tokio::time::timeout(Duration::from_secs(20), known).await.unwrap();
        assert_eq!(known.micro_usd_per_btc, 100_000_000_000);
        assert!(known.at.0 > 0 && known.source.starts_with("127.0.0.1"));
        shutdown.cancel();
    }
}
