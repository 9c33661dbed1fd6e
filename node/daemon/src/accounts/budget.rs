//! One call's money at its key: reserved before anything is sent, its requests to providers written down before their
//! tokens are passed on, and posted once, when the call has ended, however it ended.
//!
//! | state | awaits | a crash here means |
//! |---|---|---|
//! | reserved | the first provider | nothing was bought: settled for nothing |
//! | under way | the call's end | the journal knows each request: settled for what it says ([`super::recover`]) |
//! | ended | nothing | posted |
//!
//! A call without a stored key reserves nothing; what it cost is written down after it is over, many in one transaction, and
//! its client does not wait for that.

use super::{Desk, detail};
use crate::drive::now;
use crate::traces::CallTrace;
use satgrid_api::{Bill, CallContext, CompletionRequest, LimitSource, Prompt, ServiceError, Shortfall};
use satgrid_ledger::keys::{KeyId, KeyKind, KeyRefusal, room};
use satgrid_ledger_sqlite::{CallEnd, CallRef, CallState, KeyError, KeyStore, NewCall};
use satgrid_pricing::{affordable_output, ceiling, with_margin, without_margin};
use satgrid_types::{FinishReason, Msat, NodeKey, RateCard, RequestId, UnixMs};
use std::{sync::Arc, time::Instant};
use tokio::runtime::Handle;
use tracing::Instrument;

/// A call whose money is in hand.
pub(crate) struct Budget {
    desk: Arc<Desk>,
    new: NewCall,
    /// The reservation; none without a stored key.
    held: Option<Held>,
    /// The key is a stranger's: its charge is booked, with a margin.
    prepaid: bool,
    /// In thousandths.
    margin: u64,
    began: UnixMs,
    clock: Instant,
    /// Told to a collector at the end, if there is one.
    trace: Option<CallTrace>,
    /// The most that the call may produce.
    pub max_output: u32,
}

/// A reservation. Dropped before anybody was asked it is given back: its client has left, and nothing was bought.
struct Held {
    keys: KeyStore,
    call: CallRef,
    reserved: Msat,
    /// Somebody may have been asked: only the call's end, or the next start, knows what it cost.
    asked: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(runtime) = Handle::try_current().ok().filter(|_| !self.asked) else { return };
        let (keys, call) = (self.keys.clone(), self.call);
        runtime.spawn(async move {
            let nothing = Bill::default();
            let (state, detail) = (CallState::Failed, detail::of(None, &nothing));
            let end = CallEnd { state, cost: nothing.cost, charged: nothing.cost, detail };
            if let Err(error) = keys.ending_call(call, &end, now()).await {
                tracing::error!(%error, call = %call.id.short(), "a reservation was not given back; the next start does it");
            }
        });
    }
}

/// What a call is, for its budget.
pub(crate) struct Wanted<'a> {
    pub model: &'a str,
    pub request: &'a CompletionRequest,
    pub rates: Vec<RateCard>,
    pub prompt: u32,
    /// The longest output: what was asked, or what the context leaves.
    pub max_output: u32,
}

impl Budget {
    /// Reserves what the call can cost. Where the caller sets no length, the output is cut to what the key still affords.
    pub(crate) async fn open(
        desk: &Arc<Desk>,
        context: &CallContext,
        wanted: Wanted<'_>,
    ) -> Result<Budget, ServiceError> {
        let Wanted { model, request, rates, prompt, mut max_output } = wanted;
        let key = context.key.as_deref().and_then(|key| key.parse::<KeyId>().ok());
        let (began, clock) = (now(), Instant::now());
        let embeds = matches!(request.prompt, Prompt::Embed(_));
        let trace = desk.traces.is_some().then(|| CallTrace::begin(context.request, model, embeds));
        let mut new = NewCall {
            id: context.request,
            key,
            caller: context.key.clone().filter(|_| key.is_none()),
            model: model.to_owned(),
            needed: Msat::ZERO,
            wanted: Msat::ZERO,
        };
        let Some(key) = key else {
            return Ok(Budget {
                desk: desk.clone(),
                new,
                held: None,
                prepaid: false,
                margin: 0,
                began,
                clock,
                trace,
                max_output,
            });
        };
        // What is left is told exactly where an output is cut to it.
        let chain = match request.max_tokens {
            Some(_) => desk.keys.glance(key, began).await,
            None => desk.keys.chain(key, began).await,
        };
        let chain = chain.map_err(|error| refused(model, error))?;
        let prepaid = chain.first().is_some_and(|key| key.kind == KeyKind::Prepaid);
        let margin = if prepaid { desk.till.margin_permille } else { 0 };
        if request.max_tokens.is_none()
            && let Some(room) = room(&chain)
        {
            let room = without_margin(room, margin);
            // Where not even one token fits, the reservation below says so with its figures.
            max_output = affordable_output(&rates, prompt, max_output, room).unwrap_or(1);
        }
        let dear = |_| ServiceError::InvalidRequest { param: "max_tokens".into(), message: "no bill holds it".into() };
        let most = ceiling(&rates, prompt, max_output).map_err(dear)?;
        let most_of_all = if request.routing.allow_fallbacks { most.failover } else { most.one };
        new.needed = with_margin(most.one, margin);
        new.wanted = with_margin(most_of_all, margin);
        // In a task of its own: a client that leaves while it is written takes nothing with it.
        let (keys, asked) = (desk.keys.clone(), new.clone());
        let opening = tokio::spawn(async move {
            let (call, reserved) = keys.open_call(&asked, began).await?;
            Ok::<_, KeyError>(Held { keys, call, reserved, asked: false })
        });
        let opened = opening.await.unwrap_or_else(|error| Err(KeyError::Storage(error.to_string())));
        let held = opened.map_err(|error| {
            desk.meter.refused();
            refused(model, error)
        })?;
        Ok(Budget { desk: desk.clone(), new, held: Some(held), prepaid, margin, began, clock, trace, max_output })
    }

