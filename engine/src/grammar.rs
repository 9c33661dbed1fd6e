//! Grammars: which texts an answer may be, and so which tokens may be drawn next.
//!
//! A grammar is a graph of nodes over bytes: text, byte sets, sequences, choices, repetitions; a cycle is recursion. It
//! is made from a JSON schema ([`from_schema`]), travels in a request, and is run by a [`Matcher`], a stack machine with an explicit bound on everything: a stranger's grammar may fail its own job and nothing else.
//!
//! What may be drawn depends on the grammar and the output so far, never on anything that the matcher remembers beside
//! them, so a constrained stream is replayed from any position like every other.

mod constraint;
mod json;
mod matcher;
mod ordered;
mod pattern;
mod schema;
mod vocabulary;

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};

pub use constraint::Constraint;
pub use json::any_object;
pub use matcher::{Matcher, Overrun};
pub use ordered::Json;
pub use schema::{SchemaError, from_schema, into as schema_into};
pub use vocabulary::Vocabulary;

/// Most nodes of one grammar, and most bytes of its encoding: it travels in a request's first frame.
pub const MAX_NODES: usize = 16_384;
pub const MAX_GRAMMAR_BYTES: usize = 192 << 10;

/// A place in [`Grammar::nodes`].
pub type NodeId = u32;

/// One node of a grammar.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub enum Node {
    /// Exactly these bytes.
    #[n(0)]
    Text(#[cbor(n(0), with = "minicbor::bytes")] Vec<u8>),
    /// One byte of these inclusive ranges.
    #[n(1)]
    Bytes(#[n(0)] Vec<(u8, u8)>),
    #[n(2)]
    Sequence(#[n(0)] Vec<NodeId>),
    #[n(3)]
    Choice(#[n(0)] Vec<NodeId>),
    /// At least `min` and at most `max` times; no `max` is no bound. What is repeated is never empty.
    #[n(4)]
    Repeat {
        #[n(0)]
        node: NodeId,
        #[n(1)]
        min: u32,
        #[n(2)]
        max: Option<u32>,
    },
}

/// Nodes and where to begin.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Grammar {
    #[n(0)]
    pub nodes: Vec<Node>,
    #[n(1)]
    pub root: NodeId,
}

/// Why a grammar is not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum GrammarError {
    #[error("more than {MAX_NODES} nodes or {MAX_GRAMMAR_BYTES} bytes")]
    #[n(0)]
    TooLarge,
    #[error("node {node} names a node that is not there")]
    #[n(1)]
    NoSuchNode {
        #[n(0)]
        node: NodeId,
    },
    #[error("node {node} begins with itself")]
    #[n(2)]
    LeftRecursion {
        #[n(0)]
        node: NodeId,
    },
    #[error("node {node} repeats what may be empty")]
    #[n(3)]
    EmptyRepeat {
        #[n(0)]
        node: NodeId,
    },
    #[error("not a grammar of this version")]
    #[n(4)]
    Encoding,
}

impl Grammar {
    /// Every check that running it relies on.
    pub fn check(&self) -> Result<(), GrammarError> {
        if self.nodes.len() > MAX_NODES {
            return Err(GrammarError::TooLarge);
        }
        let known = |id: &NodeId| (*id as usize) < self.nodes.len();
        if !known(&self.root) {
            return Err(GrammarError::NoSuchNode { node: self.root });
        }
        for (at, node) in (0..).zip(&self.nodes) {
            if !children(node).iter().all(known) {
                return Err(GrammarError::NoSuchNode { node: at });
            }
        }
        let empty = self.may_be_empty();
        for (at, node) in (0..).zip(&self.nodes) {
            if let Node::Repeat { node, .. } = node
                && empty[*node as usize]
            {
                return Err(GrammarError::EmptyRepeat { node: at });
            }
        }
        self.refuse_left_recursion(&empty)
    }

    /// As a request carries it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, GrammarError> {
        self.check()?;
        let bytes = minicbor::to_vec(self).map_err(|_| GrammarError::Encoding)?;
        if bytes.len() > MAX_GRAMMAR_BYTES { Err(GrammarError::TooLarge) } else { Ok(bytes) }
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, GrammarError> {
        if bytes.len() > MAX_GRAMMAR_BYTES {
            return Err(GrammarError::TooLarge);
        }
        let grammar: Self = minicbor::decode(bytes).map_err(|_| GrammarError::Encoding)?;
        grammar.check()?;
        Ok(grammar)
    }

    /// Each node is looked at once, and once more for each of its children that is found to be empty: a stranger's grammar
    /// costs no more than its length.
    fn may_be_empty(&self) -> Vec<bool> {
        // Of each node: how many children must be found empty before it is. Text and bytes have none.
        let lacks = |node: &Node| match node {
            Node::Text(text) => usize::from(!text.is_empty()),
            Node::Bytes(_) | Node::Choice(_) => 1,
            Node::Sequence(parts) => parts.len(),
            Node::Repeat { min, .. } => usize::from(*min > 0),
        };
        let mut lacks: Vec<usize> = self.nodes.iter().map(lacks).collect();
        let mut parents: Vec<Vec<usize>> = vec![Vec::new(); self.nodes.len()];
        for (at, node) in self.nodes.iter().enumerate() {
            children(node).iter().for_each(|child| parents[*child as usize].push(at));
        }
        let mut empty: Vec<bool> = lacks.iter().map(|lacks| *lacks == 0).collect();
        let mut news: Vec<usize> = (0..empty.len()).filter(|at| empty[*at]).collect();
        while let Some(at) = news.pop() {
            for &parent in &parents[at] {
                lacks[parent] = lacks[parent].saturating_sub(1);
                if lacks[parent] == 0 && !empty[parent] {
                    empty[parent] = true;
                    news.push(parent);
                }
            }
        }
        empty
    }

    /// Walks the nodes that another may begin with; a way back to itself would never read a byte.
    fn refuse_left_recursion(&self, empty: &[bool]) -> Result<(), GrammarError> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        // Looked up once: a sequence of what may be empty is as long as its sender likes.
        let begins: Vec<&[NodeId]> = (0..self.nodes.len()).map(|at| self.begins_with(at, empty)).collect();
        let mut marks = vec![Mark::New; self.nodes.len()];
        for start in 0..self.nodes.len() {
            let mut path = vec![(start, 0)];
            while let Some((at, next)) = path.pop() {
                if next == 0 {
                    match marks[at] {
                        Mark::Done => continue,
                        Mark::Open => return Err(GrammarError::LeftRecursion { node: at as NodeId }),
                        Mark::New => marks[at] = Mark::Open,
                    }
                }
                match begins[at].get(next) {
                    Some(&child) => {
                        path.push((at, next + 1));
                        path.push((child as usize, 0));
                    }
                    None => marks[at] = Mark::Done,
                }
            }
        }
        Ok(())
    }

    fn begins_with(&self, at: usize, empty: &[bool]) -> &[NodeId] {
        match &self.nodes[at] {
            Node::Text(_) | Node::Bytes(_) => &[],
            Node::Sequence(parts) => {
                let first_solid = parts.iter().position(|id| !empty[*id as usize]).map_or(parts.len(), |at| at + 1);
                &parts[..first_solid]
            }
            Node::Choice(options) => options,
            Node::Repeat { node, .. } => std::slice::from_ref(node),
        }
    }
}

