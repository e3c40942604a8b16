//! Socket addresses.

use qapi::rt::QmpError;
use qapi::types::{
    InetSocketAddress, InetSocketAddressWrapper, SocketAddress, SocketAddressBranch,
    SocketAddressLegacy, SocketAddressLegacyBranch, UnixSocketAddress, UnixSocketAddressWrapper,
};

use crate::listen::{Address, Family};

/// The form of the command line.
pub(in crate::commands) fn address(address: SocketAddress) -> Result<Address, QmpError> {
    let SocketAddress { r#type } = address;
    match r#type {
        SocketAddressBranch::Inet(data) => inet(data),
        SocketAddressBranch::Unix(data) => Ok(unix(data)),
    }
}

/// The form of `nbd-server-start`, with `data` around the members.
pub(in crate::commands) fn legacy_address(
    address: SocketAddressLegacy,
) -> Result<Address, QmpError> {
    let SocketAddressLegacy { r#type } = address;
    match r#type {
        SocketAddressLegacyBranch::Inet(InetSocketAddressWrapper { data }) => inet(data),
        SocketAddressLegacyBranch::Unix(UnixSocketAddressWrapper { data }) => Ok(unix(data)),
    }
}

fn unix(address: UnixSocketAddress) -> Address {
    let UnixSocketAddress { path } = address;
    Address::Unix(path.into())
}

fn inet(address: InetSocketAddress) -> Result<Address, QmpError> {
    let InetSocketAddress {
        host,
        port,
        // Clients that vanish are always noticed.
        keep_alive: _,
        ipv4,
        ipv6,
    } = address;
    let port = port.parse().map_err(|_| {
        QmpError::generic(format!(
            "address resolution failed for {host}:{port}: Servname not supported for ai_socktype"
        ))
    })?;
    Ok(Address::Tcp {
        host,
        port,
        family: Family::of(ipv4, ipv6).map_err(QmpError::generic)?,
    })
}
