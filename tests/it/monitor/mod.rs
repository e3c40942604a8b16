//! QMP over real sockets, with a mock service behind it.

mod mock;
mod oracle;
mod sessions;
mod sockets;

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// What a test waits at most for something that must come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects. The file of a socket is there a moment before anybody listens to it.
fn listening(path: &Path) -> io::Result<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && begun.elapsed() < PATIENCE =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// A raw client: bytes out, lines in.
struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    /// Connects and takes the greeting.
    fn connect(path: &Path) -> (Client, Value) {
        let stream = listening(path).expect("a listening socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let lines = BufReader::new(stream.try_clone().expect("a second handle"));
        let mut client = Client { stream, lines };
        let greeting = client.receive();
        (client, greeting)
    }

    /// Connects and ends the negotiation, with out-of-band execution or without.
    fn ready(path: &Path, enable: &str) -> Client {
        let (mut client, _) = Client::connect(path);
        let arguments = format!("{{'enable':[{enable}]}}");
        let reply = client.ask(&format!(
            "{{'execute':'qmp_capabilities','arguments':{arguments}}}"
        ));
        assert_eq!(reply, serde_json::json!({"return": {}}));
        client
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("sent");
    }

    /// The next line, with its CRLF.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line in time");
        assert!(line.is_empty() || line.ends_with("\r\n"), "{line:?}");
        line
    }

    fn receive(&mut self) -> Value {
        serde_json::from_str(&self.line()).expect("JSON")
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.receive()
    }

    /// The sentence of the error that a message gets.
    fn refusal(&mut self, bytes: impl AsRef<[u8]>) -> String {
        self.send(bytes);
        let reply = self.receive();
        let desc = &reply["error"]["desc"];
        desc.as_str()
            .unwrap_or_else(|| panic!("{reply}"))
            .to_owned()
    }

    /// Closes the sending side and returns what still comes.
    fn finish(mut self) -> String {
        self.stream.shutdown(Shutdown::Write).expect("open");
        let mut rest = String::new();
        self.lines
            .read_to_string(&mut rest)
            .expect("the end in time");
        rest
    }
}
