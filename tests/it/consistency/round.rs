//! A daemon with new images, and some transactions under the writers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::harness::{Daemon, Program, Qmp, tool};
use super::draw::{self, Act, Backup, Drawn, Format, OverlayBy, Plan, Sync};
use super::results::{Cut, Image, Images, Kept};
use super::{
    DISK_BYTES, DISKS, Progress, Stopper, WRITERS, advance, answered, sent, write_numbers,
};

/// Transactions of one daemon at most: chains and tables of snapshots do not grow for ever.
const CUTS: u64 = 25;
/// One of so many results is read by qemu-img, too.
const BY_QEMU: u32 = 16;

/// What has been tried.
#[derive(Debug, Default)]
pub(super) struct Figures {
    rounds: u64,
    /// Transactions that have happened.
    pub(super) cuts: u64,
    /// Transactions that were made to fail.
    aborted: u64,
    /// What transactions have kept, by the kind of action.
    results: BTreeMap<String, u64>,
    by_qemu: u64,
    numbers: u64,
    longest_write: Duration,
    longest_transaction: Duration,
    /// How long it took to look at what was kept.
    looked: Duration,
}

/// The topmost image of a disk, and what is under way on it.
struct Disk {
    /// Its number among the images.
    top: usize,
    /// Jobs that copy it.
    jobs: Vec<String>,
    /// Snapshots of its topmost image that may go.
    passing: Vec<String>,
}

struct Round<'r> {
    folder: &'r Path,
    qmp: Qmp,
    random: fastrand::Rng,
    images: Vec<Image>,
    disks: [Disk; DISKS.len()],
    cuts: Vec<Cut>,
    /// Names from here on are new.
    next: u32,
    figures: &'r mut Figures,
}

/// The actions of a transaction, and what there is when it has happened.
struct Asked {
    actions: Vec<Value>,
    kept: Vec<Kept>,
    images: Vec<Image>,
    tops: [usize; DISKS.len()],
    jobs: Vec<(usize, String)>,
    passing: Vec<(usize, String)>,
    /// Nodes that have been added for it.
    nodes: Vec<String>,
    kinds: Vec<String>,
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn disk_name(disk: usize) -> &'static str {
    DISKS[disk].0
}

impl Asked {
    /// The disk as it is now shown by this.
    fn keep(&mut self, disk: usize, image: usize, snapshot: Option<String>, kind: String) {
        self.kinds.push(kind);
        self.kept.push(Kept {
            disk,
            image,
            snapshot,
        });
    }

    fn add_image(&mut self, known: usize, image: Image) -> usize {
        self.images.push(image);
        known + self.images.len() - 1
    }
}

