use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const EXPIRES: UnixMs = UnixMs(120_000);

fn preimage(n: u8) -> Preimage {
    Preimage([n; 32])
}
fn hash(n: u8) -> PaymentHash {
    PaymentHash(Sha256::digest([n; 32]).into())
}
fn intent(n: u8) -> Intent {
    Intent {
        hash: hash(n),
        bolt11: format!("invoice {n}"),
        amount: Msat(1_000),
        max_fee: Msat(10),
        expires_at: EXPIRES,
    }
}
fn settled(n: u8) -> Input {
    Input::Settled { preimage: preimage(n), fee: Msat(3) }
}
fn no_route() -> PayError {
    PayError::NoRoute { amount: Msat(1), payable: Msat(0), max_fee: Msat(0) }
}
fn drain(payment: &mut Payment) -> Vec<Action> {
    std::iter::from_fn(|| payment.poll_action()).collect()
}
fn pays(payment: &mut Payment) -> usize {
    drain(payment).iter().filter(|a| matches!(a, Action::Pay { .. })).count()
}
const USABLE: Input = Input::Observed { usable: true, outbound_in_flight: false };
const BUSY: Input = Input::Observed { usable: true, outbound_in_flight: true };
const OFFLINE: Input = Input::Observed { usable: false, outbound_in_flight: false };

/// Feeds inputs one second apart from second 1 and compares the last phase.
#[track_caller]
fn check(mut payment: Payment, inputs: &[Input], expect: Phase) {
    for (i, input) in inputs.iter().enumerate() {
        payment.handle(UnixMs(1_000 * (i as u64 + 1)), input.clone()).unwrap();
    }
    assert_eq!(*payment.phase(), expect, "{inputs:?}");
}

#[test]
fn a_clock_that_is_set_neither_proves_nor_delays_anything() {
    const DAY_MS: u64 = 86_400_000;
    let at = |ms| UnixMs(DAY_MS + ms);
    // Back by a day: it is asked about now, not tomorrow.
    let mut payment = Payment::start(at(0), intent(1));
    payment.handle(at(1), Input::Accepted).unwrap();
    drain(&mut payment);
    payment.clock_moved(UnixMs(2));
    assert_eq!(payment.poll_timeout(), Some(UnixMs(2)));
    payment.handle_timeout(UnixMs(2));
    assert_eq!(drain(&mut payment), [Action::Look { hash: hash(1) }]);
    // Ahead by a day: that is no quiet time.
    let mut payment = Payment::recover(UnixMs(0), intent(1), None);
    payment.handle(EXPIRES, USABLE).unwrap();
    payment.clock_moved(at(0));
    payment.handle(at(0), USABLE).unwrap();
    assert_eq!(*payment.phase(), Phase::Unknown);
    payment.handle(at(QUIET_MS), USABLE).unwrap();
    assert_eq!(*payment.phase(), Phase::Failed { reason: FailureReason::NeverSent });
    // What is over is not woken.
    payment.clock_moved(at(0));
    assert_eq!(payment.poll_timeout(), None);
}

#[test]
fn the_table() {
    let start = || Payment::start(UnixMs(0), intent(1));
    let recovered = || Payment::recover(UnixMs(0), intent(1), None);
    let paid = Phase::Settled { preimage: preimage(1), fee: Msat(3) };
    let failed = |reason| Phase::Failed { reason };
    let row_failed = || Input::Looked(PaymentState::Failed { reason: FailureReason::Rejected });
    let uncertain = || Input::Refused(PayError::Uncertain { reason: "disk".into() });

    check(start(), &[], Phase::Attempted);
    check(start(), &[Input::Accepted], Phase::InFlight);
    check(start(), &[Input::Accepted, settled(1)], paid);
    check(start(), &[settled(1), Input::Accepted], paid); // the event overtook the call
    check(start(), &[Input::Refused(no_route())], failed(FailureReason::NoRoute));
    check(start(), &[uncertain()], Phase::Unknown);
    check(start(), &[uncertain(), Input::Refused(no_route())], Phase::Unknown); // a refused repetition proves nothing
    check(
        start(),
        &[Input::Accepted, Input::Failed { reason: FailureReason::Rejected }],
        failed(FailureReason::Rejected),
    );
    check(start(), &[Input::Accepted, Input::Failed { reason: FailureReason::Rejected }, settled(1)], paid);
    check(start(), &[settled(1), Input::Failed { reason: FailureReason::Rejected }], paid);
    check(start(), &[row_failed()], Phase::Attempted); // the row of an earlier try
    check(start(), &[Input::Accepted, row_failed()], failed(FailureReason::Rejected));
    check(recovered(), &[Input::Looked(PaymentState::InFlight)], Phase::InFlight);
    // After a restart a failed row may tell of a repetition that was refused; the failure's own event is proof.
    check(recovered(), &[row_failed()], Phase::Unknown);
    let told = Input::Failed { reason: FailureReason::Rejected };
    check(recovered(), &[row_failed(), told], failed(FailureReason::Rejected));
    check(recovered(), &[Input::Looked(PaymentState::Unknown)], Phase::Unknown);
    let no_row = || Input::Looked(PaymentState::Unknown);
    check(recovered(), &[no_row(), USABLE, USABLE, Input::Accepted], Phase::InFlight);
    check(recovered(), &[no_row(), USABLE, USABLE, Input::Refused(no_route())], Phase::Unknown);
}

