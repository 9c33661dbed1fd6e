//! Small markets, and who is chosen in them.

use std::collections::BTreeSet;

use proptest::prelude::*;
use satgrid_types::{LayerRange, MsatPerMtok};

use super::*;
use crate::book::BookLimits;
use crate::demand::{MaxPrice, ProviderPattern, Sort};
use crate::reputation::Fault;
use crate::testing::{NOW_S, Offer, now};

fn book(offers: &[Offer]) -> Book {
    let mut book = Book::new(BookLimits::default());
    for offer in offers {
        book.apply(now(), offer.verified()).unwrap();
    }
    book
}

fn demand() -> Demand {
    Demand::new(Wanted::Roots([(Offer::new(1).root(), Offer::tokenizer())].into()), 100, 200)
}

/// Numbers of the providers in the order in which they would be used.
fn order(choice: &Choice, offers: &[Offer]) -> Vec<u32> {
    let plans = core::iter::once(&choice.best).chain(&choice.failover);
    let number = |node: NodeKey| offers.iter().find(|offer| offer.node() == node).map(|offer| offer.provider);
    plans.filter_map(|plan| number(plan.sole()?.listing.node_key)).collect()
}

#[track_caller]
fn check_order(offers: &[Offer], demand: &Demand, reputation: &Reputation, expected: &[u32]) {
    let choice = plan(now(), &book(offers), demand, reputation).unwrap();
    assert_eq!(order(&choice, offers), expected);
}

/// One listing against one demand: refused for this reason, by `plan` and by `explain` alike.
#[track_caller]
fn check_refused(reason: &str, offer: Offer, change: impl FnOnce(&mut Demand)) {
    let mut demand = demand();
    change(&mut demand);
    let book = book(core::slice::from_ref(&offer));
    let explained = explain(now(), &book, &demand, "gemma-3-270m", &Reputation::default());
    match explained.as_slice() {
        [Considered { verdict: Verdict::Refused(why), .. }] => assert_eq!(why.reason(), reason, "{why}"),
        other => panic!("{reason}: {other:?}"),
    }
    assert!(plan(now(), &book, &demand, &Reputation::default()).is_err(), "{reason}");
}

fn three() -> Vec<Offer> {
    vec![
        Offer { output: 3_000_000, decode_mtok_s: 90_000, ..Offer::new(1) },
        Offer { output: 1_000_000, decode_mtok_s: 30_000, ..Offer::new(2) },
        Offer { output: 2_000_000, decode_mtok_s: 60_000, ..Offer::new(3) },
    ]
}

#[test]
fn the_cheapest_wins_unless_another_wish_ranks() {
    let none = Reputation::default();
    check_order(&three(), &demand(), &none, &[2, 3, 1]);
    check_order(&three(), &Demand { sort: Sort::Throughput, ..demand() }, &none, &[1, 3, 2]);
    let first = vec![ProviderPattern::from(three()[2].node())];
    check_order(&three(), &Demand { order: first.clone(), ..demand() }, &none, &[3, 2, 1]);
    check_order(&three(), &Demand { order: first, allow_fallbacks: false, ..demand() }, &none, &[3]);
    let only = vec![ProviderPattern::from(three()[0].node())];
    check_order(&three(), &Demand { only: only.clone(), ..demand() }, &none, &[1]);
    check_order(&three(), &Demand { ignore: only, ..demand() }, &none, &[2, 3]);
    check_order(&three(), &Demand { failed: [three()[1].node()].into(), ..demand() }, &none, &[3, 1]);
}

#[test]
fn a_cached_prompt_can_make_the_dearer_one_cheaper() {
    let offers = vec![Offer { output: 1_000_000, ..Offer::new(1) }, Offer { output: 1_100_000, ..Offer::new(2) }];
    let mut demand = demand();
    check_order(&offers, &demand, &Reputation::default(), &[1, 2]);
    demand.cached.insert(offers[1].node(), 90);
    check_order(&offers, &demand, &Reputation::default(), &[2, 1]);
    let choice = plan(now(), &book(&offers), &demand, &Reputation::default()).unwrap();
    // 10 fresh at 1, 90 cached at a tenth, 200 out at 1.1 msat.
    assert_eq!(choice.best.sole().map(|stage| stage.expected_cost), Some(Msat(10 + 9 + 220)));
}

