//! One draw: candidates, truncation, choice.
//!
//! A vocabulary of 262,144 tokens is passed over a few times in straight loops; only the candidates that a truncation
//! keeps are ever collected and sorted.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::Sampling;
use super::weight::{ONE, REACH, pick, weight};

/// First size of the sorted head that `top_p` looks at; it grows eightfold until the probability is reached.
const FIRST_HEAD: usize = 128;
/// Tokens that are weighed at a time.
const CHUNK: usize = 256;
/// How far below the likeliest candidates are collected: each step only where the one before holds too few.
const STEPS: [f64; 4] = [3.0, 6.0, 10.0, 16.0];

#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

/// Draws the output token at `position`.
///
/// `history` is the prompt and the output so far; its last `position` tokens are output. `None` where no token is
/// possible: no logits, or every one forbidden or not a number.
pub fn draw(logits: &[f32], history: &[u32], sampling: &Sampling, position: u32) -> Option<u32> {
    let row = adjusted(logits, history, sampling, position);
    let best = likeliest(&row)?;
    if sampling.temperature <= 0.0 || sampling.temperature.is_nan() {
        return Some(best.id);
    }
    let top = f64::from(best.logit);
    let coldness = 1.0 / f64::from(sampling.temperature);
    let truncated = sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0;
    let drawn = if truncated {
        let pool = kept(&row, sampling, top);
        let weights: Vec<u64> =
            pool.iter().map(|candidate| weight((f64::from(candidate.logit) - top) * coldness)).collect();
        let left = pick(sampling.seed, position, weights.iter().sum());
        landing(&weights, left).map(|at| pool[at].id)
    } else {
        from_all(&row, top, coldness, sampling.seed, position)
    };
    // Only where the weights are all 0, as with an infinite temperature over infinite logits.
    Some(drawn.unwrap_or(best.id))
}

/// Draws from the whole row: weighs it chunk by chunk, then looks into the one chunk where the draw lands.
fn from_all(row: &[f32], top: f64, coldness: f64, seed: u64, position: u32) -> Option<u32> {
    let mut weights = [0; CHUNK];
    let sums: Vec<u64> = row.chunks(CHUNK).map(|chunk| weigh(chunk, top, coldness, &mut weights)).collect();
    let mut left = pick(seed, position, sums.iter().sum());
    for (at, (chunk, sum)) in row.chunks(CHUNK).zip(sums).enumerate() {
        if left < sum {
            weigh(chunk, top, coldness, &mut weights);
            return landing(&weights[..chunk.len()], left).map(|within| (at * CHUNK + within) as u32);
        }
        left -= sum;
    }
    None
}

/// Weights of up to [`CHUNK`] logits, and their sum.
fn weigh(chunk: &[f32], top: f64, coldness: f64, weights: &mut [u64; CHUNK]) -> u64 {
    for (weight_out, &logit) in weights.iter_mut().zip(chunk) {
        *weight_out = weight((f64::from(logit) - top) * coldness);
    }
    weights[..chunk.len()].iter().sum()
}

/// The index at which the running sum passes `left`.
fn landing(weights: &[u64], mut left: u64) -> Option<usize> {
    weights.iter().position(|&weight| {
        let here = left < weight;
        left = left.wrapping_sub(weight);
        here
    })
}

/// The row after bias and penalties; borrowed where there are none.
fn adjusted<'a>(logits: &'a [f32], history: &[u32], sampling: &Sampling, position: u32) -> Cow<'a, [f32]> {
    let mut row = Cow::Borrowed(logits);
    if !sampling.logit_bias.is_empty() {
        let row = row.to_mut();
        for &(id, bias) in &sampling.logit_bias {
            if let Some(logit) = row.get_mut(id as usize) {
                *logit += bias;
            }
        }
    }
    if sampling.repeat_penalty != 1.0 && sampling.repeat_penalty > 0.0 {
        let from = history.len().saturating_sub(sampling.repeat_window as usize);
        let row = row.to_mut();
        for &id in counts(&history[from..]).keys() {
            if let Some(logit) = row.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / sampling.repeat_penalty } else { *logit * sampling.repeat_penalty };
            }
        }
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        let from = history.len().saturating_sub(position as usize);
        let row = row.to_mut();
        for (id, count) in counts(&history[from..]) {
            if let Some(logit) = row.get_mut(id as usize) {
                *logit -= sampling.presence_penalty + count as f32 * sampling.frequency_penalty;
            }
        }
    }
    row
}

fn counts(ids: &[u32]) -> BTreeMap<u32, u32> {
    let mut counts = BTreeMap::new();
    for &id in ids {
        *counts.entry(id).or_insert(0) += 1;
    }
    counts
}

