//! Effects that wait for their entry to become durable.

use crate::{Append, Ticket};
use satgrid_ledger::entry::Draft;
use std::collections::BTreeMap;

/// Holds back the actions that an append authorises until the journal has answered.
#[derive(Debug)]
pub struct Gate<A> {
    next: u64,
    waiting: BTreeMap<Ticket, Waiting<A>>,
    broken: bool,
}

#[derive(Debug)]
struct Waiting<A> {
    then: Vec<A>,
    durable: bool,
}

impl<A> Default for Gate<A> {
    fn default() -> Self {
        Gate { next: 0, waiting: BTreeMap::new(), broken: false }
    }
}

impl<A> Gate<A> {
    /// Entries to append now, and the actions to release once they are durable.
    pub fn append(&mut self, drafts: Vec<Draft>, then: Vec<A>) -> Append {
        let ticket = Ticket(self.next);
        self.next = self.next.wrapping_add(1);
        self.waiting.insert(ticket, Waiting { then, durable: false });
        Append { ticket, drafts }
    }
    /// Actions that need nothing new, but must not overtake what was asked for before: released with the last append that
    /// is not durable yet. Gives them back where there is none.
    pub fn behind(&mut self, then: Vec<A>) -> Vec<A> {
        match self.waiting.last_entry() {
            Some(mut last) => {
                last.get_mut().then.extend(then);
                Vec::new()
            }
            None => then,
        }
    }
    /// As [`Gate::behind`], but what came after `entry` need not be durable, as long as that is no more than `newest` appends.
    pub fn behind_entry(&mut self, entry: Option<Ticket>, newest: usize, then: Vec<A>) -> Vec<A> {
        let beyond = self.waiting.len().checked_sub(newest.saturating_add(1));
        let beyond = beyond.and_then(|nth| self.waiting.keys().nth(nth).copied());
        let entry = entry.filter(|entry| self.waiting.contains_key(entry)).max(beyond);
        match entry.and_then(|entry| self.waiting.get_mut(&entry)) {
            Some(waiting) => {
                waiting.then.extend(then);
                Vec::new()
            }
            None => then,
        }
    }
    /// The last append, if it is not durable yet.
    pub fn newest(&self) -> Option<Ticket> {
        self.waiting.last_key_value().map(|(ticket, _)| *ticket)
    }
    /// The journal has it: the actions that were held back, and those that are free now because of it. Answers of a journal may
    /// overtake each other on their way here; actions never do.
    pub fn durable(&mut self, ticket: Ticket) -> Vec<A> {
        if let Some(waiting) = self.waiting.get_mut(&ticket) {
            waiting.durable = true;
        }
        let mut free = Vec::new();
        while let Some(first) = self.waiting.first_entry().filter(|first| first.get().durable) {
            free.extend(first.remove().then);
        }
        free
    }
    /// The journal cannot write: what was authorised by nothing durable never happens. Returns what that was.
    pub fn fail(&mut self) -> Vec<A> {
        self.broken = true;
        core::mem::take(&mut self.waiting).into_values().flat_map(|waiting| waiting.then).collect()
    }
    pub fn is_broken(&self) -> bool {
        self.broken
    }
    /// Appends that the journal has not answered.
    pub fn backlog(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effects_wait_for_their_entry_and_what_comes_behind_waits_too() {
        let mut gate = Gate::default();
        assert_eq!(gate.behind(vec!["free"]), vec!["free"], "nothing is awaited");
        let (first, second) = (gate.append(Vec::new(), vec!["a"]), gate.append(Vec::new(), vec!["b"]));
        assert!(gate.behind(vec!["c"]).is_empty());
        assert_eq!(gate.durable(first.ticket), vec!["a"]);
        assert_eq!(gate.durable(second.ticket), vec!["b", "c"]);
        assert_eq!((gate.durable(second.ticket), gate.backlog()), (vec![], 0), "once");
    }

    #[test]
    fn answers_that_overtake_each_other_release_nothing_too_early() {
        let mut gate = Gate::default();
        let (first, second) = (gate.append(Vec::new(), vec!["order"]), gate.append(Vec::new(), vec!["ack"]));
        assert!(gate.behind(vec!["route"]).is_empty());
        assert!(gate.durable(second.ticket).is_empty(), "its order is not out yet");
        assert_eq!(gate.durable(first.ticket), vec!["order", "ack", "route"]);
        assert_eq!(gate.backlog(), 0);
    }

    #[test]
    fn some_may_go_ahead_of_the_newest() {
        let mut gate = Gate::default();
        assert_eq!(gate.behind_entry(None, 1, vec!["free"]), vec!["free"]);
        let (first, second) = (gate.append(Vec::new(), vec!["a"]), gate.append(Vec::new(), vec!["b"]));
        assert_eq!(gate.newest(), Some(second.ticket));
        assert_eq!(gate.behind_entry(None, 2, vec!["c"]), vec!["c"]);
        assert!(gate.behind_entry(None, 1, vec!["d"]).is_empty(), "no more than one is left behind");
        assert!(gate.behind_entry(Some(first.ticket), 7, vec!["e"]).is_empty());
        assert!(gate.behind_entry(Some(second.ticket), 7, vec!["f"]).is_empty());
        assert_eq!(gate.durable(first.ticket), vec!["a", "d", "e"]);
        assert_eq!(gate.behind_entry(Some(first.ticket), 7, vec!["g"]), vec!["g"], "it is on the disk");
        assert_eq!(gate.durable(second.ticket), vec!["b", "f"]);
    }

    #[test]
    fn what_was_not_written_never_happens() {
        let mut gate = Gate::default();
        let append = gate.append(Vec::new(), vec!["pay"]);
        assert_eq!(gate.fail(), vec!["pay"]);
        assert!(gate.durable(append.ticket).is_empty() && gate.is_broken());
    }
}
