//! What a job may ask for beyond tokens: a grammar, log probabilities.

use super::bench::Bench;
use crate::grammar::{Json, from_schema};
use crate::port::{Extras, FinishReason, Job};
use crate::sampling::Sampling;

const SCHEMA: &str = r#"{"properties":{"ok":{"type":"boolean"},"n":{"type":"integer","minimum":10,"maximum":99},
    "s":{"type":"string","maxLength":3}},"required":["ok","n","s"]}"#;

pub(super) async fn grammars_are_followed(bench: &mut Bench<'_>) {
    let grammar = from_schema(&Json::parse(SCHEMA).expect("JSON")).expect("a schema");
    let extras = Extras { grammar: Some(grammar), ..Extras::default() };
    let job = |bench: &mut Bench<'_>, seed| {
        // Far below 1 a model that never heard of JSON still has its favourites; at 0 it has one.
        let sampling = if seed == 0 { Sampling::greedy() } else { Sampling::seeded(0.9, seed) };
        Job { sampling, extras: extras.clone(), ..bench.job(120) }
    };
    for seed in 0..3 {
        let (first, again) = (job(bench, seed), job(bench, seed));
        let first = bench.run(first).await;
        assert_eq!(first.finished(), FinishReason::Stop, "the job ends where nothing may follow");
        let text = bench.pieces(&first.ids).await.concat();
        let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        assert!(value["ok"].is_boolean() && value["s"].is_string(), "{value}");
        assert!((10..=99).contains(&value["n"].as_i64().expect("an integer")), "{value}");
        assert_eq!(bench.run(again).await.ids, first.ids, "the same call gave other tokens");
        if bench.exact() {
            let base = job(bench, seed);
            let received = first.ids.len() / 2;
            let prompt = base.prompt.iter().chain(&first.ids[..received]).copied().collect();
            let resumed = bench.run(Job { prompt, resumed: received as u32, ..base }).await;
            assert_eq!(resumed.ids, first.ids[received..], "resumed after {received} tokens");
        }
    }
}

pub(super) async fn log_probabilities_come_with_their_tokens(bench: &mut Bench<'_>) {
    let extras = Extras { top_logprobs: Some(3), ..Extras::default() };
    let job = Job { extras, ..bench.job(6) };
    let trace = bench.run(job).await;
    assert_eq!((trace.ids.len(), trace.logprobs.len()), (6, 6));
    for (id, entry) in trace.ids.iter().zip(&trace.logprobs) {
        assert!(entry.top.is_sorted_by(|a, b| a.1 >= b.1) && entry.top.len() == 3, "{entry:?}");
        assert_eq!(entry.top[0], (*id, entry.drawn_micro), "a greedy draw is the likeliest");
        assert!(entry.drawn_micro <= 0);
    }
}
