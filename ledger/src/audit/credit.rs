//! Credit notes that are spent: what a closed session is owed becomes the balance of another one.

use super::{
    Party, Rule,
    evidence::Read,
    flows::{Backing, Reserves},
    fold::{Auditor, half},
    session::{Notes, signed_by_both},
};
use crate::{statements::CreditTransfer, transfer::Account};
use satgrid_types::{BothSigned, Statement};

impl Auditor {
    pub(super) fn credit_transfer(&mut self, both: &BothSigned<CreditTransfer>, notes: &mut Notes) -> Read {
        let body = match both.peek() {
            Ok(body) => body,
            Err(error) => {
                notes.refuse(&error);
                return (None, Backing::Unjudged, false);
            }
        };
        let provider = Party::Provider(body.provider);
        if self.over.contains(&half(&body.from.0)) {
            let detail = format!("session {} is over: what it was owed is paid, or spent before", body.from);
            notes.add(Rule::CreditNoteSpent, provider, detail);
            return (Some(body.to), Backing::Unjudged, false);
        }
        let (Some(from), Some(to)) = (self.sessions.get(&body.from), self.sessions.get(&body.to)) else {
            let detail = format!("from session {} to {}, which are not both open here", body.from, body.to);
            notes.add(Rule::StatementSession, Party::Exporter, detail);
            return (None, Backing::Unjudged, false);
        };
        if let Err(error) = signed_by_both(both, &from.provider, &body.consumer) {
            notes.refuse(&error);
            return (Some(body.to), Backing::Unjudged, false);
        }
        notes.version(CreditTransfer::KIND, body.version, CreditTransfer::VERSION);
        let remainder = from.remainder();
        let owed = from.closed && from.refund.is_none() && from.note == Some(body.note.0) && body.amount == remainder;
        let parties = body.consumer == from.consumer && body.provider == from.provider;
        let taken = body.from != body.to && !to.closed && to.provider == from.provider;
        let fits = owed && parties && taken && !remainder.is_zero();
        if !notes.require(fits, Rule::CreditNoteSpent, provider, || {
            format!("{} of {remainder} that session {} is owed, in session {}", body.amount, body.from, body.to)
        }) {
            return (Some(body.to), Backing::Unjudged, false);
        }
        let amount = i128::from(body.amount.0);
        let nets = match to.as_provider {
            true => [(Account::RefundsDue(body.from), amount), (Account::Prepaid(body.to), amount.saturating_neg())],
            false => {
                [(Account::PrepaidAsset(body.to), amount), (Account::PrepaidAsset(body.from), amount.saturating_neg())]
            }
        };
        if let Some(from) = self.sessions.get_mut(&body.from) {
            from.spent = from.spent.saturating_add(body.amount);
            if let Some(summary) = &mut from.summary {
                summary.spent_msat = from.spent.0;
            }
        }
        if let Some(to) = self.sessions.get_mut(&body.to) {
            to.credited = to.credited.saturating_add(body.amount);
            if let Some(summary) = &mut to.summary {
                summary.credited_msat = to.credited.0;
            }
        }
        notes.spent_from = Some(body.from);
        (Some(body.to), Backing::Exactly(nets.into(), Reserves::Nothing), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        audit::{Report, cross_check, tests::report},
        bundle::Filter,
        entry::{Draft, Evidence},
        testing::{Session, Work, World, bundle_of, bytes32, chain_entries, drafts_of},
    };
    use satgrid_types::{Digest, Msat, Signed, UnixMs};

    type Drafts = Vec<(UnixMs, Draft)>;

    /// A session closed with a note, and two that may take it.
    fn world() -> (World, Session, [Session; 2]) {
        let mut world = World::new();
        let mut from = world.open();
        world.pay(&mut from, Msat::sat(10));
        world.complete(&mut from, Work { prompt: 40, cached: 0, output: 60, acks: 1 });
        let note = world.close_with_credit_note(&mut from);
        let mut to = [world.open(), world.open()];
        world.spend_credit_note(&from, &note, &mut to[0]);
        // Nothing else was paid there: the work below is on credit alone.
        world.complete(&mut to[0], Work { prompt: 20, cached: 0, output: 30, acks: 1 });
        (world, from, to)
    }

    #[test]
    fn a_note_that_is_spent_is_the_balance_of_the_other_session() {
        let (mut world, from, mut to) = world();
        let (paid, charged) = (to[0].paid, to[0].charged);
        assert!(!charged.is_zero() && paid == from.paid.saturating_sub(from.charged));
        world.close_with_refund(&mut to[0]);
        let [provider, consumer] =
            [&world.provider, &world.consumer].map(|party| report(&party.bundle(Filter::All, false)));
        for (report, name) in [(&provider, "prepaid"), (&consumer, "prepaid-asset")] {
            assert_eq!(report.findings, []);
            assert_eq!(
                (report.sessions[&from.id].spent_msat, report.sessions[&to[0].id].credited_msat),
                (paid.0, paid.0)
            );
            assert_eq!(report.balances.get(name).copied().unwrap_or(0), 0, "all of it went back or was used");
        }
        assert_eq!(cross_check(&provider, &consumer), []);
        // Either session's export holds both, since the one's balance was the other's remainder.
        for (party, filter) in [
            (&world.provider, Filter::Session(from.id)),
            (&world.consumer, Filter::Session(to[0].id)),
            (&world.consumer, Filter::Peer(from.quote.consumer)),
        ] {
            let part = report(&party.bundle(filter, false));
            assert_eq!(part.findings, [], "{filter:?}");
            assert_eq!(part.sessions.len(), 2);
        }
    }

    #[test]
    fn a_note_is_spent_once_whole_and_where_it_can_be() {
        let (world, from, to) = world();
        let key = &world.provider.node;
        let bent = |bend: &dyn Fn(&mut Drafts, usize)| -> Report {
            let mut drafts = drafts_of(&world.provider.journal.entries());
            let is_it = |(_, draft): &(UnixMs, Draft)| matches!(draft.evidence, Some(Evidence::CreditTransfer(_)));
            let at = drafts.iter().position(is_it).unwrap();
            bend(&mut drafts, at);
            report(&bundle_of(&chain_entries(drafts), key, Filter::All, false))
        };
        // Signed anew by both, with another body.
        let with = |change: &dyn Fn(&mut CreditTransfer)| -> Report {
            bent(&|drafts, at| {
                let Some(Evidence::CreditTransfer(both)) = &mut drafts[at].1.evidence else { unreachable!() };
                let mut body = both.peek().unwrap();
                change(&mut body);
                *both = BothSigned::countersign(&Signed::sign(&body, key), &from.key);
            })
        };
        let check = |what: &str, report: Report| {
            let provider = Party::ExporterOrProvider(satgrid_types::node_key(key));
            let found = report.findings.iter().find(|f| f.rule == Rule::CreditNoteSpent);
            assert_eq!(found.map(|f| f.party), Some(provider), "{what}: {:?}", report.findings);
        };
        check("twice", bent(&|drafts, at| drafts.insert(at + 1, drafts[at].clone())));
        check(
            "again in another session",
            bent(&|drafts, at| {
                let (time, mut again) = drafts[at].clone();
                let Some(Evidence::CreditTransfer(both)) = &mut again.evidence else { unreachable!() };
                let body = CreditTransfer { to: to[1].id, ..both.peek().unwrap() };
                *both = BothSigned::countersign(&Signed::sign(&body, key), &from.key);
                drafts.insert(at + 1, (time, again));
            }),
        );
        check("for less", with(&|body| body.amount = Msat(1)));
        check("another note", with(&|body| body.note = Digest(bytes32("another"))));
        check("into itself", with(&|body| body.to = body.from));
        let stranger = with(&|body| body.to = satgrid_types::SessionId(bytes32("nobody's")));
        assert!(stranger.has(Rule::StatementSession));
        let unsigned = bent(&|drafts, at| {
            let Some(Evidence::CreditTransfer(both)) = &mut drafts[at].1.evidence else { unreachable!() };
            *both = BothSigned::countersign(&Signed::sign(&both.peek().unwrap(), key), &to[0].key);
        });
        assert!(unsigned.has(Rule::StatementSignature));
        let more = bent(&|drafts, at| {
            let crate::transfer::TransferOp::Post { amount, .. } = &mut drafts[at].1.transfers[0].op else {
                unreachable!()
            };
            *amount = Msat(amount.0 - 1);
        });
        assert!(more.has(Rule::TransferUnbacked));
    }
}
