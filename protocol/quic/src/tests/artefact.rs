use super::*;
use crate::artefact::{
    Answer, ArtefactServer, Artefacts, Download, DownloadError, MAX_ARTEFACT_BYTES, RefusedBecause, Request,
    ServeLimits, Served,
};
use crate::{Code, LinkError};
use bytes::Bytes;
use satgrid_types::Digest;
use sha2::Digest as _;
use std::collections::BTreeMap;
use std::sync::Arc;

struct Store(BTreeMap<Digest, Bytes>);
impl Artefacts for Store {
    fn artefact(&self, sha256: &Digest) -> Option<Bytes> {
        self.0.get(sha256).cloned()
    }
}

fn blob(len: usize) -> (Digest, Bytes) {
    let bytes: Vec<u8> = (0..len).map(|n| (n * n / 7) as u8).collect();
    (Digest(sha2::Sha256::digest(&bytes).into()), bytes.into())
}

/// Serves the blobs on this link until it closes; the answer is what became of each download.
fn serve(link: &Link, blobs: &[(Digest, Bytes)], limits: ServeLimits) -> tokio::task::JoinHandle<Vec<Served>> {
    let store = Store(blobs.iter().cloned().collect());
    let account = ArtefactServer::new(Arc::new(store), limits).connection();
    let link = link.clone();
    tokio::spawn(async move {
        let mut served = Vec::new();
        while let Ok(stream) = link.accept().await {
            served.extend(account.serve(stream).await);
        }
        served
    })
}

/// A provider that answers one download as it likes.
async fn lie(pair: &Pair, answer: Answer, pieces: &[&[u8]], end: Option<Code>) -> Request {
    let mut stream = soon(pair.server.accept()).await.unwrap();
    let request = soon(stream.rx.recv_frame::<Request>()).await.unwrap().unwrap();
    stream.tx.send_frame(&answer).await.unwrap();
    for piece in pieces {
        stream.tx.send(piece).await.unwrap();
    }
    match end {
        None => stream.tx.finish().await.unwrap(),
        Some(code) => {
            // A cancelled stream may drop what is on its way; let the pieces arrive first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            stream.tx.cancel(code);
        }
    }
    // Until the consumer has seen the end.
    let _ = stream.rx.recv().await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    request
}

#[tokio::test]
async fn a_blob_comes_whole() {
    let pair = Pair::new().await;
    let (hash, bytes) = blob(300_001);
    let serving = serve(&pair.server, &[(hash, bytes.clone())], ServeLimits::default());
    let mut download = Download::new(hash, MAX_ARTEFACT_BYTES);
    assert_eq!(soon(download.run(&pair.client)).await.unwrap(), bytes);
    let (unknown, _) = blob(5);
    let error = soon(Download::new(unknown, MAX_ARTEFACT_BYTES).run(&pair.client)).await.unwrap_err();
    assert_eq!(error, DownloadError::Refused(RefusedBecause::Unknown));
    pair.client.close(Code::DONE, "");
    let sent = Served::Sent { sha256: hash, bytes: 300_001 };
    let refused = Served::Refused { sha256: unknown, why: RefusedBecause::Unknown };
    assert_eq!(soon(serving).await.unwrap(), [sent, refused]);
}

#[tokio::test]
async fn a_broken_download_goes_on_at_another_provider() {
    let first = Pair::new().await;
    let (hash, bytes) = blob(100_000);
    let mut download = Download::new(hash, MAX_ARTEFACT_BYTES);
    let (half, rest) = (60_000, 40_000);
    let pieces = [&bytes[..30_000], &bytes[30_000..half]];
    let (request, error) = tokio::join!(
        lie(&first, Answer::Sending(100_000), &pieces, Some(Code::BUSY)),
        soon(download.run(&first.client)),
    );
    assert_eq!(request.offset, 0);
    assert_eq!(error.unwrap_err(), DownloadError::Link(LinkError::PeerCancelled { code: Code::BUSY }));
    assert_eq!(download.received(), &bytes[..half]);

    // As after a restart: from saved bytes, at another provider.
    let mut download = Download::resume(hash, MAX_ARTEFACT_BYTES, download.received().to_vec());
    let second = Pair::new().await;
    let serving = serve(&second.server, &[(hash, bytes.clone())], ServeLimits::default());
    assert_eq!(soon(download.run(&second.client)).await.unwrap(), bytes);
    second.client.close(Code::DONE, "");
    assert_eq!(soon(serving).await.unwrap(), [Served::Sent { sha256: hash, bytes: rest }]);
}

