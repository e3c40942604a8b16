//! What is done about damage that is found while an image is in use.
//!
//! * A request *meets* damage: an entry that means nothing, a table behind the end of the file. It fails; others go on.
//! * A change would *spread* it: guest data, or freed clusters that are handed out again, would land on metadata.
//!   It is prevented, and the image takes no changes from then on. The header says so too (the corrupt bit of version 3,
//!   durable before the request is answered), so that nobody writes to the image before it is repaired. What was answered
//!   before is still written back: its metadata were sound when they were made.
//!
//! Each is reported once per image: a guest that tries again and again must not flood whoever listens.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::header::{Incompatible, Version};
use super::header_cell::HeaderCell;
use crate::error::{Error, ErrorKind, Result};
use crate::events::{Corruption, Happening, HostBytes, Reporter};

/// What is known of an image's damage.
#[derive(Debug, Default)]
pub(crate) struct Damage {
    reporter: Reporter,
    /// No change may be made any more.
    prevented: AtomicBool,
    /// The header does not say so yet.
    unmarked: AtomicBool,
    reports: Mutex<Reports>,
}

#[derive(Debug, Default)]
struct Reports {
    /// Damage has been reported.
    told: bool,
    /// What was prevented, until it is reported.
    prevented: Option<Corruption>,
}

impl Damage {
    /// None so far.
    pub(crate) fn new(reporter: Reporter) -> Self {
        Damage {
            reporter,
            ..Damage::default()
        }
    }

    /// A request has met damage; answers its error. The message has no dot.
    pub(crate) fn met(&self, message: impl Into<String>, place: Option<HostBytes>) -> Error {
        let message = message.into();
        let error = corrupt(&message);
        self.noticed(message, place);
        error
    }

    /// Damage was met that no request has to fail for.
    pub(crate) fn noticed(&self, message: impl Into<String>, place: Option<HostBytes>) {
        let message = message.into();
        let mut reports = self.reports();
        if !reports.told {
            reports.told = true;
            log::error!(
                "qcow2: Image is corrupt: {message}; further non-fatal corruption events will be suppressed{}",
                self.of_node()
            );
            self.report(Corruption {
                message,
                place,
                fatal: false,
            });
        }
    }

    /// A change would have spread damage and has not been made; answers its error. No other is made from now on.
    pub(crate) fn prevented(&self, message: impl Into<String>, place: Option<HostBytes>) -> Error {
        let message = message.into();
        let error = corrupt(&message);
        let mut reports = self.reports();
        if !self.prevented.swap(true, Ordering::SeqCst) {
            reports.prevented = Some(Corruption {
                message,
                place,
                fatal: true,
            });
            self.unmarked.store(true, Ordering::SeqCst);
        }
        error
    }

    /// Whether changes may be made.
    pub(crate) fn check(&self) -> Result<()> {
        if self.prevented.load(Ordering::SeqCst) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "qcow2: Image is corrupt; it cannot be written to until it is repaired",
            ));
        }
        Ok(())
    }

    /// Whether `mark` has something to do.
    pub(crate) fn is_unmarked(&self) -> bool {
        self.unmarked.load(Ordering::Relaxed)
    }

    /// Marks the image as corrupt if a change was prevented, durably, and reports it. What cannot be marked is reported all the
    /// same, and marked by a later call. Cancellation: run to the end by the caller.
    pub(crate) async fn mark(&self, header: &HeaderCell) {
        let marked = match header.get().version {
            // It has no bit for it. Whoever opens it finds the damage again.
            Version::V2 => Ok(()),
            // Who keeps it waits for the request that has met the damage.
            Version::V3 if header.is_kept() => Err(Error::new(
                ErrorKind::InUse,
                "a change of snapshots is under way",
            )),
            Version::V3 => {
                let set = |header: &mut super::header::Header| {
                    header.incompatible.0 |= Incompatible::CORRUPT;
                };
                header.update(set).await
            }
        };
        if marked.is_ok() {
            self.unmarked.store(false, Ordering::SeqCst);
        }
        let mut reports = self.reports();
        if let Some(corruption) = reports.prevented.take() {
            reports.told = true;
            if let Err(error) = marked {
                log::error!("qcow2: the header of a corrupt image cannot be written: {error}");
            }
            log::error!(
                "qcow2: Marking image as corrupt: {}; further corruption events will be suppressed{}",
                corruption.message,
                self.of_node()
            );
            self.report(corruption);
        }
    }

    fn report(&self, corruption: Corruption) {
        self.reporter.report(Happening::ImageCorrupted(corruption));
    }

    /// For the log.
    fn of_node(&self) -> String {
        match self.reporter.node() {
            "" => String::new(),
            node => format!(" (node '{node}')"),
        }
    }

    fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn corrupt(message: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("qcow2: Image is corrupt: {message}"),
    )
}

/// A number as QEMU's messages have it: `%#x` of C, which writes 0 without a prefix.
pub(crate) struct Hex(pub(crate) u64);

impl std::fmt::Display for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("0"),
            number => write!(f, "{number:#x}"),
        }
    }
}
