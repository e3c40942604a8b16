//! What the same process does with an image behind a failure: all that it could do before.

use std::time::Duration;

use super::*;
use crate::crashlab::content::Content;

impl Case {
    /// Fails one request of the operation, and goes on with other operations.
    pub(super) async fn goes_on(&self, kind: OpKind, skip: u64, fault: Fault) {
        let what = format!("{:?}: {kind:?} {skip} {fault:?}", self.operation);
        let (disk, image) = begin(&self.base).await;
        disk.fail_once(kind, skip, fault);
        self.operation.perform(&image).await.unwrap_err();
        disk.clear_faults();
        let size = image.size();
        let mut model = Content::new(size);
        model.write(0, &read(&image, 0, size).await);
        let (later, model) = go_on(&image, model, &what).await;
        image.close().await.unwrap();
        let mut world = closed(&disk, &what);
        let content = world.snapshots.pop().unwrap().content;
        assert_eq!(later.difference(&content), None, "{what}");
        assert_eq!(self.before.snapshots, world.snapshots, "{what}");
        assert_eq!(model.difference(&world.active), None, "{what}");
    }
}

/// A guest's requests and operations on snapshots, all of which succeed. The image holds `model`; answers what the one snapshot
/// holds that is new in the end, and what the disk does.
async fn go_on(image: &Qcow2, mut model: Content, what: &str) -> (Content, Content) {
    let cluster = image.limits().preferred as u64;
    // A disk of four clusters is enough.
    let tail = image.size() - 2 * cluster;
    let fails = |error| -> () { panic!("{what}, then: {error}") };
    for (at, len, number) in [(0, 700, 201), (cluster, 2 * cluster, 202), (tail, 900, 203)] {
        let bytes = stamp(at, len, number);
        model.write(at, &bytes);
        write(image, at, bytes).await.unwrap_or_else(fails);
    }
    image.flush().await.unwrap_or_else(fails);
    image
        .create(NewSnapshot::named("gone"))
        .await
        .map(drop)
        .unwrap_or_else(fails);
    image
        .create(NewSnapshot::named("later"))
        .await
        .map(drop)
        .unwrap_or_else(fails);
    let later = model.clone();
    for (at, len, number) in [(cluster, 2 * cluster, 204), (tail, 2 * cluster, 205)] {
        write(image, at, stamp(at, len, number))
            .await
            .unwrap_or_else(fails);
    }
    let mut change = image.change().await.unwrap();
    change.revert(selector("later")).await.unwrap();
    change.delete(selector("gone")).await.unwrap();
    change.prepare().await.unwrap_or_else(fails);
    change.commit().await.unwrap_or_else(fails);
    change.finish();
    image.discard(0, cluster).await.unwrap_or_else(fails);
    model.zero(0, cluster);
    image
        .write_zeroes(tail, cluster, unmap())
        .await
        .unwrap_or_else(fails);
    model.zero(tail, cluster);
    let bytes = stamp(2 * cluster, 100, 206);
    model.write(2 * cluster, &bytes);
    write(image, 2 * cluster, bytes).await.unwrap_or_else(fails);
    image.flush().await.unwrap_or_else(fails);
    (later, model)
}

/// Fails one request of what is done behind an operation that has succeeded; answers whether there was one to fail.
async fn fails_behind(case: &Case, kind: OpKind, skip: u64, fault: Fault) -> bool {
    let what = format!("behind {:?}: {kind:?} {skip} {fault:?}", case.operation);
    let (disk, image) = begin(&case.base).await;
    case.operation.perform(&image).await.unwrap();
    let start = disk.count(kind);
    disk.fail_once(kind, skip, fault);
    // Long enough for another try.
    tokio::time::sleep(Duration::from_secs(600)).await;
    let reached = disk.count(kind) - start > skip;
    disk.clear_faults();
    let info = image.info();
    assert!(
        !info.dirty && info.unsettled_tables == 0,
        "{what}: {info:?}"
    );
    image.close().await.unwrap();
    let world = closed(&disk, &what);
    assert_eq!(case.after.difference(&world), None, "{what}");
    reached
}

