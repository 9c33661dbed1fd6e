//! The wallet's events: to the machine that waits for each, and acknowledged only when the journal has what follows.

use super::{bookkeeper::Own, channels, consumer, journal::JournalWriter, now, payments, provider};
use crate::door::DoorDesk;
use satgrid_ledger::entry::{Draft, Evidence};
use satgrid_node::{consumer::ConsumerEvent, provider::ProviderEvent};
use satgrid_types::PaymentHash;
use satgrid_wallet::{Embedded, Lightning, WalletEvent};
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How long an event may take to be booked before it is shown to the roles again.
const BOOKED_WITHIN: Duration = Duration::from_secs(30);
/// How often the roles hear what can be paid.
const BALANCE_EVERY: Duration = Duration::from_secs(5);

/// How often peers are looked for that have a channel with us and no connection. A slice cannot be paid to a provider
/// that was restarted before it is found again, and ldk-node itself looks once a minute.
const RECONNECT_EVERY: Duration = Duration::from_secs(2);

/// Keeps the wallet connected to its channels' peers.
pub(crate) async fn keep_connected(wallet: Arc<dyn Embedded>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RECONNECT_EVERY) => {}
        }
        match wallet.reconnect().await {
            Ok(0) => {}
            Ok(found) => tracing::info!(peers = found, "Lightning peers found again"),
            Err(_) => return,
        }
    }
}

/// Where events go.
pub(crate) struct WalletPump {
    pub wallet: Arc<dyn Lightning>,
    pub journal: JournalWriter,
    pub payments: mpsc::UnboundedSender<payments::Command>,
    pub provider: Option<mpsc::Sender<provider::Message>>,
    pub consumer: Option<mpsc::Sender<consumer::Message>>,
    pub door: Option<Arc<DoorDesk>>,
    /// Payment hashes whose events the roles have booked.
    pub handled: mpsc::UnboundedReceiver<PaymentHash>,
    /// Told of every channel that opens, and of every one that closed, once the journal has it.
    pub changes: mpsc::UnboundedSender<channels::Change>,
    /// Rung whenever money moved: some of it may be the operator's own.
    pub own: Own,
    pub shutdown: CancellationToken,
}

impl WalletPump {
    pub(crate) async fn run(mut self) {
        self.tell_balance().await;
        let mut balance = tokio::time::interval(BALANCE_EVERY);
        loop {
            let event = tokio::select! {
                () = self.shutdown.cancelled() => return,
                _ = balance.tick() => {
                    self.tell_balance().await;
                    continue;
                }
                event = self.wallet.next_event() => match event {
                    Ok(event) => event,
                    Err(error) => {
                        tracing::info!(%error, "no more wallet events");
                        return;
                    }
                },
            };
            if self.event(event).await && self.wallet.event_handled().await.is_err() {
                return;
            }
            self.own.ring();
            self.tell_balance().await;
        }
    }

    /// Whether the event is dealt with and may be acknowledged.
    async fn event(&mut self, event: WalletEvent) -> bool {
        match event {
            WalletEvent::PaymentSettled { hash, preimage, fee } => {
                let _ = self.payments.send(payments::Command::Settled { hash, preimage, fee });
                self.booked(hash).await
            }
            WalletEvent::PaymentFailed { hash, reason } => {
                let _ = self.payments.send(payments::Command::Failed { hash, reason });
                self.booked(hash).await
            }
            WalletEvent::PaymentReceived { hash, amount } => {
                if let Some(door) = &self.door {
                    match door.received(hash, amount).await {
                        Ok(true) => return true,
                        Ok(false) => {}
                        Err(error) => {
                            tracing::error!(%error, payment = %hash, "a client's deposit was not booked");
                            // Shown again, but not at once.
                            tokio::time::sleep(BALANCE_EVERY).await;
                            return false;
                        }
                    }
                }
                let mut booked = true;
                if let Some(provider) = &self.provider {
                    let event = ProviderEvent::PaymentReceived { hash, amount };
                    let _ = provider.send(provider::Message::Event(event)).await;
                    booked &= self.booked(hash).await;
                }
                if let Some(consumer) = &self.consumer {
                    let event = ConsumerEvent::PaymentReceived { hash, amount };
                    let _ = consumer.send(consumer::Message::Event(event)).await;
                    booked &= self.booked(hash).await;
                }
                booked
            }
            WalletEvent::ChannelPending { channel, counterparty } => {
                tracing::info!(%channel, peer = %counterparty, "channel pending: waiting for its confirmation");
                let _ = self.changes.send(channels::Change::Opened);
                true
            }
            WalletEvent::ChannelReady { channel, counterparty, funding_confirmed, .. } => {
                tracing::info!(%channel, peer = %counterparty, funding_confirmed, "channel ready");
                let _ = self.changes.send(channels::Change::Opened);
                true
            }
            WalletEvent::ChannelClosed { channel, reason, forced, counterparty } => {
                if forced {
                    tracing::warn!(%channel, %reason, "channel force-closed; its balance returns on chain after the delay");
                } else {
                    tracing::info!(%channel, %reason, "channel closed");
                }
                let evidence = Evidence::ChannelClosed { channel: channel.to_string(), reason, force: forced };
                let booked = self.journal.append(vec![Draft::of(evidence)]).await.is_ok();
                if booked {
                    let gone = channels::Closed { channel: channel.to_string(), counterparty, forced };
                    let _ = self.changes.send(channels::Change::Closed(gone));
                }
                booked
            }
            WalletEvent::Other { what } => {
                tracing::debug!(%what, "wallet event");
                true
            }
        }
    }

    /// Waits until a role has booked this payment. A payment that no role knows is booked at once by saying so.
    async fn booked(&mut self, hash: PaymentHash) -> bool {
        let wait = async {
            while let Some(done) = self.handled.recv().await {
                if done == hash {
                    return true;
                }
            }
            false
        };
        tokio::select! {
            () = self.shutdown.cancelled() => false,
            booked = wait => booked,
            () = tokio::time::sleep(BOOKED_WITHIN) => {
                tracing::warn!(payment = %hash, at = now().0, "a payment's event was not booked in time; it will be shown again");
                false
            }
        }
    }

    async fn tell_balance(&self) {
        let Some(consumer) = &self.consumer else { return };
        if let Ok(channels) = self.wallet.channels().await {
            let peers = channels.iter().filter(|c| c.usable).map(|c| c.counterparty).collect();
            let _ = consumer.send(consumer::Message::Event(ConsumerEvent::DirectPeers(peers))).await;
        }
        if let Ok(balance) = self.wallet.balance().await {
            let _ = consumer.send(consumer::Message::Event(ConsumerEvent::Payable(balance.payable))).await;
        }
    }
}
