//! The header of an open image: read by all, changed by one write inside the first sector.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use super::header::{Header, Rewrite, SECTOR, Stage};
use crate::driver::{Child, HeaderSwitch, WriteFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;

/// While it lives nobody else changes the header.
#[derive(Debug)]
pub(crate) struct HeaderLock {
    _guard: OwnedMutexGuard<()>,
}

/// As `HeaderLock`, for a time in which guests' requests may not wait for it.
#[derive(Debug)]
pub(crate) struct HeaderKept {
    lock: HeaderLock,
    is_kept: Arc<AtomicBool>,
}

impl HeaderKept {
    /// What [`HeaderCell::update_with`] asks for.
    pub(crate) fn lock(&self) -> &HeaderLock {
        &self.lock
    }
}

impl Drop for HeaderKept {
    fn drop(&mut self) {
        self.is_kept.store(false, Ordering::SeqCst);
    }
}

/// The header, in memory as on disk.
#[derive(Debug)]
pub(crate) struct HeaderCell {
    file: Child,
    current: Mutex<Arc<Header>>,
    /// Held over a change, so that changes follow each other.
    writer: Arc<tokio::sync::Mutex<()>>,
    /// There is a `HeaderKept`.
    is_kept: Arc<AtomicBool>,
    /// A failed change could not be taken back: what is on disk is unknown, or not what it should be.
    broken: AtomicBool,
}

impl HeaderCell {
    /// The header as it was read.
    pub(crate) fn new(file: Child, header: Header) -> Self {
        HeaderCell {
            file,
            current: Mutex::new(Arc::new(header)),
            writer: Arc::default(),
            is_kept: Arc::default(),
            broken: AtomicBool::new(false),
        }
    }

    /// The present header.
    pub(crate) fn get(&self) -> Arc<Header> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }

    /// Changes fixed fields of the header with one write of the bytes that differ, and makes that durable. They lie in
    /// the first sector, so a crash leaves the old or the new header. What the new fields point to must be durable before.
    ///
    /// On error the old header is put back; where even that fails, the image takes no more changes until it is reopened.
    pub(crate) async fn update(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let writer = self.lock().await;
        self.update_with(&writer, change).await
    }

    /// As `update`, by who keeps others from changing the header.
    pub(crate) async fn update_with(
        &self,
        _: &HeaderLock,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        self.check()?;
        let old = self.get();
        let mut new = Header::clone(&old);
        change(&mut new);
        let Some(change) = difference(&old, &new) else {
            return Ok(());
        };
        self.switch(change.at, &change.after, &change.before)
            .await?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(new);
        Ok(())
    }

    /// What `update` would make of the first sector, as far as the file has one; `None` when nothing would change.
    pub(crate) async fn preview(
        &self,
        change: impl FnOnce(&mut Header),
    ) -> Result<Option<HeaderSwitch>> {
        let old = self.get();
        let mut new = Header::clone(&old);
        change(&mut new);
        let Some(Difference { at, after, .. }) = difference(&old, &new) else {
            return Ok(None);
        };
        let size = self.file.size().min(SECTOR as u64);
        let before = self.file.read(0, size).await?.to_bytes().to_vec();
        let mut sector = before.clone();
        match sector.get_mut(at..at + after.len()) {
            Some(bytes) => bytes.copy_from_slice(&after),
            None => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "The image's header is cut off",
                ));
            }
        }
        Ok(Some(HeaderSwitch {
            before,
            after: sector,
        }))
    }

    /// Keeps others from changing the header until the answer is dropped.
    pub(crate) async fn lock(&self) -> HeaderLock {
        let _guard = self.writer.clone().lock_owned().await;
        HeaderLock { _guard }
    }

    /// As `lock`, and says so: who would change it for a request that others wait for does without, or puts it off.
    pub(crate) async fn keep(&self) -> HeaderKept {
        let lock = self.lock().await;
        self.is_kept.store(true, Ordering::SeqCst);
        HeaderKept {
            lock,
            is_kept: self.is_kept.clone(),
        }
    }

    /// Whether somebody keeps it.
    pub(crate) fn is_kept(&self) -> bool {
        self.is_kept.load(Ordering::SeqCst)
    }

    /// As `lock`, but `None` when a change is being made.
    pub(crate) fn hold(&self) -> Option<HeaderLock> {
        let _guard = self.writer.clone().try_lock_owned().ok()?;
        Some(HeaderLock { _guard })
    }

    /// Changes the header in any way, its extensions and the backing file's name too; see [`Rewrite`]. At every moment, a
    /// crash leaves the old or the new header. What the new fields point to must be durable before.
    ///
    /// Errors as for `update`; `InvalidInput` and `Unsupported` where the new header breaks a rule or finds no room.
    pub(crate) async fn rewrite(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _writer = self.lock().await;
        self.check()?;
        let old = self.get();
        let mut new = Header::clone(&old);
        change(&mut new);
        if new == *old {
            return Ok(());
        }
        new.validate()?;
        let size = self.file.size().min(1 << old.cluster_bits);
        let cluster = self.file.read(0, size).await?.to_bytes();
        let plan = Rewrite::plan(&cluster, &new)?;
        let mut before = cluster.slice(..cluster.len().min(SECTOR)).to_vec();
        for (nth, stage) in plan.stages.into_iter().enumerate() {
            if let Err(error) = self.reach(&stage, &before).await {
                if nth == 0 {
                    return Err(error);
                }
                log::warn!("qcow2: the header has no names of feature bits any more: {error}");
                return Ok(());
            }
            before = stage.sector;
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            *current = Arc::new(stage.header);
        }
        if let Err(error) = self.put(SECTOR, &plan.rest).await {
            log::warn!("qcow2: parts of the old header are left behind the new one: {error}");
        }
        Ok(())
    }

    /// Makes a stage durable; `before` is the first sector as it was.
    async fn reach(&self, stage: &Stage, before: &[u8]) -> Result<()> {
        for (at, bytes) in &stage.ahead {
            self.put(*at, bytes).await?;
        }
        if !stage.ahead.is_empty() {
            self.file.flush().await?;
        }
        self.switch(0, &stage.sector, before).await
    }

    /// Whether the image may still be changed.
    pub(crate) fn check(&self) -> Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(Error::new(
                ErrorKind::Io,
                "A write of the image's header has failed; reopen the image",
            ));
        }
        Ok(())
    }

    /// The image takes no more changes of its header until it is reopened: it is not the one that it should be.
    pub(crate) fn give_up(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Writes bytes of the first sector durably; puts `before` back when that fails.
    async fn switch(&self, at: usize, bytes: &[u8], before: &[u8]) -> Result<()> {
        let Err(error) = self.write(at, bytes).await else {
            return Ok(());
        };
        if let Err(second) = self.write(at, before).await {
            self.give_up();
            log::error!("qcow2: the header is in an unknown state: {second}");
        }
        Err(error)
    }

    async fn write(&self, at: usize, bytes: &[u8]) -> Result<()> {
        self.put(at, bytes).await?;
        self.file.flush().await
    }

    async fn put(&self, at: usize, bytes: &[u8]) -> Result<()> {
        let data = Data::from(bytes.to_vec());
        self.file
            .write(at as u64, data, WriteFlags::default())
            .await
    }
}

/// The bytes of fixed fields that differ between two headers of one layout.
struct Difference {
    at: usize,
    before: Vec<u8>,
    after: Vec<u8>,
}

fn difference(old: &Header, new: &Header) -> Option<Difference> {
    let (before, after) = (old.fixed_fields(), new.fixed_fields());
    let differs = |at: &usize| before.get(*at) != after.get(*at);
    let first = (0..after.len()).find(differs)?;
    let last = (0..after.len()).rfind(differs)?;
    assert!(last < SECTOR && before.len() == after.len());
    Some(Difference {
        at: first,
        before: before[first..=last].to_vec(),
        after: after[first..=last].to_vec(),
    })
}
