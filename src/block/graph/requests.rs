//! Requests on nodes and on edges: in by the gate, and what the node does with them before its driver sees them.

use std::sync::Arc;

use super::counters::RequestKind;
use super::edge::{Edge, Inside, Way};
use super::node::{Inner, Node};
use crate::driver::{
    BlockStatus, BoxFuture, Preallocation, RequestLimits, Requests, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Data, Entered, Gate, HostRange, RunToEnd};
use crate::limits::{MAX_DISK_SIZE, MAX_REQUEST};
use crate::open::{DetectZeroes, DiscardMode};

impl Inner {
    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= MAX_DISK_SIZE);
        let inside = |end| end <= self.driver.size() || self.driver.limits().growable;
        if end.is_some_and(inside) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfRange,
            format!(
                "Request at {offset} of {len} bytes is outside of node '{}'",
                self.name.as_str()
            ),
        ))
    }

    fn check_writable(&self) -> Result<()> {
        if self.behaviour().read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("Node '{}' is read only", self.name.as_str()),
            ));
        }
        Ok(())
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Data> {
        self.check_range(offset, len)?;
        if len > MAX_REQUEST {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("A read of {len} bytes is more than the {MAX_REQUEST} allowed at once"),
            ));
        }
        self.counted(RequestKind::Read, len, self.read_aligned(offset, len))
            .await
    }

    async fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, data.len())?;
        self.counters.writes_up_to(offset + data.len());
        let behaviour = self.behaviour();
        let flags = WriteFlags {
            fua: flags.fua || behaviour.cache.writethrough,
            ..flags
        };
        if behaviour.detect_zeroes != DetectZeroes::Off && data.reads_as_zeroes() {
            let flags = ZeroFlags {
                may_unmap: behaviour.detect_zeroes == DetectZeroes::Unmap
                    && behaviour.discard == DiscardMode::Unmap,
                fua: flags.fua,
                no_fallback: false,
            };
            let zero = self.zero_aligned(offset, data.len(), flags);
            return self.counted(RequestKind::Write, data.len(), zero).await;
        }
        let len = data.len();
        let write = self.write_aligned(offset, data, flags);
        self.counted(RequestKind::Write, len, write).await
    }

    /// Pieces of whole blocks at once, others one after another.
    async fn write_pieces(&self, pieces: Vec<(u64, Data)>) -> Result<()> {
        if !self.takes_pieces(&pieces) {
            for (at, data) in pieces {
                self.write(at, data, WriteFlags::default()).await?;
            }
            return Ok(());
        }
        self.check_writable()?;
        let mut bytes = 0;
        for (at, data) in &pieces {
            self.check_range(*at, data.len())?;
            self.counters.writes_up_to(at + data.len());
            bytes += data.len();
        }
        let write = self.pieces_aligned(pieces);
        self.counted(RequestKind::Write, bytes, write).await?;
        self.written_through().await
    }

    /// Whether the driver may be given these pieces as they are.
    fn takes_pieces(&self, pieces: &[(u64, Data)]) -> bool {
        self.behaviour().detect_zeroes == DetectZeroes::Off
            && pieces
                .iter()
                .all(|(at, data)| self.is_whole_blocks(*at, data.len()))
    }

    async fn write_compressed(&self, offset: u64, data: Data) -> Result<()> {
        self.check_writable()?;
        let len = data.len();
        self.check_range(offset, len)?;
        self.counters.writes_up_to(offset + len);
        let write = self.driver.write_compressed(offset, data);
        self.counted(RequestKind::Write, len, write).await?;
        self.written_through().await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        self.counters.writes_up_to(offset + len);
        let behaviour = self.behaviour();
        let flags = ZeroFlags {
            may_unmap: flags.may_unmap && behaviour.discard == DiscardMode::Unmap,
            fua: flags.fua || behaviour.cache.writethrough,
            no_fallback: flags.no_fallback,
        };
        let zero = self.zero_aligned(offset, len, flags);
        self.counted(RequestKind::WriteZeroes, len, zero).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        if self.behaviour().discard == DiscardMode::Ignore {
            return Ok(());
        }
        let discard = self.discard_aligned(offset, len);
        self.counted(RequestKind::Discard, len, discard).await
    }

    async fn flush(&self) -> Result<()> {
        // Nothing has been written since it became so, and before that it was flushed.
        if self.behaviour().read_only {
            return Ok(());
        }
        self.counted(RequestKind::Flush, 0, self.driver.flush())
            .await
    }

    async fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.check_range(offset, len)?;
        self.status_aligned(offset, len).await
    }

    async fn host_range(&self, offset: u64, len: u64) -> Result<Option<HostRange>> {
        self.check_range(offset, len)?;
        self.driver.host_range(offset, len).await
    }

    async fn write_shared(&self, offset: u64, from: HostRange) -> Result<()> {
        self.check_writable()?;
        let len = from.len();
        self.check_range(offset, len)?;
        let behaviour = self.behaviour();
        // What is not seen cannot be searched for zeroes.
        if behaviour.detect_zeroes != DetectZeroes::Off {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "Node '{}' looks for zeroes in what is written",
                    self.name.as_str()
                ),
            ));
        }
        let shared = self.share_aligned(offset, from).await;
        // What cannot be shared is written otherwise, and counted then.
        if !matches!(&shared, Err(error) if error.kind() == ErrorKind::Unsupported) {
            self.counters.writes_up_to(offset + len);
            self.counters.count(RequestKind::Write, len, shared.is_ok());
        }
        shared?;
        self.written_through().await
    }

    /// Behind a write that cannot carry FUA.
    async fn written_through(&self) -> Result<()> {
        match self.behaviour().cache.writethrough {
            true => self.driver.flush().await,
            false => Ok(()),
        }
    }

    async fn counted<T>(
        &self,
        kind: RequestKind,
        bytes: u64,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let result = request.await;
        self.counters.count(kind, bytes, result.is_ok());
        result
    }
}

