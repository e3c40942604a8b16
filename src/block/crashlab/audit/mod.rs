//! A second reader of qcow2 images, written from the specification and sharing no code with the driver.
//!
//! It reads the bytes of a whole image, shows what each layer holds, counts the references to every cluster, and names what
//! is dangerous: that which lets a later guest write change or lose something that it does not write to.

mod bitmaps;
mod layer;
mod names;

use std::sync::Arc;

use super::content::Content;
use crate::protocols::memory::Memory;

pub use bitmaps::{Bitmap, bitmaps_differ, with_bitmaps};
pub use layer::Layer;
pub use names::with_old_snapshots;

/// Why an image cannot be read, or what is wrong with it.
pub type Problem = String;

const DATA_FILE: u64 = 1 << 2;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An image, its header and snapshot table understood.
#[derive(Debug)]
pub struct Audit<'a> {
    bytes: &'a [u8],
    data: Option<&'a Memory>,
    backing: Option<&'a Content>,
    cluster_bits: u32,
    size: u64,
    refcount_bits: u32,
    refcount_table: (u64, u64),
    incompatible: u64,
    active: (u64, u64),
    table: (u64, u64),
    snapshots: Vec<Snapshot>,
    directory: (u64, u64),
    bitmaps: Vec<Bitmap>,
}

/// A snapshot as its table entry has it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Unique in the image.
    pub id: String,
    /// The user's name.
    pub name: String,
    /// Bytes of the disk.
    pub size: u64,
    l1: (u64, u64),
}

/// What the references of an image say, beside its refcounts.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What can lose or change data, in words.
    pub dangers: Vec<String>,
    /// Clusters counted more often than referred to.
    pub leaks: u64,
    /// Counted clusters behind the end of the file: they become leaks when it grows.
    pub leaks_beyond: u64,
    /// COPIED flags that do not say what the refcounts say, and are not dangerous.
    pub stale_flags: u64,
    /// One of them, in words.
    pub stale_flag: Option<String>,
}

/// Who uses a host cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Nothing,
    Metadata,
    L2Table,
    /// The content of this guest cluster.
    Data(u64),
    /// Parts of compressed streams.
    Streams,
}

/// References to each cluster of the file, and what they are.
#[derive(Debug)]
struct References {
    counts: Vec<(u64, Use)>,
    dangers: Vec<String>,
}

impl References {
    fn new(clusters: u64) -> Self {
        References {
            counts: vec![(0, Use::Nothing); clusters as usize],
            dangers: Vec::new(),
        }
    }

    fn add(&mut self, cluster: u64, used: Use, what: &str) {
        let Some((count, before)) = self.counts.get_mut(cluster as usize) else {
            self.dangers.push(format!(
                "{what}: cluster {cluster:#x} lies behind the end of the file"
            ));
            return;
        };
        *count += 1;
        if *count > 1 && (*before != used || used == Use::Metadata) {
            self.dangers.push(format!(
                "cluster {cluster:#x} is {before:?} and {used:?} ({what})"
            ));
        }
        *before = used;
    }

    fn count(&self, cluster: u64) -> u64 {
        self.counts
            .get(cluster as usize)
            .map_or(0, |(count, _)| *count)
    }
}

/// The refcounts in the file.
#[derive(Debug)]
struct Stored {
    /// Of the clusters of the file.
    counts: Vec<u64>,
    /// How many clusters behind its end are counted.
    beyond: u64,
}

impl Stored {
    fn count(&self, cluster: u64) -> u64 {
        self.counts.get(cluster as usize).copied().unwrap_or(0)
    }
}

