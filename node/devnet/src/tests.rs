//! The chain's rules, one small story each; then both faces over real HTTP, and the relay over a real WebSocket.

use bitcoin::absolute::LockTime;
use bitcoin::consensus::encode::{deserialize, serialize_hex};
use bitcoin::hashes::Hash;
use bitcoin::key::{Keypair, Secp256k1};
use bitcoin::opcodes::all::{OP_CSV, OP_DROP};
use bitcoin::opcodes::{OP_FALSE, OP_TRUE};
use bitcoin::script::Builder;
use bitcoin::sighash::{EcdsaSighashType, SighashCache};
use bitcoin::{
    Address, Amount, Block, CompressedPublicKey, MerkleBlock, Network, OutPoint, PrivateKey, ScriptBuf, Sequence,
    Transaction, TxIn, TxOut, Txid, Witness, ecdsa, secp256k1, transaction,
};
use serde_json::{Value, json};

use crate::chain::{Chain, script_hash, shared, subsidy_sat};
use crate::consensus::{COINBASE_MATURITY, RefusedTx};

const T0: u32 = 1_700_000_000;
const COINBASE_SAT: u64 = 5_000_000_000;

/// Anyone may spend what pays to this script: `OP_TRUE` behind a witness script hash.
fn open_script() -> ScriptBuf {
    Builder::new().push_opcode(OP_TRUE).into_script()
}

fn open_address() -> Address {
    Address::p2wsh(&open_script(), Network::Regtest)
}

fn spend(from: OutPoint, witness_script: &ScriptBuf, to: ScriptBuf, value_sat: u64) -> Transaction {
    Transaction {
        version: transaction::Version::TWO,
        lock_time: LockTime::ZERO,
        input: vec![TxIn {
            previous_output: from,
            script_sig: ScriptBuf::new(),
            sequence: Sequence::ENABLE_RBF_NO_LOCKTIME,
            witness: Witness::from_slice(&[witness_script.as_bytes()]),
        }],
        output: vec![TxOut { value: Amount::from_sat(value_sat), script_pubkey: to }],
    }
}

fn open_spend(from: OutPoint, value_sat: u64) -> Transaction {
    spend(from, &open_script(), open_address().script_pubkey(), value_sat)
}

fn mine(chain: &mut Chain, blocks: u32) {
    for _ in 0..blocks {
        let now_s = T0 + chain.height();
        chain.mine(open_address().script_pubkey(), now_s);
    }
}

/// A chain whose first coinbase just became spendable, and the outpoint of that coinbase.
fn funded() -> (Chain, OutPoint) {
    let mut chain = Chain::new();
    mine(&mut chain, COINBASE_MATURITY);
    let coinbase = coinbase_of(&chain, 1);
    (chain, coinbase)
}

fn coinbase_of(chain: &Chain, height: u32) -> OutPoint {
    OutPoint::new(chain.block(height).unwrap().txdata[0].compute_txid(), 0)
}

#[test]
fn starts_at_the_known_regtest_genesis() {
    let chain = Chain::new();
    assert_eq!(chain.height(), 0);
    assert_eq!(chain.tip().to_string(), "0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206");
}

#[test]
fn mines_valid_blocks_that_pay_a_halving_subsidy() {
    let mut chain = Chain::new();
    mine(&mut chain, 151);
    assert_eq!(chain.height(), 151);
    for height in 1..=151 {
        let block = chain.block(height).unwrap();
        assert_eq!(block.header.prev_blockhash, chain.block(height - 1).unwrap().block_hash());
        assert!(block.check_merkle_root() && block.check_witness_commitment());
        assert!(block.header.validate_pow(block.header.target()).is_ok());
        // Up to sixteen the height is a one-byte opcode, as Bitcoin Core writes it and rust-bitcoin does not read it.
        if height > 16 {
            assert_eq!(block.bip34_block_height().unwrap(), u64::from(height));
        }
        assert!(block.header.time > chain.median_time(height - 1));
        assert_eq!(block.txdata[0].output[0].value.to_sat(), subsidy_sat(height));
    }
    assert_eq!(
        (subsidy_sat(149), subsidy_sat(150), subsidy_sat(300)),
        (COINBASE_SAT, COINBASE_SAT / 2, COINBASE_SAT / 4)
    );
    assert_eq!(subsidy_sat(150 * 64), 0);
}

