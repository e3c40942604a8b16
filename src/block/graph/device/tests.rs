//! Drives on a disk in memory that fails as it is told to.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::events;
use crate::graph::{Behaviour, Graph, NewDrive, Node, NodeName};
use crate::protocols::memory::{Fault, Memory, OpKind};

const SIZE: u64 = 1 << 20;
const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(5);

/// Drives `d0`, `d1`, ... of one machine, each on a disk of its own.
struct Bench {
    graph: Graph,
    disks: Vec<Arc<Memory>>,
    events: tokio::sync::mpsc::Receiver<events::NodeEvent>,
}

impl Bench {
    fn new(policies: &[ErrorPolicy]) -> Self {
        let (sink, events) = events::channel();
        let mut bench = Bench {
            graph: Graph::reporting(sink),
            disks: Vec::new(),
            events,
        };
        for policy in policies {
            bench.add(*policy);
        }
        bench
    }

    fn add(&mut self, policy: ErrorPolicy) {
        let number = self.disks.len();
        let memory = Memory::new(SIZE);
        let name = NodeName::given(&format!("n{number}")).unwrap();
        let behaviour = Behaviour {
            discard: crate::open::DiscardMode::Unmap,
            ..Behaviour::default()
        };
        let node = Node::new(name, memory.clone(), behaviour, Vec::new());
        let opened = vec![node.clone()].into();
        self.graph.insert(opened).unwrap();
        let drive = NewDrive {
            policy,
            ..NewDrive::new(format!("d{number}"), Some(node))
        };
        self.graph.add_drive(drive).unwrap();
        self.disks.push(memory);
    }

    fn client(&self, drive: usize) -> Arc<Client> {
        self.graph.drives()[drive].client()
    }

    fn status(&self, drive: usize) -> Option<IoStatus> {
        self.graph.drives()[drive].io_status()
    }

    fn errors(&self, drive: usize) -> Vec<GuestError> {
        self.graph.drives()[drive].take_untold_errors().into()
    }

    fn state(&self) -> RunState {
        self.graph.machine().state()
    }

    fn go_on(&self) {
        for drive in self.graph.drives() {
            drive.reset_io_status();
        }
        self.graph.machine().go_on();
    }
}

fn on(read: OnError, write: OnError) -> ErrorPolicy {
    ErrorPolicy { read, write }
}

fn stop() -> ErrorPolicy {
    on(OnError::Stop, OnError::Stop)
}

/// A write of a page of these bytes.
fn write(client: &Arc<Client>, offset: u64, byte: u8) -> JoinHandle<Result<()>> {
    let client = client.clone();
    let data = Data::from(vec![byte; 4096]);
    tokio::spawn(async move { client.write(offset, data, WriteFlags::default()).await })
}

async fn waits<T>(task: &mut JoinHandle<T>) -> bool {
    timeout(SHORT, task).await.is_err()
}

async fn ends<T>(task: JoinHandle<T>) -> T {
    timeout(LONG, task).await.unwrap().unwrap()
}

async fn first_byte(client: &Client, offset: u64) -> u8 {
    client.read(offset, 1).await.unwrap().to_bytes()[0]
}

#[tokio::test]
async fn a_full_disk_stops_the_machine_and_the_write_is_sent_again() {
    let mut bench = Bench::new(&[ErrorPolicy::default(), ErrorPolicy::default()]);
    let (guest, other) = (bench.client(0), bench.client(1));
    assert_eq!(bench.status(0), Some(IoStatus::Ok));
    bench.disks[0].fail_once(OpKind::Write, 0, Fault::NoSpace);
    let mut failing = write(&guest, 0, 7);
    assert!(waits(&mut failing).await);
    assert_eq!(bench.state(), RunState::IoError);
    assert_eq!(bench.status(0), Some(IoStatus::NoSpace));
    assert_eq!(bench.status(1), Some(IoStatus::Ok));
    let event = bench.events.try_recv().unwrap();
    assert_eq!((&*event.node, event.what), ("d0", Happening::GuestErrors));
    let error = GuestError {
        is_read: false,
        action: ErrorAction::Stop,
        node: Some("n0".to_owned()),
        no_space: true,
        reason: "No space left on device".to_owned(),
    };
    assert_eq!(bench.errors(0), [error]);
    // All disks of the machine stand still, and nothing is inside of their nodes.
    let mut later = write(&other, 0, 8);
    assert!(waits(&mut later).await);
    for drive in bench.graph.drives() {
        let node = drive.node().unwrap();
        drop(timeout(SHORT, node.quiesce()).await.unwrap());
        assert_eq!(node.read(0, 1).await.unwrap().to_bytes()[0], 0);
    }
    bench.go_on();
    ends(failing).await.unwrap();
    ends(later).await.unwrap();
    assert_eq!(bench.status(0), Some(IoStatus::Ok));
    assert_eq!(first_byte(&guest, 0).await, 7);
    assert_eq!(first_byte(&other, 0).await, 8);
    let stats = bench.graph.drives()[0].stats();
    assert_eq!((stats.write.done, stats.write.failed), (1, 0));
}

