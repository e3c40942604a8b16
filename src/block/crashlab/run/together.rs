//! Requests at the same time: the disk's requests complete in random order, a snapshot may be taken in their middle.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;

use futures_util::future::{join, join_all};

use super::{Done, Forced, Kind, Moment, Problem, Runner, Snapshot, World, text};
use crate::crashlab::content::{Content, SECTOR, Versions, stamp};
use crate::crashlab::script::Op;
use crate::driver::{
    BoxFuture, NewSnapshot, Requests, SnapshotInfo, Snapshots, WriteFlags, ZeroFlags,
};
use crate::error::Result;
use crate::formats::qcow2::Qcow2;
use crate::protocols::memory::OpKind;

/// Requests of the file that wait until they are let go.
const HELD: [OpKind; 5] = [
    OpKind::Read,
    OpKind::Write,
    OpKind::WriteZeroes,
    OpKind::Discard,
    OpKind::Flush,
];

/// How much has been let go, at most, when the last guest's request is sent beside a snapshot: some find it taken.
const LATEST: u32 = 24;

/// A guest's request of whole sectors.
struct Request {
    op: Op,
    at: u64,
    len: u64,
    number: u32,
}

impl Request {
    fn apply(&self, content: &mut Content) {
        match self.op {
            Op::Write { .. } => content.write(self.at, &stamp(self.at, self.len, self.number)),
            Op::Zero { .. } | Op::Discard { .. } => content.zero(self.at, self.len),
            _ => {}
        }
    }

    fn send<'a>(&self, driver: &'a Qcow2) -> BoxFuture<'a, Result<()>> {
        match self.op {
            Op::Write { fua, .. } => {
                let bytes = stamp(self.at, self.len, self.number);
                driver.write(self.at, bytes.into(), WriteFlags::fua(fua))
            }
            Op::Zero { unmap, .. } => {
                let flags = ZeroFlags {
                    may_unmap: unmap,
                    ..ZeroFlags::default()
                };
                driver.write_zeroes(self.at, self.len, flags)
            }
            Op::Discard { .. } => driver.discard(self.at, self.len),
            _ => driver.flush(),
        }
    }
}

/// A snapshot that was asked for: what was answered, and how many records the log had then.
type Taken = (Result<SnapshotInfo>, usize);

impl Runner {
    /// Sends guest requests at once, and with them a request for a snapshot.
    pub(super) async fn together(
        &mut self,
        ops: &[Op],
        takes_snapshot: bool,
        seed: u64,
    ) -> std::result::Result<Done, Problem> {
        let begun = self.disk.log_len();
        let before = self.world.active.clone();
        let requests: Vec<Request> = ops.iter().map(|op| self.request(op)).collect();
        let new = takes_snapshot.then(|| self.named());
        let (answered, taken) = self.send(&requests, new, seed).await.map_err(text)?;
        let forced = requests.iter().zip(answered);
        let forced =
            forced.filter(|(request, _)| matches!(request.op, Op::Write { fua: true, .. }));
        let forced = forced.map(|(request, answered)| Forced {
            at: request.at,
            len: request.len,
            answered,
        });
        let forced: Vec<Forced> = forced.collect();
        // Each sector holds what one of the requests has left, or what was there.
        let through: Vec<Arc<Content>> = requests
            .iter()
            .map(|request| {
                let mut content = (*before).clone();
                request.apply(&mut content);
                Arc::new(content)
            })
            .collect();
        let possible = Versions::new(through.iter().chain([&before]).map(|content| &**content));
        match taken {
            Some((Ok(info), answered)) => {
                self.adopt_snapshot(info, &possible)?;
                // What is durable with the snapshot is what was before all of this.
                self.moments.push(Moment {
                    op: "snapshot in the middle".to_owned(),
                    begun,
                    answered,
                    durable: true,
                    kind: Kind::Structure,
                    after: World {
                        snapshots: self.world.snapshots.clone(),
                        active: before.clone(),
                    },
                    passing: None,
                    through: Vec::new(),
                    forced: Vec::new(),
                });
            }
            Some((Err(error), _)) => drop(self.refused(&error)?),
            None => {}
        }
        self.adopt(&requests, &possible).await?;
        self.compare_list()?;
        Ok(Done {
            through,
            forced,
            ..Done::sectors(false)
        })
    }

