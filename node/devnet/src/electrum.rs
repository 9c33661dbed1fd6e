//! The Electrum face: what Electrum's own wallet and `electrum-client` (so bdk and ldk-node) ask for, over TCP.
//!
//! One JSON-RPC message a line, protocol 1.4: <https://electrum-protocol.readthedocs.io/>. Clients subscribe to the tip and
//! to scripts; what changed is found by looking every [`LOOK_EVERY`], which a chain of one machine can afford.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bitcoin::block::Header;
use bitcoin::consensus::encode::{deserialize, serialize_hex};
use bitcoin::hashes::{Hash, HashEngine, sha256, sha256d};
use bitcoin::{OutPoint, Transaction, Txid};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::chain::{Chain, ScriptHash, Shared, lock};
use crate::consensus::MIN_RELAY_SAT_PER_VB;
use crate::server::{bind, now_s};

/// How often a connection looks for what its client subscribed to.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Longest line that is read: the heaviest relayed transaction as hex, and its JSON around it.
const MAX_LINE: u64 = 1024 * 1024;
/// Headers in one answer.
const MAX_HEADERS: u64 = 2_016;
/// Scripts that one client may subscribe to.
const MAX_SCRIPTS: usize = 10_000;
const PROTOCOL: &str = "1.4";
const MIN_RELAY_BTC_PER_KVB: f64 = MIN_RELAY_SAT_PER_VB as f64 * 1e-5;

/// JSON-RPC's own codes, and Electrum's for everything else.
const NO_METHOD: i64 = -32_601;
const BAD_PARAMS: i64 = -32_602;
const REFUSED: i64 = 1;

/// A chain that is served to Electrum's clients. It stops when this is dropped.
#[must_use = "the server stops when this is dropped"]
pub struct ElectrumServer {
    addr: SocketAddr,
    task: JoinHandle<()>,
}

impl ElectrumServer {
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
    /// As `electrum-client` and satgrid's `wallet.chain` want it.
    pub fn url(&self) -> String {
        format!("tcp://{}", self.addr)
    }
}

impl Drop for ElectrumServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves `chain` at `addr`; port 0 takes a free one. Loopback only, as the other faces.
pub async fn serve_electrum(chain: Shared, addr: SocketAddr) -> io::Result<ElectrumServer> {
    let listener = bind(addr).await?;
    let addr = listener.local_addr()?;
    tracing::info!(%addr, "regtest chain: Electrum's protocol");
    Ok(ElectrumServer { addr, task: tokio::spawn(accept(chain, listener)) })
}