/// As [`run`], for a write. One that has to be durable when it is answered waits for the disk as a flush does.
fn run_write<F>(
    way: Way,
    fua: bool,
    request: impl FnOnce(Inside) -> F + Send + 'static,
) -> RunToEnd<Result<()>>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    RunToEnd::new(async move {
        let is_durable = |inner: &Inner| fua || inner.behaviour().cache.writethrough;
        let (_flushing, inside) = enter_to_flush(&way, is_durable).await;
        inside.place().check_open()?;
        request(inside).await
    })
}

/// Enters by `way`. What waits for the disk, as `flushes` says of the place, is known before it enters the gate: who closes that waits
/// for it first.
async fn enter_to_flush(
    way: &Way,
    flushes: impl Fn(&Inner) -> bool,
) -> (Option<Entered<Arc<Gate>>>, Inside) {
    loop {
        let inner = way.target();
        let flushing = match flushes(&inner) {
            true => Some(Gate::enter_by(inner.flushes.clone()).await),
            false => None,
        };
        let inside = Gate::enter_by(inner).await;
        if way.leads_to(inside.place()) {
            return (flushing, inside);
        }
    }
}

/// Enters by `way` and does `request` inside.
fn run<T, F>(way: Way, request: impl FnOnce(Inside) -> F + Send + 'static) -> RunToEnd<Result<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    RunToEnd::new(async move {
        let inside = way.enter().await;
        inside.place().check_open()?;
        request(inside).await
    })
}

async fn flush(way: Way) -> Result<()> {
    let (_flushing, inside) = enter_to_flush(&way, |_| true).await;
    inside.place().check_open()?;
    inside.place().flush().await
}

async fn resize(way: Way, size: u64, preallocation: Preallocation) -> Result<()> {
    if size > MAX_DISK_SIZE {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("A disk of {size} bytes is larger than the {MAX_DISK_SIZE} allowed"),
        ));
    }
    loop {
        let inner = way.target();
        let _one = inner.resizing.lock().await;
        let _flushes = inner.flushes.close().await;
        let inside = Gate::enter_by(inner.clone()).await;
        if !way.leads_to(&inner) {
            continue;
        }
        // Nobody may be writing to what is cut off.
        let _alone = inner.gate.close_around(&inside).await;
        inner.check_open()?;
        inner.check_writable()?;
        return inner.driver.resize(size, preallocation).await;
    }
}

