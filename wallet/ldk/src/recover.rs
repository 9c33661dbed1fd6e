//! What peers' closings of lost channels leave for us, found and swept with the words alone.
//!
//! A commitment of the peer pays our share to one of [`STATIC_KEYS`] keys that LDK derives from the seed without any
//! state of a channel (its `v2_remote_key_derivation`, which ldk-node 0.7 turns on). So the funding of a lost channel is
//! watched; the transaction that spends it is searched for an output to one of these keys; and that is sent on to the
//! wallet. Without anchors the key is paid as P2WPKH; with anchors a script asks for one confirmation more.
//!
//! HTLCs that were in flight when the state was lost are not recovered: their keys are in that state.

use crate::{
    ChainSource, LdkWallet,
    chain::Chain,
    embedded::{DUST_SAT, address, bitcoin_network},
};
use ldk_node::bitcoin::{
    Address, Amount, CompressedPublicKey, EcdsaSighashType, OutPoint, ScriptBuf, Sequence, Transaction, TxIn, TxOut,
    Witness,
    absolute::LockTime,
    bip32::{ChildNumber, Xpriv},
    ecdsa::Signature,
    opcodes::all::{OP_CHECKSIGVERIFY, OP_CSV},
    script::Builder,
    secp256k1::{Message, PublicKey, Secp256k1, SecretKey},
    sighash::SighashCache,
    transaction::Version,
};
use satgrid_types::LightningKey;
use satgrid_wallet::{
    Lightning, Network, WalletError,
    embedded::{BackedUp, ChannelBackup},
    keys::Seed,
    restore::LostState,
};
use std::collections::BTreeMap;

/// Keys to which peers' commitments may pay us.
const STATIC_KEYS: u32 = 1_000;
/// LDK's hardened children of its master key: the node's own key, and the root of the static keys.
const NODE_INDEX: u32 = 0;
const STATIC_INDEX: u32 = 8;
/// The longest signature, its sighash byte included.
const SIGNATURE_LEN: usize = 72;
/// At this rate nothing is waited for: what does not pay it is not worth moving.
const CHEAP_SAT_PER_VB: u64 = 5;
/// Above that, a fee may take one part in so many of what it moves. Our share is ours alone and has no deadline.
const MOST_FEE_SHARE: u64 = 4;

/// How an output of a static key is spent.
struct StaticKey {
    secret: SecretKey,
    public: PublicKey,
    anchors: bool,
}

/// LDK's master key, as ldk-node makes it from the words' seed.
fn ldk_master(seed: &Seed, network: Network) -> Option<Xpriv> {
    let root = Xpriv::new_master(bitcoin_network(network), seed.lightning().as_ref()).ok()?;
    // LDK's own derivation names a network that its keys do not depend on.
    Xpriv::new_master(ldk_node::bitcoin::Network::Testnet, &root.private_key.secret_bytes()).ok()
}

fn child(parent: &Xpriv, index: u32) -> Option<Xpriv> {
    parent.derive_priv(&Secp256k1::new(), &[ChildNumber::from_hardened_idx(index).ok()?]).ok()
}

/// The Lightning node that these words give.
pub fn node_id(seed: &Seed, network: Network) -> Option<LightningKey> {
    let key = child(&ldk_master(seed, network)?, NODE_INDEX)?;
    Some(LightningKey(PublicKey::from_secret_key(&Secp256k1::new(), &key.private_key).serialize()))
}

/// `<key> OP_CHECKSIGVERIFY 1 OP_CSV` (BOLT 3, `to_remote` with anchors).
fn anchored(key: &PublicKey) -> ScriptBuf {
    Builder::new()
        .push_slice(key.serialize())
        .push_opcode(OP_CHECKSIGVERIFY)
        .push_int(1)
        .push_opcode(OP_CSV)
        .into_script()
}

fn static_keys(seed: &Seed, network: Network) -> BTreeMap<ScriptBuf, StaticKey> {
    let mut keys = BTreeMap::new();
    let Some(root) = ldk_master(seed, network).and_then(|master| child(&master, STATIC_INDEX)) else { return keys };
    for key in (0..STATIC_KEYS).filter_map(|index| child(&root, index)) {
        let secret = key.private_key;
        let public = PublicKey::from_secret_key(&Secp256k1::new(), &secret);
        let plain = ScriptBuf::new_p2wpkh(&CompressedPublicKey(public).wpubkey_hash());
        keys.insert(plain, StaticKey { secret, public, anchors: false });
        keys.insert(anchored(&public).to_p2wsh(), StaticKey { secret, public, anchors: true });
    }
    keys
}

