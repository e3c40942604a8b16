//! Guests that write while a command runs, each to a sector of its disk that nothing else writes to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::crashlab::content::{Content, SECTOR};
use block::driver::{Requests as _, WriteFlags};
use block::graph::Edge;
use futures_util::future::{join, join_all};

use super::script::DISK_BYTES;
use super::tape::Tape;

/// Where they write.
const PLACE: u64 = DISK_BYTES - SECTOR;

/// A write of a guest: its sector full of one byte, which is greater with each write.
#[derive(Debug, Clone)]
pub(super) struct Written {
    pub(super) byte: u8,
    /// It was answered well.
    pub(super) is_done: bool,
    /// Records when it was sent, and when a flush behind it was answered, if one was.
    pub(super) begun: usize,
    pub(super) flushed: Option<usize>,
}

/// Runs a command, and the guests of disks while it does; `first` is the byte of their first write. Answers what they have written.
pub(super) async fn beside<T>(
    command: impl Future<Output = T>,
    edges: Vec<Edge>,
    tape: &Tape,
    first: u8,
) -> (T, Vec<Vec<Written>>) {
    let done = AtomicBool::new(false);
    let command = async {
        let answer = command.await;
        done.store(true, Ordering::SeqCst);
        answer
    };
    let guests = edges
        .into_iter()
        .map(|edge| write_on(edge, &done, tape, first));
    join(command, join_all(guests)).await
}

/// How many bytes a guest takes for one command.
pub(super) const WRITES: u8 = 3;

/// A guest writes when a command begins, and again as soon as that has led it elsewhere, with flushes in between.
async fn write_on(edge: Edge, done: &AtomicBool, tape: &Tape, first: u8) -> Vec<Written> {
    let mut all = Vec::new();
    let before = edge.node();
    for nth in 0..WRITES {
        let is_last = nth + 1 == WRITES;
        while is_last && Arc::ptr_eq(&edge.node(), &before) && !done.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
        let byte = first + nth;
        let begun = tape.len();
        let data = vec![byte; SECTOR as usize];
        let written = edge.write(PLACE, data.into(), WriteFlags::default()).await;
        let mut written = Written {
            byte,
            is_done: written.is_ok(),
            begun,
            flushed: None,
        };
        if nth != 1 && edge.flush().await.is_ok() && written.is_done {
            written.flushed = Some(tape.len());
        }
        all.push(written);
    }
    all
}

/// The byte that a disk has where its guest writes, and the disk without it. An error if the sector is torn.
pub(super) fn split(mut content: Content) -> Result<(u8, Content), String> {
    let bytes = content.bytes(PLACE, SECTOR);
    content.zero(PLACE, SECTOR);
    match bytes.iter().all(|byte| *byte == bytes[0]) {
        true => Ok((bytes[0], content)),
        false => Err(format!("the guest's sector holds {bytes:?}")),
    }
}
