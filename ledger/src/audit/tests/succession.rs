//! Journals whose node gave its key up.

use super::report;
use crate::{
    audit::{Report, Rule, cross_check},
    bundle::Filter,
    entry::Evidence,
    testing::{World, bundle_of, chain_entries, drafts_of, rotated, succession_of},
};
use satgrid_types::{GivenUp, NodeKey, SignedSuccession, UnixMs, node_key, nostr_key};

type Drafts = Vec<(UnixMs, crate::entry::Draft)>;

#[test]
fn receipts_of_both_keys_are_one_clean_journal() {
    let (world, old) = rotated();
    let new = node_key(&world.provider.node);
    let [provider, consumer] =
        [&world.provider, &world.consumer].map(|party| report(&party.bundle(Filter::All, false)));
    assert_eq!((provider.findings.as_slice(), consumer.findings.as_slice()), (&[][..], &[][..]));
    assert_eq!((provider.node, provider.keys.as_slice()), (new, &[old, new][..]));
    let by = |key: NodeKey| provider.sessions.values().filter(|s| s.provider == Some(key) && s.as_provider).count();
    assert_eq!((by(old), by(new)), (1, 1), "both are its provider side");
    assert_eq!(provider.as_provider.receipts, 3);
    assert_eq!(cross_check(&provider, &consumer), []);
    for filter in provider.sessions.keys().map(|id| Filter::Session(*id)) {
        let part = report(&world.provider.bundle(filter, false));
        assert_eq!(part.findings, [], "{filter:?}");
        assert_eq!(part.sessions.values().filter(|session| session.as_provider).count(), 1);
    }
    // A session that the new key's export lacks is missed, whichever key it was under.
    let mut fewer = provider.clone();
    fewer.sessions.retain(|_, session| session.provider == Some(new));
    assert!(cross_check(&fewer, &consumer).iter().any(|finding| finding.rule == Rule::CrossMissing));
}

#[test]
fn only_the_newest_key_names_the_next() {
    let (world, _) = rotated();
    let key = &world.provider.node;
    let bent = |bend: &dyn Fn(&mut Drafts, usize)| -> Report {
        let mut drafts = drafts_of(&world.provider.journal.entries());
        let at = drafts.iter().position(|(_, draft)| matches!(draft.evidence, Some(Evidence::Succession(_)))).unwrap();
        bend(&mut drafts, at);
        report(&bundle_of(&chain_entries(drafts), key, Filter::All, false))
    };
    let with = |signed: SignedSuccession| {
        bent(&|drafts, at| drafts[at].1.evidence = Some(Evidence::Succession(signed.clone())))
    };
    assert_eq!(bent(&|_, _| ()).findings, []);
    let none = bent(&|drafts, at| drop(drafts.remove(at)));
    assert!(none.has(Rule::BundleNode), "the checkpoint is by a key that the journal never had: {:?}", none.findings);
    let twice = bent(&|drafts, at| drafts.insert(at + 1, drafts[at].clone()));
    assert!(twice.has(Rule::BundleNode), "the old key speaks again: {:?}", twice.findings);
    let stranger = (&world.consumer.node, nostr_key(&world.consumer.nostr));
    let usurped = SignedSuccession::rotate(stranger, (key, stranger.1), world.now, GivenUp::Stolen);
    assert!(with(usurped).has(Rule::BundleNode));
    let before = World::new();
    let ended = SignedSuccession::revoke((&before.provider.node, stranger.1), world.now, GivenUp::Ended);
    assert!(with(ended).has(Rule::BundleNode), "a revoked key has no heir");
    // The statement of another world's clock, with this one's signatures.
    let (signed, ..) = succession_of(&before);
    let mut bytes = satgrid_types::cbor::encode(&signed);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let forged = satgrid_types::cbor::decode_limited(&bytes, bytes.len()).unwrap();
    assert!(with(forged).has(Rule::StatementSignature));
    // Under the old key's name the journal ends with another one.
    let entries = world.provider.journal.entries();
    assert!(report(&bundle_of(&entries, &before.provider.node, Filter::All, false)).has(Rule::BundleNode));
}
