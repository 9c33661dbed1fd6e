//! Those who open sessions and pay for none.

use super::{offer, resume};
use crate::{
    CloseCode, LinkId,
    provider::{InvoiceTicket, PendingRefund, Provider, ProviderAction, ProviderConfig, ProviderEvent},
    recover::Fold,
};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    Draft, Entry, Head,
    statements::{RefundTo, SessionOpen},
    testing::{World, bolt11, bytes32},
};
use satgrid_protocol::frame::{ConsumerControl, Hello, ProviderControl, Refusal};
use satgrid_types::{Digest, Msat, PaymentHash, Quote, SessionId, Signed, UnixMs, node_key};
use std::{collections::BTreeSet, net::IpAddr};

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;

/// A provider, its journal, and whoever comes.
struct Town {
    world: World,
    provider: Provider,
    drafts: Vec<(UnixMs, Draft)>,
    comers: u64,
}

/// Who came, and what became of it.
struct Comer {
    link: LinkId,
    key: SigningKey,
    session: Result<SessionId, Refusal>,
    actions: Vec<ProviderAction>,
}

impl Town {
    fn new(unpaid_per_peer: usize, unpaid_sessions: usize) -> Town {
        let config = ProviderConfig { unpaid_per_peer, unpaid_sessions, ..ProviderConfig::default() };
        let world = World::new();
        let mut provider = Provider::new(config, world.provider.node.clone(), [1; 32]);
        offer(&mut provider, &world);
        Town { world, provider, drafts: Vec::new(), comers: 0 }
    }

    fn tell(&mut self, event: ProviderEvent) -> Vec<ProviderAction> {
        let actions = super::tell(&mut self.provider, &self.world, event);
        for action in &actions {
            if let ProviderAction::Append(append) = action {
                self.drafts.extend(append.drafts.iter().cloned().map(|draft| (self.world.now, draft)));
            }
        }
        actions
    }
    fn say(&mut self, link: LinkId, frame: ConsumerControl) -> Vec<ProviderAction> {
        self.tell(ProviderEvent::Control { link, frame })
    }
    fn pass(&mut self, ms: u64) -> Vec<ProviderAction> {
        self.world.now = self.world.now.plus_ms(ms);
        self.tell(ProviderEvent::Tick)
    }

    /// A connection that has said hello.
    fn greet(&mut self, key: &SigningKey, host: IpAddr) -> LinkId {
        self.comers += 1;
        let link = LinkId(self.comers);
        self.tell(ProviderEvent::LinkUp { link, peer: node_key(key), host: Some(host) });
        self.say(link, ConsumerControl::Hello(Hello::ours()));
        link
    }

    /// Somebody opens a session from this host under a fresh key.
    fn open(&mut self, host: IpAddr) -> Comer {
        let key = SigningKey::from_bytes(&bytes32(&format!("stranger {}", self.comers)));
        let link = self.greet(&key, host);
        let wanted = ConsumerControl::WantQuote(self.world.listing.id(), self.world.listing.model_root);
        let quote = self.say(link, wanted).into_iter().find_map(|action| {
            if let ProviderAction::Control { frame: ProviderControl::Quote(quote), .. } = action {
                Some(quote)
            } else {
                None
            }
        });
        let quote: Signed<Quote> = quote.unwrap();
        let provider = node_key(&self.world.provider.node);
        let open = SessionOpen {
            version: SessionOpen::VERSION,
            provider,
            consumer: node_key(&key),
            quote: quote.verify(&provider).unwrap().quote_id(),
            refund_to: RefundTo::InvoiceAtClose,
            spend_cap: Msat::sat(1_000),
            opened_at: self.world.now,
        };
        let actions = self.say(link, ConsumerControl::Open(Signed::sign(&open, &key)));
        let answers = actions.iter().filter_map(|action| {
            if let ProviderAction::Control { link: to, frame } = action { (*to == link).then_some(frame) } else { None }
        });
        let mut session = answers.filter_map(|frame| {
            if let ProviderControl::Opened(id) = frame {
                Some(Ok(*id))
            } else if let ProviderControl::Refused(refusal, _) = frame {
                Some(Err(*refusal))
            } else {
                None
            }
        });
        let session = session.next_back().unwrap();
        Comer { link, key, session, actions }
    }

