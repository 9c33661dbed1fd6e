use std::io::Cursor;

use proptest::prelude::*;

use super::*;

fn sample() -> Vec<u8> {
    let writer = GgufWriter::new()
        .set("general.architecture", Value::string("llama"))
        .set("llama.block_count", Value::U32(2))
        .set("tokenizer.ggml.tokens", Value::Array(Array::Str(vec![b"a".to_vec(), vec![0xFF]])))
        .set("flags", Value::Array(Array::Bool(vec![true, false])))
        .tensor("one", TensorType::F32, &[3, 2])
        .unwrap()
        .tensor("two", TensorType::Q8_0, &[64])
        .unwrap();
    let mut out = Vec::new();
    writer.write(&mut out, |tensor| Ok(vec![7; tensor.bytes as usize])).unwrap();
    out
}

fn read(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(&mut Cursor::new(bytes))
}

#[test]
fn what_was_written_is_read() {
    let bytes = sample();
    let gguf = read(&bytes).unwrap();
    assert_eq!(gguf.architecture(), Some("llama"));
    assert_eq!(gguf.arch_uint("block_count"), Some(2));
    let shapes: Vec<_> = gguf.tensors.iter().map(|t| (t.name.as_str(), t.bytes, t.offset)).collect();
    assert_eq!(shapes, [("one", 24, 0), ("two", 68, 32)]);
    assert_eq!(gguf.data_offset % 32, 0);
    let mut told = 0;
    let hash = hash_tensor(&mut Cursor::new(&bytes), &gguf, &gguf.tensors[1], &mut |n| told += n).unwrap();
    assert_eq!(told, 68);
    assert_eq!(hash, <[u8; 32]>::from(<sha2::Sha256 as sha2::Digest>::digest([7; 68])));
}

#[track_caller]
fn check(change: impl Fn(&mut Vec<u8>), expect: &str) {
    let mut bytes = sample();
    change(&mut bytes);
    let error = read(&bytes).unwrap_err().to_string();
    assert!(error.contains(expect), "{error:?} should say {expect:?}");
}

#[test]
fn errors_say_what_is_wrong() {
    let put = |at: usize, new: &'static [u8]| move |bytes: &mut Vec<u8>| bytes[at..at + new.len()].copy_from_slice(new);
    check(put(0, b"GGML"), "not a GGUF file");
    check(|bytes| bytes.clear(), "inside the magic number");
    check(put(4, &[1, 0, 0, 0]), "version 1 is not supported");
    check(put(4, &[0, 0, 0, 3]), "big-endian");
    check(put(8, &[0xFF; 8]), "tensors: 18446744073709551615 is over the limit");
    check(put(16, &[0, 0, 1, 0]), "metadata entries: 65536 is over the limit");
    check(put(24, &[0xFF; 8]), "a metadata key: 18446744073709551615 is over the limit");
    check(put(52, &[99]), "unknown type 99");
    check(put(56, &[0, 0, 16]), "the file ends at byte");
    check(|bytes| bytes.truncate(bytes.len() - 40), "it is truncated");
    check(|bytes| bytes.truncate(100), "the file ends at byte 100");
}

#[test]
fn tensors_must_tile_the_data() {
    let base = || GgufWriter::new().tensor("a", TensorType::F32, &[8]).unwrap();
    let mut header = base().header().unwrap();
    let at = 24 + 8 + 1 + 4 + 8 + 4;
    header[at] = 64;
    header.resize(4096, 0);
    assert!(matches!(read(&header), Err(GgufError::BadOffset { offset: 64, expected: 0, .. })));
    assert!(base().tensor("b", TensorType::Q8_0, &[33]).is_err());
    assert!(base().tensor("b", TensorType::F32, &[0]).is_err());
    assert!(base().tensor("b", TensorType::F32, &[u64::MAX, 2]).is_err());
    assert!(base().tensor("a", TensorType::F32, &[1]).unwrap().header().is_err());
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i64>().prop_map(Value::I64),
        any::<bool>().prop_map(Value::Bool),
        (-1e30f32..1e30).prop_map(Value::F32),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(Value::Str),
        prop::collection::vec(any::<u64>(), 0..9).prop_map(|v| Value::Array(Array::U64(v))),
        prop::collection::vec(any::<i8>(), 0..9).prop_map(|v| Value::Array(Array::I8(v))),
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..9).prop_map(|v| Value::Array(Array::Str(v))),
    ]
}

proptest! {
    #[test]
    fn round_trip(
        metadata in prop::collection::btree_map("[a-z.]{1,12}", value(), 0..8),
        shapes in prop::collection::vec(prop::collection::vec(1u64..5, 1..4), 0..5),
    ) {
        let mut writer = GgufWriter::new();
        for (key, value) in &metadata {
            writer = writer.set(key, value.clone());
        }
        for (n, shape) in shapes.iter().enumerate() {
            writer = writer.tensor(format!("T{n}"), TensorType::F16, shape).unwrap();
        }
        let mut bytes = Vec::new();
        writer.write(&mut bytes, |tensor| Ok(vec![0; tensor.bytes as usize])).unwrap();
        let gguf = read(&bytes).unwrap();
        prop_assert_eq!(gguf.metadata.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(), metadata);
        prop_assert_eq!(&gguf.tensors, writer.tensors());
        prop_assert_eq!(gguf.data_offset as usize, writer.header().unwrap().len());
    }

    #[test]
    fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&bytes);
        let mut with_magic = b"GGUF\x03\0\0\0".to_vec();
        with_magic.extend(bytes);
        let _ = read(&with_magic);
    }

    #[test]
    fn damaged_files_never_panic(at in 0usize..400, byte in any::<u8>(), cut in 0usize..500) {
        let mut bytes = sample();
        let len = bytes.len();
        bytes[at % len] = byte;
        let _ = read(&bytes);
        bytes.truncate(cut);
        let _ = read(&bytes);
    }
}
