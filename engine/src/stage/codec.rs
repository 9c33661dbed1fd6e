//! Hidden rows as bytes on the wire.
//!
//! | type   | bytes a row of n     | loss, for finite numbers                                                             |
//! |--------|----------------------|--------------------------------------------------------------------------------------|
//! | `f32`  | 4 n                  | none: the only type under which a split model computes the very bits of a whole one   |
//! | `bf16` | 2 n                  | relative error at most 2^-8 (round to nearest, ties to even)                         |
//! | `q8_0` | 34 n / 32            | absolute error at most 1/200 of the largest magnitude among the 32 numbers of a block |
//!
//! There is no f16: activations of some models (Gemma) are beyond its largest number.
//!
//! Not a number and infinity never pass, in either direction: [`CodecError::NotFinite`].

use minicbor::{Decode, Encode};
use satgrid_types::WireType;

const BLOCK: usize = WireType::BLOCK;
const BLOCK_BYTES: usize = WireType::BLOCK_BYTES;
/// Largest magnitude that q8_0 carries: 127 times the largest f16.
const Q8_LARGEST: f32 = 127.0 * 65_504.0;

/// Why rows were not encoded or decoded. On decoding, the fault is the sender's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum CodecError {
    #[error("{bytes} bytes are not {rows} rows of {width} as {wire}")]
    #[n(0)]
    WrongShape {
        #[n(0)]
        bytes: u64,
        #[n(1)]
        rows: u32,
        #[n(2)]
        width: u32,
        #[n(3)]
        wire: String,
    },
    /// q8_0 takes 32 numbers at a time.
    #[error("rows of {width} do not travel as {wire}: the width is no multiple of {BLOCK}")]
    #[n(1)]
    Width {
        #[n(0)]
        width: u32,
        #[n(1)]
        wire: String,
    },
    #[error("row {row} holds a number that is not finite, or too large for its type")]
    #[n(2)]
    NotFinite {
        #[n(0)]
        row: u32,
    },
}

/// Rows of hidden states as they travel. The width is the model's and travels with none of them.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HiddenRows {
    #[n(0)]
    pub wire: WireType,
    #[n(1)]
    pub count: u32,
    #[cbor(n(2), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
}

impl HiddenRows {
    /// No rows at all: what comes back from a replay.
    pub fn none(wire: WireType) -> Self {
        Self { wire, count: 0, bytes: Vec::new() }
    }

    /// Encodes whole rows of `width` numbers each.
    pub fn encode(rows: &[f32], width: u32, wire: WireType) -> Result<Self, CodecError> {
        let row_bytes = wire.row_bytes(width).filter(|bytes| *bytes > 0);
        let row_bytes = row_bytes.ok_or_else(|| CodecError::Width { width, wire: wire.name().to_owned() })?;
        let count = rows.len() / width as usize;
        let mut bytes = Vec::with_capacity(count * row_bytes);
        for (row, numbers) in (0..).zip(rows.chunks_exact(width as usize)) {
            encode_row(numbers, wire, &mut bytes).ok_or(CodecError::NotFinite { row })?;
        }
        Ok(Self { wire, count: u32::try_from(count).unwrap_or(u32::MAX), bytes })
    }

    /// The numbers, row after row. Refuses bytes that are not exactly `count` rows, and numbers that are not finite.
    pub fn decode(&self, width: u32) -> Result<Vec<f32>, CodecError> {
        self.check(width)?;
        let Some(row_bytes) = self.wire.row_bytes(width).filter(|bytes| *bytes > 0) else {
            return Err(CodecError::Width { width, wire: self.wire.name().to_owned() });
        };
        let mut numbers = Vec::with_capacity(self.count as usize * width as usize);
        for (row, bytes) in (0..).zip(self.bytes.chunks_exact(row_bytes)) {
            decode_row(bytes, self.wire, &mut numbers);
            let from = numbers.len() - width as usize;
            if numbers[from..].iter().any(|number| !number.is_finite()) {
                return Err(CodecError::NotFinite { row });
            }
        }
        Ok(numbers)
    }

