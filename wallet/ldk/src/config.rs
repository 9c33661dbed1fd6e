//! What an embedded node is started with.

use core::fmt;
use satgrid_types::LightningKey;
use satgrid_wallet::{Network, keys::Seed, restore::Seen};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

/// What a wallet on mainnet may hold unless the operator names another cap: it is a hot wallet, beta software, and one
/// `rm -rf` away from nothing.
pub const MAINNET_CAP_SAT: u64 = 100_000;

/// Where blocks come from.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChainSource {
    /// Base URL of an Esplora server.
    Esplora {
        url: String,
    },
    /// `ssl://host:port` or `tcp://host:port`.
    Electrum {
        url: String,
    },
    BitcoindRpc {
        host: String,
        port: u16,
        user: String,
        password: String,
    },
}

impl fmt::Display for ChainSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChainSource::Esplora { url } => write!(f, "Esplora at {url}"),
            ChainSource::Electrum { url } => write!(f, "Electrum at {url}"),
            ChainSource::BitcoindRpc { host, port, .. } => write!(f, "bitcoind at {host}:{port}"),
        }
    }
}
/// Never shows the password.
impl fmt::Debug for ChainSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LogLevel {
    Trace,
    Debug,
    #[default]
    Info,
    Warn,
    Error,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LdkConfig {
    /// The node's own directory; made with mode 0700.
    pub dir: PathBuf,
    pub network: Network,
    #[serde(with = "seed_bytes")]
    pub seed: Seed,
    pub chain: ChainSource,
    /// Where peers may connect to; empty for a wallet that only connects out.
    pub listen: Vec<SocketAddr>,
    /// Peers whose channels are used before their funding confirms. The opener can double-spend it: name only peers
    /// that you trust with the channel's whole capacity. Fixed while the node runs.
    pub trusted_0conf: Vec<LightningKey>,
    /// At most 32 bytes.
    pub alias: Option<String>,
    /// The node's own log; made with mode 0600.
    pub log_file: PathBuf,
    pub log_level: LogLevel,
    /// Refuse invoices and channels that would take this wallet beyond. `None` is no cap, except on mainnet, where it
    /// is [`MAINNET_CAP_SAT`].
    pub max_balance_sat: Option<u64>,
    /// Seconds between looks at the chain; at least 10.
    pub sync_every_secs: u64,
    /// Who opens a channel to us when a payment comes that no channel has room for (LSPS2). It is trusted with
    /// unconfirmed channels.
    pub lsp: Option<Lsp>,
    /// Opens such channels for others.
    pub lsp_service: Option<LspService>,
    /// What backups saw of the channels: where the store is older, the node does not start.
    #[serde(default)]
    pub seen: Vec<Seen>,
    /// Channels that a restore gave up: where the store has one, the node does not start.
    #[serde(default)]
    pub given_up: BTreeSet<String>,
}

/// A liquidity provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lsp {
    pub node: LightningKey,
    pub addr: SocketAddr,
    pub token: Option<String>,
    /// The most that it may keep of a payment, in thousandths, for an invoice that names no limit of its own.
    pub max_fee_permille: u32,
}

/// What we take for opening channels to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LspService {
    /// Parts per million of the payment ...
    pub fee_ppm: u32,
    /// ... and never less than this.
    pub min_fee_msat: u64,
}

impl LdkConfig {
    /// A regtest node that listens nowhere and keeps everything in `dir`.
    pub fn new(dir: impl Into<PathBuf>, seed: Seed, chain: ChainSource) -> LdkConfig {
        let dir = dir.into();
        LdkConfig {
            log_file: dir.join("ldk.log"),
            dir,
            network: Network::default(),
            seed,
            chain,
            listen: Vec::new(),
            trusted_0conf: Vec::new(),
            alias: None,
            log_level: LogLevel::default(),
            max_balance_sat: None,
            sync_every_secs: 10,
            lsp: None,
            lsp_service: None,
            seen: Vec::new(),
            given_up: BTreeSet::new(),
        }
    }

    /// The cap that holds.
    pub fn cap_sat(&self) -> Option<u64> {
        self.max_balance_sat.or(self.network.is_real_money().then_some(MAINNET_CAP_SAT))
    }
}

/// The seed crosses one pipe, to the wallet's own process ([`crate::process`]), and nothing else.
mod seed_bytes {
    use satgrid_wallet::keys::Seed;
    use serde::{Deserialize, Deserializer, Serializer, de::Error, ser::SerializeSeq};

    pub(super) fn serialize<S: Serializer>(seed: &Seed, to: S) -> Result<S::Ok, S::Error> {
        let bytes = seed.lightning();
        let mut list = to.serialize_seq(Some(bytes.len()))?;
        bytes.iter().try_for_each(|byte| list.serialize_element(byte))?;
        list.end()
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Seed, D::Error> {
        let bytes = <Vec<u8>>::deserialize(from)?;
        let bytes = bytes.try_into().map_err(|_| D::Error::custom("a seed has 64 bytes"))?;
        Ok(Seed::from_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_wallet::keys::Phrase;

    #[test]
    fn real_money_is_capped_unless_the_operator_says_otherwise() {
        let seed = Phrase::from_entropy(&[1; 16]).unwrap().seed();
        let chain = ChainSource::BitcoindRpc {
            host: "localhost".into(),
            port: 8332,
            user: "u".into(),
            password: "hunter2".into(),
        };
        let mut config = LdkConfig::new("/nowhere", seed, chain);
        assert_eq!(config.network, Network::Regtest);
        assert_eq!(config.cap_sat(), None);
        config.network = Network::Mainnet;
        assert_eq!(config.cap_sat(), Some(MAINNET_CAP_SAT));
        config.max_balance_sat = Some(5);
        assert_eq!(config.cap_sat(), Some(5));
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
