use proptest::prelude::*;

use super::*;

fn draws(logits: &[f32], sampling: &Sampling, n: u32) -> Vec<u32> {
    let mut seen = vec![0; logits.len()];
    for position in 0..n {
        seen[draw(logits, &[], sampling, position).unwrap() as usize] += 1;
    }
    seen
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let greedy = Sampling::greedy();
    assert_eq!(draw(&[1.0, 3.0, 3.0, 2.0], &[], &greedy, 0), Some(1));
    assert_eq!(draw(&[f32::NAN, -1.0, f32::INFINITY, f32::INFINITY], &[], &greedy, 0), Some(2));
    assert_eq!(draw(&[], &[], &greedy, 0), None);
    assert_eq!(draw(&[f32::NAN, f32::NEG_INFINITY], &[], &greedy, 0), None);
}

#[test]
fn frequencies_follow_probabilities() {
    let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
    let seen = draws(&logits, &Sampling::seeded(1.0, 42), 20_000);
    for (seen, expect) in seen.iter().zip([10_000i64, 6_000, 3_000, 1_000]) {
        assert!((i64::from(*seen) - expect).abs() < 300, "{seen} against {expect}");
    }
    // Temperature 2 takes the square root of every probability before normalising.
    let roots: Vec<f64> = [0.5f64, 0.3, 0.15, 0.05].iter().map(|p| p.sqrt()).collect();
    let sum: f64 = roots.iter().sum();
    for (seen, root) in draws(&logits, &Sampling::seeded(2.0, 1), 20_000).iter().zip(roots) {
        assert!((f64::from(*seen) - 20_000.0 * root / sum).abs() < 300.0);
    }
}

#[test]
fn truncations_drop_the_tail() {
    let logits = [0.05f32.ln(), 0.5f32.ln(), 0.15f32.ln(), 0.3f32.ln()];
    let base = Sampling::seeded(1.5, 3);
    let kept = |sampling: &Sampling| -> Vec<usize> {
        let seen = draws(&logits, sampling, 500);
        (0..4).filter(|&id| seen[id] > 0).collect()
    };
    assert_eq!(kept(&base), [0, 1, 2, 3]);
    assert_eq!(kept(&Sampling { top_k: 2, ..base.clone() }), [1, 3]);
    assert_eq!(kept(&Sampling { top_k: 1, ..base.clone() }), [1]);
    assert_eq!(kept(&Sampling { top_p: 0.49, ..base.clone() }), [1]);
    assert_eq!(kept(&Sampling { top_p: 0.79, ..base.clone() }), [1, 3]);
    assert_eq!(kept(&Sampling { top_p: 0.9, ..base.clone() }), [1, 2, 3]);
    assert_eq!(kept(&Sampling { top_p: 0.0, ..base.clone() }), [1]);
    assert_eq!(kept(&Sampling { min_p: 0.2, ..base.clone() }), [1, 2, 3]);
    assert_eq!(kept(&Sampling { min_p: 1.0, ..base.clone() }), [1]);
    // top_p after top_k looks at the share among what is left.
    assert_eq!(kept(&Sampling { top_k: 3, top_p: 0.5, ..base }), [1]);
}

#[test]
fn penalties_and_bias() {
    let greedy = Sampling::greedy();
    let logits = [2.0, 1.9, -0.1, -1.0];
    let next = |history: &[u32], position: u32, sampling: &Sampling| draw(&logits, history, sampling, position);
    // Presence and frequency look at output only, repetition at the prompt too.
    let presence = Sampling { presence_penalty: 0.5, ..greedy.clone() };
    assert_eq!(next(&[0, 0], 0, &presence), Some(0));
    assert_eq!(next(&[0, 0], 1, &presence), Some(1));
    let frequency = Sampling { frequency_penalty: 0.06, ..greedy.clone() };
    assert_eq!(next(&[0, 9], 2, &frequency), Some(0));
    assert_eq!(next(&[0, 0], 2, &frequency), Some(1));
    let repeat = Sampling { repeat_penalty: 1.2, repeat_window: 1, ..greedy.clone() };
    assert_eq!(next(&[0], 0, &repeat), Some(1));
    assert_eq!(next(&[0, 3], 0, &repeat), Some(0));
    let bias = Sampling { logit_bias: vec![(3, 5.0), (77, 5.0)], ..greedy.clone() };
    assert_eq!(next(&[], 0, &bias), Some(3));
    let mut forbidden = greedy;
    forbidden.forbid([0, 1, 2]);
    assert_eq!(next(&[], 0, &forbidden), Some(3));
    forbidden.forbid([3]);
    assert_eq!(next(&[], 0, &forbidden), None);
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let logits: Vec<f32> = (0..1000u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 22) as f32 / 200.0).collect();
    let sampling = Sampling::seeded(0.8, 99);
    let forward: Vec<_> = (0..50).map(|i| draw(&logits, &[], &sampling, i)).collect();
    let backward: Vec<_> = (0..50).rev().map(|i| draw(&logits, &[], &sampling, i)).collect();
    assert_eq!(forward, backward.into_iter().rev().collect::<Vec<_>>());
    let other: Vec<_> = (0..50).map(|i| draw(&logits, &[], &Sampling::seeded(0.8, 100), i)).collect();
    assert_ne!(forward, other);
    // Golden: another build or platform must draw the same.
    assert_eq!(forward[..6], [474, 550, 393, 296, 527, 181].map(Some));
}

