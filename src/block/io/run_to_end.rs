//! Requests that run to their end whoever stops waiting.
//!
//! A driver's request that is dropped in its middle may have writes in the kernel that land later. Were it to
//! leave the node's gate at that moment, a snapshot taken behind the closed gate could still be written to.
//! So a dropped request is handed to the runtime, which finishes it; it leaves the gate when it is done.
//!
//! Requests of a node are inside of those of the nodes on it, and a chain of images may be long. So that the stack need not be as
//! deep as that, requests far inside become tasks of their own, for which the one outside waits.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

use crate::limits::NESTED_REQUESTS;

thread_local! {
    /// How many requests are being polled on this thread's stack, each inside of the one before.
    static NESTED: Cell<usize> = const { Cell::new(0) };
}

/// A request that is on the stack.
struct Nested;

impl Nested {
    fn enter() -> Self {
        NESTED.set(NESTED.get() + 1);
        Nested
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        NESTED.set(NESTED.get() - 1);
    }
}

type Request<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A future that is finished by the runtime when it is dropped after its first poll.
pub struct RunToEnd<T: Send + 'static> {
    /// `None` once it has answered.
    request: Option<Request<T>>,
    begun: bool,
}

impl<T: Send + 'static> RunToEnd<T> {
    /// Wraps `request`, which starts when first polled.
    pub fn new(request: impl Future<Output = T> + Send + 'static) -> Self {
        RunToEnd {
            request: Some(Box::pin(request)),
            begun: false,
        }
    }
}

impl<T: Send + 'static> fmt::Debug for RunToEnd<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunToEnd")
            .field("begun", &self.begun)
            .finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Future for RunToEnd<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        if !self.begun && NESTED.get() >= NESTED_REQUESTS {
            self.request = self.request.take().map(as_task);
        }
        self.begun = true;
        let Some(request) = &mut self.request else {
            unreachable!("polled after its answer");
        };
        let _nested = Nested::enter();
        let answer = request.as_mut().poll(context);
        if answer.is_ready() {
            self.request = None;
        }
        answer
    }
}

/// The request as a task, where there is a runtime. The task ends by itself, whoever waits for it.
fn as_task<T: Send + 'static>(request: Request<T>) -> Request<T> {
    let Ok(runtime) = Handle::try_current() else {
        return request;
    };
    let task = runtime.spawn(request);
    Box::pin(async move {
        match task.await {
            Ok(answer) => answer,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and with it whoever waits.
                Err(_) => std::future::pending().await,
            },
        }
    })
}

impl<T: Send + 'static> Drop for RunToEnd<T> {
    fn drop(&mut self) {
        let Some(request) = self.request.take() else {
            return;
        };
        if !self.begun || std::thread::panicking() {
            return;
        }
        match Handle::try_current() {
            // The task ends by itself; the gate that it has entered counts it until then.
            Ok(runtime) => drop(runtime.spawn(async move {
                request.await;
            })),
            // Nobody can wait for its I/O any more: what it holds must never be used by others.
            Err(_) => std::mem::forget(request),
        }
    }
}
