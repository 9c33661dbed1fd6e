//! What must be true: bounds at every step, and books, audits and texts once it is quiet.

use super::{World, parts};
use satgrid_engine::{
    port::{Command, EngineEvent, Job, JobId},
    toy::{ToyConfig, ToyEngine},
};
use satgrid_ledger::{
    Account, Entry,
    audit::{Detail, Report, Rule, audit, cross_check},
    bundle::{Filter, Opened, open},
    entry::Evidence,
    testing::bundle_of,
};
use satgrid_node::LinkId;
use satgrid_pricing::cost_alone;
use satgrid_protocol::{metering::part_terms, session::SessionState};
use satgrid_types::{Msat, PartUsage, TokenUsage, WorkKind, node_key};
use std::collections::BTreeSet;

/// The text that a run without any trouble gives.
pub fn undisturbed(toy: &ToyConfig, prompt: &[u32], max_output: u32, seed: Option<u64>) -> Vec<u32> {
    let mut engine = ToyEngine::new(ToyConfig { faults: Default::default(), ..toy.clone() });
    let mut sampling = satgrid_engine::sampling::Sampling { temperature: 0.0, ..Default::default() };
    if let Some(seed) = seed {
        sampling.temperature = 0.7;
        sampling.seed = seed;
    }
    let id = JobId(0);
    let job = Job {
        id,
        session: [0; 32],
        prompt: prompt.to_vec(),
        sampling,
        max_output,
        stop: Vec::new(),
        ignore_eos: false,
        resumed: 0,
        extras: Default::default(),
    };
    engine.handle(Command::Start(job)).unwrap();
    engine.handle(Command::Grant { job: id, prompt_upto: u32::MAX, output_upto: u32::MAX }).unwrap();
    let mut out = Vec::new();
    while let Some(event) = engine.poll_event() {
        if let EngineEvent::Tokens { ids, .. } = event {
            out.extend(ids);
        }
    }
    out
}

impl World {
    /// After every step, whoever cheats, dies or is late: no honest party stands to lose more than it says, and what it
    /// says stays under its caps.
    pub(super) fn check_bounds(&self) {
        for (c, node) in self.consumers.iter().enumerate() {
            let Some(role) = &node.role else { continue };
            let waiting = node.calls.values().any(|log| log.end.is_none() && !log.orphaned);
            assert!(node.halted.is_none() || !waiting, "consumer {c} has halted and a client still waits");
            let most = role.exposure();
            let summed = role.session_states().map(|s| s.consumer_exposure().most());
            assert_eq!(most, summed.fold(Msat::ZERO, Msat::saturating_add), "consumer {c}: the kept sum and the sum");
            let cap = node.config.exposure_cap;
            assert!(most <= cap, "consumer {c} may lose {most}, its cap is {cap}");
            // By the wallet's own figures: what left it and was not received back as signed-for work.
            let Ok(balance) = self.net.balance(node.purse.lightning) else { continue };
            let gone = node.endowment.saturating_sub(balance.lightning_total);
            let signed = role.session_states().fold(Msat::ZERO, |sum, s| {
                let acked = s.requests().values().fold(Msat::ZERO, |sum, r| sum.saturating_add(r.acked_cost()));
                sum.saturating_add(s.charged()).saturating_add(acked)
            });
            let fees = node.journal.books().balance(&Account::RoutingFees).max(0);
            let fees = Msat(u64::try_from(fees).unwrap());
            let lost = gone.saturating_sub(signed).saturating_sub(fees);
            assert!(
                lost <= most || node.halted.is_some(),
                "consumer {c} lost {lost} (of {gone} gone, {signed} signed for, {fees} fees), it said at most {most}"
            );
        }
        for (p, node) in self.providers.iter().enumerate() {
            let Some(role) = &node.role else { continue };
            let terms = &node.config.terms;
            let whole = TokenUsage {
                prompt: terms.prefill_piece,
                cached_prompt: 0,
                completion: terms.window_tokens,
                ..TokenUsage::default()
            };
            let usage = node.layers.map_or(whole, |range| {
                let terms =
                    part_terms(terms, range.layers(), &node.rates, node.config.part_window, node.config.part_batch);
                let usage = PartUsage::default().plus(WorkKind::Decode, terms.window_tokens.into(), range.layers());
                TokenUsage::of_part(usage.unwrap())
            });
            let window = cost_alone(&usage, &node.rates).unwrap();
            let open: usize = role.session_states().map(|s| s.requests().len()).sum();
            let cap = Msat(window.0 * open as u64);
            let most = role.exposure();
            assert!(most <= cap || node.toy.faults.overrun, "provider {p} may lose {most}, {open} windows are {cap}");
            // By the engine's own count: no work beyond what it says, and none that is not prepaid.
            let worked = node.work.values().map(|usage| cost_alone(usage, &node.quoted).unwrap());
            let worked = worked.fold(Msat::ZERO, Msat::saturating_add);
            let mut acked = Msat::ZERO;
            let (mut charged, mut paid) = (Msat::ZERO, Msat::ZERO);
            for session in role.session_states() {
                let sum = session.requests().values().fold(Msat::ZERO, |sum, r| sum.saturating_add(r.acked_cost()));
                acked = acked.saturating_add(sum);
                charged = charged.saturating_add(session.charged());
                paid = paid.saturating_add(session.paid());
            }
            let halted = node.halted.is_some() || node.toy.faults.overrun;
            let unsigned = worked.saturating_sub(acked);
            assert!(unsigned <= most || halted, "provider {p} did {unsigned} of unsigned work, it said at most {most}");
            let all = worked.saturating_add(charged);
            assert!(all <= paid || halted, "provider {p} did work for {all} on {paid}");
        }
        assert_eq!(self.net.total(), self.net.minted(), "money neither appears nor vanishes");
    }

