//! Refusals: a worker's signed word to its lead that rows of a work came to nothing there, and what a lead makes of it.
//!
//! A refusal goes back the way the rows came, so every worker before the one that refuses passes it on, and could make one up.
//! It is signed by who refuses, over the order that it has from this lead: it is nobody else's word, and none of another
//! session's, request's or work's. The lead alone checks it. Who passes it on does not know the ring, and would believe any key.
//!
//! What is counted against whom ([`blamed`]): no failure shows who is at fault where two accuse each other, but who is common to
//! several failures does ([`Blame`]).

use minicbor::{Decode, Encode};
use satgrid_types::{NodeKey, RequestId, SessionId, Signed, Statement, UnixMs};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use thiserror::Error;

/// Failures after which a worker gives way, and how long each of them is held against it, in ms.
pub const FAILURES: usize = 3;
pub const HELD_MS: u64 = 10 * 60 * 1_000;
/// What fails within this time after another failure of the same worker is the same failure: many works are under way at once.
pub const APART_MS: u64 = 1_000;

/// A worker's word, under its own key, that rows of a work came to nothing there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refusal {
    #[n(0)]
    pub version: u32,
    /// Who refuses, and signs.
    #[n(1)]
    pub worker: NodeKey,
    /// The session in which the lead pays it.
    #[n(2)]
    pub session: SessionId,
    /// An order of this lead that stands on the hop: that of the rows, where it is known.
    #[n(3)]
    pub request: RequestId,
    /// The lead's number of the work.
    #[n(4)]
    pub work: u64,
    /// Rows in it.
    #[n(5)]
    pub rows: u64,
    /// The one request of the work that it is about; absent: all of them.
    #[n(6)]
    pub slot: Option<u64>,
    #[n(7)]
    pub why: Cause,
    /// The neighbour whose doing it is, as the worker says.
    #[n(8)]
    pub accused: Option<NodeKey>,
    #[n(9)]
    pub text: String,
}

impl Refusal {
    pub const VERSION: u32 = 1;
}
impl Statement for Refusal {
    const KIND: &'static str = "refusal";
    const MAX_LEN: usize = 1_024;
}

/// Whose doing it is that rows came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Cause {
    /// The worker holds less of a sequence than the rows need: `held` positions of it.
    #[n(0)]
    Gap(#[n(0)] u32, #[n(1)] u32),
    /// Who sent them broke a rule.
    #[n(1)]
    Sender,
    /// The worker cannot.
    #[n(2)]
    Worker,
    /// They do not reach the node that is next.
    #[n(3)]
    Next,
}

/// A worker as its lead knows it, and the orders that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub node: NodeKey,
    pub orders: Vec<(SessionId, RequestId)>,
}

/// What a lead knows of a work that is refused.
#[derive(Debug, Clone, Copy)]
pub struct Sent<'a> {
    pub lead: NodeKey,
    /// The workers, in the order in which rows pass them.
    pub ring: &'a [Member],
    pub work: u64,
    pub rows: u64,
    /// The sequences that the rows are of.
    pub sequences: &'a [u32],
    /// Who delivered the refusal, on a connection under its own key.
    pub from: NodeKey,
}

/// Why a refusal is nobody's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RefusalFault {
    #[error("it cannot be read")]
    Unreadable,
    #[error("it is of nobody in this ring")]
    Stranger,
    #[error("it is not signed by the worker that it names")]
    Forged,
    #[error("it is for another {what}")]
    Other { what: &'static str },
}

/// A refusal that a worker of the ring signed for this very work, with the worker's place.
pub fn check(signed: &Signed<Refusal>, sent: &Sent<'_>) -> Result<(usize, Refusal), RefusalFault> {
    let worker = signed.peek().map_err(|_| RefusalFault::Unreadable)?.worker;
    let mut members = sent.ring.iter().enumerate();
    let (at, member) = members.find(|(_, member)| member.node == worker).ok_or(RefusalFault::Stranger)?;
    let said = signed.verify(&worker).map_err(|_| RefusalFault::Forged)?.into_statement();
    let same = |is: bool, what| if is { Ok(()) } else { Err(RefusalFault::Other { what }) };
    same(said.version == Refusal::VERSION, "version")?;
    same(member.orders.contains(&(said.session, said.request)), "order")?;
    same(said.work == sent.work && said.rows == sent.rows, "work")?;
    Ok((at, said))
}

