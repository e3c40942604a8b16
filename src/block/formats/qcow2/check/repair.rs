//! What is wrong put right: refcounts and COPIED flags, from the references that there are.
//!
//! ```text
//! flush -> count references -> refcount structures sound?  yes: correct blocks in place (`in_place`)
//!                                                          no:  make new ones next to the old (`rebuild`)
//!   -> COPIED flags (`flags`) -> flush -> header: dirty and corrupt bits off, flush
//! ```
//!
//! Nothing here can be lost or made worse by a crash, a full disk or an error half way:
//! * In place, the image is marked dirty before the first write, unless it is already. What is stored is then worth nothing, and the
//!   next repair, ours or `qemu-img check -r all`, counts again from tables that this one does not touch but for their flags.
//! * Version 2 has no dirty bit, and a repair of leaks alone does not need it: every counter and every flag that is written
//!   is right by itself, whatever the others say, since no step raises a count above, or puts one below, the truth.
//! * New structures take clusters that neither the image nor its old refcounts use, and count only from the header's switch on.
//! * COPIED is set only where the count is truly 1, which is right before the refcounts are and after.
//!
//! Space is taken only where refcount blocks are missing or damaged. What counting does not cure (tables outside of the
//! file, unaligned, with reserved bits, on top of each other; counts beyond the refcount width) is named and left as it was.

mod flags;
mod in_place;
mod rebuild;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::counts::{Bitmap, Counts};
use super::refcounts::Structure;
use super::report::{CheckOptions, MAX_FINDINGS, Progress, Repair, RepairReport};
use super::{Bounds, Scan};
use crate::driver::{Child, WriteFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::geometry::Geometry;
use crate::formats::qcow2::header::{Header, Incompatible, Version};
use crate::formats::qcow2::runs::write_pieces;
use crate::units::HostOffset;

/// Refcount blocks, or L2 tables, held in memory before they are written, in bytes.
const BATCH_BYTES: u64 = 16 << 20;

/// Repairs the image in `file`, which must not be in use. Durable when it answers.
///
/// With [`Repair::All`] the image is clean afterwards, and so are its dirty and corrupt bits. With [`Repair::Leaks`] they are cleared
/// only if nothing else was wrong. Errors: `Corrupt` for what counting does not cure, with the place of the first such thing; the image
/// is left as it was then. After another error, or a crash, it can be repaired again. Cancellation: as a crash.
pub async fn repair(file: &Child, what: Repair, options: &CheckOptions) -> Result<RepairReport> {
    // A killed process may have left tables, and the dirty bit, in the page cache alone. What is counted must not be lost when
    // something has been done by it.
    file.flush().await?;
    let mut scan = Scan::counted(file, options).await?;
    let mut report = RepairReport::default();
    if what == Repair::All && complete_snapshot_table(&mut scan).await? {
        report = RepairReport {
            corruptions_fixed: scan.report.corruptions,
            findings: std::mem::take(&mut scan.report.findings),
            ..report
        };
        scan = Scan::counted(file, options).await?;
    }
    let way = Way::find(&mut scan, what, &mut report)?;
    let mut mender = Mender::new(scan, what, report);
    let result = match &way {
        Way::InPlace(plan) => mender.correct(plan).await,
        Way::Rebuild(area) => mender.rebuild(area).await,
    };
    if result.is_err() {
        mender.unmark().await;
    }
    result?;
    if options.discard_leaks {
        mender.discard_leaks().await?;
    }
    Ok(mender.report)
}

/// How refcounts are repaired.
enum Way {
    /// The blocks are corrected where they lie.
    InPlace(in_place::Plan),
    /// There will be new ones, in this place.
    Rebuild(rebuild::Area),
}

impl Way {
    /// In place, if the refcount structures allow that.
    fn find(scan: &mut Scan<'_>, what: Repair, report: &mut RepairReport) -> Result<Way> {
        let plan = match (scan.refcount_structure()?, what) {
            (Structure::Sound(own), _) => in_place::Plan::make(scan, &own, what)?,
            (Structure::Damaged(wrong), Repair::All) => {
                report.corruptions_fixed += 1;
                report.findings.push(format!("ERROR {wrong}"));
                None
            }
            (Structure::Damaged(wrong), Repair::Leaks) => {
                let text = "Leaks are not found while refcounts are damaged";
                let text = format!("{text} ({wrong}); repair all");
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        };
        Ok(match plan {
            Some(plan) => Way::InPlace(plan),
            None => Way::Rebuild(rebuild::Area::find(scan)?),
        })
    }
}

impl<'a> Scan<'a> {
    /// A scan that has counted all references but those to refcount structures; `Corrupt` where they tell too little.
    async fn counted(file: &'a Child, options: &CheckOptions) -> Result<Scan<'a>> {
        let mut scan = Scan::load(file, options).await?;
        scan.require_curable()?;
        scan.load_refcount_table().await?;
        scan.count_references().await?;
        scan.require_curable()?;
        Ok(scan)
    }

    fn require_curable(&self) -> Result<()> {
        match &self.incurable {
            None => Ok(()),
            Some(first) => Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "The image has errors that new refcounts do not cure: {}",
                    first.trim_start_matches("ERROR ")
                ),
            )),
        }
    }
}

