//! `reconcile`: the ledger against the wallet's own payments. It finds what one knows and the other does not.

use crate::{
    CLEAN, FINDINGS,
    args::{Format, ReconcileArgs},
    output::{hinted, print, print_json, table},
    source::Source,
};
use anyhow::Context;
use satgrid_ledger::{
    audit::read_invoice,
    entry::{Entry, Evidence},
};
use satgrid_types::{PaymentHash, SessionId};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, io, io::Read, path::Path};

/// A payment as the wallet lists it: `satgrid wallet history --format json` prints an array of these. Times and other
/// fields are not looked at.
#[derive(Debug, Clone, Deserialize)]
struct WalletPayment {
    payment_hash: PaymentHash,
    direction: Direction,
    amount_msat: u64,
    #[serde(default)]
    fee_msat: u64,
    state: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Inbound,
    Outbound,
}

/// How far a payment has come, by either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    InFlight,
    Settled,
    Failed,
}

/// A payment as the ledger knows it.
#[derive(Debug, Clone)]
struct Booked {
    direction: Direction,
    amount: u64,
    fee: Option<u64>,
    state: State,
    session: SessionId,
    entry: u64,
}

/// What one side knows and the other does not. The words are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// The wallet moved money of which the ledger knows nothing.
    OnlyInWallet,
    /// The ledger booked a payment that the wallet has not made or received.
    OnlyInLedger,
    /// One says settled, the other does not.
    StateDiffers,
    AmountDiffers,
    FeeDiffers,
    DirectionDiffers,
}

#[derive(Debug, Serialize)]
struct Difference {
    kind: Kind,
    payment_hash: PaymentHash,
    direction: Direction,
    entry: Option<u64>,
    session: Option<SessionId>,
    ledger: String,
    wallet: String,
}

/// What `--format json` prints. Fields are only ever added.
#[derive(Debug, Serialize)]
struct Reconciled {
    format: &'static str,
    version: u32,
    verdict: &'static str,
    ledger_payments: usize,
    wallet_payments: usize,
    agreed: usize,
    received_msat: u64,
    sent_msat: u64,
    fees_msat: u64,
    differences: Vec<Difference>,
}

pub(crate) async fn run(args: ReconcileArgs) -> anyhow::Result<u8> {
    let wallet = wallet(&args.payments)?;
    let mut source = Source::open(&args.db).await?;
    let mut ledger = Ledger::default();
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            break;
        }
        entries.iter().for_each(|entry| ledger.entry(entry));
    }
    let reconciled = compare(&ledger, &wallet);
    match args.format {
        Format::Json => print_json(&reconciled)?,
        Format::Table => {
            let mut out = table(&["what", "payment hash", "direction", "entry", "ledger", "wallet"], 6);
            for d in &reconciled.differences {
                let kind = serde_json::to_value(d.kind)?;
                out.add_row([
                    kind.as_str().unwrap_or_default().to_owned(),
                    d.payment_hash.to_string(),
                    format!("{:?}", d.direction).to_lowercase(),
                    d.entry.map(|entry| entry.to_string()).unwrap_or_default(),
                    d.ledger.clone(),
                    d.wallet.clone(),
                ]);
            }
            if !reconciled.differences.is_empty() {
                print(&out.to_string())?;
            }
            print(&format!(
                "{} payments agree: {} msat received, {} msat sent, {} msat in fees; {} differ",
                reconciled.agreed,
                reconciled.received_msat,
                reconciled.sent_msat,
                reconciled.fees_msat,
                reconciled.differences.len(),
            ))?;
        }
    }
    Ok(if reconciled.differences.is_empty() { CLEAN } else { FINDINGS })
}

fn wallet(path: &Path) -> anyhow::Result<Vec<WalletPayment>> {
    let mut text = String::new();
    if path == Path::new("-") {
        io::stdin().read_to_string(&mut text).context("stdin")?;
    } else {
        text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    }
    serde_json::from_str(&text).map_err(|error| {
        hinted(
            format!("{}: not a wallet's list of payments: {error}", path.display()),
            "`satgrid wallet history --format json` of the running node prints one",
        )
    })
}

/// The ledger's payments, by hash.
#[derive(Debug, Default)]
struct Ledger {
    invoices: BTreeMap<PaymentHash, (SessionId, u64)>,
    booked: BTreeMap<PaymentHash, Booked>,
}

