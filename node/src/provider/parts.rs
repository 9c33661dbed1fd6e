//! Work on a part of a model: a lead orders it, its rows come from elsewhere, and it is metered like everything else.
//!
//! The rows never pass through this role. Its driver runs a desk for each engine that holds a part: the desk is told what
//! is admitted, how many units (positions, or expert rows) are granted and where the rows go next, and reports what was
//! done. A desk computes nothing beyond its grant.

use super::{EngineId, PartDone, Provider, ProviderAction, requests::Request};
use crate::{LinkId, StreamId};
use satgrid_engine::port::JobId;
use satgrid_ledger::statements::{ExpertCount, ExpertSplit, PartOrder, PartWork, RequestOpen};
use satgrid_protocol::{
    frame::{MAX_ADDRESSES, MAX_RESENDS, PartRoute, Refusal, StartRequest},
    hop::Leading,
    metering,
};
use satgrid_types::{Digest, NodeKey, Part, PartUsage, RequestId, SessionId, Terms, TokenUsage, UnixMs};

/// What is alive of an order beside its counts.
#[derive(Debug, Clone)]
pub(super) struct PartLive {
    order: PartOrder,
    done: PartDone,
    /// Of experts: rows by each, once the desk has ended the work.
    counts: Vec<ExpertCount>,
}

impl PartLive {
    pub(super) fn new(order: PartOrder) -> PartLive {
        // The hash over no rows at all.
        let none = satgrid_ledger::statements::RowsHash::default().value();
        let done =
            PartDone { usage: PartUsage::default(), input: none, output: none, bytes_in: 0, bytes_out: 0, busy_ms: 0 };
        PartLive { order, done, counts: Vec::new() }
    }
    /// What the receipt states.
    pub(super) fn work(&self) -> PartWork {
        let PartDone { input, output, bytes_in, bytes_out, busy_ms, .. } = self.done;
        PartWork { order: self.order, input, output, bytes_in, bytes_out, busy_ms }
    }
    /// The counters beside it, where experts evaluated rows.
    pub(super) fn counts(&self) -> Option<Vec<ExpertCount>> {
        (!self.counts.is_empty()).then(|| self.counts.clone())
    }
}

impl Provider {
    /// The terms for an offering: those of a part have their window in msat.
    pub(super) fn terms_for(&self, offering: &super::Offering) -> Terms {
        match &offering.listing.part {
            Part::Layers(range) => metering::part_terms(
                &self.config.terms,
                range.layers(),
                &offering.rates,
                self.config.part_window,
                self.config.part_batch,
            ),
            Part::Experts(_) => metering::expert_terms(
                &self.config.terms,
                &offering.rates,
                self.config.part_window,
                self.config.expert_batch,
            ),
            Part::Whole => self.config.terms,
        }
    }

    /// Why an order is not for what is sold here; `None` where it is.
    pub(super) fn order_refused(&self, engine: EngineId, open: &RequestOpen) -> Option<String> {
        let sold = self.offerings.values().find(|offering| offering.engine == engine).map(|o| &o.listing.part);
        match (sold, open.part) {
            (Some(Part::Whole), None) => None,
            (Some(Part::Layers(range)), Some(order)) if order.layers == Some(*range) && order.max_positions > 0 => None,
            (Some(Part::Experts(_)), Some(order)) if order.layers.is_none() && order.max_positions > 0 => None,
            (Some(part), _) => Some(format!("what is sold here is {part}, and that was not ordered")),
            (None, _) => Some("nothing is sold here".into()),
        }
    }

    /// What begins a part request at its desk.
    pub(super) fn admit(
        &self,
        engine: EngineId,
        job: JobId,
        session: SessionId,
        open: &RequestOpen,
        order: PartOrder,
    ) -> ProviderAction {
        let lead = self.sessions.get(&session).map_or(order.lead, |s| s.state.consumer());
        ProviderAction::Admit { engine, job, session, request: open.request, order, lead }
    }

