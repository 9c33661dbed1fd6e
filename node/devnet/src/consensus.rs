//! May this transaction enter the next block?
//!
//! The order of the checks is Bitcoin Core's, and so are the reject reasons, because wallets read them.
//! Script execution is `libbitcoinconsensus` with every soft fork up to taproot switched on.
//! Not checked, since nothing on a regtest of our own needs it: policy on script forms, dust, ancestor counts, sigops.

use std::collections::BTreeSet;

use bitcoin::absolute::LockTime;
use bitcoin::consensus::encode::serialize;
use bitcoin::{Amount, OutPoint, Sequence, Transaction};

use crate::chain::{Chain, Coin};

/// Blocks that must lie on top of a coinbase before it may be spent.
pub(crate) const COINBASE_MATURITY: u32 = 100;
/// The heaviest transaction that is relayed, in weight units (Core's `MAX_STANDARD_TX_WEIGHT`).
pub(crate) const MAX_TX_WEIGHT: u64 = 400_000;
/// The smallest fee rate that is relayed, in sat per virtual byte.
pub(crate) const MIN_RELAY_SAT_PER_VB: u64 = 1;

/// Why a transaction was refused. The text is Bitcoin Core's reject reason, with the figures behind it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefusedTx {
    #[error("bad-txns-vin-empty")]
    NoInputs,
    #[error("bad-txns-vout-empty")]
    NoOutputs,
    #[error("tx-size: {weight} weight units, at most {MAX_TX_WEIGHT}")]
    TooHeavy { weight: u64 },
    #[error("coinbase")]
    Coinbase,
    #[error("bad-txns-vout-toolarge")]
    OutputsTooLarge,
    #[error("non-final: lock time {lock_time}")]
    NotFinal { lock_time: u32 },
    #[error("bad-txns-inputs-duplicate: {outpoint}")]
    DuplicateInput { outpoint: OutPoint },
    #[error("bad-txns-inputs-missingorspent: {outpoint}")]
    MissingOrSpent { outpoint: OutPoint },
    #[error("bad-txns-premature-spend-of-coinbase: at depth {depth}, needs {COINBASE_MATURITY}")]
    ImmatureCoinbase { depth: u32 },
    #[error("non-BIP68-final: input {input}")]
    RelativeLock { input: usize },
    #[error("bad-txns-in-belowout: in {inputs_sat} sat, out {outputs_sat} sat")]
    SpendsMoreThanItHas { inputs_sat: u64, outputs_sat: u64 },
    #[error("mandatory-script-verify-flag-failed: input {input}: {reason}")]
    Script { input: usize, reason: String },
    #[error("min relay fee not met: {fee_sat} sat for {vsize} vbytes")]
    FeeTooLow { fee_sat: u64, vsize: u64 },
    #[error("insufficient fee, rejecting replacement: {fee_sat} sat, needs {needed_sat}")]
    ReplacementTooCheap { fee_sat: u64, needed_sat: u64 },
    #[error("too many potential replacements: {count}")]
    TooManyReplaced { count: usize },
    #[error("bad-txns-spends-conflicting-tx")]
    SpendsWhatItReplaces,
    #[error("txn-already-known")]
    AlreadyConfirmed,
    #[error("mempool full: {limit} transactions")]
    MempoolFull { limit: usize },
}

/// Checks `tx` against the coins that are confirmed or in the mempool, as of the next block.
///
/// Returns the fee in satoshi. Coins that another unconfirmed transaction spends count as present: replacing it is
/// the mempool's question.
pub(crate) fn check_tx(chain: &Chain, tx: &Transaction) -> Result<u64, RefusedTx> {
    check_shape(tx)?;
    let next_height = chain.height() + 1;
    let median_time = chain.median_time(chain.height());
    if !is_final(tx, next_height, median_time) {
        return Err(RefusedTx::NotFinal { lock_time: tx.lock_time.to_consensus_u32() });
    }
    let coins = spent_coins(chain, tx, next_height, median_time)?;
    let inputs_sat = sum(coins.iter().map(|coin| coin.output.value))?;
    let outputs_sat = sum(tx.output.iter().map(|output| output.value))?;
    let Some(fee_sat) = inputs_sat.checked_sub(outputs_sat) else {
        return Err(RefusedTx::SpendsMoreThanItHas { inputs_sat, outputs_sat });
    };
    let vsize = tx.vsize() as u64;
    if fee_sat < vsize * MIN_RELAY_SAT_PER_VB {
        return Err(RefusedTx::FeeTooLow { fee_sat, vsize });
    }
    check_scripts(tx, &coins)?;
    Ok(fee_sat)
}

