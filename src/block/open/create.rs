//! Making new images: a file of a name, with a format in it. What was there before comes back if the image is not kept.
//!
//! ```text
//!   nothing there        create the file, format it               undo: remove it
//!   an empty file        format it                                undo: empty it
//!   a file with content  format a new file beside it, then swap   undo: swap back, remove the new one
//!   a device             format it                                undo: put back what was overwritten
//! ```
//!
//! The content that a new image replaces stays on the disk until it is certain that the image is wanted: a command that
//! fails behind the creation has changed nothing.

mod device;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::{Aio, CacheMode, FileOptions, Locking};
use crate::driver::{BackingFile, Child, Driver, Preallocation, Requests};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::create::{CreateOptions, create};
use crate::io::{FileIdentity, IoContext, Names, Remains};
use crate::limits::{MAX_LEFT_BESIDE, MAX_LINKS};
use crate::protocols::file::{File, FileAccess};
use crate::units::SECTOR;

pub use device::{OverDevice, Overwritten, PutBack};

/// An image to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    /// The path.
    pub filename: String,
    /// What is to be in the file.
    pub content: NewContent,
}

/// What a new image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewContent {
    /// A disk of zeroes, as it is.
    Raw {
        /// Its size in bytes.
        size: u64,
        /// What is allocated ahead.
        preallocation: Preallocation,
    },
    /// A qcow2 image. Its data cannot be in a file of their own.
    Qcow2(Box<CreateOptions>),
}

impl NewContent {
    /// As `of_format`, for what is in a disk of `size` bytes or lies on it: where the format has whole sectors only, the new disk is as
    /// large as those that hold all of it.
    pub fn for_disk(format: &str, size: u64, backing: BackingFile) -> Result<NewContent> {
        let size = match format {
            "raw" | "file" => size,
            _ => whole_sectors(size),
        };
        Self::of_format(format, size, backing)
    }

    /// A disk of `size` bytes in the format that users call `format`, with defaults for all else. A file as such is one that holds
    /// the disk's bytes. Texts are QEMU's.
    pub fn of_format(format: &str, size: u64, backing: BackingFile) -> Result<NewContent> {
        match format {
            "qcow2" => Ok(NewContent::Qcow2(Box::new(CreateOptions {
                backing,
                ..CreateOptions::new(size)
            }))),
            "raw" | "file" if backing.name.is_some() => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Backing file not supported for file format '{format}'"),
            )),
            "raw" | "file" => Ok(NewContent::Raw {
                size,
                preallocation: Preallocation::Off,
            }),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Unknown file format '{format}'"),
            )),
        }
    }
}

/// The bytes of the sectors that hold so many.
pub fn whole_sectors(size: u64) -> u64 {
    size.checked_next_multiple_of(SECTOR).unwrap_or(size)
}

/// What becomes of a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays as it is, and nothing is made.
    Keep,
    /// The image takes its place.
    Replace,
}

/// An image that was made. Dropped without [`Created::keep`] it is gone, and what was there before is back.
///
/// Whoever has the image open closes it before.
#[derive(Debug)]
#[must_use]
pub struct Created {
    names: Names,
    path: PathBuf,
    /// Taken when there is nothing left to undo.
    undo: Option<Undo>,
}

/// How to come back to what was there.
#[derive(Debug)]
enum Undo {
    /// There was nothing.
    Remove(FileIdentity),
    /// There was an empty file.
    Empty(FileIdentity),
    /// The file that was there has this name now.
    SwapBack { former: PathBuf, made: FileIdentity },
    /// There was a device that held these bytes in front.
    PutBack { bytes: Vec<u8>, made: FileIdentity },
}

impl Created {
    /// Where the image is; links have been followed.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the image was made by this call: with [`Existing::Keep`] there may have been one.
    pub fn is_new(&self) -> bool {
        self.undo.is_some()
    }

