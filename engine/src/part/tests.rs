//! Cutting and reading back, on the tiny model; and every way in which a part may lie.

use std::io::Cursor;

use satgrid_types::LayerRange;

use super::*;
use crate::gguf::{Array, Gguf, GgufWriter, TensorType, Value};
use crate::root::ModelRoot;
use crate::tiny::TinyModel;
use crate::tiny_moe::TinyMoe;
use crate::tiny_shapes::{Family, TinyShape};

fn read(bytes: &[u8]) -> Gguf {
    Gguf::read(&mut Cursor::new(bytes)).unwrap()
}

fn root(bytes: &[u8]) -> ModelRoot {
    ModelRoot::compute(&read(bytes), &mut Cursor::new(bytes), &mut |_| ()).unwrap()
}

fn cut(bytes: &[u8], start: u32, end: u32) -> Result<Vec<u8>, CutError> {
    let (gguf, root) = (read(bytes), root(bytes));
    let cut = Cut::new(&gguf, &root, LayerRange::new(start, end).unwrap())?;
    let mut out = Vec::new();
    cut.write(&mut Cursor::new(bytes), &mut out, &mut |_| ())?;
    Ok(out)
}

fn verify(bytes: &[u8]) -> Result<PartFile, PartError> {
    let gguf = read(bytes);
    let part = PartFile::read(&gguf)?;
    part.verify(&gguf, &mut Cursor::new(bytes), &mut |_| ())?;
    Ok(part)
}

fn tiny() -> Vec<u8> {
    TinyModel { layers: 6, kind: TensorType::Q8_0, ..TinyModel::default() }.to_bytes().unwrap()
}

#[test]
fn every_part_proves_the_root_of_the_whole() {
    let whole = tiny();
    let expect = root(&whole).root;
    for (start, end) in [(0, 1), (0, 5), (2, 4), (1, 6), (5, 6), (0, 6)] {
        let bytes = cut(&whole, start, end).unwrap();
        let part = verify(&bytes).unwrap();
        assert_eq!((part.root, part.layers, part.is_tail()), (expect, 6, end == 6), "{start}..{end}");
        assert_eq!((part.range.start(), part.range.end()), (start, end));
        let gguf = read(&bytes);
        assert_eq!(gguf.arch_uint("block_count"), Some(u64::from(end - start)));
        assert_eq!(gguf.tensor("output.weight").is_some(), end == 6);
        assert_eq!(gguf.get("tokenizer.ggml.tokens").is_some(), end == 6);
        let layer = |at: u32| format!("blk.{at}.ffn_up.weight");
        assert!(gguf.tensor(&layer(end - start - 1)).is_some() && gguf.tensor(&layer(end - start)).is_none());
        if end == 6 {
            assert_eq!(
                crate::facts::ModelFacts::from_gguf(&part.whole),
                crate::facts::ModelFacts::from_gguf(&read(&whole))
            );
        }
    }
    assert!(cut(&whole, 0, 3).unwrap().len() < whole.len() / 2);
}

/// The same file with its metadata and tensors changed; data stays with its tensor.
fn rewritten(bytes: &[u8], change: impl Fn(&str, Value) -> Option<Value>, spoil: Option<&str>) -> Vec<u8> {
    let gguf = read(bytes);
    let mut writer = GgufWriter::new();
    for (key, value) in &gguf.metadata {
        if let Some(value) = change(key, value.clone()) {
            writer = writer.set(key.clone(), value);
        }
    }
    for tensor in &gguf.tensors {
        writer = writer.tensor(tensor.name.clone(), tensor.kind, &tensor.shape).unwrap();
    }
    let mut out = Vec::new();
    let data = |tensor: &crate::gguf::Tensor| {
        let at = gguf.position(gguf.tensor(&tensor.name).unwrap()) as usize;
        let mut data = bytes[at..at + tensor.bytes as usize].to_vec();
        if spoil == Some(tensor.name.as_str()) {
            data[7] ^= 1;
        }
        Ok(data)
    };
    writer.write(&mut out, data).unwrap();
    out
}

