//! A bounded queue before a stream, for callers that must not wait: a role's driver handling its next event.
//!
//! Full is an answer, not a wait: what it means (pause the work, drop the peer) is the caller's decision.

use crate::{Code, FrameSender, LinkError};
use std::sync::Arc;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

/// Why a frame was not queued.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum QueueError {
    /// The peer reads more slowly than we write.
    #[error("the queue is full")]
    Full,
    /// The stream is over; the queue's task says why.
    #[error("the stream is over")]
    Closed,
}

/// A handle to the queue; clones feed the same stream. When the last one is gone without
/// [`finish`](FrameQueue::finish), the stream is cancelled after what is queued.
#[derive(Debug, Clone)]
pub struct FrameQueue {
    items: mpsc::Sender<Item>,
    room: Arc<Semaphore>,
}

#[derive(Debug)]
enum Item {
    Frame(Vec<u8>, OwnedSemaphorePermit),
    Finish,
}

impl FrameSender {
    /// Moves the stream behind a queue of at most `frames` frames and `bytes` bytes (at least one longest frame).
    ///
    /// The task ends when the stream does: `Ok` after everything was delivered, else with the reason.
    pub fn into_queue(self, frames: usize, bytes: usize) -> (FrameQueue, JoinHandle<Result<(), LinkError>>) {
        let (sender, items) = mpsc::channel(frames.max(1));
        let room = Arc::new(Semaphore::new(bytes.max(self.longest()).min(u32::MAX as usize)));
        (FrameQueue { items: sender, room }, tokio::spawn(drain(self, items)))
    }
}

impl FrameQueue {
    /// Queues a frame if there is room now.
    pub fn try_send(&self, frame: Vec<u8>) -> Result<(), QueueError> {
        let size = u32::try_from(frame.len()).map_err(|_| QueueError::Full)?;
        let room = self.room.clone().try_acquire_many_owned(size).map_err(|_| self.full_or_closed())?;
        self.items.try_send(Item::Frame(frame, room)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => QueueError::Full,
            mpsc::error::TrySendError::Closed(_) => QueueError::Closed,
        })
    }

    /// Ends the stream after what is queued; waits for a place in the queue.
    pub async fn finish(self) -> Result<(), QueueError> {
        self.items.send(Item::Finish).await.map_err(|_| QueueError::Closed)
    }

    fn full_or_closed(&self) -> QueueError {
        if self.items.is_closed() { QueueError::Closed } else { QueueError::Full }
    }
}

async fn drain(mut stream: FrameSender, mut items: mpsc::Receiver<Item>) -> Result<(), LinkError> {
    while let Some(item) = items.recv().await {
        match item {
            Item::Frame(frame, room) => {
                stream.send(&frame).await?;
                drop(room);
            }
            Item::Finish => {
                stream.finish().await?;
                return stream.delivered().await;
            }
        }
    }
    stream.cancel(Code::CANCELLED);
    Err(LinkError::LocalShutdown)
}