    /// The length alone, for who only passes the rows on.
    pub fn check(&self, width: u32) -> Result<(), CodecError> {
        let row_bytes = self.wire.row_bytes(width);
        let row_bytes = row_bytes.ok_or_else(|| CodecError::Width { width, wire: self.wire.name().to_owned() })?;
        if (self.count as usize).checked_mul(row_bytes) == Some(self.bytes.len()) {
            return Ok(());
        }
        let (bytes, wire) = (self.bytes.len() as u64, self.wire.name().to_owned());
        Err(CodecError::WrongShape { bytes, rows: self.count, width, wire })
    }

    /// Rows `from..upto` as a value of their own; empty beyond the end. Only after [`HiddenRows::check`].
    pub fn slice(&self, from: u32, upto: u32) -> Self {
        let row = self.bytes.len().checked_div(self.count as usize).unwrap_or(0);
        let (from, upto) = (from.min(self.count), upto.min(self.count));
        let bytes = self.bytes.get(from as usize * row..upto as usize * row).unwrap_or_default().to_vec();
        Self { wire: self.wire, count: upto.saturating_sub(from), bytes }
    }

    /// Appends rows of the same type.
    pub fn extend(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        self.bytes.extend_from_slice(&other.bytes);
    }
}

/// `None` for a number that does not travel.
fn encode_row(numbers: &[f32], wire: WireType, bytes: &mut Vec<u8>) -> Option<()> {
    if numbers.iter().any(|number| !number.is_finite()) {
        return None;
    }
    match wire {
        WireType::F32 => numbers.iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes())),
        WireType::Bf16 => {
            for number in numbers {
                let rounded = bf16_bits(*number);
                // Only a number next to the largest f32 rounds to infinity.
                if !from_bf16(rounded).is_finite() {
                    return None;
                }
                bytes.extend_from_slice(&rounded.to_le_bytes());
            }
        }
        WireType::Q8_0 => {
            for block in numbers.chunks_exact(BLOCK) {
                let largest = block.iter().fold(0_f32, |largest, number| largest.max(number.abs()));
                if largest > Q8_LARGEST {
                    return None;
                }
                // Rounded up, so that no number is beyond 127 scales.
                let bits = f16_bits_up(largest / 127.0);
                let scale = from_f16(bits);
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                bytes.extend_from_slice(&bits.to_le_bytes());
                bytes.extend(block.iter().map(|number| (number * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
            }
        }
    }
    Some(())
}

fn decode_row(bytes: &[u8], wire: WireType, numbers: &mut Vec<f32>) {
    match wire {
        WireType::F32 => numbers.extend(bytes.as_chunks::<4>().0.iter().map(|chunk| f32::from_le_bytes(*chunk))),
        WireType::Bf16 => {
            numbers.extend(bytes.as_chunks::<2>().0.iter().map(|chunk| from_bf16(u16::from_le_bytes(*chunk))));
        }
        WireType::Q8_0 => {
            for block in bytes.as_chunks::<BLOCK_BYTES>().0 {
                let scale = from_f16(u16::from_le_bytes([block[0], block[1]]));
                numbers.extend(block[2..].iter().map(|byte| f32::from(*byte as i8) * scale));
            }
        }
    }
}

/// To nearest, ties to even.
fn bf16_bits(number: f32) -> u16 {
    let bits = number.to_bits();
    let half = 0x7FFF + ((bits >> 16) & 1);
    (bits.wrapping_add(half) >> 16) as u16
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The smallest f16 that is at least `number`, which is finite and not negative; the largest f16 beyond that.
fn f16_bits_up(number: f32) -> u16 {
    if number <= 0.0 {
        return 0;
    }
    if number >= 65_504.0 {
        return 0x7BFF;
    }
    if number < 6.103_515_6e-5 {
        // Below the normal numbers the step is 2^-24. Exact: a multiplication by a power of two, then a whole number.
        return (number * 16_777_216.0).ceil() as u16;
    }
    let bits = number.to_bits() - (112 << 23);
    ((bits + 0x1FFF) >> 13) as u16
}

/// Any f16, infinity and NaN too, so that a sender's are seen.
fn from_f16(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (u32::from(bits >> 10) & 0x1F, u32::from(bits) & 0x3FF);
    let magnitude = match exponent {
        0 => mantissa as f32 / 16_777_216.0,
        31 if mantissa == 0 => f32::INFINITY,
        31 => f32::NAN,
        _ => f32::from_bits(((exponent + 112) << 23) | (mantissa << 13)),
    };
    sign * magnitude
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDTH: u32 = 64;

    proptest! {
        #[test]
        fn f32_is_exact_and_the_others_keep_their_bounds(
            row in prop::collection::vec(prop_oneof![-7e4_f32..7e4, -1e-3_f32..1e-3, Just(0.0), Just(66_023.0)], 128),
        ) {
            for wire in WireType::ALL {
                let rows = HiddenRows::encode(&row, WIDTH, wire).unwrap();
                prop_assert_eq!(rows.count, 2);
                prop_assert_eq!(rows.bytes.len(), 2 * wire.row_bytes(WIDTH).unwrap());
                let back = rows.decode(WIDTH).unwrap();
                for (block, decoded) in row.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                    let largest = block.iter().fold(0_f32, |largest, number| largest.max(number.abs()));
                    for (number, decoded) in block.iter().zip(decoded) {
                        let error = (number - decoded).abs();
                        let bound = match wire {
                            WireType::F32 => 0.0,
                            WireType::Bf16 => number.abs() / 256.0,
                            // Where the scale is no normal f16, its own step counts too.
                            WireType::Q8_0 => largest / 200.0 + 127.0 / 16_777_216.0,
                        };
                        prop_assert!(error <= bound, "{:?}: {} became {}", wire, number, decoded);
                    }
                }
                if wire == WireType::F32 {
                    prop_assert!(row.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), count in 0_u32..8) {
            for wire in WireType::ALL {
                let rows = HiddenRows { wire, count, bytes: bytes.clone() };
                if let Ok(numbers) = rows.decode(WIDTH) {
                    prop_assert!(numbers.len() == count as usize * WIDTH as usize);
                    prop_assert!(numbers.iter().all(|number| number.is_finite()));
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_does_not_pass() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = vec![1.0; 96];
            row[70] = bad;
            for wire in WireType::ALL {
                assert_eq!(HiddenRows::encode(&row, 32, wire), Err(CodecError::NotFinite { row: 2 }));
            }
            let bytes = row.iter().flat_map(|number| number.to_le_bytes()).collect();
            let rows = HiddenRows { wire: WireType::F32, count: 3, bytes };
            assert_eq!(rows.decode(32), Err(CodecError::NotFinite { row: 2 }));
        }
        let scale = HiddenRows { wire: WireType::Q8_0, count: 1, bytes: [[0xFF, 0x7F].as_slice(), &[1; 32]].concat() };
        assert_eq!(scale.decode(32), Err(CodecError::NotFinite { row: 0 }));
    }

    #[test]
    fn wrong_shapes_are_told() {
        let rows = HiddenRows { wire: WireType::F32, count: 2, bytes: vec![0; 255] };
        assert!(matches!(rows.decode(32), Err(CodecError::WrongShape { bytes: 255, rows: 2, width: 32, .. })));
        assert!(matches!(HiddenRows::encode(&[0.0; 40], 40, WireType::Q8_0), Err(CodecError::Width { .. })));
        assert_eq!(HiddenRows::none(WireType::F32).decode(32), Ok(Vec::new()));
    }

    #[test]
    fn a_slice_is_what_was_there() {
        let numbers: Vec<f32> = (0..96).map(|n| n as f32).collect();
        let rows = HiddenRows::encode(&numbers, 32, WireType::F32).unwrap();
        assert_eq!(rows.slice(1, 2).decode(32).unwrap(), numbers[32..64]);
        let mut joined = rows.slice(0, 1);
        joined.extend(&rows.slice(1, 9));
        assert_eq!(joined, rows);
    }
}