#[test]
fn a_part_that_lies_is_refused_or_is_of_another_root() {
    let (whole, keep) = (tiny(), |_: &str, value| Some(value));
    let honest = root(&whole).root;
    let part = cut(&whole, 2, 4).unwrap();
    assert_eq!(verify(&rewritten(&part, keep, None)).unwrap().root, honest);
    let spoilt = verify(&rewritten(&part, keep, Some("blk.1.attn_k.weight")));
    assert!(matches!(&spoilt, Err(PartError::Data { name }) if name == "blk.1.attn_k.weight"), "{spoilt:?}");

    let set = |key: &'static str, new: Value| {
        rewritten(&part, move |k, value| Some(if k == key { new.clone() } else { value }), None)
    };
    // Another rotary base is another model.
    assert_ne!(verify(&set("llama.rope.freq_base", Value::F32(5.0))).unwrap().root, honest);
    // Layers 2 and 3 sold as 3 and 4: the data is not theirs.
    let shifted = rewritten(
        &part,
        |key, value| {
            let up = key == KEY_START || key == KEY_END;
            Some(if up { Value::U32(value.as_uint().unwrap() as u32 + 1) } else { value })
        },
        None,
    );
    assert!(matches!(verify(&shifted), Err(PartError::Data { .. })));
    let refused: [(&str, Value); 5] = [
        ("llama.block_count", Value::U32(3)),
        (KEY_END, Value::U32(7)),
        (KEY_LAYERS, Value::U32(5)),
        (KEY_HASHES, Value::Array(Array::U8(vec![0; 33]))),
        (KEY_VERSION, Value::U32(9)),
    ];
    for (key, value) in refused {
        assert!(verify(&set(key, value)).is_err(), "{key}");
    }
    let without = |dropped: &'static str| rewritten(&part, move |key, v| (key != dropped).then_some(v), None);
    assert!(matches!(verify(&without(KEY_VERSION)), Err(PartError::NotAPart)));
    assert!(matches!(verify(&without("llama.rope.freq_base")).map(|part| part.root != honest), Ok(true) | Err(_)));
    assert!(matches!(verify(&whole), Err(PartError::NotAPart)));
}

fn header(architecture: &str, layers: u32, change: impl Fn(GgufWriter) -> GgufWriter) -> Gguf {
    let mut writer = GgufWriter::new()
        .set("general.architecture", Value::string(architecture))
        .set(format!("{architecture}.block_count"), Value::U32(layers))
        .tensor("token_embd.weight", TensorType::F32, &[8, 40])
        .unwrap();
    for layer in 0..layers {
        writer = writer.tensor(format!("blk.{layer}.attn_q.weight"), TensorType::F32, &[8]).unwrap();
    }
    let mut bytes = Vec::new();
    change(writer).write(&mut bytes, |tensor| Ok(vec![0; tensor.bytes as usize])).unwrap();
    read(&bytes)
}

