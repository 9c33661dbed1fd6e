//! Work on parts under audit: a lead's receipts to its customers against the receipts of its workers.
//!
//! A lead's journal holds both sides: the sessions in which it buys layers or experts, and those in which it sells answers, or,
//! where a stage leads experts itself, layers. The workers' receipts of a request are written before the request's own, which names their root. A worker's journal and a
//! customer's hold one side alone and are checked for what that shows.

use super::{Party, Rule, session::Notes};
use crate::statements::{
    ExpertCount, ExpertLegs, Leg, Receipt, SplitFault, check_conservation, check_sold, check_split, stage_root,
};
use satgrid_types::RequestId;
use std::collections::{BTreeMap, BTreeSet};

/// Legs of one request: more replacements than this are not tried.
const MAX_LEGS: usize = 1_024;

/// Workers' parts in requests whose own receipt has not been read yet.
#[derive(Debug, Default)]
pub(super) struct Stages {
    legs: BTreeMap<RequestId, Vec<Leg>>,
    /// The same for experts.
    experts: BTreeMap<RequestId, ExpertLegs>,
    /// Requests whose receipt accounted for workers.
    accounted: BTreeSet<RequestId>,
}

impl Stages {
    /// A worker's receipt, or its last acknowledgement, in a session in which this node buys.
    /// `counts` are those of a receipt for experts; `ours`: it was ordered in this node's name.
    pub(super) fn bought(&mut self, ours: bool, leg: Leg, counts: Option<Vec<ExpertCount>>, notes: &mut Notes) {
        let request = leg.order.request;
        notes.require(ours, Rule::StageWork, Party::Exporter, || {
            format!("this node bought for {}, which leads", leg.order.lead)
        });
        if self.accounted.contains(&request) {
            let text = format!("work for request {request}, whose receipt was written before");
            return notes.add(Rule::StageOrphan, Party::Exporter, text);
        }
        if leg.order.layers.is_none() {
            let legs = self.experts.entry(request).or_default();
            if legs.ids.len() < MAX_LEGS {
                legs.add(leg.id, counts.as_deref());
            }
            return;
        }
        let legs = self.legs.entry(request).or_default();
        if legs.len() < MAX_LEGS {
            legs.push(leg);
        }
    }

    /// A receipt that this node gave: to a customer, or to the lead whose stage it is.
    pub(super) fn sold(&mut self, receipt: &Receipt, notes: &mut Notes) {
        let legs = self.legs.remove(&receipt.request).unwrap_or_default();
        let experts = self.experts.remove(&receipt.request).unwrap_or_default();
        let lead = Party::Provider(receipt.provider);
        self.sold_experts(receipt, &experts, lead, notes);
        let Some(split) = &receipt.split else {
            let worked = legs.iter().any(|leg| leg.id.is_some());
            notes.require(!worked, Rule::StageRoot, lead, || {
                format!("{} workers took part and the receipt names none", legs.len())
            });
            return;
        };
        self.accounted.insert(receipt.request);
        let root = stage_root(&legs);
        notes.require(receipt.stage_root == Some(root), Rule::StageRoot, lead, || {
            format!("names {:?}, that over {} receipts is {root}", receipt.stage_root, legs.len())
        });
        if let Err(fault) = check_split(split, &legs).and_then(|()| check_sold(split, &receipt.usage)) {
            let (rule, party) = match &fault {
                SplitFault::Gap { .. } | SplitFault::Overlap { .. } | SplitFault::Own => (Rule::StageTiling, lead),
                SplitFault::Conservation { .. } | SplitFault::Rising { .. } | SplitFault::Sold { .. } => {
                    (Rule::StageConservation, lead)
                }
                SplitFault::Missing { .. } => (Rule::StageRows, lead),
                SplitFault::Rows { party, .. } => (Rule::StageRows, Party::Provider(*party)),
            };
            notes.add(rule, party, fault.to_string());
        }
    }

    fn sold_experts(&mut self, receipt: &Receipt, legs: &ExpertLegs, lead: Party, notes: &mut Notes) {
        let Some(split) = &receipt.expert_split else {
            notes.require(legs.ids.is_empty(), Rule::ExpertRoot, lead, || {
                format!("{} workers evaluated experts and the receipt names none", legs.ids.len())
            });
            return;
        };
        self.accounted.insert(receipt.request);
        let root = legs.root();
        notes.require(receipt.expert_root == Some(root), Rule::ExpertRoot, lead, || {
            format!("names {:?}, that over {} receipts is {root}", receipt.expert_root, legs.ids.len())
        });
        if let Err(fault) = check_conservation(split, legs) {
            notes.add(Rule::ExpertConservation, lead, fault.to_string());
        }
        // A stage's rows are those of the layers that it sold.
        if let Some(range) = receipt.part.and_then(|work| work.order.layers) {
            let outside = |layer: u32| !(range.start()..range.end()).contains(&layer);
            let found = (0u32..).zip(&split.layers).find(|(layer, rows)| **rows > 0 && outside(*layer));
            notes.require(found.is_none(), Rule::ExpertConservation, lead, || {
                let (layer, rows) = found.map_or((0, 0), |(layer, rows)| (layer, *rows));
                format!("{rows} rows of layer {layer}, and layers {range} were ordered")
            });
        }
    }

    /// A customer opened a request. Ids are the customers' to choose: one that another session used before is a new request.
    pub(super) fn opened(&mut self, request: &RequestId) {
        self.accounted.remove(request);
    }

    /// A customer's request ended without a receipt: nobody is charged for its workers but the lead.
    pub(super) fn dropped(&mut self, request: &RequestId) {
        self.legs.remove(request);
        self.experts.remove(request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statements::PartOrder;
    use satgrid_types::{NodeKey, PartUsage, WireType};

    /// A worker knows the ids of its lead's customers' requests, and may open one as a customer itself.
    #[test]
    fn an_id_that_a_second_customer_takes_is_a_new_request() {
        let request = RequestId([1; 32]);
        let order = PartOrder { layers: None, lead: NodeKey([9; 32]), request, wire: WireType::F32, max_positions: 1 };
        let leg = Leg { worker: NodeKey([2; 32]), order, usage: PartUsage::default(), id: None, rows: None };
        let mut stages = Stages { accounted: BTreeSet::from([request]), ..Stages::default() };
        let bought = |stages: &mut Stages| {
            let mut notes = Notes::default();
            stages.bought(true, leg, None, &mut notes);
            notes.found.iter().map(|(rule, ..)| *rule).collect::<Vec<_>>()
        };
        assert_eq!(bought(&mut stages), [Rule::StageOrphan]);
        stages.opened(&request);
        assert_eq!(bought(&mut stages), []);
    }
}
