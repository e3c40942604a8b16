//! Requests and replies: what is answered, what is refused, and in which order.

use std::time::Duration;

use block::protocols::memory::{Fault, OpKind};

use super::client::*;
use super::{Fixture, SIZE};

#[test]
fn every_command_does_what_it_says() {
    let fixture = Fixture::new();
    let mut client = fixture.simple();
    client.write(1000, &[7; 3000]);
    let read = client.read(0, 5000);
    assert!(read[..1000].iter().all(|byte| *byte == 0));
    assert!(read[1000..4000].iter().all(|byte| *byte == 7));
    assert_eq!(client.simple(&request(0, WRITE_ZEROES, 1, 1000, 1000)), 0);
    assert_eq!(client.read(1999, 2), [0, 7]);
    assert_eq!(client.simple(&request(0, TRIM, 1, 0, 8192)), 0);
    assert_eq!(client.simple(&request(0, CACHE, 1, 0, 8192)), 0);
    assert_eq!(fixture.disk.count(OpKind::Flush), 0);
    // Offset and length of a flush are reserved, and ignored.
    assert_eq!(client.simple(&request(0, FLUSH, 1, u64::MAX, u32::MAX)), 0);
    assert_eq!(fixture.disk.count(OpKind::Flush), 1);
    assert_eq!(client.read(SIZE - 1, 1), [0]);
    assert_eq!(client.read(SIZE, 0), b"");
    client.write(SIZE, b"");
    client.send(&request(0, DISC, 9, 0, 0));
    assert!(client.is_closed());
}

#[test]
fn what_is_wrong_with_a_request_is_answered() {
    let fixture = Fixture::new();
    let last = SIZE - 512;
    let past = |offset: u64, length: u32| {
        format!("operation past EOF; From: {offset}, Len: {length}, Size: {SIZE}")
    };
    let cases = [
        (0, READ, last, 513, EINVAL, past(last, 513), Some(SIZE)),
        (
            0,
            READ,
            SIZE + 5,
            1,
            EINVAL,
            past(SIZE + 5, 1),
            Some(SIZE + 5),
        ),
        (
            0,
            READ,
            u64::MAX,
            1,
            EINVAL,
            past(u64::MAX, 1),
            Some(u64::MAX),
        ),
        (0, TRIM, last, 513, EINVAL, past(last, 513), None),
        (0, CACHE, last, 513, EINVAL, past(last, 513), None),
        (0, BLOCK_STATUS, last, 513, EINVAL, past(last, 513), None),
        (
            0,
            BLOCK_STATUS,
            0,
            0,
            EINVAL,
            "need non-zero length".into(),
            None,
        ),
        (0, WRITE_ZEROES, last, 513, ENOSPC, past(last, 513), None),
        (
            0,
            READ,
            0,
            (32 << 20) + 1,
            EINVAL,
            "len (33554433) is larger than max len (33554432)".into(),
            None,
        ),
        (
            0,
            8,
            0,
            0,
            EINVAL,
            "invalid request type (8) received".into(),
            None,
        ),
        (
            0,
            0xffff,
            0,
            0,
            EINVAL,
            "invalid request type (65535) received".into(),
            None,
        ),
        (
            REQ_ONE,
            READ,
            0,
            512,
            EINVAL,
            "unsupported flags for command read (got 0x8)".into(),
            None,
        ),
        (
            DF,
            TRIM,
            0,
            512,
            EINVAL,
            "unsupported flags for command trim (got 0x4)".into(),
            None,
        ),
        (
            FAST_ZERO,
            TRIM,
            0,
            512,
            EINVAL,
            "unsupported flags for command trim (got 0x10)".into(),
            None,
        ),
        (
            0x8000,
            FLUSH,
            0,
            0,
            EINVAL,
            "unsupported flags for command flush (got 0x8000)".into(),
            None,
        ),
    ];
    let (mut structured, mut simple) = (fixture.structured(), fixture.simple());
    for (flags, command, offset, length, error, text, at) in cases {
        let message = request(flags, command, 1, offset, length);
        assert_eq!(structured.error(&message), (error, text, at));
        assert_eq!(simple.simple(&message), error, "command {command}");
    }
    // Without structured replies there is neither NBD_CMD_FLAG_DF nor NBD_CMD_BLOCK_STATUS.
    assert_eq!(simple.simple(&request(DF, READ, 1, 0, 512)), EINVAL);
    assert_eq!(simple.simple(&request(0, BLOCK_STATUS, 1, 0, 512)), EINVAL);
    simple.read(0, 512);
}

