//! Connections: accept, serve HTTP/1.1, and close in two steps.
//!
//! | phase | new connections | open completions | ends by |
//! |---|---|---|---|
//! | open | served | go on | the shutdown future |
//! | draining | none accepted | go on, no new ones on kept connections | all done, or the drain limit |
//! | aborting | none | end with an error in their stream | all done, or [`ABORT_WAIT`]; then connections are cut |

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{Request, header},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulConnection, GracefulShutdown},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tower::ServiceExt;

use crate::{
    body::Lingering,
    config::{
        ApiConfig,
        limits::{HEAD_WAIT, MAX_HEAD_BYTES},
    },
    crowd::Crowd,
    metrics::ApiMetrics,
    router,
    service::Service,
    shutdown::{self, Closer},
    stall::Stall,
    tls::{Socket, Tls},
};

/// How long a stream may take to hand over its last error.
const ABORT_WAIT: Duration = Duration::from_secs(2);
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The edge, ready to be served or, in tests, to be called in process.
pub struct Api {
    router: Router,
    metrics: Arc<ApiMetrics>,
    closer: Closer,
    drain: Duration,
    stalled_reader: Duration,
    max_connections: usize,
    proxies: Vec<IpAddr>,
}

impl Api {
    pub fn new(service: Arc<dyn Service>, config: ApiConfig) -> Api {
        let metrics = Arc::new(ApiMetrics::default());
        let (closer, closing) = shutdown::pair();
        let ApiConfig { drain, stalled_reader, max_connections, .. } = config;
        let proxies = config.door.as_ref().map(|door| door.proxies().to_vec()).unwrap_or_default();
        let router = router::router(service, config, Arc::clone(&metrics), closing);
        Api { router, metrics, closer, drain, stalled_reader, max_connections, proxies }
    }

    /// A handle to the routes. Callers in process are not on loopback unless they insert `ConnectInfo<SocketAddr>`.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// For a [`crate::MetricsRegistry`].
    pub fn metrics(&self) -> Arc<ApiMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Serves until `shutdown` resolves and open work has ended or run out of its time.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        self.serve_over(listener, None, shutdown).await
    }

    /// [`Api::serve`], over TLS where that is given.
    pub async fn serve_over(
        self,
        listener: TcpListener,
        tls: Option<Tls>,
        shutdown: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let Api { router, closer, drain, stalled_reader, max_connections, proxies, .. } = self;
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        let doors = Doors { listener: &listener, tls: tls.as_ref(), router: &router, stalled_reader };
        let crowd = Crowd::new(max_connections, &proxies);
        accept(doors, &graceful, &mut connections, max_connections, &crowd, shutdown).await;
        drop(listener);

        closer.drain();
        let asked = tokio::spawn(graceful.shutdown());
        if tokio::time::timeout(drain, all(&mut connections)).await.is_err() {
            tracing::warn!(open = connections.len(), "shutdown: streams outlived the drain limit and are ended");
        }
        // Keyed work may go on without a connection; it ends here too.
        closer.abort();
        if !connections.is_empty() {
            let _ = tokio::time::timeout(ABORT_WAIT, all(&mut connections)).await;
        }
        connections.shutdown().await;
        asked.abort();
        Ok(())
    }
}

/// [`Api::serve`] in one call.
pub async fn serve(
    listener: TcpListener,
    service: Arc<dyn Service>,
    config: ApiConfig,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    Api::new(service, config).serve(listener, shutdown).await
}

async fn all(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

/// Where connections come in, and where they lead.
struct Doors<'a> {
    listener: &'a TcpListener,
    tls: Option<&'a Tls>,
    router: &'a Router,
    stalled_reader: Duration,
}

async fn accept(
    doors: Doors<'_>,
    graceful: &GracefulShutdown,
    connections: &mut JoinSet<()>,
    max_connections: usize,
    crowd: &Crowd,
    shutdown: impl Future<Output = ()>,
) {
    let room = Arc::new(Semaphore::new(max_connections));
    tokio::pin!(shutdown);
    loop {
        let next = async {
            // Closed by nobody, so this always gives a permit; further connections wait in the kernel's queue.
            let permit = Arc::clone(&room).acquire_owned().await.ok();
            (permit, doors.listener.accept().await)
        };
        tokio::select! {
            () = &mut shutdown => return,
            Some(_) = connections.join_next() => {}
            (permit, accepted) = next => match accepted {
                Ok((socket, peer)) => {
                    let Some(place) = crowd.enter(peer.ip(), connections.len()) else {
                        tracing::debug!(%peer, "too many connections from there");
                        continue;
                    };
                    let connection = connection(socket, &doors, peer);
                    let watched = graceful.watch(connection);
                    connections.spawn(async move {
                        let _held = (permit, place);
                        if let Err(error) = watched.await {
                            tracing::debug!(%peer, %error, "connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

fn connection(
    socket: TcpStream,
    doors: &Doors<'_>,
    peer: SocketAddr,
) -> impl GracefulConnection<Error = hyper::Error> + Send + 'static + use<> {
    let router = doors.router.clone();
    // Tokens are small and must not wait for each other.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%peer, %error, "TCP_NODELAY was refused");
    }
    let socket = match doors.tls {
        Some(tls) => tls.accept(socket),
        None => Socket::Plain(socket),
    };
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        let waits = request.headers().contains_key(header::EXPECT);
        router.clone().oneshot(request.map(|body| Body::new(Lingering::new(body, waits))))
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WAIT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(Stall::new(socket, doors.stalled_reader)), service)
}
