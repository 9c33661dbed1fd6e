//! The control stream: hello, quote, open, invoices.

use super::{EngineId, InvoiceTicket, Provider, ProviderAction, peers::Peer, sessions::Session};
use crate::LinkId;
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{SessionOpen, SliceDescriptor},
};
use satgrid_protocol::{
    frame::{ConsumerControl, Hello, MAX_OPEN_REQUESTS, ProviderControl, Refusal, reason},
    session::{MAX_RECEIPTS_AHEAD, SessionState, Side, SliceStatus, invoice_hash},
};
use satgrid_types::{ListingId, ModelRoot, Msat, NodeKey, PaymentHash, Quote, SessionId, Signed, UnixMs, Verified};
use std::net::IpAddr;

/// Invoices that a session may have issued and unpaid.
const MAX_UNPAID_INVOICES: usize = 2;
/// Invoices that replace an unpaid one of the same slice, until one is paid: more is spam.
const MAX_REISSUED: u32 = 8;
/// Further quotes of one session between two payments or receipts of it: each is an entry, and costs its consumer nothing.
pub(super) const MAX_REQUOTED: u32 = 64;
/// How long after its expiry a quote may still open what was begun under it, in ms.
const QUOTE_GRACE_MS: u64 = 30_000;

/// One connection: its peer, whether it has said hello, and the session that it carries.
pub(super) struct Link {
    pub peer: NodeKey,
    pub host: Option<IpAddr>,
    since: UnixMs,
    /// Streams with rows or a download on them.
    used: u32,
    greeted: bool,
    quote: Option<(Verified<Quote>, EngineId, String)>,
    pub session: Option<SessionId>,
    /// The consumer hears of our log: its hello said so.
    pub log: bool,
    /// The consumer spends credit notes: its hello said so.
    pub credit: bool,
    /// Its questions about the log that are not answered.
    pub asks: usize,
}

impl Link {
    /// When it is closed, as long as nothing comes of it. Who sends rows to a part, fetches a tokenizer or measures the way here
    /// has no session either: rows and downloads count while they last, and a measurement is over by then.
    fn unused_at(&self, unused_link_ms: u64) -> Option<UnixMs> {
        (self.session.is_none() && self.used == 0).then(|| self.since.plus_ms(unused_link_ms))
    }
}

/// What an invoice that the wallet is making is for.
pub(super) struct WantedInvoice {
    link: LinkId,
    pub session: SessionId,
    descriptor: SliceDescriptor,
}

impl Provider {
    pub(super) fn link_up(&mut self, link: LinkId, peer: NodeKey, host: Option<IpAddr>) {
        if self.links.len() >= self.config.max_links || self.gate.is_broken() {
            let (code, reason) = (crate::CloseCode::Unavailable, "no room for another connection".into());
            self.actions.push_back(ProviderAction::CloseLink { link, code, reason });
            return;
        }
        let (since, greeted, log, credit) = (self.now, false, false, false);
        let held = Link { peer, host, since, used: 0, greeted, quote: None, session: None, log, credit, asks: 0 };
        self.links.insert(link, held);
    }

    /// Rows or a download began on a stream of this connection, or are over.
    pub(super) fn link_used(&mut self, link: LinkId, begins: bool) {
        if let Some(held) = self.links.get_mut(&link) {
            held.used = if begins { held.used.saturating_add(1) } else { held.used.saturating_sub(1) };
        }
    }

    /// Closes the connections that nothing came of: each takes a place that a customer may need.
    pub(super) fn tick_links(&mut self, now: UnixMs) {
        let unused_ms = self.config.unused_link_ms;
        let is_over = |held: &Link| held.unused_at(unused_ms).is_some_and(|at| at <= now);
        let over: Vec<LinkId> = self.links.iter().filter(|(_, held)| is_over(held)).map(|(link, _)| *link).collect();
        for link in over {
            self.counters.links_unused += 1;
            let reason = reason(format!("no session was opened here within {} s", unused_ms / 1_000));
            self.actions.push_back(ProviderAction::CloseLink { link, code: crate::CloseCode::Done, reason });
            self.links.remove(&link);
        }
    }

    /// When the next connection is closed that nothing comes of.
    pub(super) fn next_unused_link(&self) -> Option<UnixMs> {
        self.links.values().filter_map(|held| held.unused_at(self.config.unused_link_ms)).min()
    }

