//! The provider's side: free, and therefore bounded.

use super::{Answer, MAX_ARTEFACT_BYTES, MAX_HEAD_BYTES, PIECE_BYTES, RefusedBecause, Request};
use crate::{Code, FrameStream, LinkError, Violation, Waiting};
use bytes::Bytes;
use core::time::Duration;
use satgrid_types::{Digest, cbor};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

/// A pause in a download does not add up to more credit than this.
const BURST: Duration = Duration::from_millis(100);
/// The peer must ask and read; a whole download may last this long and one second more for each 64 KiB.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the blobs are. Looking one up must not block.
pub trait Artefacts: Send + Sync + 'static {
    /// The blob with this SHA-256, if it is offered.
    fn artefact(&self, sha256: &Digest) -> Option<Bytes>;
}

/// What is given away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeLimits {
    /// Downloads at one time, over all connections.
    pub downloads: usize,
    /// Downloads at one time on one connection.
    pub downloads_per_connection: usize,
    /// Bytes that one connection ever gets.
    pub bytes_per_connection: u64,
    /// One download's rate.
    pub bytes_per_s: u64,
    /// All downloads' rate together.
    pub total_bytes_per_s: u64,
}

impl Default for ServeLimits {
    fn default() -> ServeLimits {
        ServeLimits {
            downloads: 8,
            downloads_per_connection: 2,
            bytes_per_connection: 2 * MAX_ARTEFACT_BYTES,
            bytes_per_s: 16 << 20,
            total_bytes_per_s: 64 << 20,
        }
    }
}

/// What became of one download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    Sent { sha256: Digest, bytes: u64 },
    Refused { sha256: Digest, why: RefusedBecause },
}

/// What came of a request.
pub enum Asked {
    Granted(Grant),
    /// Nothing is sent; the peer was told why.
    Refused(Served),
}

/// A download that may begin, with its places among those at one time.
pub struct Grant {
    request: Request,
    blob: Bytes,
    _places: Places,
}

/// Serves blobs to all connections of a node.
#[derive(Clone)]
pub struct ArtefactServer {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn Artefacts>,
    limits: ServeLimits,
    downloads: Arc<Semaphore>,
    pace: Pace,
}

impl ArtefactServer {
    pub fn new(store: Arc<dyn Artefacts>, limits: ServeLimits) -> ArtefactServer {
        let downloads = Arc::new(Semaphore::new(limits.downloads));
        let pace = Pace::new(limits.total_bytes_per_s);
        ArtefactServer { shared: Arc::new(Shared { store, limits, downloads, pace }) }
    }

    /// One connection's account: make one per link, and use it for all of the link's downloads.
    pub fn connection(&self) -> ConnectionArtefacts {
        let limits = &self.shared.limits;
        ConnectionArtefacts {
            shared: self.shared.clone(),
            downloads: Arc::new(Semaphore::new(limits.downloads_per_connection)),
            left: Arc::new(Mutex::new(limits.bytes_per_connection)),
        }
    }
}

/// What one connection may still have. Clones share it.
#[derive(Clone)]
pub struct ConnectionArtefacts {
    shared: Arc<Shared>,
    downloads: Arc<Semaphore>,
    left: Arc<Mutex<u64>>,
}

impl ConnectionArtefacts {
    /// Answers one stream of kind [`StreamKind::Artefact`](crate::StreamKind::Artefact), to its end.
    pub async fn serve(&self, mut stream: FrameStream) -> Result<Served, LinkError> {
        match self.asked(&mut stream).await? {
            Asked::Granted(grant) => self.give(stream, grant).await,
            Asked::Refused(refused) => Ok(refused),
        }
    }

