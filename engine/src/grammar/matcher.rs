//! Running a grammar: the set of places in it where the output so far may stand.
//!
//! A place is a stack: the text or byte set that comes next, and what follows it. The stacks share their tails. All
//! bounds are here: how deep a stack, how many at once, how much work one byte, one token or one look through the vocabulary
//! may cause. The work depends on nothing but the grammar, the output and the vocabulary.

use std::sync::Arc;

use super::{Grammar, Node, NodeId};

/// Nesting of an answer; what would go deeper is not allowed.
const MAX_DEPTH: u32 = 512;
/// Places at once. A JSON schema needs a few; more is a grammar that does not know what it wants.
const MAX_PLACES: usize = 512;
/// Steps that one byte may cause.
const MAX_STEPS: usize = 50_000;

/// Work of one step; to look at a link or at a range of bytes is 1.
const STEP: usize = 8;
/// Work that one token's bytes may cause: a JSON schema's take some thousands.
const TOKEN_WORK: u64 = 1 << 24;
/// Work that a look through the whole vocabulary may cause, or all that an earlier run has said: some seconds. Inside a JSON
/// string, where most of a large vocabulary may follow, a byte's step takes a few hundred, and all of them 2^28 or so.
const MANY_WORK: u64 = 1 << 32;

/// Work that may still be done.
pub(super) struct Work(u64);

impl Work {
    pub(super) fn of_a_token() -> Self {
        Self(TOKEN_WORK)
    }

    pub(super) fn of_many() -> Self {
        Self(MANY_WORK)
    }

    fn spend(&mut self, work: usize) -> Result<(), Overrun> {
        self.0 = self.0.checked_sub(work as u64).ok_or(Overrun)?;
        Ok(())
    }
}

/// What follows once a node is through: the next part of a sequence or text, or a repetition's next round.
#[derive(Debug)]
struct Link {
    node: NodeId,
    at: u32,
    depth: u32,
    rest: Option<Arc<Link>>,
}

/// The places where some output may stand.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// Each on a text or a byte set.
    open: Vec<Arc<Link>>,
    /// The output may end here.
    complete: bool,
}

/// The grammar allows too many readings of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the grammar is too ambiguous to follow")]
pub struct Overrun;

/// A grammar and where its output stands.
#[derive(Debug, Clone)]
pub struct Matcher {
    grammar: Arc<Grammar>,
    places: Places,
}

enum Task {
    Enter(NodeId, Option<Arc<Link>>),
    Leave(Option<Arc<Link>>),
    Round { node: NodeId, done: u32, rest: Option<Arc<Link>> },
}

impl Matcher {
    /// At the beginning of a grammar that was checked.
    pub fn new(grammar: Arc<Grammar>) -> Result<Self, Overrun> {
        let mut places = Places::default();
        settle(&grammar, vec![Task::Enter(grammar.root, None)], &mut places, &mut Work::of_a_token())?;
        Ok(Self { grammar, places })
    }

    /// Takes bytes in; false, and nothing changes, where they do not fit.
    pub fn accept(&mut self, bytes: &[u8]) -> Result<bool, Overrun> {
        self.accept_within(bytes, &mut Work::of_a_token())
    }

