//! A full disk: what is on its way to be freed is freed at once, and the change that met it is tried once more.
//!
//! A freed cluster waits for the next write-back and until all requests have left that may still use it (`quarantine`), and what
//! a deleted snapshot frees waits for its settling. A guest that discards and then writes need not know of either.
//!
//! The change that met the full disk is one of those requests, and holds locks besides. So it leaves the image first and
//! begins anew: what of it was written is written again, in place.

use tokio::time::Instant;

use super::image::Image;
use crate::error::{ErrorKind, Result};
use crate::limits::QCOW2_SETTLE_FOR_SPACE;

impl Image {
    /// Makes a change that may be made twice, and must not be inside the gate yet. `NoSpace` only when there is truly none.
    pub(super) async fn with_space<F>(&self, change: impl Fn() -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        let first = change().await;
        match &first {
            Err(error) if error.kind() == ErrorKind::NoSpace && self.make_space().await => {
                change().await
            }
            _ => first,
        }
    }

    /// Frees all that is on its way to be freed; answers whether there was anything.
    async fn make_space(&self) -> bool {
        let settles = self.settling.frees();
        if !settles && self.quarantine.is_empty() {
            return false;
        }
        if settles {
            // Others go on meanwhile.
            self.settle_until(Instant::now() + QCOW2_SETTLE_FOR_SPACE)
                .await;
        }
        if self.gate.is_reserved() {
            // Who has reserved it waits for this request. Mostly all is freed by this, too.
            let Some(_flushing) = self.gate.try_enter_flush() else {
                return false;
            };
            return !self.is_closed() && self.write_back().await.is_ok();
        }
        let _alone = self.gate.close().await;
        if self.is_closed() || self.damage.check().is_err() {
            return false;
        }
        match self.write_back_all().await {
            Ok(()) => true,
            Err(error) => {
                log::warn!("qcow2: the disk is full, and nothing more could be freed: {error}");
                false
            }
        }
    }
}
