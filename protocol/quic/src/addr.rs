//! Where a peer says it can be reached: parsing, resolving and ordering address hints.
//!
//! Hints come from listings that strangers signed, so their number, length and resolution time are bounded, and an
//! address that no unicast peer can have is dropped. Whether private addresses may be tried is the operator's choice.

use core::fmt;
use core::str::FromStr;
use core::time::Duration;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use thiserror::Error;

/// Hints of one peer that are looked at; the rest is ignored.
pub const MAX_HINTS: usize = 8;
/// Addresses of one peer that are tried; the rest is ignored.
pub const MAX_ADDRESSES: usize = 8;
/// Longest host name in DNS.
const MAX_HOST_BYTES: usize = 253;
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(3);
const SCHEME: &str = "quic://";

/// One place where a peer may be reached: a host name or an address, and a UDP port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressHint {
    host: Host,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

/// Why a text is not an address hint.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HintError {
    #[error("{text:?}: only the quic:// scheme is known")]
    Scheme { text: String },
    #[error("{text:?}: expected host:port")]
    Port { text: String },
    #[error("{text:?}: not a host name or address")]
    Host { text: String },
}

/// Why no address came of a peer's hints.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AddressError {
    #[error("no address hint was given")]
    NoHint,
    #[error("no usable address: {}", .reasons.join("; "))]
    NoneUsable { reasons: Vec<String> },
}

/// Which addresses a connection may go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reach {
    /// Loopback and private networks too: the demo, one's own machines, a mesh of friends.
    #[default]
    Any,
    /// Addresses of the public internet only.
    Public,
}

impl AddressHint {
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for AddressHint {
    fn from(address: SocketAddr) -> AddressHint {
        AddressHint { host: Host::Ip(address.ip()), port: address.port() }
    }
}

/// Those of a listing's addresses that can be read, in its order.
pub fn hints(addresses: &[String]) -> Vec<AddressHint> {
    addresses.iter().filter_map(|text| text.parse().ok()).collect()
}

impl FromStr for AddressHint {
    type Err = HintError;

    /// Accepts `quic://host:port`, `host:port`, `1.2.3.4:port` and `[v6]:port`, with nothing after the port.
    fn from_str(given: &str) -> Result<AddressHint, HintError> {
        let text = || given.chars().take(80).collect::<String>();
        let rest = match given.strip_prefix(SCHEME) {
            Some(rest) => rest,
            None if given.contains("://") => return Err(HintError::Scheme { text: text() }),
            None => given,
        };
        if let Ok(address) = rest.parse::<SocketAddr>() {
            return Ok(address.into()).and_then(|hint: AddressHint| hint.with_port(text));
        }
        let (name, port) = rest.rsplit_once(':').ok_or_else(|| HintError::Port { text: text() })?;
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse().ok().filter(|_| digits).ok_or_else(|| HintError::Port { text: text() })?;
        if !is_host_name(name) {
            return Err(HintError::Host { text: text() });
        }
        AddressHint { host: Host::Name(name.to_ascii_lowercase()), port }.with_port(text)
    }
}

impl AddressHint {
    fn with_port(self, text: impl Fn() -> String) -> Result<AddressHint, HintError> {
        if self.port == 0 { Err(HintError::Port { text: text() }) } else { Ok(self) }
    }
}

impl fmt::Display for AddressHint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => write!(f, "{SCHEME}{}", SocketAddr::new(*ip, self.port)),
            Host::Name(name) => write!(f, "{SCHEME}{name}:{}", self.port),
        }
    }
}

fn is_host_name(name: &str) -> bool {
    let labels_ok = name.split('.').all(|label| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    });
    // A name of digits alone is a mistyped address.
    labels_ok && name.len() <= MAX_HOST_BYTES && !name.split('.').all(|l| l.bytes().all(|b| b.is_ascii_digit()))
}

/// The addresses behind a peer's hints, in the order in which to try them, at most [`MAX_ADDRESSES`].
///
/// Hints keep their order; within it the two address families alternate (RFC 8305), so that a broken one costs one
/// step. `ipv6`: whether our socket can send to IPv6 at all. Names are resolved side by side, for 3 s at most.
pub async fn resolve(hints: &[AddressHint], reach: Reach, ipv6: bool) -> Result<Vec<SocketAddr>, AddressError> {
    if hints.is_empty() {
        return Err(AddressError::NoHint);
    }
    let mut lookups = tokio::task::JoinSet::new();
    for (at, hint) in hints.iter().take(MAX_HINTS).enumerate() {
        let hint = hint.clone();
        lookups.spawn(async move { (at, lookup(&hint).await, hint) });
    }
    let mut answers = Vec::new();
    while let Some(joined) = lookups.join_next().await {
        answers.extend(joined.ok());
    }
    answers.sort_by_key(|(at, _, _)| *at);

    let (mut usable, mut reasons) = (Vec::new(), Vec::new());
    for (_, answer, hint) in answers {
        match answer {
            Ok(found) => {
                for address in found {
                    match refusal(address, reach, ipv6) {
                        Some(why) => reasons.push(format!("{address} {why}")),
                        None if usable.contains(&address) => {}
                        None => usable.push(address),
                    }
                }
            }
            Err(why) => reasons.push(format!("{hint}: {why}")),
        }
    }
    if usable.is_empty() {
        reasons.truncate(MAX_ADDRESSES);
        return Err(AddressError::NoneUsable { reasons });
    }
    Ok(interleave(usable))
}

