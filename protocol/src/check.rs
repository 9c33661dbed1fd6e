//! What a consumer checks before it signs or pays. Every fault names the rule that was broken; the signed statement that
//! broke it is kept as evidence.

use crate::session::{ReceiptFacts, SessionError, SessionState, SliceStatus};
use satgrid_ledger::statements::{Ack, ExpertCount, ExpertFault, Receipt, RequestOpen, SliceDescriptor, check_work};
use satgrid_pricing::{charge, numerators};
use satgrid_types::{
    Digest, Msat, NodeKey, Numerators, PartUsage, Quote, RequestId, TokenUsage, UnixMs, VerifiedListing,
};
use std::collections::BTreeMap;
use thiserror::Error;

/// Longest validity that a quote may claim, in ms.
const MAX_VALIDITY_MS: u64 = 24 * 3_600 * 1_000;
/// Clocks may differ by this much, in ms.
const CLOCK_SKEW_MS: u64 = 5 * 60 * 1_000;

/// What is wrong with a quote. The provider's fault, all of it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum QuoteFault {
    #[error("the quote is for another session key")]
    OtherConsumer,
    #[error("the quote names another {what} than the listing")]
    OtherThanListed { what: &'static str },
    #[error("the quote is dearer than the signed listing")]
    Dearer,
    #[error("cached input at {cached} costs more than input at {input}: cached counts are the provider's word")]
    CachedDearer { cached: u64, input: u64 },
    #[error("the quote is not valid now")]
    NotValidNow,
    #[error("the quote's terms cannot be worked with: {what}")]
    Terms { what: &'static str },
}

impl QuoteFault {
    /// A stable word for kept proofs and counters.
    pub const fn rule(&self) -> &'static str {
        match self {
            QuoteFault::OtherConsumer => "quote-other-consumer",
            QuoteFault::OtherThanListed { .. } => "quote-other-than-listed",
            QuoteFault::Dearer => "quote-dearer-than-listing",
            QuoteFault::CachedDearer { .. } => "quote-cached-dearer",
            QuoteFault::NotValidNow => "quote-not-valid",
            QuoteFault::Terms { .. } => "quote-terms",
        }
    }
}

/// Checks a quote against the listing that it names and the session that it is for.
pub fn quote(quote: &Quote, listing: &VerifiedListing, consumer: &NodeKey, now: UnixMs) -> Result<(), QuoteFault> {
    let same = |is: bool, what: &'static str| if is { Ok(()) } else { Err(QuoteFault::OtherThanListed { what }) };
    if quote.consumer != *consumer {
        return Err(QuoteFault::OtherConsumer);
    }
    same(quote.version == Quote::VERSION, "version")?;
    same(quote.listing == listing.id(), "listing")?;
    same(quote.provider == listing.node_key, "provider key")?;
    same(quote.lightning_node == listing.lightning_node, "Lightning node")?;
    same(quote.model_root == listing.model_root, "model root")?;
    same(quote.tokenizer == listing.tokenizer, "tokenizer")?;
    same(quote.quantisation == listing.quantisation, "quantisation")?;
    same(quote.build == listing.build && quote.instruction_set == listing.instruction_set, "engine build")?;
    same(listing.profiles.contains(&quote.profile), "engine profile")?;
    if !quote.rates.is_within(&listing.rates) {
        return Err(QuoteFault::Dearer);
    }
    if quote.rates.cached_input > quote.rates.input {
        return Err(QuoteFault::CachedDearer { cached: quote.rates.cached_input.0, input: quote.rates.input.0 });
    }
    let issued_later = quote.issued_at.since(now) > CLOCK_SKEW_MS;
    if issued_later || quote.valid_until <= now || quote.valid_until.since(quote.issued_at) > MAX_VALIDITY_MS {
        return Err(QuoteFault::NotValidNow);
    }
    let t = &quote.terms;
    let bad = |what| Err(QuoteFault::Terms { what });
    if t.min_slice > t.max_slice || t.max_slice.is_zero() {
        return bad("slice bounds");
    }
    if t.ack_tokens == 0 || t.window_tokens < t.ack_tokens || t.ack_interval_ms == 0 {
        return bad("acknowledgement window");
    }
    if t.prefill_piece == 0 || t.invoice_expiry_secs < 10 {
        return bad("prefill piece or invoice expiry");
    }
    Ok(())
}

/// What is wrong with a slice's terms or invoice.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DescriptorFault {
    #[error("the invoice is for slice {got}, {wanted} was asked for")]
    OtherSlice { got: u32, wanted: u32 },
    #[error("the invoice is over {got}, {wanted} was asked for")]
    OtherAmount { got: Msat, wanted: Msat },
    #[error("the invoice's terms name another session, quote, key or receipt")]
    OtherTerms,
}

