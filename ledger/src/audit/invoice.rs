//! Reading a BOLT 11 invoice offline: its signature is checked, its terms are reported.

use lightning_invoice::{Currency, SignedRawBolt11Invoice, TaggedField};
use satgrid_types::{Digest, LightningKey, Msat, PaymentHash};
use secp256k1::{Message, SECP256K1};

/// No invoice text is longer, in bytes.
pub const MAX_BOLT11_LEN: usize = 2_048;

/// What an invoice says; its signature holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvoiceFacts {
    pub payee: LightningKey,
    pub payment_hash: PaymentHash,
    /// Absent where the payer chooses.
    pub amount: Option<Msat>,
    pub description_hash: Option<Digest>,
    /// `mainnet`, `testnet`, `signet`, `regtest` or `simnet`.
    pub network: &'static str,
}

fn parse(bolt11: &str) -> Result<SignedRawBolt11Invoice, String> {
    if bolt11.len() > MAX_BOLT11_LEN {
        return Err(format!("{} characters, the limit is {MAX_BOLT11_LEN}", bolt11.len()));
    }
    bolt11.parse().map_err(|e| format!("{e}"))
}

fn only_hash(invoice: &SignedRawBolt11Invoice) -> Result<PaymentHash, String> {
    let mut hashes = invoice.known_tagged_fields().filter_map(|field| {
        let TaggedField::PaymentHash(hash) = field else { return None };
        Some(PaymentHash(*AsRef::<[u8; 32]>::as_ref(&hash.0)))
    });
    let (Some(hash), None) = (hashes.next(), hashes.next()) else { return Err("not exactly one payment hash".into()) };
    Ok(hash)
}

/// Parses an invoice and recovers (or checks) its payee's signature: one curve operation.
pub fn read_invoice(bolt11: &str) -> Result<InvoiceFacts, String> {
    let invoice = parse(bolt11)?;
    let payment_hash = only_hash(&invoice)?;
    let mut descriptions = Vec::new();
    for field in invoice.known_tagged_fields() {
        if let TaggedField::DescriptionHash(hash) = field {
            descriptions.push(Digest(*AsRef::<[u8; 32]>::as_ref(&hash.0)));
        }
    }
    if descriptions.len() > 1 {
        return Err("more than one description hash".into());
    }
    let amount = match invoice.amount_pico_btc() {
        // A msat is ten pico-bitcoin; BOLT 11 refuses fractions of it.
        Some(pico) if pico % 10 == 0 => Some(Msat(pico / 10)),
        Some(pico) => return Err(format!("{pico} pBTC is not a whole msat")),
        None => None,
    };
    let message = Message::from_digest(*invoice.signable_hash());
    let signature = &invoice.signature().0;
    let payee = match invoice.payee_pub_key() {
        Some(key) => {
            let holds = SECP256K1.verify_ecdsa(&message, &signature.to_standard(), &key.0);
            holds.map_err(|_| "not signed by the payee that it names".to_owned())?;
            key.0
        }
        None => SECP256K1.recover_ecdsa(&message, signature).map_err(|_| "the signature is no signature".to_owned())?,
    };
    let network = match invoice.currency() {
        Currency::Bitcoin => "mainnet",
        Currency::BitcoinTestnet => "testnet",
        Currency::Signet => "signet",
        Currency::Regtest => "regtest",
        Currency::Simnet => "simnet",
    };
    Ok(InvoiceFacts {
        payee: LightningKey(payee.serialize()),
        payment_hash,
        amount,
        description_hash: descriptions.first().copied(),
        network,
    })
}
