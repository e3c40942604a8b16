//! Runs a script by the daemon's own code, and notes what had been answered when.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use block::crashlab::audit::{Audit, Bitmap, with_bitmaps};
use block::crashlab::content::{Content, stamp};
use block::driver::{BackingFile, NewSnapshot, Requests as _, WriteFlags};
use block::formats::qcow2::create::{Compat, CreateOptions};
use block::graph::{Edge, NewDrive};
use block::io::{Data, IoContext};
use block::open::{
    Aio, DiscardMode, DriverOptions, Existing, FileOptions, Locking, NewContent, NewImage,
    NodeOptions, NodeRef, Opener, Qcow2Options, create_image, open,
};
use serde_json::json;
use tempfile::TempDir;

use super::Problem;
use super::guests::{self, Back, Beside, Written};
use super::planned::Planned;
use super::script::{
    Act, DISK_BYTES, DISKS, Disk, Image, NewFile, Op, Other, Script, There, World, image_name,
};
use super::tape::{Failure, Tape};
use crate::daemon::{Control, Cx, StopCause, testing};
use crate::jobs::Cancel;
use crate::journal::Journal;
use crate::transaction::Completion;

/// The folders that a script runs in.
pub(super) struct Place {
    _folder: TempDir,
    pub(super) images: PathBuf,
    pub(super) state: PathBuf,
    /// Where all files of a run have a name as long as the place exists.
    pub(super) cellar: PathBuf,
    /// The time that files have after a crash.
    pub(super) begun: SystemTime,
}

impl Place {
    pub(super) fn new() -> Place {
        // States come and go by thousands: in memory, where there is a place for that.
        let memory = Path::new("/dev/shm");
        let folder = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        let folder = folder.unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let make = |name: &str| {
            let path = root.join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        Place {
            images: make("images"),
            state: make("state"),
            cellar: make("cellar"),
            _folder: folder,
            begun: SystemTime::now(),
        }
    }

    pub(super) fn filename(&self, name: &str) -> String {
        self.images.join(name).to_str().unwrap().to_owned()
    }
}

/// An operation that has been answered.
#[derive(Debug, Clone)]
pub(super) struct Moment {
    pub(super) what: String,
    /// Records when it was begun, and when it was answered.
    pub(super) begun: usize,
    pub(super) answered: usize,
    /// What there has to be behind it.
    pub(super) after: World,
    /// What there may be as well as long as it is not answered: a transaction that has failed was decided, and taken back.
    pub(super) passing: Option<World>,
    /// Of each disk, whether the answer says that its content is durable.
    pub(super) durable: [bool; DISKS],
    /// Of each disk, whether its content is durable where this has happened at all, answered or not.
    pub(super) at_once: [bool; DISKS],
}

/// What an operation is known to have done.
#[derive(Debug, Default)]
struct Attempt {
    durable: [bool; DISKS],
    at_once: [bool; DISKS],
    /// It has failed, and may have happened for a time.
    passing: Option<World>,
}

/// A daemon with a drive for each disk.
pub(super) struct Runner<'p> {
    place: &'p Place,
    tape: Arc<Tape>,
    pub(super) cx: Cx,
    daemon: testing::Running,
    pub(super) world: World,
    pub(super) moments: Vec<Moment>,
    /// Stamps and names from here on are new.
    next: u32,
    jobs: Vec<Job>,
    /// Guests write while transactions run.
    has_guests: bool,
    /// What they have written to each disk.
    pub(super) guests: [Vec<Written>; DISKS],
    /// When each disk has gone back meanwhile.
    pub(super) backs: [Vec<Back>; DISKS],
}

/// A backup that has begun.
pub(super) struct Job {
    /// The name of its target, too.
    pub(super) id: String,
    /// It ends only by being cancelled.
    pub(super) is_endless: bool,
    /// What the target shows at the end, if it shows all of it by itself.
    pub(super) content: Option<Arc<Content>>,
}

