//! From a config to a running node, with an error for each thing that an operator can mend.

use crate::{
    LdkWallet,
    config::{ChainSource, LdkConfig},
    log::Log,
    store,
    translate::public_key,
};
use ldk_node::{
    BuildError, Builder, Node, NodeError,
    bitcoin::{Network as BitcoinNetwork, secp256k1::PublicKey},
    config::{BackgroundSyncConfig, Config, ElectrumSyncConfig, EsploraSyncConfig},
    liquidity::LSPS2ServiceConfig,
};
use satgrid_types::LightningKey;
use satgrid_wallet::{
    Network,
    restore::{Stale, put_back, stale},
};
use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
};
use thiserror::Error;
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::watch,
};

/// A channel that we open for somebody has room for four times its first payment.
const OVER_PROVISIONING_PPM: u32 = 3_000_000;
const MIN_CHANNEL_LIFETIME_BLOCKS: u32 = 1_008;
const MAX_TO_SELF_DELAY_BLOCKS: u32 = 2_016;
/// The smallest and largest payment for which we open a channel to its payee.
const MIN_JIT_PAYMENT_MSAT: u64 = 1_000_000;
const MAX_JIT_PAYMENT_MSAT: u64 = 1_000_000_000;

/// Why a node did not start.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("cannot use {dir} for the Lightning node: {source}")]
    Dir { dir: PathBuf, source: io::Error },
    #[error("another process runs a Lightning node in {dir}")]
    InUse { dir: PathBuf },
    #[error("the Lightning node's database in {dir} does not open: {reason}")]
    Store { dir: PathBuf, reason: String },
    /// Starting it would offer peers a revoked state, for which they may take the whole channel.
    #[error(
        "the channels in {dir} are an old copy, or none, and are not started: {reason}. Put the newest copy back; if there is \
         none, `satgrid wallet restore` puts this one aside and has the channels closed by their peers"
    )]
    Old { dir: PathBuf, reason: String },
    #[error("cannot write the Lightning node's log {path}: {source}")]
    Log { path: PathBuf, source: io::Error },
    #[error("cannot listen for Lightning peers on {addr}: {source}")]
    Listen { addr: SocketAddr, source: io::Error },
    #[error("{key} is not a Lightning node id")]
    Key { key: LightningKey },
    #[error("alias {alias:?} is longer than 32 bytes")]
    Alias { alias: String },
    #[error("the store in {dir} belongs to another network than {network}")]
    OtherNetwork { dir: PathBuf, network: Network },
    #[error("no answer from the chain source ({chain}): {reason}")]
    Chain { chain: ChainSource, reason: String },
    #[error("the embedded node needs tokio's multi-thread runtime")]
    Runtime,
    #[error("the Lightning node did not start: {reason}")]
    Node { reason: String },
    /// The wallet's process said so.
    #[error("{reason}")]
    Remote { reason: String },
    #[error("the wallet's process did not start: {reason}")]
    Process { reason: String },
}

pub(crate) async fn start(config: LdkConfig) -> Result<LdkWallet, StartError> {
    if Handle::current().runtime_flavor() != RuntimeFlavor::MultiThread {
        return Err(StartError::Runtime);
    }
    let lock = store::prepare(&config.dir)?;
    store::set_wal(&config.dir).await?;
    refuse_old(&config).await?;
    let (cap_sat, network, lsp) = (config.cap_sat(), config.network, config.lsp.clone());
    let (seed, chain, dir) = (config.seed.clone(), config.chain.clone(), config.dir.clone());
    let node = tokio::task::spawn_blocking(move || run(&config))
        .await
        .map_err(|e| StartError::Node { reason: e.to_string() })??;
    Ok(LdkWallet {
        key: LightningKey(node.node_id().serialize()),
        node: Arc::new(node),
        network,
        cap_sat,
        lsp,
        seed,
        chain,
        dir,
        anchors: Arc::default(),
        stopped: watch::Sender::new(false),
        _lock: lock,
    })
}

/// Before anything of the node runs: it would connect to its peers, who may then take what an old state leaves open.
async fn refuse_old(config: &LdkConfig) -> Result<(), StartError> {
    if config.seen.is_empty() && config.given_up.is_empty() {
        return Ok(());
    }
    let dir = config.dir.clone();
    let disk = store::watermarks(&dir).await?;
    if let Some(channel) = put_back(&disk, &config.given_up) {
        let reason = format!("channel {channel} was given up by a restore, which asked its peer to close it");
        return Err(StartError::Old { dir, reason });
    }
    match stale(&disk, &config.seen).into_iter().next() {
        None => Ok(()),
        Some(Stale { channel, disk: Some(disk), seen, by }) => Err(StartError::Old {
            dir,
            reason: format!("channel {channel} is at state {disk}, and {by} has seen state {seen}"),
        }),
        Some(Stale { channel, disk: None, seen, by }) => Err(StartError::Old {
            dir,
            reason: format!("it does not know channel {channel}, of which {by} has seen state {seen}"),
        }),
    }
}

fn run(config: &LdkConfig) -> Result<Node, StartError> {
    check_listen(&config.listen)?;
    let node = build(config)?;
    node.start().map_err(|e| start_error(config, e))?;
    Ok(node)
}

/// ldk-node finds a taken port only after half of its tasks run, and then says "invalid address".
fn check_listen(addrs: &[SocketAddr]) -> Result<(), StartError> {
    for &addr in addrs {
        TcpListener::bind(addr).map_err(|source| StartError::Listen { addr, source })?;
    }
    Ok(())
}

