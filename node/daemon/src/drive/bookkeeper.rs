//! The operator's own money into the books: whatever the wallet's list has and no session, no door and no entry explains.
//!
//! Payments that the operator makes by hand are known by their hash before they are made ([`Own`]) and booked as soon as
//! they are settled. The rest (other apps of theirs, payments of before a crash) is booked once it has been settled for
//! [`GRACE`] and this process has run as long: until then a role may still book it as its own.

use super::{journal::JournalWriter, now};
use crate::store::Store;
use satgrid_ledger::{
    audit::read_invoice,
    entry::{Draft, Entry, Evidence},
    journal::{Journal, MAX_READ},
    own,
};
use satgrid_ledger_sqlite::KeyStore;
use satgrid_types::{Digest, PaymentHash, UnixMs};
use satgrid_wallet::{Direction, Embedded, Lightning, PaymentRecord, PaymentState, embedded::OnchainRow};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// A role books its payments within seconds of their end.
const GRACE: Duration = Duration::from_secs(600);
/// The wallet's list is read so often even where nobody says that something moved.
const LOOK_EVERY: Duration = Duration::from_secs(120);
/// A payment's row follows its event by a moment.
const SETTLES_IN: Duration = Duration::from_millis(500);
/// Drafts in one append.
const AT_ONCE: usize = 8;

/// Payments that are known to be the operator's, and a bell for when one may have settled.
#[derive(Clone, Default)]
pub(crate) struct Own {
    hashes: Arc<Mutex<BTreeSet<PaymentHash>>>,
    bell: Arc<Notify>,
}

impl Own {
    pub(crate) fn add(&self, hash: PaymentHash) {
        self.hashes.lock().unwrap_or_else(PoisonError::into_inner).insert(hash);
    }
    fn has(&self, hash: &PaymentHash) -> bool {
        self.hashes.lock().unwrap_or_else(PoisonError::into_inner).contains(hash)
    }
    pub(crate) fn ring(&self) {
        self.bell.notify_one();
    }
}

/// What the journal explains.
#[derive(Default)]
struct Known {
    next: u64,
    payments: BTreeSet<PaymentHash>,
    transactions: BTreeSet<Digest>,
}

impl Known {
    fn entry(&mut self, entry: &Entry) {
        self.next = entry.seq.saturating_add(1);
        match &entry.evidence {
            Some(Evidence::Invoice { bolt11, .. }) => {
                self.payments.extend(read_invoice(bolt11).map(|facts| facts.payment_hash));
            }
            Some(
                Evidence::PaymentAttempted { payment_hash, .. }
                | Evidence::PaymentSettled { payment_hash, .. }
                | Evidence::PaymentReceived { payment_hash, .. }
                | Evidence::RefundAttempted { payment_hash, .. }
                | Evidence::RefundSettled { payment_hash, .. }
                | Evidence::RefundReceived { payment_hash, .. }
                | Evidence::WalletPayment { payment_hash, .. },
            ) => {
                self.payments.insert(*payment_hash);
            }
            Some(Evidence::OnChain { txid, .. }) => {
                self.transactions.insert(*txid);
            }
            Some(_) | None => {}
        }
    }
}

pub(crate) struct Bookkeeper {
    pub wallet: Arc<dyn Lightning>,
    pub embedded: Option<Arc<dyn Embedded>>,
    pub store: Store,
    pub keys: KeyStore,
    pub journal: JournalWriter,
    pub own: Own,
    pub shutdown: CancellationToken,
}

impl Bookkeeper {
    pub(crate) async fn run(self) {
        let began = now();
        let mut known = Known::default();
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                _ = look.tick() => {}
                () = self.own.bell.notified() => tokio::time::sleep(SETTLES_IN).await,
            }
            if let Err(error) = self.round(began, &mut known).await {
                tracing::warn!(%error, "the operator's own payments are not booked yet");
            }
        }
    }

    async fn round(&self, began: UnixMs, known: &mut Known) -> anyhow::Result<()> {
        let rows = self.wallet.payments().await?;
        let coins = match &self.embedded {
            Some(embedded) => embedded.onchain_rows().await?,
            None => Vec::new(),
        };
        // The journal after the wallet: what a role has booked meanwhile is seen.
        loop {
            let entries = self.store.read(known.next, MAX_READ).await?;
            if entries.is_empty() {
                break;
            }
            entries.iter().for_each(|entry| known.entry(entry));
        }
        let mut drafts = Vec::new();
        for row in &rows {
            let Some(draft) = self.payment(began, known, row) else { continue };
            // A stranger's money, which the front door books.
            if self.keys.invoice(row.hash).await?.is_none() && !self.keys.has_refund(row.hash).await? {
                drafts.push(draft);
            }
        }
        drafts.extend(coins.iter().filter_map(|row| coin(known, row)));
        for drafts in drafts.chunks(AT_ONCE) {
            self.journal.append(drafts.to_vec()).await.map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }

    fn payment(&self, began: UnixMs, known: &Known, row: &PaymentRecord) -> Option<Draft> {
        let PaymentState::Settled { preimage, .. } = row.state else { return None };
        if known.payments.contains(&row.hash) {
            return None;
        }
        let grace = u64::try_from(GRACE.as_millis()).unwrap_or(u64::MAX);
        let old = now().since(row.at.max(began)) >= grace;
        let inbound = row.direction == Direction::Inbound;
        (old || self.own.has(&row.hash)).then(|| own::payment(row.hash, inbound, row.amount, row.fee, Some(preimage)))
    }
}

fn coin(known: &Known, row: &OnchainRow) -> Option<Draft> {
    let new = row.confirmed && !known.transactions.contains(&row.txid);
    new.then(|| own::on_chain(row.txid, row.inbound, row.amount, row.fee))
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::Msat;

    #[test]
    fn coins_are_booked_when_they_are_confirmed_and_once() {
        let row = |confirmed| OnchainRow {
            txid: Digest([7; 32]),
            inbound: false,
            amount: Msat(5_000_000),
            fee: Msat(141_000),
            confirmed,
        };
        let mut known = Known::default();
        assert_eq!(coin(&known, &row(false)), None);
        let draft = coin(&known, &row(true)).unwrap();
        let entry = Entry::chain(&satgrid_ledger::Head::EMPTY, UnixMs(1), draft);
        known.entry(&entry);
        assert_eq!(known.next, 1);
        assert_eq!(coin(&known, &row(true)), None);
    }
}
