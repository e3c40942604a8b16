//! `null-co`: reads zeroes and swallows writes. For tests and for measuring everything above it.

use std::time::Duration;

use crate::driver::{
    BlockStatus, BoxFuture, Child, Driver, DriverInfo, Preallocation, RequestLimits, Requests,
    WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;
use crate::open::NullOptions;

/// A disk without storage.
#[derive(Debug)]
pub struct Null {
    size: u64,
    latency: Duration,
    read_zeroes: bool,
}

impl Null {
    /// A disk as the options say.
    pub fn new(options: &NullOptions) -> Self {
        Null {
            size: options.size,
            latency: Duration::from_nanos(options.latency_ns),
            read_zeroes: options.read_zeroes,
        }
    }

    fn answer<T: Send + 'static>(&self, answer: T) -> BoxFuture<'_, Result<T>> {
        Box::pin(async move {
            if !self.latency.is_zero() {
                tokio::time::sleep(self.latency).await;
            }
            Ok(answer)
        })
    }
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

    fn read(&self, _offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.answer(Data::zeroes(len))
    }

    fn write(&self, _offset: u64, _data: Data, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.answer(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.answer(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        self.answer(())
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.answer(())
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.answer(BlockStatus {
            len,
            allocated: true,
            zero: self.read_zeroes,
            host_offset: Some(offset),
            compressed: false,
        })
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            Err(Error::new(
                ErrorKind::Unsupported,
                "Image format driver does not support resize",
            ))
        })
    }
}

impl Driver for Null {
    fn info(&self) -> DriverInfo {
        DriverInfo {
            driver: "null-co",
            filename: "null-co://".to_owned(),
            actual_size: Some(0),
            ..DriverInfo::default()
        }
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        Vec::new()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
