//! The end of a request in good order: its receipt is checked, countersigned and booked, and its call is over or goes on.

use super::{
    CallError, CallId, Consumer, ConsumerAction, Emission, Leg, SessionIndex,
    calls::Place,
    caps::Starved,
    streams::{Ended, Held, SILENT, Wrote},
};
use satgrid_ledger::statements::{Leg as PartLeg, Passed, Receipt, ReceiptOpening, ReceiptPrivate, receipt_id};
use satgrid_protocol::{check, frame::ConsumerFrame, session::RequestState};
use satgrid_types::{
    BothSigned, Digest, FinishReason, Msat, ReceiptId, RequestId, Signed, UnixMs, Verified, cbor, sign_body,
};

/// What becomes of a call once one of its requests has its receipt.
enum Next {
    Over,
    /// At another provider, from what was received.
    Elsewhere,
    /// In a fresh session with the same provider: this one is at its cap.
    Afresh,
}

impl Consumer {
    pub(super) fn receipt(
        &mut self,
        now: UnixMs,
        index: SessionIndex,
        request: RequestId,
        reason: FinishReason,
        signed: &Signed<Receipt>,
    ) {
        let Some((offered, private)) = self.checked_receipt(now, index, request, reason, signed) else { return };
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let (Some(state), Some(link)) = (&session.state, session.link) else { return };
        let Some(live) = session.requests.get_mut(&request) else { return };
        let reserved = state.request_state(&request).map_or(Msat::ZERO, RequestState::reserved);
        if offered.cost > reserved.saturating_add(state.available()) {
            // The provider was told of a payment before we were: our own wallet will tell us too.
            live.held = Some(Held::Receipt(reason, signed.clone()));
            return;
        }
        let signature = sign_body::<Receipt>(signed.body(), &session.key);
        let both = BothSigned::from_parts(signed.body().to_vec(), *signed.signature(), signature);
        let opening = ReceiptOpening { salt: live.salt, private };
        let Ok(draft) = state.finished(&both, &offered, Some(opening)) else { return };
        let decode_mtok_s = live.wrote.and_then(Wrote::mtok_s);
        let (stream, call, ended, provider) = (live.stream, live.call, live.ended, session.provider());
        let (id, cost) = (receipt_id(&both), offered.cost);
        self.request_receipted(now, index, request, id, cost);
        if let Some(call) = self.calls.get_mut(&call) {
            call.bill.legs.push(leg(&offered, id));
        }
        let (last, next) = self.after_receipt(call, index, reason, ended);
        let mut then = vec![
            ConsumerAction::Send { link, stream, frame: ConsumerFrame::Receipt(signature) },
            ConsumerAction::FinishStream { link, stream },
            ConsumerAction::Settled { provider, amount: cost, decode_mtok_s },
        ];
        then.extend(last.map(|emission| ConsumerAction::Emit { call, emission }));
        self.record(index, vec![draft], then);
        match next {
            Next::Over => {}
            Next::Afresh => self.go_on_afresh(now, call, index),
            Next::Elsewhere => {
                let why = if ended == Some(Ended::Silent) { SILENT } else { "the provider's engine failed" };
                let why = offered.error.as_deref().unwrap_or(why);
                self.reassign(now, call, why);
            }
        }
    }

    /// A receipt that says what this side counted. On any other its provider is left, with the proof kept.
    fn checked_receipt(
        &mut self,
        now: UnixMs,
        index: SessionIndex,
        request: RequestId,
        reason: FinishReason,
        signed: &Signed<Receipt>,
    ) -> Option<(Verified<Receipt>, ReceiptPrivate)> {
        let session = self.sessions.get(&index)?;
        let state = session.state.as_ref().filter(|_| session.link.is_some())?;
        let live = session.requests.get(&request)?;
        let Ok(offered) = signed.verify(&session.provider()) else {
            let text = "a receipt that its provider did not sign";
            self.drop_link(now, index, crate::CloseCode::Violation, text);
            return None;
        };
        let private = ReceiptPrivate {
            prompt_hash: live.private.prompt_hash,
            running_hash: live.running.value(),
            sampling: live.private.sampling.clone(),
        };
        let hash = private.commitment(&live.salt);
        let returned = live.part.as_ref().map(|part| part.experts.as_slice()).unwrap_or_default();
        if let Err(fault) = check::receipt(state, &request, &offered, &live.counted(), returned, hash) {
            self.misbehaved(now, index, fault.rule(), &fault.to_string(), cbor::encode(signed));
            return None;
        }
        if offered.finish != reason {
            let text = "the receipt's finish reason is not that of its frame";
            self.misbehaved(now, index, "receipt-field", text, cbor::encode(signed));
            return None;
        }
        Some((offered, private))
    }

    /// Value was delivered and checked; its promise is due, and what was reserved beyond it is free.
    fn request_receipted(&mut self, now: UnixMs, index: SessionIndex, request: RequestId, id: ReceiptId, cost: Msat) {
        self.counters.receipts += 1;
        self.await_promise(now, index, id);
        let Some(session) = self.sessions.get_mut(&index) else { return };
        session.requests.remove(&request);
        session.idle_since = now;
        session.flow.ended(now);
        // Where others run, what this one frees is theirs first: a slice is on its way for who waits.
        session.short &= !session.requests.is_empty() && session.unfunded.is_none();
        let settled = self.settled_with.entry(session.provider()).or_default();
        *settled = settled.saturating_add(cost);
    }

    /// The call's last word, where this was its last request, and how it goes on.
    fn after_receipt(
        &mut self,
        id: CallId,
        index: SessionIndex,
        reason: FinishReason,
        ended: Option<Ended>,
    ) -> (Option<Emission>, Next) {
        let starved = (ended == Some(Ended::Unfunded)).then(|| self.starved(id, index));
        let Some(call) = self.calls.get_mut(&id) else { return (None, Next::Over) };
        call.place = Place::Nowhere;
        let bill = call.bill.clone();
        // A provider that ends well has sent all rows.
        let done = matches!(reason, FinishReason::Stop | FinishReason::Length) && !call.lacks_rows();
        let emission = match starved.filter(|_| !call.cancelled) {
            _ if done => Emission::Finished { reason, bill },
            Some(Starved::Ends(error)) => Emission::Failed { error, bill },
            Some(Starved::GoesOnAfresh) => return (None, Next::Afresh),
            None if call.cancelled || (reason == FinishReason::Cancelled && ended.is_none()) => {
                Emission::Failed { error: CallError::Cancelled, bill }
            }
            None => return (None, Next::Elsewhere),
        };
        self.counters.finished += u64::from(done);
        self.counters.failed += u64::from(!done);
        self.calls.remove(&id);
        (Some(emission), Next::Over)
    }
}

/// The receipt's line on the bill of its call.
fn leg(offered: &Receipt, id: ReceiptId) -> Leg {
    let part = offered.part.map(|work| PartLeg {
        worker: offered.provider,
        order: work.order,
        usage: offered.usage.part.unwrap_or_default(),
        id: Some(Digest(id.0)),
        rows: Some(Passed::from(&work)),
    });
    Leg {
        provider: offered.provider,
        request: offered.request,
        receipt: Some(id),
        usage: offered.usage,
        rates: offered.rates,
        cost: offered.cost,
        part,
        experts: offered.expert_rows.clone().unwrap_or_default(),
    }
}
