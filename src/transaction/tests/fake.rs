//! A disk that writes down what is done to its snapshots, and fails where it is told to.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::driver::{
    BlockStatus, BoxFuture, Child, Driver, DriverInfo, GoOn, HeaderHeld, HeaderSwitch, NewSnapshot,
    Preallocation, RequestLimits, Requests, RequestsHeld, SnapshotChange, SnapshotInfo,
    SnapshotSelector, Snapshots, WriteFlags, ZeroFlags,
};
use block::error::{Error, ErrorKind, Result};
use block::graph::{Behaviour, Node, NodeName};
use block::io::Data;
use block::protocols::memory::Memory;

use crate::daemon::Cx;
use crate::daemon::lookup::from_engine;

/// What has happened, in order, to all disks and actions of a test.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn note(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }

    pub(crate) fn has(&self, what: &str) -> bool {
        self.0.lock().unwrap().iter().any(|noted| noted == what)
    }

    pub(crate) fn take(&self) -> String {
        std::mem::take(&mut *self.0.lock().unwrap()).join(", ")
    }
}

/// The part of a change that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Change,
    Create,
    Prepare,
    Commit,
    CommitPanics,
    CommitHangs,
    /// Requests are let go; the commit fails when the log has [`GO_ON`].
    CommitWaits,
    /// Requests are let go, and the disk is written to behind that.
    Marks,
    /// Requests go on until the change is held.
    Ahead,
    /// It is not.
    Hold,
    /// Writes fail when the log has [`GO_ON`].
    Write,
    RollBack,
}

pub(crate) const GO_ON: &str = "go on";

#[derive(Clone)]
struct Fake {
    name: &'static str,
    faults: &'static [Fault],
    log: Log,
    memory: Arc<Memory>,
}

/// Makes a disk of this name, and puts it into the graph.
pub(crate) async fn disk(cx: &Cx, name: &'static str, faults: &'static [Fault], log: &Log) {
    let driver = Fake {
        name,
        faults,
        log: log.clone(),
        memory: Memory::new(512),
    };
    insert(cx, name, Arc::new(driver)).await;
}

/// Puts a driver into the graph as a node of this name.
pub(crate) async fn insert(cx: &Cx, name: &str, driver: Arc<dyn Driver>) -> Arc<Node> {
    let name = NodeName::given(name).unwrap();
    let node = Node::new(name, driver, Behaviour::default(), Vec::new());
    let opened = vec![node.clone()].into();
    let inserted = cx.commit(|control| control.graph.insert(opened).map_err(from_engine));
    inserted.await.unwrap();
    node
}

impl Fake {
    /// Writes down what is done, or what fails.
    fn run(&self, what: &str, fault: Fault) -> Result<()> {
        if self.faults.contains(&fault) {
            self.log.note(format!("{what} {} fails", self.name));
            let text = format!("{what}: no");
            return Err(Error::new(ErrorKind::Io, text));
        }
        self.log.note(format!("{what} {}", self.name));
        Ok(())
    }
}

impl Snapshots for Fake {
    fn list(&self) -> Vec<SnapshotInfo> {
        Vec::new()
    }

    fn change(&self) -> BoxFuture<'_, Result<Box<dyn SnapshotChange>>> {
        Box::pin(async {
            self.run("change", Fault::Change)?;
            let change: Box<dyn SnapshotChange> = Box::new(FakeChange {
                disk: self.clone(),
                end: "drop",
            });
            Ok(change)
        })
    }
}

/// Writes down that requests go on.
struct GoesOn(Fake);

impl Drop for GoesOn {
    fn drop(&mut self) {
        self.0.log.note(format!("let go {}", self.0.name));
    }
}

struct FakeChange {
    disk: Fake,
    /// What its end is written down as.
    end: &'static str,
}

