use super::*;
use crate::{Code, LinkError, QueueError, Violation, Waiting};
use satgrid_types::cbor::CodecError;
use std::time::Instant;
use tokio::time::timeout;

fn small_frames(frame_bytes: usize) -> Limits {
    Limits { frame_bytes, ..Limits::default() }
}

/// The consumer writes these raw bytes and ends the stream; the provider must find this violation, and the consumer
/// must learn of it.
#[track_caller]
fn check(name: &str, bytes: Vec<u8>, expect: Violation) -> impl Future<Output = ()> {
    let name = name.to_owned();
    async move {
        let pair = Pair::with(small_frames(1000), Limits::default()).await;
        let (mut near, mut far) = pair.stream().await;
        let (mut other_near, _other_far) = pair.stream().await;
        near.tx.write_raw(&bytes).await;
        near.tx.finish().await.unwrap();
        let error = soon(far.rx.recv()).await.unwrap_err();
        assert_eq!(error, LinkError::PeerViolated(expect.clone()), "{name}");
        assert_eq!(pair.server.close_reason(), Some(error), "{name}: every operation of the link says so");
        let told = LinkError::PeerClosed { code: expect.code(), reason: expect.to_string() };
        assert_eq!(soon(other_near.rx.recv()).await.unwrap_err(), told, "{name}");
    }
}

#[tokio::test]
async fn violations_close_the_connection_and_the_peer_is_told() {
    check("too long", vec![0, 0, 3, 233], Violation::FrameTooLong { len: 1001, limit: 1000 }).await;
    check("huge", vec![255; 4], Violation::FrameTooLong { len: u32::MAX as usize, limit: 1000 }).await;
    check("empty", vec![0; 4], Violation::EmptyFrame).await;
    check("cut in the length", vec![0, 0], Violation::TruncatedFrame { received: 2, expected: 4 }).await;
    check("cut in the body", vec![0, 0, 0, 9, 1], Violation::TruncatedFrame { received: 5, expected: 13 }).await;
}

#[tokio::test]
async fn a_frame_of_the_limit_passes_and_our_own_is_checked() {
    let pair = Pair::with(small_frames(1000), small_frames(1000)).await;
    let (mut near, mut far) = pair.stream().await;
    near.tx.send(&[7; 1000]).await.unwrap();
    assert_eq!(soon(far.rx.recv()).await.unwrap().unwrap(), [7; 1000]);
    let error = near.tx.send(&[7; 1001]).await.unwrap_err();
    assert_eq!(error, LinkError::OwnFrameTooLong { len: 1001, limit: 1000 });
    near.tx.send(b"still fine").await.unwrap();
    assert_eq!(soon(far.rx.recv()).await.unwrap().unwrap(), b"still fine");
}

#[tokio::test]
async fn typed_frames_are_canonical_or_end_the_link() {
    let pair = Pair::new().await;
    let (mut near, mut far) = pair.stream().await;
    near.tx.send_frame(&vec![1u32, 70_000]).await.unwrap();
    assert_eq!(soon(far.rx.recv_frame::<Vec<u32>>()).await.unwrap(), Some(vec![1, 70_000]));
    near.tx.send(&[0x82, 0x01, 0x18, 0x02]).await.unwrap(); // the array [1, 2] with 2 in two bytes
    let error = soon(far.rx.recv_frame::<Vec<u32>>()).await.unwrap_err();
    let refused = Violation::Frame(CodecError::NotCanonical { given: 4, canonical: 3 });
    assert_eq!(error, LinkError::PeerViolated(refused));
    let told = soon(pair.client.closed()).await;
    assert!(matches!(told, LinkError::PeerClosed { code: Code::NOT_CANONICAL, .. }), "{told}");
}

