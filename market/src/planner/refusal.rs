//! The filter: what rules a listing out for a demand.

use satgrid_pricing::{charge, cost_alone, numerators};
use satgrid_types::{
    EngineProfile, ModelRoot, Msat, MsatPerMtok, Numerators, Part, TokenizerHash, UnixMs, VerifiedListing,
};
use thiserror::Error;

use crate::demand::{Demand, EngineIdentity, Wanted};
use crate::reputation::{REFUSED_AT, Record};

/// Which bound on the price was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PriceItem {
    Input,
    Output,
}

impl core::fmt::Display for PriceItem {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            PriceItem::Input => "input",
            PriceItem::Output => "output",
        })
    }
}

/// Why a listing was not chosen: the first of these that holds, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WhyNot {
    #[error("claims the name, but the catalogue has another root than {root} under it")]
    UnknownRoot { root: ModelRoot },
    #[error("has the tokenizer {listed}, the catalogue says {expected}")]
    WrongTokenizer { listed: TokenizerHash, expected: TokenizerHash },
    #[error("expired at {expires_at}")]
    Expired { expires_at: u64 },
    #[error("offers {part} of the model; plans of several parts are not formed yet")]
    PartOnly { part: String },
    #[error("gives no address")]
    NoAddress,
    #[error("has no slot")]
    NoSlot,
    #[error("already failed this request")]
    AlreadyFailed,
    #[error("you ignore it")]
    Ignored,
    #[error("is not among those you allow")]
    NotAllowed,
    #[error("is not in your order, and you allow no fallback")]
    NotInOrder,
    #[error("has {points} penalty points with us, {REFUSED_AT} keep a provider out")]
    Penalised { points: u64 },
    #[error("does not offer the {wanted} profile")]
    Profile { wanted: EngineProfile },
    #[error("runs another engine, which would not continue the same text")]
    OtherEngine,
    #[error("is quantised as {listed}")]
    Quantisation { listed: String },
    #[error("holds {context_length} tokens, {needed} are needed")]
    ContextTooShort { context_length: u32, needed: u64 },
    #[error("asks {asked} msat per million {item} tokens, your bound is {bound}", asked = .asked.0, bound = .bound.0)]
    TooDear { item: PriceItem, asked: MsatPerMtok, bound: MsatPerMtok },
    #[error("asks {asked} per request, your bound is {bound}")]
    RequestTooDear { asked: Msat, bound: Msat },
    #[error("could cost {cost} in all, your bound is {bound}")]
    TotalTooDear { cost: Msat, bound: Msat },
    #[error("asks a price beyond all bounds")]
    PriceOverflow,
}

impl WhyNot {
    /// A stable word for counters and for JSON.
    pub const fn reason(&self) -> &'static str {
        match self {
            WhyNot::UnknownRoot { .. } => "unknown_root",
            WhyNot::WrongTokenizer { .. } => "wrong_tokenizer",
            WhyNot::Expired { .. } => "expired",
            WhyNot::PartOnly { .. } => "part_only",
            WhyNot::NoAddress => "no_address",
            WhyNot::NoSlot => "no_slot",
            WhyNot::AlreadyFailed => "already_failed",
            WhyNot::Ignored => "ignored",
            WhyNot::NotAllowed => "not_allowed",
            WhyNot::NotInOrder => "not_in_order",
            WhyNot::Penalised { .. } => "penalised",
            WhyNot::Profile { .. } => "profile",
            WhyNot::OtherEngine => "other_engine",
            WhyNot::Quantisation { .. } => "quantisation",
            WhyNot::ContextTooShort { .. } => "context_too_short",
            WhyNot::TooDear { .. } => "too_dear",
            WhyNot::RequestTooDear { .. } => "request_too_dear",
            WhyNot::TotalTooDear { .. } => "total_too_dear",
            WhyNot::PriceOverflow => "price_overflow",
        }
    }
}

/// What a listing that fits would cost.
pub(super) struct Cost {
    pub(super) expected: Numerators,
    pub(super) expected_cost: Msat,
    pub(super) max_cost: Msat,
}

/// The first thing that rules `listing` out, or what it would cost.
pub(super) fn check(now: UnixMs, listing: &VerifiedListing, demand: &Demand, record: &Record) -> Result<Cost, WhyNot> {
    check_model(listing, demand)?;
    check_live(now, listing)?;
    check_wishes(listing, demand)?;
    let points = record.points(now);
    if points >= REFUSED_AT {
        return Err(WhyNot::Penalised { points });
    }
    check_engine(listing, demand)?;
    check_price(listing, demand)
}

