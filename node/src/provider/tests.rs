//! The provider role alone, told what no honest peer says.

mod strangers;

use super::{links::MAX_REQUOTED, start::check_start, *};
use crate::CloseCode;
use satgrid_engine::port::FinishReason;
use satgrid_ledger::{
    statements::{Ack, RequestOpen, RequestPrivate, SessionOpen},
    testing::{Session, World, bolt11, bytes32},
};
use satgrid_protocol::{
    frame::{ConsumerControl, ConsumerFrame, Hello, OpenRequest, StartRequest},
    session::Side,
};
use satgrid_types::{BothSigned, Digest, EngineProfile, MAX_LOGIT_BIAS, Quote, Salt, Sampling, Signed, node_key};

const LINK: LinkId = LinkId(7);

fn state(session: &Session) -> SessionState {
    SessionState::new(Side::Provider, &session.quote, &session.open)
}

/// A provider with these sessions, and a consumer that has connected and said hello.
fn met(world: &World, session: &Session, restored: Vec<SessionState>) -> Provider {
    let mut provider = Provider::new(ProviderConfig::default(), world.provider.node.clone(), [1; 32]);
    restored.into_iter().for_each(|state| provider.adopt(world.now, state));
    tell(&mut provider, world, ProviderEvent::LinkUp { link: LINK, peer: node_key(&session.key), host: None });
    say(&mut provider, world, ConsumerControl::Hello(Hello::ours()));
    provider
}

/// Everything that it wants done; the journal writes at once.
fn tell(provider: &mut Provider, world: &World, event: ProviderEvent) -> Vec<ProviderAction> {
    provider.handle(world.now, event);
    let mut actions = Vec::new();
    while let Some(action) = provider.poll_action() {
        if let ProviderAction::Append(append) = &action {
            provider.handle(world.now, ProviderEvent::Durable(append.ticket));
        }
        actions.push(action);
    }
    actions
}

fn say(provider: &mut Provider, world: &World, frame: ConsumerControl) -> Vec<ProviderAction> {
    tell(provider, world, ProviderEvent::Control { link: LINK, frame })
}

fn offer(provider: &mut Provider, world: &World) {
    let (listing, rates) = (world.listing.clone(), world.listing.rates);
    let (profile, build) = (EngineProfile::Exact, listing.build);
    let offering = Offering { listing, engine: EngineId(0), rates, profile, build };
    tell(provider, world, ProviderEvent::Offer(Box::new(offering)));
}

/// A request for three tokens in and five out.
fn request(world: &World, session: &Session, id: u8, sampling: Sampling) -> StartRequest {
    let (salt, prompt) = (Salt([3; 32]), vec![1, 2, 3]);
    let private = RequestPrivate::new(&salt, &prompt, sampling, Vec::new(), 0);
    let open = RequestOpen {
        version: RequestOpen::VERSION,
        session: session.id,
        request: RequestId([id; 32]),
        quote: session.quote.quote_id(),
        prompt_tokens: 3,
        max_output: 5,
        private_hash: private.commitment(&salt),
        opened_at: world.now,
        part: None,
    };
    StartRequest { open: Signed::sign(&open, &session.key), salt, prompt, private }
}

fn resume(session: SessionId) -> ConsumerControl {
    ConsumerControl::Resume(session, Vec::new(), None, None)
}

fn is_halted(actions: &[ProviderAction]) -> bool {
    actions.iter().any(|action| matches!(action, ProviderAction::Halt { .. }))
}

/// Asks for the invoice of the first slice.
fn want_invoice(provider: &mut Provider, world: &World) -> (InvoiceTicket, Digest) {
    let actions = say(provider, world, ConsumerControl::WantInvoice(0, Msat::sat(10)));
    let wanted = actions.iter().find_map(|action| {
        if let ProviderAction::MakeInvoice { ticket, description_hash, .. } = action {
            Some((*ticket, *description_hash))
        } else {
            None
        }
    });
    wanted.unwrap()
}

