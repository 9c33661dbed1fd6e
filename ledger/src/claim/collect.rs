//! From a journal's entries to the pieces of a claim, and to a list of sessions in which something is at stake.

use super::{ClaimHeader, Maker};
use crate::{
    audit::read_invoice,
    entry::{Entry, Evidence},
    statements::SessionOpen,
    transfer::Account,
};
use satgrid_types::{Msat, NodeKey, PaymentHash, RequestId, SessionId, UnixMs, statement_id};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Requests that ended, as many as a claim shows at the most.
const MOST_ENDED: usize = 16_384;

/// A request that runs or ended without a receipt: its opening and its last acknowledgement.
type Acked = (Evidence, Option<Evidence>);

/// Collects one session's claim. Give it every entry of the journal, or of that session's export, in order.
#[derive(Debug)]
pub struct ClaimCollector {
    session: SessionId,
    /// The keys that were this journal's node, one after the other.
    ours: BTreeSet<NodeKey>,
    network: String,
    /// Quotes by session key: whose they are is known once the session opens.
    quotes: BTreeMap<NodeKey, Vec<Evidence>>,
    open: Option<(Evidence, SessionOpen)>,
    invoices: BTreeMap<PaymentHash, Evidence>,
    paid: Vec<(Evidence, Evidence)>,
    /// The newest receipts: one alone does not say whose work its running total holds.
    receipts: VecDeque<Evidence>,
    /// Requests whose work is in no receipt yet.
    running: BTreeMap<RequestId, Acked>,
    /// Requests that were broken off after the last receipt: no receipt's running total holds them.
    broken_off: BTreeMap<RequestId, Acked>,
    /// Those of before: the last receipt's running total holds them, beside what the receipts do. A provider shows them, so
    /// that they can be told from the others.
    before: BTreeMap<RequestId, Acked>,
    /// So many ended that not all are shown.
    many: bool,
    close: Option<Evidence>,
    note: Option<Evidence>,
    refunds: Vec<Evidence>,
    /// Credit notes that were spent in this session, or this session's in another.
    credit: Vec<Evidence>,
}

impl ClaimCollector {
    pub fn new(session: SessionId) -> ClaimCollector {
        ClaimCollector {
            session,
            ours: BTreeSet::new(),
            network: String::new(),
            quotes: BTreeMap::new(),
            open: None,
            invoices: BTreeMap::new(),
            paid: Vec::new(),
            receipts: VecDeque::new(),
            running: BTreeMap::new(),
            broken_off: BTreeMap::new(),
            before: BTreeMap::new(),
            many: false,
            close: None,
            note: None,
            refunds: Vec::new(),
            credit: Vec::new(),
        }
    }

    /// Takes one entry; those of other sessions are passed over.
    pub fn observe(&mut self, entry: &Entry) {
        let Some(evidence) = &entry.evidence else { return };
        let ours = |session: &SessionId| *session == self.session;
        match evidence {
            Evidence::Genesis { node, network, .. } => {
                self.ours.insert(*node);
                self.network.clone_from(network);
            }
            Evidence::Succession(signed) => self.ours.extend(signed.heir()),
            Evidence::Quote(quote) => {
                if let Ok(body) = quote.peek()
                    && self.open.as_ref().is_none_or(|(_, open)| open.consumer == body.consumer)
                {
                    self.quotes.entry(body.consumer).or_default().push(evidence.clone());
                }
            }
            Evidence::Open(open) => {
                if ours(&SessionId(statement_id::<SessionOpen>(open.body())))
                    && let Ok(body) = open.peek()
                {
                    self.quotes.retain(|key, _| *key == body.consumer);
                    self.open = Some((evidence.clone(), body));
                }
            }
            Evidence::Invoice { session, bolt11, .. } => {
                if ours(session)
                    && let Ok(facts) = read_invoice(bolt11)
                {
                    self.invoices.insert(facts.payment_hash, evidence.clone());
                }
            }
            Evidence::PaymentSettled { payment_hash, .. } | Evidence::PaymentReceived { payment_hash, .. } => {
                if let Some(invoice) = self.invoices.remove(payment_hash) {
                    self.paid.push((invoice, evidence.clone()));
                }
            }
            Evidence::Request(request) => {
                if let Ok(open) = request.peek()
                    && ours(&open.session)
                {
                    self.running.insert(open.request, (evidence.clone(), None));
                }
            }
            Evidence::Ack(ack) => {
                if let Ok(body) = ack.peek()
                    && ours(&body.session)
                    && let Some((_, last)) = self.running.get_mut(&body.request)
                {
                    *last = Some(evidence.clone());
                }
            }
            Evidence::Receipt { receipt, .. } => {
                if let Ok(body) = receipt.peek()
                    && ours(&body.session)
                {
                    self.running.remove(&body.request);
                    self.before.append(&mut self.broken_off);
                    self.receipts.push_back(Evidence::Receipt { receipt: receipt.clone(), opening: None });
                    self.keep_to_the_limit();
                }
            }
            Evidence::Abandoned { session, request, .. } => {
                if ours(session)
                    && let Some(acked) = self.running.remove(request)
                {
                    self.broken_off.insert(*request, acked);
                }
            }
            Evidence::Close(close) => {
                if close.peek().is_ok_and(|body| ours(&body.session)) {
                    self.close = Some(evidence.clone());
                }
            }
            Evidence::CreditNote(note) => {
                if note.peek().is_ok_and(|body| ours(&body.session)) {
                    self.note = Some(evidence.clone());
                }
            }
            Evidence::RefundSettled { session, .. } | Evidence::RefundReceived { session, .. } => {
                if ours(session) {
                    self.refunds.push(evidence.clone());
                }
            }
            Evidence::CreditTransfer(both) => {
                if both.peek().is_ok_and(|body| ours(&body.from) || ours(&body.to)) {
                    self.credit.push(evidence.clone());
                }
            }
            Evidence::Listing { .. }
            | Evidence::PaymentAttempted { .. }
            | Evidence::PaymentFailed { .. }
            | Evidence::RefundAttempted { .. }
            | Evidence::ChannelClosed { .. }
            | Evidence::WalletPayment { .. }
            | Evidence::OnChain { .. }
            | Evidence::Misbehaviour { .. }
            | Evidence::WalletSnapshot { .. }
            | Evidence::Checkpoint { .. }
            | Evidence::Promise(_) => {}
        }
    }

