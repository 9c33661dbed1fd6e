//! What a node opens before anything runs: keys from the seed, the ledger, the wallet, the catalogue, the edge's settings.

use crate::config::{ChainSource, Config, Network};
use crate::failure::HintExt;
use anyhow::Context;
use ed25519_dalek::SigningKey;
use satgrid_api::{ApiConfig, ApiKey};
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_market::{Catalogue, ProviderPattern};
use satgrid_wallet::{
    Lightning,
    keys::{Phrase, Seed},
};
use satgrid_wallet_ldk::{LdkConfig, LdkWallet};
use std::{sync::Arc, time::Duration};

/// How long open streams may go on after the node was told to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// The keys of this node, all from one seed.
pub(super) struct Keys {
    pub seed: Seed,
    pub identity: SigningKey,
    pub nostr: secp256k1::Keypair,
    /// From which the consumer's session keys are derived.
    pub sessions: [u8; 32],
}

pub(super) fn keys(config: &Config) -> anyhow::Result<Keys> {
    let words = config.wallet.seed.read().hint("`satgrid init` makes one; only its owner may read it (chmod 600)")?;
    let seed = Phrase::parse(&words).context("the seed's words are not right")?.seed();
    let nostr = secp256k1::Keypair::from_seckey_slice(secp256k1::SECP256K1, seed.nostr().as_ref())?;
    let (identity, sessions) = (seed.identity(), seed.session(0).to_bytes());
    Ok(Keys { seed, identity, nostr, sessions })
}

pub(super) async fn open_journal(config: &Config) -> anyhow::Result<Arc<SqliteJournal>> {
    let path = &config.ledger.path;
    let journal =
        SqliteJournal::open(path).await.with_context(|| format!("the ledger {} cannot be opened", path.display()))?;
    Ok(Arc::new(journal))
}

pub(super) async fn open_wallet(config: &Config, keys: &Keys) -> anyhow::Result<Arc<LdkWallet>> {
    let chain = match &config.wallet.chain {
        Some(ChainSource::Esplora { url }) => satgrid_wallet_ldk::ChainSource::Esplora { url: url.clone() },
        Some(ChainSource::Electrum { server }) => {
            let url = if server.contains("://") { server.clone() } else { format!("tcp://{server}") };
            satgrid_wallet_ldk::ChainSource::Electrum { url }
        }
        Some(ChainSource::Bitcoind { user, host, port }) => {
            let password = config.wallet.chain_password.as_ref().context("wallet.chain_password is not set")?;
            satgrid_wallet_ldk::ChainSource::BitcoindRpc {
                host: host.clone(),
                port: *port,
                user: user.clone(),
                password: password.read()?,
            }
        }
        None => return Err(anyhow::anyhow!("wallet.chain is not set")).hint("esplora:URL is the simplest"),
    };
    let mut ldk = LdkConfig::new(config.node.dir.join("lightning"), keys.seed.clone(), chain);
    ldk.network = wallet_network(config.node.network);
    ldk.listen = vec![config.wallet.listen];
    ldk.alias = config.wallet.alias.clone();
    ldk.max_balance_sat = Some(config.wallet.max_balance_sat);
    ldk.trusted_0conf = config
        .wallet
        .trusted_0conf
        .iter()
        .map(|text| text.parse().with_context(|| format!("wallet.trusted_0conf: {text:?} is no Lightning node id")))
        .collect::<anyhow::Result<_>>()?;
    let wallet = LdkWallet::start(ldk).await.context("the Lightning wallet does not start")?;
    tracing::info!(node = %wallet.node_id(), height = wallet.height(), "wallet is up");
    Ok(Arc::new(wallet))
}

pub(super) fn wallet_network(network: Network) -> satgrid_wallet::Network {
    match network {
        Network::Regtest => satgrid_wallet::Network::Regtest,
        Network::Signet => satgrid_wallet::Network::Signet,
        Network::Testnet => satgrid_wallet::Network::Testnet,
        Network::Mainnet => satgrid_wallet::Network::Mainnet,
    }
}

/// The catalogue that came with this build, overruled by the operator's own.
pub(crate) fn catalogue(config: &Config) -> anyhow::Result<Catalogue> {
    let shipped = Catalogue::shipped()?;
    let Some(path) = &config.market.catalogue else { return Ok(shipped) };
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let own = Catalogue::parse(&text).with_context(|| format!("{} is no catalogue", path.display()))?;
    Ok(shipped.overruled_by(&own)?)
}

pub(super) fn patterns(key: &str, texts: &[String]) -> anyhow::Result<Vec<ProviderPattern>> {
    texts.iter().map(|text| text.parse().with_context(|| key.to_owned())).collect()
}

pub(super) fn api_config(config: &Config) -> anyhow::Result<ApiConfig> {
    let keys = config
        .api
        .keys
        .iter()
        .map(|key| Ok(ApiKey::new(key.name.clone(), &key.secret.read()?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(ApiConfig { keys, drain: DRAIN, ..ApiConfig::default() })
}
