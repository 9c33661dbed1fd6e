//! Transactions that wait for a block, and the rule by which one replaces another.
//!
//! An entry never precedes its parents in arrival order, so a block takes entries in that order.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bitcoin::{OutPoint, Transaction, Txid};

use crate::chain::ScriptHash;
use crate::consensus::{MIN_RELAY_SAT_PER_VB, RefusedTx};

/// Transactions that may wait at once.
pub(crate) const MAX_TRANSACTIONS: usize = 5_000;
/// Transactions that one replacement may evict (BIP 125, rule 5).
pub(crate) const MAX_REPLACED: usize = 100;

/// A transaction that waits.
#[derive(Clone)]
pub(crate) struct MempoolEntry {
    pub(crate) tx: Transaction,
    pub(crate) fee_sat: u64,
    /// Unix seconds of arrival.
    pub(crate) time_s: u32,
    /// Height of the tip at arrival.
    pub(crate) height: u32,
    /// Scripts that it pays or spends, for the history index.
    pub(crate) touches: BTreeSet<ScriptHash>,
    arrival: u64,
}

#[derive(Default, Clone)]
pub(crate) struct Mempool {
    entries: HashMap<Txid, MempoolEntry>,
    by_arrival: BTreeMap<u64, Txid>,
    spends: HashMap<OutPoint, (Txid, u32)>,
    arrivals: u64,
}

impl Mempool {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn get(&self, txid: &Txid) -> Option<&MempoolEntry> {
        self.entries.get(txid)
    }

    /// Ids in the order of arrival.
    pub(crate) fn txids(&self) -> impl Iterator<Item = &Txid> {
        self.by_arrival.values()
    }

    /// The waiting transaction, and its input, that spends `outpoint`.
    pub(crate) fn spender(&self, outpoint: &OutPoint) -> Option<(Txid, u32)> {
        self.spends.get(outpoint).copied()
    }

    /// What must leave for `tx` to enter: every transaction that spends the same coins, and all their descendants.
    ///
    /// Any transaction may be replaced (full RBF) by one that pays more in total, and its own relay besides.
    pub(crate) fn replaced_by(&self, tx: &Transaction, fee_sat: u64) -> Result<BTreeSet<Txid>, RefusedTx> {
        let mut replaced = BTreeSet::new();
        let mut queue: Vec<Txid> =
            tx.input.iter().filter_map(|i| self.spender(&i.previous_output)).map(|(txid, _)| txid).collect();
        while let Some(txid) = queue.pop() {
            if !replaced.insert(txid) {
                continue;
            }
            if replaced.len() > MAX_REPLACED {
                return Err(RefusedTx::TooManyReplaced { count: replaced.len() });
            }
            let outputs = self.entries.get(&txid).map_or(0, |entry| entry.tx.output.len() as u32);
            queue.extend((0..outputs).filter_map(|n| self.spender(&OutPoint::new(txid, n))).map(|(child, _)| child));
        }
        if replaced.is_empty() {
            return Ok(replaced);
        }
        if tx.input.iter().any(|input| replaced.contains(&input.previous_output.txid)) {
            return Err(RefusedTx::SpendsWhatItReplaces);
        }
        let old_fees: u64 = replaced.iter().filter_map(|id| self.entries.get(id)).map(|entry| entry.fee_sat).sum();
        let needed_sat = old_fees + tx.vsize() as u64 * MIN_RELAY_SAT_PER_VB;
        if fee_sat < needed_sat {
            return Err(RefusedTx::ReplacementTooCheap { fee_sat, needed_sat });
        }
        Ok(replaced)
    }

    /// Adds a checked transaction.
    pub(crate) fn insert(
        &mut self,
        txid: Txid,
        tx: Transaction,
        fee_sat: u64,
        time_s: u32,
        height: u32,
        touches: BTreeSet<ScriptHash>,
    ) {
        let arrival = self.arrivals;
        self.arrivals += 1;
        for (index, input) in tx.input.iter().enumerate() {
            self.spends.insert(input.previous_output, (txid, index as u32));
        }
        self.by_arrival.insert(arrival, txid);
        self.entries.insert(txid, MempoolEntry { tx, fee_sat, time_s, height, touches, arrival });
    }

    pub(crate) fn remove(&mut self, txid: &Txid) -> Option<MempoolEntry> {
        let entry = self.entries.remove(txid)?;
        self.by_arrival.remove(&entry.arrival);
        for input in &entry.tx.input {
            self.spends.remove(&input.previous_output);
        }
        Some(entry)
    }

    /// Takes transactions for a block, oldest first, up to `max_weight` weight units.
    pub(crate) fn take(&mut self, max_weight: u64) -> Vec<MempoolEntry> {
        let mut weight = 0;
        let mut ids = Vec::new();
        for txid in self.by_arrival.values() {
            weight += self.entries.get(txid).map_or(0, |entry| entry.tx.weight().to_wu());
            if weight > max_weight {
                break;
            }
            ids.push(*txid);
        }
        ids.iter().filter_map(|txid| self.remove(txid)).collect()
    }
}
