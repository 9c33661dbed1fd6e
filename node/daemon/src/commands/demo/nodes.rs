//! The processes of the market: their folders, seeds, ports and configurations.

use anyhow::{Context, bail};
use satgrid_devnet::ports;
use satgrid_types::{LightningKey, Msat, NodeKey};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Clock;
use super::children::Child;
use super::client::{Admin, Rpc, Status};
use super::experts::Parts;
use crate::commands::init::{new_phrase, write_new};
use crate::config;
use crate::failure::HintExt;

/// What two strangers charge, in msat per million tokens: 0.1 sat a token read, 0.4 or 0.6 sat a token written. Far above
/// the market, so that one short answer takes several slices.
const INPUT_PRICE: u64 = 100_000_000;
const OUTPUT_PRICE: u64 = 400_000_000;
/// Both sides sign this often: a short answer shows several signatures.
const ACK_TOKENS: u32 = 16;
const WINDOW_TOKENS: u32 = 32;
/// Remainders from this on are paid back at the end.
pub(super) const REFUND_DUST_SAT: u64 = 1;
/// A block reward is more than the cap that a careful operator sets.
const MAX_BALANCE_SAT: u64 = 21_000_000 * 100_000_000;
/// A provider hashes, loads and measures a model before it answers.
const UP_WITHIN: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
/// Marks a folder as a demo's, to be wiped by the next.
const MARKER: &str = "satgrid-demo";

/// The model that both providers sell.
pub(super) struct ForSale {
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Name and file of another one.
    pub(super) also: Option<(String, PathBuf)>,
    /// A base model has none: it continues text.
    pub(super) has_template: bool,
    /// The consumer's own catalogue, where the shipped one does not know the model.
    pub(super) catalogue: Option<String>,
    /// Sequences at once; each takes memory for its context.
    pub(super) slots: u32,
    /// Signatures every few tokens, to have several to show; else at the defaults.
    pub(super) short_acks: bool,
    pub(super) profile: String,
    pub(super) models_dir: PathBuf,
    pub(super) prices: Prices,
    pub(super) threads: Option<u32>,
    /// The parts with which the first provider leads; the second runs the whole model.
    pub(super) parts: Option<Parts>,
}

/// In msat per million tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prices {
    input: u64,
    /// Of the first provider, and of the second, who is dearer by half.
    output: [u64; 2],
}

impl Prices {
    pub(super) fn new(input: Option<u64>, output: Option<u64>) -> Prices {
        let output = output.unwrap_or(OUTPUT_PRICE);
        Prices { input: input.unwrap_or(INPUT_PRICE), output: [output, output.saturating_add(output / 2)] }
    }
}

/// One node, with what it said of itself when it came up.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: &'static str,
    pub(super) dir: PathBuf,
    pub(super) admin: Admin,
    /// In msat per million tokens; absent for the consumer.
    pub(super) output_price: Option<u64>,
    config: PathBuf,
    log: PathBuf,
    child: Option<Child>,
    identity: Option<Identity>,
    /// What it had at risk at most, as it last said before it was killed.
    pub(super) exposure_before: Msat,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    pub(super) node_key: NodeKey,
    pub(super) lightning_node: LightningKey,
    pub(super) lightning_listen: SocketAddr,
}

/// Everything that runs.
pub(super) struct Market {
    pub(super) dir: PathBuf,
    pub(super) clock: Clock,
    pub(super) providers: Vec<Node>,
    api: SocketAddr,
    chain_url: String,
    relay_url: String,
    chain: Option<Child>,
    relay: Option<Child>,
    consumer: Option<Node>,
    failed: bool,
}

