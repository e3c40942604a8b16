//! Requests at the same time, overlapping, with the file's requests completing in random order.

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join, join_all};
use std::future::poll_fn;
use std::task::Poll;

use super::*;

/// A request of a batch.
#[derive(Debug, Clone)]
enum Request {
    Write { at: u64, len: u64, stamp: u32 },
    Zero { at: u64, len: u64, may_unmap: bool },
    Discard { at: u64, len: u64 },
    Read { at: u64, len: u64 },
    Flush,
}

impl Request {
    fn range(&self) -> (u64, u64) {
        match *self {
            Request::Write { at, len, .. }
            | Request::Zero { at, len, .. }
            | Request::Discard { at, len }
            | Request::Read { at, len } => (at, len),
            Request::Flush => (0, 0),
        }
    }

    fn covers(&self, at: u64) -> bool {
        let (start, len) = self.range();
        start <= at && at < start + len
    }

    /// Whether the block may hold `bytes` because of this request.
    fn explains(&self, at: u64, bytes: &[u8], before: &Layer) -> bool {
        let is_zero = || bytes.iter().all(|byte| *byte == 0);
        match *self {
            _ if !self.covers(at) => false,
            Request::Write { stamp, .. } => bytes == pattern(at, bytes.len(), stamp),
            Request::Zero { .. } => is_zero(),
            Request::Discard { .. } => is_zero() || bytes == before.slice(at, bytes.len()),
            Request::Read { .. } | Request::Flush => false,
        }
    }

    /// Whether the block's old bytes are gone for sure when the request is answered.
    fn replaces(&self, at: u64) -> bool {
        let changes = matches!(self, Request::Write { .. } | Request::Zero { .. });
        changes && self.covers(at)
    }
}

/// What was done with a snapshot beside a batch, by id.
enum Meanwhile {
    Nothing,
    Created(String),
    Deleted(String),
    /// It was read.
    Viewed(String, Vec<u8>),
}

/// Requests of the file that wait for the scheduler.
const SCHEDULED: [OpKind; 5] = [
    OpKind::Read,
    OpKind::Write,
    OpKind::WriteZeroes,
    OpKind::Discard,
    OpKind::Flush,
];

impl Run {
    /// Sends two to eight requests at once, sometimes with a snapshot taken, deleted or read in their middle. Every block
    /// must hold what one of them has left, and in the snapshot that or what was before.
    pub(super) async fn together(&mut self) {
        let count = self.random.usize(2..=8);
        let requests: Vec<Request> = (0..count).map(|_| self.request()).collect();
        let driver = self.driver.clone();
        let taken = self.snapshot_meanwhile();
        let all = join_all(requests.iter().map(|request| send(&driver, request)));
        let mut all = Box::pin(join(all, taken));
        SCHEDULED.iter().for_each(|kind| self.disk.hold(*kind));
        let (answers, taken) = loop {
            // Only one look: who is ready depends on what the scheduler has released.
            let looked = poll_fn(|cx| Poll::Ready(all.as_mut().poll(cx))).await;
            if let Poll::Ready(answers) = looked {
                break answers;
            }
            match self.disk.held() {
                0 => tokio::task::yield_now().await,
                held => {
                    self.disk.release_one(self.random.usize(..held));
                }
            }
        };
        self.disk.release_all();
        for (request, answer) in requests.iter().zip(answers) {
            if let Request::Read { at, .. } = request {
                self.assert_explained(*at, &answer, &requests, Old::Allowed);
            }
        }
        for request in &requests {
            let (at, len) = request.range();
            let is = self.driver.read(at, len).await.unwrap().to_bytes();
            self.assert_explained(at, &is, &requests, Old::Replaced);
        }
        match taken {
            Meanwhile::Nothing => {}
            Meanwhile::Created(id) => {
                let content = self.read_snapshot(&id).await;
                self.assert_explained(0, &content, &requests, Old::Allowed);
                let mut layer = self.active.clone();
                layer.write(0, &content);
                self.snapshots.push((id, layer));
            }
            Meanwhile::Deleted(id) => self.snapshots.retain(|(other, _)| *other != id),
            Meanwhile::Viewed(id, content) => {
                let snapshot = self.snapshots.iter().find(|(other, _)| *other == id);
                self.assert_same(&content, &snapshot.unwrap().1, "view meanwhile");
            }
        }
        // The model follows what has happened.
        for request in &requests {
            let (at, len) = request.range();
            let is = self.driver.read(at, len).await.unwrap().to_bytes();
            self.active.write(at, &is);
        }
    }

