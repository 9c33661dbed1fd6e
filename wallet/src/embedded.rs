//! What only a wallet that is a Lightning node of our own can do: coins on chain, just-in-time channels, peers.
//!
//! A wallet over Nostr Wallet Connect is a [`Lightning`] and no more; the embedded node is an [`Embedded`] too.

use crate::{
    port::{Channel, Invoice, InvoiceError, Lightning, PayError, WalletError},
    restore::{LostState, Watermarks},
};
use async_trait::async_trait;
use core::net::SocketAddr;
use satgrid_types::{Digest, LightningKey, Msat, PaymentHash, Preimage};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What stays on chain for each anchor channel, so that its force-close can be paid for.
pub const ANCHOR_RESERVE_SAT: u64 = 25_000;
/// Longest description that goes in an invoice, in bytes (BOLT 11 has room for 639).
pub const MAX_DESCRIPTION_BYTES: usize = 256;
/// A fee rate above this is a mistake: 1,000 sat per virtual byte.
pub const MAX_SAT_PER_VB: u32 = 1_000;

/// The embedded node.
#[async_trait]
pub trait Embedded: Lightning {
    async fn facts(&self) -> Result<NodeFacts, WalletError>;
    /// Connects to every peer with whom there is a channel and no connection. Returns how many were found.
    async fn reconnect(&self) -> Result<u64, WalletError>;
    /// An invoice for a person to pay, over a just-in-time channel where no channel has room for it.
    async fn receive(&self, ask: Receive) -> Result<Received, InvoiceError>;
    /// Sends coins on chain; gives the transaction's id. The anchor reserve is never touched.
    async fn send_onchain(&self, send: OnchainSend) -> Result<String, SendError>;
    /// What [`Embedded::send_onchain`] would cost: the transaction is built and signed, and not sent.
    async fn draft_onchain(&self, send: OnchainSend) -> Result<OnchainDraft, SendError>;
    /// The preimage of an invoice of this wallet's own: whoever has it needs no payment to prove one. Never to be shown to
    /// anyone for whom nothing was paid.
    async fn preimage(&self, hash: PaymentHash) -> Result<Option<Preimage>, WalletError>;
    /// What was paid in fees so far, by the wallet's own list.
    async fn fees_paid(&self) -> Result<FeesPaid, WalletError>;
    /// What is needed, beside the seed, to reach every channel's peer again.
    async fn channel_backup(&self) -> Result<ChannelBackup, WalletError>;
    /// Pays a BOLT 12 offer; gives the payment's id, which is not its hash. The outcome comes as an event.
    async fn pay_offer(&self, offer: &str, amount: Msat, max_fee: Msat) -> Result<String, PayError>;
    /// Every transaction of the wallet's coins.
    async fn onchain_rows(&self) -> Result<Vec<OnchainRow>, WalletError>;
    /// Connects to a peer wherever it is named, `host:port`, with whom there may be no channel that we know of.
    async fn ask_peer(&self, node: LightningKey, address: &str) -> Result<(), WalletError>;
    /// How far a lost channel has come; what its closing left for us is swept to the wallet on the way.
    async fn recover(&self, lost: &BackedUp) -> Result<LostState, WalletError>;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    pub listen: Option<SocketAddr>,
    /// The height that the Lightning wallet has seen.
    pub height: u32,
    /// Kept on chain for the anchor channels that are open.
    pub anchor_reserve_sat: u64,
    /// The liquidity provider that opens just-in-time channels, if one is configured.
    pub lsp: Option<LightningKey>,
}

/// An invoice that a person asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receive {
    pub amount: Msat,
    pub description: String,
    pub expiry_secs: u32,
    /// The most that a liquidity provider may keep for opening a channel; `None` is the configured limit.
    pub max_lsp_fee: Option<Msat>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    pub invoice: Invoice,
    /// `Some`: paying it opens a channel, for which this much is kept from the amount.
    pub lsp_fee: Option<Msat>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnchainSend {
    pub address: String,
    /// `None` sends everything above the anchor reserve.
    pub amount_sat: Option<u64>,
    /// `None` leaves it to the chain source's estimate.
    pub sat_per_vb: Option<u32>,
}

/// A transaction that was made to see what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnchainDraft {
    /// What arrives.
    pub amount_sat: u64,
    pub fee_sat: u64,
    /// Signed.
    pub vsize: u64,
    pub sat_per_vb: u64,
    pub inputs: u64,
    /// The real one is the same; else it may take other coins, and cost a little more or less.
    pub exact: bool,
}

/// Why nothing was sent on chain.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum SendError {
    #[error("{address:?} is not an address of this network: {reason}")]
    BadAddress { address: String, reason: String },
    #[error("{amount_sat} sat is dust; send at least {least_sat}")]
    Dust { amount_sat: u64, least_sat: u64 },
    #[error("a fee rate of {given} sat/vB is not between 1 and {MAX_SAT_PER_VB}")]
    FeeRate { given: u32 },
    #[error(
        "not enough: {spendable_sat} sat can be sent, fee included; {reserve_sat} sat stay as the anchor reserve, with \
         which a force-close is paid"
    )]
    Funds { spendable_sat: u64, reserve_sat: u64 },
    #[error(transparent)]
    Wallet(#[from] WalletError),
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeesPaid {
    pub routing: Msat,
    /// Kept by liquidity providers from what they forwarded.
    pub lsp: Msat,
    pub onchain: Msat,
}

/// A transaction of the wallet's coins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnchainRow {
    /// As it is hashed.
    pub txid: Digest,
    pub inbound: bool,
    /// Into or out of the coins, the fee left out.
    pub amount: Msat,
    /// What we paid; zero inbound.
    pub fee: Msat,
    pub confirmed: bool,
}

