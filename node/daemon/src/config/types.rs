//! The configuration as types: what the drivers read. Filled by [`super::load`], which knows the defaults.

use satgrid_types::WireType;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::secret::Secret;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub node: Node,
    pub api: Api,
    pub door: Door,
    pub session: Session,
    pub provider: Provider,
    pub consumer: Consumer,
    pub market: Market,
    pub wallet: Wallet,
    pub ledger: Ledger,
    pub models: Models,
    pub log: Log,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Network {
    Regtest,
    Signet,
    Testnet,
    Mainnet,
}

impl Network {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Network::Regtest => "regtest",
            Network::Signet => "signet",
            Network::Testnet => "testnet",
            Network::Mainnet => "mainnet",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Provider,
    Consumer,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Node {
    pub network: Network,
    /// Absolute.
    pub dir: PathBuf,
    pub roles: Vec<Role>,
    pub min_free_mib: u64,
    /// 0: half the cores.
    pub threads: u32,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Api {
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub keys: Vec<ApiKey>,
    pub exchange_rate: Option<String>,
    pub exchange_refresh_s: u64,
}

/// Selling over HTTP to clients without a node.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Door {
    pub listen: Option<SocketAddr>,
    /// `own` or `market`.
    pub sells: Option<String>,
    /// PEM files; both or none.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Names for which an authority is asked for a certificate instead.
    pub acme_domains: Vec<String>,
    pub acme_contact: Option<String>,
    pub acme_directory: String,
    pub acme_terms_agreed: bool,
    pub acme_ca: Option<PathBuf>,
    /// Proxies in front, which end TLS and say in `X-Forwarded-For` who asks.
    pub trusted_proxies: Vec<IpAddr>,
    pub margin_permille: u64,
    pub min_sat: u64,
    pub max_sat: u64,
    pub max_balance_sat: u64,
}

/// What the front door sells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DoorSells {
    /// This provider's own models.
    Own,
    /// What this consumer buys in the market.
    Market,
}

