//! What sending coins would cost: the very transaction, built and signed on a copy of the node's coins, and never sent.
//!
//! ldk-node keeps its on-chain wallet to itself and offers no dry run. So its record of coins, which it writes to its store
//! at every change, is read beside it, and the transaction is made as its `send_to_address` makes it. Nothing is
//! written and nothing is broadcast. What the copy holds is compared with what the node says it holds: a record that is
//! behind, or that a later ldk-node writes in another way, gives an error and no wrong figure.
#![allow(clippy::drop_non_drop)] // LDK's macros for its own format do that

use crate::{
    LdkWallet,
    chain::Chain,
    embedded::{DUST_SAT, address, bitcoin_network, check_send},
    store,
};
use bdk_wallet::{
    ChangeSet, KeychainKind, SignOptions, Wallet,
    chain::{
        BlockId, ConfirmationBlockTime, DescriptorId, keychain_txout::ChangeSet as IndexChanges,
        local_chain::ChangeSet as ChainChanges, tx_graph::ChangeSet as GraphChanges,
    },
    template::Bip84,
};
use ldk_node::{
    bitcoin::{
        Amount, BlockHash, FeeRate, OutPoint, Psbt, ScriptBuf, Transaction, TxOut, Txid,
        bip32::Xpriv,
        hashes::{Hash, sha256},
    },
    lightning::{
        decode_tlv_stream,
        io::{Cursor, Read},
        ln::msgs::DecodeError,
        read_tlv_fields,
        util::ser::{BigSize, Readable, RequiredWrapper},
    },
};
use satgrid_wallet::{
    Network, WalletError,
    embedded::{OnchainDraft, OnchainSend, SendError},
    keys::Seed,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The version that ldk-node 0.7 writes before each part of the record.
const RECORD_VERSION: u8 = 1;

fn failed(reason: impl std::fmt::Display) -> SendError {
    SendError::Wallet(WalletError::Node { reason: format!("the transaction could not be tried: {reason}") })
}

impl LdkWallet {
    pub(crate) async fn draft(&self, send: OnchainSend) -> Result<OnchainDraft, SendError> {
        check_send(&send)?;
        let to = address(&send.address, self.network)?.script_pubkey();
        let sat_per_vb = match send.sat_per_vb {
            Some(given) => u64::from(given),
            None => Chain::of(&self.chain).sat_per_vb().await.map_err(failed)?,
        };
        let record = store::coins(&self.dir).await.map_err(failed)?;
        let (total_sat, reserve_sat) = self
            .blocking(|node| {
                let balances = node.list_balances();
                (balances.total_onchain_balance_sats, balances.total_anchor_channels_reserve_sats)
            })
            .await?;
        let (seed, network) = (self.seed.clone(), self.network);
        let made = move || {
            let mut wallet = copy(&record, &seed, network)?;
            let copied_sat = wallet.balance().total().to_sat();
            if copied_sat != total_sat {
                return Err(failed(format!(
                    "the record of coins says {copied_sat} sat and the node {total_sat}; try again after the next look at the chain"
                )));
            }
            draft(&mut wallet, to, send.amount_sat, sat_per_vb, reserve_sat)
        };
        tokio::task::spawn_blocking(made).await.map_err(failed)?
    }
}

/// The transaction as `ldk_node::Wallet::send_to_address` makes it, anchor reserve included.
fn draft(
    wallet: &mut Wallet,
    to: ScriptBuf,
    amount_sat: Option<u64>,
    sat_per_vb: u64,
    reserve_sat: u64,
) -> Result<OnchainDraft, SendError> {
    let rate = FeeRate::from_sat_per_vb(sat_per_vb).ok_or_else(|| failed("no such fee rate"))?;
    let coins = wallet.list_unspent().count();
    let spendable_sat = wallet.balance().trusted_spendable().to_sat().saturating_sub(reserve_sat);
    let funds = || SendError::Funds { spendable_sat, reserve_sat };
    let made = match amount_sat {
        Some(sat) => {
            let mut build = wallet.build_tx();
            build.add_recipient(to.clone(), Amount::from_sat(sat)).fee_rate(rate);
            build.finish()
        }
        // In two steps: what remains beside the reserve is known when the fee is.
        None if reserve_sat > DUST_SAT => {
            let kept = wallet.peek_address(KeychainKind::Internal, 0).address.script_pubkey();
            let mut first = wallet.build_tx();
            first.drain_wallet().drain_to(to.clone()).add_recipient(kept, Amount::from_sat(reserve_sat)).fee_rate(rate);
            let fee = first.finish().map_err(|_| funds())?.fee().map_err(failed)?;
            let left = spendable_sat.saturating_sub(fee.to_sat());
            if left < DUST_SAT {
                return Err(funds());
            }
            let mut build = wallet.build_tx();
            build.add_recipient(to.clone(), Amount::from_sat(left)).fee_absolute(fee);
            build.finish()
        }
        None => {
            let mut build = wallet.build_tx();
            build.drain_wallet().drain_to(to.clone()).fee_rate(rate);
            build.finish()
        }
    };
    let mut psbt: Psbt = made.map_err(|_| funds())?;
    let fee_sat = psbt.fee().map_err(failed)?.to_sat();
    let paid = psbt.unsigned_tx.output.iter().find(|output| output.script_pubkey == to);
    let arrives_sat = paid.map_or(0, |output| output.value.to_sat());
    if spendable_sat < arrives_sat.saturating_add(fee_sat) {
        return Err(funds());
    }
    if !wallet.sign(&mut psbt, SignOptions::default()).map_err(failed)? {
        return Err(failed("the copy does not sign it"));
    }
    let inputs = psbt.unsigned_tx.input.len();
    let vsize = psbt.extract_tx().map_err(failed)?.vsize();
    let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    Ok(OnchainDraft {
        amount_sat: arrives_sat,
        fee_sat,
        vsize: count(vsize),
        sat_per_vb,
        inputs: count(inputs),
        // Where some coins are left out, the draw among them may fall otherwise.
        exact: inputs == coins,
    })
}

/// The node's coins, with its keys, as its store has them.
fn copy(record: &BTreeMap<String, Vec<u8>>, seed: &Seed, network: Network) -> Result<Wallet, SendError> {
    let on = bitcoin_network(network);
    let root = Xpriv::new_master(on, seed.lightning().as_ref()).map_err(failed)?;
    let (external, internal) = (Bip84(root, KeychainKind::External), Bip84(root, KeychainKind::Internal));
    let made = || Wallet::create(external.clone(), internal.clone()).network(on).create_wallet_no_persist();
    let mut fresh = made().map_err(failed)?;
    let mut changes: ChangeSet = fresh.take_staged().unwrap_or_default();
    if let Some(chain) = part::<ChainChanges>(record, "local_chain")? {
        changes.local_chain = chain;
    }
    if let Some(graph) = part::<GraphChanges<ConfirmationBlockTime>>(record, "tx_graph")? {
        changes.tx_graph = graph;
    }
    if let Some(index) = part::<IndexChanges>(record, "indexer")? {
        changes.indexer = index;
    }
    let wallet = Wallet::load()
        .descriptor(KeychainKind::External, Some(external))
        .descriptor(KeychainKind::Internal, Some(internal))
        .extract_keys()
        .check_network(on)
        .load_wallet_no_persist(changes)
        .map_err(failed)?;
    wallet.ok_or_else(|| failed("the record of coins is empty"))
}

fn part<T>(record: &BTreeMap<String, Vec<u8>>, key: &str) -> Result<Option<T>, SendError>
where
    Kept<T>: Readable,
{
    let Some(bytes) = record.get(key) else { return Ok(None) };
    let read: Result<Kept<T>, DecodeError> = Readable::read(&mut Cursor::new(bytes));
    read.map(|kept| Some(kept.0))
        .map_err(|error| failed(format!("its record of coins ({key}) is not as ldk-node 0.7 writes it: {error}")))
}

/// A value as ldk-node keeps it.
struct Kept<T>(T);

fn version(reader: &mut impl Read) -> Result<(), DecodeError> {
    let version: u8 = Readable::read(reader)?;
    if version == RECORD_VERSION { Ok(()) } else { Err(DecodeError::UnknownVersion) }
}

fn required<T>(read: RequiredWrapper<T>) -> Result<T, DecodeError> {
    read.0.ok_or(DecodeError::InvalidValue)
}

/// Many of a kind: how many, then each.
fn each<R: Read, T, C: FromIterator<T>>(
    reader: &mut R,
    mut one: impl FnMut(&mut R) -> Result<T, DecodeError>,
) -> Result<C, DecodeError> {
    let count: BigSize = Readable::read(reader)?;
    (0..count.0).map(|_| one(reader)).collect()
}

impl Readable for Kept<ChainChanges> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        version(reader)?;
        let mut blocks: RequiredWrapper<BTreeMap<u32, Option<BlockHash>>> = RequiredWrapper(None);
        decode_tlv_stream!(reader, { (0, blocks, required) });
        Ok(Kept(ChainChanges { blocks: required(blocks)? }))
    }
}

