//! Both sides' ledgers as outsiders see them: exported by `satgrid ledger export`, judged by `satgrid-ledger verify`,
//! and read back from the exported files.

use anyhow::{Context, bail};
use satgrid_ledger::bundle::{Opened, open};
use satgrid_ledger::statements::Receipt;
use satgrid_ledger::{Account, Books, Entry, Evidence};
use satgrid_types::{Msat, NodeKey, PaymentHash, ReceiptId, SessionId};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use tokio::process::Command;

use super::nodes::{Market, Node};
use crate::failure::HintExt;

/// The auditor's program: beside this one, and nothing but the exported files in its hands.
const AUDITOR: &str = "satgrid-ledger";

/// One node's ledger, read back from its export.
#[derive(Debug, Serialize)]
pub(super) struct Ledger {
    pub(super) name: &'static str,
    pub(super) node: NodeKey,
    pub(super) file: PathBuf,
    pub(super) entries: u64,
    /// Acknowledgements that both signed.
    pub(super) acks: u64,
    pub(super) receipts: Vec<ReceiptRow>,
    /// Requests that ended without a receipt.
    pub(super) abandoned: u64,
    pub(super) slices: Vec<Slice>,
    pub(super) refunds: Vec<Refund>,
    pub(super) credit_notes: u64,
    pub(super) balances: Balances,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ReceiptRow {
    pub(super) id: ReceiptId,
    pub(super) session: SessionId,
    pub(super) seq: u32,
    pub(super) provider: NodeKey,
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
    pub(super) cost: Msat,
}

/// A settled slice: paid (consumer) or received (provider).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Slice {
    pub(super) hash: PaymentHash,
    pub(super) amount: Msat,
    /// Routing, on top; zero for who receives.
    pub(super) fee: Msat,
    /// Session and number; the consumer's ledger names them when the payment is attempted.
    pub(super) place: Option<(SessionId, u32)>,
}

/// A remainder that was paid back (provider) or received (consumer).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Refund {
    pub(super) hash: PaymentHash,
    pub(super) amount: Msat,
    pub(super) fee: Msat,
}

/// What stands in the accounts, in msat, as each is normally read.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(super) struct Balances {
    /// Net of all Lightning payments since the journal began.
    pub(super) lightning: i128,
    pub(super) income: i128,
    pub(super) expense: i128,
    /// Of Lightning payments alone.
    pub(super) routing_fees: i128,
    /// What opening channels and moving coins cost.
    pub(super) miner_fees: i128,
    /// What consumers paid in and did not use (provider).
    pub(super) prepaid: i128,
    /// What was paid in and not used (consumer).
    pub(super) prepaid_asset: i128,
    pub(super) refunds_due: i128,
    pub(super) dust: i128,
}

/// One run of the auditor.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    pub(super) files: Vec<String>,
    pub(super) clean: bool,
    pub(super) entries: u64,
    /// What it found, or why it could not read.
    pub(super) findings: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Ledgers {
    pub(super) ledgers: Vec<Ledger>,
    pub(super) verdicts: Vec<Verdict>,
}

impl Ledgers {
    pub(super) fn of(&self, name: &str) -> anyhow::Result<&Ledger> {
        self.ledgers.iter().find(|ledger| ledger.name == name).with_context(|| format!("no ledger of {name}"))
    }
}

/// Exports every node's ledger, verifies each alone and the consumer's against each provider's that it dealt with.
pub(super) async fn export_and_verify(market: &Market) -> anyhow::Result<Ledgers> {
    let mut ledgers = Vec::new();
    for node in market.nodes() {
        let file = market.dir.join(format!("{}.bundle", node.name));
        export(node, &file).await?;
        let node_key = node.identity()?.node_key;
        ledgers.push(read(node.name, node_key, &file).with_context(|| format!("{} is no export", file.display()))?);
    }
    let auditor = auditor()?;
    let mut verdicts = Vec::new();
    for ledger in &ledgers {
        verdicts.push(verify(&auditor, &[ledger]).await?);
    }
    let (consumer, providers) = ledgers.split_first().context("no ledger was exported")?;
    for provider in providers.iter().filter(|provider| !provider.slices.is_empty()) {
        verdicts.push(verify(&auditor, &[consumer, provider]).await?);
    }
    let programs = verdicts.len();
    market.clock.say(format!("{} ledgers exported, {programs} runs of `{AUDITOR} verify`", ledgers.len()));
    Ok(Ledgers { ledgers, verdicts })
}

