//! Receipts under audit: each against its request, its quote, its slices and the session's running totals.

use super::{
    Party, Rule,
    flows::Backing,
    session::{Notes, Request, SessionAudit, SliceStatus, half, signed_by_both},
};
use crate::statements::{ExpertFault, Leg, Passed, Receipt, ReceiptOpening, check_work, receipt_id};
use satgrid_pricing::{marginal_charge, numerators};
use satgrid_types::{BothSigned, Digest, Msat, ReceiptId, Statement};

impl SessionAudit {
    /// A finished request. `at` is where the receipt stands in the log: its number and leaf.
    pub(super) fn receipt(
        &mut self,
        (both, receipt): (&BothSigned<Receipt>, Receipt),
        opening: Option<&ReceiptOpening>,
        at: (u64, Digest),
        notes: &mut Notes,
    ) -> Backing {
        if let Err(error) = signed_by_both(both, &self.provider, &self.consumer) {
            notes.refuse(&error);
            return Backing::Unjudged;
        }
        notes.version(Receipt::KIND, receipt.version, Receipt::VERSION);
        let provider = self.owed_by();
        let id = receipt_id(both);
        let chained = receipt.seq == self.receipts && receipt.previous == self.last_receipt;
        notes.require(chained, Rule::ReceiptChain, provider, || {
            format!("number {} after {} receipts, previous {:?}", receipt.seq, self.receipts, receipt.previous)
        });
        let request = self.requests.remove(&receipt.request);
        self.ended.insert(half(&receipt.request));
        match &request {
            Some(request) => self.check_receipt_work(&receipt, request, opening, notes),
            None => notes.add(
                Rule::RequestUnknown,
                provider,
                format!("a receipt of {}, which is not open", receipt.request),
            ),
        }
        if let Some(opening) = opening {
            let opens = opening.private.commitment(&opening.salt) == receipt.private_hash;
            notes.require(opens, Rule::ReceiptOpening, Party::Exporter, || {
                "the private fields are not what the receipt commits to".into()
            });
        }
        self.check_receipt_terms(&receipt, request.as_ref(), notes);
        self.check_receipt_part(&receipt, request.as_ref(), id, notes);
        let cost = marginal_charge(self.numerators, receipt.numerators);
        notes.require(cost == Ok(receipt.cost), Rule::ReceiptCost, provider, || {
            format!("costs {}, computed {cost:?}", receipt.cost)
        });
        let cost = cost.unwrap_or(receipt.cost);
        self.add_charge(receipt.numerators, cost);
        let cumulative = receipt.cumulative_numerators == self.numerators && receipt.cumulative_cost == self.charged;
        notes.require(cumulative, Rule::ReceiptCumulative, provider, || {
            format!(
                "says {} for {}, computed {}",
                receipt.cumulative_cost, receipt.cumulative_numerators.0, self.charged
            )
        });
        self.check_receipt_slices(&receipt, notes);
        self.receipts = self.receipts.saturating_add(1);
        self.last_receipt = Some(id);
        notes.delta.receipts = 1;
        notes.delta.prompt_tokens = receipt.usage.prompt.into();
        notes.delta.cached_tokens = receipt.usage.cached_prompt.into();
        notes.delta.output_tokens = receipt.usage.completion.into();
        notes.delta.charged_msat = cost.0;
        if let Some(summary) = &mut self.summary {
            summary.logged.push((id.0, at.0, at.1));
        }
        self.charge_effect(cost)
    }

    fn check_receipt_work(
        &self,
        receipt: &Receipt,
        request: &Request,
        opening: Option<&ReceiptOpening>,
        notes: &mut Notes,
    ) {
        let provider = self.owed_by();
        let last = request.last_ack.as_ref();
        notes.require(receipt.last_ack == last.map(|(id, _)| *id), Rule::ReceiptLastAck, provider, || {
            format!("names {:?}, both signed {:?} last", receipt.last_ack, last.map(|(id, _)| *id))
        });
        let acked = last.map(|(_, ack)| ack.usage).unwrap_or_default();
        let fits = receipt.usage.is_consistent()
            && receipt.usage.covers(&acked)
            && receipt.usage.prompt <= request.prompt_tokens
            && receipt.usage.completion <= request.max_output;
        notes.require(fits, Rule::ReceiptUsage, provider, || {
            format!("{:?}, acknowledged {acked:?}, {} prompt tokens", receipt.usage, request.prompt_tokens)
        });
        if let (Some(opening), Some((_, ack))) = (opening, last)
            && ack.usage.completion == receipt.usage.completion
        {
            let same = opening.private.running_hash == ack.running_hash;
            notes.require(same, Rule::ReceiptUsage, provider, || {
                "the output's hash is not that of the last acknowledgement over as many tokens".into()
            });
        }
    }