async fn accept(chain: Shared, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                let chain = chain.clone();
                tokio::spawn(async move {
                    if let Err(error) = Client::new(chain).serve(socket).await {
                        tracing::debug!(%peer, %error, "an Electrum client went away");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "no Electrum client was accepted");
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

struct Refusal {
    code: i64,
    message: String,
}

fn refusal(code: i64, message: impl std::fmt::Display) -> Refusal {
    Refusal { code, message: message.to_string() }
}

/// One connection, and what its client was last told.
struct Client {
    chain: Shared,
    tip: Option<u32>,
    scripts: BTreeMap<ScriptHash, Value>,
}

impl Client {
    fn new(chain: Shared) -> Client {
        Client { chain, tip: None, scripts: BTreeMap::new() }
    }

    async fn serve(mut self, socket: TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        let (reader, mut writer) = socket.into_split();
        let mut reader = BufReader::new(reader);
        let mut look = tokio::time::interval(LOOK_EVERY);
        // Kept over the select: a line that came in half is not lost.
        let mut line = Vec::new();
        loop {
            let mut limited = (&mut reader).take(MAX_LINE);
            let out = tokio::select! {
                read = limited.read_until(b'\n', &mut line) => {
                    if read? == 0 || line.last() != Some(&b'\n') {
                        return Ok(());
                    }
                    let answer = self.line(&line);
                    line.clear();
                    answer
                }
                _ = look.tick() => self.news(),
            };
            if !out.is_empty() {
                writer.write_all(out.as_bytes()).await?;
            }
        }
    }

    /// The answer to one line: a call, or a batch of them.
    fn line(&mut self, line: &[u8]) -> String {
        let answer = match serde_json::from_slice(line) {
            Ok(Value::Array(calls)) => Value::Array(calls.iter().map(|call| self.answer(call)).collect()),
            Ok(call) => self.answer(&call),
            Err(error) => {
                json!({ "jsonrpc": "2.0", "id": null, "error": { "code": -32_700, "message": error.to_string() } })
            }
        };
        format!("{answer}\n")
    }

    fn answer(&mut self, call: &Value) -> Value {
        let empty = Vec::new();
        let params = call["params"].as_array().unwrap_or(&empty);
        let method = call["method"].as_str().unwrap_or_default();
        match self.call(method, params) {
            Ok(result) => json!({ "jsonrpc": "2.0", "id": call["id"], "result": result }),
            Err(Refusal { code, message }) => {
                tracing::debug!(method, code, message, "an Electrum client was refused");
                json!({ "jsonrpc": "2.0", "id": call["id"], "error": { "code": code, "message": message } })
            }
        }
    }

    fn call(&mut self, method: &str, params: &[Value]) -> Result<Value, Refusal> {
        let shared = self.chain.clone();
        let mut chain = lock(&shared);
        match method {
            "server.version" => Ok(json!([concat!("satgrid-devnet ", env!("CARGO_PKG_VERSION")), PROTOCOL])),
            "server.features" => Ok(json!({
                "genesis_hash": chain.block(0).map(|block| block.block_hash()), "hosts": {}, "protocol_min": PROTOCOL,
                "protocol_max": PROTOCOL, "server_version": "satgrid-devnet", "hash_function": "sha256", "pruning": null,
            })),
            "server.ping" => Ok(Value::Null),
            "server.banner" | "server.donation_address" => Ok(json!("")),
            "server.peers.subscribe" => Ok(json!([])),
            "mempool.get_fee_histogram" => Ok(json!([])),
            "blockchain.relayfee" => Ok(json!(MIN_RELAY_BTC_PER_KVB)),
            "blockchain.estimatefee" => Ok(json!(chain.estimate_btc_per_kvb())),
            "blockchain.headers.subscribe" => {
                self.tip = Some(chain.height());
                Ok(tip(&chain))
            }
            "blockchain.block.header" => Ok(json!(serialize_hex(header(&chain, number(params, 0)?)?))),
            "blockchain.block.headers" => headers(&chain, number(params, 0)?, number(params, 1)?),
            "blockchain.scripthash.subscribe" => {
                let script = script(params)?;
                if self.scripts.len() >= MAX_SCRIPTS {
                    return Err(refusal(REFUSED, "too many scripts"));
                }
                let status = status(&chain, &script);
                self.scripts.insert(script, status.clone());
                Ok(status)
            }
            "blockchain.scripthash.unsubscribe" => Ok(json!(self.scripts.remove(&script(params)?).is_some())),
            "blockchain.scripthash.get_history" => Ok(Value::Array(history(&chain, &script(params)?))),
            "blockchain.scripthash.get_mempool" => {
                let waits = |row: &Value| row["height"].as_i64().is_some_and(|height| height <= 0);
                Ok(history(&chain, &script(params)?).into_iter().filter(waits).collect())
            }
            "blockchain.scripthash.listunspent" => Ok(Value::Array(unspent(&chain, &script(params)?))),
            "blockchain.scripthash.get_balance" => {
                let coins = unspent(&chain, &script(params)?);
                let sum = |confirmed: bool| -> u64 {
                    let of = coins.iter().filter(|coin| (coin["height"].as_u64() > Some(0)) == confirmed);
                    of.filter_map(|coin| coin["value"].as_u64()).sum()
                };
                Ok(json!({ "confirmed": sum(true), "unconfirmed": sum(false) }))
            }
            "blockchain.transaction.get" => {
                let tx = chain.tx(&txid(params)?).ok_or_else(|| refusal(REFUSED, "no such transaction"))?;
                if params.get(1).and_then(Value::as_bool).unwrap_or(false) {
                    return Err(refusal(REFUSED, "verbose transactions are not served"));
                }
                Ok(json!(serialize_hex(tx)))
            }
            "blockchain.transaction.get_merkle" => merkle(&chain, &txid(params)?),
            "blockchain.transaction.id_from_pos" => {
                let (height, position) = (number(params, 0)?, number(params, 1)?);
                let missing = || refusal(REFUSED, "no transaction at this place");
                let block = u32::try_from(height).ok().and_then(|height| chain.block(height)).ok_or_else(missing)?;
                let position = usize::try_from(position).map_err(|_| missing())?;
                let found = block.txdata.get(position).ok_or_else(missing)?.compute_txid();
                if params.get(2).and_then(Value::as_bool).unwrap_or(false) {
                    return Ok(json!({ "tx_hash": found, "merkle": branch(&block.txdata, position) }));
                }
                Ok(json!(found))
            }
            "blockchain.transaction.broadcast" => {
                let raw = hex::decode(text(params, 0)?).map_err(|e| refusal(REFUSED, e))?;
                let tx: Transaction = deserialize(&raw).map_err(|e| refusal(REFUSED, e))?;
                Ok(json!(chain.submit(tx, now_s()).map_err(|e| refusal(REFUSED, e))?))
            }
            _ => Err(refusal(NO_METHOD, format!("unknown method {method:?}"))),
        }
    }

    /// Notifications of what changed since the client was last told.
    fn news(&mut self) -> String {
        let mut out = String::new();
        let chain = lock(&self.chain);
        let mut tell = |method: &str, params: Value| {
            let line = json!({ "jsonrpc": "2.0", "method": method, "params": params });
            out.push_str(&format!("{line}\n"));
        };
        if let Some(told) = &mut self.tip
            && *told != chain.height()
        {
            *told = chain.height();
            tell("blockchain.headers.subscribe", json!([tip(&chain)]));
        }
        for (script, told) in &mut self.scripts {
            let now = status(&chain, script);
            if now != *told {
                tell("blockchain.scripthash.subscribe", json!([script_text(script), now]));
                *told = now;
            }
        }
        out
    }
}

fn text(params: &[Value], at: usize) -> Result<&str, Refusal> {
    params.get(at).and_then(Value::as_str).ok_or_else(|| refusal(BAD_PARAMS, format!("parameter {at} is no text")))
}

fn number(params: &[Value], at: usize) -> Result<u64, Refusal> {
    params.get(at).and_then(Value::as_u64).ok_or_else(|| refusal(BAD_PARAMS, format!("parameter {at} is no number")))
}

fn txid(params: &[Value]) -> Result<Txid, Refusal> {
    text(params, 0)?.parse().map_err(|e| refusal(BAD_PARAMS, e))
}

/// Electrum writes script hashes from their last byte to their first.
fn script(params: &[Value]) -> Result<ScriptHash, Refusal> {
    let mut hash: ScriptHash = hex::decode(text(params, 0)?)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| refusal(BAD_PARAMS, "a script hash is 64 hex digits"))?;
    hash.reverse();
    Ok(hash)
}

fn script_text(script: &ScriptHash) -> String {
    hex::encode(script.iter().rev().copied().collect::<Vec<u8>>())
}

fn header(chain: &Chain, height: u64) -> Result<&Header, Refusal> {
    let block = u32::try_from(height).ok().and_then(|height| chain.block(height));
    block.map(|block| &block.header).ok_or_else(|| refusal(REFUSED, format!("no block at height {height}")))
}

fn tip(chain: &Chain) -> Value {
    let height = chain.height();
    json!({ "height": height, "hex": chain.block(height).map(|block| serialize_hex(&block.header)) })
}

fn headers(chain: &Chain, start: u64, count: u64) -> Result<Value, Refusal> {
    let end = start.saturating_add(count.min(MAX_HEADERS)).min(u64::from(chain.height()) + 1);
    let mut hex = String::new();
    for height in start..end {
        hex.push_str(&serialize_hex(header(chain, height)?));
    }
    Ok(json!({ "hex": hex, "count": end.saturating_sub(start), "max": MAX_HEADERS }))
}

/// Oldest first, as the status is hashed; what waits comes last, at height 0, or -1 where it spends what waits too.
fn history(chain: &Chain, script: &ScriptHash) -> Vec<Value> {
    let (waiting, confirmed) = chain.history(script);
    let mut rows: Vec<Value> = Vec::with_capacity(waiting.len() + confirmed.len());
    for txid in confirmed.iter().rev() {
        rows.push(json!({ "tx_hash": txid, "height": chain.confirmed_at(txid) }));
    }
    for txid in &waiting {
        let Some(entry) = chain.mempool().get(txid) else { continue };
        let unconfirmed = entry.tx.input.iter().any(|input| chain.mempool().get(&input.previous_output.txid).is_some());
        rows.push(json!({ "tx_hash": txid, "height": if unconfirmed { -1 } else { 0 }, "fee": entry.fee_sat }));
    }
    rows
}

/// SHA-256 over `txid:height:` of every row; null where there is none.
fn status(chain: &Chain, script: &ScriptHash) -> Value {
    let rows = history(chain, script);
    if rows.is_empty() {
        return Value::Null;
    }
    let mut engine = sha256::Hash::engine();
    for row in rows {
        engine.input(format!("{}:{}:", row["tx_hash"].as_str().unwrap_or_default(), row["height"]).as_bytes());
    }
    json!(hex::encode(sha256::Hash::from_engine(engine).to_byte_array()))
}

fn unspent(chain: &Chain, script: &ScriptHash) -> Vec<Value> {
    let (waiting, confirmed) = chain.history(script);
    let mut coins = Vec::new();
    for txid in confirmed.iter().rev().chain(&waiting) {
        let Some(tx) = chain.tx(txid) else { continue };
        for (vout, output) in (0u32..).zip(&tx.output) {
            let ours = crate::chain::script_hash(&output.script_pubkey) == *script;
            if ours && chain.spender(&OutPoint::new(*txid, vout)).is_none() {
                let height = chain.confirmed_at(txid).unwrap_or(0);
                coins.push(json!({
                    "tx_hash": txid, "tx_pos": vout, "height": height, "value": output.value.to_sat(),
                }));
            }
        }
    }
    coins
}

fn merkle(chain: &Chain, txid: &Txid) -> Result<Value, Refusal> {
    let missing = || refusal(REFUSED, "no such confirmed transaction");
    let height = chain.confirmed_at(txid).ok_or_else(missing)?;
    let block = chain.block(height).ok_or_else(missing)?;
    let position = block.txdata.iter().position(|tx| tx.compute_txid() == *txid).ok_or_else(missing)?;
    Ok(json!({ "block_height": height, "pos": position, "merkle": branch(&block.txdata, position) }))
}

/// The hashes beside the way from a transaction to the root, lowest first.
fn branch(txs: &[Transaction], mut position: usize) -> Vec<String> {
    let mut level: Vec<sha256d::Hash> = txs.iter().map(|tx| tx.compute_txid().to_raw_hash()).collect();
    let mut beside = Vec::new();
    while level.len() > 1 {
        if level.len() % 2 == 1 {
            level.extend(level.last().copied());
        }
        beside.push(level[position ^ 1].to_string());
        position /= 2;
        level = level
            .chunks(2)
            .map(|pair| {
                let mut engine = sha256d::Hash::engine();
                pair.iter().for_each(|hash| engine.input(hash.as_byte_array()));
                sha256d::Hash::from_engine(engine)
            })
            .collect();
    }
    beside
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitcoin::ScriptBuf;

    fn call(client: &mut Client, method: &str, params: Value) -> Value {
        let line = json!({ "id": 7, "method": method, "params": params }).to_string();
        serde_json::from_str(&client.line(line.as_bytes())).unwrap()
    }

    #[test]
    fn a_client_follows_the_tip_and_a_script() {
        let chain = crate::chain::shared();
        let mut client = Client::new(chain.clone());
        assert_eq!(call(&mut client, "blockchain.headers.subscribe", json!([]))["result"]["height"], 0);
        let output = ScriptBuf::from(vec![0x51]);
        let hash = script_text(&crate::chain::script_hash(&output));
        assert_eq!(call(&mut client, "blockchain.scripthash.subscribe", json!([hash]))["result"], Value::Null);
        assert_eq!(client.news(), "");
        lock(&chain).mine(output, 1);
        let news: Vec<Value> = client.news().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(news[0]["params"][0]["height"], 1);
        assert_eq!(news[1]["params"][0], json!(hash));
        assert_eq!(client.news(), "");
        let rows = call(&mut client, "blockchain.scripthash.get_history", json!([hash]));
        let status = format!("{}:1:", rows["result"][0]["tx_hash"].as_str().unwrap());
        let status = hex::encode(sha256::Hash::hash(status.as_bytes()).to_byte_array());
        assert_eq!(news[1]["params"][1], json!(status));
        let balance = call(&mut client, "blockchain.scripthash.get_balance", json!([hash]));
        assert_eq!(balance["result"], json!({ "confirmed": 5_000_000_000u64, "unconfirmed": 0 }));
        let txid = rows["result"][0]["tx_hash"].clone();
        let proof = call(&mut client, "blockchain.transaction.get_merkle", json!([txid, 1]));
        assert_eq!(proof["result"], json!({ "block_height": 1, "pos": 0, "merkle": [] }));
    }

    #[test]
    fn a_branch_leads_to_the_root() {
        let chain = crate::chain::shared();
        let mut chain = lock(&chain);
        let mut txs = Vec::new();
        for height in 1..6u8 {
            chain.mine(ScriptBuf::from(vec![height]), 1);
            txs.push(chain.block(height.into()).unwrap().txdata[0].clone());
        }
        let hashes = txs.iter().map(|tx| tx.compute_txid().to_raw_hash());
        let root = bitcoin::merkle_tree::calculate_root(hashes).unwrap();
        for (position, tx) in txs.iter().enumerate() {
            let mut at = position;
            let mut hash = tx.compute_txid().to_raw_hash();
            for beside in branch(&txs, position) {
                let beside: sha256d::Hash = beside.parse().unwrap();
                let mut engine = sha256d::Hash::engine();
                let (left, right) = if at.is_multiple_of(2) { (hash, beside) } else { (beside, hash) };
                engine.input(left.as_byte_array());
                engine.input(right.as_byte_array());
                hash = sha256d::Hash::from_engine(engine);
                at /= 2;
            }
            assert_eq!(hash, root, "{position}");
        }
    }

    #[test]
    fn what_it_does_not_know_it_says() {
        let mut client = Client::new(crate::chain::shared());
        let refused = call(&mut client, "blockchain.outpoint.subscribe", json!([]));
        assert_eq!((refused["id"].clone(), refused["error"]["code"].clone()), (json!(7), json!(NO_METHOD)));
        assert_eq!(call(&mut client, "blockchain.block.header", json!([9]))["error"]["code"], json!(REFUSED));
        let batch = client.line(br#"[{"id":1,"method":"server.ping"},{"id":2,"method":"nonsense"}]"#);
        let batch: Value = serde_json::from_str(&batch).unwrap();
        assert_eq!((batch[0]["result"].clone(), batch[1]["error"]["code"].clone()), (Value::Null, json!(NO_METHOD)));
    }
}