/// An empty folder that is a demo's own. One that holds anything else is left alone.
pub(super) fn fresh_dir(dir: &Path) -> anyhow::Result<PathBuf> {
    let empty = match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return Err(error).with_context(|| format!("cannot look into {}", dir.display())),
    };
    if !empty {
        if !dir.join(MARKER).exists() {
            return Err(anyhow::anyhow!("{} holds something that is no demo's", dir.display())).hint("choose --dir");
        }
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot wipe {}", dir.display()))?;
    }
    private_dir(dir)?;
    std::fs::write(dir.join(MARKER), "made by `satgrid devnet demo`, which wipes this folder when it starts\n")?;
    private_dir(&dir.join("logs"))?;
    Ok(dir.to_owned())
}

fn private_dir(dir: &Path) -> anyhow::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(|| format!("cannot make {}", dir.display()))
}

fn text(value: impl std::fmt::Display) -> String {
    toml::Value::String(value.to_string()).to_string()
}

impl Node {
    /// Folder, seed and configuration of a node; `set` adds to what every node of the market has.
    fn make(
        market: &Market,
        name: &'static str,
        for_sale: &ForSale,
        output_price: Option<u64>,
        set: BTreeMap<&'static str, String>,
    ) -> anyhow::Result<Node> {
        let dir = market.dir.join(name);
        private_dir(&dir)?;
        let phrase = new_phrase(false)?;
        write_new(&dir.join("seed"), &format!("{}\n", phrase.reveal()), 0o600)?;
        // The same key that the seed gives, as `ledger export --key` reads it.
        let identity = hex::encode(phrase.seed().identity(0).to_bytes());
        write_new(&dir.join("identity.key"), &format!("{identity}\n"), 0o600)?;

        let (admin, lightning) = (ports::free()?, ports::free()?);
        let mut all = BTreeMap::from([
            ("node.network", text("regtest")),
            ("node.dir", text(dir.display())),
            ("api.admin", text(admin)),
            ("session.refund_dust_sat", REFUND_DUST_SAT.to_string()),
            ("market.relays", format!("[{}]", text(&market.relay_url))),
            ("wallet.chain", text(format!("esplora:{}", market.chain_url))),
            ("wallet.listen", text(lightning)),
            ("wallet.alias", text(name)),
            ("wallet.max_balance_sat", MAX_BALANCE_SAT.to_string()),
            ("models.dir", text(for_sale.models_dir.display())),
        ]);
        if for_sale.short_acks {
            all.insert("session.ack_tokens", ACK_TOKENS.to_string());
            all.insert("session.window_tokens", WINDOW_TOKENS.to_string());
        }
        all.extend(set);
        let config = market.dir.join(format!("{name}.toml"));
        write_new(&config, &config::render(&all, false), 0o600)?;
        let log = market.dir.join("logs").join(format!("{name}.log"));
        Ok(Node {
            name,
            admin: Admin::new(admin, &dir)?,
            dir,
            output_price,
            config,
            log,
            child: None,
            identity: None,
            exposure_before: Msat::ZERO,
        })
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let config = self.config.to_string_lossy();
        self.child = Some(Child::start(self.name, &["up", "--config", &config], &self.log)?);
        Ok(())
    }

    /// Known once it is up.
    pub(super) fn identity(&self) -> anyhow::Result<Identity> {
        self.identity.with_context(|| format!("{} is not up", self.name))
    }

    pub(super) fn is_running(&self) -> bool {
        self.child.is_some()
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.dir.join("ledger.sqlite")
    }
}

impl Market {
    pub(super) fn new(dir: PathBuf, clock: Clock) -> Market {
        Market {
            dir,
            clock,
            providers: Vec::new(),
            api: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            chain_url: String::new(),
            relay_url: String::new(),
            chain: None,
            relay: None,
            consumer: None,
            failed: false,
        }
    }