    pub(super) fn control(&mut self, now: UnixMs, link: LinkId, frame: ConsumerControl) {
        let Some(held) = self.links.get_mut(&link) else { return };
        if !held.greeted {
            return match frame {
                ConsumerControl::Hello(hello) if hello.version == Hello::VERSION => {
                    held.greeted = true;
                    held.log = hello.speaks_of_its_log();
                    held.credit = hello.spends_credit();
                    self.say(link, ProviderControl::Hello(Hello::ours()));
                }
                ConsumerControl::Hello(hello) => {
                    self.violation(
                        link,
                        format!("version {} is not spoken here, only {}", hello.version, Hello::VERSION),
                    );
                }
                ConsumerControl::WantQuote(..)
                | ConsumerControl::Open(_)
                | ConsumerControl::WantInvoice(..)
                | ConsumerControl::Resume(..)
                | ConsumerControl::WantProof(_)
                | ConsumerControl::SpendCredit(_)
                | ConsumerControl::Close(_) => self.violation(link, "the first frame is a hello"),
            };
        }
        match frame {
            ConsumerControl::Hello(_) => self.violation(link, "a second hello"),
            ConsumerControl::WantQuote(listing, root) => self.want_quote(now, link, listing, root),
            ConsumerControl::Open(open) => self.open(now, link, &open),
            ConsumerControl::WantInvoice(k, amount) => self.want_invoice(now, link, k, amount),
            ConsumerControl::Resume(_, open, _, _) if open.len() > MAX_OPEN_REQUESTS => {
                self.violation(link, "too many open requests in a resume");
            }
            ConsumerControl::Resume(_, _, _, Some(earlier)) if earlier.len() > MAX_RECEIPTS_AHEAD => {
                self.violation(link, "too many receipts in a resume");
            }
            ConsumerControl::Resume(session, open, last, earlier) => {
                let receipts = earlier.into_iter().flatten().chain(last).collect();
                self.resume(now, link, session, open, receipts);
            }
            ConsumerControl::Close(close) => self.close(now, link, &close),
            ConsumerControl::WantProof(ask) => self.want_proof(link, ask),
            ConsumerControl::SpendCredit(order) => self.spend_credit(now, link, &order),
        }
    }

    fn want_quote(&mut self, now: UnixMs, link: LinkId, listing: ListingId, root: ModelRoot) {
        let Some(peer) = self.links.get(&link).map(|l| l.peer) else { return };
        // A listing that was replaced is quoted under its successor, which the consumer checks against what it knows.
        let offering = self.offerings.get(&listing).filter(|o| o.listing.model_root == root && o.is_live(now)).cloned();
        let Some(offering) = offering else {
            return self.refuse(link, Refusal::NotOffered, "this listing is not (or no longer) offered here");
        };
        let ours = self.keys.node_key();
        let former = self.links.get(&link).and_then(|l| l.session).and_then(|id| self.sessions.get(&id));
        if former.is_some_and(|session| session.state.provider() != ours) {
            return self.refuse(
                link,
                Refusal::NotOffered,
                "this session is under a key that was given up: open another",
            );
        }
        let listed = &offering.listing;
        let quote = Quote {
            version: Quote::VERSION,
            provider: ours,
            lightning_node: listed.lightning_node,
            consumer: peer,
            listing: listed.id(),
            model_root: listed.model_root,
            tokenizer: listed.tokenizer,
            quantisation: listed.quantisation.clone(),
            profile: offering.profile,
            build: offering.build,
            instruction_set: listed.instruction_set.clone(),
            context_length: listed.context_length,
            rates: offering.rates,
            terms: self.terms_for(&offering),
            issued_at: now,
            valid_until: now.plus_ms(self.config.quote_validity_ms),
            nonce: self.nonce(),
        };
        let signed = Signed::sign(&quote, self.keys.now());
        let Ok(verified) = signed.verify(&ours) else { return };
        let session = self.links.get(&link).and_then(|l| l.session);
        match session.and_then(|id| self.sessions.get_mut(&id).map(|s| (id, s))) {
            Some((_, session)) if session.requoted >= MAX_REQUOTED => {
                let text = format!("{MAX_REQUOTED} quotes of this session, and nothing was paid or done under them");
                self.refuse(link, Refusal::Quote, text);
            }
            Some((id, session)) => {
                session.requoted = session.requoted.saturating_add(1);
                session.engine = Some(offering.engine);
                let drafts = vec![listing_draft(&offering.listing), session.state.requote(&verified)];
                let then = vec![ProviderAction::Control { link, frame: ProviderControl::Quote(signed) }];
                self.record(id, drafts, then);
            }
            None => {
                if let Some(held) = self.links.get_mut(&link) {
                    held.quote = Some((verified, offering.engine, event_json(&offering.listing)));
                }
                self.say(link, ProviderControl::Quote(signed));
            }
        }
    }

