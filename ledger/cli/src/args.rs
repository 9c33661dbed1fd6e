//! The command line.

use crate::time::parse_time;
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use satgrid_types::{NodeKey, ReceiptId, SessionId, UnixMs};
use std::path::PathBuf;

/// Exports, verifies and shows satgrid ledgers, offline.
#[derive(Debug, Parser)]
#[command(name = "satgrid-ledger", version, propagate_version = true)]
pub struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a journal, or a part of it, to a file that anyone can verify
    Export(ExportArgs),
    /// Check one file, or both parties' files against each other
    Verify(VerifyArgs),
    /// List entries
    Show(ShowArgs),
    /// List accounts and what stands in them
    Balance(BalanceArgs),
    /// Sum up what was sold and bought, by peer, model or day
    Statement(StatementArgs),
    /// Prove that a receipt or an entry is in the log, or that the log only grew
    Prove(ProveArgs),
    /// Say whether a proof of `prove --format json` holds
    Check(CheckArgs),
    /// Print the newest signed checkpoint, to be kept by others
    Checkpoint(CheckpointArgs),
    /// Write what proves how much is owed on a session; without a session, list those that hold money
    Claim(ClaimArgs),
    /// Hold the ledger against the wallet's own list of payments
    Reconcile(ReconcileArgs),
    /// Copy a journal as it is now, also beside a running node
    Snapshot(SnapshotArgs),
    /// Let go of the bodies of old sessions that are over; leaves and transfers stay
    Prune(PruneArgs),
    /// List what others were caught at, and write what proves it to a file
    Misbehaviour(MisbehaviourArgs),
    /// Turn two checkpoints that exclude each other into a file that `verify` accepts as proof
    Fraud(FraudArgs),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ExportArgs {
    /// The node's journal: a SQLite file, or postgres://... or env:NAME that holds such an address; the node may be running.
    /// For the books, also an exported file
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// Where to write; `-` is stdout
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Only this session
    #[arg(long, group = "filter")]
    pub(crate) session: Option<SessionId>,
    /// Only sessions with this provider or session key
    #[arg(long, value_name = "KEY", group = "filter")]
    pub(crate) peer: Option<NodeKey>,
    /// Only sessions with entries from this time on (UTC; `2026-01-31`, `2026-01-31T12:00:00Z` or Unix seconds)
    #[arg(long, value_name = "TIME", value_parser = parse_time, conflicts_with = "filter")]
    pub(crate) from: Option<UnixMs>,
    /// ... and before this time
    #[arg(long, value_name = "TIME", value_parser = parse_time, conflicts_with = "filter")]
    pub(crate) to: Option<UnixMs>,
    /// Write the books as CSV instead of a file to verify
    #[arg(long, group = "form")]
    pub(crate) csv: bool,
    /// ... or as a beancount ledger
    #[arg(long, group = "form")]
    pub(crate) beancount: bool,
    /// ... or in Koinly's universal form: what went through the wallet
    #[arg(long, group = "form")]
    pub(crate) koinly: bool,
    /// Exchange rates for `--csv` and `--koinly`: lines of time,currency,rate for one bitcoin
    #[arg(long, value_name = "FILE", requires = "form")]
    pub(crate) rates: Option<PathBuf>,
    /// Leave out prompt and output hashes and sampling parameters
    #[arg(long)]
    pub(crate) redact: bool,
    /// Sign a checkpoint over the whole journal with this key (a file with 64 hex digits) instead of using the newest
    /// one in the journal
    #[arg(long, value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct VerifyArgs {
    /// An exported file, a claim, or a fraud proof
    pub(crate) file: PathBuf,
    /// The other party's export of the same sessions, or its answer to the claim
    pub(crate) other: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// List every session
    #[arg(long)]
    pub(crate) sessions: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ShowArgs {
    /// A journal or an exported file
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// Only this session
    #[arg(long)]
    pub(crate) session: Option<SessionId>,
    /// First entry
    #[arg(long, default_value_t = 0)]
    pub(crate) from: u64,
    /// At most so many entries
    #[arg(long, default_value_t = 1_000)]
    pub(crate) limit: u64,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct BalanceArgs {
    /// A journal or an exported file
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// One line for each session's accounts instead of their sums
    #[arg(long)]
    pub(crate) sessions: bool,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum By {
    Peer,
    Model,
    Day,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct StatementArgs {
    /// A journal or an exported file
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    #[arg(long, value_enum, default_value = "peer")]
    pub(crate) by: By,
    /// From this time on (UTC)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) from: Option<UnixMs>,
    /// Before this time
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) to: Option<UnixMs>,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub(crate) struct ProveArgs {
    /// The node's journal
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// That this receipt is in the log
    #[arg(long, value_name = "ID", group = "what")]
    pub(crate) receipt: Option<ReceiptId>,
    /// That the entry of this number is
    #[arg(long, value_name = "N", group = "what")]
    pub(crate) entry: Option<u64>,
    /// That the log extends the log of its first N entries
    #[arg(long, value_name = "N", group = "what")]
    pub(crate) extends: Option<u64>,
    /// In the log of so many entries; that of the newest checkpoint if not given
    #[arg(long, value_name = "N")]
    pub(crate) size: Option<u64>,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// Another program's form of the books.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BooksForm {
    Csv,
    Beancount,
    Koinly,
}

impl ExportArgs {
    pub(crate) fn books_form(&self) -> Option<BooksForm> {
        let forms =
            [(self.csv, BooksForm::Csv), (self.beancount, BooksForm::Beancount), (self.koinly, BooksForm::Koinly)];
        forms.into_iter().find_map(|(chosen, form)| chosen.then_some(form))
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CheckArgs {
    /// What `prove --format json` printed
    pub(crate) proof: PathBuf,
    /// A checkpoint that the log's owner did not choose: one kept from before, or heard from others
    #[arg(long, value_name = "FILE")]
    pub(crate) checkpoint: Vec<PathBuf>,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CheckpointArgs {
    /// The node's journal
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// The newest that covers at most so many entries
    #[arg(long, value_name = "N", conflicts_with = "of")]
    pub(crate) size: Option<u64>,
    /// Of this other node, as this one heard it
    #[arg(long, value_name = "NODE")]
    pub(crate) of: Option<NodeKey>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ClaimArgs {
    /// A journal or an exported file
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// The session; without it, sessions that hold money are listed
    #[arg(long)]
    pub(crate) session: Option<SessionId>,
    /// Where to write the claim
    #[arg(long, value_name = "FILE", requires = "session")]
    pub(crate) out: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ReconcileArgs {
    /// A journal or an exported file
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// What `satgrid wallet history --format json` printed; `-` is stdin
    #[arg(long, value_name = "FILE")]
    pub(crate) payments: PathBuf,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct SnapshotArgs {
    /// The node's journal: a SQLite file, or postgres://... or env:NAME that holds such an address; the node may be running
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// Where to write the copy, a SQLite file in either case
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct PruneArgs {
    /// The journal of a node that is stopped: a SQLite file, or postgres://... or env:NAME that holds such an address
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// Only sessions that are over and silent for so many days
    #[arg(long, value_name = "DAYS")]
    pub(crate) older_than_days: u64,
    /// Do it; without this, what could go is counted
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct MisbehaviourArgs {
    /// A journal or an exported file
    #[arg(long, value_name = "FILE")]
    pub(crate) db: PathBuf,
    /// Only by this provider
    #[arg(long, value_name = "KEY")]
    pub(crate) peer: Option<NodeKey>,
    /// What the entry of this number holds
    #[arg(long, value_name = "N")]
    pub(crate) entry: Option<u64>,
    /// Where to write it: for two histories a fraud proof that `verify` accepts, else the statement as it was received
    #[arg(long, value_name = "FILE", requires = "entry")]
    pub(crate) out: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct FraudArgs {
    /// A checkpoint (a signed note)
    pub(crate) one: PathBuf,
    /// Another one, of the same size
    pub(crate) other: PathBuf,
    /// Where to write the proof
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}
