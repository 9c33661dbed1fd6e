//! The hub, played by a small HTTP server of the test's own that can break connections and lie about hashes.

use super::*;
use crate::models::{Reference, pull as pull_reference};
use satgrid_engine::tiny::TinyModel;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const CHUNK: usize = 64 << 10;

/// Serves one file under any path; after `patience` whole ranges it hangs up in the middle of the next, once.
struct Hub {
    endpoint: String,
    served: Arc<AtomicUsize>,
}

fn hub(body: Vec<u8>, etag: String, patience: usize, status: &'static str) -> Hub {
    let length = body.len();
    hub_that_says(length, body, etag, patience, status)
}

/// As [`hub`], of a file that is said to be so long.
fn hub_that_says(length: usize, body: Vec<u8>, etag: String, patience: usize, status: &'static str) -> Hub {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let served = Arc::new(AtomicUsize::new(0));
    let counter = served.clone();
    std::thread::spawn(move || {
        let mut ranges = 0;
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut asked = None;
            for line in BufReader::new(&stream).lines() {
                let line = line.unwrap_or_default().to_lowercase();
                if let Some((from, to)) = line.strip_prefix("range: bytes=").and_then(|r| r.split_once('-')) {
                    asked = Some((from.parse().unwrap(), to.parse::<usize>().unwrap().min(body.len() - 1)));
                }
                if line.is_empty() {
                    break;
                }
            }
            // A client that was dropped while it connected asks for nothing.
            let Some((first, last)) = asked else { continue };
            let slice: &[u8] = &body[first..=last];
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-range: bytes {first}-{last}/{length}\r\netag: \"{etag}\"\r\n\
                 x-repo-commit: c0ffee\r\nconnection: close\r\n\r\n",
                slice.len()
            );
            ranges += 1;
            let sent = if ranges == patience { slice.len() / 2 } else { slice.len() };
            counter.fetch_add(sent, Ordering::Relaxed);
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&slice[..sent]));
        }
    });
    Hub { endpoint, served }
}

fn tiny() -> Vec<u8> {
    TinyModel::default().to_bytes().unwrap()
}

fn sha(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn get(store: &Store, hub: &Hub, reference: &str) -> Result<Pulled, PullError> {
    let options = HubOptions { chunk_bytes: CHUNK, endpoint: Some(hub.endpoint.clone()), token: None };
    pull_reference(store, &Reference::parse(reference).unwrap(), None, &options, |_, _| Bytes::silent())
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    let body = tiny();
    assert!(body.len() > 6 * CHUNK, "the file spans chunks");
    let hub = hub(body.clone(), sha(&body), 5, "206 Partial Content");
    let error = get(&store, &hub, "hf:o/r/tiny.gguf").unwrap_err();
    assert!(matches!(error, PullError::Offline { .. }), "{error:?}");
    assert!(store.list().is_empty());

    let pulled = get(&store, &hub, "hf:o/r/tiny.gguf").unwrap();
    assert_eq!(std::fs::read(&pulled.path).unwrap(), body);
    assert_eq!(pulled.record.sha256, sha(&body));
    let served = hub.served.load(Ordering::Relaxed);
    assert!(served < body.len() + 2 * CHUNK, "{served} bytes were served for a file of {}", body.len());

    // With its hash named and the file in place, nothing is asked of the hub.
    let again = get(&store, &hub, &format!("hf:o/r/tiny.gguf#sha256={}", sha(&body))).unwrap();
    assert!(again.cached);
    assert_eq!(hub.served.load(Ordering::Relaxed), served);
}

#[test]
fn what_a_hub_can_do_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    let body = tiny();
    let check = |hub: &Hub, reference: &str, expect: &str| {
        let error = get(&store, hub, reference).unwrap_err();
        assert!(format!("{error:?}").starts_with(expect), "{reference}: {error:?}");
        assert!(error.hint().is_some());
    };
    let wrong = "11".repeat(32);
    let partial = "206 Partial Content";
    check(&hub(body.clone(), wrong.clone(), 0, partial), "hf:o/r/a.gguf", "WrongHash");
    check(&hub(body.clone(), sha(&body), 0, partial), &format!("hf:o/r/b.gguf#sha256={wrong}"), "WrongHash");
    check(&hub(b"PK of no use".to_vec(), "tag".into(), 0, partial), "hf:o/r/c.gguf", "BadFile");
    check(&hub(body.clone(), sha(&body), 0, "404 Not Found"), "hf:o/r/d.gguf", "Refused");
    check(&hub(body[..body.len() - 500].to_vec(), "tag".into(), 0, partial), "hf:o/r/e.gguf", "BadFile");
    check(&hub_that_says(1 << 60, body.clone(), sha(&body), 0, partial), "hf:o/r/g.gguf", "DiskFull");
    let nobody = Hub { endpoint: "http://127.0.0.1:1".into(), served: Arc::default() };
    check(&nobody, "hf:o/r/f.gguf", "Offline");
    assert!(store.list().is_empty(), "nothing wrong was kept");
}
