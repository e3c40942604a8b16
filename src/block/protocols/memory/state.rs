//! What the disk holds, and how requests are executed on it one by one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use tokio::sync::oneshot;

use super::{Change, Fault, OpKind, PAGE, Record};
use crate::driver::{BlockStatus, RequestLimits};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Data, Segment};

#[derive(Debug)]
pub(super) struct State {
    pub(super) pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
    pub(super) size: u64,
    pub(super) limits: RequestLimits,
    pub(super) space_limit: Option<u64>,
    pub(super) faults: Vec<Rule>,
    pub(super) holding: Vec<OpKind>,
    pub(super) held: VecDeque<Held>,
    /// Which of the disks with this tape.
    pub(super) number: usize,
    pub(super) tape: SharedTape,
    pub(super) counts: [u64; 7],
}

/// Locked under the lock of a state.
pub(super) type SharedTape = Arc<Mutex<Tape>>;

/// The order of what happens, on one disk or on several.
#[derive(Debug, Default)]
pub(super) struct Tape {
    clock: u64,
    pub(super) log: Option<Vec<Record>>,
}

impl Tape {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

#[derive(Debug)]
pub(super) struct Rule {
    pub(super) kind: OpKind,
    pub(super) skip: u64,
    pub(super) fault: Fault,
    pub(super) once: bool,
}

#[derive(Debug)]
pub(super) struct Held {
    pub(super) request: Request,
    pub(super) issued: u64,
    pub(super) answer: oneshot::Sender<Result<Answer>>,
}

#[derive(Debug, Clone)]
pub(super) enum Request {
    Read { offset: u64, len: u64 },
    BlockStatus { offset: u64, len: u64 },
    Change(Change),
}

#[derive(Debug)]
pub(super) enum Answer {
    Read(Data),
    BlockStatus(BlockStatus),
    Done,
}

impl Default for State {
    fn default() -> Self {
        State {
            pages: BTreeMap::new(),
            size: 0,
            limits: RequestLimits {
                alignment: 1,
                preferred: PAGE as u32,
                growable: true,
            },
            space_limit: None,
            faults: Vec::new(),
            holding: Vec::new(),
            held: VecDeque::new(),
            number: 0,
            tape: SharedTape::default(),
            counts: [0; 7],
        }
    }
}

impl State {
    pub(super) fn tape(&self) -> MutexGuard<'_, Tape> {
        self.tape.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tick(&self) -> u64 {
        self.tape().tick()
    }

    /// Executes a request and answers it, whether or not somebody still listens.
    pub(super) fn finish(&mut self, held: Held) {
        let result = self.execute(held.request, held.issued);
        let _ = held.answer.send(result);
    }

    fn execute(&mut self, request: Request, issued: u64) -> Result<Answer> {
        let fault = self.fault(request.kind());
        match fault {
            None => {}
            Some(Fault::NoSpace) => return Err(no_space()),
            Some(Fault::Io) => return Err(Error::new(ErrorKind::Io, "Injected I/O error")),
            Some(Fault::Torn(len)) => {
                if let Request::Change(change) = &request {
                    self.apply_front(change, len, issued)?;
                }
                return Err(Error::new(ErrorKind::Io, "Injected I/O error"));
            }
        }
        if let Request::Change(change) = &request
            && let Some(fits) = self.fitting(change)
        {
            self.apply_front(change, fits, issued)?;
            return Err(no_space());
        }
        match request {
            Request::Read { offset, len } => Ok(Answer::Read(self.read(offset, len))),
            Request::BlockStatus { offset, len } => {
                Ok(Answer::BlockStatus(self.block_status(offset, len)))
            }
            Request::Change(change) => {
                self.apply(&change)?;
                self.record(issued, change);
                Ok(Answer::Done)
            }
        }
    }

    /// What happens of a request that fails in its middle.
    fn apply_front(&mut self, change: &Change, len: u64, issued: u64) -> Result<()> {
        let front = change.front(len);
        self.apply(&front)?;
        self.record(issued, front);
        Ok(())
    }

    /// How much of a write there is space for, if not for all of it.
    fn fitting(&self, change: &Change) -> Option<u64> {
        let (Change::Write { offset, data, .. }, Some(limit)) = (change, self.space_limit) else {
            return None;
        };
        let mut free = (limit / PAGE).saturating_sub(self.pages.len() as u64);
        let mut last = None;
        let mut at = *offset;
        for segment in data.segments() {
            let end = at + segment.len();
            if let Segment::Bytes(_) = segment {
                for page in at / PAGE..end.div_ceil(PAGE) {
                    if self.pages.contains_key(&page) || last == Some(page) {
                        continue;
                    }
                    if free == 0 {
                        return Some((page * PAGE).max(at) - offset);
                    }
                    free -= 1;
                    last = Some(page);
                }
            }
            at = end;
        }
        None
    }

    fn record(&self, issued: u64, change: Change) {
        let mut tape = self.tape();
        let completed = tape.tick();
        if let Some(log) = &mut tape.log {
            log.push(Record {
                disk: self.number,
                issued,
                completed,
                change,
            });
        }
    }