    fn open(&mut self, now: UnixMs, link: LinkId, signed: &Signed<SessionOpen>) {
        let Some(held) = self.links.get_mut(&link) else { return };
        if held.session.is_some() {
            return self.violation(link, "one session per connection");
        }
        let Ok(open) = signed.verify(&held.peer) else {
            return self.violation(link, "the open statement is not signed by this connection's key");
        };
        let Some((quote, engine, event_json)) = held.quote.take() else {
            return self.refuse(link, Refusal::Quote, "ask for a quote first");
        };
        if let Some(why) = self.paused.clone() {
            return self.refuse(link, Refusal::Unavailable, why);
        }
        let ours = self.keys.node_key();
        let fits = open.version == SessionOpen::VERSION
            && open.provider == ours
            && open.consumer == quote.consumer
            && open.quote == quote.quote_id();
        if !fits || now > quote.valid_until.plus_ms(QUOTE_GRACE_MS) {
            return self.refuse(link, Refusal::Quote, "the open statement does not accept the quote given here");
        }
        let (peer, key) = (Peer::of(held.host, held.peer), held.peer);
        if !self.room_for_session(now, peer, key) {
            return self.refuse(link, Refusal::Busy, "too many sessions wait here for a first payment");
        }
        let state = SessionState::new(Side::Provider, &quote, &open);
        let id = state.id();
        if let Some(held) = self.links.get_mut(&link) {
            held.session = Some(id);
        }
        self.note_unpaid(id, state.lapses_at());
        self.sessions.insert(id, Session::new(state, peer, Some(link), Some(engine)));
        let mut drafts = vec![Draft::of(Evidence::Listing { event_json })];
        drafts.extend(SessionState::open_drafts(&quote, &open));
        let opened = ProviderAction::Control { link, frame: ProviderControl::Opened(id) };
        self.append(drafts, vec![opened]);
    }

