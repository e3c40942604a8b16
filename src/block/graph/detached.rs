//! Requests that run to their end whoever stops waiting.
//!
//! A driver's request that is dropped in its middle may have writes in the kernel that land later. Were it to
//! leave the node's gate at that moment, a snapshot taken behind the closed gate could still be written to.
//! So a dropped request is handed to the runtime, which finishes it; it leaves the gate when it is done.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

use crate::driver::BoxFuture;

/// A future that is finished by the runtime when it is dropped after its first poll.
pub(super) struct Detached<T: Send + 'static> {
    /// `None` once it has answered.
    request: Option<BoxFuture<'static, T>>,
    begun: bool,
}

impl<T: Send + 'static> Detached<T> {
    pub(super) fn new(request: impl Future<Output = T> + Send + 'static) -> Self {
        Detached {
            request: Some(Box::pin(request)),
            begun: false,
        }
    }
}

impl<T: Send + 'static> Future for Detached<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        self.begun = true;
        let Some(request) = &mut self.request else {
            unreachable!("polled after its answer");
        };
        let answer = request.as_mut().poll(context);
        if answer.is_ready() {
            self.request = None;
        }
        answer
    }
}

impl<T: Send + 'static> Drop for Detached<T> {
    fn drop(&mut self) {
        let Some(request) = self.request.take() else {
            return;
        };
        // Without a runtime the process is on its way out, and nothing is sent any more.
        if self.begun
            && !std::thread::panicking()
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(async move {
                request.await;
            });
        }
    }
}
