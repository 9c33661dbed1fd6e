//! Invoices, slices and refunds under audit.

use super::{
    Party, Rule,
    flows::{Backing, Reserves},
    invoice::read_invoice,
    session::{Notes, Refund, SessionAudit, Slice, SliceStatus},
};
use crate::{statements::SliceDescriptor, transfer::Account};
use satgrid_types::{Msat, PaymentHash, Preimage};
use sha2::{Digest as _, Sha256};

/// Whether a preimage is that of a payment hash.
fn opens(preimage: &Preimage, hash: &PaymentHash) -> bool {
    <[u8; 32]>::from(Sha256::digest(preimage.0)) == hash.0
}

fn nothing() -> Backing {
    Backing::Exactly(Vec::new(), Reserves::Nothing)
}

/// A payment of the operator's own: it moves money between the wallet and the owner.
pub(super) fn own(
    hash: PaymentHash,
    inbound: bool,
    (amount, fee): (Msat, Msat),
    preimage: Option<&Preimage>,
    notes: &mut Notes,
) -> Backing {
    notes.require(
        preimage.is_none_or(|preimage| opens(preimage, &hash)),
        Rule::PaymentPreimage,
        Party::Exporter,
        || format!("the preimage is not that of {hash}"),
    );
    let (amount, fee) = (i128::from(amount.0), i128::from(fee.0));
    let out = if inbound { amount.saturating_neg() } else { amount };
    let nets = vec![
        (Account::External, out),
        (Account::RoutingFees, fee),
        (Account::Lightning, out.saturating_add(fee).saturating_neg()),
    ];
    Backing::Exactly(nets, Reserves::Nothing)
}

impl SessionAudit {
    /// An invoice of slice `k`. Gives the payment hash where the invoice could be read.
    pub(super) fn invoice(
        &mut self,
        k: u32,
        bolt11: &str,
        terms: &SliceDescriptor,
        network: Option<&str>,
        notes: &mut Notes,
    ) -> (Backing, Option<PaymentHash>) {
        let provider = self.owed_by();
        notes.version("slice descriptor", terms.version, SliceDescriptor::VERSION);
        let facts = match read_invoice(bolt11) {
            Ok(facts) => facts,
            Err(why) => {
                notes.add(Rule::InvoiceSignature, provider, why);
                return (Backing::Unjudged, None);
            }
        };
        notes.require(network.is_none_or(|n| n == facts.network), Rule::InvoiceSignature, provider, || {
            format!("an invoice of {}, the journal is of {network:?}", facts.network)
        });
        let quote = self.quotes.get(&terms.quote);
        let ours = terms.session == self.id
            && terms.k == k
            && terms.provider == self.provider
            && terms.consumer == self.consumer
            && quote.is_some();
        notes.require(ours, Rule::InvoiceDescriptor, provider, || {
            format!("the terms are of slice {} of session {} at quote {}", terms.k, terms.session, terms.quote)
        });
        if let Some(quote) = quote {
            notes.require(facts.payee == quote.lightning_node, Rule::InvoicePayee, provider, || {
                format!("pays {}, the quote names {}", facts.payee, quote.lightning_node)
            });
        }
        notes.require(facts.description_hash == Some(terms.description_hash()), Rule::InvoiceTerms, provider, || {
            format!("the description hash is {:?}", facts.description_hash)
        });
        notes.require(facts.amount == Some(terms.amount), Rule::InvoiceAmount, provider, || {
            format!("over {:?}, the terms say {}", facts.amount, terms.amount)
        });
        let next = self.slices.last_key_value().map_or(0, |(k, _)| k.saturating_add(1));
        let open = self.slices.get(&k).is_none_or(|old| match old.status {
            SliceStatus::Invoiced | SliceStatus::Failed => true,
            SliceStatus::Attempted | SliceStatus::Paid => false,
        });
        if notes
            .require(k <= next && open, Rule::InvoiceSequence, provider, || format!("slice {k}, the next is {next}"))
        {
            let old = self.slices.remove(&k);
            let earlier = old.map(|old| {
                let mut earlier = old.earlier;
                earlier.push((old.hash, old.amount));
                earlier
            });
            let slice = Slice {
                hash: facts.payment_hash,
                amount: terms.amount,
                earlier: earlier.unwrap_or_default(),
                max_fee: Msat::ZERO,
                status: SliceStatus::Invoiced,
                receipted: false,
            };
            self.slices.insert(k, slice);
        }
        if let Some(summary) = &mut self.summary {
            summary.invoices.insert(facts.payment_hash);
        }
        (nothing(), Some(facts.payment_hash))
    }