/// A key that a client of the endpoint presents.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ApiKey {
    pub name: String,
    pub secret: Secret,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Session {
    pub ack_tokens: u32,
    pub ack_ms: u64,
    pub window_tokens: u32,
    pub invoice_expiry_s: u64,
    pub quote_validity_s: u64,
    pub idle_close_s: u64,
    pub refund_idle: bool,
    pub resume_s: u64,
    pub refund_dust_sat: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Provider {
    pub quic_listen: SocketAddr,
    pub public_addresses: Vec<String>,
    pub region: Option<String>,
    pub listing_expiry_s: u64,
    pub slice_min_sat: u64,
    pub slice_max_sat: u64,
    pub requests_per_peer: u32,
    pub models: Vec<ModelForSale>,
    pub stages: Vec<StageForSale>,
    pub packs: Vec<PackForSale>,
    pub leads: Vec<LeadForSale>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Profile {
    /// Bit-identical under any batching; the default on CPU.
    #[default]
    Exact,
    Fast,
}

/// One model that a provider sells: a file, or a name that `satgrid models pull` knows.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelForSale {
    /// A GGUF file. Exactly one of `path` and `name`.
    pub path: Option<PathBuf>,
    /// A pulled model, as `satgrid models list` names it.
    pub name: Option<String>,
    /// The name in the listing; else `name`, or the file's stem.
    pub alias: Option<String>,
    pub price_in_msat_per_mtok: u64,
    /// Unset: the price of input.
    pub price_cached_msat_per_mtok: Option<u64>,
    pub price_out_msat_per_mtok: u64,
    #[serde(default)]
    pub per_request_msat: u64,
    #[serde(default)]
    pub profile: Profile,
    /// Sequences in one batch.
    #[serde(default = "default_slots")]
    pub slots: u32,
    /// Tokens per sequence; unset: what the model was trained for, at most the engine's default.
    pub context: Option<u32>,
    /// Engine threads; unset: one for each physical core.
    pub threads: Option<u32>,
    /// As `satgrid doctor` names it (`CUDA0`), or `cpu`; unset: the card with the most free memory, if this build has any.
    pub device: Option<String>,
    /// Layers on the device; unset: as many as fit.
    pub gpu_layers: Option<u32>,
    /// A server that runs this model already: `http://127.0.0.1:8080`. The file says what is sold; nothing is loaded here.
    pub upstream: Option<String>,
    /// The name that the server knows the model by; else the listed name.
    pub upstream_model: Option<String>,
    /// `llama-server`, `vllm`, `sglang`, `ollama` or `text`; else found out by asking.
    pub upstream_kind: Option<String>,
    pub upstream_key: Option<Secret>,
    /// Of a trunk (`satgrid models split --experts`): packs that this node evaluates itself, each in a process of its own.
    #[serde(default)]
    pub experts: Vec<PathBuf>,
    /// Of a trunk: a pack from which the node loads experts that nobody else holds any more.
    pub spare_experts: Option<PathBuf>,
    /// Of a trunk: expert rows of a million that a second holder evaluates too, to be compared to the bit.
    #[serde(default)]
    pub witness_per_million: u32,
    /// Of a trunk: buys the experts that it does not hold of other nodes.
    #[serde(default)]
    pub buy_experts: bool,
    /// What it pays for experts at the most; unset: whatever is asked.
    pub max_price_msat_per_million_expert_rows: Option<u64>,
    /// How rows travel to experts of other nodes.
    #[serde(default)]
    pub wire: Wire,
}

/// Layers that a provider sells: a part that `satgrid models split` wrote.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StageForSale {
    /// A part of a model.
    pub path: PathBuf,
    /// The name in the listing, where the part has none.
    pub alias: Option<String>,
    pub price_msat_per_million_position_layers: u64,
    #[serde(default)]
    pub per_request_msat: u64,
    #[serde(default)]
    pub profile: Profile,
    /// Sequences held at once.
    #[serde(default = "default_slots")]
    pub slots: u32,
    pub context: Option<u32>,
    pub threads: Option<u32>,
    /// As for whole models.
    pub device: Option<String>,
    pub gpu_layers: Option<u32>,
    /// The most memory that layers, cache and buffers may take; listed, so that leads plan with it. Unset: what is free.
    pub memory_mib: Option<u32>,
    /// Of a trunk (`satgrid models split --layers A..B --trunk`): as for whole models.
    #[serde(default)]
    pub experts: Vec<PathBuf>,
    pub spare_experts: Option<PathBuf>,
    #[serde(default)]
    pub witness_per_million: u32,
    #[serde(default)]
    pub buy_experts: bool,
    pub max_price_msat_per_million_expert_rows: Option<u64>,
    /// How rows travel to experts of other nodes; between stages the lead chooses.
    #[serde(default)]
    pub wire: Wire,
}

/// Where a trunk's experts are, whether it is a whole model's or a stage's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertSources<'a> {
    /// Packs of this node's own.
    pub packs: &'a [PathBuf],
    pub spare: Option<&'a PathBuf>,
    pub witness_per_million: u32,
    pub buys: bool,
    /// In msat per million expert rows.
    pub max_price: Option<u64>,
    pub wire: Wire,
}

impl ExpertSources<'_> {
    /// Somebody holds experts for it, or is to.
    pub(crate) fn any(&self) -> bool {
        self.buys || !self.packs.is_empty() || self.spare.is_some()
    }
}

impl ModelForSale {
    pub(crate) fn expert_sources(&self) -> ExpertSources<'_> {
        ExpertSources {
            packs: &self.experts,
            spare: self.spare_experts.as_ref(),
            witness_per_million: self.witness_per_million,
            buys: self.buy_experts,
            max_price: self.max_price_msat_per_million_expert_rows,
            wire: self.wire,
        }
    }
}

impl StageForSale {
    pub(crate) fn expert_sources(&self) -> ExpertSources<'_> {
        ExpertSources {
            packs: &self.experts,
            spare: self.spare_experts.as_ref(),
            witness_per_million: self.witness_per_million,
            buys: self.buy_experts,
            max_price: self.max_price_msat_per_million_expert_rows,
            wire: self.wire,
        }
    }
}

/// Experts that a provider sells: a pack that `satgrid models split --experts` wrote.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PackForSale {
    pub path: PathBuf,
    /// The name in the listing.
    pub alias: Option<String>,
    pub price_msat_per_million_expert_rows: u64,
    #[serde(default)]
    pub per_request_msat: u64,
    #[serde(default)]
    pub profile: Profile,
    /// Requests at once.
    #[serde(default = "default_pack_slots")]
    pub slots: u32,
    pub threads: Option<u32>,
    /// As for whole models; a card serves the profile `fast` alone.
    pub device: Option<String>,
}

