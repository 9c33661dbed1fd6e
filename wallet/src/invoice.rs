//! Reading a BOLT 11 invoice against what was agreed, before a msat moves.
//!
//! An invoice is the payee's signed text; [`check`] accepts one only if every term is the agreed one, exactly. What
//! passes is a [`CheckedInvoice`]: inner code pays nothing else. This room never fetches or makes an invoice.

use crate::{Invoice, Network, port::MAX_BOLT11_LEN};
use lightning_invoice::{Bolt11Invoice, Bolt11InvoiceDescriptionRef};
use satgrid_types::{Digest, LightningKey, Msat, PaymentHash, UnixMs};
use thiserror::Error;

/// An invoice must live at least this long when it is paid: one that dies on the way helps nobody.
pub const MIN_REMAINING_SECS: u64 = 10;

/// The terms that an invoice is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    pub amount: Msat,
    /// SHA-256 of the terms that both sides know (a slice's descriptor).
    pub description_hash: Digest,
    /// The Lightning node that the quote names.
    pub payee: LightningKey,
    pub network: Network,
}

/// Why an invoice is not the one that was agreed. All but `Expired` are the payee's fault; that may be a clock's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvoiceMismatch {
    #[error("not a BOLT 11 invoice: {reason}")]
    Malformed { reason: String },
    #[error("an invoice of {len} characters; the limit is {MAX_BOLT11_LEN}")]
    TooLong { len: usize },
    #[error("for {got:?}, expected {expected}")]
    Network { expected: Network, got: Option<Network> },
    #[error("over {got:?}, agreed was {expected}")]
    Amount { expected: Msat, got: Option<Msat> },
    #[error("its description hash is {got:?}, that of the agreed terms is {expected}")]
    DescriptionHash { expected: Digest, got: Option<Digest> },
    #[error("pays to {got}, the quote names {expected}")]
    Payee { expected: LightningKey, got: LightningKey },
    #[error(
        "expires at {expires_at:?}, this machine's clock says {now:?}, and at least {MIN_REMAINING_SECS} s must remain; if it was just made, one of the two clocks is wrong (`satgrid doctor` looks at this one)"
    )]
    Expired { expires_at: UnixMs, now: UnixMs },
}

/// An invoice that says what was agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedInvoice {
    bolt11: String,
    payment_hash: PaymentHash,
    amount: Msat,
    expires_at: UnixMs,
}

impl CheckedInvoice {
    pub fn bolt11(&self) -> &str {
        &self.bolt11
    }
    pub fn payment_hash(&self) -> PaymentHash {
        self.payment_hash
    }
    pub fn amount(&self) -> Msat {
        self.amount
    }
    pub fn expires_at(&self) -> UnixMs {
        self.expires_at
    }
}

/// Accepts `bolt11` if it is exactly what was agreed and has time left at `now`.
pub fn check(bolt11: &str, expected: &Expected, now: UnixMs) -> Result<CheckedInvoice, InvoiceMismatch> {
    let facts = read(bolt11)?;
    if facts.network != Some(expected.network) {
        return Err(InvoiceMismatch::Network { expected: expected.network, got: facts.network });
    }
    if facts.amount != Some(expected.amount) {
        return Err(InvoiceMismatch::Amount { expected: expected.amount, got: facts.amount });
    }
    if facts.description_hash != Some(expected.description_hash) {
        return Err(InvoiceMismatch::DescriptionHash {
            expected: expected.description_hash,
            got: facts.description_hash,
        });
    }
    if facts.payee != expected.payee {
        return Err(InvoiceMismatch::Payee { expected: expected.payee, got: facts.payee });
    }
    if now.plus_ms(MIN_REMAINING_SECS * 1_000) > facts.expires_at {
        return Err(InvoiceMismatch::Expired { expires_at: facts.expires_at, now });
    }
    Ok(CheckedInvoice {
        bolt11: bolt11.to_owned(),
        payment_hash: facts.payment_hash,
        amount: expected.amount,
        expires_at: facts.expires_at,
    })
}

/// What an invoice says, unchecked. For display and for wallets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvoiceFacts {
    pub payment_hash: PaymentHash,
    /// `None`: the payer chooses.
    pub amount: Option<Msat>,
    pub description_hash: Option<Digest>,
    pub payee: LightningKey,
    pub network: Option<Network>,
    pub expires_at: UnixMs,
}

impl InvoiceFacts {
    pub fn is_expired(&self, now: UnixMs) -> bool {
        now >= self.expires_at
    }
}

/// Parses `bolt11`; its signature holds, everything else is yet to be judged.
pub fn read(bolt11: &str) -> Result<InvoiceFacts, InvoiceMismatch> {
    if bolt11.len() > MAX_BOLT11_LEN {
        return Err(InvoiceMismatch::TooLong { len: bolt11.len() });
    }
    let invoice: Bolt11Invoice = bolt11.parse().map_err(|e| InvoiceMismatch::Malformed { reason: format!("{e}") })?;
    let description_hash = match invoice.description() {
        Bolt11InvoiceDescriptionRef::Hash(hash) => Some(Digest(*AsRef::<[u8; 32]>::as_ref(&hash.0))),
        Bolt11InvoiceDescriptionRef::Direct(_) => None,
    };
    // An expiry beyond the range of time is as good as never.
    let expires_at = invoice.expires_at().map_or(UnixMs(u64::MAX), |at| UnixMs::from_secs(at.as_secs()));
    Ok(InvoiceFacts {
        payment_hash: PaymentHash(*AsRef::<[u8; 32]>::as_ref(invoice.payment_hash())),
        amount: invoice.amount_milli_satoshis().map(Msat),
        description_hash,
        payee: LightningKey(invoice.get_payee_pub_key().serialize()),
        network: Network::of_currency(&invoice.currency()),
        expires_at,
    })
}

