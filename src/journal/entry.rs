//! The journal of one transaction while it runs.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use block::driver::HeaderSwitch;

use super::record::{Creation, Identity, ImageSwitch, Record, StagedImage, VERSION, modified};
use super::{Journal, SUFFIX};
use crate::limits;

/// The bytes that a commit takes for each image, but for its path: a sector and some fields of a header in hexadecimal, and names
/// and numbers around them.
const BYTES_PER_SWITCH: usize = 2 * 512 + 512;

/// What a record takes beside its contents.
const BYTES_PER_RECORD: usize = 256;

/// The journal of a transaction. Dropped without an end it stays: the next start takes the transaction back, or finishes it.
#[derive(Debug)]
pub struct Entry {
    file: Arc<File>,
    path: PathBuf,
    folder: Arc<File>,
    uuid: String,
    /// Where the next record goes.
    at: u64,
    staged: Vec<StagedImage>,
    /// A commit may be there.
    is_committed: bool,
    #[cfg(test)]
    fails_in: Arc<std::sync::atomic::AtomicU64>,
}

impl Journal {
    /// Begins the journal of a transaction, durably.
    pub async fn begin(&self) -> io::Result<Entry> {
        let (folder, handle) = (self.folder.clone(), self.handle.clone());
        #[cfg(test)]
        let fails_in = self.fails_in.clone();
        let mut entry = blocking(move || {
            let uuid = uuid()?;
            let path = folder.join(format!("{uuid}.{SUFFIX}"));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            Ok(Entry {
                file: Arc::new(file),
                path,
                folder: handle,
                uuid,
                at: 0,
                staged: Vec::new(),
                is_committed: false,
                #[cfg(test)]
                fails_in,
            })
        })
        .await?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        let begin = Record::Begin {
            version: VERSION,
            uuid: entry.uuid.clone(),
            time: time.unwrap_or_default().as_secs(),
        };
        let folder = entry.folder.clone();
        let begun = match entry.append(begin, Durable::Yes).await {
            Ok(()) => blocking(move || folder.sync_all()).await,
            failed => failed,
        };
        if let Err(error) = begun {
            // It says nothing yet; should it stay, the next start removes it.
            let path = entry.path;
            let _ = blocking(move || fs::remove_file(path)).await;
            return Err(error);
        }
        Ok(entry)
    }
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
    /// where it is kept until the transaction ends.
    pub async fn creates(&mut self, path: PathBuf, beside: PathBuf) -> io::Result<()> {
        let creation = blocking(move || {
            let former = match fs::metadata(&path) {
                Ok(metadata) => Some(metadata),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            let is_empty = |former: &fs::Metadata| former.is_file() && former.len() == 0;
            Ok(Creation {
                path,
                beside: former.as_ref().map(|_| beside),
                was_empty: former.as_ref().is_some_and(is_empty),
                former: former.as_ref().map(Identity::of),
            })
        });
        let creation = creation.await?;
        self.append(Record::Creates(creation), Durable::Yes).await
    }

    /// Says which file was made there.
    pub async fn created(&mut self, path: PathBuf) -> io::Result<()> {
        let at = path.clone();
        let file = blocking(move || Ok(Identity::of(&fs::metadata(at)?))).await?;
        let created = Record::Created { path, file };
        self.append(created, Durable::Later).await
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
        let (file, at) = (self.file.clone(), self.at);
        blocking(move || {
            file.write_all_at(&vec![0; room], at)?;
            file.sync_all()
        })
        .await
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
        let switches = blocking(move || {
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
    /// undone. Where it cannot be written, the journal is removed, which says the same but leaves nothing to undo by.
    pub async fn revoke(&mut self) -> io::Result<()> {
        if !self.is_committed {
            return Ok(());
        }
        let file = self.file.clone();
        // What came behind the last record that is known to be there may be there, too: behind it, this one would not count.
        let whole = blocking(move || {
            let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap_or(0)];
            file.read_exact_at(&mut bytes, 0)?;
            Ok(Record::decode_all(&bytes).1)
        });
        self.at = whole
            .await
            .map_or(self.at, |whole| self.at.max(whole as u64));
        let Err(error) = self.append(Record::Abort, Durable::Yes).await else {
            return Ok(());
        };
        log::warn!("'{}': {error}; the journal is removed", self.path.display());
        let (path, folder) = (self.path.clone(), self.folder.clone());
        blocking(move || {
            fs::remove_file(path)?;
            folder.sync_all()
        })
        .await
    }

    /// Ends the journal: nothing is left to do. The file goes.
    pub async fn end(mut self) -> io::Result<()> {
        self.append(Record::Done, Durable::Yes).await?;
        // Should the name come back after a crash, the record says that there is nothing to do.
        let path = self.path;
        blocking(move || fs::remove_file(path)).await
    }

    /// As a disk that has written something and cannot say so.
    #[cfg(test)]
    fn fault(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering::SeqCst;
        let next = |left: u64| left.checked_sub(1);
        match self.fails_in.fetch_update(SeqCst, SeqCst, next) {
            Ok(1) => Err(io::ErrorKind::Other.into()),
            _ => Ok(()),
        }
    }

    async fn append(&mut self, record: Record, durable: Durable) -> io::Result<()> {
        let (file, at, bytes) = (self.file.clone(), self.at, record.encode());
        let end = at + bytes.len() as u64;
        blocking(move || {
            file.write_all_at(&bytes, at)?;
            match durable {
                Durable::Yes => file.sync_data(),
                Durable::Later => Ok(()),
            }
        })
        .await?;
        #[cfg(test)]
        self.fault()?;
        self.at = end;
        Ok(())
    }
}

/// Runs what waits for a disk where waiting does no harm. It goes on when nobody waits for it any more.
pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(call)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
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
