//! What is done to an image.

use super::*;

/// Numbers that break things: borders of widths, limits and units.
const NUMBERS: [u64; 24] = [
    0,
    1,
    2,
    7,
    8,
    40,
    104,
    511,
    512,
    1023,
    1024,
    4096,
    65535,
    65536,
    1 << 20,
    32 << 20,
    u32::MAX as u64,
    1 << 32,
    1 << 55,
    1 << 56,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Replaces a few fields or bytes of the image.
pub(super) fn damage(disk: &Memory, random: &mut fastrand::Rng) {
    let mut image = disk.content();
    let cluster = 1_usize << u32::from_be_bytes(image[20..24].try_into().unwrap());
    for _ in 0..random.u8(1..=5) {
        let len = image.len();
        let clusters = len / cluster;
        match random.u8(..16) {
            0 => image[random.usize(..104)] = random.u8(..),
            1 => put(
                &mut image,
                8 * random.usize(1..13),
                8,
                number(random, cluster),
            ),
            2 => put(
                &mut image,
                4 * random.usize(1..26),
                4,
                number(random, cluster),
            ),
            3 => image[random.usize(..cluster.min(700))] ^= 1 << random.u8(..8),
            4..9 => {
                // An entry of a table: most of the metadata lie in the first clusters, or in short ones.
                let most = clusters.min(if random.bool() { 6 } else { 40 });
                let at = random.usize(..most) * cluster + 8 * random.usize(..cluster.min(512) / 8);
                put(&mut image, at, 8, entry(random, cluster, clusters));
            }
            9..11 => {
                let at = random.usize(..len);
                image[at] = random.u8(..);
            }
            11..13 => {
                let (from, to) = (random.usize(..len / 8) * 8, random.usize(..len / 8) * 8);
                image.copy_within(from..from + 8, to);
            }
            13 => {
                let (from, to) = (random.usize(..clusters), random.usize(..clusters));
                let from = from * cluster..(from + 1) * cluster;
                image.copy_within(from, to * cluster);
            }
            14 => image[79] |= 1 << [0, 1, 4][random.usize(..3)],
            _ => {
                let at = random.usize(..clusters) * cluster;
                let byte = [0, 0xff, 0x11][random.usize(..3)];
                image[at..at + cluster].fill(byte);
            }
        }
    }
    replace(disk, &image);
    if random.u8(..20) == 0 {
        let size = match random.bool() {
            true => random.u64(..image.len() as u64),
            false => image.len() as u64 + (1 << random.u8(10..44)),
        };
        disk.apply(&Change::Resize { size }).unwrap();
    }
}

pub(super) fn number(random: &mut fastrand::Rng, cluster: usize) -> u64 {
    let base = NUMBERS[random.usize(..NUMBERS.len())];
    match random.u8(..6) {
        0 => base.wrapping_add(1),
        1 => base.wrapping_sub(1),
        2 => cluster as u64 * random.u64(..64),
        3 => random.u64(..),
        _ => base,
    }
}

fn entry(random: &mut fastrand::Rng, cluster: usize, clusters: usize) -> u64 {
    let flags = [0, 0, 1 << 63, 1 << 63, 1 << 62, 1, 1 << 63 | 1, 3 << 62];
    let place = random.u64(..clusters as u64 + 3) * cluster as u64;
    match random.u8(..8) {
        0..5 => place | flags[random.usize(..flags.len())],
        5 => place | 1 << random.u8(..64),
        _ => number(random, cluster),
    }
}