    /// Where the content is that the image has replaced, for whoever must find it again after a crash.
    pub fn former(&self) -> Option<&Path> {
        match &self.undo {
            Some(Undo::SwapBack { former, .. }) => Some(former),
            _ => None,
        }
    }

    /// The image stays. Content that it has replaced is gone, durably: who has a note of it can throw that away then.
    pub fn keep(self) {
        drop(Created::keep_all([self]));
    }

    /// As `keep`, of several. Answers what is left of what they have replaced.
    pub fn keep_all(created: impl IntoIterator<Item = Created>) -> Vec<Remains> {
        let (mut remains, mut folders) = (Vec::new(), Folders::default());
        for mut created in created {
            let Some(Undo::SwapBack { former, .. }) = created.undo.take() else {
                continue;
            };
            let left = Remains::of(&former);
            match created.names.remove(&former) {
                Ok(()) => {
                    remains.push(left);
                    folders.add(&former, &created.names);
                }
                Err(error) => log::warn!(
                    "Could not remove '{}', the former content of '{}': {error}",
                    former.display(),
                    created.path.display()
                ),
            }
        }
        folders.sync("what was replaced");
        remains
    }

    /// Takes images back, in this order, durably. What is wrong is logged.
    pub fn take_back(created: impl IntoIterator<Item = Created>) -> TakenBack {
        let (mut remains, mut folders) = (Vec::new(), Folders::default());
        let mut are_back = true;
        for mut created in created {
            let Some(undo) = created.undo.take() else {
                continue;
            };
            match created.undo(undo) {
                Ok(None) => {}
                Ok(Some(left)) => {
                    remains.push(left);
                    folders.add(&created.path, &created.names);
                }
                Err(error) => {
                    are_back = false;
                    let path = created.path.display();
                    log::warn!("'{path}', which was to be taken back, stays: {error}");
                }
            }
        }
        are_back &= folders.sync("images that were taken back");
        TakenBack { are_back, remains }
    }

    /// Answers what is left of the image, if a name has changed.
    fn undo(&self, undo: Undo) -> io::Result<Option<Remains>> {
        let (Undo::Remove(made)
        | Undo::Empty(made)
        | Undo::SwapBack { made, .. }
        | Undo::PutBack { made, .. }) = &undo;
        if FileIdentity::of(&fs::metadata(&self.path)?) != *made {
            return Err(io::Error::other("somebody has put another file there"));
        }
        let remains = Remains::of(&self.path);
        match undo {
            Undo::Remove(_) => self.names.remove(&self.path)?,
            Undo::Empty(_) => self.names.empty(&self.path)?,
            Undo::SwapBack { former, .. } => self.names.rename(&former, &self.path)?,
            // A device keeps its name.
            Undo::PutBack { bytes, .. } => {
                return self.names.put(&self.path, &bytes).map(|()| None);
            }
        }
        Ok(Some(remains))
    }
}

/// What has become of images that were taken back.
#[derive(Debug)]
#[must_use]
pub struct TakenBack {
    /// There is what was there before, durably.
    pub are_back: bool,
    /// What is left of the images.
    pub remains: Vec<Remains>,
}

/// Folders in which names have changed. Each is made durable once.
#[derive(Default)]
struct Folders(BTreeMap<PathBuf, Names>);

impl Folders {
    /// The name of this file has changed.
    fn add(&mut self, path: &Path, names: &Names) {
        if let Some(folder) = path.parent() {
            self.0.insert(folder.to_owned(), names.clone());
        }
    }

    /// Answers whether all are durable; otherwise the log says of what.
    fn sync(self, what: &str) -> bool {
        let mut are_durable = true;
        for (folder, names) in self.0 {
            if let Err(error) = names.sync_folder(&folder) {
                let folder = folder.display();
                log::warn!("{what} in '{folder}' may come back: {error}");
                are_durable = false;
            }
        }
        are_durable
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            let taken_back = Created::take_back([Created {
                names: self.names.clone(),
                path: self.path.clone(),
                undo: Some(undo),
            }]);
            drop(taken_back);
        }
    }
}