#[test]
fn only_models_of_the_allow_list_are_cut() {
    let plain = |writer| writer;
    let rows = [
        (admit(&header("llama", 4, plain)), None),
        (admit(&header("gemma3", 26, plain)), None),
        (admit(&header("gemma3", 62, plain)), Some("scaled by the number of layers")),
        (admit(&header("gemma2", 26, plain)), Some("\"gemma2\"")),
        (admit(&header("baichuan", 40, plain)), Some("\"baichuan\"")),
        (admit(&header("llama", 1, plain)), Some("1 layers")),
        (admit(&header("qwen2", 4, |w| w.set("qwen2.expert_count", Value::U32(8)))), Some("8 experts")),
        (admit(&header("granitemoe", 4, |w| w.set("granitemoe.expert_count", Value::U32(8)))), Some("\"granitemoe\"")),
        (admit(&header("llama", 4, |w| w.set("llama.expert_count", Value::U32(8)))), None),
        (admit(&header("qwen3moe", 4, |w| w.set("qwen3moe.expert_count", Value::U32(8)))), None),
        // Embedding models of cut architectures: by mean, by the last text token, and one that ranks.
        (admit(&header("qwen3", 4, |w| w.set("qwen3.pooling_type", Value::U32(3)))), Some("embeds or ranks texts")),
        (admit(&header("llama", 4, |w| w.set("llama.pooling_type", Value::U32(1)))), Some("embeds or ranks texts")),
        (admit(&header("qwen3", 4, |w| w.set("qwen3.pooling_type", Value::U32(4)))), Some("embeds or ranks texts")),
        (
            admit(&header("gemma3", 4, |w| w.set("gemma3.attention.causal", Value::Bool(false)))),
            Some("embeds or ranks"),
        ),
        (admit(&header("qwen3", 4, |w| w.set("qwen3.pooling_type", Value::U32(0)))), None),
        (
            admit(&header("qwen3moe", 4, |w| w.set("qwen3moe.leading_dense_block_count", Value::U32(1)))),
            Some("leading_dense_block_count"),
        ),
        (
            admit(&header("gemma3", 4, |w| w.tensor("dense_2.weight", TensorType::F32, &[8]).unwrap())),
            Some("dense_2.weight"),
        ),
        (
            admit(&header("llama", 4, |w| w.tensor("blk.4.attn_q.weight", TensorType::F32, &[8]).unwrap())),
            Some("belongs to no layer"),
        ),
    ];
    for (given, expect) in rows {
        match (given, expect) {
            (Ok(_), None) => {}
            (Err(refused), Some(expect)) => assert!(refused.to_string().contains(expect), "{refused}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn per_layer_values_go_with_their_layers() {
    let array = |items: &[u32]| Value::Array(Array::U32(items.to_vec()));
    let gguf = header("gemma3", 8, |writer| {
        writer
            .set("gemma3.attention.head_count", array(&[1, 2, 3, 4, 5, 6, 7, 8]))
            .set("gemma3.attention.sliding_window", Value::U32(512))
            .set("gemma3.rope.dimension_sections", array(&[1, 1, 1, 1, 1, 1, 1, 1]))
    });
    let changed = cut::metadata(&gguf, LayerRange::new(4, 7).unwrap(), 8, None);
    let get = |key: &str| changed.metadata.iter().find(|(k, _)| k == key).map(|(_, value)| value.clone());
    assert_eq!(get("gemma3.attention.head_count"), Some(array(&[5, 6, 7])));
    assert_eq!(get("gemma3.rope.dimension_sections"), Some(array(&[1; 8])));
    // Every sixth layer sees everything: 5 of 0 to 7.
    let windows = Value::Array(Array::Bool(vec![true, false, true]));
    assert_eq!(get("gemma3.attention.sliding_window_pattern"), Some(windows));
    assert_eq!(get("gemma3.vocab_size"), Some(Value::U32(NO_VOCAB)));
    assert_eq!(changed.added.len(), 3);
    // The one layer without a window is of a model without windows, for llama.cpp.
    let changed = cut::metadata(&gguf, LayerRange::new(5, 6).unwrap(), 8, None);
    assert!(changed.metadata.iter().all(|(key, _)| !key.contains("sliding_window")));
    assert!(changed.replaced.contains(&("gemma3.attention.sliding_window".to_owned(), Value::U32(512))));
    assert_eq!(changed.added.len(), 2);
}

/// Every cut of a model with windows, also of those layers that have none.
#[test]
fn parts_of_a_windowed_model_prove_its_root() {
    let shape = TinyShape { family: Family::Gemma3, seed: 5, kind: TensorType::F32, layers: 8, context: 256 };
    let whole = shape.to_bytes().unwrap();
    let expect = root(&whole).root;
    for (start, end) in [(0, 5), (5, 6), (4, 6), (6, 8), (0, 8)] {
        assert_eq!(verify(&cut(&whole, start, end).unwrap()).unwrap().root, expect, "{start}..{end}");
    }
}

fn trunk(bytes: &[u8], start: u32, end: u32) -> Result<Vec<u8>, CutError> {
    let (gguf, root) = (read(bytes), root(bytes));
    let cut = Cut::trunk(&gguf, &root, LayerRange::new(start, end).unwrap())?;
    let mut out = Vec::new();
    cut.write(&mut Cursor::new(bytes), &mut out, &mut |_| ())?;
    Ok(out)
}

#[test]
fn a_stage_without_its_experts_proves_the_root_of_the_whole() {
    for architecture in ["qwen3moe", "qwen2moe", "olmoe", "llama"] {
        let whole = TinyMoe { architecture, layers: 5, ..TinyMoe::default() }.to_bytes().unwrap();
        let (expect, with) = (root(&whole), cut(&whole, 1, 4).unwrap());
        let bytes = trunk(&whole, 1, 4).unwrap();
        let part = verify(&bytes).unwrap();
        assert_eq!((part.root, part.range.layers()), (expect.root, 3), "{architecture}");
        let manifest = part.experts.unwrap();
        assert_eq!(manifest, crate::experts::Manifest::of_model(&read(&whole), &expect).unwrap());
        assert_eq!(verify(&with).unwrap().experts, None);
        let held = |bytes: &[u8], name: &str| read(bytes).tensor(name).map(|tensor| tensor.bytes);
        for name in ["blk.0.ffn_up_exps.weight", "blk.2.ffn_down_exps.weight"] {
            assert!(held(&bytes, name) < held(&with, name), "{name}");
        }
        for name in ["blk.0.attn_q.weight", "blk.1.ffn_gate_inp.weight"] {
            assert_eq!(held(&bytes, name), held(&with, name), "{name}");
        }
    }
}

#[test]
fn stages_without_experts_lie_no_better_than_others() {
    let whole = TinyMoe { layers: 4, ..TinyMoe::default() }.to_bytes().unwrap();
    let other = TinyMoe { layers: 4, seed: 2, ..TinyMoe::default() }.to_bytes().unwrap();
    let bytes = trunk(&whole, 1, 3).unwrap();
    let gguf = read(&bytes);
    // The manifest of another model; and none: then it says that it holds its experts.
    let foreign = read(&trunk(&other, 1, 3).unwrap());
    let key = crate::experts::manifest::MANIFEST_KEY;
    let mut lie = gguf.clone();
    lie.metadata.iter_mut().filter(|(name, _)| name == key).for_each(|(_, value)| {
        *value = foreign.get(key).unwrap().clone();
    });
    assert!(matches!(PartFile::read(&lie), Err(PartError::OtherExperts)));
    let mut lie = gguf.clone();
    lie.metadata.retain(|(name, _)| name != key);
    assert!(matches!(PartFile::read(&lie), Err(PartError::Metadata { .. })));
    // A changed weight of the trunk's own.
    let router = gguf.tensor("blk.0.ffn_gate_inp.weight").unwrap();
    let mut spoilt = bytes.clone();
    spoilt[usize::try_from(gguf.position(router)).unwrap()] ^= 1;
    assert!(matches!(verify(&spoilt), Err(PartError::Data { name }) if name == "blk.0.ffn_gate_inp.weight"));
    assert!(matches!(trunk(&whole, 2, 4), Err(CutError::TailWithoutExperts)));
    assert!(matches!(trunk(&tiny(), 1, 3), Err(CutError::Experts(_))));
}
