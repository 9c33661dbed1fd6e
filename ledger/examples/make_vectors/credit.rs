//! Histories in which a credit note is spent in another session, once and wrongly.

use satgrid_ledger::{
    bundle::Filter,
    entry::Evidence,
    statements::CreditTransfer,
    testing::{Party, Session, Work, World, bundle_of, bytes32, chain_entries, drafts_of},
};
use satgrid_types::{BothSigned, Digest, Msat, Signed};

/// A session that was closed with a note, and the one in which that was spent.
pub(crate) struct Spent {
    pub(crate) provider: Party,
    pub(crate) consumer: Party,
    pub(crate) from: Session,
    pub(crate) to: Session,
    /// The consumer's journal before it was.
    pub(crate) before: Vec<satgrid_ledger::Entry>,
}

pub(crate) fn spent() -> Spent {
    let mut world = World::new();
    let mut from = world.open();
    world.pay(&mut from, Msat::sat(10));
    world.complete(&mut from, Work { prompt: 40, cached: 0, output: 60, acks: 1 });
    let note = world.close_with_credit_note(&mut from);
    let mut to = world.open();
    let before = world.consumer.journal.entries();
    world.spend_credit_note(&from, &note, &mut to);
    world.complete(&mut to, Work { prompt: 20, cached: 0, output: 30, acks: 1 });
    world.close_with_refund(&mut to);
    Spent { provider: world.provider, consumer: world.consumer, from, to, before }
}

/// The provider's journals that spend it twice, for less, and under another note.
pub(crate) fn wrongly(spent: &Spent) -> Vec<(&'static str, Vec<u8>)> {
    let key = &spent.provider.node;
    let honest = drafts_of(&spent.provider.journal.entries());
    let at = honest.iter().position(|(_, d)| matches!(d.evidence, Some(Evidence::CreditTransfer(_)))).unwrap();
    let bundle = |drafts| bundle_of(&chain_entries(drafts), key, Filter::All, false);
    let mut twice = honest.clone();
    let mut again = honest[at].clone();
    again.1.transfers.clear();
    twice.insert(at + 1, again);
    let mut less = honest.clone();
    if let Some(Evidence::CreditTransfer(both)) = &mut less[at].1.evidence {
        let mut body = both.peek().unwrap();
        body.amount = Msat(body.amount.0 - 1);
        *both = BothSigned::countersign(&Signed::sign(&body, key), &spent.from.key);
    }
    let mut another = honest.clone();
    if let Some(Evidence::CreditTransfer(both)) = &mut another[at].1.evidence {
        let body = CreditTransfer { note: Digest(bytes32("another note")), ..both.peek().unwrap() };
        *both = BothSigned::countersign(&Signed::sign(&body, key), &spent.from.key);
    }
    vec![
        ("credit-note-spent", bundle(twice)),
        ("credit-note-spent-for-less", bundle(less)),
        ("credit-note-spent-of-another-note", bundle(another)),
    ]
}