async fn lookup(hint: &AddressHint) -> Result<Vec<SocketAddr>, String> {
    let name = match &hint.host {
        Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, hint.port)]),
        Host::Name(name) => name,
    };
    match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((name.as_str(), hint.port))).await {
        Ok(Ok(found)) => Ok(found.take(MAX_ADDRESSES).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer from DNS in {RESOLVE_TIMEOUT:?}")),
    }
}

/// Why an address is not tried.
fn refusal(address: SocketAddr, reach: Reach, ipv6: bool) -> Option<&'static str> {
    let ip = address.ip().to_canonical();
    let not_unicast = match ip {
        IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_unspecified(),
    };
    if not_unicast {
        return Some("is not the address of one host");
    }
    if ip.is_ipv6() && !ipv6 {
        return Some("is IPv6 and our socket is IPv4");
    }
    match reach {
        Reach::Public if is_private(ip) => Some("is not a public address"),
        Reach::Public | Reach::Any => None,
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let carrier_nat = a == 100 && (64..128).contains(&b);
            v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_documentation()
                || carrier_nat
                || a >= 240
        }
        IpAddr::V6(v6) => {
            let documentation = v6.segments()[..2] == [0x2001, 0xdb8];
            v6 == Ipv6Addr::LOCALHOST || v6.is_unique_local() || v6.is_unicast_link_local() || documentation
        }
    }
}

/// Alternates the families, beginning with the first address's own; cut to [`MAX_ADDRESSES`].
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|a| a.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut order = Vec::new();
    loop {
        let (a, b) = (first.next(), second.next());
        if a.is_none() && b.is_none() {
            order.truncate(MAX_ADDRESSES);
            return order;
        }
        order.extend(a.into_iter().chain(b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Result<&str, &str>) {
        match (text.parse::<AddressHint>(), expect) {
            (Ok(hint), Ok(want)) => assert_eq!(hint.to_string(), want),
            (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{text}: {error}"),
            (got, want) => panic!("{text}: got {got:?}, want {want:?}"),
        }
    }

    #[test]
    fn hints_are_parsed_strictly() {
        check("quic://node.example.org:4433", Ok("quic://node.example.org:4433"));
        check("Node.Example:1", Ok("quic://node.example:1"));
        check("127.0.0.1:8402", Ok("quic://127.0.0.1:8402"));
        check("quic://[2001:db8::1]:443", Ok("quic://[2001:db8::1]:443"));
        check("https://node.example:1", Err("quic://"));
        check("node.example", Err("host:port"));
        check("node.example:0", Err("host:port"));
        check("node.example:+80", Err("host:port"));
        check("node.example:70000", Err("host:port"));
        check("127.0.0.1:0", Err("host:port"));
        check("node.example:80/path", Err("host:port"));
        check("2001:db8::1:443", Err("host"));
        check("1.2.3.4.5:80", Err("host"));
        check("-bad.example:80", Err("host"));
        check("a..b:80", Err("host"));
        check(":80", Err("host"));
        check("user@node.example:80", Err("host"));
        check(&format!("{}:80", "a.".repeat(130) + "a"), Err("host"));
    }

    #[track_caller]
    fn usable(address: &str, reach: Reach, expect: bool) {
        assert_eq!(refusal(address.parse().unwrap(), reach, true).is_none(), expect, "{address} {reach:?}");
    }

    #[test]
    fn strangers_cannot_send_us_anywhere() {
        for address in ["0.0.0.0:1", "255.255.255.255:1", "224.0.0.1:1", "[::]:1", "[ff02::1]:1", "[::ffff:0.0.0.0]:1"]
        {
            usable(address, Reach::Any, false);
        }
        for address in [
            "127.0.0.1:1",
            "10.1.2.3:1",
            "192.168.1.1:1",
            "172.16.0.1:1",
            "169.254.1.1:1",
            "100.64.0.1:1",
            "[::1]:1",
            "[fe80::1]:1",
            "[fd00::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            usable(address, Reach::Any, true);
            usable(address, Reach::Public, false);
        }
        usable("8.8.8.8:1", Reach::Public, true);
        usable("[2606:4700::1]:1", Reach::Public, true);
    }

    #[tokio::test]
    async fn families_alternate_and_the_number_is_bounded() {
        let hints: Vec<AddressHint> =
            ["10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1", "10.0.0.1:1", "0.0.0.0:9"].map(|h| h.parse().unwrap()).to_vec();
        let found = resolve(&hints, Reach::Any, true).await.unwrap();
        let want: Vec<SocketAddr> = ["10.0.0.1:1", "[fd00::1]:1", "10.0.0.2:1"].map(|a| a.parse().unwrap()).to_vec();
        assert_eq!(found, want);
        let v4_only = resolve(&hints, Reach::Any, false).await.unwrap();
        assert!(v4_only.iter().all(SocketAddr::is_ipv4) && v4_only.len() == 2);
        let error = resolve(&hints, Reach::Public, true).await.unwrap_err();
        assert!(error.to_string().contains("10.0.0.1:1 is not a public address"), "{error}");
        assert_eq!(resolve(&[], Reach::Any, true).await, Err(AddressError::NoHint));
        let many: Vec<AddressHint> = (1..50).map(|n| SocketAddr::from(([10, 0, 0, n], 1)).into()).collect();
        assert_eq!(resolve(&many, Reach::Any, true).await.unwrap().len(), MAX_ADDRESSES);
    }
}
