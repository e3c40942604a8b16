//! Clusters of persistent bitmaps (specification: "Bitmaps extension", "Bitmap directory", "Bitmap table").
//!
//! As for `qemu-img`, an image whose autoclear bit does not vouch for its bitmaps has none: their clusters are leaks.

use super::Scan;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::bitmaps::{Directory, cluster_of, read_table};

impl Scan<'_> {
    /// Counts directory, tables and data of the bitmaps that the header points to.
    pub(super) async fn count_bitmaps(&mut self) -> Result<()> {
        let directory = match Directory::read(self.file, &self.header).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.bitmaps_are_wrong(&error);
                return Ok(());
            }
            other => other?,
        };
        self.use_metadata("bitmap directory", directory.offset.0, directory.len)?;
        for bitmap in &directory.entries {
            let bytes = bitmap.table_bytes();
            self.use_metadata("bitmap table", bitmap.table.0, bytes)?;
            self.spend(bytes)?;
            let (file, g) = (self.file, self.g);
            read_table(file, bitmap, |entry| {
                match cluster_of(g, entry) {
                    Ok(None) => {}
                    Ok(Some(host)) => self.use_metadata("bitmap", host.0, g.cluster_size())?,
                    Err(error) => self.bitmaps_are_wrong(&error),
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    fn bitmaps_are_wrong(&mut self, error: &Error) {
        self.corrupt(1, || format!("ERROR {error}"));
    }
}