/// Makes an image, durably. After an error there is what was there before.
///
/// Fails with QEMU's texts when an option is wrong, before anything is touched, and when another program or node has an existing
/// file open. Cancellation: as an error.
pub async fn create_image(io: &IoContext, image: &NewImage, existing: Existing) -> Result<Created> {
    let failed = |error: io::Error| creation_error(&image.filename, &error);
    if let NewContent::Qcow2(options) = &image.content {
        options.check()?;
    }
    if existing == Existing::Replace
        && let Some(over) = OverDevice::find(io, image).await?
    {
        return over.make(io, image).await;
    }
    let (path, names) = (PathBuf::from(&image.filename), io.names());
    let place = io
        .call(move || Place::find(&names, path, existing))
        .await
        .map_err(failed)?;
    let created = match place {
        Place::Taken(path) => {
            return Ok(Created {
                names: io.names(),
                path,
                undo: None,
            });
        }
        Place::New(created) => {
            let file = open_file(io, Path::new(&image.filename)).await?;
            fill(file, image).await?;
            created
        }
        Place::Formattable(path, undo) => {
            // It may be somebody's open image; then this fails, and nothing has happened.
            let file = open_file(io, Path::new(&image.filename)).await?;
            let created = Created {
                names: io.names(),
                path,
                undo,
            };
            fill(file, image).await?;
            created
        }
        Place::Occupied(path) => {
            let former = open_file(io, &path).await?;
            let names = io.names();
            let beside = io.call(move || Beside::make(&names, path)).await;
            let beside = beside.map_err(failed)?;
            former.close().await?;
            beside.fill_and_swap(io, image).await?
        }
    };
    sync_folder(io, &created.path).await.map_err(failed)?;
    Ok(created)
}

/// Where the image goes.
enum Place {
    /// There is something, and it stays.
    Taken(PathBuf),
    /// A file that was made for this.
    New(Created),
    /// An empty file, or a device of which nothing is overwritten: filled where it is.
    Formattable(PathBuf, Option<Undo>),
    /// A file with content.
    Occupied(PathBuf),
}

impl Place {
    fn find(names: &Names, path: PathBuf, existing: Existing) -> io::Result<Place> {
        let made = match names.make(&path) {
            // A link that leads to nothing yet.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !path.try_exists()? => {
                names.make(&final_path(&path)?)
            }
            made => made,
        };
        match made {
            Ok(made) => {
                let undo = Some(Undo::Remove(FileIdentity::of(&made)));
                let path = fs::canonicalize(path)?;
                return Ok(Place::New(Created {
                    names: names.clone(),
                    path,
                    undo,
                }));
            }
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Err(_) if existing == Existing::Keep => return Ok(Place::Taken(path)),
            Err(_) => {}
        }
        let path = fs::canonicalize(path)?;
        let metadata = fs::metadata(&path)?;
        match metadata.is_file() {
            true if metadata.len() > 0 => Ok(Place::Occupied(path)),
            true => {
                let undo = Undo::Empty(FileIdentity::of(&metadata));
                Ok(Place::Formattable(path, Some(undo)))
            }
            false if metadata.is_dir() => Err(Errno::ISDIR.into()),
            // A device, or what is no place for an image, as opening it will say.
            false => Ok(Place::Formattable(path, None)),
        }
    }
}

/// Where a file is, or will be when it is made: links have been followed, the last one also if it leads to nothing.
pub fn final_path(path: impl AsRef<Path>) -> io::Result<PathBuf> {
    let mut path = path.as_ref().to_owned();
    for _ in 0..MAX_LINKS {
        match fs::canonicalize(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Links in a circle, too.
            found => return found,
        }
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = fs::canonicalize(folder)?;
        match fs::read_link(folder.join(name)) {
            Ok(target) => path = folder.join(target),
            Err(_) => return Ok(folder.join(name)),
        }
    }
    // Somebody changes them meanwhile.
    Err(Errno::LOOP.into())
}

