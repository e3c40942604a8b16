//! Listening sockets: what the monitor and the exports open, and the command line names.
//!
//! A unix socket's file that nobody listens on any more (what a killed daemon leaves) is replaced; a living server's
//! socket and files that are no sockets stay, unlike with QEMU, and binding fails. A file goes with its socket.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, ready};

use block::error::system_text;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

/// Bytes of a socket's path with its NUL: `sun_path` of unix(7).
const UNIX_PATH_BYTES: usize = 108;

/// Clients that wait to be accepted: what `TcpListener::bind` takes too.
const TCP_BACKLOG: u32 = 1024;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A path in the file system.
    Unix(PathBuf),
    /// A host name or address, empty for all of the machine's, and a port, 0 for any free one.
    Tcp {
        /// The name or the address.
        host: String,
        /// The port.
        port: u16,
        /// Which of the host's addresses.
        family: Family,
    },
}

/// Which addresses of a host are listened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// All.
    #[default]
    Any,
    /// IPv4 only.
    V4,
    /// IPv6 only; not IPv4 by way of it either.
    V6,
}

impl Family {
    /// What `ipv4=` and `ipv6=` mean together in QEMU.
    pub fn of(ipv4: Option<bool>, ipv6: Option<bool>) -> Result<Family, String> {
        match (ipv4, ipv6) {
            (Some(false), Some(false)) => {
                Err("Cannot disable IPv4 and IPv6 at same time".to_owned())
            }
            (None, None) | (Some(true), Some(true)) => Ok(Family::Any),
            (Some(false), _) | (None, Some(true)) => Ok(Family::V6),
            (_, Some(false)) | (Some(true), None) => Ok(Family::V4),
        }
    }

    fn has(self, address: &SocketAddr) -> bool {
        match self {
            Family::Any => true,
            Family::V4 => address.is_ipv4(),
            Family::V6 => address.is_ipv6(),
        }
    }
}

impl Address {
    /// All addresses of a host.
    pub fn tcp(host: impl Into<String>, port: u16) -> Address {
        Address::Tcp {
            host: host.into(),
            port,
            family: Family::Any,
        }
    }

    /// Reads the short form, `unix:PATH` or `tcp:HOST:PORT` (an IPv6 address in brackets); `None` if it is neither.
    pub fn parse(text: &str) -> Option<Result<Address, String>> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Some(if path.is_empty() {
                Err("unix: needs a path".to_owned())
            } else {
                Ok(Address::Unix(path.into()))
            });
        }
        let endpoint = text.strip_prefix("tcp:")?;
        let Some((host, port)) = endpoint.rsplit_once(':') else {
            return Some(Err("tcp: needs HOST:PORT".to_owned()));
        };
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        Some(parse_port(port).map(|port| Address::tcp(host, port)))
    }
}

/// A port number.
pub(crate) fn parse_port(text: &str) -> Result<u16, String> {
    text.parse()
        .map_err(|_| format!("'{text}' is not a port number"))
}

/// The short form.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port, .. } if host.contains(':') => {
                write!(f, "tcp:[{host}]:{port}")
            }
            Address::Tcp { host, port, .. } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// Why a server cannot listen: the sentence for the user, in the shape of QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenError {
    desc: String,
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for ListenError {}

/// A socket that listens.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Option<Address>,
    /// Removed with the listener, if it made it. Held only for its drop.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A client's socket.
#[derive(Debug)]
pub enum Connection {
    /// Over a unix socket.
    Unix(UnixStream),
    /// Over TCP, ready for small messages that answer each other.
    Tcp(TcpStream),
}

impl Listener {
    /// Listens: on one socket, or on several where a host name has several addresses. All of them get the same port.
    ///
    /// Called in a tokio runtime, as are the other constructors.
    pub async fn bind(address: &Address) -> Result<Vec<Listener>, ListenError> {
        match address {
            Address::Unix(path) => Ok(vec![bind_unix(path).await?]),
            Address::Tcp { host, port, family } => bind_tcp(host, *port, *family).await,
        }
    }

    /// Takes a unix socket that listens already, as from a service manager.
    pub fn from_unix(socket: std::os::unix::net::UnixListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        Ok(Listener::open_already(Socket::Unix(
            UnixListener::from_std(socket)?,
        )))
    }

    /// Takes a TCP socket that listens already.
    pub fn from_tcp(socket: std::net::TcpListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        Ok(Listener::open_already(Socket::Tcp(TcpListener::from_std(
            socket,
        )?)))
    }

    /// Where it listens, with the port that it really has; `None` for a socket that was open already.
    pub fn address(&self) -> Option<&Address> {
        self.address.as_ref()
    }

    /// The next client. No client is lost when it is not polled to the end.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Connection>> {
        Poll::Ready(match &self.socket {
            Socket::Unix(listener) => {
                ready!(listener.poll_accept(cx)).map(|(stream, _)| Connection::Unix(stream))
            }
            Socket::Tcp(listener) => {
                let accepted = ready!(listener.poll_accept(cx));
                accepted.and_then(|(stream, _)| prepared(stream))
            }
        })
    }

    fn open_already(socket: Socket) -> Listener {
        Listener {
            socket,
            address: None,
            _file: None,
        }
    }
}

/// Messages are whole when they are written: there is nothing to wait for. A peer that vanished must not hold its place
/// for ever.
fn prepared(stream: TcpStream) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
    Ok(Connection::Tcp(stream))
}

