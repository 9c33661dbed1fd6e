//! The Esplora face: the paths that `esplora-client` (so bdk and ldk-node) asks for.
//!
//! Shapes follow <https://github.com/Blockstream/esplora/blob/master/API.md>. An unknown id is 404, as there.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bitcoin::consensus::encode::{deserialize, serialize, serialize_hex};
use bitcoin::{BlockHash, MerkleBlock, OutPoint, Transaction, Txid};
use serde_json::{Value, json};

use crate::chain::{Chain, ScriptHash, Shared, lock};
use crate::server::now_s;

/// Blocks in one answer of `/blocks`.
const BLOCKS_PER_PAGE: u32 = 10;
/// Confirmed transactions in one answer of a script's history.
const HISTORY_PER_PAGE: usize = 25;
/// Waiting transactions in one answer of a script's history.
const MAX_WAITING: usize = 50;

pub(crate) fn routes() -> Router<Shared> {
    Router::new()
        .route("/blocks", get(blocks))
        .route("/blocks/{start}", get(blocks_from))
        .route("/blocks/tip/hash", get(|State(c): State<Shared>| async move { lock(&c).tip().to_string() }))
        .route("/blocks/tip/height", get(|State(c): State<Shared>| async move { lock(&c).height().to_string() }))
        .route("/block-height/{height}", get(block_at))
        .route("/block/{hash}", get(block_info))
        .route("/block/{hash}/header", get(block_header))
        .route("/block/{hash}/status", get(block_status))
        .route("/block/{hash}/raw", get(block_raw))
        .route("/block/{hash}/txids", get(block_txids))
        .route("/block/{hash}/txid/{index}", get(block_txid))
        .route("/tx", post(submit))
        .route("/tx/{txid}", get(tx_info))
        .route("/tx/{txid}/raw", get(tx_raw))
        .route("/tx/{txid}/hex", get(tx_hex))
        .route("/tx/{txid}/status", get(tx_status))
        .route("/tx/{txid}/merkleblock-proof", get(merkle_block))
        .route("/tx/{txid}/outspend/{vout}", get(outspend))
        .route("/scripthash/{hash}/txs", get(history))
        .route("/scripthash/{hash}/txs/chain/{last}", get(history_after))
        .route("/fee-estimates", get(fee_estimates))
}

type Chained = State<Shared>;

async fn blocks(State(chain): Chained) -> Response {
    let chain = lock(&chain);
    Json(block_page(&chain, chain.height())).into_response()
}

async fn blocks_from(State(chain): Chained, Path(start): Path<u32>) -> Response {
    Json(block_page(&lock(&chain), start)).into_response()
}

async fn block_at(State(chain): Chained, Path(height): Path<u32>) -> Response {
    text(lock(&chain).block(height).map(|block| block.block_hash().to_string()))
}

async fn block_info(State(chain): Chained, Path(hash): Path<BlockHash>) -> Response {
    let chain = lock(&chain);
    value(chain.height_of(&hash).and_then(|height| summary(&chain, height)))
}

async fn block_header(State(chain): Chained, Path(hash): Path<BlockHash>) -> Response {
    text(block_by_hash(&lock(&chain), &hash).map(|block| serialize_hex(&block.header)))
}

async fn block_status(State(chain): Chained, Path(hash): Path<BlockHash>) -> Response {
    let chain = lock(&chain);
    let Some(height) = chain.height_of(&hash) else {
        return Json(json!({ "in_best_chain": false })).into_response();
    };
    let next = chain.block(height + 1).map(|block| block.block_hash());
    Json(json!({ "in_best_chain": true, "height": height, "next_best": next })).into_response()
}

async fn block_raw(State(chain): Chained, Path(hash): Path<BlockHash>) -> Response {
    bytes(block_by_hash(&lock(&chain), &hash).map(serialize))
}

async fn block_txids(State(chain): Chained, Path(hash): Path<BlockHash>) -> Response {
    let chain = lock(&chain);
    let block = block_by_hash(&chain, &hash);
    value(block.map(|b| json!(b.txdata.iter().map(Transaction::compute_txid).collect::<Vec<_>>())))
}

