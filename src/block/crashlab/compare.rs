//! The same snapshot operations by QEMU and by this driver, on the same image, with the same enumerator and the same oracle.
//!
//! QEMU's writes come from its own blklogwrites driver. A state is lost when the image cannot be read or does not hold what
//! had been acknowledged; it is poisoned when all is there, but guest writes behind the restart change a snapshot.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::audit::Audit;
use super::content::{Content, stamp};
use super::oracle::{Known, Recording, observe_state};
use super::qemu::daemon::Daemon;
use super::qemu::{Qemu, qemu_io, run, write_log};
use super::run::{Kind, Moment, Problem, Runner, Snapshot, World};
use super::script::{Case, DataPlace, End, Op, Step, Storage};
use super::states::{Effort, State, epochs, whole_sectors};
use crate::formats::qcow2::create::Compat;
use crate::protocols::memory::Memory;

/// An operation that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A snapshot is taken of a disk that has one.
    Create,
    /// The one snapshot is deleted.
    Delete,
    /// The disk goes back to the snapshot.
    Revert,
}

/// Whose writes, or who opens the image behind the crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// QEMU's tools.
    Qemu,
    /// This driver.
    Qblockd,
}

/// A line of the table.
#[derive(Debug, Clone)]
pub struct Row {
    /// The operation.
    pub operation: Operation,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Who did it.
    pub by: Program,
    /// Who opened the states.
    pub opened_by: Program,
    /// Records of the log: writes, discards and flushes.
    pub records: usize,
    /// Different states.
    pub states: u64,
    /// Unreadable, or not what was acknowledged.
    pub lost: u64,
    /// A snapshot that a later guest write has changed.
    pub poisoned: u64,
    /// Of the sound ones, those of which `qemu-img check` says that they have errors.
    pub complaints: u64,
    /// The first unsafe state, in words.
    pub example: Option<Problem>,
}

/// The operations, in the order of the table.
pub const OPERATIONS: [Operation; 3] = [Operation::Create, Operation::Delete, Operation::Revert];

/// Clusters that are small enough to split tables between sectors, and QEMU's default.
pub const CLUSTER_SIZES: [u64; 3] = [512, 4096, 65536];

/// A comparison under way.
pub struct Comparison {
    qemu: Qemu,
    effort: Effort,
    seed: u64,
}

/// The image that all begin with.
struct Base {
    case: Case,
    image: PathBuf,
    world: World,
    next_stamp: u32,
}

/// What has become of a state.
enum Fate {
    Sound,
    Lost(Problem),
    Poisoned(Problem),
}

impl Comparison {
    /// `None` without QEMU's tools.
    pub fn new(effort: Effort, seed: u64) -> Option<Comparison> {
        run("qemu-storage-daemon", &["--version"], &[0]).ok()?;
        Some(Comparison {
            qemu: Qemu::find()?,
            effort,
            seed,
        })
    }

    /// The rows of one operation: QEMU's writes opened by QEMU, and ours opened by us and by QEMU.
    pub async fn rows(
        &mut self,
        operation: Operation,
        cluster_size: u64,
    ) -> Result<Vec<Row>, Problem> {
        let base = self.base(cluster_size)?;
        let theirs = self.by_qemu(operation, &base)?;
        let ours = self.by_qblockd(operation, &base).await?;
        let mut rows = Vec::new();
        for (by, recording, opened_by) in [
            (Program::Qemu, &theirs, Program::Qemu),
            (Program::Qblockd, &ours, Program::Qemu),
            (Program::Qblockd, &ours, Program::Qblockd),
        ] {
            let mut row = Row {
                operation,
                cluster_size,
                by,
                opened_by,
                records: recording.log.len(),
                states: 0,
                lost: 0,
                poisoned: 0,
                complaints: 0,
                example: None,
            };
            self.fill(&mut row, recording).await?;
            rows.push(row);
        }
        Ok(rows)
    }

