//! Random runs against a model: writes, zeroes, discards, flushes, snapshots, growth, reopening, and batches of
//! overlapping requests whose I/O completes in random order.
//!
//! Each geometry runs from its own seed, which a failure prints. Every word that is written tells its guest offset and
//! its step, so that stale or foreign data cannot pass for right data. At intervals, and at the end, the image must pass
//! our checker, and the active layer and every snapshot must read as in the model; at the end also for QEMU.

use std::sync::Arc;

use super::super::check::{check, read_header};
use super::super::create::{BackingFile, Compat, CreateOptions, create};
use super::super::header::Incompatible;
use super::super::testing::{Scratch, assert_qemu_clean, block_on, qemu_img};
use super::super::{CompressionType, OpenOptions, Qcow2};
use crate::driver::{
    Driver, NewSnapshot, Preallocation, Requests, SnapshotSelector, Snapshots, WriteFlags,
    ZeroFlags,
};
use crate::error::ErrorKind;
use crate::protocols::memory::{Change, Memory, OpKind};

mod batch;
pub(super) mod layers;

use layers::{Layer, pattern};

/// What is run.
struct Case {
    cluster_bits: u32,
    refcount_bits: u32,
    compat: Compat,
    backed: bool,
    preallocated: bool,
    extended: bool,
    compression: CompressionType,
    steps: usize,
}

impl Case {
    const fn new(cluster_bits: u32, refcount_bits: u32, steps: usize) -> Self {
        Case {
            cluster_bits,
            refcount_bits,
            compat: Compat::V1_1,
            backed: false,
            preallocated: false,
            extended: false,
            compression: CompressionType::Zlib,
            steps,
        }
    }

    const fn v2(self) -> Self {
        Case {
            compat: Compat::V0_10,
            ..self
        }
    }

    const fn backed(self) -> Self {
        Case {
            backed: true,
            ..self
        }
    }

    const fn extended(self) -> Self {
        Case {
            extended: true,
            ..self
        }
    }

    const fn zstd(self) -> Self {
        Case {
            compression: CompressionType::Zstd,
            ..self
        }
    }

    const fn preallocated(self) -> Self {
        Case {
            preallocated: true,
            ..self
        }
    }

    /// Enough for several L2 tables, or several clusters where those are large.
    fn size(&self) -> u64 {
        match self.cluster_bits {
            ..=10 => 384 << 10,
            11..=14 => 3 << 20,
            15..=17 => 6 << 20,
            _ => 20 << 20,
        }
    }
}

/// A run under way.
struct Run {
    case: Case,
    seed: u64,
    random: fastrand::Rng,
    scratch: Scratch,
    disk: Arc<Memory>,
    base: Option<Arc<Memory>>,
    driver: Arc<Qcow2>,
    active: Layer,
    /// In the order of the image's table.
    snapshots: Vec<(String, Layer)>,
    /// Snapshots that are being read, by id.
    views: Vec<(String, Arc<dyn Driver>)>,
    stamp: u32,
    step: usize,
}

fn by_id(id: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: Some(id.to_owned()),
        name: None,
    }
}

/// Most snapshots at a time.
const MAX_SNAPSHOTS: usize = 5;

