//! What every call writes, in groups: calls that come together are committed together, and one wait for the disk serves them all.
//!
//! Each call proves its limits inside the transaction, after those before it, and writes only once it is proven: a refusal
//! leaves nothing behind and the group goes on. Where storage fails, the whole group does, and each is told so. Nothing is
//! answered before the commit returned.

use super::{CallEnd, CallRef, KeyError, KeyStore, NewCall, calls};
use crate::begin::begin;
use satgrid_types::{Msat, RequestId, UnixMs};
use sqlx::SqliteConnection;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::{Instant, timeout_at},
};

/// Asks that wait before callers are made to.
const QUEUE: usize = 1_024;
/// Asks in one transaction.
const GROUP: usize = 256;
/// How long what nobody waits for may stay off the disk.
const UNHURRIED: Duration = Duration::from_millis(100);

type Answer<T> = oneshot::Sender<Result<T, KeyError>>;
/// Tells one caller, given whether the group was committed.
type Reply = Box<dyn FnOnce(Result<(), KeyError>) + Send>;

pub(super) enum Ask {
    Open {
        new: Box<NewCall>,
        now: UnixMs,
        answer: Answer<(CallRef, Msat)>,
    },
    Leg {
        call: CallRef,
        request: RequestId,
        answer: Answer<()>,
    },
    End {
        call: CallRef,
        end: Box<CallEnd>,
        now: UnixMs,
        /// None where nobody waits.
        answer: Option<Answer<Msat>>,
    },
    Ended {
        new: Box<NewCall>,
        at: UnixMs,
        end: Box<CallEnd>,
        now: UnixMs,
    },
    /// Answered when everything before it is written.
    Flush {
        answer: Answer<()>,
    },
}

impl KeyStore {
    /// Everything that was asked before is on the disk when this returns.
    pub async fn flush(&self) -> Result<(), KeyError> {
        self.asked(|answer| Ask::Flush { answer }).await
    }

    pub(super) async fn asked<T>(&self, ask: impl FnOnce(Answer<T>) -> Ask) -> Result<T, KeyError> {
        let (answer, answered) = oneshot::channel();
        self.tell(ask(answer)).await?;
        answered.await.map_err(|_| gone())?
    }

    pub(super) async fn tell(&self, ask: Ask) -> Result<(), KeyError> {
        self.asks.send(ask).await.map_err(|_| gone())
    }
}

fn gone() -> KeyError {
    KeyError::Storage("their writer has stopped".to_owned())
}

/// Starts the writer. It ends with the last handle.
pub(super) fn start(connection: Arc<Mutex<SqliteConnection>>, turn: Arc<Mutex<()>>) -> mpsc::Sender<Ask> {
    let (asks, mut inbox) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut waiting = Vec::new();
        while inbox.recv_many(&mut waiting, GROUP).await > 0 {
            gather(&mut inbox, &mut waiting).await;
            let mut connection = connection.lock().await;
            let _turn = turn.lock().await;
            // Those that came while others had their turn.
            while waiting.len() < GROUP
                && let Ok(ask) = inbox.try_recv()
            {
                waiting.push(ask);
            }
            write(&mut connection, std::mem::take(&mut waiting)).await;
        }
    });
    asks
}

/// Where nobody waits for the disk, more are waited for: the journal wants its turns.
async fn gather(inbox: &mut mpsc::Receiver<Ask>, waiting: &mut Vec<Ask>) {
    let until = Instant::now() + UNHURRIED;
    while waiting.len() < GROUP && waiting.iter().all(|ask| matches!(ask, Ask::Ended { .. })) {
        match timeout_at(until, inbox.recv()).await {
            Ok(Some(ask)) => waiting.push(ask),
            Ok(None) | Err(_) => return,
        }
    }
}

async fn write(connection: &mut SqliteConnection, asks: Vec<Ask>) {
    let mut replies: Vec<Reply> = Vec::with_capacity(asks.len());
    let only_flushes = asks.iter().all(|ask| matches!(ask, Ask::Flush { .. }));
    let written = match only_flushes {
        true => {
            for ask in asks {
                replies.extend(done(connection, ask, &mut None).await);
            }
            Ok(())
        }
        false => transaction(connection, asks, &mut replies).await,
    };
    if let Err(error) = &written {
        tracing::error!(%error, asks = replies.len(), "nothing of this group of calls was written");
    }
    replies.into_iter().for_each(|reply| reply(written.clone()));
}

async fn transaction(
    connection: &mut SqliteConnection,
    asks: Vec<Ask>,
    replies: &mut Vec<Reply>,
) -> Result<(), KeyError> {
    let mut tx = match begin(connection).await {
        Ok(tx) => tx,
        Err(error) => {
            replies.extend(asks.into_iter().filter_map(unanswered));
            return Err(error.into());
        }
    };
    let mut fault = None;
    for ask in asks {
        replies.extend(match &fault {
            None => done(&mut tx, ask, &mut fault).await,
            Some(_) => unanswered(ask),
        });
    }
    match fault {
        // Dropped without a commit, the transaction is rolled back.
        Some(error) => Err(error),
        None => Ok(tx.commit().await?),
    }
}

/// Does one thing; a failure of storage, which is nobody's own, goes to `fault`.
async fn done(tx: &mut SqliteConnection, ask: Ask, fault: &mut Option<KeyError>) -> Option<Reply> {
    match ask {
        Ask::Open { new, now, answer } => Some(reply(answer, calls::open(tx, &new, now).await, fault)),
        Ask::Leg { call, request, answer } => Some(reply(answer, calls::leg(tx, call, request).await, fault)),
        Ask::End { call, end, now, answer: Some(answer) } => {
            Some(reply(answer, calls::end(tx, call, &end, now).await, fault))
        }
        Ask::End { call, end, now, answer: None } => {
            unwaited(call.id, calls::end(tx, call, &end, now).await.map(drop), fault);
            None
        }
        Ask::Flush { answer } => Some(reply(answer, Ok(()), fault)),
        Ask::Ended { new, at, end, now } => {
            unwaited(new.id, calls::ended(tx, &new, at, &end, now).await, fault);
            None
        }
    }
}

fn unwaited(call: RequestId, done: Result<(), KeyError>, fault: &mut Option<KeyError>) {
    match done {
        Ok(()) => {}
        Err(error @ KeyError::Storage(_)) => *fault = Some(error),
        Err(error) => tracing::error!(%error, call = %call.short(), "a call was not written down"),
    }
}

fn reply<T: Send + 'static>(answer: Answer<T>, done: Result<T, KeyError>, fault: &mut Option<KeyError>) -> Reply {
    if let Err(error @ KeyError::Storage(_)) = &done {
        *fault = Some(error.clone());
    }
    // A caller that stopped waiting needs no answer.
    Box::new(move |committed| drop(answer.send(committed.and(done))))
}

/// The reply to what is not tried any more.
fn unanswered(ask: Ask) -> Option<Reply> {
    match ask {
        Ask::Open { answer, .. } => Some(failing(answer)),
        Ask::Leg { answer, .. } | Ask::Flush { answer } => Some(failing(answer)),
        Ask::End { answer, .. } => answer.map(failing),
        Ask::Ended { .. } => None,
    }
}

fn failing<T: Send + 'static>(answer: Answer<T>) -> Reply {
    Box::new(move |committed| drop(answer.send(committed.and(Err(gone())))))
}
