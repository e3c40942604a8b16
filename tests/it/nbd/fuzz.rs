//! Hostile clients: noise and broken messages. The server answers or closes, uses no more memory than it may, and
//! serves the next client.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use super::client::*;
use super::{Fixture, SIZE};
use crate::harness;

/// A stream that a good client could send.
fn conversation(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    for _ in 0..random.usize(..4) {
        bytes.extend(match random.u8(..5) {
            0 => option(LIST, b""),
            1 => option(STRUCTURED_REPLY, b""),
            2 => option(INFO, &info_data("disk", &[1, 2, 3])),
            3 => option(SET_META, &meta_data("disk", &["base:allocation", "x:"])),
            _ => option(random.u32(..20), &vec![1; random.usize(..50)]),
        });
    }
    bytes.extend(option(GO, &info_data("disk", &[3])));
    for cookie in 0..random.u64(..20) {
        let (command, offset) = (random.u16(..9), random.u64(..SIZE));
        let length = random.u32(..10_000);
        bytes.extend(request(random.u16(..32), command, cookie, offset, length));
        if command == WRITE {
            bytes.extend(vec![cookie as u8; length as usize]);
        }
    }
    bytes
}

fn damage(bytes: &mut Vec<u8>, random: &mut fastrand::Rng) {
    for _ in 0..random.usize(..6) {
        let at = random.usize(..bytes.len());
        match random.u8(..5) {
            0 => bytes[at] = random.u8(..),
            1 => bytes[at] ^= 1 << random.u8(..8),
            2 => bytes.truncate(at.max(1)),
            3 => bytes.insert(at, random.u8(..)),
            _ => {
                let end = (at + 4).min(bytes.len());
                bytes[at..end].fill(0xff);
            }
        }
    }
}

fn resident_kilobytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .expect("VmRSS");
    line.split_whitespace()
        .nth(1)
        .expect("a figure")
        .parse()
        .expect("a number")
}

#[test]
fn hostile_streams_end_and_others_are_served() {
    let seed = harness::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut fixture = Fixture::new();
    let before = resident_kilobytes();
    let end = Instant::now() + Duration::from_secs(3);
    let mut rounds = 0;
    while rounds < 100 || (rounds < 5000 && Instant::now() < end) {
        rounds += 1;
        let mut bytes = match random.u8(..4) {
            0 => (0..random.usize(1..300)).map(|_| random.u8(..)).collect(),
            _ => conversation(&mut random),
        };
        damage(&mut bytes, &mut random);
        let mut client = fixture.connect();
        // The server may close before all is sent.
        let sent = client.0.write_all(&bytes);
        let _ = client.0.shutdown(std::net::Shutdown::Write);
        let mut replies = Vec::new();
        match client.0.read_to_end(&mut replies) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{sent:?}"),
        }
        assert!(replies.starts_with(b"NBDMAGICIHAVEOPT"), "round {rounds}");
        if rounds % 50 == 0 {
            fixture.simple().read(0, 512);
        }
    }
    let grown = resident_kilobytes().saturating_sub(before);
    // Other tests of this process run at the same time; a leak per round or an allocation by announced length would
    // be more than they use.
    assert!(grown < 400 << 10, "{grown} KiB more after {rounds} rounds");
    fixture.stop();
}