    /// The desk's account of the work, cumulative.
    pub(super) fn worked(&mut self, now: UnixMs, job: JobId, done: PartDone) {
        let Some(&(id, request)) = self.jobs.get(&job) else { return };
        let Some(live) = self.live(id, &request) else { return };
        let Some(part) = &mut live.part else { return };
        if !done.usage.covers(&part.done.usage) || !part.order.allows(&done.usage) {
            // A desk that counts wrongly would have us sign what no lead ordered.
            return;
        }
        part.done = done;
        live.done = TokenUsage::of_part(done.usage);
        live.mark_first(now);
        self.offer_ack_if_due(now, id, request);
    }

    /// What each expert evaluated: the desk's last word on a request.
    pub(super) fn counted(&mut self, job: JobId, counts: Vec<ExpertCount>) {
        let Some(&(id, request)) = self.jobs.get(&job) else { return };
        if let Some(part) = self.live(id, &request).and_then(|live| live.part.as_mut()) {
            part.counts = counts;
        }
    }

    /// Where the rows of a request go next.
    pub(super) fn route(&mut self, link: LinkId, stream: StreamId, id: SessionId, route: PartRoute) {
        let job = self.request_on(id, link, stream).and_then(|request| self.part_job(id, &request));
        let Some((engine, job, lead)) = job else { return };
        if route.addresses.len() > MAX_ADDRESSES || route.resend.len() > MAX_RESENDS {
            return self.violation(link, "too many addresses, or too much to be sent again, in a route");
        }
        if !Leading::is_proven(&route.leading, &lead, id) {
            return self.violation(link, "the lead that the order names did not say that it pays here");
        }
        // The order itself goes out once it is written down: this must not overtake it.
        self.behind(vec![ProviderAction::Route { engine, job, route: Box::new(route) }]);
    }

    /// The lead wants no more of this request.
    pub(super) fn part_done(&mut self, link: LinkId, stream: StreamId, id: SessionId) {
        let job = self.request_on(id, link, stream).and_then(|request| self.part_job(id, &request));
        if let Some((engine, job, _)) = job {
            self.behind(vec![ProviderAction::Settle { engine, job }]);
        }
    }

    /// The running job of an order, and the lead that the order names.
    fn part_job(&self, id: SessionId, request: &RequestId) -> Option<(EngineId, JobId, NodeKey)> {
        let session = self.sessions.get(&id)?;
        let live = session.requests.get(request).filter(|live| live.is_running())?;
        Some((session.engine?, live.job, live.part.as_ref()?.order.lead))
    }

    /// How a lead put an answer together, before its run is reported as over.
    pub(super) fn split_of(&mut self, job: JobId, split: satgrid_ledger::statements::Split, root: Digest) {
        let Some(&(id, request)) = self.jobs.get(&job) else { return };
        if let Some(live) = self.live(id, &request) {
            live.split = Some((split, root));
        }
    }

    /// How a lead that bought experts accounts for its rows, before its run is reported as over.
    pub(super) fn expert_split_of(&mut self, job: JobId, split: ExpertSplit, root: Digest) {
        let Some(&(id, request)) = self.jobs.get(&job) else { return };
        if let Some(live) = self.live(id, &request) {
            live.expert_split = Some((split, root));
        }
    }

    /// The session and request that a job works for: what a lead's orders to its workers name.
    pub fn request_of(&self, job: JobId) -> Option<(SessionId, RequestId)> {
        self.jobs.get(&job).copied()
    }

    pub(super) fn refuse_order(&mut self, link: LinkId, stream: StreamId, text: String) {
        self.refuse_request(link, stream, Refusal::NotOffered, text);
    }
}

/// A part's start carries no prompt, and nothing that only a prompt needs.
pub(super) fn check_part_start(start: &StartRequest, open: &RequestOpen) -> Result<(), String> {
    let plain = start.prompt.is_empty() && open.prompt_tokens == 0 && open.max_output == 0;
    if plain && start.private.stop.is_empty() && start.private.resumed == 0 {
        Ok(())
    } else {
        Err("an order for a part of a model has no prompt and no output".into())
    }
}

impl Request {
    fn mark_first(&mut self, now: UnixMs) {
        self.first_token_at.get_or_insert(now);
    }
}
