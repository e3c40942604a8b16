//! Files that a transaction has made, and what they have replaced.

use std::fs;
use std::io;
use std::path::Path;

use block::driver::Driver as _;
use block::io::{IoContext, Names, Remains};
use block::open::PutBack;

use super::{is_newer, open_locked};
use crate::journal::record::{Creation, Front, Identity, Time};
use crate::journal::report::FileResult;

/// Puts back what a device held in front, if an image was begun there.
pub(super) async fn put_back(
    io: &IoContext,
    creation: &Creation,
    front: &Front,
) -> io::Result<FileResult> {
    let (Some(former), Some(overwritten)) = (creation.former, front.overwritten()) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let path = creation.path.clone();
    if identity(&path)? != Some(former) {
        return Ok(FileResult::Replaced);
    }
    // Locked meanwhile.
    let file = open_locked(io, &path).await.map_err(io::Error::other)?;
    let names = io.names();
    let done = io.call(move || overwritten.put_back_after_crash(&names, &path));
    let done = done.await?;
    // What was there, too, may be in the page cache alone.
    file.close().await.map_err(io::Error::other)?;
    Ok(match done {
        PutBack::Done => FileResult::Restored,
        PutBack::WasThere => FileResult::Unchanged,
        PutBack::Changed => FileResult::Replaced,
    })
}

/// What was done about a file.
pub(super) struct Settled {
    pub(super) result: FileResult,
    /// Of what has lost its name.
    pub(super) remains: Option<Remains>,
}

impl Settled {
    /// No name is gone.
    fn named(result: FileResult) -> Self {
        Settled {
            result,
            remains: None,
        }
    }

    /// The file of this path loses its name by `done`.
    fn without(
        path: &Path,
        result: FileResult,
        done: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Self> {
        let remains = Some(Remains::of(path));
        done()?;
        Ok(Settled { result, remains })
    }
}

/// A file stays: what it has replaced goes.
pub(super) fn keep_file(names: &Names, creation: &Creation) -> io::Result<Settled> {
    if let (Some(beside), Some(former)) = (&creation.beside, creation.former)
        && identity(beside)? == Some(former)
    {
        return Settled::without(beside, FileResult::Kept, || names.remove(beside));
    }
    Ok(Settled::named(FileResult::Kept))
}

/// Makes a file what it was before. It stays as it is where somebody has written to it after `unused`.
pub(super) fn take_file_back(
    names: &Names,
    creation: &Creation,
    made: Option<Identity>,
    unused: Option<Time>,
) -> io::Result<Settled> {
    let Creation {
        path,
        former,
        was_empty,
        beside,
        overwritten: _,
    } = creation;
    let is_used = || is_newer(path, unused).map_err(io::Error::other);
    let there = identity(path)?;
    let aside = match beside {
        Some(beside) => identity(beside)?.map(|file| (beside, file)),
        None => None,
    };
    let result = match former {
        None => match there {
            None => FileResult::Unchanged,
            Some(there) if made.is_some_and(|made| made != there) => FileResult::Replaced,
            Some(_) if is_used()? => FileResult::Changed,
            Some(_) => {
                return Settled::without(path, FileResult::Removed, || names.remove(path));
            }
        },
        Some(former) => match aside {
            // It has been swapped with what was made.
            Some((_, file)) if file == *former && there.is_some() && is_used()? => {
                FileResult::Changed
            }
            Some((beside, file)) if file == *former => {
                let swap_back = || names.rename(beside, path);
                return Settled::without(path, FileResult::Restored, swap_back);
            }
            // It has not been swapped yet.
            Some((beside, _)) if there == Some(*former) => {
                return Settled::without(beside, FileResult::Removed, || names.remove(beside));
            }
            Some(_) => FileResult::Replaced,
            None if there == Some(*former) && *was_empty => {
                // By an earlier start, perhaps, which has not made it durable.
                let is_empty = fs::metadata(path)?.len() == 0;
                match !is_empty && is_used()? {
                    true => FileResult::Changed,
                    false => {
                        names.empty(path)?;
                        FileResult::Restored
                    }
                }
            }
            // A device of which nothing is overwritten, or nothing was made yet.
            None if there == Some(*former) => FileResult::Unchanged,
            None => FileResult::Replaced,
        },
    };
    Ok(Settled::named(result))
}

/// Where what a file has replaced is to be found, for people.
pub(super) fn what_was_before(creation: &Creation) -> Option<String> {
    let beside = creation.beside.as_ref().filter(|_| !creation.was_empty)?;
    Some(format!("what it has replaced is '{}'", beside.display()))
}

/// Which file is there.
fn identity(path: &Path) -> io::Result<Option<Identity>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(Identity::of(&metadata))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
