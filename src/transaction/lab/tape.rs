//! Writes down what is done to the files of a folder, and makes parts of it fail. Some of the files stand for block devices.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::crashlab::content::SECTOR;
use block::io::{Data, Deed, FileIdentity, Handle, Verdict, Witness};
use block::protocols::memory::{Change, Memory, Record};

use super::state::Recording;

/// The first disks of a log are the names in folders; the files follow.
pub(super) const FOLDERS: usize = 2;

/// Files whose names begin with this stand for block devices.
pub(super) const DEVICE: &str = "device";

/// What is done to the names in one folder.
#[derive(Debug, Clone)]
pub(super) enum Renaming {
    /// A file gets its first name.
    Make(PathBuf, usize),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
}

/// A deed that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// EIO.
    Io,
    /// ENOSPC.
    NoSpace,
    /// ENOSPC behind the first half of it.
    Short,
}

/// What a deed that goes wrong comes behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behind {
    /// The moment when that is planned; or, where another has failed before, that.
    Now,
    /// The names of images in the journal.
    Stages,
    /// The journal's commit.
    Commit,
    /// The record that nothing is to happen after all. From then on names may stay, too.
    Abort,
}

/// A failure that is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) behind: Behind,
    /// So many deeds later.
    pub(crate) skip: u64,
    pub(crate) fault: Fault,
}

