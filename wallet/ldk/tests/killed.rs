//! A payer that is killed with -9 in mid-payment, again and again, and what its journal and the payee's wallet say.
//!
//! The payer is this test binary, run as a process of its own. It writes an attempt to its journal before it pays and an
//! outcome before it acknowledges the event, and after a start it resolves what the journal leaves open by the rules of
//! `satgrid_wallet::payment`. ldk-node 0.7.1 may force-close the channel at such a start; the payer then opens another.
//!
//! Such a close has one more sting: an amount below the dust limit (354 sat) that was in flight is left to the miners.
//! The payee may have claimed it and lists it as received, while the payer's wallet calls it failed, for good. Then the
//! payee's word, which is the preimage, settles it; in the market it comes with the slice's credit, here in a file.
//!
//! A Lightning node that is killed itself may also forget a payment that it has a row for and has not sent: it waits in a channel for
//! the peer's word, which is not on disk. The row says in flight for good. The payment's own rule ends it, as never sent, when its
//! invoice has expired and nothing is out (two and a half minutes in the market); the invoices here live for hours, so the
//! payer calls it unsent when nothing has been out for a while, and never pays that slice.
//!
//! What was force-closed is noticed by the payer, comes back to its coins, and is opened again, all without a person.
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, LightningKey, Msat, PaymentHash};
use satgrid_wallet::{
    Direction, Embedded, FailureReason, InvoiceRequest, Lightning, OpenChannel, PaymentState, WalletEvent, invoice,
    payment::{Action, Input, Intent, Outcome, Phase, Slices},
};
use satgrid_wallet_ldk::{ChainSource, LdkConfig, LdkWallet, LogLevel, Program, StartError, WalletProcess};
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsString,
    fs,
    fs::OpenOptions,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use world::{World, free_addr, unix_now};

const CHANNEL_SAT: u64 = 400_000;
/// How long one kill and what follows may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Payments at once: the issue asks for four.
const IN_FLIGHT: usize = 4;
const SLICES_A_KILL: u32 = 4;

/// Where the payer's Lightning node runs: what is killed is the payer's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the payer's process, and killed with it.
    Inside,
    /// In a process of its own, as the daemon runs it.
    Apart,
    /// The same, and it is the Lightning node's process that is killed. The payer ends with an error, and is started again.
    Aimed,
}

/// What the kills have cost.
#[derive(Debug, PartialEq, Eq)]
struct Closed {
    /// Channels that the payee saw force-closed.
    forced: usize,
    /// Channels that the payer was told of, as closed by force.
    noticed: usize,
    /// Payments that the Lightning node forgot before they left.
    unsent: u32,
    /// Sats that miners got of the payer's, for channels opened, closed and swept.
    miners_sat: u64,
}

/// What a channel's opening, its forced close, and the sweep of what it held may cost at the chain's one sat a virtual byte.
const MINERS_SAT_A_CHANNEL: u64 = 3_000;
const REWARD_SAT: u64 = 50 * 100_000_000;
const HALVING_BLOCKS: u32 = 150;
const SEED: [u8; 16] = [42; 16];

fn amount(slice: u32) -> Msat {
    Msat(2_500 + u64::from(slice))
}

/// The short form, for CI: the node may lose channels where it is killed itself, and never a msat.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_payer_pays_every_slice_once() {
    kill_payer(Place::Inside, 3).await;
}

/// Somebody's aim, or the machine's out-of-memory killer: channels may be lost, money never.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_lightning_node_loses_no_money() {
    kill_payer(Place::Aimed, 3).await;
}

/// The daemon's way: not even a channel is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_payer_whose_wallet_is_apart_loses_no_channel() {
    assert_eq!(kill_payer(Place::Apart, 4).await.forced, 0);
}

