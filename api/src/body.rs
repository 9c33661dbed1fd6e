//! A request's body: its limits of size and time, the room that all bodies share, and what is done with the rest of one that was
//! answered early.
//!
//! Room is counted by what has come, not by who has begun to send: a thousand clients that send a byte a second hold as much
//! as a few that send megabytes, and keep nobody out.

use std::{
    ops::Deref,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    http::StatusCode,
};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::{runtime::Handle, sync::SemaphorePermit};

use crate::{error::ApiError, router::Edge, service::ServiceError};

/// The unit in which room is counted. No body holds less.
pub(crate) const PIECE_BYTES: usize = 16 << 10;
/// How long a client is told to wait when there is no room.
const BUSY_RETRY: Duration = Duration::from_secs(2);
/// What is read and thrown away of a body after its answer, and for how long: a client that only writes gets to its answer so,
/// where a connection that is closed under it breaks its pipe.
const DRAIN_BYTES: usize = 16 << 20;
const DRAIN_WAIT: Duration = Duration::from_secs(5);

/// A body that has come, and its room until it is dropped.
pub(crate) struct Held<'a> {
    bytes: Vec<u8>,
    _room: SemaphorePermit<'a>,
}

impl Deref for Held<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

pub(crate) const fn busy() -> ServiceError {
    ServiceError::Busy { retry_after: BUSY_RETRY }
}

pub(crate) async fn read(edge: &Edge, body: Body) -> Result<Held<'_>, ApiError> {
    // By its own claim: nothing of it is read.
    if body.size_hint().lower() > edge.config.max_body_bytes as u64 {
        return Err(too_large(edge));
    }
    match tokio::time::timeout(edge.config.body_wait, collect(edge, body)).await {
        Ok(held) => held,
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_timeout",
            format!("The body did not arrive within {} s.", edge.config.body_wait.as_secs()),
        )),
    }
}

async fn collect(edge: &Edge, mut body: Body) -> Result<Held<'_>, ApiError> {
    let mut room = edge.reading.try_acquire().map_err(|_| busy())?;
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let broken = |_| ApiError::new(StatusCode::BAD_REQUEST, "incomplete_body", "The body broke off.");
        // Trailers say nothing to us.
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        let length = bytes.len().saturating_add(data.len());
        if length > edge.config.max_body_bytes {
            return Err(too_large(edge));
        }
        let more = length.div_ceil(PIECE_BYTES).saturating_sub(room.num_permits());
        if more > 0 {
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            room.merge(edge.reading.try_acquire_many(more).map_err(|_| busy())?);
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Held { bytes, _room: room })
}

fn too_large(edge: &Edge) -> ApiError {
    let message = format!("The body is larger than {} bytes.", edge.config.max_body_bytes);
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// A body as it comes from its connection. Dropped before its end, what is left of it is thrown away for a while.
pub(crate) struct Lingering {
    inner: Option<Incoming>,
    /// It waits to be told to send its body (`Expect: 100-continue`); an answer tells it not to.
    waits: bool,
    ended: bool,
}

impl Lingering {
    pub(crate) const fn new(inner: Incoming, waits: bool) -> Lingering {
        Lingering { inner: Some(inner), waits, ended: false }
    }
}

impl HttpBody for Lingering {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let polled = Pin::new(inner).poll_frame(cx);
        self.waits = false;
        self.ended = matches!(polled, Poll::Ready(None | Some(Err(_))));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(rest) = self.inner.take() else { return };
        if self.ended || self.waits || rest.is_end_stream() {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(drain(rest));
        }
    }
}

async fn drain(mut rest: Incoming) {
    let thrown = async {
        let mut left = DRAIN_BYTES;
        while let Some(Ok(frame)) = rest.frame().await {
            match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                Some(less) => left = less,
                None => return,
            }
        }
    };
    // Whoever goes on for longer meets a closed connection.
    let _ = tokio::time::timeout(DRAIN_WAIT, thrown).await;
}