    /// Something with a snapshot in every other batch, where the refcounts can count it for sure.
    fn snapshot_meanwhile(&mut self) -> BoxFuture<'static, Meanwhile> {
        let what = self.random.u8(..8);
        let driver = self.driver.clone();
        let few = self.snapshots.len() < MAX_SNAPSHOTS && self.case.refcount_bits >= 8;
        if what == 0 && few {
            let new = NewSnapshot::named(format!("meanwhile {}", self.step));
            return async move { Meanwhile::Created(driver.create(new).await.unwrap().id) }.boxed();
        }
        if self.snapshots.is_empty() {
            return async { Meanwhile::Nothing }.boxed();
        }
        let index = self.random.usize(..self.snapshots.len());
        let id = self.snapshots[index].0.clone();
        let which = by_id(&id);
        match what {
            1 if !self.is_viewed(&id) => async move {
                driver.delete(which).await.unwrap();
                Meanwhile::Deleted(id)
            }
            .boxed(),
            2..=3 => async move {
                let view = driver.view(which).await.unwrap();
                let content = view.read(0, view.size()).await.unwrap();
                Meanwhile::Viewed(id, content.to_bytes().to_vec())
            }
            .boxed(),
            _ => async { Meanwhile::Nothing }.boxed(),
        }
    }

    async fn read_snapshot(&self, wanted: &str) -> Vec<u8> {
        let headers = layers::snapshot_headers(&self.disk.child()).await;
        let found = headers.into_iter().find(|(id, _)| id == wanted);
        let (_, header) = found.unwrap();
        self.read_as_image(&self.disk, header).await
    }

    fn request(&mut self) -> Request {
        let (at, len) = self.range(512);
        match self.random.u8(..10) {
            0..=4 => Request::Write {
                at,
                len,
                stamp: self.next_stamp(),
            },
            5..=6 => Request::Zero {
                at,
                len,
                may_unmap: self.random.bool(),
            },
            7 => Request::Discard { at, len },
            8 => Request::Read { at, len },
            _ => Request::Flush,
        }
    }

    fn assert_explained(&self, at: u64, is: &[u8], requests: &[Request], old: Old) {
        for (nth, block) in is.chunks(512).enumerate() {
            let at = at + nth as u64 * 512;
            let replaced = requests.iter().any(|request| request.replaces(at));
            let is_old = block == self.active.slice(at, block.len());
            let fits = (is_old && (old == Old::Allowed || !replaced))
                || requests
                    .iter()
                    .any(|request| request.explains(at, block, &self.active));
            assert!(
                fits,
                "{}: block at {at:#x} after {requests:?}",
                self.place()
            );
        }
    }
}

/// Whether old bytes may be seen where a request replaces them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Old {
    /// The requests are still under way.
    Allowed,
    /// They have been answered.
    Replaced,
}

fn send<'a>(driver: &'a Arc<Qcow2>, request: &Request) -> BoxFuture<'a, Vec<u8>> {
    let flags = WriteFlags::default();
    match *request {
        Request::Write { at, len, stamp } => {
            let data = pattern(at, len as usize, stamp).into();
            let write = driver.write(at, data, flags);
            write.map(|done| done.map(|()| Vec::new()).unwrap()).boxed()
        }
        Request::Zero { at, len, may_unmap } => {
            let flags = ZeroFlags {
                may_unmap,
                ..ZeroFlags::default()
            };
            let zero = driver.write_zeroes(at, len, flags);
            zero.map(|done| done.map(|()| Vec::new()).unwrap()).boxed()
        }
        Request::Discard { at, len } => {
            let discard = driver.discard(at, len);
            discard
                .map(|done| done.map(|()| Vec::new()).unwrap())
                .boxed()
        }
        Request::Read { at, len } => {
            let read = driver.read(at, len);
            read.map(|data| data.unwrap().to_bytes().to_vec()).boxed()
        }
        Request::Flush => {
            let flush = driver.flush();
            flush.map(|done| done.map(|()| Vec::new()).unwrap()).boxed()
        }
    }
}
