//! Questions to the chain source that ldk-node has no call for: who spent this output, and take this transaction.
//!
//! It asks the same source as the node, keeps nothing, and believes it as far as the node does.

use crate::ChainSource;
use electrum_client::{Client as ElectrumClient, ConfigBuilder, ElectrumApi};
use esplora_client::{AsyncClient, Builder as EsploraBuilder};
use ldk_node::bitcoin::{
    Block, OutPoint, Transaction, Txid,
    consensus::encode::{deserialize_hex, serialize_hex},
};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const ANSWER_WITHIN: Duration = Duration::from_secs(30);
const ELECTRUM_WITHIN_S: u8 = if cfg!(test) { 1 } else { 30 };
/// Blocks for which a fee is estimated.
const FEE_BLOCKS: u16 = 6;
/// Where the source knows no rate (a fresh chain): twice what nodes relay.
const FALLBACK_SAT_PER_VB: u64 = 2;
/// bitcoind has no index of spenders: so many blocks are searched for one, from the tip down (four weeks).
const BLOCKS_SEARCHED: u64 = 4_032;
/// Longest answer of bitcoind that is read: a block as hex, and some.
const MAX_ANSWER: u64 = 16 * 1024 * 1024;

/// Who spends an output.
#[derive(Debug, Clone)]
pub(crate) struct Spender {
    pub(crate) tx: Transaction,
    pub(crate) confirmed: bool,
}

/// The chain source, asked beside the node.
pub struct Chain(ChainSource);

