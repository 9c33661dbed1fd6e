//! The one writer of the journal: orders appends, proves each against the books before it is written, and tells the
//! roles when it is durable. Appends that wait together are written together.

use super::now;
use satgrid_ledger::{
    books::Books,
    entry::{Draft, Entry, Evidence},
    journal::{Journal, JournalError, MAX_APPEND, MAX_READ},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot, watch};

/// Appends that may wait.
const QUEUE: usize = 4_096;
/// So many wait that who makes more is held back until the disk has caught up.
const BEHIND: usize = QUEUE / 2;
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(5);
/// Appends that are written together.
const JOBS_AT_ONCE: usize = 256;
/// Drafts in one append of a role: a session's opening is three, a resume ends up to 64 requests one by one.
const DRAFTS_PER_JOB: usize = 8;
const _: () = assert!(JOBS_AT_ONCE * DRAFTS_PER_JOB <= MAX_APPEND);

/// A handle to the writer. Clones feed the same queue.
#[derive(Clone)]
pub(crate) struct JournalWriter {
    queue: mpsc::Sender<Job>,
    full: watch::Receiver<bool>,
}

struct Job {
    drafts: Vec<Draft>,
    done: oneshot::Sender<Result<Vec<Entry>, String>>,
}

impl JournalWriter {
    /// Folds what the journal holds, shows every entry to `each`, and starts the writer.
    pub(crate) async fn open(
        journal: Arc<dyn Journal>,
        mut each: impl FnMut(&Entry),
    ) -> Result<JournalWriter, JournalError> {
        let mut books = Books::new();
        let mut from = 0;
        loop {
            let entries = journal.read(from, MAX_READ).await?;
            let Some(last) = entries.last() else { break };
            from = last.seq.saturating_add(1);
            for entry in &entries {
                if let Err(error) = books.apply(entry.at, &entry.draft()) {
                    let what = format!("the books do not accept it: {error}");
                    return Err(JournalError::Damaged { seq: entry.seq, what });
                }
                each(entry);
            }
        }
        let (queue, inbox) = mpsc::channel(QUEUE);
        let (found_full, full) = watch::channel(false);
        tokio::spawn(write(journal, books, inbox, found_full));
        Ok(JournalWriter { queue, full })
    }

    /// Turns true when an append failed since the disk is full: nothing is written any more by this process.
    pub(crate) fn full(&self) -> watch::Receiver<bool> {
        self.full.clone()
    }

