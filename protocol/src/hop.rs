//! Hidden rows between the nodes of a ring: lead, stage 1, ..., stage n, lead. Each hop is a stream of its own, straight
//! from one node to the next.
//!
//! The upstream node opens it with its node key. It carries no money and no promises: what may be done for whom is said by
//! **tickets**, each signed by the lead with the key of the session in which it pays the downstream node. Rows that no ticket
//! covers are refused, so nobody can have work billed that the lead did not order.
//!
//! A frame on the stream is one byte of kind, then:
//!
//! | kind | what follows |
//! |---|---|
//! | 0 ticket | canonical CBOR of [`TicketFrame`]: from now on, rows of this slot are covered |
//! | 1 rows | u16 big-endian length of the header, canonical CBOR of [`RowsHeader`], the rows as they are on the wire |
//! | 2 lost | canonical CBOR of a signed [`Refusal`], from downstream to upstream: these rows were refused, by whom and why |
//! | 3 call | as rows, with a [`CallHeader`]: from a lead to a worker that holds experts |
//! | 4 answer | as rows, with an [`AnswerHeader`]: back from it |
//!
//! Rows are not wrapped in CBOR and not copied for it; header and frame are some 40 bytes a batch.

use crate::experts::{AnswerHeader, CallHeader, MAX_CALL_HEADER, encode};
use crate::frame::MAX_FRAME;
use crate::refusal::Refusal;
use minicbor::{Decode, Encode};
use satgrid_types::{NodeKey, RequestId, SessionId, Signed, Statement, UnixMs, Verified, WireType, WorkKind, cbor};
use std::collections::BTreeSet;
use thiserror::Error;

/// Pieces in one frame of rows.
pub const MAX_PIECES: usize = 256;
/// Longest header, in bytes.
pub const MAX_HEADER: usize = 16 * 1024;
/// Most bytes of rows in one frame.
pub const MAX_ROWS_BYTES: usize = MAX_FRAME - MAX_HEADER - 16;
/// A ticket stands for this long at the most, in ms.
pub const MAX_TICKET_MS: u64 = 60 * 60 * 1_000;
/// Clocks of lead and worker may differ by this much, in ms.
const SKEW_MS: u64 = 5 * 60 * 1_000;
/// Tickets that a session may have shown; more are refused.
pub const MAX_TICKETS: usize = 65_536;

const _: () = assert!(MAX_PIECES * 48 + 64 <= MAX_HEADER, "the longest header fits");

/// The lead's word to the downstream node of a hop: take so many positions of this request from that neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ticket {
    #[n(0)]
    pub version: u32,
    /// Who sends the rows.
    #[n(1)]
    pub upstream: NodeKey,
    /// Who takes them.
    #[n(2)]
    pub downstream: NodeKey,
    /// The session in which the lead pays `downstream`; where rows come back to the lead, that with `upstream`.
    #[n(3)]
    pub session: SessionId,
    /// The request in that session.
    #[n(4)]
    pub request: RequestId,
    /// Positions of all kinds, replays included.
    #[n(5)]
    pub positions: u64,
    #[n(6)]
    pub expires_at: UnixMs,
    /// Once per session.
    #[n(7)]
    pub nonce: u64,
}

impl Ticket {
    pub const VERSION: u32 = 1;
}
impl Statement for Ticket {
    const KIND: &'static str = "ticket";
    const MAX_LEN: usize = 512;
}

/// A node's word, under its own key, that it leads in a session, in which it pays under that session's key. Hops are shared by all
/// requests of a lead: without this, whoever names another's key in an order would have its rows among that one's.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Leading {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub session: SessionId,
}

impl Leading {
    pub const VERSION: u32 = 1;

    pub const fn of(session: SessionId) -> Self {
        Leading { version: Self::VERSION, session }
    }

    /// Whether `lead` itself said so of this session.
    pub fn is_proven(said: &Signed<Leading>, lead: &NodeKey, session: SessionId) -> bool {
        said.verify(lead).is_ok_and(|said| *said == Leading::of(session))
    }
}
impl Statement for Leading {
    const KIND: &'static str = "leading";
    const MAX_LEN: usize = 64;
}

