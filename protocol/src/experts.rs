//! Expert rows between a lead and a worker that holds experts: one call up, one answer down, on a hop's stream.
//!
//! The lead opens the hop and shows a ticket for each request, as for layers ([`crate::hop`]). Then it calls: each row of one
//! layer once, with the experts that are to evaluate it and the slot that pays for it. The worker answers on the same stream,
//! one row for each (row, expert) in the call's order, or says by a lost frame why not. Nothing goes on to a third node.
//!
//! Beside the rows a call has some 12 bytes and one or two for each expert of a row; an answer some 10.

use crate::hop::HopFault;
use minicbor::{Decode, Encode};
use satgrid_types::{WireType, cbor};

/// Rows in one call.
pub const MAX_CALL_ROWS: usize = 512;
/// (row, expert) pairs in one call.
pub const MAX_CALL_PAIRS: usize = 8_192;
/// Longest header of a call, in bytes.
pub const MAX_CALL_HEADER: usize = 60 * 1024;
/// Most bytes of rows in a call or an answer, as 32-bit numbers: they fit a frame in every wire type.
pub const MAX_CALL_BYTES: usize = crate::frame::MAX_FRAME - MAX_CALL_HEADER - 16;

const _: () = assert!(MAX_CALL_PAIRS * 5 + MAX_CALL_ROWS * 16 + 64 <= MAX_CALL_HEADER, "the longest header fits");
const _: () = assert!(MAX_CALL_HEADER <= u16::MAX as usize, "its length fits two bytes");

/// One row of a call.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CallRow {
    /// Whose it is: the slot that a ticket on this stream named.
    #[n(0)]
    pub slot: u64,
    /// Who evaluates it.
    #[n(1)]
    pub experts: Vec<u32>,
}

/// What a call is about.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CallHeader {
    /// The lead's number of this call: it comes back with the answer.
    #[n(0)]
    pub work: u64,
    #[n(1)]
    pub layer: u32,
    #[n(2)]
    pub wire: WireType,
    #[n(3)]
    pub rows: Vec<CallRow>,
}

/// What an answer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct AnswerHeader {
    #[n(0)]
    pub work: u64,
    #[n(1)]
    pub wire: WireType,
    /// The worker's own time for the call, in microseconds, waiting at its engine included: what is left of the lead's wait was
    /// the way. It is the worker's word, and serves estimates only.
    #[n(2)]
    pub busy_us: u32,
}

impl CallHeader {
    /// Pairs of row and expert: the rows of the answer, and what is charged.
    pub fn pairs(&self) -> usize {
        self.rows.iter().fold(0usize, |sum, row| sum.saturating_add(row.experts.len()))
    }

    /// The limits, before anything is computed.
    pub fn check(&self) -> Result<(), HopFault> {
        let (rows, pairs) = (self.rows.len(), self.pairs());
        let empty = rows == 0 || self.rows.iter().any(|row| row.experts.is_empty());
        if empty || rows > MAX_CALL_ROWS || pairs > MAX_CALL_PAIRS {
            return Err(HopFault::Call { rows, pairs });
        }
        Ok(())
    }

    /// The bytes of rows are as many as the header promises.
    pub fn check_rows(&self, bytes: usize, row_bytes: usize) -> Result<(), HopFault> {
        shape(self.rows.len(), bytes, row_bytes)
    }

    /// The same of the answer.
    pub fn check_answer(&self, bytes: usize, row_bytes: usize) -> Result<(), HopFault> {
        shape(self.pairs(), bytes, row_bytes)
    }
}

fn shape(rows: usize, bytes: usize, row_bytes: usize) -> Result<(), HopFault> {
    if rows.checked_mul(row_bytes) == Some(bytes) {
        return Ok(());
    }
    Err(HopFault::Shape { bytes, rows: rows as u64, row_bytes })
}

/// Kind, length of the header, header, rows.
pub(crate) fn encode<H: Encode<()>>(kind: u8, header: &H, rows: &[u8]) -> Vec<u8> {
    let header = cbor::encode(header);
    let mut out = Vec::with_capacity(3 + header.len() + rows.len());
    out.push(kind);
    // Headers are bounded by constants that fit; one that is not is refused by who reads it.
    out.extend_from_slice(&u16::try_from(header.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(&header);
    out.extend_from_slice(rows);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hop::HopFrame;

    fn call(rows: usize, experts: &[u32]) -> CallHeader {
        let row = CallRow { slot: 70_000, experts: experts.to_vec() };
        CallHeader { work: 1_000_000, layer: 40, wire: WireType::F32, rows: vec![row; rows] }
    }

    #[test]
    fn calls_survive_the_wire_and_cost_little() {
        let header = call(1, &[3, 127, 90, 55]);
        let rows = vec![5u8; 4 * 512];
        let bytes = HopFrame::Call(header.clone(), rows.clone()).encode();
        assert!(bytes.len() * 100 <= rows.len() * 102, "{} bytes beside the rows", bytes.len() - rows.len());
        assert_eq!(HopFrame::decode(bytes.clone()), Ok(HopFrame::Call(header.clone(), rows.clone())));
        for cut in [0, 1, 2, 5, 20] {
            assert!(HopFrame::decode(bytes[..cut].to_vec()).is_err(), "cut at {cut}");
        }
        assert_eq!(header.check_rows(rows.len(), 2_048), Ok(()));
        assert!(header.check_rows(rows.len() + 4, 2_048).is_err());
        assert_eq!((header.pairs(), header.check_answer(4 * 2_048, 2_048)), (4, Ok(())));
        let answer =
            HopFrame::Answer(AnswerHeader { work: 1_000_000, wire: WireType::Bf16, busy_us: 900 }, vec![1; 64]);
        assert_eq!(HopFrame::decode(answer.encode()), Ok(answer));
    }

    #[test]
    fn a_call_beyond_the_limits_is_the_sender_s_fault() {
        let refused = |header: CallHeader| HopFrame::decode(HopFrame::Call(header, Vec::new()).encode()).unwrap_err();
        let check = |header: CallHeader, expect: &str| {
            let fault = refused(header).to_string();
            assert!(fault.contains(expect), "{fault} has no {expect:?}");
        };
        check(call(MAX_CALL_ROWS + 1, &[1]), "513 rows");
        check(call(MAX_CALL_ROWS, &[1; 17]), "8704 pairs");
        check(call(0, &[]), "0 rows");
        check(call(1, &[]), "0 pairs");
        assert_eq!(call(MAX_CALL_ROWS, &[70_000; 16]).check(), Ok(()));
        let widest = HopFrame::Call(call(MAX_CALL_ROWS, &[70_000; 16]), Vec::new());
        assert_eq!(HopFrame::decode(widest.encode()), Ok(widest));
    }
}