impl Round<'_> {
    fn new_name(&mut self, prefix: &str) -> String {
        self.next += 1;
        format!("{prefix}{}", self.next)
    }

    fn image(&self, number: usize, asked: &Asked) -> (String, Format, Option<usize>) {
        let image = match self.images.get(number) {
            Some(image) => image,
            None => &asked.images[number - self.images.len()],
        };
        (image.name.clone(), image.format, image.backing)
    }

    fn make(&self, name: &str, format: Format, options: &str) {
        let format = format.name();
        let line = format!("qemu-img create -q -f {format} {options} {name} {DISK_BYTES}");
        tool(self.folder, &line);
    }

    /// An image as a node.
    fn add_node(&mut self, name: &str, format: Format, asked: &mut Asked) {
        let file = json!({"driver": "file", "filename": name});
        let mut options = json!({"driver": format.name(), "node-name": name, "file": file});
        if format == Format::Qcow2 {
            options["backing"] = Value::Null;
        }
        self.qmp.ok("blockdev-add", options);
        asked.nodes.push(name.to_owned());
    }

    /// What a transaction is to be asked for.
    fn ask(&mut self, plan: &Plan) -> Asked {
        let mut asked = Asked {
            actions: Vec::new(),
            kept: Vec::new(),
            images: Vec::new(),
            tops: [0, 1, 2].map(|disk: usize| self.disks[disk].top),
            jobs: Vec::new(),
            passing: Vec::new(),
            nodes: Vec::new(),
            kinds: Vec::new(),
        };
        for (number, disk) in self.disks.iter_mut().enumerate() {
            if disk.jobs.is_empty() && !plan.is_aborted && !plan.is_grouped {
                let kind = "x-blockdev-snapshot-delete-internal-sync";
                let delete =
                    |name: &String| json!({"device": disk_name(number), "name": name.clone()});
                let gone = disk.passing.drain(..);
                asked
                    .actions
                    .extend(gone.map(|name| action(kind, delete(&name))));
            }
        }
        for (disk, act) in &plan.acts {
            self.ask_for(*disk, act, &mut asked);
        }
        if plan.is_aborted {
            asked.actions.push(action("abort", json!({})));
        }
        asked
    }

    fn ask_for(&mut self, disk: usize, act: &Act, asked: &mut Asked) {
        let device = disk_name(disk);
        let top = asked.tops[disk];
        let taken = |name: &str| {
            let data = json!({"device": device, "name": name});
            action("blockdev-snapshot-internal-sync", data)
        };
        match act {
            Act::Internal => {
                let name = self.new_name("s");
                asked.actions.push(taken(&name));
                asked.keep(disk, top, Some(name), "internal".to_owned());
            }
            Act::Passing => {
                let name = self.new_name("p");
                asked.actions.push(taken(&name));
                asked.passing.push((disk, name));
            }
            Act::Revert => {
                let name = self.new_name("s");
                let data = json!({"device": device, "name": name});
                asked.actions.push(taken(&name));
                asked
                    .actions
                    .push(action("x-blockdev-snapshot-revert", data));
                asked.keep(disk, top, Some(name), "internal, reverted to".to_owned());
            }
            Act::Overlay(by) => self.ask_for_overlay(disk, *by, asked),
            Act::Backup(backup) => self.ask_for_backup(disk, backup, asked),
        }
    }

    fn ask_for_overlay(&mut self, disk: usize, by: OverlayBy, asked: &mut Asked) {
        let below = asked.tops[disk];
        let (base, base_format, _) = self.image(below, asked);
        let name = self.new_name(&format!("{}-", disk_name(disk)));
        if by != OverlayBy::New {
            let options = format!("-b {base} -F {} -u", base_format.name());
            self.make(&name, Format::Qcow2, &options);
        }
        let mode = match by {
            OverlayBy::Existing => "existing",
            _ => "absolute-paths",
        };
        let action = match by {
            OverlayBy::Node => {
                self.add_node(&name, Format::Qcow2, asked);
                let data = json!({"node": disk_name(disk), "overlay": name});
                action("blockdev-snapshot", data)
            }
            _ => {
                let data = json!({"device": disk_name(disk), "snapshot-file": name, "mode": mode});
                action("blockdev-snapshot-sync", data)
            }
        };
        asked.actions.push(action);
        let overlay = Image {
            name,
            format: Format::Qcow2,
            backing: Some(below),
        };
        asked.tops[disk] = asked.add_image(self.images.len(), overlay);
        asked.keep(disk, below, None, format!("below an overlay, {by:?}"));
    }

    fn ask_for_backup(&mut self, disk: usize, backup: &Backup, asked: &mut Asked) {
        let top = asked.tops[disk];
        let name = self.new_name("backup");
        let Backup {
            is_to_node,
            format,
            sync,
            kept,
            compress,
            speed,
        } = backup;
        let sync_name = format!("{sync:?}").to_lowercase();
        let mut data = json!({"device": disk_name(disk), "target": name, "job-id": name,
            "sync": sync_name, "compress": compress, "speed": speed,
            "x-perf": {"x-point-in-time": kept, "max-workers": self.random.u32(1..8)}});
        let kind = match is_to_node {
            true => {
                self.make(&name, *format, "");
                self.add_node(&name, *format, asked);
                "blockdev-backup"
            }
            false => {
                data["format"] = format.name().into();
                "drive-backup"
            }
        };
        asked.actions.push(action(kind, data));
        let backing = match sync {
            Sync::Full => None,
            Sync::Top => self.image(top, asked).2,
            Sync::None => Some(top),
        };
        let target = Image {
            name: name.clone(),
            format: *format,
            backing,
        };
        let target = asked.add_image(self.images.len(), target);
        let kind = format!("{kind}, {sync:?}, {format:?}, {kept}");
        asked.keep(disk, target, None, kind);
        asked.jobs.push((disk, name));
    }

    /// Takes a transaction while writers go on.
    fn cut(&mut self, plan: &Plan, progress: &[Progress]) {
        let asked = self.ask(plan);
        let mode = match plan.is_grouped {
            true => "grouped",
            false => "individual",
        };
        let properties = json!({"completion-mode": mode});
        let arguments = json!({"actions": asked.actions, "properties": properties});
        let least = answered(progress);
        let begin = Instant::now();
        if plan.is_aborted {
            let (_, problem) = self.qmp.error("transaction", arguments);
            assert_eq!(problem, "Transaction aborted using Abort action");
            self.figures.aborted += 1;
            self.forget(plan, asked);
            return;
        }
        self.qmp.ok("transaction", arguments);
        let took = begin.elapsed();
        self.figures.longest_transaction = self.figures.longest_transaction.max(took);
        for kind in asked.kinds {
            *self.figures.results.entry(kind).or_default() += 1;
        }
        self.images.extend(asked.images);
        for (disk, top) in asked.tops.into_iter().enumerate() {
            if self.disks[disk].top != top {
                self.disks[disk].top = top;
                self.disks[disk].passing.clear();
            }
        }
        for (disk, job) in asked.jobs {
            self.disks[disk].jobs.push(job);
        }
        // Those of a layer that is covered in the same transaction stay.
        let covered = |disk: usize| {
            let of_disk =
                |(other, act): &(usize, Act)| *other == disk && matches!(act, Act::Overlay(_));
            plan.acts.iter().any(of_disk)
        };
        for (disk, name) in asked.passing {
            if !covered(disk) {
                self.disks[disk].passing.push(name);
            }
        }
        // There may be nothing but what nobody looks at.
        if asked.kept.is_empty() {
            return;
        }
        self.figures.cuts += 1;
        self.cuts.push(Cut {
            what: format!("{plan:?}"),
            kept: asked.kept,
            least,
            most: sent(progress),
        });
    }

    /// After a transaction that has failed: what was there for it goes.
    fn forget(&mut self, plan: &Plan, asked: Asked) {
        for node in asked.nodes {
            self.qmp.ok("blockdev-del", json!({"node-name": node}));
        }
        let acts = plan.acts.iter().filter_map(|(_, act)| match act {
            Act::Overlay(by) => Some(*by == OverlayBy::New),
            Act::Backup(backup) => Some(!backup.is_to_node),
            _ => None,
        });
        for (image, was_to_be_made) in asked.images.iter().zip(acts) {
            let is_there = self.folder.join(&image.name).exists();
            assert_eq!(is_there, !was_to_be_made, "{}, {plan:?}", image.name);
        }
    }

    /// Waits for all jobs; each has done its work.
    fn end_jobs(&mut self, wanted: &str) {
        let jobs = self.disks.iter_mut().flat_map(|disk| disk.jobs.drain(..));
        for job in jobs.collect::<Vec<String>>() {
            let is_end = |event: &Value| {
                let name = event["event"].as_str().unwrap_or_default();
                name.starts_with("BLOCK_JOB_C") && event["data"]["device"] == job
            };
            let end = loop {
                if let Some(at) = self.qmp.events.iter().position(is_end) {
                    break self.qmp.events.remove(at);
                }
                let event = self.qmp.receive();
                self.qmp.events.push(event);
            };
            assert_eq!(end["event"], wanted, "{end}");
            assert!(end["data"].get("error").is_none(), "{end}");
        }
        self.qmp.events.clear();
    }

    /// What is known of the disks.
    fn drawn(&self) -> [Drawn; DISKS.len()] {
        [0, 1, 2].map(|disk: usize| {
            let Disk { top, jobs, .. } = &self.disks[disk];
            Drawn {
                format: self.images[*top].format,
                has_backing: self.images[*top].backing.is_some(),
                is_copied: !jobs.is_empty(),
            }
        })
    }

    /// All transactions of the round, of which there are `cuts`. Answers what is no cut.
    fn take_cuts(&mut self, progress: &[Progress], cuts: u64) -> Cut {
        let before = self.figures.cuts;
        while self.figures.cuts < before + cuts - 1 {
            let most = self.random.u64(1..150);
            advance(progress, most);
            let drawn = self.drawn();
            let plan = Plan::random(&mut self.random, drawn);
            self.cut(&plan, progress);
            if self.random.u8(..3) != 0 {
                self.end_jobs("BLOCK_JOB_COMPLETED");
            }
        }
        self.end_jobs("BLOCK_JOB_COMPLETED");
        let apart = self.take_apart(progress);
        let plan = Plan::fleecing(&mut self.random);
        self.cut(&plan, progress);
        advance(progress, 100);
        apart
    }

    /// Puts an overlay on each disk, in transactions of their own: what is below them shows no moment.
    fn take_apart(&mut self, progress: &[Progress]) -> Cut {
        let mut kept = Vec::new();
        for disk in 0..DISKS.len() {
            advance(progress, 10);
            let below = self.disks[disk].top;
            self.cut(&Plan::overlay(disk), progress);
            kept.extend(self.cuts.pop().into_iter().flat_map(|cut| cut.kept));
            assert_ne!(below, self.disks[disk].top);
            self.figures.cuts -= 1;
        }
        Cut {
            what: "transactions of one disk each".to_owned(),
            kept,
            least: vec![0; WRITERS],
            most: vec![u64::MAX; WRITERS],
        }
    }

    /// Ends the last jobs, which do not end by themselves, and the daemon.
    fn end(&mut self) {
        let jobs = self.disks.iter().flat_map(|disk| disk.jobs.clone());
        for job in jobs.collect::<Vec<String>>() {
            self.qmp.ok("block-job-cancel", json!({"device": job}));
        }
        self.end_jobs("BLOCK_JOB_CANCELLED");
        self.qmp.ok("quit", json!({}));
    }
}