/// How hidden rows travel between nodes. Only `f32` is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Wire {
    #[default]
    F32,
    Bf16,
    #[serde(rename = "q8_0")]
    Q8,
}

impl Wire {
    pub(crate) fn wire_type(self) -> WireType {
        match self {
            Wire::F32 => WireType::F32,
            Wire::Bf16 => WireType::Bf16,
            Wire::Q8 => WireType::Q8_0,
        }
    }
}

/// A model that this node leads: it runs the two ends and buys the layers between.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LeadForSale {
    /// The part with the first layers.
    pub head: PathBuf,
    /// The part that ends the model.
    pub tail: PathBuf,
    /// The name in the listing.
    pub alias: String,
    pub price_in_msat_per_mtok: u64,
    pub price_out_msat_per_mtok: u64,
    /// What it pays for layers at the most; unset: whatever is asked.
    pub max_price_msat_per_million_position_layers: Option<u64>,
    #[serde(default)]
    pub wire: Wire,
    #[serde(default)]
    pub profile: Profile,
    /// Guess tokens and verify several in one trip around the ring (profile exact alone); wrong guesses are paid too.
    #[serde(default = "default_speculate")]
    pub speculate: bool,
    /// A small model, whole and of the same vocabulary, that guesses where the text does not repeat itself.
    pub draft: Option<PathBuf>,
    #[serde(default = "default_slots")]
    pub slots: u32,
    pub context: Option<u32>,
    pub threads: Option<u32>,
    /// As for whole models: of both ends.
    pub device: Option<String>,
}

fn default_speculate() -> bool {
    true
}

/// A request at a pack is no more than its counters.
fn default_pack_slots() -> u32 {
    64
}

fn default_slots() -> u32 {
    16
}

/// A server that runs a model for this node.
#[derive(Clone, Debug)]
pub(crate) struct Upstream {
    pub url: String,
    pub model: String,
    pub kind: Option<String>,
    pub key: Option<Secret>,
}

impl ModelForSale {
    pub(crate) fn upstream(&self) -> Option<Upstream> {
        let url = self.upstream.clone()?;
        let model = self.upstream_model.clone().unwrap_or_else(|| self.listed_name());
        Some(Upstream { url, model, kind: self.upstream_kind.clone(), key: self.upstream_key.clone() })
    }

    /// The name that listings carry.
    pub(crate) fn listed_name(&self) -> String {
        let stem = || self.path.as_ref().and_then(|path| path.file_stem()).map(|s| s.to_string_lossy().into_owned());
        self.alias.clone().or_else(|| self.name.clone()).or_else(stem).unwrap_or_default()
    }

