use super::*;
use crate::identity::{self, Pin, SERVER_NAME};
use crate::{AddressHint, AttemptError, Code, ConnectError, LinkError};
use quinn::crypto::rustls::QuicClientConfig;
use satgrid_types::node_key;
use std::sync::Arc;

#[tokio::test]
async fn each_side_knows_the_other() {
    let pair = Pair::new().await;
    assert_eq!(pair.client.peer(), node_key(&key(PROVIDER)));
    assert_eq!(pair.server.peer(), node_key(&key(SESSION)));
    let other = connect(&pair.consumer, &pair.provider, 9).await;
    assert_eq!(soon(pair.provider.accept()).await.unwrap().peer(), node_key(&key(9)), "a key for each session");
    assert!(other.path().rtt < Duration::from_secs(1) && other.path().mtu_bytes >= 1200);
}

#[tokio::test]
async fn another_node_at_the_address_is_refused() {
    let (provider, consumer) = (provider(Limits::default()), consumer(Limits::default()));
    let hint = provider.local_addr().unwrap().into();
    let expected = node_key(&key(77));
    let error = soon(consumer.connect(&[hint], expected, &key(SESSION))).await.unwrap_err();
    let presented = node_key(&key(PROVIDER));
    assert_eq!(error.wrong_key(), Some(presented));
    let ConnectError::Failed(attempts) = error else { panic!("{error}") };
    assert_eq!(attempts[0].error, AttemptError::WrongKey { expected, presented });
    // The provider saw a handshake that failed, and no link.
    let real = connect(&consumer, &provider, 5).await;
    assert_eq!(soon(provider.accept()).await.unwrap().peer(), node_key(&key(5)));
    drop(real);
}

/// Connects with a TLS setting of an attacker's choice; gives the reason why it was thrown out.
async fn intrude(tls: rustls::ClientConfig) -> String {
    let (provider, consumer) = (provider(Limits::default()), quinn::Endpoint::client(LOOPBACK).unwrap());
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    let address = provider.local_addr().unwrap();
    let connecting = consumer.connect_with(config, address, SERVER_NAME).unwrap();
    // A TLS client is done before the server has looked at its key.
    let error = match soon(connecting).await {
        Ok(connection) => soon(connection.closed()).await,
        Err(error) => error,
    };
    assert!(tokio::time::timeout(Duration::from_millis(50), provider.accept()).await.is_err(), "no link came of it");
    assert_eq!(provider.accepted_connections(), 0);
    error.to_string()
}

fn attacker_tls() -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Pin::new(node_key(&key(PROVIDER))))
}

#[tokio::test]
async fn a_client_without_a_key_is_refused() {
    let mut tls = attacker_tls().with_no_client_auth();
    tls.alpn_protocols = vec![b"satgrid/1".to_vec()];
    let reason = intrude(tls).await;
    assert!(reason.contains("certificate") || reason.contains("handshake"), "{reason}");
}

/// Shows one key and signs with another.
#[derive(Debug)]
struct Impostor;
impl rustls::client::ResolvesClientCert for Impostor {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        let mut certified = (*identity::certified(key(66))).clone();
        certified.cert = identity::certified(key(SESSION)).cert.clone();
        Some(Arc::new(certified))
    }
    fn only_raw_public_keys(&self) -> bool {
        true
    }
    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn a_client_that_cannot_prove_its_key_is_refused() {
    let mut tls = attacker_tls().with_client_cert_resolver(Arc::new(Impostor));
    tls.alpn_protocols = vec![b"satgrid/1".to_vec()];
    let reason = intrude(tls).await;
    assert!(reason.to_lowercase().contains("signature") || reason.contains("decrypt"), "{reason}");
}

#[tokio::test]
async fn another_protocol_is_refused() {
    for offered in [vec![b"h3".to_vec()], vec![b"satgrid/2".to_vec()], vec![]] {
        let certified = identity::certified(key(SESSION));
        let resolver = rustls::client::AlwaysResolvesClientRawPublicKeys::new(certified);
        let mut tls = attacker_tls().with_client_cert_resolver(Arc::new(resolver));
        tls.alpn_protocols = offered;
        let reason = intrude(tls).await;
        assert!(reason.contains("known protocol"), "{reason}");
    }
}

