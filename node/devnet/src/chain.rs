//! The regtest chain: blocks, coins, the mempool, the miner.
//!
//! One [`Chain`] is a plain value: time comes in as an argument, and every answer is a pure function of what was
//! submitted and mined. [`crate::server`] puts it behind HTTP.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitcoin::block::{Header, Version};
use bitcoin::hashes::{Hash, sha256};
use bitcoin::script::{Builder, PushBytesBuf};
use bitcoin::{
    Amount, Block, BlockHash, CompactTarget, Network, OutPoint, ScriptBuf, Sequence, Transaction, TxIn, TxMerkleNode,
    TxOut, Txid, Witness, WitnessMerkleNode, Wtxid, absolute, merkle_tree, transaction,
};

use crate::consensus::{RefusedTx, check_tx};
use crate::mempool::{MAX_TRANSACTIONS, Mempool};

/// Blocks between two halvings of the subsidy on regtest.
const HALVING_INTERVAL: u32 = 150;
/// Weight that transactions may fill; the rest of the 4,000,000 is for header and coinbase.
const MAX_BLOCK_TX_WEIGHT: u64 = 3_990_000;
/// Easiest target: about every second nonce is a valid proof of work.
const REGTEST_BITS: u32 = 0x207f_ffff;
/// Marks our coinbases, and keeps their script over the two bytes that consensus asks for.
const COINBASE_TAG: &[u8; 7] = b"satgrid";

/// SHA-256 of an output script, the key of Esplora's history.
pub type ScriptHash = [u8; 32];

/// An output that could be spent.
#[derive(Debug, Clone)]
pub struct Coin {
    pub output: TxOut,
    /// Height of its block; `None` while its transaction waits in the mempool.
    pub height: Option<u32>,
    pub coinbase: bool,
}

/// A regtest chain from its genesis block, with its mempool. A clone is another chain with the same past.
#[derive(Clone)]
pub struct Chain {
    blocks: Vec<Block>,
    heights: HashMap<BlockHash, u32>,
    /// Height and position in the block.
    confirmed: HashMap<Txid, (u32, usize)>,
    coins: HashMap<OutPoint, Coin>,
    spenders: HashMap<OutPoint, (Txid, u32)>,
    history: HashMap<ScriptHash, BTreeSet<Txid>>,
    mempool: Mempool,
    estimate_sat_per_vb: u32,
}

/// A chain that several tasks use. Lock it for a moment only, and never across an await.
pub type Shared = Arc<Mutex<Chain>>;

/// A new chain, ready to be served and shared.
pub fn shared() -> Shared {
    Arc::new(Mutex::new(Chain::new()))
}

