//! A UDP socket that speaks QUIC: connects with a key per session, accepts with the node's key.

use crate::addr::{AddressError, AddressHint, resolve};
use crate::admission::{Admission, Decision, Permit};
use crate::identity::{self, IdentityError, Pin, SERVER_NAME};
use crate::link::cut;
use crate::{Code, Limits, LimitsError, Link, LinkError};
use core::time::Duration;
use ed25519_dalek::SigningKey;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{ClientConfig, ConnectionError, EndpointConfig, Incoming, ServerConfig, TokioRuntime, TransportErrorCode};
use rustls::pki_types::CertificateDer;
use satgrid_types::NodeKey;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use thiserror::Error;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

/// Authenticated links that wait for [`QuicEndpoint::accept`].
const ACCEPT_QUEUE: usize = 16;
/// A first packet and what follows it before we decide, per connection attempt and in all, in bytes.
const UNDECIDED_BYTES: u64 = 16 * 1024;
const UNDECIDED_BYTES_TOTAL: u64 = 4 << 20;
/// The next address is tried when the one before has not answered for this long (RFC 8305).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

/// What the system may hold of packets for the one socket of a node. Rows of several workers come at the same moment; what
/// does not fit is lost, and a lost tail is noticed after some 30 ms.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Why no endpoint came to be.
#[derive(Debug, Error)]
pub enum BindError {
    #[error("{address}: {source}")]
    Socket { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Limits(#[from] LimitsError),
}

/// Why no link came to be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectError {
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Each address that was tried, and what happened there.
    #[error("{}", .0.iter().map(Attempt::to_string).collect::<Vec<_>>().join("; "))]
    Failed(Vec<Attempt>),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("this node is shutting down")]
    LocalShutdown,
}

impl ConnectError {
    /// The foreign key that somebody showed at one of the peer's addresses.
    pub fn wrong_key(&self) -> Option<NodeKey> {
        let ConnectError::Failed(attempts) = self else { return None };
        attempts.iter().find_map(|attempt| match &attempt.error {
            AttemptError::WrongKey { presented, .. } => Some(*presented),
            AttemptError::Refused | AttemptError::TimedOut { .. } | AttemptError::Link(_) | AttemptError::Local(_) => {
                None
            }
        })
    }
}

/// One address that was tried in vain.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{address}: {error}")]
pub struct Attempt {
    pub address: SocketAddr,
    pub error: AttemptError,
}

/// Why one address gave no link.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AttemptError {
    /// Somebody else answers there; no frame was sent. Shown is not proved: do not blame `presented` for it.
    #[error("expected node {expected}, found {presented}")]
    WrongKey { expected: NodeKey, presented: NodeKey },
    /// The node takes no more connections now.
    #[error("refused: the node is full")]
    Refused,
    #[error("no answer within {after:?}")]
    TimedOut { after: Duration },
    #[error(transparent)]
    Link(LinkError),
    /// We could not even send.
    #[error("{0}")]
    Local(String),
}

/// A socket with its links. Clones are handles to the same one; when the last is dropped, or the token given to it is
/// cancelled, its links are closed with [`Code::SHUTTING_DOWN`].
#[derive(Debug, Clone)]
pub struct QuicEndpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    quinn: quinn::Endpoint,
    limits: Limits,
    admission: Arc<Admission>,
    links: Mutex<mpsc::Receiver<Link>>,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
}

impl QuicEndpoint {
    /// An endpoint that accepts, proving `key`, and connects. Must be called inside a tokio runtime.
    pub fn bind(
        address: SocketAddr,
        key: SigningKey,
        limits: Limits,
        shutdown: &CancellationToken,
    ) -> Result<QuicEndpoint, BindError> {
        let tls = identity::server_tls(key)?;
        QuicEndpoint::on_udp(address, Some(tls), limits, shutdown)
    }

    /// An endpoint that only connects.
    pub fn bind_client(
        address: SocketAddr,
        limits: Limits,
        shutdown: &CancellationToken,
    ) -> Result<QuicEndpoint, BindError> {
        QuicEndpoint::on_udp(address, None, limits, shutdown)
    }

