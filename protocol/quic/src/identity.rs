//! Who is at the other end: TLS 1.3 with ed25519 raw public keys (RFC 7250) in both directions.
//!
//! There are no certificates, names or validity dates to get wrong. A node's TLS key is its `NodeKey`: for a provider
//! the key in its signed listing, which the consumer pins; for a consumer the fresh key of one session, which the
//! provider learns. Both must prove possession. Signatures are made and strictly verified (RFC 8032, no small-order
//! keys) by the same library that checks receipts. A TLS 1.3 signature covers 64 spaces and a context text of its own,
//! so it can never be taken for a signed statement, which begins with `satgrid-`.
//!
//! Tickets, resumption and 0-RTT are off: every connection proves its keys anew and no byte can be replayed.

use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error as TlsError, PeerIncompatible,
    SignatureAlgorithm, SignatureScheme,
};
use satgrid_protocol::ALPN;
use satgrid_types::{NodeKey, node_key};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// Everything of an ed25519 SubjectPublicKeyInfo (RFC 8410) but the 32 bytes of the key.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// TLS wants a name; it is neither sent nor looked at.
pub(crate) const SERVER_NAME: &str = "satgrid";

/// A key or TLS setting that cannot be used. Ours.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdentityError {
    #[error("TLS: {0}")]
    Tls(String),
}

impl From<TlsError> for IdentityError {
    fn from(error: TlsError) -> IdentityError {
        IdentityError::Tls(error.to_string())
    }
}
impl From<NoInitialCipherSuite> for IdentityError {
    fn from(error: NoInitialCipherSuite) -> IdentityError {
        IdentityError::Tls(error.to_string())
    }
}

/// The key inside a SubjectPublicKeyInfo, if it is exactly an ed25519 key that strict verification can accept.
pub fn parse_public_key(spki: &[u8]) -> Option<NodeKey> {
    let bytes: [u8; 32] = spki.strip_prefix(&SPKI_PREFIX)?.try_into().ok()?;
    let key = VerifyingKey::from_bytes(&bytes).ok()?;
    (!key.is_weak()).then_some(NodeKey(bytes))
}

pub(crate) fn public_key_info(key: &NodeKey) -> Vec<u8> {
    [SPKI_PREFIX.as_slice(), key.as_bytes()].concat()
}

/// TLS for the accepting side: shows `key`, demands a key of every client.
pub(crate) fn server_tls(key: SigningKey) -> Result<QuicServerConfig, IdentityError> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnyNode))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified(key))));
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    Ok(QuicServerConfig::try_from(tls)?)
}

/// TLS for one connection: shows `session_key`, accepts only the node that `pin` names.
pub(crate) fn client_tls(session_key: SigningKey, pin: Arc<Pin>) -> Result<QuicClientConfig, IdentityError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pin)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified(session_key))));
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    tls.enable_sni = false;
    Ok(QuicClientConfig::try_from(tls)?)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

pub(crate) fn certified(key: SigningKey) -> Arc<CertifiedKey> {
    // rustls carries a raw public key where a certificate would be.
    let spki = CertificateDer::from(public_key_info(&node_key(&key)));
    Arc::new(CertifiedKey::new(vec![spki], Arc::new(NodeSigner(key))))
}

/// The node's key as rustls wants it. The secret is never encoded.
#[derive(Clone)]
struct NodeSigner(SigningKey);

impl core::fmt::Debug for NodeSigner {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "NodeSigner({})", node_key(&self.0))
    }
}

impl rustls::sign::SigningKey for NodeSigner {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn rustls::sign::Signer>> {
        offered.contains(&SignatureScheme::ED25519).then(|| Box::new(self.clone()) as Box<dyn rustls::sign::Signer>)
    }
    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(SubjectPublicKeyInfoDer::from(public_key_info(&node_key(&self.0))))
    }
    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

impl rustls::sign::Signer for NodeSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, TlsError> {
        Ok(self.0.sign(message).to_vec())
    }
    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}

/// The consumer's check: this node and no other. One per attempt, since it remembers whom it saw.
#[derive(Debug)]
pub(crate) struct Pin {
    expected: NodeKey,
    presented: Mutex<Option<NodeKey>>,
}

impl Pin {
    pub(crate) fn new(expected: NodeKey) -> Arc<Pin> {
        Arc::new(Pin { expected, presented: Mutex::new(None) })
    }
    /// The key that was shown, if it was another than expected. Shown is not proved: anyone can show any key.
    pub(crate) fn mismatch(&self) -> Option<NodeKey> {
        let presented = *self.presented.lock().unwrap_or_else(PoisonError::into_inner);
        presented.filter(|key| *key != self.expected)
    }
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let key = sole_key(end_entity, intermediates)?;
        *self.presented.lock().unwrap_or_else(PoisonError::into_inner) = Some(key);
        if key != self.expected {
            return Err(TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_handshake(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// The provider's check: any node, as long as it proves its key.
#[derive(Debug)]
struct AnyNode;

impl ClientCertVerifier for AnyNode {
    fn client_auth_mandatory(&self) -> bool {
        true
    }
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        sole_key(end_entity, intermediates).map(|_| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_handshake(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn sole_key(end_entity: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<NodeKey, TlsError> {
    match parse_public_key(end_entity) {
        Some(key) if rest.is_empty() => Ok(key),
        Some(_) | None => Err(TlsError::InvalidCertificate(CertificateError::BadEncoding)),
    }
}

fn verify_handshake(
    message: &[u8],
    spki: &[u8],
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, TlsError> {
    let refused = TlsError::InvalidCertificate(CertificateError::BadSignature);
    if dss.scheme != SignatureScheme::ED25519 {
        return Err(refused);
    }
    let key = parse_public_key(spki).and_then(|key| VerifyingKey::from_bytes(key.as_bytes()).ok());
    let signature = Signature::from_slice(dss.signature()).ok();
    match (key, signature) {
        (Some(key), Some(signature)) if key.verify_strict(message, &signature).is_ok() => {
            Ok(HandshakeSignatureValid::assertion())
        }
        (Some(_) | None, _) => Err(refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_ed25519_key_is_a_node_key() {
        let key = node_key(&SigningKey::from_bytes(&[7; 32]));
        let good = public_key_info(&key);
        assert_eq!(parse_public_key(&good), Some(key));
        let mut identity_point = good.clone();
        identity_point[12..].copy_from_slice(&[0; 32]);
        identity_point[12] = 1;
        let mut x25519 = good.clone();
        x25519[8] = 0x6e;
        let mut longer = good.clone();
        longer.push(0);
        for (name, bytes) in [
            ("a small-order key", identity_point),
            ("a key of another algorithm", x25519),
            ("a trailing byte", longer),
            ("a short key", good[..43].to_vec()),
            ("nothing", Vec::new()),
        ] {
            assert_eq!(parse_public_key(&bytes), None, "{name}");
        }
    }
}
