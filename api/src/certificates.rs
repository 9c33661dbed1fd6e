//! Certificates that are made and renewed while the node runs, and the answers to an authority's questions on the same port
//! (RFC 8737: TLS-ALPN-01). Who asks the authority is the daemon; here is only what a handshake is answered with.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use tokio_rustls::rustls::{
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::tls::TlsError;

/// The protocol that an authority asks for, alone, when it looks for an answer.
pub(crate) const CHALLENGE_PROTOCOL: &[u8] = b"acme-tls/1";

/// See the module. Before the first certificate is there, every handshake but an authority's fails.
#[derive(Debug, Default)]
pub struct Certificates {
    current: RwLock<Option<Arc<CertifiedKey>>>,
    /// By the name that is to be proved.
    answers: RwLock<BTreeMap<String, Arc<CertifiedKey>>>,
}

impl Certificates {
    /// Serves this chain from the next handshake on; both are PEM.
    pub fn set(&self, chain: &str, key: &str) -> Result<(), TlsError> {
        let unusable = |why: String| TlsError::Made { why };
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| unusable(error.to_string()))?;
        if chain.is_empty() {
            return Err(unusable("no certificate in it".to_owned()));
        }
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| unusable(error.to_string()))?;
        let made = CertifiedKey::from_der(chain, key, &ring::default_provider())?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(made));
        Ok(())
    }

    /// Answers an authority that asks for this name; both are DER, the key as PKCS #8.
    pub fn answer(&self, name: &str, certificate: &[u8], key: &[u8]) -> Result<(), TlsError> {
        let unusable = |why: &str| TlsError::Made { why: why.to_owned() };
        let key = PrivateKeyDer::try_from(key.to_vec()).map_err(unusable)?;
        let chain = vec![CertificateDer::from(certificate.to_vec())];
        // It carries a critical extension that nobody but the authority knows: what checks that key and certificate fit does not.
        let made = CertifiedKey::new(chain, ring::sign::any_supported_type(&key)?);
        self.answers.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), Arc::new(made));
        Ok(())
    }

    /// Nobody asks any more.
    pub fn forget_answers(&self) {
        self.answers.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let asks = hello.alpn().is_some_and(|mut offered| offered.all(|protocol| protocol == CHALLENGE_PROTOCOL));
        if asks {
            let answers = self.answers.read().unwrap_or_else(PoisonError::into_inner);
            return answers.get(hello.server_name()?).cloned();
        }
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
