//! The model's bytes, and the image's snapshots as images of their own.

use crate::driver::Child;
use crate::formats::qcow2::check::read_header;
use crate::formats::qcow2::snapshot::table::SnapshotTable;
use crate::units::HostOffset;

/// What a disk holds: plain bytes.
#[derive(Clone)]
pub(in super::super) struct Layer {
    bytes: Vec<u8>,
}

impl Layer {
    /// A disk of `size` bytes that shows `base`, and zeroes behind its end.
    pub(in super::super) fn new(size: u64, base: Option<Vec<u8>>) -> Self {
        let mut bytes = base.unwrap_or_default();
        bytes.resize(size as usize, 0);
        Layer { bytes }
    }

    pub(in super::super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(in super::super) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(in super::super) fn slice(&self, at: u64, len: usize) -> &[u8] {
        &self.bytes[at as usize..][..len]
    }

    pub(in super::super) fn grow(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
    }
}

/// Bytes whose words tell their guest offset and their stamp.
pub(in super::super) fn pattern(at: u64, len: usize, stamp: u32) -> Vec<u8> {
    let first = at / 8;
    let last = (at + len as u64).div_ceil(8);
    let words = (first..last).flat_map(|word| {
        let word = u64::from(stamp) << 32 | word & 0xffff_ffff;
        word.to_le_bytes()
    });
    words.skip((at % 8) as usize).take(len).collect()
}

/// For each snapshot its id and the first bytes of an image whose active layer it is.
pub(in super::super) async fn snapshot_headers(file: &Child) -> Vec<(String, Vec<u8>)> {
    let header = read_header(file).await.unwrap();
    let table = SnapshotTable::read(file, header.snapshots_offset.0, header.nb_snapshots);
    let table = table.await.unwrap();
    let entries = table.entries().iter();
    entries
        .map(|entry| {
            let info = entry.info(header.size);
            let mut header = header.clone();
            header.size = info.disk_size;
            header.l1_size = entry.l1_entries;
            header.l1_table_offset = HostOffset(entry.l1_offset);
            header.nb_snapshots = 0;
            header.snapshots_offset = HostOffset(0);
            (info.id, header.to_bytes().unwrap())
        })
        .collect()
}