impl<'a> Audit<'a> {
    /// Understands the header and the snapshot table.
    pub fn new(bytes: &'a [u8]) -> Result<Audit<'a>, Problem> {
        Audit::of(bytes, None)
    }

    /// The same of an image whose guest data may lie in an external data file.
    pub fn of(bytes: &'a [u8], data: Option<&'a Arc<Memory>>) -> Result<Audit<'a>, Problem> {
        if bytes.get(..4) != Some(b"QFI\xfb") {
            return Err("no qcow2 magic".to_owned());
        }
        let version = be32(bytes, 4)?;
        let v3 = version >= 3;
        let cluster_bits = be32(bytes, 20)?;
        if !(9..=21).contains(&cluster_bits) || !(2..=3).contains(&version) {
            return Err(format!("version {version}, cluster bits {cluster_bits}"));
        }
        let order = if v3 { be32(bytes, 96)? } else { 4 };
        let mut audit = Audit {
            bytes,
            data: data.map(|data| &**data),
            backing: None,
            cluster_bits,
            size: be64(bytes, 24)?,
            refcount_bits: 1 << order.min(6),
            refcount_table: (be64(bytes, 48)?, u64::from(be32(bytes, 56)?)),
            incompatible: if v3 { be64(bytes, 72)? } else { 0 },
            active: (be64(bytes, 40)?, u64::from(be32(bytes, 36)?)),
            table: (be64(bytes, 64)?, 0),
            snapshots: Vec::new(),
            directory: (0, 0),
            bitmaps: Vec::new(),
        };
        audit.read_snapshots(be32(bytes, 60)?)?;
        if v3 {
            audit.read_bitmaps()?;
        }
        Ok(audit)
    }

    /// The same image over a backing file that shows this.
    pub fn over(self, backing: Option<&'a Content>) -> Audit<'a> {
        Audit { backing, ..self }
    }

    fn read_snapshots(&mut self, count: u32) -> Result<(), Problem> {
        let mut at = self.table.0;
        for _ in 0..count {
            let name_at = at + 40 + u64::from(be32(self.bytes, at + 36)?);
            let id_len = u64::from(be16(self.bytes, at + 12)?);
            let name_len = u64::from(be16(self.bytes, at + 14)?);
            let size = match be32(self.bytes, at + 36)? {
                16.. => be64(self.bytes, at + 48)?,
                _ => self.size,
            };
            let id = text(self.bytes, name_at, id_len)?;
            let name = text(self.bytes, name_at + id_len, name_len)?;
            self.snapshots.push(Snapshot {
                id,
                name,
                size,
                l1: (be64(self.bytes, at)?, u64::from(be32(self.bytes, at + 8)?)),
            });
            at = (name_at + id_len + name_len).next_multiple_of(8);
        }
        self.table.1 = at - self.table.0;
        Ok(())
    }

    /// Whether the image says that its refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & 1 != 0
    }

    /// Whether guest data lie in a file of their own.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & DATA_FILE != 0
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters of the file; the last may be there in part.
    fn clusters(&self) -> u64 {
        (self.bytes.len() as u64).div_ceil(self.cluster_size())
    }

    /// The snapshots in the order of their table.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// What the disk holds.
    pub fn active(&self) -> Result<Content, Problem> {
        self.layer(self.active)?.content(self.size)
    }

    /// Whether a data file that is to be readable as a raw image shows what the disk shows.
    pub fn check_raw(&self, active: &Content) -> Result<(), Problem> {
        const PIECE: u64 = 64 << 10;
        let is_raw = self.has_data_file() && be64(self.bytes, 88)? & 2 != 0;
        let (true, Some(data)) = (is_raw, self.data) else {
            return Ok(());
        };
        let mut raw = Content::new(self.size);
        for at in (0..self.size).step_by(PIECE as usize) {
            let piece = data.peek(at, PIECE.min(self.size - at));
            if !piece.is_known_zero() {
                raw.write(at, &piece.to_bytes());
            }
        }
        match active.difference(&raw) {
            Some(problem) => Err(format!("the raw data file: {problem}")),
            None => Ok(()),
        }
    }

    /// What a snapshot holds.
    pub fn content(&self, snapshot: &Snapshot) -> Result<Content, Problem> {
        self.layer(snapshot.l1)?.content(snapshot.size)
    }

