//! The same file, opened otherwise: for reading only, for writing, past the page cache.
//!
//! A second handle is opened beside the first, by way of the first, so that it is the same file whatever has become of the name. Both
//! are locked until one is given up: no moment is left in which another program could take the file.

use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{File, Open, locks, open_error};
use crate::driver::{ReopenOptions, Reopening};
use crate::error::Result;
use crate::io::OpenMode;
use crate::open::Aio;

/// A second handle. Dropped, it is closed, and its locks go with it.
pub(super) struct Reopened {
    place: Arc<ArcSwap<Open>>,
    handle: Open,
    /// What a writer must lock, found free by the first handle.
    more: locks::More,
}

impl Reopening for Reopened {
    fn commit(self: Box<Self>) {
        let Reopened {
            place,
            handle,
            more,
        } = *self;
        let old = place.swap(Arc::new(handle));
        drop(more);
        // Now, and not when the last request that uses it has ended.
        locks::release(&old.host);
    }
}

impl File {
    pub(super) async fn do_reopen(&self, options: ReopenOptions) -> Result<Reopened> {
        let ReopenOptions {
            read_only,
            direct,
            no_flush,
            settings: _,
            file: _,
        } = options;
        let old = self.present();
        if read_only && !old.read_only {
            // What has been written by this handle is not lost with an error that only this handle is told.
            self.do_flush().await?;
        }
        let mode = OpenMode {
            writable: !read_only,
            direct,
            ring: self.options.aio == Aio::IoUring,
        };
        let opened = old.host.reopen(mode).await;
        let opened = opened.map_err(|error: io::Error| open_error(self.filename(), direct, &error));
        let handle = Open {
            host: opened?,
            read_only,
            no_flush,
            direct,
        };
        // Where nobody is in the way of the first handle, nobody is in that of the second, which could not tell the first from others.
        let more = match read_only {
            true => locks::More::none(&old),
            false => locks::More::acquire(&old, &self.options)?,
        };
        locks::acquire_again(&handle.host, !read_only, &self.options)?;
        Ok(Reopened {
            place: self.open.clone(),
            handle,
            more,
        })
    }
}
