//! Which file of the host something is, whatever its name.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::context::IoContext;

/// Which file it is: links to it, hard or symbolic, have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// The file system that it is in; of a block device, which device it is.
    pub device: u64,
    /// Its number there; 0 for a block device, whose node may be made anew.
    pub inode: u64,
}

impl FileIdentity {
    /// Of the file that a path leads to, links followed.
    pub async fn at(io: &IoContext, path: &str) -> io::Result<Self> {
        let path = path.to_owned();
        let metadata = io.call(move || fs::metadata(path)).await?;
        Ok(FileIdentity::of(&metadata))
    }

    /// Of the file with this metadata.
    pub fn of(metadata: &Metadata) -> Self {
        match metadata.file_type().is_block_device() {
            true => FileIdentity {
                device: metadata.rdev(),
                inode: 0,
            },
            false => FileIdentity {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
        }
    }
}