#[test]
fn a_coinbase_matures_after_a_hundred_blocks() {
    let mut chain = Chain::new();
    mine(&mut chain, COINBASE_MATURITY - 1);
    let tx = open_spend(coinbase_of(&chain, 1), COINBASE_SAT - 1_000);
    assert_eq!(chain.submit(tx.clone(), T0), Err(RefusedTx::ImmatureCoinbase { depth: 99 }));
    mine(&mut chain, 1);
    let txid = chain.submit(tx, T0).unwrap();
    assert_eq!(chain.confirmed_at(&txid), None);
    mine(&mut chain, 1);
    assert_eq!(chain.confirmed_at(&txid), Some(COINBASE_MATURITY + 1));
    let reward = chain.block(chain.height()).unwrap().txdata[0].output[0].value.to_sat();
    assert_eq!(reward, COINBASE_SAT + 1_000, "the miner gets the fee");
}

#[test]
fn blocks_are_taken_back_and_others_found_in_their_place() {
    let (mut chain, coinbase) = funded();
    let first = chain.submit(open_spend(coinbase, COINBASE_SAT - 1_000), T0).unwrap();
    mine(&mut chain, 1);
    let child = open_spend(OutPoint::new(first, 0), COINBASE_SAT - 2_000);
    let second = chain.submit(child, T0).unwrap();
    mine(&mut chain, 2);
    let (height, tip, before) = (chain.height(), chain.tip(), chain.clone());

    chain.undo(2, T0, |_| true);
    assert_eq!((chain.height(), chain.confirmed_at(&first)), (height - 2, Some(height - 2)));
    assert!(chain.confirmed_at(&second).is_none() && chain.mempool().get(&second).is_some());
    let script = script_hash(&open_address().script_pubkey());
    assert!(chain.history(&script).0.contains(&second) && chain.history(&script).1.contains(&first));
    assert_eq!(chain.height_of(&tip), None);
    chain.mine(ScriptBuf::new(), T0 + 1_000);
    assert_eq!(chain.confirmed_at(&second), Some(height - 1));

    // One that is forgotten takes what spends it along.
    let mut chain = before;
    chain.undo(3, T0, |tx| tx.compute_txid() != first);
    mine(&mut chain, 3);
    assert_eq!((chain.height(), chain.tip() == tip), (height, false));
    assert!(chain.tx(&first).is_none() && chain.tx(&second).is_none());
    assert!(chain.coin(&coinbase).is_some());
}

#[test]
fn scripts_are_judged_by_consensus() {
    let (mut chain, coinbase) = funded();
    // The right witness script with a wrong program, and a script that ends in false.
    let never = Builder::new().push_opcode(OP_FALSE).into_script();
    let tx = spend(coinbase, &never, open_address().script_pubkey(), COINBASE_SAT - 1_000);
    assert!(matches!(chain.submit(tx, T0), Err(RefusedTx::Script { input: 0, .. })));
    assert_eq!(chain.mempool().len(), 0);
}