/// Why a ticket was not taken. The fault is the upstream's, which showed it, but for an expired one, which may be a clock's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TicketFault {
    #[error("it is not signed by the lead of this session")]
    Forged,
    #[error("it is for another {what}")]
    Other { what: &'static str },
    #[error("it expired {by_ms} ms ago")]
    Expired { by_ms: u64 },
    #[error("it stands for longer than a ticket may")]
    TooLong,
    #[error("it was shown before")]
    Replayed,
    #[error("the session has shown {MAX_TICKETS} tickets")]
    TooMany,
}

/// What a ticket is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// The key of the session in which the lead pays.
    pub lead: NodeKey,
    /// The key that the other end of the stream proved.
    pub upstream: NodeKey,
    pub downstream: NodeKey,
    pub session: SessionId,
    pub request: RequestId,
}

/// Tickets that were shown in one session.
#[derive(Debug, Clone, Default)]
pub struct Shown(BTreeSet<u64>);

/// Checks a ticket and remembers that it was shown.
pub fn take_ticket(
    signed: &Signed<Ticket>,
    expected: &Expected,
    shown: &mut Shown,
    now: UnixMs,
) -> Result<Verified<Ticket>, TicketFault> {
    let ticket = signed.verify(&expected.lead).map_err(|_| TicketFault::Forged)?;
    let same = |is: bool, what| if is { Ok(()) } else { Err(TicketFault::Other { what }) };
    same(ticket.version == Ticket::VERSION, "version")?;
    same(ticket.upstream == expected.upstream, "upstream")?;
    same(ticket.downstream == expected.downstream, "downstream")?;
    same(ticket.session == expected.session, "session")?;
    same(ticket.request == expected.request, "request")?;
    if ticket.expires_at <= now {
        return Err(TicketFault::Expired { by_ms: now.since(ticket.expires_at) });
    }
    if ticket.expires_at.since(now) > MAX_TICKET_MS + SKEW_MS {
        return Err(TicketFault::TooLong);
    }
    if shown.0.contains(&ticket.nonce) {
        return Err(TicketFault::Replayed);
    }
    if shown.0.len() >= MAX_TICKETS {
        return Err(TicketFault::TooMany);
    }
    shown.0.insert(ticket.nonce);
    Ok(ticket)
}

/// A ticket, and the slot by which rows name it on this stream. Slots are the lead's numbers of its customers' requests.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TicketFrame {
    #[n(0)]
    pub slot: u64,
    #[n(1)]
    pub ticket: Signed<Ticket>,
}

/// Rows of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct RowsPiece {
    #[n(0)]
    pub slot: u64,
    /// The lead's number of the sequence.
    #[n(1)]
    pub sequence: u32,
    /// Position of the first row. What is held there and beyond is dropped first.
    #[n(2)]
    pub start: u32,
    #[n(3)]
    pub rows: u32,
    #[n(4)]
    pub kind: WorkKind,
}

/// What a frame of rows is about.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RowsHeader {
    /// The lead's number of this work: it comes back with the rows.
    #[n(0)]
    pub work: u64,
    #[n(1)]
    pub pieces: Vec<RowsPiece>,
    #[n(2)]
    pub wire: WireType,
    /// Hops that are left: 0 comes back to the lead. A replay may end earlier, with no rows on the last hops.
    #[n(3)]
    pub ends_after: Option<u32>,
    /// Sent before under another number, and not answered.
    #[n(4)]
    pub again: bool,
}

/// A frame of a hop, with its rows where they were received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HopFrame {
    Ticket(TicketFrame),
    Rows(RowsHeader, Vec<u8>),
    Lost(Signed<Refusal>),
    Call(CallHeader, Vec<u8>),
    Answer(AnswerHeader, Vec<u8>),
}

