//! The rows that a stage sent on, kept within a bound of bytes: when its successor is replaced, they are sent again and
//! nothing is computed twice.
//!
//! Only unbroken runs from position 0 are of use, since a new stage has nothing. So a sequence whose rows do not fit is
//! dropped whole, the longest unused first, and is remembered no more until it begins again at 0.

use std::collections::BTreeMap;

use super::codec::HiddenRows;

/// Rows by sequence, from position 0 on. `K` names a sequence.
#[derive(Debug, Clone)]
pub struct KeptRows<K> {
    limit: usize,
    bytes: usize,
    uses: u64,
    sequences: BTreeMap<K, Kept>,
}

#[derive(Debug, Clone)]
struct Kept {
    rows: HiddenRows,
    used: u64,
}

impl<K: Ord + Copy> KeptRows<K> {
    /// Keeps at most `limit` bytes of rows.
    pub fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, uses: 0, sequences: BTreeMap::new() }
    }

    /// Positions kept of a sequence, from 0.
    pub fn upto(&self, sequence: K) -> u32 {
        self.sequences.get(&sequence).map_or(0, |kept| kept.rows.count)
    }

    /// Bytes kept now.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Notes rows that were sent for positions from `start` on; what was kept there and beyond is dropped.
    pub fn push(&mut self, sequence: K, start: u32, rows: &HiddenRows) {
        self.truncate(sequence, start);
        if start > self.upto(sequence) || rows.bytes.len() > self.limit {
            self.forget(sequence);
            return;
        }
        self.uses += 1;
        let fresh = || Kept { rows: HiddenRows::none(rows.wire), used: 0 };
        let kept = self.sequences.entry(sequence).or_insert_with(fresh);
        if kept.rows.wire != rows.wire {
            self.bytes -= kept.rows.bytes.len();
            kept.rows = HiddenRows::none(rows.wire);
            if start > 0 {
                self.sequences.remove(&sequence);
                return;
            }
        }
        kept.rows.extend(rows);
        kept.used = self.uses;
        self.bytes += rows.bytes.len();
        while self.bytes > self.limit {
            let Some(oldest) = self.sequences.iter().min_by_key(|(_, kept)| kept.used).map(|(key, _)| *key) else {
                return;
            };
            self.forget(oldest);
        }
    }

    /// The rows of `from..upto`; `None` where not all of them are kept.
    pub fn rows(&self, sequence: K, from: u32, upto: u32) -> Option<HiddenRows> {
        let kept = self.sequences.get(&sequence)?;
        (from <= upto && upto <= kept.rows.count).then(|| kept.rows.slice(from, upto))
    }

    /// Drops positions at `upto` and beyond.
    pub fn truncate(&mut self, sequence: K, upto: u32) {
        let Some(kept) = self.sequences.get_mut(&sequence) else { return };
        if upto < kept.rows.count {
            let before = kept.rows.bytes.len();
            kept.rows = kept.rows.slice(0, upto);
            self.bytes -= before - kept.rows.bytes.len();
        }
    }

    pub fn forget(&mut self, sequence: K) {
        if let Some(kept) = self.sequences.remove(&sequence) {
            self.bytes -= kept.rows.bytes.len();
        }
    }

    /// Forgets every sequence that the caller names.
    pub fn forget_all(&mut self, which: impl Fn(&K) -> bool) {
        let gone: Vec<K> = self.sequences.keys().filter(|sequence| which(sequence)).copied().collect();
        gone.into_iter().for_each(|sequence| self.forget(sequence));
    }

    pub fn clear(&mut self) {
        self.sequences.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::WireType;

    fn rows(first: u32, count: u32) -> HiddenRows {
        let numbers: Vec<f32> = (first..first + count).flat_map(|n| [n as f32; 4]).collect();
        HiddenRows::encode(&numbers, 4, WireType::F32).unwrap()
    }

    #[test]
    fn runs_from_the_beginning_are_kept_and_trimmed() {
        let mut kept = KeptRows::new(10 * 16);
        kept.push('a', 0, &rows(0, 3));
        kept.push('a', 3, &rows(3, 2));
        assert_eq!((kept.upto('a'), kept.rows('a', 1, 5)), (5, Some(rows(1, 4))));
        assert_eq!(kept.rows('a', 1, 6), None);
        // Another token at position 2.
        kept.push('a', 2, &rows(20, 1));
        assert_eq!((kept.upto('a'), kept.rows('a', 1, 3).map(|r| r.decode(4).unwrap()[4])), (3, Some(20.0)));
        // A gap cannot be filled any more.
        kept.push('a', 9, &rows(9, 1));
        assert_eq!((kept.upto('a'), kept.bytes()), (0, 0));
    }

    #[test]
    fn the_bound_holds_and_the_longest_unused_goes() {
        let mut kept = KeptRows::new(10 * 16);
        kept.push('a', 0, &rows(0, 4));
        kept.push('b', 0, &rows(0, 4));
        kept.push('a', 4, &rows(4, 1));
        kept.push('c', 0, &rows(0, 4));
        assert_eq!((kept.upto('a'), kept.upto('b'), kept.upto('c')), (5, 0, 4));
        kept.push('d', 0, &rows(0, 11));
        assert_eq!((kept.upto('d'), kept.bytes()), (0, 9 * 16));
        kept.forget('a');
        assert_eq!(kept.bytes(), 4 * 16);
        kept.forget_all(|sequence| *sequence != 'c');
        assert_eq!((kept.upto('c'), kept.bytes()), (4, 4 * 16));
        kept.forget_all(|_| true);
        assert_eq!(kept.bytes(), 0);
    }
}