#[tokio::test]
async fn a_frame_that_does_not_end_times_out_and_the_link_lives_on() {
    let limits = Limits { frame_wait: Duration::from_millis(50), ..Limits::default() };
    let pair = Pair::with(limits, Limits::default()).await;
    let (mut near, mut far) = pair.stream().await;
    near.tx.write_raw(&[0, 0, 0, 9, 1, 2]).await;
    let error = soon(far.rx.recv()).await.unwrap_err();
    let waiting = Waiting::Frame { received: 6, expected: 13 };
    assert_eq!(error, LinkError::TimedOut { waiting, after: Duration::from_millis(50) });
    soon(async { while near.tx.send(b"more").await.is_ok() {} }).await;
    assert_eq!(near.tx.send(b"more").await.unwrap_err(), LinkError::PeerCancelled { code: Code::STALLED });
    pair.stream().await;
}

#[tokio::test]
async fn a_dropped_receive_or_send_loses_nothing() {
    let pair = Pair::new().await;
    let (mut near, mut far) = pair.stream().await;
    let frames: Vec<Vec<u8>> = (1..40u8).map(|n| vec![n; 40_000 + n as usize]).collect();
    let expect = frames.clone();
    let sender = tokio::spawn(async move {
        for frame in frames {
            // Given up over and over: what was accepted goes out all the same.
            let _ = timeout(Duration::from_micros(30), near.tx.send(&frame)).await;
        }
        near.tx.finish().await.unwrap();
        near.tx.delivered().await.unwrap();
    });
    let mut got = Vec::new();
    loop {
        match timeout(Duration::from_micros(20), far.rx.recv()).await {
            Ok(Ok(Some(frame))) => got.push(frame),
            Ok(Ok(None)) => break,
            Ok(Err(error)) => panic!("{error}"),
            Err(_) => tokio::task::yield_now().await,
        }
    }
    soon(sender).await.unwrap();
    // A send that never got to run is not sent; none is torn or out of order.
    assert!(!got.is_empty() && got.iter().all(|frame| expect.contains(frame)));
    assert!(got.windows(2).all(|pair| pair[0][0] < pair[1][0]));
}

#[tokio::test]
async fn a_reader_that_sleeps_stops_the_writer_at_one_window() {
    const PIECE: usize = 16 * 1024;
    let window = 128 * 1024;
    let limits = Limits { stream_window_bytes: window, ..Limits::default() };
    let pair = Pair::with(limits, Limits::default()).await;
    let (mut near, mut far) = pair.stream().await;
    let mut sent = 0u32;
    while timeout(Duration::from_millis(100), near.tx.send(&[5; PIECE])).await.is_ok() {
        sent += 1;
    }
    let taken = sent as usize * PIECE;
    assert!(taken <= window as usize, "{taken} bytes were taken");
    assert!(taken > window as usize / 2, "only {taken} bytes were taken");
    // Nothing is lost: with the reader awake, the frame that waited comes too.
    let reader = tokio::spawn(async move {
        let mut frames = 0;
        while let Some(frame) = far.rx.recv().await.unwrap() {
            assert_eq!(frame, [5; PIECE]);
            frames += 1;
        }
        frames
    });
    near.tx.finish().await.unwrap();
    assert_eq!(soon(reader).await.unwrap(), sent + 1);
}