#[tokio::test]
async fn connections_are_limited_per_source_and_places_come_back() {
    let limits = Limits { connections_per_source: 2, ..Limits::default() };
    let (provider, consumer) = (provider(limits), consumer(Limits::default()));
    let hint: AddressHint = provider.local_addr().unwrap().into();
    let expected = node_key(&key(PROVIDER));
    let first = connect(&consumer, &provider, 10).await;
    // From half of the limit on the address must be proved first; honest clients do not notice.
    let _second = connect(&consumer, &provider, 11).await;
    let error = soon(consumer.connect(&[hint], expected, &key(12))).await.unwrap_err();
    let ConnectError::Failed(attempts) = &error else { panic!("{error}") };
    assert_eq!(attempts[0].error, AttemptError::Refused);
    assert_eq!(provider.accepted_connections(), 2);
    let served = soon(provider.accept()).await.unwrap();
    first.close(Code::DONE, "");
    soon(served.closed()).await;
    soon(async {
        while provider.accepted_connections() == 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    connect(&consumer, &provider, 13).await;
}

#[tokio::test]
async fn a_dead_address_costs_one_step() {
    let (provider, consumer) = (provider(Limits::default()), consumer(Limits::default()));
    let silent = std::net::UdpSocket::bind(LOOPBACK).unwrap();
    let hints = [silent.local_addr().unwrap().into(), provider.local_addr().unwrap().into()];
    let link = soon(consumer.connect(&hints, node_key(&key(PROVIDER)), &key(SESSION))).await.unwrap();
    assert_eq!(link.remote(), provider.local_addr().unwrap());
}

#[tokio::test]
async fn nobody_there_is_told_with_each_address() {
    let consumer = consumer(Limits { handshake: Duration::from_millis(50), ..Limits::default() });
    let silent = std::net::UdpSocket::bind(LOOPBACK).unwrap();
    let address = silent.local_addr().unwrap();
    let error = soon(consumer.connect(&[address.into()], node_key(&key(PROVIDER)), &key(SESSION))).await.unwrap_err();
    assert_eq!(error.to_string(), format!("{address}: no answer within 50ms"));
    let nowhere = "224.0.0.1:9".parse().unwrap();
    let error = soon(consumer.connect(&[nowhere], node_key(&key(PROVIDER)), &key(SESSION))).await.unwrap_err();
    assert!(error.to_string().contains("not the address of one host"), "{error}");
}

#[tokio::test]
async fn a_graceful_close_is_seen_with_its_reason() {
    let pair = Pair::new().await;
    assert_eq!(pair.client.close_reason(), None);
    pair.server.close(Code::new(300), "quote expired\x07");
    let reason = LinkError::PeerClosed { code: Code::new(300), reason: "quote expired ".into() };
    assert_eq!(soon(pair.client.closed()).await, reason);
    assert_eq!(soon(pair.client.accept()).await.unwrap_err(), reason);
    assert_eq!(soon(pair.client.open(StreamKind::Request)).await.unwrap_err(), reason);
    assert_eq!(soon(pair.server.closed()).await, LinkError::LocalShutdown);
}

#[tokio::test]
async fn a_shutdown_tells_every_peer_why() {
    let pair = Pair::new().await;
    let (mut near, _far) = pair.stream().await;
    soon(pair.provider.shutdown(Code::SHUTTING_DOWN, "new version")).await;
    let reason = LinkError::PeerClosed { code: Code::SHUTTING_DOWN, reason: "new version".into() };
    assert_eq!(soon(near.rx.recv()).await.unwrap_err(), reason);
    assert_eq!(pair.client.close_reason(), Some(reason));
    assert!(soon(pair.provider.accept()).await.is_none());
    pair.consumer.shutdown(Code::DONE, "").await;
    let hint = pair.provider.local_addr().unwrap().into();
    let error = soon(pair.consumer.connect(&[hint], node_key(&key(PROVIDER)), &key(3))).await;
    assert_eq!(error.unwrap_err(), ConnectError::LocalShutdown);
}

#[tokio::test]
async fn a_cancelled_token_or_a_dropped_handle_ends_the_links() {
    let token = CancellationToken::new();
    let provider = QuicEndpoint::bind(LOOPBACK, key(PROVIDER), Limits::default(), &token).unwrap();
    let consumer = consumer(Limits::default());
    let link = connect(&consumer, &provider, SESSION).await;
    token.cancel();
    let error = soon(link.closed()).await;
    assert!(matches!(error, LinkError::PeerClosed { code: Code::SHUTTING_DOWN, .. }), "{error}");

    let pair = Pair::new().await;
    drop(pair.client);
    let error = soon(pair.server.closed()).await;
    assert!(matches!(error, LinkError::PeerClosed { code: Code::DONE, .. }), "{error}");
}

#[tokio::test]
async fn a_taken_port_is_told_with_its_address() {
    let provider = provider(Limits::default());
    let address = provider.local_addr().unwrap();
    let error = QuicEndpoint::bind(address, key(3), Limits::default(), &CancellationToken::new()).unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    let limits = Limits { streams: 0, ..Limits::default() };
    let error = QuicEndpoint::bind(LOOPBACK, key(3), limits, &CancellationToken::new()).unwrap_err();
    assert_eq!(error.to_string(), "streams is zero");
}
