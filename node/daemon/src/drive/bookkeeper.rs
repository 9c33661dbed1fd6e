//! The operator's own money into the books: whatever the wallet's list has and no session, no door and no entry explains.
//!
//! Payments that the operator makes by hand are known by their hash before they are made ([`Own`]) and booked as soon as
//! they are settled. The rest (other apps of theirs, payments of before a crash) is booked once it has been settled for
//! [`GRACE_MS`] and this process has run as long: until then a role may still book it as its own.

use super::{ClockWatch, journal::JournalWriter, now};
use crate::store::Store;
use satgrid_ledger::{entry::Draft, own};
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
const GRACE_MS: u64 = 600_000;
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

/// Rows of the wallet's list up to this time are explained, all of them. It is found anew at each start: the journal has an
/// index of what its entries name, so that costs a look-up for each row.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Explained {
    upto: UnixMs,
}

impl Explained {
    /// A row may be written a moment after its time: so much is looked at again.
    fn is_over(self, row: &PaymentRecord) -> bool {
        row.at < self.since()
    }

    /// The wallet is asked for what came then and later.
    fn since(self) -> UnixMs {
        UnixMs(self.upto.0.saturating_sub(GRACE_MS))
    }

    /// After a round that knew these rows as explained or as not.
    fn after<'a>(self, rows: impl Iterator<Item = (&'a PaymentRecord, bool)>) -> Explained {
        let (mut newest, mut open) = (self.upto, None::<UnixMs>);
        for (row, explained) in rows {
            newest = newest.max(row.at);
            if !explained {
                open = Some(open.map_or(row.at, |at| at.min(row.at)));
            }
        }
        Explained { upto: open.map_or(newest, |at| at.min(newest)).max(self.upto) }
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
        let (mut began, mut explained) = (now(), Explained::default());
        let mut clock = ClockWatch::new();
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                _ = look.tick() => {}
                () = self.own.bell.notified() => tokio::time::sleep(SETTLES_IN).await,
            }
            if clock.moved().is_some() {
                // Rows of before are older or newer than they say: everything is looked at again, and given its time.
                (began, explained) = (now(), Explained::default());
            }
            match self.round(began, explained).await {
                Ok(now_explained) => explained = now_explained,
                Err(error) => tracing::warn!(%error, "the operator's own payments are not booked yet"),
            }
        }
    }

    async fn round(&self, began: UnixMs, explained: Explained) -> anyhow::Result<Explained> {
        let mut rows = self.wallet.payments_since(explained.since()).await?;
        rows.retain(|row| !explained.is_over(row));
        let mut coins = match &self.embedded {
            Some(embedded) => embedded.onchain_rows().await?,
            None => Vec::new(),
        };
        coins.retain(|row| row.confirmed);
        let hashes = rows.iter().map(|row| Digest(row.hash.0)).chain(coins.iter().map(|row| row.txid));
        // The journal after the wallet: what a role has booked meanwhile is seen.
        let named = self.store.named(&hashes.collect::<Vec<_>>()).await?;
        let is_named = |row: &PaymentRecord| named.contains(&Digest(row.hash.0));
        let mut drafts = Vec::new();
        let mut doors = BTreeSet::new();
        for row in rows.iter().filter(|row| !is_named(row)) {
            if !matches!(row.state, PaymentState::Settled { .. }) {
                continue;
            }
            // A stranger's money, which the front door books.
            if self.keys.invoice(row.hash).await?.is_some() || self.keys.has_refund(row.hash).await? {
                doors.insert(row.hash);
                continue;
            }
            drafts.extend(self.payment(began, row));
        }
        drafts.extend(coins.iter().filter(|row| !named.contains(&row.txid)).map(coin));
        for drafts in drafts.chunks(AT_ONCE) {
            self.journal.append(drafts.to_vec()).await.map_err(anyhow::Error::msg)?;
        }
        // What is not settled has a new time when it is.
        let settled = |row: &PaymentRecord| matches!(row.state, PaymentState::Settled { .. });
        let over = |row: &PaymentRecord| is_named(row) || doors.contains(&row.hash) || !settled(row);
        Ok(explained.after(rows.iter().map(|row| (row, over(row)))))
    }

    fn payment(&self, began: UnixMs, row: &PaymentRecord) -> Option<Draft> {
        let PaymentState::Settled { preimage, .. } = row.state else { return None };
        let old = now().since(row.at.max(began)) >= GRACE_MS;
        let inbound = row.direction == Direction::Inbound;
        (old || self.own.has(&row.hash)).then(|| own::payment(row.hash, inbound, row.amount, row.fee, Some(preimage)))
    }
}

fn coin(row: &OnchainRow) -> Draft {
    own::on_chain(row.txid, row.inbound, row.amount, row.fee)
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::Msat;

    #[test]
    fn what_is_explained_is_not_looked_at_again() {
        let row = |at: u64| PaymentRecord {
            hash: PaymentHash([7; 32]),
            direction: Direction::Inbound,
            amount: Msat(1),
            fee: Msat::ZERO,
            state: PaymentState::InFlight,
            at: UnixMs(at),
        };
        const DAY: u64 = 24 * 3_600_000;
        let rows = [row(3 * DAY), row(DAY), row(2 * DAY)];
        let round = |explained: Explained, open: &[u64]| {
            let left: Vec<&PaymentRecord> = rows.iter().filter(|row| !explained.is_over(row)).collect();
            let seen = left.len();
            (explained.after(left.into_iter().map(|row| (row, !open.contains(&row.at.0)))), seen)
        };
        let (explained, seen) = round(Explained::default(), &[2 * DAY]);
        assert_eq!((explained.upto, seen), (UnixMs(2 * DAY), 3), "up to the one that is not");
        let (explained, seen) = round(explained, &[2 * DAY]);
        assert_eq!((explained.upto, seen), (UnixMs(2 * DAY), 2));
        let (explained, seen) = round(explained, &[]);
        assert_eq!((explained.upto, seen), (UnixMs(3 * DAY), 2));
        assert_eq!(round(explained, &[]).1, 1, "the newest is looked at for a while");
    }
}
