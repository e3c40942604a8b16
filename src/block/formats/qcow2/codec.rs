//! How compressed clusters are encoded: raw deflate or zstd (specification: "compression_type").
//!
//! Pure functions over bytes. A stream comes from the image, which may be hostile: it is decoded into a buffer of exactly
//! one cluster and no more, and what follows the stream is not looked at, because a descriptor counts whole sectors.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd_safe::{CCtx, DCtx, DParameter, InBuffer, OutBuffer};

use crate::limits;

/// Window of the deflate streams written, as a power of two: what QEMU writes and promises to read.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// The compression type of an image. All its compressed clusters have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CompressionType {
    /// Raw deflate; QEMU's name for it is that of the library.
    #[default]
    Zlib,
    /// Zstandard, a frame per cluster. Version 3 only.
    Zstd,
}

impl CompressionType {
    /// The type that the header's field stands for.
    pub(crate) fn from_field(field: u8) -> Option<Self> {
        match field {
            0 => Some(CompressionType::Zlib),
            1 => Some(CompressionType::Zstd),
            _ => None,
        }
    }

    /// The value of the header's field.
    pub(crate) fn field(self) -> u8 {
        match self {
            CompressionType::Zlib => 0,
            CompressionType::Zstd => 1,
        }
    }

    /// QEMU's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            CompressionType::Zlib => "zlib",
            CompressionType::Zstd => "zstd",
        }
    }

    /// Decodes a stream to exactly `size` bytes, whatever follows it. `None` for a stream that is damaged, short, longer than
    /// that, or asks for more memory than the limits allow. Time and memory are bounded by the lengths of stream and cluster.
    pub(super) fn decode(self, stream: &[u8], size: usize) -> Option<Vec<u8>> {
        match self {
            CompressionType::Zlib => inflate(stream, size),
            CompressionType::Zstd => unzstd(stream, size),
        }
    }

    /// Encodes one cluster; `None` when that does not make it smaller.
    pub(super) fn encode(self, cluster: &[u8]) -> Option<Vec<u8>> {
        match self {
            CompressionType::Zlib => deflate(cluster),
            CompressionType::Zstd => zstd(cluster),
        }
    }
}

fn inflate(stream: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut cluster = vec![0; size];
    // Any window up to deflate's largest of 32 KiB.
    let mut inflater = Decompress::new(false);
    let status = inflater.decompress(stream, &mut cluster, FlushDecompress::Finish);
    // A full cluster is enough: the stream's end may be cut off by the sector count of the descriptor.
    match status {
        Ok(_) if inflater.total_out() == size as u64 => Some(cluster),
        _ => None,
    }
}

fn deflate(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut stream = vec![0; cluster.len() - 1];
    let mut deflater =
        Compress::new_with_window_bits(Compression::default(), false, DEFLATE_WINDOW_BITS);
    let status = deflater.compress(cluster, &mut stream, FlushCompress::Finish);
    match status {
        Ok(Status::StreamEnd) => {
            stream.truncate(deflater.total_out() as usize);
            Some(stream)
        }
        _ => None,
    }
}

/// Frames are decoded until the cluster is full, which must be the end of one: its checksum has been seen then.
fn unzstd(stream: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut cluster = vec![0; size];
    let mut decoder = DCtx::try_create()?;
    let window = DParameter::WindowLogMax(limits::QCOW2_ZSTD_WINDOW_BITS);
    decoder.set_parameter(window).ok()?;
    let mut input = InBuffer::around(stream);
    let mut output = OutBuffer::around(&mut cluster[..]);
    loop {
        let before = (input.pos(), output.pos());
        let missing = decoder.decompress_stream(&mut output, &mut input).ok()?;
        if output.pos() == size {
            return (missing == 0).then_some(cluster);
        }
        if (input.pos(), output.pos()) == before {
            return None;
        }
    }
}

fn zstd(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut stream = vec![0; cluster.len() - 1];
    let mut encoder = CCtx::try_create()?;
    // At the library's default level, as QEMU. It fails where the frame needs more room than the cluster.
    let len = encoder.compress2(&mut stream[..], cluster).ok()?;
    stream.truncate(len);
    Some(stream)
}

#[cfg(test)]
mod tests;
