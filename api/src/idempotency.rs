//! `Idempotency-Key`: the same key with the same body within a window is one run, billed once.
//!
//! A keyed run is pulled by a task of its own into a bounded log; every request with its key reads that log from the
//! start, while it grows or after it ended. In memory only: a restart forgets keys, not money.
//!
//! | state of a run | a request with its key | leaves by |
//! |---|---|---|
//! | running | joins: replays the log, then follows | end of the work; nobody listening for the grace period |
//! | ended | replays | the window's end, or the oldest makes room |
//! | refused before any output | not kept | the next request starts anew |
//! | abandoned | replays what there was, then an error: it was paid for and is not started twice | as ended |

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, stream};
use satgrid_types::RequestId;
use tokio::{sync::watch, time::Instant};
use tracing::Instrument;

use crate::{
    config::limits::MAX_REPLY_BYTES,
    service::{CompletionEvent, CompletionStream, ServiceError},
    shutdown::Closing,
};

/// SHA-256 over caller, path and the client's key: one caller's keys never meet another's.
pub(crate) type RunKey = [u8; 32];

pub(crate) struct Runs {
    map: Mutex<HashMap<RunKey, Arc<Run>>>,
    capacity: usize,
    window: Duration,
    grace: Duration,
}

/// What the first request of a run fixed for all who join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) request: RequestId,
    /// Unix seconds.
    pub(crate) created: u64,
}

pub(crate) struct Joined {
    pub(crate) identity: Identity,
    pub(crate) events: CompletionStream,
    /// Whether an earlier request started the run.
    pub(crate) replayed: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JoinError {
    /// The key came with another body before.
    OtherBody,
    /// Every slot holds a run that still goes on.
    Full,
}

struct Run {
    body: [u8; 32],
    identity: Identity,
    log: Mutex<Log>,
    /// Counts changes of the log.
    grown: watch::Sender<u64>,
    listeners: watch::Sender<usize>,
}

#[derive(Default)]
struct Log {
    events: Vec<Result<CompletionEvent, ServiceError>>,
    bytes: usize,
    ended: Option<Instant>,
}

impl Runs {
    pub(crate) fn new(capacity: usize, window: Duration, grace: Duration) -> Arc<Runs> {
        Arc::new(Runs { map: Mutex::default(), capacity, window, grace })
    }

    /// Joins the run of `key`, or makes one from `start`. Must be called inside a tokio runtime.
    pub(crate) fn join(
        self: &Arc<Self>,
        key: RunKey,
        body: [u8; 32],
        identity: Identity,
        closing: &Closing,
        start: impl FnOnce() -> CompletionStream,
    ) -> Result<Joined, JoinError> {
        let mut map = lock(&self.map);
        self.forget_old(&mut map);
        if let Some(run) = map.get(&key) {
            if run.body != body {
                return Err(JoinError::OtherBody);
            }
            return Ok(Joined { identity: run.identity, events: follow(Arc::clone(run)), replayed: true });
        }
        if map.len() >= self.capacity {
            let oldest = map.iter().filter_map(|(key, run)| Some((lock(&run.log).ended?, *key))).min();
            let Some((_, oldest)) = oldest else { return Err(JoinError::Full) };
            map.remove(&oldest);
        }
        let run = Arc::new(Run {
            body,
            identity,
            log: Mutex::default(),
            grown: watch::Sender::new(0),
            listeners: watch::Sender::new(0),
        });
        map.insert(key, Arc::clone(&run));
        drop(map);
        let events = follow(Arc::clone(&run));
        let work = drive(Arc::clone(self), key, run, start(), closing.clone());
        tokio::spawn(work.in_current_span());
        Ok(Joined { identity, events, replayed: false })
    }

