//! Layers `[a, b)` of a model in a child process, behind the `Stage` port.
//!
//! `engine` is the port in the node, `queue` decides what is computed next (pure, tested alone), `layers` holds the model,
//! `worker` is the child's loop. What a stage may be asked is in `satgrid_engine::stage::port`.

pub(crate) mod engine;
pub(crate) mod layers;
pub(crate) mod local;
pub(crate) mod queue;
pub(crate) mod worker;

#[cfg(test)]
mod tests;
