//! Frames on one stream: a u32 big-endian length, then that many bytes.
//!
//! A length is checked before anything is allocated for it, and memory grows with what has arrived, not with what was
//! announced. There is no send queue here: [`FrameSender::send`] waits until QUIC takes the bytes, so a peer that does
//! not read stops us after one stream window. What QUIC has taken leaves at once; nothing is held back to fill packets.
//!
//! Receiving may be dropped half-way (`select!`): the next call goes on where it stopped.

use crate::limits::SMALL_FRAME_BYTES;
use crate::link::Shared;
use crate::{Code, LinkError, StreamKind, Violation, Waiting};
use bytes::{Buf, Bytes, BytesMut};
use minicbor::{Decode, Encode};
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use satgrid_types::cbor;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

const PREFIX_BYTES: usize = 4;

/// Both directions of one stream.
#[derive(Debug)]
pub struct FrameStream {
    pub kind: StreamKind,
    pub tx: FrameSender,
    pub rx: FrameReceiver,
}

impl FrameStream {
    /// Ends both directions at once; the peer sees the code.
    pub fn cancel(mut self, code: Code) {
        self.tx.cancel(code);
        self.rx.cancel(code);
    }
}

/// The sending half. Dropped before [`finish`](FrameSender::finish), it cancels the stream.
#[derive(Debug)]
pub struct FrameSender {
    stream: SendStream,
    shared: Arc<Shared>,
    /// The stream's kind, to go out with the first frame.
    opening: Option<u8>,
    /// Accepted by us and not yet by QUIC.
    pending: Bytes,
    ended: bool,
}

impl FrameSender {
    pub(crate) fn new(stream: SendStream, shared: Arc<Shared>, opening: Option<u8>) -> FrameSender {
        FrameSender { stream, shared, opening, pending: Bytes::new(), ended: false }
    }

    /// Sends one frame, waiting while the peer reads more slowly than we write.
    ///
    /// Dropped half-way it tears nothing: a frame that has begun goes out whole with the next call, one that still
    /// waits for its predecessor is not sent. Who must not wait, or must know which, uses a
    /// [`FrameQueue`](crate::FrameQueue).
    pub async fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        let limit = self.shared.core.limits.frame_bytes;
        let length = u32::try_from(frame.len()).ok().filter(|_| frame.len() <= limit);
        let Some(length) = length else { return Err(LinkError::OwnFrameTooLong { len: frame.len(), limit }) };
        self.write_pending().await?;
        let mut bytes = BytesMut::with_capacity(1 + PREFIX_BYTES + frame.len());
        bytes.extend(self.opening.take());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(frame);
        self.pending = bytes.freeze();
        self.write_pending().await
    }

    /// [`send`](FrameSender::send) for a value with one canonical encoding.
    pub async fn send_frame<F: Encode<()>>(&mut self, frame: &F) -> Result<(), LinkError> {
        self.send(&cbor::encode(frame)).await
    }

    /// Says that no more frames follow. Everything sent is still delivered as long as the link lives.
    pub async fn finish(&mut self) -> Result<(), LinkError> {
        if let Some(kind) = self.opening.take() {
            self.pending = Bytes::copy_from_slice(&[kind]);
        }
        self.write_pending().await?;
        self.ended = true;
        self.stream.finish().map_err(|_| LinkError::LocalShutdown)
    }

    /// After [`finish`](FrameSender::finish): waits until the peer's host has everything. Needed only before closing
    /// the link, which drops what is on its way. Fails if the peer does not read to the end.
    pub async fn delivered(&mut self) -> Result<(), LinkError> {
        let core = &self.shared.core;
        let wait = core.limits.frame_deadline(core.limits.send_window_bytes as usize);
        match timeout(wait, self.stream.stopped()).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(code))) => Err(LinkError::PeerCancelled { code: Code::from_quic(code) }),
            Ok(Err(quinn::StoppedError::ConnectionLost(error))) => Err(core.error(&error)),
            Ok(Err(quinn::StoppedError::ZeroRttRejected)) => Err(LinkError::Transport("0-RTT is off".into())),
            Err(_) => Err(LinkError::TimedOut { waiting: Waiting::Delivery, after: wait }),
        }
    }

    /// Gives up this direction: frames on their way may be lost, and the peer sees the code.
    pub fn cancel(&mut self, code: Code) {
        if !std::mem::replace(&mut self.ended, true) {
            // Fails only if the stream is over already.
            let _ = self.stream.reset(code.to_quic());
        }
    }

    #[cfg(test)]
    pub(crate) async fn write_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }
    #[cfg(test)]
    pub(crate) fn set_opening(&mut self, byte: u8) {
        self.opening = Some(byte);
    }
    pub(crate) fn longest(&self) -> usize {
        self.shared.core.limits.frame_bytes
    }

    async fn write_pending(&mut self) -> Result<(), LinkError> {
        while !self.pending.is_empty() {
            match self.stream.write(&self.pending).await {
                Ok(taken) => self.pending.advance(taken),
                Err(WriteError::ConnectionLost(error)) => return Err(self.shared.core.error(&error)),
                Err(WriteError::Stopped(code)) => {
                    return Err(LinkError::PeerCancelled { code: Code::from_quic(code) });
                }
                Err(WriteError::ClosedStream) => return Err(LinkError::LocalShutdown),
                Err(WriteError::ZeroRttRejected) => return Err(LinkError::Transport("0-RTT is off".into())),
            }
        }
        Ok(())
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        // QUIC would take a dropped stream for a finished one.
        self.cancel(Code::CANCELLED);
    }
}

/// The receiving half. Dropped before the end of the stream, it tells the peer to stop.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: RecvStream,
    shared: Arc<Shared>,
    partial: Partial,
    ended: bool,
}