impl Readable for Kept<GraphChanges<ConfirmationBlockTime>> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        version(reader)?;
        let mut txs: RequiredWrapper<Kept<BTreeSet<Arc<Transaction>>>> = RequiredWrapper(None);
        let mut txouts: RequiredWrapper<BTreeMap<OutPoint, TxOut>> = RequiredWrapper(None);
        let mut anchors: RequiredWrapper<Kept<BTreeSet<(ConfirmationBlockTime, Txid)>>> = RequiredWrapper(None);
        let mut last_seen: RequiredWrapper<BTreeMap<Txid, u64>> = RequiredWrapper(None);
        let mut first_seen = None;
        let mut last_evicted = None;
        decode_tlv_stream!(reader, {
            (0, txs, required),
            (1, first_seen, option),
            (2, txouts, required),
            (3, last_evicted, option),
            (4, anchors, required),
            (6, last_seen, required),
        });
        Ok(Kept(GraphChanges {
            txs: required(txs)?.0,
            txouts: required(txouts)?,
            anchors: required(anchors)?.0,
            last_seen: required(last_seen)?,
            first_seen: first_seen.unwrap_or_default(),
            last_evicted: last_evicted.unwrap_or_default(),
        }))
    }
}

impl Readable for Kept<BTreeSet<Arc<Transaction>>> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        let all = each(reader, |reader| {
            let mut tx: RequiredWrapper<Transaction> = RequiredWrapper(None);
            read_tlv_fields!(reader, { (0, tx, required) });
            Ok(Arc::new(required(tx)?))
        });
        all.map(Kept)
    }
}