    /// An image of QEMU's with two L2 tables or more, data in both, a snapshot, and different data in half of it.
    fn base(&mut self, cluster_size: u64) -> Result<Base, Problem> {
        let l2_span = cluster_size / 8 * cluster_size;
        // At the smallest clusters the L1 table has two sectors.
        let spans = if cluster_size == 512 { 128 } else { 3 };
        let window = 8 * cluster_size;
        let middle = (spans - spans / 3) * l2_span;
        let case = Case {
            cluster_bits: cluster_size.ilog2(),
            refcount_bits: 16,
            compat: Compat::V1_1,
            size: spans * l2_span,
            windows: vec![
                0..window,
                middle - window / 2..middle + window / 2,
                spans * l2_span - window..spans * l2_span,
            ],
            long_writes: false,
            file_size: 0,
            small_caches: false,
            discard: true,
            extended_l2: false,
            bitmaps: false,
            old_snapshots: false,
            data: DataPlace::Own,
            storage: Storage::Sectors,
            base: None,
        };
        let image = self.qemu.path("base.qcow2");
        let file = image.to_string_lossy().into_owned();
        let options = format!("cluster_size={cluster_size}");
        let size = case.size.to_string();
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", &options, &file, &size],
            &[0],
        )?;
        let mut base = Base {
            world: World {
                snapshots: Vec::new(),
                active: Arc::new(Content::new(case.size)),
            },
            case,
            image,
            next_stamp: 1,
        };
        let windows = base.case.windows.clone();
        for window in &windows {
            self.write_offline(&mut base, window.start, window.end - window.start)?;
        }
        run("qemu-img", &["snapshot", "-c", "first", &file], &[0])?;
        base.world.snapshots.push(Snapshot {
            id: "1".to_owned(),
            name: "first".to_owned(),
            content: base.world.active.clone(),
        });
        for window in &windows {
            let half = (window.end - window.start) / 2;
            self.write_offline(&mut base, window.start, half)?;
        }
        Ok(base)
    }

    fn write_offline(&self, base: &mut Base, at: u64, len: u64) -> Result<(), Problem> {
        let file = base.image.to_string_lossy().into_owned();
        let command = self.write_command(at, len, base.next_stamp)?;
        qemu_io(&file, &[command])?;
        write_to(&mut base.world, at, len, base.next_stamp);
        base.next_stamp += 1;
        Ok(())
    }

    /// A command of qemu-io's that writes stamped bytes.
    fn write_command(&self, at: u64, len: u64, number: u32) -> Result<String, Problem> {
        let data = self.qemu.path(&format!("data-{number}"));
        std::fs::write(&data, stamp(at, len, number)).map_err(|error| error.to_string())?;
        Ok(format!("write -s {} {at} {len}", data.display()))
    }

    /// QEMU does it, with guest writes before and after.
    fn by_qemu(&self, operation: Operation, base: &Base) -> Result<Recording, Problem> {
        let (image, log) = (self.qemu.path("image.qcow2"), self.qemu.path("image.log"));
        std::fs::copy(&base.image, &image).map_err(|error| error.to_string())?;
        std::fs::write(&log, []).map_err(|error| error.to_string())?;
        let mut world = base.world.clone();
        let mut moments = vec![Moment::start(&world)];
        let mut next_stamp = base.next_stamp;
        if operation == Operation::Revert {
            let file = format!(
                "driver=qcow2,file.driver=blklogwrites,file.log-super-update-interval=1,\
                 file.file.driver=file,file.file.filename={},\
                 file.log.driver=file,file.log.filename={}",
                image.display(),
                log.display()
            );
            run(
                "qemu-img",
                &["snapshot", "--image-opts", "-a", "first", &file],
                &[0],
            )?;
            world.active = world.snapshots[0].content.clone();
            moments.push(moment("revert", Kind::Everything, (0, usize::MAX), &world));
        } else {
            let dir = self.qemu.path("");
            let mut daemon = Daemon::start(&dir, &image, &log)?;
            let mut write = |daemon: &Daemon, world: &mut World, moments: &mut Vec<Moment>| {
                let (at, len) = guest_write(&base.case, next_stamp);
                self.write_command(at, len, next_stamp)?;
                let begun = daemon.logged()?;
                daemon.write(at, len, &self.qemu.path(&format!("data-{next_stamp}")))?;
                write_to(world, at, len, next_stamp);
                next_stamp += 1;
                let span = (begun, daemon.logged()?);
                moments.push(moment("write", Kind::Sectors, span, world));
                Ok::<(), Problem>(())
            };
            write(&daemon, &mut world, &mut moments)?;
            let begun = daemon.logged()?;
            let command = match operation {
                Operation::Create => "blockdev-snapshot-internal-sync",
                _ => "blockdev-snapshot-delete-internal-sync",
            };
            let name = change(operation, &mut world);
            let arguments = format!("{{\"device\": \"disk\", \"name\": \"{name}\"}}");
            daemon.execute(command, &arguments)?;
            let span = (begun, daemon.logged()?);
            moments.push(moment(command, Kind::Structure, span, &world));
            write(&daemon, &mut world, &mut moments)?;
        }
        let bytes = std::fs::read(&base.image).map_err(|error| error.to_string())?;
        let log = std::fs::read(&log).map_err(|error| error.to_string())?;
        Ok(Recording {
            case: base.case.clone(),
            base: Memory::with_content(&bytes),
            log: write_log::records(&log)?,
            moments,
            next_stamp,
        })
    }

    /// This driver does the same.
    async fn by_qblockd(&self, operation: Operation, base: &Base) -> Result<Recording, Problem> {
        let bytes = std::fs::read(&base.image).map_err(|error| error.to_string())?;
        let disk = Memory::with_content(&bytes);
        let mut runner =
            Runner::resume(&disk, &base.case, base.world.clone(), base.next_stamp).await?;
        let start = runner.start_log();
        let write = |stamp: u32| {
            let (at, len) = guest_write(&base.case, stamp);
            let fua = false;
            [Op::Write { at, len, fua }, Op::Flush]
        };
        let mut ops = Vec::new();
        ops.extend(match operation {
            Operation::Create => write(base.next_stamp).into_iter().chain([Op::Create]),
            Operation::Delete => write(base.next_stamp).into_iter().chain([Op::Delete(0)]),
            Operation::Revert => {
                let revert = Op::Change(vec![Step::Revert(0)], End::Finish);
                [Op::Flush, Op::Flush].into_iter().chain([revert])
            }
        });
        ops.extend(write(base.next_stamp + 1));
        // Time for what happens behind the answer.
        ops.extend([Op::Idle(60_000), Op::Reopen]);
        for op in &ops {
            runner.step(op).await?;
        }
        Ok(Recording {
            case: base.case.clone(),
            base: start,
            log: runner.disk.log(),
            next_stamp: runner.next_stamp(),
            moments: std::mem::take(&mut runner.moments),
        })
    }

    async fn fill(&mut self, row: &mut Row, recording: &Recording) -> Result<(), Problem> {
        let log = whole_sectors(&recording.base, &recording.log).map_err(|e| e.to_string())?;
        // The same for every row, so that both programs open the same states.
        let mut random = fastrand::Rng::with_seed(self.seed);
        let mut known = Known::default();
        let mut seen = HashSet::new();
        for epoch in epochs(&recording.base, &log).map_err(|e| e.to_string())? {
            for choice in epoch.choices(self.effort, &mut random) {
                let state = epoch.state(&choice).map_err(|e| e.to_string())?;
                if !seen.insert(state.disk.digest()) {
                    continue;
                }
                row.states += 1;
                let fate = self.fate(row, recording, &mut known, &state).await?;
                let problem = match fate {
                    Fate::Sound => continue,
                    Fate::Lost(problem) => {
                        row.lost += 1;
                        problem
                    }
                    Fate::Poisoned(problem) => {
                        row.poisoned += 1;
                        problem
                    }
                };
                let text = format!("{}: {problem}", state.what);
                row.example.get_or_insert(text);
            }
        }
        Ok(())
    }

    /// Opens a state, overwrites all that snapshots share with the disk, and looks at everything before and after.
    async fn fate(
        &mut self,
        row: &mut Row,
        recording: &Recording,
        known: &mut Known,
        state: &State,
    ) -> Result<Fate, Problem> {
        let bytes = state.disk.content();
        let world = match observe_state(&bytes, recording, known, state) {
            Ok(world) => world,
            Err(problem) => return Ok(Fate::Lost(problem)),
        };
        let after = match row.opened_by {
            Program::Qemu => {
                let file = self.qemu.path("state.qcow2");
                std::fs::write(&file, &bytes).map_err(|error| error.to_string())?;
                self.go_on_with_qemu(row, recording, world)
            }
            Program::Qblockd => go_on(recording, state, world).await,
        };
        let (bytes, wanted) = match after {
            Ok(after) => after,
            Err(problem) => return Ok(Fate::Lost(problem)),
        };
        let audit = Audit::new(&bytes)?;
        let is = match World::of(&audit) {
            Ok(is) => is,
            Err(problem) => return Ok(Fate::Lost(problem)),
        };
        Ok(match wanted.difference(&is) {
            Some(problem) => Fate::Poisoned(problem),
            None => Fate::Sound,
        })
    }

    fn go_on_with_qemu(
        &mut self,
        row: &mut Row,
        recording: &Recording,
        mut world: World,
    ) -> Result<(Vec<u8>, World), Problem> {
        let path = self.qemu.path("state.qcow2");
        let file = path.to_string_lossy().into_owned();
        let check = ["check", "-q", "-f", "qcow2", &file];
        let checked = run("qemu-img", &check, &[0, 2, 3])?;
        row.complaints += u64::from(checked.status.code() == Some(2));
        let mut commands = Vec::new();
        for (number, window) in (recording.next_stamp..).zip(&recording.case.windows) {
            let len = window.end - window.start;
            commands.push(self.write_command(window.start, len, number)?);
            write_to(&mut world, window.start, len, number);
        }
        qemu_io(&file, &commands)?;
        let bytes = std::fs::read(&path).map_err(|error| error.to_string())?;
        Ok((bytes, world))
    }
}

