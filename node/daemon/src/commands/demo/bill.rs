//! What was paid, held against every other account of it: the API's usage, the wallets' own lists and balances, and the
//! exported ledgers of all sides. Every comparison is to the msat.

use anyhow::Context;
use satgrid_types::{LightningKey, Msat, NodeKey};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::chat::Chat;
use super::client::{Direction, Payment, PaymentState, Status, Wallet};
use super::ledgers::{Ledger, Ledgers, ReceiptRow, Slice, Verdict};
use super::nodes::{self, Market};

/// Balances follow a payment by a round trip, a refund by some more.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// What all wallets hold at one moment, by node.
#[derive(Debug)]
pub(super) struct Wallets(BTreeMap<&'static str, Wallet>);

impl Wallets {
    pub(super) async fn read(market: &Market) -> anyhow::Result<Wallets> {
        let mut wallets = BTreeMap::new();
        for node in market.nodes() {
            wallets.insert(node.name, node.admin.wallet().await?);
        }
        Ok(Wallets(wallets))
    }
    fn of(&self, name: &str) -> anyhow::Result<&Wallet> {
        self.0.get(name).with_context(|| format!("no wallet of {name}"))
    }
}

/// Where things came to rest after the answer.
#[derive(Debug)]
pub(super) struct Settled {
    after: Wallets,
    payments: BTreeMap<&'static str, Vec<Payment>>,
    exposures: Vec<Exposure>,
    /// Nodes that have stopped taking work, and why.
    halted: Vec<String>,
}

/// The most that a side could have lost at any moment.
#[derive(Debug, Serialize)]
pub(super) struct Exposure {
    pub(super) name: &'static str,
    pub(super) largest_msat: Msat,
}

/// Ends the sessions, and waits until remainders are back and balances stand still.
pub(super) async fn settle(market: &mut Market, before: &Wallets) -> anyhow::Result<Settled> {
    let consumer = market.consumer()?.admin.clone();
    let quiet = async || -> anyhow::Result<bool> {
        let status = consumer.status().await?.consumer.context("the consumer has no status")?;
        let flying = consumer.payments().await?.iter().any(Payment::is_flying);
        Ok(status.open_calls == 0 && !flying)
    };
    until(quiet).await?;
    let sessions = consumer.status().await?.consumer.context("the consumer has no status")?.sessions;
    let dust = Msat(nodes::REFUND_DUST_SAT * 1_000);
    let open: Vec<_> = sessions.into_iter().filter(|session| session.remainder_msat >= dust).collect();
    for session in &open {
        let provider = market.node_with(session.provider).map_or("a provider", |node| node.name);
        market.clock.say(format!("session with {provider} ends; {} to come back", session.remainder_msat));
        consumer.close_session(session.session).await?;
    }
    let refunds = open.len();
    until(async || {
        market.check()?;
        let back = consumer.payments().await?.iter().filter(|payment| is_settled(payment, Direction::Inbound)).count();
        Ok(back >= refunds && quiet().await?)
    })
    .await?;
    let names: Vec<&'static str> = market.nodes().map(|node| node.name).collect();
    until(async || {
        for name in &names {
            if !at_rest(market, before, name).await? {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .await?;
    let mut payments = BTreeMap::new();
    for node in market.nodes() {
        payments.insert(node.name, node.admin.payments().await?);
    }
    let (mut exposures, mut halted) = (Vec::new(), Vec::new());
    for node in market.nodes() {
        let Status { provider, consumer, .. } = node.admin.status().await?;
        let of_provider = provider.map(|p| (p.largest_exposure_msat, p.halted));
        let (largest, why) = of_provider.or(consumer.map(|c| (c.largest_exposure_msat, c.halted))).unwrap_or_default();
        exposures.push(Exposure { name: node.name, largest_msat: largest.max(node.exposure_before) });
        halted.extend(why.map(|why| format!("{}: {why}", node.name)));
    }
    Ok(Settled { after: Wallets::read(market).await?, payments, exposures, halted })
}

/// The balance has moved by what the payment list says.
async fn at_rest(market: &Market, before: &Wallets, name: &str) -> anyhow::Result<bool> {
    let Some(node) = market.nodes().find(|node| node.name == name) else { return Ok(true) };
    let (wallet, payments) = (node.admin.wallet().await?, node.admin.payments().await?);
    Ok(moved(before.of(name)?, &wallet) == net(&payments))
}

/// Waits for it, but not for ever: what has not come by then is a finding of the bill.
async fn until(mut done: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + SETTLE_WITHIN;
    while !done().await? && Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

fn is_settled(payment: &Payment, direction: Direction) -> bool {
    payment.direction == direction && payment.state == PaymentState::Settled
}

fn signed(msat: Msat) -> i128 {
    i128::from(msat.0)
}

fn moved(before: &Wallet, after: &Wallet) -> i128 {
    signed(after.balance.lightning_total_msat) - signed(before.balance.lightning_total_msat)
}

/// What a wallet's own list says came in, less what went out.
fn net(payments: &[Payment]) -> i128 {
    let signed = |payment: &Payment| match payment.direction {
        Direction::Inbound => i128::from(payment.amount_msat.0),
        Direction::Outbound => -i128::from(payment.amount_msat.0) - i128::from(payment.fee_msat.0),
    };
    payments.iter().filter(|payment| payment.state == PaymentState::Settled).map(signed).sum()
}

/// One comparison.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    pub(super) what: String,
    pub(super) holds: bool,
    /// The figures.
    pub(super) detail: String,
}

#[derive(Debug, Serialize)]
pub(super) struct SliceRow {
    pub(super) provider: &'static str,
    pub(super) k: Option<u32>,
    #[serde(flatten)]
    pub(super) slice: Slice,
}

/// One wallet before and after, and what its own list and its ledger say of the way.
#[derive(Debug, Serialize)]
pub(super) struct WalletRow {
    pub(super) name: &'static str,
    pub(super) before_msat: Msat,
    pub(super) out_msat: Msat,
    pub(super) in_msat: Msat,
    pub(super) fees_msat: Msat,
    pub(super) after_msat: Msat,
    pub(super) ledger_msat: i128,
}

/// The bill, with everything that it was compared with.
#[derive(Debug, Serialize)]
pub(super) struct Bill {
    pub(super) slices: Vec<SliceRow>,
    pub(super) receipts: Vec<ReceiptRow>,
    pub(super) acks: u64,
    pub(super) wallets: Vec<WalletRow>,
    pub(super) exposures: Vec<Exposure>,
    pub(super) paid_msat: Msat,
    pub(super) refunded_msat: Msat,
    /// Neither used nor paid back: still prepaid, or owed by a credit note.
    pub(super) owed_msat: i128,
    pub(super) cost_msat: Msat,
    pub(super) checks: Vec<Check>,
    pub(super) verdicts: Vec<Verdict>,
    /// Tokens that came after a dead provider's last acknowledgement: had for nothing.
    pub(super) free_tokens: u32,
    /// Names of the providers, by key.
    #[serde(skip)]
    pub(super) names: BTreeMap<NodeKey, &'static str>,
}

impl Bill {
    pub(super) fn draw(
        market: &Market,
        chat: &Chat,
        before: &Wallets,
        settled: Settled,
        ledgers: Ledgers,
    ) -> anyhow::Result<Bill> {
        let consumer = ledgers.of("consumer")?;
        let providers: Vec<&Ledger> = ledgers.ledgers.iter().filter(|ledger| ledger.name != "consumer").collect();
        let mut checks = Checks(Vec::new());
        usage(&mut checks, chat, consumer);
        for provider in &providers {
            edge(&mut checks, consumer, provider, &settled)?;
        }
        books(&mut checks, consumer, &providers);
        let mut wallets = Vec::new();
        for node in market.nodes() {
            let closed = vanished(before.of(node.name)?, settled.after.of(node.name)?);
            let row = wallet_row(node.name, before, &settled, ledgers.of(node.name)?)?;
            wallet(&mut checks, &row, &settled, &closed)?;
            wallets.push(row);
        }
        checks.hold("every node still takes work", settled.halted.is_empty(), settled.halted.join("; "));
        for verdict in &ledgers.verdicts {
            let files = verdict.files.join(" with ");
            checks.hold(format!("{files} verifies"), verdict.clean, verdict.findings.join("; "));
        }

        let names: BTreeMap<NodeKey, &'static str> = ledgers.ledgers.iter().map(|l| (l.node, l.name)).collect();
        let payee = |slice: &Slice| providers.iter().find(|p| p.slices.iter().any(|s| s.hash == slice.hash));
        let charged_tokens = chat.usage.cost_details.providers.iter().map(|leg| leg.completion_tokens).sum();
        let slices = consumer.slices.iter().map(|slice| SliceRow {
            provider: payee(slice).map_or("nobody", |provider| provider.name),
            k: slice.place.map(|(_, k)| k),
            slice: *slice,
        });
        Ok(Bill {
            slices: slices.collect(),
            receipts: consumer.receipts.clone(),
            acks: consumer.acks,
            wallets,
            exposures: settled.exposures,
            paid_msat: sum(consumer.slices.iter().map(|slice| slice.amount)),
            refunded_msat: sum(consumer.refunds.iter().map(|refund| refund.amount)),
            owed_msat: consumer.balances.prepaid_asset,
            cost_msat: Msat(chat.usage.cost_msat),
            checks: checks.0,
            verdicts: ledgers.verdicts,
            free_tokens: chat.usage.completion_tokens.saturating_sub(charged_tokens),
            names,
        })
    }

    pub(super) fn adds_up(&self) -> bool {
        self.checks.iter().all(|check| check.holds)
    }
}

fn sum(amounts: impl Iterator<Item = Msat>) -> Msat {
    amounts.fold(Msat::ZERO, Msat::saturating_add)
}

struct Checks(Vec<Check>);

impl Checks {
    fn hold(&mut self, what: impl Into<String>, holds: bool, detail: impl Into<String>) {
        self.0.push(Check { what: what.into(), holds, detail: detail.into() });
    }
    /// All these figures are one and the same.
    fn same<T: PartialEq + std::fmt::Display>(&mut self, what: impl Into<String>, figures: &[(&str, T)]) {
        let holds = figures.windows(2).all(|pair| pair[0].1 == pair[1].1);
        let detail: Vec<String> = figures.iter().map(|(from, figure)| format!("{figure} {from}")).collect();
        self.hold(what, holds, detail.join(", "));
    }
}

/// What the API said against what both signed.
fn usage(checks: &mut Checks, chat: &Chat, consumer: &Ledger) {
    let legs = &chat.usage.cost_details.providers;
    let of_legs: u64 = legs.iter().map(|leg| leg.cost_msat).sum();
    checks.same(
        "cost in msat",
        &[
            ("in the API's usage", i128::from(chat.usage.cost_msat)),
            ("over its providers", i128::from(of_legs)),
            ("spent in the consumer's ledger", consumer.balances.expense),
        ],
    );
    let signed: BTreeSet<String> = consumer.receipts.iter().map(|receipt| receipt.id.to_string()).collect();
    let told: BTreeSet<String> = chat.usage.receipt_ids.iter().cloned().collect();
    checks.hold("receipt ids are those of the ledger", signed == told, format!("{} receipts", signed.len()));
    let ended = consumer.receipts.len() as u64 + consumer.abandoned;
    checks.same("requests that ended", &[("in the usage", legs.len() as u64), ("in the consumer's ledger", ended)]);
    for receipt in &consumer.receipts {
        let Some(leg) = legs.iter().find(|leg| leg.receipt_id.as_ref() == Some(&receipt.id.to_string())) else {
            continue;
        };
        let short = receipt.id.short();
        checks.same(
            format!("receipt {short}: cost in msat"),
            &[("in the usage", leg.cost_msat), ("signed by both", receipt.cost.0)],
        );
        checks.same(
            format!("receipt {short}: tokens"),
            &[
                ("in the usage", format!("{} in + {} out", leg.prompt_tokens, leg.completion_tokens)),
                ("signed by both", format!("{} in + {} out", receipt.prompt_tokens, receipt.completion_tokens)),
            ],
        );
    }
    let charged: u32 = legs.iter().map(|leg| leg.completion_tokens).sum();
    let received = chat.usage.completion_tokens;
    if chat.killed.is_none() {
        checks.same("tokens out", &[("received", received), ("charged", charged)]);
    } else {
        // What came after the dead provider's last acknowledgement is nobody's claim.
        let detail = format!("{received} received, {charged} charged");
        checks.hold("tokens out: no more charged than received", charged <= received, detail);
    }
}

/// One payer and one payee: their wallets and ledgers agree on every payment.
fn edge(checks: &mut Checks, consumer: &Ledger, provider: &Ledger, settled: &Settled) -> anyhow::Result<()> {
    let name = provider.name;
    let received: BTreeMap<_, _> = provider.slices.iter().map(|slice| (slice.hash, slice.amount)).collect();
    let in_wallet = listed(settled, name, Direction::Inbound)?;
    checks.hold(
        format!("{name}: every slice in its ledger is in its wallet's list, and none other"),
        received == in_wallet,
        format!("{} and {}", received.len(), in_wallet.len()),
    );
    let paid: BTreeMap<_, _> = consumer.slices.iter().map(|slice| (slice.hash, slice.amount)).collect();
    let both = received.iter().filter(|(hash, amount)| paid.get(hash) == Some(amount)).count();
    let text = format!("{name}: every slice that it received, the consumer paid, for the same amount");
    checks.hold(text, both == received.len(), format!("{both} of {}", received.len()));

    let sent: BTreeMap<_, _> = provider.refunds.iter().map(|refund| (refund.hash, refund.amount)).collect();
    let back: BTreeMap<_, _> = consumer.refunds.iter().map(|refund| (refund.hash, refund.amount)).collect();
    let arrived = sent.iter().filter(|(hash, amount)| back.get(hash) == Some(amount)).count();
    if !sent.is_empty() {
        let from_wallet = listed(settled, name, Direction::Outbound)?;
        checks.hold(
            format!("{name}: every refund is in both ledgers and its wallet"),
            arrived == sent.len() && sent == from_wallet,
            format!("{arrived} of {}", sent.len()),
        );
    }
    let shared: Vec<&ReceiptRow> = consumer.receipts.iter().filter(|r| r.provider == provider.node).collect();
    let theirs: BTreeSet<_> = provider.receipts.iter().map(|receipt| receipt.id).collect();
    let known = shared.iter().filter(|receipt| theirs.contains(&receipt.id)).count();
    checks.hold(
        format!("{name}: both ledgers hold the same receipts"),
        known == shared.len() && theirs.len() == shared.len(),
        format!("{known} of {}", shared.len().max(theirs.len())),
    );
    Ok(())
}

/// All ledgers together: what one side spent, the others earned.
fn books(checks: &mut Checks, consumer: &Ledger, providers: &[&Ledger]) {
    let over = |figure: fn(&Ledger) -> i128| providers.iter().map(|provider| figure(provider)).sum::<i128>();
    let c = &consumer.balances;
    checks.same(
        "msat earned",
        &[("spent by the consumer", c.expense), ("earned by the providers", over(|p| p.balances.income))],
    );
    checks.same(
        "msat still prepaid",
        &[
            ("at the consumer", c.prepaid_asset),
            ("at the providers", over(|p| p.balances.prepaid + p.balances.refunds_due)),
        ],
    );
    let paid = signed(sum(consumer.slices.iter().map(|slice| slice.amount)));
    let back = signed(sum(consumer.refunds.iter().map(|refund| refund.amount)));
    // A refund's routing fee is taken from the refund; between neighbours there is none.
    checks.same(
        "paid = cost + still prepaid + refunded, in msat",
        &[("paid", paid), ("together", c.expense + c.prepaid_asset + back)],
    );
    checks.same(
        "msat over Lightning, net",
        &[
            ("out of the consumer's ledger", -c.lightning - c.routing_fees),
            ("into the providers'", over(|p| p.balances.lightning)),
        ],
    );
}

fn listed(
    settled: &Settled,
    name: &str,
    direction: Direction,
) -> anyhow::Result<BTreeMap<satgrid_types::PaymentHash, Msat>> {
    let rows = settled.payments.get(name).with_context(|| format!("no payments of {name}"))?;
    let rows = rows.iter().filter(|payment| is_settled(payment, direction));
    Ok(rows.map(|payment| (payment.payment_hash, payment.amount_msat)).collect())
}

fn wallet_row(name: &'static str, before: &Wallets, settled: &Settled, ledger: &Ledger) -> anyhow::Result<WalletRow> {
    let payments = settled.payments.get(name).with_context(|| format!("no payments of {name}"))?;
    let of = |direction| payments.iter().filter(move |payment| is_settled(payment, direction));
    Ok(WalletRow {
        name,
        before_msat: before.of(name)?.balance.lightning_total_msat,
        out_msat: sum(of(Direction::Outbound).map(|payment| payment.amount_msat)),
        in_msat: sum(of(Direction::Inbound).map(|payment| payment.amount_msat)),
        fees_msat: sum(of(Direction::Outbound).map(|payment| payment.fee_msat)),
        after_msat: settled.after.of(name)?.balance.lightning_total_msat,
        ledger_msat: ledger.balances.lightning,
    })
}

/// Channels that were there before and are not now: ldk-node 0.7.1 may close one by force after a kill.
fn vanished(before: &Wallet, after: &Wallet) -> Vec<LightningKey> {
    let now: BTreeSet<LightningKey> = after.channels.iter().map(|channel| channel.counterparty).collect();
    before.channels.iter().map(|channel| channel.counterparty).filter(|peer| !now.contains(peer)).collect()
}

fn wallet(checks: &mut Checks, row: &WalletRow, settled: &Settled, closed: &[LightningKey]) -> anyhow::Result<()> {
    let name = row.name;
    let payments = settled.payments.get(name).with_context(|| format!("no payments of {name}"))?;
    let by_list = net(payments);
    checks.same(
        format!("{name}: msat by its wallet's list and its ledger"),
        &[("in the list", by_list), ("in the ledger", row.ledger_msat)],
    );
    if closed.is_empty() {
        let balance = signed(row.after_msat) - signed(row.before_msat);
        checks.same(
            format!("{name}: msat by its balance and its list"),
            &[("in its channels", balance), ("in the list", by_list)],
        );
    } else {
        let text =
            format!("{name}: {} channel closed after the kill; its balance is on its way to the chain", closed.len());
        checks.hold(text, true, "not compared");
    }
    Ok(())
}
