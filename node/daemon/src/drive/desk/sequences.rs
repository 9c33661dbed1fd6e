//! Whose the sequences in an engine are, and how far each was computed for which job: by that, rows are replay or not.

use satgrid_engine::{port::JobId, stage::port::SequenceId};
use satgrid_protocol::hop::RowsPiece;
use satgrid_types::{SessionId, WorkKind};
use std::collections::BTreeMap;

/// Sessions have numbers of their own in the engine, and no number is given twice.
#[derive(Debug, Default)]
pub(super) struct Sequences {
    owners: BTreeMap<SessionId, u64>,
    next_owner: u64,
    /// Of whom each was last, and the position up to which it was computed for that job here.
    computed: BTreeMap<SequenceId, (JobId, u32)>,
}

impl Sequences {
    /// The number of a session.
    pub(super) fn owner(&mut self, session: SessionId) -> u64 {
        *self.owners.entry(session).or_insert_with(|| {
            let owner = self.next_owner;
            self.next_owner += 1;
            owner
        })
    }

    /// The session is over; its number, if it had one.
    pub(super) fn forget(&mut self, session: SessionId) -> Option<u64> {
        let owner = self.owners.remove(&session)?;
        self.computed.retain(|sequence, _| sequence.owner != owner);
        Some(owner)
    }

    /// Notes rows that were just computed for a job, and says as what they count. Judged as works were computed, not as they came:
    /// in between, the engine may have refused what was before. `again` says that the sender sends them once more.
    pub(super) fn computed(&mut self, sequence: SequenceId, job: JobId, piece: &RowsPiece, again: bool) -> WorkKind {
        let (of, upto) = self.computed.entry(sequence).or_insert((job, 0));
        if *of != job {
            // What another job left there was no work for this one.
            (*of, *upto) = (job, piece.start);
        }
        let kind = if again && piece.start < *upto { WorkKind::Replay } else { piece.kind };
        let end = piece.start.saturating_add(piece.rows);
        // A replay goes over what was computed here already: what follows it is sent again too.
        *upto = if again || piece.kind == WorkKind::Replay { end.max(*upto) } else { end };
        kind
    }

    /// The engine holds a sequence only up to here.
    pub(super) fn cut(&mut self, sequence: SequenceId, upto: u32) {
        if let Some((_, computed)) = self.computed.get_mut(&sequence) {
            *computed = upto;
        }
    }

    /// The engine died, and holds nothing.
    pub(super) fn clear(&mut self) {
        self.computed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: SequenceId = SequenceId { owner: 0, number: 7 };

    fn piece(start: u32, rows: u32, kind: WorkKind) -> RowsPiece {
        RowsPiece { slot: 0, sequence: ONE.number, start, rows, kind }
    }

    #[test]
    fn a_new_session_never_has_the_number_of_one_that_is_open() {
        let mut sequences = Sequences::default();
        let [first, second, third] = [1, 2, 3].map(|n| SessionId([n; 32]));
        let (a, b) = (sequences.owner(first), sequences.owner(second));
        assert_eq!(sequences.owner(first), a);
        assert_eq!(sequences.forget(first), Some(a));
        assert_eq!(sequences.forget(first), None);
        let c = sequences.owner(third);
        assert!(c != b && c != a, "{a} {b} {c}");
        assert_eq!(sequences.owner(second), b);
    }

    #[test]
    fn rows_are_replay_where_this_job_had_them_computed_here() {
        let mut sequences = Sequences::default();
        let mut kind =
            |start, rows, again| sequences.computed(ONE, JobId(1), &piece(start, rows, WorkKind::Prefill), again);
        assert_eq!(kind(0, 10, false), WorkKind::Prefill);
        assert_eq!(kind(10, 5, false), WorkKind::Prefill);
        // Once more from 4 on, and beyond what was there.
        assert_eq!(kind(4, 8, true), WorkKind::Replay);
        assert_eq!(kind(12, 3, true), WorkKind::Replay);
        assert_eq!(kind(15, 2, true), WorkKind::Prefill);
        // What the engine has not any more is work again.
        sequences.cut(ONE, 3);
        assert_eq!(sequences.computed(ONE, JobId(1), &piece(3, 2, WorkKind::Prefill), true), WorkKind::Prefill);
        sequences.clear();
        assert_eq!(sequences.computed(ONE, JobId(1), &piece(0, 5, WorkKind::Prefill), true), WorkKind::Prefill);
    }

    /// A second request of a session begins behind what the first one left in the sequence, and may have to send that piece twice.
    #[test]
    fn what_another_job_left_is_no_replay_of_this_one() {
        let mut sequences = Sequences::default();
        assert_eq!(sequences.computed(ONE, JobId(1), &piece(0, 20, WorkKind::Prefill), false), WorkKind::Prefill);
        assert_eq!(sequences.computed(ONE, JobId(2), &piece(12, 4, WorkKind::Prefill), true), WorkKind::Prefill);
        assert_eq!(sequences.computed(ONE, JobId(2), &piece(12, 4, WorkKind::Prefill), true), WorkKind::Replay);
    }

    #[test]
    fn what_a_lead_orders_as_replay_stays_so() {
        let mut sequences = Sequences::default();
        assert_eq!(sequences.computed(ONE, JobId(1), &piece(0, 20, WorkKind::Replay), false), WorkKind::Replay);
        assert_eq!(sequences.computed(ONE, JobId(1), &piece(20, 1, WorkKind::Decode), false), WorkKind::Decode);
    }

    #[test]
    fn a_session_that_is_over_leaves_nothing_behind() {
        let mut sequences = Sequences::default();
        let session = SessionId([1; 32]);
        let owner = sequences.owner(session);
        let sequence = SequenceId { owner, ..ONE };
        sequences.computed(sequence, JobId(1), &piece(0, 20, WorkKind::Prefill), false);
        sequences.forget(session);
        assert!(sequences.computed.is_empty());
    }
}
