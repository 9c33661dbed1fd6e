//! The cold account: descriptors of its own, apart from the node's coins, to which sweeps go.
//!
//! Best is an xpub of a device that this machine never sees: then nothing here can spend. Without one the account hangs on
//! the node's own words at `m/84'/coin'/1'`; the node's coins are at `m/84'/coin'/0'`, so the two never share an address.
//!
//! It lives in one file beside the node's folder, is opened for one operation at a time under a lock, and is synced with
//! Esplora or Electrum's protocol; addresses need no chain at all.

use crate::{
    ChainSource,
    chain::{Chain, electrum, esplora},
    embedded::{DUST_SAT, address, bitcoin_network},
    store::private_file,
};
use bdk_electrum::BdkElectrumClient;
use bdk_esplora::EsploraAsyncExt;
use bdk_wallet::{ChangeSet, KeychainKind, SignOptions, Wallet, bitcoin::bip32::Xpriv, chain::Merge};
use ldk_node::bitcoin::{Amount, FeeRate, Psbt};
use rustix::fs::{FlockOperation, flock};
use satgrid_wallet::{Network, embedded::MAX_SAT_PER_VB, keys::Seed};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};
use thiserror::Error;

const STOP_GAP: usize = 20;
const PARALLEL: usize = 4;
const BATCH: usize = 20;

/// Whose keys the account has.
#[derive(Debug, Clone)]
pub enum ColdKeys {
    /// The node's own words, another account.
    Words(Seed),
    /// `xpub...`, `tpub...`, or a descriptor with `<0;1>/*`. Nothing can be spent here.
    WatchOnly(String),
}

#[derive(Debug, Error)]
pub enum ColdError {
    #[error("the cold account {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("another process uses the cold account; try again")]
    Busy,
    #[error("the cold account's keys are not usable: {0} (was the account made with other keys?)")]
    Keys(String),
    #[error("the chain source: {0}")]
    Chain(String),
    #[error("a bitcoind has no index of addresses: the cold account is synced with esplora: or electrum: only")]
    NoIndex,
    #[error("{0}")]
    Send(String),
}