impl Readable for Kept<BTreeSet<(ConfirmationBlockTime, Txid)>> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        let all = each(reader, |reader| {
            let mut at: RequiredWrapper<Kept<ConfirmationBlockTime>> = RequiredWrapper(None);
            let mut txid: RequiredWrapper<Txid> = RequiredWrapper(None);
            read_tlv_fields!(reader, { (0, at, required), (2, txid, required) });
            Ok((required(at)?.0, required(txid)?))
        });
        all.map(Kept)
    }
}

impl Readable for Kept<ConfirmationBlockTime> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        let mut block: RequiredWrapper<Kept<BlockId>> = RequiredWrapper(None);
        let mut time: RequiredWrapper<u64> = RequiredWrapper(None);
        decode_tlv_stream!(reader, { (0, block, required), (2, time, required) });
        Ok(Kept(ConfirmationBlockTime { block_id: required(block)?.0, confirmation_time: required(time)? }))
    }
}

impl Readable for Kept<BlockId> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        let mut height: RequiredWrapper<u32> = RequiredWrapper(None);
        let mut hash: RequiredWrapper<BlockHash> = RequiredWrapper(None);
        decode_tlv_stream!(reader, { (0, height, required), (2, hash, required) });
        Ok(Kept(BlockId { height: required(height)?, hash: required(hash)? }))
    }
}

impl Readable for Kept<IndexChanges> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        version(reader)?;
        let mut revealed: RequiredWrapper<Kept<BTreeMap<DescriptorId, u32>>> = RequiredWrapper(None);
        decode_tlv_stream!(reader, { (0, revealed, required) });
        Ok(Kept(IndexChanges { last_revealed: required(revealed)?.0, ..IndexChanges::default() }))
    }
}

impl Readable for Kept<BTreeMap<DescriptorId, u32>> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        let all = each(reader, |reader| {
            let mut id: RequiredWrapper<Kept<DescriptorId>> = RequiredWrapper(None);
            let mut last: RequiredWrapper<u32> = RequiredWrapper(None);
            read_tlv_fields!(reader, { (0, id, required), (2, last, required) });
            Ok((required(id)?.0, required(last)?))
        });
        all.map(Kept)
    }
}

impl Readable for Kept<DescriptorId> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        let mut hash: RequiredWrapper<Kept<sha256::Hash>> = RequiredWrapper(None);
        decode_tlv_stream!(reader, { (0, hash, required) });
        Ok(Kept(DescriptorId(required(hash)?.0)))
    }
}

impl Readable for Kept<sha256::Hash> {
    fn read<R: Read>(reader: &mut R) -> Result<Self, DecodeError> {
        let bytes: [u8; 32] = Readable::read(reader)?;
        Ok(Kept(sha256::Hash::from_byte_array(bytes)))
    }
}