#[test]
fn a_refused_writes_payload_is_skipped() {
    let fixture = Fixture::new();
    fixture.add("readonly", |options| options.writable = false);
    let mut readonly = fixture.connect();
    readonly.handshake(3);
    readonly.go("readonly");
    for length in [0, 1, 5000, 3 << 20] {
        for (client, offset, expected) in [
            (&mut readonly, 0, EPERM),
            (&mut fixture.simple(), SIZE + 1, ENOSPC),
        ] {
            let mut message = request(0, WRITE, 3, offset, length);
            message.extend(vec![9; length as usize]);
            assert_eq!(client.simple(&message), expected, "{length} bytes");
            assert_eq!(client.read(0, 4), [0; 4]);
        }
    }
    for command in [TRIM, WRITE_ZEROES] {
        assert_eq!(readonly.simple(&request(0, command, 1, 0, 512)), EPERM);
    }
    assert_eq!(readonly.simple(&request(0, FLUSH, 1, 0, 0)), 0);
}

#[test]
fn what_closes_the_connection() {
    let fixture = Fixture::new();
    let mut magic = request(0, READ, 1, 0, 1);
    magic[0] ^= 1;
    let mut client = fixture.simple();
    client.send(&magic);
    assert!(client.is_closed());
    // Too long to be worth skipping, but the client is told.
    let mut client = fixture.simple();
    assert_eq!(
        client.simple(&request(0, WRITE, 1, 0, (32 << 20) + 1)),
        EINVAL
    );
    assert!(client.is_closed());
    fixture.simple().read(0, 1);
}

#[test]
fn payloads_of_all_sizes_arrive_whole_and_in_pieces() {
    let fixture = Fixture::with(40 << 20, |_| {});
    let mut client = fixture.simple();
    let mut random = fastrand::Rng::with_seed(1);
    for length in [
        1,
        4095,
        32767,
        32768,
        32769,
        65508,
        65536,
        65537,
        1 << 20,
        32 << 20,
    ] {
        let data: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
        let mut message = request(0, WRITE, 5, 77, length as u32);
        message.extend(&data);
        // Cut at random places, with a pause at some, and another request right behind.
        let cut = random.usize(..message.len());
        client.send(&message[..cut]);
        std::thread::sleep(Duration::from_millis(random.u64(..5)));
        message.extend(request(0, FLUSH, 6, 0, 0));
        client.send(&message[cut..]);
        let mut replies = [client.simple_reply(), client.simple_reply()];
        replies.sort_unstable();
        assert_eq!(replies, [(5, 0), (6, 0)]);
        assert!(client.read(77, length as u32) == data, "{length} bytes");
    }
}

#[test]
fn structured_reads_tell_holes_from_data() {
    let fixture = Fixture::new();
    let mut client = fixture.structured();
    client.write(65536, &[1; 4096]);
    let chunks = client.chunks(&request(0, READ, 4, 0, 131_072));
    let at = |offset: u64| offset.to_be_bytes().to_vec();
    let hole = |offset, length: u32| [at(offset), length.to_be_bytes().to_vec()].concat();
    let expected = [
        (false, 2, hole(0, 65536)),
        (false, 1, [at(65536), vec![1; 4096]].concat()),
        (true, 2, hole(69632, 61440)),
    ];
    assert_eq!(chunks.len(), 3);
    for (chunk, (done, kind, payload)) in chunks.iter().zip(&expected) {
        assert_eq!((chunk.done, chunk.kind, chunk.cookie), (*done, *kind, 4));
        assert!(chunk.payload == *payload);
    }
    // In one piece, when that is asked for.
    let whole = client.chunks(&request(DF, READ, 4, 0, 131_072));
    assert_eq!(
        (whole.len(), whole[0].kind, whole[0].payload.len()),
        (1, 1, 131_080)
    );
    let hole = client.chunks(&request(DF, READ, 4, 0, 65536));
    assert_eq!((hole.len(), hole[0].kind), (1, 2));
    // A short run of zeroes is not worth a chunk.
    let short = client.chunks(&request(0, READ, 4, 65000, 5000));
    assert_eq!((short.len(), short[0].kind), (1, 1));
    let nothing = client.chunks(&request(0, READ, 4, 0, 0));
    assert_eq!((nothing.len(), nothing[0].kind), (1, 0));
}

