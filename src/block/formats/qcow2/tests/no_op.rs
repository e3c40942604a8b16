//! A failed operation has not happened: every request of every operation fails once, in each way that storage fails.
//!
//! After the error the disk, the snapshots and the header are what they were; the image closes without a leak; and the same
//! operation, tried again, succeeds. An operation that answers well although a request has failed is done in full.

mod afterwards;

use super::*;
use crate::crashlab::audit::{Audit, Verdict};
use crate::crashlab::content::{Versions, stamp};
use crate::crashlab::run::World;
use crate::driver::{NewSnapshot, Preallocation, SnapshotSelector, Snapshots};
use crate::error::ErrorKind;
use crate::formats::qcow2::create::Compat;
use crate::protocols::memory::{Fault, OpKind};

/// Fields of the header that an operation on the whole disk switches: size, L1 table, snapshot table.
const SWITCHED: [std::ops::Range<usize>; 3] = [24..32, 36..48, 60..72];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    Delete,
    Revert,
    /// Several steps at once.
    Steps,
    /// So much that the L1 table moves.
    Grow,
    Shrink,
    /// Of clusters that a snapshot has too, and of new ones.
    Write,
    Discard,
    Zero,
    Compress,
    /// Of what is written to memory only.
    Flush,
    Close,
}

use Operation::*;

const OPERATIONS: [Operation; 12] = [
    Create, Delete, Revert, Steps, Grow, Shrink, Write, Discard, Zero, Compress, Flush, Close,
];

impl Operation {
    /// Guest requests may have happened in part when they fail; the others never.
    fn is_guest_request(self) -> bool {
        matches!(self, Write | Discard | Zero | Compress)
    }

    async fn perform(self, image: &Qcow2) -> Result<()> {
        let cluster = image.limits().preferred as u64;
        let (at, len) = (cluster / 2, 5 * cluster);
        match self {
            Create => image.create(NewSnapshot::named("new")).await.map(drop),
            Delete => image.delete(selector("one")).await.map(drop),
            Revert => {
                let mut change = image.change().await?;
                change.revert(selector("one")).await?;
                change.prepare().await?;
                change.commit().await?;
                change.finish();
                Ok(())
            }
            Steps => {
                let mut change = image.change().await?;
                change.create(NewSnapshot::named("new")).await?;
                change.revert(selector("one")).await?;
                change.delete(selector("two")).await?;
                change.create(NewSnapshot::named("newer")).await?;
                change.prepare().await?;
                change.commit().await?;
                change.finish();
                Ok(())
            }
            Grow => image.resize(40 * image.size(), Preallocation::Off).await,
            Shrink => image.resize(image.size() / 4, Preallocation::Off).await,
            Write => write(image, at, stamp(at, len, 99)).await,
            Discard => {
                image.discard(at, len).await?;
                // Where the L2 table is a snapshot's too.
                let tail = image.size() - 3 * cluster;
                image.discard(tail, 2 * cluster).await
            }
            Zero => image.write_zeroes(at, len, unmap()).await,
            Compress => {
                let bytes = stamp(cluster, cluster, 99);
                image.write_compressed(cluster, bytes.into()).await
            }
            Flush => image.flush().await,
            Close => image.close().await,
        }
    }
}

