//! The start behind a crash: transactions that were cut off are finished or taken back before an image is served.
//!
//! | the journal has | images | files that were made |
//! |---|---|---|
//! | no commit | are as they were; space that was taken for the change is given back | are removed; what they replaced comes back |
//! | a commit | are switched, those that are not yet | stay |
//! | a commit and an abort | are switched back, those that are | are removed; what they replaced comes back |
//! | what is left behind an abort | as above, those that are left | as above, but for those that guests have written to |
//!
//! Every step can be done again, so that a crash meanwhile does no harm. An image is only touched when it is the file that it was,
//! nobody else has it open, and its header is either the old or the new one; it is only switched when nothing was
//! written to the file since. Everything else is reported, and left as it is.

mod files;
mod images;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use block::error::Error;
use block::io::{HostFile, IoContext, Names};
use block::open::{Aio, CacheMode, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};

use files::{keep_file, put_back, take_file_back, what_was_before};
use images::{reclaim, switch_image};

use super::Journal;
use super::entry;
use super::record::{
    ActionKind, Creation, Identity, ImageSwitch, JournaledAction, Record, StagedImage, Time,
    last_change, modified,
};
use super::report::{
    ActionResult, FileResult, ImageResult, Outcome, RecoveredAction, RecoveredFile, RecoveredImage,
    Report,
};

/// A transaction that was cut off, and what has been done about it.
#[derive(Debug)]
pub struct Recovered {
    /// For clients and the log.
    pub report: Report,
    path: PathBuf,
    names: Names,
}

impl Recovered {
    /// Somebody has read the report: it is forgotten, unless another start may do more.
    pub fn seen(self) {
        if self.report.is_worth_another_try() {
            return;
        }
        if let Err(error) = self.names.remove(&self.path) {
            log::warn!("'{}' stays: {error}", self.path.display());
        }
    }
}

/// Finishes or takes back what a crash has cut off. Answers what nobody has read about yet.
///
/// Errors only where the state directory itself cannot be read or written.
pub async fn recover(journal: &Journal, io: &IoContext) -> io::Result<Vec<Recovered>> {
    let mut recovered = Vec::new();
    let entries = journal.entries()?;
    if !entries.is_empty() {
        // A killed process may have given one the name of another just now, which said something else.
        io.names().sync_folder(&journal.folder)?;
    }
    for path in entries {
        let Some(plan) = Plan::read(&path)? else {
            io.names().remove(&path)?;
            continue;
        };
        let report = match plan.earlier.clone() {
            Some(report) if !report.is_worth_another_try() => report,
            _ => {
                let file = entry::open(io, &path).await?;
                // A killed process may have left its last record in the page cache alone: what that decides must not be lost when it
                // has been done in part.
                file.sync().await?;
                let report = plan.carry_out(io).await;
                write_down(&file, &path, &report).await?;
                report
            }
        };
        log_report(&report, &path);
        recovered.push(Recovered {
            report,
            path,
            names: io.names(),
        });
    }
    Ok(recovered)
}

/// Puts the report behind what there is, durably.
async fn write_down(file: &HostFile, path: &Path, report: &Report) -> io::Result<()> {
    let end = Record::decode_all(&fs::read(path)?).1;
    let images = report.images.iter().map(|image| image.path.clone());
    let files = report.files.iter().map(|file| file.path.clone());
    let paths: Vec<PathBuf> = images.chain(files).collect();
    let record = Record::Recovered {
        report: report.clone(),
        time: Some(last_change(&paths)),
    };
    file.write(end as u64, record.encode().into(), false)
        .await?;
    file.sync().await
}

fn log_report(report: &Report, path: &Path) {
    let Report {
        uuid,
        outcome,
        images,
        files,
        actions,
    } = report;
    match outcome {
        Outcome::RolledForward => {
            log::warn!("transaction {uuid} was cut off and has been finished")
        }
        Outcome::Removed => log::warn!("transaction {uuid} was cut off and has been taken back"),
        Outcome::Degraded => log::error!(
            "transaction {uuid} was cut off, and not all of it could be put right: see '{}'",
            path.display()
        ),
    }
    let because = |detail: &Option<String>| match detail {
        Some(detail) => format!(": {detail}"),
        None => String::new(),
    };
    for image in images.iter().filter(|image| !image.result.is_right()) {
        let (path, result) = (image.path.display(), image.result.said());
        log::error!(
            "transaction {uuid}: image '{path}' {result}{}",
            because(&image.detail)
        );
    }
    let text = |path: &Option<PathBuf>| match path {
        Some(path) => format!("'{}'", path.display()),
        None => "the node that the client gave".to_owned(),
    };
    for action in report.overlays() {
        let (device, overlay, image) = (&action.device, &action.filename, &action.image);
        log::warn!(
            "transaction {uuid}: disk '{device}' is {} from now on: open that instead of {}",
            text(overlay),
            text(image)
        );
    }
    for RecoveredAction { action, result } in actions {
        if *result == ActionResult::CutOff {
            log::warn!(
                "transaction {uuid}: the backup of '{}' to {} has ended with the process and is not complete",
                action.device,
                text(&action.filename)
            );
        }
    }
    for file in files.iter().filter(|file| !file.result.is_right()) {
        let (path, result) = (file.path.display(), file.result.said());
        log::error!(
            "transaction {uuid}: file '{path}' {result}{}",
            because(&file.detail)
        );
    }
}