async fn open(disk: &Arc<Memory>, base: Option<&Arc<Memory>>, read_only: bool) -> Arc<Qcow2> {
    let options = OpenOptions {
        read_only,
        // Small caches, so that eviction is part of the run.
        l2_cache_bytes: 8 << 10,
        refcount_cache_bytes: 8 << 10,
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(disk.child(), options).await.unwrap();
    opening.finish(base.map(|base| base.child())).await.unwrap()
}

impl Run {
    async fn start(case: Case, seed: u64) -> Run {
        let random = fastrand::Rng::with_seed(seed);
        let scratch = Scratch::new();
        let size = case.size();
        let base = case.backed.then(|| {
            // Shorter than the disk: behind its end there are zeroes.
            let bytes = pattern(0, size as usize * 2 / 3, 0xbace);
            std::fs::write(scratch.path("base.raw"), &bytes).unwrap();
            Memory::with_content(&bytes)
        });
        let mut options = CreateOptions::new(size);
        options.cluster_size = 1 << case.cluster_bits;
        options.refcount_bits = case.refcount_bits;
        options.compat = case.compat;
        options.compression_type = case.compression;
        options.extended_l2 = case.extended;
        if case.preallocated {
            options.preallocation = Preallocation::Metadata;
        }
        if case.backed {
            options.backing = BackingFile {
                name: Some("base.raw".to_owned()),
                format: Some("raw".to_owned()),
            };
        }
        let disk = Memory::new(0);
        create(&disk.child(), &options).await.unwrap();
        let driver = open(&disk, base.as_ref(), false).await;
        let active = Layer::new(size, base.as_ref().map(|base| base.content()));
        Run {
            case,
            seed,
            random,
            scratch,
            disk,
            base,
            driver,
            active,
            snapshots: Vec::new(),
            views: Vec::new(),
            stamp: 0,
            step: 0,
        }
    }

    fn place(&self) -> String {
        format!(
            "seed {}, step {}: {} cluster bits, {} refcount bits, {:?}, backed {}, extended {}",
            self.seed,
            self.step,
            self.case.cluster_bits,
            self.case.refcount_bits,
            self.case.compat,
            self.case.backed,
            self.case.extended
        )
    }

    /// A range of the disk: often small, often at cluster borders, often where others were.
    fn range(&mut self, alignment: u64) -> (u64, u64) {
        let size = self.active.len();
        let cluster = 1_u64 << self.case.cluster_bits;
        let longest = match self.random.u8(..8) {
            0..=2 => 4096,
            3..=5 => 2 * cluster,
            _ => 6 * cluster,
        };
        // Half of all requests meet in an eighth of the disk.
        let area = if self.random.bool() { size } else { size / 8 };
        let mut at = self.random.u64(..area);
        let mut len = self.random.u64(1..=longest.min(512 << 10));
        if self.random.bool() {
            let unit = match self.case.extended && self.random.bool() {
                true => cluster / 32,
                false => cluster,
            };
            at &= !(unit - 1);
            if self.random.bool() {
                len = len.next_multiple_of(unit);
            }
        }
        at &= !(alignment - 1);
        len = len.next_multiple_of(alignment).min(size - at);
        (at, len)
    }

    fn next_stamp(&mut self) -> u32 {
        self.stamp += 1;
        self.stamp
    }

    async fn run(&mut self) {
        for step in 0..self.case.steps {
            self.step = step;
            self.one_step().await;
            if step % 250 == 249 {
                self.verify().await;
            }
        }
        self.reopen().await;
        self.verify().await;
        self.verify_with_qemu();
    }

    async fn one_step(&mut self) {
        match self.random.u8(..100) {
            0..=29 => self.write().await,
            30..=39 => self.write_pieces().await,
            40..=49 => self.zero().await,
            50..=57 => self.discard().await,
            58..=69 => self.read().await,
            70..=77 => self.together().await,
            78..=82 => self.driver.flush().await.unwrap(),
            83..=87 => self.take_snapshot().await,
            88..=92 => self.delete_snapshot().await,
            93..=94 => self.revert().await,
            95 if self.random.bool() => self.compress().await,
            95 => self.view().await,
            96 => self.driver.image.hold_settler(self.random.bool()),
            97 => self.kill().await,
            98 => self.grow().await,
            _ => self.reopen().await,
        }
    }

    async fn write(&mut self) {
        let (at, len) = self.range(1);
        let bytes = pattern(at, len as usize, self.next_stamp());
        let flags = WriteFlags::fua(self.random.u8(..16) == 0);
        self.driver
            .write(at, bytes.clone().into(), flags)
            .await
            .unwrap();
        self.active.write(at, &bytes);
    }

    /// Pieces that lie apart, mostly whole clusters in order.
    async fn write_pieces(&mut self) {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        for _ in 0..self.random.usize(1..=6) {
            let (at, len) = self.range(1);
            let apart = |(other, bytes): &(u64, Vec<u8>)| {
                at + len <= *other || other + bytes.len() as u64 <= at
            };
            if pieces.iter().all(apart) {
                pieces.push((at, pattern(at, len as usize, self.next_stamp())));
            }
        }
        if self.random.u8(..4) > 0 {
            pieces.sort_unstable_by_key(|(at, _)| *at);
        }
        let all = pieces.iter().map(|(at, bytes)| (*at, bytes.clone().into()));
        self.driver.write_pieces(all.collect()).await.unwrap();
        for (at, bytes) in pieces {
            self.active.write(at, &bytes);
        }
    }

    async fn compress(&mut self) {
        let cluster = 1_u64 << self.case.cluster_bits;
        let at = self.random.u64(..self.active.len()) & !(cluster - 1);
        let len = cluster.min(self.active.len() - at) as usize;
        let mut bytes = pattern(at, len, self.next_stamp());
        let (front, tail) = bytes.split_at_mut(len / 4);
        tail.fill(front[0]);
        let written = self.driver.write_compressed(at, bytes.clone().into()).await;
        match written {
            Ok(()) => self.active.write(at, &bytes),
            Err(error) => {
                // Many streams share a cluster: narrow refcounts cannot count them.
                panic!("{}: {error}", self.place());
            }
        }
    }

    async fn zero(&mut self) {
        let (at, len) = self.range(1);
        let flags = ZeroFlags {
            may_unmap: self.random.bool(),
            ..ZeroFlags::default()
        };
        self.driver.write_zeroes(at, len, flags).await.unwrap();
        self.active.write(at, &vec![0; len as usize]);
    }

    /// What a discard leaves may be the old bytes or zeroes, and not what the backing has; the model follows.
    async fn discard(&mut self) {
        let (at, len) = self.range(512);
        self.driver.discard(at, len).await.unwrap();
        let is = self.driver.read(at, len).await.unwrap().to_bytes();
        for (nth, block) in is.chunks(512).enumerate() {
            let at = at + nth as u64 * 512;
            let fits =
                block.iter().all(|byte| *byte == 0) || block == self.active.slice(at, block.len());
            assert!(fits, "{}: discarded block at {at:#x}", self.place());
        }
        self.active.write(at, &is);
    }

    async fn read(&mut self) {
        let (at, len) = self.range(1);
        let is = self.driver.read(at, len).await.unwrap().to_bytes();
        assert!(
            is == self.active.slice(at, len as usize),
            "{}: read of {len} bytes at {at:#x}",
            self.place()
        );
        self.read_views(at, len).await;
    }

    async fn read_views(&mut self, at: u64, len: u64) {
        for (id, view) in &self.views {
            let (_, layer) = self
                .snapshots
                .iter()
                .find(|(other, _)| other == id)
                .unwrap();
            assert_eq!(view.size(), layer.len(), "{}", self.place());
            let at = at.min(layer.len());
            let len = len.min(layer.len() - at);
            let is = view.read(at, len).await.unwrap().to_bytes();
            assert!(
                is == layer.slice(at, len as usize),
                "{}: view of snapshot {id} at {at:#x}",
                self.place()
            );
        }
    }

    /// Begins or ends to read a snapshot while the rest goes on.
    async fn view(&mut self) {
        if self.views.len() >= 2 || self.snapshots.is_empty() {
            self.views.pop();
            return;
        }
        let index = self.random.usize(..self.snapshots.len());
        let id = self.snapshots[index].0.clone();
        let view = self.driver.view(by_id(&id)).await.unwrap();
        self.views.push((id, view));
    }

    fn is_viewed(&self, id: &str) -> bool {
        self.views.iter().any(|(other, _)| other == id)
    }

    async fn take_snapshot(&mut self) {
        if self.snapshots.len() >= MAX_SNAPSHOTS {
            return;
        }
        let name = format!("step {}", self.step);
        let new = NewSnapshot {
            name: name.clone(),
            date_sec: 1_700_000_000 + self.step as u32,
            date_nsec: 123_456_789,
            vm_clock_nsec: 0,
        };
        match self.driver.create(new).await {
            Ok(info) => {
                assert_eq!(info.name, name);
                self.snapshots.push((info.id, self.active.clone()));
            }
            Err(error) => {
                let narrow = self.case.refcount_bits <= 4;
                let kind = error.kind();
                let full = kind == ErrorKind::OutOfRange || kind == ErrorKind::Unsupported;
                assert!(narrow && full, "{}: {error}", self.place());
            }
        }
        self.compare_list();
    }

    async fn delete_snapshot(&mut self) {
        if self.snapshots.is_empty() {
            return;
        }
        let index = self.random.usize(..self.snapshots.len());
        let id = self.snapshots[index].0.clone();
        let deleted = self.driver.delete(by_id(&id)).await;
        if self.is_viewed(&id) {
            assert_eq!(deleted.unwrap_err().kind(), ErrorKind::InUse);
        } else {
            assert_eq!(deleted.unwrap().id, id);
            self.snapshots.remove(index);
        }
        self.compare_list();
    }

    async fn revert(&mut self) {
        if self.snapshots.is_empty() {
            return;
        }
        let index = self.random.usize(..self.snapshots.len());
        let (id, layer) = self.snapshots[index].clone();
        match self.driver.revert(by_id(&id)).await {
            Ok(info) => {
                assert_eq!(info.id, id);
                self.active = layer;
                assert_eq!(self.driver.size(), self.active.len(), "{}", self.place());
            }
            Err(error) => {
                let narrow = self.case.refcount_bits <= 4;
                let full = error.kind() == ErrorKind::OutOfRange;
                assert!(narrow && full, "{}: {error}", self.place());
            }
        }
        self.compare_list();
    }

    #[track_caller]
    fn compare_list(&self) {
        let list: Vec<_> = self.driver.list().into_iter().map(|info| info.id).collect();
        let wanted: Vec<_> = self.snapshots.iter().map(|(id, _)| id.clone()).collect();
        assert_eq!(list, wanted, "{}", self.place());
    }

    async fn grow(&mut self) {
        if self.active.len() > self.case.size() * 2 {
            return;
        }
        let more = 512 * self.random.u64(1..64.max(4 << self.case.cluster_bits >> 9));
        let size = self.active.len() + more;
        let resized = self.driver.resize(size, Preallocation::Off).await;
        if self.case.compat == Compat::V0_10 && !self.snapshots.is_empty() {
            // Version 2 does not record the size of a snapshot.
            assert_eq!(resized.unwrap_err().kind(), ErrorKind::Unsupported);
            return;
        }
        resized.unwrap();
        self.active.grow(size);
        // New bytes read as zeroes, whatever the backing has there.
        assert_eq!(self.driver.size(), size);
    }

    async fn reopen(&mut self) {
        self.views.clear();
        self.driver.close().await.unwrap();
        let report = check(&self.disk.child()).await.unwrap();
        assert!(
            report.is_clean() && !self.is_dirty(&self.disk).await,
            "{}: closed image: {:#?}",
            self.place(),
            report.findings
        );
        self.driver = open(&self.disk, self.base.as_ref(), false).await;
        self.compare_list();
    }

    /// What a killed process leaves: no flush, all completed writes. What was flushed must be there, and snapshots must be
    /// right, also after more writes.
    async fn kill(&mut self) {
        let flushed = self.random.bool();
        if flushed {
            self.driver.flush().await.unwrap();
        }
        let disk = self.disk.fork();
        self.assert_nothing_lost(&disk).await;
        let driver = open(&disk, self.base.as_ref(), false).await;
        if flushed {
            let active = self.read_all(&driver).await;
            self.assert_same(&active, &self.active, "active layer after a kill");
        }
        for _ in 0..8 {
            let (at, len) = self.range(1);
            let bytes = pattern(at, len as usize, self.next_stamp());
            let flags = WriteFlags::default();
            driver.write(at, bytes.into(), flags).await.unwrap();
        }
        driver.close().await.unwrap();
        assert!(!self.is_dirty(&disk).await);
        self.assert_nothing_lost(&disk).await;
        self.verify_snapshots(&disk).await;
    }

    /// Whether the image says that its refcounts must be rebuilt.
    async fn is_dirty(&self, disk: &Arc<Memory>) -> bool {
        let header = read_header(&disk.child()).await.unwrap();
        header.incompatible.has(Incompatible::DIRTY)
    }

    async fn assert_nothing_lost(&self, disk: &Arc<Memory>) {
        if self.is_dirty(disk).await {
            return;
        }
        let report = check(&disk.child()).await.unwrap();
        let lost = |finding: &String| finding.starts_with("ERROR cluster");
        assert!(
            report.overlaps == 0 && !report.findings.iter().any(lost),
            "{}: {:#?}",
            self.place(),
            report.findings
        );
    }

    /// Compares everything with the model, as it is after a flush.
    async fn verify(&mut self) {
        self.driver.flush().await.unwrap();
        if self.random.bool() {
            self.driver.image.settle_now().await.unwrap();
            let report = check(&self.disk.child()).await.unwrap();
            let info = self.driver.info();
            assert!(
                report.is_clean() && !info.dirty && info.unsettled_tables == 0,
                "{}: {:#?}",
                self.place(),
                report.findings
            );
        }
        let active = self.read_all(&self.driver).await;
        self.assert_same(&active, &self.active, "active layer");
        self.verify_snapshots(&self.disk.fork()).await;
    }

    /// Reads every snapshot as an image of its own whose active layer it is.
    async fn verify_snapshots(&self, disk: &Arc<Memory>) {
        let table = layers::snapshot_headers(&disk.child()).await;
        assert_eq!(table.len(), self.snapshots.len(), "{}", self.place());
        for ((id, header), (wanted_id, layer)) in table.into_iter().zip(&self.snapshots) {
            assert_eq!(&id, wanted_id);
            let content = self.read_as_image(disk, header).await;
            self.assert_same(&content, layer, &format!("snapshot {id}"));
        }
    }

    /// Reads the image that the disk would be with another header.
    async fn read_as_image(&self, disk: &Arc<Memory>, header: Vec<u8>) -> Vec<u8> {
        let disk = disk.fork();
        let change = Change::Write {
            offset: 0,
            data: header.into(),
            fua: false,
        };
        disk.apply(&change).unwrap();
        let driver = open(&disk, self.base.as_ref(), true).await;
        self.read_all(&driver).await
    }

    async fn read_all(&self, driver: &Qcow2) -> Vec<u8> {
        let data = driver.read(0, driver.size()).await.unwrap();
        data.to_bytes().to_vec()
    }

    #[track_caller]
    fn assert_same(&self, is: &[u8], wanted: &Layer, what: &str) {
        let wanted = wanted.slice(0, wanted.len() as usize);
        assert_eq!(is.len(), wanted.len(), "{}: size of {what}", self.place());
        if let Some(at) = (0..is.len()).find(|&at| is[at] != wanted[at]) {
            panic!("{}: {what} differs at {at:#x}", self.place());
        }
    }

    /// The same comparison with QEMU's tools on the closed image.
    fn verify_with_qemu(&self) {
        let path = self.scratch.save("image.qcow2", &self.disk);
        assert_qemu_clean(&path);
        let raw = self.scratch.path("image.raw");
        let (path, raw) = (path.to_str().unwrap(), raw.to_str().unwrap());
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path, raw]);
        self.assert_same(&std::fs::read(raw).unwrap(), &self.active, "QEMU's view");
        for (id, layer) in &self.snapshots {
            let selector = format!("snapshot.id={id}");
            qemu_img(&[
                "convert", "-f", "qcow2", "-l", &selector, "-O", "raw", path, raw,
            ]);
            // qemu-img gives every snapshot the size of the active layer.
            let is = std::fs::read(raw).unwrap();
            let both = is.len().min(layer.len() as usize);
            let same = is[..both] == *layer.slice(0, both);
            assert!(same, "{}: QEMU's view of snapshot {id}", self.place());
        }
    }
}

