//! Disks that live through everything at once: guests write, and commands, transactions, jobs' verbs, ends and kills come in any order.
//!
//! A model says what each disk, each of its snapshots, each layer below and each finished backup has to hold. One thread does it all, so
//! that a seed gives the same commands again; what runs meanwhile are the jobs, in whose way guests write.
//!
//! `QBLOCKD_SOAK` is the number of steps (120 if absent), `QBLOCKD_CRASH_SEED` the seed.

mod deed;

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::guest::{Guest, Request};
use super::harness::{self, Daemon, Program, Qmp, need, setting, tool};
use deed::{Deed, Disk, OnDisk, World};

/// Bytes of a disk at first, what it grows by, and up to where.
const SIZE: usize = 4 << 20;
const GROWTH: usize = 192 << 10;
const LARGEST: usize = SIZE + (2 << 20);
/// Jobs before the next ones wait for all to end.
const JOBS: usize = 10;

const IMAGES: [&str; 7] = [
    "",
    "-o extended_l2=on",
    "-o cluster_size=4k",
    "-o cluster_size=512,lazy_refcounts=on",
    "-o refcount_bits=8",
    "-o compat=0.10",
    "-o cluster_size=2M",
];

struct Soak {
    rng: Rng,
    folder: TempDir,
    daemon: Daemon,
    qmp: Qmp,
    guests: Vec<Guest>,
    world: World,
    number: u64,
    /// Killed once: images may have clusters that nothing uses.
    was_killed: bool,
    /// How often what was done.
    done: BTreeMap<&'static str, u64>,
}

fn start(folder: &TempDir, world: &World) -> (Daemon, Qmp, Vec<Guest>) {
    let drive = |disk: &Disk| {
        format!(
            "id={},file={},format=qcow2,discard=unmap",
            disk.name, disk.top
        )
    };
    let drives: Vec<String> = world.disks.iter().map(drive).collect();
    let mut arguments = vec!["--state-dir", "state", "--nbd-server", "unix:nbd.sock"];
    for drive in &drives {
        arguments.extend(["--drive", drive]);
    }
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let qmp = daemon.qmp();
    let guest = |disk: &Disk| Guest::connect(&folder.path().join("nbd.sock"), &disk.name).unwrap();
    let guests = world.disks.iter().map(guest).collect();
    (daemon, qmp, guests)
}

