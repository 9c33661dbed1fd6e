//! The wire's words as the engine knows them.

use satgrid_types::Sampling;

/// The wire's fixed-point parameters as the engine takes them.
pub(super) fn engine_sampling(s: &Sampling) -> satgrid_engine::sampling::Sampling {
    const MICRO: f32 = 1_000_000.0;
    #[allow(clippy::cast_precision_loss)]
    let float = |micro: i64| micro as f32 / MICRO;
    satgrid_engine::sampling::Sampling {
        temperature: float(s.temperature_micro.into()),
        top_p: float(s.top_p_micro.into()),
        top_k: s.top_k,
        min_p: float(s.min_p_micro.into()),
        presence_penalty: float(s.presence_penalty_micro.into()),
        frequency_penalty: float(s.frequency_penalty_micro.into()),
        repeat_penalty: float(s.repeat_penalty_micro.into()),
        logit_bias: s.logit_bias_micro.iter().map(|(id, bias)| (*id, float((*bias).into()))).collect(),
        seed: s.seed,
        ..satgrid_engine::sampling::Sampling::default()
    }
}