    /// Starts everything and waits until every node answers.
    pub(super) async fn start(&mut self, port: u16, for_sale: &ForSale) -> anyhow::Result<()> {
        let log = |name: &str| self.dir.join("logs").join(format!("{name}.log"));
        let (chain, url) = Child::start_and_hear("chain", &["devnet", "chain"], &log("chain")).await?;
        (self.chain, self.chain_url) = (Some(chain), url);
        let (relay, url) = Child::start_and_hear("relay", &["devnet", "relay"], &log("relay")).await?;
        (self.relay, self.relay_url) = (Some(relay), url);
        self.clock.say(format!("a regtest chain at {}, a Nostr relay at {}", self.chain_url, self.relay_url));
        // Wallets start from a chain's tip, and a chain that holds nothing but its first block has none to speak of.
        self.rpc()?.mine(1, super::funding::NOBODY).await?;

        self.api = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        for (name, price) in ["provider-a", "provider-b"].into_iter().zip(for_sale.prices.output) {
            let quic = ports::free()?;
            let parts = for_sale.parts.as_ref().filter(|_| self.providers.is_empty());
            let path = parts.map_or(&for_sale.path, |parts| &parts.trunk);
            let packs: Vec<String> =
                parts.iter().flat_map(|parts| &parts.packs).map(|pack| text(pack.display())).collect();
            let also = for_sale.also.as_ref().map(|(name, path)| {
                format!(
                    ", {{ path = {}, alias = {}, price_in_msat_per_mtok = {}, price_out_msat_per_mtok = {price}, slots = 2, \
                     threads = 1 }}",
                    text(path.display()),
                    text(name),
                    for_sale.prices.input,
                )
            });
            let model = format!(
                "[{{ path = {}, experts = [{}], alias = {}, price_in_msat_per_mtok = {}, \
                 price_out_msat_per_mtok = {price}, slots = {}, profile = {}, context = 2048{} }}{}]",
                text(path.display()),
                packs.join(", "),
                text(&for_sale.name),
                for_sale.prices.input,
                for_sale.slots,
                text(&for_sale.profile),
                for_sale.threads.map(|threads| format!(", threads = {threads}")).unwrap_or_default(),
                also.unwrap_or_default(),
            );
            let set = BTreeMap::from([
                ("node.roles", "[\"provider\"]".to_owned()),
                ("provider.quic_listen", text(quic)),
                ("provider.public_addresses", format!("[{}]", text(quic))),
                ("provider.models", model),
            ]);
            let mut node = Node::make(self, name, for_sale, Some(price), set)?;
            node.start()?;
            self.providers.push(node);
        }
        let mut set = BTreeMap::from([("node.roles", "[\"consumer\"]".to_owned()), ("api.listen", text(self.api))]);
        if let Some(catalogue) = &for_sale.catalogue {
            let path = self.dir.join("catalogue.toml");
            std::fs::write(&path, catalogue)?;
            set.insert("market.catalogue", text(path.display()));
        }
        let mut consumer = Node::make(self, "consumer", for_sale, None, set)?;
        consumer.start()?;
        self.consumer = Some(consumer);

        for name in ["consumer", "provider-a", "provider-b"] {
            self.wait_up(name).await?;
        }
        Ok(())
    }