    pub(crate) fn cached_price(&self) -> u64 {
        self.price_cached_msat_per_mtok.unwrap_or(self.price_in_msat_per_mtok)
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Consumer {
    pub slice_first_sat: u64,
    pub slice_first_direct_sat: u64,
    pub slice_max_sat: u64,
    pub max_session_sat: u64,
    pub max_exposure_sat: u64,
    pub max_fee_permille: u32,
    pub allow_unverified_names: bool,
    pub prefer: Vec<String>,
    pub only: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Market {
    pub relays: Vec<String>,
    pub catalogue: Option<PathBuf>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wallet {
    pub chain: Option<ChainSource>,
    pub chain_password: Option<Secret>,
    pub seed: Secret,
    /// Opens `seed` where that is an encrypted file.
    pub passphrase: Option<Secret>,
    pub listen: SocketAddr,
    pub alias: Option<String>,
    pub max_balance_sat: u64,
    pub trusted_0conf: Vec<String>,
    /// Where peers reach `listen` from outside; published in listings.
    pub public_address: Option<String>,
    /// `NODE_ID@HOST:PORT` of a liquidity provider.
    pub lsp: Option<String>,
    pub lsp_token: Option<Secret>,
    pub lsp_max_fee_permille: u32,
    pub lsp_serve_fee_ppm: Option<u32>,
    pub backup: Option<PathBuf>,
    pub reopen: bool,
    /// `user@host`, a BOLT 12 offer, an address, or `cold`.
    pub sweep_to: Option<String>,
    pub sweep_above_sat: u64,
    pub sweep_keep_sat: u64,
    pub sweep_every_s: u64,
    pub sweep_max_fee_permille: u32,
    pub sweep_max_onchain_fee_permille: u32,
    pub sweep_fee_rate: Option<u32>,
    /// An xpub, or a descriptor with `<0;1>/*`.
    pub cold_xpub: Option<String>,
    /// A `nostr+walletconnect:` address: that wallet is used instead of the embedded node.
    pub nwc: Option<Secret>,
}

/// The two halves of `wallet.lsp`: a Lightning node id, and its host:port.
pub(crate) fn lsp(text: &str) -> Option<(satgrid_types::LightningKey, String)> {
    let (node, addr) = text.split_once('@')?;
    addr.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())?;
    Some((node.parse().ok()?, addr.to_owned()))
}

/// Where the wallet reads the chain.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum ChainSource {
    /// `esplora:http://host:port`
    Esplora { url: String },
    /// `electrum:host:port` or `electrum:ssl://host:port`
    Electrum { server: String },
    /// `bitcoind:user@host:port`; the password is `wallet.chain_password`.
    Bitcoind { user: String, host: String, port: u16 },
}

impl TryFrom<String> for ChainSource {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let form = "write esplora:URL, electrum:HOST:PORT or bitcoind:USER@HOST:PORT";
        let (kind, rest) = text.split_once(':').ok_or_else(|| format!("{text:?} names no chain source; {form}"))?;
        match kind {
            "esplora" if rest.starts_with("http://") || rest.starts_with("https://") => {
                Ok(ChainSource::Esplora { url: rest.trim_end_matches('/').to_owned() })
            }
            "esplora" => Err(format!("{rest:?} is no URL; {form}")),
            "electrum" if rest.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => {
                Ok(ChainSource::Electrum { server: rest.to_owned() })
            }
            "electrum" => Err(format!("{rest:?} has no port; {form}")),
            "bitcoind" => {
                let (user, server) = rest.rsplit_once('@').ok_or_else(|| format!("{rest:?} names no user; {form}"))?;
                if user.contains(':') {
                    return Err("a password has no place here; put it in wallet.chain_password as env: or file:".into());
                }
                let (host, port) = server.rsplit_once(':').ok_or_else(|| format!("{server:?} has no port; {form}"))?;
                let port = port.parse().map_err(|_| format!("{port:?} is no port; {form}"))?;
                Ok(ChainSource::Bitcoind { user: user.to_owned(), host: host.to_owned(), port })
            }
            other => Err(format!("{other:?} is no chain source; {form}")),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ledger {
    /// Absolute.
    pub path: PathBuf,
    /// The address of a PostgreSQL database that keeps the journal instead of the file.
    pub url: Option<Secret>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Models {
    /// Absolute.
    pub dir: PathBuf,
    pub hub_endpoint: Option<String>,
    pub hub_token: Option<Secret>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Log {
    pub level: String,
    pub format: LogFormat,
    /// A collector of OpenTelemetry's, `http://host:4318`.
    pub otlp_endpoint: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_sources() {
        let check =
            |text: &str, expect: Result<ChainSource, &str>| match (ChainSource::try_from(text.to_owned()), expect) {
                (Ok(got), Ok(want)) => assert_eq!(got, want, "{text}"),
                (Err(got), Err(part)) => assert!(got.contains(part), "{text}: {got}"),
                (got, want) => panic!("{text}: {got:?}, wanted {want:?}"),
            };
        check("esplora:http://127.0.0.1:3002/", Ok(ChainSource::Esplora { url: "http://127.0.0.1:3002".into() }));
        check("electrum:ssl://host:50002", Ok(ChainSource::Electrum { server: "ssl://host:50002".into() }));
        let bitcoind = ChainSource::Bitcoind { user: "rpc".into(), host: "127.0.0.1".into(), port: 18443 };
        check("bitcoind:rpc@127.0.0.1:18443", Ok(bitcoind));
        check("bitcoind:rpc:secret@127.0.0.1:18443", Err("wallet.chain_password"));
        check("bitcoind:127.0.0.1:18443", Err("names no user"));
        check("esplora:ftp://x", Err("no URL"));
        check("electrum:host", Err("no port"));
        check("neutrino:peer", Err("no chain source"));
        check("nothing", Err("names no chain source"));
    }
}