async fn block_txid(State(chain): Chained, Path((hash, index)): Path<(BlockHash, usize)>) -> Response {
    let chain = lock(&chain);
    let tx = block_by_hash(&chain, &hash).and_then(|block| block.txdata.get(index));
    text(tx.map(|tx| tx.compute_txid().to_string()))
}

/// Takes a transaction as hex, the way Esplora's clients send it.
async fn submit(State(chain): Chained, body: Bytes) -> Response {
    let tx: Transaction = match hex::decode(body.trim_ascii()).map(|raw| deserialize(&raw)) {
        Ok(Ok(tx)) => tx,
        Ok(Err(error)) => return (StatusCode::BAD_REQUEST, format!("not a transaction: {error}")).into_response(),
        Err(error) => return (StatusCode::BAD_REQUEST, format!("not hex: {error}")).into_response(),
    };
    match lock(&chain).submit(tx, now_s()) {
        Ok(txid) => txid.to_string().into_response(),
        Err(refused) => (StatusCode::BAD_REQUEST, refused.to_string()).into_response(),
    }
}

async fn tx_info(State(chain): Chained, Path(txid): Path<Txid>) -> Response {
    value(tx_json(&lock(&chain), &txid))
}

async fn tx_raw(State(chain): Chained, Path(txid): Path<Txid>) -> Response {
    bytes(lock(&chain).tx(&txid).map(serialize))
}

async fn tx_hex(State(chain): Chained, Path(txid): Path<Txid>) -> Response {
    text(lock(&chain).tx(&txid).map(serialize_hex))
}

async fn tx_status(State(chain): Chained, Path(txid): Path<Txid>) -> Response {
    Json(status_json(&lock(&chain), &txid)).into_response()
}

async fn merkle_block(State(chain): Chained, Path(txid): Path<Txid>) -> Response {
    let chain = lock(&chain);
    let block = chain.confirmed_at(&txid).and_then(|height| chain.block(height));
    text(block.map(|block| serialize_hex(&MerkleBlock::from_block_with_predicate(block, |id| *id == txid))))
}

async fn outspend(State(chain): Chained, Path((txid, vout)): Path<(Txid, u32)>) -> Response {
    let chain = lock(&chain);
    Json(match chain.spender(&OutPoint::new(txid, vout)) {
        Some((by, vin)) => json!({ "spent": true, "txid": by, "vin": vin, "status": status_json(&chain, &by) }),
        None => json!({ "spent": false }),
    })
    .into_response()
}

async fn history(State(chain): Chained, Path(hash): Path<String>) -> Response {
    match script_key(&hash) {
        Some(key) => Json(history_json(&lock(&chain), &key, None)).into_response(),
        None => (StatusCode::BAD_REQUEST, "a script hash is 64 hex digits").into_response(),
    }
}

async fn history_after(State(chain): Chained, Path((hash, last)): Path<(String, Txid)>) -> Response {
    match script_key(&hash) {
        Some(key) => Json(history_json(&lock(&chain), &key, Some(last))).into_response(),
        None => (StatusCode::BAD_REQUEST, "a script hash is 64 hex digits").into_response(),
    }
}

/// The same rate for every target: blocks here are never full.
async fn fee_estimates(State(chain): Chained) -> Response {
    let rate = f64::from(lock(&chain).estimate_sat_per_vb());
    let targets = [1u32, 2, 3, 6, 12, 24, 144, 504, 1008];
    let estimates = targets.iter().map(|target| (target.to_string(), json!(rate))).collect();
    Json(Value::Object(estimates)).into_response()
}

fn block_by_hash<'a>(chain: &'a Chain, hash: &BlockHash) -> Option<&'a bitcoin::Block> {
    chain.block(chain.height_of(hash)?)
}

/// The block at `start` and those below it, newest first.
fn block_page(chain: &Chain, start: u32) -> Value {
    let top = start.min(chain.height());
    let bottom = top.saturating_sub(BLOCKS_PER_PAGE - 1);
    json!((bottom..=top).rev().filter_map(|height| summary(chain, height)).collect::<Vec<_>>())
}

