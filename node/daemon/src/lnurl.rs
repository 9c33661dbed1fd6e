//! Where money goes that leaves by Lightning: a BOLT 11 invoice, or a Lightning address that is asked for one (LNURL-pay).
//!
//! This node asks the host that the address names: over HTTPS only, or plain HTTP to this machine where that is allowed,
//! without redirects, small answers only. A stranger's word never leads it into a private network.

use anyhow::{Context, bail, ensure};
use satgrid_types::Msat;
use serde_json::Value;
use std::{net::IpAddr, time::Duration};

const ANSWER_WITHIN: Duration = Duration::from_secs(15);
const MAX_ANSWER_BYTES: usize = 32 << 10;
const MAX_ADDRESS_LEN: usize = 320;
/// As long as the wallet looks at.
const MAX_INVOICE_LEN: usize = 2_048;

/// Where a refund may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    Bolt11(String),
    /// `user@host`
    Address {
        user: String,
        host: String,
    },
}

impl std::str::FromStr for Destination {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Destination, &'static str> {
        let text = text.trim();
        let text = text.strip_prefix("lightning:").unwrap_or(text);
        if text.len() > MAX_INVOICE_LEN {
            return Err("a destination is never that long");
        }
        let lower = text.to_ascii_lowercase();
        if let Some((user, host)) = lower.split_once('@') {
            let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
            let place = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
            let sound = !user.is_empty() && user.chars().all(name) && !host.is_empty() && host.chars().all(place);
            if !sound || text.len() > MAX_ADDRESS_LEN {
                return Err("a Lightning address is user@host");
            }
            return Ok(Destination::Address { user: user.to_owned(), host: host.to_owned() });
        }
        if lower.starts_with("lnbc") || lower.starts_with("lntb") {
            return Ok(Destination::Bolt11(lower));
        }
        Err("name a BOLT 11 invoice with an amount, or a Lightning address (user@host)")
    }
}

/// Who named the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Named {
    /// The owner of this node: it may lead anywhere.
    ByOwner,
    /// Anybody. `local`: this machine is allowed, as on regtest.
    ByStranger { local: bool },
}

impl Named {
    /// Whether the host is this machine, and may be.
    fn is_here(self, host: &str) -> bool {
        let allowed = match self {
            Named::ByOwner => true,
            Named::ByStranger { local } => local,
        };
        allowed && is_this_machine(host)
    }
}

/// Asks a Lightning address for an invoice over exactly `amount`.
pub(crate) async fn invoice(user: &str, host: &str, amount: Msat, named: Named) -> anyhow::Result<String> {
    let scheme = if named.is_here(host) { "http" } else { "https" };
    let first = get(&format!("{scheme}://{host}/.well-known/lnurlp/{user}"), named).await?;
    let range = |name: &str| first[name].as_u64();
    ensure!(first["tag"] == "payRequest", "the address takes no payments: {}", said(&first));
    let (least, most) = (range("minSendable").unwrap_or(1), range("maxSendable").unwrap_or(u64::MAX));
    ensure!((least..=most).contains(&amount.0), "the address takes {least} to {most} msat, not {amount}");
    let callback = first["callback"].as_str().context("the address names no callback")?;
    let join = if callback.contains('?') { '&' } else { '?' };
    let second = get(&format!("{callback}{join}amount={}", amount.0), named).await?;
    let bolt11 = second["pr"].as_str().with_context(|| format!("the address gave no invoice: {}", said(&second)))?;
    Ok(bolt11.to_ascii_lowercase())
}

fn said(answer: &Value) -> String {
    answer["reason"].as_str().unwrap_or("no reason given").chars().filter(|c| !c.is_control()).take(120).collect()
}

fn is_this_machine(host: &str) -> bool {
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    host == "localhost" || host == "127.0.0.1"
}