#[test]
fn block_status_merges_neighbours_and_stops_where_it_is_told() {
    let fixture = Fixture::new();
    let mut client = fixture.structured();
    client.write(65536, &[1; 8192]);
    let mut status = |flags, offset, length| {
        let chunks = client.chunks(&request(flags, BLOCK_STATUS, 4, offset, length));
        assert_eq!((chunks.len(), chunks[0].kind), (1, 5));
        let (context, extents) = chunks[0].payload.split_at(4);
        assert_eq!(context, [0; 4], "the id given to base:allocation");
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        let pairs = extents.chunks(8);
        pairs
            .map(|pair| (number(&pair[..4]), number(&pair[4..])))
            .collect::<Vec<_>>()
    };
    let all = [(65536, 3), (8192, 0), (SIZE as u32 - 73728, 3)];
    assert_eq!(status(0, 0, SIZE as u32), all);
    assert_eq!(status(REQ_ONE, 0, SIZE as u32), all[..1]);
    assert_eq!(status(0, 66000, 100), [(100, 0)]);
}

#[test]
fn failures_of_the_node_reach_the_client_with_their_text() {
    let fixture = Fixture::new();
    let (mut simple, mut structured) = (fixture.simple(), fixture.structured());
    let cases = [
        (OpKind::Read, READ, Fault::Io, EIO),
        (OpKind::WriteZeroes, WRITE_ZEROES, Fault::NoSpace, ENOSPC),
        (OpKind::Discard, TRIM, Fault::Io, EIO),
        (OpKind::Flush, FLUSH, Fault::Io, EIO),
        (OpKind::BlockStatus, BLOCK_STATUS, Fault::Io, EIO),
    ];
    for (kind, command, fault, expected) in cases {
        fixture.disk.fail_once(kind, 0, fault);
        let message = request(0, command, 1, 0, 512);
        let (error, text, _) = structured.error(&message);
        assert_eq!(error, expected);
        assert!(!text.is_empty());
        if command != BLOCK_STATUS {
            fixture.disk.fail_once(kind, 0, fault);
            assert_eq!(simple.simple(&message), expected);
        }
    }
    simple.read(0, 512);
}

#[test]
fn requests_of_a_connection_overtake_each_other() {
    let fixture = Fixture::new();
    let mut client = fixture.simple();
    fixture.disk.hold(OpKind::Read);
    for cookie in 0..8 {
        client.send(&request(0, READ, cookie, cookie * 512, 512));
    }
    client.send(&request(0, FLUSH, 99, 0, 0));
    assert_eq!(
        client.simple_reply(),
        (99, 0),
        "a flush does not wait for reads"
    );
    fixture.wait_held(8);
    for index in (0..8).rev() {
        assert!(fixture.disk.release_one(index));
        assert_eq!(client.simple_reply(), (index as u64, 0));
        client.take(512);
    }
}

#[test]
fn what_a_connection_may_hold_is_bounded() {
    let fixture = Fixture::with(64 << 20, |_| {});
    let mut client = fixture.simple();
    fixture.disk.hold(OpKind::Read);
    for cookie in 0..40 {
        client.send(&request(0, READ, cookie, 0, 1 << 20));
    }
    fixture.wait_held(32);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(fixture.disk.held(), 32, "32 MiB of payload at a time");
    fixture.disk.release_all();
    let mut cookies = Vec::new();
    for _ in 0..40 {
        let (cookie, error) = client.simple_reply();
        assert_eq!(error, 0);
        client.take(1 << 20);
        cookies.push(cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, (0..40).collect::<Vec<_>>());
    // Small ones are bounded by their number.
    fixture.disk.hold(OpKind::Read);
    for cookie in 0..200 {
        client.send(&request(0, READ, cookie, 0, 1));
    }
    fixture.wait_held(128);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(fixture.disk.held(), 128);
    fixture.disk.release_all();
    for _ in 0..200 {
        client.simple_reply();
        client.take(1);
    }
}

#[test]
fn a_client_that_reads_no_replies_is_not_served_for_ever() {
    let fixture = Fixture::new();
    let mut client = fixture.simple();
    client
        .0
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // Each round costs the client 28 bytes and the server 64 KiB.
    let batch: Vec<u8> = (0..1000)
        .flat_map(|_| request(0, READ, 1, 0, 65536))
        .collect();
    let mut sent = 0;
    while sent < 100 && std::io::Write::write_all(&mut client.0, &batch).is_ok() {
        sent += 1;
    }
    assert!(sent < 100, "the server goes on reading requests");
    assert!(fixture.disk.count(OpKind::Read) < 2000);
    // Others do not notice.
    fixture.simple().read(0, 512);
}
