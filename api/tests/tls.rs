//! The edge behind TLS: certificate files, clients that do not shake hands, files that are no certificate.
#![allow(clippy::unwrap_used)]

mod support;

use satgrid_api::{Api, ApiConfig, Tls, TlsError};
use std::{path::Path, sync::Arc, time::Duration};
use support::Scripted;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

/// Made for these tests, for `localhost`, good for a century and for nothing else.
const CERTIFICATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls/certificate.pem");
const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls/key.pem");

fn connector() -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(CERTIFICATE).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn answers_over_tls_while_others_do_not_shake_hands() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = Tls::from_files(Path::new(CERTIFICATE), Path::new(KEY)).unwrap();
    let api = Api::new(Arc::new(Scripted::default()), ApiConfig::default());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(api.serve_over(listener, Some(tls), async {
        let _ = stopped.await;
    }));

    // Says nothing, and holds nobody up.
    let silent = TcpStream::connect(address).await.unwrap();
    let plain = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = connector().connect(name, TcpStream::connect(address).await.unwrap()).await.unwrap();
    client.write_all(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // A peer that closes TCP without a TLS farewell has still answered.
    let _ = tokio::time::timeout(Duration::from_secs(30), client.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    let mut plain = plain;
    plain.write_all(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(30), plain.read_to_end(&mut answer)).await.unwrap();
    assert!(!answer.starts_with(b"HTTP/"), "nothing is answered in the clear");
    drop(silent);
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(30), served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn files_that_do_not_serve_are_told_by_name() {
    let absent = Tls::from_files(Path::new("/nowhere/certificate.pem"), Path::new(KEY)).err().unwrap();
    assert!(absent.to_string().contains("/nowhere/certificate.pem"), "{absent}");
    let swapped = Tls::from_files(Path::new(KEY), Path::new(CERTIFICATE)).err().unwrap();
    assert!(matches!(swapped, TlsError::File { .. }), "{swapped}");
}
