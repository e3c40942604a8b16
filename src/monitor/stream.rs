//! The two ends of a client's connection.

use tokio::io::{AsyncRead, AsyncWrite};

use super::descriptors::{Descriptors, UnixReader};
use crate::listen::Connection;

/// The two ends of a client's connection, whatever it runs over.
pub(super) struct Stream {
    pub(super) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(super) writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Filled by the reader; stays empty where a transport has none.
    pub(super) descriptors: Descriptors,
}

impl From<Connection> for Stream {
    fn from(connection: Connection) -> Stream {
        let descriptors = Descriptors::default();
        match connection {
            Connection::Unix(stream) => {
                let (reader, writer) = stream.into_split();
                Stream {
                    reader: Box::new(UnixReader::new(reader, descriptors.clone())),
                    writer: Box::new(writer),
                    descriptors,
                }
            }
            Connection::Tcp(stream) => {
                let (reader, writer) = stream.into_split();
                Stream {
                    reader: Box::new(reader),
                    writer: Box::new(writer),
                    descriptors,
                }
            }
        }
    }
}