#[test]
fn a_slice_that_is_paid_while_its_second_invoice_is_made_stops_nobody() {
    let mut world = World::new();
    let session = world.open();
    let mut provider = met(&world, &session, vec![state(&session)]);
    say(&mut provider, &world, resume(session.id));
    let invoice = |terms: &Digest, hash: &PaymentHash| {
        Ok(bolt11(&world.provider.lightning, Msat::sat(10), terms, hash, world.now))
    };
    let [first, second] = ["first", "second"].map(|name| PaymentHash(bytes32(name)));
    let (ticket, terms) = want_invoice(&mut provider, &world);
    tell(&mut provider, &world, ProviderEvent::InvoiceMade { ticket, result: invoice(&terms, &first) });
    let (ticket, terms) = want_invoice(&mut provider, &world);
    tell(&mut provider, &world, ProviderEvent::PaymentReceived { hash: first, amount: Msat::sat(10) });
    let late = tell(&mut provider, &world, ProviderEvent::InvoiceMade { ticket, result: invoice(&terms, &second) });
    assert!(!is_halted(&late), "{late:?}");
    assert!(matches!(
        late.as_slice(),
        [ProviderAction::Control { frame: ProviderControl::Refused(Refusal::Protocol, _), .. }]
    ));
    assert_eq!(provider.session_states().next().unwrap().paid(), Msat::sat(10));
}

#[test]
fn a_connection_that_carries_a_session_takes_up_no_other() {
    let mut world = World::new();
    let session = world.open();
    // Another one under the same key.
    let quote = Quote { nonce: session.quote.nonce + 1, ..Quote::clone(&session.quote) };
    let quote = Signed::sign(&quote, &world.provider.node).verify(&quote.provider).unwrap();
    let open = SessionOpen { quote: quote.quote_id(), ..SessionOpen::clone(&session.open) };
    let open = Signed::sign(&open, &session.key).verify(&open.consumer).unwrap();
    let other = SessionState::new(Side::Provider, &quote, &open);
    let id = other.id();
    let mut provider = met(&world, &session, vec![state(&session), other]);
    say(&mut provider, &world, resume(session.id));
    say(&mut provider, &world, resume(session.id));
    assert_eq!(provider.counters().violations, 0, "said twice, it is the same");
    let actions = say(&mut provider, &world, resume(id));
    assert!(
        actions.iter().any(|a| matches!(a, ProviderAction::CloseLink { code: CloseCode::Violation, .. })),
        "{actions:?}"
    );
    assert!(provider.sessions.values().all(|session| session.link.is_none()), "nobody waits for a link that is closed");
}

#[test]
fn a_request_has_no_more_biased_tokens_than_are_kept_beside_its_receipt() {
    let mut world = World::new();
    let session = world.open();
    let check = |biased: usize| {
        let bias = (0..).zip(std::iter::repeat_n(1, biased)).collect();
        let sampling = Sampling { logit_bias_micro: bias, ..Sampling::default() };
        check_start(&state(&session), &request(&world, &session, 4, sampling)).is_ok()
    };
    assert!(check(MAX_LOGIT_BIAS) && !check(MAX_LOGIT_BIAS + 1));
}

#[test]
fn quotes_that_nothing_comes_of_do_not_fill_the_journal() {
    let mut world = World::new();
    let session = world.open();
    let mut provider = met(&world, &session, vec![state(&session)]);
    offer(&mut provider, &world);
    say(&mut provider, &world, resume(session.id));
    let quoted = |provider: &mut Provider| {
        let wanted = ConsumerControl::WantQuote(world.listing.id(), world.listing.model_root);
        let actions = say(provider, &world, wanted);
        actions.iter().any(|action| matches!(action, ProviderAction::Append(_)))
    };
    assert!((0..MAX_REQUOTED).all(|_| quoted(&mut provider)));
    assert!(!quoted(&mut provider));
}