/// What is wrong with a frame. The fault is the sender's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HopFault {
    #[error("a frame of kind {0}, or one that is cut short")]
    Kind(u8),
    #[error("{0}")]
    Codec(#[from] cbor::CodecError),
    #[error("{bytes} bytes are not {rows} rows of {row_bytes} bytes")]
    Shape { bytes: usize, rows: u64, row_bytes: usize },
    #[error("no pieces, more than {MAX_PIECES}, or an empty one")]
    Pieces,
    #[error("a call of {rows} rows and {pairs} pairs of row and expert")]
    Call { rows: usize, pairs: usize },
}

const TICKET: u8 = 0;
const ROWS: u8 = 1;
const LOST: u8 = 2;
const CALL: u8 = 3;
const ANSWER: u8 = 4;
const PREFIX: usize = 3;

impl HopFrame {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            HopFrame::Ticket(frame) => tagged(TICKET, frame),
            HopFrame::Lost(frame) => tagged(LOST, frame),
            HopFrame::Rows(header, rows) => rows_frame(header, rows),
            HopFrame::Call(header, rows) => encode(CALL, header, rows),
            HopFrame::Answer(header, rows) => encode(ANSWER, header, rows),
        }
    }

    pub fn decode(mut bytes: Vec<u8>) -> Result<HopFrame, HopFault> {
        let kind = *bytes.first().ok_or(HopFault::Kind(u8::MAX))?;
        match kind {
            TICKET => Ok(HopFrame::Ticket(cbor::decode_limited(&bytes[1..], 2 * Ticket::MAX_LEN)?)),
            LOST => Ok(HopFrame::Lost(cbor::decode_limited(&bytes[1..], 2 * Refusal::MAX_LEN)?)),
            ROWS => {
                let (header, end) = header_of(&bytes)?;
                let header: RowsHeader = cbor::decode_limited(header, MAX_HEADER)?;
                let pieces = &header.pieces;
                if pieces.is_empty() || pieces.len() > MAX_PIECES || pieces.iter().any(|piece| piece.rows == 0) {
                    return Err(HopFault::Pieces);
                }
                Ok(HopFrame::Rows(header, bytes.split_off(end)))
            }
            CALL => {
                let (header, end) = header_of(&bytes)?;
                let header: CallHeader = cbor::decode_limited(header, MAX_CALL_HEADER)?;
                header.check()?;
                Ok(HopFrame::Call(header, bytes.split_off(end)))
            }
            ANSWER => {
                let (header, end) = header_of(&bytes)?;
                let header: AnswerHeader = cbor::decode_limited(header, MAX_HEADER)?;
                Ok(HopFrame::Answer(header, bytes.split_off(end)))
            }
            other => Err(HopFault::Kind(other)),
        }
    }
}

/// The header behind its length, and where it ends.
fn header_of(bytes: &[u8]) -> Result<(&[u8], usize), HopFault> {
    let kind = bytes.first().copied().unwrap_or(u8::MAX);
    let length = bytes.get(1..PREFIX).ok_or(HopFault::Kind(kind))?;
    let end = PREFIX + usize::from(u16::from_be_bytes([length[0], length[1]]));
    Ok((bytes.get(PREFIX..end).ok_or(HopFault::Kind(kind))?, end))
}

/// A frame of rows, from borrowed bytes.
pub fn rows_frame(header: &RowsHeader, rows: &[u8]) -> Vec<u8> {
    encode(ROWS, header, rows)
}

fn tagged<T: Encode<()>>(kind: u8, frame: &T) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend(cbor::encode(frame));
    out
}