/// Makes an image besides, over one that is there.
async fn make_image(
    io: &IoContext,
    place: &Place,
    name: &str,
    base: Option<&str>,
) -> Result<(), Problem> {
    let mut options = CreateOptions::new(DISK_BYTES);
    options.backing = BackingFile {
        name: base.map(|base| place.filename(base)),
        format: base.map(|_| "qcow2".to_owned()),
    };
    let image = NewImage {
        filename: place.filename(name),
        content: NewContent::Qcow2(Box::new(options)),
    };
    let made = create_image(io, &image, Existing::Keep).await;
    made.map_err(text)?.keep();
    Ok(())
}

/// Puts bitmaps into an image that is empty, where there is room for them.
fn add_bitmaps(filename: &str) -> Result<Arc<[Bitmap]>, Problem> {
    let Some(bytes) = with_bitmaps(&fs::read(filename).unwrap())? else {
        return Ok(Arc::default());
    };
    fs::write(filename, &bytes).unwrap();
    Ok(Audit::new(&bytes)?.bitmaps().into())
}

/// The name of a disk's drive.
pub(super) fn drive(disk: usize) -> String {
    format!("d{disk}")
}

/// How an image of the laboratory is opened.
fn node_options(filename: String) -> NodeOptions {
    let file = FileOptions {
        filename,
        aio: Aio::Threads,
        locking: Locking::On,
    };
    let file = NodeOptions::new(DriverOptions::File(file));
    let qcow2 = Qcow2Options::new(NodeRef::Inline(Arc::new(file)));
    NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::new(DriverOptions::Qcow2(qcow2))
    }
}

