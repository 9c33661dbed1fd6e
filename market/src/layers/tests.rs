//! Plans over signed listings: time, price, links, memory, measured pace, and a reason for whoever is left out.

use super::*;
use crate::book::BookLimits;
use crate::testing::{Offer, now};

/// Offers of layers: provider, first, end, decode speed, price.
type Row = (u32, u32, u32, u64, u64);

fn book(rows: &[Row]) -> Book {
    let mut book = Book::new(BookLimits::default());
    for (provider, from, to, decode_mtok_s, price) in rows {
        let part = Part::Layers(LayerRange::new(*from, *to).unwrap());
        let offer = Offer { part, decode_mtok_s: *decode_mtok_s, layer_price: Some(*price), ..Offer::new(*provider) };
        book.apply(now(), offer.verified()).unwrap();
    }
    book
}
fn demand() -> LayerDemand {
    let (root, range) = (Offer::new(1).root(), LayerRange::new(2, 10).unwrap());
    let (not, profile, ends) = (BTreeSet::new(), EngineProfile::Exact, (NodeKey([9; 32]), NodeKey([9; 32])));
    LayerDemand {
        root,
        range,
        ends,
        not,
        profile,
        build: None,
        max_rate: None,
        slots: 1,
        context: 1,
        needs: LayerNeeds::default(),
    }
}
#[track_caller]
fn check(rows: &[Row], bend: impl Fn(&mut LayerDemand), expect: Result<&[(u32, u32, u32)], &str>) {
    let mut demand = demand();
    bend(&mut demand);
    let given = plan_layers(now(), &book(rows), &demand, &Known::default()).map(|plan| plan.stages);
    match (given, expect) {
        (Ok(plan), Ok(want)) => {
            let got: Vec<(NodeKey, u32, u32)> =
                plan.iter().map(|p| (p.listing.node_key, p.range.start(), p.range.end())).collect();
            let want: Vec<(NodeKey, u32, u32)> = want.iter().map(|(p, a, b)| (Offer::new(*p).node(), *a, *b)).collect();
            assert_eq!(got, want);
        }
        (Err(why), Err(text)) => assert!(why.to_string().contains(text), "{why}"),
        (got, want) => panic!("{got:?}, wanted {want:?}"),
    }
}

#[test]
fn layers_are_cut_by_speed_and_price() {
    let three = [(1, 2, 5, 100_000, 10), (2, 5, 8, 100_000, 10), (3, 8, 10, 100_000, 10)];
    check(&three, |_| (), Ok(&[(1, 2, 5), (2, 5, 8), (3, 8, 10)]));
    let one = [three[0], three[1], three[2], (4, 2, 10, 40_000, 90)];
    check(&one, |_| (), Ok(&[(4, 2, 10)]));
    // Slower than three machines with their hops.
    check(&[three[0], three[1], three[2], (4, 2, 10, 20_000, 90)], |_| (), Ok(&[(1, 2, 5), (2, 5, 8), (3, 8, 10)]));
    // Equally fast: the cheaper.
    check(&[(1, 2, 10, 50_000, 20), (2, 2, 10, 50_000, 19)], |_| (), Ok(&[(2, 2, 10)]));
}

