//! Keys that were given up, and who came after them.
//!
//! | of a key is known | listings by it | what we knew of it |
//! |---|---|---|
//! | nothing | taken | its own |
//! | one heir | refused | goes to the heir, penalties included |
//! | a revocation | refused | goes to nobody |
//! | two different heirs, or an heir and a revocation | refused | goes to nobody: one of them was signed by a thief |
//!
//! The rule looks at the statements alone, so **the same statements give the same verdict in whatever order relays deliver
//! them**. It follows that a thief who speaks first is followed until the owner speaks, and never longer.

use satgrid_types::{NodeKey, SignedSuccession, Succession, Verified};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// Given-up keys remembered. Beyond, only those of providers that we dealt with are taken.
pub const MAX_GIVEN_UP: usize = 50_000;
/// No key is followed over more heirs.
const MAX_STEPS: usize = 32;
/// No more keys are remembered to have named one heir, and none stands for more: of others those with the lowest keys. An heir
/// accepts, so who has more has asked for it.
const MAX_NAMED: usize = 32;

/// One statement, with what proves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastWord {
    pub signed: SignedSuccession,
    pub said: Verified<Succession>,
}

/// What became of a key that was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate<'a> {
    /// This key stands in its place.
    Heir(NodeKey, &'a LastWord),
    /// Nobody does.
    Ended(&'a LastWord),
    /// Two statements by one key contradict each other; or heirs go round in a circle.
    Disputed(&'a LastWord, &'a LastWord),
}

impl Fate<'_> {
    /// The signed statements, in hex: whoever doubts it checks them.
    pub fn proof(&self) -> String {
        match self {
            Fate::Heir(_, word) | Fate::Ended(word) => word.signed.to_hex(),
            Fate::Disputed(one, other) => format!("{} {}", one.signed.to_hex(), other.signed.to_hex()),
        }
    }
}

impl core::fmt::Display for Fate<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Fate::Heir(heir, word) => write!(f, "given up ({}) for {heir}", word.said.why.name()),
            Fate::Ended(word) => write!(f, "revoked ({})", word.said.why.name()),
            Fate::Disputed(one, other) => {
                let name = |word: &LastWord| word.said.new.map_or("nobody".to_owned(), |new| new.short());
                write!(f, "given up twice, for {} and for {}: nobody's", name(one), name(other))
            }
        }
    }
}

/// Why a statement changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LineageRefusal {
    #[error("known")]
    Known,
    #[error("{MAX_GIVEN_UP} keys of strangers were given up already")]
    Full,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Lineage {
    /// By the key that was given up: its word, and the first that contradicts it.
    words: BTreeMap<NodeKey, (LastWord, Option<LastWord>)>,
    /// By heir, who named it.
    named_by: BTreeMap<NodeKey, BTreeSet<NodeKey>>,
}

impl Lineage {
    pub fn len(&self) -> usize {
        self.words.len()
    }
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Takes a statement in. `dealt_with`: the key is of a provider that this node had to do with.
    pub fn apply(&mut self, word: LastWord, dealt_with: bool) -> Result<(), LineageRefusal> {
        let (old, new) = (word.said.old, word.said.new);
        let full = self.words.len() >= MAX_GIVEN_UP;
        match self.words.get_mut(&old) {
            None if full && !dealt_with => return Err(LineageRefusal::Full),
            None => {
                self.words.insert(old, (word, None));
            }
            Some((one, _)) if one.said.new == new => {
                // Of two that say the same, the lower id stands, whichever came first.
                if word.said.id() < one.said.id() {
                    *one = word;
                }
                return Err(LineageRefusal::Known);
            }
            Some((_, Some(_))) => return Err(LineageRefusal::Known),
            Some((_, none)) => *none = Some(word),
        }
        if let Some(new) = new {
            let named_by = self.named_by.entry(new).or_default();
            named_by.insert(old);
            if named_by.len() > MAX_NAMED {
                named_by.pop_last();
            }
        }
        Ok(())
    }

