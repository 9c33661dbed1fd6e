//! A model whose middle layers are elsewhere: the lead's child process holds the embedding, the first layers, the last layers
//! and the head, and sends hidden rows through a `Ring` in between.
//!
//! Seen from the node it is an engine like any other: jobs, grants and tokens. The child runs the same scheduler as a whole
//! model; only its backend differs. `ends` is the two ends in memory, `trip` sends a batch around the ring and replays what a
//! replaced stage has lost (pure, tested alone), `worker` is the child's loop, `engine` the port in the node, which joins the
//! child to the ring.

pub(crate) mod backend;
pub(crate) mod ends;
pub(crate) mod engine;
mod trip;
pub(crate) mod worker;

#[cfg(test)]
mod tests;
