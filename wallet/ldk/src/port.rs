//! The port, spoken to ldk-node.

use crate::{
    LdkWallet, balance,
    translate::{self, public_key, wallet_error},
};
use async_trait::async_trait;
use ldk_node::{
    Node, NodeError,
    bitcoin::hashes::{Hash as _, sha256},
    lightning::{ln::channelmanager::PaymentId, routing::router::RouteParametersConfig},
    lightning_invoice::{Bolt11Invoice, Bolt11InvoiceDescription, Sha256},
};
use satgrid_types::{LightningKey, Msat, PaymentHash, UnixMs};
use satgrid_wallet::{
    Balance, Channel, ChannelError, ChannelId, Invoice, InvoiceError, InvoiceRequest, Lightning, Network, OpenChannel,
    PayError, PaymentRecord, PaymentState, WalletError, WalletEvent, embedded::ANCHOR_RESERVE_SAT, invoice,
};
use std::{
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

#[async_trait]
impl Lightning for LdkWallet {
    fn node_id(&self) -> LightningKey {
        self.key
    }
    fn network(&self) -> Network {
        self.network
    }

    async fn create_invoice(&self, request: InvoiceRequest) -> Result<Invoice, InvoiceError> {
        let terms = Sha256(sha256::Hash::from_byte_array(request.description_hash.0));
        let description = Bolt11InvoiceDescription::Hash(terms);
        Ok(self.invoice(request.amount, description, request.expiry_secs, None).await?.invoice)
    }

    async fn pay(&self, bolt11: &str, max_fee: Msat) -> Result<(), PayError> {
        let bad = |reason: String| PayError::BadInvoice { reason };
        let facts = invoice::read(bolt11).map_err(|e| bad(e.to_string()))?;
        let amount = facts.amount.ok_or_else(|| bad("it names no amount".to_owned()))?;
        if facts.network != Some(self.network) {
            return Err(bad(format!("it is for {:?}, this wallet is on {}", facts.network, self.network)));
        }
        if facts.payee == self.key {
            return Err(bad("it is our own".to_owned()));
        }
        match self.lookup(facts.payment_hash).await {
            Ok(PaymentState::InFlight | PaymentState::Settled { .. }) => return Ok(()),
            Ok(PaymentState::Unknown | PaymentState::Failed { .. }) => {}
            Err(WalletError::Stopped) => return Err(PayError::Stopped),
            Err(WalletError::Node { reason }) => return Err(PayError::Uncertain { reason }),
        }
        let parsed: Bolt11Invoice = bolt11.parse().map_err(|e| bad(format!("{e}")))?;
        let route = RouteParametersConfig { max_total_routing_fee_msat: Some(max_fee.0), ..Default::default() };
        let sent = self.blocking(move |node| node.bolt11_payment().send(&parsed, Some(route))).await;
        match sent {
            // A duplicate is in flight or paid: what the caller wants.
            Ok(Ok(_) | Err(NodeError::DuplicatePayment)) => Ok(()),
            Ok(Err(NodeError::NotRunning)) | Err(WalletError::Stopped) => Err(PayError::Stopped),
            Ok(Err(NodeError::InvalidInvoice)) => Err(bad("the node cannot pay it".to_owned())),
            Ok(Err(NodeError::PaymentSendingFailed)) if facts.is_expired(now()) => Err(PayError::Expired),
            Ok(Err(NodeError::PaymentSendingFailed)) => {
                let payable = self.balance().await.map_or(Msat::ZERO, |b| b.payable);
                Err(PayError::NoRoute { amount, payable, max_fee })
            }
            // Whatever else broke, it may have broken after the HTLC was handed over.
            Ok(Err(error)) => Err(PayError::Uncertain { reason: error.to_string() }),
            Err(WalletError::Node { reason }) => Err(PayError::Uncertain { reason }),
        }
    }

    async fn lookup(&self, hash: PaymentHash) -> Result<PaymentState, WalletError> {
        let row = self.blocking(move |node| node.payment(&PaymentId(hash.0))).await?;
        Ok(row.and_then(translate::record).map_or(PaymentState::Unknown, |record| record.state))
    }

    async fn payments_since(&self, since: UnixMs) -> Result<Vec<PaymentRecord>, WalletError> {
        // Its clock ticks in seconds.
        let since = since.as_secs();
        let rows = self
            .blocking(move |node| node.list_payments_with_filter(|row| row.latest_update_timestamp >= since))
            .await?;
        let mut records: Vec<PaymentRecord> = rows.into_iter().filter_map(translate::record).collect();
        records.sort_by_key(|record| (record.at, record.hash));
        Ok(records)
    }

    async fn balance(&self) -> Result<Balance, WalletError> {
        let anchors = self.anchors.clone();
        self.blocking(move |node| {
            let mut balance = balance::balance(&node.list_channels(), &node.list_balances(), &anchors);
            balance.outbound_in_flight |= node.next_event().is_some();
            balance
        })
        .await
    }

    async fn channels(&self) -> Result<Vec<Channel>, WalletError> {
        let anchors = self.anchors.clone();
        self.blocking(move |node| {
            let balances = node.list_balances();
            node.list_channels().iter().map(|c| balance::channel(c, &balances, &anchors)).collect()
        })
        .await
    }

    async fn connect(&self, node: LightningKey, addr: SocketAddr) -> Result<(), ChannelError> {
        let peer = public_key(&node)?;
        match self.blocking(move |n| n.connect(peer, addr.into(), true)).await? {
            Ok(()) => Ok(()),
            Err(NodeError::ConnectionFailed) => Err(ChannelError::Unreachable { node, addr }),
            Err(error) => Err(wallet_error(error).into()),
        }
    }

    async fn open_channel(&self, open: OpenChannel) -> Result<(), ChannelError> {
        let capacity_sat = open.capacity_sat;
        if let Some(cap_sat) = self.cap_sat
            && capacity_sat > cap_sat
        {
            return Err(ChannelError::OverCap { capacity_sat, cap_sat });
        }
        let peer = public_key(&open.node)?;
        let push = (!open.push.is_zero()).then_some(open.push.0);
        let opened = self.blocking(move |n| n.open_channel(peer, open.addr.into(), capacity_sat, push, None)).await?;
        match opened {
            Ok(_) => Ok(()),
            Err(NodeError::ConnectionFailed) => Err(ChannelError::Unreachable { node: open.node, addr: open.addr }),
            Err(NodeError::InsufficientFunds) => Err(ChannelError::Funds {
                capacity_sat,
                anchor_reserve_sat: ANCHOR_RESERVE_SAT,
                spendable_sat: self.balance().await?.onchain_confirmed_sat,
            }),
            Err(NodeError::ChannelCreationFailed) => Err(ChannelError::Refused {
                reason: format!(
                    "a channel of {capacity_sat} sat with {} pushed was refused (the node's log says why; channels \
                     under about 1,000 sat above their reserve are too small)",
                    open.push
                ),
            }),
            Err(error) => Err(wallet_error(error).into()),
        }
    }

    async fn close_channel(&self, channel: ChannelId, force: bool) -> Result<(), ChannelError> {
        let closed = self
            .blocking(move |node| {
                let open = node.list_channels().into_iter().find(|c| c.channel_id.0 == channel.0)?;
                let (id, peer) = (open.user_channel_id, open.counterparty_node_id);
                Some(if force { node.force_close_channel(&id, peer, None) } else { node.close_channel(&id, peer) })
            })
            .await?;
        match closed {
            Some(Ok(())) => Ok(()),
            Some(Err(NodeError::ChannelClosingFailed)) => {
                Err(ChannelError::Refused { reason: format!("channel {channel} does not close now") })
            }
            Some(Err(error)) => Err(wallet_error(error).into()),
            None => Err(ChannelError::NoSuchChannel(channel)),
        }
    }

    async fn new_address(&self) -> Result<String, WalletError> {
        let address = self.blocking(|node| node.onchain_payment().new_address()).await?.map_err(wallet_error)?;
        Ok(address.to_string())
    }

    async fn sync(&self) -> Result<(), WalletError> {
        self.blocking(Node::sync_wallets).await?.map_err(wallet_error)
    }

    async fn next_event(&self) -> Result<WalletEvent, WalletError> {
        let mut stopped = self.stopped.subscribe();
        tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => Err(WalletError::Stopped),
            event = self.node.next_event_async() => Ok(translate::event(&self.node, event)),
        }
    }

    async fn event_handled(&self) -> Result<(), WalletError> {
        self.blocking(Node::event_handled).await?.map_err(wallet_error)
    }

    fn sign_message(&self, message: &[u8]) -> String {
        self.node.sign_message(message)
    }

    async fn stop(&self) -> Result<(), WalletError> {
        if self.stopped.send_replace(true) {
            return Ok(());
        }
        let node = self.node.clone();
        let stopped = tokio::task::spawn_blocking(move || node.stop())
            .await
            .map_err(|e| WalletError::Node { reason: format!("the node did not stop: {e}") })?;
        match stopped {
            Ok(()) | Err(NodeError::NotRunning) => Ok(()),
            Err(error) => Err(WalletError::Node { reason: error.to_string() }),
        }
    }
}

/// Everything that is ours, rounded up: what the cap is held against.
pub(crate) fn holds_sat(balance: &Balance) -> u64 {
    balance
        .lightning_total
        .0
        .div_ceil(1_000)
        .saturating_add(balance.onchain_total_sat)
        .saturating_add(balance.closing_sat)
}

fn now() -> UnixMs {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
