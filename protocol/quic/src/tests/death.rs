//! A peer that is gone without a word is noticed within two seconds, whatever took it away.

use super::*;
use crate::{LinkError, Waiting};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tokio::net::UdpSocket;
use tokio::sync::oneshot;

/// The promise, and what a busy machine may add to a timer.
const NOTICED_WITHIN: Duration = Duration::from_millis(2000 + 300);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Waits for the end of a link; says how long after `death` it was noticed.
async fn notice(link: Link, death: oneshot::Receiver<Instant>) -> Duration {
    let error = soon(link.closed()).await;
    let waiting = Waiting::Peer;
    assert_eq!(error, LinkError::TimedOut { waiting, after: Limits::default().idle });
    assert!(soon(link.open(StreamKind::Request)).await.is_err());
    death.await.unwrap().elapsed()
}

/// Forwards packets between one client and the provider until the path is cut.
async fn path_to(provider: SocketAddr, cut: Arc<AtomicBool>) -> SocketAddr {
    let (front, back) = (UdpSocket::bind(LOOPBACK).await.unwrap(), UdpSocket::bind(LOOPBACK).await.unwrap());
    let address = front.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut there, mut here) = ([0; 2048], [0; 2048]);
        let mut client = None;
        loop {
            let (packet, socket, to) = tokio::select! {
                Ok((len, from)) = front.recv_from(&mut there) => {
                    client = Some(from);
                    (&there[..len], &back, provider)
                }
                Ok((len, _)) = back.recv_from(&mut here) => match client {
                    Some(client) => (&here[..len], &front, client),
                    None => continue,
                },
            };
            if !cut.load(Ordering::Relaxed) {
                socket.send_to(packet, to).await.unwrap();
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn death_is_noticed_within_two_seconds_and_silence_is_no_death() {
    // A healthy link on which nobody says anything.
    let quiet = Pair::new().await;

    // The provider's process dies: its sockets and tasks are gone at once, and nothing is sent.
    let provider_process = runtime();
    let doomed = provider_process.spawn(async { provider(Limits::default()) }).await.unwrap();
    let consumer = consumer(Limits::default());
    let orphan = connect(&consumer, &doomed, 30).await;

    // The consumer's process dies.
    let consumer_process = runtime();
    let provider = provider(Limits::default());
    let address = provider.local_addr().unwrap();
    let departed = consumer_process.spawn(async move {
        let consumer = super::consumer(Limits::default());
        let expected = satgrid_types::node_key(&key(PROVIDER));
        let link = consumer.connect(&[address.into()], expected, &key(31)).await.unwrap();
        (consumer, link)
    });
    let departed = departed.await.unwrap();
    let widow = soon(provider.accept()).await.unwrap();

    // The path is cut while both live.
    let cut = Arc::new(AtomicBool::new(false));
    let front = path_to(address, cut.clone()).await;
    let expected = satgrid_types::node_key(&key(PROVIDER));
    let near = soon(consumer.connect(&[front.into()], expected, &key(32))).await.unwrap();
    let far = soon(provider.accept()).await.unwrap();

    let (mut deaths, mut noticed) = (Vec::new(), tokio::task::JoinSet::new());
    for (name, link) in [("dead provider", orphan), ("dead consumer", widow), ("cut, here", near), ("cut, there", far)]
    {
        let (death, at) = oneshot::channel();
        deaths.push(death);
        noticed.spawn(async move { (name, notice(link, at).await) });
    }
    // Let every link fall silent first: between two keep-alives is the worst moment to die.
    tokio::time::sleep(Duration::from_millis(100)).await;
    provider_process.shutdown_background();
    consumer_process.shutdown_background();
    cut.store(true, Ordering::Relaxed);
    let now = Instant::now();
    deaths.into_iter().for_each(|death| death.send(now).unwrap());
    while let Some(done) = noticed.join_next().await {
        let (name, after) = done.unwrap();
        println!("{name}: noticed after {after:?}");
        assert!(after < NOTICED_WITHIN, "{name}: {after:?}");
    }
    soon(async {
        while provider.accepted_connections() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(quiet.client.close_reason(), None, "a link on which nobody speaks lives on");
    quiet.stream().await;
    drop((departed, doomed));
}
