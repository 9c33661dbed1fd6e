//! Finding who sells the experts of a model.
//!
//! A lead lacks some (layer, expert). Every live listing of experts of that model that fits is of use: an expert with several
//! holders has its rows spread over them, and one of them may be lost. The hash in a listing says which weights are held, so
//! one that holds others under the same root is refused by name before it is paid a single msat.

mod choose;

pub use choose::{Choosing, Role, choose};

use crate::book::Book;
use satgrid_types::{
    BuildId, Digest, ExpertSet, ModelRoot, MsatPerMtok, NodeKey, Part, UnixMs, VerifiedListing, experts_hash,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use thiserror::Error;

/// The weights of a model's experts: a hash for each (layer, expert).
pub type Weights = BTreeMap<(u32, u32), [u8; 32]>;

/// The (layer, expert) that a lead's layers have: all of the model's, or those of a stage.
pub type Wanted = BTreeSet<(u32, u32)>;

/// Which experts are wanted, and of whom.
#[derive(Debug, Clone)]
pub struct ExpertDemand {
    pub root: ModelRoot,
    /// Of the whole model: a seller may hold more than is wanted.
    pub weights: Arc<Weights>,
    pub wanted: Arc<Wanted>,
    /// Nodes that are not asked: the lead itself, and workers that lied.
    pub not: BTreeSet<NodeKey>,
    /// The lead's own engine: only the same build on the same instruction set computes the same bits.
    /// None where it is not known yet.
    pub build: Option<(BuildId, String)>,
    /// The most that a million expert rows may cost.
    pub max_rate: Option<MsatPerMtok>,
}

/// Why some experts are not to be had.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NoExperts {
    #[error("nobody lists experts of this model")]
    NotListed,
    #[error("{} experts are sold by nobody who fits: {}", .missing.pairs().len(), counts(.refused))]
    Missing { missing: ExpertSet, refused: BTreeMap<&'static str, usize> },
}

fn counts(refused: &BTreeMap<&'static str, usize>) -> String {
    if refused.is_empty() {
        return "nobody lists them".into();
    }
    let counts: Vec<String> = refused.iter().map(|(why, count)| format!("{count} {why}")).collect();
    counts.join(", ")
}

/// Why a listing of experts is of no use; `None` where it is.
pub fn refusal(listing: &VerifiedListing, demand: &ExpertDemand) -> Option<&'static str> {
    let Part::Experts(set) = &listing.part else { return Some("not experts") };
    if demand.not.contains(&listing.node_key) {
        return Some("left out (the lead itself, or caught with wrong rows)");
    }
    if set.pairs().iter().any(|place| !demand.weights.contains_key(place)) {
        return Some("experts that the model does not have");
    }
    if !demand.wanted.iter().any(|place| set.contains(place.0, place.1)) {
        return Some("experts of other layers");
    }
    if listing.experts_hash != Some(hash_of(set, &demand.weights)) {
        return Some("other weights than the model's");
    }
    if demand.build.as_ref().is_some_and(|(build, set)| (&listing.build, &listing.instruction_set) != (build, set)) {
        return Some("another engine build or instruction set");
    }
    match (listing.rates.expert_row, demand.max_rate) {
        (None, _) => Some("without a price for experts"),
        (Some(rate), Some(most)) if rate > most => Some("too dear"),
        (Some(_), _) => None,
    }
}

/// What a listing of these experts of a model says of their weights.
pub fn hash_of(set: &ExpertSet, weights: &Weights) -> Digest {
    experts_hash(set.pairs().iter().filter_map(|place| weights.get_key_value(place)))
}

/// Who fits now, cheapest first, one listing of each node; and why the others do not.
pub fn sellers(
    now: UnixMs,
    book: &Book,
    demand: &ExpertDemand,
) -> (Vec<Arc<VerifiedListing>>, BTreeMap<&'static str, usize>) {
    let mut refused: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut found: Vec<Arc<VerifiedListing>> = Vec::new();
    let of_root = book.live(now).filter(|listing| listing.model_root == demand.root);
    for listing in of_root.filter(|listing| matches!(listing.part, Part::Experts(_))) {
        match refusal(listing, demand) {
            Some(why) => *refused.entry(why).or_default() += 1,
            None => found.push(Arc::clone(listing)),
        }
    }
    found.sort_by_key(|listing| (listing.rates.expert_row, listing.node_key, listing.id()));
    (found, refused)
}