#[test]
fn links_are_part_of_the_time() {
    let node = |provider: u32| Offer::new(provider).node();
    let lead = demand().ends.0;
    // Two sellers of each half, equally fast: those who are near each other and the lead.
    let rows = [(1, 2, 6, 100_000, 10), (2, 2, 6, 100_000, 9), (3, 6, 10, 100_000, 10), (4, 6, 10, 100_000, 9)];
    let mut links = Links::default();
    for (a, b, rtt_us) in [
        (lead, node(1), 4_000),
        (lead, node(2), 4_000),
        (lead, node(3), 4_000),
        (lead, node(4), 4_000),
        (node(1), node(3), 1_000),
        (node(1), node(4), 60_000),
        (node(2), node(3), 60_000),
        (node(2), node(4), 60_000),
    ] {
        links.measured(a, b, rtt_us);
    }
    let book = book(&rows);
    let (plan, considered) =
        explain_layers(now(), &book, &demand(), &Known { links: links.clone(), ..Known::default() });
    let plan = plan.unwrap();
    let who: Vec<NodeKey> = plan.stages.iter().map(|stage| stage.listing.node_key).collect();
    assert_eq!(who, [node(1), node(3)]);
    assert_eq!(plan.hops().map(Hop::us).collect::<Vec<_>>(), [2_000, 500, 2_000]);
    assert_eq!(plan.token_us(), 24_500);
    // Whoever is left out is told by how much, and by which link.
    let verdict = |who: u32| considered.iter().find(|one| one.listing.node_key == node(who)).unwrap().verdict;
    // Both halves beside it are equally far: the cheaper.
    let far = links.hop(&node(2), &node(4));
    let slow = LayerVerdict::TooSlow { with_us: 54_000, plan_us: 24_500, slowest: Slowest::Link(far) };
    assert_eq!(verdict(2), slow);
    // Without figures every hop is the same, and the price decides.
    let blind = plan_layers(now(), &book, &demand(), &Known::default()).unwrap();
    let who: Vec<NodeKey> = blind.stages.iter().map(|stage| stage.listing.node_key).collect();
    assert_eq!(who, [node(2), node(4)]);
    // Beside its neighbours a replacement is chosen by its links to them.
    let half = LayerDemand { range: LayerRange::new(6, 10).unwrap(), ends: (node(2), lead), ..demand() };
    links.measured(node(2), node(4), 900);
    assert_eq!(
        plan_layers(now(), &book, &half, &Known { links: links.clone(), ..Known::default() }).unwrap().stages[0]
            .listing
            .node_key,
        node(4)
    );
}

#[test]
fn every_listing_has_its_verdict() {
    let book = book(&[(1, 2, 6, 100_000, 10), (2, 6, 10, 100_000, 10), (3, 6, 10, 100_000, 90), (4, 6, 10, 9_000, 20)]);
    let demand = LayerDemand { max_rate: Some(MsatPerMtok(50)), ..demand() };
    let (plan, considered) = explain_layers(now(), &book, &demand, &Known::default());
    assert_eq!(plan.unwrap().stages.len(), 2);
    let told: Vec<(NodeKey, LayerVerdict)> = considered.iter().map(|c| (c.listing.node_key, c.verdict)).collect();
    let slow = Slowest::Layers(111_111);
    for (provider, verdict) in [
        (1, LayerVerdict::Planned { place: 1 }),
        (2, LayerVerdict::Planned { place: 2 }),
        (3, LayerVerdict::Refused("too dear")),
        (4, LayerVerdict::TooSlow { with_us: 127_111, plan_us: 26_000, slowest: slow }),
    ] {
        assert!(told.contains(&(Offer::new(provider).node(), verdict)), "{provider}: {told:?}");
    }
    let demand = LayerDemand { slots: u32::MAX, ..demand };
    let (none, considered) = explain_layers(now(), &book, &demand, &Known::default());
    assert!(none.unwrap_err().to_string().contains("too small"), "nobody holds so many");
    assert!(considered.iter().all(|c| matches!(c.verdict, LayerVerdict::Refused(_))));
}

#[test]
fn what_is_missing_is_named() {
    check(&[], |_| (), Err("nobody lists layers"));
    check(&[(1, 2, 5, 1_000, 1), (2, 6, 10, 1_000, 1)], |_| (), Err("layers 5 to 10 are sold by nobody"));
    check(&[(1, 2, 10, 1_000, 50)], |d| d.max_rate = Some(MsatPerMtok(49)), Err("1 too dear"));
    check(&[(1, 0, 10, 1_000, 50)], |_| (), Err("1 beyond the layers"));
    check(&[(1, 2, 10, 1_000, 50)], |d| d.not = BTreeSet::from([Offer::new(1).node()]), Err("1 left out"));
    let other = Some((BuildId([9; 32]), "avx2".to_owned()));
    check(&[(1, 2, 10, 1_000, 50)], |d| d.build = other.clone(), Err("1 another engine build"));
    check(&[(1, 2, 10, 1_000, 50)], |d| d.profile = EngineProfile::Fast, Err("1 another profile"));
    // Two parts of one node are two hops to one machine: it sells them as one.
    check(&[(1, 2, 5, 1_000, 1), (1, 5, 10, 1_000, 1)], |_| (), Err("layers 5 to 10"));
}

