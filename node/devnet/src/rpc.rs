//! The face of bitcoind's JSON-RPC: what ldk-node's bitcoind source asks for, and `generatetoaddress` to mine,
//! `invalidateblock` to take blocks back.
//!
//! Error codes are Bitcoin Core's (`src/rpc/protocol.h`), since clients decide by them. No batches, no credentials.

use std::str::FromStr;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use bitcoin::consensus::encode::{deserialize, serialize_hex};
use bitcoin::{Address, BlockHash, Network, OutPoint, Transaction, Txid};
use serde_json::{Value, json};

use crate::chain::{Chain, Shared, lock};
use crate::consensus::MIN_RELAY_SAT_PER_VB;
use crate::server::now_s;

/// Blocks that one call may mine.
const MAX_BLOCKS_PER_CALL: u64 = 1_000;
/// One satoshi per virtual byte, as bitcoind states rates: BTC per 1000 virtual bytes.
const RATE_BTC_PER_KVB: f64 = MIN_RELAY_SAT_PER_VB as f64 * 1e-5;
const SAT_PER_BTC: f64 = 1e8;

const MISC_ERROR: i64 = -1;
const INVALID_ADDRESS_OR_KEY: i64 = -5;
const INVALID_PARAMETER: i64 = -8;
const DESERIALIZATION_ERROR: i64 = -22;
const VERIFY_REJECTED: i64 = -26;
const METHOD_NOT_FOUND: i64 = -32601;
const PARSE_ERROR: i64 = -32700;

/// An error as JSON-RPC carries it.
#[derive(Debug)]
pub(crate) struct RpcError {
    pub(crate) code: i64,
    pub(crate) message: String,
}

impl RpcError {
    fn new(code: i64, message: impl ToString) -> Self {
        Self { code, message: message.to_string() }
    }
}

pub(crate) fn routes() -> Router<Shared> {
    Router::new().route("/", post(handle))
}

async fn handle(State(chain): State<Shared>, body: Bytes) -> Response {
    let request: Value = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return reply(&Value::Null, Err(RpcError::new(PARSE_ERROR, error))),
    };
    let method = request["method"].as_str().unwrap_or_default();
    let params = request["params"].as_array().map(Vec::as_slice).unwrap_or_default();
    let result = call(&mut lock(&chain), method, params, now_s());
    if let Err(error) = &result {
        tracing::debug!(method, code = error.code, message = %error.message, "rpc refused");
    }
    reply(&request["id"], result)
}

fn reply(id: &Value, result: Result<Value, RpcError>) -> Response {
    match result {
        Ok(result) => Json(json!({ "result": result, "error": null, "id": id })).into_response(),
        Err(RpcError { code, message }) => {
            let body = json!({ "result": null, "error": { "code": code, "message": message }, "id": id });
            (StatusCode::INTERNAL_SERVER_ERROR, Json(body)).into_response()
        }
    }
}

