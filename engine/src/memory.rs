//! How much memory a model takes before it is loaded, on a device and beside it, and how many layers fit.
//!
//! The figures come from the file's own table and the context's shape; nothing is measured here. Weights and the KV cache
//! are exact; the compute buffers are the sum of the largest tensors of one layer's graph, which is what llama.cpp's
//! allocator ends up with to within a few per cent for dense models.
//!
//! llama.cpp offloads from the end: the output head first, then the last layers. The token embedding stays in the host's
//! memory; where the head is tied to it, the device gets a copy.

use crate::gguf::{Gguf, Tensor};

/// What the engine keeps beside weights: CUDA's own context, kernels and the allocator's granularity.
pub const DEVICE_OVERHEAD: u64 = 512 << 20;
/// Bytes of one number in the KV cache (f16).
const KV_BYTES: u64 = 2;
/// Bytes of one number in a compute buffer (f32).
const COMPUTE_BYTES: u64 = 4;
/// Positions are taken in whole blocks of this many.
const CONTEXT_BLOCK: u64 = 256;

/// The shape of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextShape {
    pub slots: u32,
    /// Positions of each slot.
    pub context: u32,
    /// Most rows in one batch.
    pub batch: u32,
    /// Most rows of a batch whose logits are wanted.
    pub outputs: u32,
    /// Flash attention keeps no matrix of scores.
    pub flash: bool,
}

/// What a model needs, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// Weights of each layer.
    pub layers: Vec<u64>,
    /// The token embedding and whatever else belongs to no layer; always in the host's memory.
    pub embedding: u64,
    /// Output norm and head.
    pub head: u64,
    /// KV cache of one layer.
    pub kv_layer: u64,
    /// Buffers of one batch.
    pub compute: u64,
}

/// Where a model's layers go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// All layers.
    Whole { bytes: u64 },
    /// The last `layers`; the rest is computed by the processor.
    Part { layers: u32, bytes: u64 },
    /// Not one layer.
    Nothing,
}

impl Needs {
    /// Reads the table of a model's file.
    pub fn of(gguf: &Gguf, shape: &ContextShape) -> Needs {
        let count = gguf.arch_uint("block_count").unwrap_or(0).min(4096);
        let mut layers = vec![0_u64; usize::try_from(count).unwrap_or(0)];
        let (mut embedding, mut head, mut tied) = (0_u64, 0_u64, 0_u64);
        for tensor in &gguf.tensors {
            match layer_of(tensor).and_then(|index| layers.get_mut(index)) {
                Some(layer) => *layer = layer.saturating_add(tensor.bytes),
                None if tensor.name.starts_with("output") => head = head.saturating_add(tensor.bytes),
                None => {
                    embedding = embedding.saturating_add(tensor.bytes);
                    if tensor.name == "token_embd.weight" {
                        tied = tensor.bytes;
                    }
                }
            }
        }
        if gguf.tensor("output.weight").is_none() {
            head = head.saturating_add(tied);
        }
        let width = gguf.arch_uint("embedding_length").unwrap_or(0);
        let heads = largest(gguf, "attention.head_count").unwrap_or(1).max(1);
        let heads_kv = largest(gguf, "attention.head_count_kv").unwrap_or(heads);
        let key = gguf.arch_uint("attention.key_length").unwrap_or(width / heads);
        let value = gguf.arch_uint("attention.value_length").unwrap_or(width / heads);
        let inner = largest(gguf, "feed_forward_length").unwrap_or(width.saturating_mul(4));
        let vocab = gguf
            .tensor("output.weight")
            .or_else(|| gguf.tensor("token_embd.weight"))
            .and_then(|tensor| tensor.shape.get(1).copied())
            .unwrap_or(0);
        let positions = u64::from(shape.context).div_ceil(CONTEXT_BLOCK).saturating_mul(CONTEXT_BLOCK);
        let cells = positions.saturating_mul(u64::from(shape.slots));
        let rows = u64::from(shape.batch);
        let scores = if shape.flash { 0 } else { heads.saturating_mul(positions).saturating_mul(2) };
        let row = width.saturating_mul(3).saturating_add(inner.saturating_mul(2)).saturating_add(scores);
        Needs {
            layers,
            embedding,
            head,
            kv_layer: heads_kv.saturating_mul(key.saturating_add(value)).saturating_mul(KV_BYTES).saturating_mul(cells),
            compute: COMPUTE_BYTES.saturating_mul(
                rows.saturating_mul(row).saturating_add(u64::from(shape.outputs).saturating_mul(vocab)),
            ),
        }
    }