impl Soak {
    fn new(seed: u64) -> Soak {
        let mut rng = Rng::with_seed(seed);
        let folder = tempfile::tempdir().unwrap();
        let mut world = World::default();
        for number in 0..3 {
            let (name, top) = (format!("disk{number}"), format!("disk{number}.qcow2"));
            let options = rng.choice(IMAGES).unwrap();
            let line = format!("qemu-img create -q -f qcow2 {options} {top} {SIZE}");
            tool(folder.path(), &line);
            world.disks.push(Disk {
                name,
                top,
                content: vec![0; SIZE],
                snapshots: BTreeMap::new(),
                below: Vec::new(),
            });
        }
        let (daemon, qmp, guests) = start(&folder, &world);
        Soak {
            rng,
            folder,
            daemon,
            qmp,
            guests,
            world,
            number: 0,
            was_killed: false,
            done: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    fn any_disk(&mut self) -> usize {
        self.rng.usize(..self.world.disks.len())
    }

    fn step(&mut self) {
        for _ in 0..self.rng.usize(..12) {
            self.write();
        }
        match self.rng.u8(..100) {
            0..45 => self.command(),
            45..65 => self.verb(),
            65..72 => self.verify_any(),
            72..80 => self.view(),
            80..86 => self.resize(),
            86..91 => self.reopen(),
            91..94 => self.quit(),
            94..98 => self.kill(),
            _ => std::thread::sleep(Duration::from_millis(self.rng.u64(..30))),
        }
        self.collect();
        if self.world.copies.len() > JOBS {
            self.end_jobs();
        }
    }

    // Guests.

    fn write(&mut self) {
        let number = self.any_disk();
        let disk = &mut self.world.disks[number];
        let offset = self.rng.usize(..SIZE / 512) * 512;
        let most = [512, 4096, 65536, 300 << 10][self.rng.usize(..4)];
        let end = (offset + self.rng.usize(1..=most / 512) * 512).min(SIZE);
        let part = &mut disk.content[offset..end];
        let request = match self.rng.u8(..10) {
            0 => Request::Flush,
            1 | 2 => {
                part.fill(0);
                Request::Zero {
                    offset: offset as u64,
                    length: part.len() as u32,
                }
            }
            _ => {
                // A part of it may be zeroes.
                let noise = self.rng.usize(..=part.len());
                self.rng.fill(&mut part[..noise]);
                part[noise..].fill(0);
                Request::Write {
                    offset: offset as u64,
                    data: part.to_vec(),
                }
            }
        };
        assert_eq!(self.guests[number].run(&request).unwrap(), 0, "{request:?}");
    }

    fn verify(&mut self, number: usize) {
        let disk = &self.world.disks[number];
        let mut guest = Guest::connect(&self.daemon.path("nbd.sock"), &disk.name).unwrap();
        same(&guest.content().unwrap(), &disk.content, &disk.name);
        self.count("looked at a disk");
    }

    fn verify_any(&mut self) {
        let number = self.any_disk();
        self.verify(number);
    }

    // Commands.

    fn draw(&mut self) -> Vec<OnDisk> {
        let count = [1, 1, 1, 2, 3, 4, 6][self.rng.usize(..7)];
        let mut deeds = Vec::new();
        for _ in 0..count {
            let number = self.any_disk();
            self.number += 1;
            let deed = Deed::draw(&mut self.rng, &self.world.disks[number], self.number);
            deeds.push((number, deed));
        }
        deeds
    }

    fn actions(&self, deeds: &[OnDisk]) -> Vec<Value> {
        let action = |(number, deed): &OnDisk| deed.action(&self.world.disks[*number].name);
        deeds.iter().map(action).collect()
    }

    fn command(&mut self) {
        let deeds = self.draw();
        let mut is_done = true;
        let reply = match deeds.as_slice() {
            [(number, deed)] if self.rng.bool() => {
                let (name, arguments) = deed.command(&self.world.disks[*number].name);
                self.qmp.execute(name, arguments)
            }
            _ => {
                let mut actions = self.actions(&deeds);
                let mut arguments = json!({});
                match self.rng.u8(..10) {
                    0 => {
                        let at = self.rng.usize(..=actions.len());
                        actions.insert(at, json!({"type": "abort", "data": {}}));
                    }
                    1 => {
                        is_done = false;
                        arguments["x-dry-run"] = json!(true);
                    }
                    2 => arguments["properties"] = json!({"completion-mode": "grouped"}),
                    _ => {}
                }
                arguments["actions"] = json!(actions);
                self.qmp.execute("transaction", arguments)
            }
        };
        match (reply.get("return"), is_done) {
            (None, _) => self.count("refused"),
            (Some(_), false) => self.count("dry run"),
            (Some(_), true) => {
                self.world = self.world.behind(&deeds).expect("it was done");
                self.count("commands and transactions");
            }
        }
    }

    fn verb(&mut self) {
        let jobs = self.qmp.ok("query-jobs", json!({}));
        for job in jobs.as_array().unwrap() {
            let id = &job["id"];
            let (verb, arguments) = match self.rng.u8(..8) {
                0 => ("job-pause", json!({"id": id})),
                1 => ("job-resume", json!({"id": id})),
                2 => ("job-cancel", json!({"id": id})),
                3 => ("block-job-cancel", json!({"device": id, "force": true})),
                4 => ("job-complete", json!({"id": id})),
                5 => ("job-finalize", json!({"id": id})),
                6 => (
                    "block-job-set-speed",
                    json!({"device": id, "speed": self.rng.u64(..64 << 20)}),
                ),
                _ => continue,
            };
            // Many are refused in the state that the job has by now.
            self.qmp.execute(verb, arguments);
        }
        self.count("verbs");
    }

    fn view(&mut self) {
        let number = self.any_disk();
        let disk = &self.world.disks[number];
        let kept: Vec<(&String, &Vec<u8>)> = disk.snapshots.iter().collect();
        let Some((name, content)) = self.rng.choice(kept) else {
            return;
        };
        let node =
            json!({"driver": "qcow2", "node-name": "view", "x-snapshot": name, "file": disk.name});
        self.qmp.ok("blockdev-add", node);
        let export = json!({"type": "nbd", "id": "view", "node-name": "view"});
        self.qmp.ok("block-export-add", export);
        let mut guest = Guest::connect(&self.daemon.path("nbd.sock"), "view").unwrap();
        same(&guest.content().unwrap(), content, name);
        let gone = json!({"id": "view", "mode": "hard"});
        self.qmp.ok("block-export-del", gone);
        self.qmp.event("BLOCK_EXPORT_DELETED");
        self.qmp.ok("blockdev-del", json!({"node-name": "view"}));
        self.count("looked at a snapshot");
    }

    fn resize(&mut self) {
        let number = self.any_disk();
        let disk = &mut self.world.disks[number];
        let size = disk.content.len() + GROWTH;
        if size > LARGEST {
            return;
        }
        let arguments = json!({"device": disk.name, "size": size});
        // A disk that is copied keeps its size.
        if self
            .qmp
            .execute("block_resize", arguments)
            .get("return")
            .is_some()
        {
            disk.content.resize(size, 0);
            self.count("resized");
        }
    }

    fn reopen(&mut self) {
        let number = self.any_disk();
        let disk = &self.world.disks[number];
        if !disk.below.is_empty() {
            return;
        }
        let nodes = self
            .qmp
            .ok("query-named-block-nodes", json!({"flat": true}));
        let find = |driver: &str| {
            let is_it = |node: &&Value| {
                let file = node["file"].as_str().unwrap_or_default();
                node["drv"] == driver && file.ends_with(&disk.top)
            };
            let node = nodes.as_array().unwrap().iter().find(is_it);
            node.map(|node| node["node-name"].clone())
        };
        let options = json!({
            "driver": "qcow2", "node-name": find("qcow2"), "file": find("file"),
            "discard": self.rng.choice(["unmap", "ignore"]), "detect-zeroes": self.rng.choice(["on", "off"]),
            "l2-cache-size": self.rng.choice([65536, 1 << 20])});
        self.qmp
            .execute("blockdev-reopen", json!({"options": [options]}));
        self.count("reopened");
    }

    // Jobs.

    /// Looks at what jobs that have ended have made.
    fn collect(&mut self) {
        // With its reply, all events before it have come.
        let jobs = self.qmp.ok("query-jobs", json!({}));
        for job in jobs.as_array().unwrap() {
            if job["status"] == "concluded" {
                self.qmp.ok("job-dismiss", json!({"id": job["id"]}));
            }
        }
        for event in std::mem::take(&mut self.qmp.events) {
            let data = &event["data"];
            let (is_whole, id) = match event["event"].as_str().unwrap() {
                "BLOCK_JOB_COMPLETED" => (data.get("error").is_none(), &data["device"]),
                "BLOCK_JOB_CANCELLED" => (false, &data["device"]),
                "BLOCK_JOB_ERROR" | "BLOCK_IO_ERROR" | "STOP" => panic!("{event}"),
                _ => continue,
            };
            let copy = self.world.copies.remove(id.as_str().unwrap()).unwrap();
            if is_whole {
                let what = format!("{id}'s target");
                same(
                    &self.content(&copy.target, copy.format),
                    &copy.content,
                    &what,
                );
                self.count("backups");
            } else {
                self.count("backups that did not end well");
            }
            std::fs::remove_file(self.daemon.path(&copy.target)).unwrap();
        }
    }

    fn end_jobs(&mut self) {
        while !self.world.copies.is_empty() {
            let jobs = self.qmp.ok("query-jobs", json!({}));
            for job in jobs.as_array().unwrap() {
                let id = &job["id"];
                self.qmp
                    .execute("block-job-set-speed", json!({"device": id, "speed": 0}));
                self.qmp.execute("job-resume", json!({"id": id}));
                self.qmp.execute("job-finalize", json!({"id": id}));
            }
            self.collect();
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    // Images, as another program sees them.

    fn content(&self, file: &str, format: &str) -> Vec<u8> {
        let line = format!("qemu-img convert -U -f {format} -O raw {file} content.raw");
        tool(self.folder.path(), &line);
        std::fs::read(self.folder.path().join("content.raw")).unwrap()
    }

    fn snapshots_of(&self, file: &str) -> Vec<String> {
        let text = tool(
            self.folder.path(),
            &format!("qemu-img snapshot -U -l {file}"),
        );
        let names = text.lines().skip(2);
        let mut names: Vec<String> = names
            .filter_map(|line| line.split_whitespace().nth(1))
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }

    /// What the images hold while no daemon has them open.
    fn verify_images(&mut self) {
        for disk in &self.world.disks {
            // 3: only leaks.
            let allowed = if self.was_killed {
                "[ $? = 3 ]"
            } else {
                "false"
            };
            let line = format!("qemu-img check -q {} || {allowed}", disk.top);
            tool(self.folder.path(), &line);
            same(&self.content(&disk.top, "qcow2"), &disk.content, &disk.top);
            let names: Vec<&String> = disk.snapshots.keys().collect();
            assert_eq!(
                self.snapshots_of(&disk.top).iter().collect::<Vec<_>>(),
                names
            );
            if let Some((file, content)) = self.rng.choice(&disk.below) {
                same(&self.content(file, "qcow2"), content, file);
            }
        }
    }

    // Ends.

    fn quit(&mut self) {
        self.guests.clear();
        self.qmp.ok("quit", json!({}));
        assert!(self.daemon.exited().success());
        self.verify_images();
        self.restart();
        self.count("ended");
    }

    fn kill(&mut self) {
        for guest in &mut self.guests {
            assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
        }
        let deeds = match self.rng.u8(..4) {
            0 => Vec::new(),
            _ => self.draw(),
        };
        if !deeds.is_empty() {
            let arguments = json!({"actions": self.actions(&deeds)});
            let message = json!({"execute": "transaction", "arguments": arguments});
            self.qmp.send(&message.to_string());
            let most = [1, 10, 60, 300][self.rng.usize(..4)] * 1000;
            std::thread::sleep(Duration::from_micros(self.rng.u64(..most)));
        }
        self.guests.clear();
        self.daemon.kill();
        self.was_killed = true;
        // Recovery comes before anything is opened.
        let mut daemon = Daemon::start_in(
            Program::Qblockd,
            self.folder.path(),
            &["--state-dir", "state"],
        );
        daemon.qmp();
        assert!(daemon.terminated().success());
        match self.world.behind(&deeds) {
            Some(behind) if self.has_become(&behind, &deeds) => {
                self.world = behind;
                self.count("killed, it has happened");
            }
            _ => self.count("killed, nothing has happened"),
        }
        self.restart();
    }

    /// Whether a transaction that was cut off has happened. All of it says the same; backups leave nothing behind that says it.
    fn has_become(&self, behind: &World, deeds: &[OnDisk]) -> bool {
        let is = |world: &World| {
            world.disks.iter().all(|disk| {
                let mut files = disk.below.iter().map(|(file, _)| file).chain([&disk.top]);
                files.all(|file| self.folder.path().join(file).exists())
                    && self.snapshots_of(&disk.top)
                        == disk.snapshots.keys().cloned().collect::<Vec<_>>()
                    && self.content(&disk.top, "qcow2") == disk.content
            })
        };
        let overlays = |deeds: &[OnDisk]| {
            let there = deeds.iter().filter_map(|(_, deed)| match deed {
                Deed::Overlay(file) => Some(self.folder.path().join(file).exists()),
                _ => None,
            });
            there.collect::<Vec<bool>>()
        };
        let happened = is(behind) && overlays(deeds).iter().all(|there| *there);
        let not = is(&self.world) && !overlays(deeds).contains(&true);
        assert!(happened || not, "half a transaction: {deeds:?}");
        happened && !not
    }

    /// A daemon on what there is now; there are no jobs any more.
    fn restart(&mut self) {
        for copy in std::mem::take(&mut self.world.copies).into_values() {
            let _ = std::fs::remove_file(self.daemon.path(&copy.target));
        }
        (self.daemon, self.qmp, self.guests) = start(&self.folder, &self.world);
        for number in 0..self.world.disks.len() {
            self.verify(number);
        }
    }
}

/// Says where they differ.
fn same(is: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(is.len(), wanted.len(), "the size of {what}");
    if is == wanted {
        return;
    }
    if let Some(at) = is.iter().zip(wanted).position(|(is, wanted)| is != wanted) {
        panic!("{what} differs at {at:#x}");
    }
}

#[test]
fn disks_live_through_everything() {
    let Some(()) = need(&["qemu-img"]) else {
        return;
    };
    let seed = harness::seed();
    let mut soak = Soak::new(seed);
    for _ in 0..setting("QBLOCKD_SOAK", 120) {
        soak.step();
    }
    soak.end_jobs();
    soak.quit();
    println!("{:?}", soak.done);
    assert!(soak.daemon.terminated().success());
}
