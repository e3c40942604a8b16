//! The same file, opened otherwise: for reading only, for writing, past the page cache.
//!
//! A second handle is opened beside the first, by way of the first, so that it is the same file whatever has become of the name. Both
//! are locked until one is given up: no moment is left in which another program could take the file.

use std::sync::Arc;

use tokio::sync::OwnedMutexGuard;

use super::claims::Holding;
use super::{File, Open, locks, open_error};
use crate::driver::{DriverSettings, Need, NothingToChange, ReopenOptions, Reopening};
use crate::error::Result;
use crate::io::OpenMode;
use crate::open::Aio;

/// A second handle. Dropped, it is closed, and its locks go with it.
pub(super) struct Reopened {
    holding: Arc<Holding>,
    open: Open,
    /// What it is locked for.
    level: Need,
    /// Nobody claims more meanwhile.
    _alone: OwnedMutexGuard<()>,
}

impl Reopening for Reopened {
    fn commit(self: Box<Self>) {
        self.holding.replace(self.open, self.level);
    }
}

impl File {
    pub(super) async fn do_reopen(&self, options: ReopenOptions) -> Result<Box<dyn Reopening>> {
        let ReopenOptions {
            read_only,
            direct,
            no_flush,
            settings,
            file: _,
        } = options;
        let alone = self.holding.changing.clone().lock_owned().await;
        let old = self.present();
        let auto = match settings {
            Some(DriverSettings::File { auto_read_only }) => auto_read_only,
            _ => old.auto,
        };
        if (read_only, auto, direct, no_flush)
            == (old.read_only, old.auto, old.direct, old.no_flush)
        {
            // A handle that was given, or opened with other rights, need not be had again.
            return Ok(Box::new(NothingToChange));
        }
        if read_only && !old.read_only {
            // What has been written by this handle is not lost with an error that only this handle is told.
            self.do_flush().await?;
        }
        let mode = OpenMode {
            writable: !read_only && !auto,
            direct,
            ring: self.holding.options.aio == Aio::IoUring,
        };
        let opened = old.host.reopen(mode).await;
        let opened = opened.map_err(|error| open_error(self.filename(), direct, &error));
        let mut open = Open {
            host: opened?,
            reading: None,
            read_only,
            auto,
            no_flush,
            direct,
        };
        // Where nobody is in the way of the first handle, nobody is in that of the second, which could not tell the first from others.
        let level = self.holding.level();
        locks::acquire_again(&open.host, level, &self.holding.options)?;
        if level == Need::Writes && open.opens_for_writing() {
            open = self.open_for_writing(&Arc::new(open)).await?;
        }
        Ok(Box::new(Reopened {
            holding: self.holding.clone(),
            open,
            level,
            _alone: alone,
        }))
    }
}
