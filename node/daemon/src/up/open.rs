//! What a node opens before anything runs: keys from the seed, the ledger, the wallet, the catalogue, the edge's settings.

use crate::accounts::rate::{Rate, Source};
use crate::commands::wallet_process::NAME as WALLET_PROCESS;
use crate::config::{ChainSource, Config, Network, lsp};
use crate::door::acme;
use crate::drive::{channels::BACKUP_FILE, fresh_seed, restore};
use crate::failure::HintExt;
use crate::identity::{self, Pair, Standing};
use crate::store::Store;
use anyhow::Context;
use ed25519_dalek::SigningKey;
use satgrid_api::{Accounts, Api, ApiConfig, ApiKey, Door, Service, Tls};
use satgrid_ledger_postgres::PostgresJournal;
use satgrid_ledger_sqlite::{KeyStore, SqliteJournal};
use satgrid_market::{Catalogue, ProviderPattern};
use satgrid_market_nostr::{
    RelayConfig,
    heartbeat::{self, HeartbeatError},
};
use satgrid_types::{NodeKey, node_key};
use satgrid_wallet::{Embedded, Lightning, keys::Seed, restore::Restoring};
use satgrid_wallet_ldk::{ColdKeys, LdkConfig, Lsp, LspService, Program, WalletProcess};
use satgrid_wallet_nwc::{Connections, NwcConfig, NwcService, NwcWallet, ServiceConfig};
use sha2::{Digest, Sha256};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long open streams may go on after the node was told to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// A source of exchange rates is not asked more often than this.
const MIN_REFRESH_S: u64 = 10;

/// The least that we take for opening a channel to somebody.
const LSP_MIN_FEE_MSAT: u64 = 1_000_000;

/// The keys of this node, all from one seed.
pub(crate) struct Keys {
    pub seed: Seed,
    pub identity: SigningKey,
    pub nostr: secp256k1::Keypair,
    /// Which of the seed's identities these are, and how they came to be.
    pub standing: Standing,
    /// From which the consumer's session keys are derived.
    pub sessions: [u8; 32],
}

pub(crate) async fn keys(config: &Config) -> anyhow::Result<Keys> {
    let seed = crate::seed::read(config)?.0.seed();
    let standing = identity::standing(config, &seed).await?;
    let Pair { node: identity, nostr } = Pair::of(&seed, standing.index)?;
    let sessions = seed.session(0).to_bytes();
    Ok(Keys { seed, identity, nostr, standing, sessions })
}

impl Keys {
    /// Every node key that was ever this node's, the newest last.
    pub(super) fn all(&self) -> impl Iterator<Item = NodeKey> {
        (0..=self.standing.index).map(|index| node_key(&self.seed.identity(index)))
    }
    /// The keys before the newest.
    pub(super) fn former(&self) -> Vec<SigningKey> {
        (0..self.standing.index).map(|index| self.seed.identity(index)).collect()
    }
}

/// Refuses to run where another node with the same seed does. A relay that does not answer refuses nobody.
pub(super) async fn claim_seed(
    config: &Config,
    keys: &Keys,
    life: CancellationToken,
) -> anyhow::Result<Option<JoinHandle<()>>> {
    if config.market.relays.is_empty() {
        return Ok(None);
    }
    let relays = RelayConfig::new(config.market.relays.clone());
    let sign = secp256k1::Keypair::from_seckey_slice(secp256k1::SECP256K1, keys.seed.sign_of_life().as_ref())?;
    match heartbeat::claim(&relays, sign, instance(config)?, life).await {
        Ok(beating) => Ok(Some(beating)),
        Err(error @ HeartbeatError::Elsewhere { .. }) => Err(anyhow::Error::new(error)).hint(format!(
            "stop the other one; two nodes on one seed lose channels. If it is gone for good, wait {} s",
            heartbeat::STALE_S
        )),
        Err(HeartbeatError::Relays(error)) => Err(error).context("market.relays cannot be used"),
    }
}

/// Names this folder on this machine: a copy elsewhere is another instance.
fn instance(config: &Config) -> anyhow::Result<String> {
    let path = config.node.dir.join("instance");
    let id = match std::fs::read(&path) {
        Ok(id) => id,
        Err(_) => {
            let id = fresh_seed().to_vec();
            std::fs::write(&path, &id).with_context(|| format!("cannot write {}", path.display()))?;
            id
        }
    };
    let mut hasher = Sha256::new();
    hasher.update(&id);
    hasher.update(std::fs::read("/etc/machine-id").unwrap_or_default());
    hasher.update(config.node.dir.canonicalize().unwrap_or_default().as_os_str().as_encoded_bytes());
    Ok(hex::encode(hasher.finalize()))
}