/// Where a transaction is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Back,
}

/// What a journal says.
#[derive(Debug)]
struct Plan {
    uuid: String,
    actions: Vec<JournaledAction>,
    staged: Vec<StagedImage>,
    creations: Vec<(Creation, Option<Identity>)>,
    /// Where a path is among them for the first time.
    of_path: HashMap<PathBuf, usize>,
    switches: Vec<ImageSwitch>,
    direction: Direction,
    /// Files that stay where it goes back.
    kept: HashSet<PathBuf>,
    /// What an earlier start has done.
    earlier: Option<Report>,
    /// Whoever has written to a file that is to go, or to an image that is to go back, later than this uses it.
    unused_until: Unused,
}

/// Times up to which nobody can have used what a failed transaction has left, as far as they are known.
#[derive(Debug, Clone, Copy, Default)]
struct Unused {
    /// Files that it made.
    files: Option<Time>,
    /// Its images. Those that the daemon itself could not put back its guests have gone on with.
    images: Option<Time>,
}

impl Plan {
    /// `None` where there is nothing to do.
    fn read(path: &Path) -> io::Result<Option<Plan>> {
        let (records, _) = Record::decode_all(&fs::read(path)?);
        let mut records = records.into_iter();
        let begin = records.next();
        let Some(Record::Begin {
            version,
            uuid,
            actions,
            ..
        }) = begin
        else {
            // It was torn before anything was done.
            return Ok(None);
        };
        if version != super::record::VERSION {
            let text = format!("'{}' was written by another version", path.display());
            return Err(io::Error::other(text));
        }
        let mut plan = Plan {
            uuid,
            actions,
            staged: Vec::new(),
            creations: Vec::new(),
            of_path: HashMap::new(),
            switches: Vec::new(),
            direction: Direction::Back,
            kept: HashSet::new(),
            earlier: None,
            unused_until: Unused::default(),
        };
        for record in records {
            match record {
                Record::Begin { .. } => {}
                Record::Stages { images } => plan.staged = images,
                Record::Creates(creation) => plan.creates(creation),
                Record::Created { path, file } => plan.created(&path, file),
                Record::Commit { switches } => {
                    plan.switches = switches;
                    plan.direction = Direction::Forward;
                }
                Record::Abort => plan.direction = Direction::Back,
                Record::Leaves {
                    images,
                    files,
                    time,
                } => {
                    let images: HashSet<PathBuf> = images.into_iter().collect();
                    plan.kept = files.into_iter().collect();
                    plan.unused_until.files = time;
                    plan.staged.retain(|image| images.contains(&image.path));
                    let switches = &mut plan.switches;
                    switches.retain(|switch| images.contains(&switch.image.path));
                }
                Record::Done => return Ok(None),
                Record::Recovered { report, time } => {
                    plan.earlier = Some(report);
                    let Unused { files, images } = plan.unused_until;
                    plan.unused_until = Unused {
                        files: files.or(time),
                        images: images.or(time),
                    };
                }
            }
        }
        Ok(Some(plan))
    }

    fn creates(&mut self, creation: Creation) {
        let place = self.of_path.entry(creation.path.clone());
        place.or_insert(self.creations.len());
        self.creations.push((creation, None));
    }

    fn created(&mut self, path: &Path, file: Identity) {
        let place = self.of_path.get(path);
        if let Some((_, made)) = place.and_then(|at| self.creations.get_mut(*at)) {
            *made = Some(file);
        }
    }

    async fn carry_out(&self, io: &IoContext) -> Report {
        let mut images = Vec::new();
        for switch in &self.switches {
            images.push(self.switch(io, switch).await);
        }
        let files = self.settle_files(io).await;
        if self.direction == Direction::Back {
            // What a header does not lead to that is not as it was is no leak: the next start may put back the one that does.
            let wrong = images.iter().filter(|image| !image.result.is_right());
            let wrong: HashSet<&PathBuf> = wrong.map(|image| &image.path).collect();
            for image in &self.staged {
                // On a device that is what had been there before.
                if !self.makes(&image.path) && !wrong.contains(&image.path) {
                    reclaim(io, image).await;
                }
            }
        }
        let right = images.iter().all(|image| image.result.is_right())
            && files.iter().all(|file| file.result.is_right());
        Report {
            uuid: self.uuid.clone(),
            outcome: match (right, self.direction) {
                (false, _) => Outcome::Degraded,
                (true, Direction::Forward) => Outcome::RolledForward,
                (true, Direction::Back) => Outcome::Removed,
            },
            actions: self.results(&images, &files),
            images,
            files,
        }
    }