/// The data path of what has a `way` in, and can be looked at. Each request comes in two forms: as users know it, and without the box
/// around it for what puts it into one of its own.
macro_rules! requests_by_way {
    ($place:ty) => {
        impl $place {
            pub(super) fn start_read(&self, offset: u64, len: u64) -> RunToEnd<Result<Data>> {
                run(self.way(), move |inside| async move {
                    inside.place().read(offset, len).await
                })
            }

            pub(super) fn start_write(
                &self,
                offset: u64,
                data: Data,
                flags: WriteFlags,
            ) -> RunToEnd<Result<()>> {
                run_write(self.way(), flags.fua, move |inside| async move {
                    inside.place().write(offset, data, flags).await
                })
            }

            pub(super) fn start_write_zeroes(
                &self,
                offset: u64,
                len: u64,
                flags: ZeroFlags,
            ) -> RunToEnd<Result<()>> {
                run_write(self.way(), flags.fua, move |inside| async move {
                    inside.place().write_zeroes(offset, len, flags).await
                })
            }

            pub(super) fn start_discard(&self, offset: u64, len: u64) -> RunToEnd<Result<()>> {
                run(self.way(), move |inside| async move {
                    inside.place().discard(offset, len).await
                })
            }

            pub(super) fn start_flush(&self) -> RunToEnd<Result<()>> {
                RunToEnd::new(flush(self.way()))
            }
        }

        impl Requests for $place {
            fn size(&self) -> u64 {
                self.look(|inner| inner.driver.size())
            }

            fn size_by_now(&self) -> u64 {
                self.look(|inner| inner.driver.size_by_now())
            }

            fn limits(&self) -> RequestLimits {
                RequestLimits {
                    // Whatever the driver needs, the node takes anything.
                    alignment: 1,
                    ..self.look(|inner| inner.driver.limits())
                }
            }

            fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
                Box::pin(self.start_read(offset, len))
            }

            fn write(
                &self,
                offset: u64,
                data: Data,
                flags: WriteFlags,
            ) -> BoxFuture<'_, Result<()>> {
                Box::pin(self.start_write(offset, data, flags))
            }

            fn write_pieces(&self, pieces: Vec<(u64, Data)>) -> BoxFuture<'_, Result<()>> {
                Box::pin(run_write(self.way(), false, move |inside| async move {
                    inside.place().write_pieces(pieces).await
                }))
            }

            fn write_compressed(&self, offset: u64, data: Data) -> BoxFuture<'_, Result<()>> {
                Box::pin(run_write(self.way(), false, move |inside| async move {
                    inside.place().write_compressed(offset, data).await
                }))
            }

            fn write_zeroes(
                &self,
                offset: u64,
                len: u64,
                flags: ZeroFlags,
            ) -> BoxFuture<'_, Result<()>> {
                Box::pin(self.start_write_zeroes(offset, len, flags))
            }

            fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
                Box::pin(self.start_discard(offset, len))
            }

            fn flush(&self) -> BoxFuture<'_, Result<()>> {
                Box::pin(self.start_flush())
            }

            fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
                Box::pin(run(self.way(), move |inside| async move {
                    inside.place().block_status(offset, len).await
                }))
            }

            fn host_range(
                &self,
                offset: u64,
                len: u64,
            ) -> BoxFuture<'_, Result<Option<HostRange>>> {
                Box::pin(run(self.way(), move |inside| async move {
                    inside.place().host_range(offset, len).await
                }))
            }

            fn write_shared(&self, offset: u64, from: HostRange) -> BoxFuture<'_, Result<()>> {
                Box::pin(run_write(self.way(), false, move |inside| async move {
                    inside.place().write_shared(offset, from).await
                }))
            }

            fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
                Box::pin(RunToEnd::new(resize(self.way(), size, preallocation)))
            }
        }
    };
}

requests_by_way!(Node);
requests_by_way!(Edge);