#[test]
fn after_a_crash_the_same_invoice_goes_out_again_only_over_a_usable_channel() {
    let mut payment = Payment::recover(UnixMs(0), intent(1), None);
    assert_eq!(drain(&mut payment), [Action::Look { hash: hash(1) }, Action::Observe]);
    payment.handle(UnixMs(1), USABLE).unwrap();
    assert_eq!(pays(&mut payment), 0, "the wallet has not yet been asked for a row");
    payment.handle(UnixMs(2), Input::Looked(PaymentState::Unknown)).unwrap();
    for (at, observed) in [(3, USABLE), (900, OFFLINE), (1_100, USABLE), (2_000, BUSY), (2_100, USABLE)] {
        payment.handle(UnixMs(at), observed.clone()).unwrap();
        assert_eq!(pays(&mut payment), 0, "at {at}: {observed:?}");
    }
    payment.handle(UnixMs(2_099 + STILL_MS), USABLE).unwrap();
    assert_eq!(pays(&mut payment), 0, "an end may still be on its way to the event queue");
    payment.handle(UnixMs(2_100 + STILL_MS), USABLE).unwrap();
    assert_eq!(drain(&mut payment), [Action::Pay { bolt11: "invoice 1".into(), max_fee: Msat(10) }]);
    payment.handle(UnixMs(2_101 + STILL_MS), USABLE).unwrap();
    assert_eq!(pays(&mut payment), 0, "one call at a time");
    payment.handle(UnixMs(2_102 + STILL_MS), Input::Accepted).unwrap();
    assert_eq!(*payment.phase(), Phase::InFlight);
}

#[test]
fn given_up_only_after_a_quiet_time_past_expiry() {
    #[track_caller]
    fn check(observations: &[(u64, Input)], expect_over: bool) {
        let mut payment = Payment::recover(UnixMs(0), intent(1), None);
        payment.handle(UnixMs(0), Input::Looked(PaymentState::InFlight)).unwrap();
        for (at, input) in observations {
            payment.handle(UnixMs(*at), input.clone()).unwrap();
        }
        let given_up = *payment.phase() == Phase::Failed { reason: FailureReason::NeverSent };
        assert_eq!(given_up, expect_over, "{observations:?}");
        // Proof or not, a preimage has the last word.
        assert!(matches!(payment.handle(UnixMs(900_000), settled(1)), Ok(Some(Outcome::Settled { .. }))));
    }
    check(&[(1_000, USABLE), (60_000, USABLE)], false); // not expired
    check(&[(120_000, USABLE), (150_000, USABLE)], true);
    check(&[(120_000, USABLE), (149_999, USABLE)], false); // not quiet for long enough
    check(&[(120_000, USABLE), (140_000, BUSY), (150_000, USABLE)], false); // something is out
    check(&[(120_000, USABLE), (140_000, OFFLINE), (150_000, USABLE)], false); // something may be held back
    check(&[(120_000, USABLE), (140_000, BUSY), (150_000, USABLE), (180_000, USABLE)], true);
}