    /// An invoice for its first slice.
    fn invoice(&mut self, comer: &Comer) -> PaymentHash {
        let asked = self.say(comer.link, ConsumerControl::WantInvoice(0, Msat::sat(10)));
        let wanted: Option<(InvoiceTicket, Digest)> = asked.into_iter().find_map(|action| {
            if let ProviderAction::MakeInvoice { ticket, description_hash, .. } = action {
                Some((ticket, description_hash))
            } else {
                None
            }
        });
        let (ticket, terms) = wanted.unwrap();
        let hash = PaymentHash(bytes32(&format!("payment {}", comer.link.0)));
        let text = bolt11(&self.world.provider.lightning, Msat::sat(10), &terms, &hash, self.world.now);
        self.tell(ProviderEvent::InvoiceMade { ticket, result: Ok(text) });
        hash
    }
    fn pay(&mut self, hash: PaymentHash) {
        self.tell(ProviderEvent::PaymentReceived { hash, amount: Msat::sat(10) });
    }

    fn sessions(&self) -> BTreeSet<SessionId> {
        self.provider.sessions.keys().copied().collect()
    }
    fn paid(&self, comer: &Comer) -> Option<Msat> {
        self.provider.sessions.get(&comer.session.ok()?).map(|session| session.state.paid())
    }

    /// The process ends and starts again on what the journal has.
    fn restart(&mut self) {
        let mut fold = Fold::new([node_key(&self.world.provider.node)]);
        let mut head = Head::EMPTY;
        for (at, draft) in &self.drafts {
            let entry = Entry::chain(&head, *at, draft.clone());
            head = entry.head();
            fold.entry(&entry);
        }
        let recovered = fold.finish();
        assert_eq!(recovered.refunds, Vec::<PendingRefund>::new());
        let config = self.provider.config.clone();
        self.provider = Provider::new(config, self.world.provider.node.clone(), [2; 32]);
        self.provider.restore(self.world.now, recovered.provider_sessions, recovered.refunds);
        offer(&mut self.provider, &self.world);
    }
}

fn host(n: u64) -> IpAddr {
    IpAddr::from((0x0a00_0000 + u32::try_from(n).unwrap()).to_be_bytes())
}

fn closed(actions: &[ProviderAction]) -> Vec<(LinkId, &str)> {
    let closed = actions.iter().filter_map(|action| {
        let ProviderAction::CloseLink { link, code: CloseCode::Done, reason } = action else { return None };
        Some((*link, reason.as_str()))
    });
    closed.collect()
}

#[test]
fn strangers_without_end_hold_few_sessions_and_take_none_that_was_paid_for() {
    let mut town = Town::new(8, 64);
    // Two honest ones: one has paid, one has its invoice and pays late.
    let payer = town.open(host(1_000));
    let hash = town.invoice(&payer);
    town.pay(hash);
    let late = town.open(host(1_001));
    let late_hash = town.invoice(&late);
    // One who opened and went to sleep: nobody promised it anything.
    let idle = town.open(host(1_002));
    let mut busy = 0;
    for n in 0..1_000 {
        town.pass(1_500);
        let stranger = town.open(host(n % 40));
        busy += usize::from(stranger.session == Err(Refusal::Busy));
        town.tell(ProviderEvent::LinkDown { link: stranger.link });
        assert!(town.provider.sessions.len() <= 64 + 1, "{} sessions", town.provider.sessions.len());
        assert!(town.provider.by_payment.len() <= 2 && town.provider.unpaid.len() <= 64);
    }
    assert_eq!(busy, 0, "within a minute there are never as many as there may be");
    assert!(town.provider.counters().sessions_forgotten >= 1_000 - 64);
    assert_eq!((town.paid(&payer), town.paid(&late), town.paid(&idle)), (Some(Msat::sat(10)), Some(Msat::ZERO), None));
    town.restart();
    let kept = BTreeSet::from([payer.session.unwrap(), late.session.unwrap()]);
    assert_eq!(town.sessions(), kept, "what was forgotten does not come back");
    town.pay(late_hash);
    town.restart();
    assert_eq!((town.paid(&payer), town.paid(&late)), (Some(Msat::sat(10)), Some(Msat::sat(10))));
}

