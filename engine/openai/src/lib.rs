//! The `Engine` port over a server that already runs a model: llama-server, vLLM, SGLang, Ollama, or whatever else speaks
//! OpenAI's completions.
//!
//! | file | for |
//! |---|---|
//! | `config` | which server, and how it is to be spoken to |
//! | `dialect` | each server's requests and the pieces of its streams |
//! | `probe` | what answers at the URL, whether it tells token ids, whether it tokenises as we do, how fast it is |
//! | `retokenise` | text back to ids, where the server gives none |
//! | `client` | HTTP: one prefill, one stream |
//! | `engine`, `run` | the port; one task for each job |
//!
//! Nothing runs ahead of its grant: a prompt is sent on piece by piece, and a stream that may not be emitted is not read.
//! Nothing is reported before the server has done it, so what fails upstream costs nothing. It never sees who pays.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod client;
mod config;
mod dialect;
mod engine;
mod probe;
mod retokenise;
mod run;

pub use config::{Dialect, UpstreamConfig};
pub use engine::{Served, UpstreamEngine};
pub use probe::{ProbeError, Probed, probe};
