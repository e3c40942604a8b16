//! Where a socket is: the short forms `unix:PATH` and `tcp:HOST:PORT`.

use std::fmt;
use std::path::PathBuf;

/// The address of a listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A TCP port; port 0 lets the system choose.
    Tcp {
        /// A host name or address.
        host: String,
        /// The port.
        port: u16,
    },
}

impl Address {
    /// Reads `unix:PATH` or `tcp:HOST:PORT` (an IPv6 address in brackets); `None` if it is neither form.
    pub(super) fn parse(text: &str) -> Option<Result<Address, String>> {
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
        Some(parse_port(port).map(|port| Address::Tcp {
            host: host.to_owned(),
            port,
        }))
    }
}

/// A port number.
pub(super) fn parse_port(text: &str) -> Result<u16, String> {
    text.parse()
        .map_err(|_| format!("'{text}' is not a port number"))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
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
}