pub(super) async fn open_journal(config: &Config) -> anyhow::Result<Store> {
    if let Some(url) = &config.ledger.url {
        let url = url.read().context("ledger.url")?;
        let journal = PostgresJournal::open(&url).await.context("the ledger cannot be opened")?;
        return Ok(Store::Postgres(journal));
    }
    let path = &config.ledger.path;
    let journal =
        SqliteJournal::open(path).await.with_context(|| format!("the ledger {} cannot be opened", path.display()))?;
    Ok(Store::Sqlite(journal))
}

/// The wallet that this node uses.
#[derive(Clone)]
pub(super) struct Wallet {
    pub lightning: Arc<dyn Lightning>,
    /// Absent where the wallet is somebody else's (Nostr Wallet Connect).
    pub embedded: Option<Arc<WalletProcess>>,
}

impl Wallet {
    /// Resolves when the wallet ended by itself.
    pub(super) async fn gone(&self) {
        match &self.embedded {
            Some(process) => process.gone().await,
            None => std::future::pending().await,
        }
    }
}

/// The user's own wallet, instead of the embedded node.
async fn connect_wallet(config: &Config, uri: String) -> anyhow::Result<Wallet> {
    let network = wallet_network(config.node.network);
    let state = config.node.dir.join("connected-wallet.json");
    let wallet = NwcWallet::connect(NwcConfig { uri, network, state }).await;
    let wallet =
        wallet.context("the wallet of wallet.nwc cannot be used").hint("make the connection anew in that wallet")?;
    tracing::info!(node = %wallet.node_id(), "connected to a wallet over Nostr Wallet Connect");
    Ok(Wallet { lightning: Arc::new(wallet), embedded: None })
}

/// The chain source as the wallet's adapter has it.
pub(crate) fn chain_source(config: &Config) -> anyhow::Result<satgrid_wallet_ldk::ChainSource> {
    Ok(match &config.wallet.chain {
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
    })
}

pub(super) async fn open_wallet(config: &Config, keys: &Keys, restored: Option<&Restoring>) -> anyhow::Result<Wallet> {
    if let Some(uri) = &config.wallet.nwc {
        return connect_wallet(config, uri.read()?).await;
    }
    let chain = chain_source(config)?;
    let mut ldk = LdkConfig::new(config.node.dir.join("lightning"), keys.seed.clone(), chain);
    ldk.network = wallet_network(config.node.network);
    ldk.seen = restore::seen(&backups(config), restored);
    ldk.given_up = restored.map(|restored| restored.given_up.clone()).unwrap_or_default();
    ldk.listen = vec![config.wallet.listen];
    ldk.alias = config.wallet.alias.clone();
    ldk.max_balance_sat = Some(config.wallet.max_balance_sat);
    ldk.trusted_0conf = config
        .wallet
        .trusted_0conf
        .iter()
        .map(|text| text.parse().with_context(|| format!("wallet.trusted_0conf: {text:?} is no Lightning node id")))
        .collect::<anyhow::Result<_>>()?;
    ldk.lsp_service =
        config.wallet.lsp_serve_fee_ppm.map(|fee_ppm| LspService { fee_ppm, min_fee_msat: LSP_MIN_FEE_MSAT });
    if let Some((node, addr)) = config.wallet.lsp.as_deref().and_then(lsp) {
        let addr = tokio::net::lookup_host(&addr).await.ok().and_then(|mut found| found.next());
        let addr = addr.with_context(|| format!("wallet.lsp: {:?} has no address", config.wallet.lsp))?;
        let token = config.wallet.lsp_token.as_ref().map(|secret| secret.read()).transpose()?;
        ldk.lsp = Some(Lsp { node, addr, token, max_fee_permille: config.wallet.lsp_max_fee_permille });
    }
    let program = Program { exe: crate::program()?, args: vec![WALLET_PROCESS.into()] };
    let wallet = WalletProcess::start(&program, ldk).await.context("the Lightning wallet does not start")?;
    let height = wallet.facts().await.map(|facts| facts.height).unwrap_or_default();
    tracing::info!(node = %wallet.node_id(), height, process = wallet.pid(), "wallet is up");
    let wallet = Arc::new(wallet);
    Ok(Wallet { lightning: wallet.clone(), embedded: Some(wallet) })
}

