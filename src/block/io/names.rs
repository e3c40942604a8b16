//! Names of files in folders: made, changed, removed, and made durable.
//!
//! All of it waits for the disk: call it where waiting does no harm, as in [`IoContext::call`].

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::IoContext;
use super::witness::{Deed, Extent, Handle, witnessed};

/// The names of files, as those who open files with an [`IoContext`] see them.
#[derive(Debug, Clone)]
pub struct Names {
    io: IoContext,
}

impl Names {
    pub(super) fn new(io: IoContext) -> Self {
        Names { io }
    }

    /// Makes an empty file where nothing is, and answers what it is.
    pub fn make(&self, path: &Path) -> io::Result<fs::Metadata> {
        let deed = || Deed::Make {
            path: path.to_owned(),
        };
        self.act(deed, || File::create_new(path).map(drop))?;
        fs::metadata(path)
    }

    /// Removes a name.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        let deed = || Deed::Remove {
            path: path.to_owned(),
        };
        self.act(deed, || fs::remove_file(path))
    }

    /// Gives a file another name, which another file may have had.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let deed = || Deed::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
        };
        self.act(deed, || fs::rename(from, to))
    }

    /// Gives two files each other's names, at once.
    pub fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        let deed = || Deed::Exchange {
            one: one.to_owned(),
            other: other.to_owned(),
        };
        self.act(deed, || {
            Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
        })
    }

    /// Makes durable what has become of the names in a folder.
    pub fn sync_folder(&self, path: &Path) -> io::Result<()> {
        let deed = || Deed::SyncFolder {
            path: path.to_owned(),
        };
        self.act(deed, || File::open(path)?.sync_all())
    }

    /// Makes a file empty, durably.
    pub fn empty(&self, path: &Path) -> io::Result<()> {
        let file = Arc::new(OwnedFd::from(OpenOptions::new().write(true).open(path)?));
        let resize = || Deed::Resize {
            file: Handle(file.clone()),
        };
        self.act(resize, || Ok(rustix::fs::ftruncate(&*file, 0)?))?;
        let sync = || Deed::Sync {
            file: Handle(file.clone()),
        };
        self.act(sync, || Ok(rustix::fs::fsync(&*file)?))
    }

    /// Puts bytes into a file or device that is there, from its beginning, durably.
    pub fn put(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        // A witness reads what has been put there.
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let file = Arc::new(OwnedFd::from(file));
        let change = || Deed::Change {
            file: Handle(file.clone()),
            offset: 0,
            len: bytes.len() as u64,
        };
        self.act(change, || {
            File::from(file.try_clone()?).write_all_at(bytes, 0)
        })?;
        let sync = || Deed::Sync {
            file: Handle(file.clone()),
        };
        self.act(sync, || Ok(rustix::fs::fsync(&*file)?))
    }

    /// A file of this name is about to be opened.
    pub(super) fn opens(&self, path: &Path) -> io::Result<()> {
        let deed = || Deed::Open {
            path: path.to_owned(),
        };
        self.act(deed, || Ok(()))
    }

    fn act(
        &self,
        deed: impl FnOnce() -> Deed,
        call: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(witness) = self.io.witness() else {
            return call();
        };
        witnessed(&**witness, &deed(), |extent| match extent {
            Extent::All => call(),
            Extent::Front(_) | Extent::Nothing => Ok(()),
        })
    }
}
