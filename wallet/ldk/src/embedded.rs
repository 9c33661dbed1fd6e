//! What only a node of our own does: invoices for people, just-in-time channels, coins on chain, the channel backup.

use crate::{
    LdkWallet,
    port::holds_sat,
    store,
    translate::{node_key, public_key, wallet_error},
};
use async_trait::async_trait;
use ldk_node::{
    Node, NodeError,
    bitcoin::{
        Address, FeeRate, Network as BitcoinNetwork, address::NetworkUnchecked, constants::ChainHash, hashes::Hash,
    },
    lightning::{
        ln::{channelmanager::PaymentId, msgs::SocketAddress},
        offers::offer::Offer,
        routing::router::RouteParametersConfig,
    },
    lightning_invoice::{Bolt11Invoice, Bolt11InvoiceDescription, Description},
    payment::{ConfirmationStatus, PaymentDetails, PaymentDirection, PaymentKind, PaymentStatus},
};
use satgrid_types::{Digest, LightningKey, Msat, PaymentHash, Preimage};
use satgrid_wallet::{
    Invoice, InvoiceError, Lightning, Network, PayError, WalletError,
    embedded::{
        BackedUp, ChannelBackup, Embedded, FeesPaid, MAX_DESCRIPTION_BYTES, MAX_SAT_PER_VB, NodeFacts, OnchainDraft,
        OnchainRow, OnchainSend, Receive, Received, SendError,
    },
    port::MAX_INVOICE_EXPIRY_SECS,
    restore::LostState,
};

/// Outputs below this are not relayed.
pub(crate) const DUST_SAT: u64 = 546;

impl LdkWallet {
    /// Makes an invoice within the limits, over a just-in-time channel where no channel has room for it.
    pub(crate) async fn invoice(
        &self,
        amount: Msat,
        description: Bolt11InvoiceDescription,
        expiry_secs: u32,
        max_lsp_fee: Option<Msat>,
    ) -> Result<Received, InvoiceError> {
        if amount.is_zero() {
            return Err(InvoiceError::ZeroAmount);
        }
        if expiry_secs == 0 || expiry_secs > MAX_INVOICE_EXPIRY_SECS {
            return Err(InvoiceError::Expiry { asked: expiry_secs });
        }
        if self.cap_sat.is_none() && self.lsp.is_none() {
            return Ok(Received { invoice: self.plain(amount, description, expiry_secs).await?, lsp_fee: None });
        }
        let balance = self.balance().await?;
        if let Some(cap_sat) = self.cap_sat {
            let holds_sat = holds_sat(&balance);
            if holds_sat.saturating_add(amount.0.div_ceil(1_000)) > cap_sat {
                return Err(InvoiceError::OverCap { holds_sat, asked: amount, cap_sat });
            }
        }
        match &self.lsp {
            Some(lsp) if balance.receivable < amount => {
                let permille = u64::from(lsp.max_fee_permille);
                let limit = max_lsp_fee.unwrap_or(Msat(amount.0.saturating_mul(permille) / 1_000));
                self.just_in_time(amount, description, expiry_secs, limit).await
            }
            Some(_) | None => {
                Ok(Received { invoice: self.plain(amount, description, expiry_secs).await?, lsp_fee: None })
            }
        }
    }

    async fn plain(&self, amount: Msat, text: Bolt11InvoiceDescription, expiry: u32) -> Result<Invoice, WalletError> {
        let made = self.blocking(move |node| node.bolt11_payment().receive(amount.0, &text, expiry)).await?;
        Ok(invoice(&made.map_err(wallet_error)?))
    }

    async fn just_in_time(
        &self,
        amount: Msat,
        text: Bolt11InvoiceDescription,
        expiry: u32,
        limit: Msat,
    ) -> Result<Received, InvoiceError> {
        let made = self
            .blocking(move |node| {
                let made = node.bolt11_payment().receive_via_jit_channel(amount.0, &text, expiry, Some(limit.0))?;
                let row = node.payment(&PaymentId(*made.payment_hash().as_ref()));
                let fee = match row.map(|row| row.kind) {
                    Some(PaymentKind::Bolt11Jit { lsp_fee_limits, .. }) => lsp_fee_limits.max_total_opening_fee_msat,
                    Some(
                        PaymentKind::Bolt11 { .. }
                        | PaymentKind::Onchain { .. }
                        | PaymentKind::Bolt12Offer { .. }
                        | PaymentKind::Bolt12Refund { .. }
                        | PaymentKind::Spontaneous { .. },
                    )
                    | None => None,
                };
                Ok((made, fee))
            })
            .await?;
        match made {
            Ok((made, fee)) => Ok(Received { invoice: invoice(&made), lsp_fee: fee.map(Msat) }),
            Err(NodeError::LiquidityFeeTooHigh) => Err(InvoiceError::LspFee { amount, limit }),
            Err(
                error @ (NodeError::LiquidityRequestFailed
                | NodeError::LiquiditySourceUnavailable
                | NodeError::ConnectionFailed),
            ) => Err(InvoiceError::NoRoom { amount, reason: error.to_string() }),
            Err(error) => Err(wallet_error(error).into()),
        }
    }
}

