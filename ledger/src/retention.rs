//! Retention: which bodies a journal may let go of. Leaves and transfers stay, so the log keeps its root and the books
//! keep their sums.
//!
//! What goes is the evidence of sessions that are over: closed, with nothing prepaid, owed or reserved, and silent since
//! before a time; and of those that share credit, once all of them are. Quotes, opens and closes stay (they are few, and
//! session keys are counted by opens), and so does all that belongs to no session. An entry without its body can no longer be
//! shown: exports of the whole journal end there.

use crate::{
    Books, BooksError,
    bundle::{Subjected, keep_linked},
    entry::{Entry, Evidence},
    transfer::Account,
};
use satgrid_types::{SessionId, UnixMs};
use std::collections::{BTreeMap, BTreeSet};

/// Finds what may go. Give it every entry, in order.
#[derive(Debug, Default)]
pub struct Retention {
    books: Books,
    subjected: Subjected,
    sessions: BTreeMap<SessionId, Span>,
    /// Sessions between which credit moved: neither can be shown without the other.
    linked: Vec<(SessionId, SessionId)>,
    /// Entries whose body may go, with the sessions that they belong to.
    bodies: Vec<(u64, Vec<SessionId>)>,
    last: Option<u64>,
}

#[derive(Debug, Default)]
struct Span {
    closed: bool,
    last_at: UnixMs,
}

impl Retention {
    pub fn new() -> Retention {
        Retention::default()
    }

    pub fn observe(&mut self, entry: &Entry) -> Result<(), BooksError> {
        let subjects = self.subjected.of(entry);
        self.books.apply(entry.at, &entry.draft())?;
        self.last = Some(entry.seq);
        for session in &subjects.sessions {
            let span = self.sessions.entry(*session).or_default();
            span.last_at = entry.at;
            span.closed |= matches!(entry.evidence, Some(Evidence::Close(_)));
        }
        if let Some(Evidence::CreditTransfer(both)) = &entry.evidence {
            self.linked.extend(both.peek().ok().map(|moved| (moved.from, moved.to)));
        }
        if entry.evidence.as_ref().is_some_and(may_go) && !subjects.sessions.is_empty() {
            self.bodies.push((entry.seq, subjects.sessions.into_iter().collect()));
        }
        Ok(())
    }

    /// Numbers of the entries whose bodies may go: of sessions that were over and silent before this time. Never the last
    /// entry, which the next one is chained to.
    pub fn finish(self, before: UnixMs) -> Vec<u64> {
        let mut over: BTreeSet<SessionId> = self
            .sessions
            .iter()
            .filter(|(id, span)| span.closed && span.last_at < before && is_settled(&self.books, **id))
            .map(|(id, _)| *id)
            .collect();
        keep_linked(&mut over, &self.linked);
        let gone =
            self.bodies.into_iter().filter(|(_, sessions)| sessions.iter().all(|session| over.contains(session)));
        gone.map(|(seq, _)| seq).filter(|seq| Some(*seq) != self.last).collect()
    }
}

fn is_settled(books: &Books, session: SessionId) -> bool {
    let accounts = [Account::Prepaid(session), Account::PrepaidAsset(session), Account::RefundsDue(session)];
    accounts.iter().all(|account| books.balance(account) == 0) && books.holds_of(session).next().is_none()
}

/// Whether the evidence is of a session's work and money, and not what the session is known by.
fn may_go(evidence: &Evidence) -> bool {
    match evidence {
        Evidence::Invoice { .. }
        | Evidence::PaymentAttempted { .. }
        | Evidence::PaymentSettled { .. }
        | Evidence::PaymentFailed { .. }
        | Evidence::PaymentReceived { .. }
        | Evidence::Request(_)
        | Evidence::Ack(_)
        | Evidence::Receipt { .. }
        | Evidence::Abandoned { .. }
        | Evidence::CreditNote(_)
        | Evidence::RefundAttempted { .. }
        | Evidence::RefundSettled { .. }
        | Evidence::RefundReceived { .. }
        | Evidence::Promise(_)
        | Evidence::CreditTransfer(_) => true,
        Evidence::Genesis { .. }
        | Evidence::Listing { .. }
        | Evidence::Quote(_)
        | Evidence::Open(_)
        | Evidence::Close(_)
        | Evidence::ChannelClosed { .. }
        | Evidence::WalletPayment { .. }
        | Evidence::OnChain { .. }
        | Evidence::Succession(_)
        | Evidence::Misbehaviour { .. }
        | Evidence::WalletSnapshot { .. }
        | Evidence::Checkpoint { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Work, World};
    use satgrid_types::Msat;

    fn gone(entries: &[Entry], before: UnixMs) -> Vec<u64> {
        let mut retention = Retention::new();
        entries.iter().for_each(|entry| retention.observe(entry).unwrap());
        retention.finish(before)
    }

    #[test]
    fn only_sessions_that_are_over_lose_their_bodies() {
        let world = World::example();
        for party in [&world.provider, &world.consumer] {
            let entries = party.journal.entries();
            let (first, last) = (entries[0].at, entries.last().unwrap().at.plus_ms(1));
            assert!(gone(&entries, first).is_empty(), "nothing is that old");
            let gone = gone(&entries, last);
            assert!(!gone.is_empty() && gone.len() < entries.len());
            let mut subjected = Subjected::default();
            let sessions: Vec<_> = entries.iter().map(|entry| subjected.of(entry).sessions).collect();
            let touched: BTreeSet<SessionId> =
                gone.iter().flat_map(|seq| sessions[usize::try_from(*seq).unwrap()].clone()).collect();
            // One session is over, one is open, one ended with a credit note: it is still owed.
            assert_eq!(touched.len(), 1);
            for seq in gone {
                assert!(entries[usize::try_from(seq).unwrap()].evidence.as_ref().is_some_and(may_go));
            }
        }
    }

    /// What a session was given by another's credit note is shown by that one's entries.
    #[test]
    fn sessions_that_share_credit_lose_their_bodies_together() {
        let work = Work { prompt: 40, cached: 0, output: 60, acks: 1 };
        let mut world = World::new();
        let mut from = world.open();
        world.pay(&mut from, Msat::sat(10));
        world.complete(&mut from, work);
        let note = world.close_with_credit_note(&mut from);
        let mut to = world.open();
        world.spend_credit_note(&from, &note, &mut to);
        world.complete(&mut to, work);
        let late = world.now.plus_ms(1_000);
        for party in [&world.provider, &world.consumer] {
            assert!(gone(&party.journal.entries(), late).is_empty(), "the one that has its credit is open");
        }
        world.close_with_refund(&mut to);
        for party in [&world.provider, &world.consumer] {
            assert!(!gone(&party.journal.entries(), late).is_empty());
        }
    }
}