impl FakeChange {
    fn step(&self, what: &str, which: Option<String>) -> Result<SnapshotInfo> {
        let name = which.unwrap_or_default();
        self.disk.run(&format!("{what} {name} of"), Fault::Create)?;
        Ok(SnapshotInfo {
            id: "1".to_owned(),
            name,
            vm_state_size: 0,
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            icount: None,
            disk_size: 512,
        })
    }
}

impl SnapshotChange for FakeChange {
    fn go_ahead(&mut self) -> BoxFuture<'_, Result<bool>> {
        let goes = self.disk.faults.contains(&Fault::Ahead);
        if goes {
            self.disk.log.note(format!("go ahead {}", self.disk.name));
        }
        Box::pin(async move { Ok(goes) })
    }

    fn hold(&mut self) -> BoxFuture<'_, Result<()>> {
        let is_noted = self.disk.faults.contains(&Fault::Ahead);
        let held = match is_noted {
            true => self.disk.run("hold", Fault::Hold),
            false => Ok(()),
        };
        Box::pin(async { held })
    }

    fn create(&mut self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(async { self.step("create", Some(new.name)) })
    }

    fn delete(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(async { self.step("delete", which.name) })
    }

    fn revert(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(async { self.step("revert", which.name) })
    }

    fn size(&self) -> u64 {
        512
    }

    fn may_let_go(&mut self) -> BoxFuture<'_, Result<bool>> {
        let may = |fault: &Fault| matches!(fault, Fault::CommitWaits | Fault::Marks);
        Box::pin(async move { Ok(self.disk.faults.iter().any(may)) })
    }

    fn let_go(&mut self, then: GoOn) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async {
            let may = self.may_let_go().await?;
            if self.disk.faults.contains(&Fault::Marks) {
                // As taking a lock does.
                tokio::task::consume_budget().await;
                then(RequestsHeld::by(GoesOn(self.disk.clone())));
                tokio::task::yield_now().await;
                self.disk.log.note(format!("mark {}", self.disk.name));
            } else if may {
                then(RequestsHeld::not());
            }
            Ok(may)
        })
    }

    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.disk.run("prepare", Fault::Prepare) })
    }

    fn try_out(&mut self) -> BoxFuture<'_, Result<()>> {
        self.prepare()
    }

    fn switch(&mut self) -> BoxFuture<'_, Result<Option<HeaderSwitch>>> {
        Box::pin(async { Ok(None) })
    }

    fn commit(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            assert!(
                !self.disk.faults.contains(&Fault::CommitPanics),
                "as the test wants it"
            );
            if self.disk.faults.contains(&Fault::CommitHangs) {
                std::future::pending::<()>().await;
            }
            if self.disk.faults.contains(&Fault::CommitWaits) {
                while !self.disk.log.has(GO_ON) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                return self.disk.run("commit", Fault::CommitWaits);
            }
            self.disk.run("commit", Fault::Commit)
        })
    }

    fn roll_back(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.disk.run("roll back", Fault::RollBack) })
    }

    fn finish(mut self: Box<Self>) -> HeaderHeld {
        self.end = "finish";
        HeaderHeld::not()
    }
}

impl Drop for FakeChange {
    fn drop(&mut self) {
        self.disk
            .log
            .note(format!("{} {}", self.end, self.disk.name));
    }
}

impl Driver for Fake {
    fn info(&self) -> DriverInfo {
        DriverInfo {
            driver: "raw",
            filename: format!("{}.qcow2", self.name),
            ..DriverInfo::default()
        }
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        Vec::new()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
}

impl Requests for Fake {
    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn limits(&self) -> RequestLimits {
        self.memory.limits()
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.memory.read(offset, len)
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        if self.log.has(GO_ON)
            && let Err(error) = self.run("write", Fault::Write)
        {
            return Box::pin(async { Err(error) });
        }
        self.memory.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.memory.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.memory.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.log.note(format!("flush {}", self.name));
        self.memory.flush()
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.memory.block_status(offset, len)
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        self.memory.resize(size, preallocation)
    }
}
