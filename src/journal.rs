//! The journal: what a transaction is about to do, on disk, so that the next start can finish it or take it back.
//!
//! ```text
//!   begin, stages      guests run        what the actions are, which images will be changed
//!   creates, created   guests run        each file that is made, before and after
//!   commit             guests stand still: the switch of each image's header, old and new
//!     -> the headers are switched
//!   done               guests run        nothing is left to do; the file is removed
//! ```
//!
//! A transaction has a file of its own in the state directory, `UUID.transaction`: lines of a CRC and a JSON object. A line that
//! is torn, and what follows it, does not count. So one durable line, `commit`, decides: without it everything is
//! taken back, with it everything is done. An `abort` behind it takes it back again; it is written before anything is undone.
//! A transaction that one write decides anyway, because it changes one image and makes no file, needs no journal.
//!
//! * `record`: the lines
//! * `entry`: the journal of one transaction while it runs
//! * `sparse`: what a device held where an image is made over it
//! * `recovery`: what the next start does
//! * `report`: what it has done

mod entry;
mod record;
mod recovery;
mod report;
mod sparse;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::io::IoContext;
use rustix::fs::{FlockOperation, flock};

pub use entry::Entry;
pub use record::{
    ActionKind, Creation, Front, Identity, ImageSwitch, JournaledAction, StagedImage,
};
pub use recovery::{Recovered, recover};
pub use report::{
    ActionResult, FileResult, ImageResult, Outcome, RecoveredAction, RecoveredFile, RecoveredImage,
    Report,
};
pub use sparse::Sparse;

/// How the files of transactions end.
const SUFFIX: &str = "transaction";

/// How the file ends that is to take the place of one which cannot be written.
const MOVED: &str = "moved";

/// A state directory, which one daemon has for itself.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    /// What its files are written with.
    io: IoContext,
    /// Locked as long as this daemon has the directory.
    _handle: Arc<File>,
}

impl Journal {
    /// Takes the directory, and makes it if there is none. Fails where another daemon has it.
    pub fn open(folder: &Path, io: &IoContext) -> io::Result<Journal> {
        fs::create_dir_all(folder).map_err(|error| match error.kind() {
            // Something that is no directory.
            io::ErrorKind::AlreadyExists => rustix::io::Errno::NOTDIR.into(),
            _ => error,
        })?;
        let handle = File::open(folder)?;
        flock(&handle, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            match error == rustix::io::Errno::WOULDBLOCK {
                true => io::Error::new(io::ErrorKind::WouldBlock, "another daemon uses it"),
                false => error.into(),
            }
        })?;
        Ok(Journal {
            folder: fs::canonicalize(folder)?,
            io: io.clone(),
            _handle: Arc::new(handle),
        })
    }

    /// The files of transactions that have not ended in order, oldest first. What was to take the place of one, and has not, goes.
    fn entries(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let path = entry.path();
            if path.extension().is_some_and(|suffix| suffix == SUFFIX) {
                found.push((entry.metadata()?.modified()?, path));
            } else if path.extension().is_some_and(|suffix| suffix == MOVED) {
                self.io.names().remove(&path)?;
            }
        }
        found.sort();
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }
}

#[cfg(test)]
mod tests;