/// The driver opens a state and a guest overwrites all windows.
async fn go_on(
    recording: &Recording,
    state: &State,
    world: World,
) -> Result<(Vec<u8>, World), Problem> {
    let disk = state.disk.fork();
    let mut runner = Runner::resume(&disk, &recording.case, world, recording.next_stamp).await?;
    for window in &recording.case.windows {
        let write = Op::Write {
            at: window.start,
            len: window.end - window.start,
            fua: false,
        };
        runner.step(&write).await?;
    }
    runner.close().await?;
    Ok((disk.content(), runner.world))
}

fn moment(op: &str, kind: Kind, (begun, answered): (usize, usize), world: &World) -> Moment {
    Moment {
        op: op.to_owned(),
        begun,
        answered,
        durable: true,
        kind,
        after: world.clone(),
        passing: None,
        through: Vec::new(),
        forced: Vec::new(),
    }
}

/// A guest's write beside the operation: half of a window.
fn guest_write(case: &Case, number: u32) -> (u64, u64) {
    let window = &case.windows[number as usize % case.windows.len()];
    let quarter = (window.end - window.start) / 4;
    (window.start + quarter, 2 * quarter)
}

fn write_to(world: &mut World, at: u64, len: u64, number: u32) {
    Arc::make_mut(&mut world.active).write(at, &stamp(at, len, number));
}

/// What an operation does to the world; answers the snapshot's name.
fn change(operation: Operation, world: &mut World) -> String {
    match operation {
        Operation::Create => {
            world.snapshots.push(Snapshot {
                id: "2".to_owned(),
                name: "second".to_owned(),
                content: world.active.clone(),
            });
            "second".to_owned()
        }
        _ => world.snapshots.remove(0).name,
    }
}
