//! Exchange rates that the user brings: `export` never asks anybody for one.

use crate::time::parse_time;
use anyhow::{Context, bail};
use satgrid_types::UnixMs;
use std::{fs, path::Path};

/// A rate is used for this long after its time; then none is known.
const GOOD_FOR_MS: u64 = 24 * 60 * 60 * 1_000;
/// Decimals kept of a rate.
const DECIMALS: u32 = 8;

/// Rates of one currency, by time.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    pub(crate) currency: String,
    rates: Vec<Rate>,
}

/// So much of the currency for one bitcoin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rate {
    pub(crate) at: UnixMs,
    /// As it was given.
    pub(crate) text: String,
    /// In 10^-8 of the currency.
    units: u128,
}

impl Rate {
    /// What so many msat are worth, rounded half up to six decimals.
    pub(crate) fn value(&self, msat: u64) -> String {
        // msat are 10^-11 bitcoin, units 10^-8 of the currency: six decimals are left of nineteen.
        const CUT: u128 = 10u128.pow(13);
        let millionths = (u128::from(msat) * self.units + CUT / 2) / CUT;
        format!("{}.{:06}", millionths / 1_000_000, millionths % 1_000_000)
    }
}

impl Rates {
    /// Reads lines of `time,currency,rate`, for example `2026-01-31T12:00:00Z,USD,98123.45`; a heading is passed over.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Rates> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Rates::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> anyhow::Result<Rates> {
        let mut out = Rates::default();
        for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            let [at, currency, rate] = fields[..] else { bail!("line {}: expected time,currency,rate", n + 1) };
            let at = match parse_time(at) {
                Ok(at) => at,
                Err(_) if n == 0 => continue,
                Err(error) => bail!("line {}: {error}", n + 1),
            };
            if out.currency.is_empty() {
                currency.clone_into(&mut out.currency);
            }
            if out.currency != currency {
                bail!("line {}: {currency} after {}; one file is of one currency", n + 1, out.currency);
            }
            let units = units(rate).with_context(|| format!("line {}: {rate:?} is no rate", n + 1))?;
            out.rates.push(Rate { at, text: rate.to_owned(), units });
        }
        out.rates.sort_by_key(|rate| rate.at);
        Ok(out)
    }

    /// The newest rate at or before this time, unless it is too old.
    pub(crate) fn at(&self, at: UnixMs) -> Option<&Rate> {
        let after = self.rates.partition_point(|rate| rate.at <= at);
        self.rates[..after].last().filter(|rate| at.0 - rate.at.0 <= GOOD_FOR_MS)
    }
}

/// A decimal number in units of its eighth decimal.
fn units(text: &str) -> Option<u128> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let decimals = u32::try_from(part.len()).ok().filter(|n| *n <= DECIMALS)?;
    if whole.is_empty() || whole.len() > 15 || !digits(whole) || !digits(part) {
        return None;
    }
    let whole: u128 = whole.parse().ok()?;
    let part: u128 = if part.is_empty() { 0 } else { part.parse().ok()? };
    Some(whole * 10u128.pow(DECIMALS) + part * 10u128.pow(DECIMALS - decimals))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_found_by_time_and_grow_old() {
        let rates = Rates::parse("time,currency,rate\n2026-01-02,USD,100000\n2026-01-01,USD,50000.5\n").unwrap();
        let at = |text: &str| rates.at(parse_time(text).unwrap()).map(|rate| rate.text.as_str());
        assert_eq!(at("2025-12-31"), None);
        assert_eq!(at("2026-01-01T23:59:59Z"), Some("50000.5"));
        assert_eq!(at("2026-01-02"), Some("100000"));
        assert_eq!(at("2026-01-04"), None);
        assert_eq!(rates.currency, "USD");
        // 100,000 msat are 10^-6 bitcoin: ten cents.
        assert_eq!(rates.at(parse_time("2026-01-02").unwrap()).unwrap().value(100_000), "0.100000");
        assert_eq!(rates.at(parse_time("2026-01-01").unwrap()).unwrap().value(1), "0.000001");
        for bad in
            ["2026-01-01,USD\n", "2026-01-01,USD,x\n", "x,USD,1\ny,USD,1\n", "2026-01-01,USD,1\n2026-01-02,EUR,1\n"]
        {
            assert!(Rates::parse(bad).is_err(), "{bad:?}");
        }
    }
}