async fn get(url: &str, named: Named) -> anyhow::Result<Value> {
    let parsed = reqwest::Url::parse(url).context("the address leads to no URL")?;
    let host = parsed.host_str().context("the address leads to no host")?.to_owned();
    let here = named.is_here(&host);
    ensure!(here || parsed.scheme() == "https", "the address is not reached over HTTPS");
    let mut client = reqwest::Client::builder().timeout(ANSWER_WITHIN).redirect(reqwest::redirect::Policy::none());
    if let Named::ByStranger { .. } = named {
        let port = parsed.port_or_known_default().unwrap_or(443);
        let found: Vec<std::net::SocketAddr> =
            tokio::net::lookup_host((host.as_str(), port)).await.context("the address has no host")?.collect();
        // What was looked up is what is connected to: a name cannot change its mind in between.
        let Some(at) = found.into_iter().find(|at| here || is_public(at.ip())) else {
            bail!("the address leads into a private network")
        };
        client = client.no_proxy().resolve(&host, at);
    }
    let mut response = client.build()?.get(parsed).send().await?.error_for_status()?;
    let mut body = Vec::new();
    while let Some(bytes) = response.chunk().await? {
        body.extend_from_slice(&bytes);
        ensure!(body.len() <= MAX_ANSWER_BYTES, "the address answers at length");
    }
    Ok(serde_json::from_slice(&body)?)
}

fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            let shared = a == 100 && (64..128).contains(&b);
            // This network, protocols', benchmarks', reserved.
            let special = a == 0 || (a, b, c) == (192, 0, 0) || (a == 198 && (18..20).contains(&b)) || a >= 240;
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_multicast()
                || ip.is_documentation()
                || shared
                || special)
        }
        IpAddr::V6(ip) => {
            let carried = |high: u16, low: u16| {
                let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
                is_public(IpAddr::from([a, b, c, d]))
            };
            match ip.segments() {
                // A gateway or a tunnel may lead on to the address that these carry: NAT64, 6to4, the oldest form.
                [0x64, 0xff9b, 0, 0, 0, 0, high, low]
                | [0x2002, high, low, _, _, _, _, _]
                | [0, 0, 0, 0, 0, 0, high, low] => carried(high, low),
                [0x64, 0xff9b, ..] => false,
                [first, ..] => {
                    let local = first & 0xfe00 == 0xfc00 || first & 0xff80 == 0xfe80;
                    !(ip.is_multicast() || local)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let check = |text: &str, expect: Option<Destination>| assert_eq!(text.parse().ok(), expect, "{text}");
        let address = |user: &str, host: &str| Some(Destination::Address { user: user.into(), host: host.into() });
        check("Alice@Example.com", address("alice", "example.com"));
        check(" lightning:bob@localhost:80 ", address("bob", "localhost:80"));
        check("LNBCRT10N1XYZ", Some(Destination::Bolt11("lnbcrt10n1xyz".into())));
        check("lntb1xyz", Some(Destination::Bolt11("lntb1xyz".into())));
        check("a/../b@example.com", None);
        check("a@example.com/path", None);
        check("@example.com", None);
        check("bc1qxyz", None);
    }

    #[test]
    fn private_networks_are_not_asked() {
        for private in [
            "10.0.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "192.168.1.1",
            "100.64.0.1",
            "::1",
            "fd00::1",
            "::ffff:10.0.0.1",
            "::",
            "::10.0.0.1",
            "fec0::1",
            "64:ff9b::a00:1",
            "64:ff9b:1::a00:1",
            "2002:c0a8:101::1",
            "0.1.2.3",
            "198.18.0.1",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        for public in ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "198.20.0.1"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }

    #[tokio::test]
    async fn an_address_is_asked_for_an_invoice_over_the_very_amount() {
        use axum::{Json, Router, extract::Query, routing::get};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
        let callback = format!("http://{host}/pay");
        let app = Router::new()
            .route(
                "/.well-known/lnurlp/alice",
                get(move || async move {
                    Json(serde_json::json!({
                        "tag": "payRequest", "callback": callback, "minSendable": 1_000, "maxSendable": 9_000_000,
                    }))
                }),
            )
            .route(
                "/pay",
                get(|Query(q): Query<std::collections::BTreeMap<String, String>>| async move {
                    Json(serde_json::json!({ "pr": format!("lnbcrt{}", q["amount"]) }))
                }),
            );
        tokio::spawn(async move { axum::serve(listener, app).await });
        for named in [Named::ByOwner, Named::ByStranger { local: true }] {
            assert_eq!(invoice("alice", &host, Msat(5_000), named).await.unwrap(), "lnbcrt5000");
            let little = invoice("alice", &host, Msat(500), named).await.unwrap_err();
            assert!(little.to_string().contains("1000 to 9000000"), "{named:?}: {little}");
        }
        let stranger = Named::ByStranger { local: false };
        assert!(invoice("alice", &host, Msat(5_000), stranger).await.is_err(), "not over plain HTTP");
    }
}
