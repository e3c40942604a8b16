//! The journal of one transaction while it runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{SystemTime, UNIX_EPOCH};

use block::driver::HeaderSwitch;
use block::io::{Data, HostFile, IoContext, OpenMode};
use block::open::Overwritten;
use tokio::sync::Mutex;

use super::record::{
    Creation, Front, Identity, ImageSwitch, JournaledAction, Record, StagedImage, VERSION,
    last_change, modified,
};
use super::{Journal, MOVED, SUFFIX};
use crate::limits;

/// The bytes that a commit takes for each image, but for its path: a sector and some fields of a header in hexadecimal, and names
/// and numbers around them.
const BYTES_PER_SWITCH: usize = 2 * 512 + 512;

/// What a record takes beside its contents.
const BYTES_PER_RECORD: usize = 256;

/// The journal of a transaction. Dropped without an end it stays: the next start takes the transaction back, or finishes it.
#[derive(Debug)]
pub struct Entry {
    file: HostFile,
    path: PathBuf,
    io: IoContext,
    uuid: String,
    /// Where the next record goes. Held while one is written.
    at: Mutex<u64>,
    /// Up to where records of several at once are durable. Held while that is done, for all who wait for it.
    durable: Mutex<io::Result<u64>>,
    staged: Vec<StagedImage>,
    /// The files that were made.
    made: std::sync::Mutex<Vec<PathBuf>>,
    /// A commit may be there.
    is_committed: bool,
}

impl Journal {
    /// Begins the journal of a transaction of these actions, durably.
    pub async fn begin(&self, actions: Vec<JournaledAction>) -> io::Result<Entry> {
        let uuid = uuid()?;
        let path = self.folder.join(format!("{uuid}.{SUFFIX}"));
        let (io, names, name) = (self.io.clone(), self.io.names(), path.clone());
        io.call(move || names.make(&name).map(drop)).await?;
        let begun = self.begin_at(path.clone(), uuid, actions).await;
        if begun.is_err() {
            // It says nothing yet; should it stay, the next start removes it.
            let names = io.names();
            let _ = io.call(move || names.remove(&path)).await;
        }
        begun
    }

    async fn begin_at(
        &self,
        path: PathBuf,
        uuid: String,
        actions: Vec<JournaledAction>,
    ) -> io::Result<Entry> {
        let mut entry = Entry {
            file: open(&self.io, &path).await?,
            path,
            io: self.io.clone(),
            uuid: uuid.clone(),
            at: Mutex::default(),
            durable: Mutex::new(Ok(0)),
            staged: Vec::new(),
            made: std::sync::Mutex::default(),
            is_committed: false,
        };
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        let begin = Record::Begin {
            version: VERSION,
            uuid,
            time: time.unwrap_or_default().as_secs(),
            actions,
        };
        entry.append(begin, Durable::Yes).await?;
        let (folder, names) = (self.folder.clone(), self.io.names());
        self.io.call(move || names.sync_folder(&folder)).await?;
        Ok(entry)
    }
}

/// The file of a journal, for writing.
pub(super) async fn open(io: &IoContext, path: &Path) -> io::Result<HostFile> {
    let mode = OpenMode {
        writable: true,
        direct: false,
        ring: false,
    };
    HostFile::open(io, path, mode).await
}

/// Whether a record has to be on disk before the transaction goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durable {
    Yes,
    /// With the next one that is. It survives this process alone.
    Later,
}