#[tokio::test]
async fn it_stops_again_while_the_cause_persists() {
    let bench = Bench::new(&[stop()]);
    let guest = bench.client(0);
    bench.disks[0].fail_once(OpKind::Write, 0, Fault::Io);
    bench.disks[0].fail_once(OpKind::Write, 1, Fault::Io);
    let mut failing = write(&guest, 0, 7);
    assert!(waits(&mut failing).await);
    assert_eq!(bench.status(0), Some(IoStatus::Failed));
    assert_eq!(bench.errors(0).len(), 1);
    bench.go_on();
    assert!(waits(&mut failing).await);
    assert_eq!(bench.state(), RunState::IoError);
    assert_eq!(bench.errors(0).len(), 1);
    bench.go_on();
    ends(failing).await.unwrap();
    assert_eq!(first_byte(&guest, 0).await, 7);
}

#[tokio::test]
async fn every_kind_of_request_follows_its_policy() {
    let kinds = [
        (OpKind::Read, true),
        (OpKind::Write, false),
        (OpKind::WriteZeroes, false),
        (OpKind::Discard, false),
        (OpKind::Flush, false),
    ];
    for (kind, is_read) in kinds {
        for policy in [OnError::Report, OnError::Ignore] {
            let policies = match is_read {
                true => on(policy, OnError::Stop),
                false => on(OnError::Stop, policy),
            };
            let bench = Bench::new(&[policies]);
            bench.disks[0].fail_once(kind, 0, Fault::Io);
            let guest = bench.client(0);
            let flags = WriteFlags::default();
            let result = match kind {
                OpKind::Read => guest
                    .read(0, 512)
                    .await
                    .map(|data| assert_eq!(data.len(), 512)),
                OpKind::Write => guest.write(0, Data::from(vec![1; 512]), flags).await,
                OpKind::WriteZeroes => guest.write_zeroes(0, 512, ZeroFlags::default()).await,
                OpKind::Discard => guest.discard(0, 4096).await,
                _ => guest.flush().await,
            };
            assert_eq!(result.is_ok(), policy == OnError::Ignore, "{kind:?}");
            let errors = bench.errors(0);
            assert_eq!(errors.len(), 1, "{kind:?}");
            assert_eq!(errors[0].is_read, is_read);
            assert_eq!(bench.state(), RunState::Running);
            let DriveStats {
                read,
                write,
                discard,
                flush,
                idle,
            } = bench.graph.drives()[0].stats();
            let all = [read, write, discard, flush];
            let done: u64 = all.iter().map(|totals| totals.done).sum();
            let failed: u64 = all.iter().map(|totals| totals.failed).sum();
            let expected = match policy {
                OnError::Ignore => (1, 0),
                _ => (0, 1),
            };
            assert_eq!((done, failed), expected, "{kind:?}");
            assert!(idle.is_some());
        }
    }
}

#[tokio::test]
async fn what_makes_no_sense_is_answered_and_stops_nothing() {
    let bench = Bench::new(&[stop()]);
    let guest = bench.client(0);
    // The disk in memory grows as a file does, so only the largest offset is outside.
    let outside = guest.read(u64::MAX - 511, 512).await.unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::OutOfRange);
    assert_eq!(bench.state(), RunState::Running);
    assert_eq!(bench.errors(0), []);
    let stats = bench.graph.drives()[0].stats();
    assert_eq!((stats.read.invalid, stats.read.failed), (1, 0));
}

