//! Who may begin a handshake: limits on connections as a whole, per source, and on handshakes in progress.
//!
//! The address of a first packet can be forged, so an unproved address never takes the last half of anything: from
//! half of a limit on, the client is asked to prove its address first (QUIC Retry), which costs us no memory.
//!
//! | state of the tables | address proved | address not proved |
//! |---|---|---|
//! | a limit is reached | refuse | retry if only its own source is full, else refuse |
//! | half of the source's or the handshakes' limit is used | accept | retry |
//! | else | accept | accept |

use crate::Limits;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One subscriber as far as addresses can tell: an IPv4 address, or the /64 that an IPv6 subscriber owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Source(IpAddr);

impl Source {
    fn of(address: IpAddr) -> Source {
        match address.to_canonical() {
            IpAddr::V4(v4) => Source(v4.into()),
            IpAddr::V6(v6) => Source(IpAddr::from((u128::from(v6) & !u128::from(u64::MAX)).to_be_bytes())),
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    connections: usize,
    handshakes: usize,
    sources: BTreeMap<Source, usize>,
}

#[derive(Debug)]
pub(crate) struct Admission {
    connections: usize,
    per_source: usize,
    handshakes: usize,
    table: Mutex<Table>,
}

#[derive(Debug)]
pub(crate) enum Decision {
    Accept(Permit),
    Retry,
    Refuse,
}

impl Admission {
    pub(crate) fn new(limits: &Limits) -> Arc<Admission> {
        Arc::new(Admission {
            connections: limits.connections,
            per_source: limits.connections_per_source,
            handshakes: limits.handshakes,
            table: Mutex::default(),
        })
    }

    pub(crate) fn admit(self: &Arc<Self>, address: IpAddr, proved: bool) -> Decision {
        let source = Source::of(address);
        let mut table = self.table();
        let from_source = table.sources.get(&source).copied().unwrap_or(0);
        if table.connections >= self.connections || table.handshakes >= self.handshakes {
            return Decision::Refuse;
        }
        if from_source >= self.per_source {
            return if proved { Decision::Refuse } else { Decision::Retry };
        }
        if !proved && (2 * from_source >= self.per_source.max(2) || 2 * table.handshakes >= self.handshakes.max(2)) {
            return Decision::Retry;
        }
        table.connections += 1;
        table.handshakes += 1;
        *table.sources.entry(source).or_insert(0) += 1;
        drop(table);
        Decision::Accept(Permit { admission: self.clone(), source, handshaking: true })
    }

    /// Connections counted now.
    pub(crate) fn connections(&self) -> usize {
        self.table().connections
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    admission: Arc<Admission>,
    source: Source,
    handshaking: bool,
}

impl Permit {
    pub(crate) fn handshake_over(&mut self) {
        if std::mem::take(&mut self.handshaking) {
            self.admission.table().handshakes -= 1;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.handshake_over();
        let mut table = self.admission.table();
        table.connections -= 1;
        if let Some(count) = table.sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                table.sources.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(connections: usize, connections_per_source: usize, handshakes: usize) -> Arc<Admission> {
        Admission::new(&Limits { connections, connections_per_source, handshakes, ..Limits::default() })
    }
    fn word(decision: &Decision) -> &'static str {
        match decision {
            Decision::Accept(_) => "accept",
            Decision::Retry => "retry",
            Decision::Refuse => "refuse",
        }
    }

    /// Each step: source address, whether it is proved, what must be decided. Handshakes end at once.
    #[track_caller]
    fn check(limits: (usize, usize, usize), steps: &[(&str, bool, &str)]) {
        let admission = admission(limits.0, limits.1, limits.2);
        let mut held = Vec::new();
        for (at, (source, proved, expect)) in steps.iter().enumerate() {
            let mut decision = admission.admit(source.parse().unwrap(), *proved);
            assert_eq!(word(&decision), *expect, "step {at}");
            if let Decision::Accept(permit) = &mut decision {
                permit.handshake_over();
            }
            held.push(decision);
        }
        drop(held);
        assert_eq!(admission.connections(), 0);
        assert!(admission.table().sources.is_empty());
    }

    #[test]
    fn each_source_and_the_whole_are_bounded() {
        let a = "10.0.0.1";
        check(
            (9, 2, 9),
            &[(a, true, "accept"), (a, true, "accept"), (a, true, "refuse"), ("10.0.0.2", true, "accept")],
        );
        check((2, 9, 9), &[(a, true, "accept"), ("10.0.0.2", true, "accept"), ("10.0.0.3", true, "refuse")]);
        check((9, 1, 9), &[("2001:db8::1", true, "accept"), ("2001:db8::2", true, "refuse")]);
        check((9, 1, 9), &[("2001:db8::1", true, "accept"), ("2001:db8:0:1::1", true, "accept")]);
        check((9, 1, 9), &[(a, true, "accept"), ("::ffff:10.0.0.1", true, "refuse")]);
    }

    #[test]
    fn an_unproved_address_takes_at_most_half_of_a_source() {
        let a = "10.0.0.1";
        check((9, 4, 9), &[(a, false, "accept"), (a, false, "accept"), (a, false, "retry"), (a, true, "accept")]);
        check((9, 2, 9), &[(a, true, "accept"), (a, true, "accept"), (a, false, "retry")]);
    }

    #[test]
    fn under_load_everyone_proves_an_address_first() {
        let admission = admission(99, 99, 4);
        let held: Vec<_> = (0..2).map(|n| admission.admit([10, 0, 0, n].into(), false)).collect();
        assert!(held.iter().all(|d| word(d) == "accept"));
        assert_eq!(word(&admission.admit([10, 0, 0, 9].into(), false)), "retry");
        let proved: Vec<_> = (0..2).map(|n| admission.admit([10, 0, 0, n].into(), true)).collect();
        assert!(proved.iter().all(|d| word(d) == "accept"));
        assert_eq!(word(&admission.admit([10, 0, 0, 9].into(), true)), "refuse");
        drop(held);
        assert_eq!(word(&admission.admit([10, 0, 0, 9].into(), true)), "accept");
    }
}