/// Checks that an invoice's terms are the ones asked for.
pub fn descriptor(got: &SliceDescriptor, wanted: &SliceDescriptor) -> Result<(), DescriptorFault> {
    if got.k != wanted.k {
        return Err(DescriptorFault::OtherSlice { got: got.k, wanted: wanted.k });
    }
    if got.amount != wanted.amount {
        return Err(DescriptorFault::OtherAmount { got: got.amount, wanted: wanted.amount });
    }
    // The previous receipt may be one that crossed the request for this invoice; both ends of that race are ours.
    let same = SliceDescriptor { previous_receipt: got.previous_receipt, ..wanted.clone() };
    if *got == same { Ok(()) } else { Err(DescriptorFault::OtherTerms) }
}

/// What this consumer has itself counted of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Output ids received, in order, without gaps.
    pub received: u32,
    /// Running hash over them.
    pub running_hash: Digest,
    /// Of a worker: the most that was ordered of it, kind by kind.
    pub ordered: Option<PartUsage>,
    /// Of texts that are embedded: prompt tokens up to the last one of the first text whose row has not come. None: all.
    pub embedded: Option<u32>,
}

/// What is wrong with an acknowledgement or a receipt. The provider's fault.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CountFault {
    #[error("it speaks of another session or request, or is out of order")]
    OutOfOrder,
    #[error("{claimed} output tokens claimed, {received} received")]
    Output { claimed: u32, received: u32 },
    #[error("{claimed} prompt tokens claimed, the prompt has {prompt}")]
    Prompt { claimed: u32, prompt: u32 },
    #[error("{claimed} prompt tokens claimed, the rows that came cover fewer than {short_of}")]
    Rows { claimed: u32, short_of: u32 },
    #[error("part work claimed that was not ordered: {claimed:?} of {ordered:?}")]
    Part { claimed: Option<PartUsage>, ordered: Option<PartUsage> },
    #[error("expert rows: {why}")]
    Experts { why: String },
    #[error("a count is smaller than before, or contradicts another")]
    Inconsistent,
    #[error("{claimed} claimed, {computed} computed at the quote's rates")]
    Cost { claimed: Msat, computed: Msat },
    #[error("the running hash is not that of the received tokens")]
    RunningHash,
    #[error("`{field}` is not what both sides know it to be")]
    Field { field: &'static str },
    #[error(transparent)]
    State(#[from] SessionError),
}

impl CountFault {
    /// A stable word for kept proofs and counters.
    pub const fn rule(&self) -> &'static str {
        match self {
            CountFault::OutOfOrder => "count-out-of-order",
            CountFault::Output { .. } => "overcount-output",
            CountFault::Prompt { .. } => "overcount-prompt",
            CountFault::Rows { .. } => "overcount-rows",
            CountFault::Part { .. } => "overcount-part",
            CountFault::Experts { .. } => "expert-counts",
            CountFault::Inconsistent => "count-inconsistent",
            CountFault::Cost { .. } => "overcharge",
            CountFault::RunningHash => "output-hash",
            CountFault::Field { .. } => "receipt-field",
            CountFault::State(_) => "receipt-state",
        }
    }
}

/// Checks an acknowledgement against the consumer's own count: never the provider's figure, never a re-tokenised text.
pub fn ack(state: &SessionState, id: &RequestId, offered: &Ack, counted: &Counted) -> Result<(), CountFault> {
    let request = state.request_state(id).ok_or(SessionError::UnknownRequest(*id))?;
    let in_order = offered.version == Ack::VERSION
        && offered.session == state.id()
        && offered.request == *id
        && offered.seq == request.acked_seq().saturating_add(1);
    if !in_order {
        return Err(CountFault::OutOfOrder);
    }
    usage(&offered.usage, &request.acked(), request.open(), counted)?;
    let computed = numerators(&offered.usage, request.rates()).map_err(SessionError::Charge)?;
    cost(offered.numerators, computed, offered.cost, charge(computed))?;
    if offered.running_hash != counted.running_hash {
        return Err(CountFault::RunningHash);
    }
    Ok(())
}

/// Checks a receipt: everything that both sides know is computed again, and only the provider's account of the run
/// (times, finish reason, engine name) is taken as given. Of a worker that evaluated experts, `returned` is what came back of
/// each expert. Returns what the consumer may sign.
pub fn receipt(
    state: &SessionState,
    id: &RequestId,
    offered: &Receipt,
    counted: &Counted,
    returned: &[ExpertCount],
    private_hash: Digest,
) -> Result<(), CountFault> {
    let request = state.request_state(id).ok_or(SessionError::UnknownRequest(*id))?;
    usage(&offered.usage, &request.acked(), request.open(), counted)?;
    if offered.part.map(|work| work.order) != request.open().part {
        return Err(CountFault::Field { field: "part" });
    }
    experts(offered, returned)?;
    for slice in &offered.slices {
        let known = state.slices().get(&slice.k).is_some_and(|s| {
            s.amount == slice.amount
                && s.payment_hash == Some(slice.payment_hash)
                && matches!(s.status, SliceStatus::Attempted | SliceStatus::Paid)
        });
        if !known || state.is_receipted(slice.k) {
            return Err(CountFault::Field { field: "slices" });
        }
    }
    if offered.slices.windows(2).any(|pair| pair[0].k >= pair[1].k) || offered.slices.len() > Receipt::MAX_SLICES {
        return Err(CountFault::Field { field: "slices" });
    }
    let facts = ReceiptFacts {
        model: offered.model.clone(),
        engine: offered.engine.clone(),
        usage: offered.usage,
        finish: offered.finish,
        started_at: offered.started_at,
        first_token_ms: offered.first_token_ms,
        duration_ms: offered.duration_ms,
        private_hash,
        error: offered.error.clone(),
        slices: offered.slices.clone(),
        part: offered.part,
        split: offered.split.clone().zip(offered.stage_root),
        expert_rows: offered.expert_rows.clone(),
        expert_split: offered.expert_split.clone().zip(offered.expert_root),
    };
    let ours = state.receipt(id, facts)?;
    cost(offered.numerators, ours.numerators, offered.cost, ours.cost)?;
    first_difference(offered, &ours).map_or(Ok(()), |field| Err(CountFault::Field { field }))
}