    fn want_invoice(&mut self, now: UnixMs, link: LinkId, k: u32, amount: Msat) {
        let Some(id) = self.links.get(&link).and_then(|l| l.session) else {
            return self.refuse(link, Refusal::Unknown, "no session on this connection");
        };
        let Some(session) = self.sessions.get(&id) else { return };
        // What runs is paid for to its end; nothing is taken for work that would not be begun.
        if let Some(why) = self.paused.clone().filter(|_| session.requests.is_empty()) {
            return self.refuse(link, Refusal::Unavailable, why);
        }
        let state = &session.state;
        let terms = &state.quote().terms;
        if now > state.quote().valid_until {
            return self.refuse(link, Refusal::Quote, "the quote has expired: ask for a new one");
        }
        if amount < terms.min_slice || amount > terms.max_slice {
            let text = format!("a slice is between {} and {}", terms.min_slice, terms.max_slice);
            return self.refuse(link, Refusal::Protocol, text);
        }
        let taken = state.slices().get(&k).is_some_and(|s| s.status == SliceStatus::Paid);
        let reissue = state.slices().get(&k).is_some();
        let reissued = session.reissued.saturating_add(u32::from(reissue));
        if reissued > MAX_REISSUED {
            return self.refuse(
                link,
                Refusal::Protocol,
                format!("slice {k} was invoiced {MAX_REISSUED} times and not paid"),
            );
        }
        if taken || state.close_statement().is_some() || session.closing.is_some() {
            return self.refuse(link, Refusal::Protocol, format!("slice {k} is settled, or the session is closed"));
        }
        if !reissue && (k != state.next_k().max(slices_issued(state)) || state.unpaid_invoices() >= MAX_UNPAID_INVOICES)
        {
            return self.refuse(
                link,
                Refusal::Protocol,
                format!("slice {k} is not the next one, or two invoices are unpaid"),
            );
        }
        let descriptor = state.descriptor(k, amount);
        let ticket = InvoiceTicket(self.next_invoice);
        self.next_invoice = self.next_invoice.wrapping_add(1);
        let (description_hash, expiry_secs) = (descriptor.description_hash(), terms.invoice_expiry_secs);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.reissued = reissued;
        }
        // One at a time: what was asked for on a link that broke is not waited for.
        self.invoices.retain(|_, wanted| wanted.session != id);
        self.invoices.insert(ticket, WantedInvoice { link, session: id, descriptor });
        self.actions.push_back(ProviderAction::MakeInvoice { ticket, amount, description_hash, expiry_secs });
    }

    pub(super) fn invoice_made(&mut self, ticket: InvoiceTicket, result: Result<String, String>) {
        let Some(WantedInvoice { link, session, descriptor }) = self.invoices.remove(&ticket) else { return };
        let bolt11 = match result {
            Ok(bolt11) => bolt11,
            Err(error) => return self.refuse(link, Refusal::Unavailable, format!("no invoice could be made: {error}")),
        };
        if self.links.get(&link).and_then(|l| l.session) != Some(session) {
            return;
        }
        let Some(live) = self.sessions.get(&session) else { return };
        // While the wallet made it, an earlier invoice of this slice may have been paid, or the session closed.
        let paid = live.state.slices().get(&descriptor.k).is_some_and(|s| s.status == SliceStatus::Paid);
        if paid || live.state.close_statement().is_some() {
            let text = format!("slice {} is settled, or the session is closed", descriptor.k);
            return self.refuse(link, Refusal::Protocol, text);
        }
        if let Some(hash) = invoice_hash(&bolt11) {
            self.by_payment.insert(hash, session);
        }
        let draft = live.state.invoiced(descriptor.clone(), bolt11.clone());
        let then = vec![ProviderAction::Control { link, frame: ProviderControl::Invoice(descriptor, bolt11) }];
        self.record(session, vec![draft], then);
    }

    pub(super) fn payment_received(&mut self, now: UnixMs, hash: PaymentHash, amount: Msat) {
        let handled = ProviderAction::WalletHandled { hash };
        let known = self.by_payment.get(&hash).copied();
        let session = known.and_then(|id| self.sessions.get_mut(&id).map(|s| (id, s)));
        let Some((id, session)) = session else {
            // Somebody paid an invoice that is not a slice of ours: the wallet's affair, counted and left alone.
            self.counters.payments_unknown += 1;
            return self.actions.push_back(handled);
        };
        if session.state.close_statement().is_some() {
            // The consumer asked for its remainder and then paid more, on an invoice that cannot be called back: it is a
            // gift. Nothing could be bought with it, and the session's account is closed.
            self.counters.payments_unknown += 1;
            return self.actions.push_back(handled);
        }
        let Ok(draft) = session.state.received(hash, amount) else {
            // Told twice (a payment hash credits once), or paid on an invoice that was replaced.
            let twice = session.state.slice_by_hash(&hash).is_some_and(|(_, s)| s.payment_hash == Some(hash));
            self.counters.payments_unknown += u64::from(!twice);
            return self.actions.push_back(handled);
        };
        self.counters.slices += 1;
        (session.reissued, session.requoted) = (0, 0);
        let k = session.state.slice_by_hash(&hash).map_or(0, |(k, _)| k);
        let link = session.link;
        let paid = session.state.slices().get(&k).map_or(Msat::ZERO, |s| s.amount).saturating_add(session.state.paid());
        let mut then = vec![handled];
        if let Some(link) = link {
            then.push(ProviderAction::Control { link, frame: ProviderControl::Credited(k, paid) });
        }
        self.record(id, vec![draft], then);
        self.funds_arrived(now, id);
    }
}

fn slices_issued(state: &SessionState) -> u32 {
    state.slices().last_key_value().map_or(0, |(k, _)| k.saturating_add(1))
}

/// A listing's signed event as JSON, for the journal.
pub(crate) fn event_json(listing: &satgrid_types::VerifiedListing) -> String {
    listing.event().to_json()
}

fn listing_draft(listing: &satgrid_types::VerifiedListing) -> Draft {
    Draft::of(Evidence::Listing { event_json: event_json(listing) })
}
