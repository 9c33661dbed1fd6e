//! How a job ends: the workers' receipts are asked for, then the account of all rows is put together over them.

use super::{
    ConsumerMessage, Said, Settled,
    running::{Job, Running, counts, tell_exactly},
};
use satgrid_engine::{experts::group::JobRows, port::JobId};
use satgrid_ledger::statements::{ExpertLegs, ExpertSplit};
use satgrid_node::consumer::ConsumerEvent;
use tokio::sync::oneshot;

impl Running {
    /// The engine is done with a job: every worker is to give its receipt.
    pub(super) fn settle(&mut self, id: JobId, answer: oneshot::Sender<Option<Settled>>) -> Vec<ConsumerMessage> {
        let Some(job) = self.jobs.get_mut(&id) else {
            let _ = answer.send(None);
            return Vec::new();
        };
        job.answer = Some(answer);
        job.over = true;
        let (said, within) = (self.said.clone(), self.parts.settle);
        tokio::spawn(async move {
            tokio::time::sleep(within).await;
            let _ = said.send(Said::Late(id));
        });
        let mut orders = Vec::new();
        for (key, order) in job.orders.iter_mut().filter(|(_, order)| !order.over) {
            let call = order.call;
            if order.ordered.is_none() {
                orders.push(ConsumerMessage::Event(ConsumerEvent::Cancel { call }));
                continue;
            }
            let lied = self.workers.get(key).is_some_and(|worker| worker.lied);
            orders.push(tell_exactly(order, lied));
            orders.push(ConsumerMessage::Event(ConsumerEvent::PartDone { call }));
        }
        self.finish(id, false);
        orders
    }

    /// Who has not given a receipt by now is left with its last acknowledgement.
    pub(super) fn late(&mut self, id: JobId) -> Vec<ConsumerMessage> {
        let Some(job) = self.jobs.get(&id) else { return Vec::new() };
        let late = job.orders.values().filter(|order| !order.over).map(|order| order.call);
        let orders = late.map(|call| ConsumerMessage::Event(ConsumerEvent::Cancel { call })).collect();
        self.finish(id, true);
        orders
    }

    /// Answers how the job's rows were evaluated, once every worker's call has ended, or `late`.
    pub(super) fn finish(&mut self, id: JobId, late: bool) {
        let over = |job: &Job| job.answer.is_some() && (late || job.orders.values().all(|order| order.over));
        if !self.jobs.get(&id).is_some_and(over) {
            return;
        }
        let Some(job) = self.jobs.remove(&id) else { return };
        let rows = self.parts.group.close_account(id).unwrap_or_default();
        let Some(answer) = job.answer else { return };
        let mut legs = ExpertLegs::default();
        for leg in &job.legs {
            let counted = leg.receipt.is_some().then_some(leg.experts.as_slice());
            legs.add(leg.part.and_then(|part| part.id), counted);
        }
        // An order that is not over has no leg yet: what it did is nobody's to count.
        legs.vanished = legs.vanished.saturating_add(job.orders.values().filter(|order| !order.over).count() as u64);
        let split = account(self.parts.group.manifest().layers, &rows, &legs);
        let worked = !legs.ids.is_empty();
        let _ = answer.send(worked.then(|| Settled::Experts(Box::new(split), legs.root())));
    }
}

/// Rows by layer, what the lead evaluated itself, and what was evaluated more often than once.
fn account(layers: u32, rows: &JobRows, legs: &ExpertLegs) -> ExpertSplit {
    let chosen = rows.chosen.max(1);
    let by_layer: Vec<u64> = (0..layers).map(|layer| rows.layers.get(&layer).copied().unwrap_or(0)).collect();
    let again: Vec<u64> = (0u32..)
        .zip(&by_layer)
        .map(|(layer, rows_here)| {
            let own = rows.own.iter().filter(|((at, _), _)| *at == layer).map(|(_, rows)| *rows);
            let evaluated = own.fold(legs.rows.get(&layer).copied().unwrap_or(0), u64::saturating_add);
            evaluated.saturating_sub(rows_here.saturating_mul(u64::from(chosen)))
        })
        .collect();
    let again = if again.iter().all(|rows| *rows == 0) { Vec::new() } else { again };
    ExpertSplit { chosen, layers: by_layer, own: counts(&rows.own), again }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_ledger::statements::{ExpertCount, check_conservation};
    use std::collections::BTreeMap;

    #[test]
    fn the_account_holds_whatever_was_evaluated_again() {
        let rows = JobRows {
            chosen: 2,
            layers: BTreeMap::from([(0, 10), (2, 4)]),
            own: BTreeMap::from([((0, 1), 5), ((2, 1), 8)]),
        };
        let count = |layer, expert, rows| ExpertCount { layer, expert, rows };
        let check = |receipts: &[&[ExpertCount]], vanished: bool, again: &[u64]| {
            let mut legs = ExpertLegs::default();
            receipts.iter().for_each(|counts| legs.add(None, Some(counts)));
            if vanished {
                legs.add(None, None);
            }
            let split = account(3, &rows, &legs);
            assert_eq!(split.again, again);
            assert_eq!(check_conservation(&split, &legs), Ok(()));
        };
        check(&[&[count(0, 0, 9)], &[count(0, 2, 6)]], false, &[]);
        // A witness, and rows that were lost and asked again.
        check(&[&[count(0, 0, 12)], &[count(0, 2, 6)]], false, &[3, 0, 0]);
        check(&[&[count(0, 0, 9)]], true, &[]);
        check(&[&[count(0, 0, 9), count(1, 0, 2)], &[count(0, 2, 6)]], false, &[0, 2, 0]);
    }
}
