//! Who holds which expert, and who evaluates what of a step.
//!
//! A map is made from claims, each checked against the model's own hashes: a host whose pack has other weights under the
//! same number is named and left out. An expert may have several holders; then the rows of a step go to the one
//! that would have them done first by its measured [`Pace`], the busiest expert first, and among those alike to the one that
//! was given the least so far. Hosts that stand by get rows only where nobody else holds the expert. All rows of one expert in
//! one step go to one host.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use satgrid_types::{ExpertSet, LayerRange};

use super::manifest::Manifest;

/// Names a host within one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub u32);

/// The experts that a host says it holds, with the hash of each one's weights ([`Manifest::expert_hash`]).
pub type Claims = BTreeMap<(u32, u32), [u8; 32]>;

/// How fast a host answers, as measured: one call takes `call_ns` and `row_ns` for each of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    pub call_ns: u64,
    pub row_ns: u64,
}

impl Default for Pace {
    /// Of a host that nobody has measured: a machine in the same city.
    fn default() -> Self {
        Self { call_ns: 1_000_000, row_ns: 50_000 }
    }
}

/// Hosts that are done within a part of so many of the first one's time count as equally fast.
const ALIKE: u64 = 16;
/// Rows given are halved beyond this, for all hosts: what was long ago does not count for ever.
const GIVEN_MOST: u64 = 1 << 20;

/// Why a host's claims are not taken, or a group cannot begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The host's.
    #[error("{host} holds other weights than the model's as expert {expert} of layer {layer}")]
    OtherWeights { host: String, layer: u32, expert: u32 },
    /// The host's.
    #[error("{host} claims expert {expert} of layer {layer}, which the model does not have")]
    NoSuchExpert { host: String, layer: u32, expert: u32 },
    /// Nobody's: find more hosts, or hold them yourself.
    #[error("nobody holds {}", list(.experts))]
    Missing { experts: ExpertSet },
}

/// `layer 0: 1, 3-5; layer 2: 0`.
pub fn list(experts: &ExpertSet) -> String {
    let mut layers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for &(layer, expert) in experts.pairs() {
        layers.entry(layer).or_default().push(expert);
    }
    let mut out = String::new();
    for (layer, experts) in layers {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for expert in experts {
            match runs.last_mut() {
                Some((_, end)) if *end + 1 == expert => *end = expert,
                _ => runs.push((expert, expert)),
            }
        }
        let runs: Vec<String> = runs
            .into_iter()
            .map(|(from, to)| if from == to { from.to_string() } else { format!("{from}-{to}") })
            .collect();
        let gap = if out.is_empty() { "" } else { "; " };
        // Writing to a string does not fail.
        let _ = write!(out, "{gap}layer {layer}: {}", runs.join(", "));
    }
    out
}

/// Reads `0: 1, 3-5; 2: *` or `*: 0-3`: of which layers, which experts. A star stands for all of the model's.
pub fn parse(text: &str, layers: u32, experts: u32) -> Result<ExpertSet, String> {
    let numbers = |text: &str, most: u32, what: &str| -> Result<Vec<u32>, String> {
        let mut out = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (from, to) = match part.split_once('-') {
                _ if part == "*" => ("0".to_owned(), most.saturating_sub(1).to_string()),
                Some((from, to)) => (from.trim().to_owned(), to.trim().to_owned()),
                None => (part.to_owned(), part.to_owned()),
            };
            let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{part:?} is no {what}"));
            let (from, to) = (number(&from)?, number(&to)?);
            if from > to || to >= most {
                return Err(format!("{what} {part}: the model has 0 to {}", most.saturating_sub(1)));
            }
            out.extend(from..=to);
        }
        Ok(out)
    };
    let mut pairs = Vec::new();
    for part in text.split(';') {
        let (at, which) = part.split_once(':').ok_or_else(|| format!("{part:?} is not LAYERS:EXPERTS"))?;
        let which = numbers(which, experts, "expert")?;
        for layer in numbers(at.trim(), layers, "layer")? {
            pairs.extend(which.iter().map(|expert| (layer, *expert)));
        }
    }
    Ok(ExpertSet::new(pairs))
}

/// Deals all experts of a model over packs, those of each layer evenly, shifted from layer to layer.
pub fn deal(layers: u32, experts: u32, packs: u32) -> Vec<ExpertSet> {
    let packs = packs.max(1);
    let of = |pack: u32| {
        let layer =
            move |layer: u32| (0..experts).filter(move |e| (e + layer) % packs == pack).map(move |e| (layer, e));
        ExpertSet::new((0..layers).flat_map(layer))
    };
    (0..packs).map(of).collect()
}

