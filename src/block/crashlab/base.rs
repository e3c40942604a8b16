//! What an image stands on: a raw disk below it, which nobody writes to.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::content::{Content, SECTOR, stamp};
use crate::driver::Child;
use crate::protocols::memory::{Change, Memory};

/// How images name their backing file.
pub const BASE_FILE: &str = "base.raw";

/// The first number of the writes that have filled a base: above all of a script.
const FIRST: u32 = 1 << 29;

/// A backing file. It may be shorter or longer than the disk above it.
#[derive(Clone)]
pub struct Base {
    content: Arc<Content>,
    disk: Arc<Memory>,
}

impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Base of {} bytes", self.content.size())
    }
}

impl Base {
    /// A disk of `size` bytes that has data all over the windows where guests write, with some holes.
    pub fn random(random: &mut fastrand::Rng, size: u64, windows: &[Range<u64>]) -> Base {
        let mut content = Content::new(size);
        let disk = Memory::new(size);
        for (number, window) in (FIRST..).zip(windows) {
            let mut at = window.start;
            while at < window.end.min(size) {
                let len = SECTOR * random.u64(1..64);
                let len = len.min(window.end.min(size) - at);
                if random.u8(..8) > 0 {
                    content.write(at, &stamp(at, len, number));
                }
                at += len;
            }
        }
        for (number, sector) in content.sectors() {
            let write = Change::Write {
                offset: number * SECTOR,
                data: sector.to_vec().into(),
                fua: false,
            };
            // A disk in memory without faults or limits takes it.
            let _ = disk.apply(&write);
        }
        Base {
            content: Arc::new(content),
            disk,
        }
    }

    /// What it shows.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Where it lies.
    pub fn disk(&self) -> &Memory {
        &self.disk
    }

    /// A handle for the image above.
    pub fn child(&self) -> Child {
        self.disk.child()
    }
}