#[tokio::test]
async fn a_client_that_hangs_up_waits_no_more_and_its_write_does_not_happen() {
    let bench = Bench::new(&[stop()]);
    let (guest, other) = (bench.client(0), bench.client(0));
    bench.disks[0].fail_once(OpKind::Write, 0, Fault::Io);
    let mut failing = write(&guest, 0, 7);
    let mut held = write(&other, 4096, 8);
    assert!(waits(&mut failing).await && waits(&mut held).await);
    guest.hang_up();
    let error = ends(failing).await.unwrap_err();
    assert_eq!(error.errno(), libc::ESHUTDOWN);
    assert!(
        ends(write(&guest, 0, 7)).await.is_err(),
        "nor do later ones"
    );
    assert!(waits(&mut held).await, "the other client goes on waiting");
    bench.go_on();
    ends(held).await.unwrap();
    assert_eq!(first_byte(&other, 0).await, 0);
    assert_eq!(first_byte(&other, 4096).await, 8);
    // While the machine runs it is served as before.
    ends(write(&guest, 0, 9)).await.unwrap();
}

#[tokio::test]
async fn a_request_that_is_dropped_while_it_is_held_has_not_happened() {
    let bench = Bench::new(&[stop()]);
    let guest = bench.client(0);
    bench.graph.machine().stop(RunState::Paused);
    let mut held = write(&guest, 0, 7);
    assert!(waits(&mut held).await);
    held.abort();
    assert!(held.await.unwrap_err().is_cancelled());
    bench.go_on();
    assert_eq!(first_byte(&guest, 0).await, 0);
}

#[tokio::test]
async fn a_drive_that_is_added_while_the_machine_stands_still_waits_too() {
    let mut bench = Bench::new(&[stop()]);
    bench.graph.machine().stop(RunState::Paused);
    bench.add(stop());
    let mut held = write(&bench.client(1), 0, 7);
    assert!(waits(&mut held).await);
    bench.graph.remove_drive("d0").map(drop).unwrap();
    bench.go_on();
    ends(held).await.unwrap();
}

#[tokio::test]
async fn a_drive_without_medium_answers_with_an_error() {
    let mut bench = Bench::new(&[]);
    bench.graph.add_drive(NewDrive::new("d", None)).unwrap();
    let guest = bench.client(0);
    assert_eq!(guest.size(), 0);
    let error = guest.read(0, 1).await.unwrap_err();
    assert_eq!(error.message(), "Device 'd' has no medium");
    assert_eq!(bench.status(0), Some(IoStatus::Ok));
}

#[tokio::test]
async fn of_many_errors_the_first_and_the_last_are_told() {
    let mut bench = Bench::new(&[on(OnError::Report, OnError::Report)]);
    let guest = bench.client(0);
    assert_eq!(bench.status(0), None);
    for nth in 0..40 {
        let fault = if nth < 39 { Fault::Io } else { Fault::NoSpace };
        bench.disks[0].fail_once(OpKind::Write, 0, fault);
        ends(write(&guest, 0, 7)).await.unwrap_err();
    }
    let errors = bench.errors(0);
    assert_eq!(errors.len(), MAX_UNTOLD_ERRORS);
    assert!(!errors[0].no_space && errors[MAX_UNTOLD_ERRORS - 1].no_space);
    assert!(bench.events.try_recv().is_ok());
    assert!(bench.events.try_recv().is_err(), "one call for all");
    bench.disks[0].fail_once(OpKind::Write, 0, Fault::Io);
    ends(write(&guest, 0, 7)).await.unwrap_err();
    assert!(bench.events.try_recv().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_however_often_several_drives_stop_the_machine() {
    const WRITES: u64 = 64;
    let bench = Bench::new(&[stop(), stop(), stop()]);
    for disk in &bench.disks {
        for nth in 0..10 {
            disk.fail_once(OpKind::Write, nth * 5, Fault::NoSpace);
        }
    }
    let guests: Vec<_> = (0..3).map(|drive| bench.client(drive)).collect();
    let writes: Vec<_> = (0..WRITES)
        .flat_map(|nth| guests.iter().map(move |guest| (guest, nth)))
        .map(|(guest, nth)| write(guest, nth * 4096, nth as u8 + 1))
        .collect();
    let mut stops = 0;
    while writes.iter().any(|write| !write.is_finished()) {
        if bench.state() != RunState::Running {
            stops += 1;
            bench.go_on();
        }
        tokio::task::yield_now().await;
    }
    assert!(stops > 0);
    for write in writes {
        write.await.unwrap().unwrap();
    }
    for guest in &guests {
        for nth in 0..WRITES {
            assert_eq!(first_byte(guest, nth * 4096).await, nth as u8 + 1);
        }
    }
}
