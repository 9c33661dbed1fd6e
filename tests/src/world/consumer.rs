//! Driving the consumer role, and being its clients.

use super::{CallLog, What, Who, World, parts, ring};
use rand::Rng;
use satgrid_node::{
    consumer::{CallId, Consumer, ConsumerAction, ConsumerEvent, Emission, Submit},
    recover::Fold,
};
use satgrid_protocol::frame::{self, ConsumerControl, ConsumerFrame};
use satgrid_types::{Digest, Msat, Sampling, node_key};
use satgrid_wallet::{fake::Crash, port::InvoiceRequest};

/// A call as a test makes it.
#[derive(Debug, Clone)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub max_output: u32,
    pub sampling: Sampling,
    /// Providers in the order of the plan.
    pub providers: Vec<usize>,
    pub allow_fallbacks: bool,
    /// Tokens that end a generation.
    pub ends: std::collections::BTreeSet<u32>,
    /// The prompt is texts of so many tokens to be embedded.
    pub texts: Option<Vec<u32>>,
}

impl Ask {
    /// A prompt of so many tokens, to provider 0 and then the others.
    pub fn tokens(prompt: u32, max_output: u32) -> Ask {
        let prompt = (0..prompt).map(|i| 3 + (i * 7 + max_output) % 250).collect();
        Ask {
            prompt,
            max_output,
            sampling: Sampling::default(),
            providers: vec![0],
            allow_fallbacks: true,
            ends: [2].into(),
            texts: None,
        }
    }
    /// Texts of so many tokens to be embedded.
    pub fn texts(lengths: &[u32]) -> Ask {
        Ask { texts: Some(lengths.to_vec()), max_output: 0, ..Ask::tokens(lengths.iter().sum(), 0) }
    }
    pub fn to(mut self, providers: &[usize]) -> Ask {
        self.providers = providers.to_vec();
        self
    }
    pub fn seeded(mut self, seed: u64) -> Ask {
        self.sampling = Sampling { temperature_micro: 700_000, seed, ..Sampling::default() };
        self
    }
}

impl World {
    /// A consumer's process starts; what its journal holds is taken up.
    pub fn start_consumer(&mut self, c: usize) {
        let node = &mut self.consumers[c];
        assert!(node.role.is_none(), "it runs already");
        let mut seed = parts::bytes32(&format!("consumer {c} seed {}", self.options.seed));
        seed[0] ^= node.epoch as u8;
        let mut role = Consumer::new(node.config.clone(), node.master, seed);
        let mut fold = Fold::new([node_key(&node.key)]);
        node.journal.entries().iter().for_each(|entry| fold.entry(entry));
        let recovered = fold.finish();
        role.restore(recovered.consumer_sessions, recovered.opened, recovered.settled_with);
        node.role = Some(role);
        node.halted = None;
        self.tell_payable(c);
        self.settle();
    }

    pub fn crash_consumer(&mut self, c: usize, crash: Crash) {
        let pending = self.consumers[c].journal.pending();
        let survive = self.rng.gen_range(0..=pending);
        self.say(|| format!("consumer {c} dies, {survive} of {pending} appends survive"));
        let node = &mut self.consumers[c];
        node.role = None;
        node.epoch += 1;
        node.journal.crash(survive);
        for log in node.calls.values_mut().filter(|log| log.end.is_none()) {
            log.orphaned = true;
        }
        node.rings.values_mut().for_each(ring::Ring::orphan);
        let lightning = node.purse.lightning;
        node.purse = super::Purse::new(lightning);
        self.net.crash(self.now, lightning, crash);
        self.cut_links_of(Some(c), None);
        self.settle();
    }

    pub fn restart_consumer(&mut self, c: usize) {
        let lightning = self.consumers[c].purse.lightning;
        self.net.restart(self.now, lightning);
        self.reconnect_wallets();
        self.start_consumer(c);
    }

    // The clients.