/// Starts a daemon on new images.
fn start(folder: &Path, random: &mut fastrand::Rng) -> (Daemon, Vec<Image>) {
    let mut arguments = ["--state-dir", "state", "--nbd-server", "unix:nbd.sock"]
        .map(str::to_owned)
        .to_vec();
    let mut images = Vec::new();
    for (disk, _) in DISKS {
        let options = draw::image(random);
        let (format, options) = match options {
            None => (Format::Raw, String::new()),
            Some(options) => (Format::Qcow2, format!("-o {options}")),
        };
        let text = format.name();
        let line = format!("qemu-img create -q -f {text} {options} {disk} {DISK_BYTES}");
        tool(folder, &line);
        let drive = format!("id={disk},file={disk},format={text},discard=unmap");
        arguments.extend(["--drive".to_owned(), drive]);
        images.push(Image {
            name: disk.to_owned(),
            format,
            backing: None,
        });
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::start_in(Program::Qblockd, folder, &arguments);
    (daemon, images)
}

/// Takes some transactions, at most `left`, and looks at all that they have left.
pub(super) fn run(seed: u64, left: u64, figures: &mut Figures) -> Result<(), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    // Images come and go by thousands: in memory, where there is a place for that.
    let memory = Path::new("/dev/shm");
    let folder = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    let folder = folder.unwrap();
    let (mut daemon, images) = start(folder.path(), &mut random);
    let mut qmp = daemon.qmp();
    // Commands wait until the command line has been followed.
    let exports = qmp.ok("query-block-exports", json!({}));
    assert_eq!(exports.as_array().map(Vec::len), Some(DISKS.len()));
    let disk = |top| Disk {
        top,
        jobs: Vec::new(),
        passing: Vec::new(),
    };
    let mut round = Round {
        folder: folder.path(),
        qmp,
        random,
        images,
        disks: [disk(0), disk(1), disk(2)],
        cuts: Vec::new(),
        next: 0,
        figures,
    };
    let socket = daemon.path("nbd.sock");
    let progress: Vec<Progress> = (0..WRITERS).map(|_| Progress::default()).collect();
    let stop = AtomicBool::new(false);
    let (apart, longest) = thread::scope(|scope| {
        let begin = |(writer, progress)| {
            let (socket, stop) = (&socket, &stop);
            scope.spawn(move || write_numbers(socket, writer, 1, progress, stop).unwrap())
        };
        let writers: Vec<_> = progress.iter().enumerate().map(begin).collect();
        // A failed assertion below must not leave the writers running: the scope waits for them.
        let _stopper = Stopper(&stop);
        let apart = round.take_cuts(&progress, left.min(CUTS));
        stop.store(true, Ordering::SeqCst);
        let longest = writers.into_iter().map(|writer| writer.join().unwrap());
        (apart, longest.max().unwrap_or_default())
    });
    round.end();
    assert!(daemon.exited().success());
    round.figures.longest_write = round.figures.longest_write.max(longest);
    let last = answered(&progress);
    round.figures.numbers += last.iter().sum::<u64>();
    round.figures.rounds += 1;
    // The disks themselves have all that was answered.
    let kept = (0..DISKS.len()).map(|disk| Kept {
        disk,
        image: round.disks[disk].top,
        snapshot: None,
    });
    round.cuts.push(Cut {
        what: "the disks at the end".to_owned(),
        kept: kept.collect(),
        least: last.clone(),
        most: last,
    });
    let begin = Instant::now();
    let images = Images::read(round.folder, &round.images)?;
    for (number, cut) in round.cuts.iter().enumerate() {
        let by_qemu = || {
            let chosen = round.random.u32(..BY_QEMU) == 0;
            round.figures.by_qemu += u64::from(chosen);
            chosen
        };
        let checked = images.check(cut, by_qemu);
        checked.map_err(|problem| format!("transaction {number}: {problem}\n{}", cut.what))?;
    }
    // And this test sees what is no cut.
    if images.check(&apart, || false).is_ok() {
        return Err("layers of different times look like one".to_owned());
    }
    for Image { name, format, .. } in &round.images {
        if *format == Format::Qcow2 && round.random.u32(..BY_QEMU) == 0 {
            tool(round.folder, &format!("qemu-img check -q -f qcow2 {name}"));
        }
    }
    round.figures.looked += begin.elapsed();
    Ok(())
}