    fn forget_old(&self, map: &mut HashMap<RunKey, Arc<Run>>) {
        let now = Instant::now();
        map.retain(|_, run| lock(&run.log).ended.is_none_or(|ended| now.duration_since(ended) < self.window));
    }
}

/// Pulls the work into the log until it ends, nobody has listened for the grace period, or the node closes.
async fn drive(runs: Arc<Runs>, key: RunKey, run: Arc<Run>, mut events: CompletionStream, mut closing: Closing) {
    let mut listeners = run.listeners.subscribe();
    let abandoned = async {
        loop {
            let _ = listeners.wait_for(|n| *n == 0).await;
            let back = async { drop(listeners.wait_for(|n| *n > 0).await) };
            if tokio::time::timeout(runs.grace, back).await.is_err() {
                return;
            }
        }
    };
    tokio::pin!(abandoned);
    loop {
        let (event, left) = tokio::select! {
            event = events.next() => (event, false),
            () = &mut abandoned => (Some(Err(ServiceError::ProviderFailed {
                reason: format!(
                    "the client was away for {} s and the work was stopped; a new Idempotency-Key starts it again",
                    runs.grace.as_secs()
                ),
                bill: None,
            })), true),
            () = closing.aborted() => (Some(Err(ServiceError::closing())), false),
        };
        let event = event.unwrap_or_else(|| Err(ServiceError::no_result()));
        let (last, refused) = run.push(event);
        // What was left behind may have read its prompt, which is paid for: only a refusal starts anew.
        if refused && !left {
            let mut map = lock(&runs.map);
            // Another run may have its key by now, if this one has made room.
            if map.get(&key).is_some_and(|kept| Arc::ptr_eq(kept, &run)) {
                map.remove(&key);
            }
        }
        if last {
            return;
        }
    }
}

impl Run {
    /// Whether that was the last event, and whether the run ended before it gave anything.
    fn push(&self, event: Result<CompletionEvent, ServiceError>) -> (bool, bool) {
        let mut log = lock(&self.log);
        let mut event = event;
        if let Ok(told) = &event {
            log.bytes = log.bytes.saturating_add(told.bytes());
            if log.bytes > MAX_REPLY_BYTES {
                event = Err(ServiceError::reply_too_large());
            }
        }
        let last = matches!(event, Err(_) | Ok(CompletionEvent::Finished { .. }));
        let silent = log
            .events
            .iter()
            .all(|e| matches!(e, Ok(CompletionEvent::Started { .. } | CompletionEvent::Choice { .. })));
        let unbilled =
            matches!(&event, Err(error) if !matches!(error, ServiceError::ProviderFailed { bill: Some(_), .. }));
        log.events.push(event);
        if last {
            log.ended = Some(Instant::now());
        }
        drop(log);
        self.grown.send_modify(|n| *n = n.wrapping_add(1));
        (last, silent && unbilled)
    }
}

/// The log from its start, then as it grows.
fn follow(run: Arc<Run>) -> CompletionStream {
    struct Listener {
        run: Arc<Run>,
        grown: watch::Receiver<u64>,
        next: usize,
    }
    impl Drop for Listener {
        fn drop(&mut self) {
            self.run.listeners.send_modify(|n| *n = n.saturating_sub(1));
        }
    }
    run.listeners.send_modify(|n| *n += 1);
    let grown = run.grown.subscribe();
    Box::pin(stream::unfold(Listener { run, grown, next: 0 }, |mut listener| async move {
        loop {
            listener.grown.borrow_and_update();
            {
                let log = lock(&listener.run.log);
                if let Some(event) = log.events.get(listener.next).cloned() {
                    drop(log);
                    listener.next += 1;
                    return Some((event, listener));
                }
                if log.ended.is_some() {
                    return None;
                }
            }
            // The sender lives in the run that this listener holds.
            listener.grown.changed().await.ok()?;
        }
    }))
}

/// A panic elsewhere leaves these maps whole: each change is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::channel::mpsc;
    use satgrid_types::FinishReason;

    const GRACE: Duration = Duration::from_secs(60);

    fn open() -> Closing {
        crate::shutdown::pair().1
    }

    fn text(s: &str) -> Result<CompletionEvent, ServiceError> {
        Ok(CompletionEvent::Text { delta: s.to_owned() })
    }

    fn finished() -> Result<CompletionEvent, ServiceError> {
        Ok(CompletionEvent::Finished { reason: FinishReason::Stop, bill: crate::Bill::default() })
    }

    fn id(n: u8) -> Identity {
        Identity { request: RequestId([n; 32]), created: u64::from(n) }
    }

    fn script(events: Vec<Result<CompletionEvent, ServiceError>>) -> CompletionStream {
        Box::pin(stream::iter(events))
    }