    /// Has all requests under way at once, and lets the file's requests complete in an order that `seed` says. Answers how many
    /// records the log had when each was answered.
    async fn send(
        &self,
        requests: &[Request],
        snapshot: Option<NewSnapshot>,
        seed: u64,
    ) -> Result<(Vec<usize>, Option<Taken>)> {
        let mut random = fastrand::Rng::with_seed(seed);
        let looks = AtomicU32::new(0);
        let is_late = snapshot.is_some();
        let taken = async {
            let taken = self.driver.create(snapshot?).await;
            Some((taken, self.disk.log_len()))
        };
        let mut sent = Vec::new();
        for request in requests {
            let at = match is_late && random.bool() {
                true => random.u32(..LATEST),
                false => 0,
            };
            let looks = &looks;
            sent.push(async move {
                poll_fn(|_| match looks.load(Ordering::Relaxed) >= at {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                })
                .await;
                let sent = request.send(&self.driver).await;
                sent.map(|()| self.disk.log_len())
            });
        }
        let sent = join_all(sent);
        let mut all = Box::pin(join(sent, taken));
        let disks = || [&self.disk].into_iter().chain(self.disk.second());
        for disk in disks() {
            HELD.iter().for_each(|kind| disk.hold(*kind));
        }
        let (answers, taken) = loop {
            // One look each time: who is ready depends on what is let go.
            looks.fetch_add(1, Ordering::Relaxed);
            let looked = poll_fn(|cx| Poll::Ready(all.as_mut().poll(cx))).await;
            if let Poll::Ready(answers) = looked {
                break answers;
            }
            let held: Vec<_> = disks()
                .flat_map(|disk| (0..disk.held()).map(move |nth| (disk, nth)))
                .collect();
            match held.len() {
                0 => tokio::task::yield_now().await,
                count => {
                    let (disk, nth) = held[random.usize(..count)];
                    disk.release_one(nth);
                }
            }
        };
        disks().for_each(|disk| disk.release_all());
        let answered = answers.into_iter().collect::<Result<_>>()?;
        Ok((answered, taken))
    }

    /// The model follows: the snapshot holds what the file says, if that is possible.
    fn adopt_snapshot(
        &mut self,
        info: SnapshotInfo,
        possible: &Versions,
    ) -> std::result::Result<(), Problem> {
        let bytes = self.disk.content();
        let audit = self.case.audit(&bytes, None)?;
        let found = audit.snapshots().iter().find(|s| s.id == info.id);
        let content = audit.content(found.ok_or("the snapshot is not in the file")?)?;
        possible.violation(&content).map_or(Ok(()), Err)?;
        self.world.snapshots.push(Snapshot {
            id: info.id,
            name: info.name,
            content: Arc::new(content),
        });
        Ok(())
    }

    /// The request of an operation: whole sectors, so that each sector is one request's.
    fn request(&mut self, op: &Op) -> Request {
        let (at, len) = match *op {
            Op::Write { at, len, .. } | Op::Zero { at, len, .. } | Op::Discard { at, len } => {
                (at & !(SECTOR - 1), len.next_multiple_of(SECTOR))
            }
            _ => (0, 0),
        };
        let (at, len) = self.cut(at, len);
        self.next_stamp += 1;
        Request {
            op: op.clone(),
            at,
            len,
            number: self.next_stamp - 1,
        }
    }

    /// The model follows what has happened.
    async fn adopt(
        &mut self,
        requests: &[Request],
        possible: &Versions,
    ) -> std::result::Result<(), Problem> {
        for request in requests.iter().filter(|request| request.len > 0) {
            let data = self.driver.read(request.at, request.len).await;
            let bytes = data.map_err(text)?.to_bytes();
            self.active().write(request.at, &bytes);
        }
        possible.violation(&self.world.active).map_or(Ok(()), Err)
    }
}