/// Locks a shared chain. A panic elsewhere cannot leave it half-changed in a way that matters to a test network.
pub(crate) fn lock(chain: &Shared) -> MutexGuard<'_, Chain> {
    chain.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// The genesis block and nothing else.
    pub fn new() -> Self {
        let genesis = bitcoin::constants::genesis_block(Network::Regtest);
        Self {
            heights: HashMap::from([(genesis.block_hash(), 0)]),
            blocks: vec![genesis],
            confirmed: HashMap::new(),
            coins: HashMap::new(),
            spenders: HashMap::new(),
            history: HashMap::new(),
            mempool: Mempool::default(),
            estimate_sat_per_vb: 1,
        }
    }

    /// What every face answers when it is asked for a fee rate; blocks here are never full, so it is a matter of taste.
    pub fn set_estimate(&mut self, sat_per_vb: u32) {
        self.estimate_sat_per_vb = sat_per_vb.max(1);
    }

    pub(crate) fn estimate_sat_per_vb(&self) -> u32 {
        self.estimate_sat_per_vb
    }

    /// The same as bitcoind and Electrum's servers write it.
    pub(crate) fn estimate_btc_per_kvb(&self) -> f64 {
        f64::from(self.estimate_sat_per_vb) * 1e-5
    }

    pub fn height(&self) -> u32 {
        self.blocks.len() as u32 - 1
    }

    pub fn tip(&self) -> BlockHash {
        self.tip_block().block_hash()
    }

    pub fn block(&self, height: u32) -> Option<&Block> {
        self.blocks.get(height as usize)
    }

    pub fn height_of(&self, hash: &BlockHash) -> Option<u32> {
        self.heights.get(hash).copied()
    }

    /// Height of the block that holds this transaction.
    pub fn confirmed_at(&self, txid: &Txid) -> Option<u32> {
        self.confirmed.get(txid).map(|(height, _)| *height)
    }

    /// A transaction, confirmed or waiting.
    pub fn tx(&self, txid: &Txid) -> Option<&Transaction> {
        match self.confirmed.get(txid) {
            Some((height, position)) => self.block(*height)?.txdata.get(*position),
            None => self.mempool.get(txid).map(|entry| &entry.tx),
        }
    }

    /// The unspent output at `outpoint`, confirmed or waiting; the mempool's spends are not looked at.
    pub fn coin(&self, outpoint: &OutPoint) -> Option<Coin> {
        if let Some(coin) = self.coins.get(outpoint) {
            return Some(coin.clone());
        }
        let output = self.mempool.get(&outpoint.txid)?.tx.output.get(outpoint.vout as usize)?;
        Some(Coin { output: output.clone(), height: None, coinbase: false })
    }

    /// The transaction, and its input, that spends `outpoint`, confirmed or waiting.
    pub fn spender(&self, outpoint: &OutPoint) -> Option<(Txid, u32)> {
        self.spenders.get(outpoint).copied().or_else(|| self.mempool.spender(outpoint))
    }

    /// Transactions that pay or spend a script: the waiting ones, then the confirmed, newest first.
    pub fn history(&self, script: &ScriptHash) -> (Vec<Txid>, Vec<Txid>) {
        let Some(txids) = self.history.get(script) else { return (Vec::new(), Vec::new()) };
        let mut waiting = Vec::new();
        let mut confirmed = Vec::new();
        for txid in txids {
            match self.confirmed.get(txid) {
                Some(place) => confirmed.push((*place, *txid)),
                None => waiting.push(*txid),
            }
        }
        confirmed.sort_unstable_by(|a, b| b.cmp(a));
        (waiting, confirmed.into_iter().map(|(_, txid)| txid).collect())
    }

    /// Median time of the eleven blocks that end at `height` (BIP 113).
    pub fn median_time(&self, height: u32) -> u32 {
        let last = (height as usize).min(self.blocks.len() - 1);
        let mut times: Vec<u32> = self.blocks[last.saturating_sub(10)..=last].iter().map(|b| b.header.time).collect();
        times.sort_unstable();
        times[times.len() / 2]
    }

    /// Takes a transaction into the mempool; one that already waits is accepted again.
    ///
    /// It may replace waiting ones that spend the same coins, if it pays for that.
    pub fn submit(&mut self, tx: Transaction, now_s: u32) -> Result<Txid, RefusedTx> {
        let txid = tx.compute_txid();
        if self.mempool.get(&txid).is_some() {
            return Ok(txid);
        }
        if self.confirmed.contains_key(&txid) {
            return Err(RefusedTx::AlreadyConfirmed);
        }
        let fee_sat = check_tx(self, &tx)?;
        let replaced = self.mempool.replaced_by(&tx, fee_sat)?;
        if self.mempool.len() - replaced.len() >= MAX_TRANSACTIONS {
            return Err(RefusedTx::MempoolFull { limit: MAX_TRANSACTIONS });
        }
        for old in replaced {
            self.evict(&old);
        }
        let touches = self.touched_scripts(&tx);
        for script in &touches {
            self.history.entry(*script).or_default().insert(txid);
        }
        let height = self.height();
        self.mempool.insert(txid, tx, fee_sat, now_s, height, touches);
        Ok(txid)
    }

    /// Mines one block that pays its reward to `reward_to` and confirms what waits, oldest first.
    pub fn mine(&mut self, reward_to: ScriptBuf, now_s: u32) -> BlockHash {
        let height = self.height() + 1;
        let entries = self.mempool.take(MAX_BLOCK_TX_WEIGHT);
        let fees_sat: u64 = entries.iter().map(|entry| entry.fee_sat).sum();
        let txs: Vec<Transaction> = entries.into_iter().map(|entry| entry.tx).collect();
        let time = now_s.max(self.median_time(height - 1).saturating_add(1));
        let block = build_block(self.tip(), height, time, reward_to, fees_sat, txs);
        self.connect(block)
    }

    /// Takes the last `depth` blocks back: as if others had been found in their place, which the caller mines. Their
    /// transactions wait again where `again` says so, as far as they are still valid.
    pub fn undo(&mut self, depth: u32, now_s: u32, again: impl Fn(&Transaction) -> bool) {
        let kept = self.blocks.len().saturating_sub(depth as usize).max(1);
        let gone = self.blocks.split_off(kept);
        let confirmed = gone.into_iter().flat_map(|block| block.txdata.into_iter().skip(1));
        let waited = self.mempool.txids().filter_map(|txid| self.mempool.get(txid)).map(|entry| entry.tx.clone());
        let waiting: Vec<Transaction> = confirmed.chain(waited.collect::<Vec<_>>()).filter(again).collect();
        let blocks = std::mem::take(&mut self.blocks);
        *self = Self { estimate_sat_per_vb: self.estimate_sat_per_vb, ..Self::new() };
        for block in blocks.into_iter().skip(1) {
            let txs = block.txdata.clone();
            self.connect(block);
            for tx in &txs {
                for script in self.touched_scripts(tx) {
                    self.history.entry(script).or_default().insert(tx.compute_txid());
                }
            }
        }
        for tx in waiting {
            if let Err(refused) = self.submit(tx, now_s) {
                tracing::debug!(%refused, "a transaction is gone with its block");
            }
        }
    }

    /// A block that confirms nothing: what waits goes on waiting.
    pub fn mine_empty(&mut self, now_s: u32) -> BlockHash {
        let height = self.height() + 1;
        let time = now_s.max(self.median_time(height - 1).saturating_add(1));
        let block = build_block(self.tip(), height, time, ScriptBuf::new(), 0, Vec::new());
        self.connect(block)
    }

    pub(crate) fn mempool(&self) -> &Mempool {
        &self.mempool
    }

    /// An output of any known transaction, spent or not.
    pub(crate) fn output(&self, outpoint: &OutPoint) -> Option<&TxOut> {
        self.tx(&outpoint.txid)?.output.get(outpoint.vout as usize)
    }

    fn tip_block(&self) -> &Block {
        &self.blocks[self.blocks.len() - 1]
    }

    fn evict(&mut self, txid: &Txid) {
        let Some(entry) = self.mempool.remove(txid) else { return };
        for script in &entry.touches {
            if let Some(txids) = self.history.get_mut(script) {
                txids.remove(txid);
            }
        }
    }

    fn touched_scripts(&self, tx: &Transaction) -> BTreeSet<ScriptHash> {
        let spent = tx.input.iter().filter_map(|input| self.output(&input.previous_output));
        spent.chain(&tx.output).map(|output| script_hash(&output.script_pubkey)).collect()
    }

    fn connect(&mut self, block: Block) -> BlockHash {
        let height = self.blocks.len() as u32;
        let hash = block.block_hash();
        for (position, tx) in block.txdata.iter().enumerate() {
            let txid = tx.compute_txid();
            let coinbase = position == 0;
            for (index, input) in tx.input.iter().enumerate().filter(|_| !coinbase) {
                self.coins.remove(&input.previous_output);
                self.spenders.insert(input.previous_output, (txid, index as u32));
            }
            for (vout, output) in tx.output.iter().enumerate() {
                if !output.script_pubkey.is_op_return() {
                    let coin = Coin { output: output.clone(), height: Some(height), coinbase };
                    self.coins.insert(OutPoint::new(txid, vout as u32), coin);
                }
                // What a waiting transaction touches was indexed when it came; only a coinbase is new here.
                if coinbase {
                    self.history.entry(script_hash(&output.script_pubkey)).or_default().insert(txid);
                }
            }
            self.confirmed.insert(txid, (height, position));
        }
        self.heights.insert(hash, height);
        self.blocks.push(block);
        hash
    }
}