#[test]
fn whoever_lacks_the_memory_is_left_out() {
    let mut book = Book::new(BookLimits::default());
    // Weights of 8 layers of 10 MB, and a cache of 2 sequences of 100 positions of 50 kB in each layer: 160 MB.
    let needs = LayerNeeds { weights: vec![10_000_000; 12], position: 50_000 };
    for (provider, memory_bytes, price) in [(1, 159_999_999, 1), (2, 160_000_000, 9)] {
        let part = Part::Layers(LayerRange::new(2, 10).unwrap());
        let offer = Offer { part, memory_bytes, layer_price: Some(price), ..Offer::new(provider) };
        book.apply(now(), offer.verified()).unwrap();
    }
    let demand = LayerDemand { slots: 2, context: 100, needs, ..demand() };
    let (plan, considered) = explain_layers(now(), &book, &demand, &Known::default());
    assert_eq!(plan.unwrap().stages[0].listing.node_key, Offer::new(2).node(), "the cheaper one cannot hold them");
    let small = considered.iter().find(|one| one.listing.node_key == Offer::new(1).node()).unwrap();
    assert_eq!(small.verdict, LayerVerdict::Refused(TOO_LITTLE_MEMORY));
    assert_eq!(small.needs_bytes, 160_000_000);
    // Where no context is named, what the listing itself promises is what it must hold.
    let longer = LayerDemand { context: 0, ..demand };
    let why = plan_layers(now(), &book, &longer, &Known::default()).unwrap_err();
    assert!(why.to_string().contains("2 too small: less memory"), "{why}");
}

#[test]
fn measured_pace_counts_and_not_the_listed_one() {
    // The first lists a tenth of what it takes.
    let book = book(&[(1, 2, 10, 1_000_000, 10), (2, 2, 10, 100_000, 10)]);
    let range = LayerRange::new(2, 10).unwrap();
    let mut known = Known::default();
    let first = |known: &Known| plan_layers(now(), &book, &demand(), known).map(|plan| plan.stages[0].clone());
    assert_eq!(first(&known).unwrap().listing.node_key, Offer::new(1).node());
    for lies in 1..=3 {
        known.paces.measured(now(), Offer::new(1).node(), &range, 1_000, 30_000);
        assert_eq!(first(&known).unwrap().listing.node_key, Offer::new(2).node());
        let (_, considered) = explain_layers(now(), &book, &demand(), &known);
        let liar = considered.iter().find(|one| one.listing.node_key == Offer::new(1).node()).unwrap();
        assert_eq!((liar.listed_us, liar.compute_us, liar.pace.unwrap().lies), (1_000, 30_000, lies));
        match liar.verdict {
            LayerVerdict::TooSlow { slowest, .. } => assert_eq!((lies < 3, slowest), (true, Slowest::Layers(30_000))),
            LayerVerdict::Refused(why) => assert_eq!((lies, why), (3, OVERSTATED)),
            LayerVerdict::Planned { .. } | LayerVerdict::Spare => panic!("{liar:?}"),
        }
    }
    // Also where nobody else sells these layers: better none than one that is known to lie.
    let alone = LayerDemand { not: BTreeSet::from([Offer::new(2).node()]), ..demand() };
    let why = plan_layers(now(), &book, &alone, &known).unwrap_err().to_string();
    assert!(why.contains("1 lists a speed that it was measured not to have"), "{why}");
    // An honest one is ranked by what it does, were it better than it says.
    let mut known = Known::default();
    known.paces.measured(now(), Offer::new(2).node(), &range, 10_000, 900);
    assert_eq!(first(&known).unwrap().compute_us, 900);
}