    /// When a slice is asked for: what is free beside running requests' reservations is under the larger of the work at hand
    /// and what was delivered allows, and so is the slice. Delivered: by the receipts in the journal and the signed
    /// acknowledgements, not by the role's own sum.
    pub(super) fn check_slice(&self, c: usize, link: LinkId, amount: Msat) {
        let node = &self.consumers[c];
        let Some((key, p)) = self.carried(c, link) else { return };
        let provider = node_key(&self.providers[p].key);
        let states = node.role.iter().flat_map(|role| role.session_states());
        let state = states.into_iter().find(|s| s.consumer() == key).expect("a slice belongs to a session");
        let receipts = node.journal.entries().iter().filter_map(|entry| match &entry.evidence {
            Some(Evidence::Receipt { receipt, .. }) => receipt.peek().ok().filter(|r| r.provider == provider),
            _ => None,
        });
        let acked = state.requests().values().map(|r| r.acked_cost());
        let delivered = receipts.map(|r| r.cost).chain(acked).fold(Msat::ZERO, Msat::saturating_add);
        let slices = &node.config.slices;
        let first = slices.first.max(node.config.first_routed).max(state.quote().terms.min_slice);
        let proven = Msat(delivered.0 / 10).min(slices.largest);
        let (rates, terms) = (state.quote().rates, state.quote().terms);
        // Two pieces of prompt and 45 tokens for every call that has not ended.
        let open = node.calls.values().filter(|log| log.end.is_none());
        let at_hand = open.map(|log| {
            let prompt = (log.prompt.len() + log.tokens.len()) as u32;
            let usage = TokenUsage {
                prompt: prompt.min(terms.prefill_piece * 2),
                completion: 8 + 37.max(terms.ack_tokens / 4),
                ..TokenUsage::default()
            };
            cost_alone(&usage, &rates).unwrap()
        });
        let at_hand = at_hand.fold(Msat::ZERO, Msat::saturating_add);
        let bound = first.max(proven).max(at_hand);
        let free = state.available();
        assert!(free < bound, "consumer {c} asks for {amount} with {free} free: {bound} is the most");
        assert!(amount <= bound, "consumer {c} asks for {amount}: {bound} is the most");
    }

    pub fn audit_of(&self, entries: &[Entry], key: &ed25519_dalek::SigningKey) -> Report {
        let bundle = bundle_of(entries, key, Filter::All, false);
        let Opened::Journal(reader) = open(bundle.as_slice()).expect("a bundle of ours opens") else {
            panic!("a journal's bundle is no proof of fraud");
        };
        audit(reader, Detail::Sessions).expect("a bundle of ours is whole")
    }
    pub fn audit_provider(&self, p: usize) -> Report {
        self.audit_of(self.providers[p].journal.entries(), &self.providers[p].key)
    }
    pub fn audit_consumer(&self, c: usize) -> Report {
        self.audit_of(self.consumers[c].journal.entries(), &self.consumers[c].key)
    }

    /// What must be true of every node once nothing is under way: clean audits, books that agree with the wallets, no
    /// request or payment left open, the journal folding to the live state.
    ///
    /// # Panics
    /// Where something is not.
    pub fn assert_quiet(&self) {
        self.assert_quiet_but(&BTreeSet::new());
    }

    /// As [`World::assert_quiet`]; the audits of these providers, which lie, may find something. Returns all audits.
    ///
    /// # Panics
    /// Where something is not as it must be.
    pub fn assert_quiet_but(&self, cheats: &BTreeSet<usize>) -> (Vec<Report>, Vec<Report>) {
        let (mut sellers, mut buyers) = (Vec::new(), Vec::new());
        for (p, node) in self.providers.iter().enumerate() {
            let report = self.audit_provider(p);
            assert!(report.is_clean() || cheats.contains(&p), "provider {p}'s audit: {:#?}", report.findings);
            sellers.push(report);
            self.assert_lightning(&format!("provider {p}"), node.journal.books(), node.purse.lightning, node.endowment);
            if let Some(role) = &node.role {
                assert_eq!(role.open_requests(), 0, "provider {p} still runs requests");
                self.assert_folds(&format!("provider {p}"), &node.key, &node.journal, role.session_states());
            }
        }
        for (c, node) in self.consumers.iter().enumerate() {
            let report = self.audit_consumer(c);
            assert!(report.is_clean(), "consumer {c}'s audit: {:#?}", report.findings);
            buyers.push(report);
            assert_eq!(node.journal.books().holds().count(), 0, "consumer {c} still holds reservations");
            self.assert_lightning(&format!("consumer {c}"), node.journal.books(), node.purse.lightning, node.endowment);
            if let Some(role) = &node.role {
                assert_eq!(role.open_calls(), 0, "consumer {c} still has calls");
                self.assert_folds(&format!("consumer {c}"), &node.key, &node.journal, role.session_states());
            }
        }
        (sellers, buyers)
    }