async fn export(node: &Node, file: &Path) -> anyhow::Result<()> {
    let exe = std::env::current_exe().context("this program does not find itself")?;
    let mut command = Command::new(exe);
    command.args(["ledger", "export", "--db"]).arg(node.journal()).arg("--out").arg(file);
    let output = command.arg("--key").arg(node.dir.join("identity.key")).kill_on_drop(true).output().await?;
    if !output.status.success() {
        bail!("the ledger of {} is not exported: {}", node.name, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn auditor() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("this program does not find itself")?;
    let path = exe.with_file_name(AUDITOR);
    if !path.exists() {
        return Err(anyhow::anyhow!("{} is not there", path.display())).hint("cargo build -p satgrid-ledger-cli");
    }
    Ok(path)
}

async fn verify(auditor: &Path, ledgers: &[&Ledger]) -> anyhow::Result<Verdict> {
    let mut command = Command::new(auditor);
    command.arg("verify").args(ledgers.iter().map(|ledger| &ledger.file)).args(["--format", "json"]);
    let output = command.kill_on_drop(true).output().await.with_context(|| format!("cannot run {AUDITOR}"))?;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let files = report["files"].as_array().map(Vec::as_slice).unwrap_or_default();
    let alone = files.iter().flat_map(|file| file["findings"].as_array().into_iter().flatten());
    let mut findings: Vec<String> =
        alone.chain(report["cross"].as_array().into_iter().flatten()).map(Value::to_string).collect();
    if report.is_null() {
        findings.push(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(Verdict {
        files: ledgers.iter().map(|ledger| ledger.name.to_owned()).collect(),
        clean: output.status.success() && report["verdict"] == "clean" && findings.is_empty(),
        entries: files.iter().filter_map(|file| file["journal"]["entries"].as_u64()).sum(),
        findings,
    })
}

/// Folds an export: what it says was paid, received, earned and spent.
fn read(name: &'static str, node: NodeKey, file: &Path) -> anyhow::Result<Ledger> {
    let Opened::Journal(mut bundle) = open(BufReader::new(File::open(file)?))? else { bail!("it is a fraud proof") };
    let mut books = Books::new();
    let mut ledger = Ledger {
        name,
        node,
        file: file.to_owned(),
        entries: 0,
        acks: 0,
        receipts: Vec::new(),
        abandoned: 0,
        slices: Vec::new(),
        refunds: Vec::new(),
        credit_notes: 0,
        balances: Balances::default(),
    };
    let mut attempted = BTreeMap::new();
    while let Some(item) = bundle.next_entry()? {
        let entry = Entry::decode(&item.entry)?;
        books.apply(entry.at, &entry.draft()).with_context(|| format!("entry {}", entry.seq))?;
        ledger.entries += 1;
        if let Some(evidence) = &entry.evidence {
            note(&mut ledger, &mut attempted, evidence)?;
        }
    }
    for (account, _) in books.accounts() {
        let balance = books.balance(account);
        let balances = &mut ledger.balances;
        match account {
            Account::Lightning => balances.lightning += balance,
            Account::Income => balances.income += balance,
            Account::Expense => balances.expense += balance,
            Account::RoutingFees => balances.routing_fees += balance,
            Account::MinersFees => balances.miner_fees += balance,
            Account::Prepaid(_) => balances.prepaid += balance,
            Account::PrepaidAsset(_) => balances.prepaid_asset += balance,
            Account::RefundsDue(_) => balances.refunds_due += balance,
            Account::Dust => balances.dust += balance,
            Account::WorkerPayable(_) | Account::External | Account::Clients => {}
        }
    }
    Ok(ledger)
}

type Attempted = BTreeMap<PaymentHash, (SessionId, u32)>;

fn note(ledger: &mut Ledger, attempted: &mut Attempted, evidence: &Evidence) -> anyhow::Result<()> {
    match evidence {
        Evidence::PaymentAttempted { session, k, payment_hash, .. } => {
            attempted.insert(*payment_hash, (*session, *k));
        }
        Evidence::PaymentSettled { payment_hash, amount, fee, .. } => {
            let place = attempted.get(payment_hash).copied();
            ledger.slices.push(Slice { hash: *payment_hash, amount: *amount, fee: *fee, place });
        }
        Evidence::PaymentReceived { payment_hash, amount } => {
            ledger.slices.push(Slice { hash: *payment_hash, amount: *amount, fee: Msat::ZERO, place: None });
        }
        Evidence::RefundSettled { payment_hash, amount, fee, .. } => {
            ledger.refunds.push(Refund { hash: *payment_hash, amount: *amount, fee: *fee });
        }
        Evidence::RefundReceived { payment_hash, amount, .. } => {
            ledger.refunds.push(Refund { hash: *payment_hash, amount: *amount, fee: Msat::ZERO });
        }
        Evidence::Receipt { receipt, .. } => {
            let id = ReceiptId(receipt.id());
            let Receipt { session, seq, provider, usage, cost, .. } = receipt.peek()?;
            let (prompt_tokens, completion_tokens) = (usage.prompt, usage.completion);
            ledger.receipts.push(ReceiptRow { id, session, seq, provider, prompt_tokens, completion_tokens, cost });
        }
        Evidence::Abandoned { .. } => ledger.abandoned += 1,
        Evidence::Ack(_) => ledger.acks += 1,
        Evidence::CreditNote(_) => ledger.credit_notes += 1,
        Evidence::Genesis { .. }
        | Evidence::Listing { .. }
        | Evidence::Quote(_)
        | Evidence::Open(_)
        | Evidence::Invoice { .. }
        | Evidence::PaymentFailed { .. }
        | Evidence::Request(_)
        | Evidence::Close(_)
        | Evidence::RefundAttempted { .. }
        | Evidence::ChannelClosed { .. }
        | Evidence::WalletPayment { .. }
        | Evidence::Misbehaviour { .. }
        | Evidence::OnChain { .. }
        | Evidence::WalletSnapshot { .. }
        | Evidence::Checkpoint { .. }
        | Evidence::CreditTransfer(_)
        | Evidence::Succession(_)
        | Evidence::Promise(_) => {}
    }
    Ok(())
}
