//! Sessions in which nothing was ever paid. They cost whoever opens them nothing, so that there are never many.
//!
//! | such a session | then |
//! |---|---|
//! | its quote has run out, and no payment of an invoice of it can arrive any more | it is forgotten |
//! | there are as many of its peer, or of all peers, as there may be, and another one is opened | the one that was quoted longest ago is forgotten |
//! | and each of them was quoted within a minute, may still be paid, or has work under way | the new one is refused: busy |
//!
//! Forgetting is no entry: a consumer that comes back hears that there is no such session, and opens another one. A restart takes up
//! none without an invoice, so that what was forgotten in a crowd does not come back. One with an invoice is kept for a while
//! after a restart or a sleep of the machine, however long that was: the wallet may have a payment of before, which it tells then.

use super::{Provider, ProviderAction, peers::Peer, sessions::Session};
use crate::CloseCode;
use satgrid_engine::port::Command;
use satgrid_protocol::session::LATE_PAYMENT_MS;
use satgrid_types::{NodeKey, SessionId, UnixMs};

/// So long after its quote no other session takes the place of one, in ms: an honest consumer pays meanwhile. It bounds how many
/// of them the journal gets, too.
const YOUNG_MS: u64 = 60_000;
/// What has work under way is looked at again after this long, in ms.
const LOOK_AGAIN_MS: u64 = 60_000;
/// A machine whose time is up so much too late, in ms, has slept.
const GAP_MS: u64 = 60_000;

/// One of them, as far as the rule goes.
#[derive(Debug, Clone, Copy)]
struct Unpaid {
    id: SessionId,
    quoted_at: UnixMs,
    /// Of the peer that opens another one.
    same_peer: bool,
    /// It gives its place to nobody.
    stays: bool,
}

/// What is done with another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Free,
    /// There is room once this one is forgotten.
    Of(SessionId),
    None,
}

/// See the module.
fn room(unpaid: &[Unpaid], per_peer: usize, in_all: usize) -> Room {
    let of_peer = || unpaid.iter().filter(|one| one.same_peer);
    let oldest = |among: &mut dyn Iterator<Item = &Unpaid>| {
        let oldest = among.filter(|one| !one.stays).min_by_key(|one| (one.quoted_at, one.id));
        oldest.map_or(Room::None, |one| Room::Of(one.id))
    };
    if of_peer().count() >= per_peer {
        oldest(&mut of_peer())
    } else if unpaid.len() >= in_all {
        oldest(&mut unpaid.iter())
    } else {
        Room::Free
    }
}

impl Provider {
    /// Makes room for one more session of this peer. Whether there is some.
    pub(super) fn room_for_session(&mut self, now: UnixMs, peer: Peer, key: NodeKey) -> bool {
        let unpaid = self.unpaid_now(now, |other, consumer| *other == peer || consumer == key);
        match room(&unpaid, self.config.unpaid_per_peer, self.config.unpaid_sessions) {
            Room::Free => true,
            Room::Of(id) => {
                self.forget_session(id, "another session took its place: nothing was paid in it");
                true
            }
            Room::None => false,
        }
    }

    /// A session begins, or is back from the journal.
    pub(super) fn note_unpaid(&mut self, id: SessionId, lapses_at: UnixMs) {
        self.unpaid.insert(id);
        self.unpaid_due = Some(self.unpaid_due.map_or(lapses_at, |due| due.min(lapses_at)));
    }

    /// What was due is looked at long after: the machine slept. What the wallet has of before, it tells now.
    pub(super) fn note_gap(&mut self, now: UnixMs) {
        if self.wake.is_some_and(|due| now.since(due) >= GAP_MS) {
            self.awake_since = now;
        }
    }

    /// When this one is forgotten, as long as nothing comes of it.
    fn forgotten_at(&self, session: &Session, now: UnixMs) -> UnixMs {
        let state = &session.state;
        let told = if state.is_invoiced() { self.awake_since.plus_ms(LATE_PAYMENT_MS) } else { UnixMs(0) };
        let busy = if session.is_live() { now.plus_ms(LOOK_AGAIN_MS) } else { UnixMs(0) };
        state.lapses_at().max(told).max(busy)
    }