fn build(config: &LdkConfig) -> Result<Node, StartError> {
    let trusted: Result<Vec<PublicKey>, StartError> =
        config.trusted_0conf.iter().map(|key| public_key(key).map_err(|_| StartError::Key { key: *key })).collect();
    let mut builder = Builder::from_config(Config { trusted_peers_0conf: trusted?, ..Config::default() });
    builder.set_network(match config.network {
        Network::Mainnet => BitcoinNetwork::Bitcoin,
        Network::Testnet => BitcoinNetwork::Testnet,
        Network::Signet => BitcoinNetwork::Signet,
        Network::Regtest => BitcoinNetwork::Regtest,
    });
    builder.set_storage_dir_path(path_text(&config.dir)?);
    builder.set_entropy_seed_bytes(*config.seed.lightning());
    let log = Log::open(config.log_file.clone(), config.log_level)
        .map_err(|source| StartError::Log { path: config.log_file.clone(), source })?;
    builder.set_custom_logger(Arc::new(log));
    set_chain(&mut builder, config);
    set_liquidity(&mut builder, config)?;
    let build_error = |e| build_error(config, e);
    if !config.listen.is_empty() {
        builder
            .set_listening_addresses(config.listen.iter().map(|addr| (*addr).into()).collect())
            .map_err(build_error)?;
    }
    if let Some(alias) = &config.alias {
        builder.set_node_alias(alias.clone()).map_err(|_| StartError::Alias { alias: alias.clone() })?;
    }
    builder.build().map_err(build_error)
}

fn set_chain(builder: &mut Builder, config: &LdkConfig) {
    // Fees move slowly; the node also refreshes them whenever it is told to sync.
    let background_sync_config = Some(BackgroundSyncConfig {
        onchain_wallet_sync_interval_secs: config.sync_every_secs,
        lightning_wallet_sync_interval_secs: config.sync_every_secs,
        fee_rate_cache_update_interval_secs: config.sync_every_secs.max(60),
    });
    match config.chain.clone() {
        ChainSource::Esplora { url } => {
            let sync = EsploraSyncConfig { background_sync_config };
            builder.set_chain_source_esplora(url, Some(sync))
        }
        ChainSource::Electrum { url } => {
            let sync = ElectrumSyncConfig { background_sync_config };
            builder.set_chain_source_electrum(url, Some(sync))
        }
        ChainSource::BitcoindRpc { host, port, user, password } => {
            builder.set_chain_source_bitcoind_rpc(host, port, user, password)
        }
    };
}

/// Channels that are opened when a payment needs them, by others for us and by us for others.
fn set_liquidity(builder: &mut Builder, config: &LdkConfig) -> Result<(), StartError> {
    if let Some(lsp) = &config.lsp {
        let key = public_key(&lsp.node).map_err(|_| StartError::Key { key: lsp.node })?;
        builder.set_liquidity_source_lsps2(key, lsp.addr.into(), lsp.token.clone());
    }
    if let Some(service) = config.lsp_service {
        builder.set_liquidity_provider_lsps2(LSPS2ServiceConfig {
            require_token: None,
            advertise_service: false,
            channel_opening_fee_ppm: service.fee_ppm,
            channel_over_provisioning_ppm: OVER_PROVISIONING_PPM,
            min_channel_opening_fee_msat: service.min_fee_msat,
            min_channel_lifetime: MIN_CHANNEL_LIFETIME_BLOCKS,
            max_client_to_self_delay: MAX_TO_SELF_DELAY_BLOCKS,
            min_payment_size_msat: MIN_JIT_PAYMENT_MSAT,
            max_payment_size_msat: MAX_JIT_PAYMENT_MSAT,
            client_trusts_lsp: false,
        });
    }
    Ok(())
}

fn path_text(dir: &Path) -> Result<String, StartError> {
    dir.to_str().map(str::to_owned).ok_or_else(|| StartError::Dir {
        dir: dir.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidInput, "its name is not UTF-8"),
    })
}

fn build_error(config: &LdkConfig, error: BuildError) -> StartError {
    let dir = config.dir.clone();
    match error {
        BuildError::NetworkMismatch => StartError::OtherNetwork { dir, network: config.network },
        BuildError::ReadFailed
        | BuildError::WriteFailed
        | BuildError::KVStoreSetupFailed
        | BuildError::StoragePathAccessFailed
        | BuildError::InvalidChannelMonitor => StartError::Store { dir, reason: error.to_string() },
        BuildError::WalletSetupFailed => {
            StartError::Store { dir, reason: format!("{error} (was it made with another recovery phrase or network?)") }
        }
        BuildError::InvalidSeedBytes
        | BuildError::InvalidSeedFile
        | BuildError::InvalidSystemTime
        | BuildError::InvalidListeningAddresses
        | BuildError::InvalidAnnouncementAddresses
        | BuildError::InvalidNodeAlias
        | BuildError::RuntimeSetupFailed
        | BuildError::LoggerSetupFailed
        | BuildError::AsyncPaymentsConfigMismatch => StartError::Node { reason: error.to_string() },
    }
}

fn start_error(config: &LdkConfig, error: NodeError) -> StartError {
    let reason = error.to_string();
    if matches!(
        error,
        NodeError::FeerateEstimationUpdateFailed
            | NodeError::FeerateEstimationUpdateTimeout
            | NodeError::ConnectionFailed
            | NodeError::TxSyncFailed
            | NodeError::TxSyncTimeout
    ) {
        StartError::Chain { chain: config.chain.clone(), reason }
    } else {
        StartError::Node { reason }
    }
}
