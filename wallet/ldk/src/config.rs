//! What an embedded node is started with.

use core::fmt;
use satgrid_types::LightningKey;
use satgrid_wallet::{Network, keys::Seed};
use std::{net::SocketAddr, path::PathBuf};

/// What a wallet on mainnet may hold unless the operator names another cap: it is a hot wallet, beta software, and one
/// `rm -rf` away from nothing.
pub const MAINNET_CAP_SAT: u64 = 100_000;

/// Where blocks come from.
#[derive(Clone, PartialEq, Eq)]
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

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Trace,
    Debug,
    #[default]
    Info,
    Warn,
    Error,
}

#[derive(Debug, Clone)]
pub struct LdkConfig {
    /// The node's own directory; made with mode 0700.
    pub dir: PathBuf,
    pub network: Network,
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
        }
    }

    /// The cap that holds.
    pub fn cap_sat(&self) -> Option<u64> {
        self.max_balance_sat.or(self.network.is_real_money().then_some(MAINNET_CAP_SAT))
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
