//! How far work may run ahead: of acknowledgements (the provider's risk) and of money (nobody's, where all is prepaid).
//!
//! The provider grants its engine positions in steps. A grant is the smallest of what was asked for, what the
//! acknowledgement window allows and what the funds cover:
//!
//! * prompt: at most one unacknowledged piece (`prefill_piece` tokens), granted only as a whole piece that is covered;
//! * output: at most `window_tokens` beyond the last countersigned acknowledgement, as many as the funds cover.
//!
//! Work on a part of a model runs on the same rules: its units (positions through the ordered layers, or expert rows) take
//! the place of output tokens, at what one unit costs. [`Meter`] says which a request is.

use satgrid_ledger::statements::{PartOrder, RequestOpen};
use satgrid_pricing::{ChargeError, PER_MILLION, cost_alone, numerators};
use satgrid_types::{Msat, MsatPerMtok, RateCard, Terms, TokenUsage};

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
        TokenUsage { prompt: self.prompt_upto, completion: self.output_upto, ..TokenUsage::default() }
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
    let usage = TokenUsage { prompt: piece, completion: output, ..TokenUsage::default() };
    cost_alone(&usage, rates).ok()
}

/// A further reservation is at least this part of what is reserved already.
const GROWTH: u64 = 32;

/// What a request is metered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meter {
    Tokens {
        prompt_tokens: u32,
        max_output: u32,
    },
    /// Work on a part of a model: a unit is a position through the ordered layers, or an expert row.
    Part(PartOrder),
}

impl Meter {
    pub fn of(open: &RequestOpen) -> Meter {
        match open.part {
            Some(order) => Meter::Part(order),
            None => Meter::Tokens { prompt_tokens: open.prompt_tokens, max_output: open.max_output },
        }
    }

    /// The largest grant that windows and funds allow. For part work `output_upto` counts units.
    pub fn grant(&self, acked: &TokenUsage, funds: Msat, rates: &RateCard, terms: &Terms) -> Grant {
        let progress = |prompt_tokens, max_output, acked, funds, rates| {
            grant(&Progress { prompt_tokens, max_output, acked, funds, rates, terms: *terms })
        };
        match self {
            Meter::Tokens { prompt_tokens, max_output } => progress(*prompt_tokens, *max_output, *acked, funds, *rates),
            Meter::Part(order) => {
                let most = u32::try_from(order.max_positions).unwrap_or(u32::MAX);
                let funds = funds.saturating_sub(rates.per_request);
                progress(0, most, self.units(acked), funds, self.unit_rates(rates))
            }
        }
    }

    /// What all the work that a grant allows costs: what must be reserved for it.
    pub fn cost(&self, grant: Grant, rates: &RateCard) -> Result<Msat, ChargeError> {
        match self {
            Meter::Tokens { .. } => cost_alone(&grant.usage(), rates),
            Meter::Part(_) => cost_alone(&grant.usage(), &self.unit_rates(rates)),
        }
    }

    /// What is reserved further so that a grant is covered, as far as it is `free`: at least a part of what is reserved
    /// already, within what the request can cost. Reservations grow with the work; there is not one for each acknowledgement,
    /// whose number is the peer's to choose, and all of which the request's end names in one entry.
    pub fn further(&self, grant: Grant, reserved: Msat, free: Msat, rates: &RateCard) -> Result<Msat, ChargeError> {
        let lacking = self.cost(grant, rates)?.saturating_sub(reserved);
        if lacking.is_zero() {
            return Ok(Msat::ZERO);
        }
        let rest = self.cost(self.whole(), rates).unwrap_or(Msat::MAX).saturating_sub(reserved);
        Ok(lacking.max(rest.min(Msat(reserved.0 / GROWTH))).min(free))
    }

    /// All that the request asks for.
    fn whole(&self) -> Grant {
        match self {
            Meter::Tokens { prompt_tokens, max_output } => {
                Grant { prompt_upto: *prompt_tokens, output_upto: *max_output }
            }
            Meter::Part(order) => {
                Grant { prompt_upto: 0, output_upto: u32::try_from(order.max_positions).unwrap_or(u32::MAX) }
            }
        }
    }