fn invoice(made: &Bolt11Invoice) -> Invoice {
    Invoice { payment_hash: PaymentHash(*made.payment_hash().as_ref()), bolt11: made.to_string() }
}

#[async_trait]
impl Embedded for LdkWallet {
    async fn facts(&self) -> Result<NodeFacts, WalletError> {
        let lsp = self.lsp.as_ref().map(|lsp| lsp.node);
        self.blocking(move |node| NodeFacts {
            listen: node.listening_addresses().and_then(|a| a.iter().find_map(|addr| addr.to_string().parse().ok())),
            height: node.status().current_best_block.height,
            anchor_reserve_sat: node.list_balances().total_anchor_channels_reserve_sats,
            lsp,
        })
        .await
    }

    async fn reconnect(&self) -> Result<u64, WalletError> {
        self.blocking(|node| {
            let partners: Vec<_> = node.list_channels().iter().map(|channel| channel.counterparty_node_id).collect();
            let lost =
                node.list_peers().into_iter().filter(|peer| !peer.is_connected && partners.contains(&peer.node_id));
            lost.fold(0, |found, peer| found + u64::from(node.connect(peer.node_id, peer.address, true).is_ok()))
        })
        .await
    }

    async fn receive(&self, ask: Receive) -> Result<Received, InvoiceError> {
        let mut text = ask.description;
        while text.len() > MAX_DESCRIPTION_BYTES {
            text.pop();
        }
        let description = Description::new(text).map_err(|e| WalletError::Node { reason: e.to_string() })?;
        let description = Bolt11InvoiceDescription::Direct(description);
        self.invoice(ask.amount, description, ask.expiry_secs, ask.max_lsp_fee).await
    }

    async fn preimage(&self, hash: PaymentHash) -> Result<Option<Preimage>, WalletError> {
        let row = self.blocking(move |node| node.payment(&PaymentId(hash.0))).await?;
        let ours = row.filter(|row| row.direction == PaymentDirection::Inbound);
        Ok(ours.and_then(|row| match row.kind {
            PaymentKind::Bolt11 { preimage, .. } | PaymentKind::Bolt11Jit { preimage, .. } => {
                preimage.map(|preimage| Preimage(preimage.0))
            }
            PaymentKind::Onchain { .. }
            | PaymentKind::Bolt12Offer { .. }
            | PaymentKind::Bolt12Refund { .. }
            | PaymentKind::Spontaneous { .. } => None,
        }))
    }

    async fn send_onchain(&self, send: OnchainSend) -> Result<String, SendError> {
        check_send(&send)?;
        let address = address(&send.address, self.network)?;
        let sent = self
            .blocking(move |node| {
                let rate = send.sat_per_vb.map(FeeRate::from_sat_per_vb_u32);
                let onchain = node.onchain_payment();
                match send.amount_sat {
                    Some(sat) => onchain.send_to_address(&address, sat, rate),
                    None => onchain.send_all_to_address(&address, true, rate),
                }
            })
            .await?;
        match sent {
            Ok(txid) => Ok(txid.to_string()),
            Err(NodeError::InsufficientFunds | NodeError::OnchainTxCreationFailed) => {
                let reserve_sat = self.facts().await?.anchor_reserve_sat;
                Err(SendError::Funds { spendable_sat: self.balance().await?.onchain_confirmed_sat, reserve_sat })
            }
            Err(error) => Err(wallet_error(error).into()),
        }
    }

    async fn draft_onchain(&self, send: OnchainSend) -> Result<OnchainDraft, SendError> {
        self.draft(send).await
    }

    async fn fees_paid(&self) -> Result<FeesPaid, WalletError> {
        self.blocking(|node| {
            let mut paid = FeesPaid::default();
            for row in node.list_payments() {
                let fee = row.fee_paid_msat.unwrap_or(0);
                match (&row.kind, row.direction, row.status) {
                    (PaymentKind::Onchain { .. }, PaymentDirection::Outbound, _) => {
                        paid.onchain = paid.onchain.saturating_add(Msat(fee));
                    }
                    (PaymentKind::Bolt11Jit { counterparty_skimmed_fee_msat, .. }, _, PaymentStatus::Succeeded) => {
                        paid.lsp = paid.lsp.saturating_add(Msat(counterparty_skimmed_fee_msat.unwrap_or(0)));
                    }
                    (_, PaymentDirection::Outbound, PaymentStatus::Succeeded) => {
                        paid.routing = paid.routing.saturating_add(Msat(fee));
                    }
                    (_, PaymentDirection::Inbound | PaymentDirection::Outbound, _) => {}
                }
            }
            paid
        })
        .await
    }

