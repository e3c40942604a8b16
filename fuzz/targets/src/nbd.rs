//! Bytes of an NBD client: the handshake, options, requests.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use block::protocols::memory::Memory;
use qblockd::exports::nbd::{NbdExportOptions, NbdServer, NbdServerOptions};
use qblockd::listen::Address;

use crate::peer;

/// Bytes of the disk that is served.
const SIZE: u64 = 1 << 20;

/// The server, which lives as long as the process.
struct Fixture {
    socket: PathBuf,
    _server: NbdServer,
    _runtime: tokio::runtime::Runtime,
    _directory: tempfile::TempDir,
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("nbd");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        // Nobody waits for exports that are gone.
        let (events, _) = tokio::sync::mpsc::unbounded_channel();
        let options = NbdServerOptions::new(vec![Address::Unix(socket.clone())]);
        let server = runtime
            .block_on(NbdServer::start(options, events))
            .expect("a server");
        let export = NbdExportOptions {
            id: "export".to_owned(),
            name: "disk".to_owned(),
            writable: true,
            ..NbdExportOptions::default()
        };
        server
            .add(export, Memory::with_content(&[7; SIZE as usize]) as Arc<_>)
            .expect("an export");
        Fixture {
            socket,
            _server: server,
            _runtime: runtime,
            _directory: directory,
        }
    })
}

/// Options in front of the bytes, by the first one's lowest bits: none, client flags, an export in the old way, an export by
/// NBD_OPT_GO with structured replies. The second byte says in how long pieces they are sent.
pub fn run(data: &[u8]) {
    let (&[first, piece], rest) = data.split_first_chunk().unwrap_or((&[0, 0], data));
    let mut bytes = Vec::new();
    if first & 3 > 0 {
        bytes.extend_from_slice(&3_u32.to_be_bytes());
    }
    match first & 3 {
        2 => option(&mut bytes, 1, b"disk"),
        3 => {
            option(&mut bytes, 8, b"");
            option(&mut bytes, 7, b"\0\0\0\x04disk\0\0");
        }
        _ => {}
    }
    bytes.extend_from_slice(rest);
    let piece = match piece {
        0 => bytes.len(),
        piece => usize::from(piece) * 16,
    };
    let answer = peer::talk(&fixture().socket, &bytes, piece);
    assert!(answer.starts_with(b"NBDMAGICIHAVEOPT"));
}

fn option(bytes: &mut Vec<u8>, option: u32, data: &[u8]) {
    bytes.extend_from_slice(b"IHAVEOPT");
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
}