/// Where the new content of an existing file is made, and the former one kept until it is not needed; `path` without links. The
/// same for as long as nobody makes it: a process that was killed may have left one of the same number.
pub fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // File systems take 255 bytes.
    let fits = |end: &usize| name.is_char_boundary(*end);
    let end = (0..=name.len().min(200)).rev().find(fits).unwrap_or(0);
    let (name, process) = (&name[..end], std::process::id());
    let numbered = |number: u32| path.with_file_name(format!(".{name}.qblockd-{process}-{number}"));
    let mut free = (0..MAX_LEFT_BESIDE).map(numbered);
    let is_free = |path: &PathBuf| fs::symlink_metadata(path).is_err();
    // Where all are taken the last one is refused as any file that exists.
    free.find(is_free)
        .unwrap_or_else(|| numbered(MAX_LEFT_BESIDE))
}

/// A new file beside the one whose place it is to take. Dropped, it is gone.
struct Beside {
    path: PathBuf,
    temporary: Created,
}

impl Beside {
    /// Makes it, with the permissions of the other.
    fn make(names: &Names, path: PathBuf) -> io::Result<Beside> {
        let permissions = fs::metadata(&path)?.permissions();
        let beside = beside(&path);
        let made = FileIdentity::of(&names.make(&beside)?);
        let temporary = Created {
            names: names.clone(),
            path: beside,
            undo: Some(Undo::Remove(made)),
        };
        fs::set_permissions(&temporary.path, permissions)?;
        Ok(Beside { path, temporary })
    }

    async fn fill_and_swap(self, io: &IoContext, image: &NewImage) -> Result<Created> {
        let file = open_file(io, &self.temporary.path).await?;
        fill(file, image).await?;
        io.call(move || self.swap())
            .await
            .map_err(|error| creation_error(&image.filename, &error))
    }

    fn swap(self) -> io::Result<Created> {
        let Beside {
            path,
            mut temporary,
        } = self;
        let Some(Undo::Remove(made)) = temporary.undo else {
            unreachable!("a file beside another one is new");
        };
        let names = temporary.names.clone();
        names.exchange(&temporary.path, &path)?;
        temporary.undo = None;
        let former = temporary.path.clone();
        let undo = Some(Undo::SwapBack { former, made });
        Ok(Created { names, path, undo })
    }
}

/// Puts the image into an open file, and closes it.
async fn fill(file: File, image: &NewImage) -> Result<()> {
    let file = Arc::new(file);
    let filled = match &image.content {
        NewContent::Raw {
            size,
            preallocation,
        } => fill_raw(&file, *size, *preallocation).await,
        NewContent::Qcow2(options) => create(&Child::new(file.clone()), options)
            .await
            .map_err(|error| error.context(format!("Could not create '{}'", image.filename))),
    };
    let closed = file.close().await;
    filled.and(closed)
}

async fn fill_raw(file: &File, size: u64, preallocation: Preallocation) -> Result<()> {
    match file.limits().growable {
        true => file.resize(size, preallocation).await,
        false if file.size() >= size => Ok(()),
        false => Err(Error::new(ErrorKind::NoSpace, "Cannot grow device files")),
    }
}

/// The file, locked.
async fn open_file(io: &IoContext, path: &Path) -> Result<File> {
    let options = FileOptions {
        filename: utf8(path)?.to_owned(),
        aio: Aio::default(),
        locking: Locking::Auto,
    };
    let access = FileAccess {
        read_only: false,
        auto_read_only: false,
        cache: CacheMode::default(),
    };
    File::open(io, &options, access).await
}

/// Makes the name durable.
async fn sync_folder(io: &IoContext, path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().map(Path::to_owned) else {
        return Ok(());
    };
    let names = io.names();
    io.call(move || names.sync_folder(&folder)).await
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("The path of '{}' is not UTF-8", path.display()),
        )
    })
}

fn creation_error(filename: &str, error: &io::Error) -> Error {
    Error::io(format!("Could not create '{filename}'"), error)
}

#[cfg(test)]
mod tests;