/// What has arrived of the current frame.
#[derive(Debug, Default)]
struct Partial {
    prefix: [u8; PREFIX_BYTES],
    prefix_len: usize,
    body: Vec<u8>,
    began: Option<Instant>,
    /// Its share of the link's room for large frames.
    room: Option<OwnedSemaphorePermit>,
}

impl Partial {
    /// The frame's length, once it is known.
    fn expected(&self) -> Option<usize> {
        (self.prefix_len == PREFIX_BYTES).then(|| u32::from_be_bytes(self.prefix) as usize)
    }
    fn waiting(&self) -> Waiting {
        let (received, expected) = (self.prefix_len + self.body.len(), PREFIX_BYTES + self.expected().unwrap_or(0));
        Waiting::Frame { received, expected }
    }
}

impl FrameReceiver {
    pub(crate) fn new(stream: RecvStream, shared: Arc<Shared>) -> FrameReceiver {
        FrameReceiver { stream, shared, partial: Partial::default(), ended: false }
    }

    /// The next frame, or `None` at the peer's end of the stream.
    ///
    /// A frame that is empty, over the limit or cut short closes the connection (`PeerViolated`). Between frames it
    /// waits as long as the link lives; a frame that has begun must be whole in time, or the stream is cancelled
    /// (`TimedOut`).
    pub async fn recv(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        loop {
            if let Some(frame) = self.complete()? {
                return Ok(Some(frame));
            }
            let deadline = self.deadline();
            let step = match deadline {
                Some((at, after)) => match timeout_at(at, self.step()).await {
                    Ok(step) => step,
                    Err(_) => {
                        let waiting = self.partial.waiting();
                        self.cancel(Code::STALLED);
                        return Err(LinkError::TimedOut { waiting, after });
                    }
                },
                None => self.step().await,
            };
            if !step? {
                self.ended = true;
                if self.partial.prefix_len == 0 {
                    return Ok(None);
                }
                let expected = PREFIX_BYTES + self.partial.expected().unwrap_or(0);
                let received = self.partial.prefix_len + self.partial.body.len();
                return Err(self.shared.core.violated(Violation::TruncatedFrame { received, expected }));
            }
        }
    }

    /// [`recv`](FrameReceiver::recv) for a value with one canonical encoding; any other bytes close the connection.
    pub async fn recv_frame<F>(&mut self) -> Result<Option<F>, LinkError>
    where
        F: Encode<()> + for<'b> Decode<'b, ()>,
    {
        let Some(bytes) = self.recv().await? else { return Ok(None) };
        match cbor::decode(&bytes) {
            Ok(frame) => Ok(Some(frame)),
            Err(error) => Err(self.shared.core.violated(Violation::Frame(error))),
        }
    }

    /// Closes the whole connection because of what came on this stream, and tells the peer why.
    pub fn violated(&self, violation: Violation) -> LinkError {
        self.shared.core.violated(violation)
    }

    /// Tells the peer to stop sending; it sees the code.
    pub fn cancel(&mut self, code: Code) {
        if !std::mem::replace(&mut self.ended, true) {
            // Fails only if the stream is over already.
            let _ = self.stream.stop(code.to_quic());
        }
    }

    /// Takes the frame out if all of it is here; refuses a bad length as soon as it is known.
    fn complete(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        let Some(expected) = self.partial.expected() else { return Ok(None) };
        let limit = self.shared.core.limits.frame_bytes;
        if expected > limit {
            return Err(self.shared.core.violated(Violation::FrameTooLong { len: expected, limit }));
        }
        if expected == 0 {
            return Err(self.shared.core.violated(Violation::EmptyFrame));
        }
        Ok((self.partial.body.len() == expected).then(|| std::mem::take(&mut self.partial).body))
    }

    fn deadline(&self) -> Option<(Instant, core::time::Duration)> {
        let allowed = self.shared.core.limits.frame_deadline(self.partial.expected().unwrap_or(0));
        self.partial.began.map(|began| (began + allowed, allowed))
    }

    /// Reads some bytes; false at the end of the stream.
    async fn step(&mut self) -> Result<bool, LinkError> {
        let partial = &mut self.partial;
        let read = match partial.expected() {
            None => {
                let read = self.stream.read(&mut partial.prefix[partial.prefix_len..]).await;
                read.map(|count| count.inspect(|count| partial.prefix_len += count).is_some())
            }
            Some(expected) => {
                if expected > SMALL_FRAME_BYTES && partial.room.is_none() {
                    let room = self.shared.core.large_frames.clone();
                    let share = u32::try_from(expected).unwrap_or(u32::MAX);
                    // The semaphore is never closed, and its room holds at least one frame of any legal length.
                    partial.room = room.acquire_many_owned(share).await.ok();
                }
                let chunk = self.stream.read_chunk(expected - partial.body.len(), true).await;
                chunk.map(|chunk| chunk.inspect(|chunk| partial.body.extend_from_slice(&chunk.bytes)).is_some())
            }
        };
        if partial.prefix_len > 0 && partial.began.is_none() {
            partial.began = Some(Instant::now());
        }
        read.map_err(|error| match error {
            ReadError::ConnectionLost(error) => self.shared.core.error(&error),
            ReadError::Reset(code) => {
                self.ended = true;
                LinkError::PeerCancelled { code: Code::from_quic(code) }
            }
            ReadError::ClosedStream => LinkError::LocalShutdown,
            ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => LinkError::Transport(error.to_string()),
        })
    }
}

impl Drop for FrameReceiver {
    fn drop(&mut self) {
        self.cancel(Code::CANCELLED);
    }
}
