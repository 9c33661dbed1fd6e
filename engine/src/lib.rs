//! Running a model, seen from outside: the `Engine` port, and every decision about inference that needs
//! no weights in memory.
//!
//! - [`port`]: the commands, events and traits that the node speaks; `conformance` (a feature) is the suite that
//!   every engine passes.
//! - [`sampling`], [`stop`], [`utf8`], [`template`]: from logits to a token, from tokens to text, from messages to a
//!   prompt.
//! - [`gguf`], [`facts`], [`root`], [`tokenizer_artefact`]: what a model file says, and the hashes that name it;
//!   [`memory`]: what it will need.
//! - [`part`]: layers `[a, b)` of a model as a file of their own that proves which model they are of.
//! - [`stage`]: a model over several machines: the ports of a stage and of the ring between, and hidden rows as bytes.
//! - [`draft`]: guesses of what comes next, verified several at once where a trip through the model is dear.
//! - [`embedder`]: the machine of engines whose model embeds texts instead of writing them.
//! - [`experts`]: a mixture-of-experts model whose experts live elsewhere: artefacts, calls, hosts.
//! - [`random_model`]: real shapes with random weights, for benchmarks. [`tiny`], [`tiny_bert`], [`tiny_shapes`], [`tiny_moe`]: seeded
//!   random models for tests. `toy` (a feature): a deterministic engine without weights, for tests and simulation.
//!
//! This crate never opens a file or socket, reads no clock and no random source: bytes, seeds, dates and
//! limits are arguments. The adapters below this folder (`llama`, `openai`) do the running.

#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod draft;
pub mod embedder;
pub mod experts;
pub mod facts;
pub mod gguf;
pub mod grammar;
pub mod memory;
pub mod part;
pub mod port;
pub mod random_model;
pub mod root;
pub mod sampling;
pub mod stage;
pub mod stop;
pub mod template;
pub mod tiny;
pub mod tiny_bert;
pub mod tiny_moe;
pub mod tiny_shapes;
pub mod tokenizer_artefact;
pub mod tools;
#[cfg(feature = "toy")]
pub mod toy;
pub mod utf8;
