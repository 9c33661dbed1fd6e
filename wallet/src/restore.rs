//! Getting back what was in channels when everything but the words and the channel backup is gone; and the guard that
//! keeps an old copy of the channels from being started.
//!
//! A channel backup holds no channel state. With it a restored node finds its peers; each peer sees that we know nothing
//! of the channel and closes it with its own latest commitment, which pays our share to a key that the words alone give.
//!
//! | state of a lost channel | it awaits | a crash there means |
//! |---|---|---|
//! | asked | the closing transaction: we connect to the peer, again and again | nothing: we connect again |
//! | closed | that transaction's first confirmation, and a fee that is worth paying | nothing: it is found again by the funding that it spends |
//! | swept | nothing; our share is on its way to an address of the wallet | the spend is found by the output that it spends |
//! | too small | nothing; what is ours is worth less than the fee that moves it | |
//! | elsewhere | nothing; no output of it is of our static keys. A close by agreement pays the wallet's own address, which its scan finds | |
//!
//! The guard compares watermarks: for each channel the number of its latest state, which only grows. What a backup has
//! seen is never above what the disk holds, unless the disk is an old copy; then a peer could take everything in the
//! channel by publishing nothing more than the truth. What a restore gave up is never started again, whatever its number.

use crate::embedded::{BackedUp, ChannelBackup};
use satgrid_types::{LightningKey, UnixMs};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// For each channel, as the wallet's store names it, the number of its latest state.
pub type Watermarks = BTreeMap<String, u64>;

/// A channel whose monitor was put away: it is over, and no state of it can be old.
pub const OVER: u64 = u64::MAX;

/// What somebody saw of the channels before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Where it is written, for the message.
    pub by: String,
    pub updates: Watermarks,
}

/// A channel of which the disk holds an older state than was seen before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    pub channel: String,
    /// `None`: the disk does not know the channel at all.
    pub disk: Option<u64>,
    pub seen: u64,
    pub by: String,
}

/// Everything on `disk` that is older than what was seen.
pub fn stale(disk: &Watermarks, seen: &[Seen]) -> Vec<Stale> {
    let mut found = Vec::new();
    for Seen { by, updates } in seen {
        for (channel, &seen) in updates {
            let disk = disk.get(channel).copied();
            if disk.is_none_or(|disk| disk < seen) && seen != OVER {
                found.push(Stale { channel: channel.clone(), disk, seen, by: by.clone() });
            }
        }
    }
    found
}

/// A channel on `disk` that a restore gave up: its store was put aside, is here again, and nobody can say how old it is.
pub fn put_back<'a>(disk: &'a Watermarks, given_up: &BTreeSet<String>) -> Option<&'a str> {
    let mut live = disk.iter().filter(|(_, state)| **state != OVER).map(|(channel, _)| channel.as_str());
    live.find(|channel| given_up.contains(*channel))
}

/// See the module's table.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum LostState {
    #[default]
    Asked,
    Closed {
        txid: String,
    },
    Swept {
        txid: String,
        /// What arrives, the fee taken off.
        sat: u64,
    },
    TooSmall {
        txid: String,
        sat: u64,
    },
    Elsewhere {
        txid: String,
    },
}

impl LostState {
    pub const fn is_over(&self) -> bool {
        match self {
            LostState::Asked | LostState::Closed { .. } => false,
            LostState::Swept { .. } | LostState::TooSmall { .. } | LostState::Elsewhere { .. } => true,
        }
    }
}

impl core::fmt::Display for LostState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            LostState::Asked => write!(f, "the peer is asked to close it"),
            LostState::Closed { txid } => {
                write!(f, "closed by {txid}; our share waits for its block, or for lower fees")
            }
            LostState::Swept { txid, sat } => write!(f, "{sat} sat are coming back by {txid}"),
            LostState::TooSmall { txid, sat } => write!(f, "closed by {txid}; our {sat} sat are not worth a fee"),
            LostState::Elsewhere { txid } => {
                write!(f, "closed by {txid}; what it pays us, if anything, is at an address of the wallet")
            }
        }
    }
}

/// A channel whose state is lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    pub channel: BackedUp,
    /// `host:port` of the peer; without it we wait for the peer to connect.
    pub address: Option<String>,
    #[serde(flatten)]
    pub state: LostState,
}

/// A restore under way, as it is kept on disk until every channel is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restoring {
    pub version: u32,
    pub node: LightningKey,
    pub began_at: UnixMs,
    pub lost: Vec<Lost>,
    /// Channels, as watermarks name them, whose old states were put aside on purpose: the guard no longer asks for them.
    pub given_up: BTreeSet<String>,
}

impl Restoring {
    pub const VERSION: u32 = 1;