impl<'p> Runner<'p> {
    /// Makes the images of a script, and starts a daemon with them.
    pub(super) async fn create(
        place: &'p Place,
        tape: &Arc<Tape>,
        script: &Script,
    ) -> Result<Runner<'p>, Problem> {
        let io = IoContext::witnessed(tape.clone());
        let mut disks = Vec::new();
        for disk in 0..DISKS {
            let mut chain = Vec::new();
            let count = 1 + usize::from(script.has_overlay[disk]);
            for nth in 0..count {
                let file = image_name(disk, nth);
                let mut options = script.images[disk].clone();
                if nth > 0 {
                    options.backing = BackingFile {
                        name: Some(place.filename(&image_name(disk, nth - 1))),
                        format: Some("qcow2".to_owned()),
                    };
                }
                let image = NewImage {
                    filename: place.filename(&file),
                    content: NewContent::Qcow2(Box::new(options.clone())),
                };
                let made = create_image(&io, &image, Existing::Keep).await;
                made.map_err(text)?.keep();
                // In an overlay they would take the place of the format of what is below.
                let may_have_bitmaps = nth == 0 && options.compat == Compat::V1_1;
                let bitmaps = match script.has_bitmaps[disk] && may_have_bitmaps {
                    true => add_bitmaps(&image.filename)?,
                    false => Arc::default(),
                };
                chain.push(Image {
                    bitmaps,
                    ..Image::new(file, Arc::new(Content::new(DISK_BYTES)))
                });
            }
            disks.push(Disk { chain });
        }
        let mut others = BTreeMap::new();
        for NewFile { name, there } in script.files() {
            if let Some(bytes) = there.bytes() {
                fs::write(place.images.join(name), &bytes).unwrap();
                others.insert(name.clone(), Other::Bytes(bytes));
            }
        }
        for (name, base) in script.nodes() {
            make_image(&io, place, &name, base.as_deref()).await?;
            others.insert(name, Other::Empty);
        }
        let mut runner = Runner::resume(place, tape, World { disks, others }, 1).await?;
        runner.has_guests = script.has_guests;
        for disk in 0..DISKS {
            runner.fill(disk, script.seed).await?;
        }
        Ok(runner)
    }

    /// Makes an image besides, over one that is there.
    pub(super) async fn make_image(&self, name: &str, base: Option<&str>) -> Result<(), Problem> {
        let io = IoContext::witnessed(self.tape.clone());
        make_image(&io, self.place, name, base).await
    }

    /// A daemon with images that are there.
    pub(super) async fn resume(
        place: &'p Place,
        tape: &Arc<Tape>,
        world: World,
        next: u32,
    ) -> Result<Runner<'p>, Problem> {
        let daemon = testing::started();
        let cx = daemon.cx.clone();
        let (io, state) = (IoContext::witnessed(tape.clone()), place.state.clone());
        let begun = cx.commit(move |control: &mut Control| {
            let journal = Journal::open(&state, &io);
            control.journal = Some(Arc::new(journal.map_err(|e| text_error(e.to_string()))?));
            control.io = io;
            Ok(())
        });
        begun.await.map_err(|error| error.desc)?;
        let runner = Runner {
            place,
            tape: tape.clone(),
            cx,
            daemon,
            world,
            moments: Vec::new(),
            next,
            jobs: Vec::new(),
            has_guests: false,
            guests: Default::default(),
            backs: Default::default(),
        };
        for disk in 0..DISKS {
            let top = runner.world.disks[disk].top().file.clone();
            let options = node_options(place.filename(&top));
            let opener = runner.with(|control| Opener::new(&control.io, &control.graph));
            let opened = open(&opener.await, &options).await.map_err(text)?;
            let added = runner.with(move |control| {
                let root = control.graph.insert(opened)?;
                let drive = NewDrive {
                    id: drive(disk),
                    root: Some(root),
                    policy: Default::default(),
                };
                control.graph.add_drive(drive)
            });
            added.await.map_err(text)?;
        }
        Ok(runner)
    }

    /// Some data, a snapshot, and other data; everything durable.
    async fn fill(&mut self, disk: usize, seed: u64) -> Result<(), Problem> {
        let mut random = fastrand::Rng::with_seed(seed ^ disk as u64);
        for round in 0..2 {
            for _ in 0..4 {
                let at = 512 * random.u64(..DISK_BYTES / 512 - 8);
                self.write(disk, at, 4096).await?;
            }
            if round == 0 {
                let name = "old".to_owned();
                let edge = self.edge(disk).await;
                let node = edge.node();
                let snapshots = node.driver().snapshots().unwrap();
                let taken = snapshots.create(NewSnapshot::named(&name)).await;
                taken.map_err(text)?;
                self.world.disks[disk].take(name);
            }
        }
        self.edge(disk).await.flush().await.map_err(text)
    }

    /// From here on everything is written down.
    pub(super) fn start(&mut self) {
        self.tape.start(&self.place.cellar);
        self.moments = vec![Moment {
            what: "start".to_owned(),
            begun: 0,
            answered: 0,
            after: self.world.clone(),
            passing: None,
            durable: [true; DISKS],
            at_once: [true; DISKS],
        }];
    }

    pub(super) async fn with<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Control) -> T + Send + 'static,
    ) -> T {
        let looked = self.cx.commit(|control| Ok(look(control)));
        looked.await.unwrap()
    }

    pub(super) async fn edge(&self, disk: usize) -> Edge {
        let id = drive(disk);
        let edge = self.with(move |control| control.graph.drive(&id).unwrap().root.clone());
        edge.await.unwrap()
    }

    pub(super) async fn edges(&self) -> Vec<Edge> {
        let mut edges = Vec::new();
        for disk in 0..DISKS {
            edges.push(self.edge(disk).await);
        }
        edges
    }

    async fn write(&mut self, disk: usize, at: u64, len: u64) -> Result<(), Problem> {
        self.next += 1;
        let bytes = stamp(at, len, self.next);
        let edge = self.edge(disk).await;
        let data = Data::from(bytes.clone());
        let written = edge.write(at, data, WriteFlags::default()).await;
        written.map_err(text)?;
        Arc::make_mut(&mut self.world.disks[disk].top_mut().content).write(at, &bytes);
        Ok(())
    }

    /// Does one operation.
    pub(super) async fn step(&mut self, op: &Op) -> Result<(), Problem> {
        let begun = self.tape.len();
        let mut attempt = Attempt::default();
        match op {
            Op::Write { disk, at, len } => self.write(*disk, *at, *len).await?,
            Op::Flush(disk) => {
                self.edge(*disk).await.flush().await.map_err(text)?;
                attempt.durable[*disk] = true;
            }
            Op::Transaction(acts) => attempt = self.transaction(acts, &[]).await?,
            Op::Failing(acts, failures) => attempt = self.transaction(acts, failures).await?,
            Op::Idle => tokio::time::sleep(Duration::from_secs(30)).await,
        }
        self.note(format!("{op:?}"), begun, attempt);
        if !self.jobs.is_empty() {
            let begun = self.tape.len();
            self.end_jobs().await?;
            self.note("the end of jobs".to_owned(), begun, Attempt::default());
        }
        Ok(())
    }

    fn note(&mut self, what: String, begun: usize, attempt: Attempt) {
        let Attempt {
            durable,
            at_once,
            passing,
        } = attempt;
        self.moments.push(Moment {
            what,
            begun,
            answered: self.tape.len(),
            after: self.world.clone(),
            passing,
            durable,
            at_once,
        });
    }

    /// Asks for a transaction, in which this fails.
    async fn transaction(
        &mut self,
        acts: &[Act],
        failures: &[Failure],
    ) -> Result<Attempt, Problem> {
        let mut planned = Planned {
            world: self.world.clone(),
            actions: Vec::new(),
            durable: [false; DISKS],
            at_once: [false; DISKS],
            covered: [false; DISKS],
            reverted: [false; DISKS],
            jobs: Vec::new(),
        };
        for act in acts {
            self.next += 1;
            planned.add(act.clone(), self.place, format!("s{}", self.next));
        }
        for act in acts {
            if let Act::External(_, file) | Act::Backup(_, _, file) = act
                && file.there == There::Image
            {
                self.add_node(&file.name).await?;
            }
        }
        let fails = acts.contains(&Act::Abort);
        let actions = std::mem::take(&mut planned.actions);
        let cx = self.cx.clone();
        self.tape.plan(failures);
        let command = crate::transaction::run(&cx, actions, Completion::Individual);
        let done = match self.has_guests {
            false => command.await,
            true => {
                let firsts = [0, 1, 2].map(|disk: usize| 1 + self.guests[disk].len() as u8);
                let edges = self.edges().await;
                let (done, guests) = guests::beside(command, edges, &self.tape, firsts).await;
                self.note_guests(guests, &planned.reverted, done.is_ok());
                done
            }
        };
        let has_failed = self.tape.no_fault().is_some();
        match done {
            Ok(_) if fails => return Err("it has not been aborted".to_owned()),
            Ok(_) => {}
            Err(_) if fails => return Ok(Attempt::default()),
            Err(_) if has_failed => {
                self.find_what_stays(&planned.world).await;
                return Ok(Attempt {
                    passing: Some(planned.world),
                    ..Attempt::default()
                });
            }
            Err(error) => return Err(error.desc),
        }
        self.world = planned.world;
        // Something may have failed behind the answer, so that a job does not get to its end.
        match failures {
            [] => self.jobs = planned.jobs,
            _ => self.cancel_jobs().await?,
        }
        Ok(Attempt {
            durable: planned.durable,
            at_once: planned.at_once,
            passing: None,
        })
    }

    /// Guests have written this while disks were reverted, or would have been.
    fn note_guests(&mut self, guests: Vec<Beside>, reverted: &[bool; DISKS], has_happened: bool) {
        for (disk, beside) in guests.into_iter().enumerate() {
            if reverted[disk] {
                self.note_back(disk, has_happened, &beside);
            }
            self.guests[disk].extend(beside.written);
        }
    }

    /// A disk has been reverted beside its guest, or would have been.
    fn note_back(&mut self, disk: usize, has_happened: bool, beside: &Beside) {
        let before = self.guests[disk].len();
        let Beside {
            gone_back, over, ..
        } = beside;
        let (may, must) = match has_happened {
            true => (gone_back.unwrap_or(0), gone_back.unwrap_or(*over)),
            // It has written nothing behind it.
            false => (usize::MAX - before, usize::MAX - before),
        };
        self.backs[disk].push(Back {
            moment: self.moments.len(),
            is_taken_back: !has_happened,
            before,
            may: before + may,
            must: before + must,
        });
    }

    /// A transaction has failed, and overlays have stayed that guests have written to: what they have could not be written to what is
    /// below.
    async fn find_what_stays(&mut self, planned: &World) {
        for (disk, planned) in planned.disks.iter().enumerate() {
            let node = self.edge(disk).await.node().below_filters();
            let top = node.driver().info().filename;
            let chain = &mut self.world.disks[disk].chain;
            let is_top = |image: &Image| self.place.filename(&image.file) == top;
            let Some(height) = planned.chain.iter().position(is_top) else {
                continue;
            };
            let content = chain[chain.len() - 1].content.clone();
            for image in &planned.chain[chain.len()..=height.max(chain.len() - 1)] {
                // What was there is gone.
                self.world.others.remove(&image.file);
                chain.push(Image::new(image.file.clone(), content.clone()));
            }
        }
    }

    /// Adds an image as a node of its name.
    async fn add_node(&self, name: &str) -> Result<(), Problem> {
        let file = json!({"driver": "file", "filename": self.place.filename(name)});
        let node = json!({"driver": "qcow2", "node-name": name, "file": file, "backing": null});
        let added = testing::execute(&self.cx, "blockdev-add", node).await;
        added.map(drop).map_err(|error| error.desc)
    }

    /// Waits for the jobs of the last transaction.
    async fn end_jobs(&mut self) -> Result<(), Problem> {
        for Job {
            id,
            is_endless,
            content,
        } in std::mem::take(&mut self.jobs)
        {
            if is_endless {
                let job = id.clone();
                let cancelled = self.with(move |control| {
                    let key = control.jobs.find(&job)?;
                    control.jobs.cancel(key, Cancel::Force)
                });
                cancelled.await.map_err(text)?;
            }
            for turn in 0.. {
                let job = id.clone();
                if self
                    .with(move |control| control.jobs.find(&job).is_err())
                    .await
                {
                    break;
                }
                if turn > 10_000 {
                    return Err(format!("job {id} does not end"));
                }
                testing::a_moment().await;
            }
            self.world.others.insert(id, Other::Target { content });
        }
        Ok(())
    }

    /// Ends all jobs, whatever becomes of them.
    pub(super) async fn cancel_jobs(&self) -> Result<(), Problem> {
        for _ in 0..10_000 {
            let left = self.with(|control| {
                control.jobs.end_all();
                control.jobs.list().len()
            });
            if left.await == 0 {
                return Ok(());
            }
            testing::a_moment().await;
        }
        Err("a job does not end".to_owned())
    }

    /// The next stamp and name that are new.
    pub(super) fn next(&self) -> u32 {
        self.next + 1
    }

    /// What a disk shows, read through the daemon.
    pub(super) async fn read(&self, disk: usize) -> Result<Content, Problem> {
        let edge = self.edge(disk).await;
        let data = edge.read(0, edge.size()).await.map_err(text)?;
        let mut content = Content::new(edge.size());
        content.write(0, &data.to_bytes());
        Ok(content)
    }

    /// The daemon ends in order.
    pub(super) async fn end(self) -> Result<(), Problem> {
        self.with(|control| control.stop(StopCause::Quit)).await;
        self.daemon.ended().await
    }
}

fn text(error: block::error::Error) -> Problem {
    error.to_string()
}

fn text_error(text: String) -> qapi::rt::QmpError {
    qapi::rt::QmpError::generic(text)
}