/// The highest logit, the lowest id among equals.
fn likeliest(row: &[f32]) -> Option<Candidate> {
    // False for NaN.
    let higher = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = row.as_chunks::<16>();
    for block in blocks {
        for (lane, logit) in lanes.iter_mut().zip(block) {
            *lane = higher(*lane, *logit);
        }
    }
    let highest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| higher(a, *b));
    if highest == f32::NEG_INFINITY {
        return None;
    }
    let id = row.iter().position(|logit| *logit == highest)? as u32;
    // An infinite logit would make every distance infinite or NaN.
    Some(Candidate { logit: highest.min(f32::MAX), id })
}

/// What `top_k`, `top_p` and `min_p` leave, in the order of ids.
fn kept(row: &[f32], sampling: &Sampling, top: f64) -> Vec<Candidate> {
    let top_k = sampling.top_k as usize;
    let nucleus = (top_k == 0 && sampling.top_p < 1.0).then(|| {
        let mut weights = [0; CHUNK];
        share(sampling.top_p, row.chunks(CHUNK).map(|chunk| weigh(chunk, top, 1.0, &mut weights)).sum())
    });
    let mut pool = collect(row, sampling, top, nucleus);
    if top_k > 0 && top_k < pool.len() {
        pool.select_nth_unstable_by(top_k, order);
        pool.truncate(top_k);
    }
    if sampling.top_p < 1.0 {
        let wanted = nucleus.unwrap_or_else(|| share(sampling.top_p, pool.iter().map(|one| plain(one, top)).sum()));
        keep_nucleus(&mut pool, wanted, top);
    }
    if sampling.min_p > 0.0 {
        let least = share(sampling.min_p, ONE);
        pool.retain(|candidate| plain(candidate, top) >= least);
    }
    pool.sort_unstable_by_key(|candidate| candidate.id);
    pool
}

/// A head of the order of likelihood that surely holds everything that the truncations keep; `nucleus` is the weight
/// that `top_p` wants where it looks at the whole row.
fn collect(row: &[f32], sampling: &Sampling, top: f64, nucleus: Option<u64>) -> Vec<Candidate> {
    let top_k = sampling.top_k as usize;
    for distance in STEPS {
        let pool = within(row, top - distance);
        let enough = if top_k > 0 {
            pool.len() >= top_k
        } else {
            nucleus.is_some_and(|wanted| pool.iter().map(|one| plain(one, top)).sum::<u64>() >= wanted)
                || (sampling.min_p > 0.0 && weight(-distance) < share(sampling.min_p, ONE))
        };
        if enough {
            return pool;
        }
    }
    // What lies further down weighs nothing, neither at temperature 1 nor at the one asked for.
    within(row, top - REACH * f64::from(sampling.temperature).max(1.0))
}

/// Candidates whose logit is at least `floor`.
fn within(row: &[f32], floor: f64) -> Vec<Candidate> {
    let floor = (floor as f32).max(f32::MIN);
    let mut pool = Vec::new();
    for (at, chunk) in row.chunks(CHUNK).enumerate() {
        // Most chunks hold none, and this is one vector loop.
        if chunk.iter().fold(false, |any, logit| any | (*logit >= floor)) {
            let ids = (at * CHUNK) as u32..;
            let found = ids.zip(chunk).filter(|(_, logit)| **logit >= floor);
            pool.extend(found.map(|(id, &logit)| Candidate { logit: logit.min(f32::MAX), id }));
        }
    }
    pool
}

/// A candidate's weight at temperature 1.
fn plain(candidate: &Candidate, top: f64) -> u64 {
    weight(f64::from(candidate.logit) - top)
}

/// `fraction` of `total`, rounded down; fractions outside 0 to 1 are taken as the nearer end.
fn share(fraction: f32, total: u64) -> u64 {
    let fraction = if fraction >= 0.0 { f64::from(fraction).min(1.0) } else { 0.0 };
    // Exact enough: total is below 2^59, and a unit is 2^-40 of the likeliest token.
    ((total as f64 * fraction) as u64).min(total)
}

/// Keeps the fewest likeliest candidates whose weights reach `wanted`, at least one. Sorts only as far as it must.
fn keep_nucleus(pool: &mut Vec<Candidate>, wanted: u64, top: f64) {
    let mut head = FIRST_HEAD;
    loop {
        head = head.min(pool.len());
        if head < pool.len() {
            pool.select_nth_unstable_by(head, order);
        }
        pool[..head].sort_unstable_by(order);
        let mut sum: u64 = 0;
        let reached = pool[..head].iter().position(|candidate| {
            sum += plain(candidate, top);
            sum >= wanted
        });
        match reached {
            Some(last) => return pool.truncate(last + 1),
            None if head == pool.len() => return,
            None => head *= 8,
        }
    }
}

/// Likeliest first, lowest id first among equals. The pool holds no NaN.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

#[cfg(test)]
mod tests;