/// A worker's counters add up to what it charges for, and leave out nothing that came back: together with the sum, which is
/// bounded by what was ordered, so much that the lead's own account holds at every layer.
fn experts(offered: &Receipt, returned: &[ExpertCount]) -> Result<(), CountFault> {
    let counts = offered.expert_rows.as_deref();
    let fault = |fault: ExpertFault| CountFault::Experts { why: fault.to_string() };
    match &offered.part {
        Some(work) => check_work(&work.order, &offered.usage.part.unwrap_or_default(), counts).map_err(fault)?,
        None if counts.is_some() => return Err(CountFault::Field { field: "expert_rows" }),
        None => {}
    }
    let stated: BTreeMap<(u32, u32), u64> =
        counts.unwrap_or_default().iter().map(|count| ((count.layer, count.expert), count.rows)).collect();
    for count in returned {
        let rows = stated.get(&(count.layer, count.expert)).copied().unwrap_or(0);
        if rows < count.rows {
            let (layer, expert) = (count.layer, count.expert);
            let why = format!("{rows} rows of expert {expert} of layer {layer} are stated, {} came back", count.rows);
            return Err(CountFault::Experts { why });
        }
    }
    Ok(())
}

fn usage(claimed: &TokenUsage, acked: &TokenUsage, open: &RequestOpen, counted: &Counted) -> Result<(), CountFault> {
    let prompt = open.prompt_tokens;
    let fits = match (&claimed.part, open.part, counted.ordered) {
        (None, None, _) => true,
        // A worker that did nothing need not count.
        (None, Some(_), _) => true,
        (Some(part), Some(order), Some(ordered)) => order.allows(part) && ordered.covers(part),
        (Some(_), _, _) => false,
    };
    if !fits {
        return Err(CountFault::Part { claimed: claimed.part, ordered: counted.ordered });
    }
    if claimed.completion != counted.received {
        return Err(CountFault::Output { claimed: claimed.completion, received: counted.received });
    }
    if claimed.prompt > prompt {
        return Err(CountFault::Prompt { claimed: claimed.prompt, prompt });
    }
    if let Some(short_of) = counted.embedded
        && claimed.prompt >= short_of
    {
        return Err(CountFault::Rows { claimed: claimed.prompt, short_of });
    }
    if !claimed.is_consistent() || !claimed.covers(acked) {
        return Err(CountFault::Inconsistent);
    }
    Ok(())
}

fn cost(claimed: Numerators, computed: Numerators, cost: Msat, computed_cost: Msat) -> Result<(), CountFault> {
    if claimed == computed && cost == computed_cost {
        Ok(())
    } else {
        Err(CountFault::Cost { claimed: cost, computed: computed_cost })
    }
}

/// The first field in which two receipts differ.
fn first_difference(a: &Receipt, b: &Receipt) -> Option<&'static str> {
    if a == b {
        return None;
    }
    let fields: [(bool, &'static str); 17] = [
        (a.session == b.session, "session"),
        (a.seq == b.seq, "seq"),
        (a.previous == b.previous, "previous"),
        (a.request == b.request, "request"),
        (a.quote == b.quote, "quote"),
        (a.listing == b.listing, "listing"),
        (a.model_root == b.model_root, "model_root"),
        (a.tokenizer == b.tokenizer && a.quantisation == b.quantisation, "tokenizer"),
        (a.profile == b.profile && a.build == b.build && a.instruction_set == b.instruction_set, "build"),
        (a.rates == b.rates, "rates"),
        (a.cumulative_numerators == b.cumulative_numerators, "cumulative_numerators"),
        (a.cumulative_cost == b.cumulative_cost, "cumulative_cost"),
        (a.cumulative_paid == b.cumulative_paid, "cumulative_paid"),
        (a.private_hash == b.private_hash, "private_hash"),
        (a.last_ack == b.last_ack, "last_ack"),
        (a.provider == b.provider, "provider"),
        (a.consumer == b.consumer, "consumer"),
    ];
    fields.iter().find(|(same, _)| !same).map_or(Some("other"), |(_, field)| Some(field))
}