#[test]
fn only_the_right_key_spends() {
    let secp = Secp256k1::new();
    let secret = |byte| PrivateKey::from_slice(&[byte; 32], Network::Regtest).unwrap();
    let public = CompressedPublicKey::from_private_key(&secp, &secret(1)).unwrap();
    let ours = ScriptBuf::new_p2wpkh(&public.wpubkey_hash());
    let (mut chain, coinbase) = funded();
    let funding = spend(coinbase, &open_script(), ours.clone(), COINBASE_SAT - 1_000);
    let outpoint = OutPoint::new(chain.submit(funding, T0).unwrap(), 0);

    let signed_by = |byte| {
        let mut tx = spend(outpoint, &ScriptBuf::new(), open_address().script_pubkey(), COINBASE_SAT - 2_000);
        let amount = Amount::from_sat(COINBASE_SAT - 1_000);
        let hash = SighashCache::new(&tx).p2wpkh_signature_hash(0, &ours, amount, EcdsaSighashType::All).unwrap();
        let message = secp256k1::Message::from_digest(hash.to_byte_array());
        let signature = ecdsa::Signature::sighash_all(secp.sign_ecdsa(&message, &secret(byte).inner));
        tx.input[0].witness = Witness::p2wpkh(&signature, &public.0);
        tx
    };
    assert!(matches!(chain.submit(signed_by(2), T0), Err(RefusedTx::Script { .. })));
    // The good one spends a coin that is itself unconfirmed.
    let txid = chain.submit(signed_by(1), T0).unwrap();
    mine(&mut chain, 1);
    assert_eq!(chain.confirmed_at(&txid), Some(chain.height()));
}

#[test]
fn taproot_signatures_are_checked() {
    let secp = Secp256k1::new();
    let pair = Keypair::from_seckey_slice(&secp, &[7; 32]).unwrap();
    let script = ScriptBuf::new_p2tr(&secp, pair.x_only_public_key().0, None);
    let (mut chain, coinbase) = funded();
    let funding = spend(coinbase, &open_script(), script, COINBASE_SAT - 1_000);
    let outpoint = OutPoint::new(chain.submit(funding, T0).unwrap(), 0);
    let mut forged = open_spend(outpoint, COINBASE_SAT - 2_000);
    forged.input[0].witness = Witness::from_slice(&[[9u8; 64]]);
    assert!(matches!(chain.submit(forged, T0), Err(RefusedTx::Script { input: 0, .. })));
}

#[test]
fn money_comes_from_somewhere() {
    let (mut chain, coinbase) = funded();
    let nowhere = OutPoint::new(Txid::all_zeros(), 7);
    let mut twice = open_spend(coinbase, 1_000);
    twice.input.push(twice.input[0].clone());
    let mut empty = open_spend(coinbase, 1_000);
    empty.output.clear();
    let cases = [
        (open_spend(nowhere, 1_000), RefusedTx::MissingOrSpent { outpoint: nowhere }),
        (
            open_spend(coinbase, COINBASE_SAT + 1),
            RefusedTx::SpendsMoreThanItHas { inputs_sat: COINBASE_SAT, outputs_sat: COINBASE_SAT + 1 },
        ),
        (open_spend(coinbase, u64::MAX), RefusedTx::OutputsTooLarge),
        (twice, RefusedTx::DuplicateInput { outpoint: coinbase }),
        (empty, RefusedTx::NoOutputs),
    ];
    for (tx, reason) in cases {
        assert_eq!(chain.submit(tx, T0), Err(reason));
    }
    let free = chain.submit(open_spend(coinbase, COINBASE_SAT), T0);
    assert!(matches!(free, Err(RefusedTx::FeeTooLow { fee_sat: 0, .. })));
}

#[test]
fn a_confirmed_coin_is_spent_once() {
    let (mut chain, coinbase) = funded();
    let first = open_spend(coinbase, COINBASE_SAT - 1_000);
    chain.submit(first.clone(), T0).unwrap();
    assert_eq!(chain.submit(first.clone(), T0), Ok(first.compute_txid()), "the same again is no error");
    mine(&mut chain, 1);
    assert_eq!(chain.submit(first, T0), Err(RefusedTx::AlreadyConfirmed));
    let second = chain.submit(open_spend(coinbase, COINBASE_SAT - 9_000), T0);
    assert_eq!(second, Err(RefusedTx::MissingOrSpent { outpoint: coinbase }));
}

