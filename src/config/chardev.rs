//! `--chardev` and `--monitor`: qemu-storage-daemon's two steps to a QMP socket.

use qapi::rt::decode::{Members, boolean, string};
use qapi::rt::{Path, Value};

use super::{flat, keyval};
use crate::listen::{Address, Family, parse_port};

/// A socket that a `--monitor` of the same command line takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chardev {
    /// The name that `--monitor` refers to.
    pub id: String,
    /// Where it listens.
    pub address: Address,
}

/// A QMP monitor on a character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitor {
    /// The character device.
    pub chardev: String,
    /// Whether replies are spread over lines.
    pub pretty: bool,
}

const CHARDEV_KEYS: &[&str] = &[
    "backend",
    "id",
    "path",
    "host",
    "port",
    "server",
    "wait",
    "ipv4",
    "ipv6",
    "nodelay",
    "telnet",
    "websocket",
    "reconnect",
];

impl Chardev {
    /// Reads `socket,id=,path=|host=,port=,server=on,wait=off`.
    pub(super) fn parse(text: &str) -> Result<Chardev, String> {
        let options = flat::parse(text, Some("backend"), CHARDEV_KEYS)?;
        let at = Path::keyval();
        let decoded = (|| {
            let mut members = Members::open(Value::Object(options), &at)?;
            Ok(Fields {
                backend: members.optional("backend", string)?,
                id: members.optional("id", string)?,
                path: members.optional("path", string)?,
                host: members.optional("host", string)?,
                port: members.optional("port", string)?,
                server: members.optional("server", boolean)?.unwrap_or(false),
                // Accepted and without effect: the daemon never waits for a client before it goes on.
                _wait: members.optional("wait", boolean)?,
                ipv4: members.optional("ipv4", boolean)?,
                ipv6: members.optional("ipv6", boolean)?,
                telnet: members.optional("telnet", boolean)?.unwrap_or(false),
                websocket: members.optional("websocket", boolean)?.unwrap_or(false),
                reconnect: members.optional("reconnect", string)?,
            })
        })();
        let fields = decoded.map_err(|error: qapi::rt::QmpError| error.desc)?;
        fields.check()
    }
}

/// The keys of a socket that mean something here.
struct Fields {
    backend: Option<String>,
    id: Option<String>,
    path: Option<String>,
    host: Option<String>,
    port: Option<String>,
    server: bool,
    _wait: Option<bool>,
    ipv4: Option<bool>,
    ipv6: Option<bool>,
    telnet: bool,
    websocket: bool,
    reconnect: Option<String>,
}

impl Fields {
    fn check(self) -> Result<Chardev, String> {
        let id = self.id.ok_or("chardev: no id specified")?;
        let backend = self
            .backend
            .ok_or_else(|| format!("chardev: \"{id}\" missing backend"))?;
        if backend != "socket" {
            return Err(format!("'{backend}' is not a valid char driver name"));
        }
        if !self.server {
            return Err(
                "chardev: socket: only listening sockets are supported (server=on)".to_owned(),
            );
        }
        // What would change the bytes on the socket is refused. `nodelay` is always on.
        for (name, on) in [("telnet", self.telnet), ("websocket", self.websocket)] {
            if on {
                return Err(format!("chardev: socket: {name}=on is not supported"));
            }
        }
        if self.reconnect.is_some() {
            return Err(
                "'reconnect' option is incompatible with socket in server listen mode".to_owned(),
            );
        }
        let address = match (self.path, self.host) {
            (Some(path), None) => Address::Unix(path.into()),
            (None, Some(host)) => {
                let port = self.port.ok_or("chardev: socket: no port given")?;
                Address::Tcp {
                    host,
                    port: parse_port(&port)?,
                    family: Family::of(self.ipv4, self.ipv6)?,
                }
            }
            (Some(_), Some(_)) => {
                return Err("chardev: socket: both path and host given".to_owned());
            }
            (None, None) => return Err("chardev: socket: no path or host given".to_owned()),
        };
        Ok(Chardev { id, address })
    }
}

impl Monitor {
    /// Reads `[chardev=]name[,mode=control][,pretty=on|off][,id=]`.
    pub(super) fn parse(text: &str) -> Result<Monitor, String> {
        let options = keyval::parse(text, Some("chardev"))?;
        let at = Path::keyval();
        let decoded = (|| {
            let mut members = Members::open(Value::Object(options), &at)?;
            members.optional("id", string)?;
            if let Some(mode) = members.optional("mode", string)?
                && mode != "control"
            {
                return Err(at.member("mode").unknown_name(&mode));
            }
            let pretty = members.optional("pretty", boolean)?.unwrap_or(false);
            let chardev = members.required("chardev", string)?;
            members.finish()?;
            Ok(Monitor { chardev, pretty })
        })();
        decoded.map_err(|error: qapi::rt::QmpError| error.desc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_both_kinds_are_read() {
        let unix = Chardev::parse("socket,id=q,path=/run/q,server=on,wait=off").unwrap();
        assert_eq!(unix.address, Address::Unix("/run/q".into()));
        let tcp = Chardev::parse("socket,id=q,host=localhost,port=4444,server,nowait").unwrap();
        assert_eq!(tcp.address.to_string(), "tcp:localhost:4444");
    }

    #[test]
    fn bad_character_devices_are_named() {
        let cases = [
            ("socket", "chardev: no id specified"),
            ("id=a", "chardev: \"a\" missing backend"),
            ("bogus,id=a", "'bogus' is not a valid char driver name"),
            ("socket,id=a,path=s,bogus=1", "Invalid parameter 'bogus'"),
            (
                "socket,id=a,path=s,server=maybe",
                "Parameter 'server' expects 'on' or 'off'",
            ),
            (
                "socket,id=a,path=s,logfile=l",
                "Invalid parameter 'logfile'",
            ),
            (
                "socket,id=a,path=s,server=on,telnet=on",
                "chardev: socket: telnet=on is not supported",
            ),
            (
                "socket,id=a,path=s,server=on,reconnect=1",
                "'reconnect' option is incompatible with socket in server listen mode",
            ),
            (
                "socket,id=a,host=h,port=1,server=on,ipv4=off,ipv6=off",
                "Cannot disable IPv4 and IPv6 at same time",
            ),
            (
                "socket,id=a,host=h,server=on",
                "chardev: socket: no port given",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(Chardev::parse(text), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_monitor_names_its_character_device_with_or_without_the_key() {
        let expected = Monitor {
            chardev: "q".to_owned(),
            pretty: true,
        };
        assert_eq!(
            Monitor::parse("q,mode=control,pretty=on"),
            Ok(expected.clone())
        );
        assert_eq!(Monitor::parse("chardev=q,pretty=on"), Ok(expected));
        let cases = [
            (
                "x,mode=bogus",
                "Parameter 'mode' does not accept value 'bogus'",
            ),
            ("x,bogus=1", "Parameter 'bogus' is unexpected"),
            ("mode=control", "Parameter 'chardev' is missing"),
        ];
        for (text, expected) in cases {
            assert_eq!(Monitor::parse(text), Err(expected.to_owned()), "{text}");
        }
    }
}
