//! The one encoding: deterministic CBOR (RFC 8949, section 4.2.1) with integer map keys, no floats, no tags.
//!
//! Types derive `minicbor::Encode` and `Decode` with `#[cbor(map)]`; fields are written in ascending order of their
//! numbers, absent options are left out, lengths are definite and integers are as short as they can be. [`decode`]
//! accepts bytes only if encoding the decoded value gives the same bytes again, so unknown fields, long forms,
//! indefinite lengths, wrong order and trailing bytes are all refused by one rule.

use minicbor::{Decode, Encode};
use thiserror::Error;

/// Why bytes were not accepted as a value. Always the sender's fault.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CodecError {
    #[error("not valid CBOR for this type: {0}")]
    Malformed(String),
    #[error("not canonical: the same value encodes to {canonical} bytes that differ from the {given} given")]
    NotCanonical { given: usize, canonical: usize },
    #[error("{given} bytes, the limit is {limit}")]
    TooLong { given: usize, limit: usize },
}

/// Canonical bytes of a value.
pub fn encode<T: Encode<()>>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(1_024);
    match minicbor::encode(value, &mut out) {
        Ok(()) => out,
        // Writing to a Vec is infallible and our types have no failing encoders.
        Err(never) => unreachable!("encoding to memory failed: {never}"),
    }
}

/// Reads one value and refuses every encoding of it but the canonical one.
pub fn decode<'b, T: Decode<'b, ()> + Encode<()>>(bytes: &'b [u8]) -> Result<T, CodecError> {
    let mut decoder = minicbor::Decoder::new(bytes);
    let value: T = decoder.decode().map_err(|e| CodecError::Malformed(e.to_string()))?;
    let canonical = encode(&value);
    if canonical != bytes {
        return Err(CodecError::NotCanonical { given: bytes.len(), canonical: canonical.len() });
    }
    Ok(value)
}

/// As [`decode`], for input from a peer: the length is checked first.
pub fn decode_limited<'b, T: Decode<'b, ()> + Encode<()>>(bytes: &'b [u8], limit: usize) -> Result<T, CodecError> {
    if bytes.len() > limit {
        return Err(CodecError::TooLong { given: bytes.len(), limit });
    }
    decode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Encode, Decode)]
    #[cbor(map)]
    struct Sample {
        #[n(0)]
        a: u64,
        #[n(1)]
        b: Option<u32>,
    }

    #[track_caller]
    fn check(hex_bytes: &str, expect: Result<Sample, &str>) {
        let bytes = hex::decode(hex_bytes).unwrap();
        match (decode::<Sample>(&bytes), expect) {
            (Ok(got), Ok(want)) => assert_eq!(got, want),
            (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{got}"),
            (got, want) => panic!("{hex_bytes}: got {got:?}, want {want:?}"),
        }
    }

    #[test]
    fn one_encoding_for_one_value() {
        check("a10005", Ok(Sample { a: 5, b: None }));
        check("a200050107", Ok(Sample { a: 5, b: Some(7) }));
        check("a1001805", Err("not canonical")); // 5 in two bytes
        check("bf0005ff", Err("not canonical")); // indefinite length
        check("a201070005", Err("not canonical")); // order
        check("a200050907", Err("not canonical")); // unknown field
        check("a20005", Err("not valid")); // truncated
        check("a1000500", Err("not canonical")); // trailing byte
        check("a100f94500", Err("not valid")); // a float
        check("a2000501f6", Err("not canonical")); // null instead of absence
        check("a10005a10005", Err("not canonical")); // two values
    }
}
