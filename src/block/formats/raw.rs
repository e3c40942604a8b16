//! `raw`: the bytes of the layer below as they are, or a window of them.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::driver::{
    BlockStatus, BoxFuture, Child, Driver, DriverInfo, DriverSettings, NewFile, Preallocation,
    ReopenOptions, Reopening, RequestLimits, Requests, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Data, HostRange};

/// A window of the layer below.
#[derive(Debug)]
pub struct Raw {
    file: Child,
    window: Arc<ArcSwap<Window>>,
    /// What the disk must not begin with.
    banned: Option<&'static [u8]>,
}

/// What is seen of which file. Changed while nobody looks.
#[derive(Debug)]
struct Window {
    filename: String,
    offset: u64,
    /// `None`: up to the end of the layer below, wherever that is by then.
    len: Option<u64>,
}

impl Window {
    /// A window of a file that has it.
    fn of(file: &Child, filename: String, offset: u64, size: Option<u64>) -> Result<Window> {
        let actual = file.size();
        if offset > actual {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "Offset ({offset}) cannot be greater than size of the containing file ({actual})"
                ),
            ));
        }
        if let Some(size) = size
            && size > actual - offset
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to \
                     the actual size of the containing file ({actual})"
                ),
            ));
        }
        Ok(Window {
            filename,
            offset,
            len: size,
        })
    }
}

/// A driver with another window.
struct Reopened {
    place: Arc<ArcSwap<Window>>,
    window: Window,
}

impl Reopening for Reopened {
    fn commit(self: Box<Self>) {
        self.place.store(Arc::new(self.window));
    }
}

impl Raw {
    /// A window from `offset` (0 if missing) of `size` bytes (to the end if missing). `filename` is what queries show.
    pub fn new(
        file: Child,
        filename: String,
        offset: Option<u64>,
        size: Option<u64>,
    ) -> Result<Self> {
        let window = Window::of(&file, filename, offset.unwrap_or(0), size)?;
        Ok(Raw {
            file,
            window: Arc::new(ArcSwap::from_pointee(window)),
            banned: None,
        })
    }

    /// All of a disk that was found to be raw because it does not begin with `magic`. It never will: a guest that could
    /// write that would make the next look at the disk find an image, with a backing file of the guest's choice.
    pub fn probed(file: Child, filename: String, magic: &'static [u8]) -> Self {
        let window = Window {
            filename,
            offset: 0,
            len: None,
        };
        Raw {
            file,
            window: Arc::new(ArcSwap::from_pointee(window)),
            banned: Some(magic),
        }
    }

    /// Refuses what could complete the banned bytes: whichever write does that agrees with them where it overlaps them.
    fn check_banned(&self, offset: u64, data: &Data) -> Result<()> {
        let Some(rest) = self
            .banned
            .and_then(|magic| magic.get(usize::try_from(offset).ok()?..))
            .filter(|rest| !rest.is_empty() && !data.is_empty())
        else {
            return Ok(());
        };
        let start = data.slice(0, data.len().min(rest.len() as u64)).to_bytes();
        if !rest.starts_with(&start) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::PermissionDenied,
            format!(
                "Writing the beginning of an image to '{}' is refused, because its format was probed; \
                 type format=raw to allow it",
                self.window.load().filename
            ),
        ))
    }

    /// The range in the layer below. A window of fixed size has an end; another grows with its file.
    fn shift(&self, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len);
        let window = self.window.load();
        if end.is_none_or(|end| window.len.is_some_and(|size| end > size)) {
            return Err(self.out_of_range(offset, len));
        }
        window
            .offset
            .checked_add(offset)
            .ok_or_else(|| self.out_of_range(offset, len))
    }

    fn out_of_range(&self, offset: u64, len: u64) -> Error {
        Error::new(
            ErrorKind::OutOfRange,
            format!("Request at {offset} of {len} bytes is outside of the window"),
        )
    }

    async fn do_block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let below = self.shift(offset, len)?;
        let status = self.file.block_status(below, len).await?;
        // What the layer below says about itself is about our bytes too; they lie where they were asked for.
        Ok(BlockStatus {
            host_offset: Some(below),
            ..status
        })
    }

    async fn do_resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if self.window.load().len.is_some() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Cannot resize fixed-size raw disks",
            ));
        }
        let offset = self.window.load().offset;
        let end = offset.checked_add(size).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                "Disk size too large for the chosen offset",
            )
        })?;
        self.file.resize(end, preallocation).await
    }
}

impl Requests for Raw {
    fn size(&self) -> u64 {
        let window = self.window.load();
        window
            .len
            .unwrap_or_else(|| self.file.size().saturating_sub(window.offset))
    }