#[test]
fn a_lost_event_is_found_by_looking() {
    let mut payment = Payment::start(UnixMs(0), intent(1));
    drain(&mut payment);
    payment.handle(UnixMs(10), Input::Accepted).unwrap();
    payment.handle_timeout(UnixMs(5_009));
    assert!(drain(&mut payment).is_empty());
    payment.handle_timeout(payment.poll_timeout().unwrap());
    assert_eq!(drain(&mut payment), [Action::Look { hash: hash(1) }]);
    let row = PaymentState::Settled { preimage: preimage(1), fee: Msat(3), amount: Msat(1_000) };
    assert!(matches!(payment.handle(UnixMs(5_020), Input::Looked(row.clone())), Ok(Some(Outcome::Settled { .. }))));
    assert_eq!(payment.handle(UnixMs(5_030), Input::Looked(row)), Ok(None), "news once");
    assert_eq!(payment.poll_timeout(), None);
}

#[test]
fn a_wrong_preimage_settles_nothing() {
    let mut payment = Payment::start(UnixMs(0), intent(1));
    assert_eq!(payment.handle(UnixMs(1), settled(2)), Err(InputError::WrongPreimage { hash: hash(1) }));
    assert_eq!(*payment.phase(), Phase::Attempted);
}

#[test]
fn payments_that_hang_give_way_and_stay_unfinished() {
    let mut slices = Slices::new(1);
    slices.start(UnixMs(0), 0, intent(1)).unwrap();
    assert!(matches!(slices.start(UnixMs(1), 1, intent(2)), Err(StartError::TooMany { limit: 1 })));
    slices.set_aside(usize::MAX);
    let most = u8::try_from(Slices::<u8>::MAX_ASIDE).unwrap();
    for n in 1..=most {
        slices.start(UnixMs(2), n, intent(n + 1)).unwrap();
    }
    assert!(matches!(slices.start(UnixMs(3), 99, intent(99)), Err(StartError::TooMany { .. })), "they have a bound");
    assert!(matches!(slices.start(UnixMs(3), 0, intent(98)), Err(StartError::NotOver { .. })), "never paid twice");
    assert_eq!(slices.unfinished(), Slices::<u8>::MAX_ASIDE + 1);
}

#[test]
fn one_payment_for_one_slice() {
    let mut slices = Slices::new(2);
    slices.start(UnixMs(0), "a", intent(1)).unwrap();
    assert!(matches!(slices.start(UnixMs(1), "a", intent(2)), Err(StartError::NotOver { .. })));
    assert!(matches!(slices.start(UnixMs(1), "b", intent(1)), Err(StartError::HashReused { .. })));
    slices.start(UnixMs(1), "b", intent(2)).unwrap();
    assert!(matches!(slices.start(UnixMs(1), "c", intent(3)), Err(StartError::TooMany { limit: 2 })));
    assert_eq!(slices.exposure(), Msat(2_020));
    // A failure frees the slice, for the same invoice or for another.
    let fail = Input::Failed { reason: FailureReason::NoRoute };
    assert!(slices.handle(UnixMs(2), hash(1), fail.clone()).unwrap().is_some());
    slices.start(UnixMs(3), "a", intent(1)).unwrap();
    slices.handle(UnixMs(4), hash(1), fail).unwrap();
    slices.start(UnixMs(5), "a", intent(4)).unwrap();
    assert!(matches!(slices.handle(UnixMs(6), hash(4), settled(4)), Ok(Some(("a", Outcome::Settled { .. })))));
    assert!(matches!(slices.start(UnixMs(7), "a", intent(5)), Err(StartError::Paid { .. })));
    assert!(matches!(slices.start(UnixMs(7), "a", intent(1)), Err(StartError::Paid { .. })));
    slices.retire(|slice| *slice == "a");
    assert!(slices.get(&"a").is_none() && slices.get(&"b").is_some());
    assert!(matches!(slices.handle(UnixMs(8), hash(9), settled(9)), Err(InputError::UnknownHash { .. })));
}

/// A wallet that crashes at any point, loses rows but never an HTLC, and answers as the embedded one does.
#[derive(Default)]
struct Wallet {
    out: bool,
    has_row: bool,
    paid: u32,
    outcome: Option<bool>,
}

