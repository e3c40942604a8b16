//! The log of QEMU's blklogwrites driver, which has the format of the kernel's dm-log-writes.
//!
//! ```text
//! sector 0: magic, version, number of entries, bytes of a sector
//! then each: sector, number of sectors, flags, length | its data, if it has any
//! ```

use crate::io::Data;
use crate::protocols::memory::{Change, Record};

use super::super::run::Problem;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// Bytes that count entries' places, whatever the log's own sectors are.
const UNIT: u64 = 512;

/// How many entries the log has.
pub fn entries(log: &[u8]) -> Result<usize, Problem> {
    if log.is_empty() {
        // Its first sector is written with the first entry.
        return Ok(0);
    }
    match le64(log, 0)? {
        MAGIC => Ok(le64(log, 16)? as usize),
        other => Err(format!("a write log begins with {other:#x}")),
    }
}

/// The log as records, each issued when the one before had completed.
pub fn records(log: &[u8]) -> Result<Vec<Record>, Problem> {
    let sector = le64(log, 24)? & 0xffff_ffff;
    let mut at = sector;
    let mut records = Vec::new();
    for _ in 0..entries(log)? {
        let place = le64(log, at)? * UNIT;
        let len = le64(log, at + 8)? * UNIT;
        let flags = le64(log, at + 16)?;
        at += sector;
        let fua = flags & FUA != 0;
        if flags & MARK != 0 {
            at += le64(log, at - sector + 24)?.next_multiple_of(sector);
            continue;
        }
        if flags & FLUSH != 0 {
            push(&mut records, Change::Flush);
        }
        if len == 0 {
            continue;
        }
        if flags & DISCARD != 0 {
            push(&mut records, Change::Discard { offset: place, len });
            continue;
        }
        let bytes = log
            .get(at as usize..(at + len) as usize)
            .ok_or("the write log ends in the middle of a write")?;
        push(
            &mut records,
            Change::Write {
                offset: place,
                data: Data::from(bytes.to_vec()),
                fua,
            },
        );
        if fua {
            push(&mut records, Change::Flush);
        }
        at += len.next_multiple_of(sector);
    }
    Ok(records)
}

fn push(records: &mut Vec<Record>, change: Change) {
    let clock = 2 * records.len() as u64;
    records.push(Record {
        disk: 0,
        issued: clock + 1,
        completed: clock + 2,
        change,
    });
}

fn le64(log: &[u8], at: u64) -> Result<u64, Problem> {
    let bytes = log.get(at as usize..at as usize + 8);
    let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
    let bytes = bytes.ok_or("the write log is too short")?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of a write of two sectors, a flush, and a discard, in sectors of 512 bytes.
    fn log() -> Vec<u8> {
        let mut log = Vec::new();
        let mut header = |words: [u64; 4]| {
            let start = log.len();
            log.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            log.resize(start + 512, 0);
            if words == [5, 2, 0, 0] {
                log.resize(start + 3 * 512, 7);
            }
        };
        header([MAGIC, 1, 3, 512]);
        header([5, 2, 0, 0]);
        header([0, 0, FLUSH, 0]);
        header([9, 4, DISCARD, 0]);
        log
    }

    #[test]
    fn entries_become_records() {
        let records = records(&log()).unwrap();
        let changes: Vec<&Change> = records.iter().map(|record| &record.change).collect();
        let [
            Change::Write {
                offset: 2560,
                data,
                fua: false,
            },
            Change::Flush,
            Change::Discard {
                offset: 4608,
                len: 2048,
            },
        ] = changes[..]
        else {
            panic!("{changes:?}");
        };
        assert_eq!(data.to_bytes().to_vec(), vec![7; 1024]);
        assert!(records[0].completed < records[1].issued);
    }

    #[test]
    fn damaged_logs_are_refused() {
        assert!(records(&[0; 600]).is_err());
        let mut log = log();
        log.truncate(1100);
        assert!(records(&log).is_err());
    }
}
