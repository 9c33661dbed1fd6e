//! One connection to a peer whose key is proved.
//!
//! | state | what it awaits | a crash of either side there means |
//! |---|---|---|
//! | open | streams, or any packet at least every `idle` | the other notices within 2 s: `TimedOut` |
//! | closed by the peer | nothing; every operation says `PeerClosed` with code and reason | nothing |
//! | closed for a violation | nothing; every operation says `PeerViolated` | nothing |
//! | closed by us | nothing; every operation says `LocalShutdown` | the peer may miss the reason and time out |
//!
//! A link never reopens. Dropping the last handle (a [`Link`], or a stream of it) closes it with [`Code::DONE`].

use crate::admission::Permit;
use crate::stream::{FrameReceiver, FrameSender, FrameStream};
use crate::{Code, Limits, LinkError, Violation, Waiting};
use core::time::Duration;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use satgrid_types::NodeKey;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

/// What a stream is for: its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StreamKind {
    /// The session itself: at most one per connection.
    Control = 0,
    /// One request.
    Request = 1,
    /// One download of a blob by its hash.
    Artefact = 2,
    /// Hidden rows from one node of a ring to the next.
    Hop = 3,
}

impl StreamKind {
    fn from_byte(byte: u8) -> Option<StreamKind> {
        match byte {
            0 => Some(StreamKind::Control),
            1 => Some(StreamKind::Request),
            2 => Some(StreamKind::Artefact),
            3 => Some(StreamKind::Hop),
            _ => None,
        }
    }
    /// Acks and invoices go before tokens, tokens before downloads.
    fn priority(self) -> i32 {
        match self {
            StreamKind::Control => 1,
            StreamKind::Request | StreamKind::Hop => 0,
            StreamKind::Artefact => -1,
        }
    }
}

/// A measurement of the path to the peer. Keep-alives keep it fresh on a quiet link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathInfo {
    pub remote: SocketAddr,
    /// Smoothed round trip.
    pub rtt: Duration,
    pub min_rtt: Duration,
    pub sent_packets: u64,
    pub lost_packets: u64,
    /// How much may be in flight.
    pub congestion_window_bytes: u64,
    /// Largest UDP payload that fits the path.
    pub mtu_bytes: u16,
}

/// One connection. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Link {
    shared: Arc<Shared>,
}

/// Closes the connection when the last handle is gone.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) core: Arc<Core>,
    peer: NodeKey,
    /// Streams that the peer opened; none on the side that connected.
    incoming: Option<Mutex<mpsc::Receiver<Opened>>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.core.connection.close(Code::DONE.to_quic(), b"");
    }
}

/// What the link's tasks may hold without keeping it open.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) connection: Connection,
    pub(crate) limits: Limits,
    pub(crate) large_frames: Arc<Semaphore>,
    violation: OnceLock<Violation>,
}

#[derive(Debug)]
struct Opened {
    kind: StreamKind,
    send: SendStream,
    receive: RecvStream,
}

impl Core {
    fn new(connection: Connection, limits: Limits) -> Arc<Core> {
        let large_frames = Arc::new(Semaphore::new(limits.large_frame_bytes.min(u32::MAX as usize)));
        Arc::new(Core { connection, limits, large_frames, violation: OnceLock::new() })
    }

    pub(crate) fn error(&self, error: &ConnectionError) -> LinkError {
        match (LinkError::from_connection(error, self.limits.idle), self.violation.get()) {
            (LinkError::LocalShutdown, Some(violation)) => LinkError::PeerViolated(violation.clone()),
            (error, _) => error,
        }
    }

    /// Closes the connection and tells the peer why.
    pub(crate) fn violated(&self, violation: Violation) -> LinkError {
        let violation = self.violation.get_or_init(|| violation).clone();
        self.connection.close(violation.code().to_quic(), violation.to_string().as_bytes());
        LinkError::PeerViolated(violation)
    }
}

impl Link {
    /// The side that connected.
    pub(crate) fn connected(connection: Connection, peer: NodeKey, limits: Limits) -> Link {
        let core = Core::new(connection, limits);
        Link { shared: Arc::new(Shared { core, peer, incoming: None }) }
    }

    /// The side that accepted; the permit is held until the connection is over.
    pub(crate) fn accepted(connection: Connection, peer: NodeKey, limits: Limits, permit: Permit) -> Link {
        let (streams, incoming) = mpsc::channel(limits.streams as usize);
        let core = Core::new(connection, limits);
        let task_core = core.clone();
        tokio::spawn(async move {
            let error = accept_streams(&task_core, streams).await;
            debug!(peer = %peer.short(), %error, "link over");
            drop(permit);
        });
        Link { shared: Arc::new(Shared { core, peer, incoming: Some(Mutex::new(incoming)) }) }
    }

