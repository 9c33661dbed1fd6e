//! One call's money at its key: reserved before anything is sent, its requests to providers written down before their
//! tokens are passed on, and posted once, when the call has ended, however it ended.
//!
//! | state | awaits | a crash here means |
//! |---|---|---|
//! | reserved | the first provider | nothing was bought: settled for nothing |
//! | under way | the call's end | the journal knows each request: settled for what it says ([`super::recover`]) |
//! | ended | nothing | posted |
//!
//! A call without a stored key reserves nothing; what it cost is written down when it is over, many in one transaction.

use super::{Desk, detail};
use crate::drive::now;
use satgrid_api::{Bill, CallContext, CompletionRequest, LimitSource, ServiceError, Shortfall};
use satgrid_ledger::keys::{KeyId, KeyRefusal, room};
use satgrid_ledger_sqlite::{CallEnd, CallRef, CallState, KeyError, NewCall};
use satgrid_pricing::{affordable_output, ceiling};
use satgrid_types::{FinishReason, Msat, RateCard, RequestId, UnixMs};
use std::{sync::Arc, time::Instant};

/// A call whose money is in hand.
pub(crate) struct Budget {
    desk: Arc<Desk>,
    new: NewCall,
    /// The reservation; none without a stored key.
    held: Option<(CallRef, Msat)>,
    began: UnixMs,
    clock: Instant,
    /// The most that the call may produce.
    pub max_output: u32,
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
        let mut new = NewCall {
            id: context.request,
            key,
            caller: context.key.clone().filter(|_| key.is_none()),
            model: model.to_owned(),
            needed: Msat::ZERO,
            wanted: Msat::ZERO,
        };
        let Some(key) = key else {
            return Ok(Budget { desk: desk.clone(), new, held: None, began, clock, max_output });
        };
        if request.max_tokens.is_none() {
            let chain = desk.keys.chain(key, began).await.map_err(|error| refused(model, error))?;
            if let Some(room) = room(&chain) {
                // Where not even one token fits, the reservation below says so with its figures.
                max_output = affordable_output(&rates, prompt, max_output, room).unwrap_or(1);
            }
        }
        let dear = |_| ServiceError::InvalidRequest { param: "max_tokens".into(), message: "no bill holds it".into() };
        let most = ceiling(&rates, prompt, max_output).map_err(dear)?;
        new.needed = most.one;
        new.wanted = if request.routing.allow_fallbacks { most.failover } else { most.one };
        let held = desk.keys.open_call(&new, began).await.map_err(|error| {
            desk.meter.refused();
            refused(model, error)
        })?;
        Ok(Budget { desk: desk.clone(), new, held: Some(held), began, clock, max_output })
    }

    /// The most that providers may ask for.
    pub(crate) fn max_cost(&self) -> Option<Msat> {
        self.held.map(|(_, reserved)| reserved)
    }

    /// A provider has taken the call under this id.
    pub(crate) async fn leg(&self, request: RequestId) -> Result<(), ServiceError> {
        let Some((call, _)) = self.held else { return Ok(()) };
        self.desk.keys.leg(call, request).await.map_err(|error| ServiceError::Internal { detail: error.to_string() })
    }

    /// The first tokens have come.
    pub(crate) fn spoke(&self) {
        self.desk.meter.spoke(self.clock.elapsed());
    }

    /// Writes the exchange rate of this moment on the bill.
    pub(crate) fn rated(&self, bill: Bill) -> Bill {
        Bill { rate: self.desk.rate.now(), ..bill }
    }

    /// The call is over. Returns once that is written.
    pub(crate) async fn end(self, finish: Option<FinishReason>, bill: &Bill) {
        self.desk.meter.ended(finish.is_some(), self.clock.elapsed(), bill);
        let state = if finish.is_some() { CallState::Done } else { CallState::Failed };
        let end = CallEnd { state, cost: bill.cost, charged: bill.cost, detail: detail::of(finish, bill) };
        let written = match self.held {
            Some((call, reserved)) => {
                if end.charged > reserved {
                    tracing::error!(call = %call.id.short(), cost = %end.charged, %reserved, "a call cost more than it may");
                }
                self.desk.keys.end_call(call, &end, now()).await.map(drop)
            }
            None => self.desk.keys.ended_call(&self.new, self.began, &end, now()).await.map(drop),
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
        error @ (KeyError::BadKey(_) | KeyError::Full(_) | KeyError::NotOpen(_) | KeyError::Storage(_)) => {
            ServiceError::Internal { detail: error.to_string() }
        }
    }
}
