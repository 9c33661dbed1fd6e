//! Vectors of listing events: what a reader takes, and each way in which one is refused.

use satgrid_ledger::testing::{EPOCH, Party, bytes32, listing};
use satgrid_types::{
    LayerRange, Listing, MAX_EMBEDDING, ModelRoot, Msat, MsatPerMtok, NostrEvent, Part, RateCard, UnixMs, node_key,
    nostr_key, sign_lightning_message, sign_node_binding, verify_listing,
};
use serde_json::{Value, json};

pub(crate) fn listings() -> Vec<Value> {
    let provider = Party::new("provider");
    let rates = RateCard {
        input: MsatPerMtok(1),
        cached_input: MsatPerMtok(1),
        output: MsatPerMtok(2),
        per_request: Msat(0),
        ..RateCard::default()
    };
    let good = listing(&provider, rates, EPOCH);
    let at = good.created_at();
    let remade = |change: &dyn Fn(&mut Listing)| {
        let mut listing = Listing::clone(&good);
        change(&mut listing);
        listing.to_event(&provider.nostr, at, &[0; 32])
    };
    // Whatever the change is of, the node stands for it.
    let bound = |change: &dyn Fn(&mut Listing)| {
        remade(&|l| {
            change(l);
            l.bindings.node = Some(sign_node_binding(&provider.node, &nostr_key(&provider.nostr), &l.d()));
        })
    };
    let layers = |l: &mut Listing| l.part = Part::Layers(LayerRange::new(4, 9).expect("a range"));
    let edited = |change: &dyn Fn(&mut NostrEvent)| {
        let mut event = good.event().clone();
        change(&mut event);
        event
    };
    let retagged = |change: &dyn Fn(&mut Vec<Vec<String>>)| {
        let event = good.event();
        let mut tags = event.tags.clone();
        change(&mut tags);
        NostrEvent::sign(&provider.nostr, at, event.kind, tags, event.content.clone(), &[0; 32])
    };
    let stranger = Party::new("stranger");
    let cases = [
        ("good", good.event().clone()),
        ("good: another listing of the same keys", remade(&|l| l.slots = 9)),
        ("good: a model that embeds", remade(&|l| l.embeds = Some(768))),
        ("good: the longest rows", remade(&|l| l.embeds = Some(MAX_EMBEDDING))),
        ("good: layers", bound(&|l| layers(l))),
        ("bad: it embeds rows of no numbers", remade(&|l| l.embeds = Some(0))),
        ("bad: it embeds rows of too many numbers", remade(&|l| l.embeds = Some(MAX_EMBEDDING + 1))),
        (
            "bad: layers that embed",
            bound(&|l| {
                layers(l);
                l.embeds = Some(768);
            }),
        ),
        (
            "bad: content changed after signing",
            edited(&|e| e.content = e.content.replace("\"slots\":4", "\"slots\":5")),
        ),
        ("bad: one bit of the signature flipped", edited(&|e| e.sig.0[40] ^= 1)),
        ("bad: another event id", edited(&|e| e.id.0[0] ^= 1)),
        ("bad: another kind", edited(&|e| e.kind += 1)),
        ("bad: the node's binding is for another model", remade(&|l| l.model_root = ModelRoot(bytes32("other model")))),
        (
            "bad: the node's binding is by another key",
            remade(&|l| {
                l.bindings.node = Some(sign_node_binding(&stranger.node, &nostr_key(&provider.nostr), &l.d()));
            }),
        ),
        ("bad: no node binding", remade(&|l| l.bindings.node = None)),
        (
            "bad: the Lightning binding is by another node",
            remade(&|l| {
                l.bindings.lightning = Some(sign_lightning_message(
                    &stranger.lightning,
                    &format!("satgrid-node-key-v1:{}", node_key(&provider.node)),
                ));
            }),
        ),
        ("bad: no Lightning binding", remade(&|l| l.bindings.lightning = None)),
        ("bad: a tag says another model name", retagged(&|tags| tags[2][1].push('x'))),
        ("bad: two `d` tags", retagged(&|tags| tags.push(tags[0].clone()))),
        ("bad: no expiration", retagged(&|tags| drop(tags.remove(1)))),
        ("bad: it lives longer than an hour", remade(&|l| l.expires_at += 3_600)),
        ("bad: version 2", remade(&|l| l.version = 2)),
    ];
    let show = |(name, event): (&str, NostrEvent)| {
        let (json, created) = (event.to_json(), UnixMs::from_secs(event.created_at));
        let verdict = verify_listing(event, created);
        let valid = verdict.is_ok();
        assert_eq!(valid, name.starts_with("good"), "{name}");
        let mut vector = json!({ "name": name, "event": json, "valid": valid });
        if let Ok(listing) = verdict {
            vector["id"] = json!(listing.id().to_string());
            vector["node_key"] = json!(listing.node_key.to_string());
            if let Some(numbers) = listing.embeds {
                vector["embeds"] = json!(numbers);
            }
        }
        vector
    };
    cases.into_iter().map(show).collect()
}
