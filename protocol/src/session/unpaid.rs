//! Sessions in which nothing was ever paid: until when a provider has to remember one.
//!
//! Whoever opens a session may never come back, and it costs nothing. What a provider said in it holds for a while: its quote,
//! and its invoices. After that nothing is lost with it. All of this is read off the entries, so that a node that starts
//! again forgets the same sessions.

use super::SessionState;
use satgrid_types::{PaymentHash, UnixMs};

/// A session outlives its quote by this, in ms: what was begun under it is on its way.
const UNDER_WAY_MS: u64 = 60_000;
/// A payment may arrive so long after its invoice has expired, in ms. Wallets refuse later ones: LDK's after two hours, since the
/// time that it goes by is that of blocks.
pub const LATE_PAYMENT_MS: u64 = 3 * 60 * 60 * 1_000;
/// A payment that arrived just before a provider went away is told when it is back, in ms.
const AWAY_MS: u64 = 30 * 24 * 60 * 60 * 1_000;

impl SessionState {
    /// Nothing was paid here and nothing that ended cost anything: neither side owes the other.
    pub fn is_unpaid(&self) -> bool {
        [self.paid, self.credited, self.charged].iter().all(|sum| sum.is_zero())
    }

    /// Some invoice was issued.
    pub fn is_invoiced(&self) -> bool {
        self.payable_until.is_some()
    }

    /// One of its invoices may still be paid.
    pub fn may_be_paid(&self, now: UnixMs) -> bool {
        self.payable_until.is_some_and(|until| now <= until.plus_ms(LATE_PAYMENT_MS))
    }

    /// Whether a provider that starts takes it up: where nothing was paid and nothing is under way, only if a payment may be told yet.
    pub fn is_taken_up(&self, now: UnixMs) -> bool {
        let told = self.payable_until.is_some_and(|until| now <= until.plus_ms(AWAY_MS));
        !self.is_unpaid() || !self.requests.is_empty() || told
    }

    /// When its consumer last asked for a price.
    pub fn quoted_at(&self) -> UnixMs {
        self.quote().issued_at
    }

    /// From when on nothing that the provider said in it holds.
    pub fn lapses_at(&self) -> UnixMs {
        let quote = self.quote().valid_until.plus_ms(UNDER_WAY_MS);
        self.payable_until.map_or(quote, |until| quote.max(until.plus_ms(LATE_PAYMENT_MS).plus_ms(1)))
    }

    /// Of all invoices that were issued in it.
    pub fn payment_hashes(&self) -> impl Iterator<Item = &PaymentHash> {
        self.by_hash.keys()
    }
}