    fn assert_lightning(
        &self,
        who: &str,
        books: &satgrid_ledger::Books,
        wallet: satgrid_types::LightningKey,
        endowment: Msat,
    ) {
        let Ok(balance) = self.net.balance(wallet) else { return };
        let booked = books.balance(&Account::Lightning);
        let real = i128::from(balance.lightning_total.0) - i128::from(endowment.0);
        assert_eq!(booked, real, "{who}: Lightning by the books and by the wallet");
    }

    fn assert_folds<'a>(
        &self,
        who: &str,
        key: &ed25519_dalek::SigningKey,
        journal: &super::journal::SimJournal,
        live: impl Iterator<Item = &'a SessionState>,
    ) {
        let mut fold = satgrid_node::recover::Fold::new([node_key(key)]);
        journal.entries().iter().for_each(|entry| fold.entry(entry));
        let recovered = fold.finish();
        let mut folded = recovered.provider_sessions;
        let mut live: Vec<_> = live.cloned().collect();
        // A provider may forget, without an entry, what nothing was paid in.
        let may_go = |s: &SessionState| s.is_unpaid() && s.requests().is_empty() && !s.may_be_paid(self.now);
        folded.retain(|session| !may_go(session) || live.iter().any(|live| live.id() == session.id()));
        folded.extend(recovered.consumer_sessions);
        live.sort_by_key(|s| s.id());
        folded.sort_by_key(|s| s.id());
        assert_eq!(live.len(), folded.len(), "{who}: sessions in the journal and alive");
        for (live, folded) in live.iter().zip(&folded) {
            assert_eq!(live, folded, "{who}: a session folded from the journal is the live one");
        }
    }

    /// Both journals of a provider and a consumer agree on every session that they share.
    ///
    /// # Panics
    /// Where they do not.
    pub fn assert_agree(&self, p: usize, c: usize) {
        self.assert_reports_agree((p, &self.audit_provider(p)), (c, &self.audit_consumer(c)));
    }

    /// As [`World::assert_agree`], where the audits have been made.
    ///
    /// # Panics
    /// Where they do not.
    pub fn assert_reports_agree(&self, (p, seller): (usize, &Report), (c, buyer): (usize, &Report)) {
        let mut findings = cross_check(seller, buyer);
        // A session whose opening was lost on the way, and under which nothing was paid, is nobody's concern.
        let empty = |id| buyer.sessions.get(&id).is_some_and(|s| s.paid_msat == 0 && s.charged_msat == 0);
        findings.retain(|f| !(f.rule == Rule::CrossMissing && f.session.is_some_and(empty)));
        assert!(findings.is_empty(), "provider {p} and consumer {c}: {findings:#?}");
        let (Some(seller), Some(buyer)) = (&self.providers[p].role, &self.consumers[c].role) else { return };
        for ours in buyer.session_states().filter(|s| s.provider() == node_key(&self.providers[p].key)) {
            let theirs = seller.session_states().find(|s| s.id() == ours.id());
            let Some(theirs) = theirs else {
                assert!(ours.paid().is_zero(), "the provider has every session under which it was paid");
                continue;
            };
            assert_eq!(ours.paid(), theirs.paid(), "paid");
            assert_eq!(ours.charged(), theirs.charged(), "charged");
            assert_eq!(ours.settled_numerators(), theirs.settled_numerators(), "numerators");
            assert_eq!(ours.last_receipt(), theirs.last_receipt(), "the receipt chain");
            assert_eq!(ours.refunded(), theirs.refunded(), "refunded");
        }
    }

    /// The whole text that a call should get.
    pub fn undisturbed(&self, log: &super::CallLog) -> Vec<u32> {
        let seed = (log.sampling.temperature_micro > 0).then_some(log.sampling.seed);
        undisturbed(&self.options.toy, &log.prompt, log.max_output, seed)
    }

    /// The canonical bytes of every journal: equal for equal seeds.
    pub fn fingerprint(&self) -> [u8; 32] {
        let journals = self.providers.iter().map(|p| &p.journal).chain(self.consumers.iter().map(|c| &c.journal));
        let leaves: Vec<String> = journals.flat_map(|j| j.entries()).map(|e| e.leaf().to_string()).collect();
        parts::bytes32(&leaves.concat())
    }
}