    /// Forgets those of which nothing can come any more.
    pub(super) fn tick_unpaid(&mut self, now: UnixMs) {
        if self.unpaid_due.is_none_or(|due| now < due) {
            return;
        }
        let (mut unpaid, mut over) = (core::mem::take(&mut self.unpaid), Vec::new());
        let mut due: Option<UnixMs> = None;
        unpaid.retain(|id| {
            let Some(session) = self.sessions.get(id).filter(|session| session.state.is_unpaid()) else { return false };
            let at = self.forgotten_at(session, now);
            if at <= now {
                over.push(*id);
            } else {
                due = Some(due.map_or(at, |due| due.min(at)));
            }
            true
        });
        (self.unpaid, self.unpaid_due) = (unpaid, due);
        for id in over {
            self.forget_session(id, "nothing was paid in this session while its quote stood");
        }
    }

    /// All of them as they are now. Those in which something was paid meanwhile are looked at no more.
    fn unpaid_now(&mut self, now: UnixMs, is_same: impl Fn(&Peer, NodeKey) -> bool) -> Vec<Unpaid> {
        let sessions = &self.sessions;
        let mut all = Vec::with_capacity(self.unpaid.len());
        self.unpaid.retain(|id| {
            let Some(session) = sessions.get(id).filter(|session| session.state.is_unpaid()) else { return false };
            let (state, quoted_at) = (&session.state, session.state.quoted_at());
            let young = now.since(quoted_at) < YOUNG_MS;
            let told = state.is_invoiced() && now.since(self.awake_since) < YOUNG_MS;
            let stays = young || told || session.is_live() || state.may_be_paid(now);
            all.push(Unpaid { id: *id, quoted_at, same_peer: is_same(&session.peer, state.consumer()), stays });
            true
        });
        all
    }

    /// Nothing was paid in it: nothing is lost with it.
    fn forget_session(&mut self, id: SessionId, why: &str) {
        let Some(session) = self.sessions.remove(&id) else { return };
        self.unpaid.remove(&id);
        self.live.remove(&id);
        self.exposed = self.exposed.saturating_sub(session.exposed);
        for hash in session.state.payment_hashes() {
            self.by_payment.remove(hash);
        }
        self.invoices.retain(|_, wanted| wanted.session != id);
        if let Some(engine) = session.engine {
            let command = Command::ForgetSession { session: id.0 };
            self.actions.push_back(ProviderAction::Engine { engine, command });
        }
        if let Some(link) = session.link {
            let (code, reason) = (CloseCode::Done, why.to_owned());
            self.actions.push_back(ProviderAction::CloseLink { link, code, reason });
            self.links.remove(&link);
        }
        self.counters.sessions_forgotten += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpaid(n: u8, quoted_at: u64, same_peer: bool, stays: bool) -> Unpaid {
        Unpaid { id: SessionId([n; 32]), quoted_at: UnixMs(quoted_at), same_peer, stays }
    }

    #[test]
    fn a_peer_makes_room_among_its_own_and_others_where_all_is_full() {
        let of = |n: u8| Room::Of(SessionId([n; 32]));
        let all = [
            unpaid(1, 10, false, false),
            unpaid(2, 30, true, false),
            unpaid(3, 20, true, false),
            unpaid(4, 5, true, true),
            unpaid(5, 1, false, true),
        ];
        assert_eq!(room(&all, 4, 6), Room::Free);
        assert_eq!(room(&all, 3, 6), of(3), "its own oldest that may go");
        assert_eq!(room(&all, 3, 5), of(3), "even where all is full");
        assert_eq!(room(&all, 4, 5), of(1), "the oldest of all");
        let stay = all.map(|one| Unpaid { stays: one.same_peer || one.stays, ..one });
        assert_eq!(room(&stay, 3, 6), Room::None, "others do not suffer for it");
        assert_eq!(room(&stay, 4, 5), of(1));
        let stay = all.map(|one| Unpaid { stays: true, ..one });
        assert_eq!(room(&stay, 4, 5), Room::None);
        assert_eq!(room(&[], 1, 1), Room::Free);
    }
}