type Answer<T> = Result<T, String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Chain {
    pub fn of(source: &ChainSource) -> Chain {
        Chain(source.clone())
    }

    /// The transaction that spends `out`, waiting or confirmed; `None` while it is unspent.
    ///
    /// A bitcoind shows a spender when it is in a block; while it waits, the output is spent by nobody that is known.
    pub(crate) async fn spender(&self, out: OutPoint) -> Answer<Option<Spender>> {
        match &self.0 {
            ChainSource::Esplora { url } => {
                let client = esplora(url)?;
                let status = client.get_output_status(&out.txid, u64::from(out.vout)).await.map_err(text)?;
                let Some(by) = status.filter(|status| status.spent).and_then(|status| status.txid) else {
                    return Ok(None);
                };
                let confirmed = client.get_tx_status(&by).await.map_err(text)?.confirmed;
                Ok(client.get_tx(&by).await.map_err(text)?.map(|tx| Spender { tx, confirmed }))
            }
            ChainSource::Electrum { url } => {
                let url = url.clone();
                tokio::task::spawn_blocking(move || electrum_spender(&url, out)).await.map_err(text)?
            }
            ChainSource::BitcoindRpc { .. } => self.bitcoind_spender(out).await,
        }
    }

    pub(crate) async fn broadcast(&self, tx: &Transaction) -> Answer<()> {
        match &self.0 {
            ChainSource::Esplora { url } => esplora(url)?.broadcast(tx).await.map_err(text),
            ChainSource::Electrum { url } => {
                let (url, tx) = (url.clone(), tx.clone());
                let send = move || electrum(&url).and_then(|client| client.transaction_broadcast(&tx));
                tokio::task::spawn_blocking(send).await.map_err(text)?.map(drop).map_err(text)
            }
            ChainSource::BitcoindRpc { .. } => {
                self.rpc("sendrawtransaction", json!([serialize_hex(tx)])).await.map(drop)
            }
        }
    }

    /// What the newest block says of the time, in Unix seconds.
    pub async fn tip_time(&self) -> Answer<u64> {
        match &self.0 {
            ChainSource::Esplora { url } => {
                let client = esplora(url)?;
                let tip = client.get_tip_hash().await.map_err(text)?;
                Ok(client.get_header_by_hash(&tip).await.map_err(text)?.time.into())
            }
            ChainSource::Electrum { url } => {
                let url = url.clone();
                let ask = move || electrum(&url).and_then(|client| client.block_headers_subscribe());
                let tip = tokio::task::spawn_blocking(ask).await.map_err(text)?.map_err(text)?;
                Ok(tip.header.time.into())
            }
            ChainSource::BitcoindRpc { .. } => {
                let tip = self.rpc("getblockchaininfo", json!([])).await?["bestblockhash"].clone();
                let header = self.rpc("getblockheader", json!([tip])).await?;
                header["time"].as_u64().ok_or_else(|| "its newest block has no time".to_owned())
            }
        }
    }

    /// The estimate for a confirmation within an hour.
    pub async fn sat_per_vb(&self) -> Answer<u64> {
        let per_kvb = match &self.0 {
            ChainSource::Esplora { url } => {
                let all = esplora(url)?.get_fee_estimates().await.map_err(text)?;
                // An estimate of a few thousand sat/vB at most.
                #[allow(clippy::float_arithmetic, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                all.get(&FEE_BLOCKS).map(|rate| (rate.clamp(0.0, 10_000.0) * 1_000.0).ceil() as u64)
            }
            ChainSource::Electrum { url } => {
                let url = url.clone();
                let ask = move || electrum(&url).and_then(|client| client.estimate_fee(FEE_BLOCKS.into()));
                btc_per_kvb(tokio::task::spawn_blocking(ask).await.map_err(text)?.map_err(text)?)
            }
            ChainSource::BitcoindRpc { .. } => {
                self.rpc("estimatesmartfee", json!([FEE_BLOCKS])).await?["feerate"].as_f64().and_then(btc_per_kvb)
            }
        };
        Ok(per_kvb.map_or(FALLBACK_SAT_PER_VB, |rate| rate.div_ceil(1_000)).max(1))
    }

    async fn bitcoind_spender(&self, out: OutPoint) -> Answer<Option<Spender>> {
        if !self.rpc("gettxout", json!([out.txid, out.vout, true])).await?.is_null() {
            return Ok(None);
        }
        let mut hash = self.rpc("getblockchaininfo", json!([])).await?["bestblockhash"].clone();
        for _ in 0..BLOCKS_SEARCHED {
            let raw = self.rpc("getblock", json!([hash, 0])).await?;
            let block: Block = deserialize_hex(raw.as_str().unwrap_or_default()).map_err(text)?;
            let spends = |tx: &&Transaction| tx.input.iter().any(|input| input.previous_output == out);
            if let Some(tx) = block.txdata.iter().find(spends) {
                return Ok(Some(Spender { tx: tx.clone(), confirmed: true }));
            }
            // What created the output is the last block in which it can be spent.
            if block.txdata.iter().any(|tx| tx.compute_txid() == out.txid) {
                break;
            }
            hash = json!(block.header.prev_blockhash);
        }
        Ok(None)
    }

    /// One call of bitcoind's JSON-RPC, over a connection of its own.
    async fn rpc(&self, method: &str, params: Value) -> Answer<Value> {
        let ChainSource::BitcoindRpc { host, port, user, password } = &self.0 else {
            return Err("no bitcoind".to_owned());
        };
        let body = json!({ "jsonrpc": "1.0", "id": 1, "method": method, "params": params }).to_string();
        let auth = base64(format!("{user}:{password}").as_bytes());
        let head = format!(
            "POST / HTTP/1.0\r\nHost: {host}\r\nAuthorization: Basic {auth}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        let call = async {
            let mut socket = TcpStream::connect((host.as_str(), *port)).await?;
            socket.write_all(head.as_bytes()).await?;
            socket.write_all(body.as_bytes()).await?;
            let mut answer = Vec::new();
            socket.take(MAX_ANSWER).read_to_end(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        let answer = tokio::time::timeout(ANSWER_WITHIN, call).await.map_err(text)?.map_err(text)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (_, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("{method}: no answer"))?;
        let answer: Value = serde_json::from_str(body).map_err(|e| format!("{method}: {e}"))?;
        if answer["error"].is_null() {
            Ok(answer["result"].clone())
        } else {
            Err(format!("{method}: {}", answer["error"]))
        }
    }
}

pub(crate) fn esplora(url: &str) -> Answer<AsyncClient> {
    EsploraBuilder::new(url).timeout(ANSWER_WITHIN.as_secs()).build_async().map_err(text)
}

/// Left to itself it waits for ever: a server that takes a connection and says nothing would hold a restore up.
pub(crate) fn electrum(url: &str) -> Result<ElectrumClient, electrum_client::Error> {
    ElectrumClient::from_config(url, ConfigBuilder::new().timeout(Some(ELECTRUM_WITHIN_S)).build())
}

fn electrum_spender(url: &str, out: OutPoint) -> Answer<Option<Spender>> {
    let client = electrum(url).map_err(text)?;
    let funding = client.transaction_get(&out.txid).map_err(text)?;
    let Some(output) = usize::try_from(out.vout).ok().and_then(|vout| funding.output.get(vout)) else {
        return Err(format!("{} has no output {}", out.txid, out.vout));
    };
    for row in client.script_get_history(&output.script_pubkey).map_err(text)? {
        let txid: Txid = row.tx_hash;
        let tx = if txid == out.txid { continue } else { client.transaction_get(&txid).map_err(text)? };
        if tx.input.iter().any(|input| input.previous_output == out) {
            return Ok(Some(Spender { tx, confirmed: row.height > 0 }));
        }
    }
    Ok(None)
}

/// Bitcoin per 1,000 virtual bytes as sat; a source that knows nothing says -1.
#[allow(clippy::float_arithmetic, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn btc_per_kvb(rate: f64) -> Option<u64> {
    (rate > 0.0).then(|| (rate.min(0.1) * 100_000_000.0).round() as u64)
}

/// RFC 4648, with padding: one header's worth of it.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let at = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for i in 0..4 {
            let letter = LETTERS.get(usize::try_from(bits >> (18 - 6 * i) & 63).unwrap_or(0)).copied().unwrap_or(b'=');
            out.push(if i > chunk.len() { '=' } else { char::from(letter) });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_vectors() {
        let check = |plain: &str, coded: &str| assert_eq!(base64(plain.as_bytes()), coded);
        check("", "");
        check("f", "Zg==");
        check("fo", "Zm8=");
        check("foo", "Zm9v");
        check("foobar", "Zm9vYmFy");
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_not_waited_for() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("tcp://{}", silent.local_addr().unwrap());
        let chain = Chain::of(&ChainSource::Electrum { url });
        let answer = tokio::time::timeout(ANSWER_WITHIN, chain.tip_time()).await;
        assert!(answer.expect("it gives up by itself").is_err());
    }

    #[test]
    fn a_source_without_an_estimate_says_so() {
        assert_eq!(btc_per_kvb(-1.0), None);
        assert_eq!(btc_per_kvb(0.00002), Some(2_000));
    }
}
