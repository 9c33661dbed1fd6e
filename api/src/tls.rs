//! TLS in front of a listener: certificate files, read again when they change, or certificates that the daemon has made
//! ([`Certificates`]), and a handshake that no reader waits for.

use std::{
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{
    Accept, TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::{ClientHello, ResolvesServerCert},
        sign::CertifiedKey,
    },
    server::TlsStream,
};

use crate::certificates::{CHALLENGE_PROTOCOL, Certificates};

/// The one protocol that requests are spoken in.
const HTTP: &[u8] = b"http/1.1";
/// How often the files are looked at: whoever renews them need not restart the node.
const LOOK_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, Error)]
pub enum TlsError {
    #[error("{}: {why}", path.display())]
    File { path: PathBuf, why: String },
    #[error("the certificate that was made: {why}")]
    Made { why: String },
    #[error("the certificate and the key do not serve: {0}")]
    Rustls(#[from] tokio_rustls::rustls::Error),
}

/// A certificate chain and its key, from PEM files.
#[derive(Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    current: RwLock<Arc<CertifiedKey>>,
}

fn changed_at(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|about| about.modified()).ok()
}

fn read(certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let file = |path: &Path, why: String| TlsError::File { path: path.to_owned(), why };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| file(certificate, error.to_string()))?;
    if chain.is_empty() {
        return Err(file(certificate, "no certificate in it".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| file(key, error.to_string()))?;
    Ok(CertifiedKey::from_der(chain, key, &ring::default_provider())?)
}

impl ResolvesServerCert for Files {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// What takes connections in.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
}

impl Tls {
    /// Reads the files; must be called within a tokio runtime, which looks at them again every minute.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Tls, TlsError> {
        let current = RwLock::new(Arc::new(read(certificate, key)?));
        let files = Arc::new(Files { certificate: certificate.to_owned(), key: key.to_owned(), current });
        let tls = Tls::of(Arc::clone(&files) as Arc<dyn ResolvesServerCert>, &[HTTP])?;
        tokio::spawn(renew(files));
        Ok(tls)
    }

    /// Serves what `certificates` holds at the time of each handshake.
    pub fn managed(certificates: Arc<Certificates>) -> Result<Tls, TlsError> {
        Tls::of(certificates, &[HTTP, CHALLENGE_PROTOCOL])
    }

    fn of(resolver: Arc<dyn ResolvesServerCert>, protocols: &[&[u8]]) -> Result<Tls, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Tls { acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    pub(crate) fn accept(&self, socket: TcpStream) -> Socket {
        Socket::Handshake(Box::new(self.acceptor.accept(socket)))
    }
}

async fn renew(files: Arc<Files>) {
    let stamp = |files: &Files| (changed_at(&files.certificate), changed_at(&files.key));
    let mut known = stamp(&files);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = stamp(&files);
        if now == known {
            continue;
        }
        // Both files are replaced one after the other: what does not fit together now may a minute later.
        match read(&files.certificate, &files.key) {
            Ok(fresh) => {
                *files.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                known = now;
                tracing::info!("the TLS certificate was read again");
            }
            Err(error) => tracing::warn!(%error, "the TLS certificate changed and is not usable yet"),
        }
    }
}

/// A connection, plain or not. The handshake runs when the first byte is wanted, within the wait for a request's head.
pub(crate) enum Socket {
    Plain(TcpStream),
    Handshake(Box<Accept<TcpStream>>),
    Tls(Box<TlsStream<TcpStream>>),
    Failed,
}

impl Socket {
    /// Drives the handshake, if it goes on still.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Socket::Handshake(accept) = self else { return Poll::Ready(Ok(())) };
        match Pin::new(accept.as_mut()).poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(stream)) => {
                *self = Socket::Tls(Box::new(stream));
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => {
                *self = Socket::Failed;
                Poll::Ready(Err(error))
            }
        }
    }
}

fn gone() -> io::Error {
    io::Error::from(io::ErrorKind::NotConnected)
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.poll_ready(cx))?;
        match &mut *self {
            Socket::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
            Socket::Handshake(_) | Socket::Failed => Poll::Ready(Err(gone())),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        std::task::ready!(self.poll_ready(cx))?;
        match &mut *self {
            Socket::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
            Socket::Handshake(_) | Socket::Failed => Poll::Ready(Err(gone())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Socket::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
            Socket::Handshake(_) | Socket::Failed => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Socket::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            Socket::Handshake(_) | Socket::Failed => Poll::Ready(Ok(())),
        }
    }
}