    /// Consumer: about to pay.
    pub(super) fn attempted(&mut self, k: u32, hash: PaymentHash, max_fee: Msat, notes: &mut Notes) -> Backing {
        self.require_side(!self.as_provider, notes);
        let busy = self.slices.values().any(|slice| slice.status == SliceStatus::Attempted);
        notes.require(!busy, Rule::PaymentInFlight, Party::Exporter, || {
            "another payment of the session is in flight".into()
        });
        let slice = self.slices.get_mut(&k).and_then(|slice| slice.take_up(hash).then_some(slice));
        let Some(slice) = slice else {
            notes.add(Rule::PaymentUnknown, Party::Exporter, format!("slice {k} has no invoice of this payment hash"));
            return Backing::Unjudged;
        };
        let again = matches!(slice.status, SliceStatus::Paid | SliceStatus::Attempted);
        notes.require(!again, Rule::PaymentTwice, Party::Exporter, || format!("slice {k} was attempted before"));
        (slice.status, slice.max_fee) = (SliceStatus::Attempted, max_fee);
        let (session, amount) = (self.id, slice.amount);
        Backing::Exactly(Vec::new(), Reserves::Slice { session, amount, max_fee })
    }

    /// Consumer: slice `k` was paid.
    pub(super) fn settled(
        &mut self,
        k: u32,
        (hash, preimage): (PaymentHash, Preimage),
        (amount, fee): (Msat, Msat),
        notes: &mut Notes,
    ) -> Backing {
        self.require_side(!self.as_provider, notes);
        notes.require(opens(&preimage, &hash), Rule::PaymentPreimage, Party::Exporter, || {
            format!("the preimage is not that of {hash}")
        });
        let Some(slice) = self.slices.get_mut(&k).filter(|slice| slice.hash == hash) else {
            notes.add(Rule::PaymentUnknown, Party::Exporter, format!("{hash} is not the invoice of slice {k}"));
            return Backing::Unjudged;
        };
        match slice.status {
            SliceStatus::Attempted => {}
            SliceStatus::Paid => {
                notes.add(Rule::PaymentTwice, Party::Exporter, format!("slice {k} was settled before"))
            }
            SliceStatus::Invoiced | SliceStatus::Failed => {
                notes.add(Rule::PaymentUnknown, Party::Exporter, format!("slice {k} was not attempted"));
            }
        }
        let (agreed, cap) = (slice.amount, self.spend_cap);
        notes.require(amount == agreed, Rule::PaymentAmount, Party::Exporter, || {
            format!("settled {amount}, the invoice is over {agreed}")
        });
        slice.status = SliceStatus::Paid;
        self.add_paid(k, agreed, notes);
        notes.require(self.paid <= cap, Rule::OpenSpendCap, Party::Exporter, || {
            format!("{} paid, the cap is {cap}", self.paid)
        });
        let (amount, fee) = (i128::from(agreed.0), i128::from(fee.0));
        let nets = vec![
            (Account::PrepaidAsset(self.id), amount),
            (Account::RoutingFees, fee),
            (Account::Lightning, amount.saturating_add(fee).saturating_neg()),
        ];
        Backing::Exactly(nets, Reserves::Nothing)
    }

    /// Provider: slice `k` arrived.
    pub(super) fn received(&mut self, k: u32, hash: PaymentHash, amount: Msat, notes: &mut Notes) -> Backing {
        self.require_side(self.as_provider, notes);
        let slice = self.slices.get_mut(&k).and_then(|slice| slice.take_up(hash).then_some(slice));
        let Some(slice) = slice else {
            notes.add(Rule::PaymentUnknown, Party::Exporter, format!("{hash} is not an invoice of slice {k}"));
            return Backing::Unjudged;
        };
        if slice.status == SliceStatus::Paid {
            notes.add(Rule::PaymentTwice, Party::Exporter, format!("slice {k} was received before"));
            return Backing::Unjudged;
        }
        slice.status = SliceStatus::Paid;
        let agreed = slice.amount;
        self.add_paid(k, agreed, notes);
        let (arrived, agreed) = (i128::from(amount.min(agreed).0), i128::from(agreed.0));
        let nets = vec![
            (Account::Lightning, arrived),
            (Account::RoutingFees, agreed.saturating_sub(arrived)),
            (Account::Prepaid(self.id), agreed.saturating_neg()),
        ];
        Backing::Exactly(nets, Reserves::Nothing)
    }