    /// Files stay, or go, the last one first. Their names are durable then; folders are made so once, whatever was in them.
    async fn settle_files(&self, io: &IoContext) -> Vec<RecoveredFile> {
        let (mut files, mut remains) = (Vec::new(), Vec::new());
        let mut folders: BTreeSet<PathBuf> = BTreeSet::new();
        for (creation, made) in self.creations.iter().rev() {
            let direction = match self.kept.contains(&creation.path) {
                true => Direction::Forward,
                false => self.direction,
            };
            let done = match (&creation.overwritten, direction) {
                (Some(front), Direction::Back) => put_back(io, creation, front).await,
                _ => {
                    folders.extend(creation.path.parent().map(Path::to_owned));
                    let (creation, made) = (creation.clone(), *made);
                    let (names, unused) = (io.names(), self.unused_until.files);
                    let settled = io.call(move || match direction {
                        Direction::Forward => keep_file(&names, &creation),
                        Direction::Back => take_file_back(&names, &creation, made, unused),
                    });
                    settled.await.map(|settled| {
                        remains.extend(settled.remains);
                        settled.result
                    })
                }
            };
            let (result, detail) = match done {
                Ok(FileResult::Changed) => (FileResult::Changed, what_was_before(creation)),
                Ok(result) => (result, None),
                Err(error) => (FileResult::Failed, Some(error.to_string())),
            };
            files.push(RecoveredFile {
                path: creation.path.clone(),
                result,
                detail,
            });
        }
        for folder in folders {
            let (names, synced) = (io.names(), folder.clone());
            let Err(error) = io.call(move || names.sync_folder(&synced)).await else {
                continue;
            };
            let there = |file: &&mut RecoveredFile| {
                file.path.parent() == Some(&folder) && file.result.is_right()
            };
            for file in files.iter_mut().filter(there) {
                (file.result, file.detail) = (FileResult::Failed, Some(error.to_string()));
            }
        }
        io.release(remains).await;
        files
    }

    /// What has become of each action, by its image and file.
    fn results(&self, images: &[RecoveredImage], files: &[RecoveredFile]) -> Vec<RecoveredAction> {
        // The first of each path counts.
        let images = images.iter().rev();
        let images: HashMap<&PathBuf, ImageResult> =
            images.map(|image| (&image.path, image.result)).collect();
        let files = files.iter().rev();
        let files: HashMap<&PathBuf, FileResult> =
            files.map(|file| (&file.path, file.result)).collect();
        let result = |action: &JournaledAction| {
            let file = action.filename.as_ref();
            let file = file.and_then(|path| files.get(path).copied());
            let right = match action.kind {
                ActionKind::Create | ActionKind::Delete | ActionKind::Revert => {
                    let image = action.image.as_ref().and_then(|path| images.get(path));
                    // Without a commit no image has been changed.
                    image.map_or(self.switches.is_empty(), |image| image.is_right())
                }
                _ => file.is_none_or(FileResult::is_right),
            };
            match (action.kind, self.direction) {
                _ if !right => ActionResult::Unclear,
                (ActionKind::BackupToFile | ActionKind::BackupToNode, Direction::Forward) => {
                    ActionResult::CutOff
                }
                (_, Direction::Forward) => ActionResult::Done,
                // It has what guests have written.
                (ActionKind::OverlayFile, Direction::Back) if file == Some(FileResult::Kept) => {
                    ActionResult::Done
                }
                (_, Direction::Back) => ActionResult::Undone,
            }
        };
        let actions = self.actions.iter();
        let actions = actions.map(|action| RecoveredAction {
            result: result(action),
            action: action.clone(),
        });
        actions.collect()
    }

    /// Whether the file of this path was made by the transaction, and goes where that is taken back.
    fn makes(&self, path: &Path) -> bool {
        self.of_path.contains_key(path) && !self.kept.contains(path)
    }

    async fn switch(&self, io: &IoContext, switch: &ImageSwitch) -> RecoveredImage {
        let path = &switch.image.path;
        let goes_with_its_file = self.direction == Direction::Back && self.makes(path);
        let (result, detail) = match goes_with_its_file {
            true => (ImageResult::Unchanged, None),
            false => switch_image(io, switch, self.direction, self.unused_until.images).await,
        };
        RecoveredImage {
            path: path.clone(),
            result,
            detail,
        }
    }
}

/// A file that is there, for writing.
async fn open_locked(io: &IoContext, path: &Path) -> Result<File, Error> {
    let options = FileOptions {
        filename: path.to_string_lossy().into_owned(),
        aio: Aio::Threads,
        locking: Locking::Auto,
    };
    let access = FileAccess {
        read_only: false,
        auto_read_only: false,
        cache: CacheMode::default(),
    };
    File::open(io, &options, access).await
}

/// Whether somebody has written to a file later than this, as far as that can be known.
fn is_newer(path: &Path, until: Option<Time>) -> Result<bool, Error> {
    let metadata = fs::metadata(path)
        .map_err(|error| Error::io(format!("Could not look at '{}'", path.display()), &error))?;
    // A power failure may have kept an older time. A killed process may have left the time of a switch, but not the switch.
    Ok(until.is_some() && modified(&metadata) > until)
}
