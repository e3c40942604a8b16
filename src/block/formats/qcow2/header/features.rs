//! Feature bits and their names.

/// Features that a reader must know (specification: incompatible_features).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Incompatible(pub(crate) u64);

/// Features that a reader may ignore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Compatible(pub(crate) u64);

/// Features whose bits a writer that does not know them clears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Autoclear(pub(crate) u64);

impl Incompatible {
    /// Refcounts may be wrong and must be rebuilt before use.
    pub(crate) const DIRTY: u64 = 1;
    /// Any structure may be wrong; read-only until repaired.
    pub(crate) const CORRUPT: u64 = 1 << 1;
    /// Guest data lie in another file.
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not deflate.
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    /// 16-byte L2 entries with subclusters.
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    /// All that this version of the driver knows the meaning of.
    pub(crate) const KNOWN: u64 = 0x1f;

    /// Whether all of `bits` are set.
    pub(crate) fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

impl Compatible {
    /// Refcount updates may be postponed under the dirty bit.
    pub(crate) const LAZY_REFCOUNTS: u64 = 1;

    /// Whether all of `bits` are set.
    pub(crate) fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

impl Autoclear {
    /// The bitmaps extension agrees with the data.
    pub(crate) const BITMAPS: u64 = 1;
    /// The external data file can be read as a raw image.
    pub(crate) const DATA_FILE_RAW: u64 = 1 << 1;
    /// Those whose promise this driver keeps when it writes.
    pub(crate) const KEPT: u64 = Self::BITMAPS | Self::DATA_FILE_RAW;

    /// Whether all of `bits` are set.
    pub(crate) fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

/// Bytes of a record of the feature name table: kind, bit, name.
const RECORD: usize = 48;

/// What the feature name table says about each bit of `unknown` incompatible features.
pub(super) fn names(table: Option<&[u8]>, unknown: u64) -> String {
    let mut names = Vec::new();
    let mut rest = unknown;
    for record in table.unwrap_or_default().chunks_exact(RECORD) {
        let bit = 1_u64.checked_shl(record[1].into()).unwrap_or(0);
        if record[0] == 0 && rest & bit != 0 {
            let name: Vec<u8> = record[2..]
                .iter()
                .copied()
                .take_while(|&b| b != 0)
                .collect();
            names.push(String::from_utf8_lossy(&name).into_owned());
            rest &= !bit;
        }
    }
    if rest != 0 {
        names.push(format!("Unknown incompatible feature: {rest:x}"));
    }
    names.join(", ")
}

/// The feature name table of the bits that this driver knows.
pub(super) fn name_table() -> Vec<u8> {
    let known: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut table = Vec::with_capacity(known.len() * RECORD);
    for (kind, bit, name) in known {
        let end = table.len() + RECORD;
        table.push(kind);
        table.push(bit);
        table.extend(name.as_bytes());
        table.resize(end, 0);
    }
    table
}
