//! One fake wallet behind the async port.

use super::network::FakeNetwork;
use crate::{
    Network,
    port::{
        Balance, Channel, ChannelError, ChannelId, Invoice, InvoiceError, InvoiceRequest, Lightning, OpenChannel,
        PayError, PaymentRecord, PaymentState, WalletError, WalletEvent,
    },
};
use async_trait::async_trait;
use core::{
    future::poll_fn,
    net::SocketAddr,
    task::{Poll, Waker},
};
use satgrid_types::{LightningKey, Msat, PaymentHash, UnixMs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A wallet of a shared [`FakeNetwork`]. Nothing sleeps: whoever waits for an event moves the network's time on.
#[derive(Clone)]
pub struct FakeLightning {
    shared: Arc<Shared>,
    id: LightningKey,
}

struct Shared {
    network: Mutex<FakeNetwork>,
    waiting: Mutex<Vec<Waker>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeLightning {
    /// Puts `N` new wallets of `network` behind the port.
    pub fn wallets<const N: usize>(mut network: FakeNetwork) -> [FakeLightning; N] {
        let ids: [LightningKey; N] = core::array::from_fn(|_| network.add_wallet());
        let shared = Arc::new(Shared { network: Mutex::new(network), waiting: Mutex::new(Vec::new()) });
        ids.map(|id| FakeLightning { shared: shared.clone(), id })
    }

    /// The network itself: to script faults, crash wallets or count coins.
    pub fn with_network<T>(&self, f: impl FnOnce(&mut FakeNetwork) -> T) -> T {
        let result = f(&mut lock(&self.shared.network));
        for waker in lock(&self.shared.waiting).drain(..) {
            waker.wake();
        }
        result
    }
}

#[async_trait]
impl Lightning for FakeLightning {
    fn node_id(&self) -> LightningKey {
        self.id
    }
    fn network(&self) -> Network {
        Network::Regtest
    }
    async fn create_invoice(&self, request: InvoiceRequest) -> Result<Invoice, InvoiceError> {
        self.with_network(|n| n.create_invoice(n.now(), self.id, request))
    }
    async fn pay(&self, bolt11: &str, max_fee: Msat) -> Result<(), PayError> {
        self.with_network(|n| n.pay(n.now(), self.id, bolt11, max_fee))
    }
    async fn lookup(&self, hash: PaymentHash) -> Result<PaymentState, WalletError> {
        self.with_network(|n| n.lookup(self.id, hash))
    }
    async fn payments_since(&self, since: UnixMs) -> Result<Vec<PaymentRecord>, WalletError> {
        let mut rows = self.with_network(|n| n.payments(self.id))?;
        rows.retain(|row| row.at >= since);
        Ok(rows)
    }
    async fn balance(&self) -> Result<Balance, WalletError> {
        self.with_network(|n| n.balance(self.id))
    }
    async fn channels(&self) -> Result<Vec<Channel>, WalletError> {
        self.with_network(|n| n.channels(self.id))
    }
    async fn connect(&self, node: LightningKey, addr: SocketAddr) -> Result<(), ChannelError> {
        self.with_network(|n| n.connect(self.id, node, addr))
    }
    async fn open_channel(&self, open: OpenChannel) -> Result<(), ChannelError> {
        self.with_network(|n| n.open_channel(self.id, open))
    }
    async fn close_channel(&self, channel: ChannelId, force: bool) -> Result<(), ChannelError> {
        self.with_network(|n| n.close_channel(self.id, channel, force))
    }
    async fn new_address(&self) -> Result<String, WalletError> {
        self.with_network(|n| n.new_address(self.id))
    }
    async fn sync(&self) -> Result<(), WalletError> {
        self.with_network(|n| n.up(self.id).map(drop))
    }
    async fn next_event(&self) -> Result<WalletEvent, WalletError> {
        poll_fn(|context| {
            let event = self.with_network(|n| {
                loop {
                    n.up(self.id)?;
                    if let Some(event) = n.poll_event(self.id) {
                        return Ok(Some(event.clone()));
                    }
                    match n.poll_timeout() {
                        Some(at) => n.handle_timeout(at),
                        None => return Ok(None),
                    }
                }
            });
            match event {
                Ok(Some(event)) => Poll::Ready(Ok(event)),
                Err(stopped) => Poll::Ready(Err(stopped)),
                Ok(None) => {
                    lock(&self.shared.waiting).push(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
    async fn event_handled(&self) -> Result<(), WalletError> {
        self.with_network(|n| n.event_handled(self.id))
    }
    fn sign_message(&self, message: &[u8]) -> String {
        self.with_network(|n| n.sign_message(self.id, message))
    }
    async fn stop(&self) -> Result<(), WalletError> {
        self.with_network(|n| n.stop(self.id));
        Ok(())
    }
}