impl Ledger {
    fn entry(&mut self, entry: &Entry) {
        let seq = entry.seq;
        match &entry.evidence {
            Some(Evidence::Invoice { session, bolt11, descriptor, .. }) => {
                if let Ok(facts) = read_invoice(bolt11) {
                    self.invoices.insert(facts.payment_hash, (*session, descriptor.amount.0));
                }
            }
            Some(Evidence::PaymentAttempted { session, payment_hash, .. }) => {
                let amount = self.invoices.get(payment_hash).map_or(0, |(_, amount)| *amount);
                self.book(*payment_hash, Direction::Outbound, amount, None, State::InFlight, *session, seq);
            }
            Some(Evidence::PaymentSettled { payment_hash, amount, fee, .. }) => {
                let session = self.session(payment_hash);
                self.book(*payment_hash, Direction::Outbound, amount.0, Some(fee.0), State::Settled, session, seq);
            }
            Some(Evidence::PaymentFailed { payment_hash, .. }) => {
                if let Some(booked) = self.booked.get_mut(payment_hash) {
                    booked.state = State::Failed;
                }
            }
            Some(Evidence::PaymentReceived { payment_hash, amount }) => {
                let session = self.session(payment_hash);
                self.book(*payment_hash, Direction::Inbound, amount.0, None, State::Settled, session, seq);
            }
            Some(Evidence::RefundAttempted { session, payment_hash, amount, .. }) => {
                self.book(*payment_hash, Direction::Outbound, amount.0, None, State::InFlight, *session, seq);
            }
            Some(Evidence::RefundSettled { session, payment_hash, amount, fee, .. }) => {
                self.book(*payment_hash, Direction::Outbound, amount.0, Some(fee.0), State::Settled, *session, seq);
            }
            Some(Evidence::RefundReceived { session, payment_hash, amount }) => {
                self.book(*payment_hash, Direction::Inbound, amount.0, None, State::Settled, *session, seq);
            }
            Some(Evidence::WalletPayment { payment_hash, inbound, amount, fee, .. }) => {
                let direction = if *inbound { Direction::Inbound } else { Direction::Outbound };
                let none = SessionId([0; 32]);
                self.book(*payment_hash, direction, amount.0, Some(fee.0), State::Settled, none, seq);
            }
            Some(_) | None => {}
        }
    }

    fn session(&self, hash: &PaymentHash) -> SessionId {
        let invoiced = self.invoices.get(hash).map(|(session, _)| *session);
        invoiced.or_else(|| self.booked.get(hash).map(|booked| booked.session)).unwrap_or(SessionId([0; 32]))
    }

    #[allow(clippy::too_many_arguments)]
    fn book(
        &mut self,
        hash: PaymentHash,
        direction: Direction,
        amount: u64,
        fee: Option<u64>,
        state: State,
        session: SessionId,
        entry: u64,
    ) {
        self.booked.insert(hash, Booked { direction, amount, fee, state, session, entry });
    }
}

fn state_of(payment: &WalletPayment) -> Option<State> {
    match payment.state.as_str() {
        "settled" => Some(State::Settled),
        "failed" => Some(State::Failed),
        "in_flight" => Some(State::InFlight),
        _ => None,
    }
}

fn compare(ledger: &Ledger, wallet: &[WalletPayment]) -> Reconciled {
    let mut differences = Vec::new();
    let (mut agreed, mut received, mut sent, mut fees) = (0, 0u64, 0u64, 0u64);
    let known: BTreeMap<(PaymentHash, bool), &WalletPayment> =
        wallet.iter().map(|p| ((p.payment_hash, p.direction == Direction::Inbound), p)).collect();
    for (hash, booked) in &ledger.booked {
        let inbound = booked.direction == Direction::Inbound;
        let says = format!("{:?}, {} msat", booked.state, booked.amount).to_lowercase();
        let differs = |kind, wallet: String| Difference {
            kind,
            payment_hash: *hash,
            direction: booked.direction,
            entry: Some(booked.entry),
            session: Some(booked.session),
            ledger: says.clone(),
            wallet,
        };
        let Some(payment) = known.get(&(*hash, inbound)) else {
            if known.contains_key(&(*hash, !inbound)) {
                differences.push(differs(Kind::DirectionDiffers, "the other direction".into()));
            } else if booked.state != State::Failed {
                // A payment that was begun before a crash may never have reached the wallet; the node finds out at its start.
                differences.push(differs(Kind::OnlyInLedger, "unknown".into()));
            }
            continue;
        };
        let theirs = state_of(payment);
        let before = differences.len();
        if theirs != Some(booked.state) {
            differences.push(differs(Kind::StateDiffers, payment.state.clone()));
        } else if booked.state == State::Settled {
            if payment.amount_msat != booked.amount {
                differences.push(differs(Kind::AmountDiffers, format!("{} msat", payment.amount_msat)));
            }
            if let Some(fee) = booked.fee.filter(|fee| *fee != payment.fee_msat) {
                differences.push(differs(Kind::FeeDiffers, format!("fee {} msat, booked {fee}", payment.fee_msat)));
            }
        }
        if differences.len() == before {
            agreed += 1;
            if booked.state == State::Settled {
                let sum = if inbound { &mut received } else { &mut sent };
                *sum = sum.saturating_add(booked.amount);
                fees = fees.saturating_add(booked.fee.unwrap_or(0));
            }
        }
    }
    for payment in wallet {
        // Invoices nobody paid, and payments that failed, moved nothing.
        let moves = matches!(state_of(payment), Some(State::Settled))
            || (payment.direction == Direction::Outbound && state_of(payment) == Some(State::InFlight));
        if moves && !ledger.booked.contains_key(&payment.payment_hash) {
            differences.push(Difference {
                kind: Kind::OnlyInWallet,
                payment_hash: payment.payment_hash,
                direction: payment.direction,
                entry: None,
                session: ledger.invoices.get(&payment.payment_hash).map(|(session, _)| *session),
                ledger: "unknown".into(),
                wallet: format!("{}, {} msat", payment.state, payment.amount_msat),
            });
        }
    }
    Reconciled {
        format: "satgrid-reconcile",
        version: 1,
        verdict: if differences.is_empty() { "agree" } else { "differ" },
        ledger_payments: ledger.booked.len(),
        wallet_payments: wallet.len(),
        agreed,
        received_msat: received,
        sent_msat: sent,
        fees_msat: fees,
        differences,
    }
}
