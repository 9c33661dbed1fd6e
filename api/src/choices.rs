//! Several replies to one request, as one stream: `n`, and the prompts of a legacy request.
//!
//! Each reply is a completion of its own, with its own provider, receipt and seed. [`CompletionEvent::Choice`] says whose
//! events follow; the last reply to end carries the bill of them all. The prompt's tokens count once in `usage`, as OpenAI
//! counts them; what each provider was paid for is in the legs, and the cost is their sum.

use std::collections::{BTreeSet, VecDeque};

use futures::{StreamExt, stream};

use crate::service::{Bill, CompletionEvent, CompletionStream, ServiceError};

/// One reply's events, and which prompt it continues.
pub(crate) struct Reply {
    pub(crate) prompt: usize,
    pub(crate) events: CompletionStream,
}

/// All replies as one stream. One alone passes unchanged.
pub(crate) fn merge(mut replies: Vec<Reply>) -> CompletionStream {
    if replies.len() == 1
        && let Some(only) = replies.pop()
    {
        return only.events;
    }
    let prompts: Vec<usize> = replies.iter().map(|reply| reply.prompt).collect();
    let tagged = replies.into_iter().enumerate().map(|(index, reply)| {
        let ended = stream::once(async { Err(ServiceError::no_result()) });
        reply.events.chain(ended).map(move |event| (index, event)).boxed()
    });
    let merged = Merged {
        events: stream::select_all(tagged).boxed(),
        open: (0..prompts.len()).collect(),
        prompts,
        counted: BTreeSet::new(),
        bill: Bill::default(),
        current: None,
        ready: VecDeque::new(),
    };
    Box::pin(stream::unfold(merged, |mut merged| async move { Some((merged.next().await?, merged)) }))
}

struct Merged {
    events: stream::BoxStream<'static, (usize, Result<CompletionEvent, ServiceError>)>,
    open: BTreeSet<usize>,
    prompts: Vec<usize>,
    /// Prompts whose tokens are in the bill.
    counted: BTreeSet<usize>,
    bill: Bill,
    current: Option<usize>,
    ready: VecDeque<Result<CompletionEvent, ServiceError>>,
}

impl Merged {
    async fn next(&mut self) -> Option<Result<CompletionEvent, ServiceError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                if event.is_err() {
                    self.open.clear();
                }
                return Some(event);
            }
            if self.open.is_empty() {
                return None;
            }
            let (index, event) = self.events.next().await?;
            // What follows a reply's end is the mark set behind it.
            if self.open.contains(&index) {
                self.take(index, event);
            }
        }
    }

    fn take(&mut self, index: usize, event: Result<CompletionEvent, ServiceError>) {
        let event = match event {
            Ok(CompletionEvent::Finished { reason, bill }) => {
                self.open.remove(&index);
                self.add(index, bill);
                if self.open.is_empty() {
                    CompletionEvent::Finished { reason, bill: std::mem::take(&mut self.bill) }
                } else {
                    CompletionEvent::Ended { reason }
                }
            }
            Ok(event) => event,
            Err(error) => return self.ready.push_back(Err(error)),
        };
        if self.current != Some(index) {
            self.current = Some(index);
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            self.ready.push_back(Ok(CompletionEvent::Choice { index }));
        }
        self.ready.push_back(Ok(event));
    }

    fn add(&mut self, index: usize, bill: Bill) {
        let usage = &mut self.bill.usage;
        if self.prompts.get(index).is_some_and(|prompt| self.counted.insert(*prompt)) {
            usage.prompt = usage.prompt.saturating_add(bill.usage.prompt);
            usage.cached_prompt = usage.cached_prompt.saturating_add(bill.usage.cached_prompt);
        }
        usage.completion = usage.completion.saturating_add(bill.usage.completion);
        usage.reasoning = usage.reasoning.saturating_add(bill.usage.reasoning);
        self.bill.routing_fees = self.bill.routing_fees.saturating_add(bill.routing_fees);
        if bill.charged.is_some() || self.bill.charged.is_some() {
            let before = self.bill.charged.unwrap_or(self.bill.cost);
            self.bill.charged = Some(before.saturating_add(bill.charged.unwrap_or(bill.cost)));
        }
        self.bill.cost = self.bill.cost.saturating_add(bill.cost);
        self.bill.rate = bill.rate.or(self.bill.rate.take());
        self.bill.legs.extend(bill.legs);
    }
}
