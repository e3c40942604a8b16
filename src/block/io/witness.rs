//! Somebody who sees everything that is done to files of the host, and may make it fail.
//!
//! For the crash laboratory of transactions and for tests of faults: what a daemon does to several images, to its journal and to
//! names in folders goes by [`super::IoContext`], so that one place sees all of it in order. Without a witness this costs nothing.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::buffer::Buffer;
use super::identity::FileIdentity;
use super::operation::{Operation, Work};

/// Something that is done to files of the host.
#[derive(Debug, Clone)]
pub enum Deed {
    /// A range is read.
    Read {
        /// Of this file.
        file: Handle,
        /// From here.
        offset: u64,
        /// So many bytes.
        len: u64,
    },
    /// The bytes of a range become others; the file may grow.
    Change {
        /// Of this file.
        file: Handle,
        /// From here.
        offset: u64,
        /// So many bytes.
        len: u64,
    },
    /// A file gets a size.
    Resize {
        /// This one.
        file: Handle,
    },
    /// What was written to a file becomes durable.
    Sync {
        /// This one.
        file: Handle,
    },
    /// A file that is there is opened.
    Open {
        /// Its name.
        path: PathBuf,
    },
    /// An empty file of a new name is made.
    Make {
        /// The name.
        path: PathBuf,
    },
    /// A name goes.
    Remove {
        /// The name.
        path: PathBuf,
    },
    /// A file gets another name; a file that had it loses it.
    Rename {
        /// The former one.
        from: PathBuf,
        /// The new one.
        to: PathBuf,
    },
    /// Two files get each other's names.
    Exchange {
        /// The one name.
        one: PathBuf,
        /// The other.
        other: PathBuf,
    },
    /// The names in a folder become durable.
    SyncFolder {
        /// The folder.
        path: PathBuf,
    },
}

/// What becomes of a deed.
#[derive(Debug)]
pub enum Verdict {
    /// It is done.
    Do,
    /// It is not done, and answered as if it had been: for syncs.
    Skip,
    /// It is not done, and fails.
    Fail(io::Error),
    /// Of a change this many bytes are made, and then it fails.
    Short(u64, io::Error),
}

/// Sees deeds in the order in which they are done.
pub trait Witness: fmt::Debug + Send + Sync {
    /// A deed is about to be done. The number comes back with [`Witness::ends`].
    fn begins(&self, deed: &Deed) -> (u64, Verdict);

    /// The deed has been done, or the front of it.
    fn ends(&self, begun: u64, deed: &Deed);

    /// For how many turns of other tasks the next deed waits: so that what goes on at the same time ends in any order.
    fn pause(&self) -> u32;

    /// Whether a file is to be treated as a block device, which not every machine has for tests: it does not grow.
    fn is_device(&self, file: FileIdentity) -> bool {
        let _ = file;
        false
    }
}

/// An open file that a deed is about.
#[derive(Debug, Clone)]
pub struct Handle(pub(super) Arc<OwnedFd>);

impl Handle {
    /// Which file it is: its file system, and its number there.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&*self.0)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Its size in bytes.
    pub fn size(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&*self.0)?.st_size).unwrap_or(0))
    }

    /// Its bytes as they are; those behind its end are zeroes. The file must be open without `O_DIRECT`.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let work = Work::Read {
            offset,
            buffer: Buffer::new(len, 1)?,
            alignment: 1,
        };
        let mut operation = Operation::new(self.0.clone(), work);
        operation.run()?;
        match operation.into_work() {
            Work::Read { buffer, .. } => Ok(buffer.freeze().to_vec()),
            _ => unreachable!("a read came back as something else"),
        }
    }
}

/// Does a deed as far as its witness lets it.
pub(super) fn witnessed<T>(
    witness: &dyn Witness,
    deed: &Deed,
    act: impl FnOnce(Extent) -> io::Result<T>,
) -> io::Result<T> {
    let (begun, verdict) = witness.begins(deed);
    let (done, failure) = match verdict {
        Verdict::Do => (act(Extent::All)?, None),
        Verdict::Skip => (act(Extent::Nothing)?, None),
        Verdict::Fail(error) => return Err(error),
        Verdict::Short(len, error) => (act(Extent::Front(len))?, Some(error)),
    };
    witness.ends(begun, deed);
    match failure {
        None => Ok(done),
        Some(error) => Err(error),
    }
}

/// How much of a deed is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    All,
    /// This many bytes of a change.
    Front(u64),
    Nothing,
}