#[test]
fn a_replacement_pays_for_itself_and_takes_descendants_along() {
    let (mut chain, coinbase) = funded();
    let parent = open_spend(coinbase, COINBASE_SAT - 1_000);
    let child = open_spend(OutPoint::new(parent.compute_txid(), 0), COINBASE_SAT - 2_000);
    chain.submit(parent.clone(), T0).unwrap();
    chain.submit(child.clone(), T0).unwrap();
    // Parent and child paid 2,000 sat together; a replacement must pay that and its own relay.
    let cheap = chain.submit(open_spend(coinbase, COINBASE_SAT - 2_000), T0);
    assert!(matches!(cheap, Err(RefusedTx::ReplacementTooCheap { fee_sat: 2_000, .. })));
    let mut selfish = open_spend(coinbase, COINBASE_SAT - 50_000);
    selfish.input.push(open_spend(OutPoint::new(child.compute_txid(), 0), 1).input.remove(0));
    assert_eq!(chain.submit(selfish, T0), Err(RefusedTx::SpendsWhatItReplaces));
    assert_eq!(chain.mempool().len(), 2, "a refused replacement changes nothing");

    let better = chain.submit(open_spend(coinbase, COINBASE_SAT - 3_000), T0).unwrap();
    assert_eq!(chain.mempool().txids().copied().collect::<Vec<_>>(), vec![better]);
    assert_eq!(chain.spender(&coinbase), Some((better, 0)));
    let (waiting, _) = chain.history(&script_hash(&open_address().script_pubkey()));
    assert_eq!(waiting, vec![better], "the evicted ones left the history");
    mine(&mut chain, 1);
    assert_eq!(chain.confirmed_at(&better), Some(chain.height()));
    assert!(chain.tx(&child.compute_txid()).is_none());
}

/// Coins come from subsidies alone, and none is lost: fees go to miners.
#[test]
fn the_coins_are_the_sum_of_the_subsidies() {
    let (mut chain, coinbase) = funded();
    let mut outpoint = coinbase;
    let mut value_sat = COINBASE_SAT;
    for fee_sat in [1_000, 2_000, 30_000, 500] {
        value_sat -= fee_sat;
        let tx = open_spend(outpoint, value_sat);
        outpoint = OutPoint::new(chain.submit(tx, T0).unwrap(), 0);
        // Chains of unconfirmed coins and confirmed ones alike.
        mine(&mut chain, u32::from(fee_sat > 1_000));
    }
    mine(&mut chain, 1);
    assert_eq!(chain.mempool().len(), 0);
    let txs = (1..=chain.height()).flat_map(|height| &chain.block(height).unwrap().txdata);
    let outpoints = txs.flat_map(|tx| (0..tx.output.len() as u32).map(|vout| OutPoint::new(tx.compute_txid(), vout)));
    let coins_sat: u64 = outpoints.filter_map(|outpoint| chain.coin(&outpoint)).map(|c| c.output.value.to_sat()).sum();
    assert_eq!(coins_sat, (1..=chain.height()).map(subsidy_sat).sum::<u64>());
}

#[test]
fn relative_locks_hold_for_their_blocks() {
    const DELAY: u32 = 5;
    let locked = Builder::new().push_int(i64::from(DELAY)).push_opcode(OP_CSV).push_opcode(OP_DROP);
    let locked = locked.push_opcode(OP_TRUE).into_script();
    let (mut chain, coinbase) = funded();
    let funding = spend(coinbase, &open_script(), ScriptBuf::new_p2wsh(&locked.wscript_hash()), COINBASE_SAT - 1_000);
    let outpoint = OutPoint::new(chain.submit(funding, T0).unwrap(), 0);
    let claim = |sequence| {
        let mut tx = spend(outpoint, &locked, open_address().script_pubkey(), COINBASE_SAT - 2_000);
        tx.input[0].sequence = sequence;
        tx
    };
    let delayed = claim(Sequence::from_height(DELAY as u16));
    // Blocks on top of the coin, its own included: confirmed in the first of these.
    for _ in 0..DELAY {
        assert_eq!(chain.submit(delayed.clone(), T0), Err(RefusedTx::RelativeLock { input: 0 }));
        mine(&mut chain, 1);
    }
    let early = chain.submit(claim(Sequence::from_height(DELAY as u16 - 1)), T0);
    assert!(matches!(early, Err(RefusedTx::Script { .. })), "the script itself asks for the delay");
    chain.submit(delayed, T0).unwrap();
}

