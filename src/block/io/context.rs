//! What all files of a process share: the ring and the pool, started when first needed, and memory for reads.

use std::io;
use std::sync::{Arc, OnceLock};

use super::buffer::Buffer;
use super::operation::Operation;
use super::pool::Pool;
use super::ring::Ring;
use super::spares::Spares;

/// The engines that run what would block. Cheap to clone; the last clone to go ends the threads, after
/// everything in flight has ended. The daemon makes one and gives it to everything that opens files.
#[derive(Clone)]
pub struct IoContext(Arc<Engines>);

struct Engines {
    pool: Pool,
    spares: Arc<Spares>,
    /// `None` inside: the kernel refused.
    ring: OnceLock<Option<Ring>>,
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
        IoContext(Arc::new(Engines {
            pool: Pool::new(),
            spares: Arc::default(),
            ring: OnceLock::new(),
        }))
    }

    /// Memory for a read of `len` bytes, at a multiple of `alignment`. `OutOfMemory` when there is none.
    pub(crate) fn buffer(&self, len: usize, alignment: usize) -> io::Result<Buffer> {
        self.0.spares.buffer(len, alignment)
    }

    /// Runs an operation and gives it back. Cancellation: it runs to its end anyway.
    pub(crate) async fn run(
        &self,
        kind: EngineKind,
        mut operation: Operation,
    ) -> io::Result<Operation> {
        if kind == EngineKind::Ring
            && let Some(ring) = self.ring()
        {
            return ring.run(operation).await;
        }
        self.call(move || {
            operation.run()?;
            Ok(operation)
        })
        .await
    }

    /// Runs a blocking call on the pool. Cancellation: it runs to its end anyway.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.0.pool.run(call).await
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
