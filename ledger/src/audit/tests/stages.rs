//! A lead's journal: what it bought of its workers against what it sold.

use super::{Rule, report};
use crate::testing::{Stated, lead_bundle};
use satgrid_types::Digest;

#[track_caller]
fn check(what: &str, expect: &[Rule], bend: impl Fn(&mut Stated)) {
    let report = report(&lead_bundle(bend));
    let mut rules: Vec<Rule> = report.findings.iter().map(|finding| finding.rule).collect();
    rules.dedup();
    assert_eq!(rules, expect, "{what}: {:?}", report.findings);
}

#[test]
fn what_a_lead_sold_is_what_its_workers_did() {
    check("honest", &[], |_| ());
    check("a layer that nobody ran", &[Rule::StageTiling], |s| s.split.as_mut().unwrap().own.truncate(1));
    check("fewer positions than sold", &[Rule::StageConservation], |s| s.split.as_mut().unwrap().positions += 1);
    check("other rows came out than went in", &[Rule::StageRows], |s| s.work.output = Digest([7; 32]));
    check("more layers than ordered", &[Rule::StageWork], |s| s.usage.position_layers += 1);
    check("another order than the request's", &[Rule::StageWork], |s| s.work.order.max_positions += 1);
    check("workers that the receipt does not name", &[Rule::StageRoot], |s| s.split = None);
    let late = [Rule::StageRoot, Rule::StageTiling, Rule::StageOrphan];
    check("a worker's receipt after the request's", &late, |s| s.late = true);
}