/// A signed transaction that moves `output` to `to`; `Err` with its worth where that is not above dust and fee.
fn spend(from: OutPoint, output: &TxOut, key: &StaticKey, to: &Address, sat_per_vb: u64) -> Result<Transaction, u64> {
    let script = anchored(&key.public);
    let input = TxIn {
        previous_output: from,
        script_sig: ScriptBuf::new(),
        sequence: if key.anchors { Sequence::from_height(1) } else { Sequence::ENABLE_RBF_NO_LOCKTIME },
        witness: Witness::new(),
    };
    let value = output.value.to_sat();
    let mut tx = Transaction {
        version: Version::TWO,
        lock_time: LockTime::ZERO,
        input: vec![input],
        output: vec![TxOut { value: Amount::ZERO, script_pubkey: to.script_pubkey() }],
    };
    let last: &[u8] = if key.anchors { script.as_bytes() } else { &key.public.serialize() };
    let witness = |signature: &[u8]| Witness::from_slice(&[signature, last]);
    tx.input[0].witness = witness(&[0; SIGNATURE_LEN]);
    let fee = u64::try_from(tx.vsize()).unwrap_or(u64::MAX).saturating_mul(sat_per_vb);
    let left = value.saturating_sub(fee);
    if left < DUST_SAT {
        return Err(value);
    }
    tx.output[0].value = Amount::from_sat(left);
    let mut cache = SighashCache::new(&tx);
    let all = EcdsaSighashType::All;
    let hash = if key.anchors {
        cache.p2wsh_signature_hash(0, &script, output.value, all).map_err(drop)
    } else {
        cache.p2wpkh_signature_hash(0, &output.script_pubkey, output.value, all).map_err(drop)
    };
    let Ok(hash): Result<_, ()> = hash else { return Err(value) };
    let signature = Secp256k1::new().sign_ecdsa(&Message::from(hash), &key.secret);
    tx.input[0].witness = witness(&Signature { signature, sighash_type: all }.serialize());
    Ok(tx)
}

/// What to do with our share at a fee rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worth {
    Move,
    /// The rate is high, or the source says so: it may be another one tomorrow.
    Wait,
    /// With its worth.
    Leave(u64),
}

fn worth(from: OutPoint, output: &TxOut, key: &StaticKey, sat_per_vb: u64) -> Worth {
    // As long as any address of the wallet; none is given away for a question.
    let to = Address::p2wpkh(&CompressedPublicKey(key.public), ldk_node::bitcoin::Network::Bitcoin);
    if let Err(value) = spend(from, output, key, &to, sat_per_vb.min(CHEAP_SAT_PER_VB)) {
        return Worth::Leave(value);
    }
    let value = output.value.to_sat();
    match spend(from, output, key, &to, sat_per_vb) {
        Ok(_) if sat_per_vb <= CHEAP_SAT_PER_VB => Worth::Move,
        Ok(tx) if tx.output[0].value.to_sat() >= value - value / MOST_FEE_SHARE => Worth::Move,
        Ok(_) | Err(_) => Worth::Wait,
    }
}

fn funding(lost: &BackedUp) -> Result<OutPoint, WalletError> {
    let bad = || WalletError::Node { reason: format!("channel {} has no funding in the backup", lost.channel) };
    lost.funding.as_deref().and_then(|text| text.parse().ok()).ok_or_else(bad)
}

fn chain_error(reason: String) -> WalletError {
    WalletError::Node { reason: format!("the chain source: {reason}") }
}

impl LdkWallet {
    pub(crate) async fn recover_channel(&self, lost: &BackedUp) -> Result<LostState, WalletError> {
        let chain = Chain::of(&self.chain);
        let Some(closing) = chain.spender(funding(lost)?).await.map_err(chain_error)? else {
            return Ok(LostState::Asked);
        };
        let close = closing.tx.compute_txid();
        let txid = close.to_string();
        // Until a block has it another may take its place, and what that pays us is what counts.
        if !closing.confirmed {
            return Ok(LostState::Closed { txid });
        }
        let keys = static_keys(&self.seed, self.network);
        let ours = (0u32..).zip(&closing.tx.output).find_map(|(vout, output)| {
            Some((OutPoint { txid: close, vout }, output, keys.get(&output.script_pubkey)?))
        });
        let Some((from, output, key)) = ours else { return Ok(LostState::Elsewhere { txid }) };
        if let Some(spender) = chain.spender(from).await.map_err(chain_error)? {
            let sat = spender.tx.output.iter().map(|output| output.value.to_sat()).sum();
            return Ok(LostState::Swept { txid: spender.tx.compute_txid().to_string(), sat });
        }
        let rate = chain.sat_per_vb().await.map_err(chain_error)?;
        match worth(from, output, key, rate) {
            Worth::Move => {}
            Worth::Wait => return Ok(LostState::Closed { txid }),
            Worth::Leave(sat) => return Ok(LostState::TooSmall { txid, sat }),
        }
        let to = self.new_address().await?;
        let to = address(&to, self.network).map_err(|e| WalletError::Node { reason: e.to_string() })?;
        match spend(from, output, key, &to, rate) {
            Ok(tx) => {
                chain.broadcast(&tx).await.map_err(chain_error)?;
                let sat = tx.output.iter().map(|output| output.value.to_sat()).sum();
                Ok(LostState::Swept { txid: tx.compute_txid().to_string(), sat })
            }
            Err(sat) => Ok(LostState::TooSmall { txid, sat }),
        }
    }
}