/// The checks that need no chain.
fn check_shape(tx: &Transaction) -> Result<(), RefusedTx> {
    if tx.input.is_empty() {
        return Err(RefusedTx::NoInputs);
    }
    if tx.output.is_empty() {
        return Err(RefusedTx::NoOutputs);
    }
    let weight = tx.weight().to_wu();
    if weight > MAX_TX_WEIGHT {
        return Err(RefusedTx::TooHeavy { weight });
    }
    if tx.input.iter().any(|input| input.previous_output.is_null()) {
        return Err(RefusedTx::Coinbase);
    }
    let mut seen = BTreeSet::new();
    for input in &tx.input {
        if !seen.insert(input.previous_output) {
            return Err(RefusedTx::DuplicateInput { outpoint: input.previous_output });
        }
    }
    Ok(())
}

/// The lock time has passed, or every input opts out of it (BIP 113: time is the median of the last 11 blocks).
fn is_final(tx: &Transaction, next_height: u32, median_time: u32) -> bool {
    let passed = match tx.lock_time {
        LockTime::Blocks(height) => height.to_consensus_u32() < next_height,
        LockTime::Seconds(time) => time.to_consensus_u32() < median_time,
    };
    passed || tx.input.iter().all(|input| input.sequence == Sequence::MAX)
}

/// The coin behind each input, in order, each of them mature and past its relative lock (BIP 68).
fn spent_coins(chain: &Chain, tx: &Transaction, next_height: u32, median_time: u32) -> Result<Vec<Coin>, RefusedTx> {
    let mut coins = Vec::with_capacity(tx.input.len());
    for (index, input) in tx.input.iter().enumerate() {
        let outpoint = input.previous_output;
        let coin = chain.coin(&outpoint).ok_or(RefusedTx::MissingOrSpent { outpoint })?;
        // An unconfirmed coin would be confirmed in the next block at the earliest.
        let coin_height = coin.height.unwrap_or(next_height);
        let depth = next_height - coin_height;
        if coin.coinbase && depth < COINBASE_MATURITY {
            return Err(RefusedTx::ImmatureCoinbase { depth });
        }
        if tx.version.0 as u32 >= 2 && input.sequence.is_relative_lock_time() {
            let count = input.sequence.to_consensus_u32() & 0xffff;
            let unlocked = if input.sequence.is_height_locked() {
                depth >= count
            } else {
                median_time >= chain.median_time(coin_height.saturating_sub(1)).saturating_add(count * 512)
            };
            if !unlocked {
                return Err(RefusedTx::RelativeLock { input: index });
            }
        }
        coins.push(coin);
    }
    Ok(coins)
}

fn sum(values: impl Iterator<Item = Amount>) -> Result<u64, RefusedTx> {
    let mut total = Amount::ZERO;
    for value in values {
        total = total.checked_add(value).filter(|t| *t <= Amount::MAX_MONEY).ok_or(RefusedTx::OutputsTooLarge)?;
    }
    Ok(total.to_sat())
}

fn check_scripts(tx: &Transaction, coins: &[Coin]) -> Result<(), RefusedTx> {
    let raw = serialize(tx);
    let spent: Vec<bitcoinconsensus::Utxo> = coins
        .iter()
        .map(|coin| bitcoinconsensus::Utxo {
            script_pubkey: coin.output.script_pubkey.as_bytes().as_ptr(),
            script_pubkey_len: coin.output.script_pubkey.len() as u32,
            value: coin.output.value.to_sat() as i64,
        })
        .collect();
    for (input, coin) in coins.iter().enumerate() {
        let script = coin.output.script_pubkey.as_bytes();
        bitcoinconsensus::verify(script, coin.output.value.to_sat(), &raw, Some(&spent), input)
            .map_err(|error| RefusedTx::Script { input, reason: error.to_string() })?;
    }
    Ok(())
}