    /// What must be available before the request starts.
    pub fn start_cost(&self, rates: &RateCard, terms: &Terms) -> Option<Msat> {
        match self {
            Meter::Tokens { prompt_tokens, max_output } => start_cost(*prompt_tokens, *max_output, rates, terms),
            // Never less than the window, which holds at least one batch of the engine.
            Meter::Part(order) => {
                let window = u64::from(terms.window_tokens.max(1)).min(order.max_positions);
                let output_upto = u32::try_from(window).unwrap_or(u32::MAX);
                self.cost(Grant { prompt_upto: 0, output_upto }, rates).ok()
            }
        }
    }

    /// What the first grant reserves where money does not limit it.
    pub fn first_reserve(&self, rates: &RateCard, terms: &Terms) -> Msat {
        let grant = self.grant(&TokenUsage::default(), Msat::MAX, rates, terms);
        self.cost(grant, rates).unwrap_or(Msat::MAX)
    }

    /// What must be free beside a running request's reservation so that it does not wait for a payment: `low` water, or the
    /// next two prompt pieces, and never more than the rest of it can cost.
    pub fn ahead(&self, acked: &TokenUsage, reserved: Msat, low: Msat, rates: &RateCard, terms: &Terms) -> Msat {
        let cost = |prompt_upto, output_upto| {
            self.cost(Grant { prompt_upto, output_upto }, rates).unwrap_or(Msat::MAX).saturating_sub(reserved)
        };
        match self {
            Meter::Tokens { prompt_tokens, max_output } => {
                let pieces = terms.prefill_piece.max(1).saturating_mul(2);
                let prompt = acked.prompt.saturating_add(pieces).min(*prompt_tokens);
                low.max(cost(prompt, 0)).min(cost(*prompt_tokens, *max_output))
            }
            Meter::Part(order) => {
                let most = u32::try_from(order.max_positions).unwrap_or(u32::MAX);
                let next = self.units(acked).completion.saturating_add(terms.window_tokens.max(1).saturating_mul(2));
                low.max(cost(0, next.min(most))).min(cost(0, most))
            }
        }
    }

    pub fn ack_due(&self, done: &TokenUsage, offered: &TokenUsage, ms_since_offer: u64, terms: &Terms) -> bool {
        ack_due(&self.units(done), &self.units(offered), ms_since_offer, terms)
    }

    /// Whether the grant allows more than what is done.
    pub fn goes_on(&self, grant: Grant, done: &TokenUsage) -> bool {
        let done = self.units(done);
        match self {
            Meter::Tokens { prompt_tokens, .. } if done.prompt < *prompt_tokens => grant.prompt_upto > done.prompt,
            // Nothing follows texts that are embedded.
            Meter::Tokens { max_output: 0, .. } => true,
            Meter::Tokens { .. } | Meter::Part(_) => grant.output_upto > done.completion,
        }
    }

    /// Usage as the meter counts it.
    pub fn units(&self, usage: &TokenUsage) -> TokenUsage {
        match self {
            Meter::Tokens { .. } => *usage,
            Meter::Part(order) => {
                let part = usage.part.unwrap_or_default();
                let units = match order.layers {
                    Some(_) => part.positions().unwrap_or(u64::MAX),
                    None => part.expert_rows,
                };
                let completion = u32::try_from(units).unwrap_or(u32::MAX);
                TokenUsage { completion, ..TokenUsage::default() }
            }
        }
    }

    /// What a unit costs, where output tokens stand.
    fn unit_rates(&self, rates: &RateCard) -> RateCard {
        let unit = match self {
            Meter::Tokens { .. } => return *rates,
            Meter::Part(PartOrder { layers: Some(range), .. }) => {
                rates.position_layer.unwrap_or_default().0.saturating_mul(range.layers().into())
            }
            Meter::Part(PartOrder { layers: None, .. }) => rates.expert_row.unwrap_or_default().0,
        };
        RateCard { output: MsatPerMtok(unit), per_request: rates.per_request, ..RateCard::default() }
    }
}

/// The terms of a worker whose window is given in msat: in units, rounded up, and never less than one batch of its engine.
pub fn part_terms(terms: &Terms, order_layers: u32, rates: &RateCard, window: Msat, batch: u32) -> Terms {
    let unit = rates.position_layer.unwrap_or_default().0.saturating_mul(order_layers.into());
    window_of(terms, unit, window, batch, MAX_PART_WINDOW)
}

/// The same where experts are sold: `batch` is in expert rows.
pub fn expert_terms(terms: &Terms, rates: &RateCard, window: Msat, batch: u32) -> Terms {
    window_of(terms, rates.expert_row.unwrap_or_default().0, window, batch, MAX_EXPERT_WINDOW)
}