async fn bind_unix(path: &Path) -> Result<Listener, ListenError> {
    let shown = path.display();
    if path.as_os_str().len() >= UNIX_PATH_BYTES {
        return Err(refused(format!("UNIX socket path '{shown}' is too long")));
    }
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && nobody_listens(path).await {
        fs::remove_file(path).map_err(|error| {
            let reason = reason(&error);
            refused(format!("Failed to unlink socket {shown}: {reason}"))
        })?;
    }
    let failed = |error: io::Error| {
        let reason = reason(&error);
        refused(format!("Failed to bind socket to {shown}: {reason}"))
    };
    Ok(Listener {
        socket: Socket::Unix(UnixListener::bind(path).map_err(failed)?),
        address: Some(Address::Unix(path.to_owned())),
        _file: Some(SocketFile::of(path).map_err(failed)?),
    })
}

async fn nobody_listens(path: &Path) -> bool {
    let error = UnixStream::connect(path).await.err();
    error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

async fn bind_tcp(host: &str, mut port: u16, family: Family) -> Result<Vec<Listener>, ListenError> {
    // `::` takes connections over IPv4 as well; a host without IPv6 has the other one.
    let names: &[&str] = if host.is_empty() {
        &["::", "0.0.0.0"]
    } else {
        &[host]
    };
    let mut listeners = Vec::new();
    let mut failure = None;
    for name in names {
        let addresses = match tokio::net::lookup_host((*name, port)).await {
            Ok(addresses) => addresses,
            Err(error) => {
                failure = Some(unresolved(host, port, &reason(&error)));
                continue;
            }
        };
        for mut address in addresses.filter(|address| family.has(address)) {
            address.set_port(port);
            let bound = async {
                let socket = listen(address, family).await?;
                let port = socket.local_addr()?.port();
                io::Result::Ok((socket, port))
            };
            match bound.await {
                Ok((socket, its_port)) => {
                    port = its_port;
                    listeners.push(Listener {
                        socket: Socket::Tcp(socket),
                        address: Some(Address::Tcp {
                            host: host.to_owned(),
                            port,
                            family,
                        }),
                        _file: None,
                    });
                }
                Err(error) => failure = Some(unbound(&error)),
            }
        }
        if host.is_empty() && !listeners.is_empty() {
            break;
        }
    }
    if listeners.is_empty() {
        return Err(failure.unwrap_or_else(|| unresolved(host, port, "Name or service not known")));
    }
    // One address of several will do: a host may lack IPv6.
    Ok(listeners)
}

async fn listen(address: SocketAddr, family: Family) -> io::Result<TcpListener> {
    if family != Family::V6 {
        return TcpListener::bind(address).await;
    }
    let socket = TcpSocket::new_v6()?;
    socket.set_reuseaddr(true)?;
    rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
    socket.bind(address)?;
    socket.listen(TCP_BACKLOG)
}

fn unresolved(host: &str, port: u16, reason: &str) -> ListenError {
    refused(format!(
        "address resolution failed for {host}:{port}: {reason}"
    ))
}

fn unbound(error: &io::Error) -> ListenError {
    let what = match error.kind() {
        io::ErrorKind::AddrInUse => "Failed to find an available port",
        _ => "Failed to bind socket",
    };
    refused(format!("{what}: {}", reason(error)))
}

fn refused(desc: String) -> ListenError {
    ListenError { desc }
}

/// The system's words for an error, without Rust's additions.
fn reason(error: &io::Error) -> String {
    let text = system_text(error);
    match text.strip_prefix("failed to lookup address information: ") {
        Some(reason) => reason.to_owned(),
        None => text,
    }
}

/// A socket's file, removed on drop unless another one has taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<SocketFile> {
        Ok(SocketFile {
            // The daemon may change its directory.
            path: std::path::absolute(path)?,
            identity: identity(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_forms_read_back_as_they_print() {
        for text in ["unix:/run/a b.sock", "tcp:localhost:10809", "tcp:[::1]:0"] {
            let address = Address::parse(text).unwrap().unwrap();
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn what_is_neither_form_is_left_to_the_long_form() {
        assert_eq!(Address::parse("addr.type=unix"), None);
        for text in ["unix:", "tcp:a", "tcp:a:99999", "tcp:a:"] {
            assert!(Address::parse(text).unwrap().is_err(), "{text}");
        }
    }

    #[test]
    fn families_are_named_as_in_qemu() {
        let (on, off) = (Some(true), Some(false));
        let cases = [
            (None, None, Family::Any),
            (on, on, Family::Any),
            (on, None, Family::V4),
            (on, off, Family::V4),
            (None, off, Family::V4),
            (None, on, Family::V6),
            (off, on, Family::V6),
            (off, None, Family::V6),
        ];
        for (ipv4, ipv6, expected) in cases {
            assert_eq!(Family::of(ipv4, ipv6), Ok(expected), "{ipv4:?} {ipv6:?}");
        }
        assert!(Family::of(off, off).is_err());
    }

    #[tokio::test]
    async fn only_the_family_that_was_asked_for_is_listened_on() {
        let tcp = |host: &str, family| Address::Tcp {
            host: host.to_owned(),
            port: 0,
            family,
        };
        let error = Listener::bind(&tcp("127.0.0.1", Family::V6))
            .await
            .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("address resolution failed for 127.0.0.1:0")
        );
        let port = |listeners: &[Listener]| match listeners.first().and_then(Listener::address) {
            Some(Address::Tcp { port, .. }) => *port,
            other => panic!("{other:?}"),
        };
        let v4 = Listener::bind(&tcp("", Family::V4)).await.unwrap();
        TcpStream::connect(("127.0.0.1", port(&v4))).await.unwrap();
        TcpStream::connect(("::1", port(&v4))).await.unwrap_err();
        // A machine may have no IPv6.
        if let Ok(v6) = Listener::bind(&tcp("", Family::V6)).await {
            TcpStream::connect(("::1", port(&v6))).await.unwrap();
            TcpStream::connect(("127.0.0.1", port(&v6)))
                .await
                .unwrap_err();
        }
    }
}
