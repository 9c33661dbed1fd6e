//! The Merkle log over entries: nobody who has seen a signed head can be shown another history later.
//!
//! | part | for |
//! |---|---|
//! | tree | RFC 6962 hashing, roots, inclusion and consistency proofs |
//! | tiles | how the tree is stored, so that proofs over millions of leaves read a few rows |
//! | checkpoint | signed tree heads (C2SP signed note), and the proof that a node signed two that exclude each other |

mod checkpoint;
mod tiles;
mod tree;

pub use checkpoint::*;
pub use tiles::*;
pub use tree::*;
