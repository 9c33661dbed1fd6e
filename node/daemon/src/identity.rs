//! Which of the seed's identities this node has: the node key (QUIC, receipts) and the Nostr key, by their index, and the
//! statements by which each gave way to the next.
//!
//! `node.dir/identity.json` holds no secret. A node that has none is the seed's first, unless relays tell of more: so a node that
//! was restored from its words finds its newest key by asking what its older ones said.
//!
//! | `rotate`, `revoke` | a crash right after means |
//! |---|---|
//! | the file is replaced | the next start journals it and tells the relays |
//! | relays are told | nothing: they are told again at each start |

use crate::config::Config;
use crate::drive::channels::write;
use crate::failure::HintExt;
use anyhow::{Context, bail, ensure};
use ed25519_dalek::SigningKey;
use satgrid_market_nostr::{RelayConfig, succession};
use satgrid_types::{
    GivenUp, NodeKey, NostrEvent, NostrKey, SignedSuccession, Succession, UnixMs, node_key, nostr_key,
};
use satgrid_wallet::keys::{MAX_IDENTITIES, Seed};
use secp256k1::{Keypair, SECP256K1};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

const FILE: &str = "identity.json";
const VERSION: u32 = 1;
/// How long relays may take.
pub(crate) const RELAYS_WITHIN: Duration = Duration::from_secs(3);
/// Keys after the known one that relays are asked about.
const LOOK_AHEAD: u32 = 4;

/// One identity of a seed.
#[derive(Clone)]
pub(crate) struct Pair {
    pub node: SigningKey,
    pub nostr: Keypair,
}

impl Pair {
    pub(crate) fn of(seed: &Seed, index: u32) -> anyhow::Result<Pair> {
        let nostr = Keypair::from_seckey_slice(SECP256K1, seed.nostr(index).as_ref())?;
        Ok(Pair { node: seed.identity(index), nostr })
    }
    pub(crate) fn node_key(&self) -> NodeKey {
        node_key(&self.node)
    }
    pub(crate) fn nostr_key(&self) -> NostrKey {
        nostr_key(&self.nostr)
    }
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    version: u32,
    index: u32,
    /// Successions in hex: from each key to the next; and a revocation at the end, if there is one.
    given_up: Vec<String>,
}

/// Where the seed's identities stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub index: u32,
    pub given_up: Vec<SignedSuccession>,
}

impl Standing {
    /// What the folder says, held against the seed.
    pub(crate) fn read(dir: &Path, seed: &Seed) -> anyhow::Result<Option<Standing>> {
        let path = dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let wrong = || format!("{} is not of this seed, or not what this version wrote", path.display());
        let kept: Kept = serde_json::from_str(&text).with_context(wrong)?;
        ensure!(kept.version == VERSION && kept.index < MAX_IDENTITIES, wrong());
        let given_up = kept.given_up.iter().map(|text| SignedSuccession::from_hex(text));
        let standing =
            Standing { index: kept.index, given_up: given_up.collect::<Result<_, _>>().with_context(wrong)? };
        standing.check(seed).with_context(wrong)?;
        Ok(Some(standing))
    }

    fn first() -> Standing {
        Standing { index: 0, given_up: Vec::new() }
    }

