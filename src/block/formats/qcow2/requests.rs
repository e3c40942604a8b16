//! The driver's contract, put together from the operations.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::header::{Compatible, Incompatible, Version};
use super::image::Image;
use crate::driver::{
    AmendOptions, BlockStatus, BoxFuture, Child, Driver, DriverInfo, FormatSpecific, Preallocation,
    ReopenOptions, Reopening, RequestLimits, Requests, Snapshots, WriteFlags, ZeroFlags,
};
use crate::error::Result;
use crate::io::{Data, HostRange, RunToEnd};

impl Image {
    async fn write(self: &Arc<Self>, offset: u64, data: Data, flags: WriteFlags) -> Result<()> {
        {
            let _inside = self.gate.enter().await;
            self.check_range(offset, data.len())?;
            self.prepare_change().await?;
            self.write_range(offset, data).await?;
        }
        self.finish_change(flags.fua).await
    }

    async fn write_pieces(self: &Arc<Self>, pieces: Vec<(u64, Data)>) -> Result<()> {
        {
            let _inside = self.gate.enter().await;
            for (at, data) in &pieces {
                self.check_range(*at, data.len())?;
            }
            self.prepare_change().await?;
            self.write_scattered(pieces).await?;
        }
        self.finish_change(false).await
    }

    async fn write_zeroes(self: &Arc<Self>, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        {
            let _inside = self.gate.enter().await;
            self.check_range(offset, len)?;
            self.prepare_change().await?;
            if len > 0 {
                self.zero_range(offset, len, flags).await?;
            }
        }
        self.finish_change(flags.fua).await
    }

    async fn write_compressed(self: &Arc<Self>, offset: u64, data: Data) -> Result<()> {
        {
            let _inside = self.gate.enter().await;
            self.check_range(offset, data.len())?;
            self.prepare_change().await?;
            self.write_compressed_cluster(offset, data).await?;
        }
        self.finish_change(false).await
    }

    async fn write_shared(self: &Arc<Self>, offset: u64, from: HostRange) -> Result<()> {
        {
            let _inside = self.gate.enter().await;
            self.check_range(offset, from.len())?;
            self.prepare_change().await?;
            self.share_range(offset, from).await?;
        }
        self.finish_change(false).await
    }

    async fn discard(self: &Arc<Self>, offset: u64, len: u64) -> Result<()> {
        {
            let _inside = self.gate.enter().await;
            self.check_range(offset, len)?;
            self.prepare_change().await?;
            if len > 0 {
                self.discard_range(offset, len).await?;
            }
        }
        self.finish_change(false).await
    }

    /// Makes a change durable if it is to be, and what has come together before it when that is much. It has left the gate.
    async fn finish_change(self: &Arc<Self>, fua: bool) -> Result<()> {
        if !fua {
            self.relieve_behind().await;
            return Ok(());
        }
        let _inside = self.gate.enter_unnoticed().await;
        match self.is_closed() {
            // That has written everything.
            true => Ok(()),
            false => self.write_back().await,
        }
    }

    async fn flush(&self) -> Result<()> {
        let _flushing = self.gate.enter_flush().await;
        let _inside = self.gate.enter().await;
        if self.is_read_only() {
            return Ok(());
        }
        self.write_back().await?;
        // What was written before this image was put on another: that one is asked until it is read-only.
        match self.backing() {
            Some(backing) => backing.flush().await,
            None => Ok(()),
        }
    }

    async fn close(&self) -> Result<()> {
        let _alone = self.gate.close().await;
        // Until it is closed: another program may use those clusters then.
        let alone = self.stop_punching().await;
        if !self.is_read_only() && !self.is_closed() {
            self.settle_to_close(&alone).await;
            self.write_back_all().await?;
            self.mark_clean().await?;
        }
        self.closed.store(true, Ordering::Release);
        Ok(())
    }
}

impl Qcow2 {
    /// Starts an operation on the image that ends even when nobody waits for it any more.
    pub(super) fn run<T, F>(&self, operation: impl FnOnce(Arc<Image>) -> F) -> RunToEnd<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let image = self.image.clone();
        let operation = operation(image.clone());
        RunToEnd::new(async move {
            let answer = operation.await;
            // Before the answer: who gets an error for damage finds the image marked.
            if image.damage.is_unmarked() {
                image.damage.mark(&image.header).await;
            }
            answer
        })
    }
}

