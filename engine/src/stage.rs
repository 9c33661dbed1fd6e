//! A model over several machines: what a node asks of an engine that holds some of the layers, what a lead's engine asks of
//! the machines between its two ends, and the hidden states that travel.
//!
//! ```text
//! lead's engine                      the middle stages, each an engine of its own node
//!  embedding + first layers --rows--> [a, b) --rows--> [b, c) --rows--+
//!  last layers + head, sampling <-------------------------------------+
//! ```
//!
//! - [`port`]: `Stage`, the port to an engine process that holds layers `[a, b)`.
//! - [`ring`]: `Ring`, the port through which a lead's engine reaches the middle stages, wherever they are. The lead's
//!   engine itself is an [`Engine`](crate::port::Engine): a provider sells it like a whole model.
//! - [`codec`]: hidden rows as bytes: f32 (exact), bf16 and q8_0 with their loss stated.
//! - [`kept`]: the rows that a stage sent, kept within a bound, to be sent again when its successor is replaced.
//!
//! # Rules that every side keeps
//!
//! **Start trims.** A piece that starts at position `p` of a sequence first drops whatever the stage holds of that sequence at
//! `p` and beyond. So rejected drafts, a shared prefix that goes on elsewhere, and work sent again need no message of their
//! own. A piece that starts beyond what the stage holds is refused with [`StageError::Gap`](port::StageError::Gap).
//!
//! **One work, one batch.** The pieces of a work are either one row each, of different sequences, or one piece of any number
//! of rows. These are the batches of the exact profile; a stage may join works of single rows into one batch, never others.
//!
//! **Order.** The works of one sequence are computed in the order in which they were sent.
//!
//! Hidden states are not private: whoever holds a layer's input can recover much of the text.

pub mod codec;
pub mod kept;
pub mod port;
pub mod ring;