/// Answers one call.
pub(crate) fn call(chain: &mut Chain, method: &str, params: &[Value], now_s: u32) -> Result<Value, RpcError> {
    let params = Params(params);
    match method {
        "getblockchaininfo" => Ok(json!({
            "chain": "regtest",
            "blocks": chain.height(),
            "headers": chain.height(),
            "bestblockhash": chain.tip(),
            "mediantime": chain.median_time(chain.height()),
            "verificationprogress": 1,
            "initialblockdownload": false,
        })),
        "getbestblockhash" => Ok(json!(chain.tip())),
        "getblockcount" => Ok(json!(chain.height())),
        "getblockhash" => {
            let height = u32::try_from(params.number(0)?).ok();
            let block = height.and_then(|height| chain.block(height));
            let block = block.ok_or_else(|| RpcError::new(INVALID_PARAMETER, "Block height out of range"))?;
            Ok(json!(block.block_hash()))
        }
        "getblockheader" => get_block_header(chain, &params),
        "getblock" => get_block(chain, &params),
        "getrawmempool" => Ok(json!(chain.mempool().txids().collect::<Vec<_>>())),
        "getmempoolinfo" => Ok(json!({
            "loaded": true,
            "size": chain.mempool().len(),
            "mempoolminfee": RATE_BTC_PER_KVB,
            "minrelaytxfee": RATE_BTC_PER_KVB,
        })),
        "getmempoolentry" => {
            let txid = params.parse::<Txid>(0)?;
            let entry = chain.mempool().get(&txid);
            let entry = entry.ok_or_else(|| RpcError::new(INVALID_ADDRESS_OR_KEY, "Transaction not in mempool"))?;
            Ok(json!({
                "time": entry.time_s,
                "height": entry.height,
                "vsize": entry.tx.vsize(),
                "weight": entry.tx.weight().to_wu(),
                "fees": { "base": entry.fee_sat as f64 / SAT_PER_BTC },
            }))
        }
        "getrawtransaction" => {
            let tx = chain.tx(&params.parse::<Txid>(0)?);
            let missing = || RpcError::new(INVALID_ADDRESS_OR_KEY, "No such mempool or blockchain transaction");
            Ok(json!(serialize_hex(tx.ok_or_else(missing)?)))
        }
        "sendrawtransaction" => {
            let raw = hex::decode(params.text(0)?).map_err(|e| RpcError::new(DESERIALIZATION_ERROR, e))?;
            let tx: Transaction = deserialize(&raw).map_err(|e| RpcError::new(DESERIALIZATION_ERROR, e))?;
            let txid = chain.submit(tx, now_s).map_err(|e| RpcError::new(VERIFY_REJECTED, e))?;
            Ok(json!(txid))
        }
        "estimatesmartfee" => Ok(json!({ "feerate": chain.estimate_btc_per_kvb(), "blocks": params.0.first() })),
        "gettxout" => get_tx_out(chain, &params),
        "generatetoaddress" => generate_to_address(chain, &params, now_s),
        "invalidateblock" => invalidate_block(chain, &params, now_s),
        _ => Err(RpcError::new(METHOD_NOT_FOUND, format!("Method not found: {method}"))),
    }
}

fn get_block_header(chain: &Chain, params: &Params<'_>) -> Result<Value, RpcError> {
    let height = params.known_block(chain)?;
    let raw = params.0.get(1) == Some(&json!(false));
    match chain.block(height) {
        Some(block) if raw => Ok(json!(serialize_hex(&block.header))),
        Some(_) | None => Ok(header_json(chain, height)),
    }
}

fn get_block(chain: &Chain, params: &Params<'_>) -> Result<Value, RpcError> {
    let height = params.known_block(chain)?;
    let verbosity = match params.0.get(1) {
        None => 1,
        Some(value) => value.as_u64().or_else(|| value.as_bool().map(u64::from)).unwrap_or(1),
    };
    let Some(block) = chain.block(height) else { return Ok(Value::Null) };
    if verbosity == 0 {
        return Ok(json!(serialize_hex(block)));
    }
    let mut value = header_json(chain, height);
    value["tx"] = json!(block.txdata.iter().map(Transaction::compute_txid).collect::<Vec<_>>());
    Ok(value)
}

fn get_tx_out(chain: &Chain, params: &Params<'_>) -> Result<Value, RpcError> {
    let vout = u32::try_from(params.number(1)?).map_err(|e| RpcError::new(INVALID_PARAMETER, e))?;
    let outpoint = OutPoint::new(params.parse::<Txid>(0)?, vout);
    let with_mempool = params.0.get(2).and_then(Value::as_bool).unwrap_or(true);
    let spent = with_mempool && chain.mempool().spender(&outpoint).is_some();
    let coin = chain.coin(&outpoint).filter(|coin| !spent && (with_mempool || coin.height.is_some()));
    let Some(coin) = coin else { return Ok(Value::Null) };
    Ok(json!({
        "bestblock": chain.tip(),
        "confirmations": coin.height.map_or(0, |height| chain.height() - height + 1),
        "value": coin.output.value.to_btc(),
        "scriptPubKey": { "hex": coin.output.script_pubkey.to_hex_string() },
        "coinbase": coin.coinbase,
    }))
}