/// Against whom a failure counts. A gap is nobody's fault, but in a sequence that was not asked for, its inventor's. What is a worker's own by its own word is its own. Where a worker accuses
/// the one beside it either may lie, so it counts against both ends of that hop; where it accuses another one, against itself. What
/// nobody in the ring signed counts against who delivered it. A lead does not count itself.
pub fn blamed(outcome: &Result<(usize, Refusal), RefusalFault>, sent: &Sent<'_>) -> BTreeSet<NodeKey> {
    let Ok((at, refusal)) = outcome else { return BTreeSet::from([sent.from]) };
    let node = |at: Option<usize>| at.and_then(|at| sent.ring.get(at)).map_or(sent.lead, |member| member.node);
    let beside = match refusal.why {
        Cause::Gap(sequence, _) if sent.sequences.contains(&sequence) => return BTreeSet::new(),
        Cause::Gap(..) | Cause::Worker => None,
        Cause::Sender => Some(node(at.checked_sub(1))),
        Cause::Next => Some(node(at.checked_add(1))),
    };
    let accused = refusal.accused.filter(|accused| beside == Some(*accused) && *accused != sent.lead);
    [refusal.worker].into_iter().chain(accused).collect()
}

/// What a lead holds against its workers: when they failed, of late.
#[derive(Debug, Clone, Default)]
pub struct Blame(BTreeMap<NodeKey, VecDeque<UnixMs>>);

impl Blame {
    /// A failure counts against these.
    pub fn count(&mut self, now: UnixMs, who: impl IntoIterator<Item = NodeKey>) {
        self.0.retain(|_, times| {
            times.retain(|at| now.since(*at) < HELD_MS);
            !times.is_empty()
        });
        for node in who {
            let times = self.0.entry(node).or_default();
            if times.back().is_none_or(|last| now.since(*last) >= APART_MS) {
                times.push_back(now);
            }
            // The latest decide.
            while times.len() > FAILURES {
                times.pop_front();
            }
        }
    }