proptest! {
    /// Whatever the order of answers, crashes and losses: the payee is paid at most once, and the machine's end agrees
    /// with what happened.
    #[test]
    fn never_paid_twice_and_the_end_is_true(script in prop::collection::vec(0u8..10, 1..120)) {
        let mut wallet = Wallet::default();
        let mut journal: Option<Outcome> = None;
        let mut payment = Payment::start(UnixMs(0), intent(1));
        let mut now = UnixMs(0);
        for step in script {
            now = now.plus_ms(u64::from(step) * 1_500);
            let mut inputs = Vec::new();
            while let Some(action) = payment.poll_action() {
                match action {
                    Action::Pay { .. } => match (wallet.outcome, wallet.out, step) {
                        // Duplicate: the wallet still knows it.
                        (Some(true), ..) | (None, true, _) => inputs.push(Input::Accepted),
                        // The invoice has expired at the payee and here.
                        _ if now >= EXPIRES => inputs.push(Input::Refused(PayError::Expired)),
                        (.., 0) => inputs.push(Input::Refused(no_route())),
                        (.., 1) => {
                            wallet.out = true;
                            wallet.outcome = None;
                            inputs.push(Input::Refused(PayError::Uncertain { reason: "row not written".into() }));
                        }
                        _ => {
                            wallet.out = true;
                            wallet.outcome = None;
                            wallet.has_row = true;
                            inputs.push(Input::Accepted);
                        }
                    },
                    Action::Look { .. } => inputs.push(Input::Looked(match (wallet.has_row, wallet.outcome) {
                        (false, _) => PaymentState::Unknown,
                        (true, None) => PaymentState::InFlight,
                        (true, Some(true)) => PaymentState::Settled { preimage: preimage(1), fee: Msat(0), amount: Msat(1_000) },
                        (true, Some(false)) => PaymentState::Failed { reason: FailureReason::Rejected },
                    })),
                    Action::Observe => inputs.push(Input::Observed { usable: step != 2, outbound_in_flight: wallet.out }),
                }
            }
            match step {
                // Crash: the journal and the HTLC stay, a row in flight may be gone (3), the answers are lost.
                3 | 4 => {
                    wallet.has_row &= step == 4 || wallet.outcome.is_some();
                    inputs.clear();
                    payment = Payment::recover(now, intent(1), journal);
                }
                5 if wallet.out => {
                    wallet.out = false;
                    wallet.paid += 1;
                    wallet.outcome = Some(true);
                    inputs.push(settled(1));
                }
                6 if wallet.out => {
                    wallet.out = false;
                    wallet.outcome = Some(false);
                    inputs.push(Input::Failed { reason: FailureReason::Rejected });
                }
                // Settled, and the event lost; the row stays.
                7 if wallet.out && wallet.has_row => {
                    wallet.out = false;
                    wallet.paid += 1;
                    wallet.outcome = Some(true);
                }
                _ => {}
            }
            for input in inputs {
                if let Some(outcome) = payment.handle(now, input).unwrap() {
                    journal = Some(outcome);
                }
            }
            payment.handle_timeout(now);
        }
        prop_assert!(wallet.paid <= 1);
        match payment.phase() {
            Phase::Settled { .. } => prop_assert_eq!(wallet.paid, 1),
            Phase::Failed { .. } => prop_assert!(wallet.paid == 0 && !wallet.out),
            Phase::Attempted | Phase::InFlight | Phase::Unknown => {}
        }
    }

    /// Two invoices for one slice are never unfinished or paid together, whatever is asked.
    #[test]
    fn a_slice_is_never_paid_by_two(script in prop::collection::vec((0u8..3, 0u8..6, 0u8..4), 1..80)) {
        let mut slices: Slices<u8> = Slices::new(8);
        let mut paid: BTreeMap<u8, u32> = BTreeMap::new();
        for (i, (slice, invoice, what)) in script.into_iter().enumerate() {
            let now = UnixMs(i as u64);
            let was_free = slices.get(&slice).is_none_or(|p| matches!(p.phase(), Phase::Failed { .. }));
            let started = slices.start(now, slice, intent(invoice));
            prop_assert!(started.is_err() || was_free);
            let input = match what {
                0 => settled(invoice),
                1 => Input::Failed { reason: FailureReason::Rejected },
                _ => Input::Accepted,
            };
            // The wallet ends only what is running.
            let running = slices.get(&slice).is_some_and(|p| p.intent().hash == hash(invoice) && !p.phase().is_over());
            if running && let Some((slice, Outcome::Settled { .. })) = slices.handle(now, hash(invoice), input).unwrap() {
                *paid.entry(slice).or_default() += 1;
            }
        }
        prop_assert!(paid.values().all(|&n| n == 1));
    }
}
