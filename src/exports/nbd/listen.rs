//! Where a server listens: unix and TCP sockets.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream as BlockingUnixStream;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll};

use block::error::{Error, ErrorKind, Result};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// An address to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// A TCP socket.
    Tcp {
        /// A name or an address; empty for all addresses of the host.
        host: String,
        /// 0 for a free one.
        port: u16,
    },
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Unix(path) => write!(f, "{}", path.display()),
            ListenAddress::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// A connection's socket.
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A socket that accepts connections. Dropping it removes a unix socket's file.
pub(super) struct Listener {
    socket: Socket,
    address: ListenAddress,
}

enum Socket {
    Unix {
        listener: UnixListener,
        /// Kept for its drop.
        _file: SocketFile,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `address`: one socket, or several where a host name has several addresses.
    pub(super) async fn bind(address: &ListenAddress) -> Result<Vec<Listener>> {
        match address {
            ListenAddress::Unix(path) => {
                let (socket, file) =
                    bind_unix(path).map_err(|error| Error::io(bind_failure(address), &error))?;
                Ok(vec![Listener {
                    socket: Socket::Unix {
                        listener: socket,
                        _file: file,
                    },
                    address: address.clone(),
                }])
            }
            ListenAddress::Tcp { host, port } => bind_tcp(host, *port).await,
        }
    }

    /// The address, with the port that it really has.
    pub(super) fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// The next connection.
    pub(super) fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        match &self.socket {
            Socket::Unix { listener, .. } => listener
                .poll_accept(cx)
                .map_ok(|(stream, _)| Stream::Unix(stream)),
            Socket::Tcp(listener) => listener
                .poll_accept(cx)
                .map_ok(|(stream, _)| Stream::Tcp(stream)),
        }
    }
}

fn bind_failure(address: &ListenAddress) -> String {
    match address {
        ListenAddress::Unix(path) => format!("Failed to bind socket to {}", path.display()),
        ListenAddress::Tcp { .. } => "Failed to find an available port".into(),
    }
}

async fn bind_tcp(host: &str, port: u16) -> Result<Vec<Listener>> {
    let name = if host.is_empty() { "::" } else { host };
    let addresses = tokio::net::lookup_host((name, port))
        .await
        .map_err(|error| {
            let text = format!("address resolution failed for {host}:{port}");
            Error::io(text, &error)
        })?;
    let mut listeners: Vec<Listener> = Vec::new();
    let mut failure = None;
    for mut address in addresses {
        // All addresses of a name get the same port, also when the system chooses it.
        if let (0, Some(first)) = (port, listeners.first())
            && let ListenAddress::Tcp { port, .. } = first.address
        {
            address.set_port(port);
        }
        let bound = async {
            let socket = TcpListener::bind(address).await?;
            let port = socket.local_addr()?.port();
            io::Result::Ok((socket, port))
        };
        match bound.await {
            Ok((socket, port)) => listeners.push(Listener {
                socket: Socket::Tcp(socket),
                address: ListenAddress::Tcp {
                    host: host.to_owned(),
                    port,
                },
            }),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        // One address of several will do: a host may lack IPv6.
        Some(error) if listeners.is_empty() => {
            let address = ListenAddress::Tcp {
                host: host.to_owned(),
                port,
            };
            Err(Error::io(bind_failure(&address), &error))
        }
        None if listeners.is_empty() => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("address resolution failed for {host}:{port}: no address"),
        )),
        _ => Ok(listeners),
    }
}

fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    remove_if_stale(path)?;
    let socket = UnixListener::bind(path)?;
    let file = SocketFile::of(path)?;
    Ok((socket, file))
}

/// Removes a socket at which nobody listens any more: what a killed server leaves. Anything else stays, and binding fails.
fn remove_if_stale(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match BlockingUnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}

/// The file of a unix socket, removed on drop if it is still the one that was made.
struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(SocketFile {
            // The process may change its working directory.
            path: std::path::absolute(path)?,
            identity: identity(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|present| present == self.identity) {
            // One that cannot be removed is stale, and will be replaced.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let file = std::fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}
