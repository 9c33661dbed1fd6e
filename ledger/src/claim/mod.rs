//! Claims: what a provider owes on one session, as a file that proves it by itself.
//!
//! A claim carries statements, not a journal: the quotes, the opening, every paid slice's invoice with its preimage, the
//! receipts, the last acknowledgement of each request that ended without one, the close. Nothing in it is a sum; a
//! reader computes what is owed. The provider answers with a file of the same form from its own journal: a later
//! acknowledgement or receipt, a refund with its preimage. Neither file shows anything of prompts or answers, and neither
//! proves that nothing was left out: that is what the other side's file is for.
//!
//! | part | for |
//! |---|---|
//! | `collect` | a journal's entries to the pieces of a claim |
//! | `judge` | the pieces to a verdict, with findings |

mod collect;
mod judge;

pub use collect::{ClaimCollector, Stake, Stakes};
pub use judge::{ClaimAudit, ClaimFigures, ClaimMismatch, ClaimReport, MAX_CLAIM_PIECES, audit_claim, cross_claims};

use minicbor::{Decode, Encode};

/// Whose journal a claim was made from: it decides whose word counts against whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Maker {
    #[n(0)]
    Consumer,
    #[n(1)]
    Provider,
}

impl Maker {
    pub const fn name(&self) -> &'static str {
        match self {
            Maker::Consumer => "consumer",
            Maker::Provider => "provider",
        }
    }
}

/// The first item of a claim. It names no node: a consumer is known by its session key alone.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ClaimHeader {
    /// Always [`ClaimHeader::FORMAT`].
    #[n(0)]
    pub format: String,
    #[n(1)]
    pub version: u32,
    #[n(2)]
    pub maker: Maker,
    /// As in the genesis: `mainnet`, `testnet`, `signet`, `regtest`.
    #[n(3)]
    pub network: String,
}

impl ClaimHeader {
    pub const FORMAT: &'static str = "satgrid-claim";
    pub const VERSION: u32 = 1;
    pub fn new(maker: Maker, network: impl Into<String>) -> ClaimHeader {
        ClaimHeader {
            format: ClaimHeader::FORMAT.into(),
            version: ClaimHeader::VERSION,
            maker,
            network: network.into(),
        }
    }
}

#[cfg(test)]
mod tests;
