//! Which Bitcoin network a wallet lives on.

use core::{fmt, str::FromStr};
use lightning_invoice::Currency;
use thiserror::Error;

/// A Bitcoin network. Real money is never the default: it has to be named.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum Network {
    Mainnet,
    Testnet,
    Signet,
    #[default]
    Regtest,
}

/// A name that is none of the networks'.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a Bitcoin network; one of mainnet, testnet, signet, regtest is")]
pub struct UnknownNetwork(pub String);

impl Network {
    /// Coins here are worth something.
    pub const fn is_real_money(self) -> bool {
        matches!(self, Network::Mainnet)
    }
    /// The network that a BOLT 11 prefix stands for; `None` for a network that this wallet does not serve.
    pub(crate) fn of_currency(currency: &Currency) -> Option<Network> {
        match currency {
            Currency::Bitcoin => Some(Network::Mainnet),
            Currency::BitcoinTestnet => Some(Network::Testnet),
            Currency::Signet => Some(Network::Signet),
            Currency::Regtest => Some(Network::Regtest),
            Currency::Simnet => None,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Network::Mainnet => "mainnet",
            Network::Testnet => "testnet",
            Network::Signet => "signet",
            Network::Regtest => "regtest",
        })
    }
}

impl FromStr for Network {
    type Err = UnknownNetwork;
    fn from_str(name: &str) -> Result<Network, UnknownNetwork> {
        match name {
            "mainnet" | "bitcoin" => Ok(Network::Mainnet),
            "testnet" => Ok(Network::Testnet),
            "signet" => Ok(Network::Signet),
            "regtest" => Ok(Network::Regtest),
            other => Err(UnknownNetwork(other.chars().take(40).collect())),
        }
    }
}