fn window_of(terms: &Terms, unit: u64, window: Msat, batch: u32, most: u32) -> Terms {
    let units = window.0.saturating_mul(PER_MILLION).checked_div(unit).unwrap_or(u64::MAX);
    let batch = batch.clamp(1, most / 2);
    let window_tokens = u32::try_from(units).unwrap_or(u32::MAX).clamp(batch.saturating_mul(2), most);
    Terms { window_tokens, ack_tokens: batch.min(window_tokens), ..*terms }
}

/// Positions that may be unacknowledged, whatever they cost.
pub const MAX_PART_WINDOW: u32 = 8_192;
/// Expert rows that may be unacknowledged, whatever they cost.
pub const MAX_EXPERT_WINDOW: u32 = 65_536;

fn covers(p: &Progress, grant: Grant) -> bool {
    cost_alone(&grant.usage(), &p.rates).is_ok_and(|cost| cost <= p.funds)
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
    use satgrid_types::{LayerRange, MsatPerMtok, NodeKey, PartUsage, RequestId, WireType, WorkKind};

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
                ..RateCard::default()
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
    fn reservations_are_few_however_often_a_request_is_acknowledged() {
        let meter = Meter::Tokens { prompt_tokens: 100, max_output: 200_000 };
        let (rates, terms) =
            (progress(100, (0, 0), 0).rates, Terms { window_tokens: 1, ack_tokens: 1, ..Terms::default() });
        let (mut reserved, mut holds) = (Msat::ZERO, 0);
        for completion in 0..200_000 {
            let acked = TokenUsage { prompt: 100, completion, ..TokenUsage::default() };
            let grant = meter.grant(&acked, Msat::sat(1_000_000), &rates, &terms);
            let more = meter.further(grant, reserved, Msat::MAX, &rates).unwrap();
            reserved = reserved.saturating_add(more);
            holds += usize::from(!more.is_zero());
            assert!(meter.cost(grant, &rates).unwrap() <= reserved);
        }
        assert!(holds < crate::session::MAX_HOLDS / 2, "{holds}");
        assert_eq!(Ok(reserved), meter.cost(meter.whole(), &rates), "and never more than it can cost");
        let grant = Grant { prompt_upto: 100, output_upto: 9 };
        assert_eq!(meter.further(grant, Msat(180), Msat(4), &rates), Ok(Msat(4)), "as far as it is free");
        assert_eq!(meter.further(grant, Msat(180), Msat(99), &rates), Ok(Msat(10)));
        assert_eq!(meter.further(grant, Msat(190), Msat(99), &rates), Ok(Msat::ZERO));
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

    #[test]
    fn part_work_is_metered_in_positions() {
        let order = PartOrder {
            layers: LayerRange::new(2, 12),
            lead: NodeKey([1; 32]),
            request: RequestId([2; 32]),
            wire: WireType::F32,
            max_positions: 5_000,
        };
        let meter = Meter::Part(order);
        // 10 layers at 100 msat per thousand position-layers: a msat a position.
        let rates =
            RateCard { position_layer: Some(MsatPerMtok(100_000)), per_request: Msat(5), ..RateCard::default() };
        let terms = part_terms(&Terms::default(), 10, &rates, Msat(600), 256);
        assert_eq!((terms.window_tokens, terms.ack_tokens), (600, 256));
        assert_eq!(part_terms(&Terms::default(), 10, &rates, Msat(3), 256).window_tokens, 512, "two batches at least");
        let grant = |done: u64, funds| {
            let part = PartUsage::default().plus(WorkKind::Prefill, done, 10).unwrap();
            meter.grant(&TokenUsage::of_part(part), Msat(funds), &rates, &terms).output_upto
        };
        assert_eq!(grant(0, 10_000), 600);
        assert_eq!(grant(0, 105), 100, "funds, less what a request costs");
        assert_eq!(grant(4_700, 10_000), 5_000, "the order");
        assert_eq!(meter.start_cost(&rates, &terms), Some(Msat(605)));
        let at = |positions| TokenUsage::of_part(PartUsage::default().plus(WorkKind::Decode, positions, 10).unwrap());
        assert!(!meter.ack_due(&at(255), &at(0), 999, &terms) && meter.ack_due(&at(256), &at(0), 0, &terms));
        assert!(meter.ack_due(&at(1), &at(0), 1_000, &terms));
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