    /// The first rule whose turn it is. All rules of the kind count this request.
    fn fault(&mut self, kind: OpKind) -> Option<Fault> {
        let mut hit = None;
        for (index, rule) in self.faults.iter_mut().enumerate() {
            if rule.kind != kind {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if hit.is_none() {
                hit = Some((index, rule.fault, rule.once));
            }
        }
        let (index, fault, once) = hit?;
        if once {
            self.faults.remove(index);
        }
        Some(fault)
    }

    pub(super) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len);
        if end.is_some_and(|end| end <= self.size || self.limits.growable) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfRange,
            format!("Request at {offset:#x} of {len} bytes is outside of the memory disk"),
        ))
    }

    pub(super) fn apply(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::Write { offset, data, .. } => self.write(*offset, data),
            Change::WriteZeroes { offset, len, .. } => {
                self.check_range(*offset, *len)?;
                self.clear(*offset, *len);
                self.size = self.size.max(offset + len);
                Ok(())
            }
            Change::Discard { offset, len } => {
                let end = offset.saturating_add(*len).min(self.size);
                self.clear(*offset, end.saturating_sub(*offset));
                Ok(())
            }
            Change::Resize { size } => {
                if *size < self.size {
                    self.clear(*size, self.size - size);
                }
                self.size = *size;
                Ok(())
            }
            Change::Flush => Ok(()),
        }
    }

    fn write(&mut self, offset: u64, data: &Data) -> Result<()> {
        self.check_range(offset, data.len())?;
        let mut at = offset;
        for segment in data.segments() {
            match segment {
                Segment::Zeroes(len) => {
                    self.clear(at, *len);
                    at += len;
                }
                Segment::Bytes(bytes) => {
                    let mut rest = &bytes[..];
                    while !rest.is_empty() {
                        let start = (at % PAGE) as usize;
                        let len = rest.len().min(PAGE as usize - start);
                        let page = self
                            .pages
                            .entry(at / PAGE)
                            .or_insert_with(|| Arc::new([0; PAGE as usize]));
                        Arc::make_mut(page)[start..start + len].copy_from_slice(&rest[..len]);
                        rest = &rest[len..];
                        at += len as u64;
                        self.size = self.size.max(at);
                    }
                }
            }
            self.size = self.size.max(at);
        }
        Ok(())
    }

    /// Makes a range zero and frees the pages that lie wholly in it. Needs no space.
    fn clear(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let end = offset + len;
        let touched: Vec<u64> = self
            .pages
            .range(offset / PAGE..=(end - 1) / PAGE)
            .map(|(index, _)| *index)
            .collect();
        for index in touched {
            let from = offset.max(index * PAGE);
            let to = end.min((index + 1) * PAGE);
            if to - from == PAGE {
                self.pages.remove(&index);
            } else if let Some(page) = self.pages.get_mut(&index) {
                let within = (from - index * PAGE) as usize..(to - index * PAGE) as usize;
                Arc::make_mut(page)[within].fill(0);
            }
        }
    }

    /// Bytes as they are; what was never written and what lies behind the end are zero runs.
    pub(super) fn read(&self, offset: u64, len: u64) -> Data {
        let mut data = Data::new();
        let mut at = offset;
        let end = offset + len;
        let mut piece = BytesMut::new();
        for (index, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let from = offset.max(index * PAGE);
            let to = end.min((index + 1) * PAGE);
            if from > at {
                data.push(Segment::Bytes(piece.split().freeze()));
                data.push(Segment::Zeroes(from - at));
            }
            let within = (from - index * PAGE) as usize..(to - index * PAGE) as usize;
            piece.extend_from_slice(&page[within]);
            at = to;
        }
        data.push(Segment::Bytes(piece.freeze()));
        data.push(Segment::Zeroes(end - at));
        data
    }

    fn block_status(&self, offset: u64, len: u64) -> BlockStatus {
        let end = offset + len;
        let present = self.pages.contains_key(&(offset / PAGE));
        let mut at = offset;
        while at < end && self.pages.contains_key(&(at / PAGE)) == present {
            at = ((at / PAGE + 1) * PAGE).min(end);
        }
        BlockStatus {
            len: at - offset,
            allocated: true,
            zero: !present,
            host_offset: Some(offset),
            compressed: false,
        }
    }
}

impl Request {
    pub(super) fn kind(&self) -> OpKind {
        match self {
            Request::Read { .. } => OpKind::Read,
            Request::BlockStatus { .. } => OpKind::BlockStatus,
            Request::Change(Change::Write { .. }) => OpKind::Write,
            Request::Change(Change::WriteZeroes { .. }) => OpKind::WriteZeroes,
            Request::Change(Change::Discard { .. }) => OpKind::Discard,
            Request::Change(Change::Resize { .. }) => OpKind::Resize,
            Request::Change(Change::Flush) => OpKind::Flush,
        }
    }
}

fn no_space() -> Error {
    Error::new(ErrorKind::NoSpace, "No space left on device")
}