    fn layer(&self, l1: (u64, u64)) -> Result<Layer<'a>, Problem> {
        let layer = Layer::new(self.bytes, self.cluster_bits, self.incompatible, l1)?;
        Ok(layer.with_data(self.data).with_backing(self.backing))
    }

    /// Counts all references and holds them against the refcounts and flags.
    pub fn verdict(&self) -> Result<Verdict, Problem> {
        let mut references = References::new(self.clusters());
        self.count_metadata(&mut references)?;
        let layers = std::iter::once(self.active).chain(self.snapshots.iter().map(|s| s.l1));
        for l1 in layers {
            self.count_layer(&mut references, l1)?;
        }
        self.judge(references)
    }

    fn count_metadata(&self, references: &mut References) -> Result<(), Problem> {
        let cluster = self.cluster_size();
        let mut area = |at: u64, len: u64, what: &str| {
            for number in at / cluster..(at + len).div_ceil(cluster) {
                references.add(number, Use::Metadata, what);
            }
        };
        area(0, 1, "header");
        area(self.active.0, self.active.1 * 8, "active L1 table");
        area(self.table.0, self.table.1, "snapshot table");
        for snapshot in &self.snapshots {
            area(snapshot.l1.0, snapshot.l1.1 * 8, "L1 table of a snapshot");
        }
        let (at, clusters) = self.refcount_table;
        area(at, clusters * cluster, "refcount table");
        for block in self.refcount_blocks()?.into_iter().filter(|at| *at != 0) {
            area(block, cluster, "refcount block");
        }
        area(self.directory.0, self.directory.1, "bitmap directory");
        for bitmap in &self.bitmaps {
            area(bitmap.table.0, bitmap.table.1 * 8, "bitmap table");
            for at in bitmap.clusters() {
                area(at, cluster, "bits of a bitmap");
            }
        }
        Ok(())
    }

    fn refcount_blocks(&self) -> Result<Vec<u64>, Problem> {
        let (at, clusters) = self.refcount_table;
        let entries = clusters * self.cluster_size() / 8;
        Ok(words(self.bytes, at, entries)?.collect())
    }

    fn count_layer(&self, references: &mut References, l1: (u64, u64)) -> Result<(), Problem> {
        let cluster = self.cluster_size();
        let layer = self.layer(l1)?;
        for table in layer.tables() {
            references.add(table.at / cluster, Use::L2Table, "L2 table");
            for entry in layer.entries(table)? {
                for (number, stream) in entry.clusters(cluster) {
                    let used = match stream {
                        true => Use::Streams,
                        false => Use::Data(entry.guest),
                    };
                    references.add(number, used, "L2 entry");
                }
            }
        }
        Ok(())
    }

    fn judge(&self, references: References) -> Result<Verdict, Problem> {
        let stored = self.stored()?;
        let mut verdict = Verdict {
            leaks_beyond: stored.beyond,
            ..Verdict::default()
        };
        for (cluster, (used, what)) in references.counts.iter().enumerate() {
            let counted = stored.counts[cluster];
            verdict.leaks += u64::from(*used < counted);
            // A dirty image says itself that its counts and flags are wrong.
            if !self.is_dirty() && *used > counted {
                verdict.dangers.push(format!(
                    "cluster {cluster:#x} ({what:?}) is counted {counted} times and used {used} times"
                ));
            }
        }
        if !self.is_dirty() {
            self.judge_flags(&references, &stored, &mut verdict)?;
        }
        verdict.dangers.extend(references.dangers);
        Ok(verdict)
    }

    /// COPIED may only stand where nobody else refers to the cluster: who sees it writes in place.
    fn judge_flags(
        &self,
        references: &References,
        stored: &Stored,
        verdict: &mut Verdict,
    ) -> Result<(), Problem> {
        let cluster = self.cluster_size();
        let layer = self.layer(self.active)?;
        let mut judge = |number: u64, copied: bool, what: String| {
            let used = references.count(number);
            if copied && used > 1 {
                verdict.dangers.push(format!(
                    "{what} is flagged COPIED, and is used {used} times"
                ));
            } else if copied != (stored.count(number) == 1) {
                let counted = stored.count(number);
                let flagged = format!("{what} is counted {counted} times, COPIED is {copied}");
                verdict.stale_flag.get_or_insert(flagged);
                verdict.stale_flags += 1;
            }
        };
        for table in layer.tables() {
            let what = format!("L2 table {:#x}", table.at);
            judge(table.at / cluster, table.copied, what);
            for entry in layer.entries(table)? {
                for (number, stream) in entry.clusters(cluster) {
                    if !stream {
                        let what = format!("data of guest cluster {:#x}", entry.guest);
                        judge(number, entry.copied, what);
                    }
                }
            }
        }
        Ok(())
    }

    fn stored(&self) -> Result<Stored, Problem> {
        let bits = u64::from(self.refcount_bits);
        let per_block = self.cluster_size() * 8 / bits;
        let mut stored = Stored {
            counts: vec![0; self.clusters() as usize],
            beyond: 0,
        };
        for (index, block) in self.refcount_blocks()?.into_iter().enumerate() {
            if block == 0 {
                continue;
            }
            let counters = slice(self.bytes, block, self.cluster_size())?;
            // Whole words without counts are skipped: most of a block is empty.
            for (word, chunk) in counters.as_chunks::<8>().0.iter().enumerate() {
                if *chunk == [0; 8] {
                    continue;
                }
                let per_word = 64 / bits;
                for nth in word as u64 * per_word..(word as u64 + 1) * per_word {
                    let count = counter(counters, nth, bits);
                    match stored
                        .counts
                        .get_mut((index as u64 * per_block + nth) as usize)
                    {
                        Some(stored) => *stored = count,
                        None => stored.beyond += u64::from(count > 0),
                    }
                }
            }
        }
        Ok(stored)
    }
}

