//! Tree heads of others, heard over QUIC and from relays: kept, and compared with what was heard before.

use super::{consumer::Message, market::Market, now};
use crate::store::Store;
use satgrid_ledger::{
    journal::Witness,
    log::{FraudProof, SignedCheckpoint},
};
use satgrid_node::consumer::ConsumerEvent;
use tokio::sync::mpsc;

/// Texts from relays that may wait.
pub(crate) const NOTES: usize = 256;

/// Keeps a tree head; one that contradicts a head heard before is told to the consumer's role.
pub(crate) async fn witness(store: &Store, heard: SignedCheckpoint, consumer: &mpsc::Sender<Message>) {
    match store.witness(&heard, now()).await {
        Ok(Witness::Conflict { with }) => {
            tracing::error!(node = %heard.node, size = heard.size, "two tree heads exclude each other: this node keeps two histories");
            let proof = FraudProof { one: with.note().to_owned(), other: heard.note().to_owned() };
            let _ = consumer.send(Message::Event(ConsumerEvent::SecondHistory(Box::new(proof)))).await;
        }
        Ok(Witness::First | Witness::Known | Witness::Grown { .. }) => {}
        Err(error) => tracing::warn!(%error, "a tree head of another node was not kept"),
    }
}

/// Holds the heads that relays spread against those that providers told us. Only of providers that are listed now: anybody
/// can make up a node and its log.
pub(crate) async fn compare_heads(
    mut notes: mpsc::Receiver<String>,
    store: Store,
    market: Market,
    consumer: mpsc::Sender<Message>,
) {
    while let Some(note) = notes.recv().await {
        let Ok(heard) = SignedCheckpoint::parse(&note) else { continue };
        if market.live().iter().any(|listing| listing.node_key == heard.node) {
            witness(&store, heard, &consumer).await;
        }
    }
}
