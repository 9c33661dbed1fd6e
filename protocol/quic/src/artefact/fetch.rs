//! The consumer's side: a download that survives its link.

use super::{Answer, MAX_ARTEFACT_BYTES, MAX_HEAD_BYTES, RefusedBecause, Request};
use crate::limits::SLOWEST_BYTES_PER_S;
use crate::{Code, FrameStream, Link, LinkError, StreamKind};
use core::time::Duration;
use satgrid_types::Digest;
use satgrid_types::cbor::{self, CodecError};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio::time::timeout;

/// A whole download may last this long and one second more for each 64 KiB.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a download did not complete.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DownloadError {
    /// What came so far is kept.
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the provider refuses: {0}")]
    Refused(RefusedBecause),
    /// What came so far is kept.
    #[error("slower than {SLOWEST_BYTES_PER_S} bytes/s: {received} of {total} bytes in {after:?}")]
    TooSlow { received: u64, total: u64, after: Duration },
    /// The peer's fault.
    #[error("{total} bytes announced, the limit is {limit}")]
    TooLarge { total: u64, limit: u64 },
    /// The peer's fault.
    #[error("{announced} bytes announced, {received} came")]
    WrongLength { announced: u64, received: u64 },
    /// The peer's fault.
    #[error("the answer is not one: {0}")]
    Answer(CodecError),
    /// Somebody who sent a part of it lied. Everything is forgotten.
    #[error("the bytes hash to {got}, not to {expected}")]
    Corrupt { expected: Digest, got: Digest },
}

/// One wanted blob and what has come of it.
#[derive(Debug, Clone)]
pub struct Download {
    sha256: Digest,
    limit: u64,
    bytes: Vec<u8>,
    hasher: Sha256,
}

impl Download {
    /// `limit` in bytes; never more than [`MAX_ARTEFACT_BYTES`].
    pub fn new(sha256: Digest, limit: u64) -> Download {
        Download { sha256, limit: limit.min(MAX_ARTEFACT_BYTES), bytes: Vec::new(), hasher: Sha256::new() }
    }

    /// Goes on from bytes that an earlier process had saved.
    pub fn resume(sha256: Digest, limit: u64, bytes: Vec<u8>) -> Download {
        let hasher = Sha256::new_with_prefix(&bytes);
        Download { bytes, hasher, ..Download::new(sha256, limit) }
    }

    /// What has come so far; not verified before it is complete.
    pub fn received(&self) -> &[u8] {
        &self.bytes
    }

    /// Asks this peer for the rest and hands out the whole blob once its hash fits.
    ///
    /// After an error the download may be run again, on this link or on one to another provider.
    pub async fn run(&mut self, link: &Link) -> Result<Vec<u8>, DownloadError> {
        let mut stream = link.open(StreamKind::Artefact).await?;
        let (code, error) = match self.receive(&mut stream).await {
            Ok(()) => return Ok(std::mem::take(&mut self.bytes)),
            Err(error @ DownloadError::Corrupt { .. }) => (Code::DONE, error),
            Err(error @ (DownloadError::Link(_) | DownloadError::Refused(_))) => (Code::CANCELLED, error),
            Err(error @ DownloadError::TooSlow { .. }) => (Code::STALLED, error),
            Err(
                error @ (DownloadError::TooLarge { .. } | DownloadError::WrongLength { .. } | DownloadError::Answer(_)),
            ) => (Code::LIMIT, error),
        };
        stream.cancel(code);
        Err(error)
    }

    async fn receive(&mut self, stream: &mut FrameStream) -> Result<(), DownloadError> {
        let offset = self.bytes.len() as u64;
        stream.tx.send_frame(&Request { sha256: self.sha256, offset }).await?;
        stream.tx.finish().await?;
        let wait = PATIENCE;
        let head = timeout(wait, stream.rx.recv()).await;
        let head = head.map_err(|_| DownloadError::TooSlow { received: offset, total: 0, after: wait })??;
        let head = head.ok_or(DownloadError::WrongLength { announced: 0, received: 0 })?;
        let total = match cbor::decode_limited(&head, MAX_HEAD_BYTES).map_err(DownloadError::Answer)? {
            Answer::Sending(total) => total,
            Answer::Refused(why) => {
                if why == RefusedBecause::Offset {
                    self.forget();
                }
                return Err(DownloadError::Refused(why));
            }
        };
        if total > self.limit {
            return Err(DownloadError::TooLarge { total, limit: self.limit });
        }
        let after = PATIENCE + Duration::from_secs(total / SLOWEST_BYTES_PER_S as u64);
        match timeout(after, self.receive_bytes(stream, total)).await {
            Ok(received) => received?,
            Err(_) => return Err(DownloadError::TooSlow { received: self.bytes.len() as u64, total, after }),
        }
        let got = Digest(self.hasher.clone().finalize().into());
        if got != self.sha256 {
            self.forget();
            return Err(DownloadError::Corrupt { expected: self.sha256, got });
        }
        Ok(())
    }

    async fn receive_bytes(&mut self, stream: &mut FrameStream, total: u64) -> Result<(), DownloadError> {
        while let Some(piece) = stream.rx.recv().await? {
            let received = self.bytes.len() as u64 + piece.len() as u64;
            if received > total {
                return Err(DownloadError::WrongLength { announced: total, received });
            }
            self.hasher.update(&piece);
            self.bytes.extend_from_slice(&piece);
        }
        let received = self.bytes.len() as u64;
        if received == total { Ok(()) } else { Err(DownloadError::WrongLength { announced: total, received }) }
    }

    fn forget(&mut self) {
        *self = Download::new(self.sha256, self.limit);
    }
}
