//! The ranking of listings that fit.

use core::cmp::Reverse;

use satgrid_types::{ListingId, Msat, UnixMs, VerifiedListing};

use super::refusal::Cost;
use crate::demand::{Demand, Sort};
use crate::reputation::Record;

/// Smaller is better. A total order: the listing's id comes last.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// Place in the user's order; those outside it come after all.
    order: usize,
    first: u128,
    second: u128,
    /// More settled with us is better.
    settled: Reverse<Msat>,
    id: ListingId,
}

pub(super) fn rank(now: UnixMs, listing: &VerifiedListing, demand: &Demand, record: &Record, cost: &Cost) -> Rank {
    let order = demand.order.iter().position(|pattern| pattern.matches(listing)).unwrap_or(usize::MAX);
    let price = effective_price(now, record, cost);
    let (first, second) = match demand.sort {
        Sort::Price => (price, u128::from(duration_ms(listing, demand, record))),
        Sort::Throughput => (u128::from(u64::MAX - decode_speed(listing, record)), price),
        Sort::Latency => (u128::from(prefill_ms(listing, demand)), price),
    };
    Rank { order, first, second, settled: Reverse(record.settled), id: listing.id() }
}

/// What the request costs us in effect: its charge, the routing fee as measured, and a thousandth more for every penalty
/// point. In numerators (msat per million) times 10^9, so that nothing is rounded away.
fn effective_price(now: UnixMs, record: &Record, cost: &Cost) -> u128 {
    let with_fee = 1_000_000 + u128::from(record.fee_ppm);
    let with_penalty = 1_000 + u128::from(record.points(now).min(1_000));
    u128::from(cost.expected.0) * with_fee * with_penalty
}

/// How fast it writes: as measured by ourselves, else as listed.
fn decode_speed(listing: &VerifiedListing, record: &Record) -> u64 {
    if record.decode_mtok_s > 0 { record.decode_mtok_s } else { listing.speed.decode_mtok_s }
}

/// Time to evaluate what is not cached of the prompt, in ms; a listing that names no speed counts as 1 token/s.
fn prefill_ms(listing: &VerifiedListing, demand: &Demand) -> u64 {
    let usage = demand.usage(&listing.node_key, 0);
    milliseconds(usage.prompt - usage.cached_prompt, listing.speed.prefill_mtok_s)
}

fn duration_ms(listing: &VerifiedListing, demand: &Demand, record: &Record) -> u64 {
    let decode = milliseconds(demand.expected_output_tokens, decode_speed(listing, record));
    prefill_ms(listing, demand).saturating_add(decode)
}

fn milliseconds(tokens: u32, speed_mtok_s: u64) -> u64 {
    let speed = if speed_mtok_s == 0 { 1_000 } else { speed_mtok_s };
    u64::from(tokens) * 1_000_000 / speed
}