/// What a restore would find, without touching anything.
#[derive(Debug, Clone)]
pub struct Rehearsed {
    pub channel: BackedUp,
    /// `Ok(true)`: open on chain; `Ok(false)`: closed already; else what the chain source said.
    pub open: Result<bool, String>,
}

/// Holds a channel backup against the words and the chain. `Err`: they do not belong together.
pub async fn rehearse(
    seed: &Seed,
    network: Network,
    source: &ChainSource,
    backup: &ChannelBackup,
) -> Result<Vec<Rehearsed>, String> {
    let ours = node_id(seed, network).ok_or("the words give no Lightning key")?;
    if ours != backup.node {
        return Err(format!("the backup is of node {}, these words are those of {ours}", backup.node));
    }
    let chain = Chain::of(source);
    let mut found = Vec::new();
    for channel in &backup.channels {
        let open = match funding(channel) {
            Ok(out) => chain.spender(out).await.map(|spender| spender.is_none()),
            Err(error) => Err(error.to_string()),
        };
        found.push(Rehearsed { channel: channel.clone(), open });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ldk_node::lightning::sign::{KeysManager, NodeSigner, Recipient};
    use satgrid_wallet::keys::Phrase;
    use std::collections::BTreeSet;

    /// LDK's own list of scripts, and its own node id, from the same words.
    #[test]
    fn the_keys_are_those_of_ldk() {
        for network in [Network::Regtest, Network::Mainnet] {
            let seed = Phrase::from_entropy(&[3; 32]).unwrap().seed();
            let root = Xpriv::new_master(bitcoin_network(network), seed.lightning().as_ref()).unwrap();
            let manager = KeysManager::new(&root.private_key.secret_bytes(), 1, 2, true);
            let theirs = manager.possible_v2_counterparty_closed_balance_spks(&Secp256k1::new());
            let theirs: BTreeSet<ScriptBuf> = theirs.into_iter().collect();
            let ours: BTreeSet<ScriptBuf> = static_keys(&seed, network).into_keys().collect();
            assert_eq!(ours.len(), 2_000);
            assert_eq!(ours, theirs);
            let id = manager.get_node_id(Recipient::Node).unwrap();
            assert_eq!(node_id(&seed, network), Some(LightningKey(id.serialize())));
        }
    }

    #[test]
    fn what_is_not_worth_its_fee_is_left() {
        let seed = Phrase::from_entropy(&[3; 16]).unwrap().seed();
        let keys = static_keys(&seed, Network::Regtest);
        let to = address("bcrt1q6rhpng9evdsfnn833a4f4vej0asu6dk5srld6x", Network::Regtest).unwrap();
        for (script, key) in keys.iter().take(8) {
            let output = |sat| TxOut { value: Amount::from_sat(sat), script_pubkey: script.clone() };
            let from = OutPoint::null();
            assert_eq!(spend(from, &output(800), key, &to, 10).err(), Some(800));
            let tx = spend(from, &output(50_000), key, &to, 10).unwrap();
            assert!(tx.output[0].value.to_sat() > 48_500, "{tx:?}");
            assert_eq!(tx.input[0].sequence.is_relative_lock_time(), key.anchors);
        }
    }

    /// A rate of a day, or one that a source makes up, neither gives a share up nor burns it.
    #[test]
    fn a_high_rate_is_waited_out() {
        let seed = Phrase::from_entropy(&[3; 16]).unwrap().seed();
        for (script, key) in static_keys(&seed, Network::Regtest).iter().take(8) {
            let check = |sat: u64, sat_per_vb: u64, expect: Worth| {
                let output = TxOut { value: Amount::from_sat(sat), script_pubkey: script.clone() };
                assert_eq!(worth(OutPoint::null(), &output, key, sat_per_vb), expect, "{sat} sat at {sat_per_vb}");
            };
            check(2_000, 3, Worth::Move);
            check(1_000, 3, Worth::Move);
            check(1_000, 5, Worth::Leave(1_000));
            check(1_000, 10_000, Worth::Leave(1_000));
            check(50_000, 50, Worth::Move);
            check(50_000, 200, Worth::Wait);
            check(50_000, 10_000, Worth::Wait);
            check(5_000_000, 10_000, Worth::Move);
        }
    }
}
