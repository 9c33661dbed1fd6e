//! QUIC links as the roles see them: frames in as events, frames out through bounded queues.
//!
//! A peer that reads too slowly fills its queue; its link is then closed rather than held in memory.

use minicbor::{Decode, Encode};
use satgrid_node::{CloseCode, StreamId};
use satgrid_protocol_quic::{Code, FrameQueue, FrameReceiver, FrameSender, Link, LinkError};
use std::collections::BTreeMap;
use tokio::sync::mpsc;

/// Frames and bytes that may wait for a slow peer on one stream.
const QUEUE_FRAMES: usize = 4_096;
const QUEUE_BYTES: usize = 4 << 20;

/// The sending side of one link: its control stream and its request streams.
pub(crate) struct Outbound {
    link: Link,
    control: Option<FrameQueue>,
    streams: BTreeMap<StreamId, FrameQueue>,
}

impl Outbound {
    pub(crate) fn new(link: Link) -> Outbound {
        Outbound { link, control: None, streams: BTreeMap::new() }
    }
    pub(crate) fn link(&self) -> &Link {
        &self.link
    }
    pub(crate) fn set_control(&mut self, sender: FrameSender) {
        self.control = Some(queue(sender));
    }
    pub(crate) fn add_stream(&mut self, stream: StreamId, sender: FrameSender) {
        self.streams.insert(stream, queue(sender));
    }
    pub(crate) fn control<F: Encode<()>>(&self, frame: &F) {
        if let Some(queue) = &self.control {
            self.put(queue, frame);
        }
    }
    pub(crate) fn send<F: Encode<()>>(&self, stream: StreamId, frame: &F) {
        if let Some(queue) = self.streams.get(&stream) {
            self.put(queue, frame);
        }
    }
    /// No more frames on this stream; what is queued still goes out.
    pub(crate) fn finish(&mut self, stream: StreamId) {
        if let Some(queue) = self.streams.remove(&stream) {
            tokio::spawn(queue.finish());
        }
    }
    /// Drops the stream: its sender cancels it.
    pub(crate) fn forget(&mut self, stream: StreamId) {
        self.streams.remove(&stream);
    }
    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        // What was queued before the close (a refusal, say) gets a moment to leave.
        const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(20);
        let (link, reason) = (self.link.clone(), reason.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(LAST_WORDS).await;
            link.close(quic_code(code), &reason);
        });
    }

    fn put<F: Encode<()>>(&self, queue: &FrameQueue, frame: &F) {
        if queue.try_send(satgrid_protocol::frame::encode(frame)).is_err() {
            self.link.close(Code::STALLED, "frames are not read");
        }
    }
}

fn queue(sender: FrameSender) -> FrameQueue {
    let (queue, task) = sender.into_queue(QUEUE_FRAMES, QUEUE_BYTES);
    // How the stream ended is told by its receiving half and by the link.
    drop(task);
    queue
}

/// The roles' reasons start above the transport's own.
fn quic_code(code: CloseCode) -> Code {
    const ABOVE_TRANSPORT: u32 = 256;
    match code {
        CloseCode::Done => Code::DONE,
        CloseCode::Violation | CloseCode::Unavailable => Code::new(ABOVE_TRANSPORT + code.number()),
    }
}

/// Hands every frame on as a message, until the stream or the link ends or nobody listens.
pub(crate) async fn read<F, M>(
    receiver: &mut FrameReceiver,
    inbox: &mpsc::Sender<M>,
    message: impl Fn(F) -> M + Send,
) -> Result<(), LinkError>
where
    F: Encode<()> + for<'b> Decode<'b, ()> + Send,
    M: Send,
{
    while let Some(frame) = receiver.recv_frame::<F>().await? {
        if inbox.send(message(frame)).await.is_err() {
            break;
        }
    }
    Ok(())
}
