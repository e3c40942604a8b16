//! The handshake: every option, good and bad.

use super::client::*;
use super::{Fixture, SIZE};

/// The flags of a writable export without structured replies: HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN,
/// CACHE, FAST_ZERO.
const FLAGS: u16 = 0b1101_0110_1101;

#[test]
fn go_tells_size_flags_and_block_sizes() {
    let fixture = Fixture::new();
    fixture.add("described", |options| {
        options.description = Some("a text".into());
        options.writable = false;
    });
    let mut client = fixture.connect();
    client.handshake(3);
    let sizes = [1u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
    let export = |flags: u16| [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat();
    client.send(&option(INFO, &info_data("described", &[1, 2, 3, 0x1234])));
    let replies: Vec<OptionReply> = (0..5).map(|_| client.reply()).collect();
    let kinds: Vec<u32> = replies.iter().map(|reply| reply.kind).collect();
    assert_eq!(kinds, [3, 3, 3, 3, ACK]);
    assert_eq!(replies[0].data, b"\x00\x01described");
    assert_eq!(replies[1].data, b"\x00\x02a text");
    assert_eq!(replies[2].data, [&[0, 3][..], &sizes].concat());
    // READ_ONLY instead of TRIM, WRITE_ZEROES and FAST_ZERO.
    assert_eq!(replies[3].data, export(0b0101_0000_1111));
    // The handshake goes on after NBD_OPT_INFO.
    client.structured();
    let information = client.go("disk");
    assert_eq!(information[0], [&[0, 3][..], &sizes].concat());
    assert_eq!(
        information[1],
        export(FLAGS | 1 << 7),
        "with NBD_FLAG_SEND_DF"
    );
    assert_eq!(client.chunks(&request(0, READ, 1, 0, 512)).len(), 1);
}

#[test]
fn the_nodes_alignment_is_the_minimum_for_those_who_ask() {
    let fixture = Fixture::new();
    fixture.disk.set_limits(block::driver::RequestLimits {
        alignment: 512,
        preferred: 65536,
        growable: false,
    });
    let sizes = |minimum: u32| {
        [
            &[0, 3][..],
            &[minimum, 65536, 32 << 20].map(u32::to_be_bytes).concat(),
        ]
        .concat()
    };
    let mut client = fixture.connect();
    client.handshake(3);
    client.send(&option(INFO, &info_data("disk", &[3])));
    assert_eq!(client.reply().data, sizes(512));
    assert_eq!((client.reply().kind, client.reply().kind), (3, ACK));
    client.send(&option(INFO, &info_data("disk", &[])));
    assert_eq!(client.reply().data, sizes(512));
    assert_eq!(client.reply().kind, 3);
    assert_eq!(client.reply().kind, ERR_BLOCK_SIZE_REQD);
    assert_eq!(client.go("disk")[0], sizes(1));
    assert_eq!(client.simple(&request(0, READ, 1, 256, 512)), EINVAL);
    assert_eq!(client.simple(&request(0, READ, 1, 512, 100)), EINVAL);
    client.read(512, 512);
}

#[test]
fn the_old_way_in_works_with_and_without_zeroes() {
    let fixture = Fixture::new();
    for (flags, tail) in [(1, 124), (3, 0), (0, 124), (2, 0)] {
        let mut client = fixture.connect();
        client.handshake(flags);
        client.send(&option(EXPORT_NAME, b"disk"));
        let reply = client.take(10 + tail);
        assert_eq!(reply[..8], SIZE.to_be_bytes());
        assert_eq!(reply[8..10], FLAGS.to_be_bytes());
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        client.write(4096, b"hello");
        assert_eq!(client.read(4096, 5), b"hello");
    }
}

#[test]
fn requests_may_be_sent_ahead_of_the_transmission_phase() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let mut all = 3u32.to_be_bytes().to_vec();
    all.extend(option(GO, &info_data("disk", &[])));
    all.extend(request(0, WRITE, 7, 0, 5));
    all.extend(b"early");
    all.extend(request(0, DISC, 8, 0, 0));
    client.send(&all);
    client.take(18);
    let kinds: Vec<u32> = (0..3).map(|_| client.reply().kind).collect();
    assert_eq!(kinds, [3, 3, ACK]);
    assert_eq!(client.simple_reply(), (7, 0));
    assert!(client.is_closed());
    assert_eq!(&fixture.disk.content()[..5], b"early");
}

#[test]
fn what_closes_the_connection() {
    let fixture = Fixture::new();
    let long_name = vec![b'x'; 5000];
    let cases: Vec<(&str, u32, Vec<u8>)> = vec![
        ("unknown client flags", 4, vec![]),
        (
            "a name that is not there",
            3,
            option(EXPORT_NAME, b"nodisk"),
        ),
        ("an empty name", 3, option(EXPORT_NAME, b"")),
        ("a long name", 3, option(EXPORT_NAME, &long_name)),
        (
            "a very long name",
            3,
            option(EXPORT_NAME, &vec![b'x'; 100_000]),
        ),
        ("a name with a NUL", 3, option(EXPORT_NAME, b"disk\0")),
        ("a wrong magic", 3, b"IHAVEOPS\0\0\0\x03\0\0\0\0".to_vec()),
        ("an option without fixed newstyle", 0, option(LIST, b"")),
        (
            "an endless option",
            3,
            b"IHAVEOPT\0\0\0\x03\xff\xff\xff\xff".to_vec(),
        ),
    ];
    for (what, flags, bytes) in cases {
        let mut client = fixture.connect();
        client.handshake(flags);
        client.send(&bytes);
        assert!(client.is_closed(), "{what}");
    }
    fixture.simple().read(0, 1);
}

#[test]
fn what_is_refused_and_the_handshake_goes_on() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    client.handshake(3);
    let mut case = |number, data: &[u8], kind, text: &str| {
        assert_eq!(client.refused(number, data, kind), text, "option {number}");
    };
    let go = |name: &str| info_data(name, &[]);
    case(4, b"", ERR_UNSUP, "Unsupported option 4 (<unknown>)");
    case(11, b"", ERR_UNSUP, "Unsupported option 11 (<unknown>)");
    case(
        0x4242,
        &[7; 1000],
        ERR_UNSUP,
        "Unsupported option 16962 (<unknown>)",
    );
    case(STARTTLS, b"", ERR_POLICY, "TLS not configured");
    case(
        GO,
        &go("nodisk"),
        ERR_UNKNOWN,
        "export 'nodisk' not present",
    );
    case(INFO, &go(""), ERR_UNKNOWN, "export '' not present");
    let (long, shown) = ("x".repeat(200), "x".repeat(80));
    let text = format!("export '{shown}...' not present");
    case(GO, &go(&long), ERR_UNKNOWN, &text);
    case(
        GO,
        &go(&"x".repeat(4097)),
        ERR_INVALID,
        "Invalid name length: 4097",
    );
    case(
        GO,
        b"\xff\xff\xff\xff",
        ERR_INVALID,
        "Inconsistent lengths in option go",
    );
    case(
        LIST,
        b"x",
        ERR_INVALID,
        "option 'list' has unexpected length",
    );
    case(GO, &vec![0; 100_000], ERR_TOO_BIG, "option go is too long");
    let meta = meta_data("disk", &["base:allocation"]);
    let early = "request option 'set meta context' when structured reply is not negotiated";
    case(SET_META, &meta, ERR_INVALID, early);
    client.structured();
    let again = client.refused(STRUCTURED_REPLY, b"", ERR_INVALID);
    assert_eq!(again, "structured reply already negotiated");
    let nodisk = meta_data("nodisk", &[]);
    let text = client.refused(SET_META, &nodisk, ERR_UNKNOWN);
    assert_eq!(text, "export 'nodisk' not present");
    client.go("disk");
    assert_eq!(client.chunks(&request(0, READ, 1, 0, 1)).len(), 1);
}

