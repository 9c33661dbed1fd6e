//! Hops: the streams on which hidden rows travel from one node straight to the next.
//!
//! What comes in is handed to whom its first ticket is for: the desk of an engine that holds a part, or the ring of an
//! engine that leads. What goes out is a connection of its own, under this node's key, kept while it is used.

use ed25519_dalek::SigningKey;
use satgrid_protocol::hop::{HopFrame, TicketFrame};
use satgrid_protocol_quic::{AddressHint, Code, FrameStream, Link, QuicEndpoint, StreamKind, hints};
use satgrid_types::{NodeKey, RequestId, SessionId};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// Frames that may wait on a hop in either direction; beyond, QUIC holds the sender back.
const QUEUE: usize = 64;
/// A ticket may come before the order that it is for has been written down.
const TICKET_WAIT: Duration = Duration::from_secs(5);
const TICKET_POLL: Duration = Duration::from_millis(5);

/// Names one incoming hop of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HopId(pub u64);

/// What a desk or a ring hears of hops.
pub(crate) enum HopEvent {
    /// The upstream node's stream begins; answers go where this leads.
    Begun {
        hop: HopId,
        upstream: NodeKey,
        back: mpsc::Sender<HopFrame>,
    },
    Frame {
        hop: HopId,
        frame: HopFrame,
    },
    Ended {
        hop: HopId,
    },
    /// From downstream, on a hop of ours: rows were refused there, or expert rows are back.
    Back {
        /// The lead that the hop works for: leads number their works each for itself.
        lead: NodeKey,
        from: NodeKey,
        frame: HopFrame,
    },
    /// A hop of ours is over, or never came to be.
    Lost {
        /// As of [`HopEvent::Back`]: what one lead says of a node's addresses may be wrong, and is nobody else's trouble.
        lead: NodeKey,
        to: NodeKey,
        reason: String,
    },
}

type Ear = mpsc::Sender<HopEvent>;

/// Who waits for the tickets of which request.
#[derive(Clone, Default)]
pub(crate) struct Switchboard(Arc<Mutex<(u64, Ears)>>);

/// Who hears the hops of a request of a session.
type Ears = BTreeMap<(SessionId, RequestId), Ear>;

impl Switchboard {
    pub(crate) fn expect(&self, session: SessionId, request: RequestId, ear: Ear) {
        self.with(|(_, ears)| ears.insert((session, request), ear));
    }
    pub(crate) fn forget(&self, session: SessionId, request: RequestId) {
        self.with(|(_, ears)| ears.remove(&(session, request)));
    }
    fn with<T>(&self, f: impl FnOnce(&mut (u64, BTreeMap<(SessionId, RequestId), Ear>)) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
    async fn ear(&self, frame: &TicketFrame) -> Option<Ear> {
        let ticket = frame.ticket.peek().ok()?;
        let key = (ticket.session, ticket.request);
        let deadline = tokio::time::Instant::now() + TICKET_WAIT;
        loop {
            if let Some(ear) = self.with(|(_, ears)| ears.get(&key).cloned()) {
                return Some(ear);
            }
            if tokio::time::Instant::now() >= deadline {
                return None;
            }
            tokio::time::sleep(TICKET_POLL).await;
        }
    }

    /// The first frame of a hop that an upstream node opened: a ticket for a request of this node, and who waits for it.
    pub(crate) async fn admit(&self, upstream: NodeKey, stream: &mut FrameStream) -> Option<Admitted> {
        let first = match stream.rx.recv().await {
            Ok(Some(bytes)) => HopFrame::decode(bytes),
            Ok(None) | Err(_) => return None,
        };
        let Ok(HopFrame::Ticket(ticket)) = first else {
            tracing::warn!(upstream = %upstream.short(), "a hop that does not begin with a ticket");
            stream.rx.cancel(Code::CANCELLED);
            return None;
        };
        let Some(ear) = self.ear(&ticket).await else {
            tracing::warn!(upstream = %upstream.short(), "a hop with a ticket for no request of this node");
            stream.rx.cancel(Code::CANCELLED);
            return None;
        };
        Some(Admitted { ticket, ear })
    }

    /// Serves a hop to its end.
    pub(crate) async fn serve(self, upstream: NodeKey, stream: FrameStream, admitted: Admitted) {
        let (FrameStream { mut tx, mut rx, .. }, Admitted { ticket, ear }) = (stream, admitted);
        let hop = HopId(self.with(|(next, _)| {
            *next += 1;
            *next
        }));
        let (back, mut answers) = mpsc::channel::<HopFrame>(QUEUE);
        tokio::spawn(async move {
            while let Some(frame) = answers.recv().await {
                if tx.send(&frame.encode()).await.is_err() {
                    return;
                }
            }
        });
        if ear.send(HopEvent::Begun { hop, upstream, back }).await.is_err() {
            return;
        }
        let mut frame = HopFrame::Ticket(ticket);
        loop {
            if ear.send(HopEvent::Frame { hop, frame }).await.is_err() {
                return;
            }
            frame = match rx.recv().await.map(|bytes| bytes.map(HopFrame::decode)) {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(fault))) => {
                    tracing::warn!(upstream = %upstream.short(), %fault, "a hop broke the rules");
                    rx.cancel(Code::CANCELLED);
                    break;
                }
                Ok(None) | Err(_) => break,
            };
        }
        let _ = ear.send(HopEvent::Ended { hop }).await;
    }
}

