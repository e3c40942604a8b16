//! Who is at work, as the owner of a copy counts: nobody, while the copy stands still.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::*;
use crate::protocols::memory::{Fault, OpKind};

const CLUSTER: u64 = 64 << 10;
const LONG: Duration = Duration::from_secs(30);

/// Decides about the first error when nobody is at work any more, and lets nobody begin until then.
struct Patient {
    at_work: watch::Sender<usize>,
    is_open: watch::Sender<bool>,
    target: Arc<Memory>,
    stops: Mutex<usize>,
}

impl CopyHooks for Patient {
    fn admit(&self, _bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let mut open = self.is_open.subscribe();
            open.wait_for(|open| *open).await.unwrap();
            self.at_work.send_modify(|count| *count += 1);
            tokio::task::yield_now().await;
        })
    }

    fn finished(&self) {
        self.at_work.send_modify(|count| *count -= 1);
    }

    fn progress(&self, _progress: Progress) {}

    fn on_error(&self, _side: Side, _error: &Error) -> BoxFuture<'_, OnCopyError> {
        Box::pin(async {
            self.is_open.send_replace(false);
            let mut at_work = self.at_work.subscribe();
            let rest = at_work.wait_for(|count| *count == 0);
            let rest = timeout(LONG, rest).await;
            assert!(rest.is_ok(), "somebody is at work while all wait");
            drop(rest);
            *self.stops.lock().unwrap() += 1;
            self.target.clear_faults();
            self.is_open.send_replace(true);
            OnCopyError::Retry
        })
    }
}

async fn copy_with_a_full_target(guest_writes: u64) {
    let (source_file, target_file) = (Memory::new(16 * CLUSTER), Memory::new(16 * CLUSTER));
    for cluster in 0..16 {
        let old = vec![cluster as u8 + 1; CLUSTER as usize];
        put(&*source_file, cluster * CLUSTER, old).await.unwrap();
    }
    let before = content(&*source_file).await;
    let options = CopyOptions {
        guest_memory: 2 * CLUSTER,
        max_chunk: CLUSTER,
        ..CopyOptions::default()
    };
    let (source, target) = (Jitter::new(source_file, 1, 3), target_file.clone());
    let setup = setup(source, Jitter::new(target.clone(), 2, 3), options);
    setup.copier.activate().unwrap();
    for cluster in 0..guest_writes {
        let at = (15 - cluster) * CLUSTER;
        put(&*setup.guest, at, vec![0xff; 512]).await.unwrap();
    }
    target.fail_from(OpKind::Write, 2, Fault::NoSpace);
    let owner = Arc::new(Patient {
        at_work: watch::Sender::new(0),
        is_open: watch::Sender::new(true),
        target,
        stops: Mutex::default(),
    });
    let copied = timeout(2 * LONG, setup.copier.run(owner.clone())).await;
    copied.unwrap().unwrap();
    setup.copier.close().await.unwrap();
    assert!(*owner.stops.lock().unwrap() > 0);
    assert_eq!(*owner.at_work.borrow(), 0);
    assert_same(&content(&*target_file).await, &before, "the target");
}

#[tokio::test]
async fn nobody_is_at_work_while_an_error_is_decided() {
    copy_with_a_full_target(0).await;
}

#[tokio::test]
async fn nobody_is_at_work_while_guests_old_content_waits_for_the_target() {
    copy_with_a_full_target(2).await;
}