    pub fn of(backup: &ChannelBackup, now: UnixMs) -> Restoring {
        let address =
            |peer: &LightningKey| backup.peers.iter().find(|(key, _)| key == peer).map(|(_, address)| address.clone());
        let lost = backup.channels.iter().map(|channel| Lost {
            address: address(&channel.counterparty),
            channel: channel.clone(),
            state: LostState::default(),
        });
        Restoring {
            version: Restoring::VERSION,
            node: backup.node,
            began_at: now,
            lost: lost.collect(),
            given_up: backup.updates.keys().cloned().collect(),
        }
    }

    /// A second restore on top of an unfinished one forgets nothing of the first.
    #[must_use]
    pub fn after(mut self, before: Restoring) -> Restoring {
        let known: BTreeSet<String> = self.lost.iter().map(|lost| lost.channel.channel.clone()).collect();
        self.lost.extend(before.lost.into_iter().filter(|lost| !known.contains(&lost.channel.channel)));
        self.given_up.extend(before.given_up);
        self
    }

    pub fn is_over(&self) -> bool {
        self.lost.iter().all(|lost| lost.state.is_over())
    }

    /// Channels that are still to come back: they stay in every backup that is written meanwhile.
    pub fn open(&self) -> impl Iterator<Item = &Lost> {
        self.lost.iter().filter(|lost| !lost.state.is_over())
    }

    /// What was seen, without what was given up on purpose.
    pub fn allow(&self, mut seen: Seen) -> Seen {
        seen.updates.retain(|channel, _| !self.given_up.contains(channel));
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::Msat;

    fn marks(of: &[(&str, u64)]) -> Watermarks {
        of.iter().map(|(channel, update)| ((*channel).to_owned(), *update)).collect()
    }

    #[test]
    fn an_old_copy_is_found_and_a_newer_disk_is_not() {
        #[track_caller]
        fn check(disk: &[(&str, u64)], seen: &[(&str, u64)], expect: &[(&str, Option<u64>)]) {
            let seen = [Seen { by: "channels.json".into(), updates: marks(seen) }];
            let found = stale(&marks(disk), &seen);
            let found: Vec<_> = found.iter().map(|s| (s.channel.as_str(), s.disk)).collect();
            assert_eq!(found, expect);
        }
        check(&[("a", 7)], &[("a", 7)], &[]);
        check(&[("a", 8)], &[("a", 7)], &[]);
        check(&[("a", 6)], &[("a", 7)], &[("a", Some(6))]);
        check(&[], &[("a", 1)], &[("a", None)]);
        check(&[("a", OVER)], &[("a", 9)], &[]);
        check(&[("a", 9), ("b", 3)], &[], &[]);
    }

    #[test]
    fn what_was_given_up_is_not_started_again() {
        let given_up = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        assert_eq!(put_back(&marks(&[]), &given_up), None);
        assert_eq!(put_back(&marks(&[("c", 1)]), &given_up), None);
        assert_eq!(put_back(&marks(&[("b", OVER), ("c", 1)]), &given_up), None);
        assert_eq!(put_back(&marks(&[("a", 9), ("c", 1)]), &given_up), Some("a"));
        assert_eq!(put_back(&marks(&[("a", 9)]), &BTreeSet::new()), None);
    }

    #[test]
    fn what_was_given_up_is_not_asked_for_again() {
        let key = LightningKey([2; 33]);
        let channel = BackedUp {
            channel: "c".into(),
            counterparty: key,
            funding: Some(format!("{}:1", "ab".repeat(32))),
            capacity_sat: 100_000,
            ours: Msat(5),
        };
        let backup = ChannelBackup {
            node: key,
            peers: vec![(key, "127.0.0.1:9735".into())],
            channels: vec![channel.clone()],
            updates: marks(&[("a", 4)]),
        };
        let first = Restoring::of(&backup, UnixMs(1));
        assert_eq!(first.lost[0].address.as_deref(), Some("127.0.0.1:9735"));
        assert!(!first.is_over());
        let seen = Seen { by: "x".into(), updates: marks(&[("a", 4), ("b", 1)]) };
        assert_eq!(first.allow(seen).updates, marks(&[("b", 1)]));

        let other = ChannelBackup { channels: Vec::new(), updates: marks(&[("b", 1)]), ..backup };
        let mut second = Restoring::of(&other, UnixMs(2)).after(first);
        assert_eq!((second.lost.len(), second.given_up.len()), (1, 2));
        second.lost[0].state = LostState::Swept { txid: "t".into(), sat: 9 };
        assert!(second.is_over());
        let text = serde_json::to_string(&second).unwrap();
        assert!(text.contains("\"state\":\"swept\""), "{text}");
        assert_eq!(serde_json::from_str::<Restoring>(&text).unwrap(), second);
    }
}
