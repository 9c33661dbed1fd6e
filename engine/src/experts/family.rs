//! The architectures whose experts may live elsewhere.
//!
//! Each is admitted by the whole-against-split test of `engine/llama` (tests/experts.rs); every other one is refused by
//! name, and so is a file of an admitted one that holds something the test has not seen: merged gate and up,
//! biases or scales per expert, groups of experts, widths that differ from layer to layer.

use crate::facts;
use crate::gguf::{Gguf, Value};

/// An admitted architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// The key, behind the architecture's name, that gives an expert's inner width.
    pub width_key: &'static str,
}

/// All of them. `llama` with experts is what Mixtral's files call themselves.
pub const FAMILIES: [Family; 5] = [
    Family { architecture: "qwen3moe", width_key: "expert_feed_forward_length" },
    Family { architecture: "qwen2moe", width_key: "expert_feed_forward_length" },
    Family { architecture: "olmoe", width_key: "feed_forward_length" },
    Family { architecture: "llama", width_key: "feed_forward_length" },
    Family { architecture: "granitemoe", width_key: "feed_forward_length" },
];

/// llama.cpp's own limit.
pub const MAX_EXPERTS: u32 = 512;
/// Most experts for one row; the widest published model uses 10.
pub const MAX_USED: u32 = 64;
pub const MAX_LAYERS: u32 = 512;

/// The shape of a model's expert layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeShape {
    pub family: Family,
    pub layers: u32,
    pub experts: u32,
    /// Experts that the router chooses for each row.
    pub used: u32,
    /// Width of a row.
    pub n_embd: u32,
    /// An expert's inner width.
    pub n_ff: u32,
}

/// Why a model's experts are not split off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("architecture {0:?} is not admitted for expert execution; admitted are {list}", list = names())]
    Architecture(String),
    #[error("the model has no experts")]
    Dense,
    #[error("the model embeds or ranks texts (its pooling_type says so) and writes none; sell it whole")]
    Pooled,
    #[error("metadata {key:?} is missing or not one number for all layers")]
    Metadata { key: String },
    #[error("{what} is {value}, at most {limit} are possible")]
    OverLimit { what: &'static str, value: u64, limit: u64 },
    #[error("{used} experts used of {experts}")]
    Used { used: u32, experts: u32 },
    #[error("the model chooses experts by groups, which is not admitted")]
    Groups,
    #[error("tensor {name:?} is missing")]
    Missing { name: String },
    #[error("tensor {name:?} has the shape {shape:?}, expected {expected:?}")]
    Shape { name: String, shape: Vec<u64>, expected: [u64; 3] },
    #[error("tensor {name:?} is not admitted beside experts")]
    Tensor { name: String },
}

fn names() -> String {
    FAMILIES.map(|family| family.architecture).join(", ")
}

impl MoeShape {
    /// Reads the shape of a whole model, or says why its experts stay where they are.
    pub fn admit(gguf: &Gguf) -> Result<Self, Refused> {
        let architecture = gguf.architecture().unwrap_or_default();
        let family = FAMILIES.into_iter().find(|family| family.architecture == architecture);
        let family = family.ok_or_else(|| Refused::Architecture(architecture.to_owned()))?;
        let number = |name: &str, limit: u32| -> Result<Option<u32>, Refused> {
            let key = format!("{architecture}.{name}");
            let Some(value) = gguf.get(&key) else { return Ok(None) };
            let value = value.as_uint().ok_or(Refused::Metadata { key })?;
            let what = "a number in the metadata";
            let small = u32::try_from(value).ok().filter(|small| *small <= limit);
            small.map(Some).ok_or(Refused::OverLimit { what, value, limit: u64::from(limit) })
        };
        let needed = |name: &str, limit: u32| {
            number(name, limit)?.ok_or_else(|| Refused::Metadata { key: format!("{architecture}.{name}") })
        };
        if !matches!(facts::pooling(gguf, architecture), Ok(None)) {
            return Err(Refused::Pooled);
        }
        let experts = number("expert_count", MAX_EXPERTS)?.unwrap_or(0);
        if experts < 2 {
            return Err(Refused::Dense);
        }
        let used = needed("expert_used_count", MAX_USED)?;
        if used == 0 || used > experts {
            return Err(Refused::Used { used, experts });
        }
        if number("expert_group_count", u32::MAX)?.is_some_and(|groups| groups > 1) {
            return Err(Refused::Groups);
        }
        // A width of its own must be one number: a trunk replaces it.
        number(family.width_key, u32::MAX)?;
        let layers = needed("block_count", MAX_LAYERS)?;
        let n_embd = needed("embedding_length", 1 << 20)?;
        let first = gguf.tensor("blk.0.ffn_up_exps.weight");
        let first = first.ok_or_else(|| Refused::Missing { name: "blk.0.ffn_up_exps.weight".to_owned() })?;
        let n_ff = first.shape.get(1).and_then(|width| u32::try_from(*width).ok()).unwrap_or(0);
        let shape = Self { family, layers, experts, used, n_embd, n_ff };
        shape.check_tensors(gguf)?;
        Ok(shape)
    }

    fn check_tensors(&self, gguf: &Gguf) -> Result<(), Refused> {
        for layer in 0..self.layers {
            for part in super::Part::ALL {
                let (name, expected) = (part.tensor(layer), part.shape(self));
                let tensor = gguf.tensor(&name).ok_or_else(|| Refused::Missing { name: name.clone() })?;
                if tensor.shape != expected {
                    return Err(Refused::Shape { name, shape: tensor.shape.clone(), expected });
                }
            }
        }
        let known =
            |name: &str| (0..self.layers).any(|layer| super::Part::ALL.iter().any(|part| part.tensor(layer) == name));
        match gguf.tensors.iter().find(|tensor| tensor.name.contains("_exps.") && !known(&tensor.name)) {
            Some(tensor) => Err(Refused::Tensor { name: tensor.name.clone() }),
            None => Ok(()),
        }
    }

    /// The key of an expert's inner width, in full.
    pub fn width_key(&self) -> String {
        format!("{}.{}", self.family.architecture, self.family.width_key)
    }

    /// A width of the same kind as the one that it replaces.
    pub(super) fn width_like(original: Option<&Value>, width: u32) -> Value {
        if let Some(Value::U64(_)) = original {
            Value::U64(u64::from(width))
        } else if let Some(Value::I32(_)) = original {
            Value::I32(i32::try_from(width).unwrap_or(i32::MAX))
        } else {
            Value::U32(width)
        }
    }
}