    /// Waits for the request. What is not granted is answered here.
    pub async fn asked(&self, stream: &mut FrameStream) -> Result<Asked, LinkError> {
        let request = match timeout(PATIENCE, stream.rx.recv()).await {
            Ok(request) => request?,
            Err(_) => {
                stream.tx.cancel(Code::STALLED);
                stream.rx.cancel(Code::STALLED);
                return Err(LinkError::TimedOut { waiting: Waiting::Request, after: PATIENCE });
            }
        };
        let Some(request) = request else { return Err(LinkError::PeerCancelled { code: Code::DONE }) };
        let request: Request = match cbor::decode_limited(&request, MAX_HEAD_BYTES) {
            Ok(request) => request,
            Err(error) => return Err(stream.rx.violated(Violation::Frame(error))),
        };
        match self.grant(&request) {
            Ok((blob, places)) => Ok(Asked::Granted(Grant { request, blob, _places: places })),
            Err(why) => {
                stream.tx.send_frame(&Answer::Refused(why)).await?;
                stream.tx.finish().await?;
                Ok(Asked::Refused(Served::Refused { sha256: request.sha256, why }))
            }
        }
    }

    /// Sends what was granted.
    pub async fn give(&self, mut stream: FrameStream, grant: Grant) -> Result<Served, LinkError> {
        let Grant { request, blob, _places } = grant;
        let bytes = blob.len() as u64 - request.offset;
        let allowed = PATIENCE + Duration::from_secs(bytes / crate::limits::SLOWEST_BYTES_PER_S as u64);
        match timeout(allowed, self.send(&mut stream, blob, request.offset)).await {
            Ok(sent) => sent?,
            Err(_) => {
                stream.cancel(Code::STALLED);
                return Err(LinkError::TimedOut { waiting: Waiting::Reader, after: allowed });
            }
        }
        Ok(Served::Sent { sha256: request.sha256, bytes })
    }

    /// Takes the places and the bytes that the download needs.
    fn grant(&self, request: &Request) -> Result<(Bytes, Places), RefusedBecause> {
        let blob = self.shared.store.artefact(&request.sha256).filter(|blob| blob.len() as u64 <= MAX_ARTEFACT_BYTES);
        let blob = blob.ok_or(RefusedBecause::Unknown)?;
        let wanted = (blob.len() as u64).checked_sub(request.offset).ok_or(RefusedBecause::Offset)?;
        let here = self.downloads.clone().try_acquire_owned().map_err(|_| RefusedBecause::Busy)?;
        let everywhere = self.shared.downloads.clone().try_acquire_owned().map_err(|_| RefusedBecause::Busy)?;
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = left.checked_sub(wanted).ok_or(RefusedBecause::Spent)?;
        Ok((blob, [here, everywhere]))
    }

    async fn send(&self, stream: &mut FrameStream, blob: Bytes, offset: u64) -> Result<(), LinkError> {
        stream.tx.send_frame(&Answer::Sending(blob.len() as u64)).await?;
        let pace = Pace::new(self.shared.limits.bytes_per_s);
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(blob.len());
        for piece in blob[start..].chunks(PIECE_BYTES) {
            let now = Instant::now();
            sleep_until(pace.reserve(piece.len(), now).max(self.shared.pace.reserve(piece.len(), now))).await;
            stream.tx.send(piece).await?;
        }
        stream.tx.finish().await
    }
}

/// Places among the downloads at one time; given back when dropped.
type Places = [OwnedSemaphorePermit; 2];

/// Spreads bytes over time.
struct Pace {
    bytes_per_s: u64,
    free_from: Mutex<Instant>,
}

impl Pace {
    fn new(bytes_per_s: u64) -> Pace {
        Pace { bytes_per_s: bytes_per_s.max(1), free_from: Mutex::new(Instant::now()) }
    }

    /// When these bytes may go.
    fn reserve(&self, bytes: usize, now: Instant) -> Instant {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let mut free_from = self.free_from.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*free_from).max(now.checked_sub(BURST).unwrap_or(now));
        *free_from = at + cost;
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_and_silence_saves_up_little() {
        let pace = Pace::new(1000);
        let begin = Instant::now() + Duration::from_secs(1);
        let mut now = begin;
        for _ in 0..5 {
            now = now.max(pace.reserve(1000, now));
        }
        assert_eq!(now - begin, Duration::from_millis(3900), "the first goes at once, then one a second");
        let later = now + Duration::from_secs(60);
        now = later;
        for _ in 0..3 {
            now = now.max(pace.reserve(1000, now));
        }
        assert_eq!(now - later, Duration::from_millis(1900));
    }
}
