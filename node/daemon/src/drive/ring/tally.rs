//! What a job sent into the ring and what came back, and the account of it for the receipt. It counts and signs nothing.
//!
//! Rows that never came back were lost under way: a worker's engine or a link died under them, or the ring had failed by
//! then. Some workers have computed them and say so in their receipts, others have not: only where those receipts show it
//! does the account speak of the loss, so that everywhere else every layer is held to the very positions that came back.

use satgrid_ledger::statements::{Leg, LostRows, RowsHash, Split, check_split};
use satgrid_types::{LayerRange, WorkKind};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Tally {
    sent: RowsHash,
    received: RowsHash,
    bytes_sent: u64,
    bytes_received: u64,
    /// Positions that came back, replays left out.
    positions: u64,
    /// Positions that were sent, each time that they were, replays left out.
    begun: u64,
    /// Rows of any kind that are under way or lost.
    away: u64,
}

impl Tally {
    /// Rows go out: to the first worker as `bytes`, or, with none, from a worker that has kept them.
    pub(super) fn sent(&mut self, kind: WorkKind, rows: u32, bytes: &[u8]) {
        self.sent.push(bytes);
        self.bytes_sent = self.bytes_sent.saturating_add(bytes.len() as u64);
        self.away = self.away.saturating_add(rows.into());
        if kind != WorkKind::Replay {
            self.begun = self.begun.saturating_add(rows.into());
        }
    }

    /// They are back, as `bytes` unless they ended at a worker.
    pub(super) fn came_back(&mut self, kind: WorkKind, rows: u32, bytes: &[u8]) {
        self.received.push(bytes);
        self.bytes_received = self.bytes_received.saturating_add(bytes.len() as u64);
        self.away = self.away.saturating_sub(rows.into());
        if kind != WorkKind::Replay {
            self.positions = self.positions.saturating_add(rows.into());
        }
    }

    /// How the job was put together, over its workers' parts.
    pub(super) fn split(&self, layers: u32, own: &[LayerRange], legs: &[Leg]) -> Split {
        let whole = Split {
            layers,
            own: own.to_vec(),
            positions: self.positions,
            sent: self.sent.value(),
            received: self.received.value(),
            lost: None,
        };
        if self.away == 0 || check_split(&whole, legs).is_ok() {
            return whole;
        }
        let positions = self.begun.saturating_sub(self.positions);
        let lost = LostRows { positions, bytes_sent: self.bytes_sent, bytes_received: self.bytes_received };
        Split { lost: Some(lost), ..whole }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_ledger::statements::{PartOrder, Passed};
    use satgrid_types::{Digest, NodeKey, PartUsage, RequestId, WireType};

    /// Batches by their number, as rows of eight bytes: no two are alike, and each worker makes others of them.
    fn batch(number: u8, rows: u32, worker: u8) -> Vec<u8> {
        [number, worker].repeat(4 * rows as usize)
    }

    /// A worker that took in some batches, and did not get to the end of the last so many.
    fn leg(worker: u8, range: (u32, u32), batches: &[(u8, u32)], unfinished: usize) -> Leg {
        let layers = LayerRange::new(range.0, range.1).unwrap();
        let (mut input, mut output) = (RowsHash::default(), RowsHash::default());
        let (mut usage, mut bytes_in, mut bytes_out) = (PartUsage::default(), 0, 0);
        for (at, &(number, rows)) in batches.iter().enumerate() {
            input.push(&batch(number, rows, worker - 1));
            bytes_in += 8 * u64::from(rows);
            if at + unfinished < batches.len() {
                output.push(&batch(number, rows, worker));
                bytes_out += 8 * u64::from(rows);
                usage = usage.plus(WorkKind::Decode, rows.into(), layers.layers()).unwrap();
            }
        }
        let order = PartOrder {
            layers: Some(layers),
            lead: NodeKey([9; 32]),
            request: RequestId([1; 32]),
            wire: WireType::F32,
            max_positions: 1_000,
        };
        let rows = Some(Passed { input: input.value(), output: output.value(), bytes_in, bytes_out });
        Leg { worker: NodeKey([worker; 32]), order, usage, id: Some(Digest([worker; 32])), rows }
    }

    fn around(tally: &mut Tally, sent: &[(u8, u32)], back: usize, last: u8) {
        for &(number, rows) in sent {
            tally.sent(WorkKind::Decode, rows, &batch(number, rows, 0));
        }
        for &(number, rows) in &sent[..back] {
            tally.came_back(WorkKind::Decode, rows, &batch(number, rows, last));
        }
    }

    #[test]
    fn a_loss_is_told_where_the_receipts_show_it() {
        let own = [LayerRange::new(0, 1).unwrap(), LayerRange::new(7, 8).unwrap()];
        let sent = [(1, 30), (2, 4), (3, 2)];
        let check = |what: &str, legs: &[Leg], back: usize, lost: Option<u64>| {
            let mut tally = Tally::default();
            around(&mut tally, &sent, back, 3);
            let split = tally.split(8, &own, legs);
            assert_eq!(check_split(&split, legs), Ok(()), "{what}");
            assert_eq!(split.lost.map(|lost| lost.positions), lost, "{what}");
        };
        let (a, b, c) = ((1, 3), (3, 5), (5, 7));
        let all = [leg(1, a, &sent, 0), leg(2, b, &sent, 0), leg(3, c, &sent, 0)];
        check("all is well", &all, 3, None);
        check(
            "the first one's engine",
            &[leg(1, a, &sent[..1], 0), leg(2, b, &sent[..1], 0), leg(3, c, &sent[..1], 0)],
            1,
            Some(6),
        );
        // It took in all of them and got to the end of one: that is all that came back, and no receipt shows a loss.
        check("it had begun", &[leg(1, a, &sent, 2), leg(2, b, &sent[..1], 0), leg(3, c, &sent[..1], 0)], 1, None);
        check(
            "the second one's engine",
            &[leg(1, a, &sent, 0), leg(2, b, &sent[..2], 1), leg(3, c, &sent[..1], 0)],
            1,
            Some(6),
        );
        check(
            "the last one's engine",
            &[leg(1, a, &sent, 0), leg(2, b, &sent[..2], 0), leg(3, c, &sent[..1], 0)],
            1,
            Some(6),
        );
        check("on the way back", &all, 2, Some(2));
        let vanished = Leg { rows: None, ..leg(2, b, &sent[..1], 0) };
        check("a worker that vanished is judged as before", &[all[0], vanished, all[2]], 1, None);
    }

    #[test]
    fn rows_that_were_changed_are_no_loss() {
        let own = [LayerRange::new(0, 1).unwrap(), LayerRange::new(5, 6).unwrap()];
        let sent = [(1, 30), (2, 4)];
        let mut tally = Tally::default();
        around(&mut tally, &sent, 1, 2);
        let (a, b) = ((1, 3), (3, 5));
        let changed = leg(2, b, &[(7, 30), (2, 4)], 0);
        let split = tally.split(6, &own, &[leg(1, a, &sent, 0), changed]);
        assert!(split.lost.is_some() && check_split(&split, &[leg(1, a, &sent, 0), changed]).is_err());
        // Nothing is lost: nothing is excused.
        tally.came_back(WorkKind::Decode, 4, &batch(2, 4, 2));
        assert_eq!(tally.split(6, &own, &[leg(1, a, &sent, 0), leg(2, b, &sent[..1], 0)]).lost, None);
    }
}