/// 20,000 steps in all; the seeds are fixed, so that a failure comes again.
const CASES: [Case; 23] = [
    Case::new(9, 16, 2500),
    Case::new(9, 64, 1500).backed(),
    Case::new(9, 2, 1500),
    Case::new(9, 16, 1500).v2().backed(),
    Case::new(10, 8, 1500),
    Case::new(12, 16, 2000),
    Case::new(12, 16, 1500).backed(),
    Case::new(12, 16, 1000).v2(),
    Case::new(12, 32, 1000).preallocated(),
    Case::new(12, 1, 1000),
    Case::new(14, 4, 1500).zstd(),
    Case::new(16, 16, 1500),
    Case::new(16, 16, 1000).v2().backed(),
    Case::new(16, 16, 500).preallocated(),
    Case::new(17, 16, 500).zstd().backed(),
    Case::new(18, 8, 500),
    Case::new(21, 16, 250).backed(),
    Case::new(14, 16, 1000).extended().backed(),
    Case::new(14, 2, 600).extended(),
    Case::new(16, 16, 800).extended().backed(),
    Case::new(16, 64, 400).extended().zstd(),
    Case::new(17, 16, 300).extended().backed().preallocated(),
    Case::new(21, 16, 200).extended().backed(),
];

/// Runs every third case, from `first` on: three tests share the cores.
fn run_cases(first: usize) {
    let base_seed: u64 = std::env::var("QBLOCKD_MODEL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1000);
    for (index, case) in CASES.into_iter().enumerate().skip(first).step_by(3) {
        let seed = base_seed + index as u64;
        println!("case {index}, seed {seed}");
        block_on(async {
            let mut run = Run::start(case, seed).await;
            run.run().await;
        });
    }
}

#[test]
fn twenty_thousand_random_steps_agree_with_the_model() {
    assert!(CASES.iter().map(|case| case.steps).sum::<usize>() >= 20_000);
    run_cases(0);
}

#[test]
fn twenty_thousand_random_steps_second_share() {
    run_cases(1);
}

#[test]
fn twenty_thousand_random_steps_third_share() {
    run_cases(2);
}
