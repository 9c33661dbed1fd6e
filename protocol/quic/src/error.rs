//! What can end a link or a stream, sorted by whose fault it is.

use crate::Code;
use crate::code::readable;
use core::time::Duration;
use quinn::ConnectionError;
use satgrid_types::cbor::CodecError;
use thiserror::Error;

/// Whose fault an error is: a bug report, a penalty or a retry follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// We did it, by decision or by a bug.
    Ours,
    /// The peer did what no correct node does.
    Peer,
    /// Nobody in particular: networks, crashes, a peer that left politely.
    World,
}

/// Something that no correct peer does. The connection is closed and the peer is told why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Violation {
    #[error("frame of {len} bytes exceeds the limit of {limit}")]
    FrameTooLong { len: usize, limit: usize },
    #[error("empty frame")]
    EmptyFrame,
    #[error("stream ended after {received} of a frame's {expected} bytes")]
    TruncatedFrame { received: usize, expected: usize },
    #[error("frame refused: {0}")]
    Frame(CodecError),
    #[error("a second control stream")]
    SecondControlStream,
}

impl Violation {
    /// The code with which the connection is closed.
    pub fn code(&self) -> Code {
        match self {
            Violation::FrameTooLong { .. } => Code::LIMIT,
            Violation::Frame(CodecError::TooLong { .. }) => Code::LIMIT,
            Violation::Frame(CodecError::Malformed(_) | CodecError::NotCanonical { .. }) => Code::NOT_CANONICAL,
            Violation::EmptyFrame | Violation::TruncatedFrame { .. } | Violation::SecondControlStream => Code::PROTOCOL,
        }
    }
}

/// What was waited for in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// Any packet at all: the peer's process, host or network is gone.
    Peer,
    /// The rest of a frame that had begun.
    Frame { received: usize, expected: usize },
    /// Room for one more stream on this connection.
    StreamSlot,
    /// What the peer wants on a stream that it opened.
    Request,
    /// The peer to read what it asked for.
    Reader,
    /// The peer's confirmation that it received everything.
    Delivery,
}

impl core::fmt::Display for Waiting {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Waiting::Peer => f.write_str("any sign of life"),
            Waiting::Frame { received, expected } => write!(f, "a frame ({received} of {expected} bytes came)"),
            Waiting::StreamSlot => f.write_str("room for one more stream"),
            Waiting::Request => f.write_str("the request"),
            Waiting::Reader => f.write_str("the peer to read"),
            Waiting::Delivery => f.write_str("confirmation of delivery"),
        }
    }
}

/// Why a link or one of its streams failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LinkError {
    #[error("peer violated the protocol: {0}")]
    PeerViolated(#[from] Violation),
    #[error("peer closed the connection ({code}): {reason}")]
    PeerClosed { code: Code, reason: String },
    /// One stream only; the connection lives on.
    #[error("peer cancelled the stream ({code})")]
    PeerCancelled { code: Code },
    #[error("timed out after {after:?} waiting for {waiting}")]
    TimedOut { waiting: Waiting, after: Duration },
    #[error("closed by this node")]
    LocalShutdown,
    /// We tried to send more than the protocol allows; nothing was sent.
    #[error("own frame of {len} bytes exceeds the limit of {limit}")]
    OwnFrameTooLong { len: usize, limit: usize },
    #[error("QUIC: {0}")]
    Transport(String),
}

impl LinkError {
    pub fn fault(&self) -> Fault {
        match self {
            LinkError::PeerViolated(_) => Fault::Peer,
            LinkError::PeerClosed { .. }
            | LinkError::PeerCancelled { .. }
            | LinkError::TimedOut { .. }
            | LinkError::Transport(_) => Fault::World,
            LinkError::LocalShutdown | LinkError::OwnFrameTooLong { .. } => Fault::Ours,
        }
    }

    /// `idle` is the connection's idle timeout, to say how long nothing was heard.
    pub(crate) fn from_connection(error: &ConnectionError, idle: Duration) -> LinkError {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                LinkError::PeerClosed { code: Code::from_quic(close.error_code), reason: readable(&close.reason) }
            }
            // A restarted peer answers packets of its former life with a stateless reset.
            ConnectionError::Reset => {
                LinkError::PeerClosed { code: Code::SHUTTING_DOWN, reason: "the peer has restarted".into() }
            }
            ConnectionError::TimedOut => LinkError::TimedOut { waiting: Waiting::Peer, after: idle },
            ConnectionError::LocallyClosed => LinkError::LocalShutdown,
            ConnectionError::ConnectionClosed(_)
            | ConnectionError::TransportError(_)
            | ConnectionError::VersionMismatch
            | ConnectionError::CidsExhausted => LinkError::Transport(readable(error.to_string().as_bytes())),
        }
    }
}
