//! The house: how a provider sells its own models to clients without a node.
//!
//! The house is a consumer in the same process, with an identity, a ledger (`house.sqlite`) and sessions of its own. It buys
//! from this provider like any other consumer, over QUIC, so that strangers' calls are metered, acknowledged and receipted
//! by the same code and their receipts are signed by two keys. Only its payments never leave the wallet: a slice is an
//! invoice of the very wallet that would pay it. [`HouseWallet`] stands in for Lightning there: it takes the invoice's
//! preimage from the wallet that made it, writes down that it is paid, and tells both sides.
//!
//! | step | provider's journal | a crash after it |
//! |---|---|---|
//! | the row in `door_house` | | told again at the next start |
//! | the owner's advance: external / lightning | written | both again: the same transfer, the same event |
//! | `PaymentReceived` to the provider | lightning / prepaid | told again; a payment hash credits once |
//! | `PaymentSettled` to the house | (its own journal) | it asks by hash |
//!
//! What a client is charged at the end pays the advance back (clients / external).

use crate::drive::{journal::JournalWriter, now, provider};
use async_trait::async_trait;
use satgrid_ledger_sqlite::{HousePayment, KeyStore};
use satgrid_node::provider::ProviderEvent;
use satgrid_types::{LightningKey, Msat, PaymentHash, UnixMs};
use satgrid_wallet::{
    Balance, Channel, ChannelError, ChannelId, Embedded, Invoice, InvoiceError, InvoiceRequest, Lightning, Network,
    OpenChannel, PayError, PaymentRecord, PaymentState, WalletError, WalletEvent, invoice,
};
use sha2::{Digest as _, Sha256};
use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::{Notify, mpsc};

/// What the house may advance at one time, as its consumer role sees it. Clients have paid before: what they paid bounds it.
const FLOAT: Msat = Msat(1_000_000_000_000);
/// Payments that are told again at a start. A consumer has fewer in flight.
const TOLD_AGAIN: u32 = 64;

/// Pays invoices of the wallet behind it, inside this process.
pub(crate) struct HouseWallet {
    wallet: Arc<dyn Embedded>,
    store: KeyStore,
    /// The provider's.
    journal: JournalWriter,
    provider: mpsc::Sender<provider::Message>,
    events: Mutex<VecDeque<WalletEvent>>,
    told: Notify,
}

fn refused(reason: &str) -> WalletError {
    WalletError::Node { reason: reason.to_owned() }
}

impl HouseWallet {
    pub(crate) fn new(
        wallet: Arc<dyn Embedded>,
        store: KeyStore,
        journal: JournalWriter,
        provider: mpsc::Sender<provider::Message>,
    ) -> HouseWallet {
        let events = Mutex::new(VecDeque::new());
        HouseWallet { wallet, store, journal, provider, events, told: Notify::new() }
    }

    /// Tells what the last run may have left half told.
    pub(crate) async fn restore(&self) -> anyhow::Result<()> {
        for paid in self.store.house_payments(TOLD_AGAIN).await? {
            self.tell(&paid).await.map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }

    /// Books the advance and tells both sides.
    async fn tell(&self, paid: &HousePayment) -> Result<(), String> {
        let HousePayment { hash, amount, preimage } = *paid;
        self.journal.append(vec![super::books::advance(hash, amount)]).await?;
        let event = provider::Message::Event(ProviderEvent::PaymentReceived { hash, amount });
        self.provider.send(event).await.map_err(|_| "the provider has stopped".to_owned())?;
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push_back(WalletEvent::PaymentSettled { hash, preimage, fee: Msat::ZERO });
        self.told.notify_one();
        Ok(())
    }

    async fn row(&self, hash: PaymentHash) -> Result<Option<HousePayment>, WalletError> {
        self.store.house_payment(hash).await.map_err(|error| refused(&error.to_string()))
    }
}

#[async_trait]
impl Lightning for HouseWallet {
    fn node_id(&self) -> LightningKey {
        self.wallet.node_id()
    }
    fn network(&self) -> Network {
        self.wallet.network()
    }
    async fn create_invoice(&self, _: InvoiceRequest) -> Result<Invoice, InvoiceError> {
        Err(refused("the house is paid by nobody").into())
    }