    fn save(&self, dir: &Path) -> anyhow::Result<()> {
        let given_up = self.given_up.iter().map(SignedSuccession::to_hex).collect();
        let kept = Kept { version: VERSION, index: self.index, given_up };
        let path = dir.join(FILE);
        write(&path, &serde_json::to_string_pretty(&kept)?).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Each key names the next one of the seed, and the newest names none, or nobody.
    fn check(&self, seed: &Seed) -> anyhow::Result<()> {
        let key = |index: u32| node_key(&seed.identity(index));
        for (n, signed) in (0..).zip(&self.given_up) {
            let said = signed.verify()?;
            let next = (n < self.index).then(|| key(n + 1));
            ensure!(said.old == key(n) && said.new == next && n <= self.index, "a succession that does not follow");
        }
        ensure!(self.given_up.len() >= self.index as usize, "a succession is missing");
        Ok(())
    }

    /// The newest key signed that nobody comes after it.
    pub(crate) fn revoked(&self) -> Option<Succession> {
        self.given_up.get(self.index as usize).and_then(|signed| signed.peek().ok())
    }

    /// Takes over what relays tell of this seed's own keys beyond the known ones.
    fn follow(&mut self, seed: &Seed, told: &[SignedSuccession]) -> bool {
        let before = self.clone();
        while self.given_up.len() == self.index as usize && self.index + 1 < MAX_IDENTITIES {
            let mut next = self.clone();
            let found = told.iter().find(|signed| {
                next = self.clone();
                next.given_up.push((*signed).clone());
                next.index += u32::from(signed.heir().is_some());
                next.check(seed).is_ok()
            });
            if found.is_none() {
                break;
            }
            *self = next;
        }
        *self != before
    }

    /// The events that tell of it, each by the newest Nostr key that it names.
    pub(crate) fn events(&self, seed: &Seed) -> anyhow::Result<Vec<NostrEvent>> {
        (0..)
            .zip(&self.given_up)
            .map(|(n, signed)| {
                let said = signed.verify()?;
                let by = if said.new.is_some() { n + 1 } else { n };
                Ok(signed.event(&Pair::of(seed, by)?.nostr, &said, &[0; 32]))
            })
            .collect()
    }
}

/// The standing of this node: from its folder, else from what relays have of this seed, else the first.
pub(crate) async fn standing(config: &Config, seed: &Seed) -> anyhow::Result<Standing> {
    if let Some(known) = Standing::read(&config.node.dir, seed)? {
        return Ok(known);
    }
    let mut standing = Standing::first();
    let relays = &config.market.relays;
    if relays.is_empty() {
        // Not written down: relays that are configured later may know better.
        return Ok(standing);
    }
    // Each look finds at most so many keys more.
    loop {
        let ahead = standing.index..(standing.index + LOOK_AHEAD).min(MAX_IDENTITIES);
        let authors = ahead.map(|index| Ok(Pair::of(seed, index)?.nostr_key())).collect::<anyhow::Result<Vec<_>>>()?;
        let told = match succession::ask(&RelayConfig::new(relays.clone()), &authors, RELAYS_WITHIN).await {
            Ok(told) => told,
            Err(error) => {
                tracing::warn!(%error, "relays were not asked whether this node's key was rotated");
                return Ok(standing);
            }
        };
        let told: Vec<SignedSuccession> = told.into_iter().map(|(signed, _)| signed).collect();
        if !standing.follow(seed, &told) {
            break;
        }
    }
    if standing != Standing::first() {
        tracing::info!(index = standing.index, "relays know of a newer identity of this seed; it is taken up");
    }
    standing.save(&config.node.dir)?;
    Ok(standing)
}

/// Makes the seed's next identity this node's. Returns the statement.
pub(crate) fn rotate(dir: &Path, seed: &Seed, standing: &mut Standing, at: UnixMs, why: GivenUp) -> anyhow::Result<()> {
    if let Some(said) = standing.revoked() {
        return Err(anyhow::anyhow!("this key was revoked ({}); nobody can come after it", said.why.name()))
            .hint("a node that is to go on needs new words: satgrid init in another folder");
    }
    ensure!(standing.index + 1 < MAX_IDENTITIES, "{MAX_IDENTITIES} identities are all that a seed gives");
    let (old, new) = (Pair::of(seed, standing.index)?, Pair::of(seed, standing.index + 1)?);
    let named = |pair: &Pair| pair.nostr_key();
    standing.given_up.push(SignedSuccession::rotate((&old.node, named(&old)), (&new.node, named(&new)), at, why));
    standing.index += 1;
    standing.check(seed)?;
    standing.save(dir)
}

/// Ends the newest identity without another.
pub(crate) fn revoke(dir: &Path, seed: &Seed, standing: &mut Standing, at: UnixMs, why: GivenUp) -> anyhow::Result<()> {
    if let Some(said) = standing.revoked() {
        bail!("this key was revoked already ({})", said.why.name());
    }
    let old = Pair::of(seed, standing.index)?;
    standing.given_up.push(SignedSuccession::revoke((&old.node, old.nostr_key()), at, why));
    standing.check(seed)?;
    standing.save(dir)
}

/// The successions that a journal lacks, which this key began and which holds so many already.
pub(crate) fn unwritten(
    seed: &Seed,
    standing: &Standing,
    genesis: NodeKey,
    written: usize,
) -> anyhow::Result<Vec<SignedSuccession>> {
    let began = (0..=standing.index).find(|index| node_key(&seed.identity(*index)) == genesis);
    let began = began.with_context(|| format!("the ledger is of {genesis}, which is no identity of this seed"));
    let began = began.hint("the words, node.dir and ledger.path have to be of one node")?;
    Ok(standing.given_up.iter().skip(began as usize + written).cloned().collect())
}

/// Tells relays of the keys that were given up, until every one has heard it once.
pub(crate) async fn tell(relays: Vec<String>, events: Vec<NostrEvent>, every: Duration) {
    let mut missing: BTreeSet<String> = relays.into_iter().collect();
    while !events.is_empty() && !missing.is_empty() {
        let config = RelayConfig::new(missing.iter().cloned().collect());
        match succession::tell(&config, &events, RELAYS_WITHIN).await {
            Ok(told) if told.missed.is_empty() => return,
            Ok(told) => {
                let still = |url: &String| told.missed.iter().any(|(missed, _)| same(missed, url));
                missing.retain(still);
            }
            Err(error) => return tracing::warn!(%error, "relays were not told which key was given up"),
        }
        tokio::time::sleep(every).await;
    }
}

/// Whether two texts name one relay: a client adds a slash.
fn same(one: &str, other: &str) -> bool {
    one.trim_end_matches('/') == other.trim_end_matches('/')
}

/// Where the file is.
pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_wallet::keys::Phrase;