    /// The key that the peer proved.
    pub fn peer(&self) -> NodeKey {
        self.shared.peer
    }
    /// Where the peer's packets come from now; a peer behind a NAT may move.
    pub fn remote(&self) -> SocketAddr {
        let address = self.shared.core.connection.remote_address();
        // A dual-stack socket shows IPv4 peers in IPv6 clothes.
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }
    /// Tells links of one endpoint apart in logs and maps.
    pub fn id(&self) -> usize {
        self.shared.core.connection.stable_id()
    }
    pub fn limits(&self) -> &Limits {
        &self.shared.core.limits
    }

    pub fn path(&self) -> PathInfo {
        let connection = &self.shared.core.connection;
        let path = connection.stats().path;
        PathInfo {
            remote: self.remote(),
            rtt: path.rtt,
            min_rtt: path.min_rtt,
            sent_packets: path.sent_packets,
            lost_packets: path.lost_packets,
            congestion_window_bytes: path.cwnd,
            mtu_bytes: path.current_mtu,
        }
    }

    /// Opens a stream; only the side that connected may. Waits while the peer's limit of open streams is reached.
    ///
    /// The peer learns of the stream with the first frame.
    pub async fn open(&self, kind: StreamKind) -> Result<FrameStream, LinkError> {
        let core = &self.shared.core;
        let wait = core.limits.stream_wait;
        let (send, receive) = match timeout(wait, core.connection.open_bi()).await {
            Ok(opened) => opened.map_err(|error| core.error(&error))?,
            Err(_) => return Err(LinkError::TimedOut { waiting: Waiting::StreamSlot, after: wait }),
        };
        Ok(self.wrap(Opened { kind, send, receive }, true))
    }

    /// The next stream that the peer opened. On the side that connected it only ever reports the end of the link.
    pub async fn accept(&self) -> Result<FrameStream, LinkError> {
        if let Some(incoming) = &self.shared.incoming {
            let mut incoming = incoming.lock().await;
            if let Some(opened) = incoming.recv().await {
                return Ok(self.wrap(opened, false));
            }
        }
        Err(self.closed().await)
    }

    /// Waits for the end of the link and says why it ended.
    pub async fn closed(&self) -> LinkError {
        let core = &self.shared.core;
        core.error(&core.connection.closed().await)
    }

    /// Why the link is over; `None` while it lives.
    pub fn close_reason(&self) -> Option<LinkError> {
        let core = &self.shared.core;
        core.connection.close_reason().map(|error| core.error(&error))
    }

    /// Closes at once; the peer sees code and reason (cut to 256 bytes). What was sent and not confirmed may be lost:
    /// see [`FrameSender::delivered`].
    pub fn close(&self, code: Code, reason: &str) {
        self.shared.core.connection.close(code.to_quic(), cut(reason).as_bytes());
    }

    fn wrap(&self, Opened { kind, send, receive }: Opened, ours: bool) -> FrameStream {
        // Fails only on a stream that is already closed, which the first use will report.
        let _ = send.set_priority(kind.priority());
        let opening = ours.then_some(kind as u8);
        FrameStream {
            kind,
            tx: FrameSender::new(send, self.shared.clone(), opening),
            rx: FrameReceiver::new(receive, self.shared.clone()),
        }
    }
}

/// Sorts the peer's streams by kind until the connection ends. One that is slow to say its kind delays no other.
async fn accept_streams(core: &Arc<Core>, streams: mpsc::Sender<Opened>) -> LinkError {
    let mut unsorted = JoinSet::new();
    let mut control_seen = false;
    loop {
        tokio::select! {
            biased;
            accepted = core.connection.accept_bi() => match accepted {
                Ok((send, receive)) => {
                    unsorted.spawn(sort(send, receive, core.limits.frame_wait));
                }
                Err(error) => return core.error(&error),
            },
            Some(sorted) = unsorted.join_next() => {
                let Ok(Some(opened)) = sorted else { continue };
                if opened.kind == StreamKind::Control && std::mem::replace(&mut control_seen, true) {
                    return core.violated(Violation::SecondControlStream);
                }
                // There is a place for as many streams as the peer may have open; it waits here only if it cancels
                // them and opens new ones faster than they are accepted.
                let error = tokio::select! {
                    biased;
                    sent = streams.send(opened) => match sent {
                        Ok(()) => continue,
                        Err(_) => core.connection.closed().await,
                    },
                    error = core.connection.closed() => error,
                };
                return core.error(&error);
            }
        }
    }
}

async fn sort(mut send: SendStream, mut receive: RecvStream, wait: Duration) -> Option<Opened> {
    let mut first = [0u8];
    let refuse = match timeout(wait, receive.read_exact(&mut first)).await {
        Ok(Ok(())) => match StreamKind::from_byte(first[0]) {
            Some(kind) => return Some(Opened { kind, send, receive }),
            None => Code::UNKNOWN_KIND,
        },
        Ok(Err(_)) => Code::CANCELLED,
        Err(_) => Code::STALLED,
    };
    // Both fail only on streams that are closed already.
    let _ = send.reset(refuse.to_quic());
    let _ = receive.stop(refuse.to_quic());
    None
}

/// Longest reason text that we send, in bytes.
const MAX_REASON_BYTES: usize = 256;

pub(crate) fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_REASON_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
