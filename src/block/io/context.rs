//! What all files of a process share: the ring and the pool, started when first needed, and memory for reads.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::sync::{Arc, OnceLock};

use super::buffer::Buffer;
use super::identity::FileIdentity;
use super::names::Names;
use super::operation::Operation;
use super::pool::{Pool, Waits};
use super::remains::{Heap, Remains};
use super::ring::Ring;
use super::spares::Spares;
use super::witness::{Deed, Extent, Witness, witnessed};

/// The engines that run what would block. Cheap to clone; the last clone to go ends the threads, after
/// everything in flight has ended. The daemon makes one and gives it to everything that opens files.
#[derive(Clone)]
pub struct IoContext(Arc<Engines>);

struct Engines {
    pool: Pool,
    spares: Arc<Spares>,
    /// `None` inside: the kernel refused.
    ring: OnceLock<Option<Ring>>,
    witness: Option<Arc<dyn Witness>>,
    /// Files that were removed, and whose space is to be given back.
    heap: Heap,
}

/// Who runs the operations of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EngineKind {
    /// The pool.
    Threads,
    /// The ring; the pool where there is none.
    Ring,
}

impl IoContext {
    /// Starts no thread yet.
    pub fn new() -> Self {
        IoContext::of(None)
    }

    /// One whose deeds somebody sees. They are done by the task that asks for them, one at a time: in an order that depends on
    /// the witness alone.
    pub fn witnessed(witness: Arc<dyn Witness>) -> Self {
        IoContext::of(Some(witness))
    }

    fn of(witness: Option<Arc<dyn Witness>>) -> Self {
        IoContext(Arc::new(Engines {
            pool: Pool::new(),
            spares: Arc::default(),
            ring: OnceLock::new(),
            witness,
            heap: Heap::new(),
        }))
    }

    /// Memory for a read of `len` bytes, at a multiple of `alignment`. `OutOfMemory` when there is none.
    pub(crate) fn buffer(&self, len: usize, alignment: usize) -> io::Result<Buffer> {
        self.0.spares.buffer(len, alignment)
    }

    /// The names of files.
    pub fn names(&self) -> Names {
        Names::new(self.clone())
    }

    /// Whether this is the metadata of a block device.
    pub fn is_device(&self, metadata: &Metadata) -> bool {
        let stands_for_one =
            |witness: &Arc<dyn Witness>| witness.is_device(FileIdentity::of(metadata));
        metadata.file_type().is_block_device() || self.witness().is_some_and(stands_for_one)
    }

    pub(super) fn witness(&self) -> Option<&Arc<dyn Witness>> {
        self.0.witness.as_ref()
    }

    /// Runs an operation and gives it back. Cancellation: it runs to its end anyway.
    pub(crate) async fn run(
        &self,
        kind: EngineKind,
        mut operation: Operation,
    ) -> io::Result<Operation> {
        if let Some(witness) = self.witness() {
            pause(&**witness).await;
            let done = witnessed(&**witness, &operation.deed(), |extent| {
                operation.run_part(extent)
            });
            pause(&**witness).await;
            return done.map(|()| operation);
        }
        if kind == EngineKind::Ring
            && let Some(ring) = self.ring()
        {
            return ring.run(operation).await;
        }
        let waits = operation.waits();
        let run = move || {
            operation.run()?;
            Ok(operation)
        };
        self.0.pool.run(waits, run).await
    }

    /// Runs a blocking call on the pool. Cancellation: it runs to its end anyway.
    pub async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if let Some(witness) = self.witness() {
            pause(&**witness).await;
            return call();
        }
        self.0.pool.run(Waits::Little, call).await
    }

    /// Has the space of files that were removed given back, behind the caller, who waits only where there are too many of them.
    pub async fn release(&self, remains: Vec<Remains>) {
        if remains.is_empty() {
            return;
        }
        if let Some(service) = self.0.heap.add(remains).await
            && let Err(error) = self.0.pool.push(Box::new(|| drop(service)), Waits::ForDisk)
        {
            log::warn!("what was removed has been given back while others waited: {error}");
        }
    }

    /// As [`IoContext::call`], of something that a witness sees.
    pub(crate) async fn act(
        &self,
        deed: impl FnOnce() -> Deed,
        call: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let Some(witness) = self.witness() else {
            return self.call(call).await;
        };
        pause(&**witness).await;
        let done = witnessed(&**witness, &deed(), |extent| match extent {
            Extent::All => call(),
            Extent::Front(_) | Extent::Nothing => Ok(()),
        });
        pause(&**witness).await;
        done
    }

    fn ring(&self) -> Option<&Ring> {
        let ring = self.0.ring.get_or_init(|| {
            Ring::start()
                .inspect_err(|error| {
                    log::warn!("io_uring is not available, aio=io_uring uses threads: {error}");
                })
                .ok()
        });
        ring.as_ref()
    }
}

/// Lets other tasks go on.
async fn pause(witness: &dyn Witness) {
    for _ in 0..witness.pause() {
        tokio::task::yield_now().await;
    }
}

impl Default for IoContext {
    fn default() -> Self {
        IoContext::new()
    }
}

impl std::fmt::Debug for IoContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoContext").finish_non_exhaustive()
    }
}
