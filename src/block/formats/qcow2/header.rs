//! The image header with its extensions and the backing file's name (specification: "Header", "Header extensions").
//!
//! `parse` reads the structure, `validate` holds every number against the limits, `to_bytes` writes it back with
//! everything that this driver does not know preserved: header bytes behind the known fields and unknown extensions.
//!
//! ```text
//! | fixed fields (72 or 104) | more header bytes | extensions ... end | backing name | rest of cluster 0 |
//! ```

use super::codec::CompressionType;
use super::geometry::{Geometry, SUBCLUSTER_ORDER};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::units::HostOffset;

mod features;
mod rewrite;

pub(crate) use features::{Autoclear, Compatible, Incompatible};
pub(crate) use rewrite::{Rewrite, SECTOR, Stage};

/// The first bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// What is said of a file that begins otherwise.
pub const NOT_QCOW2: &str = "Image is not in qcow2 format";
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Where the fields start that one write switches together.
const SWITCH_START: usize = 36;

/// Header extension types.
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_ENCRYPTION: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// The format's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// No feature bits, no zero flag, 16-bit refcounts.
    V2,
    /// The current one.
    V3,
}

/// A header extension as it is in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Extension {
    /// Its type.
    pub(crate) kind: u32,
    /// Its data without padding.
    pub(crate) data: Vec<u8>,
}

/// The header in native form. Field names are the specification's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: Version,
    /// The backing file's name, if the image has one.
    pub(crate) backing_name: Option<String>,
    pub(crate) cluster_bits: u32,
    /// Disk size in bytes.
    pub(crate) size: u64,
    pub(crate) crypt_method: u32,
    /// Entries of the active L1 table.
    pub(crate) l1_size: u32,
    pub(crate) l1_table_offset: HostOffset,
    pub(crate) refcount_table_offset: HostOffset,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) nb_snapshots: u32,
    pub(crate) snapshots_offset: HostOffset,
    pub(crate) incompatible: Incompatible,
    pub(crate) compatible: Compatible,
    pub(crate) autoclear: Autoclear,
    pub(crate) refcount_order: u32,
    /// Header bytes from 104 to `header_length`, as they are: compression type first.
    pub(crate) trailing: Vec<u8>,
    /// All extensions in order, without the end mark.
    pub(crate) extensions: Vec<Extension>,
}

/// Whether the first sector of an image says that its refcounts are worth nothing.
pub fn is_marked_dirty(sector: &[u8]) -> bool {
    let field = |at: usize| {
        sector
            .get(at..at + 8)
            .and_then(|field| field.try_into().ok())
    };
    let version = sector.get(4..8) == Some(&3u32.to_be_bytes()[..]);
    let incompatible = field(72).map_or(0, u64::from_be_bytes);
    version && Incompatible(incompatible).has(Incompatible::DIRTY)
}

/// Whether the first sector of a file names no other file: it is an image without a backing and without a data file, or none at all.
pub fn names_no_other(sector: &[u8]) -> bool {
    if sector.get(..4) != Some(&MAGIC[..]) {
        return true;
    }
    let field = |at: usize| {
        let field = sector.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_be_bytes(field))
    };
    let has_data_file = match sector.get(4..8) == Some(&2u32.to_be_bytes()[..]) {
        true => Some(false),
        false => field(72).map(|bits| Incompatible(bits).has(Incompatible::DATA_FILE)),
    };
    field(8) == Some(0) && has_data_file == Some(false)
}

/// Whether a first sector is `other` but for the mark that its refcounts are worth nothing.
pub fn is_same_marked_dirty(sector: &[u8], other: &[u8]) -> bool {
    let is_mark = |at: usize, is: u8, was: u8| at == 79 && is == was | Incompatible::DIRTY as u8;
    let mut bytes = sector.iter().zip(other).enumerate();
    is_marked_dirty(sector)
        && sector.len() == other.len()
        && bytes.all(|(at, (is, was))| is == was || is_mark(at, *is, *was))
}

