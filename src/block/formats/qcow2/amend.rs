//! Changes of the format of an open image: what `qemu-img amend` does for images that nobody uses.
//!
//! Each amendment is one durable switch of the header (`header_cell`): after an error, and at a crash, the image is what it was.
//! What would need more than the header, and a completed snapshot table for version 3, is refused.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::header::{Autoclear, Compatible, Header, Version};
use super::image::Image;
use super::snapshot::CompleteTable;
use crate::driver::{AmendOptions, BackingFile, Compat};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::QCOW2_MAX_BACKING_NAME;

/// Bytes of the header behind the fields of version 3: compression type and padding.
const TRAILING_BYTES: usize = 8;

/// The longest name of a backing format, as it is believed when it is read.
const MAX_FORMAT_NAME: usize = 15;

impl Image {
    /// Makes the changes (see `Driver::amend`). Cancellation: run to the end by the caller.
    pub(super) async fn amend(self: &Arc<Self>, options: &AmendOptions) -> Result<()> {
        // Alone: requests see one version from their beginning to their end.
        let _alone = self.gate.close().await;
        self.check_range(0, 0)?;
        self.prepare_metadata_change().await?;
        let old = self.header.get();
        validate(&old, options)?;
        let upgrades = options.compat == Some(Compat::V1_1) && old.version == Version::V2;
        let mut snapshots = match upgrades {
            true => self.complete_snapshots().await?,
            false => None,
        };
        let before = self
            .may_have_backing
            .fetch_or(names_backing(options), Ordering::AcqRel);
        let table = snapshots.as_ref().map(|table| table.offset(self));
        let change = |header: &mut Header| {
            apply(header, options);
            header.snapshots_offset = table.unwrap_or(header.snapshots_offset);
        };
        let amended = match moves(options) {
            true => self.header.rewrite(change).await,
            false => self.header.update(change).await,
        };
        if let Err(error) = amended {
            self.may_have_backing.store(before, Ordering::Release);
            if self.header.check().is_err() {
                // It may be the new one.
                snapshots.iter_mut().for_each(CompleteTable::keep);
            }
            return Err(error);
        }
        if let Some(table) = snapshots {
            self.adopt_snapshots(table);
        }
        let v3 = self.header.get().version == Version::V3;
        self.has_zero_flag.store(v3, Ordering::Release);
        if options.data_file_raw == Some(false) {
            self.data.is_raw_no_more();
        }
        Ok(())
    }
}

/// Whether more than fixed fields may change.
fn moves(options: &AmendOptions) -> bool {
    options.compat.is_some() || options.backing.is_some()
}

fn names_backing(options: &AmendOptions) -> bool {
    let backing = options.backing.as_ref();
    backing.is_some_and(|backing| backing.name.is_some())
}

fn apply(header: &mut Header, options: &AmendOptions) {
    if options.compat == Some(Compat::V1_1) && header.version == Version::V2 {
        header.version = Version::V3;
        header.trailing = vec![0; TRAILING_BYTES];
        header.set_feature_names();
    }
    if let Some(lazy) = options.lazy_refcounts {
        set(&mut header.compatible.0, Compatible::LAZY_REFCOUNTS, lazy);
    }
    if let Some(raw) = options.data_file_raw {
        set(&mut header.autoclear.0, Autoclear::DATA_FILE_RAW, raw);
    }
    if let Some(BackingFile { name, format }) = &options.backing {
        header.backing_name.clone_from(name);
        header.set_backing_format(format.as_deref());
    }
}

fn set(bits: &mut u64, bit: u64, on: bool) {
    match on {
        true => *bits |= bit,
        false => *bits &= !bit,
    }
}

/// What can be told from the options and the header, with QEMU's texts where it has one.
fn validate(header: &Header, options: &AmendOptions) -> Result<()> {
    let version = match options.compat {
        None => header.version,
        Some(Compat::V1_1) => Version::V3,
        Some(Compat::V0_10) if header.version == Version::V2 => Version::V2,
        Some(Compat::V0_10) => {
            return Err(unsupported(
                "An image of version 3 cannot be made one of version 2 while it is open",
            ));
        }
    };
    if options.lazy_refcounts == Some(true) && version == Version::V2 {
        return Err(invalid(
            "Lazy refcounts only supported with compatibility level 1.1 and above \
             (use compat=1.1 or greater)",
        ));
    }
    if options
        .refcount_bits
        .is_some_and(|bits| bits != header.geometry().refcount_bits())
    {
        return Err(unsupported(
            "The refcount width of an image cannot be changed while it is open",
        ));
    }
    let is_raw = header.autoclear.has(Autoclear::DATA_FILE_RAW);
    if options.data_file_raw == Some(true) && !is_raw {
        return Err(invalid("data-file-raw cannot be set on existing images"));
    }
    let stays_raw = is_raw && options.data_file_raw != Some(false);
    if stays_raw && names_backing(options) {
        return Err(invalid(
            "Backing file and data-file-raw cannot be used at the same time",
        ));
    }
    options.backing.as_ref().map_or(Ok(()), validate_backing)
}

fn validate_backing(backing: &BackingFile) -> Result<()> {
    let BackingFile { name, format } = backing;
    let wrong = |text: &str| text.is_empty() || text.contains('\0');
    let most = QCOW2_MAX_BACKING_NAME as usize;
    if name
        .as_deref()
        .is_some_and(|name| wrong(name) || name.len() > most)
    {
        return Err(invalid("The backing file's name is not valid"));
    }
    let Some(format) = format else {
        return Ok(());
    };
    if name.is_none() {
        return Err(invalid(
            "Backing format cannot be used without backing file",
        ));
    }
    if wrong(format) || format.len() > MAX_FORMAT_NAME {
        return Err(invalid("The backing file's format name is not valid"));
    }
    Ok(())
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

fn unsupported(message: &str) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

#[cfg(test)]
mod tests;