/// The dumb reference: full sort, every step spelled out.
fn reference_support(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let mut all: Vec<Candidate> = logits
        .iter()
        .enumerate()
        .filter(|(_, logit)| !logit.is_nan() && **logit > f32::NEG_INFINITY)
        .map(|(id, &logit)| Candidate { logit, id: id as u32 })
        .collect();
    all.sort_by(order);
    if sampling.top_k > 0 {
        all.truncate(sampling.top_k as usize);
    }
    let top = f64::from(all[0].logit);
    let plain = |c: &Candidate| plain(c, top);
    if sampling.top_p < 1.0 {
        let wanted = share(sampling.top_p, all.iter().map(plain).sum());
        let mut sum = 0;
        let last = all.iter().position(|c| {
            sum += plain(c);
            sum >= wanted
        });
        all.truncate(last.map_or(all.len(), |last| last + 1));
    }
    all.retain(|c| plain(c) >= share(sampling.min_p, ONE));
    all.iter().map(|c| c.id).collect()
}

proptest! {
    #[test]
    fn hostile_logits_never_panic(
        logits in prop::collection::vec(prop_oneof![
            any::<f32>(), Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(0.0),
        ], 0..40),
        numbers in prop::array::uniform7(any::<f32>()),
        top_k in any::<u32>(), window in any::<u32>(), seed in any::<u64>(), position in any::<u32>(),
        history in prop::collection::vec(any::<u32>(), 0..20),
        bias in prop::collection::vec((0u32..50, any::<f32>()), 0..5),
    ) {
        let [temperature, top_p, min_p, presence, frequency, repeat, _] = numbers;
        let sampling = Sampling {
            temperature, top_p, top_k, min_p, presence_penalty: presence, frequency_penalty: frequency,
            repeat_penalty: repeat, repeat_window: window, logit_bias: bias, seed,
        };
        if let Some(id) = draw(&logits, &history, &sampling, position) {
            prop_assert!((id as usize) < logits.len());
        }
    }

    /// Truncating nothing is the same draw by another way.
    #[test]
    fn both_ways_agree(
        logits in prop::collection::vec((-400i32..400).prop_map(|x| x as f32 / 10.0), 1..900),
        seed in any::<u64>(), temperature in 0.1f32..3.0,
    ) {
        let all = Sampling::seeded(temperature, seed);
        let most = Sampling { top_k: u32::MAX, ..all.clone() };
        for position in 0..5 {
            prop_assert_eq!(draw(&logits, &[], &all, position), draw(&logits, &[], &most, position));
        }
    }

    #[test]
    fn drawn_tokens_are_in_the_reference_support(
        logits in prop::collection::vec((-400i32..400).prop_map(|x| x as f32 / 40.0), 1..600),
        top_k in 0u32..300, top_p in 0.0f32..1.2, min_p in 0.0f32..0.3, seed in any::<u64>(),
    ) {
        let sampling = Sampling { top_k, top_p, min_p, ..Sampling::seeded(1.3, seed) };
        let support = reference_support(&logits, &sampling);
        for position in 0..20 {
            let id = draw(&logits, &[], &sampling, position).unwrap();
            prop_assert!(support.contains(&id), "{id} is not in {support:?}");
        }
    }
}
