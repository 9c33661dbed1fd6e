//! Providers that lie: what leaves an honest role is bent on its way out and signed again with the provider's own key.

use ed25519_dalek::SigningKey;
use satgrid_protocol::frame::ProviderFrame;
use satgrid_types::{Digest, Msat, Numerators, Signed};

/// What a provider lies about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cheat {
    None,
    /// Acknowledgements claim one output token more than was sent, and its price.
    OvercountAck,
    /// Receipts do.
    OvercountReceipt,
    /// The counts are right, the cost is not.
    Overcharge,
    /// Acknowledgements sign another output than was sent.
    OutputHash,
    /// Invoices over ten times the slice.
    InvoiceAmount,
    /// Invoices for other terms.
    InvoiceTerms,
    /// Invoices that pay somebody else.
    InvoicePayee,
    /// The first invoice again and again.
    InvoiceReuse,
    /// Takes the first slice and never says so.
    NeverCredits,
    /// Says nothing more on a request's stream after this many output tokens.
    SilentAfter(u32),
    /// Instead of output a row of a text that nobody asked for, longer than an entry of the journal.
    LongRow,
    /// Promises nothing about its log.
    NoPromises,
    /// Answers no question about its log.
    NoProofs,
}

impl Cheat {
    /// Those about money: what the simulation draws from.
    pub const ALL: [Cheat; 10] = [
        Cheat::OvercountAck,
        Cheat::OvercountReceipt,
        Cheat::Overcharge,
        Cheat::OutputHash,
        Cheat::InvoiceAmount,
        Cheat::InvoiceTerms,
        Cheat::InvoicePayee,
        Cheat::InvoiceReuse,
        Cheat::NeverCredits,
        Cheat::SilentAfter(40),
    ];
}

/// Bends a frame, if this cheat does; `None` swallows it.
pub(super) fn bend(cheat: Cheat, key: &SigningKey, frame: ProviderFrame) -> Option<ProviderFrame> {
    match (cheat, frame) {
        (Cheat::OvercountAck, ProviderFrame::Ack(signed)) => {
            let mut ack = signed.peek().unwrap();
            ack.usage.completion += 1;
            ack.numerators = Numerators(ack.numerators.0 + 20_000_001);
            ack.cost = satgrid_pricing::charge(ack.numerators);
            Some(ProviderFrame::Ack(Signed::sign(&ack, key)))
        }
        (Cheat::OutputHash, ProviderFrame::Ack(signed)) => {
            let mut ack = signed.peek().unwrap();
            ack.running_hash = Digest([7; 32]);
            Some(ProviderFrame::Ack(Signed::sign(&ack, key)))
        }
        (Cheat::OvercountReceipt, ProviderFrame::Receipt(reason, signed)) => {
            let mut receipt = signed.peek().unwrap();
            receipt.usage.completion += 1;
            receipt.numerators = Numerators(receipt.numerators.0 + 20_000_001);
            receipt.cost = Msat(receipt.cost.0 + 20);
            receipt.cumulative_cost = Msat(receipt.cumulative_cost.0 + 20);
            Some(ProviderFrame::Receipt(reason, Signed::sign(&receipt, key)))
        }
        (Cheat::Overcharge, ProviderFrame::Receipt(reason, signed)) => {
            let mut receipt = signed.peek().unwrap();
            receipt.cost = Msat(receipt.cost.0 + 1);
            receipt.cumulative_cost = Msat(receipt.cumulative_cost.0 + 1);
            Some(ProviderFrame::Receipt(reason, Signed::sign(&receipt, key)))
        }
        (Cheat::LongRow, ProviderFrame::Chunk(..)) => Some(ProviderFrame::Embedded(0, vec![0; 300_000].into())),
        (Cheat::SilentAfter(tokens), ProviderFrame::Chunk(first, _)) if first >= tokens => None,
        (Cheat::SilentAfter(_), ProviderFrame::Receipt(..)) => None,
        (_, frame) => Some(frame),
    }
}