    /// Past the limit the newest receipts are shown, and nothing of what was broken off before the last.
    fn keep_to_the_limit(&mut self) {
        self.many |= self.receipts.len().saturating_add(self.before.len()) > MOST_ENDED;
        if self.many {
            self.before.clear();
            while self.receipts.len() > MOST_ENDED {
                self.receipts.pop_front();
            }
        }
    }

    /// The header and the pieces in the order of the format; `None` where the journal does not hold the session.
    pub fn finish(self) -> Option<(ClaimHeader, Vec<Evidence>)> {
        let (open, body) = self.open?;
        let maker = if self.ours.contains(&body.provider) { Maker::Provider } else { Maker::Consumer };
        let mut pieces: Vec<Evidence> = self.quotes.into_values().flatten().collect();
        pieces.push(open);
        for (invoice, payment) in self.paid {
            pieces.extend([invoice, payment]);
        }
        pieces.extend(self.receipts);
        let before = match maker {
            Maker::Consumer => BTreeMap::new(),
            Maker::Provider => self.before,
        };
        let acked = before.into_values().chain(self.broken_off.into_values()).chain(self.running.into_values());
        for (request, ack) in acked {
            // A request that was never acknowledged costs nothing.
            pieces.extend(ack.map(|ack| [request, ack]).into_iter().flatten());
        }
        pieces.extend(self.close);
        pieces.extend(self.note);
        pieces.extend(self.refunds);
        pieces.extend(self.credit);
        Some((ClaimHeader::new(maker, self.network), pieces))
    }
}

/// What stands in one session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stake {
    pub as_provider: bool,
    pub provider: NodeKey,
    pub consumer: NodeKey,
    pub opened_at: UnixMs,
    /// Prepaid and not charged for, or due as a refund, by this journal's books.
    pub amount: Msat,
    pub closed: bool,
}

/// Which sessions of a journal hold money, for `claim` without a session.
#[derive(Debug, Default)]
pub struct Stakes {
    ours: BTreeSet<NodeKey>,
    sessions: BTreeMap<SessionId, Stake>,
}

impl Stakes {
    pub fn observe(&mut self, entry: &Entry) {
        match &entry.evidence {
            Some(Evidence::Genesis { node, .. }) => drop(self.ours.insert(*node)),
            Some(Evidence::Succession(signed)) => self.ours.extend(signed.heir()),
            Some(Evidence::Open(open)) => {
                if let Ok(body) = open.peek() {
                    let stake = Stake {
                        as_provider: self.ours.contains(&body.provider),
                        provider: body.provider,
                        consumer: body.consumer,
                        opened_at: body.opened_at,
                        amount: Msat::ZERO,
                        closed: false,
                    };
                    self.sessions.insert(SessionId(statement_id::<SessionOpen>(open.body())), stake);
                }
            }
            Some(Evidence::Close(close)) => {
                if let Ok(body) = close.peek()
                    && let Some(stake) = self.sessions.get_mut(&body.session)
                {
                    stake.closed = true;
                }
            }
            Some(_) | None => {}
        }
    }

    /// The sessions in which the books hold something.
    pub fn finish(self, books: &crate::Books) -> BTreeMap<SessionId, Stake> {
        let with = |(id, stake): (SessionId, Stake)| {
            let accounts = [Account::PrepaidAsset(id), Account::Prepaid(id), Account::RefundsDue(id)];
            let sum = accounts.iter().fold(0i128, |sum, account| sum.saturating_add(books.balance(account)));
            let amount = Msat(u64::try_from(sum.max(0)).unwrap_or(u64::MAX));
            (id, Stake { amount, ..stake })
        };
        self.sessions.into_iter().map(with).filter(|(_, stake)| !stake.amount.is_zero()).collect()
    }
}