    fn on_udp(
        address: SocketAddr,
        tls: Option<QuicServerConfig>,
        limits: Limits,
        shutdown: &CancellationToken,
    ) -> Result<QuicEndpoint, BindError> {
        limits.check()?;
        let server = tls.map(|tls| server_config(tls, &limits));
        let quinn = UdpSocket::bind(address)
            .inspect(roomy)
            .and_then(|socket| quinn::Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime)))
            .map_err(|source| BindError::Socket { address, source })?;
        Ok(QuicEndpoint::start(quinn, limits, shutdown))
    }

    pub(crate) fn start(quinn: quinn::Endpoint, limits: Limits, shutdown: &CancellationToken) -> QuicEndpoint {
        let stop = shutdown.child_token();
        let admission = Admission::new(&limits);
        let (sender, links) = mpsc::channel(ACCEPT_QUEUE);
        tokio::spawn(accept_loop(quinn.clone(), limits.clone(), admission.clone(), sender, stop.clone()));
        let links = Mutex::new(links);
        let _stop_on_drop = stop.clone().drop_guard();
        QuicEndpoint { shared: Arc::new(Shared { quinn, limits, admission, links, stop, _stop_on_drop }) }
    }

    /// The address of the socket: the port that the system chose, if it was asked to.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.quinn.local_addr()
    }

    /// Accepted connections now, handshakes in progress included.
    pub fn accepted_connections(&self) -> usize {
        self.shared.admission.connections()
    }

    /// The next peer that proved its key; `None` once the endpoint is shut down.
    pub async fn accept(&self) -> Option<Link> {
        self.shared.links.lock().await.recv().await
    }

    /// Connects to the node `expected`, wherever its hints lead first, and proves `session_key` to it.
    ///
    /// Addresses are tried in order, the next one whenever the one before fails or stays silent for 250 ms; the first
    /// that proves the key wins. Nothing is sent to a node that shows another key.
    pub async fn connect(
        &self,
        hints: &[AddressHint],
        expected: NodeKey,
        session_key: &SigningKey,
    ) -> Result<Link, ConnectError> {
        let shared = &self.shared;
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => Err(ConnectError::LocalShutdown),
            link = self.race(hints, expected, session_key) => link,
        }
    }

    async fn race(&self, hints: &[AddressHint], expected: NodeKey, key: &SigningKey) -> Result<Link, ConnectError> {
        let ipv6 = self.local_addr().is_ok_and(|address| address.is_ipv6());
        let mut addresses = resolve(hints, self.shared.limits.reach, ipv6).await?.into_iter();
        let mut attempts = JoinSet::new();
        let mut failed = Vec::new();
        loop {
            if let Some(address) = addresses.next() {
                let pin = Pin::new(expected);
                let tls = identity::client_tls(key.clone(), pin.clone())?;
                let (quinn, limits) = (self.shared.quinn.clone(), self.shared.limits.clone());
                attempts.spawn(async move {
                    attempt(quinn, address, tls, &pin, expected, limits)
                        .await
                        .map_err(|error| Attempt { address, error })
                });
            }
            tokio::select! {
                biased;
                Some(done) = attempts.join_next() => match done {
                    Ok(Ok(link)) => return Ok(link),
                    Ok(Err(attempt)) => failed.push(attempt),
                    // Aborted only with the runtime itself.
                    Err(_) => return Err(ConnectError::LocalShutdown),
                },
                () = sleep(NEXT_ADDRESS_AFTER), if addresses.len() > 0 => {}
                else => return Err(ConnectError::Failed(failed)),
            }
        }
    }

    /// Closes every link with this code and reason, accepts no more, and waits (2 s at most) until peers were told.
    pub async fn shutdown(&self, code: Code, reason: &str) {
        let shared = &self.shared;
        shared.quinn.close(code.to_quic(), cut(reason).as_bytes());
        shared.stop.cancel();
        if timeout(shared.limits.drain_wait, shared.quinn.wait_idle()).await.is_err() {
            debug!("some peers did not confirm the end of their links");
        }
    }
}