fn children(node: &Node) -> &[NodeId] {
    match node {
        Node::Text(_) | Node::Bytes(_) => &[],
        Node::Sequence(parts) => parts,
        Node::Choice(options) => options,
        Node::Repeat { node, .. } => std::slice::from_ref(node),
    }
}

/// Collects nodes; equal ones are kept once.
#[derive(Debug, Default)]
pub struct Builder {
    nodes: Vec<Node>,
    known: BTreeMap<Node, NodeId>,
}

impl Builder {
    pub fn add(&mut self, node: Node) -> NodeId {
        if let Some(&id) = self.known.get(&node) {
            return id;
        }
        let id = self.nodes.len() as NodeId;
        self.known.insert(node.clone(), id);
        self.nodes.push(node);
        id
    }

    pub fn text(&mut self, text: impl AsRef<[u8]>) -> NodeId {
        self.add(Node::Text(text.as_ref().to_vec()))
    }

    pub fn sequence(&mut self, parts: impl Into<Vec<NodeId>>) -> NodeId {
        let parts = parts.into();
        if let [only] = parts.as_slice() { *only } else { self.add(Node::Sequence(parts)) }
    }

    pub fn choice(&mut self, options: impl Into<Vec<NodeId>>) -> NodeId {
        let mut options = options.into();
        options.sort_unstable();
        options.dedup();
        if let [only] = options.as_slice() { *only } else { self.add(Node::Choice(options)) }
    }

    pub fn repeat(&mut self, node: NodeId, min: u32, max: Option<u32>) -> NodeId {
        self.add(Node::Repeat { node, min, max })
    }

    /// A place that is filled later: the way to recursion.
    pub fn reserve(&mut self) -> NodeId {
        let id = self.nodes.len() as NodeId;
        self.nodes.push(Node::Choice(Vec::new()));
        id
    }

    pub fn fill(&mut self, place: NodeId, node: NodeId) {
        if let Some(reserved) = self.nodes.get_mut(place as usize) {
            *reserved = Node::Sequence(vec![node]);
        }
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub fn finish(self, root: NodeId) -> Result<Grammar, GrammarError> {
        let grammar = Grammar { nodes: self.nodes, root };
        grammar.check()?;
        Ok(grammar)
    }
}

#[cfg(test)]
mod tests;