    pub fn submit(&mut self, c: usize, ask: Ask) -> CallId {
        let call = CallId(self.consumers[c].next_call);
        self.consumers[c].next_call += 1;
        self.say(|| format!("consumer {c} {call:?}: {} + {} tokens", ask.prompt.len(), ask.max_output));
        let (prompt, sampling) = (ask.prompt.clone(), ask.sampling.clone());
        let log = CallLog { prompt, max_output: ask.max_output, sampling, ..CallLog::default() };
        self.consumers[c].calls.insert(call, log);
        self.tell_payable(c);
        let submit = Submit {
            call,
            candidates: ask.providers.iter().map(|p| self.providers[*p].listing.clone()).collect(),
            prompt: ask.prompt,
            sampling: ask.sampling,
            stop: Vec::new(),
            max_output: ask.max_output,
            ends: ask.ends,
            grammar: None,
            top_logprobs: None,
            embed: ask.texts,
            allow_fallbacks: ask.allow_fallbacks,
            part: None,
            max_cost: None,
        };
        let epoch = self.consumers[c].epoch;
        self.tell_consumer(c, epoch, ConsumerEvent::Submit(Box::new(submit)));
        self.settle();
        call
    }
    pub fn cancel(&mut self, c: usize, call: CallId) {
        let epoch = self.consumers[c].epoch;
        self.tell_consumer(c, epoch, ConsumerEvent::Cancel { call });
        self.settle();
    }
    /// Something woke it: it looks at what is due.
    pub fn tick_consumer(&mut self, c: usize) {
        let epoch = self.consumers[c].epoch;
        self.tell_consumer(c, epoch, ConsumerEvent::Tick);
        self.settle();
    }
    pub fn pause_consumer(&mut self, c: usize, why: Option<String>) {
        let epoch = self.consumers[c].epoch;
        self.tell_consumer(c, epoch, ConsumerEvent::Paused(why));
        self.settle();
    }
    /// Asks the remainders of all sessions back.
    pub fn close_all(&mut self, c: usize) {
        let listings: Vec<_> = self.providers.iter().map(|p| p.listing.clone()).collect();
        let Some(role) = &mut self.consumers[c].role else { return };
        listings.iter().for_each(|listing| role.learn(listing));
        let ids: Vec<_> = role.session_states().map(|s| s.id()).collect();
        let epoch = self.consumers[c].epoch;
        for session in ids {
            self.tell_consumer(c, epoch, ConsumerEvent::CloseSession { session });
        }
        self.settle();
    }

    pub fn call(&self, c: usize, call: CallId) -> &CallLog {
        &self.consumers[c].calls[&call]
    }
    /// Calls that a living client still waits for.
    pub fn open_calls(&self) -> usize {
        let open = |c: &super::ConsumerNode| c.calls.values().filter(|log| log.end.is_none() && !log.orphaned).count();
        self.consumers.iter().map(open).sum()
    }
    /// Runs until every call has ended.
    pub fn finish_calls(&mut self, ms: u64) {
        self.run_while("every call ends", ms, |w| w.open_calls() > 0);
        self.run_ms(2_000);
    }

    pub(super) fn drain_consumer(&mut self, c: usize) -> bool {
        let mut busy = false;
        while let Some(action) = self.consumers[c].role.as_mut().and_then(Consumer::poll_action) {
            busy = true;
            self.consumer_action(c, action);
        }
        busy
    }