/// The trials behind docs/adr/0012: `KILLS=100 cargo test -p satgrid-wallet-ldk --test killed -- --ignored trials --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: set KILLS"]
async fn trials() {
    let kills = env::var("KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    let places = env::var("PLACE").unwrap_or_else(|_| "inside,aimed,apart".to_owned());
    for place in places.split(',') {
        let place = match place {
            "inside" => Place::Inside,
            "aimed" => Place::Aimed,
            "apart" => Place::Apart,
            other => panic!("PLACE is {other}"),
        };
        let closed = kill_payer(place, kills).await;
        assert!(place != Place::Apart || closed.forced == 0, "{closed:?}");
    }
}

/// Kills the payer, or its Lightning node, so many times in mid-payment.
async fn kill_payer(place: Place, kills: u32) -> Closed {
    let slices = (kills + 1) * SLICES_A_KILL;
    let world = Arc::new(World::new().await);
    let payee = Arc::new(world.start("payee").await);
    world.fund(&[&payee]).await;
    let payer_dir = world.dir.path().join("payer");
    fs::create_dir(&payer_dir).unwrap();
    let mut invoices = String::new();
    for slice in 0..slices {
        let request = InvoiceRequest { amount: amount(slice), description_hash: Digest([1; 32]), expiry_secs: 36_000 };
        invoices += &format!("{}\n", payee.create_invoice(request).await.unwrap().bolt11);
    }
    fs::write(payer_dir.join("invoices"), invoices).unwrap();

    // The payee acknowledges what it hears, the chain grows, and both look at it.
    let events = tokio::spawn({
        let (payee, payer_dir) = (payee.clone(), payer_dir.clone());
        async move {
            let mut forced = BTreeSet::new();
            while let Ok(event) = payee.next_event().await {
                if let WalletEvent::PaymentReceived { hash, .. } = event
                    && let Ok(PaymentState::Settled { preimage, .. }) = payee.lookup(hash).await
                {
                    append(&payer_dir.join("credits"), &format!("{hash} {preimage}"));
                }
                if let WalletEvent::ChannelClosed { forced: true, channel, .. } = event {
                    forced.insert(channel);
                }
                payee.event_handled().await.unwrap();
            }
            forced
        }
    });
    let blocks = tokio::spawn({
        let (world, payee) = (world.clone(), payee.clone());
        async move {
            while payee.sync().await.is_ok() {
                world.mine(1);
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        }
    });

    let mut funded_sat = None;
    for kill in 0..=kills {
        let since = Instant::now();
        let mut payer = Payer::spawn(&world, &payee, &payer_dir, place);
        let goal = if kill < kills { 1 + kill * SLICES_A_KILL } else { slices };
        loop {
            assert!(since.elapsed() < PATIENCE, "{place:?}: stuck before kill {kill}: {}", report(&payer_dir));
            if funded_sat.is_none()
                && let Ok(address) = fs::read_to_string(payer_dir.join("address"))
            {
                let height = world.chain.lock().unwrap().height() + 1;
                funded_sat = Some(REWARD_SAT >> (height / HALVING_BLOCKS));
                world.fund_address(&address);
            }
            if Journal::read(&payer_dir).over() >= goal {
                break;
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        // Somewhere in the payments after the last one that is in the journal.
        tokio::time::sleep(Duration::from_millis(u64::from(kill * 23 % 160))).await;
        payer.kill(place, &payer_dir, since);
    }

    let journal = Journal::read(&payer_dir);
    assert_eq!(journal.over(), slices);
    let received: Vec<_> = payee
        .payments()
        .await
        .unwrap()
        .into_iter()
        .filter(|p| p.direction == Direction::Inbound && matches!(p.state, PaymentState::Settled { .. }))
        .collect();
    let sum: u64 = received.iter().map(|p| p.amount.0).sum();
    assert_eq!(sum, journal.0.values().filter(|row| is_settled(row)).map(|row| amount(row.0).0).sum::<u64>());
    assert!(received.iter().all(|p| matches!(journal.0.get(&p.hash), Some((_, Some(Outcome::Settled { .. }))))));
    let (left_sat, own) = all_comes_back(&world, &payee, &payer_dir).await;
    let booked: BTreeSet<PaymentHash> =
        journal.0.iter().filter(|(_, row)| is_settled(row)).map(|(hash, _)| *hash).collect();
    // What the payer's own wallet calls paid is in its journal; beyond that, where the node itself was killed, are those of which only
    // the payee's word tells.
    assert!(own.is_subset(&booked), "{place:?}: paid and not booked: {:?}", own.difference(&booked));
    assert!(place != Place::Apart || own == booked, "booked and not paid: {:?}", booked.difference(&own));
    payee.stop().await.unwrap();
    blocks.await.unwrap();
    let forced = events.await.unwrap();
    let told = fs::read_to_string(payer_dir.join("closed")).unwrap_or_default();
    let told: BTreeSet<&str> = told.lines().collect();
    let miners_sat = funded_sat.unwrap() - sum.div_ceil(1_000) - left_sat;
    let unsent = slices - journal.settled();
    let closed = Closed { forced: forced.len(), noticed: told.len(), unsent, miners_sat };
    eprintln!(
        "{place:?}: {kills} kills in mid-payment, {} slices paid once, {sum} msat; {closed:?}",
        journal.settled()
    );
    assert!(place != Place::Apart || unsent == 0, "{closed:?}");
    assert!(forced.iter().all(|channel| told.contains(channel.to_string().as_str())), "not noticed: {forced:?}");
    let channels = u64::try_from(forced.len() + 1).unwrap();
    assert!(miners_sat <= channels * MINERS_SAT_A_CHANNEL, "lost beside the miners' share: {closed:?}");
    closed
}

/// The payer's wallet once more, until nothing of closed channels is out any more. Gives what it has, in sat, and what it calls
/// paid.
async fn all_comes_back(world: &World, payee: &LdkWallet, dir: &Path) -> (u64, BTreeSet<PaymentHash>) {
    let (since, mut looks) = (Instant::now(), 0);
    let wallet = loop {
        match LdkWallet::start(config(dir, &world.server.url())).await {
            Ok(wallet) => break wallet,
            // The process of the payer that was killed last stops its node.
            Err(StartError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => panic!("{error}"),
        }
        assert!(since.elapsed() < PATIENCE, "the store is not let go of");
    };
    loop {
        looks += 1;
        // An event that nobody read is a thing that is not yet told.
        while let Ok(event) = tokio::time::timeout(Duration::from_millis(20), wallet.next_event()).await {
            if let WalletEvent::ChannelClosed { forced: true, channel, .. } = event.unwrap() {
                append(&dir.join("closed"), &channel.to_string());
            }
            wallet.event_handled().await.unwrap();
        }
        world.mine(8);
        wallet.sync().await.unwrap();
        let _ = wallet.connect(payee.node_id(), payee.listen_addr().unwrap()).await;
        let (balance, channels) = (wallet.balance().await.unwrap(), wallet.channels().await.unwrap());
        let settled = looks > 2 && channels.iter().all(|c| c.usable) && !balance.outbound_in_flight;
        if settled && balance.closing_sat == 0 {
            let payments = wallet.payments().await.unwrap().into_iter();
            let paid = payments
                .filter(|p| p.direction == Direction::Outbound && matches!(p.state, PaymentState::Settled { .. }));
            let paid = paid.map(|p| p.hash).collect();
            wallet.stop().await.unwrap();
            return (balance.onchain_total_sat + balance.lightning_total.0 / 1_000, paid);
        }
        assert!(since.elapsed() < PATIENCE, "not all came back: {balance:?} {channels:?}");
    }
}

fn config(dir: &Path, esplora: &str) -> LdkConfig {
    let chain = ChainSource::Esplora { url: esplora.to_owned() };
    let seed = satgrid_wallet::keys::Phrase::from_entropy(&SEED).unwrap().seed();
    let log_level = LogLevel::Debug;
    LdkConfig { listen: vec![free_addr()], log_level, ..LdkConfig::new(dir.join("ldk"), seed, chain) }
}

/// Where the payer says which process its Lightning node is.
const WALLET_PID: &str = "wallet.pid";

/// The payer's process.
struct Payer(Child);

impl Payer {
    fn spawn(world: &World, payee: &LdkWallet, dir: &Path, place: Place) -> Payer {
        let _ = fs::remove_file(dir.join(WALLET_PID));
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "payer_process", "--ignored", "--nocapture"])
            .env("PAYER_DIR", dir)
            .env("PAYER_APART", if place == Place::Inside { "" } else { "1" })
            .env("PAYER_CHAIN", world.server.url())
            .env("PAYER_PEER", payee.node_id().to_string())
            .env("PAYER_PEER_ADDR", payee.listen_addr().unwrap().to_string())
            .stdout(Stdio::null())
            // It dies of its wallet's death, and says so at length.
            .stderr(if place == Place::Aimed { Stdio::null() } else { Stdio::inherit() })
            .spawn()
            .unwrap();
        Payer(child)
    }

    fn kill(&mut self, place: Place, dir: &Path, since: Instant) {
        if place == Place::Aimed {
            let wallet = fs::read_to_string(dir.join(WALLET_PID)).unwrap();
            assert!(Command::new("kill").args(["-9", wallet.trim()]).status().unwrap().success());
            while self.0.try_wait().unwrap().is_none() {
                assert!(since.elapsed() < PATIENCE, "the payer outlives its wallet");
                std::thread::sleep(Duration::from_millis(5));
            }
            return;
        }
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Payer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What was attempted and how it ended; appended to, never rewritten.
struct Journal(BTreeMap<PaymentHash, (u32, Option<Outcome>)>);

impl Journal {
    fn read(dir: &Path) -> Journal {
        let mut rows = BTreeMap::new();
        for line in fs::read_to_string(dir.join("journal")).unwrap_or_default().lines() {
            // A torn last line was never acted on.
            let [what, slice, hash, preimage] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
            let outcome = match what {
                "settled" => Some(Outcome::Settled { preimage: preimage.parse().unwrap(), fee: Msat(0) }),
                "failed" => Some(Outcome::Failed { reason: FailureReason::Other }),
                "unsent" => Some(UNSENT),
                _ => None,
            };
            let row = rows.entry(hash.parse().unwrap()).or_insert((slice.parse().unwrap(), None));
            assert!(!matches!(row.1, Some(Outcome::Settled { .. })), "an entry after the payment settled: {line}");
            row.1 = outcome;
        }
        Journal(rows)
    }
    fn append(dir: &Path, line: &str) {
        append(&dir.join("journal"), line);
    }
    fn settled(&self) -> u32 {
        u32::try_from(self.0.values().filter(|row| is_settled(row)).count()).unwrap()
    }
    /// Settled, or never to be paid.
    fn over(&self) -> u32 {
        self.settled() + u32::try_from(self.0.values().filter(|row| row.1 == Some(UNSENT)).count()).unwrap()
    }
}

const UNSENT: Outcome = Outcome::Failed { reason: FailureReason::NeverSent };

fn is_settled(row: &(u32, Option<Outcome>)) -> bool {
    matches!(row.1, Some(Outcome::Settled { .. }))
}

fn append(path: &Path, line: &str) {
    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
    file.sync_data().unwrap();
}

/// What the journal leaves open, and what the payer's node said of it.
fn report(dir: &Path) -> String {
    let open: Vec<String> =
        Journal::read(dir).0.iter().filter(|(_, row)| row.1.is_none()).map(|(hash, _)| hash.to_string()).collect();
    let log = fs::read_to_string(dir.join("ldk/ldk.log")).unwrap_or_default();
    let about: Vec<&str> = log.lines().filter(|line| open.iter().any(|hash| line.contains(hash.as_str()))).collect();
    format!("open: {open:?}\n{}", about.join("\n"))
}

/// Not a test: the process that the test above starts and kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the test above"]
async fn payer_process() {
    let Ok(dir) = env::var("PAYER_DIR").map(PathBuf::from) else { return };
    let peer: LightningKey = env::var("PAYER_PEER").unwrap().parse().unwrap();
    let addr: SocketAddr = env::var("PAYER_PEER_ADDR").unwrap().parse().unwrap();
    let config = config(&dir, &env::var("PAYER_CHAIN").unwrap());
    let wallet: Box<dyn Embedded> = if env::var("PAYER_APART").as_deref() == Ok("1") {
        let args = ["--exact", "wallet_process", "--ignored", "--nocapture"].map(OsString::from).to_vec();
        let program = Program { exe: env::current_exe().unwrap(), args };
        let wallet = WalletProcess::start(&program, config).await.unwrap();
        fs::write(dir.join(WALLET_PID), wallet.pid().unwrap().to_string()).unwrap();
        Box::new(wallet)
    } else {
        Box::new(LdkWallet::start(config).await.unwrap())
    };
    if !dir.join("address").exists() {
        let address = wallet.new_address().await.unwrap();
        fs::write(dir.join("address.new"), address).unwrap();
        fs::rename(dir.join("address.new"), dir.join("address")).unwrap();
    }
    let offers = fs::read_to_string(dir.join("invoices")).unwrap();
    let intents: Vec<Intent> = offers
        .lines()
        .map(|bolt11| {
            let facts = invoice::read(bolt11).unwrap();
            let (amount, max_fee) = (facts.amount.unwrap(), Msat(0));
            Intent { hash: facts.payment_hash, bolt11: bolt11.into(), amount, max_fee, expires_at: facts.expires_at }
        })
        .collect();
    let mut slices: Slices<u32> = Slices::new(IN_FLIGHT);
    for (hash, (slice, outcome)) in Journal::read(&dir).0 {
        let intent = intents.iter().find(|i| i.hash == hash).unwrap().clone();
        slices.recover(unix_now(), slice, intent, outcome);
    }
    let mut role = Role { wallet, dir, slices, intents, quiet_since: None };
    loop {
        role.keep_a_channel(peer, addr).await;
        role.turn().await;
    }
}

/// Not a test: the wallet's process, with its socket for standard input.
#[test]
#[ignore = "started by the payer above"]
fn wallet_process() {
    let _ = satgrid_wallet_ldk::process::worker_main();
}

struct Role {
    wallet: Box<dyn Embedded>,
    dir: PathBuf,
    slices: Slices<u32>,
    intents: Vec<Intent>,
    /// Since when nothing is out.
    quiet_since: Option<Instant>,
}

/// Nothing out for so long: what a row says of a payment in flight is no longer so.
const QUIET: Duration = Duration::from_secs(8);

impl Role {
    async fn keep_a_channel(&self, peer: LightningKey, addr: SocketAddr) {
        let channels = self.wallet.channels().await.unwrap();
        if channels.iter().any(|c| c.usable) {
            return;
        }
        let _ = self.wallet.connect(peer, addr).await;
        let _ = self.wallet.sync().await;
        if channels.is_empty() {
            let open = OpenChannel { node: peer, addr, capacity_sat: CHANNEL_SAT, push: Msat::ZERO };
            let _ = self.wallet.open_channel(open).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    /// Events first, then what the machines ask, then new slices.
    async fn turn(&mut self) {
        while let Ok(event) = tokio::time::timeout(Duration::from_millis(5), self.wallet.next_event()).await {
            match event.unwrap() {
                WalletEvent::PaymentSettled { hash, preimage, fee } => {
                    self.tell(hash, Input::Settled { preimage, fee })
                }
                WalletEvent::PaymentFailed { hash, reason } => self.tell(hash, Input::Failed { reason }),
                WalletEvent::ChannelClosed { forced: true, channel, .. } => {
                    append(&self.dir.join("closed"), &channel.to_string());
                }
                WalletEvent::PaymentReceived { .. }
                | WalletEvent::ChannelPending { .. }
                | WalletEvent::ChannelReady { .. }
                | WalletEvent::ChannelClosed { .. }
                | WalletEvent::Other { .. } => {}
            }
            self.wallet.event_handled().await.unwrap();
        }
        self.slices.handle_timeout(unix_now());
        while let Some((hash, action)) = self.slices.poll_action() {
            let input = match action {
                Action::Pay { bolt11, max_fee } => match self.wallet.pay(&bolt11, max_fee).await {
                    Ok(()) => Input::Accepted,
                    Err(error) => Input::Refused(error),
                },
                Action::Look { hash } => Input::Looked(self.wallet.lookup(hash).await.unwrap()),
                Action::Observe => Input::Observed {
                    usable: self.wallet.channels().await.unwrap().iter().any(|c| c.usable),
                    outbound_in_flight: self.wallet.balance().await.unwrap().outbound_in_flight,
                },
            };
            self.tell(hash, input);
        }
        self.believe_the_payee();
        self.give_up_what_was_forgotten().await;
        if !self.wallet.channels().await.unwrap().iter().any(|c| c.usable) {
            return;
        }
        for (slice, intent) in (0u32..).zip(&self.intents) {
            if self.slices.may_start(&slice, intent.hash).is_ok() {
                Journal::append(&self.dir, &format!("attempt {slice} {} -", intent.hash));
                self.slices.start(unix_now(), slice, intent.clone()).unwrap();
            }
        }
    }

    async fn give_up_what_was_forgotten(&mut self) {
        let flies = |intent: &&Intent| {
            self.slices.payment(&intent.hash).is_some_and(|(_, payment)| *payment.phase() == Phase::InFlight)
        };
        let flying: Vec<PaymentHash> = self.intents.iter().filter(flies).map(|intent| intent.hash).collect();
        let usable = self.wallet.channels().await.unwrap().iter().any(|c| c.usable);
        if flying.is_empty() || !usable || self.wallet.balance().await.unwrap().outbound_in_flight {
            self.quiet_since = None;
            return;
        }
        if self.quiet_since.get_or_insert_with(Instant::now).elapsed() > QUIET {
            for hash in flying {
                self.tell(hash, Input::Failed { reason: FailureReason::NeverSent });
            }
        }
    }

    /// A preimage settles a payment that the wallet calls failed.
    fn believe_the_payee(&mut self) {
        for line in fs::read_to_string(self.dir.join("credits")).unwrap_or_default().lines() {
            let Some((hash, preimage)) = line.split_once(' ') else { continue };
            let (Ok(hash), Ok(preimage)) = (hash.parse(), preimage.parse()) else { continue };
            let slice = self.intents.iter().position(|i| i.hash == hash).map(|i| u32::try_from(i).unwrap());
            let failed = slice
                .and_then(|slice| self.slices.get(&slice))
                .is_some_and(|p| matches!(p.phase(), Phase::Failed { .. }));
            if failed {
                self.tell(hash, Input::Settled { preimage, fee: Msat(0) });
            }
        }
    }

    fn tell(&mut self, hash: PaymentHash, input: Input) {
        match self.slices.handle(unix_now(), hash, input).unwrap() {
            Some((slice, Outcome::Settled { preimage, .. })) => {
                Journal::append(&self.dir, &format!("settled {slice} {hash} {preimage}"));
            }
            Some((slice, UNSENT)) => Journal::append(&self.dir, &format!("unsent {slice} {hash} -")),
            Some((slice, Outcome::Failed { .. })) => Journal::append(&self.dir, &format!("failed {slice} {hash} -")),
            None => {}
        }
    }
}
