//! Calls that a crash left open: each is settled for what the journal says that its requests have cost.
//!
//! A request that has ended cost what its last entry posted. One that had not ended is abandoned by the consumer's
//! restore at its last acknowledgement, in the order of the session's requests; the same is worked out here.

use super::detail;
use crate::door::{Charged, Till};
use crate::drive::now;
use satgrid_api::Bill;
use satgrid_ledger::{
    entry::{Draft, Entry, Evidence},
    keys::KeyKind,
    transfer::TransferOp,
};
use satgrid_ledger_sqlite::{CallEnd, CallState, KeyError, KeyStore, OpenCall};
use satgrid_pricing::with_margin;
use satgrid_protocol::session::SessionState;
use satgrid_types::{Msat, RequestId};
use std::collections::BTreeMap;

/// What the open calls' requests cost, gathered while the journal is read.
pub(crate) struct Costs {
    open: Vec<OpenCall>,
    charged: Charged,
    cost: BTreeMap<RequestId, Msat>,
    /// Of requests that the house has made: the provider's own journal has them too, from its side.
    house: BTreeMap<RequestId, Msat>,
}

impl Costs {
    pub(crate) async fn of(keys: &KeyStore) -> Result<Costs, KeyError> {
        let open = keys.open_calls().await?;
        let requests = open.iter().flat_map(|call| call.requests.iter().map(|request| (*request, Msat::ZERO)));
        let cost = requests.collect();
        let charged = Charged::of(open.iter().map(|call| call.call));
        Ok(Costs { open, charged, cost, house: BTreeMap::new() })
    }

    /// Looks at one entry of the journal in which strangers are charged.
    pub(crate) fn charge(&mut self, entry: &Entry) {
        self.charged.entry(entry);
    }

    /// Looks at one entry of the journal in which this node buys.
    pub(crate) fn entry(&mut self, entry: &Entry) {
        let Some((request, cost)) = self.cost_of(entry) else { return };
        if let Some(sum) = self.cost.get_mut(&request) {
            *sum = sum.saturating_add(cost);
        }
    }

    /// Looks at one entry of the house's journal.
    pub(crate) fn house_entry(&mut self, entry: &Entry) {
        let Some((request, cost)) = self.cost_of(entry) else { return };
        let sum = self.house.entry(request).or_default();
        *sum = sum.saturating_add(cost);
    }

    /// What an entry takes for good, if it is about a request of an open call.
    fn cost_of(&self, entry: &Entry) -> Option<(RequestId, Msat)> {
        if self.cost.is_empty() {
            return None;
        }
        let request = match &entry.evidence {
            Some(Evidence::Receipt { receipt, .. }) => receipt.peek().ok().map(|body| body.request),
            Some(Evidence::Abandoned { request, .. }) => Some(*request),
            Some(_) | None => None,
        };
        let request = request.filter(|request| self.cost.contains_key(request))?;
        Some((request, posted(&entry.draft())))
    }

    /// Adds what the consumer's restore is about to charge for requests that were open.
    pub(crate) fn restored(&mut self, sessions: &[SessionState]) {
        for (request, cost) in self.to_be_abandoned(sessions) {
            let sum = self.cost.entry(request).or_default();
            *sum = sum.saturating_add(cost);
        }
    }

    /// The same, of the house's.
    pub(crate) fn house_restored(&mut self, sessions: &[SessionState]) {
        for (request, cost) in self.to_be_abandoned(sessions) {
            let sum = self.house.entry(request).or_default();
            *sum = sum.saturating_add(cost);
        }
    }

    fn to_be_abandoned(&self, sessions: &[SessionState]) -> Vec<(RequestId, Msat)> {
        let mut found = Vec::new();
        if self.cost.is_empty() {
            return found;
        }
        for session in sessions {
            let mut state = session.clone();
            let open: Vec<RequestId> = state.requests().keys().copied().collect();
            for request in open {
                let Ok(draft) = state.abandoned(request) else { continue };
                if self.cost.contains_key(&request) {
                    found.push((request, posted(&draft)));
                }
                // What cannot be applied here cannot be there either; the session stands as it is.
                let _ = state.apply(&draft);
            }
        }
        found
    }

    /// Ends every call that was open.
    pub(crate) async fn settle(self, keys: &KeyStore, till: &Till) -> anyhow::Result<()> {
        for call in &self.open {
            let of = |request| self.house.get(request).or_else(|| self.cost.get(request));
            let costs = call.requests.iter().filter_map(of);
            let cost = costs.fold(Msat::ZERO, |sum, cost| sum.saturating_add(*cost));
            let bill = Bill { cost, ..Bill::default() };
            let prepaid = match call.key {
                Some(key) => keys.chain(key, now()).await?.first().is_some_and(|key| key.kind == KeyKind::Prepaid),
                None => false,
            };
            let computed = with_margin(cost, if prepaid { till.margin_permille } else { 0 });
            let booked = self.charged.get(call.call);
            let charged = booked.unwrap_or(computed).min(call.reserved);
            if prepaid && booked.is_none() {
                till.charge(call.call, charged).await.map_err(anyhow::Error::msg)?;
            }
            let end = CallEnd { state: CallState::Failed, cost, charged, detail: detail::of(None, &bill) };
            let charged = keys.end_call(call.call, &end, now()).await?;
            tracing::info!(call = %call.call.id.short(), %charged, "a call that the last run left open is settled");
        }
        Ok(())
    }
}

/// What an entry takes for good.
fn posted(draft: &Draft) -> Msat {
    draft.transfers.iter().fold(Msat::ZERO, |sum, transfer| match transfer.op {
        TransferOp::Post { amount, .. } | TransferOp::PostPending { amount, .. } => sum.saturating_add(amount),
        TransferOp::Pending { .. } | TransferOp::VoidPending { .. } | TransferOp::ExpirePending { .. } => sum,
    })
}