    fn seed(n: u8) -> Seed {
        Phrase::from_entropy(&[n; 16]).unwrap().seed()
    }

    #[test]
    fn words_and_what_relays_have_give_the_newest_key() {
        let dir = tempfile::tempdir().unwrap();
        let (seed, mut kept) = (seed(1), Standing::first());
        assert_eq!(Standing::read(dir.path(), &seed).unwrap(), None);
        for n in 1..4 {
            rotate(dir.path(), &seed, &mut kept, UnixMs(n), GivenUp::Routine).unwrap();
        }
        assert_eq!(Standing::read(dir.path(), &seed).unwrap().unwrap(), kept);
        assert_eq!(kept.index, 3);
        let mut told = kept.given_up.clone();
        told.reverse();
        let mut restored = Standing::first();
        assert!(restored.follow(&seed, &told) && restored == kept);
        assert!(!restored.follow(&seed, &told));
        // Somebody else's rotations, and one that skips a key, lead nowhere.
        let mut other = Standing::first();
        assert!(!other.follow(&self::seed(2), &told) && !other.follow(&seed, &told[..1]));
        let error = Standing::read(dir.path(), &self::seed(2)).unwrap_err();
        assert!(error.to_string().contains("not of this seed"), "{error}");
    }

    #[test]
    fn a_revoked_key_has_no_heir() {
        let dir = tempfile::tempdir().unwrap();
        let (seed, mut kept) = (seed(1), Standing::first());
        rotate(dir.path(), &seed, &mut kept, UnixMs(1), GivenUp::Stolen).unwrap();
        revoke(dir.path(), &seed, &mut kept, UnixMs(2), GivenUp::Ended).unwrap();
        assert_eq!((kept.index, kept.revoked().unwrap().why), (1, GivenUp::Ended));
        assert_eq!(Standing::read(dir.path(), &seed).unwrap().unwrap(), kept);
        assert!(rotate(dir.path(), &seed, &mut kept, UnixMs(3), GivenUp::Routine).is_err());
        assert!(revoke(dir.path(), &seed, &mut kept, UnixMs(3), GivenUp::Ended).is_err());
        let mut restored = Standing::first();
        assert!(restored.follow(&seed, &kept.given_up) && restored == kept);
        assert_eq!(kept.events(&seed).unwrap().len(), 2);
    }

    #[test]
    fn a_journal_is_told_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let (seed, mut kept) = (seed(1), Standing::first());
        let lacks = |kept: &Standing, n, written| {
            unwritten(&seed, kept, node_key(&seed.identity(n)), written).map(|all| all.len()).map_err(drop)
        };
        assert_eq!(lacks(&kept, 0, 0), Ok(0));
        rotate(dir.path(), &seed, &mut kept, UnixMs(1), GivenUp::Routine).unwrap();
        rotate(dir.path(), &seed, &mut kept, UnixMs(2), GivenUp::Routine).unwrap();
        assert_eq!((lacks(&kept, 0, 0), lacks(&kept, 0, 1), lacks(&kept, 0, 2)), (Ok(2), Ok(1), Ok(0)));
        assert_eq!((lacks(&kept, 1, 0), lacks(&kept, 2, 0), lacks(&kept, 3, 0)), (Ok(1), Ok(0), Err(())));
    }
}
