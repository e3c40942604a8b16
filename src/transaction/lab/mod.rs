//! The crash laboratory of transactions: what a killed process or a power cut may leave of several images, of the files that are
//! made besides, of names in folders and of the journal, tried state by state.
//!
//! ```text
//! script -> run by the daemon's own code, all that it does to files in one log -> states that a crash may leave
//!                                                                                     |
//!            compare  <-  go on writing  <-  compare  <-  the daemon's recovery  <----+
//!                                                             |      ^
//!                                                             +------+ a crash while it recovers
//! ```
//!
//! * `tape`: writes down what is done to files, and makes parts of it fail
//! * `script`: three disks, some with chains, and random transactions on them
//! * `guests`: writes that go on while a transaction runs
//! * `run`: does it, and notes what had been answered when
//! * `state`: puts a state into the folder again: the same files, by number and name, with what reached the disk
//! * `oracle`: what must hold in each state
//! * `faults`: no crash, but everything that a command asks of the host fails once
//!
//! `block::crashlab` makes the states. A flush makes durable what its own file got, and no name; names in one folder reach
//! the disk in their order, and are durable when the folder was synced.

mod faults;
mod guests;
mod oracle;
mod planned;
mod run;
mod script;
mod state;
pub(crate) mod tape;
mod tests;

/// Why something has failed, in words.
type Problem = String;
