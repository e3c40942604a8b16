//! A client of a server in this process: sends bytes, hangs up its sending half, and reads what comes until the end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a server may take to answer and hang up before it counts as hanging.
const HANGS_AFTER: Duration = Duration::from_secs(20);

/// Sends `input` in pieces of `piece` bytes; answers everything that was read.
pub(crate) fn talk(socket: &Path, input: &[u8], piece: usize) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).expect("the server listens");
    stream
        .set_read_timeout(Some(HANGS_AFTER))
        .expect("a timeout");
    stream
        .set_write_timeout(Some(HANGS_AFTER))
        .expect("a timeout");
    let mut reading = stream.try_clone().expect("another handle");
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut answer = Vec::new();
            match reading.read_to_end(&mut answer) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    panic!("the server neither answers nor hangs up");
                }
                // A connection that is reset ends as well as one that is closed.
                _ => answer,
            }
        });
        for part in input.chunks(piece.max(1)) {
            if stream.write_all(part).is_err() {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Write);
        reader.join().expect("the reader")
    })
}