    /// A worker's receipt states the order it was given; what it did becomes a leg of its lead's request.
    fn check_receipt_part(&self, receipt: &Receipt, request: Option<&Request>, id: ReceiptId, notes: &mut Notes) {
        let provider = self.owed_by();
        let Some(request) = request else { return };
        let same = request.part == receipt.part.map(|work| work.order) && request.allows(&receipt.usage);
        notes.require(same, Rule::StageWork, provider, || {
            format!("ordered {:?}, done {:?}", request.part, receipt.usage.part)
        });
        notes.require(receipt.split.is_some() == receipt.stage_root.is_some(), Rule::StageRoot, provider, || {
            "a stage root without a split, or a split without a stage root".into()
        });
        let both = receipt.expert_split.is_some() == receipt.expert_root.is_some();
        notes.require(both, Rule::ExpertRoot, provider, || "an expert root or an account of rows, not both".into());
        let counts = receipt.expert_rows.as_deref();
        let counted = match &receipt.part {
            Some(work) => check_work(&work.order, &receipt.usage.part.unwrap_or_default(), counts),
            None if counts.is_some() => Err(ExpertFault::Counters),
            None => Ok(()),
        };
        if let Err(fault) = counted {
            notes.add(Rule::ExpertWork, provider, fault.to_string());
        }
        if let Some(work) = receipt.part {
            let usage = receipt.usage.part.unwrap_or_default();
            let rows = Some(Passed::from(&work));
            let id = Some(Digest(id.0));
            notes.leg = Some(Leg { worker: self.provider, order: work.order, usage, id, rows });
            notes.counts = work.order.layers.is_none().then(|| receipt.expert_rows.clone().unwrap_or_default());
        }
    }

    fn check_receipt_terms(&self, receipt: &Receipt, request: Option<&Request>, notes: &mut Notes) {
        let provider = self.owed_by();
        let Some(quote) = self.quotes.get(&receipt.quote) else {
            notes.add(Rule::ReceiptTerms, provider, format!("quote {} is not this session's", receipt.quote));
            return;
        };
        let computed = numerators(&receipt.usage, &quote.rates);
        notes.require(computed == Ok(receipt.numerators), Rule::ReceiptCost, provider, || {
            format!("numerators {}, computed {computed:?}", receipt.numerators.0)
        });
        let differs = [
            (request.is_none_or(|request| request.quote == receipt.quote), "quote"),
            (receipt.rates == quote.rates, "rates"),
            (receipt.listing == quote.listing, "listing"),
            (receipt.model_root == quote.model_root, "model root"),
            (receipt.tokenizer == quote.tokenizer, "tokenizer"),
            (receipt.quantisation == quote.quantisation, "quantisation"),
            (receipt.profile == quote.profile, "engine profile"),
            (receipt.build == quote.build, "build"),
            (receipt.instruction_set == quote.instruction_set, "instruction set"),
            (receipt.provider == self.provider, "provider"),
            (receipt.consumer == self.consumer, "consumer"),
        ];
        let differs: Vec<&str> = differs.iter().filter(|(same, _)| !same).map(|(_, name)| *name).collect();
        notes.require(differs.is_empty(), Rule::ReceiptTerms, provider, || {
            format!("not the quote's: {}", differs.join(", "))
        });
    }

    fn check_receipt_slices(&mut self, receipt: &Receipt, notes: &mut Notes) {
        let provider = Party::Provider(self.provider);
        let sorted = receipt.slices.is_sorted_by(|a, b| a.k < b.k) && receipt.slices.len() <= Receipt::MAX_SLICES;
        notes.require(sorted, Rule::ReceiptSlices, provider, || "slices out of order or too many".into());
        for given in &receipt.slices {
            let as_provider = self.as_provider;
            let known = self.slices.get_mut(&given.k).is_some_and(|slice| {
                // The payee's word may reach the payer before its own wallet's: an attempt is enough there.
                let moved = match slice.status {
                    SliceStatus::Paid => true,
                    SliceStatus::Attempted => !as_provider,
                    SliceStatus::Invoiced | SliceStatus::Failed => false,
                };
                let same = slice.hash == given.payment_hash && slice.amount == given.amount;
                let first = !slice.receipted;
                slice.receipted = true;
                moved && same && first
            });
            notes.require(known, Rule::ReceiptSlices, provider, || {
                format!(
                    "slice {} over {} is not a payment of this session, or was counted before",
                    given.k, given.amount
                )
            });
        }
        let newly = Msat::checked_sum(receipt.slices.iter().map(|slice| slice.amount)).unwrap_or(Msat::MAX);
        self.receipted_paid = self.receipted_paid.saturating_add(newly);
        notes.require(receipt.cumulative_paid == self.receipted_paid, Rule::ReceiptCumulative, provider, || {
            format!("says {} paid, its slices so far are {}", receipt.cumulative_paid, self.receipted_paid)
        });
    }
}
