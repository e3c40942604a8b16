//! Serves one disk over NBD, without a daemon around it: for measurements of the server alone, and for trying tools.
//!
//! ```text
//! cargo run --release --example nbd_serve -- /tmp/nbd.sock null:1G
//! cargo run --release --example nbd_serve -- /tmp/nbd.sock memory:1G
//! cargo run --release --example nbd_serve -- /tmp/nbd.sock file:disk.img
//! fio --name=x --ioengine=nbd --uri='nbd+unix:///disk?socket=/tmp/nbd.sock' --rw=randread --bs=4k --iodepth=32
//! ```

use std::error::Error;
use std::sync::Arc;

use block::driver::{
    BlockStatus, BoxFuture, Preallocation, RequestLimits, Requests, WriteFlags, ZeroFlags,
};
use block::error::Result;
use block::io::{Data, IoContext};
use block::open::{Aio, CacheMode, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};
use block::protocols::memory::Memory;
use bytes::Bytes;
use qblockd::exports::nbd::{NbdExportOptions, NbdServer, NbdServerOptions};
use qblockd::listen::Address;

/// Answers at once, with bytes of no meaning: what is left is the cost of the server. As QSD's null-co without
/// `read-zeroes`.
struct Null {
    size: u64,
}

static BYTES: [u8; 32 << 20] = [0; 32 << 20];

fn ready<T: Send + 'static>(value: T) -> BoxFuture<'static, Result<T>> {
    Box::pin(std::future::ready(Ok(value)))
}

impl Requests for Null {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> RequestLimits {
        RequestLimits {
            alignment: 1,
            preferred: 4096,
            growable: false,
        }
    }

    fn read(&self, _: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        ready(Bytes::from_static(&BYTES[..len as usize]).into())
    }

    fn write(&self, _: u64, _: Data, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        ready(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        ready(())
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<()>> {
        ready(())
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        ready(())
    }

    fn block_status(&self, _: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        ready(BlockStatus {
            len,
            allocated: true,
            zero: false,
            host_offset: None,
            compressed: false,
        })
    }

    fn resize(&self, _: u64, _: Preallocation) -> BoxFuture<'_, Result<()>> {
        ready(())
    }
}

/// `512M`, `1G` or a number of bytes.
fn size(text: &str) -> std::result::Result<u64, Box<dyn Error>> {
    let (digits, unit) = match text.strip_suffix('G') {
        Some(digits) => (digits, 1 << 30),
        None => match text.strip_suffix('M') {
            Some(digits) => (digits, 1 << 20),
            None => (text, 1),
        },
    };
    Ok(digits.parse::<u64>()? * unit)
}

async fn open(disk: &str) -> std::result::Result<Arc<dyn Requests>, Box<dyn Error>> {
    match disk.split_once(':') {
        Some(("null", bytes)) => Ok(Arc::new(Null { size: size(bytes)? })),
        Some(("memory", bytes)) => Ok(Memory::new(size(bytes)?)),
        Some(("file", path)) => {
            let options = FileOptions {
                filename: path.to_owned(),
                aio: Aio::Threads,
                locking: Locking::Auto,
            };
            let access = FileAccess {
                read_only: false,
                auto_read_only: false,
                cache: CacheMode::default(),
            };
            Ok(Arc::new(
                File::open(&IoContext::new(), &options, access).await?,
            ))
        }
        _ => Err("a disk is null:SIZE, memory:SIZE or file:PATH".into()),
    }
}

async fn serve(socket: &str, disk: &str) -> std::result::Result<(), Box<dyn Error>> {
    let node = open(disk).await?;
    let options = NbdServerOptions::new(vec![Address::Unix(socket.into())]);
    let (events, _) = tokio::sync::mpsc::unbounded_channel();
    let server = NbdServer::start(options, events).await?;
    let export = NbdExportOptions {
        id: "disk".into(),
        name: "disk".into(),
        node_name: disk.into(),
        writable: true,
        ..NbdExportOptions::default()
    };
    server.add(export, node)?;
    println!("nbd+unix:///disk?socket={socket}");
    tokio::signal::ctrl_c().await?;
    server.stop().await;
    Ok(())
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (socket, disk, threads) = match &arguments[..] {
        [socket, disk] => (socket, disk, 0),
        [socket, disk, threads] => (socket, disk, threads.parse()?),
        _ => return Err("usage: nbd_serve SOCKET DISK [THREADS]".into()),
    };
    let mut builder = match threads {
        0 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = builder
        .worker_threads(threads.max(1))
        .enable_all()
        .build()?;
    runtime.block_on(serve(socket, disk))
}
