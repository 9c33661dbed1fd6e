//! A lead's journal: what it bought of its workers against what it sold.

use super::{Rule, report};
use crate::testing::{Stated, experts_bundle, lead_bundle, lost_bundle, stage_bundle};
use satgrid_types::{Digest, PartUsage, WorkKind};

#[track_caller]
fn check(what: &str, expect: &[Rule], bend: impl Fn(&mut Stated)) {
    check_bundle(what, expect, &lead_bundle(bend));
}

#[track_caller]
fn check_bundle(what: &str, expect: &[Rule], bundle: &[u8]) {
    let report = report(bundle);
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

#[test]
fn what_a_dying_worker_lost_is_nobody_s_fault_and_hides_nothing() {
    let check = |what: &str, expect: &[Rule], bend: fn(&mut Stated)| check_bundle(what, expect, &lost_bundle(bend));
    check("honest", &[], |_| ());
    check("a loss that nobody speaks of", &[Rule::StageRows], |s| s.split.as_mut().unwrap().lost = None);
    check("positions that were sold and are said to be lost", &[Rule::StageConservation], |s| {
        let split = s.split.as_mut().unwrap();
        split.positions -= 10;
        split.lost.as_mut().unwrap().positions += 10;
    });
    check("more evaluated than came back and was lost", &[Rule::StageConservation], |s| {
        s.usage = PartUsage::default().plus(WorkKind::Prefill, 49, 8).unwrap();
    });
    check("other rows, and none of them missing", &[Rule::StageRows], |s| s.work.bytes_in = 48);
    check("more rows than were sent", &[Rule::StageRows], |s| s.work.bytes_in = 49);
    check("other rows came back, and none is missing", &[Rule::StageRows], |s| s.work.output = Digest([7; 32]));
}

#[test]
fn what_the_router_sent_is_what_experts_did() {
    let check = |what: &str, expect: &[Rule], bend: fn(&mut Stated)| check_bundle(what, expect, &experts_bundle(bend));
    check("honest", &[], |_| ());
    check("a row more than the router sent", &[Rule::ExpertConservation], |s| {
        s.expert_split.as_mut().unwrap().layers[1] -= 1;
    });
    check("rows of the lead's own that nobody sent", &[Rule::ExpertConservation], |s| {
        s.expert_split.as_mut().unwrap().own[0].rows += 1;
    });
    check("more rows charged than counted", &[Rule::ExpertWork], |s| s.usage.expert_rows += 1);
    check("counters in another order", &[Rule::ExpertWork], |s| s.counts.as_mut().unwrap().swap(0, 1));
    check("more rows than ordered", &[Rule::StageWork], |s| s.work.order.max_positions = 1);
    check("workers that the receipt does not name", &[Rule::ExpertRoot], |s| s.expert_split = None);
    let late = [Rule::ExpertRoot, Rule::ExpertConservation, Rule::StageOrphan];
    check("a worker's receipt after the request's", &late, |s| s.late = true);
}

#[test]
fn a_stage_accounts_for_the_experts_that_it_bought() {
    let check = |what: &str, expect: &[Rule], bend: fn(&mut Stated)| check_bundle(what, expect, &stage_bundle(bend));
    check("honest", &[], |_| ());
    check("a row more than the router sent", &[Rule::ExpertConservation], |s| {
        s.expert_split.as_mut().unwrap().layers[1] -= 1;
    });
    check("rows of a layer that it did not sell", &[Rule::ExpertConservation], |s| {
        let split = s.expert_split.as_mut().unwrap();
        split.layers.push(1);
        split.own.push(crate::statements::ExpertCount { layer: 2, expert: 0, rows: 2 });
        split.again.push(0);
    });
    check("workers that the receipt does not name", &[Rule::ExpertRoot], |s| s.expert_split = None);
    let late = [Rule::ExpertRoot, Rule::ExpertConservation, Rule::StageOrphan];
    check("a worker's receipt after the stage's", &late, |s| s.late = true);
}
