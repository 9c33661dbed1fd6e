//! Refunds are paid here, again and again until the money is taken or the tries are used up: an invoice as long as it
//! stands, a Lightning address by a new invoice each time. One payment at most: a payment whose fate is unknown is
//! resolved by its hash and never followed by another, and an invoice that one refund pays is paid by no other.
//!
//! | state | in the journal | a crash here |
//! |---|---|---|
//! | waiting | nothing | it is tried when its time comes |
//! | attempted | amount and fee limit pending, before the wallet is asked | both are written again, and the payment is resolved by its hash |
//! | settled, failed | posted, or voided, before the row is | the payment's end is told again and changes nothing |

use super::{DoorDesk, books};
use crate::{
    drive::{now, payments},
    lnurl::{self, Destination, Named},
};
use futures::{StreamExt, stream};
use satgrid_ledger_sqlite::{KeyError, RefundRow};
use satgrid_types::{Msat, PaymentHash, UnixMs};
use satgrid_wallet::{invoice, payment::Outcome};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

const LOOK_EVERY: Duration = Duration::from_secs(3);
/// Tries at one time: hosts that clients name may let this node wait, and others wait behind them.
const AT_ONCE: usize = 32;
/// Waits between tries; after the last one the money returns to the key.
const RETRY_S: [u64; 6] = [10, 60, 300, 1_800, 7_200, 43_200];