/// A hop's first ticket, and who hears of it.
pub(crate) struct Admitted {
    ticket: TicketFrame,
    ear: Ear,
}

/// A hop of ours to the next node. Dropped, it ends once everything is sent.
pub(crate) struct Outgoing {
    frames: mpsc::UnboundedSender<Queued>,
}

/// A frame, and its room among those that are sent again.
type Queued = (HopFrame, Option<OwnedSemaphorePermit>);

impl Outgoing {
    /// Connects in the background; frames wait meanwhile. What becomes of it is told to `ear`.
    pub(crate) fn start(
        endpoint: QuicEndpoint,
        key: Arc<SigningKey>,
        (lead, to): (NodeKey, NodeKey),
        addresses: &[String],
        ear: Ear,
    ) -> Outgoing {
        // Bounded by what was granted: a worker computes nothing beyond its window, a lead sends nothing beyond its batches.
        let (frames, queue) = mpsc::unbounded_channel();
        let hints = hints(addresses);
        tokio::spawn(async move {
            let reason = match run(endpoint, &key, (lead, to), &hints, queue, &ear).await {
                Ok(()) => return,
                Err(reason) => reason,
            };
            let _ = ear.send(HopEvent::Lost { lead, to, reason }).await;
        });
        Outgoing { frames }
    }

    pub(crate) fn send(&self, frame: HopFrame) {
        let _ = self.frames.send((frame, None));
    }

    /// Nothing is granted anew for what is sent again: it waits only where there is `room`, which it leaves once it is sent.
    pub(crate) fn send_again(&self, frame: HopFrame, room: OwnedSemaphorePermit) {
        let _ = self.frames.send((frame, Some(room)));
    }
}

async fn run(
    endpoint: QuicEndpoint,
    key: &SigningKey,
    (lead, to): (NodeKey, NodeKey),
    hints: &[AddressHint],
    mut queue: mpsc::UnboundedReceiver<Queued>,
    ear: &Ear,
) -> Result<(), String> {
    let link: Link = endpoint.connect(hints, to, key).await.map_err(|error| error.to_string())?;
    let FrameStream { mut tx, mut rx, .. } = link.open(StreamKind::Hop).await.map_err(|error| error.to_string())?;
    let back = ear.clone();
    let reader = tokio::spawn(async move {
        while let Ok(Some(bytes)) = rx.recv().await {
            let Ok(frame) = HopFrame::decode(bytes) else { return };
            if back.send(HopEvent::Back { lead, from: to, frame }).await.is_err() {
                return;
            }
        }
    });
    let outcome = loop {
        tokio::select! {
            frame = queue.recv() => match frame {
                Some((frame, _room)) => {
                    if let Err(error) = tx.send(&frame.encode()).await {
                        break Err(error.to_string());
                    }
                }
                None => {
                    let _ = tx.finish().await;
                    let _ = tx.delivered().await;
                    break Ok(());
                }
            },
            reason = link.closed() => break Err(reason.to_string()),
        }
    };
    reader.abort();
    let path = link.path();
    tracing::debug!(
        to = %to.short(), rtt_us = path.rtt.as_micros(), sent = path.sent_packets, lost = path.lost_packets,
        window = path.congestion_window_bytes, mtu = path.mtu_bytes, "a hop is over"
    );
    outcome
}