/// The nth counter of a block: big endian, or from the least significant bits of its byte on.
fn counter(block: &[u8], nth: u64, bits: u64) -> u64 {
    if bits < 8 {
        let byte = block[(nth * bits / 8) as usize];
        return u64::from(byte) >> (nth * bits % 8) & ((1 << bits) - 1);
    }
    let width = (bits / 8) as usize;
    let at = nth as usize * width;
    let bytes = &block[at..at + width];
    bytes
        .iter()
        .fold(0, |count, byte| count << 8 | u64::from(*byte))
}

/// Bytes of the image; what lies behind its end inside of a last cluster is an error too.
fn slice(bytes: &[u8], at: u64, len: u64) -> Result<&[u8], Problem> {
    let range = at as usize..(at.saturating_add(len)) as usize;
    bytes
        .get(range)
        .ok_or_else(|| format!("{len} bytes at {at:#x} lie behind the end of the file"))
}

fn be16(bytes: &[u8], at: u64) -> Result<u16, Problem> {
    array(bytes, at).map(u16::from_be_bytes)
}

fn be32(bytes: &[u8], at: u64) -> Result<u32, Problem> {
    array(bytes, at).map(u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: u64) -> Result<u64, Problem> {
    array(bytes, at).map(u64::from_be_bytes)
}

/// Big-endian words of a table.
fn words(bytes: &[u8], at: u64, count: u64) -> Result<impl Iterator<Item = u64>, Problem> {
    let table = slice(bytes, at, count.saturating_mul(8))?;
    let words = table.as_chunks().0.iter();
    Ok(words.map(|word| u64::from_be_bytes(*word)))
}

fn array<const N: usize>(bytes: &[u8], at: u64) -> Result<[u8; N], Problem> {
    let mut array = [0; N];
    array.copy_from_slice(slice(bytes, at, N as u64)?);
    Ok(array)
}

fn text(bytes: &[u8], at: u64, len: u64) -> Result<String, Problem> {
    let bytes = slice(bytes, at, len)?;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}