fn summary(chain: &Chain, height: u32) -> Option<Value> {
    let block = chain.block(height)?;
    let header = &block.header;
    Some(json!({
        "id": block.block_hash(),
        "height": height,
        "version": header.version.to_consensus(),
        "timestamp": header.time,
        "tx_count": block.txdata.len(),
        "size": block.total_size(),
        "weight": block.weight().to_wu(),
        "merkle_root": header.merkle_root,
        "previousblockhash": (height > 0).then_some(header.prev_blockhash),
        "mediantime": chain.median_time(height),
        "nonce": header.nonce,
        "bits": header.bits.to_consensus(),
        "difficulty": 0.0,
    }))
}

fn status_json(chain: &Chain, txid: &Txid) -> Value {
    let height = chain.confirmed_at(txid);
    match height.and_then(|height| chain.block(height)) {
        Some(block) => json!({
            "confirmed": true,
            "block_height": height,
            "block_hash": block.block_hash(),
            "block_time": block.header.time,
        }),
        None => json!({ "confirmed": false }),
    }
}

fn tx_json(chain: &Chain, txid: &Txid) -> Option<Value> {
    let tx = chain.tx(txid)?;
    let coinbase = tx.is_coinbase();
    let prevouts: Vec<_> = tx.input.iter().map(|input| chain.output(&input.previous_output)).collect();
    let inputs_sat: u64 = prevouts.iter().flatten().map(|output| output.value.to_sat()).sum();
    let outputs_sat: u64 = tx.output.iter().map(|output| output.value.to_sat()).sum();
    let vin = tx.input.iter().zip(&prevouts).map(|(input, prevout)| {
        json!({
            "txid": input.previous_output.txid,
            "vout": input.previous_output.vout,
            "prevout": prevout.map(output_json),
            "scriptsig": input.script_sig.to_hex_string(),
            "witness": input.witness.iter().map(hex::encode).collect::<Vec<_>>(),
            "sequence": input.sequence.to_consensus_u32(),
            "is_coinbase": coinbase,
        })
    });
    Some(json!({
        "txid": txid,
        "version": tx.version.0,
        "locktime": tx.lock_time.to_consensus_u32(),
        "vin": vin.collect::<Vec<_>>(),
        "vout": tx.output.iter().map(output_json).collect::<Vec<_>>(),
        "size": tx.total_size(),
        "weight": tx.weight().to_wu(),
        "fee": if coinbase { 0 } else { inputs_sat.saturating_sub(outputs_sat) },
        "status": status_json(chain, txid),
    }))
}

fn output_json(output: &bitcoin::TxOut) -> Value {
    json!({ "value": output.value.to_sat(), "scriptpubkey": output.script_pubkey.to_hex_string() })
}

/// The first page has the waiting transactions before the confirmed ones; later pages go on after `last`.
fn history_json(chain: &Chain, key: &ScriptHash, last: Option<Txid>) -> Value {
    let (waiting, confirmed) = chain.history(key);
    let txids: Vec<Txid> = match last {
        None => waiting.into_iter().take(MAX_WAITING).chain(confirmed.into_iter().take(HISTORY_PER_PAGE)).collect(),
        Some(last) => confirmed.into_iter().skip_while(|txid| *txid != last).skip(1).take(HISTORY_PER_PAGE).collect(),
    };
    json!(txids.iter().filter_map(|txid| tx_json(chain, txid)).collect::<Vec<_>>())
}

fn script_key(hash: &str) -> Option<ScriptHash> {
    hex::decode(hash).ok()?.try_into().ok()
}

fn text(found: Option<String>) -> Response {
    found.map_or_else(not_found, IntoResponse::into_response)
}

fn value(found: Option<Value>) -> Response {
    found.map_or_else(not_found, |value| Json(value).into_response())
}

fn bytes(found: Option<Vec<u8>>) -> Response {
    found.map_or_else(not_found, IntoResponse::into_response)
}

fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "not found").into_response()
}
