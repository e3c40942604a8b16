//! An image made over what a block device holds. What it overwrites is read first, and comes back if the image is not kept.
//!
//! An image's metadata lie in front, and all that is behind them is left as it is until somebody writes to the disk. So only the
//! front is lost, some 256 KiB for a disk of 1 TiB. Raw bytes overwrite nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Created, NewContent, NewImage, Undo, creation_error, fill, open_file};
use crate::driver::{RequestLimits, Requests as _};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::create::create;
use crate::io::{FileIdentity, IoContext, Names};
use crate::limits::MAX_OVERWRITTEN;
use crate::protocols::file::File;
use crate::protocols::memory::Memory;
use crate::units::SECTOR;

/// The front of a device, as it was and as the image makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overwritten {
    /// What was there.
    pub before: Vec<u8>,
    /// What is there when the image is complete: as many bytes.
    pub after: Vec<u8>,
}

/// What has become of an attempt to put back what was overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutBack {
    /// It is there again.
    Done,
    /// It was there.
    WasThere,
    /// Something else is there, of somebody else, and stays.
    Changed,
}

impl Overwritten {
    /// Puts it back after a crash, durably; whoever calls this has the device locked. Left alone is what holds anything but what an
    /// interrupted creation of this image leaves: each sector as it was, as it was to be, or cleared.
    pub fn put_back_after_crash(&self, names: &Names, path: &Path) -> io::Result<PutBack> {
        use std::os::unix::fs::FileExt as _;
        let mut is = vec![0; self.before.len()];
        fs::File::open(path)?.read_exact_at(&mut is, 0)?;
        if is == self.before {
            return Ok(PutBack::WasThere);
        }
        // A crash leaves each of these as it was, or as it was to be.
        let sector = SECTOR as usize;
        let sectors = is.chunks(sector).zip(self.before.chunks(sector));
        let mut sectors = sectors.zip(self.after.chunks(sector));
        let is_ours = |((is, before), after): ((&[u8], &[u8]), &[u8])| {
            is == before || is == after || is.iter().all(|byte| *byte == 0)
        };
        if !sectors.all(is_ours) {
            return Ok(PutBack::Changed);
        }
        names.put(path, &self.before)?;
        Ok(PutBack::Done)
    }
}

/// A device that an image is about to be made on, locked, with what will be overwritten. Nothing has been written yet.
#[derive(Debug)]
pub struct OverDevice {
    file: File,
    path: PathBuf,
    identity: FileIdentity,
    overwritten: Overwritten,
}

impl OverDevice {
    /// Looks whether the image's place is a block device of which something would be overwritten, and keeps that.
    ///
    /// Fails when another program or node has it open, and when it is too small.
    pub async fn find(io: &IoContext, image: &NewImage) -> Result<Option<OverDevice>> {
        let NewContent::Qcow2(options) = &image.content else {
            return Ok(None);
        };
        let (named, context) = (PathBuf::from(&image.filename), io.clone());
        let found = io.call(move || {
            let metadata = match fs::metadata(&named) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                metadata => metadata?,
            };
            let is_device = context.is_device(&metadata);
            let found = is_device.then(|| fs::canonicalize(&named));
            let path = found.transpose()?;
            Ok(path.map(|path| (path, FileIdentity::of(&metadata))))
        });
        let found = found.await;
        let found = found.map_err(|error| creation_error(&image.filename, &error))?;
        let Some((path, identity)) = found else {
            return Ok(None);
        };
        let len = options.overwritten_bytes()?;
        if len > MAX_OVERWRITTEN {
            let text = format!(
                "The image's metadata take {len} bytes, too many to be kept until it is complete"
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let file = open_file(io, &path).await?;
        let after = Memory::new(file.size());
        after.set_limits(RequestLimits {
            growable: false,
            ..after.limits()
        });
        // What does not fit is refused here.
        let made = create(&after.child(), options).await;
        made.map_err(|error| error.context(format!("Could not create '{}'", image.filename)))?;
        let before = file.read(0, len).await?.to_bytes().to_vec();
        let after = after.peek(0, len).to_bytes().to_vec();
        Ok(Some(OverDevice {
            file,
            path,
            identity,
            overwritten: Overwritten { before, after },
        }))
    }

    /// What will be overwritten.
    pub fn overwritten(&self) -> &Overwritten {
        &self.overwritten
    }

    /// Which device it is.
    pub fn device(&self) -> FileIdentity {
        self.identity
    }

    /// Makes the image, durably. After an error there is what was there before.
    pub async fn make(self, io: &IoContext, image: &NewImage) -> Result<Created> {
        let OverDevice {
            file,
            path,
            identity,
            overwritten,
        } = self;
        let made = Created {
            names: io.names(),
            path,
            undo: Some(Undo::PutBack {
                bytes: overwritten.before,
                made: identity,
            }),
        };
        match fill(file, image).await {
            Ok(()) => Ok(made),
            Err(error) => {
                // Where waiting does no harm.
                let undone = io.call(move || {
                    drop(made);
                    Ok(())
                });
                undone
                    .await
                    .map_err(|lost| creation_error(&image.filename, &lost))?;
                Err(error)
            }
        }
    }
}
