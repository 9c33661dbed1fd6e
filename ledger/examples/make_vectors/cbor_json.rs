//! Canonical CBOR shown as JSON, for people and for other implementations.
//!
//! Maps become objects with decimal keys, byte strings `"h'<hex>'"`, integers numbers (above 2^53 - 1 decimal strings).

use minicbor::{Decoder, data::Type};
use serde_json::{Map, Value, json};

pub(crate) fn to_json(bytes: &[u8]) -> Value {
    let mut decoder = Decoder::new(bytes);
    let value = item(&mut decoder);
    assert_eq!(decoder.position(), bytes.len(), "one item");
    value
}

fn item(d: &mut Decoder<'_>) -> Value {
    match d.datatype().unwrap() {
        Type::U8 | Type::U16 | Type::U32 | Type::U64 => number(i128::from(d.u64().unwrap())),
        Type::I8 | Type::I16 | Type::I32 | Type::I64 => number(i128::from(d.i64().unwrap())),
        Type::Bytes => json!(format!("h'{}'", hex::encode(d.bytes().unwrap()))),
        Type::String => json!(d.str().unwrap()),
        Type::Bool => json!(d.bool().unwrap()),
        Type::Null => {
            d.null().unwrap();
            Value::Null
        }
        Type::Array => {
            let len = d.array().unwrap().unwrap();
            Value::Array((0..len).map(|_| item(d)).collect())
        }
        Type::Map => {
            let len = d.map().unwrap().unwrap();
            let pairs = (0..len).map(|_| {
                let key = d.u64().unwrap().to_string();
                (key, item(d))
            });
            Value::Object(pairs.collect::<Map<_, _>>())
        }
        other => panic!("{other} is not in the format"),
    }
}

fn number(n: i128) -> Value {
    const EXACT: i128 = (1 << 53) - 1;
    if (-EXACT..=EXACT).contains(&n) { json!(n as i64) } else { json!(n.to_string()) }
}