    /// The most that providers may ask for.
    pub(crate) fn max_cost(&self) -> Option<Msat> {
        self.held.as_ref().map(|held| without_margin(held.reserved, self.margin))
    }

    /// The call is on its way to providers.
    pub(crate) fn asked(&mut self) {
        self.held.iter_mut().for_each(|held| held.asked = true);
    }

    /// A provider has taken the call under this id.
    pub(crate) async fn leg(&mut self, request: RequestId, provider: NodeKey) -> Result<(), ServiceError> {
        self.trace.iter_mut().for_each(|trace| trace.leg(request, provider));
        let Some(held) = &self.held else { return Ok(()) };
        self.desk
            .keys
            .leg(held.call, request)
            .await
            .map_err(|error| ServiceError::Internal { detail: error.to_string() })
    }

    /// The first tokens have come.
    pub(crate) fn spoke(&self) {
        self.desk.meter.spoke(self.clock.elapsed());
    }

    /// Writes the exchange rate of this moment on the bill.
    pub(crate) fn rated(&self, bill: Bill) -> Bill {
        let charged = (self.margin > 0).then(|| with_margin(bill.cost, self.margin));
        Bill { rate: self.desk.rate.now(), charged, ..bill }
    }

    /// The call is over. Where a key's money is in it, that is written before the key's next call is opened; a crash before that
    /// settles it for what the journal says. A caller that stops waiting, as its client left, ends it all the same.
    pub(crate) async fn end(self, finish: Option<FinishReason>, bill: &Bill) {
        let bill = bill.clone();
        let written = tokio::spawn(async move { self.write(finish, &bill).await }.in_current_span());
        if let Err(error) = written.await {
            tracing::error!(%error, "a call's end was not written; a reservation is settled at the next start");
        }
    }

    async fn write(mut self, finish: Option<FinishReason>, bill: &Bill) {
        self.asked();
        self.desk.meter.ended(finish.is_some(), self.clock.elapsed(), bill);
        if let (Some(traces), Some(trace)) = (&self.desk.traces, self.trace.take()) {
            traces.end(trace, finish, bill);
        }
        let state = if finish.is_some() { CallState::Done } else { CallState::Failed };
        let charged = with_margin(bill.cost, self.margin);
        let end = CallEnd { state, cost: bill.cost, charged, detail: detail::of(finish, bill) };
        let written = match &self.held {
            Some(Held { call, reserved, .. }) => {
                let (call, reserved) = (*call, *reserved);
                if end.charged > reserved {
                    tracing::error!(call = %call.id.short(), charged = %end.charged, %reserved, "a call cost more than it may");
                }
                let booked = match self.prepaid {
                    true => self.desk.till.charge(call, end.charged.min(reserved)).await,
                    false => Ok(()),
                };
                match booked {
                    Ok(()) => self.desk.keys.ending_call(call, &end, now()).await,
                    Err(reason) => Err(KeyError::Storage(reason)),
                }
            }
            None => self.desk.keys.ended_call(&self.new, self.began, &end, now()).await,
        };
        if let Err(error) = written {
            tracing::error!(%error, "what a call cost was not written down; a reservation is settled at the next start");
        }
    }
}

/// A key's refusal as the API tells it.
fn refused(model: &str, error: KeyError) -> ServiceError {
    match error {
        KeyError::Refused(refusal) => match refusal {
            KeyRefusal::Limit { required, available, .. } => ServiceError::InsufficientFunds(Box::new(Shortfall {
                required,
                available,
                limit: LimitSource::Key,
                topup: None,
            })),
            KeyRefusal::Model { .. } => ServiceError::Forbidden {
                code: "model_not_allowed",
                message: format!("This API key may not use the model `{model}`."),
            },
            KeyRefusal::Revoked(_) | KeyRefusal::Expired(_) | KeyRefusal::CannotInfer(_) => {
                ServiceError::Forbidden { code: "key_not_usable", message: refusal.to_string() }
            }
        },
        KeyError::NoSuchKey(_) => {
            ServiceError::Forbidden { code: "key_not_usable", message: "This API key is gone.".to_owned() }
        }
        error @ (KeyError::BadKey(_)
        | KeyError::Full(_)
        | KeyError::TooManyInvoices
        | KeyError::OverBalance(_)
        | KeyError::PaidElsewhere
        | KeyError::NotOpen(_)
        | KeyError::Storage(_)) => ServiceError::Internal { detail: error.to_string() },
    }
}
