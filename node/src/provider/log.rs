//! The provider's log as its consumers see it: a promise with each receipt, the newest tree head, and proofs on demand.
//!
//! Nothing here moves money or waits for anything: a promise follows its receipt once that is durable, and speaks of the
//! place that it has then.

use super::{Provider, ProviderAction};
use crate::LinkId;
use satgrid_ledger::{Entry, statements::InclusionPromise};
use satgrid_protocol::frame::{LogAsk, LogProof, ProviderControl};
use satgrid_types::{SessionId, Signed, UnixMs};

/// Questions about the log that one connection may have open.
const MAX_ASKS: usize = 4;

impl Provider {
    /// An entry with a receipt is durable: its consumer is promised that it is in the log, and where.
    pub(super) fn logged(&mut self, now: UnixMs, entry: &Entry) {
        let Some(promise) = InclusionPromise::of(entry, self.keys.node_key(), now) else { return };
        let Some(session) = self.sessions.get(&promise.session) else { return };
        let (link, promise) = (session.link, InclusionPromise { node: session.state.provider(), ..promise });
        let Some(link) = link.filter(|link| self.links.get(link).is_some_and(|held| held.log)) else { return };
        let signed = Signed::sign(&promise, self.keys.of(&promise.node));
        self.say(link, ProviderControl::Promise(signed));
    }

    /// A tree head was signed: everyone with a session here hears it, so that all hear the same. A session under a former key
    /// knows the log by that name and hears no more of it.
    pub(super) fn tree_head(&mut self, note: &str) {
        let ours = self.keys.node_key();
        let named = |id: Option<SessionId>| id.and_then(|id| self.sessions.get(&id)).map(|s| s.state.provider());
        let told = self.links.iter().filter(|(_, held)| held.log && named(held.session) == Some(ours));
        let told: Vec<LinkId> = told.map(|(link, _)| *link).collect();
        for link in told {
            self.say(link, ProviderControl::TreeHead(note.to_owned()));
        }
    }

    pub(super) fn want_proof(&mut self, link: LinkId, ask: LogAsk) {
        let Some(held) = self.links.get_mut(&link) else { return };
        if held.session.is_none() || held.asks >= MAX_ASKS {
            return self.violation(link, "questions about the log without a session, or too many at once");
        }
        held.asks += 1;
        self.actions.push_back(ProviderAction::ProveLog { link, ask });
    }

    /// The log answered; without hashes it could not.
    pub(super) fn proved(&mut self, link: LinkId, proof: LogProof) {
        if let Some(held) = self.links.get_mut(&link) {
            held.asks = held.asks.saturating_sub(1);
            self.say(link, ProviderControl::Proof(proof));
        }
    }
}
