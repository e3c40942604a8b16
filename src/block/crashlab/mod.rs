//! The crash laboratory: what a killed process or a power cut may leave of a qcow2 image, tried state by state.
//!
//! ```text
//! seed -> script -> run on a disk that keeps a log -> states that a crash may leave -> oracle
//!                                                       ^                               |
//!                                                       +------- crash while recovering +
//! ```
//!
//! * `base`: a backing file below an image
//! * `script`: a random image and a few random operations on it
//! * `run`: executes them, and notes what had been answered when
//! * `states`: the enumerator: which writes reach the disk, and how much of each
//! * `audit`: a second reader of images, which shares no code with the driver
//! * `oracle`: what must hold in each state, and still after recovery and more writes
//! * `qemu`: QEMU's tools as another oracle, and QEMU's own write logs as input
//! * `lab`: many seeds, and the figures
//! * `compare`: snapshot operations of QEMU and of this driver, side by side
//!
//! The durability model: a write is durable when a flush that was issued after the write's completion has completed. Of the
//! others any subset may reach the disk, each torn at sectors of 512 bytes. docs/crash-safety.md has the whole.

pub mod audit;
pub mod base;
pub mod compare;
pub mod content;
pub mod lab;
pub mod oracle;
pub mod qemu;
pub mod run;
pub mod script;
pub mod states;
#[cfg(test)]
mod tests;
