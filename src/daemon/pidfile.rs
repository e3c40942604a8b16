//! `--pidfile`: the process id in a file that stays locked while the daemon runs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, fcntl_lock};

/// A pid file of this process. Dropping it removes the file.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
    /// Holds the lock: the system takes it away when the process ends, however it ends.
    _file: File,
}

impl PidFile {
    /// Creates, locks and writes it. A file that a process which is gone has left is taken over.
    pub(super) fn create(path: &Path) -> Result<PidFile, String> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|error| {
                    describe(&format!("Could not create '{}'", path.display()), &error)
                })?;
            fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|error| describe("Cannot lock pid file", &error.into()))?;
            // Its former owner may have removed it between the two calls; then the lock is on nothing.
            if !is_at(&file, &path) {
                continue;
            }
            let written = file
                .set_len(0)
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            written.map_err(|error| describe("Failed to write pid file", &error))?;
            return Ok(PidFile { path, _file: file });
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("Could not remove '{}': {error}", self.path.display());
        }
    }
}

/// Whether the open file is what the path names.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn describe(what: &str, error: &io::Error) -> String {
    let error = block::error::Error::io(what, error);
    format!("cannot create PID file: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_the_process_id_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        fs::write(&path, "99999999 left by another").unwrap();
        let pidfile = PidFile::create(&path).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!("{}\n", std::process::id())
        );
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        assert_eq!(
            PidFile::create(Path::new("/nonexistent/p")).map(|_| ()),
            Err("cannot create PID file: Could not create '/nonexistent/p': No such file or directory".to_owned())
        );
    }
}