    pub(super) fn accept_within(&mut self, bytes: &[u8], work: &mut Work) -> Result<bool, Overrun> {
        match self.after(&self.places, bytes, work)? {
            Some(places) => {
                self.places = places;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    pub fn allows(&self, bytes: &[u8]) -> Result<bool, Overrun> {
        Ok(self.after(&self.places, bytes, &mut Work::of_a_token())?.is_some())
    }

    /// The output may end here.
    pub fn is_complete(&self) -> bool {
        self.places.complete
    }

    /// The output is complete and nothing may follow.
    pub fn is_over(&self) -> bool {
        self.places.complete && self.places.open.is_empty()
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    fn after(&self, places: &Places, bytes: &[u8], work: &mut Work) -> Result<Option<Places>, Overrun> {
        let mut now: Option<Places> = None;
        for &byte in bytes {
            let next = self.step(now.as_ref().unwrap_or(places), byte, work)?;
            if next.is_none() {
                return Ok(None);
            }
            now = next;
        }
        Ok(Some(now.unwrap_or_else(|| places.clone())))
    }

    /// The places one byte on; `None` where it fits none.
    pub(super) fn step(&self, from: &Places, byte: u8, work: &mut Work) -> Result<Option<Places>, Overrun> {
        let mut tasks = Vec::new();
        work.spend(from.open.len())?;
        for place in &from.open {
            match &self.grammar.nodes[place.node as usize] {
                Node::Text(text) if text.get(place.at as usize) == Some(&byte) => {
                    let at = place.at + 1;
                    if at as usize == text.len() {
                        tasks.push(Task::Leave(place.rest.clone()));
                    } else {
                        tasks.push(Task::Leave(Some(link(place.node, at, place.rest.clone()))));
                    }
                }
                Node::Bytes(ranges) => {
                    work.spend(ranges.len())?;
                    if ranges.iter().any(|(low, high)| (*low..=*high).contains(&byte)) {
                        tasks.push(Task::Leave(place.rest.clone()));
                    }
                }
                Node::Text(_) | Node::Sequence(_) | Node::Choice(_) | Node::Repeat { .. } => {}
            }
        }
        if tasks.is_empty() {
            return Ok(None);
        }
        tasks.reverse();
        let mut places = Places::default();
        settle(&self.grammar, tasks, &mut places, work)?;
        Ok((places.complete || !places.open.is_empty()).then_some(places))
    }
}

fn link(node: NodeId, at: u32, rest: Option<Arc<Link>>) -> Arc<Link> {
    let depth = rest.as_ref().map_or(0, |rest| rest.depth) + 1;
    Arc::new(Link { node, at, depth, rest })
}

/// Works tasks down to places on texts and byte sets.
fn settle(grammar: &Grammar, mut tasks: Vec<Task>, places: &mut Places, work: &mut Work) -> Result<(), Overrun> {
    let mut steps = 0;
    while let Some(task) = tasks.pop() {
        steps += 1;
        // What waits is a step each, too: too much of it ends here and not once it fills the memory.
        if steps + tasks.len() > MAX_STEPS {
            return Err(Overrun);
        }
        work.spend(STEP)?;
        match task {
            Task::Enter(id, rest) => {
                if rest.as_ref().is_some_and(|rest| rest.depth >= MAX_DEPTH) {
                    continue;
                }
                match &grammar.nodes[id as usize] {
                    Node::Text(text) if text.is_empty() => tasks.push(Task::Leave(rest)),
                    Node::Text(_) | Node::Bytes(_) => open(places, link(id, 0, rest), work)?,
                    Node::Sequence(_) => tasks.push(Task::Leave(Some(link(id, 0, rest)))),
                    Node::Choice(options) => {
                        tasks.extend(options.iter().rev().map(|option| Task::Enter(*option, rest.clone())));
                    }
                    Node::Repeat { .. } => tasks.push(Task::Round { node: id, done: 0, rest }),
                }
            }
            Task::Leave(None) => places.complete = true,
            Task::Leave(Some(top)) => match &grammar.nodes[top.node as usize] {
                Node::Sequence(parts) => {
                    let at = top.at as usize;
                    match parts.get(at) {
                        // The last part is followed by what follows the sequence: recursion at the end costs no depth.
                        Some(part) if at + 1 == parts.len() => tasks.push(Task::Enter(*part, top.rest.clone())),
                        Some(part) => {
                            tasks.push(Task::Enter(*part, Some(link(top.node, top.at + 1, top.rest.clone()))));
                        }
                        None => tasks.push(Task::Leave(top.rest.clone())),
                    }
                }
                Node::Repeat { .. } => {
                    tasks.push(Task::Round { node: top.node, done: top.at, rest: top.rest.clone() });
                }
                Node::Text(_) | Node::Bytes(_) => open(places, top, work)?,
                Node::Choice(_) => {}
            },
            Task::Round { node: id, done, rest } => {
                let Node::Repeat { node, min, max } = &grammar.nodes[id as usize] else { continue };
                if max.is_none_or(|max| done < max) {
                    // Past `min` an unbounded repetition need not count: equal places stay equal.
                    let next = if max.is_none() { (done + 1).min(*min) } else { done + 1 };
                    tasks.push(Task::Enter(*node, Some(link(id, next, rest.clone()))));
                }
                if done >= *min {
                    tasks.push(Task::Leave(rest));
                }
            }
        }
    }
    Ok(())
}

fn open(places: &mut Places, place: Arc<Link>, work: &mut Work) -> Result<(), Overrun> {
    for known in &places.open {
        if same(known, &place, work)? {
            return Ok(());
        }
    }
    if places.open.len() >= MAX_PLACES {
        return Err(Overrun);
    }
    places.open.push(place);
    Ok(())
}

/// Equal stacks, as far as a bounded look tells.
fn same(a: &Arc<Link>, b: &Arc<Link>, work: &mut Work) -> Result<bool, Overrun> {
    let (mut a, mut b) = (Some(a), Some(b));
    for _ in 0..MAX_DEPTH {
        work.spend(1)?;
        match (a, b) {
            (None, None) => return Ok(true),
            (Some(x), Some(y)) if Arc::ptr_eq(x, y) => return Ok(true),
            (Some(x), Some(y)) if (x.node, x.at, x.depth) == (y.node, y.at, y.depth) => {
                (a, b) = (x.rest.as_ref(), y.rest.as_ref());
            }
            (_, _) => return Ok(false),
        }
    }
    Ok(false)
}