impl Header {
    /// Bytes from the start of the image that `parse` needs: a cluster. Takes the first 24 bytes or more.
    pub(crate) fn bytes_needed(start: &[u8]) -> Result<u64> {
        let mut fields = Fields::new(start);
        if fields.u32()?.to_be_bytes() != MAGIC {
            return Err(Error::new(ErrorKind::InvalidInput, NOT_QCOW2));
        }
        let version = fields.u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("Unsupported qcow2 version {version}"),
            ));
        }
        fields.at = 20;
        let bits = fields.u32()?;
        if !(limits::QCOW2_MIN_CLUSTER_BITS..=limits::QCOW2_MAX_CLUSTER_BITS).contains(&bits) {
            return Err(invalid(format!("Unsupported cluster size: 2^{bits}")));
        }
        Ok(1 << bits)
    }

    /// Reads the header from the first cluster of an image (or all of a shorter image).
    pub(crate) fn parse(cluster: &[u8]) -> Result<Header> {
        let cluster_size = Self::bytes_needed(cluster)?;
        let mut fields = Fields::new(cluster);
        fields.at = 4;
        let version = match fields.u32()? {
            2 => Version::V2,
            _ => Version::V3,
        };
        let backing_offset = fields.u64()?;
        let backing_size = fields.u32()?;
        let mut header = Header {
            version,
            backing_name: None,
            cluster_bits: fields.u32()?,
            size: fields.u64()?,
            crypt_method: fields.u32()?,
            l1_size: fields.u32()?,
            l1_table_offset: HostOffset(fields.u64()?),
            refcount_table_offset: HostOffset(fields.u64()?),
            refcount_table_clusters: fields.u32()?,
            nb_snapshots: fields.u32()?,
            snapshots_offset: HostOffset(fields.u64()?),
            incompatible: Incompatible(0),
            compatible: Compatible(0),
            autoclear: Autoclear(0),
            refcount_order: 4,
            trailing: Vec::new(),
            extensions: Vec::new(),
        };
        let mut length = V2_LENGTH;
        if version == Version::V3 {
            length = header.parse_v3(&mut fields, cluster, cluster_size)?;
        }
        let is_inside = backing_offset != 0 && backing_offset < length as u64;
        if backing_offset > cluster_size || is_inside {
            return Err(invalid("Invalid backing file offset"));
        }
        let area_end = match backing_offset {
            0 => cluster_size,
            offset => offset,
        };
        header.extensions = parse_extensions(cluster, length, area_end as usize)?;
        if backing_offset != 0 {
            let name = backing_name(cluster, cluster_size, backing_offset, backing_size)?;
            header.backing_name = (!name.is_empty()).then_some(name);
        }
        Ok(header)
    }

    /// The fields of version 3; answers the header's length.
    fn parse_v3(
        &mut self,
        fields: &mut Fields<'_>,
        all: &[u8],
        cluster_size: u64,
    ) -> Result<usize> {
        self.incompatible = Incompatible(fields.u64()?);
        self.compatible = Compatible(fields.u64()?);
        self.autoclear = Autoclear(fields.u64()?);
        self.refcount_order = fields.u32()?;
        let length = fields.u32()? as usize;
        if length < V3_LENGTH {
            return Err(invalid("qcow2 header too short"));
        }
        if length as u64 > cluster_size {
            return Err(invalid("qcow2 header exceeds cluster size"));
        }
        if !length.is_multiple_of(8) {
            return Err(invalid("qcow2 header length is not a multiple of 8"));
        }
        self.trailing = all.get(V3_LENGTH..length).ok_or_else(too_short)?.to_vec();
        Ok(length)
    }

    /// Holds every field against the specification's and the engine's limits. Nothing of the image is used before.
    pub(crate) fn validate(&self) -> Result<()> {
        if self.refcount_order > 6 {
            return Err(invalid(
                "Reference count entry width too large; may not exceed 64 bits",
            ));
        }
        if self.incompatible.has(Incompatible::EXTENDED_L2)
            && self.cluster_bits < limits::QCOW2_MIN_EXTENDED_CLUSTER_BITS
        {
            return Err(invalid(format!(
                "Unsupported subcluster size: {}",
                (1_u32 << self.cluster_bits) >> SUBCLUSTER_ORDER
            )));
        }
        let g = self.geometry();
        let compression = self.compression_field();
        if (compression != 0) != self.incompatible.has(Incompatible::COMPRESSION) {
            return Err(invalid(
                "Compression type field does not match the compression type feature bit",
            ));
        }
        self.validate_tables(g)?;
        let needed = g.l1_entries_for(self.size);
        if needed > limits::QCOW2_MAX_L1_BYTES / 8 {
            return Err(invalid("Image is too big: its L1 table would be too large"));
        }
        if u64::from(self.l1_size) < needed {
            return Err(invalid("L1 table is too small"));
        }
        self.validate_features()
    }

    fn validate_tables(&self, g: Geometry) -> Result<()> {
        let reftable = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if reftable > limits::QCOW2_MAX_REFTABLE_BYTES {
            return Err(invalid(
                "Image does not contain a valid refcount table: too large",
            ));
        }
        check_table(
            g,
            "Reference count table",
            self.refcount_table_offset,
            reftable,
        )?;
        if self.refcount_table_clusters == 0 {
            return Err(invalid("Image does not contain a reference count table"));
        }
        let l1 = u64::from(self.l1_size) * 8;
        if l1 > limits::QCOW2_MAX_L1_BYTES {
            return Err(invalid("Active L1 table too large"));
        }
        check_table(g, "Active L1 table", self.l1_table_offset, l1)?;
        if self.nb_snapshots > limits::QCOW2_MAX_SNAPSHOTS {
            return Err(invalid("Snapshot table too large"));
        }
        // The least that the entries take; their real size is checked where the table is read.
        let snapshots = u64::from(self.nb_snapshots) * 40;
        check_table(g, "Snapshot table", self.snapshots_offset, snapshots)
    }

    /// Refuses what this driver cannot read at all.
    fn validate_features(&self) -> Result<()> {
        let unknown = self.incompatible.0 & !Incompatible::KNOWN;
        if unknown != 0 {
            let names = features::names(self.extension(EXT_FEATURE_NAMES), unknown);
            return Err(unsupported(format!(
                "Unsupported qcow2 feature(s): {names}"
            )));
        }
        self.validate_data_file()?;
        if self.compression_type().is_none() {
            return Err(unsupported(format!(
                "qcow2: unknown compression type: {}",
                self.compression_field()
            )));
        }
        match self.crypt_method {
            0 if self.extension(EXT_ENCRYPTION).is_some() => Err(invalid(
                "CRYPTO header extension only expected with LUKS encryption method",
            )),
            0 => Ok(()),
            1 => Err(unsupported("AES-encrypted qcow2 images are not supported")),
            2 => Err(unsupported(
                "LUKS-encrypted qcow2 images are not supported yet",
            )),
            other => Err(unsupported(format!(
                "Unsupported encryption method {other}"
            ))),
        }?;
        if self.autoclear.has(Autoclear::BITMAPS) && self.extension(EXT_BITMAPS).is_none() {
            return Err(invalid(
                "The bitmaps feature bit is set, but the image has no bitmaps extension",
            ));
        }
        Ok(())
    }

    fn validate_data_file(&self) -> Result<()> {
        let is_raw = self.autoclear.has(Autoclear::DATA_FILE_RAW);
        if !self.has_data_file() {
            return match is_raw {
                true => Err(invalid("data-file-raw requires a data file")),
                false => Ok(()),
            };
        }
        if is_raw && self.backing_name.is_some() {
            return Err(invalid(
                "data-file-raw cannot be set when there is a backing file",
            ));
        }
        if self.nb_snapshots > 0 {
            return Err(invalid(
                "Internal snapshots are not possible with an external data file",
            ));
        }
        Ok(())
    }

    /// The geometry; for headers that passed `validate`.
    pub(crate) fn geometry(&self) -> Geometry {
        let g = Geometry::new(self.cluster_bits, self.refcount_order);
        match self.incompatible.has(Incompatible::EXTENDED_L2) {
            true => g.with_extended_l2(),
            false => g,
        }
    }

    /// How clusters are compressed; always known in headers that passed `validate`.
    pub(crate) fn compression_type(&self) -> Option<CompressionType> {
        CompressionType::from_field(self.compression_field())
    }

    fn compression_field(&self) -> u8 {
        self.trailing.first().copied().unwrap_or(0)
    }

    /// The backing file's format as the image names it.
    pub(crate) fn backing_format(&self) -> Option<String> {
        let data = self.extension(EXT_BACKING_FORMAT)?;
        Some(String::from_utf8_lossy(data).into_owned())
    }

    /// Sets or removes the name of the backing file's format.
    pub(crate) fn set_backing_format(&mut self, format: Option<&str>) {
        self.extensions.retain(|ext| ext.kind != EXT_BACKING_FORMAT);
        if let Some(format) = format {
            let data = format.as_bytes().to_vec();
            let kind = EXT_BACKING_FORMAT;
            self.extensions.insert(0, Extension { kind, data });
        }
    }

    /// Guest data lie in an external data file.
    pub(crate) fn has_data_file(&self) -> bool {
        self.incompatible.has(Incompatible::DATA_FILE)
    }

    /// The external data file's name: what the image says, and nothing to be opened for that.
    pub(crate) fn data_file_name(&self) -> Option<String> {
        let data = self.extension(EXT_DATA_FILE)?;
        Some(String::from_utf8_lossy(data).into_owned())
    }

    /// Sets the name of the external data file.
    pub(crate) fn set_data_file_name(&mut self, name: &str) {
        self.extensions.retain(|ext| ext.kind != EXT_DATA_FILE);
        let (kind, data) = (EXT_DATA_FILE, name.as_bytes().to_vec());
        self.extensions.push(Extension { kind, data });
    }

    /// Puts the names of the feature bits that this driver knows into the header, as QEMU does in version 3.
    pub(crate) fn set_feature_names(&mut self) {
        self.extensions.retain(|ext| ext.kind != EXT_FEATURE_NAMES);
        let (kind, data) = (EXT_FEATURE_NAMES, features::name_table());
        self.extensions.push(Extension { kind, data });
    }

    /// The data of the bitmaps extension.
    pub(crate) fn bitmaps_extension(&self) -> Option<&[u8]> {
        self.extension(EXT_BITMAPS)
    }

    fn extension(&self, kind: u32) -> Option<&[u8]> {
        let found = self.extensions.iter().find(|ext| ext.kind == kind)?;
        Some(&found.data)
    }

    /// The header's length in bytes, without extensions.
    pub(crate) fn length(&self) -> usize {
        match self.version {
            Version::V2 => V2_LENGTH,
            Version::V3 => V3_LENGTH + self.trailing.len(),
        }
    }

    /// Header, extensions and backing name as they go to offset 0. Fails when they need more than a cluster.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut out = self.front();
        if let Some(name) = &self.backing_name {
            if name.len() > limits::QCOW2_MAX_BACKING_NAME as usize {
                return Err(invalid("Backing file name too long"));
            }
            let at = out.len();
            Self::point_to_name(&mut out, at, name.len());
            out.extend(name.as_bytes());
        }
        if out.len() as u64 > 1 << self.cluster_bits {
            return Err(invalid("The header does not fit into a cluster"));
        }
        Ok(out)
    }

    /// The fields and the extensions with their end mark. Where the name is, is left open.
    fn front(&self) -> Vec<u8> {
        let mut out = self.fixed_fields();
        for ext in &self.extensions {
            out.extend(ext.kind.to_be_bytes());
            out.extend((ext.data.len() as u32).to_be_bytes());
            out.extend(&ext.data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
        out
    }

    /// Fills in where the backing file's name is.
    fn point_to_name(front: &mut [u8], at: usize, len: usize) {
        front[8..16].copy_from_slice(&(at as u64).to_be_bytes());
        front[16..20].copy_from_slice(&(len as u32).to_be_bytes());
    }

    /// Where a first cluster says that the backing file's name is; 0 without one.
    fn name_offset(cluster: &[u8]) -> Result<usize> {
        let mut fields = Fields::new(cluster);
        fields.at = 8;
        Ok(fields.u64()? as usize)
    }

    /// The fields up to the end of the header; those of the backing name are zero here.
    pub(crate) fn fixed_fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        out.extend(MAGIC);
        let version: u32 = match self.version {
            Version::V2 => 2,
            Version::V3 => 3,
        };
        out.extend(version.to_be_bytes());
        // Filled in with the name.
        out.extend([0; 12]);
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(self.l1_table_offset.0.to_be_bytes());
        out.extend(self.refcount_table_offset.0.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.nb_snapshots.to_be_bytes());
        out.extend(self.snapshots_offset.0.to_be_bytes());
        if self.version == Version::V3 {
            out.extend(self.incompatible.0.to_be_bytes());
            out.extend(self.compatible.0.to_be_bytes());
            out.extend(self.autoclear.0.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend((self.length() as u32).to_be_bytes());
            out.extend(&self.trailing);
        }
        out
    }

    /// The fields from `l1_size` to `incompatible_features` (to `snapshots_offset` in version 2): their offset and
    /// bytes. They lie in the first sector, so one write of them switches any of them together.
    pub(crate) fn switch_bytes(&self) -> (HostOffset, Vec<u8>) {
        let end = match self.version {
            Version::V2 => V2_LENGTH,
            Version::V3 => 80,
        };
        let all = self.fixed_fields();
        (
            HostOffset(SWITCH_START as u64),
            all[SWITCH_START..end].to_vec(),
        )
    }
}

/// Big-endian fields one after another.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Fields { bytes, at: 0 }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let part = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk);
        self.at += N;
        part.copied().ok_or_else(too_short)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.take()?))
    }
}

