//! How far work may run ahead: of acknowledgements (the provider's risk) and of money (nobody's, where all is prepaid).
//!
//! The provider grants its engine positions in steps. A grant is the smallest of what was asked for, what the
//! acknowledgement window allows and what the funds cover:
//!
//! * prompt: at most one unacknowledged piece (`prefill_piece` tokens), granted only as a whole piece that is covered;
//! * output: at most `window_tokens` beyond the last countersigned acknowledgement, as many as the funds cover.

use satgrid_pricing::{PER_MILLION, numerators};
use satgrid_types::{Msat, RateCard, Terms, TokenUsage};

/// Positions that the engine may evaluate and emit; both only grow.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Prompt positions below this may be evaluated.
    pub prompt_upto: u32,
    /// Output tokens below this may be emitted.
    pub output_upto: u32,
}

impl Grant {
    /// The work that this grant allows, as if nothing came from the cache: what must be reserved for it.
    pub fn usage(&self) -> TokenUsage {
        TokenUsage { prompt: self.prompt_upto, cached_prompt: 0, completion: self.output_upto, reasoning: 0 }
    }
}

/// What a grant depends on.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    pub prompt_tokens: u32,
    pub max_output: u32,
    /// By the last acknowledgement that both signed.
    pub acked: TokenUsage,
    /// What this request may cost at the most: its reservation so far plus what is available beside it.
    pub funds: Msat,
    pub rates: RateCard,
    pub terms: Terms,
}

/// The largest grant that windows and funds allow.
pub fn grant(p: &Progress) -> Grant {
    let wanted = p.acked.prompt.saturating_add(p.terms.prefill_piece.max(1)).min(p.prompt_tokens);
    let prompt_upto = if covers(p, Grant { prompt_upto: wanted, output_upto: 0 }) { wanted } else { p.acked.prompt };
    if prompt_upto < p.prompt_tokens {
        return Grant { prompt_upto, output_upto: 0 };
    }
    let window = p.acked.completion.saturating_add(p.terms.window_tokens.max(1)).min(p.max_output);
    Grant { prompt_upto, output_upto: affordable_output(p, prompt_upto, window) }
}

/// Output that must be covered when a request starts; the next slice is paid while these tokens flow.
const START_TOKENS: u32 = 8;

/// What must be available before a request starts: its first prompt piece, and a few tokens of output where the prompt is
/// that short.
pub fn start_cost(prompt_tokens: u32, max_output: u32, rates: &RateCard, terms: &Terms) -> Option<Msat> {
    let piece = prompt_tokens.min(terms.prefill_piece.max(1));
    let output = if piece == prompt_tokens { max_output.min(START_TOKENS) } else { 0 };
    let usage = TokenUsage { prompt: piece, cached_prompt: 0, completion: output, reasoning: 0 };
    satgrid_pricing::cost_alone(&usage, rates).ok()
}

fn covers(p: &Progress, grant: Grant) -> bool {
    satgrid_pricing::cost_alone(&grant.usage(), &p.rates).is_ok_and(|cost| cost <= p.funds)
}

fn affordable_output(p: &Progress, prompt_upto: u32, window: u32) -> u32 {
    let prompt_only = Grant { prompt_upto, output_upto: 0 };
    let Ok(spent) = numerators(&prompt_only.usage(), &p.rates) else { return 0 };
    let rate = u128::from(p.rates.output.0);
    if rate == 0 {
        return window;
    }
    let budget = u128::from(p.funds.0).saturating_mul(u128::from(PER_MILLION));
    let left = budget.saturating_sub(u128::from(spent.0)) / rate;
    u32::try_from(left).unwrap_or(u32::MAX).min(window)
}

/// Whether the provider owes the consumer an acknowledgement to sign.
///
/// Due at the end of every prompt piece, after `ack_tokens` output tokens, and after `ack_interval_ms` where any work
/// is unacknowledged. One at a time: a second is offered when the first has come back.
pub fn ack_due(done: &TokenUsage, offered: &TokenUsage, ms_since_offer: u64, terms: &Terms) -> bool {
    let output = done.completion.saturating_sub(offered.completion);
    done.prompt > offered.prompt
        || output >= terms.ack_tokens.max(1)
        || (output > 0 && ms_since_offer >= u64::from(terms.ack_interval_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use satgrid_types::MsatPerMtok;

    fn progress(prompt: u32, acked: (u32, u32), funds: u64) -> Progress {
        Progress {
            prompt_tokens: prompt,
            max_output: 1_000,
            acked: TokenUsage { prompt: acked.0, completion: acked.1, ..TokenUsage::default() },
            funds: Msat(funds),
            rates: RateCard {
                input: MsatPerMtok(1_000_000),
                cached_input: MsatPerMtok(500_000),
                output: MsatPerMtok(10_000_000),
                per_request: Msat(0),
            },
            terms: Terms::default(),
        }
    }
    #[track_caller]
    fn check(p: Progress, prompt_upto: u32, output_upto: u32) {
        assert_eq!(grant(&p), Grant { prompt_upto, output_upto });
    }

    #[test]
    fn windows_and_funds_bound_a_grant() {
        check(progress(100, (0, 0), 100_000), 100, 256); // window
        check(progress(100, (0, 0), 1_100), 100, 100); // funds: 100 prompt + 100 x 10
        check(progress(100, (0, 0), 99), 0, 0); // not even the prompt
        check(progress(1_000, (0, 0), 100_000), 512, 0); // one piece
        check(progress(1_000, (512, 0), 100_000), 1_000, 256); // the second, and output
        check(progress(1_000, (512, 0), 600), 512, 0); // the second piece is not covered
        check(progress(100, (100, 900), 100_000), 100, 1_000); // max_output
        check(progress(100, (100, 128), 100_000), 100, 384);
    }

    #[test]
    fn acknowledgements_fall_due() {
        let at = |prompt, completion| TokenUsage { prompt, completion, ..TokenUsage::default() };
        let terms = Terms::default();
        assert!(!ack_due(&at(10, 0), &at(10, 0), 5_000, &terms));
        assert!(ack_due(&at(10, 0), &at(0, 0), 0, &terms));
        assert!(!ack_due(&at(10, 127), &at(10, 0), 999, &terms));
        assert!(ack_due(&at(10, 128), &at(10, 0), 0, &terms));
        assert!(ack_due(&at(10, 1), &at(10, 0), 1_000, &terms));
    }

    proptest! {
        #[test]
        fn a_grant_is_always_covered_and_never_shrinks_with_funds(prompt in 1u32..5_000, acked in 0u32..5_000, funds in 0u64..100_000, more in 0u64..100_000) {
            let p = progress(prompt, (acked.min(prompt), 0), funds);
            let g = grant(&p);
            if g.prompt_upto > p.acked.prompt || g.output_upto > 0 {
                prop_assert!(covers(&p, g));
            }
            let richer = grant(&Progress { funds: Msat(funds + more), ..p });
            prop_assert!(richer.prompt_upto >= g.prompt_upto && richer.output_upto >= g.output_upto);
        }
    }
}