impl Requests for Qcow2 {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn limits(&self) -> RequestLimits {
        RequestLimits {
            alignment: 1,
            preferred: self.image.g.subcluster_size() as u32,
            growable: false,
        }
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        Box::pin(async move {
            let _inside = self.image.gate.enter().await;
            self.image.check_range(offset, len)?;
            self.image.read_range(offset, len).await
        })
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move {
            let write = || image.write(offset, data.clone(), flags);
            image.with_space(write).await
        }))
    }

    fn write_pieces(&self, pieces: Vec<(u64, Data)>) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move {
            let write = || image.write_pieces(pieces.clone());
            image.with_space(write).await
        }))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move {
            let zero = || image.write_zeroes(offset, len, flags);
            image.with_space(zero).await
        }))
    }

    fn write_compressed(&self, offset: u64, data: Data) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move {
            let write = || image.write_compressed(offset, data.clone());
            image.with_space(write).await
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move {
            let discard = || image.discard(offset, len);
            image.with_space(discard).await
        }))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(|image| async move { image.flush().await }))
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            let _inside = self.image.gate.enter().await;
            self.image.check_range(offset, len)?;
            self.image.status(offset, len).await
        })
    }

    fn host_range(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Option<HostRange>>> {
        Box::pin(async move {
            let _inside = self.image.gate.enter().await;
            self.image.check_range(offset, len)?;
            self.image.host_range(offset, len).await
        })
    }

    fn write_shared(&self, offset: u64, from: HostRange) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move {
            let share = || image.write_shared(offset, from.clone());
            image.with_space(share).await
        }))
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move {
            let resize = || image.change_size(size, preallocation);
            image.with_space(resize).await
        }))
    }
}

impl Driver for Qcow2 {
    fn info(&self) -> DriverInfo {
        let header = self.image.header.get();
        let v3 = header.version == Version::V3;
        DriverInfo {
            driver: "qcow2",
            filename: self.image.tuning.filename(),
            cluster_size: Some(self.image.g.cluster_size()),
            backing_filename: header.backing_name.clone(),
            backing_format: header.backing_format(),
            specific: FormatSpecific::Qcow2 {
                data_file: header.data_file_name(),
                data_file_raw: self
                    .image
                    .data
                    .is_external()
                    .then(|| self.image.data.is_raw()),
                compat: if v3 { "1.1" } else { "0.10" },
                lazy_refcounts: v3.then(|| header.compatible.has(Compatible::LAZY_REFCOUNTS)),
                refcount_bits: self.image.g.refcount_bits(),
                corrupt: v3.then(|| header.incompatible.has(Incompatible::CORRUPT)),
                extended_l2: v3.then(|| header.incompatible.has(Incompatible::EXTENDED_L2)),
                compression_type: self.image.compression.name(),
                bitmaps: self.image.bitmaps.info(),
            },
            dirty: header.incompatible.has(Incompatible::DIRTY),
            unsettled_tables: self.image.settling.unsettled_tables(),
            ..DriverInfo::default()
        }
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        let mut children = vec![("file", self.image.file.clone())];
        if self.image.data.is_external() {
            children.push(("data-file", self.image.data.child().clone()));
        }
        let backing = self.image.backing();
        children.extend(backing.map(|child| ("backing", (*child).clone())));
        children
    }

    fn check_backing(&self) -> Result<()> {
        self.image.data.check_backing(true)
    }

    fn set_backing(&self, backing: Option<Child>) {
        self.image.set_backing(backing);
    }

    fn amend(&self, options: AmendOptions) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(move |image| async move { image.amend(&options).await }))
    }

    fn reopen(&self, options: ReopenOptions) -> BoxFuture<'_, Result<Box<dyn Reopening>>> {
        Box::pin(self.run(move |image| async move {
            let reopened = image.reopen(options).await?;
            Ok(Box::new(reopened) as Box<dyn Reopening>)
        }))
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.run(|image| async move { image.close().await }))
    }
}
