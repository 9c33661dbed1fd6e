//! What the demo asks of running nodes: their admin ports, and the chain's JSON-RPC to mine.

use anyhow::{Context, bail};
use reqwest::Client;
use satgrid_types::{LightningKey, Msat, NodeKey, PaymentHash, SessionId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::admin::TOKEN_FILE;

const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// One node's admin port.
#[derive(Debug, Clone)]
pub(super) struct Admin {
    client: Client,
    pub(super) address: SocketAddr,
    /// The node writes the token when it starts.
    token_file: PathBuf,
}

/// `GET /admin/v1/status`, as much of it as the demo reads.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Status {
    pub(super) node_key: NodeKey,
    pub(super) lightning_node: LightningKey,
    pub(super) lightning_listen: Option<SocketAddr>,
    pub(super) provider: Option<ProviderStatus>,
    pub(super) consumer: Option<ConsumerStatus>,
    pub(super) listings: usize,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ProviderStatus {
    pub(super) largest_exposure_msat: Msat,
    pub(super) halted: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ConsumerStatus {
    pub(super) open_calls: usize,
    pub(super) largest_exposure_msat: Msat,
    pub(super) sessions: Vec<SessionStatus>,
    pub(super) halted: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct SessionStatus {
    pub(super) session: SessionId,
    pub(super) provider: NodeKey,
    pub(super) remainder_msat: Msat,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Wallet {
    pub(super) balance: Balance,
    pub(super) channels: Vec<Channel>,
}

#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
pub(super) struct Balance {
    pub(super) lightning_total_msat: Msat,
    pub(super) onchain_confirmed_sat: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Channel {
    pub(super) counterparty: LightningKey,
    pub(super) usable: bool,
}

/// One row of a wallet's own payment list.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Payment {
    pub(super) payment_hash: PaymentHash,
    pub(super) direction: Direction,
    pub(super) amount_msat: Msat,
    pub(super) fee_msat: Msat,
    pub(super) state: PaymentState,
}

impl Payment {
    /// Paid by us, and its end is not known yet.
    pub(super) fn is_flying(&self) -> bool {
        self.direction == Direction::Outbound && self.state == PaymentState::InFlight
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Direction {
    Inbound,
    Outbound,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PaymentState {
    Unknown,
    InFlight,
    /// An invoice of ours that nobody paid yet.
    Unpaid,
    Settled,
    Failed,
}

impl Admin {
    pub(super) fn new(address: SocketAddr, node_dir: &std::path::Path) -> anyhow::Result<Admin> {
        // A demo talks to this machine only; a proxy from the environment has no business here.
        let client = Client::builder().no_proxy().timeout(ANSWER_WITHIN).build()?;
        Ok(Admin { client, address, token_file: node_dir.join(TOKEN_FILE) })
    }

    pub(super) async fn status(&self) -> anyhow::Result<Status> {
        self.ask(self.client.get(self.url("status"))).await
    }
    pub(super) async fn wallet(&self) -> anyhow::Result<Wallet> {
        self.ask(self.client.get(self.url("wallet"))).await
    }
    pub(super) async fn payments(&self) -> anyhow::Result<Vec<Payment>> {
        self.ask(self.client.get(self.url("wallet/payments"))).await
    }
    pub(super) async fn new_address(&self) -> anyhow::Result<String> {
        let answer: Value = self.ask(self.client.post(self.url("wallet/address"))).await?;
        Ok(answer["address"].as_str().context("no address in the answer")?.to_owned())
    }
    pub(super) async fn sync(&self) -> anyhow::Result<()> {
        self.ask::<Value>(self.client.post(self.url("wallet/sync"))).await.map(drop)
    }
    pub(super) async fn open_channel(
        &self,
        node: LightningKey,
        addr: SocketAddr,
        capacity_sat: u64,
        push: Msat,
    ) -> anyhow::Result<()> {
        let open = json!({ "node": node, "addr": addr, "capacity_sat": capacity_sat, "push_msat": push });
        self.ask::<Value>(self.client.post(self.url("wallet/open")).json(&open)).await.map(drop)
    }
    pub(super) async fn close_session(&self, session: SessionId) -> anyhow::Result<()> {
        self.ask::<Value>(self.client.post(self.url(&format!("sessions/{session}/close")))).await.map(drop)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/admin/v1/{path}", self.address)
    }

    async fn ask<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> anyhow::Result<T> {
        let token = std::fs::read_to_string(&self.token_file)
            .with_context(|| format!("no admin token yet in {}", self.token_file.display()))?;
        let response = request.bearer_auth(token.trim()).send().await?;
        let (url, status) = (response.url().clone(), response.status());
        let text = response.text().await?;
        if !status.is_success() {
            let error: Value = serde_json::from_str(&text).unwrap_or_default();
            bail!("{}: {status}: {}", url.path(), error["error"].as_str().unwrap_or(&text));
        }
        serde_json::from_str(&text).with_context(|| format!("{} answers something else", url.path()))
    }
}

/// The chain's bitcoind face.
#[derive(Debug, Clone)]
pub(super) struct Rpc {
    client: Client,
    url: String,
}

impl Rpc {
    pub(super) fn new(url: &str) -> anyhow::Result<Rpc> {
        let client = Client::builder().no_proxy().timeout(ANSWER_WITHIN).build()?;
        Ok(Rpc { client, url: url.to_owned() })
    }
    pub(super) async fn mine(&self, blocks: u32, address: &str) -> anyhow::Result<()> {
        self.call("generatetoaddress", json!([blocks, address])).await.map(drop)
    }
    /// Transactions that wait for a block.
    pub(super) async fn waiting(&self) -> anyhow::Result<usize> {
        Ok(self.call("getrawmempool", json!([])).await?.as_array().map_or(0, Vec::len))
    }

    async fn call(&self, method: &str, params: Value) -> anyhow::Result<Value> {
        let request = json!({ "jsonrpc": "1.0", "id": "demo", "method": method, "params": params });
        let sent = self.client.post(&self.url).json(&request).send().await;
        let answer: Value = sent.context("the chain does not answer")?.json().await?;
        if !answer["error"].is_null() {
            bail!("the chain refuses {method}: {}", answer["error"]["message"]);
        }
        Ok(answer["result"].clone())
    }
}