    fn limits(&self) -> RequestLimits {
        RequestLimits {
            // The node below widens what does not fit it.
            alignment: 1,
            preferred: self.file.limits().preferred,
            growable: self.window.load().len.is_none() && self.file.limits().growable,
        }
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        match self.shift(offset, len) {
            Ok(below) => self.file.read(below, len),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        let allowed = self.check_banned(offset, &data);
        match allowed.and_then(|()| self.shift(offset, data.len())) {
            Ok(below) => self.file.write(below, data, flags),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn write_pieces(&self, pieces: Vec<(u64, Data)>) -> BoxFuture<'_, Result<()>> {
        let shift = |(at, data): (u64, Data)| {
            self.check_banned(at, &data)?;
            Ok((self.shift(at, data.len())?, data))
        };
        match pieces.into_iter().map(shift).collect::<Result<Vec<_>>>() {
            Ok(below) => self.file.write_pieces(below),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        match self.shift(offset, len) {
            Ok(below) => self.file.write_zeroes(below, len, flags),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        match self.shift(offset, len) {
            Ok(below) => self.file.discard(below, len),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.file.flush()
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(self.do_block_status(offset, len))
    }

    fn host_range(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Option<HostRange>>> {
        match self.shift(offset, len) {
            Ok(below) => self.file.host_range(below, len),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn write_shared(&self, offset: u64, from: HostRange) -> BoxFuture<'_, Result<()>> {
        // What is not seen cannot be told from the banned bytes.
        let banned = self.banned.is_some_and(|magic| offset < magic.len() as u64);
        match self.shift(offset, from.len()) {
            Ok(_) if banned => Box::pin(async {
                let text = "The beginning of a probed image is not shared";
                Err(Error::new(ErrorKind::Unsupported, text))
            }),
            Ok(below) => self.file.write_shared(below, from),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.do_resize(size, preallocation))
    }
}

impl Driver for Raw {
    fn info(&self) -> DriverInfo {
        DriverInfo {
            driver: "raw",
            filename: self.window.load().filename.clone(),
            ..DriverInfo::default()
        }
    }

    fn is_window(&self) -> bool {
        true
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        vec![("file", self.file.clone())]
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn reopen(&self, options: ReopenOptions) -> BoxFuture<'_, Result<Box<dyn Reopening>>> {
        Box::pin(async move {
            let old = self.window.load_full();
            let (offset, size) = match options.settings {
                Some(DriverSettings::Raw { offset, size }) => (offset, size),
                Some(DriverSettings::File { .. } | DriverSettings::Qcow2 { .. }) | None => {
                    (old.offset, old.len)
                }
            };
            let window = match options.file {
                Some(NewFile { child, filename }) => Window::of(&child, filename, offset, size),
                None => Window::of(&self.file, old.filename.clone(), offset, size),
            };
            let reopened = Reopened {
                place: self.window.clone(),
                window: window?,
            };
            Ok(Box::new(reopened) as Box<dyn Reopening>)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocols::memory::Memory;

    fn window(offset: Option<u64>, size: Option<u64>) -> Result<Raw> {
        let content: Vec<u8> = (0..100).collect();
        let memory = Memory::with_content(&content);
        Raw::new(memory.child(), "image".to_owned(), offset, size)
    }

    #[tokio::test]
    async fn a_window_shows_its_part_only() {
        let raw = window(Some(10), Some(20)).unwrap();
        assert_eq!(raw.size(), 20);
        assert_eq!(raw.read(5, 3).await.unwrap().to_bytes(), [15, 16, 17][..]);
        let data = Data::from(vec![1, 2]);
        raw.write(18, data.clone(), WriteFlags::default())
            .await
            .unwrap();
        assert_eq!(
            raw.file.read(28, 3).await.unwrap().to_bytes(),
            [1, 2, 30][..]
        );
        let beyond = raw.write(19, data, WriteFlags::default()).await;
        assert_eq!(beyond.unwrap_err().kind(), ErrorKind::OutOfRange);
        assert!(raw.read(u64::MAX, 2).await.is_err());
        assert_eq!(raw.block_status(0, 20).await.unwrap().host_offset, Some(10));
    }

    #[tokio::test]
    async fn an_open_ended_window_is_resized_with_its_file() {
        let raw = window(Some(10), None).unwrap();
        assert_eq!(raw.size(), 90);
        raw.resize(50, Preallocation::Off).await.unwrap();
        assert_eq!((raw.size(), raw.file.size()), (50, 60));
        let fixed = window(None, Some(20)).unwrap();
        assert!(fixed.resize(10, Preallocation::Off).await.is_err());
    }

    #[test]
    fn a_window_outside_of_the_file_is_refused() {
        assert_eq!(
            window(Some(101), None).unwrap_err().message(),
            "Offset (101) cannot be greater than size of the containing file (100)"
        );
        assert!(window(Some(90), Some(10)).is_ok());
        assert!(window(Some(90), Some(11)).is_err());
        assert!(window(Some(1), Some(u64::MAX)).is_err());
    }

    #[tokio::test]
    async fn a_probed_disk_never_begins_as_an_image() {
        let memory = Memory::with_content(&[0; 64]);
        let raw = Raw::probed(memory.child(), "image".to_owned(), b"QFI\xfb");
        let write = |offset, bytes: &[u8]| {
            raw.write(offset, Data::from(bytes.to_vec()), WriteFlags::default())
        };
        for (offset, bytes) in [
            (0, &b"QFI\xfb and more"[..]),
            (0, b"Q"),
            (1, b"FI\xfb"),
            (3, b"\xfb\0\0"),
        ] {
            let error = write(offset, bytes).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{bytes:?}");
        }
        for (offset, bytes) in [
            (0, &b"QFI\xfc"[..]),
            (1, b"FI\0\xfb"),
            (4, b"QFI\xfb"),
            (0, b""),
        ] {
            write(offset, bytes).await.unwrap();
        }
    }
}