fn check_model(listing: &VerifiedListing, demand: &Demand) -> Result<(), WhyNot> {
    let Wanted::Roots(roots) = &demand.wanted else { return Ok(()) };
    match roots.get(&listing.model_root) {
        None => Err(WhyNot::UnknownRoot { root: listing.model_root }),
        Some(expected) if *expected != listing.tokenizer => {
            Err(WhyNot::WrongTokenizer { listed: listing.tokenizer, expected: *expected })
        }
        Some(_) => Ok(()),
    }
}

fn check_live(now: UnixMs, listing: &VerifiedListing) -> Result<(), WhyNot> {
    if !listing.is_live(now) {
        return Err(WhyNot::Expired { expires_at: listing.expires_at });
    }
    if listing.part != Part::Whole {
        return Err(WhyNot::PartOnly { part: listing.part.to_string() });
    }
    if listing.addresses.is_empty() {
        return Err(WhyNot::NoAddress);
    }
    if listing.slots == 0 {
        return Err(WhyNot::NoSlot);
    }
    Ok(())
}

fn check_wishes(listing: &VerifiedListing, demand: &Demand) -> Result<(), WhyNot> {
    if demand.failed.contains(&listing.node_key) {
        return Err(WhyNot::AlreadyFailed);
    }
    if demand.ignore.iter().any(|pattern| pattern.matches(listing)) {
        return Err(WhyNot::Ignored);
    }
    if !demand.only.is_empty() && !demand.only.iter().any(|pattern| pattern.matches(listing)) {
        return Err(WhyNot::NotAllowed);
    }
    let ordered = demand.order.iter().any(|pattern| pattern.matches(listing));
    if !demand.order.is_empty() && !demand.allow_fallbacks && !ordered {
        return Err(WhyNot::NotInOrder);
    }
    Ok(())
}

fn check_engine(listing: &VerifiedListing, demand: &Demand) -> Result<(), WhyNot> {
    if let Some(wanted) = demand.profile.filter(|wanted| !listing.profiles.contains(wanted)) {
        return Err(WhyNot::Profile { wanted });
    }
    if demand.same_engine.as_ref().is_some_and(|engine| *engine != EngineIdentity::of(listing)) {
        return Err(WhyNot::OtherEngine);
    }
    let accepted = &demand.quantisations;
    if !accepted.is_empty() && !accepted.iter().any(|wanted| wanted.eq_ignore_ascii_case(&listing.quantisation)) {
        return Err(WhyNot::Quantisation { listed: listing.quantisation.clone() });
    }
    let needed = u64::from(demand.prompt_tokens) + u64::from(demand.max_output_tokens);
    if u64::from(listing.context_length) < needed {
        return Err(WhyNot::ContextTooShort { context_length: listing.context_length, needed });
    }
    Ok(())
}

fn check_price(listing: &VerifiedListing, demand: &Demand) -> Result<Cost, WhyNot> {
    let rates = &listing.rates;
    let max = &demand.max_price;
    for (item, asked, bound) in
        [(PriceItem::Input, rates.input, max.input), (PriceItem::Output, rates.output, max.output)]
    {
        if let Some(bound) = bound.filter(|bound| asked > *bound) {
            return Err(WhyNot::TooDear { item, asked, bound });
        }
    }
    if let Some(bound) = max.per_request.filter(|bound| rates.per_request > *bound) {
        return Err(WhyNot::RequestTooDear { asked: rates.per_request, bound });
    }
    let usage = |output| demand.usage(&listing.node_key, output);
    let max_cost = cost_alone(&usage(demand.max_output_tokens), rates).map_err(|_| WhyNot::PriceOverflow)?;
    if let Some(bound) = max.total.filter(|bound| max_cost > *bound) {
        return Err(WhyNot::TotalTooDear { cost: max_cost, bound });
    }
    let output = demand.expected_output_tokens.min(demand.max_output_tokens);
    let expected = numerators(&usage(output), rates).map_err(|_| WhyNot::PriceOverflow)?;
    Ok(Cost { expected, expected_cost: charge(expected), max_cost })
}
