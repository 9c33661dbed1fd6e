//! Reason codes: the number that QUIC carries when a connection is closed or a stream is cancelled.

use core::fmt;
use quinn::VarInt;

/// Why a connection was closed or a stream cancelled.
///
/// Codes below 256 belong to this room; a peer may send any number, and an unknown one means no more than "other".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(u64);

impl Code {
    /// Nothing is left to say.
    pub const DONE: Code = Code(0);
    /// The node is going down; the session may be resumed later.
    pub const SHUTTING_DOWN: Code = Code(1);
    /// A limit on connections, streams or downloads is reached; try later or elsewhere.
    pub const BUSY: Code = Code(2);
    /// The peer went over a limit that the protocol states.
    pub const LIMIT: Code = Code(3);
    /// A frame was not the canonical encoding of anything expected here.
    pub const NOT_CANONICAL: Code = Code(4);
    /// A frame or stream came where the protocol does not allow it.
    pub const PROTOCOL: Code = Code(5);
    /// Our own fault.
    pub const INTERNAL: Code = Code(6);
    /// The user or the other end of the work no longer wants it.
    pub const CANCELLED: Code = Code(7);
    /// Bytes that were announced did not come in time.
    pub const STALLED: Code = Code(8);
    /// A stream of a kind that this version does not know.
    pub const UNKNOWN_KIND: Code = Code(9);

    /// A code of the layer above; by agreement not below 256.
    pub const fn new(code: u32) -> Code {
        Code(code as u64)
    }
    pub const fn value(self) -> u64 {
        self.0
    }
    fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "done",
            1 => "shutting down",
            2 => "busy",
            3 => "limit exceeded",
            4 => "not canonical",
            5 => "protocol violated",
            6 => "internal error",
            7 => "cancelled",
            8 => "stalled",
            9 => "unknown stream kind",
            _ => return None,
        })
    }
    pub(crate) fn to_quic(self) -> VarInt {
        // Only a peer's code can exceed 32 bits, and those are QUIC's own integers.
        VarInt::from_u64(self.0).unwrap_or(VarInt::MAX)
    }
    pub(crate) fn from_quic(code: VarInt) -> Code {
        Code(code.into_inner())
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "code {}", self.0),
        }
    }
}
impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Code({}: {self})", self.0)
    }
}

/// Characters of a peer's reason text that are kept.
pub(crate) const MAX_REASON_CHARS: usize = 256;

/// A peer's text made fit for logs and terminals: UTF-8, no control characters, a bounded length.
pub(crate) fn readable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_REASON_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_cannot_write_to_a_terminal() {
        assert_eq!(readable(b"too\x1b[2Jlong\n"), "too [2Jlong ");
        assert_eq!(readable(&[0xff; 2]), "\u{fffd}\u{fffd}");
        assert_eq!(readable(&[b'x'; 5000]).len(), MAX_REASON_CHARS);
    }

    #[test]
    fn codes_have_names_and_strangers_have_numbers() {
        assert_eq!(Code::LIMIT.to_string(), "limit exceeded");
        assert_eq!(Code::new(300).to_string(), "code 300");
        assert_eq!(Code::from_quic(VarInt::MAX).to_quic(), VarInt::MAX);
    }
}