/// The claims that a holder of these experts of this model can make.
pub fn claims(manifest: &Manifest, set: &ExpertSet) -> Claims {
    let hash = |&(layer, expert): &(u32, u32)| Some(((layer, expert), manifest.expert_hash(layer, expert)?));
    set.pairs().iter().filter_map(hash).collect()
}

/// The holders of every expert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpertMap {
    holders: BTreeMap<(u32, u32), Vec<HostId>>,
    paces: BTreeMap<HostId, Pace>,
    /// Rows that each host was given.
    given: BTreeMap<HostId, u64>,
    /// Hosts that get rows only where nobody else holds the expert.
    standby: BTreeSet<HostId>,
}

impl ExpertMap {
    /// Takes a host's claims in, all of them or none.
    pub fn admit(&mut self, manifest: &Manifest, id: HostId, host: &str, claims: &Claims) -> Result<(), MapError> {
        for (&(layer, expert), hash) in claims {
            let host = || host.to_owned();
            match manifest.expert_hash(layer, expert).filter(|_| expert < manifest.experts) {
                None => return Err(MapError::NoSuchExpert { host: host(), layer, expert }),
                Some(own) if own != *hash => return Err(MapError::OtherWeights { host: host(), layer, expert }),
                Some(_) => {}
            }
        }
        for &place in claims.keys() {
            let holders = self.holders.entry(place).or_default();
            if !holders.contains(&id) {
                holders.push(id);
            }
        }
        Ok(())
    }

    /// A host that is gone holds nothing.
    pub fn dismiss(&mut self, id: HostId) {
        for holders in self.holders.values_mut() {
            holders.retain(|holder| *holder != id);
        }
        self.paces.remove(&id);
        self.given.remove(&id);
        self.standby.remove(&id);
    }

    /// How fast a host was found to be.
    pub fn set_pace(&mut self, id: HostId, pace: Pace) {
        self.paces.insert(id, pace);
    }

    /// Whether a host serves, or only stands by.
    pub fn set_standby(&mut self, id: HostId, standby: bool) {
        if standby {
            self.standby.insert(id);
        } else {
            self.standby.remove(&id);
        }
    }

    /// A host was given rows.
    pub fn gave(&mut self, id: HostId, rows: u64) {
        let given = self.given.entry(id).or_default();
        *given = given.saturating_add(rows);
        if *given > GIVEN_MOST {
            self.given.values_mut().for_each(|rows| *rows /= 2);
        }
    }

    pub fn holders(&self, layer: u32, expert: u32) -> &[HostId] {
        self.holders.get(&(layer, expert)).map(Vec::as_slice).unwrap_or_default()
    }

    /// The experts of these layers (or of all) that nobody holds.
    pub fn missing(&self, manifest: &Manifest, layers: Option<LayerRange>) -> ExpertSet {
        ExpertSet::new(manifest.of_layers(layers).filter(|&(layer, expert)| self.holders(layer, expert).is_empty()))
    }

    /// Refuses to begin while nobody holds some expert of these layers, or of all.
    pub fn complete(&self, manifest: &Manifest, layers: Option<LayerRange>) -> Result<(), MapError> {
        let experts = self.missing(manifest, layers);
        if experts.pairs().is_empty() { Ok(()) } else { Err(MapError::Missing { experts }) }
    }

    /// The host for each expert of a step at a layer, given each expert's rows; the experts without one are the error.
    pub fn assign(&self, layer: u32, rows: &BTreeMap<u32, u64>) -> Result<BTreeMap<u32, HostId>, Vec<u32>> {
        let mut busiest: Vec<(u32, u64)> = rows.iter().map(|(expert, rows)| (*expert, *rows)).collect();
        busiest.sort_by_key(|&(expert, rows)| (std::cmp::Reverse(rows), expert));
        let mut load: BTreeMap<HostId, u64> = BTreeMap::new();
        let (mut chosen, mut missing) = (BTreeMap::new(), BTreeSet::new());
        for (expert, rows) in busiest {
            match self.next(self.holders(layer, expert), &load, rows) {
                Some(host) => {
                    *load.entry(host).or_default() += rows;
                    chosen.insert(expert, host);
                }
                None => {
                    missing.insert(expert);
                }
            }
        }
        if missing.is_empty() { Ok(chosen) } else { Err(missing.into_iter().collect()) }
    }

