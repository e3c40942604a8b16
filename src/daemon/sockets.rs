//! Sockets for a user who asked for none: in a folder that only this user can enter.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use block::error::Error;

/// A folder for the sockets. Dropping it removes it; the sockets are gone by then.
#[derive(Debug)]
pub(super) struct DefaultSockets {
    folder: PathBuf,
}

impl DefaultSockets {
    /// Makes the folder, in $XDG_RUNTIME_DIR if there is one, else where temporary files go.
    pub(super) fn make() -> Result<Self, String> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let parent = runtime
            .filter(|path| path.is_dir())
            .unwrap_or_else(std::env::temp_dir);
        let folder = parent.join(format!("qblockd-{}", std::process::id()));
        // It must be new: a folder that is there already may be a stranger's.
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(|error| {
                Error::io(format!("Could not create '{}'", folder.display()), &error).to_string()
            })?;
        Ok(DefaultSockets { folder })
    }

    pub(super) fn qmp(&self) -> PathBuf {
        self.folder.join("qmp.sock")
    }

    pub(super) fn nbd(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }
}

impl Drop for DefaultSockets {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.folder) {
            log::warn!("Could not remove '{}': {error}", self.folder.display());
        }
    }
}
