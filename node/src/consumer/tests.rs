//! The consumer role alone, told what no honest provider says.

use super::*;
use satgrid_ledger::{
    statements::SessionOpen,
    testing::{World, bolt11, bytes32},
};
use satgrid_protocol::{
    frame::{Hello, ProviderControl, Refusal},
    session::Side,
};
use satgrid_types::{Numerators, Preimage, Quote, Sampling, Signed};
use sha2::Digest as _;

const MASTER: [u8; 32] = [5; 32];

/// A session under this consumer's first key, with one slice of this amount paid.
fn paid(world: &mut World, amount: Msat) -> SessionState {
    let session = world.open();
    let key = session_key(&MASTER, SessionIndex(0));
    let quote = Quote { consumer: node_key(&key), ..Quote::clone(&session.quote) };
    let quote = Signed::sign(&quote, &world.provider.node).verify(&quote.provider).unwrap();
    let open = SessionOpen { consumer: node_key(&key), quote: quote.quote_id(), ..SessionOpen::clone(&session.open) };
    let open = Signed::sign(&open, &key).verify(&open.consumer).unwrap();
    let mut state = SessionState::new(Side::Consumer, &quote, &open);
    let preimage = Preimage(bytes32("preimage"));
    let hash = PaymentHash(Sha256::digest(preimage.0).into());
    let terms = state.descriptor(0, amount);
    let text = bolt11(&world.provider.lightning, amount, &terms.description_hash(), &hash, world.now);
    let invoiced = state.invoiced(terms, text);
    state.apply(&invoiced).unwrap();
    let attempt = state.attempt(0, hash, Msat::ZERO).unwrap();
    state.apply(&attempt).unwrap();
    let settled = state.settled(hash, preimage, Msat::ZERO).unwrap();
    state.apply(&settled).unwrap();
    state
}

fn submit(world: &World, call: u64) -> ConsumerEvent {
    ConsumerEvent::Submit(Box::new(Submit {
        call: CallId(call),
        candidates: vec![world.listing.clone()],
        prompt: vec![1, 2, 3],
        sampling: Sampling::default(),
        stop: Vec::new(),
        max_output: 50,
        ends: BTreeSet::new(),
        grammar: None,
        top_logprobs: None,
        embed: None,
        allow_fallbacks: false,
        part: None,
        max_cost: None,
    }))
}

/// Everything that it wants done; the journal writes at once.
fn tell(consumer: &mut Consumer, now: UnixMs, event: ConsumerEvent) -> Vec<ConsumerAction> {
    consumer.handle(now, event);
    let mut actions = Vec::new();
    while let Some(action) = consumer.poll_action() {
        if let ConsumerAction::Append(append) = &action {
            consumer.handle(now, ConsumerEvent::Durable(append.ticket));
        }
        actions.push(action);
    }
    actions
}

/// The stream that was opened for a request.
fn opened(actions: &[ConsumerAction]) -> Option<StreamId> {
    actions.iter().find_map(
        |action| {
            if let ConsumerAction::OpenStream { stream, .. } = action { Some(*stream) } else { None }
        },
    )
}

#[test]
fn a_provider_that_says_the_balance_is_short_where_it_is_not_is_left() {
    let mut world = World::new();
    let (amount, now) = (Msat::sat(1_000), world.now);
    let state = paid(&mut world, amount);
    let session = state.id();
    let mut consumer = Consumer::new(ConsumerConfig::default(), MASTER, [6; 32]);
    consumer.restore(vec![state], 1, BTreeMap::new());
    let actions = tell(&mut consumer, now, submit(&world, 1));
    let link = actions
        .iter()
        .find_map(|action| if let ConsumerAction::Connect { link, .. } = action { Some(*link) } else { None });
    let link = link.unwrap();
    tell(&mut consumer, now, ConsumerEvent::LinkUp { link });
    let say = |consumer: &mut Consumer, frame| tell(consumer, now, ConsumerEvent::Control { link, frame });
    say(&mut consumer, ProviderControl::Hello(Hello::ours()));
    let going = say(&mut consumer, ProviderControl::Resumed(session, amount, None, Numerators::ZERO, Vec::new()));
    assert!(opened(&going).is_some(), "the first one runs on: {going:?}");
    let mut actions = tell(&mut consumer, now, submit(&world, 2));
    let mut refused = 0;
    while let Some(stream) = opened(&actions) {
        refused += 1;
        let frame = ProviderFrame::Refused(Refusal::Funds, "not enough".into());
        let told = tell(&mut consumer, now, ConsumerEvent::Frame { link, stream, frame });
        if told.iter().any(|action| matches!(action, ConsumerAction::CloseLink { .. })) {
            break;
        }
        assert!(refused < 20, "it would go on paying slices");
        let total = Msat(amount.0 + refused);
        actions = say(&mut consumer, ProviderControl::Credited(0, total));
    }
    assert_eq!(refused, 5);
    assert!(consumer.shunned(now).next().is_some());
}

#[test]
fn a_connection_that_was_given_up_before_it_stood_is_closed() {
    let world = World::new();
    let mut consumer = Consumer::new(ConsumerConfig::default(), MASTER, [6; 32]);
    let actions = tell(&mut consumer, world.now, ConsumerEvent::LinkUp { link: LinkId(9) });
    assert!(matches!(actions.as_slice(), [ConsumerAction::CloseLink { link: LinkId(9), .. }]), "{actions:?}");
}

#[test]
fn a_speed_is_that_of_what_follows_the_first_tokens() {
    use super::streams::Wrote;
    let wrote = |chunks: &[(u64, u32)]| {
        let mut wrote = None;
        for (at, tokens) in chunks {
            wrote = Some(Wrote::more(wrote, UnixMs(*at), *tokens));
        }
        wrote.and_then(Wrote::mtok_s)
    };
    assert_eq!(wrote(&[(5_000, 1), (5_500, 20), (6_000, 20)]), Some(40_000));
    // One answer in one piece, a few tokens, and all within the clock's step say nothing.
    assert_eq!(wrote(&[(5_000, 100)]), None);
    assert_eq!(wrote(&[(5_000, 1), (6_000, 15)]), None);
    assert_eq!(wrote(&[(5_000, 1), (5_000, 50)]), None);
}
