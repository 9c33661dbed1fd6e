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

/// Keeps a tree head; one that contradicts a head heard before is told to the consumer's role. Whether it is a new one that
/// contradicts none.
pub(crate) async fn witness(store: &Store, heard: &SignedCheckpoint, consumer: &mpsc::Sender<Message>) -> bool {
    match store.witness(heard, now()).await {
        Ok(Witness::Conflict { with }) => {
            tracing::error!(node = %heard.node, size = heard.size, "two tree heads exclude each other: this node keeps two histories");
            let proof = FraudProof { one: with.note().to_owned(), other: heard.note().to_owned() };
            let _ = consumer.send(Message::Event(ConsumerEvent::SecondHistory(Box::new(proof)))).await;
            false
        }
        Ok(Witness::First | Witness::Grown { .. }) => true,
        Ok(Witness::Known) => false,
        Err(error) => {
            tracing::warn!(%error, "a tree head of another node was not kept");
            false
        }
    }
}

/// Holds the heads that relays spread against those that providers told us. Only of providers that are listed now or told us
/// of their log before: anybody can make up a node and its log. Heads of different sizes do not contradict each other by
/// themselves: the role asks the provider for the proof that joins them.
pub(crate) async fn compare_heads(
    mut notes: mpsc::Receiver<String>,
    store: Store,
    market: Market,
    consumer: mpsc::Sender<Message>,
) {
    while let Some(note) = notes.recv().await {
        let Ok(heard) = SignedCheckpoint::parse(&note) else { continue };
        let listed = market.live().iter().any(|listing| listing.node_key == heard.node);
        let known = listed || store.has_heard_of(heard.node).await;
        if known && witness(&store, &heard, &consumer).await {
            let _ = consumer.send(Message::Event(ConsumerEvent::OthersHead(Box::new(heard)))).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;
    use satgrid_ledger::{audit::Rule, bundle};
    use satgrid_ledger_sqlite::SqliteJournal;
    use satgrid_market::Catalogue;
    use satgrid_market_nostr::{Publisher, PublisherConfig, RelayConfig};
    use satgrid_types::{Digest, node_key};
    use secp256k1::{Keypair, SECP256K1};
    use std::time::Duration;
    use tokio_util::sync::CancellationToken;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A provider told us one head; a relay, a real one, has another of the same size.
    #[tokio::test]
    async fn a_head_from_a_relay_that_contradicts_the_providers_own_is_a_proof() {
        let folder = tempfile::tempdir().unwrap();
        let relay = satgrid_devnet::relay::serve_relay(0).await.unwrap();
        let (provider, stranger) = (SigningKey::from_bytes(&[3; 32]), SigningKey::from_bytes(&[4; 32]));
        let head = |key: &SigningKey, root: u8| SignedCheckpoint::sign(12, Digest([root; 32]), key);
        let store = Store::Sqlite(SqliteJournal::open(&folder.path().join("ledger.sqlite")).await.unwrap());
        let (inbox, mut consumer) = mpsc::channel(8);
        assert!(witness(&store, &head(&provider, 1), &inbox).await);

        let token = CancellationToken::new();
        let market = Market::new(Catalogue::default());
        let (notes, heard) = mpsc::channel(NOTES);
        tokio::spawn(compare_heads(heard, store.clone(), market.clone(), inbox));
        let relays = vec![relay.url()];
        let listening =
            super::super::market::Listening::start(&market, relays.clone(), Some(notes), None, token.clone());
        let _listening = listening.await.unwrap();

        let keys = Keypair::from_seckey_slice(SECP256K1, &[9; 32]).unwrap();
        let publisher = Publisher::start(PublisherConfig::new(RelayConfig::new(relays), 1), keys, token.clone());
        let publisher = publisher.await.unwrap();
        // Of a node that nobody here knows, the same head once more, no head at all: nothing. Then the other history.
        let texts = [head(&stranger, 1), head(&stranger, 2), head(&provider, 1)].map(|head| head.note().to_owned());
        let texts = texts.into_iter().chain(["10\nroot".to_owned(), head(&provider, 2).note().to_owned()]);
        for (n, text) in texts.enumerate() {
            publisher.checkpoint(&format!("log {n}"), text).await.unwrap();
        }
        let told = tokio::time::timeout(PATIENCE, consumer.recv()).await.unwrap().unwrap();
        let Message::Event(ConsumerEvent::SecondHistory(proof)) = told else { panic!("a proof was expected") };
        assert_eq!(proof.check(), Ok(node_key(&provider)));
        assert!(consumer.try_recv().is_err());

        // One of another size contradicts nothing by itself: the provider is to be asked.
        let grown = SignedCheckpoint::sign(20, Digest([3; 32]), &provider);
        publisher.checkpoint("log grown", grown.note().to_owned()).await.unwrap();
        let told = tokio::time::timeout(PATIENCE, consumer.recv()).await.unwrap().unwrap();
        let Message::Event(ConsumerEvent::OthersHead(asked)) = told else { panic!("a head to ask about was expected") };
        assert_eq!(*asked, grown);

        // What is kept of it is a file that the auditor's tool judges.
        let mut file = Vec::new();
        bundle::write_fraud(&mut file, &proof).unwrap();
        assert!(matches!(bundle::open(file.as_slice()), Ok(bundle::Opened::Fraud(_))));
        assert_eq!(Rule::Fraud.id(), "log/two-histories");
        token.cancel();
        store.close().await;
    }
}
