//! Which wishes of a request reach the node.

use std::sync::{Arc, Mutex};

use block::driver::{
    BlockStatus, BoxFuture, Preallocation, RequestLimits, Requests, WriteFlags, ZeroFlags,
};
use block::error::{Error, ErrorKind, Result};
use block::io::Data;
use block::protocols::memory::Memory;

use super::client::*;
use super::{Fixture, SIZE};

/// A disk that notes what changes it, and cannot zero fast.
struct Recorder {
    disk: Arc<Memory>,
    notes: Mutex<Vec<Note>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Note {
    Write(WriteFlags),
    Zero(ZeroFlags),
    Discard,
    Flush,
}

impl Recorder {
    fn note(&self, note: Note) {
        self.notes.lock().unwrap().push(note);
    }
}

impl Requests for Recorder {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn limits(&self) -> RequestLimits {
        self.disk.limits()
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.disk.read(offset, len)
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.note(Note::Write(flags));
        self.disk.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.note(Note::Zero(flags));
        if flags.no_fallback {
            let slow = Error::new(ErrorKind::Unsupported, "zeroes are written slowly here");
            return Box::pin(async { Err(slow) });
        }
        self.disk.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.note(Note::Discard);
        self.disk.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.note(Note::Flush);
        self.disk.flush()
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.disk.block_status(offset, len)
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        self.disk.resize(size, preallocation)
    }
}

/// Sends one request and answers what reached the node, with the error that the client got.
fn notes(writethrough: bool, flags: u16, command: u16) -> (Vec<Note>, u32) {
    let fixture = Fixture::new();
    let recorder = Arc::new(Recorder {
        disk: Memory::new(SIZE),
        notes: Mutex::default(),
    });
    let options = qblockd::exports::nbd::NbdExportOptions {
        id: "recorder".into(),
        name: "recorder".into(),
        writable: true,
        writethrough,
        ..Default::default()
    };
    fixture.server().add(options, recorder.clone()).unwrap();
    let mut client = fixture.connect();
    client.handshake(3);
    client.go("recorder");
    let mut message = request(flags, command, 1, 0, 512);
    if command == WRITE {
        message.extend([1; 512]);
    }
    let error = client.simple(&message);
    let notes = recorder.notes.lock().unwrap().clone();
    (notes, error)
}

#[test]
fn force_unit_access_means_durable_on_every_command() {
    let durable = Note::Write(WriteFlags::fua(true));
    let zero = Note::Zero(ZeroFlags {
        may_unmap: true,
        fua: true,
        no_fallback: false,
    });
    let cases = [
        (READ, vec![Note::Flush]),
        (WRITE, vec![durable]),
        (WRITE_ZEROES, vec![zero]),
        (TRIM, vec![Note::Discard, Note::Flush]),
        (FLUSH, vec![Note::Flush]),
        (CACHE, vec![]),
    ];
    for (command, expected) in cases {
        assert_eq!(
            notes(false, FUA, command),
            (expected.clone(), 0),
            "{command}"
        );
        if command != READ {
            assert_eq!(
                notes(true, 0, command),
                (expected, 0),
                "writethrough {command}"
            );
        }
    }
    assert_eq!(
        notes(false, 0, WRITE).0,
        [Note::Write(WriteFlags::default())]
    );
    assert_eq!(notes(false, 0, TRIM).0, [Note::Discard]);
}

#[test]
fn zeroes_say_whether_space_may_go_and_time_may_be_spent() {
    let zero = |may_unmap, no_fallback| {
        vec![Note::Zero(ZeroFlags {
            may_unmap,
            fua: false,
            no_fallback,
        })]
    };
    const ENOTSUP: u32 = 95;
    assert_eq!(notes(false, 0, WRITE_ZEROES), (zero(true, false), 0));
    assert_eq!(notes(false, NO_HOLE, WRITE_ZEROES), (zero(false, false), 0));
    assert_eq!(
        notes(false, FAST_ZERO, WRITE_ZEROES),
        (zero(true, true), ENOTSUP)
    );
}