/// Everything beside the seed with which a lost node's channels are closed by their peers. It holds no secret and no
/// channel state, so an old one can do no harm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelBackup {
    pub node: LightningKey,
    pub peers: Vec<(LightningKey, String)>,
    pub channels: Vec<BackedUp>,
    /// The number of each channel's latest state: whoever starts an older one is stopped ([`crate::restore`]).
    #[serde(default)]
    pub updates: Watermarks,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackedUp {
    pub channel: String,
    pub counterparty: LightningKey,
    /// `txid:vout`; absent until the channel is funded.
    pub funding: Option<String>,
    pub capacity_sat: u64,
    pub ours: Msat,
}

/// What an operator should hear before work is promised. Pure, so that every front says the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shortage {
    /// A payee to whom nothing can be paid.
    NoInbound { receivable: Msat, wanted: Msat, lsp: bool },
    /// A payer that can pay nothing.
    NoOutbound { payable: Msat, wanted: Msat, onchain_sat: u64 },
    /// A force-close of our anchor channels could not be paid for.
    NoReserve { has_sat: u64, wants_sat: u64 },
}

impl Shortage {
    /// What stands in the way of selling (`sells`: the smallest slice) and of buying (`buys`: the first slice).
    pub fn all(
        balance: &crate::port::Balance,
        channels: &[Channel],
        lsp: bool,
        sells: Option<Msat>,
        buys: Option<Msat>,
    ) -> Vec<Shortage> {
        let mut found = Vec::new();
        if let Some(wanted) = sells
            && balance.receivable < wanted
        {
            found.push(Shortage::NoInbound { receivable: balance.receivable, wanted, lsp });
        }
        if let Some(wanted) = buys
            && balance.payable < wanted
        {
            let onchain_sat = balance.onchain_confirmed_sat;
            found.push(Shortage::NoOutbound { payable: balance.payable, wanted, onchain_sat });
        }
        let open = u64::try_from(channels.len()).unwrap_or(u64::MAX);
        let wants_sat = open.saturating_mul(ANCHOR_RESERVE_SAT);
        if balance.onchain_total_sat < wants_sat {
            found.push(Shortage::NoReserve { has_sat: balance.onchain_total_sat, wants_sat });
        }
        found
    }

    /// A stable word for programs.
    pub const fn reason(&self) -> &'static str {
        match self {
            Shortage::NoInbound { .. } => "no_inbound",
            Shortage::NoOutbound { .. } => "no_outbound",
            Shortage::NoReserve { .. } => "no_reserve",
        }
    }

    /// Nobody can be served while it lasts. A missing reserve is a risk, not a stop.
    pub const fn blocks(&self) -> bool {
        match self {
            Shortage::NoInbound { lsp, .. } => !*lsp,
            Shortage::NoOutbound { .. } => true,
            Shortage::NoReserve { .. } => false,
        }
    }

    pub const fn remedy(&self) -> &'static str {
        match self {
            Shortage::NoInbound { lsp: true, .. } => {
                "the first payment that is large enough opens a channel; `satgrid wallet receive 20000` shows its fee"
            }
            Shortage::NoInbound { lsp: false, .. } => {
                "let a consumer or another node open a channel to you (`satgrid status` shows your Lightning address), \
                 or set wallet.lsp for just-in-time channels"
            }
            Shortage::NoOutbound { onchain_sat: 0, .. } => {
                "`satgrid wallet receive AMOUNT` tops up over Lightning; `satgrid wallet address` takes coins"
            }
            Shortage::NoOutbound { .. } => {
                "`satgrid wallet open PROVIDER AMOUNT` opens a channel with the coins you have"
            }
            Shortage::NoReserve { .. } => {
                "send that much to `satgrid wallet address`; without it a force-close may not confirm in time"
            }
        }
    }
}

impl core::fmt::Display for Shortage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Shortage::NoInbound { receivable, wanted, .. } => {
                write!(f, "nobody can pay you: {receivable} can be received, the smallest slice is {wanted}")
            }
            Shortage::NoOutbound { payable, wanted, .. } => {
                write!(f, "nothing can be bought: {payable} can be paid, the first slice is {wanted}")
            }
            Shortage::NoReserve { has_sat, wants_sat } => {
                write!(f, "{has_sat} sat on chain; the open channels want {wants_sat} sat as an anchor reserve")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::Balance;

    #[test]
    fn shortages_are_named_before_work_starts() {
        let check = |balance: Balance, lsp: bool, sells: Option<u64>, buys: Option<u64>, expect: &[(&str, bool)]| {
            let found = Shortage::all(&balance, &[], lsp, sells.map(Msat), buys.map(Msat));
            let found: Vec<_> = found.iter().map(|s| (s.reason(), s.blocks())).collect();
            assert_eq!(found, expect, "{balance:?}");
        };
        let empty = Balance::default();
        check(empty, false, None, None, &[]);
        check(empty, false, Some(10_000), None, &[("no_inbound", true)]);
        check(empty, true, Some(10_000), None, &[("no_inbound", false)]);
        check(empty, false, Some(10_000), Some(10_000), &[("no_inbound", true), ("no_outbound", true)]);
        let fits = Balance { receivable: Msat(10_000), payable: Msat(10_000), ..empty };
        check(fits, false, Some(10_000), Some(10_000), &[]);
        check(fits, false, Some(10_001), Some(10_001), &[("no_inbound", true), ("no_outbound", true)]);
    }
}
