//! What can be said of the wallet.

use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum WalletCommand {
    /// What can be paid and received, and what is lacking
    Balance,
    /// Every channel
    Channels,
    /// An invoice, with its QR code: top up from any Lightning wallet
    Receive(ReceiveArgs),
    /// A fresh on-chain address of this wallet, with its QR code
    Address,
    /// Pay a Lightning invoice
    Pay(PayArgs),
    /// Send coins on chain
    Send(SendArgs),
    /// Open a channel to a provider or to any Lightning node
    Open(OpenArgs),
    /// Close a channel
    Close {
        /// The channel's id, or its beginning
        channel: String,
        /// Without the peer: our share comes back after the channel's delay
        #[arg(long)]
        force: bool,
    },
    /// What was paid in fees, what a channel keeps on chain, what the chain asks now
    Fees,
    /// Every Lightning payment that the wallet knows
    History {
        /// Invoices that nobody paid, too
        #[arg(long)]
        all: bool,
    },
    /// What reaches the channels' peers again when this machine is lost; it is also written at every change
    Backup {
        /// A file; standard output where it is missing
        file: Option<PathBuf>,
    },
    /// Bring back what was in channels whose state is lost, from the words and the channel backup; node stopped
    Restore(RestoreArgs),
    /// Money to where you keep it: shows what would be sent; --now sends it (wallet.sweep_to does so by itself)
    Sweep(SweepArgs),
    /// The cold account: its own addresses, apart from the node's coins
    #[command(subcommand)]
    Cold(ColdCommand),
    /// Other apps that may use this wallet (Nostr Wallet Connect)
    #[command(subcommand)]
    App(AppCommand),
    /// Keep the seed under a passphrase, or under another one than before
    Encrypt {
        /// Where the new passphrase is, as env:NAME, file:PATH or fd:NUMBER [default: it is asked for]
        #[arg(long, value_name = "PLACE")]
        passphrase_from: Option<String>,
    },
    /// Keep the seed as plain words again, which only this user can read
    Decrypt,
    /// End a session and ask for its remainder back
    Refund {
        /// The session's id, as the status or the ledger shows it
        session: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum AppCommand {
    /// Connect an app; prints the address that it wants, once, with its QR code
    Add {
        name: String,
        /// What it may spend; 0: it may receive and look, and not pay
        #[arg(long, default_value_t = 0)]
        budget_sat: u64,
        /// When the budget starts over
        #[arg(long, default_value = "never", value_parser = ["never", "daily", "weekly", "monthly"])]
        renewal: String,
    },
    /// Every app, and what it may still spend
    List,
    /// Take the wallet away from an app, at once
    Revoke { name: String },
}

#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    /// user@host, a BOLT 12 offer, an on-chain address, or `cold` [default: wallet.sweep_to]
    #[arg(long)]
    pub to: Option<String>,
    /// What stays in the wallet, reserves aside [default: wallet.sweep_keep_sat]
    #[arg(long)]
    pub keep_sat: Option<u64>,
    /// Sats per virtual byte, on chain [default: wallet.sweep_fee_rate, else the estimate]
    #[arg(long)]
    pub fee_rate: Option<u32>,
    #[arg(long)]
    pub label: Option<String>,
    /// Send it
    #[arg(long)]
    pub now: bool,
    /// Do not ask
    #[arg(long, requires = "now")]
    pub yes: bool,
    /// Every sweep that was made
    #[arg(long, conflicts_with_all = ["to", "keep_sat", "fee_rate", "label", "now"])]
    pub list: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ColdCommand {
    /// A fresh address
    Address {
        #[arg(long)]
        label: Option<String>,
    },
    /// Every address that was given away
    List,
    /// What the account holds, by Esplora or Electrum
    Balance,
    /// Out of the account; shows what it costs first. Where the keys are elsewhere, prints a PSBT
    Send {
        address: String,
        /// Sats, or `all`
        amount: String,
        #[arg(long)]
        fee_rate: Option<u32>,
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The channel backup [default: the newest of node.dir/channels.json and wallet.backup]
    #[arg(long, value_name = "FILE")]
    pub backup: Option<PathBuf>,
    /// Say what would be found and done; touch nothing
    #[arg(long)]
    pub rehearse: bool,
    /// How far a restore is, asked of the running node
    #[arg(long, conflicts_with_all = ["backup", "rehearse"])]
    pub status: bool,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    pub amount_sat: u64,
    #[arg(long, default_value = "satgrid")]
    pub description: String,
    #[arg(long, default_value_t = 86_400)]
    pub expiry_s: u32,
    /// The most that a liquidity provider may keep for opening a channel
    #[arg(long, value_name = "SAT")]
    pub max_lsp_fee_sat: Option<u64>,
    /// Wait until it is paid
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PayArgs {
    pub invoice: String,
    /// The most that the route may cost [default: 1 %, at least 1 sat]
    #[arg(long)]
    pub max_fee_sat: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct SendArgs {
    pub address: String,
    /// Sats, or `all` above the anchor reserve
    pub amount: String,
    /// Sats per virtual byte [default: the chain source's estimate]
    #[arg(long)]
    pub fee_rate: Option<u32>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct OpenArgs {
    /// A Lightning node id; or a provider's key (or its first letters), or a model: the listing says where
    pub node: String,
    /// [HOST:PORT] CAPACITY_SAT
    #[arg(num_args = 1..=2, value_name = "HOST:PORT CAPACITY_SAT", required = true)]
    pub place_and_capacity: Vec<String>,
    /// Given to the peer at the start
    #[arg(long, default_value_t = 0)]
    pub push_msat: u64,
    /// Return once it is asked for, without waiting for its confirmation
    #[arg(long)]
    pub no_wait: bool,
}
