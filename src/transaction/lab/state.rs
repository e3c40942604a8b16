//! A state that a crash has left, in the folders that the run had: the same files, by number and name.

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::crashlab::content::SECTOR;
use block::crashlab::states::State;
use block::driver::Requests as _;
use block::protocols::memory::{Change, Memory, Record};

use super::guests::{Back, Written};
use super::run::{Moment, Place};
use super::script::DISKS;
use super::tape::{FOLDERS, Folder, Recorded, Renaming, Tape};

/// A run whose crash states are tried.
pub(super) struct Recording {
    /// The disks before the first record: names, and files.
    pub(super) base: Arc<Memory>,
    pub(super) log: Vec<Record>,
    /// Where all files have a name, and how many they are.
    pub(super) cellar: PathBuf,
    pub(super) files: usize,
    pub(super) folders: [Folder; FOLDERS],
    /// What had been answered when.
    pub(super) moments: Vec<Moment>,
    /// Stamps and names from here on are new.
    pub(super) next: u32,
    /// What guests have written beside, to each disk.
    pub(super) guests: [Vec<Written>; DISKS],
    /// When each disk has gone back meanwhile.
    pub(super) backs: [Vec<Back>; DISKS],
}

/// Flushes that a daemon could have forgotten: whether the laboratory finds that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forgotten {
    Images,
    Journals,
    Names,
}

impl Recording {
    /// The same as if some flushes had not been there.
    pub(super) fn forget(&mut self, forgotten: Forgotten) {
        let journals = self.folders[1].numbers();
        // The moments count records: a flush becomes a write of nothing.
        for record in &mut self.log {
            let is_journal = || journals.contains(&(record.disk - FOLDERS));
            let is_forgotten = match forgotten {
                Forgotten::Names => record.disk < FOLDERS,
                Forgotten::Journals => record.disk >= FOLDERS && is_journal(),
                Forgotten::Images => record.disk >= FOLDERS && !is_journal(),
            };
            if is_forgotten && matches!(record.change, Change::Flush) {
                record.change = Change::Discard { offset: 0, len: 0 };
            }
        }
    }

    pub(super) fn of(tape: &Tape, moments: Vec<Moment>, next: u32) -> Recording {
        let Recorded {
            base,
            log,
            cellar,
            files,
            folders,
        } = tape.take();
        Recording {
            base,
            log,
            cellar,
            files,
            folders,
            moments,
            next,
            guests: Default::default(),
            backs: Default::default(),
        }
    }

    /// When a disk has last gone back behind a moment. `is_decided`: what is taken back in that has been done.
    pub(super) fn back(&self, disk: usize, moment: usize, is_decided: bool) -> Option<&Back> {
        let happened = |back: &&Back| match back.is_taken_back {
            true => is_decided && back.moment == moment,
            false => back.moment <= moment,
        };
        self.backs[disk].iter().rfind(happened)
    }
}

impl Recording {
    /// A record for people.
    pub(super) fn explain(&self, record: &Record) -> String {
        let what = match &record.change {
            Change::Write { offset, data, .. } => format!("{} bytes at {offset}", data.len()),
            other => format!("{other:?}"),
        };
        if record.disk < FOLDERS {
            return match &record.change {
                Change::Write { offset, .. } => {
                    let nth = (offset / SECTOR) as usize;
                    format!("{:?}", self.folders[record.disk].renamings[nth])
                }
                _ => format!("folder {}: {what}", record.disk),
            };
        }
        let number = record.disk - FOLDERS;
        let named = |folder: &Folder| {
            let before = folder.before.iter().map(|(path, number)| (path, *number));
            let made = folder
                .renamings
                .iter()
                .filter_map(|renaming| match renaming {
                    Renaming::Make(path, number) => Some((path, *number)),
                    _ => None,
                });
            let mut all = before.chain(made);
            let (path, _) = all.find(|(_, other)| *other == number)?;
            Some(path.file_name()?.to_string_lossy().into_owned())
        };
        let name = self.folders.iter().find_map(named);
        format!("{}: {what}", name.unwrap_or_default())
    }
}

