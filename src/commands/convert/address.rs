//! Socket addresses.

use qapi::rt::QmpError;
use qapi::types::{
    InetSocketAddress, InetSocketAddressWrapper, SocketAddress, SocketAddressBranch,
    SocketAddressLegacy, SocketAddressLegacyBranch, UnixSocketAddress, UnixSocketAddressWrapper,
};

use crate::exports::nbd::ListenAddress;

/// The form of the command line.
pub(in crate::commands) fn address(address: SocketAddress) -> Result<ListenAddress, QmpError> {
    let SocketAddress { r#type } = address;
    match r#type {
        SocketAddressBranch::Inet(data) => inet(data),
        SocketAddressBranch::Unix(data) => Ok(unix(data)),
    }
}

/// The form of `nbd-server-start`, with `data` around the members.
pub(in crate::commands) fn legacy_address(
    address: SocketAddressLegacy,
) -> Result<ListenAddress, QmpError> {
    let SocketAddressLegacy { r#type } = address;
    match r#type {
        SocketAddressLegacyBranch::Inet(InetSocketAddressWrapper { data }) => inet(data),
        SocketAddressLegacyBranch::Unix(UnixSocketAddressWrapper { data }) => Ok(unix(data)),
    }
}

fn unix(address: UnixSocketAddress) -> ListenAddress {
    let UnixSocketAddress { path } = address;
    ListenAddress::Unix(path.into())
}

fn inet(address: InetSocketAddress) -> Result<ListenAddress, QmpError> {
    let InetSocketAddress { host, port } = address;
    let port = port.parse().map_err(|_| {
        QmpError::generic(format!(
            "address resolution failed for {host}:{port}: Servname not supported for ai_socktype"
        ))
    })?;
    Ok(ListenAddress::Tcp { host, port })
}
