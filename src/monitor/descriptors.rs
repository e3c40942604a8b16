//! File descriptors that come with the bytes of a Unix socket (SCM_RIGHTS).
//!
//! A command that wants one (`getfd`, `add-fd`) takes it from its session. Descriptors that no
//! command took are closed when the next ones come, as in QEMU, and when the session ends: a client
//! cannot pile them up.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::unix::OwnedReadHalf;

use crate::limits;

/// The descriptors that one client sent last. Clones are the same place.
#[derive(Debug, Clone, Default)]
pub(super) struct Descriptors {
    received: Arc<Mutex<Vec<OwnedFd>>>,
}

impl Descriptors {
    /// The first descriptor that has not been taken.
    pub(super) fn take(&self) -> Option<OwnedFd> {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        (!received.is_empty()).then(|| received.remove(0))
    }

    fn replace(&self, descriptors: Vec<OwnedFd>) {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        *received = descriptors;
    }
}

/// Reads a Unix socket together with the descriptors that come along.
#[derive(Debug)]
pub(super) struct UnixReader {
    socket: OwnedReadHalf,
    descriptors: Descriptors,
}

impl UnixReader {
    pub(super) fn new(socket: OwnedReadHalf, descriptors: Descriptors) -> UnixReader {
        UnixReader {
            socket,
            descriptors,
        }
    }

    fn receive(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(limits::QMP_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let stream = self.socket.as_ref();
        let received = stream.try_io(Interest::READABLE, || {
            let mut slices = [IoSliceMut::new(bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            Ok(recvmsg(stream, &mut slices, &mut control, flags)?)
        })?;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if !descriptors.is_empty() {
            self.descriptors.replace(descriptors);
        }
        Ok(received.bytes)
    }
}

impl AsyncRead for UnixReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.socket.as_ref().poll_read_ready(cx))?;
            match self.receive(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(length) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}
