//! What the header of an image may refer to: a file beside it, in a format that it names.
//!
//! A header is written by whoever made the image, and a guest can write what looks like a header to a raw disk.
//! So it opens plain files only, never a protocol or a `json:` description, and no format is guessed unless the user
//! asked for that.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::{
    Aio, BackingOption, DriverOptions, FileOptions, Locking, NodeOptions, NodeRef, Qcow2Options,
    RawOptions, UnnamedFormat,
};
use crate::error::{Error, ErrorKind, Result};

/// A backing file as an image's header names it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reference<'a> {
    /// The image that refers, as the user named it.
    pub(super) image: &'a str,
    /// The backing file's name.
    pub(super) filename: &'a str,
    /// Its format, if the image names one.
    pub(super) format: Option<&'a str>,
    /// What the user wants where it does not.
    pub(super) unnamed: UnnamedFormat,
}

/// Why a reference without a format is refused, and the ways out.
const NO_FORMAT: &str = "the image does not name its format, which is not guessed: give it with backing.driver=, write \
                         it into the image (qemu-img rebase -u -F), or use --drive format=auto";

/// The options of the backing node: read-only, and otherwise as the image that refers to it.
pub(super) fn options(
    reference: Reference<'_>,
    parent: &NodeOptions,
    aio: Aio,
) -> Result<NodeOptions> {
    let file = NodeRef::Inline(Arc::new(file_options(reference, aio)?));
    let driver = match (reference.format, reference.unnamed) {
        (Some("raw"), _) => DriverOptions::Raw(RawOptions {
            file,
            offset: None,
            size: None,
        }),
        (Some("qcow2"), unnamed) => DriverOptions::Qcow2(Qcow2Options {
            backing: BackingOption::FromImage(unnamed),
            ..Qcow2Options::new(file)
        }),
        (Some(format), _) => {
            return Err(refused(reference, &format!("Unknown driver '{format}'")));
        }
        (None, UnnamedFormat::Probed) => DriverOptions::Probed(file),
        (None, UnnamedFormat::Refused) => return Err(refused(reference, NO_FORMAT)),
    };
    Ok(NodeOptions {
        read_only: true,
        cache: parent.cache,
        ..NodeOptions::new(driver)
    })
}

/// The options of the file that the backing node is on.
pub(super) fn file_options(reference: Reference<'_>, aio: Aio) -> Result<NodeOptions> {
    Ok(NodeOptions::new(DriverOptions::File(FileOptions {
        filename: resolve(reference)?,
        aio,
        locking: Locking::Auto,
    })))
}

/// The path of the backing file: relative names start at the image's folder.
pub(super) fn resolve(reference: Reference<'_>) -> Result<String> {
    let Reference {
        image, filename, ..
    } = reference;
    // In a header, not even behind `file:`.
    if !plain_path(filename).is_ok_and(|plain| protocol(plain).is_none()) {
        return Err(refused(
            reference,
            "only plain files are opened for an image's header; give other kinds in 'backing'",
        ));
    }
    match backing_path(image, filename).to_str() {
        Some(path) => Ok(path.to_owned()),
        None => Err(refused(reference, "its path is not UTF-8")),
    }
}

/// Where the plain file is that the header of an image names: relative names begin in the folder of the image.
pub fn backing_path(image: &str, filename: &str) -> PathBuf {
    let plain = filename.strip_prefix("file:").unwrap_or(filename);
    let folder = Path::new(image).parent().unwrap_or(Path::new(""));
    folder.join(plain)
}

/// The path in a name as QEMU's commands take it: `file:` may stand before it, and no other protocol may. A path with a colon before
/// its first slash begins with `./`.
///
/// # Errors
/// `InvalidInput` with QEMU's text for a name with a protocol, such as `nbd://...` or `json:{...}`.
pub fn plain_path(filename: &str) -> Result<&str> {
    match (filename.strip_prefix("file:"), protocol(filename)) {
        (Some(plain), _) => Ok(plain),
        (None, None) => Ok(filename),
        (None, Some(protocol)) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("Unknown protocol '{protocol}'"),
        )),
    }
}

/// What comes before a colon that is in front of the first slash: `nbd://...`, `json:{...}`.
fn protocol(filename: &str) -> Option<&str> {
    let first = filename.split('/').next().unwrap_or(filename);
    first.split_once(':').map(|(protocol, _)| protocol)
}

fn refused(reference: Reference<'_>, reason: &str) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!(
            "Could not open backing file '{}' of '{}': {reason}",
            reference.filename, reference.image
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(image: &str, filename: &str) -> Option<String> {
        let reference = Reference {
            image,
            filename,
            format: Some("raw"),
            unnamed: UnnamedFormat::Refused,
        };
        let parent = NodeOptions::new(DriverOptions::Null(super::super::NullOptions {
            size: 0,
            read_zeroes: true,
            latency_ns: 0,
        }));
        let options = options(reference, &parent, Aio::Threads).ok()?;
        assert!(options.read_only);
        match options.driver {
            DriverOptions::Raw(RawOptions {
                file: NodeRef::Inline(file),
                ..
            }) => match &file.driver {
                DriverOptions::File(file) => Some(file.filename.clone()),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_are_relative_to_the_image() {
        assert_eq!(path("/a/top", "base").unwrap(), "/a/base");
        assert_eq!(path("top", "base").unwrap(), "base");
        assert_eq!(path("a/top", "../base").unwrap(), "a/../base");
        assert_eq!(path("/a/top", "/b/base").unwrap(), "/b/base");
        assert_eq!(path("/a/top", "file:base").unwrap(), "/a/base");
        assert_eq!(path("/a/top", "./x:y").unwrap(), "/a/./x:y");
    }

    #[test]
    fn a_header_opens_nothing_but_plain_files() {
        for hostile in [
            "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
            "nbd://host/x",
            "file:json:{}",
            "ssh:host",
            "fd:3",
        ] {
            assert_eq!(path("/a/top", hostile), None, "{hostile}");
        }
    }

    #[test]
    fn a_format_is_needed_and_must_be_known() {
        let parent = NodeOptions::new(DriverOptions::Null(super::super::NullOptions {
            size: 0,
            read_zeroes: true,
            latency_ns: 0,
        }));
        for (format, reason) in [
            (None, "does not name its format"),
            (Some("vmdk"), "Unknown driver 'vmdk'"),
        ] {
            let reference = Reference {
                image: "top",
                filename: "base",
                format,
                unnamed: UnnamedFormat::Refused,
            };
            let error = options(reference, &parent, Aio::Threads).unwrap_err();
            assert!(error.message().contains(reason), "{error}");
        }
    }
}