    /// A payer shows a preimage, a payee has its wallet's word: neither may write down what is the other's to say.
    fn require_side(&self, right: bool, notes: &mut Notes) {
        notes.require(right, Rule::PaymentUnknown, Party::Exporter, || {
            let says = if self.as_provider {
                "paid, and this journal is the payee's"
            } else {
                "received, and it is the payer's"
            };
            format!("a slice is said to be {says}")
        });
    }

    fn add_paid(&mut self, k: u32, amount: Msat, notes: &mut Notes) {
        self.paid = self.paid.saturating_add(amount);
        notes.delta.slices = 1;
        notes.delta.paid_msat = amount.0;
        if let (Some(summary), Some(slice)) = (&mut self.summary, self.slices.get(&k)) {
            summary.slices.insert(k, (slice.hash.to_string(), amount.0));
        }
    }

    /// Slice `k` failed for good.
    pub(super) fn failed(&mut self, k: u32, hash: PaymentHash, notes: &mut Notes) -> Backing {
        match self.slices.get_mut(&k).filter(|slice| slice.hash == hash) {
            Some(slice) if slice.status == SliceStatus::Paid => {
                notes.add(Rule::PaymentTwice, Party::Exporter, format!("slice {k} failed after it was paid"));
            }
            Some(slice) => slice.status = SliceStatus::Failed,
            None => notes.add(Rule::PaymentUnknown, Party::Exporter, format!("{hash} is not the invoice of slice {k}")),
        }
        nothing()
    }

    /// Provider: about to pay a remainder back.
    pub(super) fn refund_attempted(
        &mut self,
        hash: PaymentHash,
        amount: Msat,
        max_fee: Msat,
        notes: &mut Notes,
    ) -> Backing {
        let remainder = self.remainder();
        notes.require(amount <= remainder && self.as_provider, Rule::RefundInvalid, Party::Exporter, || {
            format!("{amount}, owed are {remainder}")
        });
        notes.require(self.refund.is_none(), Rule::PaymentInFlight, Party::Exporter, || {
            "another refund of the session is in flight".into()
        });
        self.refund = Some(Refund { hash, amount });
        Backing::Remainder(self.id, Reserves::Refund { session: self.id, amount, max_fee })
    }

    pub(super) fn refund_settled(
        &mut self,
        hash: PaymentHash,
        (amount, fee): (Msat, Msat),
        preimage: Option<&Preimage>,
        from_due: Msat,
        notes: &mut Notes,
    ) -> Backing {
        notes.require(preimage.is_none_or(|p| opens(p, &hash)), Rule::PaymentPreimage, Party::Exporter, || {
            format!("the preimage is not that of {hash}")
        });
        let attempted = self.refund.take();
        let right = attempted.is_some_and(|refund| refund.hash == hash && refund.amount == amount);
        notes.require(right, Rule::RefundInvalid, Party::Exporter, || {
            format!("{amount} under {hash} is not the refund that was attempted")
        });
        let left = self.remainder();
        notes.require(from_due <= left, Rule::RefundInvalid, Party::Exporter, || {
            format!("{from_due} taken from a remainder of {left}")
        });
        self.refunded = self.refunded.saturating_add(from_due);
        notes.delta.refunded_msat = amount.0;
        Backing::RefundOut { session: self.id, amount, fee }
    }

    /// A refund that failed for good; the remainder is still owed.
    pub(super) fn refund_failed(&mut self) -> Backing {
        self.refund = None;
        nothing()
    }

    /// Consumer: the remainder came back. `booked` left the prepaid account.
    pub(super) fn refund_received(&mut self, amount: Msat, booked: Msat, notes: &mut Notes) -> Backing {
        let remainder = self.remainder();
        notes.require(!self.as_provider && booked <= remainder, Rule::RefundInvalid, Party::Exporter, || {
            format!("{booked} of a remainder of {remainder}")
        });
        self.refunded = self.refunded.saturating_add(booked);
        notes.delta.refunded_msat = amount.0;
        let cap = self.quotes.values().map(|quote| quote.terms.refund_fee_cap).max().unwrap_or(Msat::ZERO);
        // More than is owed is booked as far as it is owed.
        Backing::RefundIn { session: self.id, amount: amount.min(remainder), cap }
    }
}
