//! Streams of every kind, whole, damaged and made to hurt.

use zstd_safe::{CParameter, ResetDirective};

use super::*;

const BOTH: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];

/// Text-like bytes: a third is noise, the rest repeats what came up to 40 KiB before.
fn sample(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes: Vec<u8> = Vec::with_capacity(len);
    while bytes.len() < len {
        let piece = random.usize(1..200).min(len - bytes.len());
        if bytes.len() < 300 || random.u8(..3) == 0 {
            bytes.extend((0..piece).map(|_| random.u8(..)));
        } else {
            let back = random.usize(200..=bytes.len().min(40 << 10));
            let start = bytes.len() - back;
            bytes.extend_from_within(start..start + piece);
        }
    }
    bytes
}

#[test]
fn clusters_of_every_size_come_back_whatever_follows_the_stream() {
    for compression in BOTH {
        for bits in 9..=21 {
            let cluster = sample(1 << bits, bits);
            let Some(mut stream) = compression.encode(&cluster) else {
                panic!("{compression:?}: 2^{bits} bytes do not become smaller");
            };
            assert!(stream.len() < cluster.len());
            stream.extend(sample(511, 1));
            let decoded = compression.decode(&stream, cluster.len());
            assert!(decoded == Some(cluster), "{compression:?}, 2^{bits} bytes");
        }
    }
}

#[test]
fn what_does_not_become_smaller_is_not_encoded() {
    let mut random = fastrand::Rng::with_seed(5);
    let noise: Vec<u8> = (0..65536).map(|_| random.u8(..)).collect();
    for compression in BOTH {
        assert_eq!(compression.encode(&noise), None);
    }
}

#[test]
fn a_stream_that_is_cut_too_short_or_too_long_for_the_cluster_is_damaged() {
    for compression in BOTH {
        let cluster = sample(65536, 7);
        let stream = compression.encode(&cluster).unwrap();
        for len in [0, 1, 4, 11, stream.len() / 2, stream.len() - 20] {
            assert_eq!(compression.decode(&stream[..len], 65536), None, "{len}");
        }
        assert_eq!(compression.decode(&stream, 65536 + 1), None);
    }
    // Deflate has no mark of its length at the start: what fits is taken. A zstd frame must end with the cluster.
    let zstd = CompressionType::Zstd.encode(&sample(65536, 7)).unwrap();
    assert_eq!(CompressionType::Zstd.decode(&zstd, 65535), None);
}

#[test]
fn damaged_streams_are_refused_or_read_as_something_but_never_run_away() {
    let mut random = fastrand::Rng::with_seed(8);
    for compression in BOTH {
        let stream = compression.encode(&sample(4096, 9)).unwrap();
        for _ in 0..3000 {
            let mut damaged = stream.clone();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..damaged.len());
                damaged[at] ^= 1 << random.u8(..8);
            }
            if let Some(read) = compression.decode(&damaged, 4096) {
                assert_eq!(read.len(), 4096);
            }
            let noise: Vec<u8> = (0..random.usize(..600)).map(|_| random.u8(..)).collect();
            let _ = compression.decode(&noise, 4096);
        }
    }
}

/// A frame written piece by piece, as a stream: no content size, and flushed into blocks.
fn streamed(pieces: &[&[u8]], parameters: &[CParameter]) -> Vec<u8> {
    let mut encoder = CCtx::create();
    encoder.reset(ResetDirective::SessionAndParameters).unwrap();
    for parameter in parameters {
        encoder.set_parameter(*parameter).unwrap();
    }
    let room = pieces.iter().map(|piece| piece.len()).sum::<usize>() + 4096;
    let mut stream = vec![0; room];
    let mut output = OutBuffer::around(&mut stream[..]);
    for piece in pieces {
        let mut input = InBuffer::around(piece);
        encoder.compress_stream(&mut output, &mut input).unwrap();
        assert_eq!(encoder.flush_stream(&mut output).unwrap(), 0);
    }
    assert_eq!(encoder.end_stream(&mut output).unwrap(), 0);
    let len = output.pos();
    stream.truncate(len);
    stream
}

#[test]
fn zstd_frames_of_many_blocks_with_checksums_and_several_frames_are_read() {
    let cluster = sample(65536, 11);
    let pieces: Vec<&[u8]> = cluster.chunks(5000).collect();
    let frame = streamed(&pieces, &[CParameter::ChecksumFlag(true)]);
    assert!(CompressionType::Zstd.decode(&frame, 65536) == Some(cluster.clone()));
    // The checksum is the frame's last four bytes.
    let mut damaged = frame.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert_eq!(CompressionType::Zstd.decode(&damaged, 65536), None);
    let mut frames = streamed(&[&cluster[..30000]], &[]);
    frames.extend(streamed(&[&cluster[30000..]], &[]));
    frames.extend([0; 300]);
    assert!(CompressionType::Zstd.decode(&frames, 65536) == Some(cluster));
}

#[test]
fn a_zstd_window_may_be_as_large_as_the_format_recommends_and_no_larger() {
    let cluster = sample(65536, 12);
    let limit = limits::QCOW2_ZSTD_WINDOW_BITS;
    for (bits, readable) in [(limit, true), (limit + 1, false)] {
        let frame = streamed(&[&cluster], &[CParameter::WindowLog(bits)]);
        let decoded = CompressionType::Zstd.decode(&frame, 65536);
        assert_eq!(decoded.is_some(), readable, "2^{bits}");
    }
}

#[test]
fn a_bomb_takes_no_more_than_a_cluster() {
    // All of it would take minutes each time.
    let bomb = tebibyte();
    assert!(bomb.len() < 64 << 20);
    for _ in 0..50 {
        assert_eq!(CompressionType::Zstd.decode(&bomb, 4096), None);
    }
    let zeroes = vec![0; 64 << 20];
    let bomb = CompressionType::Zlib.encode(&zeroes).unwrap();
    for _ in 0..50 {
        let read = CompressionType::Zlib.decode(&bomb, 4096);
        assert_eq!(read, Some(vec![0; 4096]));
    }
}

/// A zstd frame that stands for a tebibyte: blocks of one byte and how often it comes (RFC 8878, 3.1.1.2).
fn tebibyte() -> Vec<u8> {
    const BLOCK: u32 = 128 << 10;
    let window = 7 << 3;
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
    let blocks = (1_u64 << 40) / u64::from(BLOCK);
    for nth in 1..=blocks {
        let header = BLOCK << 3 | 1 << 1 | u32::from(nth == blocks);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(7);
    }
    frame
}

#[test]
fn frames_of_repeated_bytes_are_read() {
    let whole = tebibyte();
    let mut frame = whole[..6 + 4].to_vec();
    frame[6] |= 1;
    let read = CompressionType::Zstd.decode(&frame, 128 << 10);
    assert_eq!(read, Some(vec![7; 128 << 10]));
}

#[test]
fn deflate_streams_with_any_window_are_read() {
    let cluster = sample(65536, 13);
    for bits in 9..=15 {
        let mut stream = vec![0; cluster.len()];
        let mut deflater = Compress::new_with_window_bits(Compression::best(), false, bits);
        let status = deflater.compress(&cluster, &mut stream, FlushCompress::Finish);
        assert_eq!(status.unwrap(), Status::StreamEnd);
        let read = CompressionType::Zlib.decode(&stream, 65536);
        assert!(read.as_ref() == Some(&cluster), "2^{bits}");
    }
}