impl Folder {
    /// The files that ever got a name here.
    fn numbers(&self) -> HashSet<usize> {
        let made = self.renamings.iter().filter_map(|renaming| match renaming {
            Renaming::Make(_, number) => Some(*number),
            _ => None,
        });
        self.before.values().copied().chain(made).collect()
    }

    /// The names behind so many renamings.
    fn names(&self, renamings: usize) -> HashMap<PathBuf, usize> {
        let mut names = self.before.clone();
        for renaming in &self.renamings[..renamings] {
            match renaming {
                Renaming::Make(path, number) => {
                    names.insert(path.clone(), *number);
                }
                Renaming::Remove(path) => {
                    names.remove(path);
                }
                Renaming::Rename(from, to) => {
                    if let Some(number) = names.remove(from) {
                        names.insert(to.clone(), number);
                    }
                }
                Renaming::Exchange(one, other) => {
                    if let (Some(first), Some(second)) = (names.remove(one), names.remove(other)) {
                        names.insert(one.clone(), second);
                        names.insert(other.clone(), first);
                    }
                }
            }
        }
        names
    }
}

impl Recording {
    /// A process was killed at this state, where nothing that it had sent is lost yet; then this was done.
    pub(super) fn continued(&self, state: &State, tape: &Tape) -> Recording {
        let Recorded { log, folders, .. } = tape.take();
        let mut all = self.log[..state.completed].to_vec();
        let now = all.iter().map(|record| record.completed).max();
        let later = now.unwrap_or(0) + 1;
        all.extend(log.into_iter().map(|record| Record {
            issued: record.issued + later,
            completed: record.completed + later,
            ..record
        }));
        let mut moments = self.moments.clone();
        for moment in &mut moments {
            if moment.answered > state.completed {
                moment.answered = usize::MAX;
            }
        }
        moments.retain(|moment| moment.begun < state.completed || moment.answered == 0);
        let mut guests = self.guests.clone();
        for written in guests.iter_mut() {
            written.retain(|write| write.begun < state.completed);
            for write in written {
                write.flushed.take_if(|at| *at > state.completed);
            }
        }
        Recording {
            base: self.base.clone(),
            log: all,
            cellar: self.cellar.clone(),
            files: self.files,
            folders,
            moments,
            next: self.next,
            guests,
            backs: self.backs.clone(),
        }
    }
}

/// How many renamings have reached the disk, without a gap: they are in the file system's journal, which has an order.
pub(super) fn renamings(disk: &Memory) -> usize {
    let sectors = 0..disk.size() / SECTOR;
    let is_there = |at: &u64| !disk.peek(at * SECTOR, 8).is_known_zero() && word(disk, *at) > 0;
    sectors.take_while(is_there).count()
}

fn word(disk: &Memory, sector: u64) -> u64 {
    let bytes = disk.peek(sector * SECTOR, 8).to_bytes();
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// Makes the folders what the state is. Whatever was there is gone.
pub(super) fn restore(place: &Place, recording: &Recording, disks: &Memory) {
    let cellar = &recording.cellar;
    for (number, folder) in [&place.images, &place.state].into_iter().enumerate() {
        clear(folder);
        let names = &recording.folders[number];
        for (path, file) in names.names(renamings(disks.numbered(number))) {
            fs::hard_link(cellar.join(file.to_string()), path).unwrap();
        }
    }
    for number in 0..recording.files {
        let path = cellar.join(number.to_string());
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(0).unwrap();
        let content = disks.numbered(FOLDERS + number).content();
        file.write_all_at(&content, 0).unwrap();
        file.set_modified(place.begun).unwrap();
    }
}

pub(super) fn clear(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
}
