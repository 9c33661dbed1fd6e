//! The real endpoints in virtual time, on a network that delays, loses and cuts, all from one seed.
//!
//! Keys and TLS randomness stay truly random, so packets differ in their bytes from run to run; what is compared is
//! what the layer above sees: every frame, every error, and the virtual instant of each.

use super::{PROVIDER, SESSION, key};
use crate::endpoint::server_config;
use crate::identity::server_tls;
use crate::{AddressHint, Code, Limits, Link, LinkError, QuicEndpoint, StreamKind, Waiting};
use core::fmt;
use core::pin::Pin;
use core::task::{Context, Poll, ready};
use core::time::Duration;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, EndpointConfig, TokioRuntime, UdpPoller};
use satgrid_types::node_key;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use tokio_util::sync::CancellationToken;

const PORT: u16 = 4433;
const FRAME_BYTES: usize = 3000;
const FRAMES: usize = 40;

type Wait = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// A simulated UDP socket as quinn wants it.
struct SimSocket {
    socket: Arc<turmoil::net::UdpSocket>,
    /// The wait for the next packet, kept between polls.
    readable: Mutex<Option<Wait>>,
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimSocket")
    }
}

/// A simulated socket takes any number of packets.
#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for SimSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send_to(transmit.contents, transmit.destination).map(drop)
    }
    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut readable = self.readable.lock().unwrap();
        loop {
            if let Some(wait) = readable.as_mut() {
                ready!(wait.as_mut().poll(cx))?;
                *readable = None;
            }
            match self.socket.try_recv_from(&mut buffers[0]) {
                Ok((len, addr)) => {
                    meta[0] = RecvMeta { addr, len, stride: len, ..RecvMeta::default() };
                    return Poll::Ready(Ok(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let socket = self.socket.clone();
                    *readable = Some(Box::pin(async move { socket.readable().await }));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
    fn may_fragment(&self) -> bool {
        false
    }
}

async fn endpoint(port: u16, node: Option<u8>, seed: u64) -> io::Result<QuicEndpoint> {
    let socket = Arc::new(turmoil::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).await?);
    let socket = Arc::new(SimSocket { socket, readable: Mutex::new(None) });
    let limits = Limits::default();
    let server = node.map(|node| server_config(server_tls(key(node)).unwrap(), &limits));
    let mut config = EndpointConfig::default();
    let mut rng_seed = [0; 32];
    rng_seed[..8].copy_from_slice(&(seed ^ u64::from(port)).to_le_bytes());
    config.rng_seed(Some(rng_seed));
    let quinn = quinn::Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))?;
    Ok(QuicEndpoint::start(quinn, limits, &CancellationToken::new()))
}

/// What was seen, and when.
#[derive(Clone, Default)]
struct Trace(Arc<Mutex<Vec<String>>>);

impl Trace {
    fn note(&self, what: impl fmt::Display) {
        let at = turmoil::sim_elapsed().unwrap();
        self.0.lock().unwrap().push(format!("{at:?} {what}"));
    }
}

fn frame(stream: u8, n: usize) -> Vec<u8> {
    vec![stream ^ n as u8; FRAME_BYTES]
}

async fn echo(link: Link, trace: Trace) {
    loop {
        match link.accept().await {
            Ok(mut stream) => {
                tokio::spawn(async move {
                    while let Ok(Some(frame)) = stream.rx.recv().await {
                        stream.tx.send(&frame).await.unwrap_or_default();
                    }
                    stream.tx.finish().await.unwrap_or_default();
                });
            }
            Err(error) => return trace.note(format_args!("provider: {error}")),
        }
    }
}

/// Echoes frames over several streams at once; each comes back whole and in order, whatever the network does.
async fn talk(link: &Link, trace: &Trace) {
    let mut streams = tokio::task::JoinSet::new();
    for id in 0..4u8 {
        let (link, trace) = (link.clone(), trace.clone());
        streams.spawn(async move {
            let mut stream = link.open(StreamKind::Request).await.unwrap();
            for n in 0..FRAMES {
                stream.tx.send(&frame(id, n)).await.unwrap();
                assert_eq!(stream.rx.recv().await.unwrap().unwrap(), frame(id, n));
                trace.note(format_args!("stream {id} frame {n}"));
            }
            stream.tx.finish().await.unwrap();
            assert_eq!(stream.rx.recv().await.unwrap(), None);
        });
    }
    while let Some(done) = streams.join_next().await {
        done.unwrap();
    }
}

fn run(seed: u64, loss: f64) -> Vec<String> {
    let trace = Trace::default();
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .fail_rate(loss)
        .repair_rate(if loss > 0.0 { 1.0 } else { 0.0 })
        .min_message_latency(Duration::from_millis(2))
        .max_message_latency(Duration::from_millis(30))
        .udp_capacity(4096)
        .simulation_duration(Duration::from_secs(300))
        .build();
    let provider_trace = trace.clone();
    sim.host("provider", move || {
        let trace = provider_trace.clone();
        async move {
            let endpoint = endpoint(PORT, Some(PROVIDER), seed).await?;
            while let Some(link) = endpoint.accept().await {
                tokio::spawn(echo(link, trace.clone()));
            }
            Ok(())
        }
    });
    let consumer_trace = trace.clone();
    sim.client("consumer", async move {
        let trace = consumer_trace;
        let endpoint = endpoint(0, None, seed).await?;
        let provider = turmoil::lookup("provider");
        let hint: AddressHint = SocketAddr::new(provider, PORT).into();
        let expected = node_key(&key(PROVIDER));

        let link = endpoint.connect(std::slice::from_ref(&hint), expected, &key(SESSION)).await?;
        trace.note("connected");
        talk(&link, &trace).await;

        turmoil::partition("consumer", "provider");
        let cut = turmoil::sim_elapsed().unwrap();
        let error = link.closed().await;
        trace.note(format_args!("consumer: {error}"));
        let silent = turmoil::sim_elapsed().unwrap() - cut;
        assert!(matches!(error, LinkError::TimedOut { waiting: Waiting::Peer, .. }), "{error}");
        assert!(silent < Duration::from_secs(2), "noticed after {silent:?}");
        // The provider notices in the same two seconds; only then is the path mended.
        tokio::time::sleep(Duration::from_secs(2)).await;
        turmoil::repair("consumer", "provider");

        let link = endpoint.connect(&[hint], expected, &key(SESSION)).await?;
        trace.note("connected again");
        talk(&link, &trace).await;
        trace.note(format_args!("{:?} round trip", link.path().rtt));
        link.close(Code::DONE, "enough");
        endpoint.shutdown(Code::DONE, "").await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        Ok(())
    });
    sim.run().unwrap();
    let seen = trace.0.lock().unwrap().clone();
    let ends = |end: &str| seen.iter().filter(|line| line.contains("provider:") && line.contains(end)).count();
    assert_eq!((ends("any sign of life"), ends("enough")), (1, 1), "{seen:#?}");
    seen
}

#[test]
fn one_seed_gives_one_course_of_events() {
    let first = run(7, 0.0);
    assert!(first.len() > 2 * 4 * FRAMES);
    assert_eq!(first, run(7, 0.0));
    assert_ne!(first, run(8, 0.0));
}

#[test]
fn lost_packets_cost_time_and_nothing_else() {
    for seed in 0..3 {
        run(seed, 0.02);
    }
}