    /// Everything, wherever it is.
    pub fn total(&self) -> u64 {
        self.layers.iter().fold(self.embedding.saturating_add(self.on_device(0)), |sum, bytes| {
            sum.saturating_add(*bytes).saturating_add(self.kv_layer)
        })
    }

    /// On a device that holds the last `layers` and the head.
    pub fn on_device(&self, layers: u32) -> u64 {
        let layers = usize::try_from(layers).unwrap_or(usize::MAX).min(self.layers.len());
        let weights = self.layers.iter().rev().take(layers).fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
        let cache = self.kv_layer.saturating_mul(layers as u64);
        weights.saturating_add(cache).saturating_add(self.head).saturating_add(self.compute)
    }

    /// The most layers that a device with so much free memory can take, its own overhead left aside.
    pub fn fit(&self, free: u64) -> Fit {
        let free = free.saturating_sub(DEVICE_OVERHEAD);
        let all = u32::try_from(self.layers.len()).unwrap_or(u32::MAX);
        let whole = self.on_device(all);
        if whole <= free {
            return Fit::Whole { bytes: whole };
        }
        let most = (1..all).rev().find(|layers| self.on_device(*layers) <= free);
        most.map_or(Fit::Nothing, |layers| Fit::Part { layers, bytes: self.on_device(layers) })
    }
}

fn layer_of(tensor: &Tensor) -> Option<usize> {
    tensor.name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// A key that may be one number or one per layer.
fn largest(gguf: &Gguf, key: &str) -> Option<u64> {
    let value = gguf.get(&format!("{}.{key}", gguf.architecture()?))?;
    match value.as_array() {
        Some(crate::gguf::Array::U32(items)) => items.iter().max().map(|n| u64::from(*n)),
        Some(crate::gguf::Array::I32(items)) => items.iter().max().and_then(|n| u64::try_from(*n).ok()),
        Some(_) => None,
        None => value.as_uint(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs() -> Needs {
        Needs {
            layers: vec![100 << 20; 10],
            embedding: 50 << 20,
            head: 60 << 20,
            kv_layer: 10 << 20,
            compute: 40 << 20,
        }
    }

    #[test]
    fn the_most_layers_that_fit() {
        #[track_caller]
        fn check(free_mib: u64, expect: Fit) {
            assert_eq!(needs().fit(DEVICE_OVERHEAD + (free_mib << 20)), expect);
        }
        check(1_200, Fit::Whole { bytes: 1_200 << 20 });
        check(1_199, Fit::Part { layers: 9, bytes: 1_090 << 20 });
        check(319, Fit::Part { layers: 1, bytes: 210 << 20 });
        check(209, Fit::Nothing);
        assert_eq!(needs().fit(0), Fit::Nothing);
    }

    #[test]
    fn a_file_says_what_it_needs() {
        let mut file = std::io::Cursor::new(Vec::new());
        let tiny = crate::tiny::TinyModel { layers: 3, context: 512, ..Default::default() };
        tiny.write(&mut file).unwrap();
        file.set_position(0);
        let gguf = Gguf::read(&mut file).unwrap();
        let shape = ContextShape { slots: 2, context: 500, batch: 64, outputs: 2, flash: true };
        let needs = Needs::of(&gguf, &shape);
        let tensors: u64 = gguf.tensors.iter().map(|tensor| tensor.bytes).sum();
        let tied =
            if gguf.tensor("output.weight").is_some() { 0 } else { gguf.tensor("token_embd.weight").unwrap().bytes };
        let weights = needs.layers.iter().sum::<u64>() + needs.embedding + needs.head - tied;
        assert_eq!(weights, tensors, "every tensor is counted once");
        assert_eq!(needs.layers.len(), 3);
        let heads_kv = gguf.arch_uint("attention.head_count_kv").unwrap();
        let head_dim = gguf.arch_uint("embedding_length").unwrap() / gguf.arch_uint("attention.head_count").unwrap();
        // Two slots of 512 positions (500 in whole blocks), keys and values, two bytes each.
        assert_eq!(needs.kv_layer, 2 * 512 * heads_kv * head_dim * 2 * 2);
        let exact = Needs::of(&gguf, &ContextShape { flash: false, ..shape });
        assert!(exact.compute > needs.compute, "without flash attention the scores take room");
    }
}
