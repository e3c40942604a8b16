//! The sockets that clients connect to.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::descriptors::{Descriptors, UnixReader};

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
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
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

/// A listening socket. Made from an [`Address`], or from one that is open already.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    /// Removed with the listener, if it made it. Held only for its drop.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// The two ends of a client's connection, whatever it runs over.
pub(super) struct Stream {
    pub(super) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Filled by the reader; stays empty where a transport has none.
    pub(super) descriptors: Descriptors,
}

impl Listener {
    /// Opens a socket and listens. A socket file that nobody listens on any more is replaced.
    ///
    /// Called in a tokio runtime, as are the other constructors.
    pub async fn bind(address: &Address) -> Result<Listener, ListenError> {
        match address {
            Address::Unix(path) => bind_unix(path).await,
            Address::Tcp { host, port } => Ok(Listener {
                socket: Socket::Tcp(bind_tcp(host, *port).await?),
                _file: None,
            }),
        }
    }

    /// Takes a Unix socket that listens already, as from a service manager.
    pub fn from_unix(socket: std::os::unix::net::UnixListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        Ok(Listener {
            socket: Socket::Unix(UnixListener::from_std(socket)?),
            _file: None,
        })
    }

    /// Takes a TCP socket that listens already.
    pub fn from_tcp(socket: std::net::TcpListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        Ok(Listener {
            socket: Socket::Tcp(TcpListener::from_std(socket)?),
            _file: None,
        })
    }

    /// The port a TCP socket got.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Unix(_) => None,
            Socket::Tcp(socket) => socket.local_addr().ok(),
        }
    }

    /// Waits for a client.
    ///
    /// # Cancellation
    /// No client is lost.
    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Unix(socket) => {
                let (stream, _) = socket.accept().await?;
                let (reader, writer) = stream.into_split();
                let descriptors = Descriptors::default();
                Ok(Stream {
                    reader: Box::new(UnixReader::new(reader, descriptors.clone())),
                    writer: Box::new(writer),
                    descriptors,
                })
            }
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept().await?;
                // Replies are whole when they are written: there is nothing to wait for.
                stream.set_nodelay(true)?;
                // A peer that vanished must not hold its place for ever.
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                let (reader, writer) = stream.into_split();
                Ok(Stream {
                    reader: Box::new(reader),
                    writer: Box::new(writer),
                    descriptors: Descriptors::default(),
                })
            }
        }
    }
}

async fn bind_unix(path: &Path) -> Result<Listener, ListenError> {
    // sun_path holds 108 bytes with the NUL (unix(7)).
    const PATH_BYTES: usize = 108;
    let shown = path.display();
    if path.as_os_str().len() >= PATH_BYTES {
        return Err(refused(format!("UNIX socket path '{shown}' is too long")));
    }
    let is_socket = |path: &Path| {
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
    };
    // Unlike QEMU we neither delete files that are no sockets nor take a living server's place.
    if is_socket(path) && nobody_listens(path).await {
        fs::remove_file(path).map_err(|error| {
            refused(format!(
                "Failed to unlink socket {shown}: {}",
                reason(&error)
            ))
        })?;
    }
    let failed = |error: io::Error| {
        refused(format!(
            "Failed to bind socket to {shown}: {}",
            reason(&error)
        ))
    };
    let socket = UnixListener::bind(path).map_err(failed)?;
    let file = SocketFile::new(path).map_err(failed)?;
    Ok(Listener {
        socket: Socket::Unix(socket),
        _file: Some(file),
    })
}

async fn nobody_listens(path: &Path) -> bool {
    let error = UnixStream::connect(path).await.err();
    error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

async fn bind_tcp(host: &str, port: u16) -> Result<TcpListener, ListenError> {
    let all = ["::".to_owned(), "0.0.0.0".to_owned()];
    let named = [host.to_owned()];
    let hosts = if host.is_empty() { &all[..] } else { &named };
    let mut last: Option<ListenError> = None;
    for host in hosts {
        let addresses = match tokio::net::lookup_host((host.as_str(), port)).await {
            Ok(addresses) => addresses,
            Err(error) => {
                last = Some(refused(format!(
                    "address resolution failed for {host}:{port}: {}",
                    reason(&error)
                )));
                continue;
            }
        };
        for address in addresses {
            match TcpListener::bind(address).await {
                Ok(socket) => return Ok(socket),
                Err(error) => last = Some(bind_failed(&error)),
            }
        }
    }
    Err(last.unwrap_or_else(|| refused(format!("{host}:{port} has no address"))))
}

fn bind_failed(error: &io::Error) -> ListenError {
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
    let text = error.to_string();
    let text = text
        .strip_prefix("failed to lookup address information: ")
        .unwrap_or(&text);
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_owned()
}

/// A socket file, removed on drop unless another one has taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<SocketFile> {
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
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}