fn parse_extensions(cluster: &[u8], start: usize, end: usize) -> Result<Vec<Extension>> {
    let mut extensions: Vec<Extension> = Vec::new();
    let mut at = start;
    // An area that ends without room for another extension needs no end mark.
    while at + 8 <= end && at + 8 <= cluster.len() {
        let mut fields = Fields { bytes: cluster, at };
        let (kind, len) = (fields.u32()?, fields.u32()? as usize);
        if kind == EXT_END {
            break;
        }
        let data = at + 8;
        if len > end.saturating_sub(data) {
            return Err(invalid(format!(
                "Header extension too large: type {kind:#x} with {len} bytes"
            )));
        }
        let known = [
            EXT_BACKING_FORMAT,
            EXT_FEATURE_NAMES,
            EXT_BITMAPS,
            EXT_DATA_FILE,
        ]
        .contains(&kind);
        if known && extensions.iter().any(|ext| ext.kind == kind) {
            return Err(invalid(format!("Header extension {kind:#x} appears twice")));
        }
        let bytes = cluster.get(data..data + len).ok_or_else(too_short)?;
        if kind == EXT_BACKING_FORMAT && (bytes.contains(&0) || len >= 16) {
            return Err(invalid("The backing file's format name is not valid"));
        }
        let data_bytes = bytes.to_vec();
        extensions.push(Extension {
            kind,
            data: data_bytes,
        });
        at = data + len.next_multiple_of(8);
    }
    Ok(extensions)
}

fn backing_name(cluster: &[u8], cluster_size: u64, offset: u64, size: u32) -> Result<String> {
    let room = cluster_size - offset;
    if size > limits::QCOW2_MAX_BACKING_NAME || u64::from(size) > room {
        return Err(invalid("Backing file name too long"));
    }
    let start = offset as usize;
    let bytes = cluster
        .get(start..start + size as usize)
        .ok_or_else(too_short)?;
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => Err(invalid("The backing file's name is not valid text")),
    }
}

/// Alignment and range of a table that the header points to.
pub(crate) fn check_table(g: Geometry, what: &str, offset: HostOffset, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let end = offset.0.checked_add(bytes);
    if !g.is_aligned(offset.0)
        || offset.0 == 0
        || end.is_none_or(|end| end > limits::QCOW2_MAX_HOST_OFFSET)
    {
        return Err(invalid(format!("{what} offset invalid")));
    }
    Ok(())
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

fn too_short() -> Error {
    invalid("The image is too short for its qcow2 header")
}

#[cfg(test)]
mod tests;