#[test]
fn our_own_history_counts() {
    let offers = three();
    let mut reputation = Reputation::default();
    // Half a day of bad luck is a thousandth a point: 2 % dearer does not change the order, a lie does.
    reputation.fault(now(), offers[1].node(), Fault::Unreachable);
    check_order(&offers, &demand(), &reputation, &[2, 3, 1]);
    reputation.fault(now(), offers[1].node(), Fault::Overcount);
    check_order(&offers, &demand(), &reputation, &[3, 1]);
    let why = explain(now(), &book(&offers), &demand(), "gemma-3-270m", &reputation);
    let refused = why.iter().find(|c| c.listing.node_key == offers[1].node()).unwrap();
    assert_eq!(refused.verdict, Verdict::Refused(WhyNot::Penalised { points: 10_020 }));

    // A routing fee of 200 % on the second one.
    let mut reputation = Reputation::default();
    reputation.paid_slice(offers[1].node(), Msat(1_000), Msat(2_000));
    check_order(&offers, &demand(), &reputation, &[3, 1, 2]);

    // Between equals, whom we settled more with.
    let equals = vec![Offer::new(1), Offer::new(2)];
    for settled in [1, 2] {
        let mut reputation = Reputation::default();
        reputation.settled(Offer::new(settled).node(), Msat(1), None);
        check_order(&equals, &demand(), &reputation, &[settled, 3 - settled]);
    }
}

#[test]
fn every_refusal_has_its_reason() {
    let one = Offer::new(1);
    check_refused("unknown_root", Offer { model: 9, ..one.clone() }, |_| ());
    check_refused("wrong_tokenizer", one.clone(), |d| {
        d.wanted = Wanted::Roots([(Offer::new(1).root(), satgrid_types::TokenizerHash([9; 32]))].into());
    });
    let layers = Part::Layers(LayerRange::new(0, 9).unwrap());
    check_refused("part_only", Offer { part: layers, ..one.clone() }, |_| ());
    check_refused("no_address", Offer { addresses: vec![], ..one.clone() }, |_| ());
    check_refused("no_slot", Offer { slots: 0, ..one.clone() }, |_| ());
    check_refused("already_failed", one.clone(), |d| d.failed = BTreeSet::from([Offer::new(1).node()]));
    check_refused("ignored", one.clone(), |d| d.ignore = vec![Offer::new(1).node().into()]);
    check_refused("not_allowed", one.clone(), |d| d.only = vec![Offer::new(2).node().into()]);
    check_refused("not_in_order", one.clone(), |d| {
        d.order = vec![Offer::new(2).node().into()];
        d.allow_fallbacks = false;
    });
    check_refused("profile", one.clone(), |d| d.profile = Some(EngineProfile::Fast));
    check_refused("other_engine", Offer { build: 7, ..one.clone() }, |d| {
        d.same_engine = Some(EngineIdentity::of(&Offer::new(1).verified()));
    });
    check_refused("quantisation", one.clone(), |d| d.quantisations = BTreeSet::from(["Q8_0".into()]));
    check_refused("context_too_short", one.clone(), |d| d.max_output_tokens = 3_997);
    let bound = |max_price| move |d: &mut Demand| d.max_price = max_price;
    let input = MaxPrice { input: Some(MsatPerMtok(999_999)), ..MaxPrice::default() };
    check_refused("too_dear", one.clone(), bound(input));
    let output = MaxPrice { output: Some(MsatPerMtok(3_999_999)), ..MaxPrice::default() };
    check_refused("too_dear", one.clone(), bound(output));
    let total = MaxPrice { total: Some(Msat(899)), ..MaxPrice::default() };
    check_refused("total_too_dear", one.clone(), bound(total));
    check_refused("price_overflow", Offer { output: u64::MAX, ..one }, |_| ());
}

#[test]
fn bounds_include_their_value() {
    let max_price = MaxPrice {
        input: Some(MsatPerMtok(1_000_000)),
        output: Some(MsatPerMtok(4_000_000)),
        per_request: Some(Msat(0)),
        total: Some(Msat(900)),
    };
    let exact = Demand { max_price, max_output_tokens: 200, ..demand() };
    check_order(&[Offer::new(1)], &exact, &Reputation::default(), &[1]);
    check_order(&[Offer::new(1)], &Demand { max_output_tokens: 3_996, ..demand() }, &Reputation::default(), &[1]);
    let any_case = Demand { quantisations: ["q4_k_m".into()].into(), ..demand() };
    check_order(&[Offer::new(1)], &any_case, &Reputation::default(), &[1]);
}