#[tokio::test]
async fn a_corrupt_blob_is_refused_and_forgotten() {
    let pair = Pair::new().await;
    let (hash, bytes) = blob(50_000);
    let mut wrong = bytes.to_vec();
    wrong[20_000] ^= 1;
    let mut download = Download::new(hash, MAX_ARTEFACT_BYTES);
    let pieces = [&wrong[..30_000], &wrong[30_000..]];
    let (_, error) =
        tokio::join!(lie(&pair, Answer::Sending(50_000), &pieces, None), soon(download.run(&pair.client)),);
    let error = error.unwrap_err();
    assert!(matches!(error, DownloadError::Corrupt { expected, .. } if expected == hash), "{error}");
    assert!(download.received().is_empty());
    let _serving = serve(&pair.server, &[(hash, bytes.clone())], ServeLimits::default());
    assert_eq!(soon(download.run(&pair.client)).await.unwrap(), bytes, "an honest provider repairs it");
}

#[tokio::test]
async fn sizes_are_checked_before_and_while_bytes_come() {
    let (hash, bytes) = blob(1000);
    let announced = MAX_ARTEFACT_BYTES + 1;
    for (answer, pieces, expect) in [
        (announced, vec![], DownloadError::TooLarge { total: announced, limit: MAX_ARTEFACT_BYTES }),
        (900, vec![&bytes[..]], DownloadError::WrongLength { announced: 900, received: 1000 }),
        (1100, vec![&bytes[..]], DownloadError::WrongLength { announced: 1100, received: 1000 }),
    ] {
        let pair = Pair::new().await;
        let mut download = Download::new(hash, u64::MAX);
        let (_, error) =
            tokio::join!(lie(&pair, Answer::Sending(answer), &pieces, None), soon(download.run(&pair.client)));
        assert_eq!(error.unwrap_err(), expect);
    }
}

#[tokio::test]
async fn what_is_free_is_bounded() {
    let pair = Pair::new().await;
    let (hash, bytes) = blob(10_000);
    let limits = ServeLimits { bytes_per_connection: 15_000, ..ServeLimits::default() };
    let serving = serve(&pair.server, &[(hash, bytes.clone())], limits);
    assert_eq!(soon(Download::new(hash, 10_000).run(&pair.client)).await.unwrap(), bytes);
    let error = soon(Download::new(hash, 10_000).run(&pair.client)).await.unwrap_err();
    assert_eq!(error, DownloadError::Refused(RefusedBecause::Spent));
    let mut behind = Download::resume(hash, 10_000, vec![0; 10_001]);
    assert_eq!(soon(behind.run(&pair.client)).await.unwrap_err(), DownloadError::Refused(RefusedBecause::Offset));
    assert!(behind.received().is_empty());
    pair.client.close(Code::DONE, "");
    assert_eq!(soon(serving).await.unwrap().len(), 3);

    let pair = Pair::new().await;
    let none = ServeLimits { downloads_per_connection: 0, ..ServeLimits::default() };
    let _serving = serve(&pair.server, &[(hash, bytes)], none);
    let error = soon(Download::new(hash, 10_000).run(&pair.client)).await.unwrap_err();
    assert_eq!(error, DownloadError::Refused(RefusedBecause::Busy));
}

#[tokio::test]
async fn a_request_that_is_none_ends_the_link() {
    let pair = Pair::new().await;
    let _serving = serve(&pair.server, &[], ServeLimits::default());
    let mut stream = pair.client.open(StreamKind::Artefact).await.unwrap();
    stream.tx.send(b"GET /tokenizer.json").await.unwrap();
    let told = soon(pair.client.closed()).await;
    assert!(matches!(told, LinkError::PeerClosed { code: Code::NOT_CANONICAL, .. }), "{told}");
}
