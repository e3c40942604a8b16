//! An open image that becomes read-only, or writable, while it is read.
//!
//! What is in memory stays true meanwhile: an image that is open for reading keeps other programs from writing to it. So an image
//! that was writable only has to be clean before it is read-only, and needs nothing to be writable again; one that was opened for
//! reading reads what only writers need.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::alloc::Allocator;
use super::gate::Exclusive;
use super::header::Incompatible;
use super::image::Image;
use super::open::{Tables, read_header};
use crate::driver::{Child, ReopenOptions, Reopening};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::QCOW2_SETTLE_ON_CLOSE;

/// An image that is ready. Requests wait until it is committed or dropped.
pub(super) struct Reopened {
    image: Arc<Image>,
    options: ReopenOptions,
    _alone: Exclusive,
}

impl Reopening for Reopened {
    fn commit(self: Box<Self>) {
        let Reopened { image, options, .. } = *self;
        // Bitmaps and feature bits are looked at again before the next change.
        image.prepared.store(false, Ordering::Release);
        image.read_only.store(options.read_only, Ordering::Release);
        if let Some(bytes) = image.tuning.set(options.settings, options.file) {
            image.l2.set_size(bytes);
        }
    }
}

impl Image {
    /// Makes it ready to be read-only, or to be written to, and to lie in another file. Cancellation: run to the end by the caller.
    pub(super) async fn reopen(self: Arc<Self>, options: ReopenOptions) -> Result<Reopened> {
        let read_only = options.read_only;
        if read_only && !self.is_read_only() {
            // While requests go on, as far as it goes.
            self.settle_until(Instant::now() + QCOW2_SETTLE_ON_CLOSE)
                .await;
            self.check_settled()?;
        }
        let alone = self.gate.close().await;
        self.check_range(0, 0)?;
        match (self.is_read_only(), read_only) {
            (false, true) => self.clean_up().await?,
            (true, false) => self.load_for_writing().await?,
            (false, false) | (true, true) => {}
        }
        if let Some(file) = &options.file {
            self.check_file(&file.child).await?;
        }
        Ok(Reopened {
            image: self,
            options,
            _alone: alone,
        })
    }

    /// Whether the image goes on in this file: what is in memory is about the image as it is. Under the closed gate.
    async fn check_file(&self, file: &Child) -> Result<()> {
        if !self.is_read_only() {
            self.write_back_all().await?;
            self.file.flush().await?;
        }
        let same_size = file.size() == self.file.size();
        let len = self.g.cluster_size().min(self.file.size());
        let is_same = same_size
            && file.limits().growable == self.file.limits().growable
            && file.read(0, len).await?.to_bytes() == self.file.read(0, len).await?.to_bytes();
        match is_same {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::InvalidInput,
                "qcow2: the new 'file' does not show the image that is open",
            )),
        }
    }

    /// Leaves the image in the file as `close` would. Under the closed gate.
    async fn clean_up(&self) -> Result<()> {
        let alone = self.stop_punching().await;
        self.settle_to_close(&alone).await;
        self.write_back_all().await?;
        self.mark_clean().await?;
        match self.is_marked_dirty() {
            false => self.check_settled(),
            true => Err(refused("its refcounts are not known to be right")),
        }
    }

    fn check_settled(&self) -> Result<()> {
        if self.settling.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InUse,
            format!(
                "qcow2: refcounts of {} tables are still being brought up to date behind snapshot operations",
                self.settling.unsettled_tables()
            ),
        ))
    }

    /// Reads what only writers need. Under the closed gate; an image that is not written to does not use it.
    async fn load_for_writing(&self) -> Result<()> {
        self.damage.check()?;
        if self.can_write.load(Ordering::Acquire) {
            return Ok(());
        }
        let header = read_header(&self.file).await?;
        if header != *self.header.get() {
            return Err(refused("it was changed by another program"));
        }
        if header.incompatible.has(Incompatible::CORRUPT) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "qcow2: Image is corrupt; cannot be opened read/write",
            ));
        }
        if header.incompatible.has(Incompatible::DIRTY) {
            return Err(refused(
                "its refcounts need a repair, which opening it for writing does",
            ));
        }
        let Tables {
            reftable, owners, ..
        } = Tables::load(&self.file, &header, false).await?;
        self.owners.adopt(owners);
        let (metadata, cell) = (self.metadata.clone(), self.header.clone());
        let loaded = Allocator::new(metadata, cell, reftable, self.tuning.clone());
        *self.alloc.lock().await = loaded;
        self.can_write.store(true, Ordering::Release);
        Ok(())
    }
}

fn refused(reason: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("qcow2: the image cannot be reopened: {reason}"),
    )
}
