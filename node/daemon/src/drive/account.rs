//! What a desk keeps of one job on a part of a model, whichever part it is: who ordered it, how far it is granted, what went
//! in and came out. It counts; what a unit is, positions or expert rows, its desk knows.

use super::inlets::Ordered;
use satgrid_engine::port::JobId;
use satgrid_ledger::statements::{PartOrder, RowsHash};
use satgrid_node::provider::PartDone;
use satgrid_types::{NodeKey, PartUsage, RequestId, SessionId, WireType};
use std::time::Duration;

/// See the module.
pub(super) struct Account {
    pub session: SessionId,
    pub request: RequestId,
    pub order: PartOrder,
    pub lead: NodeKey,
    granted: u64,
    /// Units that were given to the engine.
    begun: u64,
    pub usage: PartUsage,
    input: RowsHash,
    output: RowsHash,
    bytes_in: u64,
    bytes_out: u64,
    busy: Duration,
    /// Pieces of work of this job that the engine has now.
    at_work: u32,
    settling: bool,
}

impl Account {
    pub(super) fn new(session: SessionId, request: RequestId, order: PartOrder, lead: NodeKey) -> Account {
        Account {
            session,
            request,
            order,
            lead,
            granted: 0,
            begun: 0,
            usage: PartUsage::default(),
            input: RowsHash::default(),
            output: RowsHash::default(),
            bytes_in: 0,
            bytes_out: 0,
            busy: Duration::ZERO,
            at_work: 0,
            settling: false,
        }
    }

    /// What its tickets must be for, where this is the job of the request.
    pub(super) fn ordered(&self, id: JobId, session: &SessionId, request: &RequestId) -> Option<(JobId, Ordered)> {
        let Account { lead, .. } = *self;
        (self.session == *session && self.request == *request)
            .then_some((id, Ordered { session: *session, request: *request, lead }))
    }

    pub(super) fn grant(&mut self, upto: u64) {
        self.granted = self.granted.max(upto);
    }

    /// Whether `more` units may begin now: `None` where they have to wait for a grant, else nothing or what is wrong.
    pub(super) fn may_begin(&self, more: u64, wire: WireType, unit: &str) -> Option<Result<(), String>> {
        if self.order.wire != wire {
            return Some(Err(format!("rows as {wire}, ordered as {}", self.order.wire)));
        }
        let (upto, most) = (self.begun.saturating_add(more), self.order.max_positions);
        if upto > most {
            return Some(Err(format!("{upto} {unit}, {most} were ordered")));
        }
        (upto <= self.granted).then_some(Ok(()))
    }

    /// Rows of so many units go to the engine.
    pub(super) fn begin(&mut self, rows: &[u8], units: u64) {
        self.input.push(rows);
        self.bytes_in = self.bytes_in.saturating_add(rows.len() as u64);
        self.begun = self.begun.saturating_add(units);
        self.at_work += 1;
    }

    /// A piece of work is at the engine no more.
    pub(super) fn put_down(&mut self) {
        self.at_work = self.at_work.saturating_sub(1);
    }

    /// The engine has let go of everything.
    pub(super) fn drop_work(&mut self) {
        self.at_work = 0;
    }

    /// Units that began and came to nothing: they may begin again.
    pub(super) fn give_back(&mut self, units: u64) {
        self.begun = self.begun.saturating_sub(units);
    }

    /// Rows that came out, and the time that they took.
    pub(super) fn came_out(&mut self, rows: &[u8], busy: Duration) {
        self.output.push(rows);
        self.bytes_out = self.bytes_out.saturating_add(rows.len() as u64);
        self.busy += busy;
    }

    /// Rows that came out before go out once more.
    pub(super) fn sent_again(&mut self, rows: &[u8]) {
        self.came_out(rows, Duration::ZERO);
    }

    pub(super) fn settle(&mut self) {
        self.settling = true;
    }

    /// It is to be settled, and nothing of it is at work.
    pub(super) fn is_over(&self) -> bool {
        self.settling && self.at_work == 0
    }

    pub(super) fn done(&self) -> PartDone {
        PartDone {
            usage: self.usage,
            input: self.input.value(),
            output: self.output.value(),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            busy_ms: u64::try_from(self.busy.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// As the engine's port counts it.
    pub(super) fn evaluated(&self) -> u32 {
        u32::try_from(self.begun).unwrap_or(u32::MAX)
    }
}

/// The rows of pieces that lie one behind the other, by how many each has; none beyond the end. Whoever passes over a piece, since
/// its job is over, finds the next one where it is.
pub(super) fn cut(rows: &[u8], row_bytes: usize, pieces: impl Iterator<Item = usize>) -> Vec<&[u8]> {
    let mut at = 0_usize;
    let next = |count: usize| {
        let from = at;
        at = at.saturating_add(count.saturating_mul(row_bytes));
        rows.get(from..at).unwrap_or_default()
    };
    pieces.map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_piece_are_where_they_are_whoever_wants_those_before() {
        let rows: Vec<u8> = (0..12).collect();
        let cut = |counts: &[usize]| cut(&rows, 2, counts.iter().copied()).concat();
        assert_eq!(cut(&[1, 3, 2]), rows);
        assert_eq!(super::cut(&rows, 2, [1, 3, 2].into_iter())[1], [2, 3, 4, 5, 6, 7]);
        assert_eq!(super::cut(&rows, 2, [5, 2, 1].into_iter())[1..], [[0_u8; 0]; 2], "beyond the end");
        assert_eq!(super::cut(&[], 0, [1, 1].into_iter()), [[0_u8; 0]; 2], "a replay that ended before");
    }
}