/// What is kept: bdk's own state, and a label for each address that was given one.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    changes: ChangeSet,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// The account, open and locked.
pub struct Cold {
    path: PathBuf,
    network: Network,
    wallet: Wallet,
    kept: Kept,
    can_sign: bool,
    _lock: File,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ColdAddress {
    pub index: u32,
    pub address: String,
    pub label: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ColdBalance {
    pub confirmed_sat: u64,
    pub pending_sat: u64,
}

/// A transaction that was made and not sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ColdDraft {
    pub amount_sat: u64,
    pub fee_sat: u64,
    pub vsize: u64,
    /// Base64, for the device that has the keys; signed where this account has them.
    pub psbt: String,
    pub signed: bool,
}

impl Cold {
    pub fn open(dir: &Path, network: Network, keys: &ColdKeys) -> Result<Cold, ColdError> {
        let path = dir.join("cold.json");
        let bad = |reason: String| ColdError::File { path: path.clone(), reason };
        let lock = private_file(&dir.join("cold.lock")).map_err(|e| bad(e.to_string()))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| ColdError::Busy)?;
        let kept: Kept = match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Kept::default(),
            Err(error) => return Err(bad(error.to_string())),
        };
        let on = bitcoin_network(network);
        let (external, internal) = descriptors(network, keys)?;
        let refused = |e: &dyn std::fmt::Display| ColdError::Keys(e.to_string());
        let known = Wallet::load()
            .descriptor(KeychainKind::External, Some(external.clone()))
            .descriptor(KeychainKind::Internal, Some(internal.clone()))
            .extract_keys()
            .check_network(on)
            .load_wallet_no_persist(kept.changes.clone())
            .map_err(|e| refused(&e))?;
        let wallet = match known {
            Some(wallet) => wallet,
            None => {
                Wallet::create(external, internal).network(on).create_wallet_no_persist().map_err(|e| refused(&e))?
            }
        };
        let can_sign = matches!(keys, ColdKeys::Words(_));
        Ok(Cold { path, network, wallet, kept, can_sign, _lock: lock })
    }

    /// The next address that was never given away; it is on disk before it is given.
    pub fn next_address(&mut self, label: Option<&str>) -> Result<ColdAddress, ColdError> {
        let next = self.wallet.reveal_next_address(KeychainKind::External);
        let (index, address) = (next.index, next.address.to_string());
        if let Some(label) = label {
            self.kept.labels.insert(address.clone(), label.to_owned());
        }
        self.save()?;
        Ok(ColdAddress { index, address, label: label.map(str::to_owned) })
    }

    /// The address that would be given away next.
    pub fn peek_address(&self) -> String {
        let next = self.wallet.next_derivation_index(KeychainKind::External);
        self.wallet.peek_address(KeychainKind::External, next).address.to_string()
    }

    /// Every address that was given away, oldest first.
    pub fn addresses(&self) -> Vec<ColdAddress> {
        let Some(last) = self.wallet.derivation_index(KeychainKind::External) else { return Vec::new() };
        (0..=last)
            .map(|index| {
                let address = self.wallet.peek_address(KeychainKind::External, index).address.to_string();
                let label = self.kept.labels.get(&address).cloned();
                ColdAddress { index, address, label }
            })
            .collect()
    }

    /// Looks at the chain for everything that these keys ever had.
    pub async fn sync(&mut self, source: &ChainSource) -> Result<ColdBalance, ColdError> {
        let chain = |e: &dyn std::fmt::Display| ColdError::Chain(e.to_string());
        let request = self.wallet.start_full_scan();
        let update = match source {
            ChainSource::Esplora { url } => {
                let client = esplora(url).map_err(|e| chain(&e))?;
                client.full_scan(request, STOP_GAP, PARALLEL).await.map_err(|e| chain(&e))?
            }
            ChainSource::Electrum { url } => {
                let url = url.clone();
                let scan = move || {
                    let client = BdkElectrumClient::new(electrum(&url)?);
                    client.full_scan(request, STOP_GAP, BATCH, false)
                };
                tokio::task::spawn_blocking(scan).await.map_err(|e| chain(&e))?.map_err(|e| chain(&e))?
            }
            ChainSource::BitcoindRpc { .. } => return Err(ColdError::NoIndex),
        };
        self.wallet.apply_update(update).map_err(|e| chain(&e))?;
        self.save()?;
        Ok(self.balance())
    }

    pub fn balance(&self) -> ColdBalance {
        let balance = self.wallet.balance();
        let pending = balance.trusted_pending + balance.untrusted_pending + balance.immature;
        ColdBalance { confirmed_sat: balance.confirmed.to_sat(), pending_sat: pending.to_sat() }
    }

    /// Makes a transaction out of the account; `None` sends everything. Nothing is broadcast.
    pub fn draft(&mut self, to: &str, amount_sat: Option<u64>, sat_per_vb: u64) -> Result<ColdDraft, ColdError> {
        let refused = |e: &dyn std::fmt::Display| ColdError::Send(e.to_string());
        if !(1..=u64::from(MAX_SAT_PER_VB)).contains(&sat_per_vb) {
            return Err(ColdError::Send(format!(
                "a fee rate of {sat_per_vb} sat/vB is not between 1 and {MAX_SAT_PER_VB}"
            )));
        }
        if amount_sat.is_some_and(|sat| sat < DUST_SAT) {
            return Err(ColdError::Send(format!("less than {DUST_SAT} sat is dust")));
        }
        let to = address(to, self.network).map_err(|e| refused(&e))?.script_pubkey();
        let mut build = self.wallet.build_tx();
        match amount_sat {
            Some(sat) => build.add_recipient(to.clone(), Amount::from_sat(sat)),
            None => build.drain_wallet().drain_to(to.clone()),
        };
        build.fee_rate(FeeRate::from_sat_per_vb(sat_per_vb).unwrap_or(FeeRate::BROADCAST_MIN));
        let mut psbt = build.finish().map_err(|e| refused(&e))?;
        let fee_sat = psbt.fee().map_err(|e| refused(&e))?.to_sat();
        let paid = psbt.unsigned_tx.output.iter().find(|output| output.script_pubkey == to);
        let amount_sat = paid.map_or(0, |output| output.value.to_sat());
        let signed = self.can_sign && self.wallet.sign(&mut psbt, SignOptions::default()).map_err(|e| refused(&e))?;
        let vsize = psbt.clone().extract_tx().map_or(0, |tx| tx.vsize());
        let vsize = u64::try_from(vsize).unwrap_or(u64::MAX);
        Ok(ColdDraft { amount_sat, fee_sat, vsize, psbt: psbt.to_string(), signed })
    }

    fn save(&mut self) -> Result<(), ColdError> {
        let bad = |reason: String| ColdError::File { path: self.path.clone(), reason };
        if let Some(changes) = self.wallet.take_staged() {
            self.kept.changes.merge(changes);
        }
        let text = serde_json::to_string(&self.kept).map_err(|e| bad(e.to_string()))?;
        let new = self.path.with_extension("json.new");
        let _ = fs::remove_file(&new);
        let mut file = private_file(&new).map_err(|e| bad(e.to_string()))?;
        std::io::Write::write_all(&mut file, text.as_bytes()).map_err(|e| bad(e.to_string()))?;
        file.sync_all().map_err(|e| bad(e.to_string()))?;
        fs::rename(&new, &self.path).map_err(|e| bad(e.to_string()))?;
        // The name is durable only when its folder is.
        let folder = self.path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all());
        folder.map_err(|e| bad(e.to_string()))
    }
}

impl ColdDraft {
    /// Sends a signed draft; gives its id.
    pub async fn broadcast(&self, source: &ChainSource) -> Result<String, ColdError> {
        let psbt: Psbt = self.psbt.parse().map_err(|e| ColdError::Send(format!("{e}")))?;
        let tx = psbt.extract_tx().map_err(|e| ColdError::Send(e.to_string()))?;
        Chain::of(source).broadcast(&tx).await.map_err(ColdError::Chain)?;
        Ok(tx.compute_txid().to_string())
    }
}

/// External and internal.
fn descriptors(network: Network, keys: &ColdKeys) -> Result<(String, String), ColdError> {
    let of = |key: &str| (format!("wpkh({key}/0/*)"), format!("wpkh({key}/1/*)"));
    match keys {
        ColdKeys::Words(seed) => {
            let root = Xpriv::new_master(bitcoin_network(network), seed.lightning().as_ref());
            let root = root.map_err(|e| ColdError::Keys(e.to_string()))?;
            let coin = u8::from(network != Network::Mainnet);
            Ok(of(&format!("{root}/84'/{coin}'/1'")))
        }
        ColdKeys::WatchOnly(text) if text.contains("<0;1>") => {
            Ok((text.replace("<0;1>", "0"), text.replace("<0;1>", "1")))
        }
        ColdKeys::WatchOnly(text) if text.starts_with("xpub") || text.starts_with("tpub") => Ok(of(text)),
        ColdKeys::WatchOnly(_) => {
            Err(ColdError::Keys("write an xpub, a tpub, or a descriptor with <0;1>/*".to_owned()))
        }
    }
}
