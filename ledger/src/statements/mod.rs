//! What provider and consumer sign about a session, from its opening to its refund.
//!
//! | statement | signed by | says |
//! |---|---|---|
//! | [`SessionOpen`] | consumer | these are my session key, the quote I accept, where refunds go and the most I will spend |
//! | [`SliceDescriptor`] | the invoice's node (its hash is in the BOLT 11) | what this instalment pays for |
//! | [`RequestOpen`] | consumer | this prompt length at this quote: acknowledgement 0, which alone costs nothing |
//! | [`Ack`] | both | so much of this request is done, and it cost so much |
//! | [`Receipt`] | both | the request is finished; chained per session in the order in which requests finish |
//! | [`SessionClose`] | consumer | no more requests; refund the remainder to this invoice |
//! | [`CreditNote`] | provider | this remainder could not be paid out now and is still owed |
//! | [`CreditTransfer`] | both | what that note says is owed is now the balance of this other session |
//! | [`InclusionPromise`] | provider | this receipt is that leaf of my log |

mod credit;
mod experts;
mod hashing;
mod part;
mod promise;
mod receipt;
mod session;

pub use credit::*;
pub use experts::*;
pub use hashing::*;
pub use part::*;
pub use promise::*;
pub use receipt::*;
pub use session::*;