#[test]
fn a_receipt_that_was_on_its_way_counts_on_from_what_ended_since() {
    let mut world = World::new();
    let session = world.open();
    let mut paid = state(&session);
    let (terms, hash) = (paid.descriptor(0, Msat::sat(10)), PaymentHash(bytes32("slice")));
    let text = bolt11(&world.provider.lightning, Msat::sat(10), &terms.description_hash(), &hash, world.now);
    let invoiced = paid.invoiced(terms, text);
    paid.apply(&invoiced).unwrap();
    let received = paid.received(hash, Msat::sat(10)).unwrap();
    paid.apply(&received).unwrap();
    let mut provider = met(&world, &session, vec![paid]);
    offer(&mut provider, &world);
    say(&mut provider, &world, resume(session.id));
    let mut jobs = Vec::new();
    for id in [1, 2] {
        let frame = ConsumerFrame::Start(Box::new(request(&world, &session, id, Sampling::default())));
        let event = ProviderEvent::Request { link: LINK, stream: StreamId(id.into()), frame };
        jobs.extend(tell(&mut provider, &world, event).into_iter().find_map(|action| {
            if let ProviderAction::Engine { command: Command::Start(job), .. } = action { Some(job.id) } else { None }
        }));
    }
    let engine = |event| ProviderEvent::Engine { engine: EngineId(0), event };
    // The second one's prompt is signed for; it runs on.
    let told = tell(&mut provider, &world, engine(EngineEvent::Prefilled { job: jobs[1], upto: 3, cached: 0 }));
    let offered = told.into_iter().find_map(|action| {
        if let ProviderAction::Send { frame: ProviderFrame::Ack(signed), .. } = action { Some(signed) } else { None }
    });
    let signed: BothSigned<Ack> = BothSigned::countersign(&offered.unwrap(), &session.key);
    let frame = ConsumerFrame::Ack(1, *signed.consumer_signature());
    tell(&mut provider, &world, ProviderEvent::Request { link: LINK, stream: StreamId(2), frame });
    // The first one is over. Its receipt is lost with the connection, and then the second one's client leaves.
    let over = EngineEvent::Finished { job: jobs[0], reason: FinishReason::Stop, evaluated: 0 };
    tell(&mut provider, &world, engine(over));
    tell(&mut provider, &world, ProviderEvent::LinkDown { link: LINK });
    tell(&mut provider, &world, ProviderEvent::LinkUp { link: LINK, peer: node_key(&session.key), host: None });
    say(&mut provider, &world, ConsumerControl::Hello(Hello::ours()));
    let open = |id: u8, last_ack, received| OpenRequest { request: RequestId([id; 32]), last_ack, received };
    let open = vec![open(1, None, Some(0)), open(2, Some(signed), None)];
    say(&mut provider, &world, ConsumerControl::Resume(session.id, open, None, None));
    let settled = provider.session_states().next().unwrap().settled_numerators();
    assert_ne!(settled.0, 0, "its prompt was signed for");
    let frame = ConsumerFrame::Resume(RequestId([1; 32]));
    let again = tell(&mut provider, &world, ProviderEvent::Request { link: LINK, stream: StreamId(3), frame });
    let receipts = again.into_iter().filter_map(|action| {
        if let ProviderAction::Send { frame: ProviderFrame::Receipt(_, signed), .. } = action {
            Some(signed.peek().unwrap())
        } else {
            None
        }
    });
    let sums: Vec<_> = receipts.map(|receipt| receipt.cumulative_numerators).collect();
    assert_eq!(sums, [settled], "nothing was done for the first one");
}

#[test]
fn a_connection_that_nothing_comes_of_is_closed() {
    let mut world = World::new();
    let session = world.open();
    let begun = world.now;
    let mut provider = met(&world, &session, vec![state(&session)]);
    let [carries_session, silent, greeted, sends_rows] = [7, 8, 9, 10].map(LinkId);
    say(&mut provider, &world, resume(session.id));
    for link in [silent, greeted, sends_rows] {
        tell(&mut provider, &world, ProviderEvent::LinkUp { link, peer: NodeKey([2; 32]), host: None });
    }
    let hello = ProviderEvent::Control { link: greeted, frame: ConsumerControl::Hello(Hello::ours()) };
    tell(&mut provider, &world, hello);
    // Two streams of it carry some.
    tell(&mut provider, &world, ProviderEvent::LinkUsed { link: sends_rows });
    tell(&mut provider, &world, ProviderEvent::LinkUsed { link: sends_rows });
    let closed = |actions: Vec<ProviderAction>| -> Vec<LinkId> {
        let closed = actions.into_iter().filter_map(|action| {
            let ProviderAction::CloseLink { link, code, reason } = action else { return None };
            assert_eq!((code, reason.as_str()), (CloseCode::Done, "no session was opened here within 60 s"));
            Some(link)
        });
        closed.collect()
    };
    assert_eq!(provider.poll_timeout(), Some(begun.plus_ms(60_000)));
    world.now = begun.plus_ms(59_999);
    assert_eq!(closed(tell(&mut provider, &world, ProviderEvent::Tick)), []);
    world.now = begun.plus_ms(60_000);
    assert_eq!(closed(tell(&mut provider, &world, ProviderEvent::Tick)), [silent, greeted]);
    assert_eq!((provider.next_unused_link(), provider.counters().links_unused), (None, 2));
    // What is said on it now is not heard.
    let wanted = ConsumerControl::WantQuote(world.listing.id(), world.listing.model_root);
    assert!(tell(&mut provider, &world, ProviderEvent::Control { link: greeted, frame: wanted }).is_empty());
    world.now = begun.plus_ms(600_000);
    assert_eq!(closed(tell(&mut provider, &world, ProviderEvent::LinkFreed { link: sends_rows })), []);
    assert_eq!(closed(tell(&mut provider, &world, ProviderEvent::LinkFreed { link: sends_rows })), [sends_rows]);
    assert_eq!(provider.links.keys().copied().collect::<Vec<_>>(), [carries_session]);
}
