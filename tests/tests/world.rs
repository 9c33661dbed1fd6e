//! Two-node worlds in virtual time: the roles as they ship, against everything that can go wrong between two nodes.
//!
//! `SATGRID_TRACE=1` prints what happens.
#![allow(clippy::unwrap_used)]

#[path = "world/calls.rs"]
mod calls;
#[path = "world/cheats.rs"]
mod cheats;
#[path = "world/crashes.rs"]
mod crashes;
#[path = "world/credit.rs"]
mod credit;
#[path = "world/failover.rs"]
mod failover;
#[path = "world/log.rs"]
mod log;
#[path = "world/money.rs"]
mod money;
#[path = "world/pace.rs"]
mod pace;
#[path = "world/texts.rs"]
mod texts;

use satgrid_tests::world::{CallLog, World, oracle::undisturbed};
use satgrid_wallet::fake::Crash;

/// The call finished, and its text is the one of a run without any trouble.
#[track_caller]
fn assert_undisturbed(world: &World, log: &CallLog) {
    assert!(log.is_ok(), "{:?}", log.end);
    assert_eq!(log.tokens, undisturbed(&world.options.toy, &log.prompt, log.max_output, None));
}

/// By turns: the consumer dies and comes back, the provider does, their connection breaks.
fn strike(world: &mut World, turn: u64) {
    match turn % 3 {
        0 => {
            world.crash_consumer(0, Crash::default());
            world.run_ms(100);
            world.restart_consumer(0);
        }
        1 => {
            world.crash_provider(0, Crash::default());
            world.run_ms(100);
            world.restart_provider(0);
        }
        _ => world.break_links(0, 0),
    }
}
