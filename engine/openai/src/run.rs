//! One job: its prompt sent on as it is granted, its stream read as it may be emitted.

use std::{collections::VecDeque, sync::Arc};

use satgrid_engine::{
    port::{EngineEvent, FinishReason, Job, JobError, JobId},
    sampling::Sampling,
    stop::StopMatcher,
};
use tokio::sync::watch;

use crate::{
    client::{Stream, UpstreamError},
    dialect::{Ask, End, PromptForm},
    engine::{Limits, Shared},
    retokenise::{Retokeniser, ids_of},
};

/// How a job ended.
enum Ended {
    Finished(FinishReason),
    Failed(JobError),
    /// The server is gone: the engine says so for all jobs at once.
    Down(String),
    /// Nobody wants it any more.
    Forgotten,
}

/// A job under way.
struct Run<'a> {
    shared: &'a Shared,
    job: &'a Job,
    limits: watch::Receiver<Limits>,
    covered: u32,
    /// Ids that came and may not be emitted yet.
    pending: VecDeque<u32>,
    emitted: u32,
    /// Ids that the server has sent, for dialects that repeat them.
    seen: usize,
    stop: StopMatcher,
    words: Retokeniser,
}

/// Runs a job to its end and reports it.
pub(crate) async fn run(shared: Arc<Shared>, job: Job, limits: watch::Receiver<Limits>) {
    let id = job.id;
    let stop = StopMatcher::new(&job.stop);
    let words = Retokeniser::default();
    let pending = VecDeque::new();
    let mut run = Run { shared: &shared, job: &job, limits, covered: 0, pending, emitted: 0, seen: 0, stop, words };
    let ended = run.drive_on().await.unwrap_or_else(|failed| failed);
    let evaluated = run.evaluated();
    match ended {
        Ended::Finished(reason) => shared.end(id, EngineEvent::Finished { job: id, reason, evaluated }),
        Ended::Failed(error) => shared.end(id, EngineEvent::Failed { job: id, error }),
        Ended::Down(reason) => shared.down(reason),
        Ended::Forgotten => {}
    }
}

/// Goes to the consumer, and into both nodes' logs: what a server says in words may repeat the prompt, or the operator's key.
fn failed(error: UpstreamError) -> Ended {
    match error {
        UpstreamError::Unreachable(_) => Ended::Down(format!("the upstream: {error}")),
        UpstreamError::Status { status, .. } => Ended::Failed(backend(format!("it answered {status}"))),
        UpstreamError::Said(_) => Ended::Failed(backend("it reported an error")),
        UpstreamError::Silent(_) | UpstreamError::BrokeOff | UpstreamError::Garbled(_) => Ended::Failed(backend(error)),
    }
}

fn backend(reason: impl std::fmt::Display) -> JobError {
    JobError::Backend { reason: format!("the upstream: {reason}") }
}

