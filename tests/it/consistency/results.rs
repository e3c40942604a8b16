//! What transactions have left, opened by the second reader of images and, in a sample, by qemu-img.

use std::fs;
use std::path::Path;

use block::crashlab::audit::Audit;
use block::crashlab::content::Content;

use super::super::harness::tool;
use super::draw::Format;
use super::{DISK_BYTES, DISKS, Shown, shows_one_moment};

/// An image that there is.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) name: String,
    pub(super) format: Format,
    /// Which of the images it stands on; one with a lower number.
    pub(super) backing: Option<usize>,
}

/// Something that shows a disk at a point in time.
#[derive(Debug)]
pub(super) struct Kept {
    /// The number of the disk.
    pub(super) disk: usize,
    pub(super) image: usize,
    pub(super) snapshot: Option<String>,
}

/// All that a transaction has kept, and what it has to show of each writer: at least what was answered when it was asked for, at
/// most what was sent when it was there.
#[derive(Debug)]
pub(super) struct Cut {
    pub(super) what: String,
    pub(super) kept: Vec<Kept>,
    pub(super) least: Vec<u64>,
    pub(super) most: Vec<u64>,
}

/// The images of a round.
pub(super) struct Images<'r> {
    folder: &'r Path,
    images: &'r [Image],
    bytes: Vec<Vec<u8>>,
    contents: Vec<Content>,
}

impl<'r> Images<'r> {
    /// Reads them all, from the lowest up, and looks whether each is sound.
    pub(super) fn read(folder: &'r Path, images: &'r [Image]) -> Result<Images<'r>, String> {
        let read = |image: &Image| fs::read(folder.join(&image.name)).unwrap();
        let mut all = Images {
            folder,
            images,
            bytes: images.iter().map(read).collect(),
            contents: Vec::new(),
        };
        for (number, image) in images.iter().enumerate() {
            let at = |problem| format!("{}: {problem}", image.name);
            let content = match image.format {
                Format::Raw => raw(&all.bytes[number]),
                Format::Qcow2 => {
                    let audit = all.audit(number).map_err(at)?;
                    let verdict = audit.verdict().map_err(at)?;
                    if audit.is_dirty() || verdict.leaks > 0 || !verdict.dangers.is_empty() {
                        return Err(at(format!("{verdict:?}, dirty: {}", audit.is_dirty())));
                    }
                    audit.active().map_err(at)?
                }
            };
            all.contents.push(content);
        }
        Ok(all)
    }

    fn audit(&self, number: usize) -> Result<Audit<'_>, String> {
        let backing = self.images[number].backing;
        let audit = Audit::new(&self.bytes[number])?;
        Ok(audit.over(backing.map(|below| &self.contents[below])))
    }

    /// Whether a cut is one. `by_qemu` says which of its results qemu-img reads too.
    pub(super) fn check(&self, cut: &Cut, mut by_qemu: impl FnMut() -> bool) -> Result<(), String> {
        let mut disks = Vec::new();
        for kept in &cut.kept {
            let bytes = self.shown(kept)?;
            if by_qemu() && bytes != self.by_qemu(kept) {
                return Err(format!("qemu-img reads {kept:?} otherwise"));
            }
            disks.push((kept.disk, bytes));
        }
        let shown: Vec<Shown<'_>> = disks
            .iter()
            .map(|(disk, bytes)| (*disk, &bytes[..]))
            .collect();
        shows_one_moment(&shown, &cut.least, &cut.most)
    }

    fn shown(&self, kept: &Kept) -> Result<Vec<u8>, String> {
        let content = match &kept.snapshot {
            None => self.contents[kept.image].clone(),
            Some(name) => {
                let audit = self.audit(kept.image)?;
                let found = audit.snapshots().iter().find(|other| other.name == *name);
                let found = found.ok_or_else(|| format!("there is no snapshot: {kept:?}"))?;
                audit.content(found)?
            }
        };
        match content.size() {
            DISK_BYTES => Ok(content.bytes(0, DISK_BYTES)),
            other => Err(format!("{kept:?} has {other} bytes")),
        }
    }

    fn by_qemu(&self, kept: &Kept) -> Vec<u8> {
        let Image { name, format, .. } = &self.images[kept.image];
        let which = kept.snapshot.as_ref();
        let which = which.map_or(String::new(), |name| format!("-l snapshot.name={name}"));
        let format = format.name();
        let raw = format!("{}.read", DISKS[kept.disk].0);
        let line = format!("qemu-img convert -f {format} -O raw {which} {name} {raw}");
        tool(self.folder, &line);
        fs::read(self.folder.join(raw)).unwrap()
    }
}

fn raw(bytes: &[u8]) -> Content {
    let mut content = Content::new(bytes.len() as u64);
    content.write(0, bytes);
    content
}