fn generate_to_address(chain: &mut Chain, params: &Params<'_>, now_s: u32) -> Result<Value, RpcError> {
    let count = params.number(0)?;
    if count > MAX_BLOCKS_PER_CALL {
        let message = format!("{count} blocks asked for, at most {MAX_BLOCKS_PER_CALL} in one call");
        return Err(RpcError::new(INVALID_PARAMETER, message));
    }
    let address = Address::from_str(params.text(1)?)
        .and_then(|address| address.require_network(Network::Regtest))
        .map_err(|error| RpcError::new(INVALID_ADDRESS_OR_KEY, error))?;
    let script = address.script_pubkey();
    let hashes: Vec<BlockHash> = (0..count).map(|_| chain.mine(script.clone(), now_s)).collect();
    tracing::info!(blocks = count, height = chain.height(), "mined");
    Ok(json!(hashes))
}

/// Takes a block back and those after it; what they confirmed waits again.
fn invalidate_block(chain: &mut Chain, params: &Params<'_>, now_s: u32) -> Result<Value, RpcError> {
    let height = params.known_block(chain)?;
    if height == 0 {
        return Err(RpcError::new(MISC_ERROR, "the first block stays"));
    }
    let depth = chain.height().saturating_sub(height).saturating_add(1);
    chain.undo(depth, now_s, |_| true);
    tracing::info!(blocks = depth, height = chain.height(), "taken back");
    Ok(Value::Null)
}

fn header_json(chain: &Chain, height: u32) -> Value {
    let Some(block) = chain.block(height) else { return Value::Null };
    let header = &block.header;
    let mut value = json!({
        "hash": block.block_hash(),
        "confirmations": chain.height() - height + 1,
        "height": height,
        "version": header.version.to_consensus(),
        "merkleroot": header.merkle_root,
        "time": header.time,
        "mediantime": chain.median_time(height),
        "nonce": header.nonce,
        "bits": format!("{:08x}", header.bits.to_consensus()),
        // Every regtest block takes two hashes on average.
        "chainwork": format!("{:064x}", 2 * (u64::from(height) + 1)),
        "nTx": block.txdata.len(),
    });
    if height > 0 {
        value["previousblockhash"] = json!(header.prev_blockhash);
    }
    if let Some(next) = chain.block(height + 1) {
        value["nextblockhash"] = json!(next.block_hash());
    }
    value
}

/// Positional parameters, read by type.
struct Params<'a>(&'a [Value]);

impl Params<'_> {
    fn text(&self, index: usize) -> Result<&str, RpcError> {
        let value = self.0.get(index).and_then(Value::as_str);
        value.ok_or_else(|| RpcError::new(MISC_ERROR, format!("parameter {index}: a string is expected")))
    }

    fn number(&self, index: usize) -> Result<u64, RpcError> {
        let value = self.0.get(index).and_then(Value::as_u64);
        value.ok_or_else(|| RpcError::new(MISC_ERROR, format!("parameter {index}: a whole number is expected")))
    }

    fn parse<T: FromStr<Err: ToString>>(&self, index: usize) -> Result<T, RpcError> {
        self.text(index)?.parse().map_err(|error: T::Err| RpcError::new(INVALID_PARAMETER, error.to_string()))
    }

    /// The height of the block whose hash is the first parameter.
    fn known_block(&self, chain: &Chain) -> Result<u32, RpcError> {
        let hash = self.parse::<BlockHash>(0)?;
        chain.height_of(&hash).ok_or_else(|| RpcError::new(INVALID_ADDRESS_OR_KEY, "Block not found"))
    }
}