#[test]
fn exports_are_listed_in_order_with_descriptions() {
    let fixture = Fixture::new();
    fixture.add("second", |options| {
        options.description = Some("text".into())
    });
    fixture.add("", |_| {});
    let mut client = fixture.connect();
    client.handshake(3);
    client.send(&option(LIST, b""));
    let mut list = Vec::new();
    loop {
        let reply = client.reply();
        if reply.kind == ACK {
            break;
        }
        assert_eq!(reply.kind, 2);
        list.push(reply.data);
    }
    let second = [counted("second"), b"text".to_vec()].concat();
    assert_eq!(list, [counted("disk"), second, counted("")]);
    client.send(&option(ABORT, b""));
    assert_eq!(client.reply().kind, ACK);
    assert!(client.is_closed());
    // With an export of that name, asking for none gets it.
    let mut client = fixture.connect();
    client.handshake(3);
    client.go("");
}

#[test]
fn metadata_contexts_are_listed_and_selected_per_export() {
    let fixture = Fixture::new();
    fixture.add("other", |_| {});
    let mut client = fixture.connect();
    client.handshake(3);
    // Listing needs no structured replies, selecting does.
    client.send(&option(LIST_META, &meta_data("disk", &[])));
    assert_eq!((client.reply().kind, client.reply().kind), (4, ACK));
    client.structured();
    let mut found = |number, queries: &[&str]| {
        client.send(&option(number, &meta_data("disk", queries)));
        let mut found = 0;
        while client.reply().kind == 4 {
            found += 1;
        }
        found
    };
    for (number, queries, expected) in [
        (LIST_META, &[][..], 1),
        (LIST_META, &["base:"], 1),
        (LIST_META, &["qemu:", "x"], 0),
        (SET_META, &[], 0),
        (SET_META, &["base:"], 0),
        (
            SET_META,
            &["base:allocation", "qemu:dirty-bitmap:b", "base:allocation"],
            1,
        ),
    ] {
        assert_eq!(found(number, queries), expected, "{number} {queries:?}");
    }
    // Selected for `disk`, so it is void for `other`.
    client.go("other");
    let (error, text, _) = client.error(&request(0, BLOCK_STATUS, 1, 0, 512));
    assert_eq!(
        (error, &text[..]),
        (EINVAL, "CMD_BLOCK_STATUS not negotiated")
    );
}