    /// Waits until this node answers on its admin port, and notes who it is.
    async fn wait_up(&mut self, name: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + UP_WITHIN;
        let status = loop {
            self.check()?;
            let admin = self.node(name)?.admin.clone();
            match admin.status().await {
                Ok(status) => break status,
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("{name} did not come up within {} s", UP_WITHIN.as_secs())));
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        };
        let Status { node_key, lightning_node, lightning_listen, .. } = status;
        let lightning_listen = lightning_listen.with_context(|| format!("{name} has no Lightning address"))?;
        let pid = {
            let node = self.node_mut(name)?;
            node.identity = Some(Identity { node_key, lightning_node, lightning_listen });
            node.child.as_ref().and_then(Child::id).unwrap_or_default()
        };
        let price = self.node(name)?.output_price;
        let sells = price.map_or(String::new(), |price| format!(", {} msat a token", price / 1_000_000));
        self.clock.say(format!("{name} is up: process {pid}, node {}{sells}", node_key.short()));
        Ok(())
    }

    /// Starts a node again that was killed.
    pub(super) async fn restart(&mut self, name: &str) -> anyhow::Result<()> {
        self.node_mut(name)?.start()?;
        self.wait_up(name).await
    }

    /// SIGKILL for the node with this key. Its name comes back.
    pub(super) async fn kill(&mut self, key: NodeKey) -> anyhow::Result<&'static str> {
        for node in &mut self.providers {
            if node.identity.is_some_and(|identity| identity.node_key == key) {
                if let Some(provider) = node.admin.status().await?.provider {
                    node.exposure_before = provider.largest_exposure_msat;
                }
                if let Some(mut child) = node.child.take() {
                    child.kill().await?;
                }
                return Ok(node.name);
            }
        }
        bail!("no provider has the key {key}")
    }

    /// An error where a process ended that nobody told to.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let nodes = self.providers.iter_mut().chain(&mut self.consumer).filter_map(|node| node.child.as_mut());
        let checked = nodes.chain(&mut self.chain).chain(&mut self.relay).try_for_each(Child::check);
        self.failed |= checked.is_err();
        checked
    }

    pub(super) fn consumer(&self) -> anyhow::Result<&Node> {
        self.consumer.as_ref().context("the consumer was not started")
    }

    /// Consumer first.
    pub(super) fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.consumer.iter().chain(&self.providers)
    }

    pub(super) fn node_with(&self, key: NodeKey) -> Option<&Node> {
        self.nodes().find(|node| node.identity.is_some_and(|identity| identity.node_key == key))
    }

    fn node(&self, name: &str) -> anyhow::Result<&Node> {
        self.nodes().find(|node| node.name == name).with_context(|| format!("{name} was not started"))
    }

    fn node_mut(&mut self, name: &str) -> anyhow::Result<&mut Node> {
        let mut nodes = self.consumer.iter_mut().chain(&mut self.providers);
        nodes.find(|node| node.name == name).with_context(|| format!("{name} was not started"))
    }

    pub(super) fn rpc(&self) -> anyhow::Result<Rpc> {
        Rpc::new(&self.chain_url)
    }

    pub(super) fn api_url(&self) -> String {
        format!("http://{}/v1", self.api)
    }

    /// Who is who, for programs.
    pub(super) fn describe(&self, for_sale: &ForSale) -> Value {
        let nodes: Vec<Value> = self
            .nodes()
            .map(|node| {
                json!({
                    "name": node.name, "pid": node.child.as_ref().and_then(Child::id), "dir": node.dir,
                    "config": node.config, "log": node.log, "admin": node.admin.address,
                    "node_key": node.identity.map(|identity| identity.node_key),
                    "output_msat_per_mtok": node.output_price,
                })
            })
            .collect();
        let pid = |child: &Option<Child>| child.as_ref().and_then(Child::id);
        json!({
            "model": for_sale.name, "api": self.api_url(), "dir": self.dir, "nodes": nodes,
            "chain": { "url": self.chain_url, "pid": pid(&self.chain) },
            "relay": { "url": self.relay_url, "pid": pid(&self.relay) },
        })
    }

    /// After a failure: the ends of the nodes' logs, unless one was shown already.
    pub(super) fn show_why(&self) {
        if self.failed {
            return;
        }
        for node in self.nodes() {
            if let Some(child) = &node.child {
                eprintln!("--- {}\n{}", node.name, child.tail());
            }
        }
    }

    /// Ends everything: nodes first, so that they can take their leave of relay and chain.
    pub(super) async fn stop(&mut self) {
        let nodes = self.consumer.iter_mut().chain(&mut self.providers);
        let children: Vec<Child> = nodes.filter_map(|node| node.child.take()).collect();
        futures::future::join_all(children.into_iter().map(|mut child| async move { child.stop().await })).await;
        for mut child in self.relay.take().into_iter().chain(self.chain.take()) {
            child.stop().await;
        }
    }
}
