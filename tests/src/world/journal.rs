//! A journal in memory that books every draft before it takes it, answers after a while, and can lose its tail.

use satgrid_ledger::{Books, Draft, Entry, Head, entry::Evidence};
use satgrid_node::Ticket;
use satgrid_types::UnixMs;
use std::collections::VecDeque;

/// See the module.
#[derive(Default)]
pub struct SimJournal {
    entries: Vec<Entry>,
    books: Books,
    /// Appends that were not answered yet: the ticket and how many entries there are with it.
    pending: VecDeque<(Ticket, usize)>,
    durable: usize,
    /// Writes fail from now on.
    pub broken: bool,
}

impl SimJournal {
    pub fn with_genesis(at: UnixMs, genesis: Evidence) -> SimJournal {
        let mut journal = SimJournal::default();
        journal.take(at, Draft::of(genesis));
        journal.durable = journal.entries.len();
        journal
    }

    /// Takes an append in. It is durable once [`SimJournal::durable`] was called for it; appends become so in order.
    ///
    /// # Panics
    /// Where a draft does not balance or breaks the books: a role asked for something that it never may.
    pub fn append(&mut self, at: UnixMs, ticket: Ticket, drafts: Vec<Draft>) {
        for draft in drafts {
            self.take(at, draft);
        }
        self.pending.push_back((ticket, self.entries.len()));
    }

    fn take(&mut self, at: UnixMs, draft: Draft) {
        let head = self.entries.last().map_or(Head::EMPTY, Entry::head);
        let kind = draft.evidence.as_ref().map_or("reservation", Evidence::kind);
        if let Err(error) = self.books.apply(at, &draft) {
            panic!("the books refuse a {kind} draft: {error}\n{draft:#?}");
        }
        self.entries.push(Entry::chain(&head, at, draft));
    }

    /// The oldest pending append is on disk. Its ticket must be this one.
    /// Gives its entries.
    pub fn durable(&mut self, ticket: Ticket) -> &[Entry] {
        let (first, len) = self.pending.pop_front().expect("an append was pending");
        assert_eq!(first, ticket, "appends become durable in order");
        let before = core::mem::replace(&mut self.durable, len);
        &self.entries[before..len]
    }

    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The process dies: of the appends that were not answered, the first `survive` reached the disk after all.
    pub fn crash(&mut self, survive: usize) {
        let last = survive.checked_sub(1).and_then(|at| self.pending.get(at));
        let kept = last.map_or(self.durable, |(_, len)| *len);
        self.entries.truncate(kept);
        self.pending.clear();
        self.durable = kept;
        self.books = Books::new();
        for entry in &self.entries {
            self.books.apply(entry.at, &entry.draft()).expect("it was booked before");
        }
    }

    pub fn durable_entries(&self) -> &[Entry] {
        &self.entries[..self.durable]
    }
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
    pub fn books(&self) -> &Books {
        &self.books
    }
    /// Evidence of one kind.
    pub fn count(&self, kind: &str) -> usize {
        self.entries.iter().filter(|e| e.evidence.as_ref().is_some_and(|e| e.kind() == kind)).count()
    }
    /// The rules that kept proofs name.
    pub fn misbehaviour(&self) -> Vec<String> {
        let rule = |e: &Entry| match &e.evidence {
            Some(Evidence::Misbehaviour { rule, .. }) => Some(rule.clone()),
            _ => None,
        };
        self.entries.iter().filter_map(rule).collect()
    }
}
