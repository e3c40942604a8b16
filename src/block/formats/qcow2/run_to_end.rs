//! Operations that outlive the caller who stops waiting for them.
//!
//! A dropped future does not stop the writes that it has started: they may land at any later time. Was their host
//! cluster given to somebody else meanwhile, they would destroy data. So a change of the image is never abandoned
//! half way: when its caller drops it, what is left of it runs to its end as a task of the runtime, with all its
//! locks and reservations. `close` waits for such tasks, because they are inside the image's gate.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::driver::BoxFuture;

/// An operation that runs to its end even when dropped; dropped before its first poll it does nothing.
pub(super) struct RunToEnd<T: Send + 'static> {
    started: bool,
    operation: Option<BoxFuture<'static, T>>,
}

impl<T: Send + 'static> RunToEnd<T> {
    /// Wraps `operation`, which starts when first polled.
    pub(super) fn new(operation: impl Future<Output = T> + Send + 'static) -> Self {
        RunToEnd {
            started: false,
            operation: Some(Box::pin(operation)),
        }
    }
}

impl<T: Send + 'static> Future for RunToEnd<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.started = true;
        let Some(operation) = self.operation.as_mut() else {
            unreachable!("polled after completion");
        };
        let answer = operation.as_mut().poll(cx);
        if answer.is_ready() {
            self.operation = None;
        }
        answer
    }
}

impl<T: Send + 'static> Drop for RunToEnd<T> {
    fn drop(&mut self) {
        if !self.started || std::thread::panicking() {
            return;
        }
        let Some(operation) = self.operation.take() else {
            return;
        };
        match tokio::runtime::Handle::try_current() {
            // The task ends by itself; the image's gate counts it until then.
            Ok(runtime) => drop(runtime.spawn(operation)),
            // Without a runtime its I/O cannot be awaited: what it holds must never be reused.
            Err(_) => std::mem::forget(operation),
        }
    }
}
