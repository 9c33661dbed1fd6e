//! Blobs by their hash: how a consumer gets a provider's tokenizer and template.
//!
//! One download is one stream. The consumer sends a [`Request`], the provider an [`Answer`], then the blob's bytes from
//! the wanted offset in frames of at most 32 KiB, then the end of the stream. Serving is free, so it is bounded: in
//! size, in rate, in downloads at one time and in bytes per connection ([`ServeLimits`]).
//!
//! | the download's state | what it awaits | a crash or broken link there means |
//! |---|---|---|
//! | asked | the answer | ask again |
//! | receiving | bytes up to the announced size | [`Download`] keeps what came; go on there, or at another provider |
//! | complete | nothing: the hash fits, the bytes are handed out | nothing |
//! | corrupt | nothing: all bytes are forgotten, whoever sent them | start anew at another provider |

mod fetch;
mod serve;

pub use fetch::{Download, DownloadError};
pub use serve::{ArtefactServer, Artefacts, Asked, ConnectionArtefacts, Grant, ServeLimits, Served};

use minicbor::{Decode, Encode};
use satgrid_types::Digest;

/// Largest artefact, in bytes.
pub const MAX_ARTEFACT_BYTES: u64 = 64 << 20;
/// Bytes of the blob in one frame.
const PIECE_BYTES: usize = 32 * 1024;
/// Longest request or answer, in bytes.
const MAX_HEAD_BYTES: usize = 64;

const _: () = assert!(PIECE_BYTES <= crate::limits::SMALL_FRAME_BYTES);

/// Which blob, and from which byte on.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Request {
    #[n(0)]
    pub sha256: Digest,
    #[n(1)]
    pub offset: u64,
}

/// What comes of a request.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Answer {
    /// The blob's whole size in bytes; its bytes from the offset on follow.
    #[n(0)]
    Sending(#[n(0)] u64),
    #[n(1)]
    Refused(#[n(0)] RefusedBecause),
}

/// Why nothing is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum RefusedBecause {
    /// No such blob here.
    #[n(0)]
    Unknown,
    /// Too many downloads at one time; try again in a while.
    #[n(1)]
    Busy,
    /// This connection has had its free bytes.
    #[n(2)]
    Spent,
    /// The offset lies behind the end.
    #[n(3)]
    Offset,
}

impl core::fmt::Display for RefusedBecause {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            RefusedBecause::Unknown => "no such artefact",
            RefusedBecause::Busy => "too many downloads at one time",
            RefusedBecause::Spent => "no free bytes left on this connection",
            RefusedBecause::Offset => "the offset lies behind the end",
        })
    }
}