#[test]
fn an_expired_listing_is_explained_and_not_used() {
    let book = book(&[Offer { lifetime_s: 60, ..Offer::new(1) }]);
    let later = now().plus_ms(60_000);
    assert!(plan(now(), &book, &demand(), &Reputation::default()).is_ok());
    let refused = plan(later, &book, &demand(), &Reputation::default()).unwrap_err();
    assert_eq!(refused.to_string(), "none of 1 listings fits: 1 expired");
    let why = explain(later, &book, &demand(), "x", &Reputation::default());
    assert_eq!(why[0].verdict, Verdict::Refused(WhyNot::Expired { expires_at: NOW_S + 60 }));
}

#[test]
fn failover_goes_to_an_equal_engine_first() {
    let offers = vec![
        Offer { output: 1_000_000, ..Offer::new(1) },
        Offer { output: 2_000_000, build: 7, ..Offer::new(2) },
        Offer { output: 3_000_000, ..Offer::new(3) },
    ];
    let exact = Demand { profile: Some(EngineProfile::Exact), ..demand() };
    check_order(&offers, &exact, &Reputation::default(), &[1, 3, 2]);
    check_order(&offers, &demand(), &Reputation::default(), &[1, 2, 3]);
}

#[test]
fn a_name_that_nobody_verified_works_only_as_a_claim() {
    let offers = vec![Offer { model: 9, ..Offer::new(1) }];
    let nothing = plan(now(), &book(&offers), &demand(), &Reputation::default());
    assert_eq!(nothing, Err(NoPlan::NotListed));
    let claimed = Demand { wanted: Wanted::ClaimedName("Gemma-3-270M".into()), ..demand() };
    check_order(&offers, &claimed, &Reputation::default(), &[1]);
}

#[test]
fn one_node_is_asked_once() {
    let offers = [Offer { model: 1, quantisation: "Q8_0", output: 9_000_000, ..Offer::new(1) }, Offer::new(1)];
    let roots = offers.iter().map(|offer| (offer.root(), Offer::tokenizer())).collect();
    let demand = Demand { wanted: Wanted::Roots(roots), ..demand() };
    let choice = plan(now(), &book(&offers), &demand, &Reputation::default()).unwrap();
    assert_eq!(choice.best.sole().map(|stage| stage.listing.quantisation.as_str()), Some("Q4_K_M"));
    assert_eq!(choice.failover, vec![]);
    assert_eq!(explain(now(), &book(&offers), &demand, "x", &Reputation::default()).len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn the_choice_is_the_cheapest_that_fits(
        prices in proptest::collection::vec((1u64..5_000_000, 100u32..600), 1..8),
        bound in 1u64..5_000_000,
    ) {
        let offers: Vec<Offer> = prices.iter().enumerate().map(|(index, (output, context_length))| {
            Offer { output: *output, context_length: *context_length, ..Offer::new(index as u32 + 1) }
        }).collect();
        let max_price = MaxPrice { output: Some(MsatPerMtok(bound)), ..MaxPrice::default() };
        let demand = Demand { max_price, ..demand() };
        let book = book(&offers);
        let fits = |offer: &&Offer| offer.output <= bound && offer.context_length >= 300;
        let cheapest = offers.iter().filter(fits).map(|offer| offer.output).min();
        let chosen = plan(now(), &book, &demand, &Reputation::default());
        prop_assert_eq!(chosen.as_ref().ok().and_then(|c| c.best.sole()).map(|s| s.listing.rates.output.0), cheapest);
        // Explanation and choice agree, and every listing is accounted for.
        let explained = explain(now(), &book, &demand, "gemma-3-270m", &Reputation::default());
        prop_assert_eq!(explained.len(), offers.len());
        let ranked = explained.iter().filter(|c| matches!(c.verdict, Verdict::Ranked { .. })).count();
        prop_assert_eq!(ranked, offers.iter().filter(fits).count());
        if let Ok(choice) = chosen {
            prop_assert_eq!(1 + choice.failover.len(), ranked.min(1 + MAX_FAILOVER));
            prop_assert_eq!(&explained[0].listing, &choice.best.stages[0].listing);
        }
    }
}
