//! The keys that a provider signs with: its own now, and those that its older sessions were opened under.
//!
//! A session's statements name the key that its quote named, to the end, whatever the node is called meanwhile: receipts
//! of both keys stand in one ledger, and what is owed under an old key is paid back under it.

use ed25519_dalek::SigningKey;
use satgrid_types::{NodeKey, node_key};
use std::collections::BTreeMap;

pub(super) struct Signers {
    key: SigningKey,
    former: BTreeMap<NodeKey, SigningKey>,
}

impl Signers {
    pub(super) fn new(key: SigningKey) -> Signers {
        Signers { key, former: BTreeMap::new() }
    }

    pub(super) fn add_former(&mut self, keys: Vec<SigningKey>) {
        self.former.extend(keys.into_iter().map(|key| (node_key(&key), key)));
    }

    /// What new quotes are signed by.
    pub(super) fn now(&self) -> &SigningKey {
        &self.key
    }

    pub(super) fn node_key(&self) -> NodeKey {
        node_key(&self.key)
    }

    /// The key of a session under this name. A name that is none of ours is never one of our sessions.
    pub(super) fn of(&self, provider: &NodeKey) -> &SigningKey {
        self.former.get(provider).unwrap_or(&self.key)
    }
}