/// What is lacking where these sellers are all there are, beside what the lead holds itself.
pub fn complete(
    demand: &ExpertDemand,
    own: &BTreeSet<(u32, u32)>,
    sellers: &[Arc<VerifiedListing>],
    refused: BTreeMap<&'static str, usize>,
) -> Result<(), NoExperts> {
    let held = |place: &(u32, u32)| {
        own.contains(place)
            || sellers.iter().any(|listing| match &listing.part {
                Part::Experts(set) => set.contains(place.0, place.1),
                Part::Whole | Part::Layers(_) => false,
            })
    };
    let missing = ExpertSet::new(demand.wanted.iter().filter(|place| !held(place)).copied());
    if missing.pairs().is_empty() {
        return Ok(());
    }
    if sellers.is_empty() && refused.is_empty() {
        return Err(NoExperts::NotListed);
    }
    Err(NoExperts::Missing { missing, refused })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::book::BookLimits;
    use crate::testing::{Offer, now};

    fn weights() -> Weights {
        (0..2u32).flat_map(|layer| (0..4u32).map(move |e| ((layer, e), [(layer * 4 + e) as u8; 32]))).collect()
    }
    fn demand() -> ExpertDemand {
        ExpertDemand {
            root: Offer::new(1).root(),
            weights: Arc::new(weights()),
            wanted: Arc::new(weights().into_keys().collect()),
            not: BTreeSet::new(),
            build: Some((BuildId([6; 32]), "avx2".to_owned())),
            max_rate: None,
        }
    }
    /// Provider, held experts, price, and whether its hash is the model's.
    type Row<'a> = (u32, &'a [(u32, u32)], u64, bool);

    /// Who holds which experts at what price; `honest` says whether its hash is the model's.
    fn book(offers: &[Row<'_>]) -> Book {
        let mut book = Book::new(BookLimits::default());
        for (provider, held, price, honest) in offers {
            let set = ExpertSet::new(held.to_vec());
            let mut hashes = weights();
            if !honest {
                hashes.values_mut().for_each(|hash| hash[0] ^= 1);
            }
            let experts = Some(hash_of(&set, &hashes));
            let offer =
                Offer { part: Part::Experts(set), expert_price: Some(*price), experts, ..Offer::new(*provider) };
            book.apply(now(), offer.verified()).unwrap();
        }
        book
    }
    #[track_caller]
    fn check(offers: &[Row<'_>], bend: impl Fn(&mut ExpertDemand), own: &[(u32, u32)], expect: Result<&[u32], &str>) {
        let mut demand = demand();
        bend(&mut demand);
        let (sellers, refused) = sellers(now(), &book(offers), &demand);
        let own: BTreeSet<_> = own.iter().copied().collect();
        match (complete(&demand, &own, &sellers, refused), expect) {
            (Ok(()), Ok(want)) => {
                let got: Vec<NodeKey> = sellers.iter().map(|listing| listing.node_key).collect();
                assert_eq!(got, want.iter().map(|p| Offer::new(*p).node()).collect::<Vec<_>>());
            }
            (Err(why), Err(text)) => assert!(why.to_string().contains(text), "{why}"),
            (got, want) => panic!("{got:?}, wanted {want:?}"),
        }
    }

    const EVEN: &[(u32, u32)] = &[(0, 0), (0, 2), (1, 0), (1, 2)];
    const ODD: &[(u32, u32)] = &[(0, 1), (0, 3), (1, 1), (1, 3)];

    #[test]
    fn whoever_fits_takes_part_cheapest_first() {
        check(&[(1, EVEN, 9, true), (2, ODD, 3, true)], |_| (), &[], Ok(&[2, 1]));
        check(&[(1, EVEN, 9, true), (2, ODD, 3, true), (3, EVEN, 4, true)], |_| (), &[], Ok(&[2, 3, 1]));
        check(&[(1, EVEN, 9, true)], |_| (), ODD, Ok(&[1]));
    }

    #[test]
    fn what_is_missing_and_who_does_not_fit_is_named() {
        check(&[], |_| (), &[], Err("nobody lists experts"));
        check(&[(1, EVEN, 9, true)], |_| (), &[], Err("4 experts are sold by nobody who fits"));
        let both = [(1, EVEN, 9, true), (2, ODD, 30, true)];
        check(&both, |d| d.max_rate = Some(MsatPerMtok(10)), &[], Err("1 too dear"));
        check(&both, |d| d.not = BTreeSet::from([Offer::new(2).node()]), &[], Err("1 left out"));
        let other = Some((BuildId([6; 32]), "avx512".to_owned()));
        check(&both, |d| d.build = other.clone(), &[], Err("2 another engine build"));
        check(&[(1, EVEN, 9, true), (2, ODD, 3, false)], |_| (), &[], Err("1 other weights than the model's"));
        check(
            &[(1, EVEN, 9, true), (2, &[(7, 1)], 3, true)],
            |_| (),
            &[],
            Err("1 experts that the model does not have"),
        );
    }
}