impl RowsHeader {
    pub fn rows(&self) -> u64 {
        self.pieces.iter().fold(0u64, |sum, piece| sum.saturating_add(piece.rows.into()))
    }
    /// The bytes are that many rows; none where a replay ended before.
    pub fn check_shape(&self, bytes: usize, row_bytes: usize) -> Result<(), HopFault> {
        let rows = self.rows();
        let whole = usize::try_from(rows).ok().and_then(|rows| rows.checked_mul(row_bytes));
        if whole == Some(bytes) { Ok(()) } else { Err(HopFault::Shape { bytes, rows, row_bytes }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;
    use satgrid_types::node_key;

    const NOW: UnixMs = UnixMs(1_000_000_000);

    fn ticket() -> Ticket {
        Ticket {
            version: 1,
            upstream: NodeKey([1; 32]),
            downstream: NodeKey([2; 32]),
            session: SessionId([3; 32]),
            request: RequestId([4; 32]),
            positions: 600,
            expires_at: NOW.plus_ms(60_000),
            nonce: 7,
        }
    }

    #[track_caller]
    fn check(expect: Result<(), TicketFault>, signer: u8, bend: impl Fn(&mut Ticket)) {
        let lead = SigningKey::from_bytes(&[9; 32]);
        let (upstream, downstream) = (NodeKey([1; 32]), NodeKey([2; 32]));
        let (session, request) = (SessionId([3; 32]), RequestId([4; 32]));
        let expected = Expected { lead: node_key(&lead), upstream, downstream, session, request };
        let mut ticket = ticket();
        bend(&mut ticket);
        let signed = Signed::sign(&ticket, &SigningKey::from_bytes(&[signer; 32]));
        let mut shown = Shown::default();
        shown.0.insert(99);
        assert_eq!(take_ticket(&signed, &expected, &mut shown, NOW).map(|_| ()), expect);
        if expect.is_ok() {
            assert_eq!(take_ticket(&signed, &expected, &mut shown, NOW).map(|_| ()), Err(TicketFault::Replayed));
        }
    }

    #[test]
    fn a_ticket_is_for_one_hop_one_request_and_one_time() {
        check(Ok(()), 9, |_| ());
        check(Err(TicketFault::Forged), 8, |_| ());
        check(Err(TicketFault::Other { what: "upstream" }), 9, |t| t.upstream.0[0] = 9);
        check(Err(TicketFault::Other { what: "downstream" }), 9, |t| t.downstream.0[0] = 9);
        check(Err(TicketFault::Other { what: "session" }), 9, |t| t.session.0[0] = 9);
        check(Err(TicketFault::Other { what: "request" }), 9, |t| t.request.0[0] = 9);
        check(Err(TicketFault::Other { what: "version" }), 9, |t| t.version = 2);
        check(Err(TicketFault::Expired { by_ms: 0 }), 9, |t| t.expires_at = NOW);
        check(Err(TicketFault::TooLong), 9, |t| t.expires_at = NOW.plus_ms(2 * MAX_TICKET_MS));
        check(Err(TicketFault::Replayed), 9, |t| t.nonce = 99);
    }

    #[test]
    fn frames_survive_the_wire_and_cost_little() {
        let piece = RowsPiece { slot: 70_000, sequence: 3, start: 1_000, rows: 1, kind: WorkKind::Decode };
        let header =
            RowsHeader { work: 1_000_000, pieces: vec![piece], wire: WireType::F32, ends_after: None, again: false };
        let rows = vec![5u8; 4 * 640];
        let frame = HopFrame::Rows(header.clone(), rows.clone());
        let bytes = frame.encode();
        assert!(bytes.len() - rows.len() <= 40, "{} bytes beside the rows", bytes.len() - rows.len());
        assert!(bytes.len() * 100 <= rows.len() * 105, "within 5 % of the hidden state");
        assert_eq!(HopFrame::decode(bytes.clone()), Ok(frame));
        assert_eq!(header.check_shape(rows.len(), 2_560), Ok(()));
        assert!(header.check_shape(rows.len() - 1, 2_560).is_err());
        let ticket = HopFrame::Ticket(TicketFrame {
            slot: 1,
            ticket: Signed::sign(&ticket(), &SigningKey::from_bytes(&[9; 32])),
        });
        assert_eq!(HopFrame::decode(ticket.encode()), Ok(ticket));
        for cut in [0, 1, 2, 5, 20] {
            assert!(HopFrame::decode(bytes[..cut].to_vec()).is_err(), "cut at {cut}");
        }
        let empty = RowsHeader { pieces: vec![RowsPiece { rows: 0, ..piece }], ..header };
        assert_eq!(HopFrame::decode(rows_frame(&empty, &[])), Err(HopFault::Pieces));
        assert_eq!(HopFrame::decode(vec![9, 1, 2]), Err(HopFault::Kind(9)));
    }
}