#[tokio::test(start_paused = true)]
async fn settling_that_meets_a_fault_goes_on() {
    let mut met = 0;
    for options in [
        geometry(512, 16, Compat::V1_1),
        geometry(4096, 4, Compat::V1_1),
        geometry(4096, 16, Compat::V0_10),
    ] {
        let base = base(&options).await;
        for operation in [Create, Delete, Revert, Steps] {
            let case = Case::new(operation, &base).await;
            for (kind, fault) in FAULTS {
                for skip in 0.. {
                    if !fails_behind(&case, kind, skip, fault).await {
                        break;
                    }
                    met += 1;
                }
            }
        }
    }
    assert!(met >= 120, "{met}");
}

/// From some requests on all of their kinds fail until the operation has answered. Either it goes on then, or the header is in doubt,
/// and nothing is changed any more: what is on the disk is sound, as the old state or as the new one. Answers whether it is in
/// doubt; nothing if none of the requests came.
async fn fails_for_a_while(case: &Case, faults: &[(OpKind, u64, Fault)]) -> Option<bool> {
    let what = format!("{:?}: from {faults:?} on", case.operation);
    let (disk, image) = begin(&case.base).await;
    let counts = || faults.iter().map(|(kind, ..)| disk.count(*kind));
    let start: Vec<u64> = counts().collect();
    for (kind, skip, fault) in faults {
        disk.fail_from(*kind, *skip, *fault);
    }
    let done = case.operation.perform(&image).await;
    let sent = counts().zip(start).map(|(now, start)| now - start);
    let reached = sent.zip(faults).any(|(sent, (_, skip, _))| sent > *skip);
    disk.clear_faults();
    if !reached {
        return None;
    }
    let in_doubt = done.is_err() && image.create(NewSnapshot::named("doubt")).await.is_err();
    if !in_doubt {
        let closed_now = image.close().await;
        closed_now.unwrap_or_else(|error| panic!("{what}: {error}"));
        closed(&disk, &what);
        return Some(false);
    }
    // What was in memory may be written or not.
    let _ = image.close().await;
    drop(image);
    let bytes = disk.content();
    let audit = Audit::new(&bytes).unwrap();
    let dangers = audit.verdict().unwrap().dangers;
    assert!(dangers.is_empty(), "{what}: {dangers:?}");
    let world = World::of(&audit).unwrap();
    let known = [&case.before, &case.after];
    let differences = known.map(|known| known.difference(&world));
    assert!(differences.contains(&None), "{what}: {differences:?}");
    // A process that begins anew can do everything.
    let image = open(&disk).await;
    let (_, model) = go_on(&image, (*world.active).clone(), &what).await;
    image.close().await.unwrap();
    let bytes = disk.content();
    let audit = Audit::new(&bytes).unwrap();
    assert!(audit.verdict().unwrap().dangers.is_empty(), "{what}");
    assert_eq!(model.difference(&audit.active().unwrap()), None, "{what}");
    Some(true)
}

#[tokio::test(start_paused = true)]
async fn storage_that_fails_for_a_while_leaves_the_old_state_or_the_new_one() {
    let mut in_doubt = 0;
    for options in [
        geometry(512, 16, Compat::V1_1),
        geometry(4096, 4, Compat::V1_1),
        geometry(4096, 16, Compat::V0_10),
    ] {
        let base = base(&options).await;
        for operation in [Create, Delete, Revert, Steps, Grow, Shrink] {
            let resizes = operation == Grow || operation == Shrink;
            if resizes && options.compat == Compat::V0_10 {
                continue;
            }
            let case = Case::new(operation, &base).await;
            for (kind, fault) in FAULTS {
                for skip in 0.. {
                    let faults = [(kind, skip, fault)];
                    let Some(doubt) = fails_for_a_while(&case, &faults).await else {
                        break;
                    };
                    in_doubt += u64::from(doubt);
                }
            }
            // The new header is in the file, and cannot be taken back.
            for writes in 0.. {
                let write = (OpKind::Write, writes, Fault::Io);
                for flushes in 0.. {
                    let faults = [write, (OpKind::Flush, flushes, Fault::Io)];
                    let Some(doubt) = fails_for_a_while(&case, &faults).await else {
                        break;
                    };
                    in_doubt += u64::from(doubt);
                    if flushes > 12 {
                        break;
                    }
                }
                if fails_for_a_while(&case, &[write]).await.is_none() {
                    break;
                }
            }
        }
    }
    assert!(in_doubt >= 4, "{in_doubt}");
}
