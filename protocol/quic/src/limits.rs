//! Every bound of this room, in one place.

use crate::Reach;
use core::time::Duration;
use quinn::{IdleTimeout, TransportConfig, VarInt};
use satgrid_protocol::frame::MAX_FRAME;
use std::sync::Arc;
use thiserror::Error;

/// A frame up to this size, in bytes, needs no share of [`Limits::large_frame_bytes`].
pub(crate) const SMALL_FRAME_BYTES: usize = 64 * 1024;
/// A frame is given [`Limits::frame_wait`] and one second more for each of these, in bytes.
pub(crate) const SLOWEST_BYTES_PER_S: usize = 64 * 1024;

/// What peers may make this node hold, and how long it waits for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Accepted connections, handshakes in progress included.
    pub connections: usize,
    /// Of those, from one source: an IPv4 address or an IPv6 /64.
    pub connections_per_source: usize,
    /// Handshakes in progress. From half of it on, a new client must first prove its address (QUIC Retry).
    pub handshakes: usize,
    /// Streams that a consumer may have open on one connection.
    pub streams: u32,
    /// Longest frame in either direction.
    pub frame_bytes: usize,
    /// Received and not yet read, per stream.
    pub stream_window_bytes: u32,
    /// Received and not yet read, per connection. Holds every stream's window, so that streams which nobody reads
    /// never hold up one that somebody does.
    pub connection_window_bytes: u32,
    /// Written and not yet acknowledged, per connection.
    pub send_window_bytes: u32,
    /// Per connection, frames of more than 64 KiB that are being received at one time.
    pub large_frame_bytes: usize,
    /// Where connections of ours may go.
    pub reach: Reach,
    /// A packet is sent at least this often.
    pub keep_alive: Duration,
    /// A connection on which nothing was heard for this long is over.
    ///
    /// QUIC restarts the idle timer when a packet comes and at the first packet sent afterwards. The latest possible
    /// restart after a death is therefore one `keep_alive` later, and death is noticed within `keep_alive + idle`:
    /// 1.9 s by default. Only on a path whose probe timeout exceeds a third of `idle` does QUIC wait longer
    /// (three probe timeouts: it matters from a round trip of about 400 ms).
    pub idle: Duration,
    /// From the first packet to an authenticated peer.
    pub handshake: Duration,
    /// From a frame's first byte to its last, and one second more for each 64 KiB of it.
    pub frame_wait: Duration,
    /// For room for one more stream.
    pub stream_wait: Duration,
    /// For connections to close at shutdown.
    pub drain_wait: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 256,
            connections_per_source: 32,
            handshakes: 64,
            streams: 32,
            frame_bytes: MAX_FRAME,
            stream_window_bytes: 256 << 10,
            connection_window_bytes: 8 << 20,
            send_window_bytes: 4 << 20,
            large_frame_bytes: 4 << 20,
            reach: Reach::Any,
            keep_alive: Duration::from_millis(400),
            idle: Duration::from_millis(1500),
            handshake: Duration::from_secs(5),
            frame_wait: Duration::from_secs(10),
            stream_wait: Duration::from_secs(10),
            drain_wait: Duration::from_secs(2),
        }
    }
}

/// Limits that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LimitsError {
    #[error("keep-alive every {keep_alive:?} and {idle:?} of silence allowed: one lost packet would kill a link")]
    KeepAlive { keep_alive: Duration, idle: Duration },
    #[error("{name} is zero")]
    Zero { name: &'static str },
    #[error("{streams} streams of {window} bytes do not fit the connection's {connection} bytes")]
    Windows { streams: u32, window: u32, connection: u32 },
    #[error("a frame of {frame} bytes does not fit the {room} bytes for large frames")]
    LargeFrames { frame: usize, room: usize },
}

impl Limits {
    pub(crate) fn check(&self) -> Result<(), LimitsError> {
        for (name, value) in [
            ("connections", self.connections),
            ("connections_per_source", self.connections_per_source),
            ("handshakes", self.handshakes),
            ("streams", self.streams as usize),
            ("frame_bytes", self.frame_bytes),
            ("stream_window_bytes", self.stream_window_bytes as usize),
            ("send_window_bytes", self.send_window_bytes as usize),
        ] {
            if value == 0 {
                return Err(LimitsError::Zero { name });
            }
        }
        let (keep_alive, idle) = (self.keep_alive, self.idle);
        if keep_alive.is_zero() || idle < 2 * keep_alive {
            return Err(LimitsError::KeepAlive { keep_alive, idle });
        }
        let (streams, window, connection) = (self.streams, self.stream_window_bytes, self.connection_window_bytes);
        if u64::from(streams) * u64::from(window) > u64::from(connection) {
            return Err(LimitsError::Windows { streams, window, connection });
        }
        let (frame, room) = (self.frame_bytes, self.large_frame_bytes);
        if frame > room || frame > u32::MAX as usize {
            return Err(LimitsError::LargeFrames { frame, room });
        }
        Ok(())
    }

    /// The most memory, in bytes, that the peer of one connection can make this node hold.
    pub fn bytes_per_connection(&self) -> usize {
        let small_frames = (self.streams as usize).saturating_mul(SMALL_FRAME_BYTES.min(self.frame_bytes));
        (self.connection_window_bytes as usize)
            .saturating_add(self.send_window_bytes as usize)
            .saturating_add(self.large_frame_bytes)
            .saturating_add(small_frames)
    }

    pub(crate) fn frame_deadline(&self, len: usize) -> Duration {
        self.frame_wait + Duration::from_secs((len / SLOWEST_BYTES_PER_S) as u64)
    }

    /// `streams`: how many the peer may open. Datagrams and one-way streams are off in both directions.
    pub(crate) fn transport(&self, streams: u32) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();
        let idle = u32::try_from(self.idle.as_millis()).unwrap_or(u32::MAX);
        transport
            .max_concurrent_bidi_streams(streams.into())
            .max_concurrent_uni_streams(0u32.into())
            .stream_receive_window(self.stream_window_bytes.into())
            .receive_window(self.connection_window_bytes.into())
            .send_window(self.send_window_bytes.into())
            .datagram_receive_buffer_size(None)
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle))))
            .allow_spin(false);
        Arc::new(transport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(change: impl FnOnce(&mut Limits), expect: Result<(), &str>) {
        let mut limits = Limits::default();
        change(&mut limits);
        match (limits.check(), expect) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{error}"),
            (got, want) => panic!("got {got:?}, want {want:?}"),
        }
    }

    #[test]
    fn contradictions_are_refused() {
        check(|_| {}, Ok(()));
        check(|l| l.idle = Duration::from_secs(30), Ok(()));
        check(|l| l.idle = l.keep_alive, Err("one lost packet"));
        check(|l| l.keep_alive = Duration::ZERO, Err("one lost packet"));
        check(|l| l.streams = 0, Err("streams is zero"));
        check(|l| l.streams *= 2, Err("do not fit the connection"));
        check(|l| l.large_frame_bytes = l.frame_bytes - 1, Err("does not fit"));
    }

    #[test]
    fn by_default_death_shows_in_two_seconds_and_a_peer_costs_18_mib() {
        let limits = Limits::default();
        assert!(limits.keep_alive + limits.idle < Duration::from_secs(2));
        assert_eq!(limits.bytes_per_connection(), 18 << 20);
    }
}