    fn consumer_action(&mut self, c: usize, action: ConsumerAction) {
        let who = Who::Consumer(c);
        match action {
            ConsumerAction::Append(append) => self.append(who, append),
            ConsumerAction::Connect { link, provider, session, .. } => self.connect(c, link, provider, session),
            ConsumerAction::Control { link, frame } => {
                if let ConsumerControl::WantInvoice(_, amount) = &frame {
                    self.check_slice(c, link, *amount);
                }
                self.send_to_provider(c, link, None, frame::encode(&frame));
            }
            ConsumerAction::OpenStream { link, stream, frame } | ConsumerAction::Send { link, stream, frame } => {
                let signs = matches!(frame, ConsumerFrame::Ack(..) | ConsumerFrame::Receipt(_));
                if !(signs && self.consumers[c].never_signs) {
                    self.send_to_provider(c, link, Some(stream), frame::encode(&frame));
                }
            }
            ConsumerAction::FinishStream { link, stream } | ConsumerAction::ResetStream { link, stream } => {
                if !self.consumers[c].never_signs {
                    self.close_stream(Some(c), None, link, stream);
                }
            }
            ConsumerAction::CloseLink { link, reason, .. } => self.close_link(Some(c), None, link, reason),
            ConsumerAction::Pay { hash, bolt11, max_fee, .. } => {
                self.pay(who, hash, bolt11, max_fee, false);
            }
            ConsumerAction::ResolvePayment { hash, bolt11, max_fee, .. } => {
                self.pay(who, hash, bolt11, max_fee, true);
            }
            ConsumerAction::MakeCloseInvoice { session, amount } => {
                let lightning = self.consumers[c].purse.lightning;
                let amount = Msat(amount.0 * self.consumers[c].greed);
                let request = InvoiceRequest { amount, description_hash: Digest([1; 32]), expiry_secs: 3_600 };
                let result = self.net.create_invoice(self.now, lightning, request).map_err(|e| e.to_string());
                let epoch = self.consumers[c].epoch;
                let result = result.map(|i| i.bolt11);
                self.at(3, What::CloseInvoice { consumer: c, epoch, session, result });
            }
            ConsumerAction::WalletHandled { hash } => self.wallet_handled(who, hash),
            ConsumerAction::Emit { call, emission } => self.emission(c, call, emission),
            ConsumerAction::Penalise { provider, rule } => self.consumers[c].penalised.push((provider, rule)),
            // The role compares the heads of one run; what a store compares over runs is tested with the store.
            ConsumerAction::Witness { .. } => {}
            ConsumerAction::Left { provider, received, why } => {
                self.say(|| format!("consumer {c}: a call left {} at {received}: {why}", provider.short()));
            }
            ConsumerAction::Settled { amount, .. } => assert!(amount < Msat::MAX),
            ConsumerAction::PaidSlice { amount, fee, .. } => assert!(fee <= amount),
            ConsumerAction::Halt { reason } => {
                self.say(|| format!("consumer {c} halts: {reason}"));
                assert!(self.consumers[c].journal.broken, "consumer {c} halts by itself: {reason}");
                self.consumers[c].halted = Some(reason);
            }
        }
    }

    fn emission(&mut self, c: usize, call: CallId, emission: Emission) {
        let now = self.now;
        if self.consumers[c].parts.contains_key(&call) {
            return match emission {
                Emission::Ordered { session, request, .. } => self.part_ordered(c, call, session, request),
                Emission::Finished { bill, .. } | Emission::Failed { bill, .. } => self.part_ended(c, call, &bill),
                other => assert!(matches!(other, Emission::Started { .. }), "{other:?} from a worker"),
            };
        }
        let log = self.consumers[c].calls.get_mut(&call).expect("the call was made");
        assert!(log.end.is_none(), "{call:?} hears {emission:?} after its end");
        match emission {
            Emission::Started { provider, request } => log.started.push((provider, request)),
            Emission::Ordered { .. } | Emission::Ticket { .. } => {}
            Emission::Logprobs { .. } => {}
            Emission::Embedded { row } => log.rows.push(row),
            Emission::Tokens { ids } => {
                log.tokens.extend(ids);
                log.chunk_times.push(now);
            }
            Emission::Finished { reason, bill } => {
                log.end = Some(Ok((reason, bill)));
                log.ended_at = Some(now);
            }
            Emission::Failed { error, bill } => {
                log.end = Some(Err((error, bill)));
                log.ended_at = Some(now);
            }
        }
        if self.consumers[c].calls[&call].end.is_some() {
            self.say(|| format!("consumer {c} {call:?} ends: {:?}", self.consumers[c].calls[&call].end));
        }
    }
}
