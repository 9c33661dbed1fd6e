//! llama.cpp behind satgrid's engine port, in a child process.
//!
//! llama.cpp may abort, run out of memory or choke on a hostile file. So the node never links its fate to it: it starts its own
//! binary again as a worker, speaks CBOR with it over a socket pair, and when the worker dies the node reports `Down`,
//! starts it again and reports `Up`. Wallet, ledger and API live in the node and notice nothing else.
//!
//! | in the node                                   | in the child                                                     |
//! |-----------------------------------------------|------------------------------------------------------------------|
//! | [`LlamaEngine`]: the `Engine` port             | `worker`: load, serve, exit with the parent                      |
//! | [`LlamaStage`]: the `Stage` port               | `stage`: some layers, hidden rows in and out                     |
//! | [`LlamaLead`]: the `Engine` port over a `Ring` | `lead`: the scheduler over a model's two ends                    |
//! | [`LlamaExperts`]: the `ExpertHost` port        | `pack`: experts' weights, proved and evaluated                   |
//! | either of the first two, as a trunk           | `node_experts`: asks the node for experts' rows in mid-batch      |
//! | the same, of a model that embeds              | `texts`: rows for texts, in batches of `satgrid_engine::embedder` |
//! | [`LlamaTokenizer`]: the `Tokenizer` port       | `scheduler` and `plan`: continuous batching, pure and tested alone |
//! | `child`: start, hear, end a process           | `backend` and `ffi`: llama.cpp; the product's only `unsafe`      |
//!
//! `wire` is what they say to each other, [`WorkerArgs`] how a child is told its task, [`bare`] the yardstick for benchmarks.
//!
//! This crate never sees money, peers or the network, writes no prompt to any log, and opens no file but those that its
//! settings name (and a temporary one of its own for the known answer in the build id).

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod backend;
pub mod bare;
mod child;
mod crowd;
mod devices;
mod draft;
mod engine;
mod experts;
mod facts;
mod ffi;
mod keeper;
mod lead;
mod model_file;
mod node_experts;
mod owners;
mod pack;
mod placed;
mod plan;
mod render;
mod scheduler;
mod settings;
mod socket;
mod split;
mod stage;
mod texts;
mod tokenizer;
mod watchdog;
mod wire;
mod worker;

pub use child::{SpawnError, WorkerProgram};
pub use devices::{Device, DeviceKind, LOADS_BACKENDS, Offload, libraries_beside, list_devices};
pub use engine::{EngineConfig, LlamaEngine};
pub use experts::LlamaExperts;
pub use lead::engine::{LeadConfig, LlamaLead};
pub use settings::{
    ArgsError, BATCH, DEFAULT_CONTEXT, EngineSettings, LeadSettings, MAX_SLOTS, PackSettings, StageSettings,
    WorkerArgs, default_threads,
};
pub use split::{SplitError, SplitReport, split_model, split_stage_trunk};
pub use stage::engine::{LlamaStage, StageConfig};
pub use stage::local::{LocalRing, StageCounts};
pub use tokenizer::{LlamaTokenizer, MAX_TEXT, TokenizerConfig};
pub use wire::{HeldExpert, PackFacts};
pub use worker::worker_main;