fn selector(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

/// A disk of three L2 tables at small clusters, of which two snapshots share some with the active layer.
async fn base(options: &CreateOptions) -> Arc<Memory> {
    let disk = new_image(options).await;
    let image = open(&disk).await;
    let cluster = options.cluster_size;
    let tail = options.size - 4 * cluster;
    for (at, len, number) in [(0, 10 * cluster, 1), (tail, 4 * cluster, 2)] {
        write(&image, at, stamp(at, len, number)).await.unwrap();
    }
    image.create(NewSnapshot::named("one")).await.unwrap();
    write(&image, 0, stamp(0, 3 * cluster, 3)).await.unwrap();
    image.create(NewSnapshot::named("two")).await.unwrap();
    write(&image, cluster, stamp(cluster, 100, 4))
        .await
        .unwrap();
    image.close().await.unwrap();
    disk
}

/// An open image in the middle of its life: some of its metadata are not written yet.
async fn begin(base: &Memory) -> (Arc<Memory>, Arc<Qcow2>) {
    let disk = base.fork();
    let options = OpenOptions {
        l2_cache_bytes: 0,
        refcount_cache_bytes: 0,
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(disk.child(), options).await.unwrap();
    let image = opening.finish(None).await.unwrap();
    let at = 6 * image.limits().preferred as u64;
    write(&image, at, stamp(at, 700, 5)).await.unwrap();
    (disk, image)
}

/// What a closed image holds; it must not have anything wrong, no leak either.
#[track_caller]
fn closed(disk: &Memory, what: &str) -> World {
    let bytes = disk.content();
    let audit = Audit::new(&bytes).unwrap();
    assert_eq!(audit.verdict(), Ok(Verdict::default()), "{what}");
    assert!(!audit.is_dirty(), "{what}");
    World::of(&audit).unwrap()
}

/// One operation, with what is before and after it.
struct Case {
    operation: Operation,
    base: Arc<Memory>,
    before: World,
    after: World,
}

impl Case {
    async fn new(operation: Operation, base: &Arc<Memory>) -> Case {
        let (disk, image) = begin(base).await;
        image.close().await.unwrap();
        let before = closed(&disk, "before");
        let (disk, image) = begin(base).await;
        operation.perform(&image).await.unwrap();
        image.close().await.unwrap();
        Case {
            operation,
            base: base.clone(),
            before,
            after: closed(&disk, "after"),
        }
    }

    /// Whether the world is that before the operation; behind a guest request, its parts may have happened.
    fn assert_nothing_happened(&self, world: &World, what: &str) {
        if !self.operation.is_guest_request() {
            assert_eq!(self.before.difference(world), None, "{what}");
            return;
        }
        assert_eq!(self.before.snapshots, world.snapshots, "{what}");
        let versions = Versions::new([&*self.before.active, &*self.after.active]);
        assert_eq!(versions.violation(&world.active), None, "{what}");
    }

    /// Fails one request; answers whether there was one to fail, and whether the operation failed with it.
    async fn try_fault(&self, kind: OpKind, skip: u64, fault: Fault) -> (bool, bool) {
        let what = format!("{:?}: {kind:?} {skip} {fault:?}", self.operation);
        let (disk, image) = begin(&self.base).await;
        let header = disk.content()[..104].to_vec();
        let (start, list) = (disk.count(kind), image.list());
        disk.fail_once(kind, skip, fault);
        let done = self.operation.perform(&image).await;
        let reached = disk.count(kind) - start > skip;
        disk.clear_faults();
        let Err(error) = done else {
            image.close().await.unwrap();
            let world = closed(&disk, &what);
            assert_eq!(self.after.difference(&world), None, "{what}");
            return (reached, false);
        };
        assert!(reached, "{what}: {error}");
        assert_eq!(image.list(), list, "{what}");
        assert_eq!(image.size(), self.before.active.size(), "{what}");
        if !self.operation.is_guest_request() {
            for range in SWITCHED {
                let is = &disk.content()[range.clone()];
                assert_eq!(is, &header[range], "{what}");
            }
            let size = image.size();
            assert_same(
                &read(&image, 0, size).await,
                &self.before.active.bytes(0, size),
            );
        }
        image.close().await.unwrap();
        self.assert_nothing_happened(&closed(&disk, &what), &what);
        self.succeeds_the_second_time(kind, skip, fault, &what)
            .await;
        (true, true)
    }

    async fn succeeds_the_second_time(&self, kind: OpKind, skip: u64, fault: Fault, what: &str) {
        let (disk, image) = begin(&self.base).await;
        disk.fail_once(kind, skip, fault);
        self.operation.perform(&image).await.unwrap_err();
        disk.clear_faults();
        let again = self.operation.perform(&image).await;
        again.unwrap_or_else(|error| panic!("{what}, again: {error}"));
        image.close().await.unwrap();
        let world = closed(&disk, what);
        assert_eq!(self.after.difference(&world), None, "{what}, again");
    }
}

/// How storage fails.
const FAULTS: [(OpKind, Fault); 12] = [
    (OpKind::Write, Fault::Io),
    (OpKind::Write, Fault::NoSpace),
    (OpKind::Write, Fault::Torn(512)),
    (OpKind::Flush, Fault::Io),
    (OpKind::Flush, Fault::NoSpace),
    (OpKind::Read, Fault::Io),
    (OpKind::Discard, Fault::Io),
    (OpKind::Discard, Fault::Torn(512)),
    (OpKind::WriteZeroes, Fault::Io),
    (OpKind::WriteZeroes, Fault::NoSpace),
    (OpKind::Resize, Fault::Io),
    (OpKind::Resize, Fault::NoSpace),
];

fn geometry(cluster_size: u64, refcount_bits: u32, compat: Compat) -> CreateOptions {
    let mut options = CreateOptions::new(match cluster_size {
        512 => 96 << 10,
        _ => 16 * cluster_size,
    });
    options.cluster_size = cluster_size;
    options.refcount_bits = refcount_bits;
    options.compat = compat;
    options
}

/// Answers how many faults have made an operation fail.
async fn try_all(options: &CreateOptions) -> u64 {
    let base = base(options).await;
    let mut failed = 0;
    for operation in OPERATIONS {
        let resizes = operation == Grow || operation == Shrink;
        if resizes && options.compat == Compat::V0_10 {
            // Version 2 does not record the size of a snapshot.
            continue;
        }
        let case = Case::new(operation, &base).await;
        for (kind, fault) in FAULTS {
            let (mut met, mut failed_here) = (0, 0);
            for skip in 0.. {
                let (reached, fails) = case.try_fault(kind, skip, fault).await;
                if !reached {
                    break;
                }
                met += 1;
                failed_here += u64::from(fails);
                if fails && operation != Close {
                    case.goes_on(kind, skip, fault).await;
                }
            }
            println!("{operation:?}: {kind:?} {fault:?}: {met} met, {failed_here} made it fail");
            failed += failed_here;
        }
    }
    failed
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_fails_has_not_happened_with_small_clusters() {
    let failed = try_all(&geometry(512, 16, Compat::V1_1)).await;
    assert!(failed >= 100, "{failed}");
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_fails_has_not_happened_with_wide_counters() {
    let failed = try_all(&geometry(512, 64, Compat::V1_1)).await;
    assert!(failed >= 100, "{failed}");
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_fails_has_not_happened_in_version_2() {
    let failed = try_all(&geometry(4096, 16, Compat::V0_10)).await;
    assert!(failed >= 60, "{failed}");
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_fails_has_not_happened_with_narrow_counters() {
    let failed = try_all(&geometry(4096, 4, Compat::V1_1)).await;
    assert!(failed >= 60, "{failed}");
}

/// On a full disk a snapshot is refused; every cluster that was there can still be overwritten, and nothing is leaked.
#[tokio::test(start_paused = true)]
async fn a_full_disk_refuses_changes_of_snapshots_and_takes_writes() {
    for operation in [Create, Revert, Steps] {
        for options in [
            geometry(512, 16, Compat::V1_1),
            geometry(4096, 64, Compat::V1_1),
            geometry(4096, 16, Compat::V0_10),
        ] {
            let base = base(&options).await;
            let mut refused = 0;
            for room in 0.. {
                let what = format!("{operation:?}, {} bytes, room {room}", options.cluster_size);
                let (disk, image) = begin(&base).await;
                // Ours alone, so that overwriting needs no space.
                let mut content = stamp(0, options.size, 50);
                write(&image, 0, content.clone()).await.unwrap();
                image.flush().await.unwrap();
                let list = image.list();
                disk.set_space_limit(Some(disk.allocated() + room * 4096));
                match operation.perform(&image).await {
                    Ok(()) => break,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}"),
                }
                refused += 1;
                assert_eq!(image.list(), list, "{what}");
                for (number, at) in (60..).zip((0..options.size).step_by(512)) {
                    let bytes = stamp(at, 512, number);
                    content[at as usize..at as usize + 512].copy_from_slice(&bytes);
                    let written = write(&image, at, bytes).await;
                    written.unwrap_or_else(|error| panic!("{what}, write at {at}: {error}"));
                }
                image.flush().await.unwrap();
                assert_same(&read(&image, 0, options.size).await, &content);
                image.close().await.unwrap();
                closed(&disk, &what);
            }
            // Small clusters of a refused change fit into the file's last page.
            let small = options.cluster_size < 4096;
            assert!(refused > 0 || small, "{operation:?}, {options:?}");
        }
    }
}

/// What a longer backing shows is hidden before the header says the new size, in tables that only the new L1 table reaches.
#[tokio::test(start_paused = true)]
async fn growing_over_a_longer_backing_happens_or_leaves_nothing() {
    let backing = Memory::with_content(&stamp(0, 200 << 10, 1));
    let options = geometry(512, 16, Compat::V1_1);
    let (old, new) = (options.size, 40 * options.size);
    let base = new_image(&options).await;
    let mut failed = 0;
    for (kind, fault) in FAULTS {
        for skip in 0.. {
            let what = format!("{kind:?} {skip} {fault:?}");
            let disk = base.fork();
            let image = open_over(&disk, Some(backing.child())).await;
            write(&image, 512, stamp(512, 512, 2)).await.unwrap();
            let before = read(&image, 0, old).await;
            let start = disk.count(kind);
            disk.fail_once(kind, skip, fault);
            let grown = image.resize(new, Preallocation::Off).await;
            let reached = disk.count(kind) - start > skip;
            disk.clear_faults();
            if grown.is_err() {
                failed += 1;
                assert_eq!(image.size(), old, "{what}");
                assert_same(&read(&image, 0, old).await, &before);
                image.close().await.unwrap();
                let bytes = disk.content();
                let verdict = Audit::new(&bytes).unwrap().verdict();
                assert_eq!(verdict, Ok(Verdict::default()), "{what}");
                let image = open_over(&disk, Some(backing.child())).await;
                image.resize(new, Preallocation::Off).await.unwrap();
                image.close().await.unwrap();
            } else {
                image.close().await.unwrap();
            }
            let bytes = disk.content();
            let verdict = Audit::new(&bytes).unwrap().verdict();
            assert_eq!(verdict, Ok(Verdict::default()), "{what}");
            let image = open_over(&disk, Some(backing.child())).await;
            let mut wanted = before.clone();
            wanted.resize(new as usize, 0);
            assert_same(&read(&image, 0, new).await, &wanted);
            if !reached {
                break;
            }
        }
    }
    assert!(failed >= 20, "{failed}");
}