impl Behind {
    /// What a journal has then.
    fn record(self) -> Option<&'static [u8]> {
        match self {
            Behind::Now => None,
            Behind::Stages => Some(br#"{"record":"stages""#),
            Behind::Commit => Some(br#"{"record":"commit""#),
            Behind::Abort => Some(br#"{"record":"abort""#),
        }
    }
}

/// Which names a folder had, and then got.
#[derive(Debug, Default, Clone)]
pub(super) struct Folder {
    pub(super) before: HashMap<PathBuf, usize>,
    pub(super) renamings: Vec<Renaming>,
}

/// What has been written down.
pub(super) struct Recorded {
    /// The disks before the first record.
    pub(super) base: Arc<Memory>,
    pub(super) log: Vec<Record>,
    /// Where all files have a name, and how many they are.
    pub(super) cellar: PathBuf,
    pub(super) files: usize,
    /// What the records of folders mean.
    pub(super) folders: [Folder; FOLDERS],
}

/// A file of the folders, whatever its name.
#[derive(Debug)]
struct File {
    /// Its size as the log has it.
    size: u64,
    /// What it held before the log began.
    before: Vec<u8>,
}

#[derive(Debug)]
struct State {
    random: fastrand::Rng,
    /// The longest pause, in turns of other tasks.
    longest_pause: u32,
    clock: u64,
    folders: [PathBuf; FOLDERS],
    names: [Folder; FOLDERS],
    files: Vec<File>,
    /// Which file has this number in the file system.
    numbers: HashMap<u64, usize>,
    /// Where all files have a name for as long as the tape exists.
    cellar: Option<PathBuf>,
    log: Option<Vec<Record>>,
    /// What is to fail, one behind the other.
    failures: VecDeque<Failure>,
    /// Names are removed, and made durable, whatever else fails: nothing could be done about it, and an old file is left.
    spares_names: bool,
    /// The last deed that has failed.
    failed: Option<Deed>,
    /// Deeds that could have failed.
    deeds: u64,
}

/// Sees what is done to files in two folders.
#[derive(Debug)]
pub(crate) struct Tape(Mutex<State>);

impl Tape {
    /// Of images in `images` and journals in `state`. What goes on at the same time ends in an order that `seed` decides; 0 for
    /// the order in which it begins.
    pub(crate) fn new(images: &Path, state: &Path, seed: u64) -> Arc<Tape> {
        Arc::new(Tape(Mutex::new(State {
            random: fastrand::Rng::with_seed(seed),
            longest_pause: if seed == 0 { 0 } else { 3 },
            clock: 0,
            folders: [images.to_owned(), state.to_owned()],
            names: Default::default(),
            files: Vec::new(),
            numbers: HashMap::new(),
            cellar: None,
            log: None,
            failures: VecDeque::new(),
            spares_names: false,
            failed: None,
            deeds: 0,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything from now on is written down. All files stay in `cellar`, by the numbers that they have in the log.
    pub(super) fn start(&self, cellar: &Path) {
        let mut state = self.state();
        state.cellar = Some(cellar.to_owned());
        for folder in 0..FOLDERS {
            for entry in fs::read_dir(&state.folders[folder]).unwrap() {
                let path = entry.unwrap().path();
                let content = fs::read(&path).unwrap();
                let number = state.add_file(&path, content);
                state.names[folder].before.insert(path, number);
            }
        }
        state.log = Some(Vec::new());
    }

    /// As `start`, but goes on where a recording was cut off: its files keep their numbers, and the names of folders have been changed
    /// so often.
    pub(super) fn go_on(&self, cut: &Recording, renamings: [usize; FOLDERS]) {
        let mut state = self.state();
        for number in 0..cut.files {
            let metadata = fs::metadata(cut.cellar.join(number.to_string())).unwrap();
            state.numbers.insert(metadata.ino(), number);
            let (size, before) = (metadata.len(), Vec::new());
            state.files.push(File { size, before });
        }
        state.cellar = Some(cut.cellar.clone());
        for (number, count) in renamings.into_iter().enumerate() {
            state.names[number] = cut.folders[number].clone();
            state.names[number].renamings.truncate(count);
        }
        state.log = Some(Vec::new());
    }

    /// How many records there are.
    pub(super) fn len(&self) -> usize {
        self.state().log.as_ref().map_or(0, Vec::len)
    }

    /// Ends what `start` began.
    pub(super) fn take(&self) -> Recorded {
        let mut state = self.state();
        let base = Memory::group(FOLDERS + state.files.len());
        for (number, file) in state.files.iter().enumerate() {
            let disk = base.numbered(FOLDERS + number);
            let offset = 0;
            let data = Data::from(file.before.clone());
            let fua = false;
            disk.apply(&Change::Write { offset, data, fua }).unwrap();
        }
        Recorded {
            base,
            log: state.log.take().unwrap_or_default(),
            cellar: state.cellar.take().unwrap_or_default(),
            files: state.files.len(),
            folders: state.names.clone(),
        }
    }

    /// Makes the deed fail that comes behind `skip` others.
    pub(crate) fn fail(&self, skip: u64, fault: Fault) {
        let behind = Behind::Now;
        self.plan(&[Failure {
            behind,
            skip,
            fault,
        }]);
        self.state().spares_names = false;
    }

    /// Makes deeds fail, one behind the other, but none that removes a name or makes names durable before an abort.
    pub(super) fn plan(&self, failures: &[Failure]) {
        let mut state = self.state();
        state.deeds = 0;
        state.failures = failures.iter().copied().collect();
        state.spares_names = true;
    }

    /// Nothing fails any more. Answers what has failed.
    pub(crate) fn no_fault(&self) -> Option<Deed> {
        let mut state = self.state();
        state.failures.clear();
        state.failed.take()
    }

    /// How many deeds there have been since the last `fail`.
    pub(super) fn deeds(&self) -> u64 {
        self.state().deeds
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A file that is to be in the log: it keeps its content and number whatever becomes of its names.
    fn add_file(&mut self, path: &Path, before: Vec<u8>) -> usize {
        let metadata = fs::metadata(path).unwrap();
        let number = self.files.len();
        self.numbers.insert(metadata.ino(), number);
        let size = metadata.len();
        self.files.push(File { size, before });
        if let Some(cellar) = &self.cellar {
            fs::hard_link(path, cellar.join(number.to_string())).unwrap();
        }
        number
    }

    fn record(&mut self, disk: usize, issued: u64, change: Change) {
        let completed = self.tick();
        if let Some(log) = &mut self.log {
            log.push(Record {
                disk,
                issued,
                completed,
                change,
            });
        }
    }

    fn file(&self, handle: &Handle) -> Option<usize> {
        let (_, inode) = handle.identity().unwrap();
        self.numbers.get(&inode).copied()
    }

    /// A file has other bytes in a range, and perhaps another size.
    fn changed(&mut self, issued: u64, handle: &Handle, offset: u64, len: u64) {
        let Some(number) = self.file(handle) else {
            return;
        };
        let size = handle.size().unwrap();
        if size != self.files[number].size {
            self.files[number].size = size;
            self.record(FOLDERS + number, issued, Change::Resize { size });
        }
        let len = len.min(size.saturating_sub(offset));
        if len > 0 {
            let data: Data = handle.read(offset, len as usize).unwrap().into();
            self.arm(&data.to_bytes());
            let fua = false;
            let write = Change::Write { offset, data, fua };
            self.record(FOLDERS + number, issued, write);
        }
    }

    /// What is to fail behind a record of a journal, if that is what was written.
    fn arm(&mut self, written: &[u8]) {
        if let Some(failure) = self.failures.front_mut()
            && let Some(record) = failure.behind.record()
            && written.windows(record.len()).any(|part| part == record)
        {
            self.spares_names = failure.behind != Behind::Abort;
            failure.behind = Behind::Now;
        }
    }

    fn folder_of(&self, path: &Path) -> Option<usize> {
        let parent = path.parent()?;
        self.folders.iter().position(|folder| folder == parent)
    }

    /// One sector of the folder's disk says how many renamings there have been.
    fn renamed(&mut self, issued: u64, path: &Path, renaming: Renaming) {
        let Some(folder) = self.folder_of(path) else {
            return;
        };
        let renamings = &mut self.names[folder].renamings;
        renamings.push(renaming);
        let nth = renamings.len() as u64;
        let mut sector = vec![0; SECTOR as usize];
        sector[..8].copy_from_slice(&nth.to_le_bytes());
        let write = Change::Write {
            offset: (nth - 1) * SECTOR,
            data: sector.into(),
            fua: false,
        };
        self.record(folder, issued, write);
    }

    /// What becomes of a deed, by the fault that is planned.
    fn verdict(&mut self, deed: &Deed) -> Verdict {
        self.deeds += 1;
        let is_of_names = matches!(deed, Deed::Remove { .. } | Deed::SyncFolder { .. });
        if self.spares_names && is_of_names {
            return usual(deed);
        }
        let fault = match self.failures.front_mut() {
            Some(Failure {
                behind: Behind::Now,
                skip: 0,
                fault,
            }) => *fault,
            Some(Failure {
                behind: Behind::Now,
                skip,
                ..
            }) => {
                *skip -= 1;
                return usual(deed);
            }
            _ => return usual(deed),
        };
        self.failures.pop_front();
        self.failed = Some(deed.clone());
        let no_space = || io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        match (fault, deed) {
            (Fault::Io, _) => {
                let error = rustix::io::Errno::IO.raw_os_error();
                Verdict::Fail(io::Error::from_raw_os_error(error))
            }
            (Fault::Short, Deed::Change { len, .. }) => Verdict::Short(len / 2, no_space()),
            (Fault::NoSpace | Fault::Short, _) => Verdict::Fail(no_space()),
        }
    }
}

/// Nothing here has to survive more than this process: what a power cut leaves is made from the log.
fn usual(deed: &Deed) -> Verdict {
    match deed {
        Deed::Sync { .. } | Deed::SyncFolder { .. } => Verdict::Skip,
        _ => Verdict::Do,
    }
}

impl Witness for Tape {
    fn begins(&self, deed: &Deed) -> (u64, Verdict) {
        let mut state = self.state();
        let issued = state.tick();
        (issued, state.verdict(deed))
    }

    fn ends(&self, issued: u64, deed: &Deed) {
        let mut state = self.state();
        if state.log.is_none() {
            return;
        }
        match deed {
            Deed::Read { .. } | Deed::Open { .. } => {}
            Deed::Change { file, offset, len } => state.changed(issued, file, *offset, *len),
            Deed::Resize { file } => state.changed(issued, file, 0, 0),
            Deed::Sync { file } => {
                if let Some(number) = state.file(file) {
                    state.record(FOLDERS + number, issued, Change::Flush);
                }
            }
            Deed::Make { path } => {
                if state.folder_of(path).is_some() {
                    let number = state.add_file(path, Vec::new());
                    state.renamed(issued, path, Renaming::Make(path.clone(), number));
                }
            }
            Deed::Remove { path } => state.renamed(issued, path, Renaming::Remove(path.clone())),
            Deed::Rename { from, to } => {
                state.renamed(issued, to, Renaming::Rename(from.clone(), to.clone()));
            }
            Deed::Exchange { one, other } => {
                state.renamed(issued, one, Renaming::Exchange(one.clone(), other.clone()));
            }
            Deed::SyncFolder { path } => {
                let folder = state.folders.iter().position(|folder| folder == path);
                if let Some(folder) = folder {
                    state.record(folder, issued, Change::Flush);
                }
            }
        }
    }

    fn is_device(&self, file: FileIdentity) -> bool {
        let images = self.state().folders[0].clone();
        let mut entries = fs::read_dir(images).unwrap().map(Result::unwrap);
        entries.any(|entry| {
            let name = entry.file_name();
            name.to_string_lossy().starts_with(DEVICE) && entry.ino() == file.inode
        })
    }

    fn pause(&self) -> u32 {
        let mut state = self.state();
        match state.longest_pause {
            0 => 0,
            longest => state.random.u32(..=longest),
        }
    }
}
