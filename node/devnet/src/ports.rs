//! Ports for markets on one machine.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Below those that systems give to connections on their way out: one of these may be gone before its node listens.
const FIRST: u16 = 16_384;
const COUNT: u16 = 16_384;

/// The next one to try. Another process begins elsewhere.
static NEXT: OnceLock<AtomicU16> = OnceLock::new();

/// An address of this machine whose port was free for TCP and UDP a moment ago. This process gives it once.
pub fn free() -> io::Result<SocketAddr> {
    let next = NEXT.get_or_init(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_micros());
        AtomicU16::new((now ^ process::id().wrapping_mul(7_919)) as u16)
    });
    for _ in 0..COUNT {
        let port = FIRST + next.fetch_add(1, Ordering::Relaxed) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return Ok(address);
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, format!("no port of {FIRST} to {} is free", FIRST + (COUNT - 1))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_is_given_once_and_not_where_somebody_listens() {
        let taken = TcpListener::bind(free().unwrap()).unwrap();
        let given: BTreeSet<SocketAddr> = (0..200).map(|_| free().unwrap()).collect();
        assert_eq!(given.len(), 200);
        assert!(!given.contains(&taken.local_addr().unwrap()));
        assert!(given.iter().all(|address| (FIRST..32_768).contains(&address.port())));
    }
}
