//! The wire format against bytes written out by hand, and against noise.

use bytes::BytesMut;

use super::constants::*;
use super::handshake::*;
use super::transmission::*;

/// A string with its length in front.
fn counted(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

#[test]
fn the_greeting_is_the_specifications() {
    let mut out = BytesMut::new();
    put_greeting(&mut out);
    assert_eq!(&out[..], b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn client_flags_that_were_not_offered_are_refused() {
    let decoded = |bits| ClientFlags::decode(bits).map(|f| (f.fixed_newstyle, f.no_zeroes));
    assert_eq!(decoded(0), Some((false, false)));
    assert_eq!(decoded(1), Some((true, false)));
    assert_eq!(decoded(3), Some((true, true)));
    for bits in [4, 7, 1 << 16, u32::MAX] {
        assert_eq!(decoded(bits), None, "{bits:#x}");
    }
}

#[test]
fn an_option_header_needs_its_magic() {
    let good = *b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x2a";
    let header = OptionHeader::decode(&good).unwrap();
    assert_eq!((header.option, header.length), (NBD_OPT_GO, 42));
    let mut bad = good;
    bad[0] ^= 1;
    assert_eq!(OptionHeader::decode(&bad), None);
}

#[test]
fn options_decode_to_what_they_say() {
    let info = |name, block_size| InfoRequest {
        export: "disk".into(),
        name,
        block_size,
    };
    let meta = |queries: &[&str]| MetaQuery {
        export: "disk".into(),
        queries: queries.iter().map(|query| query.to_string()).collect(),
    };
    let disk = counted(b"disk");
    let cases: Vec<(u32, Vec<u8>, ClientOption)> = vec![
        (1, b"disk".to_vec(), ClientOption::ExportName("disk".into())),
        (1, vec![], ClientOption::ExportName(String::new())),
        (2, vec![], ClientOption::Abort),
        (2, b"why not".to_vec(), ClientOption::Abort),
        (3, vec![], ClientOption::List),
        (5, vec![], ClientOption::StartTls),
        (8, vec![], ClientOption::StructuredReply),
        (
            6,
            [&disk[..], &[0, 0]].concat(),
            ClientOption::Info(info(false, false)),
        ),
        (
            7,
            [&disk[..], &[0, 3, 0, 1, 0, 3, 0x77, 0x77]].concat(),
            ClientOption::Go(info(true, true)),
        ),
        (
            9,
            [&disk[..], &[0; 4]].concat(),
            ClientOption::ListMetaContext(meta(&[])),
        ),
        (
            10,
            [
                &disk[..],
                &[0, 0, 0, 2],
                &counted(b"base:"),
                &counted(b"x:y"),
            ]
            .concat(),
            ClientOption::SetMetaContext(meta(&["base:", "x:y"])),
        ),
        (11, b"anything".to_vec(), ClientOption::Unknown),
        (u32::MAX, vec![], ClientOption::Unknown),
    ];
    for (option, data, expected) in cases {
        assert_eq!(
            ClientOption::decode(option, &data),
            Ok(expected),
            "option {option}"
        );
    }
}

#[test]
fn malformed_options_are_named_in_the_error() {
    let disk = counted(b"disk");
    let long = vec![b'x'; NBD_MAX_STRING + 1];
    let cases: Vec<(u32, Vec<u8>, &str)> = vec![
        (3, vec![0], "option 'list' has unexpected length"),
        (5, vec![0], "option 'starttls' has unexpected length"),
        (
            8,
            vec![0],
            "option 'structured reply' has unexpected length",
        ),
        (7, vec![], "Inconsistent lengths in option go"),
        (
            7,
            vec![0, 0, 0, 9, b'x'],
            "Inconsistent lengths in option go",
        ),
        (7, vec![255; 4], "Inconsistent lengths in option go"),
        (7, disk.clone(), "Inconsistent lengths in option go"),
        (
            7,
            [&disk[..], &[0, 1]].concat(),
            "Inconsistent lengths in option go",
        ),
        (
            6,
            [&disk[..], &[0, 0, 0]].concat(),
            "option 'info' has unexpected length",
        ),
        (7, counted(&long), "Invalid name length: 4097"),
        (1, long.clone(), "Invalid name length: 4097"),
        (
            1,
            b"a\0b".to_vec(),
            "Unexpected embedded NUL in option export name",
        ),
        (1, vec![0xff], "String in option export name is not UTF-8"),
        (
            10,
            [&disk[..], &[255; 4]].concat(),
            "Inconsistent lengths in option set meta context",
        ),
    ];
    for (option, data, expected) in cases {
        let error = ClientOption::decode(option, &data).unwrap_err();
        assert_eq!(error.0, expected, "option {option}");
    }
}

#[test]
fn option_replies_carry_their_parts() {
    let mut out = BytesMut::new();
    put_option_reply(&mut out, NBD_OPT_LIST, NBD_REP_ERR_UNSUP, &[b"no", b"pe"]);
    assert_eq!(
        &out[..],
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x80\x00\x00\x01\x00\x00\x00\x04nope"
    );
}

#[test]
fn the_old_reply_has_zeroes_unless_they_were_declined() {
    for (no_zeroes, length) in [(true, 10), (false, 134)] {
        let mut out = BytesMut::new();
        put_export_name_reply(&mut out, 0x0102, 0x0304, no_zeroes);
        assert_eq!(out.len(), length);
        assert_eq!(&out[..10], [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
        assert!(out[10..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_request_is_28_bytes() {
    let bytes = *b"\x25\x60\x95\x13\x00\x11\x00\x06\x00\x00\x00\x00\x00\x00\x00\x07\
        \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00";
    let request = Request::decode(&bytes).unwrap();
    let expected = Request {
        flags: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_FAST_ZERO,
        command: Command::WriteZeroes,
        cookie: 7,
        offset: 4096,
        length: 512,
    };
    assert_eq!(request, expected);
    let mut bad = bytes;
    bad[3] = 0;
    assert_eq!(Request::decode(&bad), None);
}

#[test]
fn reply_headers_announce_what_follows() {
    let simple = Header::simple_reply(1, 28);
    assert_eq!(
        simple.as_bytes(),
        b"\x67\x44\x66\x98\x00\x00\x00\x1c\x00\x00\x00\x00\x00\x00\x00\x01"
    );
    // (header, flags and type, length of the payload with what of it is in the header)
    let cases: Vec<(Header, [u8; 4], u32, usize)> = vec![
        (Header::done(1), [0, 1, 0, 0], 0, 0),
        (
            Header::data(1, Position::More, 5, 100),
            [0, 0, 0, 1],
            108,
            8,
        ),
        (
            Header::hole(1, Position::Last, 5, 100),
            [0, 1, 0, 2],
            12,
            12,
        ),
        (Header::block_status(1, 0, 3), [0, 1, 0, 5], 28, 4),
        (
            Header::error(1, NbdErrno::Inval, 4, false),
            [0, 1, 0x80, 1],
            10,
            6,
        ),
        (
            Header::error(1, NbdErrno::Inval, 4, true),
            [0, 1, 0x80, 2],
            18,
            6,
        ),
    ];
    for (header, kind, length, included) in cases {
        let bytes = header.as_bytes();
        assert_eq!(bytes[..4], [0x66, 0x8e, 0x33, 0xef]);
        assert_eq!(bytes[4..8], kind);
        assert_eq!(bytes[8..16], 1u64.to_be_bytes());
        assert_eq!(bytes[16..20], length.to_be_bytes());
        assert_eq!(bytes.len(), 20 + included);
    }
}

#[test]
fn system_errors_become_the_protocols() {
    let cases = [
        (1, NbdErrno::Perm),
        (13, NbdErrno::Perm),
        (30, NbdErrno::Perm),
        (5, NbdErrno::Io),
        (12, NbdErrno::NoMem),
        (22, NbdErrno::Inval),
        (28, NbdErrno::NoSpc),
        (122, NbdErrno::NoSpc),
        (27, NbdErrno::NoSpc),
        (75, NbdErrno::Overflow),
        (95, NbdErrno::NotSup),
        (16, NbdErrno::Io),
        (0, NbdErrno::Io),
        (-7, NbdErrno::Io),
        (i32::MAX, NbdErrno::Io),
    ];
    for (errno, expected) in cases {
        assert_eq!(NbdErrno::of_system(errno), expected, "errno {errno}");
    }
}

#[test]
fn noise_and_broken_messages_decode_or_fail_but_do_nothing_else() {
    let mut random = fastrand::Rng::with_seed(1);
    let disk = counted(b"disk");
    let good: Vec<(u32, Vec<u8>)> = vec![
        (7, [&disk[..], &[0, 2, 0, 1, 0, 3]].concat()),
        (
            10,
            [&disk[..], &[0, 0, 0, 1], &counted(b"base:allocation")].concat(),
        ),
        (1, b"disk".to_vec()),
    ];
    for _ in 0..50_000 {
        let (option, mut data) = match random.bool() {
            true => good[random.usize(..good.len())].clone(),
            false => {
                let noise = (0..random.usize(..64)).map(|_| random.u8(..)).collect();
                (random.u32(..12), noise)
            }
        };
        for _ in 0..random.usize(..4) {
            if !data.is_empty() {
                let at = random.usize(..data.len());
                match random.u8(..3) {
                    0 => data[at] = random.u8(..),
                    1 => data.truncate(at),
                    _ => data.insert(at, random.u8(..)),
                }
            }
        }
        if let Ok(ClientOption::SetMetaContext(query)) = ClientOption::decode(option, &data) {
            let kept: usize = query.queries.iter().map(String::len).sum();
            assert!(kept <= data.len(), "more kept than sent");
        }
        let mut fixed = [0; REQUEST_SIZE];
        fixed.fill_with(|| random.u8(..));
        let _ = Request::decode(&fixed);
        fixed[..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
        assert!(Request::decode(&fixed).is_some());
    }
}