/// Gives snapshots the extra data that version 3 requires, in a new table. Answers whether that was needed.
async fn complete_snapshot_table(scan: &mut Scan<'_>) -> Result<bool> {
    let needed = scan.header.version == Version::V3
        && scan
            .snapshots
            .entries()
            .iter()
            .any(|entry| entry.is_incomplete());
    if !needed {
        return Ok(false);
    }
    scan.snapshots.complete(scan.header.size);
    let mut bytes = scan.snapshots.encode()?;
    let clusters = scan.g.clusters_for(bytes.len() as u64);
    bytes.resize((clusters << scan.g.cluster_bits()) as usize, 0);
    let start = rebuild::free_run(scan, &rebuild::old_structures(scan)?, clusters)?;
    let start = HostOffset(start << scan.g.cluster_bits());
    scan.file
        .write(start.0, bytes.into(), WriteFlags::default())
        .await?;
    scan.file.flush().await?;
    // Nothing counts the new table yet.
    scan.header.incompatible.0 |= Incompatible::DIRTY;
    scan.header.snapshots_offset = start;
    switch(scan.file, &scan.header).await?;
    Ok(true)
}

/// Writes the header's fields that one write switches, and makes that durable.
async fn switch(file: &Child, header: &Header) -> Result<()> {
    let (at, bytes) = header.switch_bytes();
    file.write(at.0, bytes.into(), WriteFlags::default())
        .await?;
    file.flush().await
}

/// A repair that writes.
struct Mender<'a> {
    file: &'a Child,
    header: Header,
    g: Geometry,
    bounds: Bounds,
    what: Repair,
    /// All references, those to refcount structures that stay or come included.
    counts: Arc<Counts>,
    /// With `Repair::Leaks`: clusters whose stored count is and stays too low.
    low: Arc<Bitmap>,
    /// Clusters that nobody uses any more.
    freed: Vec<Range<u64>>,
    /// Things found wrong and left so.
    left: u64,
    /// Something has been written.
    written: bool,
    /// The dirty bit was set by this repair.
    marked: bool,
    report: RepairReport,
    progress: Option<Arc<Progress>>,
}

impl<'a> Mender<'a> {
    fn new(scan: Scan<'a>, what: Repair, report: RepairReport) -> Self {
        Mender {
            file: scan.file,
            header: scan.header,
            g: scan.g,
            bounds: scan.bounds,
            what,
            counts: Arc::new(scan.counts),
            low: Arc::default(),
            freed: Vec::new(),
            left: 0,
            written: false,
            marked: false,
            report,
            progress: scan.progress,
        }
    }

    /// Clusters that are read and written as one batch.
    fn batch(&self) -> usize {
        (BATCH_BYTES / self.g.cluster_size()).max(1) as usize
    }

    fn fixed(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.report.corruptions_fixed += times;
        self.note(text);
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.report.findings.len() < MAX_FINDINGS {
            self.report.findings.push(text());
        }
    }

    /// Writes parts of an image whose present state is not worth keeping; says so in the header first.
    async fn write(&mut self, pieces: &[(HostOffset, Bytes)]) -> Result<()> {
        if pieces.is_empty() {
            return Ok(());
        }
        self.mark().await?;
        write_pieces(self.file, pieces).await
    }

    /// Sets the dirty bit before the first write, where it exists and something may be wrong meanwhile.
    async fn mark(&mut self) -> Result<()> {
        self.written = true;
        let can = self.header.version == Version::V3 && self.what == Repair::All;
        if !can || self.header.incompatible.has(Incompatible::DIRTY) {
            return Ok(());
        }
        self.header.incompatible.0 |= Incompatible::DIRTY;
        self.marked = true;
        switch(self.file, &self.header).await
    }

    /// After an error: the image is no worse than it was, and was not dirty.
    async fn unmark(&mut self) {
        if self.marked {
            self.header.incompatible.0 &= !Incompatible::DIRTY;
            if let Err(error) = switch(self.file, &self.header).await {
                log::warn!("qcow2: the image stays marked as dirty: {error}");
            }
        }
    }

    /// Makes all durable, and then says in the header that the image is in order, if it is.
    async fn finish(&mut self) -> Result<()> {
        if self.written {
            self.file.flush().await?;
        }
        let bits = Incompatible::DIRTY | Incompatible::CORRUPT;
        if self.left == 0 && self.header.incompatible.0 & bits != 0 {
            self.header.incompatible.0 &= !bits;
            switch(self.file, &self.header).await?;
        }
        Ok(())
    }

    /// Punches holes where leaked clusters were. Nothing durable points to them.
    async fn discard_leaks(&mut self) -> Result<()> {
        let bits = self.g.cluster_bits();
        for run in std::mem::take(&mut self.freed) {
            let end = (run.end << bits).min(self.file.size());
            let len = end.saturating_sub(run.start << bits);
            self.file.discard(run.start << bits, len).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