    /// Whether it is common to so many failures that another is to take its place.
    pub fn gives_way(&self, now: UnixMs, who: &NodeKey) -> bool {
        let recent = |times: &VecDeque<UnixMs>| times.iter().filter(|at| now.since(**at) < HELD_MS).count();
        self.0.get(who).is_some_and(|times| recent(times) >= FAILURES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{frame::MAX_REASON, hop::HopFrame};
    use ed25519_dalek::SigningKey;
    use satgrid_types::{Signature, node_key};

    const LEAD: NodeKey = NodeKey([9; 32]);

    fn key(n: u8) -> SigningKey {
        SigningKey::from_bytes(&[n; 32])
    }

    fn node(n: u8) -> NodeKey {
        node_key(&key(n))
    }

    fn order(worker: u8) -> (SessionId, RequestId) {
        (SessionId([worker; 32]), RequestId([worker + 100; 32]))
    }

    /// Workers 1, 2 and 3.
    fn ring() -> Vec<Member> {
        (1..=3)
            .map(|n| Member { node: node(n), orders: vec![(SessionId([n; 32]), RequestId([8; 32])), order(n)] })
            .collect()
    }

    fn refusal(worker: u8, why: Cause, accused: Option<NodeKey>) -> Refusal {
        let (session, request) = order(worker);
        let (version, worker, text) = (Refusal::VERSION, node(worker), "no room".to_owned());
        Refusal { version, worker, session, request, work: 70, rows: 3, slot: None, why, accused, text }
    }

    fn with_sent<T>(f: impl FnOnce(&Sent<'_>) -> T) -> T {
        f(&Sent { lead: LEAD, ring: &ring(), work: 70, rows: 3, sequences: &[1, 4], from: node(1) })
    }

    #[track_caller]
    fn refused(expect: Result<usize, RefusalFault>, signer: u8, bend: impl Fn(&mut Refusal)) {
        let mut said = refusal(2, Cause::Worker, None);
        bend(&mut said);
        let signed = Signed::sign(&said, &key(signer));
        with_sent(|sent| {
            let outcome = check(&signed, sent);
            let counted = if outcome.is_ok() { said.worker } else { sent.from };
            assert_eq!(blamed(&outcome, sent), BTreeSet::from([counted]));
            assert_eq!(outcome, expect.map(|at| (at, said.clone())));
        });
    }

    #[test]
    fn a_refusal_is_its_workers_word_on_one_work_of_one_order() {
        let other = |what| Err(RefusalFault::Other { what });
        refused(Ok(1), 2, |_| ());
        refused(Ok(1), 2, |said| said.request = RequestId([8; 32]));
        // The neighbour that passes it on may sign what it likes, but not as another one.
        refused(Err(RefusalFault::Forged), 1, |_| ());
        refused(Err(RefusalFault::Stranger), 7, |said| said.worker = node(7));
        refused(Err(RefusalFault::Stranger), 9, |said| said.worker = LEAD);
        // Replayed: of another session, another request of the same one, another work, a work of another length.
        refused(other("order"), 2, |said| said.session = SessionId([3; 32]));
        refused(other("order"), 2, |said| said.request = RequestId([7; 32]));
        refused(other("work"), 2, |said| said.work = 71);
        refused(other("work"), 2, |said| said.rows = 4);
        refused(other("version"), 2, |said| said.version = 2);
    }

    #[test]
    fn no_bit_of_a_refusal_can_be_changed_under_its_signature() {
        let signed = Signed::sign(&refusal(2, Cause::Sender, Some(node(1))), &key(2));
        assert!(with_sent(|sent| check(&signed, sent)).is_ok());
        for at in 0..signed.body().len() {
            for bit in 0..8 {
                let mut body = signed.body().to_vec();
                body[at] ^= 1 << bit;
                let bent = Signed::from_parts(body, *signed.signature());
                assert!(with_sent(|sent| check(&bent, sent)).is_err(), "byte {at}, bit {bit}");
            }
        }
        let unsigned = Signed::from_parts(signed.body().to_vec(), Signature([0; 64]));
        assert_eq!(with_sent(|sent| check(&unsigned, sent)), Err(RefusalFault::Forged));
        let unreadable: Signed<Refusal> = Signed::from_parts(vec![0xff; 9], *signed.signature());
        assert_eq!(with_sent(|sent| check(&unreadable, sent)), Err(RefusalFault::Unreadable));
        // What it signed as something else is no refusal.
        let signature = satgrid_types::sign_body::<crate::hop::Leading>(signed.body(), &key(2));
        let other = Signed::from_parts(signed.body().to_vec(), signature);
        assert_eq!(with_sent(|sent| check(&other, sent)), Err(RefusalFault::Forged));
    }

    #[test]
    fn a_failure_counts_against_who_may_have_caused_it() {
        let check = |worker: u8, why: Cause, accused: Option<NodeKey>, expect: &[u8]| {
            let outcome = Ok((usize::from(worker) - 1, refusal(worker, why, accused)));
            let expect: BTreeSet<NodeKey> = expect.iter().map(|n| node(*n)).collect();
            assert_eq!(with_sent(|sent| blamed(&outcome, sent)), expect, "{worker} {why:?}");
        };
        check(2, Cause::Gap(1, 9), None, &[]);
        check(2, Cause::Gap(1, 9), Some(node(1)), &[]);
        check(2, Cause::Gap(5, 9), None, &[2]);
        check(2, Cause::Worker, None, &[2]);
        check(2, Cause::Worker, Some(node(1)), &[2]);
        // Both ends of the hop.
        check(2, Cause::Sender, Some(node(1)), &[1, 2]);
        check(2, Cause::Next, Some(node(3)), &[2, 3]);
        // Who is not beside it, or on the other side, cannot have done it.
        check(2, Cause::Sender, Some(node(3)), &[2]);
        check(3, Cause::Sender, Some(node(1)), &[3]);
        check(2, Cause::Next, Some(node(1)), &[2]);
        check(2, Cause::Sender, None, &[2]);
        // At the ring's ends the neighbour is the lead.
        check(1, Cause::Sender, Some(LEAD), &[1]);
        check(3, Cause::Next, Some(LEAD), &[3]);
    }

    #[test]
    fn who_is_common_to_several_failures_gives_way() {
        let (mut blame, at) = (Blame::default(), |s: u64| UnixMs(1_000_000 + s * 1_000));
        let [liar, before, behind] = [1, 2, 3].map(|n| NodeKey([n; 32]));
        blame.count(at(0), [liar, before]);
        blame.count(at(10), [liar, behind]);
        assert!(!blame.gives_way(at(10), &liar));
        blame.count(at(20), [liar, before]);
        assert!(blame.gives_way(at(20), &liar));
        assert!(!blame.gives_way(at(20), &before) && !blame.gives_way(at(20), &behind), "they are common to none");
        // It is forgotten in time.
        assert!(!blame.gives_way(at(0).plus_ms(HELD_MS), &liar));
        blame.count(at(20).plus_ms(HELD_MS), [behind]);
        assert_eq!(blame.0.len(), 1);
        // All that was under way with one failure is one failure.
        let mut blame = Blame::default();
        (0..50).for_each(|ms| blame.count(at(0).plus_ms(ms), [liar]));
        assert!(!blame.gives_way(at(1), &liar));
        (1..50).for_each(|s| blame.count(at(s), [liar]));
        assert!(blame.gives_way(at(50), &liar));
        assert_eq!(blame.0[&liar].len(), FAILURES, "no more is kept than is asked for");
    }

    #[test]
    fn refusals_survive_the_wire_and_bad_ones_do_not_come_in() {
        let longest = Refusal {
            text: "x".repeat(MAX_REASON),
            slot: Some(u64::MAX),
            work: u64::MAX,
            rows: u64::MAX,
            ..refusal(2, Cause::Gap(u32::MAX, u32::MAX), Some(LEAD))
        };
        for said in [refusal(2, Cause::Worker, None), refusal(2, Cause::Next, Some(node(3))), longest] {
            let frame = HopFrame::Lost(Signed::sign(&said, &key(2)));
            let bytes = frame.encode();
            assert_eq!(HopFrame::decode(bytes.clone()), Ok(frame));
            let HopFrame::Lost(signed) = HopFrame::decode(bytes.clone()).unwrap() else { panic!("another kind") };
            assert_eq!(signed.verify(&node(2)).unwrap().into_statement(), said);
            for cut in 1..bytes.len() {
                assert!(HopFrame::decode(bytes[..cut].to_vec()).is_err(), "cut at {cut}");
            }
        }
        let long = Refusal { text: "x".repeat(Refusal::MAX_LEN), ..refusal(2, Cause::Worker, None) };
        let long = Signed::sign(&long, &key(2));
        assert_eq!(with_sent(|sent| check(&long, sent)), Err(RefusalFault::Unreadable), "longer than one may be");
        let endless = Refusal { text: "x".repeat(3 * Refusal::MAX_LEN), ..refusal(2, Cause::Worker, None) };
        assert!(HopFrame::decode(HopFrame::Lost(Signed::sign(&endless, &key(2))).encode()).is_err());
        // As docs/protocol.md has them.
        assert_eq!(satgrid_types::cbor::encode(&Cause::Gap(7, 9)), [0x82, 0, 0x82, 7, 9]);
        assert_eq!(satgrid_types::cbor::encode(&Cause::Next), [0x82, 3, 0x80]);
        let plain = HopFrame::Lost(Signed::sign(&refusal(2, Cause::Sender, Some(node(1))), &key(2))).encode();
        assert!(plain.len() < 320, "{} bytes", plain.len());
        // As it was before refusals were signed: work, worker, why and text.
        let mut unsigned = vec![2];
        unsigned.extend(satgrid_types::cbor::encode(&(70_u64, node(2), Cause::Worker, "no room")));
        assert!(HopFrame::decode(unsigned).is_err());
    }
}