#[tokio::test]
async fn a_full_queue_says_so_and_loses_nothing() {
    let limits = Limits { stream_window_bytes: 64 * 1024, ..Limits::default() };
    let pair = Pair::with(limits, Limits::default()).await;
    let (near, mut far) = pair.stream().await;
    let (queue, task) = near.tx.into_queue(8, 64 * 1024);
    let mut sent = 0u32;
    let full = loop {
        match queue.try_send(sent.to_be_bytes().repeat(2000)) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        // Lets the queue's task fill the window first.
        if sent.is_multiple_of(4) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(full, QueueError::Full);
    assert!((8..=24).contains(&sent), "{sent} frames of 8 kB: a window and a queue");
    let reader = tokio::spawn(async move {
        let mut next = 0u32;
        while let Some(frame) = far.rx.recv().await.unwrap() {
            assert_eq!(frame, next.to_be_bytes().repeat(2000));
            next += 1;
        }
        next
    });
    soon(queue.finish()).await.unwrap();
    assert_eq!(soon(reader).await.unwrap(), sent);
    assert_eq!(soon(task).await.unwrap(), Ok(()));
}

#[tokio::test]
async fn a_queue_whose_peer_is_gone_is_closed() {
    let pair = Pair::new().await;
    let (near, far) = pair.stream().await;
    let (queue, task) = near.tx.into_queue(1, 1000);
    far.cancel(Code::new(400));
    soon(async {
        while queue.try_send(vec![1]) != Err(QueueError::Closed) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(soon(task).await.unwrap(), Err(LinkError::PeerCancelled { code: Code::new(400) }));
}

#[tokio::test]
async fn a_cancelled_stream_is_seen_with_its_code_and_hurts_no_other() {
    let pair = Pair::new().await;
    let (near, mut far) = pair.stream().await;
    let (mut other_near, mut other_far) = pair.stream().await;
    near.cancel(Code::new(300));
    assert_eq!(soon(far.rx.recv()).await.unwrap_err(), LinkError::PeerCancelled { code: Code::new(300) });
    soon(async { while far.tx.send(b"token").await.is_ok() {} }).await;
    drop(other_near.tx);
    let dropped = LinkError::PeerCancelled { code: Code::CANCELLED };
    assert_eq!(soon(other_far.rx.recv()).await.unwrap_err(), dropped, "a lost handle is no clean end");
    other_far.tx.send(b"the other way still works").await.unwrap();
    assert!(soon(other_near.rx.recv()).await.unwrap().is_some());
}

#[tokio::test]
async fn many_streams_share_a_few_places() {
    let limits = Limits { streams: 8, ..Limits::default() };
    let pair = Pair::with(limits, Limits::default()).await;
    let server = pair.server.clone();
    let serving = tokio::spawn(async move {
        let mut most = 0usize;
        let open = std::sync::Arc::new(());
        while let Ok(mut stream) = server.accept().await {
            let guard = open.clone();
            most = most.max(std::sync::Arc::strong_count(&open) - 1);
            tokio::spawn(async move {
                while let Ok(Some(frame)) = stream.rx.recv().await {
                    stream.tx.send(&frame).await.unwrap();
                }
                stream.tx.finish().await.unwrap();
                drop(guard);
            });
        }
        most
    });
    let mut requests = tokio::task::JoinSet::new();
    for n in 0..200u32 {
        let client = pair.client.clone();
        requests.spawn(async move {
            let mut stream = client.open(StreamKind::Request).await.unwrap();
            for part in 0..3u32 {
                let frame = [n.to_be_bytes(), part.to_be_bytes()].concat();
                stream.tx.send(&frame).await.unwrap();
                assert_eq!(stream.rx.recv().await.unwrap().unwrap(), frame);
            }
            stream.tx.finish().await.unwrap();
            assert_eq!(stream.rx.recv().await.unwrap(), None);
        });
    }
    soon(async {
        while let Some(done) = requests.join_next().await {
            done.unwrap()
        }
    })
    .await;
    pair.client.close(Code::DONE, "");
    let most = soon(serving).await.unwrap();
    assert!((2..=9).contains(&most), "{most} at one time");
}

#[tokio::test]
async fn places_for_streams_run_out_with_an_error() {
    let one = Limits { streams: 1, ..Limits::default() };
    let hasty = Limits { stream_wait: Duration::from_millis(50), ..Limits::default() };
    let pair = Pair::with(one, hasty).await;
    let _held = pair.stream().await;
    let error = soon(pair.client.open(StreamKind::Request)).await.unwrap_err();
    assert_eq!(error, LinkError::TimedOut { waiting: Waiting::StreamSlot, after: Duration::from_millis(50) });
}

#[tokio::test]
async fn kinds_are_told_apart_and_checked() {
    let pair = Pair::new().await;
    for kind in [StreamKind::Artefact, StreamKind::Control, StreamKind::Request] {
        let mut near = pair.client.open(kind).await.unwrap();
        near.tx.send(b"x").await.unwrap();
        assert_eq!(soon(pair.server.accept()).await.unwrap().kind, kind);
    }
    let mut strange = pair.client.open(StreamKind::Request).await.unwrap();
    strange.tx.set_opening(200);
    strange.tx.send(b"x").await.unwrap();
    let error = soon(strange.rx.recv()).await.unwrap_err();
    assert_eq!(error, LinkError::PeerCancelled { code: Code::UNKNOWN_KIND });
    // A stream that never says its kind holds up no other.
    let mute = pair.client.open(StreamKind::Request).await.unwrap();
    pair.stream().await;
    drop(mute);
    let mut second = pair.client.open(StreamKind::Control).await.unwrap();
    second.tx.send(b"x").await.unwrap();
    let error = soon(pair.server.accept()).await.unwrap_err();
    assert_eq!(error, LinkError::PeerViolated(Violation::SecondControlStream));
    let told = soon(pair.client.closed()).await;
    assert_eq!(told, LinkError::PeerClosed { code: Code::PROTOCOL, reason: "a second control stream".into() });
}

#[tokio::test]
async fn large_frames_share_a_room_and_all_pass() {
    let limits = Limits { large_frame_bytes: 1 << 20, ..Limits::default() };
    let pair = Pair::with(limits, Limits::default()).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..6u8 {
        let (mut near, mut far) = pair.stream().await;
        tasks.spawn(async move { near.tx.send(&vec![n; 1 << 20]).await.map(|()| near) });
        tasks.spawn(async move {
            assert_eq!(far.rx.recv().await.unwrap().unwrap(), vec![n; 1 << 20]);
            Ok(far)
        });
    }
    let mut ends = Vec::new();
    soon(async {
        while let Some(done) = tasks.join_next().await {
            ends.push(done.unwrap().unwrap())
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_frames_leave_at_once() {
    const ROUNDS: usize = 1000;
    let pair = Pair::new().await;
    let (mut near, mut far) = pair.stream().await;
    let echo = tokio::spawn(async move {
        while let Some(frame) = far.rx.recv().await.unwrap() {
            far.tx.send(&frame).await.unwrap();
        }
    });
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        near.tx.send(&[9; 64]).await.unwrap();
        assert_eq!(soon(near.rx.recv()).await.unwrap().unwrap(), [9; 64]);
        times.push(begin.elapsed());
    }
    near.tx.finish().await.unwrap();
    soon(echo).await.unwrap();
    times.sort();
    let (median, p99) = (times[ROUNDS / 2], times[ROUNDS * 99 / 100]);
    println!("64-byte frame there and back on loopback: median {median:?}, p99 {p99:?}");
    // A delayed acknowledgement (25 ms) or a flush timer would show.
    assert!(median < Duration::from_millis(5), "{median:?}");
}

#[tokio::test]
async fn streams_that_nobody_reads_hold_up_no_other() {
    let limits = Limits { streams: 4, connection_window_bytes: 1 << 20, ..Limits::default() };
    let pair = Pair::with(limits, Limits::default()).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let (mut near, far) = pair.stream().await;
        while timeout(Duration::from_millis(50), near.tx.send(&[1; 60_000])).await.is_ok() {}
        held.push((near, far));
    }
    let (mut near, mut far) = pair.stream().await;
    let sending = tokio::spawn(async move { near.tx.send(&vec![2; 1 << 20]).await.map(|()| near) });
    assert_eq!(soon(far.rx.recv()).await.unwrap().unwrap(), vec![2; 1 << 20]);
    soon(sending).await.unwrap().unwrap();
}