    async fn channel_backup(&self) -> Result<ChannelBackup, WalletError> {
        let channels = self.channels().await?;
        let node = self.node_id();
        let updates = store::watermarks(&self.dir).await.map_err(|e| WalletError::Node { reason: e.to_string() })?;
        self.blocking(move |ldk: &Node| {
            let peers = ldk.list_peers().iter().map(|p| (node_key(&p.node_id), p.address.to_string())).collect();
            let open = ldk.list_channels();
            let backed_up = channels
                .iter()
                .map(|c| BackedUp {
                    channel: c.id.to_string(),
                    counterparty: c.counterparty,
                    funding: open
                        .iter()
                        .find(|o| o.channel_id.0 == c.id.0)
                        .and_then(|o| o.funding_txo.map(|txo| txo.to_string())),
                    capacity_sat: c.capacity_sat,
                    ours: c.ours,
                })
                .collect();
            ChannelBackup { node, peers, channels: backed_up, updates }
        })
        .await
    }

    async fn pay_offer(&self, offer: &str, amount: Msat, max_fee: Msat) -> Result<String, PayError> {
        let bad = |reason: String| PayError::BadInvoice { reason };
        let parsed: Offer = offer.parse().map_err(|e| bad(format!("{e:?}")))?;
        if !parsed.supports_chain(ChainHash::using_genesis_block(bitcoin_network(self.network))) {
            return Err(bad(format!("the offer is not for {}", self.network)));
        }
        let route = RouteParametersConfig { max_total_routing_fee_msat: Some(max_fee.0), ..Default::default() };
        let sent = self
            .blocking(move |node| node.bolt12_payment().send_using_amount(&parsed, amount.0, None, None, Some(route)))
            .await;
        match sent {
            Ok(Ok(id)) => Ok(hex(&id.0)),
            Ok(Err(NodeError::NotRunning)) | Err(WalletError::Stopped) => Err(PayError::Stopped),
            Ok(Err(NodeError::InvalidOffer | NodeError::InvalidAmount | NodeError::UnsupportedCurrency)) => {
                Err(bad(format!("the offer does not take {amount}")))
            }
            Ok(Err(error)) => Err(PayError::Uncertain { reason: error.to_string() }),
            Err(WalletError::Node { reason }) => Err(PayError::Uncertain { reason }),
        }
    }

    async fn onchain_rows(&self) -> Result<Vec<OnchainRow>, WalletError> {
        self.blocking(|node| {
            let row = |payment: PaymentDetails| {
                let PaymentKind::Onchain { txid, status } = payment.kind else { return None };
                let inbound = payment.direction == PaymentDirection::Inbound;
                let fee = if inbound { 0 } else { payment.fee_paid_msat.unwrap_or(0) };
                Some(OnchainRow {
                    txid: Digest(txid.to_byte_array()),
                    inbound,
                    amount: Msat(payment.amount_msat.unwrap_or(0)),
                    fee: Msat(fee),
                    confirmed: matches!(status, ConfirmationStatus::Confirmed { .. }),
                })
            };
            node.list_payments().into_iter().filter_map(row).collect()
        })
        .await
    }

    async fn ask_peer(&self, node: LightningKey, address: &str) -> Result<(), WalletError> {
        let peer = public_key(&node)?;
        let bad = |_| WalletError::Node { reason: format!("{address:?} is no HOST:PORT of a Lightning peer") };
        let address: SocketAddress = address.parse().map_err(bad)?;
        self.blocking(move |node| node.connect(peer, address, true)).await?.map_err(wallet_error)
    }

    async fn recover(&self, lost: &BackedUp) -> Result<LostState, WalletError> {
        self.recover_channel(lost).await
    }
}

/// What can be refused without looking at a coin.
pub(crate) fn check_send(send: &OnchainSend) -> Result<(), SendError> {
    if let Some(given) = send.sat_per_vb
        && !(1..=MAX_SAT_PER_VB).contains(&given)
    {
        return Err(SendError::FeeRate { given });
    }
    if let Some(amount_sat) = send.amount_sat
        && amount_sat < DUST_SAT
    {
        return Err(SendError::Dust { amount_sat, least_sat: DUST_SAT });
    }
    Ok(())
}

pub(crate) fn address(text: &str, network: Network) -> Result<Address, SendError> {
    let bad = |reason: String| SendError::BadAddress { address: text.to_owned(), reason };
    let parsed: Address<NetworkUnchecked> = text.parse().map_err(|e| bad(format!("{e}")))?;
    parsed.require_network(bitcoin_network(network)).map_err(|e| bad(e.to_string()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) const fn bitcoin_network(network: Network) -> BitcoinNetwork {
    match network {
        Network::Mainnet => BitcoinNetwork::Bitcoin,
        Network::Testnet => BitcoinNetwork::Testnet,
        Network::Signet => BitcoinNetwork::Signet,
        Network::Regtest => BitcoinNetwork::Regtest,
    }
}
