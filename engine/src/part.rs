//! A part of a model as a file of its own: layers `[a, b)`, cut from a GGUF so that stock llama.cpp runs them as a model.
//!
//! | part              | holds                                                                                   | input         |
//! |-------------------|-----------------------------------------------------------------------------------------|---------------|
//! | stage, `b` < all  | its layers, no vocabulary, an embedding of zeros for 32 tokens that is never looked at (and a head, where llama.cpp wants one) | hidden rows |
//! | tail, `b` = all   | its layers, the embedding, the last norm and the head, the tokenizer                    | hidden rows   |
//!
//! A lead looks tokens up in its tail's embedding and runs the first layers as an ordinary stage.
//!
//! Of a mixture of experts a stage may be a *trunk*: its routed experts are elsewhere, zeros stand in their place as in a whole
//! model's trunk ([`crate::experts`]), and it carries the manifest by which packs are held to the model.
//!
//! What is written: `block_count` is `b - a`; `blk.i` becomes `blk.(i - a)`; arrays with a value for each layer are sliced;
//! Gemma's pattern of sliding windows, which llama.cpp else counts from the first layer *of the file*, is written out. So
//! any boundary is right. Only the tensors that go into the part are read, a megabyte at a time.
//!
//! # Proof of membership
//!
//! The part carries the table of all tensors of the whole model (name, type, shape, hash) and every metadata value that was
//! changed for it. From these the model root ([`crate::root`]) is computed again: see [`PartFile`].
//!
//! Only models of the allow-list are cut ([`admit`]): an architecture may scale by the number of layers, or keep state
//! between them, and would then be silently wrong.

mod admit;
mod cut;
mod file;

pub use admit::{Refused, admit};
pub use cut::{Cut, CutError};
pub use file::{PartError, PartFile};

/// Tokens of a stage's embedding of zeros; llama.cpp wants one.
const NO_VOCAB: u32 = 32;
/// Version of the keys below.
const VERSION: u32 = 1;
/// Our own keys. A file that holds any is a part.
const PREFIX: &str = "satgrid.";
/// Values of the whole model under keys that were changed for the part.
const WHOLE: &str = "satgrid.whole.";
const KEY_VERSION: &str = "satgrid.part.version";
const KEY_START: &str = "satgrid.part.start";
const KEY_END: &str = "satgrid.part.end";
const KEY_LAYERS: &str = "satgrid.part.layers";
/// Keys of the part that the whole model has not.
const KEY_ADDED: &str = "satgrid.part.added";
/// The whole model's tensors, in the order of their leaves.
const KEY_NAMES: &str = "satgrid.part.tensor.names";
const KEY_KINDS: &str = "satgrid.part.tensor.types";
/// Dimensions of each, then all dimensions in a row.
const KEY_RANKS: &str = "satgrid.part.tensor.ranks";
const KEY_SHAPES: &str = "satgrid.part.tensor.shapes";
/// 32 bytes of each.
const KEY_HASHES: &str = "satgrid.part.tensor.hashes";

#[cfg(test)]
mod tests;