/// Whose keys the cold account has.
pub(crate) fn cold_keys(config: &Config, seed: &Seed) -> (satgrid_wallet::Network, ColdKeys) {
    let keys = config.wallet.cold_xpub.clone().map_or_else(|| ColdKeys::Words(seed.clone()), ColdKeys::WatchOnly);
    (wallet_network(config.node.network), keys)
}

/// Where channel backups are written, and read by the guard.
pub(crate) fn backups(config: &Config) -> Vec<PathBuf> {
    let own = config.node.dir.join(BACKUP_FILE);
    std::iter::once(own).chain(config.wallet.backup.clone()).collect()
}

/// Our wallet for the user's other apps. A relay that does not answer is no reason not to run.
pub(super) async fn serve_apps(
    config: &Config,
    keys: &Keys,
    wallet: &Wallet,
) -> anyhow::Result<Option<Arc<NwcService>>> {
    if config.market.relays.is_empty() {
        return Ok(None);
    }
    let connections = Connections::open(config.node.dir.join("connections.json"), keys.sessions)?;
    let embedded = wallet.embedded.clone().map(|process| process as Arc<dyn Embedded>);
    let relays = ServiceConfig { relays: config.market.relays.clone() };
    match NwcService::start(relays, wallet.lightning.clone(), embedded, connections).await {
        Ok(service) => Ok(Some(Arc::new(service))),
        Err(error) => {
            tracing::warn!(%error, "apps cannot connect to this wallet");
            Ok(None)
        }
    }
}

pub(crate) fn wallet_network(network: Network) -> satgrid_wallet::Network {
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

/// Where budgets and figures are kept: in the journal's file, or in one of their own where the journal is on a server.
pub(crate) fn beside_journal(config: &Config) -> PathBuf {
    match config.ledger.url {
        Some(_) => config.node.dir.join("keys.sqlite"),
        None => config.ledger.path.clone(),
    }
}

/// Budgets in the journal's file, which is open already; in one of their own where the journal is on a server.
pub(super) async fn open_keys(config: &Config) -> anyhow::Result<KeyStore> {
    let path = beside_journal(config);
    KeyStore::open(&path).await.with_context(|| format!("the keys in {} cannot be opened", path.display()))
}

/// What a bitcoin is worth, if the operator named a source.
pub(super) fn exchange_rate(config: &Config, shutdown: &CancellationToken) -> anyhow::Result<Rate> {
    let source = config.api.exchange_rate.as_deref().map(str::parse::<Source>).transpose();
    let source = source.map_err(anyhow::Error::msg).context("api.exchange_rate")?;
    let refresh = Duration::from_secs(config.api.exchange_refresh_s.max(MIN_REFRESH_S));
    Ok(Rate::start(source, refresh, shutdown.clone()))
}

/// The edge for strangers: no key of the operator's file, nobody without a key.
pub(super) fn door_api(
    config: &Config,
    service: Arc<dyn Service>,
    accounts: Arc<dyn Accounts>,
    door: Arc<dyn Door>,
) -> anyhow::Result<Api> {
    let own = api_config(config, accounts)?;
    let for_strangers = ApiConfig { keys: Vec::new(), keyless_loopback: false, door: Some(door), ..own };
    Ok(Api::new(service, for_strangers))
}

/// The front door's certificate, if it ends TLS itself.
pub(super) fn tls(config: &Config, edges: &CancellationToken) -> anyhow::Result<Option<Tls>> {
    let door = &config.door;
    if let Some(acme) = door.acme() {
        return acme::start(acme, &config.node.dir, edges.clone()).map(Some).context("door.acme_domains");
    }
    let (Some(certificate), Some(key)) = (&door.certificate, &door.key) else { return Ok(None) };
    Tls::from_files(certificate, key).map(Some).context("door.certificate and door.key cannot be used")
}

pub(super) fn api_config(config: &Config, accounts: Arc<dyn Accounts>) -> anyhow::Result<ApiConfig> {
    let keys = config
        .api
        .keys
        .iter()
        .map(|key| Ok(ApiKey::new(key.name.clone(), &key.secret.read()?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(ApiConfig { keys, accounts: Some(accounts), drain: DRAIN, ..ApiConfig::default() })
}