    fn never() -> CompletionStream {
        unreachable!("the work must not start a second time")
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_request_joins_and_a_third_replays() {
        let runs = Runs::new(4, Duration::from_secs(600), GRACE);
        let (tx, rx) = mpsc::unbounded();
        let first = runs.join([1; 32], [9; 32], id(1), &open(), || Box::pin(rx)).unwrap();
        tx.unbounded_send(text("a")).unwrap();
        let second = runs.join([1; 32], [9; 32], id(2), &open(), never).unwrap();
        assert_eq!((second.identity, second.replayed, first.replayed), (id(1), true, false));
        tx.unbounded_send(text("b")).unwrap();
        tx.unbounded_send(finished()).unwrap();
        let whole = vec![text("a"), text("b"), finished()];
        assert_eq!(first.events.collect::<Vec<_>>().await, whole);
        assert_eq!(second.events.collect::<Vec<_>>().await, whole);
        let third = runs.join([1; 32], [9; 32], id(3), &open(), never).unwrap();
        assert_eq!(third.events.collect::<Vec<_>>().await, whole);
        assert_eq!(runs.join([1; 32], [8; 32], id(4), &open(), never).err(), Some(JoinError::OtherBody));

        tokio::time::advance(Duration::from_secs(601)).await;
        let fresh = runs.join([1; 32], [8; 32], id(5), &open(), || script(vec![finished()])).unwrap();
        assert!(!fresh.replayed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_not_kept() {
        let runs = Runs::new(4, Duration::from_secs(600), GRACE);
        let busy = Err(ServiceError::Busy { retry_after: Duration::from_secs(1) });
        let refusal = busy.clone();
        let first = runs.join([1; 32], [9; 32], id(1), &open(), || script(vec![refusal])).unwrap();
        assert_eq!(first.events.collect::<Vec<_>>().await, vec![busy]);
        let second = runs.join([1; 32], [9; 32], id(2), &open(), || script(vec![text("x"), finished()])).unwrap();
        assert!(!second.replayed);
        assert_eq!(second.events.collect::<Vec<_>>().await, vec![text("x"), finished()]);
    }

    #[tokio::test(start_paused = true)]
    async fn work_outlives_its_listener_for_the_grace_period_only() {
        let runs = Runs::new(4, Duration::from_secs(600), GRACE);
        let (tx, rx) = mpsc::unbounded();
        let mut first = runs.join([1; 32], [9; 32], id(1), &open(), || Box::pin(rx)).unwrap();
        tx.unbounded_send(text("a")).unwrap();
        assert_eq!(first.events.next().await, Some(text("a")));
        drop(first);
        tokio::time::sleep(GRACE / 2).await;
        assert!(!tx.is_closed(), "still within the grace period");
        let mut back = runs.join([1; 32], [9; 32], id(2), &open(), never).unwrap();
        assert_eq!(back.events.next().await, Some(text("a")));
        tokio::time::sleep(GRACE * 2).await;
        assert!(!tx.is_closed(), "somebody listens");
        drop(back);
        // Output does not restart the clock.
        tokio::time::sleep(GRACE / 2).await;
        tx.unbounded_send(text("b")).unwrap();
        tokio::time::sleep(GRACE / 2 + Duration::from_secs(1)).await;
        assert!(tx.is_closed(), "nobody came back, so the work was cancelled");
        let late = runs.join([1; 32], [9; 32], id(3), &open(), never).unwrap();
        let events = late.events.collect::<Vec<_>>().await;
        assert_eq!(events[..2], [text("a"), text("b")]);
        assert!(matches!(events[2], Err(ServiceError::ProviderFailed { .. })), "{events:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_was_left_before_it_spoke_is_not_started_twice() {
        let runs = Runs::new(4, Duration::from_secs(600), GRACE);
        let started = || -> CompletionStream {
            let first = CompletionEvent::Started { model: "m".to_owned(), fingerprint: None };
            Box::pin(stream::iter([Ok(first)]).chain(stream::pending()))
        };
        drop(runs.join([1; 32], [9; 32], id(1), &open(), started).unwrap());
        tokio::time::sleep(GRACE * 2).await;
        let late = runs.join([1; 32], [9; 32], id(2), &open(), never).unwrap();
        assert_eq!((late.identity, late.replayed), (id(1), true));
        let events = late.events.collect::<Vec<_>>().await;
        assert!(matches!(events[..], [Ok(_), Err(ServiceError::ProviderFailed { .. })]), "{events:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn closing_ends_work_that_nobody_waits_for() {
        let runs = Runs::new(4, Duration::from_secs(600), GRACE);
        let (closer, closing) = crate::shutdown::pair();
        let (tx, rx) = mpsc::unbounded::<Result<CompletionEvent, ServiceError>>();
        drop(runs.join([1; 32], [9; 32], id(1), &closing, || Box::pin(rx)).unwrap());
        closer.drain();
        tokio::task::yield_now().await;
        assert!(!tx.is_closed(), "draining lets work go on");
        closer.abort();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(tx.is_closed());
    }

    #[tokio::test(start_paused = true)]
    async fn the_store_is_bounded() {
        let runs = Runs::new(2, Duration::from_secs(600), GRACE);
        let endless = || -> CompletionStream { Box::pin(stream::pending()) };
        let one = runs.join([1; 32], [0; 32], id(1), &open(), endless).unwrap();
        let two = runs.join([2; 32], [0; 32], id(2), &open(), || script(vec![text("2"), finished()])).unwrap();
        assert_eq!(two.events.count().await, 2);
        let three = runs.join([3; 32], [0; 32], id(3), &open(), endless).unwrap();
        assert!(!three.replayed, "the ended run made room");
        assert_eq!(runs.join([4; 32], [0; 32], id(4), &open(), never).err(), Some(JoinError::Full));
        drop((one, three));
    }
}