    /// What became of a key; `None` while it is in use.
    pub fn fate(&self, key: &NodeKey) -> Option<Fate<'_>> {
        let (first, other) = self.words.get(key)?;
        if let Some(other) = other {
            return Some(Fate::Disputed(first, other));
        }
        let mut at = first.said.new;
        for _ in 0..MAX_STEPS {
            let Some(heir) = at else { return Some(Fate::Ended(first)) };
            match self.words.get(&heir) {
                None => return Some(Fate::Heir(heir, first)),
                // Whoever an ended or a disputed key had named is nobody's heir either.
                Some((_, Some(_))) => return Some(Fate::Ended(first)),
                Some((word, None)) => at = word.said.new,
            }
        }
        Some(Fate::Disputed(first, first))
    }

    /// The key that stands for this one now: itself while it is in use.
    pub fn current(&self, key: &NodeKey) -> Option<NodeKey> {
        match self.fate(key) {
            None => Some(*key),
            Some(Fate::Heir(heir, _)) => Some(heir),
            Some(Fate::Ended(_) | Fate::Disputed(..)) => None,
        }
    }

    /// Every key that was given up, and what became of it.
    pub fn all(&self) -> impl Iterator<Item = (NodeKey, Fate<'_>)> {
        self.words.keys().filter_map(|key| Some((*key, self.fate(key)?)))
    }

    /// Whom a key named in all that is known of it.
    pub fn heirs_named_by(&self, key: &NodeKey) -> impl Iterator<Item = NodeKey> {
        let words = self.words.get(key).into_iter().flat_map(|(one, other)| [Some(one), other.as_ref()]);
        words.flatten().filter_map(|word| word.said.new)
    }

    /// The keys that this one stands for, itself first.
    pub fn line(&self, key: &NodeKey) -> Vec<NodeKey> {
        let mut line = vec![*key];
        let mut at = 0;
        while let Some(next) = line.get(at).filter(|_| line.len() <= MAX_NAMED) {
            let before = self.named_by.get(next).into_iter().flatten();
            let before = before.filter(|old| self.current(old) == Some(*key) && !line.contains(old)).copied();
            let before: Vec<NodeKey> = before.take((MAX_NAMED + 1).saturating_sub(line.len())).collect();
            line.extend(before);
            at += 1;
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use satgrid_types::{GivenUp, NostrKey, UnixMs, node_key};

    fn signing(n: u8) -> ed25519_dalek::SigningKey {
        ed25519_dalek::SigningKey::from_bytes(&[n; 32])
    }
    fn key(n: u8) -> NodeKey {
        node_key(&signing(n))
    }
    /// `new` 0: a revocation.
    fn word(old: u8, new: u8) -> LastWord {
        let nostr = NostrKey([9; 32]);
        let (old, at, why) = (signing(old), UnixMs(u64::from(new)), GivenUp::Routine);
        let signed = match new {
            0 => SignedSuccession::revoke((&old, nostr), at, why),
            new => SignedSuccession::rotate((&old, nostr), (&signing(new), nostr), at, why),
        };
        LastWord { said: signed.verify().unwrap(), signed }
    }
    fn told(words: &[(u8, u8)]) -> Lineage {
        let mut lineage = Lineage::default();
        for (old, new) in words {
            let _ = lineage.apply(word(*old, *new), false);
        }
        lineage
    }

    #[test]
    fn heirs_are_followed_and_thieves_are_not() {
        #[track_caller]
        fn check(words: &[(u8, u8)], asked: u8, expect: Option<u8>) {
            let mut turned = words.to_vec();
            turned.reverse();
            for words in [words, turned.as_slice()] {
                assert_eq!(told(words).current(&key(asked)), expect.map(key), "{words:?}");
            }
        }
        check(&[], 1, Some(1));
        check(&[(1, 2)], 1, Some(2));
        check(&[(1, 2)], 2, Some(2));
        check(&[(1, 2), (2, 3)], 1, Some(3));
        check(&[(1, 2), (1, 2)], 1, Some(2));
        check(&[(1, 0)], 1, None);
        check(&[(1, 2), (1, 3)], 1, None);
        check(&[(1, 2), (1, 0)], 1, None);
        check(&[(1, 2), (2, 0)], 1, None);
        check(&[(1, 2), (2, 3), (2, 4)], 1, None);
        check(&[(1, 2), (2, 1)], 1, None);
        check(&[(1, 2), (1, 3)], 3, Some(3));
    }

    #[test]
    fn a_line_goes_back_to_all_who_named_its_heir() {
        let lineage = told(&[(1, 2), (2, 3), (4, 3), (5, 3), (5, 6)]);
        assert_eq!(lineage.line(&key(3)).into_iter().collect::<BTreeSet<_>>(), [1, 2, 3, 4].map(key).into());
        assert_eq!(lineage.line(&key(6)), vec![key(6)], "what is disputed is inherited by nobody");
        assert_eq!(lineage.line(&key(2)), vec![key(2)], "a key that was given up itself has nothing any more");
        let mut lineage = told(&[(1, 2)]);
        assert_eq!(lineage.apply(word(1, 2), true), Err(LineageRefusal::Known));
        assert!(lineage.fate(&key(1)).unwrap().to_string().contains("routine"));
    }

    #[test]
    fn an_heir_of_very_many_stands_for_a_few_whichever_came_first() {
        let words: Vec<(u8, u8)> = (2..=200).map(|old| (old, 1)).collect();
        let turned: Vec<(u8, u8)> = words.iter().rev().copied().collect();
        let line = told(&words).line(&key(1));
        assert_eq!((line.len(), line[0]), (MAX_NAMED + 1, key(1)));
        assert_eq!(told(&turned).line(&key(1)), line);
    }

    proptest! {
        #[test]
        fn the_order_of_arrival_does_not_matter(words in proptest::collection::vec((1u8..6, 0u8..6), 0..10), by in 0usize..10) {
            let words: Vec<(u8, u8)> = words.into_iter().filter(|(old, new)| old != new).collect();
            let mut turned = words.clone();
            turned.rotate_left(by.min(words.len()));
            turned.reverse();
            let (one, other) = (told(&words), told(&turned));
            for n in 1..6 {
                prop_assert_eq!(one.current(&key(n)), other.current(&key(n)));
                let line = |lineage: &Lineage| lineage.line(&key(n)).into_iter().collect::<BTreeSet<_>>();
                prop_assert_eq!(line(&one), line(&other));
            }
        }
    }
}
