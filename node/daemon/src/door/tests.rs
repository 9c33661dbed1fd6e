//! The desk against two fake wallets and a real SQLite: paid in once, spent by a key, paid back, and booked.

use super::*;
use crate::accounts::{
    Desk,
    budget::{Budget, Wanted},
    rate::Rate,
};
use crate::drive::wallet::WalletPump;
use satgrid_api::{Bill, CallContext, CompletionRequest, Format, Prompt, Routing, ToolChoice};
use satgrid_ledger::Account;
use satgrid_ledger::{Books, Journal};
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_types::{MsatPerMtok, RateCard, RequestId, Sampling};
use satgrid_wallet::{
    PaymentState,
    fake::{FakeLightning, FakeNetwork, FaultRates},
};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const WITHIN: Duration = Duration::from_secs(30);

struct World {
    desk: Arc<DoorDesk>,
    keys: KeyStore,
    stranger: FakeLightning,
    journal: SqliteJournal,
    shutdown: CancellationToken,
    _dir: tempfile::TempDir,
}

async fn world() -> World {
    world_up_to(100_000, 150_000).await
}

/// With these bounds of an invoice and of a balance, in sats.
async fn world_up_to(max_sat: u64, max_balance_sat: u64) -> World {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    let [node, stranger] = FakeLightning::wallets(FakeNetwork::new(7, FaultRates::NONE));
    node.with_network(|network| {
        network.handle_timeout(now());
        network.add_channel(stranger.node_id(), node.node_id(), 1_000_000, Msat::sat(100_000));
    });
    let journal = SqliteJournal::open(&path).await.unwrap();
    let opened: Arc<dyn Journal> = Arc::new(journal.clone());
    let writer = JournalWriter::open(opened, |_| {}).await.unwrap();
    let keys = KeyStore::open(&path).await.unwrap();
    let wallet: Arc<dyn Lightning> = Arc::new(node);
    let (handled, handled_inbox) = mpsc::unbounded_channel();
    let (ended, mut ended_inbox) = mpsc::unbounded_channel::<payments::Ended>();
    let payments = payments::start(wallet.clone(), None, ended, handled.clone());
    let settings = config::Door {
        listen: None,
        sells: None,
        certificate: None,
        key: None,
        acme_domains: vec![],
        acme_contact: None,
        acme_directory: String::new(),
        acme_terms_agreed: false,
        acme_ca: None,
        trusted_proxies: vec![],
        margin_permille: 100,
        min_sat: 10,
        max_sat,
        max_balance_sat,
    };
    let desk = DoorDesk::new(Parts {
        keys: keys.clone(),
        journal: writer.clone(),
        wallet: wallet.clone(),
        payments: payments.clone(),
        handled,
        settings,
        margin_permille: 100,
        network: satgrid_wallet::Network::Regtest,
        secret: [3; 32],
    });
    let shutdown = CancellationToken::new();
    let pump = WalletPump {
        wallet,
        journal: writer,
        payments,
        provider: None,
        consumer: None,
        door: Some(desk.clone()),
        handled: handled_inbox,
        changes: mpsc::unbounded_channel().0,
        own: crate::drive::bookkeeper::Own::default(),
        shutdown: shutdown.clone(),
    };
    tokio::spawn(pump.run());
    tokio::spawn(desk.clone().pay_refunds(shutdown.clone()));
    let told = desk.clone();
    tokio::spawn(async move {
        while let Some(payments::Ended { hash, outcome, .. }) = ended_inbox.recv().await {
            told.ended(hash, outcome).await;
        }
    });
    World { desk, keys, stranger, journal, shutdown, _dir: dir }
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let asked = async {
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(WITHIN, asked).await.unwrap_or_else(|_| panic!("{what}: not in time"))
}

impl World {
    /// The stranger pays; its preimage.
    async fn pay(&self, invoice: &DoorInvoice) -> String {
        self.stranger.pay(&invoice.bolt11, Msat::sat(10)).await.unwrap();
        until("paid", || async {
            match self.stranger.lookup(invoice.payment_hash).await.unwrap() {
                PaymentState::Settled { preimage, .. } => Some(preimage.to_string()),
                PaymentState::Unknown | PaymentState::InFlight | PaymentState::Failed { .. } => None,
            }
        })
        .await
    }

    /// A key that the stranger fills with 100 sat, and its invoice.
    async fn new_key(&self) -> (DoorInvoice, KeyId) {
        let made = self.desk.invoice(Order::NewKey { amount: Msat::sat(100) }, "a").await.unwrap();
        let hash: [u8; 32] = sha2::Sha256::digest(made.secret.as_deref().unwrap().as_bytes()).into();
        self.pay(&made).await;
        let find = || async { self.keys.find(hash, now()).await.unwrap().first().map(|key| key.id) };
        (made, until("made", find).await)
    }

    async fn balance(&self, key: KeyId) -> Msat {
        self.keys.chain(key, now()).await.unwrap()[0].balance()
    }

    /// What the journal says is in the wallet, and what it says belongs to clients.
    async fn booked(&self) -> (i128, i128) {
        let mut books = Books::new();
        for entry in self.journal.read(0, 1_000).await.unwrap() {
            books.apply(entry.at, &entry.draft()).unwrap();
        }
        (books.balance(&Account::Lightning), books.balance(&Account::Clients))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_l402_token_is_paid_spent_and_paid_back() {
    let world = world().await;
    let made = world.desk.invoice(Order::L402 { amount: Msat(20_500) }, "a").await.unwrap();
    assert_eq!(made.amount, Msat(21_000), "whole sats");
    let token = made.secret.clone().unwrap();
    let unpaid = world.desk.credential(&token, &"00".repeat(32)).await;
    assert_eq!(unpaid, Err(DoorError::BadCredential));
    let preimage = world.pay(&made).await;
    let hash = until("credited", || async { world.desk.credential(&token, &preimage).await.ok() }).await;
    let key = world.keys.find(hash, now()).await.unwrap()[0].id;
    assert_eq!(world.balance(key).await, Msat(21_000));
    assert_eq!(world.desk.invoice_state(made.payment_hash).await, Ok(Some(InvoiceState::Paid)));
    // The wallet may tell an event twice.
    assert_eq!(world.desk.received(made.payment_hash, Msat(21_000)).await, Ok(true));
    assert_eq!(world.balance(key).await, Msat(21_000));
    until("booked", || async { (world.booked().await == (21_000, 21_000)).then_some(()) }).await;
    assert_eq!(world.desk.received(PaymentHash([1; 32]), Msat(5)).await, Ok(false), "none of the door's");

    // Back to an invoice: no more than is there, then what was asked, and the unused fee returns.
    let request = |sat| InvoiceRequest { amount: Msat::sat(sat), description_hash: Digest([0; 32]), expiry_secs: 600 };
    let too_much = world.stranger.create_invoice(request(21)).await.unwrap();
    let refused = world.desk.refund(&key.to_string(), &too_much.bolt11, None).await;
    assert!(matches!(refused, Err(DoorError::Balance { .. })), "{refused:?}");
    let back = world.stranger.create_invoice(request(15)).await.unwrap();
    let refund = world.desk.refund(&key.to_string(), &back.bolt11, None).await.unwrap();
    assert_eq!((refund.amount, refund.max_fee), (Msat(15_000), Msat(1_000)));
    let settled = until("refunded", || async {
        let refunds = world.desk.refunds(&key.to_string()).await.unwrap();
        refunds.into_iter().find(|refund| refund.state == "settled")
    });
    assert_eq!(settled.await.fee, Some(Msat::ZERO));
    assert_eq!(world.balance(key).await, Msat(6_000));
    until("booked", || async { (world.booked().await == (6_000, 6_000)).then_some(()) }).await;
    world.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_made_by_its_payment_and_filled_again() {
    let world = world().await;
    let made = world.desk.invoice(Order::NewKey { amount: Msat::sat(100) }, "a").await.unwrap();
    let secret = made.secret.clone().unwrap();
    let hash: [u8; 32] = sha2::Sha256::digest(secret.as_bytes()).into();
    assert!(world.keys.find(hash, now()).await.unwrap().is_empty(), "nothing is made before it is paid");
    world.pay(&made).await;
    let find = || async { world.keys.find(hash, now()).await.unwrap().first().map(|key| key.id) };
    let key = until("made", find).await;
    let more = world.desk.invoice(Order::TopUp { key: key.to_string(), amount: Msat::sat(50) }, "a").await.unwrap();
    let lacking = world.desk.invoice(Order::Missing { key: key.to_string(), amount: Msat(1) }, "a").await.unwrap();
    assert!(lacking.amount >= Msat::sat(1) && lacking.amount.0 % 1_000 == 0, "{}", lacking.amount);
    world.pay(&more).await;
    until("filled", || async { (world.balance(key).await == Msat::sat(150)).then_some(()) }).await;
    for amount in [Msat::sat(9), Msat::sat(100_001), Msat(10_500)] {
        let refused = world.desk.invoice(Order::NewKey { amount }, "a").await;
        assert!(matches!(refused, Err(DoorError::Invalid { param: "amount_sat", .. })), "{amount}");
    }
    let over = world.desk.invoice(Order::TopUp { key: key.to_string(), amount: Msat::sat(99_999) }, "a").await.unwrap();
    let over_again = Order::TopUp { key: key.to_string(), amount: Msat::sat(99_999) };
    let refused = world.desk.invoice(over_again, "a").await;
    assert!(matches!(refused, Err(DoorError::Invalid { .. })), "with {} open it would hold too much", over.amount);
    // A refund that no host answers waits for its next try, and holds its money meanwhile.
    let address = format!("nobody@127.0.0.1:{}", 1);
    let refund = world.desk.refund(&key.to_string(), &address, None).await.unwrap();
    assert_eq!(world.balance(key).await, Msat(150_000 - refund.amount.0 - refund.max_fee.0));
    let waits = until("tried", || async {
        let refunds = world.desk.refunds(&key.to_string()).await.unwrap();
        refunds.into_iter().find(|refund| refund.reason.is_some())
    });
    assert_eq!(waits.await.state, "waiting");
    world.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_price_above_any_invoice_is_refused_and_never_lowered() {
    for bounds in [(50, 80), (80, 50)] {
        let world = world_up_to(bounds.0, bounds.1).await;
        let ask = |amount| world.desk.invoice(Order::L402 { amount }, "a");
        let most = Msat::sat(50);
        let price = Msat(most.0 + 1);
        assert_eq!(ask(price).await, Err(DoorError::PriceTooHigh { price, most }));
        assert_eq!(ask(most).await.unwrap().amount, most);
        assert_eq!(ask(Msat(most.0 - 1)).await.unwrap().amount, most, "whole sats");
        world.shutdown.cancel();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_invoice_is_paid_by_one_refund() {
    let world = world().await;
    let (made, key) = world.new_key().await;
    let request = InvoiceRequest { amount: Msat::sat(20), description_hash: Digest([0; 32]), expiry_secs: 600 };
    let back = world.stranger.create_invoice(request).await.unwrap();
    for _ in 0..2 {
        world.desk.refund(&key.to_string(), &back.bolt11, None).await.unwrap();
    }
    let ended = until("both ended", || async {
        let refunds = world.desk.refunds(&key.to_string()).await.unwrap();
        refunds.iter().all(|refund| refund.state == "settled" || refund.state == "failed").then_some(refunds)
    });
    let mut states: Vec<String> = ended.await.into_iter().map(|refund| refund.state).collect();
    states.sort();
    assert_eq!(states, ["failed", "settled"], "the second was not paid");
    assert_eq!(world.keys.has_refund(back.payment_hash).await, Ok(true), "none of the operator's own payments");
    assert_eq!(world.keys.has_refund(made.payment_hash).await, Ok(false));
    until("returned", || async { (world.balance(key).await == Msat::sat(80)).then_some(()) }).await;
    until("booked", || async { (world.booked().await == (80_000, 80_000)).then_some(()) }).await;
    world.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_has_few_open_invoices() {
    let world = world().await;
    let ask = |asker: &'static str| world.desk.invoice(Order::L402 { amount: Msat(1) }, asker);
    for _ in 0..MAX_OPEN_INVOICES_OF_ONE {
        ask("a").await.unwrap();
    }
    assert_eq!(ask("a").await, Err(DoorError::TooManyInvoices));
    let made = ask("b").await.unwrap();
    assert_eq!(world.desk.invoice_state(made.payment_hash).await, Ok(Some(InvoiceState::Open)));
    world.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_at_any_moment_leaves_nothing_reserved() {
    let world = world().await;
    let (_, key) = world.new_key().await;
    let till = Till::resale(world.desk.journal.clone(), 100);
    let desk = Desk::new(world.keys.clone(), Rate::default(), till, None);
    let request = CompletionRequest {
        model: "m".to_owned(),
        fallback_models: vec![],
        prompt: Prompt::Text("hi".to_owned()),
        sampling: Sampling::default(),
        stop: vec![],
        max_tokens: Some(8),
        routing: Routing::default(),
        format: Format::Text,
        tools: vec![],
        tool_choice: ToolChoice::None,
        parallel_tool_calls: false,
        top_logprobs: None,
    };
    let rates = RateCard { output: MsatPerMtok(1_000_000), ..RateCard::default() };
    let wanted = || Wanted { model: "m", request: &request, rates: vec![rates], prompt: 1, max_output: 8 };
    let context = |n: u8| CallContext {
        request: RequestId([n; 32]),
        trace: String::new(),
        key: Some(key.to_string()),
        deadline: None,
    };
    // While its money is reserved, and once it is but nobody was asked.
    for polls in 1..12 {
        let context = context(polls);
        let mut opening = Box::pin(Budget::open(&desk, &context, wanted()));
        for _ in 0..polls {
            if futures::poll!(opening.as_mut()).is_ready() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    until("given back", || async {
        let usage = world.keys.chain(key, now()).await.unwrap()[0].usage;
        (usage.requests > 0 && usage.reserved.is_zero()).then_some(())
    })
    .await;
    assert_eq!(world.balance(key).await, Msat::sat(100));
    // While its call's end is written.
    let mut budget = Budget::open(&desk, &context(100), wanted()).await.unwrap();
    budget.asked();
    let bill = Bill { cost: Msat(5), ..Bill::default() };
    let mut ending = Box::pin(budget.end(None, &bill));
    let _ = futures::poll!(ending.as_mut());
    drop(ending);
    until("posted", || async {
        let usage = world.keys.chain(key, now()).await.unwrap()[0].usage;
        (usage.spent == Msat(6) && usage.reserved.is_zero()).then_some(())
    })
    .await;
    until("booked", || async { (world.booked().await == (100_000, 99_994)).then_some(()) }).await;
    world.shutdown.cancel();
}
