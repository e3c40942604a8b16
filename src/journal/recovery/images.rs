//! Images whose headers were to be switched.

use std::fs;
use std::io;
use std::sync::Arc;

use block::driver::{Child, Driver as _, HeaderSwitch, Requests as _, WriteFlags};
use block::error::{Error, ErrorKind};
use block::formats::qcow2::check::{CheckOptions, Repair, repair};
use block::formats::qcow2::{is_marked_dirty, is_same_marked_dirty};
use block::io::IoContext;
use block::protocols::file::File;

use super::{Direction, is_newer, open_locked};
use crate::journal::record::{Identity, ImageSwitch, StagedImage, Time};
use crate::journal::report::ImageResult;

/// The image's file, locked, if it is the one that it was.
async fn open_image(
    io: &IoContext,
    image: &StagedImage,
) -> Result<File, (ImageResult, Option<String>)> {
    let failed = |text: String| (ImageResult::Failed, Some(text));
    let metadata = match fs::metadata(&image.path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err((ImageResult::Missing, None));
        }
        Err(error) => return Err(failed(error.to_string())),
    };
    if Identity::of(&metadata) != image.file {
        return Err((ImageResult::Replaced, None));
    }
    let opened = open_locked(io, &image.path).await;
    opened.map_err(|error| failed(error.to_string()))
}

/// Makes an image what it has to be.
pub(super) async fn switch_image(
    io: &IoContext,
    switch: &ImageSwitch,
    direction: Direction,
    unused: Option<Time>,
) -> (ImageResult, Option<String>) {
    let file = match open_image(io, &switch.image).await {
        Ok(file) => file,
        Err(failed) => return failed,
    };
    let result = switch_header(&file, switch, direction, unused).await;
    // This makes it durable, also where it was there: a killed process may have left it in the page cache alone.
    let closed = file.close().await;
    match result.and_then(|result| closed.map(|()| result)) {
        Ok(result) => result,
        Err(error) => (ImageResult::Failed, Some(error.to_string())),
    }
}

async fn switch_header(
    file: &File,
    switch: &ImageSwitch,
    direction: Direction,
    unused: Option<Time>,
) -> Result<(ImageResult, Option<String>), Error> {
    let changed = |what: &str| Ok((ImageResult::Changed, Some(what.to_owned())));
    let offset = switch.image.offset;
    let end = offset + switch.before.len() as u64;
    let Some(after) = switch.after().filter(|_| end <= file.size()) else {
        return changed("The file is too short");
    };
    let sector = file.read(offset, end - offset).await?.to_bytes();
    let (is, result) = match direction {
        Direction::Forward => (&switch.before, ImageResult::Switched),
        Direction::Back => (&after, ImageResult::SwitchedBack),
    };
    let wanted = match direction {
        Direction::Forward => &after,
        Direction::Back => &switch.before,
    };
    if sector[..] == wanted[..] {
        return Ok((ImageResult::Unchanged, None));
    }
    // It has been put back. Where its refcounts were not right yet, the next who opens it puts them right; or that has been done already.
    let is_same = is_same_marked_dirty(&sector, wanted) || is_same_marked_dirty(wanted, &sector);
    if direction == Direction::Back && is_same {
        return Ok((ImageResult::Unchanged, None));
    }
    if sector[..] != is[..] {
        return changed("Its header is neither the old nor the new one");
    }
    // Another program that writes to an image marked dirty repairs it first, and clears the mark: these are writes of our own guests.
    let ours = is_marked_dirty(is);
    let (until, what) = match direction {
        Direction::Forward => (switch.until, "It was written to after the crash"),
        Direction::Back => (unused, "It was written to after it could not be put back"),
    };
    if !ours && is_newer(&switch.image.path, until)? {
        return changed(what);
    }
    let write = HeaderSwitch {
        before: is.clone(),
        after: wanted.clone(),
    };
    let (at, bytes) = write.difference();
    file.write(
        offset + at as u64,
        bytes.to_vec().into(),
        WriteFlags::default(),
    )
    .await?;
    Ok((result, None))
}

/// Gives back what a change that does not happen has taken in an image. A leak does no harm, so errors are logged.
pub(super) async fn reclaim(io: &IoContext, image: &StagedImage) {
    let Ok(file) = open_image(io, image).await else {
        return;
    };
    let file = Arc::new(file);
    let options = CheckOptions {
        discard_leaks: true,
        ..CheckOptions::default()
    };
    let path = image.path.display();
    if image.offset == 0 {
        match repair(&Child::new(file.clone()), Repair::Leaks, &options).await {
            Ok(report) if report.leaks_fixed > 0 => {
                log::info!(
                    "'{path}': {} leaked clusters were freed",
                    report.leaks_fixed
                );
            }
            Ok(_) => {}
            // It is repaired when it is opened.
            Err(error) if error.kind() == ErrorKind::Corrupt => log::debug!("'{path}': {error}"),
            Err(error) => log::warn!("'{path}' may have leaked clusters: {error}"),
        }
    }
    let _ = file.close().await;
}
