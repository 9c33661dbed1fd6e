//! The suite that every engine passes: the toy here, the real ones in their own tests.
//!
//! It panics where an engine breaks a promise of the port. There is no clock here, so "the engine does nothing" is
//! tested by letting another job run from start to end meanwhile; a promise that is never kept shows as a hang, so
//! callers put their own timeout around it.
//!
//! The engine must be idle, have at least two slots, and be read by nobody else.

mod bench;
mod cases;
mod extras;
mod texts;
mod tokens;

use crate::port::{Engine, Tokenizer};

pub use texts::embedding_conformance;

/// Runs every case. Text comes out the same only where the profile promises it (`Exact`); everything else holds for
/// all.
pub async fn conformance(engine: &dyn Engine, tok: &dyn Tokenizer) {
    tokens::round_trips(tok).await;
    let mut bench = bench::Bench::new(engine, tok).await;
    cases::bad_jobs_are_refused(&mut bench).await;
    cases::greedy_is_repeatable_and_usage_exact(&mut bench).await;
    cases::output_is_bounded(&mut bench).await;
    cases::grants_are_honoured(&mut bench).await;
    cases::cancellation(&mut bench).await;
    cases::prefixes_are_reused_within_a_session_only(&mut bench).await;
    cases::stop_strings_across_tokens(&mut bench).await;
    cases::end_of_generation(&mut bench).await;
    cases::many_sessions_at_once(&mut bench).await;
    cases::more_jobs_than_slots(&mut bench).await;
    cases::sampled_streams_replay_and_resume(&mut bench).await;
    extras::grammars_are_followed(&mut bench).await;
    extras::log_probabilities_come_with_their_tokens(&mut bench).await;
}