#[test]
fn one_address_makes_room_among_its_own() {
    let mut town = Town::new(4, 64);
    let other = town.open(host(1));
    let first = town.open(host(2));
    let second = town.open(host(2));
    let with_invoice = town.open(host(2));
    town.invoice(&with_invoice);
    town.open(host(2));
    let early = town.open(host(2));
    assert_eq!(early.session, Err(Refusal::Busy), "all of them are young");
    assert_eq!(closed(&early.actions), []);
    town.pass(MINUTE_MS);
    let fifth = town.open(host(2));
    assert!(fifth.session.is_ok());
    let why = "another session took its place: nothing was paid in it";
    assert_eq!(closed(&fifth.actions), [(first.link, why)], "the oldest, whose consumer is told");
    // Others of that address, and those of other addresses, are as they were.
    assert!(town.provider.sessions.contains_key(&second.session.unwrap()));
    assert!(town.provider.sessions.contains_key(&other.session.unwrap()));
    // It is met again by its key: there is no such session, and it opens another one.
    let link = town.greet(&first.key, host(3));
    let told = town.say(link, resume(first.session.unwrap()));
    assert!(
        matches!(
            told.as_slice(),
            [ProviderAction::Control { frame: ProviderControl::Refused(Refusal::Unknown, _), .. }]
        ),
        "{told:?}"
    );
    // What may still be paid gives its place to nobody.
    town.pass(MINUTE_MS);
    (0..3).for_each(|_| drop(town.open(host(2))));
    assert_eq!(town.open(host(2)).session, Err(Refusal::Busy));
    assert!(town.provider.sessions.contains_key(&with_invoice.session.unwrap()));
}

#[test]
fn what_nothing_was_paid_in_is_forgotten_once_nothing_that_was_said_in_it_holds() {
    let mut town = Town::new(8, 64);
    let begun = town.world.now;
    let bare = town.open(host(1));
    let invoiced = town.open(host(2));
    let hash = town.invoice(&invoiced);
    let paid = town.open(host(3));
    let first = town.invoice(&paid);
    town.pay(first);
    // A quote stands for ten minutes; what was begun under it has one more.
    assert_eq!(town.provider.poll_timeout(), Some(begun.plus_ms(11 * MINUTE_MS)));
    assert_eq!(closed(&town.pass(11 * MINUTE_MS - 1)), []);
    let why = "nothing was paid in this session while its quote stood";
    assert_eq!(closed(&town.pass(1)), [(bare.link, why)]);
    // An invoice expires after two minutes, and a payment that hung on its way may come for three hours.
    let lapses = town.provider.poll_timeout().unwrap();
    assert_eq!(lapses, UnixMs::from_secs(begun.as_secs()).plus_ms(2 * MINUTE_MS + 3 * HOUR_MS + 1));
    town.world.now = UnixMs(lapses.0 - 1);
    assert_eq!(closed(&town.pass(0)), []);
    assert_eq!(closed(&town.pass(1)), [(invoiced.link, why)]);
    town.pay(hash);
    assert_eq!((town.paid(&invoiced), town.provider.counters().payments_unknown), (None, 1));
    assert_eq!((town.provider.poll_timeout(), town.provider.unpaid.len()), (None, 0), "nothing is due any more");
    town.pass(10_000 * HOUR_MS);
    town.restart();
    assert_eq!(town.sessions(), BTreeSet::from([paid.session.unwrap()]));
}

#[test]
fn a_payment_of_before_a_sleep_or_a_restart_finds_its_session() {
    let asleep = |town: &mut Town| drop(town.pass(100 * HOUR_MS));
    let restarted = |town: &mut Town| {
        town.world.now = town.world.now.plus_ms(100 * HOUR_MS);
        town.restart();
    };
    for away in [&asleep as &dyn Fn(&mut Town), &restarted] {
        for told in [true, false] {
            let mut town = Town::new(8, 64);
            let bare = town.open(host(1));
            let comer = town.open(host(2));
            let hash = town.invoice(&comer);
            away(&mut town);
            assert_eq!((town.paid(&bare), town.paid(&comer)), (None, Some(Msat::ZERO)));
            if told {
                town.pay(hash);
            }
            let due = town.provider.poll_timeout();
            assert!(due.is_some_and(|due| due <= town.world.now.plus_ms(3 * HOUR_MS)), "{due:?}");
            town.pass(3 * HOUR_MS);
            assert_eq!(town.paid(&comer), told.then_some(Msat::sat(10)));
            town.restart();
            assert_eq!(town.paid(&comer).unwrap_or_default(), if told { Msat::sat(10) } else { Msat::ZERO });
        }
    }
    let mut town = Town::new(8, 64);
    let comer = town.open(host(1));
    town.invoice(&comer);
    town.world.now = town.world.now.plus_ms(31 * 24 * HOUR_MS);
    town.restart();
    assert_eq!(town.sessions(), BTreeSet::new(), "nobody comes back after so long");
}
