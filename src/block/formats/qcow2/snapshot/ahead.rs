//! A change that goes as far as the header while requests go on: deletes and reverts alone.
//!
//! What the header is going to point to depends on nothing that requests do: the tables that snapshots refer to do not change, and a copy
//! of an L1 table lies where nobody else writes. So the header is switched first, and the disk follows in memory, when requests have been
//! held back. Until then they go on with the active tables of before, which nothing in the file points to any more: what they write
//! there, durably or not, is what a revert takes away, and a crash in between is one behind it. Should the change be taken back, the
//! header points to these tables again, which have all that was written.
//!
//! ```text
//! H dirty | L1 copies, new table | write-back | header | gate closed | the disk, in memory | gate open
//! ^^^^^ requests go on as if there were no change ^^^^^               ^ the moment that it shows
//! ```
//!
//! The header is kept from before the switch, so that a journal can say what it was: nobody clears the dirty bit, and a refcount table that
//! has grown meanwhile is switched to behind the change. Nothing that the tables of before refer to is freed before it is known that these
//! have been left for good. What of them is still to be written then is written first (`Settling::drop_later`): nobody else may have got
//! their clusters by that time.

use std::sync::Arc;

use super::counting::{Counting, Margin};
use super::settle::Expecting;
use super::settling::{changes, sum};
use super::staged::{Ready, Staged};
use crate::error::Result;
use crate::formats::qcow2::header::Version;
use crate::formats::qcow2::image::Image;

impl Image {
    /// Whether deletes and reverts can go ahead: what they take can be counted behind the switch, whatever requests do, and no bitmap
    /// says what has changed. Nobody else changes snapshots.
    pub(super) async fn may_go_ahead(&self) -> bool {
        if self.header.get().version == Version::V2
            || !self.bitmaps.is_empty()
            || self.settling.has_passed_on()
        {
            return false;
        }
        let tables = self.snapshots.get().entries().len() as u64;
        // Reverts take one L1 table in the end, however many they are.
        self.counters_are_wide(tables, 1, Margin::Guests).await
    }
}

impl Staged {
    /// A change without steps, while requests go on.
    pub(super) fn ahead(image: Arc<Image>, ready: Ready) -> Result<Staged> {
        let mut staged = Staged::new(image, ready)?;
        staged.goes_ahead = true;
        staged.counting = Counting::Behind;
        Ok(staged)
    }

    /// Marks the image before anything else is written: a journal can say then that it is marked.
    pub(super) async fn mark_ahead(&mut self) -> Result<()> {
        let image = self.image.clone();
        {
            // Whoever clears the mark has ended then, or finds that it is to stay.
            let _flushes = image.gate.close_to_flushes().await;
            self.expecting = Some(Expecting::new(image.clone()));
        }
        image.mark_dirty().await
    }

    /// Nobody else changes the header from now on.
    pub(super) async fn keep_header(&mut self) {
        if self.kept.is_none() {
            // A write-back that is going to switch to another refcount table does so before.
            let _quiet = self.image.commits.stop().await;
            self.kept = Some(self.image.header.keep().await);
        }
    }

    /// Holds back what makes the image durable.
    pub(super) async fn hold_flushes(&mut self) {
        if self.goes_ahead {
            self.alone.shut_to_flushes().await;
        }
    }

    /// Holds requests back, if that has not been done.
    pub(super) async fn hold(&mut self) -> Result<()> {
        if self.goes_ahead && !self.is_held {
            self.alone.shut().await;
            self.is_held = true;
        }
        Ok(())
    }

    /// Makes the image in memory what the header says. Requests have been held back.
    pub(super) fn apply_ahead(&mut self) {
        let image = self.image.clone();
        let mut all = std::mem::take(&mut self.changes);
        let active = self.new_active();
        if let Some(active) = &active {
            // All that requests have put there up to now.
            all.extend(changes(image.g, &self.before.entries(), -1));
            image.set_l1(active.clone());
        }
        let (takes, drops): (Vec<_>, Vec<_>) =
            sum(all).into_iter().partition(|change| change.more > 0);
        if let Some(active) = &active {
            image.settling.apply(image.g, &takes, &self.before, active);
        }
        image.settling.drop_later(drops);
    }
}
