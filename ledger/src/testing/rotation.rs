//! A provider whose key gives way in the middle of its work: receipts of both keys in one journal.

use super::{
    party::{bytes32, listing},
    world::{Work, World},
};
use crate::entry::{Draft, Evidence};
use ed25519_dalek::SigningKey;
use satgrid_types::{GivenUp, Msat, NodeKey, SignedSuccession, nostr_key};
use secp256k1::{Keypair, SECP256K1};

const WORK: Work = Work { prompt: 40, cached: 0, output: 60, acks: 1 };

/// A session that was opened under the old key and ends under it, after the new key opened one of its own.
pub fn rotated() -> (World, NodeKey) {
    let mut world = World::new();
    let mut before = world.open();
    world.pay(&mut before, Msat::sat(10));
    world.complete(&mut before, WORK);
    let old = world.provider.node.clone();
    let (signed, new, nostr) = succession_of(&world);
    let at = world.now;
    world.provider.append(at, Draft::of(Evidence::Succession(signed)));
    (world.provider.node, world.provider.nostr) = (new.clone(), nostr);
    world.listing = listing(&world.provider, world.listing.rates, world.now);
    let listed = Draft::of(Evidence::Listing { event_json: world.listing.event().to_json() });
    for party in [&mut world.provider, &mut world.consumer] {
        party.append(at, listed.clone());
    }

    let mut after = world.open();
    world.pay(&mut after, Msat::sat(10));
    world.complete(&mut after, WORK);
    // The older session is served by the key that it knows.
    world.provider.node = old.clone();
    world.complete(&mut before, WORK);
    world.close_with_refund(&mut before);
    world.provider.node = new;
    world.snapshot();
    (world, satgrid_types::node_key(&old))
}

/// The provider's next keys, and the statement that names them.
pub fn succession_of(world: &World) -> (SignedSuccession, SigningKey, Keypair) {
    let (old, new) = (&world.provider.node, SigningKey::from_bytes(&bytes32("provider/node/1")));
    let nostr = Keypair::from_seckey_slice(SECP256K1, &bytes32("provider/nostr/1")).expect("a hash is a valid key");
    let (was, is) = (nostr_key(&world.provider.nostr), nostr_key(&nostr));
    (SignedSuccession::rotate((old, was), (&new, is), world.now, GivenUp::Routine), new, nostr)
}