#[test]
fn absolute_locks_hold_until_their_height() {
    let (mut chain, coinbase) = funded();
    let mut tx = open_spend(coinbase, COINBASE_SAT - 1_000);
    let height = chain.height() + 1;
    tx.lock_time = LockTime::from_consensus(height);
    assert_eq!(chain.submit(tx.clone(), T0), Err(RefusedTx::NotFinal { lock_time: height }));
    mine(&mut chain, 1);
    chain.submit(tx, T0).unwrap();
}

async fn rpc(url: &str, method: &str, params: Value) -> Value {
    let body = json!({ "id": 1, "method": method, "params": params });
    reqwest::Client::new().post(url).json(&body).send().await.unwrap().json().await.unwrap()
}

async fn esplora(url: &str, path: &str) -> (u16, String) {
    let response = reqwest::get(format!("{url}{path}")).await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

#[tokio::test]
async fn both_faces_tell_the_same_story() {
    let server = crate::serve(shared(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = server.url();
    let address = open_address().to_string();
    let mined = rpc(&url, "generatetoaddress", json!([101, address])).await;
    let hashes = mined["result"].as_array().unwrap();
    assert_eq!(hashes.len(), 101);
    let tip = hashes[100].as_str().unwrap();
    assert_eq!(esplora(&url, "/blocks/tip/hash").await, (200, tip.to_owned()));
    assert_eq!(rpc(&url, "getblockchaininfo", json!([])).await["result"]["bestblockhash"], tip);

    let raw = rpc(&url, "getblock", json!([hashes[0], 0])).await["result"].as_str().unwrap().to_owned();
    let block: Block = deserialize(&hex::decode(raw).unwrap()).unwrap();
    let tx = open_spend(OutPoint::new(block.txdata[0].compute_txid(), 0), COINBASE_SAT - 1_000);
    let txid = tx.compute_txid();
    let posted = reqwest::Client::new().post(format!("{url}/tx")).body(serialize_hex(&tx)).send().await.unwrap();
    assert_eq!(posted.text().await.unwrap(), txid.to_string());
    assert_eq!(rpc(&url, "getrawmempool", json!([])).await["result"], json!([txid.to_string()]));
    assert_eq!(esplora(&url, &format!("/tx/{txid}/merkleblock-proof")).await.0, 404, "not in a block yet");

    rpc(&url, "generatetoaddress", json!([1, address])).await;
    let height = async || {
        let (_, status) = esplora(&url, &format!("/tx/{txid}/status")).await;
        serde_json::from_str::<Value>(&status).unwrap()["block_height"].clone()
    };
    assert_eq!(height().await, 102);
    // Taken back, it waits again, and is mined again.
    let last = rpc(&url, "getbestblockhash", json!([])).await["result"].clone();
    assert_eq!(rpc(&url, "invalidateblock", json!([last])).await["error"], Value::Null);
    assert_eq!((esplora(&url, "/blocks/tip/height").await.1.as_str(), height().await), ("101", Value::Null));
    assert_eq!(rpc(&url, "getrawmempool", json!([])).await["result"], json!([txid.to_string()]));
    rpc(&url, "generatetoaddress", json!([1, address])).await;
    assert_eq!(height().await, 102);
    let (_, proof) = esplora(&url, &format!("/tx/{txid}/merkleblock-proof")).await;
    let proof: MerkleBlock = deserialize(&hex::decode(proof).unwrap()).unwrap();
    let (mut matched, mut indexes) = (vec![], vec![]);
    proof.extract_matches(&mut matched, &mut indexes).unwrap();
    assert_eq!(matched, vec![txid]);

    let script = hex::encode(script_hash(&open_address().script_pubkey()));
    let (_, page) = esplora(&url, &format!("/scripthash/{script}/txs")).await;
    let page: Value = serde_json::from_str(&page).unwrap();
    assert_eq!(page.as_array().unwrap().len(), 25);
    assert_eq!(page[0]["txid"], txid.to_string(), "newest first");
    let last = page[24]["txid"].as_str().unwrap();
    let (_, next) = esplora(&url, &format!("/scripthash/{script}/txs/chain/{last}")).await;
    let next: Value = serde_json::from_str(&next).unwrap();
    assert!(next[0]["status"]["block_height"].as_u64() <= page[24]["status"]["block_height"].as_u64());
    assert_ne!(next[0]["txid"], page[24]["txid"]);
    let (_, spent) = esplora(&url, &format!("/tx/{}/outspend/0", tx.input[0].previous_output.txid)).await;
    assert_eq!(serde_json::from_str::<Value>(&spent).unwrap()["txid"], txid.to_string());
}

#[tokio::test]
async fn bad_requests_get_errors_not_panics() {
    let server = crate::serve(shared(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = server.url();
    let cases = [
        ("nonsense", json!([]), -32601),
        ("getblockhash", json!([9]), -8),
        ("getblockhash", json!([]), -1),
        ("getblockhash", json!([4_294_967_296u64]), -8),
        ("getblock", json!(["zz"]), -8),
        ("getblock", json!([Txid::all_zeros().to_string()]), -5),
        ("gettxout", json!([Txid::all_zeros().to_string()]), -1),
        ("sendrawtransaction", json!(["00"]), -22),
        ("sendrawtransaction", json!(["xyz"]), -22),
        ("generatetoaddress", json!([1_000_000, open_address().to_string()]), -8),
        ("generatetoaddress", json!([1, "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"]), -5),
    ];
    for (method, params, code) in cases {
        assert_eq!(rpc(&url, method, params).await["error"]["code"], code, "{method}");
    }
    for (path, status) in [("/tx/zz", 400), ("/block-height/9", 404), ("/scripthash/00/txs", 400), ("/nothing", 404)] {
        assert_eq!(esplora(&url, path).await.0, status, "{path}");
    }
    let client = reqwest::Client::new();
    let huge = client.post(format!("{url}/tx")).body(vec![b'0'; 2 * 1024 * 1024]).send().await.unwrap();
    assert_eq!(huge.status().as_u16(), 413);
    let garbage = client.post(&url).body("{").send().await.unwrap();
    assert_eq!(garbage.json::<Value>().await.unwrap()["error"]["code"], -32700);
}

#[tokio::test]
async fn ports_are_loopback_and_free() {
    let everyone = "0.0.0.0:0".parse().unwrap();
    let refused = crate::serve(shared(), everyone).await.err().unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
    assert!(matches!(crate::RelayServer::start(everyone).await, Err(crate::RelayError::NotLoopback(_))));
    let first = crate::serve(shared(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let taken = crate::serve(shared(), first.addr()).await.err().unwrap();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    assert!(matches!(crate::RelayServer::start(first.addr()).await, Err(crate::RelayError::Listen { .. })));
}

#[tokio::test]
async fn the_relay_keeps_and_returns_an_event() {
    use nostr_sdk::{Client, EventBuilder, Filter, Keys, Kind};
    let relay = crate::relay::serve_relay(0).await.unwrap();
    let keys = Keys::generate();
    let author = Client::new(keys.clone());
    author.add_relay(relay.url()).await.unwrap();
    author.connect().await;
    let sent = author.send_event_builder(EventBuilder::text_note("ten sat a reply")).await.unwrap();
    assert_eq!(sent.success.len(), 1);

    let reader = Client::default();
    reader.add_relay(relay.url()).await.unwrap();
    reader.connect().await;
    let filter = Filter::new().author(keys.public_key()).kind(Kind::TextNote);
    let found = reader.fetch_events(filter, std::time::Duration::from_secs(10)).await.unwrap();
    assert_eq!(found.first().map(|event| event.content.as_str()), Some("ten sat a reply"));
    author.shutdown().await;
    reader.shutdown().await;
}