    /// Who of an expert's holders gets so many rows more, where each has this load of the step already.
    fn next(&self, holders: &[HostId], load: &BTreeMap<HostId, u64>, rows: u64) -> Option<HostId> {
        let serving = holders.iter().any(|host| !self.standby.contains(host));
        let candidates = holders.iter().filter(|host| !serving || !self.standby.contains(host));
        let done = |host: &HostId| {
            let pace = self.paces.get(host).copied().unwrap_or_default();
            let all = load.get(host).copied().unwrap_or(0).saturating_add(rows);
            pace.call_ns.saturating_add(pace.row_ns.saturating_mul(all))
        };
        let first = candidates.clone().map(done).min()?;
        let alike = candidates.filter(|host| done(host) <= first.saturating_add(first / ALIKE));
        alike.min_by_key(|host| (self.given.get(host).copied().unwrap_or(0), **host)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_listed_in_runs() {
        let check = |pairs: &[(u32, u32)], expect: &str| assert_eq!(list(&ExpertSet::new(pairs.to_vec())), expect);
        check(&[], "");
        check(&[(0, 4)], "layer 0: 4");
        check(&[(0, 1), (0, 2), (0, 3), (0, 5), (2, 0), (2, 1)], "layer 0: 1-3, 5; layer 2: 0-1");
    }

    #[test]
    fn sets_are_read_as_they_are_listed() {
        let check = |text: &str, expect: &str| match parse(text, 3, 4) {
            Ok(set) => assert_eq!(list(&set), expect, "{text}"),
            Err(error) => assert!(!expect.is_empty() && error.contains(expect), "{text}: {error}"),
        };
        check("0: 1", "layer 0: 1");
        check("*:0", "layer 0: 0; layer 1: 0; layer 2: 0");
        check("0-1: 1-2, 3; 2: *", "layer 0: 1-3; layer 1: 1-3; layer 2: 0-3");
        check("3: 0", "the model has 0 to 2");
        check("0: 2-1", "expert 2-1");
        check("0: x", "is no expert");
        check("0", "is not LAYERS:EXPERTS");
    }

    #[test]
    fn experts_are_dealt_once_each() {
        let sets = deal(3, 8, 3);
        let all: Vec<_> = sets.iter().flat_map(|set| set.pairs().to_vec()).collect();
        assert_eq!((all.len(), ExpertSet::new(all).pairs().len()), (24, 24));
        assert!(sets.iter().all(|set| set.pairs().len() == 8));
    }

    #[test]
    fn rows_go_to_the_least_laden_holder() {
        let mut map = ExpertMap::default();
        for (expert, hosts) in [(0, [0, 1]), (1, [0, 1]), (2, [1, 1])] {
            let holders = hosts.iter().map(|host| HostId(*host)).collect::<BTreeSet<_>>();
            map.holders.insert((0, expert), holders.into_iter().collect());
        }
        let assign = |map: &ExpertMap, rows: &[(u32, u64)]| {
            map.assign(0, &rows.iter().copied().collect()).map(|chosen| chosen.into_values().map(|h| h.0).collect())
        };
        assert_eq!(assign(&map, &[(0, 3), (1, 2), (2, 1)]), Ok(vec![0, 1, 1]));
        assert_eq!(assign(&map, &[(0, 1), (1, 1), (2, 5)]), Ok(vec![0, 0, 1]));
        map.dismiss(HostId(1));
        assert_eq!(assign(&map, &[(0, 3), (1, 2)]), Ok(vec![0, 0]));
        assert_eq!(assign(&map, &[(0, 3), (2, 2), (7, 1)]), Err::<Vec<u32>, _>(vec![2, 7]));
    }

    #[test]
    fn replicas_share_by_pace_and_by_what_they_were_given() {
        let mut map = ExpertMap::default();
        for expert in 0..2 {
            map.holders.insert((0, expert), vec![HostId(0), HostId(1)]);
        }
        map.holders.insert((0, 2), vec![HostId(0), HostId(1), HostId(2)]);
        map.holders.insert((0, 3), vec![HostId(2)]);
        let one = |map: &ExpertMap, expert: u32| map.assign(0, &BTreeMap::from([(expert, 1)])).unwrap()[&expert].0;
        // Alike: whoever was given less.
        assert_eq!(one(&map, 0), 0);
        map.gave(HostId(0), 1);
        assert_eq!(one(&map, 0), 1);
        map.gave(HostId(1), 2);
        assert_eq!(one(&map, 0), 0);
        // A far host gets rows only once the near one has so many that it would be done later.
        map.set_pace(HostId(1), Pace { call_ns: 5_000_000, row_ns: 50_000 });
        assert_eq!(one(&map, 0), 0);
        let both = map.assign(0, &BTreeMap::from([(0, 200), (1, 200)])).unwrap();
        assert_eq!((both[&0], both[&1]), (HostId(0), HostId(1)));
        // Who stands by serves where nobody else does.
        map.set_standby(HostId(2), true);
        assert_eq!((one(&map, 2), one(&map, 3)), (0, 2));
        map.dismiss(HostId(0));
        map.dismiss(HostId(1));
        assert_eq!(one(&map, 2), 2);
    }
}