impl Entry {
    /// The name of the transaction.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Says that a file of this path is about to be made, durably. What is there now can be told from it afterwards; `beside` is
    /// where it is kept until the transaction ends. Of a device `overwritten` is kept, here. Those who say so at the same time wait
    /// for the disk together.
    pub async fn creates(
        &self,
        path: PathBuf,
        beside: PathBuf,
        overwritten: Option<Overwritten>,
    ) -> io::Result<()> {
        let creation = self.io.call(move || {
            let former = match fs::metadata(&path) {
                Ok(metadata) => Some(metadata),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            let is_empty = |former: &fs::Metadata| former.is_file() && former.len() == 0;
            Ok(Creation {
                path,
                beside: former.as_ref().map(|_| beside),
                overwritten: overwritten.as_ref().map(Front::new),
                was_empty: former.as_ref().is_some_and(is_empty),
                former: former.as_ref().map(Identity::of),
            })
        });
        let creation = creation.await?;
        let end = self.append_beside_others(Record::Creates(creation)).await?;
        self.make_durable(end).await
    }

    /// Says which file was made there.
    pub async fn created(&self, path: PathBuf) -> io::Result<()> {
        let at = path.clone();
        let made = self.made.lock();
        made.unwrap_or_else(PoisonError::into_inner)
            .push(path.clone());
        let file = self.io.call(move || Ok(Identity::of(&fs::metadata(at)?)));
        let file = file.await?;
        let created = Record::Created { path, file };
        self.append_beside_others(created).await.map(drop)
    }

    /// Says that these images will be changed, durably, and takes the space that the commit will need: that is one write to
    /// blocks which are there already.
    pub async fn stages(&mut self, images: Vec<StagedImage>) -> io::Result<()> {
        let paths: usize = images
            .iter()
            .map(|image| 2 * image.path.as_os_str().len())
            .sum();
        let room = paths + images.len() * BYTES_PER_SWITCH + BYTES_PER_RECORD;
        self.staged.clone_from(&images);
        self.append(Record::Stages { images }, Durable::Later)
            .await?;
        // Not a hole: the commit is to find its space there.
        let room = Data::from(vec![0; room]);
        let at = *self.at.get_mut();
        self.file.write(at, room, false).await?;
        self.file.sync().await
    }

    /// The images that will be changed, in the order in which they were named.
    pub fn staged(&self) -> &[StagedImage] {
        &self.staged
    }

    /// Says that everything is to happen, durably. `switches` are of images that were named by [`Entry::stages`], with their places
    /// there.
    ///
    /// After an error the transaction must be taken back, by [`Entry::revoke`] first.
    pub async fn commit(&mut self, switches: Vec<(usize, HeaderSwitch)>) -> io::Result<()> {
        let images = self.staged.clone();
        let switches = self.io.call(move || {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            let end = since.unwrap_or_default() + limits::JOURNAL_SWITCH;
            let end = (end.as_secs() as i64, i64::from(end.subsec_nanos()));
            let switch = |(place, switch): (usize, HeaderSwitch)| {
                let (at, bytes) = switch.difference();
                let image: &StagedImage = images.get(place).ok_or(io::ErrorKind::NotFound)?;
                let metadata = fs::metadata(&image.path)?;
                if Identity::of(&metadata) != image.file {
                    let text = format!("'{}' is another file now", image.path.display());
                    return Err(io::Error::other(text));
                }
                Ok(ImageSwitch {
                    image: image.clone(),
                    until: modified(&metadata).map(|last| last.max(end)),
                    at,
                    bytes: bytes.to_vec(),
                    before: switch.before,
                })
            };
            switches.into_iter().map(switch).collect::<io::Result<_>>()
        });
        let switches = switches.await?;
        self.is_committed = true;
        self.append(Record::Commit { switches }, Durable::Yes).await
    }

    /// Says that nothing is to happen after all, durably, whatever has become of the commit. It is written before anything is
    /// undone. Where it cannot be written, not even to another file, the journal is removed, which says the same but leaves nothing
    /// to undo by.
    pub async fn revoke(&mut self) -> io::Result<()> {
        if !self.is_committed {
            return Ok(());
        }
        // What came behind the last record that is known to be there may be there, too: behind it, this one would not count.
        let whole = async {
            let bytes = self.file.read(0, self.file.size()?).await?;
            io::Result::Ok(Record::decode_all(&bytes).1)
        };
        let whole = whole.await;
        let at = self.at.get_mut();
        *at = whole.map_or(*at, |whole| (*at).max(whole as u64));
        match self.append_or_move(Record::Abort).await {
            Err(error) => self.vanish(&error).await,
            written => written,
        }
    }

    /// Says, durably, what is left of a transaction that has been taken back: `images`, by their places, are still to be put back, and
    /// `files` stay, since they have what guests have written. Where it cannot be written, not even to another file, and there are such
    /// files, the journal is removed, which says the same of them, and leaves the images to the user.
    pub async fn leaves(&mut self, images: &[usize], files: &[PathBuf]) -> io::Result<()> {
        let staged = images.iter().filter_map(|place| self.staged.get(*place));
        let made = self.made.get_mut().unwrap_or_else(PoisonError::into_inner);
        let goes = |path: &PathBuf| !files.contains(path);
        let gone: Vec<PathBuf> = made.iter().filter(|path| goes(path)).cloned().collect();
        let leaves = Record::Leaves {
            images: staged.map(|image| image.path.clone()).collect(),
            files: files.to_vec(),
            time: Some(self.io.call(move || Ok(last_change(&gone))).await?),
        };
        match self.append_or_move(leaves).await {
            Err(error) if !files.is_empty() => self.vanish(&error).await,
            written => written,
        }
    }

    /// Ends the journal: nothing is left to do. The file goes.
    pub async fn end(mut self) -> io::Result<()> {
        // Should the name come back after a crash, the record says that there is nothing to do.
        let Err(error) = self.append(Record::Done, Durable::Yes).await else {
            let (path, names) = (self.path, self.io.names());
            return self.io.call(move || names.remove(&path)).await;
        };
        self.vanish(&error).await
    }

    /// Where a record cannot be written that says that nothing is to be done, the file goes, which says the same.
    async fn vanish(&self, error: &io::Error) -> io::Result<()> {
        log::warn!("'{}': {error}; the journal is removed", self.path.display());
        let (path, names) = (self.path.clone(), self.io.names());
        let remove = move || {
            names.remove(&path)?;
            names.sync_folder(path.parent().unwrap_or(Path::new("/")))
        };
        self.io.call(remove).await
    }

    /// As `append`, durably. Where this file cannot be written, all records go to another one that takes its name: what the file holds
    /// behind a failed flush nobody knows.
    async fn append_or_move(&mut self, record: Record) -> io::Result<()> {
        let Err(error) = self.append(record.clone(), Durable::Yes).await else {
            return Ok(());
        };
        self.move_with(record).await.map_err(|second| {
            log::debug!("'{}' cannot be moved: {second}", self.path.display());
            error
        })
    }

    async fn move_with(&mut self, record: Record) -> io::Result<()> {
        let bytes = self.file.read(0, self.file.size()?).await?;
        let (mut records, _) = Record::decode_all(&bytes);
        let has_commit = records.iter().any(|r| matches!(r, Record::Commit { .. }));
        if self.is_committed && !has_commit {
            return Err(io::ErrorKind::InvalidData.into());
        }
        records.push(record);
        let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        let end = bytes.len() as u64;
        let (path, names) = (self.path.with_extension(MOVED), self.io.names());
        let name = path.clone();
        self.io.call(move || names.make(&name).map(drop)).await?;
        match self.take_name(&path, bytes).await {
            Ok(file) => {
                self.file = file;
                *self.at.get_mut() = end;
                Ok(())
            }
            Err(error) => {
                // Should it stay, the next start removes it.
                let names = self.io.names();
                let _ = self.io.call(move || names.remove(&path)).await;
                Err(error)
            }
        }
    }

    /// Writes the file of this path, durably, and gives it the journal's name.
    async fn take_name(&self, path: &Path, bytes: Vec<u8>) -> io::Result<HostFile> {
        let file = open(&self.io, path).await?;
        file.write(0, bytes.into(), false).await?;
        file.sync().await?;
        let (from, to, names) = (path.to_owned(), self.path.clone(), self.io.names());
        let rename = move || {
            names.rename(&from, &to)?;
            names.sync_folder(to.parent().unwrap_or(Path::new("/")))
        };
        self.io.call(rename).await?;
        Ok(file)
    }

    async fn append(&mut self, record: Record, durable: Durable) -> io::Result<()> {
        let bytes = record.encode();
        let at = self.at.get_mut();
        let end = *at + bytes.len() as u64;
        self.file.write(*at, bytes.into(), false).await?;
        if durable == Durable::Yes {
            self.file.sync().await?;
        }
        *at = end;
        Ok(())
    }

    /// As `append`, where others do the same. Answers where the record ends.
    async fn append_beside_others(&self, record: Record) -> io::Result<u64> {
        let bytes = record.encode();
        let mut at = self.at.lock().await;
        let end = *at + bytes.len() as u64;
        self.file.write(*at, bytes.into(), false).await?;
        *at = end;
        Ok(end)
    }

    /// Waits until what ends here is durable. After an error nothing is any more: what is asked for again may be answered without
    /// having been done.
    async fn make_durable(&self, end: u64) -> io::Result<()> {
        let mut durable = self.durable.lock().await;
        match &*durable {
            Ok(there) if *there >= end => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.kind().into()),
        }
        // What others have written meanwhile, too.
        let end = *self.at.lock().await;
        let done = self.file.sync().await;
        *durable = match &done {
            Ok(()) => Ok(end),
            Err(error) => Err(error.kind().into()),
        };
        done
    }
}

/// A random UUID (version 4 of RFC 9562).
fn uuid() -> io::Result<String> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    Ok(parts.join("-"))
}