/// The key under which Esplora files a script.
pub fn script_hash(script: &bitcoin::Script) -> ScriptHash {
    sha256::Hash::hash(script.as_bytes()).to_byte_array()
}

/// Subsidy of the block at `height`, in satoshi.
pub(crate) fn subsidy_sat(height: u32) -> u64 {
    (50 * Amount::ONE_BTC.to_sat()).checked_shr(height / HALVING_INTERVAL).unwrap_or(0)
}

fn build_block(
    prev: BlockHash,
    height: u32,
    time: u32,
    reward_to: ScriptBuf,
    fees_sat: u64,
    txs: Vec<Transaction>,
) -> Block {
    let mut coinbase = Transaction {
        version: transaction::Version::TWO,
        lock_time: absolute::LockTime::ZERO,
        input: vec![TxIn {
            previous_output: OutPoint::null(),
            // BIP 34: the height makes every coinbase, and so its id, unique.
            script_sig: Builder::new().push_int(i64::from(height)).push_slice(COINBASE_TAG).into_script(),
            sequence: Sequence::MAX,
            witness: Witness::from_slice(&[[0u8; 32]]),
        }],
        output: vec![TxOut { value: Amount::from_sat(subsidy_sat(height) + fees_sat), script_pubkey: reward_to }],
    };
    coinbase.output.push(TxOut { value: Amount::ZERO, script_pubkey: witness_commitment(&txs) });

    let mut txdata = vec![coinbase];
    txdata.extend(txs);
    let header = Header {
        version: Version::from_consensus(0x2000_0000),
        prev_blockhash: prev,
        merkle_root: TxMerkleNode::all_zeros(),
        time,
        bits: CompactTarget::from_consensus(REGTEST_BITS),
        nonce: 0,
    };
    let mut block = Block { header, txdata };
    // A block always has its coinbase, so there is a root.
    if let Some(root) = block.compute_merkle_root() {
        block.header.merkle_root = root;
    }
    let target = block.header.target();
    while block.header.validate_pow(target).is_err() {
        block.header.nonce = block.header.nonce.wrapping_add(1);
    }
    block
}

/// BIP 141: the coinbase commits to every witness; its own counts as zero.
fn witness_commitment(txs: &[Transaction]) -> ScriptBuf {
    let ids = std::iter::once(Wtxid::all_zeros()).chain(txs.iter().map(Transaction::compute_wtxid));
    let root = merkle_tree::calculate_root(ids.map(|id| id.to_raw_hash())).map(WitnessMerkleNode::from_raw_hash);
    let root = root.unwrap_or(WitnessMerkleNode::all_zeros());
    let commitment = Block::compute_witness_commitment(&root, &[0u8; 32]);
    let mut data = PushBytesBuf::from([0xaa, 0x21, 0xa9, 0xed]);
    // Four and thirty-two bytes: far under the limit on a push, so this cannot fail.
    let pushed = data.extend_from_slice(commitment.as_byte_array());
    debug_assert!(pushed.is_ok());
    ScriptBuf::new_op_return(data)
}
