//! Calls that a crash left open: each is settled for what the journal says that its requests have cost.
//!
//! A request that has ended cost what its last entry posted. One that had not ended is abandoned by the consumer's
//! restore at its last acknowledgement, in the order of the session's requests; the same is worked out here.

use super::detail;
use crate::drive::now;
use satgrid_api::Bill;
use satgrid_ledger::{
    entry::{Draft, Entry, Evidence},
    transfer::TransferOp,
};
use satgrid_ledger_sqlite::{CallEnd, CallState, KeyError, KeyStore, OpenCall};
use satgrid_protocol::session::SessionState;
use satgrid_types::{Msat, RequestId};
use std::collections::BTreeMap;

/// What the open calls' requests cost, gathered while the journal is read.
pub(crate) struct Costs {
    open: Vec<OpenCall>,
    cost: BTreeMap<RequestId, Msat>,
}

impl Costs {
    pub(crate) async fn of(keys: &KeyStore) -> Result<Costs, KeyError> {
        let open = keys.open_calls().await?;
        let requests = open.iter().flat_map(|call| call.requests.iter().map(|request| (*request, Msat::ZERO)));
        let cost = requests.collect();
        Ok(Costs { open, cost })
    }

    /// Looks at one entry of the journal.
    pub(crate) fn entry(&mut self, entry: &Entry) {
        if self.cost.is_empty() {
            return;
        }
        let request = match &entry.evidence {
            Some(Evidence::Receipt { receipt, .. }) => receipt.peek().ok().map(|body| body.request),
            Some(Evidence::Abandoned { request, .. }) => Some(*request),
            Some(_) | None => None,
        };
        let Some(cost) = request.and_then(|request| self.cost.get_mut(&request)) else { return };
        *cost = cost.saturating_add(posted(&entry.draft()));
    }

    /// Adds what the consumer's restore is about to charge for requests that were open.
    pub(crate) fn restored(&mut self, sessions: &[SessionState]) {
        if self.cost.is_empty() {
            return;
        }
        for session in sessions {
            let mut state = session.clone();
            let open: Vec<RequestId> = state.requests().keys().copied().collect();
            for request in open {
                let Ok(draft) = state.abandoned(request) else { continue };
                if let Some(cost) = self.cost.get_mut(&request) {
                    *cost = cost.saturating_add(posted(&draft));
                }
                // What cannot be applied here cannot be there either; the session stands as it is.
                let _ = state.apply(&draft);
            }
        }
    }

    /// Ends every call that was open.
    pub(crate) async fn settle(self, keys: &KeyStore) -> Result<(), KeyError> {
        for call in &self.open {
            let costs = call.requests.iter().filter_map(|request| self.cost.get(request));
            let cost = costs.fold(Msat::ZERO, |sum, cost| sum.saturating_add(*cost));
            let bill = Bill { cost, ..Bill::default() };
            let end = CallEnd { state: CallState::Failed, cost, charged: cost, detail: detail::of(None, &bill) };
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