impl Run<'_> {
    fn id(&self) -> JobId {
        self.job.id
    }

    fn prompt_len(&self) -> u32 {
        u32::try_from(self.job.prompt.len()).unwrap_or(u32::MAX)
    }

    fn evaluated(&self) -> u32 {
        self.covered.saturating_add(self.emitted.saturating_sub(1))
    }

    async fn drive_on(&mut self) -> Result<Ended, Ended> {
        self.prime().await?;
        let Some(_slot) = self.slot().await else { return Ok(self.given_up()) };
        loop {
            let limits = *self.limits.borrow_and_update();
            if limits.cancelled {
                return Ok(Ended::Finished(FinishReason::Cancelled));
            }
            let upto = limits.prompt_upto.min(self.prompt_len());
            if upto == self.prompt_len() && limits.output_upto > 0 {
                return self.generate().await;
            }
            if upto > self.covered {
                let cancelled = self.prefill(upto).await?;
                if cancelled {
                    return Ok(Ended::Finished(FinishReason::Cancelled));
                }
                continue;
            }
            if self.limits.changed().await.is_err() {
                return Ok(Ended::Forgotten);
            }
        }
    }

    /// The stop matcher goes on where an earlier run of the same request was.
    async fn prime(&mut self) -> Result<(), Ended> {
        let resumed = self.job.resumed_tokens().to_vec();
        if !resumed.is_empty() && !self.job.stop.is_empty() {
            self.matches(&resumed).await?;
        }
        Ok(())
    }

    /// Feeds tokens to the stop matcher; how many there are up to the one that completes a stop string.
    async fn matches(&mut self, ids: &[u32]) -> Result<Option<usize>, Ended> {
        let pieces = self.shared.tokenizer.pieces(ids, false).await.map_err(|e| Ended::Failed(backend(e)))?;
        for (at, piece) in pieces.iter().enumerate() {
            self.stop.push(piece);
            if self.stop.stopped() {
                return Ok(Some(at + 1));
            }
        }
        Ok(None)
    }

    async fn slot(&mut self) -> Option<tokio::sync::OwnedSemaphorePermit> {
        let slots = Arc::clone(&self.shared.slots);
        loop {
            tokio::select! {
                permit = Arc::clone(&slots).acquire_owned() => return permit.ok(),
                changed = self.limits.changed() => {
                    if changed.is_err() || self.limits.borrow().cancelled {
                        return None;
                    }
                }
            }
        }
    }

    fn given_up(&self) -> Ended {
        if self.limits.borrow().cancelled { Ended::Finished(FinishReason::Cancelled) } else { Ended::Forgotten }
    }

    async fn prompt(&self, upto: u32) -> Result<PromptForm, Ended> {
        let ids = &self.job.prompt[..self.job.prompt.len().min(upto as usize)];
        if self.shared.served.dialect.takes_ids() {
            return Ok(PromptForm::Ids(ids.to_vec()));
        }
        // The server puts its own beginning-of-text in front.
        let bos = self.shared.tokenizer.special().bos;
        let rest = if ids.first().copied() == bos { ids.get(1..).unwrap_or_default() } else { ids };
        let pieces = self.shared.tokenizer.pieces(rest, true).await.map_err(|e| Ended::Failed(backend(e)))?;
        let text = String::from_utf8(pieces.concat());
        text.map(PromptForm::Text).map_err(|_| Ended::Failed(backend("a prompt that is no text cannot be sent on")))
    }

    async fn open(&self, prompt: &PromptForm, sampling: &Sampling, max_output: u32) -> Result<Stream, Ended> {
        let ignore_eos = self.job.ignore_eos;
        let ask = Ask { model: &self.shared.client.config().model, prompt, sampling, max_output, ignore_eos };
        self.shared.client.stream(self.shared.served.dialect, &ask).await.map_err(failed)
    }

    /// Has the server evaluate a part of the prompt, which its prefix cache then holds. True where the job was cancelled.
    async fn prefill(&mut self, upto: u32) -> Result<bool, Ended> {
        let prompt = self.prompt(upto).await?;
        let done = async {
            // One token is drawn and thrown away: servers do not all take none.
            let mut stream = self.open(&prompt, &Sampling::greedy(), 1).await?;
            let mut said = false;
            while stream.next(0).await.map_err(failed)?.is_some() {
                said = true;
            }
            // Whoever says nothing at all has read nothing.
            if said { Ok(()) } else { Err(failed(UpstreamError::BrokeOff)) }
        };
        let mut limits = self.limits.clone();
        tokio::select! {
            done = done => done?,
            () = cancelled(&mut limits) => return Ok(true),
        }
        self.cover(upto);
        Ok(false)
    }

    fn cover(&mut self, upto: u32) {
        if upto > self.covered {
            self.covered = upto;
            self.shared.tell(EngineEvent::Prefilled { job: self.id(), upto, cached: 0 });
        }
    }

    async fn generate(&mut self) -> Result<Ended, Ended> {
        let prompt = self.prompt(self.prompt_len()).await?;
        let room = self.shared.context.saturating_sub(self.prompt_len());
        let most = self.job.max_output.min(room);
        let mut limits = self.limits.clone();
        let mut stream = tokio::select! {
            opened = self.open(&prompt, &self.job.sampling, most) => opened?,
            () = cancelled(&mut limits) => return Ok(Ended::Finished(FinishReason::Cancelled)),
        };
        let mut upstream_end = None;
        loop {
            if let Some(ended) = self.emit(most).await? {
                return Ok(ended);
            }
            if self.pending.is_empty() {
                if let Some(end) = upstream_end {
                    // Only now is everything out that it sent.
                    return Ok(Ended::Finished(match end {
                        End::Stop => FinishReason::Stop,
                        End::Length => FinishReason::Length,
                    }));
                }
                let piece = tokio::select! {
                    piece = stream.next(self.seen) => piece.map_err(failed)?,
                    () = cancelled(&mut limits) => return Ok(Ended::Finished(FinishReason::Cancelled)),
                };
                match piece {
                    Some(piece) => {
                        // Whatever it says, it has read the prompt.
                        self.cover(self.prompt_len());
                        let ids = self.ids(&piece.ids, &piece.text).await?;
                        self.pending.extend(ids);
                        upstream_end = piece.end;
                    }
                    None => return Err(failed(UpstreamError::BrokeOff)),
                }
                if upstream_end.is_some() {
                    let rest = self.words.finish(&*self.shared.tokenizer).await;
                    self.pending.extend(rest.map_err(|e| Ended::Failed(backend(e)))?);
                }
            } else if self.limits.changed().await.is_err() {
                return Ok(Ended::Forgotten);
            } else if self.limits.borrow().cancelled {
                return Ok(Ended::Finished(FinishReason::Cancelled));
            }
        }
    }

    /// What a piece adds to the output, as ids of the vocabulary.
    async fn ids(&mut self, ids: &[u32], text: &str) -> Result<Vec<u32>, Ended> {
        self.seen += ids.len();
        let tokenizer = &*self.shared.tokenizer;
        if self.shared.served.retokenised {
            return self.words.push(text, tokenizer).await.map_err(|e| Ended::Failed(backend(e)));
        }
        if ids.iter().any(|id| *id >= self.shared.vocab) {
            return Err(Ended::Failed(backend("it sent a token that the vocabulary does not have")));
        }
        // llama-server holds tokens back until their text is whole and then names only the last of them.
        if self.shared.served.dialect == crate::Dialect::LlamaServer && !text.is_empty() {
            let pieces = tokenizer.pieces(ids, true).await.map_err(|e| Ended::Failed(backend(e)))?;
            if pieces.concat() != text.as_bytes() {
                return ids_of(text, tokenizer).await.map_err(|e| Ended::Failed(backend(e)));
            }
        }
        Ok(ids.to_vec())
    }

    /// Emits what is granted; the end, where a limit or a stop string says so.
    async fn emit(&mut self, most: u32) -> Result<Option<Ended>, Ended> {
        let upto = self.limits.borrow_and_update().output_upto.min(most);
        let granted = upto.saturating_sub(self.emitted) as usize;
        let mut ids: Vec<u32> = self.pending.drain(..self.pending.len().min(granted)).collect();
        if !ids.is_empty() {
            let stopped = if self.job.stop.is_empty() { None } else { self.matches(&ids).await? };
            if let Some(upto) = stopped {
                ids.truncate(upto);
            }
            let first = self.emitted;
            self.emitted = self.emitted.saturating_add(u32::try_from(ids.len()).unwrap_or(u32::MAX));
            self.shared.tell(EngineEvent::Tokens { job: self.id(), first, ids });
            if stopped.is_some() {
                return Ok(Some(Ended::Finished(FinishReason::Stop)));
            }
        }
        Ok((self.emitted >= most).then_some(Ended::Finished(FinishReason::Length)))
    }
}

/// Returns when the job is cancelled or nobody can cancel it any more.
async fn cancelled(limits: &mut watch::Receiver<Limits>) {
    if limits.wait_for(|limits| limits.cancelled).await.is_err() {
        std::future::pending::<()>().await;
    }
}