pub(crate) fn server_config(tls: QuicServerConfig, limits: &Limits) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config
        .transport_config(limits.transport(limits.streams))
        .max_incoming(limits.handshakes)
        .incoming_buffer_size(UNDECIDED_BYTES)
        .incoming_buffer_size_total(UNDECIDED_BYTES_TOTAL);
    // Tokens for later visits would only help 0-RTT, which is off.
    config.validation_token.sent(0);
    config
}

async fn attempt(
    quinn: quinn::Endpoint,
    address: SocketAddr,
    tls: quinn::crypto::rustls::QuicClientConfig,
    pin: &Pin,
    expected: NodeKey,
    limits: Limits,
) -> Result<Link, AttemptError> {
    let mut config = ClientConfig::new(Arc::new(tls));
    // A provider opens nothing on a link that a consumer made.
    config.transport_config(limits.transport(0));
    let connecting =
        quinn.connect_with(config, address, SERVER_NAME).map_err(|error| AttemptError::Local(error.to_string()))?;
    let (begin, wait) = (Instant::now(), limits.handshake);
    match timeout(wait, connecting).await {
        Ok(Ok(connection)) => Ok(Link::connected(connection, expected, limits)),
        Ok(Err(error)) => Err(match (pin.mismatch(), &error) {
            (Some(presented), _) => AttemptError::WrongKey { expected, presented },
            (None, ConnectionError::ConnectionClosed(close))
                if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
            {
                AttemptError::Refused
            }
            // QUIC itself gives up on a silent address after about 3 s.
            (None, ConnectionError::TimedOut) => AttemptError::TimedOut { after: begin.elapsed() },
            (None, _) => AttemptError::Link(LinkError::from_connection(&error, limits.idle)),
        }),
        Err(_) => Err(AttemptError::TimedOut { after: wait }),
    }
}

/// Asks for larger buffers than the system's usual ones; it gives what its own limit (`net.core.rmem_max`) allows.
fn roomy(socket: &UdpSocket) {
    let socket = socket2::SockRef::from(socket);
    for asked in [socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES), socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)] {
        if let Err(error) = asked {
            debug!(%error, "the socket's buffers stay as they are");
        }
    }
}

async fn accept_loop(
    quinn: quinn::Endpoint,
    limits: Limits,
    admission: Arc<Admission>,
    links: mpsc::Sender<Link>,
    stop: CancellationToken,
) {
    loop {
        let incoming = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            incoming = quinn.accept() => match incoming {
                Some(incoming) => incoming,
                None => break,
            },
        };
        match admission.admit(incoming.remote_address().ip(), incoming.remote_address_validated()) {
            Decision::Accept(permit) => {
                tokio::spawn(handshake(incoming, permit, limits.clone(), links.clone()));
            }
            // An unproved address may always be asked to retry, says QUIC's own state machine.
            Decision::Retry => drop(incoming.retry()),
            Decision::Refuse => incoming.refuse(),
        }
    }
    // The first close of an endpoint counts: an explicit shutdown has told its own reason already.
    quinn.close(Code::SHUTTING_DOWN.to_quic(), b"the node is shutting down");
}

async fn handshake(incoming: Incoming, mut permit: Permit, limits: Limits, links: mpsc::Sender<Link>) {
    let remote = incoming.remote_address();
    let connection = match timeout(limits.handshake, async { incoming.accept()?.await }).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return debug!(%remote, %error, "handshake failed"),
        Err(_) => return debug!(%remote, "handshake not finished in time"),
    };
    permit.handshake_over();
    let proved =
        connection.peer_identity().and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    match proved.as_deref().and_then(|keys| keys.first()).and_then(|key| identity::parse_public_key(key)) {
        Some(peer) => {
            let link = Link::accepted(connection, peer, limits, permit);
            // Refused only when the endpoint is gone; dropping the link closes it.
            drop(links.send(link).await);
        }
        // TLS does not finish without a key that parses.
        None => connection.close(Code::INTERNAL.to_quic(), b"no key"),
    }
}