    async fn pay(&self, bolt11: &str, _: Msat) -> Result<(), PayError> {
        let bad = |reason: &str| PayError::BadInvoice { reason: reason.to_owned() };
        let facts = invoice::read(bolt11).map_err(|error| bad(&error.to_string()))?;
        let amount = facts.amount.ok_or_else(|| bad("it names no amount"))?;
        if facts.payee != self.node_id() || facts.network != Some(self.network()) {
            return Err(bad("the house pays this node alone"));
        }
        let hash = facts.payment_hash;
        let uncertain = |reason: String| PayError::Uncertain { reason };
        let paid = match self.row(hash).await.map_err(|error| uncertain(error.to_string()))? {
            Some(paid) => paid,
            None if facts.is_expired(now()) => return Err(PayError::Expired),
            None => {
                let preimage = self.wallet.preimage(hash).await.map_err(|_| PayError::Stopped)?;
                let preimage = preimage.filter(|found| <[u8; 32]>::from(Sha256::digest(found.0)) == hash.0);
                let preimage = preimage.ok_or_else(|| bad("this wallet did not make it"))?;
                let paid = HousePayment { hash, amount, preimage };
                self.store.add_house_payment(&paid, now()).await.map_err(|error| uncertain(error.to_string()))?;
                paid
            }
        };
        self.tell(&paid).await.map_err(uncertain)
    }

    async fn lookup(&self, hash: PaymentHash) -> Result<PaymentState, WalletError> {
        Ok(self.row(hash).await?.map_or(PaymentState::Unknown, |HousePayment { amount, preimage, .. }| {
            PaymentState::Settled { preimage, fee: Msat::ZERO, amount }
        }))
    }
    async fn payments_since(&self, _: UnixMs) -> Result<Vec<PaymentRecord>, WalletError> {
        Ok(Vec::new())
    }
    async fn balance(&self) -> Result<Balance, WalletError> {
        Ok(Balance { lightning_total: FLOAT, payable: FLOAT, largest_payment: FLOAT, ..Balance::default() })
    }
    /// One, to this node itself.
    async fn channels(&self) -> Result<Vec<Channel>, WalletError> {
        Ok(vec![Channel {
            id: ChannelId([0; 32]),
            counterparty: self.node_id(),
            capacity_sat: FLOAT.0 / 1_000,
            ours: FLOAT,
            reserve_sat: 0,
            payable: FLOAT,
            largest_payment: FLOAT,
            receivable: Msat::ZERO,
            we_opened: true,
            ready: true,
            usable: true,
            confirmations: u32::MAX,
        }])
    }
    async fn connect(&self, _: LightningKey, _: SocketAddr) -> Result<(), ChannelError> {
        Ok(())
    }
    async fn open_channel(&self, _: OpenChannel) -> Result<(), ChannelError> {
        Err(refused("the house has no channels of its own").into())
    }
    async fn close_channel(&self, _: ChannelId, _: bool) -> Result<(), ChannelError> {
        Err(refused("the house has no channels of its own").into())
    }
    async fn new_address(&self) -> Result<String, WalletError> {
        Err(refused("the house has no coins of its own"))
    }
    async fn sync(&self) -> Result<(), WalletError> {
        Ok(())
    }
    async fn next_event(&self) -> Result<WalletEvent, WalletError> {
        loop {
            let front = self.events.lock().unwrap_or_else(PoisonError::into_inner).front().cloned();
            match front {
                Some(event) => return Ok(event),
                None => self.told.notified().await,
            }
        }
    }
    async fn event_handled(&self) -> Result<(), WalletError> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        Ok(())
    }
    fn sign_message(&self, message: &[u8]) -> String {
        self.wallet.sign_message(message)
    }
    async fn stop(&self) -> Result<(), WalletError> {
        Ok(())
    }
}