impl From<CheckedInvoice> for Invoice {
    fn from(checked: CheckedInvoice) -> Invoice {
        Invoice { bolt11: checked.bolt11, payment_hash: checked.payment_hash }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fake::{FakeNetwork, FaultRates},
        port::InvoiceRequest,
    };

    #[test]
    fn every_term_is_held_to() {
        let mut network = FakeNetwork::new(1, FaultRates::NONE);
        let payee = network.add_wallet();
        let other = network.add_wallet();
        let (amount, description_hash) = (Msat(250_000), Digest([3; 32]));
        let request = InvoiceRequest { amount, description_hash, expiry_secs: 120 };
        let made = network.create_invoice(UnixMs(1_000_000), payee, request).unwrap();
        let good = Expected { amount, description_hash, payee, network: Network::Regtest };
        let now = UnixMs(1_050_000);
        let check_with = |expected: Expected, now| check(&made.bolt11, &expected, now);

        let checked = check_with(good, now).unwrap();
        assert_eq!((checked.payment_hash(), checked.expires_at()), (made.payment_hash, UnixMs(1_120_000)));
        assert_eq!(Invoice::from(checked), made);
        use InvoiceMismatch as M;
        let wrong = check_with(Expected { amount: Msat(249_999), ..good }, now);
        assert_eq!(wrong, Err(M::Amount { expected: Msat(249_999), got: Some(amount) }));
        let wrong = check_with(Expected { description_hash: Digest([4; 32]), ..good }, now);
        assert_eq!(wrong, Err(M::DescriptionHash { expected: Digest([4; 32]), got: Some(description_hash) }));
        let wrong = check_with(Expected { payee: other, ..good }, now);
        assert_eq!(wrong, Err(M::Payee { expected: other, got: payee }));
        let wrong = check_with(Expected { network: Network::Mainnet, ..good }, now);
        assert_eq!(wrong, Err(M::Network { expected: Network::Mainnet, got: Some(Network::Regtest) }));
        assert!(check_with(good, UnixMs(1_110_000)).is_ok());
        assert!(matches!(check_with(good, UnixMs(1_110_001)), Err(M::Expired { .. })));
    }

    /// The specification's invoice with an unknown feature (bit 100) that a payer must understand.
    #[test]
    fn a_feature_that_nobody_knows_is_refused() {
        let unknown = "lnbc25m1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5vdhkven9v5sxyetpdeessp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygs9q4psqqqqqqqqqqqqqqqqsgqtqyx5vggfcsll4wu246hz02kp85x4katwsk9639we5n5yngc3yhqkm35jnjw4len8vrnqnf5ejh0mzj9n3vz2px97evektfm2l6wqccp3y7372";
        let refused = read(unknown);
        assert!(
            matches!(&refused, Err(InvoiceMismatch::Malformed { reason }) if reason.contains("eature")),
            "{refused:?}"
        );
    }

    /// An amount of zero is no amount, and a missing one is not the agreed one.
    #[test]
    fn an_invoice_over_nothing_is_not_the_agreed_one() {
        let donation = "lnbc1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdpl2pkx2ctnv5sxxmmwwd5kgetjypeh2ursdae8g6twvus8g6rfwvs8qun0dfjkxaq9qrsgq357wnc5r2ueh7ck6q93dj32dlqnls087fxdwk8qakdyafkq3yap9us6v52vjjsrvywa6rt52cm9r9zqt8r2t7mlcwspyetp5h2tztugp9lfyql";
        let payee = read(donation).unwrap().payee;
        let expected =
            Expected { amount: Msat(250_000), description_hash: Digest([3; 32]), payee, network: Network::Mainnet };
        let refused = check(donation, &expected, UnixMs(0));
        assert_eq!(refused.map(drop), Err(InvoiceMismatch::Amount { expected: Msat(250_000), got: None }));
    }

    /// The specification's own examples: a description hash on mainnet, no amount, and broken texts.
    #[test]
    fn the_specifications_examples() {
        let hashed = "lnbc20m1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqhp58yjmdan79s6qqdhdzgynm4zwqd5d7xmw5fk98klysy043l2ahrqs9qrsgq7ea976txfraylvgzuxs8kgcw23ezlrszfnh8r6qtfpr6cxga50aj6txm9rxrydzd06dfeawfk6swupvz4erwnyutnjq7x39ymw6j38gp7ynn44";
        let facts = read(hashed).unwrap();
        assert_eq!(facts.amount, Some(Msat(2_000_000_000)));
        assert_eq!(facts.network, Some(Network::Mainnet));
        assert_eq!(facts.payment_hash.to_string(), "0001020304050607080900010203040506070809000102030405060708090102");
        let donation = "lnbc1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdpl2pkx2ctnv5sxxmmwwd5kgetjypeh2ursdae8g6twvus8g6rfwvs8qun0dfjkxaq9qrsgq357wnc5r2ueh7ck6q93dj32dlqnls087fxdwk8qakdyafkq3yap9us6v52vjjsrvywa6rt52cm9r9zqt8r2t7mlcwspyetp5h2tztugp9lfyql";
        assert_eq!(read(donation).unwrap().amount, None);
        assert_eq!(read(donation).unwrap().description_hash, None);
        for broken in ["", "lnbc", &hashed[..hashed.len() - 1], &hashed.replace("20m", "21m"), "lnbc1é"] {
            assert!(matches!(read(broken), Err(InvoiceMismatch::Malformed { .. })), "{broken}");
        }
        assert_eq!(read(&"l".repeat(3_000)), Err(InvoiceMismatch::TooLong { len: 3_000 }));
    }
}