impl DoorDesk {
    /// Takes up what the last run attempted, then pays what is due until the node stops.
    pub(crate) async fn pay_refunds(self: Arc<Self>, shutdown: CancellationToken) {
        if !self.recover(&shutdown).await {
            return;
        }
        loop {
            match self.keys.refunds_due(now()).await {
                Ok(rows) => {
                    let tries = stream::iter(rows).for_each_concurrent(AT_ONCE, |row| {
                        let desk = &self;
                        async move { desk.attempt(&row).await }
                    });
                    tries.await;
                }
                Err(error) => tracing::error!(%error, "refunds cannot be read"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.asked.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Takes up everything that the last run attempted, page by page; whether that is done. Nothing is attempted before:
    /// what is of this run is paid already, and would look as if it had never been sent.
    async fn recover(&self, shutdown: &CancellationToken) -> bool {
        let mut after = 0;
        loop {
            match self.keys.refunds_attempted(after).await {
                Ok(rows) if rows.is_empty() => return true,
                Ok(rows) => {
                    for row in rows {
                        self.send(&row, true).await;
                        after = row.id;
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "refunds of the last run cannot be read; trying again");
                    tokio::select! {
                        () = shutdown.cancelled() => return false,
                        () = tokio::time::sleep(LOOK_EVERY) => {}
                    }
                }
            }
        }
    }

    async fn attempt(&self, row: &RefundRow) {
        let bolt11 = match row.destination.parse::<Destination>() {
            Ok(Destination::Bolt11(bolt11)) => Ok(bolt11),
            Ok(Destination::Address { user, host }) => {
                let named = Named::ByStranger { local: self.network == satgrid_wallet::Network::Regtest };
                lnurl::invoice(&user, &host, row.amount, named).await.map_err(|error| format!("{error:#}"))
            }
            Err(why) => Err(why.to_owned()),
        };
        let checked = bolt11.and_then(|bolt11| {
            let facts = invoice::read(&bolt11).map_err(|error| error.to_string())?;
            let right = facts.amount == Some(row.amount) && facts.network == Some(self.network);
            let ours = facts.payee == self.wallet.node_id();
            match (right, ours, facts.is_expired(now())) {
                (true, false, false) => Ok((bolt11, facts.payment_hash)),
                (_, _, true) => Err("the invoice has expired".to_owned()),
                (_, true, _) => Err("the invoice is this node's own".to_owned()),
                (false, _, _) => Err("the invoice is not over what was asked".to_owned()),
            }
        });
        let written = match checked {
            Ok((bolt11, hash)) => match self.keys.refund_attempted(row.id, hash, &bolt11).await {
                Ok(row) => {
                    self.send(&row, false).await;
                    Ok(())
                }
                Err(error @ KeyError::PaidElsewhere) => self.keys.refund_given_up(row.id, &error.to_string()).await,
                Err(error) => Err(error),
            },
            Err(reason) => self.later(row, &reason).await,
        };
        if let Err(error) = written {
            tracing::error!(%error, refund = row.id, "a refund was not written down; nothing was paid");
        }
    }

    /// Asks the wallet, once the journal holds the money.
    async fn send(&self, row: &RefundRow, recover: bool) {
        let (Some(hash), Some(bolt11)) = (row.hash, row.bolt11.clone()) else { return };
        if let Err(reason) = self.journal.append(vec![books::refund_held(row)]).await {
            // The row says attempted: the next start writes the hold again and asks the wallet what became of it.
            tracing::error!(%reason, refund = row.id, "a refund was not booked; nothing was paid");
            return;
        }
        let (pays_for, amount, max_fee) = (payments::PaysFor::Door(row.id), row.amount, row.max_fee);
        let _ = self.payments.send(payments::Command::Pay { pays_for, hash, bolt11, amount, max_fee, recover });
    }

    /// When it is tried again, if it may still succeed.
    fn again(row: &RefundRow) -> Option<UnixMs> {
        let at = now().plus_ms(RETRY_S.get(row.tries as usize)?.saturating_mul(1_000));
        match row.destination.parse() {
            Ok(Destination::Address { .. }) => Some(at),
            Ok(Destination::Bolt11(bolt11)) => {
                invoice::read(&bolt11).ok().filter(|facts| !facts.is_expired(at)).map(|_| at)
            }
            Err(_) => None,
        }
    }

    /// Nothing was paid: again later, if this may still succeed.
    async fn later(&self, row: &RefundRow, reason: &str) -> Result<(), KeyError> {
        let again = Self::again(row);
        tracing::info!(refund = row.id, %reason, again = again.is_some(), "a refund was not paid");
        match again {
            Some(at) => self.keys.refund_waits(row.id, reason, at).await,
            None => self.keys.refund_given_up(row.id, reason).await,
        }
    }

    /// A refund's payment has ended. Its event is acknowledged once everything is written.
    pub(crate) async fn ended(&self, hash: PaymentHash, outcome: Outcome) {
        let written = match outcome {
            Outcome::Settled { fee, .. } => self.settled(hash, fee).await,
            Outcome::Failed { reason } => self.failed(hash, &reason.to_string()).await,
        };
        match written {
            Ok(()) => {
                let _ = self.payments.send(payments::Command::Booked { hash });
                let _ = self.handled.send(hash);
            }
            Err(error) => {
                tracing::error!(%error, payment = %hash, "a refund's end was not booked; it will be shown again")
            }
        }
    }

    async fn settled(&self, hash: PaymentHash, fee: Msat) -> Result<(), String> {
        let text = |error: KeyError| error.to_string();
        let Some(row) = self.keys.refund_of_payment(hash).await.map_err(text)? else { return Ok(()) };
        self.journal.append(vec![books::refund_paid(&row, fee)]).await?;
        self.keys.refund_settled(hash, fee.min(row.max_fee)).await.map_err(text)?;
        tracing::info!(refund = row.id, amount = %row.amount, %fee, "a client's balance was paid back");
        Ok(())
    }

    async fn failed(&self, hash: PaymentHash, reason: &str) -> Result<(), String> {
        let text = |error: KeyError| error.to_string();
        let Some(row) = self.keys.refund_of_payment(hash).await.map_err(text)? else { return Ok(()) };
        self.journal.append(vec![books::refund_void(&row)]).await?;
        // This try is counted already.
        let before = RefundRow { tries: row.tries.saturating_sub(1), ..row };
        match Self::again(&before) {
            Some(at) => self.keys.refund_waits(before.id, reason, at).await.map_err(text),
            None => self.keys.refund_failed(hash, reason).await.map(drop).map_err(text),
        }
    }
}