    /// Waits while the disk is behind. A role's driver asks before it hears the next message: those who speak to it are held back
    /// then by their connections, and nobody's words fill the queue.
    pub(crate) async fn caught_up(&self) {
        while QUEUE - self.queue.capacity() >= BEHIND && !self.queue.is_closed() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Appends all drafts or none; durable when it returns `Ok`, with the entries of receipts as they stand in the journal.
    /// Calls are written in the order in which they are made.
    pub(crate) fn append(&self, drafts: Vec<Draft>) -> impl Future<Output = Result<Vec<Entry>, String>> + Send + use<> {
        let (done, written) = oneshot::channel();
        let queued = self.queue.try_send(Job { drafts, done });
        async move {
            queued.map_err(|_| "the journal's queue is full".to_owned())?;
            written.await.map_err(|_| "the journal's writer has stopped".to_owned())?
        }
    }
}

async fn write(
    journal: Arc<dyn Journal>,
    mut books: Books,
    mut inbox: mpsc::Receiver<Job>,
    found_full: watch::Sender<bool>,
) {
    let mut broken: Option<String> = None;
    let mut waiting = Vec::new();
    while inbox.recv_many(&mut waiting, JOBS_AT_ONCE).await > 0 {
        let jobs = waiting.drain(..);
        if let Some(reason) = &broken {
            jobs.for_each(|job| drop(job.done.send(Err(reason.clone()))));
            continue;
        }
        if let Err(broke) = commit(journal.as_ref(), &mut books, jobs.collect()).await {
            let (full, reason) = (matches!(broke, Broke::Storage(JournalError::Full)), broke.to_string());
            let cure = if full { "the node starts anew when there is room" } else { "mend it and restart the node" };
            tracing::error!(%reason, "the journal cannot be written; no work is taken; {cure}");
            broken = Some(reason);
            found_full.send_replace(full);
        }
    }
}

fn is_receipt(entry: &Entry) -> bool {
    matches!(entry.evidence, Some(Evidence::Receipt { .. }))
}

/// Why nothing more is written.
#[derive(Debug, Clone, thiserror::Error)]
enum Broke {
    #[error(transparent)]
    Storage(JournalError),
    #[error("an entry does not balance: {0}")]
    Books(String),
}

/// Proves each job against the books, writes those that pass, and answers all.
///
/// An error breaks the writer for good: the books may be ahead of the disk then, and only a restart brings them together.
async fn commit(journal: &dyn Journal, books: &mut Books, jobs: Vec<Job>) -> Result<(), Broke> {
    let at = now();
    let mut passed = Vec::with_capacity(jobs.len());
    let mut drafts = Vec::new();
    let mut fault = None;
    for job in jobs {
        if fault.is_none() {
            let applied = job.drafts.iter().try_for_each(|draft| books.apply(at, draft));
            fault = applied.err().map(|error| Broke::Books(error.to_string()));
        }
        match &fault {
            None => {
                let count = job.drafts.len();
                drafts.extend(job.drafts);
                passed.push((job.done, count));
            }
            Some(broke) => drop(job.done.send(Err(broke.to_string()))),
        }
    }
    let written =
        if drafts.is_empty() { Ok(Vec::new()) } else { journal.append(at, drafts).await.map_err(Broke::Storage) };
    let (mut entries, written) = match written {
        Ok(entries) => (entries.into_iter(), Ok(())),
        Err(broke) => (Vec::new().into_iter(), Err(broke)),
    };
    for (done, count) in passed {
        let receipts = entries.by_ref().take(count).filter(is_receipt).collect();
        let _ = done.send(written.clone().map(|()| receipts).map_err(|broke| broke.to_string()));
    }
    written.and(fault.map_or(Ok(()), Err))
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_ledger::{entry::Head, journal::JournalFuture};
    use satgrid_types::{NodeKey, UnixMs};
    use tokio::{sync::Semaphore, time::timeout};

    /// A disk that writes when it is told to.
    struct Slow(Arc<Semaphore>);

    impl Journal for Slow {
        fn append(&self, _at: UnixMs, _drafts: Vec<Draft>) -> JournalFuture<'_, Vec<Entry>> {
            Box::pin(async move {
                self.0.acquire().await.map_err(|_| JournalError::Closed)?.forget();
                Ok(Vec::new())
            })
        }
        fn read(&self, _from: u64, _limit: usize) -> JournalFuture<'_, Vec<Entry>> {
            Box::pin(async { Ok(Vec::new()) })
        }
        fn head(&self) -> JournalFuture<'_, Head> {
            Box::pin(async { Ok(Head::EMPTY) })
        }
    }

    #[tokio::test]
    async fn who_makes_entries_faster_than_the_disk_takes_them_is_held_back() {
        let disk = Arc::new(Semaphore::new(0));
        let writer = JournalWriter::open(Arc::new(Slow(disk.clone())), |_| {}).await.unwrap();
        let one = || {
            let rule = "rule".to_owned();
            vec![Draft::of(Evidence::Misbehaviour { peer: NodeKey([1; 32]), rule, statement: Vec::new() })]
        };
        let mut written = Vec::new();
        // Some are taken out by the writer, which waits with them.
        while QUEUE - writer.queue.capacity() < BEHIND {
            timeout(Duration::from_secs(1), writer.caught_up()).await.unwrap();
            written.push(writer.append(one()));
            tokio::task::yield_now().await;
        }
        assert!(timeout(Duration::from_millis(50), writer.caught_up()).await.is_err());
        disk.add_permits(1 << 16);
        timeout(Duration::from_secs(10), writer.caught_up()).await.unwrap();
        for one in written {
            assert_eq!(one.await.map(|entries| entries.len()), Ok(0));
        }
    }
}
